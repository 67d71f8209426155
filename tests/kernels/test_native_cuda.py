"""The CUDA operators without a GPU: their kernels run emulated on the CPU, their library loads, and
what nvcc made of them fits the registers."""

import contextlib
import json
import math
import re
import shutil
import subprocess
from functools import cache, partial
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

from rodimus_kernels import blocks_step, build, linear, native, native_block
from rodimus_kernels.testing import relative_error

EMULATOR = Path(__file__).parent / "cuda_emulator"
CONFIGS = Path(__file__).parents[2] / "configs/model"


def compiled(folder, name, *flags, files=()):
    """A program of the emulator."""
    try:
        cxx = build._cxx()
    except build.Unavailable as reason:
        pytest.skip(f"the emulator cannot be built: {reason}")
    includes = [f"-I{EMULATOR}", f"-I{build.sources()}"]
    files = [EMULATOR / f"{name}.cpp", *(build.sources() / file for file in files)]
    # with it, glibc refuses jumps to another stack
    flags = ["-std=c++17", "-O1", "-w", "-U_FORTIFY_SOURCE", *flags]
    command = [cxx, *flags, *includes, *map(str, files)]
    subprocess.run([*command, "-o", str(folder / name)], check=True)
    return folder / name


# What may happen early or late, as late as it may, or as early: copies under way, and what a kernel
# does before its turn, which then sees nothing that the kernel before writes.
SCHEDULES = {"late": {}, "eager": {"EMULATOR_EAGER": "1"}}


@pytest.fixture(scope="module")
def compare(tmp_path_factory):
    """The program that compares the emulated CUDA kernels with the CPU kernels."""
    flags = ["-DRODIMUS_ISA=portable", '-DRODIMUS_ISA_NAME="portable"', "-DRODIMUS_HAS_portable"]
    files = ("cpu/kernels.cpp", "cpu/select.cpp")
    return compiled(tmp_path_factory.mktemp("emulator"), "compare", *flags, files=files)


@pytest.fixture(scope="module", params=SCHEDULES)
def differences(compare, request):
    """Case to the largest difference between the emulated CUDA kernel and the CPU kernel."""
    environment = SCHEDULES[request.param]
    done = subprocess.run([compare], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    return {name: float(value) for name, value in map(str.split, done.stdout.splitlines())}


@pytest.mark.parametrize(
    "kernel",
    [
        *("ddts_step", "mixer_step", "conv_step", "linear", "norm"),
        *("attention_staged", "attention_any", "attention_int8_staged", "attention_int8_any"),
    ],
)
def test_emulated_kernels_equal_the_cpu(differences, kernel):
    for dtype, limit in {"float32": 2e-6, "bfloat16": 2**-7}.items():
        found = {n: x for n, x in differences.items() if n.startswith(f"{kernel}-{dtype}")}
        assert len(found) >= 2
        assert all(x <= limit for x in found.values()), found


def test_emulated_mixer_keeps_its_state_in_float32(differences):
    found = {n: x for n, x in differences.items() if n.startswith("mixer_state-")}
    assert len(found) >= 4
    assert all(x <= 2e-6 for x in found.values()), found


def test_emulated_mixer_leaves_the_factor_of_its_norm(differences):
    found = {n: x for n, x in differences.items() if n.startswith("mixer_scaled-")}
    assert len(found) >= 2
    assert all(x <= 2**-7 for x in found.values()), found


@pytest.mark.parametrize("kind", ["norm", "add", "scaled", "squares", "gate", "conv"])
def test_emulated_linear_steps_equal_the_cpu(differences, kind):
    """bfloat16 throughout; the CPU rounds where they do, so a sum may fall on the other side: a
    step of the largest result, 2^-7 of it at most."""
    limit = {"squares": 1e-4}.get(kind, 2**-7)
    found = {n: x for n, x in differences.items() if n.startswith(f"step_linear_{kind}-")}
    assert len(found) >= 2
    assert all(x <= limit for x in found.values()), found


@pytest.fixture(scope="module")
def block_program(tmp_path_factory):
    """The program that runs one block of the model."""
    return compiled(tmp_path_factory.mktemp("block"), "block", "-O2")


@pytest.fixture(scope="module", params=SCHEDULES)
def emulated_block(block_program, request):
    return block_step(block_program, SCHEDULES[request.param])


def block_step(program, environment):
    """``blocks_step`` by the kernel of a whole block, on so many multiprocessors of so much shared
    memory, or by those of its parts where that is 0."""
    integers = lambda *x: torch.tensor(x, dtype=torch.int64)
    kinds = {torch.float32: 0, torch.bfloat16: 1, torch.int64: 2}

    def array(x):
        rows = x.reshape(1, -1) if x.dim() == 1 else x.flatten(0, -2)
        return [integers(kinds[x.dtype], *rows.shape), rows]

    def step(stream, weights, *states, processors, shared, head_dim, window_size, **eps):
        taps, state, ring, position, rotary = states
        attends = ring is not None
        written = [integers(processors, shared, attends, head_dim, window_size)]
        written += [torch.tensor([eps["key_eps"], eps["norm_eps"]], dtype=torch.float64)]
        changed = [stream.clone(), taps, state, *([ring] if attends else [])]
        if attends:
            # rows that hold no token yet may hold anything
            unwritten = torch.arange(ring.shape[1]) > position[:, None]
            kept = ring[unwritten]
            ring[unwritten] = torch.nan
        for x in (*(x for x in weights if x is not None), *changed):
            written += array(x.contiguous())
        for x in (position, *rotary) if attends else ():
            written += array(x.contiguous())
        data = b"".join(bytes(x.contiguous().view(torch.uint8).numpy()) for x in written)
        done = subprocess.run([program], input=data, capture_output=True, env=environment)
        assert done.returncode == 0, done.stderr.decode()
        found = torch.frombuffer(bytearray(done.stdout), dtype=torch.uint8)
        parts = found.split([x.nbytes for x in changed])
        for x, part in zip(changed, parts, strict=True):
            x.copy_(part.view(x.dtype).view(x.shape))
        if attends:
            assert ring[unwritten].isnan().all()
            ring[unwritten] = kept
        return changed[0]

    return step


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_emulator_shows_what_is_done_before_the_turn(tmp_path, schedule):
    program, options = compiled(tmp_path, "turns"), {"capture_output": True, "text": True}
    run = lambda what: subprocess.run([program, what], env=SCHEDULES[schedule], **options)
    sum_of = lambda what: float(run(what).stdout)
    early = schedule == "eager"
    # 32 threads of two blocks, of which 32 together read something more
    assert sum_of("nothing") == 64 and sum_of("read older") == 96
    assert math.isnan(sum_of("read newer")) if early else sum_of("read newer") == 96
    assert ("writes before its turn" in run("write").stderr) == early
    assert "ends without its turn" in run("end").stderr


# sequences, multiprocessors, shared memory for two, four or six stages of weights, sizes
HEADS = {"dim": 128, "rank": 8}
PERSISTENT = {
    "rodimus_one_row": (1, 3, 115_000, {"width": 136, "inner": 208, "keys": 16, "rank": 8}),
    "rodimus_odd": (3, 2, 232_448, {"width": 72, "inner": 88, "keys": 100, "rank": 3}),
    # more inputs than one unit for each warp
    "rodimus_wide": (2, 3, 232_448, {"width": 72, "inner": 1160, "keys": 16, "rank": 8}),
    "plus_one_row": (1, 3, 166_912, {"width": 256, "inner": 96, "keys": 16, **HEADS}),
    "plus_heads": (2, 2, 232_448, {"width": 512, "inner": 40, "keys": 8, **HEADS}),
    # threads that fill no part of the window, and more parts than a few
    "plus_six_heads": (1, 3, 166_912, {"width": 768, "inner": 40, "keys": 8, **HEADS, "rows": 40}),
    # several groups of keys to a part, past the ring's end for some
    "plus_eight_rows": (
        8,
        2,
        232_448,
        {"width": 256, "inner": 96, "keys": 66, **HEADS, "rows": 19},
    ),
}


def check_whole_block(step, batch, sizes, device="cpu"):
    """Three tokens against the reference."""
    from tests.kernels import test_block as block

    torch.manual_seed(0)
    attends, rows = "dim" in sizes, sizes.get("rows", 8)
    of_weights = {name: size for name, size in sizes.items() if name not in ("rows", "age")}
    of_states = {name: size for name, size in sizes.items() if name not in ("rank", "mlp")}
    weights = block.weights_of(torch.bfloat16, attends, **({"mlp": 72} | of_weights))
    turned = {"turned": 64} if attends else {}
    states = block.states_of(torch.bfloat16, batch, attends, **of_states, **turned)
    named = {"head_dim": sizes.get("dim", block.NAMED["head_dim"]), "window_size": rows - 2}
    block.assert_equals_reference(step, weights, states, device, **named)


# the longest
SLOW = {("plus_six_heads", "persistent"), ("plus_eight_rows", "persistent")}
FORMS = [
    pytest.param(case, form, marks=[pytest.mark.slow] if (case, form) in SLOW else [])
    for case in PERSISTENT
    for form in ("persistent", "parts")
]


@pytest.mark.parametrize("case, form", FORMS)
def test_emulated_block_equals_the_reference(emulated_block, case, form):
    batch, processors, shared, sizes = PERSISTENT[case]
    shared = 0 if form == "parts" else shared
    check_whole_block(partial(emulated_block, processors=processors, shared=shared), batch, sizes)


@pytest.fixture(scope="module")
def watched(sanitizer, tmp_path_factory):
    """Compiles a program of the emulator in which two accesses that no barrier orders are an
    error."""
    if not sanitizer:
        pytest.skip("the thread sanitizer does not work here")
    folder = tmp_path_factory.mktemp("watched")
    return lambda name: compiled(folder, name, "-g", *sanitizer)


@pytest.mark.slow
def test_emulator_sees_races(watched):
    """By what is between a write and a read, and whether one warp, block or grid has both."""
    program, scopes = watched("races"), ("warp", "block", "grid")
    run = lambda *what: subprocess.run([program, *what], capture_output=True, env={})
    for place, between in enumerate((*scopes, "shuffle", "nothing")):
        ordered = scopes[: place + 1] if between in scopes else ()
        for whose in scopes:
            found = b"data race" in run(between, whose).stderr
            assert found == (whose not in ordered), (between, whose)


@pytest.mark.slow
def test_whole_block_has_no_races(watched):
    step = block_step(watched("block"), {"TSAN_OPTIONS": "halt_on_error=1"})
    for case, shared in (("plus_one_row", 166_912), ("rodimus_one_row", 0)):
        batch, *_, sizes = PERSISTENT[case]
        check_whole_block(partial(step, processors=2, shared=shared), batch, sizes)


MOST_INPUTS = {"width": 72, "inner": 6144, "keys": 8, "rank": 8}


def test_only_the_persistent_kernel_takes_eight_rows_of_the_4b():
    """The ten kernels have the shared memory of any GPU, it has that of its own."""
    from tests.kernels import test_block as block

    weights = block.weights_of(torch.bfloat16, False, **MOST_INPUTS)
    fits = lambda rows, persistent: native_block._is_one_call(rows, weights, None, None, persistent)
    assert fits(7, False) and not fits(8, False) and fits(8, True) and not fits(9, True)


def test_rows_of_a_stream_that_start_between_16_bytes_are_seen():
    wide = torch.zeros(3, 12)
    for stream in (wide[:, :8], wide[:1, 4:], wide.bfloat16()[::2, :8]):
        assert native_block._in_pieces(stream)
    for stream in (wide[:, 1:9], torch.zeros(3, 9)[:, :8], wide.bfloat16()[:, :8]):
        assert not native_block._in_pieces(stream)


@pytest.mark.slow
def test_emulated_block_of_the_most_inputs(emulated_block):
    check_whole_block(partial(emulated_block, processors=2, shared=232_448), 8, MOST_INPUTS)


def persistent_bytes(batch, sizes):
    """Shared memory for two stages of weights, the sums, and the rows of x."""
    inputs = max(size for name, size in sizes.items() if name in ("width", "inner", "mlp"))
    return 65_536 + 16_896 + 2 * batch * (-(-inputs // 64) * 64 + 32)


def test_the_persistent_kernel_takes_what_just_suffices_and_no_less(emulated_block):
    (batch, processors, _, sizes) = PERSISTENT["rodimus_odd"]
    step = lambda shared: partial(emulated_block, processors=processors, shared=shared)
    needed = persistent_bytes(batch, sizes)
    check_whole_block(step(needed), batch, sizes)
    with pytest.raises(AssertionError, match=f"{needed - 1} bytes are too few"):
        check_whole_block(step(needed - 1), batch, sizes)


RELEASED = {"width": 2048, "inner": 4096, "keys": 64, "rank": 32, "dim": 128, "mlp": 2816}
RELEASED_4B = {"width": 3072, "inner": 6144, "keys": 64, "rank": 48, "dim": 128, "mlp": 4096}


@pytest.mark.slow
@pytest.mark.parametrize("form", ["persistent", "parts"])
@pytest.mark.parametrize("batch, sizes", [(2, RELEASED), (1, RELEASED_4B)], ids=["1.6B", "4B"])
def test_emulated_block_of_released_sizes(emulated_block, batch, sizes, form):
    """Over the ring's end; with fewer multiprocessors than any GPU has, and a shorter window."""
    gpu = {"processors": 7, "shared": 0 if form == "parts" else 232_448}
    check_whole_block(partial(emulated_block, **gpu), batch, sizes | {"rows": 200, "age": 190})


class Launch(NamedTuple):
    """A linear step: what is asked for, and how it would be launched."""

    processors: int
    rows: int
    inputs: int
    norm: bool
    outputs: tuple[int, ...]
    kernel: str
    threads: int
    blocks: int
    fixed: int
    shared: int
    asks: bool
    taken: bool


@pytest.fixture(scope="module")
def launches(tmp_path_factory):
    """Launches of the products of every model in ``configs/model``, and of other sizes, on GPUs
    with few and many multiprocessors."""
    layers = {(inputs, norm, 0, (48,)) for inputs in range(8, 9000, 40) for norm in (0, 1)}
    for path in CONFIGS.glob("rodimus*.json"):
        layers |= products_of(json.loads(path.read_text()))
    asked = [
        (processors, rows, inputs, norm, gated, outputs)
        for processors in (1, 40, 108, 132, 148, 10**6)
        for rows in range(1, native.MAX_ROWS + 1)
        for inputs, norm, gated, outputs in sorted(layers)
    ]
    text = "".join(" ".join(map(str, (*step, *outputs))) + "\n" for *step, outputs in asked)
    program = compiled(tmp_path_factory.mktemp("launches"), "launches")
    done = subprocess.run([program], input=text, check=True, capture_output=True, text=True)
    found = []
    for (*step, _, outputs), line in zip(asked, done.stdout.splitlines(), strict=True):
        warps, depth, blocks, scaled, fixed, staged, asks, taken = map(int, line.split())
        kernel = f"step_linear_kernel<{warps}, {depth}, {blocks}, {scaled}>"
        sizes = (32 * warps, blocks, fixed, fixed + staged, bool(asks), bool(taken))
        found.append(Launch(*step, outputs, kernel, *sizes))
    return found


def products_of(config):
    """``(inputs, norm, gated, outputs)`` of the steps of a block and of the head."""
    from rodimus import RodimusConfig, RodimusForCausalLM

    with torch.device("meta"):
        model = RodimusForCausalLM(RodimusConfig.from_dict(config | {"n_layer": 1}))
    w = model.model.layers[0].step_weights()
    steps = [(1, 0, w.fc), (0, 0, w.query_key, w.mem_gate, w.gate_in), (0, 0, w.mixer_out)]
    if w.query is not None:
        steps += [(0, 0, w.query, w.key, w.value), (0, 0, w.attn_out)]
        steps += [(0, 1, w.ffn_in), (0, 0, w.ffn_out)]
    steps.append((0, 0, model.lm_head.weight))
    return {
        (first.shape[1], norm, gated, tuple(x.shape[0] for x in (first, *more)))
        for norm, gated, first, *more in steps
    }


# of a block, in every GPU of compute capability 8.0 and above
UNASKED_SHARED, MOST_SHARED = 48 * 1024, 99 * 1024


def test_linear_steps_have_the_shared_memory_they_need(launches):
    """Beyond it a launch is an invalid argument."""
    taken = [x for x in launches if x.taken]
    assert {x.rows for x in taken} == set(range(1, 9)) and len({x.kernel for x in taken}) == 6
    assert not [x for x in taken if x.shared > UNASKED_SHARED and not x.asks]
    assert not [x for x in taken if x.shared > MOST_SHARED]


def test_models_up_to_the_4b_are_taken_whole(launches):
    """The 4B model has up to 6144 inputs, too many for eight rows: those are composed."""
    assert all(x.taken for x in launches if x.inputs <= 5120 or (x.inputs <= 6144 and x.rows <= 7))


def test_blocks_agree_with_their_kernels_on_what_fits(launches):
    """Otherwise a block would be sent to kernels that refuse it."""
    for x in launches:
        fits = native_block._fits_shared(x.rows, x.inputs)
        # after a norm of its own a step declares less memory
        assert fits <= x.taken and (fits == x.taken or x.norm), x


LIBRARY = build.PACKAGE / build.LIBRARIES["cuda"]
built = pytest.mark.skipif(
    not LIBRARY.is_file(), reason="the CUDA library is not built: it needs nvcc"
)


@built
def test_library_loads_on_any_torch_and_registers():
    assert native.problem("cuda") is None
    names = ("ddts_step", "ddts_mixer_step", "short_conv_step", "linear_step", "rms_norm")
    for name in (*names, "shared_key_attention_step"):
        assert torch._C._dispatch_has_kernel_for_dispatch_key(f"rodimus::native_{name}", "CUDA")


@built
@pytest.mark.skipif(torch.cuda.is_available(), reason="its runtime can run here")
def test_library_says_why_its_runtime_cannot_run():
    assert re.search(r"(?i)driver|no CUDA-capable device", native._cuda_problem())


@built
@pytest.mark.skipif(shutil.which("nm") is None, reason="needs nm")
def test_no_symbol_of_torch_may_be_absent():
    """A weak symbol that is not found loads as null, and crashes when it is called."""
    command = ["nm", "-D", "--undefined-only", str(LIBRARY)]
    lines = subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()
    symbols = [line.split()[-2:] for line in lines]
    assert symbols
    assert not [name for kind, name in symbols if kind in "wv" and not name.startswith("_")]


@cache
def assembled():
    """``(architecture, kernel, instructions by their address)`` of every kernel that the library
    has for GPUs on which kernels take turns."""
    if max(map(int, re.findall(r"\d+", build.recorded_archs(LIBRARY)))) < 90:
        pytest.skip("the library has no code for GPUs on which kernels take turns")
    kernels = []
    triton = pytest.importorskip("triton")
    tool = str(Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump")
    read = lambda *flags: (
        subprocess.run([tool, *flags, LIBRARY], check=True, capture_output=True, text=True).stdout
    )
    archs = re.findall(r"\.(sm_(\d+)\w*)\.cubin", read("--list-elf"))
    for arch in (arch for arch, number in archs if int(number) >= 90):
        for text in read("-sass", "-arch", arch).split("Function : ")[1:]:
            code = re.findall(r"^ +/\*([0-9a-f]{4,})\*/ +(.*?) ;", text, re.MULTILINE)
            lines = {int(address, 16): line for address, line in code}
            kernels.append((arch, text.split()[0], lines))
    assert kernels
    return kernels


def before_the_turn(code):
    """What touches memory or lets the next kernel be started on a path that has not waited: any
    path, whether or not its conditions can hold together."""
    following = dict(zip(code, [*list(code)[1:], None], strict=True))
    found, seen, ahead = [], set(), [0]
    while ahead:
        address = ahead.pop()
        if address in seen or address is None:
            continue
        seen.add(address)
        guard, name, operands = re.match(r"(@\S+ )?(\S+)(.*)", code[address]).groups()
        kind = name.partition(".")[0]
        assert kind not in ("BRX", "JMP", "JMX"), "a branch whose target is not known"
        if re.match(r"(LDG|STG|LDGSTS|LD|ST|RED|REDG|ATOM|ATOMG|PREEXIT)$", kind):
            found.append(name)
        if kind in ("BRA", "CALL"):
            ahead.append(int(re.search(r"0x([0-9a-f]+)", operands)[1], 16))
        if guard or "," in operands or kind not in ("BRA", "EXIT", "RET", "ACQBULK"):
            ahead.append(following[address])
    return found


@built
def test_assembler_moves_nothing_before_the_turn():
    """Nor is the next kernel let start before the wait: what that one does before its turn would
    run beside more than the kernel just before."""
    for arch, kernel, code in assembled():
        if "persistent_kernel" in kernel:
            continue
        assert any(line == "ACQBULK" for line in code.values()), (arch, kernel)
        found = before_the_turn(code)
        assert "PREEXIT" not in found, (arch, kernel)
        # those wait here or there, as they are told: not every path is one that is taken
        if re.search("mixer_step_kernel|attention_staged_kernel", kernel):
            continue
        # weights go past the first cache
        weights = [name for name in found if "step_linear_kernel" in kernel and ".NA." in name]
        assert found == weights, (arch, kernel, found)


@built
def test_states_are_stored_sixteen_bytes_at_a_time():
    wide = r"(ddts|mixer)_step_kernelILi(\d+)ELi128E"
    steps = [(*x, found) for x in assembled() if (found := re.search(wide, x[1]))]
    assert {found[1] for *_, found in steps} == {"ddts", "mixer"}
    for arch, kernel, code, found in steps:
        stores = [line for line in code.values() if re.search(r"\bSTG\.E\.128\b", line)]
        assert len(stores) >= int(found[2]) // 4, (arch, kernel)


@built
@pytest.mark.skipif(torch.version.cuda is not None, reason="this torch has the stream")
def test_an_operator_without_a_stream_raises():
    native.require("test", "cuda")
    keys = torch._C.DispatchKeySet(torch._C.DispatchKey.CUDA)
    operator = torch.ops.rodimus.native_rms_norm.default
    with pytest.raises(RuntimeError, match=r"libtorch_cuda\.so is not loaded"):
        operator.redispatch(keys, torch.ones(2, 8), torch.ones(8), 1e-5)


@pytest.mark.slow
def test_kernels_keep_their_numbers_in_registers(launches, monkeypatch):
    monkeypatch.delenv("RODIMUS_CUDA_ARCHS", raising=False)
    try:
        usages = build.report()
    except build.Unavailable as reason:
        pytest.skip(str(reason))
    assert len({usage.arch for usage in usages}) >= 2 and len(usages) > 40
    assert not [usage for usage in usages if usage.registers > 255 or usage.spills > 0]
    # it is allowed all the shared memory that a block may have: what it declared would be too much
    whole = [usage for usage in usages if usage.kernel.startswith("persistent_kernel")]
    assert len(whole) >= 6 and not [usage for usage in whole if usage.shared]
    # 65536 registers a multiprocessor, given to warps in units of 8 a thread
    steps = {(x.kernel.partition("(")[0], x.threads, x.blocks, x.fixed) for x in launches}
    for kernel, threads, blocks, fixed in steps:
        found = [usage for usage in usages if usage.kernel.startswith(kernel)]
        assert len(found) >= 2, kernel
        for usage in found:
            assert usage.shared == fixed, usage
            assert -(-usage.registers // 8) * 8 * threads * blocks <= 65536, usage


@pytest.mark.gpu
def test_cuda_equals_the_cpu():
    """Against float64, as the CPU is. The reference is no measure of a float32 state: from bfloat16
    inputs it rounds gates and keys on their way to it, which neither of the two does."""
    from tests.kernels import test_native as cpu

    native.require("test", "cuda")
    makers = (cpu.ddts_step, cpu.mixer_step, cpu.conv_step, cpu.linear, cpu.rms_norm)
    for maker in (*makers, cpu.attention_step, cpu.int8_attention_step):
        for dtype in cpu.DTYPES:
            torch.manual_seed(0)
            case = maker(dtype)
            actual = cpu.run(case[0], case, lambda x: x.cuda(), impl="native")
            cpu.check_results([x.cpu() for x in actual], case, limit=1e-5)


@pytest.mark.gpu
@pytest.mark.parametrize("steps", [1, 2])
@pytest.mark.parametrize("heads", [16, 24])
def test_attention_of_the_released_heads_on_cuda(steps, heads):
    """One key head and 16 or 24 value heads of 128 have kernels of their own: over the ring's end,
    in several parts."""
    from tests.kernels import test_native as cpu

    native.require("test", "cuda")
    sizes = {"T": steps, "H": heads, "heads": (1, heads), "dims": (128, 128)}
    for maker in (cpu.attention_step, cpu.int8_attention_step):
        for dtype in cpu.DTYPES:
            torch.manual_seed(0)
            case = maker(dtype, **sizes, ring=704, window=650, past=1000)
            actual = cpu.run(case[0], case, lambda x: x.cuda(), impl="native")
            cpu.check_results([x.cpu() for x in actual], case, limit=1e-5)


# what the kernels take whole, and what they leave to torch's products
WHOLE = {"width": 64, "inner": 128, "keys": 16, "dim": 32}
SHAPES = {"whole": WHOLE, "odd": {}}


@pytest.mark.gpu
@pytest.mark.parametrize("attends", [False, True], ids=["rodimus", "rodimus_plus"])
@pytest.mark.parametrize("batch", [1, 3, 8, 64])
@pytest.mark.parametrize("dtype", native.DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES)
def test_block_on_cuda_equals_the_reference(shape, dtype, batch, attends):
    from tests.kernels import test_block as block

    native.require("test", "cuda")
    torch.manual_seed(0)
    sizes = SHAPES[shape]
    more = {"rank": 8, "mlp": 72} if sizes else {}
    weights = block.weights_of(dtype, attends, **sizes, **more)
    turned = {"turned": sizes["dim"]} if sizes else {}
    states = block.states_of(dtype, batch, attends, **sizes, **turned)
    head_dim = sizes.get("dim", block.NAMED["head_dim"])
    block.assert_equals_reference(block.native_step, weights, states, "cuda", head_dim=head_dim)
    # in float32 a value may fall between two steps on one side alone
    if attends and dtype == torch.bfloat16:
        named = {"head_dim": head_dim, "int8": True}
        block.assert_equals_reference(block.native_step, weights, states, "cuda", **named)


ON_GPU = {
    **{case: sizes for case, (*_, sizes) in PERSISTENT.items()},
    "sixteen_heads": {"width": 2048, "inner": 40, "keys": 8, **HEADS, "rows": 30},
    # as many parts as the window is cut into at most, over the ring's end
    "released": RELEASED | {"rows": 2112, "age": 2100},
    "released_4b": RELEASED_4B | {"rows": 300, "age": 290},
}


@pytest.mark.gpu
@pytest.mark.parametrize("impl", ["persistent", "native"])
@pytest.mark.parametrize("batch", [1, 2, 8])
@pytest.mark.parametrize("case", ON_GPU)
def test_whole_block_on_cuda_equals_the_reference(case, batch, impl):
    from tests.kernels import test_block as block

    native.require("test", "cuda")
    needed = persistent_bytes(batch, ON_GPU[case])
    refused = contextlib.nullcontext()
    if impl == "persistent" and needed > most_shared():
        refused = pytest.raises(RuntimeError, match=f"needs a GPU with .* {needed} bytes of shared")
    with refused:
        check_whole_block(block.of_one_block(blocks_step, impl=impl), batch, ON_GPU[case], "cuda")


def most_shared():
    """Bytes of shared memory that this GPU gives a block."""
    return torch.cuda.get_device_properties(0).shared_memory_per_block_optin


@pytest.mark.gpu
@pytest.mark.parametrize("impl", ["persistent", "native"])
def test_blocks_on_cuda_repeat_to_the_bit(impl):
    """A recorded token through several blocks, 200 times from the same states: every sum has an
    order, so a difference is a race."""
    from tests.kernels import test_block as block

    native.require("test", "cuda")
    torch.manual_seed(0)
    sizes = {name: RELEASED[name] for name in ("width", "inner", "keys", "dim")}
    weights = [block.weights_of(torch.bfloat16, True, **RELEASED) for _ in range(3)]
    weights = [type(w)(*(x.cuda() for x in w)) for w in weights]
    more = {"turned": 64, "rows": 2112, "age": 2100}
    states = [block.states_of(torch.bfloat16, 2, True, **sizes, **more) for _ in weights]
    kept = [[x.cuda() for x in found] for found in zip(*(s[:3] for s in states), strict=True)]
    position, rotary = states[0][3].cuda(), tuple(x.cuda() for x in states[0][4])
    used, stream = [[x.clone() for x in found] for found in kept], torch.randn(2, 2048).cuda()
    named = block.NAMED | {"window_size": 2049, "head_dim": 128, "impl": impl}
    step = lambda: blocks_step(stream, weights, *used, position, rotary, **named)
    is_whole = lambda w: native_block._is_one_call(2, w, rotary[0], 128, impl == "persistent")
    assert all(map(is_whole, weights))
    step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for found, before in zip(used, kept, strict=True):
            for x, y in zip(found, before, strict=True):
                x.copy_(y)
        out = step()
    first = None
    for _ in range(200):
        graph.replay()
        now = [out, *used[0], *used[1], *used[2]]
        first = [x.clone() for x in now] if first is None else first
        assert all(map(torch.equal, now, first))


@pytest.mark.gpu
@pytest.mark.parametrize("batch", [1, 3, 8, 9])
def test_linear_step_on_cuda(batch):
    native.require("test", "cuda")
    torch.manual_seed(0)
    sizes = [(2048, 2816), (130, 2048), (7, 4096), (3072, 4096), (300, 6144), (33, 100)]
    for outputs, inputs in sizes:
        x, weight = torch.randn(batch, inputs).bfloat16(), torch.randn(outputs, inputs).bfloat16()
        exact = x.double() @ weight.double().t()
        error = relative_error(linear(x.cuda(), weight.cuda()).cpu(), exact)
        assert error < 4e-3, (outputs, inputs)


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["rodimus", "rodimus_plus"])
@pytest.mark.parametrize("dtype", native.DTYPES, ids=str)
def test_engine_on_cuda_generates_what_the_model_does(dtype, kind):
    """From captured graphs, against a dynamic cache without them, across the end of the window."""
    from rodimus.generation import Engine, Request
    from tests.generation.helpers import greedy, prompts_of
    from tests.model.helpers import model_of

    native.require("test", "cuda")
    model = model_of(kind).to("cuda", dtype)
    prompts = prompts_of(3, 20) if dtype == torch.float32 else prompts_of(5)
    found = Engine(model, slots=len(prompts)).generate(
        [Request(prompt=prompt.tolist(), max_new_tokens=24) for prompt in prompts]
    )
    for generation, prompt in zip(found, prompts, strict=True):
        assert generation.tokens == greedy(model, prompt.cuda(), 24)


def test_launchers_cover_every_registered_operator():
    for device, lacks in {"cpu": set(), "cuda": {"short_conv"}}.items():
        files = (f"{device}/operators.cpp", f"{device}/block.cpp")
        text = "".join((build.sources() / file).read_text() for file in files)
        assert set(re.findall(r'm\.impl\("native_(\w+)"', text)) == set(native._SCHEMAS) - lacks
