"""The Triton implementation of shared-key attention against the definition in float64.

Without a GPU it runs in the interpreter, so the default cases are few and small; the slow ones are
all cases of the other implementations, in several tilings.
"""

import dataclasses
import importlib

import pytest
import torch

from rodimus_kernels import rope, rope_tables, shared_key_attention
from rodimus_kernels.testing import assert_close, assert_within_budget, relative_error
from tests.kernels.device import DEVICE, TRITON_MARKS, triton_module
from tests.kernels.test_shared_key_attention import (
    CASES,
    LIMIT,
    Case,
    packed,
    rounded_attention,
    run,
    truth,
)

pytestmark = TRITON_MARKS
SMALL = [
    Case(1, 37, 37, 2, 1, 2, window=17),
    Case(1, 20, 20, 2, 1, 2, window=1),
    # the last whole tile ends where the diagonal begins, give or take one
    Case(1, 20, 34, 2, 1, 2, window=None),
    Case(1, 20, 35, 2, 1, 2, window=None),
    Case(1, 48, 48, 1, 1, 1, window=31),
    Case(1, 21, 53, 2, 1, 2, 24, 8, window=20),
    Case(2, 9, 9, 6, 3, 2, window=4),
    packed(0, 9, 0, 0, 27, 1, 0, heads=2, value_heads=2, window=18),
    Case(1, 21, 53, 2, 1, 2, window=20, documents=(10, 5, 20, 0, 18)),
]


@pytest.fixture
def triton_attention():
    return importlib.import_module("rodimus_kernels.shared_key_attention.triton_attention")


@pytest.fixture
def tiling(triton_attention, monkeypatch):
    """Tile sizes small enough that a short sequence has edges, whole tiles and a diagonal."""

    def use(queries, keys):
        tile = triton_attention.Tile(queries, keys, 4, 1)
        monkeypatch.setattr(triton_attention, "tiles", lambda *sizes: (tile, tile, tile))

    use(16, 16)
    return use


@pytest.fixture
def check(measure):
    """``check(case, dtype)``: values and gradients are as good as the definition's."""

    def check(case, dtype=None):
        tensors, cu_seqlens = dataclasses.replace(case, dtype=dtype or case.dtype).inputs(DEVICE)
        options = {"window_size": case.window, "cu_seqlens": cu_seqlens}
        actual = run(shared_key_attention, *tensors, impl="triton", **options)
        exact = truth(tensors, **options)
        if dtype is None:
            case.compare(actual, exact, "triton", measure)
            return
        baseline = run(rounded_attention, *tensors, **options)
        for name in actual:
            assert actual[name].dtype == dtype
            assert_within_budget(name, actual[name], exact[name], baseline[name])

    return check


@pytest.mark.parametrize("case", SMALL, ids=str)
def test_matches_the_definition(case, tiling, check):
    check(case)


@pytest.mark.slow
@pytest.mark.parametrize("number", range(len(CASES)), ids=lambda n: str(CASES[n]))
def test_matches_the_definition_in_other_tilings(number, tiling, check):
    """Every case, the tilings in turn: in the interpreter a case takes seconds."""
    tiling(*((32, 16), (16, 32), (16, 16))[number % 3])
    check(CASES[number])


@pytest.mark.gpu
@pytest.mark.parametrize("case", CASES, ids=str)
def test_matches_the_definition_in_its_own_tiles(case, check):
    check(case)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("dim", [64, 128, 256])
@pytest.mark.parametrize("window", [129, 700, None])
def test_many_tiles(window, dim, dtype, check):
    case = Case(2, 1000, 1100, 4, 1, 4, dim, dim, window)
    # in float32 three tf32 products stand for one: 1e-6 a score
    if dtype == torch.float32:
        tensors, _ = case.inputs(DEVICE)
        actual = run(shared_key_attention, *tensors, impl="triton", window_size=window)
        assert_close(actual, truth(tensors, window_size=window), 1e-5)
    else:
        check(case, dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_is_as_good_as_the_definition_in_it(dtype, tiling, check):
    check(SMALL[0], dtype)


def test_tiles_by_the_copy_engine(check, tiling, triton_attention, monkeypatch):
    """The interpreter runs descriptors too: they clip at the end of the row."""
    monkeypatch.setattr(triton_attention, "use_tma", lambda *tensors: True)
    check(Case(2, 37, 37, 2, 1, 2, window=17))
    check(Case(1, 5, 37, 2, 1, 2, window=17))


def test_strided_boundaries_are_read_without_a_warning(recwarn):
    """Such as a column of pairs of starts and ends."""
    tensors, bounds = packed(4, 0, 6, heads=1, value_heads=1).inputs(DEVICE)
    options = {"window_size": 9, "impl": "triton"}
    strided = torch.stack((bounds, bounds), 1)[:, 0]
    found = run(shared_key_attention, *tensors, cu_seqlens=strided, **options)
    expected = run(shared_key_attention, *tensors, cu_seqlens=bounds, **options)
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert not [str(w.message) for w in recwarn if "non-contiguous" in str(w.message)]


@pytest.mark.parametrize("engine", [0, 90])
def test_an_empty_batch_is_empty(triton_attention, engine):
    _triton = importlib.import_module("rodimus_kernels._triton")
    tensors = [torch.zeros(0, 20, heads, 16, dtype=torch.bfloat16) for heads in (2, 1, 2, 2)]
    with _triton.assume_capability(engine):
        found = run(shared_key_attention, *(x.to(DEVICE) for x in tensors), impl="triton")
    assert all(x.numel() == 0 for x in found.values())


def test_a_head_of_an_expanded_key_is_copied_by_the_engine(triton_attention, monkeypatch):
    """A model spreads its key over the heads and hands one of them on: its stride is 0."""
    seen = []

    def refuse_zero(*tensors):
        seen.extend(x.stride() for x in tensors)
        return False

    monkeypatch.setattr(triton_attention, "use_tma", refuse_zero)
    (q, k, v, do), _ = Case(1, 20, 20, 2, 1, 2).inputs(DEVICE)
    head = k.transpose(1, 2).expand(-1, 2, -1, -1)[:, :1].transpose(1, 2)
    assert 0 in head.stride()
    actual = run(shared_key_attention, q, head, v, do, impl="triton")
    assert seen and all(min(strides) > 0 for strides in seen)
    assert_close(actual, truth((q, k, v, do)), 2e-6)


def test_heads_split_over_programs(check, tiling, triton_attention, monkeypatch):
    """dk is then a sum of partial sums."""
    monkeypatch.setattr(triton_attention, "head_groups", lambda *sizes: 2)
    check(Case(1, 20, 20, 4, 1, 4, window=8))
    check(Case(1, 10, 10, 6, 2, 6, window=8))


def test_head_groups_fill_the_gpu_and_no_more(triton_attention):
    groups = triton_attention.head_groups
    assert groups(256, 16, 132) == 2
    assert groups(264, 16, 132) == 1
    assert groups(32, 16, 132) == 16
    assert groups(8, 4, 132) == 4
    assert groups(1, 1, 132) == 1


def test_strided_inputs(tiling):
    (q, k, v, do), _ = Case(1, 20, 20, 2, 1, 2, value_dim=24).inputs(DEVICE)
    row = torch.cat((k.flatten(2), v.flatten(2)), dim=-1)
    k_view, v_view = row[..., :16].unflatten(-1, (1, 16)), row[..., 16:].unflatten(-1, (2, 24))
    q_view = q.transpose(1, 2).contiguous().transpose(1, 2)
    o = shared_key_attention(q_view, k_view, v_view, window_size=9, impl="triton")
    assert relative_error(o, truth((q, k, v, do), window_size=9)["o"]) < LIMIT
    # channels that are not dense are copied
    wide = torch.stack((v, v), dim=-1)[..., 0]
    assert torch.equal(o, shared_key_attention(q, k, wide, window_size=9, impl="triton"))


def test_large_scores_stay_finite(tiling):
    (q, k, v, do), _ = Case(1, 20, 20, 2, 1, 2, window=5).inputs(DEVICE)
    actual = run(shared_key_attention, 1e3 * q, 1e3 * k, v, do, window_size=5, impl="triton")
    assert all(x.isfinite().all() for x in actual.values())


def test_is_deterministic(tiling):
    tensors, _ = Case(1, 20, 20, 4, 1, 4, window=8).inputs(DEVICE)
    runs = [run(shared_key_attention, *tensors, window_size=8, impl="triton") for _ in range(2)]
    assert all(torch.equal(runs[0][name], runs[1][name]) for name in runs[0])


def test_unused_queries_and_mixed_dtypes(tiling):
    """Under autocast q and k may come in float32 from the rotary embedding, v in bfloat16."""
    (q, k, v, do), _ = Case(1, 20, 20, 2, 1, 2, window=8).inputs(DEVICE)
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        actual = run(shared_key_attention, q, k, v.half(), do, window_size=8, impl="triton")
    assert actual["o"].dtype == torch.float16 and actual["dq"].dtype == torch.float32
    exact = truth((q, k, v.half(), do), window_size=8)
    assert all(relative_error(actual[name], exact[name]) < 2e-3 for name in exact)


def test_checkpointing_gives_the_same_gradients(tiling):
    tensors, _ = Case(1, 18, 18, 2, 1, 2, window=9).inputs(DEVICE)
    function = lambda q, k, v: shared_key_attention(q, k, v, window_size=9, impl="triton")
    checkpointed = lambda *x: torch.utils.checkpoint.checkpoint(function, *x, use_reentrant=False)
    plain, again = run(function, *tensors), run(checkpointed, *tensors)
    assert all(torch.equal(plain[name], again[name]) for name in plain)


def test_compiles_without_a_graph_break(tiling):
    tensors, cu_seqlens = packed(4, 6, heads=1, value_heads=1).inputs(DEVICE)
    function = lambda *x: shared_key_attention(
        *x, window_size=9, cu_seqlens=cu_seqlens, impl="triton"
    )
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    plain, again = run(function, *tensors), run(compiled, *tensors)
    assert all(torch.equal(plain[name], again[name]) for name in plain)


@pytest.mark.parametrize("dim, value_dim", [(16, 80), (80, 16), (16, 256), (256, 16), (16, 16)])
def test_products_of_16_channels_are_no_narrow_wgmma(triton_attention, dim, value_dim):
    """Eight warps would take 8 columns of 64 rows for each warpgroup, of 128 rows they take 16."""
    empty = lambda heads, size: torch.empty(1, 300, heads, size, dtype=torch.bfloat16)
    q, do, k, v = empty(2, dim), empty(2, value_dim), empty(1, dim), empty(2, value_dim)
    for kernel, by_query in enumerate(([q], [q, do], [q, do])):
        with triton_module("rodimus_kernels._triton").assume_capability(90):
            tile = triton_attention._operands(kernel, by_query, [k, v]).tile
        rows = tile.keys if kernel == 2 else tile.queries
        # fewer rows are no wgmma
        assert rows < 64 or tile.num_warps <= 4 * rows // 64, kernel


def test_registration(tiling):
    """Schema, fake, autograd and dynamic shapes, as torch checks them."""
    tensors, cu_seqlens = packed(3, 4, heads=1, value_heads=1).inputs(DEVICE)
    leaves = [x.requires_grad_() for x in tensors[:3]]
    operator = torch.ops.rodimus.shared_key_attention.default
    torch.library.opcheck(operator, (*leaves, 9, 0.25, cu_seqlens))
    o, lse = operator(*tensors[:3], 9, 0.25, None)
    arguments = (*tensors[:3], None, 0.25, None, o.detach(), lse, tensors[3])
    backward = torch.ops.rodimus.shared_key_attention_backward.default
    torch.library.opcheck(backward, [x.detach() if torch.is_tensor(x) else x for x in arguments])


@pytest.mark.gpu
def test_nothing_waits_for_the_device():
    tensors, cu_seqlens = packed(100, 0, 200, dim=64, value_dim=64).inputs(DEVICE)
    options = {"window_size": 50, "cu_seqlens": cu_seqlens, "impl": "triton"}
    run(shared_key_attention, *tensors, **options)
    torch.cuda.set_sync_debug_mode("error")
    try:
        run(shared_key_attention, *tensors, **options)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
def test_offsets_beyond_32_bits():
    """The last row of a batch whose values take more than 2**31 elements."""
    shape = (66, 16384, 16, 128)
    if torch.cuda.get_device_properties(0).total_memory < 40e9:
        pytest.skip("needs 40 GB of device memory")
    v = torch.zeros(shape, dtype=torch.bfloat16, device=DEVICE)
    q, k = torch.randn(66, 1, 16, 128), torch.randn(66, 16384, 1, 128)
    q, k = (x.to(DEVICE, torch.bfloat16) for x in (q, k))
    v[-1].normal_()
    o = shared_key_attention(q, k, v, window_size=300, impl="triton")
    alone = shared_key_attention(q[-1:], k[-1:], v[-1:], window_size=300, impl="sdpa")
    assert relative_error(o[-1:], alone.double()) < 1e-2


class TestRope:
    """Values and gradients, with tables of every position, some of the channels, strided heads."""

    @pytest.mark.parametrize(
        ("heads", "dim", "turned", "rows"),
        [(16, 128, 128, 1), (3, 24, 8, 2), (1, 20, 20, 2), (5, 16, 2, 1)],
    )
    def test_equals_the_definition(self, heads, dim, turned, rows):
        position_ids = torch.randint(0, 3000, (rows, 5), device=DEVICE)
        cos, sin = rope_tables(position_ids, turned)
        # heads lie apart, and one more than is turned
        wide, dy = torch.randn(2, 2, heads + 1, 5, dim, device=DEVICE).transpose(2, 3)
        results = []
        for impl, dtype in (("triton", torch.float32), ("reference", torch.float64)):
            x = wide.to(dtype).detach().requires_grad_()
            y = rope(x[:, :, 1:], cos.to(dtype), sin.to(dtype), impl=impl)
            y.backward(dy[:, :, 1:].to(dtype))
            results.append((y.detach(), x.grad))
        for actual, exact in zip(*results, strict=True):
            assert relative_error(actual, exact) < 3e-7
        assert torch.equal(results[0][0][..., turned:], wide[:, :, 1:, turned:])

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
    def test_half_precision_is_rounded_once(self, dtype):
        x = torch.randn(1, 4, 2, 16, device=DEVICE).to(dtype)
        tables = rope_tables(torch.arange(4, device=DEVICE)[None], 16, dtype=dtype)
        y, expected = (rope(x, *tables, impl=impl) for impl in ("triton", "reference"))
        assert y.dtype == dtype
        assert relative_error(y, expected) < torch.finfo(dtype).eps / 2

    def test_registration(self):
        x = torch.randn(2, 3, 2, 6, device=DEVICE, requires_grad=True)
        cos, sin = rope_tables(torch.arange(3, device=DEVICE)[None], 4)
        torch.library.opcheck(torch.ops.rodimus.rope.default, (x, cos, sin, False))

    def test_dtype(self):
        x, table = torch.randn(1, 2, 1, 4, device=DEVICE), torch.ones(1, 2, 2, device=DEVICE)
        with pytest.raises(ValueError, match="rope: Triton takes float32, bfloat16 and float16"):
            rope(x.double(), table, table, impl="triton")
        with pytest.raises(ValueError, match="unknown impl 'fast'; expected one of 'auto'"):
            rope(x, table, table, impl="fast")


class TestErrors:
    def test_head_dimension(self):
        q, k, v = (torch.randn(1, 4, 1, 264, device=DEVICE) for _ in range(3))
        with pytest.raises(ValueError, match="expected D and Dv up to 256, got D = 264, Dv = 264"):
            shared_key_attention(q, k, v, impl="triton")

    def test_dtype(self):
        q, k, v = (torch.randn(1, 4, 1, 16, device=DEVICE).double() for _ in range(3))
        with pytest.raises(ValueError, match="Triton takes float32, bfloat16 and float16"):
            shared_key_attention(q, k, v, impl="triton")
