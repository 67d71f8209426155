"""Shared-key attention: the definition against a plain loop, every implementation against the
definition in float64, values and gradients."""

import dataclasses
import importlib.metadata
import inspect
import math
import sys
import types
import typing

import numpy as np
import pytest
import torch
from torch._subclasses import FakeTensorMode

from rodimus_kernels import _dispatch, reference, rope, rope_tables, shared_key_attention
from rodimus_kernels.shared_key_attention import api, flex, sdpa
from rodimus_kernels.testing import assert_close, assert_within_budget, relative_error

# float32 against float64: measured at most 4e-7
LIMIT = 1e-6
TABLE = "attention: values and gradients in float32 against float64 (relative, Frobenius norm)"
# the Triton implementation has its own file: in the interpreter a case takes a second
DIFFERENTIABLE = ["sdpa"]


@dataclasses.dataclass(frozen=True)
class Case:
    """One shape of the operator; ``documents`` are the lengths of packed documents."""

    batch: int = 2
    queries: int = 37
    keys: int = 37
    heads: int = 4
    key_heads: int = 1
    value_heads: int = 4
    dim: int = 16
    value_dim: int = 16
    window: int | None = 17
    documents: tuple[int, ...] | None = None
    dtype: torch.dtype = torch.float32

    def __str__(self):
        heads = f"H{self.heads}-{self.key_heads}-{self.value_heads}"
        packed = "" if self.documents is None else f"-{len(self.documents)}docs"
        dtype = str(self.dtype).removeprefix("torch.")
        sizes = f"B{self.batch}T{self.queries}S{self.keys}{heads}D{self.dim}-{self.value_dim}"
        return f"{sizes}W{self.window}{packed}-{dtype}"

    @property
    def has_lone_keys(self):
        """Whether queries see one key: its weight is 1, so errors of dq and dk are absolute."""
        return self.window == 1 or self.keys == 1

    def compare(self, actual, exact, impl, measure):
        """Asserts values and gradients in float32, and reports their largest error."""
        limit = 2e-5 if self.has_lone_keys else LIMIT
        seen = "one key seen, some errors absolute" if self.has_lone_keys else "many keys seen"
        measure(TABLE, seen, impl, assert_close(actual, exact, limit), limit)

    def inputs(self, device="cpu"):
        """``(q, k, v, do)``, and the boundaries of the documents or None."""
        draw = lambda *shape: torch.randn(*shape, dtype=torch.float64).to(device, self.dtype)
        tensors = (
            draw(self.batch, self.queries, self.heads, self.dim),
            draw(self.batch, self.keys, self.key_heads, self.dim),
            draw(self.batch, self.keys, self.value_heads, self.value_dim),
            draw(self.batch, self.queries, self.heads, self.value_dim),
        )
        return tensors, boundaries(self.documents, device)


def boundaries(documents, device="cpu"):
    if documents is None:
        return None
    return torch.tensor((0, *documents)).cumsum(0).to(device, torch.int32)


def packed(*documents, **options):
    """A case of one row that holds these documents."""
    length = sum(documents)
    return Case(1, length, length, documents=documents, **options)


# the default has window 17 < T; then the edges of the window, of the heads, of the sizes, packing
CASES = [
    Case(),
    Case(window=1),
    Case(window=8, dim=32),
    Case(window=37),
    Case(window=100),
    Case(window=None),
    Case(key_heads=2, value_heads=2),
    Case(key_heads=2, value_heads=4),
    Case(heads=6, key_heads=3, value_heads=2),
    Case(heads=3, key_heads=3, value_heads=1),
    Case(dim=16, value_dim=48),
    Case(dim=24, value_dim=8),
    Case(queries=5),
    Case(queries=1, window=8),
    Case(queries=21, window=None),
    Case(batch=1, queries=1, keys=1),
    Case(batch=1, queries=70, keys=131, window=33),
    packed(20, 17),
    packed(0, 9, 0, 0, 27, 1, 0, window=8),
    packed(1, 1, 1, 40, window=None),
    packed(37, window=1),
    packed(30, 40, window=40, key_heads=2, value_heads=2),
    # documents that end before the first query, one that it continues, and new ones
    Case(1, 21, 53, documents=(10, 5, 20, 0, 18)),
    Case(1, 21, 53, window=8, documents=(10, 5, 20, 18)),
    Case(1, 21, 53, window=None, documents=(32, 21)),
]


def run(function, q, k, v, do, **options):
    """Output and gradients of one run, by name."""
    leaves = [x.detach().clone().requires_grad_() for x in (q, k, v)]
    o = function(*leaves, **options)
    o.backward(do.to(o.dtype))
    return {"o": o.detach(), **dict(zip(("dq", "dk", "dv"), (x.grad for x in leaves), strict=True))}


def truth(tensors, **options):
    return run(reference.shared_key_attention, *(x.double() for x in tensors), **options)


def plain_loop(q, k, v, window, documents):
    """The sentence "query i of head h sees the last ``window`` keys of its own document, through
    key head h % Hk and value head h % Hv" in Python."""
    batch, queries, heads, dim = q.shape
    keys = k.shape[1]
    lengths = documents or (keys,)
    starts = [sum(lengths[:n]) for n, length in enumerate(lengths) for _ in range(length)]
    o = torch.zeros(batch, queries, heads, v.shape[-1], dtype=torch.float64)
    for b in range(batch):
        for row in range(queries):
            position = row + keys - queries
            first = starts[position]
            if window is not None:
                first = max(first, position - window + 1)
            for h in range(heads):
                scores = [
                    float(q[b, row, h] @ k[b, j, h % k.shape[2]]) / math.sqrt(dim)
                    for j in range(first, position + 1)
                ]
                weights = [math.exp(score - max(scores)) for score in scores]
                for j, weight in zip(range(first, position + 1), weights, strict=True):
                    o[b, row, h] += weight / sum(weights) * v[b, j, h % v.shape[2]]
    return o


@pytest.mark.parametrize("case", CASES, ids=str)
def test_definition_equals_a_plain_loop(case):
    (q, k, v, _), cu_seqlens = dataclasses.replace(case, dtype=torch.float64).inputs()
    expected = plain_loop(q, k, v, case.window, case.documents)
    o = reference.shared_key_attention(q, k, v, window_size=case.window, cu_seqlens=cu_seqlens)
    assert relative_error(o, expected) < 1e-14


def test_definition_has_the_gradient_of_its_values():
    case = Case(1, 5, 7, 4, 2, 2, 3, 2, window=3, dtype=torch.float64)
    leaves = [x.requires_grad_() for x in case.inputs()[0][:3]]
    function = lambda *x: reference.shared_key_attention(*x, window_size=3)
    assert torch.autograd.gradcheck(function, leaves)


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("impl", DIFFERENTIABLE)
def test_matches_the_definition(impl, case, device, measure):
    tensors, cu_seqlens = case.inputs(device)
    options = {"window_size": case.window, "cu_seqlens": cu_seqlens}
    actual = run(shared_key_attention, *tensors, impl=impl, **options)
    assert actual["o"].shape == tensors[3].shape
    case.compare(actual, truth(tensors, **options), impl, measure)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("case", [Case(), packed(9, 0, 28, key_heads=2, value_heads=2)], ids=str)
@pytest.mark.parametrize("impl", DIFFERENTIABLE)
def test_half_precision_is_as_good_as_the_definition_in_it(impl, case, dtype, device):
    tensors, cu_seqlens = dataclasses.replace(case, dtype=dtype).inputs(device)
    options = {"window_size": case.window, "cu_seqlens": cu_seqlens}
    actual = run(shared_key_attention, *tensors, impl=impl, **options)
    exact = truth(tensors, **options)
    baseline = run(rounded_attention, *tensors, **options)
    for name in actual:
        assert actual[name].dtype == dtype
        assert_within_budget(name, actual[name], exact[name], baseline[name])


def rounded_attention(q, k, v, *, window_size, cu_seqlens):
    """Attention as a model in half precision writes it: every product rounded to the dtype."""
    heads = torch.arange(q.shape[2], device=q.device)
    k, v = k[:, :, heads % k.shape[2]], v[:, :, heads % v.shape[2]]
    seen = reference.visible_keys(
        q.shape[1], k.shape[1], window_size, cu_seqlens=cu_seqlens, device=q.device
    )
    scores = torch.einsum("bthd,bshd->bhts", q * q.shape[-1] ** -0.5, k)
    weights = scores.masked_fill(~seen, float("-inf")).softmax(-1)
    return torch.einsum("bhts,bshd->bthd", weights, v)


@pytest.mark.parametrize("impl", ["reference", *DIFFERENTIABLE])
def test_query_head_i_reads_key_head_i_modulo_hk_and_value_head_i_modulo_hv(impl, device):
    """A key head that no query matches gives uniform weights over zeros; one that matches picks
    its token."""
    q = torch.zeros(1, 2, 6, 16, device=device)
    k = torch.zeros(1, 2, 2, 16, device=device)
    v = torch.zeros(1, 2, 3, 16, device=device)
    q[..., 0] = 1.0
    k[0, 0, 1, 0] = 1000.0
    v[0, 0] = torch.arange(3.0, device=device)[:, None]
    o = shared_key_attention(q, k, v, impl=impl)[0, 1, :, 0]
    # heads 1, 3, 5 use key head 1 and see token 0 alone, the others average it with a zero
    expected = torch.tensor([0.0, 1.0, 1.0, 0.0, 0.5, 2.0], device=device)
    assert torch.allclose(o, expected)


@pytest.mark.parametrize("impl", ["reference", *DIFFERENTIABLE])
def test_strided_inputs(impl, device):
    (q, k, v, do), _ = Case(value_heads=2, value_dim=24).inputs(device)
    row = torch.cat((k.flatten(2), v.flatten(2)), dim=-1)
    k_view = row[..., :16].unflatten(-1, (1, 16))
    v_view = row[..., 16:].unflatten(-1, (2, 24))
    q_view = q.transpose(1, 2).contiguous().transpose(1, 2)
    assert not (k_view.is_contiguous() or v_view.is_contiguous() or q_view.is_contiguous())
    o = shared_key_attention(q_view, k_view, v_view, window_size=9, impl=impl)
    assert relative_error(o, truth((q, k, v, do), window_size=9)["o"]) < LIMIT


@pytest.mark.parametrize("impl", DIFFERENTIABLE)
def test_split_queries_equal_the_whole(impl, device):
    (q, k, v, _), _ = Case(queries=50, keys=50, window=13).inputs(device)
    whole = shared_key_attention(q, k, v, window_size=13, impl=impl)
    for stop in (1, 12, 13, 14, 49):
        first = shared_key_attention(q[:, :stop], k[:, :stop], v[:, :stop], window_size=13)
        rest = shared_key_attention(q[:, stop:], k, v, window_size=13, impl=impl)
        assert relative_error(torch.cat((first, rest), 1), whole) < LIMIT


@pytest.mark.parametrize("impl", DIFFERENTIABLE)
def test_large_scores_stay_finite(impl, device):
    (q, k, v, do), _ = Case(window=5).inputs(device)
    tensors = (1e3 * q, 1e3 * k, v, do)
    actual = run(shared_key_attention, *tensors, window_size=5, impl=impl)
    assert all(x.isfinite().all() for x in actual.values())
    # scores near 1e6 carry an absolute error of 0.1 in float32
    assert relative_error(actual["o"], truth(tensors, window_size=5)["o"]) < 0.1


@pytest.mark.parametrize("impl", ["reference", *DIFFERENTIABLE])
def test_autocast_does_not_round_what_was_given_in_float32(impl, device):
    (q, k, v, _), _ = Case().inputs(device)
    plain = shared_key_attention(q, k, v, window_size=9, impl=impl)
    with torch.autocast(device.type, dtype=torch.bfloat16):
        inside = shared_key_attention(q, k, v, window_size=9, impl=impl)
        mixed = shared_key_attention(q, k, v.bfloat16(), window_size=9, impl=impl)
    assert torch.equal(inside, plain)
    assert mixed.dtype == torch.bfloat16


@pytest.mark.parametrize("impl", DIFFERENTIABLE)
def test_checkpointing_gives_the_same_gradients(impl, device):
    tensors, _ = Case(window=9).inputs(device)
    function = lambda q, k, v: shared_key_attention(q, k, v, window_size=9, impl=impl)
    checkpointed = lambda *x: torch.utils.checkpoint.checkpoint(function, *x, use_reentrant=False)
    plain, again = run(function, *tensors), run(checkpointed, *tensors)
    assert all(torch.equal(plain[name], again[name]) for name in plain)


@pytest.mark.parametrize("impl", ["reference", *DIFFERENTIABLE])
def test_compiles_without_a_graph_break(impl, device):
    (q, k, v, _), _ = Case(window=9).inputs(device)
    function = lambda *x: shared_key_attention(*x, window_size=9, impl=impl)
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    assert relative_error(compiled(q, k, v), function(q, k, v)) < LIMIT


def peak_bytes(function):
    """Largest total of the live tensors that ``function`` allocates on the CPU."""
    with torch.profiler.profile(profile_memory=True, record_shapes=False) as profiler:
        function()
    live = peak = 0
    for event in profiler.profiler.kineto_results.events():
        if event.name() == "[memory]":
            live += event.nbytes()
            peak = max(peak, live)
    return peak


@pytest.mark.parametrize("bands", [(1, 1), (4, 4), (8, 16)], ids=str)
def test_sdpa_in_many_bands(bands, monkeypatch, measure):
    monkeypatch.setattr(sdpa, "_MIN_BAND", bands[0])
    monkeypatch.setattr(sdpa, "_MAX_BAND", bands[1])
    for case in CASES:
        tensors, cu_seqlens = case.inputs()
        options = {"window_size": case.window, "cu_seqlens": cu_seqlens}
        actual = run(shared_key_attention, *tensors, impl="sdpa", **options)
        case.compare(actual, truth(tensors, **options), "sdpa", measure)


def test_sdpa_memory_grows_with_the_window_and_not_with_the_square_of_the_length():
    def peak(length):
        (q, k, v, do), _ = Case(1, length, length, heads=2, value_heads=2, window=32).inputs()
        return peak_bytes(lambda: run(shared_key_attention, q, k, v, do, window_size=32))

    short, long = peak(1024), peak(4096)
    assert long < 4.5 * short
    # bool scores of all pairs would be this much by themselves, and float scores 8 times as much
    assert long < 4096 * 4096


class TestErrors:
    """Each message names what was expected and what was given."""

    def make(self, **shapes):
        sizes = {"q": (2, 5, 4, 16), "k": (2, 5, 2, 16), "v": (2, 5, 4, 16), **shapes}
        return [torch.randn(size) for size in sizes.values()]

    @pytest.mark.parametrize(
        ("shapes", "options", "message"),
        [
            ({"q": (2, 5, 64)}, {}, r"q must have shape \[B, T, H, D\], got \(2, 5, 64\)"),
            ({"k": (2, 5, 2, 8)}, {}, r"k must have shape \[2, S, Hk, 16\], got \(2, 5, 2, 8\)"),
            ({"v": (2, 6, 4, 16)}, {}, r"v must have shape \[2, 5, Hv, Dv\], got \(2, 6, 4, 16\)"),
            ({"k": (2, 5, 3, 16)}, {}, "multiple of key and value heads, got H = 4, Hk = 3"),
            ({"v": (2, 5, 8, 16)}, {}, "multiple of key and value heads.*Hv = 8"),
            ({"q": (2, 6, 4, 16)}, {}, "S >= T >= 1, got T = 6 queries and S = 5 keys"),
            ({"q": (2, 0, 4, 16)}, {}, "S >= T >= 1, got T = 0"),
            ({}, {"window_size": 0}, "counts the query itself and must be >= 1, got 0"),
            ({}, {"window_size": 2.5}, "window_size must be an integer, got 2.5"),
            ({}, {"window_size": True}, "window_size must be an integer, got True"),
            ({"k": (2, 5, 0, 16)}, {}, r"at least one head and one channel.*\(2, 5, 0, 16\)"),
            ({"q": (2, 5, 4, 0), "k": (2, 5, 2, 0)}, {}, "at least one head and one channel"),
            ({}, {"scale": 0.0}, r"scale must be > 0, got 0.0"),
            ({}, {"scale": torch.tensor(0.5)}, "scale must be a number, got a tensor"),
            ({}, {"impl": "fast"}, "unknown impl 'fast'; expected one of 'auto', 'reference'"),
            ({}, {"cu_seqlens": torch.tensor([0, 5])}, "expected B = 1, got B = 2"),
        ],
    )
    def test_message(self, shapes, options, message):
        with pytest.raises(ValueError, match=message):
            shared_key_attention(*self.make(**shapes), **options)

    def test_a_window_may_be_an_integer_of_numpy(self):
        given = self.make()
        expected = shared_key_attention(*given, window_size=3)
        assert torch.equal(shared_key_attention(*given, window_size=np.int64(3)), expected)

    @pytest.mark.parametrize(
        ("bounds", "message"),
        [
            ([0, 4], r"cu_seqlens must rise from 0 to T = 5, got \[0, 4\]"),
            ([0, 3, 2, 5], "must rise"),
            ([1, 5], "must rise"),
            ([[0, 5]], r"cu_seqlens must be integers \[N \+ 1\]"),
            ([0.0, 5.0], r"cu_seqlens must be integers \[N \+ 1\] with N >= 1, got torch.float32"),
        ],
    )
    def test_boundaries(self, bounds, message):
        q, k, v = (x[:1] for x in self.make())
        with pytest.raises(ValueError, match=message):
            shared_key_attention(q, k, v, cu_seqlens=torch.tensor(bounds))

    def test_boundaries_are_those_of_the_keys(self):
        q, k, v = (x[:1] for x in self.make(q=(2, 4, 4, 16)))
        with pytest.raises(ValueError, match=r"must rise from 0 to T = 5, got \[0, 4\]"):
            shared_key_attention(q, k, v, cu_seqlens=torch.tensor([0, 4]))

    def test_device_and_dtype(self):
        q, k, v = self.make()
        with pytest.raises(ValueError, match=r"k must be on the device of q \(cpu\), got meta"):
            shared_key_attention(q, k.to("meta"), v)
        with pytest.raises(ValueError, match="v must be floating point, got torch.int64"):
            shared_key_attention(q, k, v.long())


def test_every_implementation_is_listed():
    assert {"reference", "triton", "flex", "flash", *DIFFERENTIABLE} == set(api.IMPLS)


def test_flex_matches_the_definition(monkeypatch, device):
    on_gpu = device.type == "cuda"
    monkeypatch.setattr(flex, "_BLOCK", 128 if on_gpu else 16)
    for case in CASES if on_gpu else (CASES[0], CASES[8], CASES[14], CASES[18], CASES[21]):
        tensors, cu_seqlens = case.inputs(device)
        options = {"window_size": case.window, "cu_seqlens": cu_seqlens}
        exact = truth(tensors, **options)
        o = shared_key_attention(*tensors[:3], impl="flex", **options)
        assert relative_error(o, exact["o"]) < (LIMIT if device.type == "cpu" else 1e-3), case


def test_flex_lists_whole_blocks_and_skips_unseen_ones():
    mask = flex.block_mask(1024, 1024, 300, None, "cpu")
    dense = mask.to_dense()[0, 0].bool()
    i, j = torch.meshgrid(torch.arange(8), torch.arange(8), indexing="ij")
    assert torch.equal(dense, (j <= i) & (128 * j + 127 > 128 * i - 300))
    assert mask.full_kv_num_blocks.flatten().tolist() == [0, 1, 1, 1, 1, 1, 1, 1]


@pytest.mark.gpu
def test_flex_gradients(device):
    case = Case(1, 300, 300, 4, 1, 4, 64, 64, window=130, dtype=torch.bfloat16)
    tensors, _ = case.inputs(device)
    actual = run(shared_key_attention, *tensors, window_size=130, impl="flex")
    exact = truth(tensors, window_size=130)
    assert all(relative_error(actual[name], exact[name]) < 1e-2 for name in exact)


def test_flex_has_no_gradient_on_the_cpu():
    q, k, v = Case().inputs()[0][:3]
    with pytest.raises(ValueError, match="no gradient on the CPU"):
        shared_key_attention(q.requires_grad_(), k, v, impl="flex")


class FlashLibrary(types.ModuleType):
    """A stand-in for flash-attn on the CPU: the parameters of the version in their order, its
    window, its heads (i // n), its output; what a call does not know is a TypeError."""

    # flash-attn 2.8.3 and flash-attn-4 4.0.0b36
    DENSE: typing.ClassVar = {
        2: "q k v dropout_p softmax_scale causal window_size softcap alibi_slopes deterministic"
        " return_attn_probs",
        4: "q k v qv gather_kv_indices softmax_scale causal window_size learnable_sink softcap"
        " num_splits pack_gqa deterministic score_mod score_mod_bwd mask_mod aux_tensors"
        " aux_scalars block_sparse_tensors block_sparse_tensors_bwd return_lse"
        " gather_bwd_recompute_p gather_bwd_token_chunk",
    }
    PACKED: typing.ClassVar = {
        2: "q k v cu_seqlens_q cu_seqlens_k max_seqlen_q max_seqlen_k dropout_p softmax_scale"
        " causal window_size softcap alibi_slopes deterministic return_attn_probs block_table",
        4: "q k v qv cu_seqlens_q cu_seqlens_k max_seqlen_q max_seqlen_k min_seqlen_k seqused_q"
        " seqused_k gather_kv_indices page_table softmax_scale causal window_size learnable_sink"
        " softcap num_splits pack_gqa deterministic score_mod score_mod_bwd mask_mod"
        " block_sparse_tensors aux_tensors aux_scalars return_lse scheduler_metadata"
        " seqlen_k_per_split disable_scheduler_metadata gather_bwd_recompute_p"
        " gather_bwd_token_chunk",
    }
    READ: typing.ClassVar = {"softmax_scale", "causal", "window_size"}
    BOUNDS: typing.ClassVar = {"cu_seqlens_q", "cu_seqlens_k", "max_seqlen_q", "max_seqlen_k"}

    def __init__(self, version):
        super().__init__({2: "flash_attn", 4: "flash_attn.cute"}[version])
        self.version, self.calls = version, []

    def flash_attn_func(self, *args, **options):
        given = self._bind(self.DENSE, self.READ, args, options)
        return self._result(*self._attend(*(given[name] for name in "qkv"), given))

    def flash_attn_varlen_func(self, *args, **options):
        given = self._bind(self.PACKED, self.READ | self.BOUNDS, args, options)
        starts = [given["cu_seqlens_q"], given["cu_seqlens_k"]]
        assert all(x.dtype == torch.int32 and x.is_contiguous() for x in starts)
        if self.version == 2:
            most = given["max_seqlen_q"], given["max_seqlen_k"]
            assert all(x.diff().max() <= n for x, n in zip(starts, most, strict=True))
        q, k, v = (given[name] for name in "qkv")
        o, lse = [], []
        for n in range(len(starts[0]) - 1):
            mine, keys = (slice(*x[n : n + 2].tolist()) for x in starts)
            row = self._attend(q[mine][None], k[keys][None], v[keys][None], given)
            o.append(row[0][0])
            lse.append(row[1][0])
        return self._result(torch.cat(o), torch.cat(lse, dim=1))

    def _bind(self, names, read, args, options):
        names = names[self.version].split()
        signature = inspect.Signature(
            inspect.Parameter(name, inspect.Parameter.POSITIONAL_OR_KEYWORD, default=None)
            for name in names
        )
        given = signature.bind(*args, **options).arguments
        assert set(given) <= {"q", "k", "v"} | read
        self.calls.append(given)
        return given

    def _attend(self, q, k, v, given):
        # as many key as value heads, and one dtype: both versions check it
        assert k.shape == v.shape and q.shape[-1] == k.shape[-1]
        assert q.dtype == k.dtype == v.dtype and all(x.stride(-1) == 1 for x in (q, k, v))
        before, after = given["window_size"]
        if self.version == 2:
            before, after = (None if x < 0 else x for x in (before, after))
        elif None not in (before, after) and before < 0 and after < 0:
            before = after = None
        i = torch.arange(q.shape[1])[:, None] + k.shape[1] - q.shape[1]
        j = torch.arange(k.shape[1])[None]
        seen = torch.ones(q.shape[1], k.shape[1], dtype=torch.bool)
        seen &= (j <= i) if given["causal"] else True
        seen &= (j >= i - before) if before is not None else True
        seen &= (j <= i + after) if after is not None else True
        k, v = (x.repeat_interleave(q.shape[2] // x.shape[2], dim=2).float() for x in (k, v))
        scores = given["softmax_scale"] * torch.einsum("bthd,bshd->bhts", q.float(), k)
        scores = scores.masked_fill(~seen, float("-inf"))
        # rows that see nothing are zeros
        weights = scores.softmax(-1).nan_to_num()
        o = torch.einsum("bhts,bshd->bthd", weights, v).to(q.dtype)
        return o, scores.logsumexp(-1)

    def _result(self, o, lse):
        return o if self.version == 2 else (o, lse)


class TestFlash:
    """The adapter, over stand-ins for both versions of the library."""

    @pytest.fixture
    def install(self, monkeypatch):
        """Makes these versions the installed ones, on a device of this compute capability."""
        home = "rodimus_kernels.shared_key_attention.flash"

        def forget():
            sys.modules.pop(home, None)
            vars(_dispatch._imported).pop(home.replace(".", "_"), None)

        def install(*versions, major=9):
            found = {version: FlashLibrary(version) for version in versions}
            # version 4 alone is a folder flash_attn without functions
            package = found.get(2) or (types.ModuleType("flash_attn") if found else None)
            # version 2 brings a flash_attn.cute of its own, without what is asked of version 4
            cute = found.get(4) or (types.ModuleType("flash_attn.cute") if found else None)
            monkeypatch.setitem(sys.modules, "flash_attn", package)
            monkeypatch.setitem(sys.modules, "flash_attn.cute", cute)

            def version(name):
                if {"flash-attn": 2, "flash-attn-4": 4}[name] not in found:
                    raise importlib.metadata.PackageNotFoundError(name)

            monkeypatch.setattr(importlib.metadata, "version", version)
            forget()
            if found:
                flash = importlib.import_module(home)
                monkeypatch.setattr(flash, "_capability", lambda device: major)
            return found

        yield install
        forget()

    @pytest.mark.parametrize(
        "case",
        [
            Case(),
            Case(window=1),
            Case(window=None),
            Case(queries=5),
            Case(queries=21, window=None),
            Case(heads=6, key_heads=3, value_heads=2),
            Case(value_heads=1),
            packed(9, 0, 28),
            packed(1, 1, 1, 40, window=None),
            Case(1, 21, 53, documents=(10, 5, 20, 0, 18)),
            Case(1, 21, 53, window=8, documents=(10, 5, 20, 18)),
        ],
        ids=str,
    )
    @pytest.mark.parametrize("version", [2, 4])
    def test_matches_the_definition(self, install, version, case):
        library = install(version)[version]
        tensors, cu_seqlens = dataclasses.replace(case, dtype=torch.float16).inputs()
        options = {"window_size": case.window, "scale": 0.3, "cu_seqlens": cu_seqlens}
        actual = run(shared_key_attention, *tensors, impl="flash", **options)
        assert len(library.calls) == 1 and actual["o"].shape == tensors[3].shape
        # the stand-in computes in float32 and rounds to float16 what it returns
        assert_close(actual, truth(tensors, **options), 1e-3)

    @pytest.mark.gpu
    @pytest.mark.parametrize(
        "case",
        [
            Case(2, 300, 300, 4, 1, 4, 128, 128, window=130),
            Case(1, 70, 300, 4, 1, 4, 128, 128, window=None),
            packed(90, 0, 210, window=130, dim=64, value_dim=64),
            Case(1, 90, 300, 4, 1, 4, 128, 128, window=130, documents=(100, 60, 0, 140)),
        ],
        ids=str,
    )
    def test_the_installed_library_matches_the_definition(self, case, device):
        tensors, cu_seqlens = dataclasses.replace(case, dtype=torch.bfloat16).inputs(device)
        options = {"window_size": case.window, "cu_seqlens": cu_seqlens}
        try:
            actual = run(shared_key_attention, *tensors, impl="flash", **options)
        except ImportError as error:
            pytest.skip(str(error))
        assert_close(actual, truth(tensors, **options), 1e-2)

    @pytest.mark.parametrize("version", [2, 4])
    def test_one_key_head_is_expanded_without_a_copy(self, install, version):
        library = install(version)[version]
        q, k, v = (x.half() for x in packed(9, 28).inputs()[0][:3])
        for cu_seqlens in (None, boundaries((9, 28))):
            shared_key_attention(q, k, v, cu_seqlens=cu_seqlens, impl="flash")
            given = library.calls[-1]["k"]
            assert given.shape[-2] == q.shape[2] and given.stride(-2) == 0
            assert given.data_ptr() == k.data_ptr()

    @pytest.mark.parametrize("version", [2, 4])
    def test_boundaries_of_any_integer_and_stride(self, install, version):
        install(version)
        q, k, v = (x.half() for x in packed(9, 28).inputs()[0][:3])
        bounds = torch.tensor([[0, 1], [9, 1], [37, 1]], dtype=torch.int32)[:, 0]
        expected = shared_key_attention(q, k, v, cu_seqlens=bounds.clone(), impl="flash")
        for given in (bounds, bounds.long()):
            o = shared_key_attention(q, k, v, cu_seqlens=given, impl="flash")
            assert torch.equal(o, expected)

    @pytest.mark.parametrize(
        ("versions", "major", "dim", "expected"),
        [
            ((2, 4), 9, 128, 4),
            ((2, 4), 9, 256, 4),
            ((2, 4), 9, 264, 2),
            ((2, 4), 9, 20, 2),
            ((2, 4), 10, 128, 4),
            # no window in the backward pass
            ((2, 4), 10, 256, 2),
            ((2, 4), 11, 64, 4),
            ((2, 4), 8, 128, 2),
            ((2, 4), 12, 128, 2),
            ((2, 4), 0, 128, 2),
            ((2,), 9, 128, 2),
            ((4,), 9, 128, 4),
        ],
    )
    def test_version_4_where_it_takes_the_device_and_the_head(
        self, install, versions, major, dim, expected
    ):
        found = install(*versions, major=major)
        case = Case(1, 3, 3, 2, 1, 2, dim, dim, dtype=torch.bfloat16)
        shared_key_attention(*case.inputs()[0][:3], impl="flash")
        called = [version for version, library in found.items() if library.calls]
        assert called == [expected]

    @pytest.mark.parametrize(
        ("major", "where"), [(8, "compute capability 8"), (0, "no GPU")], ids=str
    )
    def test_version_4_alone_says_what_it_does_not_take(self, install, major, where):
        install(4, major=major)
        q, k, v = (x.half() for x in Case().inputs()[0][:3])
        message = f"flash-attn 4 does not take D = 16 on {where}.*flash-attn for version 2"
        with pytest.raises(ImportError, match=message):
            shared_key_attention(q, k, v, impl="flash")

    def test_messages(self, install):
        install(2)
        q, k, v = Case(value_dim=8).inputs()[0][:3]
        with pytest.raises(ValueError, match="expected float16 or bfloat16 and D = Dv, got"):
            shared_key_attention(q, k, v, impl="flash")

    def test_absence_is_said(self, install):
        install()
        q, k, v = (x.half() for x in Case().inputs()[0][:3])
        message = (
            r"\(impl='flash'\) cannot be loaded.*flash_attn is not installed"
            r" \(pip install flash-attn-4, or flash-attn for version 2"
        )
        with pytest.raises(ImportError, match=message):
            shared_key_attention(q, k, v, impl="flash")


@pytest.mark.parametrize(
    ("triton", "dim", "dtype", "expected"),
    [
        (True, 128, torch.bfloat16, "triton"),
        (True, 256, torch.bfloat16, "triton"),
        (True, 256, torch.float16, "triton"),
        (True, 264, torch.bfloat16, "sdpa"),
        (True, 128, torch.float32, "triton"),
        (True, 136, torch.float32, "sdpa"),
        (True, 128, torch.float64, "sdpa"),
        (False, 128, torch.bfloat16, "sdpa"),
        (False, 264, torch.float64, "sdpa"),
    ],
)
def test_automatic_choice(triton, dim, dtype, expected):
    assert api._choose(triton, dim, dtype) == expected


class TestRope:
    def test_equals_the_formula(self):
        """Channel d and channel d + dim / 2 turn by position * base ** (-2 d / dim)."""
        x = torch.randn(2, 5, 3, 16, dtype=torch.float64)
        position_ids = torch.tensor([[0, 1, 2, 3, 4], [7, 1000, 0, 1, 2048]])
        for dim in (16, 8, 2):
            cos, sin = rope_tables(position_ids, dim, dtype=torch.float64)
            rotated = rope(x, cos, sin)
            for d in range(dim // 2):
                angle = position_ids.double() * 10000.0 ** (-2 * d / dim)
                pair = torch.complex(x[..., d], x[..., d + dim // 2])
                turned = pair * torch.polar(torch.ones(()).double(), angle)[..., None]
                # angles are float32 by definition: 2048 rad to 1e-4
                assert torch.allclose(rotated[..., d], turned.real, atol=3e-4)
                assert torch.allclose(rotated[..., d + dim // 2], turned.imag, atol=3e-4)
            assert torch.equal(rotated[..., dim:], x[..., dim:])

    def test_scores_depend_on_distance_alone(self):
        q, k = torch.randn(2, 1, 1, 1, 32, dtype=torch.float64)

        def score(i, j):
            turn = lambda x, t: rope(x, *rope_tables(torch.tensor([[t]]), 32, dtype=torch.float64))
            return (turn(q, i) * turn(k, j)).sum()

        assert torch.allclose(score(40, 33), score(7, 0), atol=1e-5)
        assert not torch.allclose(score(40, 33), score(8, 0), atol=1e-2)

    def test_what_is_kept_serves_everywhere(self, monkeypatch):
        """Frequencies found in a mode of torch are those of a plain call, and plain themselves."""
        expected = rope_tables(torch.arange(9)[None], 16)
        modes = {
            "inference": torch.inference_mode,
            "fake": lambda: FakeTensorMode(allow_non_fake_inputs=True),
            "device": lambda: torch.device("meta"),
        }
        for name, mode in modes.items():
            monkeypatch.setattr(reference, "_FREQUENCIES", kept := {})
            positions = torch.arange(9)[None]
            with mode():
                inside = rope_tables(positions, 16)
            angles = torch.ones(1, 9, 8, requires_grad=True)
            for x in kept.values():
                assert type(x) is torch.Tensor and not x.is_inference(), name
                (angles * x).sum().backward()
            if name != "fake":
                assert all(map(torch.equal, inside, expected)), name
            assert all(map(torch.equal, rope_tables(positions, 16), expected)), name
        assert len(kept) == 1

    def test_bases_and_sizes_are_kept_apart(self):
        for dim, base in ((8, 10000.0), (8, 500.0), (16, 500.0), (8, 10000.0)):
            cos, _ = rope_tables(torch.ones(1, 1, dtype=torch.long), dim, base=base)
            angles = [base ** (-2 * d / dim) for d in range(dim // 2)]
            assert torch.allclose(cos[0, 0], torch.tensor(angles).cos(), atol=1e-6)

    def test_tables_are_rounded_to_the_dtype_of_the_model(self):
        tables = rope_tables(torch.arange(9)[None], 16, dtype=torch.bfloat16)
        exact = rope_tables(torch.arange(9)[None], 16)
        for table, wide in zip(tables, exact, strict=True):
            assert table.dtype == torch.bfloat16 and torch.equal(table, wide.bfloat16())

    def test_messages(self):
        x = torch.randn(2, 5, 3, 16)
        cos, sin = rope_tables(torch.arange(5)[None], 16)
        with pytest.raises(ValueError, match=r"x must have shape \[B, T, H, D\]"):
            rope(x[0], cos, sin)
        with pytest.raises(ValueError, match=r"cos must have shape \[1 or B, 5, dim / 2\]"):
            rope(x, cos[:, :4], sin)
        with pytest.raises(ValueError, match=r"sin must have shape \[1, 5, 8\], got \(1, 5, 4\)"):
            rope(x, cos, sin[..., :4])
        with pytest.raises(ValueError, match=r"cos must be \[1 or 2, 5, 1 to 8\]"):
            rope(x, *rope_tables(torch.arange(5)[None], 32))
