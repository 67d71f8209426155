"""The chunked loss against the formula with all logits, in float64."""

import pytest
import torch
import torch.nn.functional as F

from rodimus_kernels import cross_entropy, linear_cross_entropy
from rodimus_kernels.testing import assert_close, relative_error
from tests.kernels.device import DEVICE, TRITON_MARKS, triton_module

VOCABULARY = 37
IMPLS = ["reference", "eager", pytest.param("triton", marks=TRITON_MARKS)]


def make(tokens=23, dtype=torch.float32):
    labels = torch.randint(VOCABULARY, (tokens,))
    labels[::5] = -100
    hidden, weight = torch.randn(tokens, 16), torch.randn(VOCABULARY, 16)
    return hidden.to(DEVICE, dtype), weight.to(DEVICE, dtype), labels.to(DEVICE)


def run(function, hidden, weight, labels, dtype, **options):
    leaves = [x.detach().to(dtype).requires_grad_() for x in (hidden, weight)]
    loss, logged = function(*leaves, labels, **options)
    (3 * loss).backward()
    names = ("loss", "cross_entropy", "dhidden", "dweight")
    return dict(zip(names, (loss.detach(), logged, *(x.grad for x in leaves)), strict=True))


def exact(hidden, weight, labels, *, z_loss=0.0, ignore_index=-100, reduction="sum"):
    """torch's own cross entropy on the full logits."""
    logits = hidden @ weight.t()
    valid = labels != ignore_index
    plain = F.cross_entropy(logits, labels, ignore_index=ignore_index, reduction=reduction)
    square = logits.logsumexp(-1).square()[valid]
    penalty = square.mean() if reduction == "mean" else square.sum()
    return plain + z_loss * penalty, plain.detach()


# tokens at once
@pytest.fixture(params=[256, 12, 1], ids=["whole", "halves", "tokens"])
def chunks(request, monkeypatch):
    monkeypatch.setattr(cross_entropy, "_chunk_rows", lambda *shape: request.param)


# logits of a row at once: several blocks with a rest
@pytest.fixture
def blocks(monkeypatch):
    module = triton_module("rodimus_kernels.triton_cross_entropy")
    monkeypatch.setattr(module, "_LOGITS", 16)
    monkeypatch.setattr(module, "_WARPS", 1)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("reduction", ["sum", "mean"])
@pytest.mark.parametrize("z_loss", [0.0, 0.3])
def test_matches_full_logits_with_gradients(chunks, impl, reduction, z_loss):
    inputs, options = make(), {"z_loss": z_loss, "reduction": reduction}
    actual = run(linear_cross_entropy, *inputs, torch.float32, impl=impl, **options)
    assert_close(actual, run(exact, *inputs, torch.float64, **options), 2e-6)


@pytest.mark.parametrize("impl", IMPLS[2:])
def test_a_row_in_several_blocks(blocks, impl):
    inputs = make()
    actual = run(linear_cross_entropy, *inputs, torch.float32, impl=impl, z_loss=0.3)
    assert_close(actual, run(exact, *inputs, torch.float64, z_loss=0.3), 2e-6)


@pytest.mark.parametrize("impl", IMPLS)
def test_another_ignore_index(impl):
    hidden, weight, labels = make()
    labels[labels == -100] = 3
    inputs = (hidden, weight, labels)
    actual = run(linear_cross_entropy, *inputs, torch.float32, impl=impl, ignore_index=3)
    assert_close(actual, run(exact, *inputs, torch.float64, ignore_index=3), 2e-6)


@pytest.mark.parametrize("impl", IMPLS)
def test_an_ignore_index_behind_the_vocabulary(impl):
    hidden, weight, labels = make()
    expected = run(linear_cross_entropy, hidden, weight, labels, torch.float32, impl=impl)
    labels = labels.masked_fill(labels == -100, VOCABULARY)
    options = {"impl": impl, "ignore_index": VOCABULARY}
    actual = run(linear_cross_entropy, hidden, weight, labels, torch.float32, **options)
    assert all(torch.equal(actual[name], expected[name]) for name in expected)


def test_half_precision_keeps_float32_logits():
    inputs = make(200, torch.bfloat16)
    loss, _ = linear_cross_entropy(*inputs)
    truth, _ = exact(inputs[0].double(), inputs[1].double(), inputs[2])
    # the CPU product rounds logits to 8 bits; their errors average out over the tokens
    assert loss.dtype == torch.float32 and relative_error(loss, truth) < 2e-3


@pytest.mark.parametrize("impl", IMPLS[2:])
def test_half_precision_gradients(blocks, chunks, impl):
    inputs = make(23, torch.bfloat16)
    actual = run(linear_cross_entropy, *inputs, torch.bfloat16, impl=impl, z_loss=0.1)
    # logits and their gradient are rounded to 8 bits, and on a CPU every chunk's weight gradient
    assert_close(actual, run(exact, *inputs, torch.float64, z_loss=0.1), 2e-2)


@pytest.mark.parametrize("impl", IMPLS[2:])
def test_huge_and_masked_logits_stay_finite(blocks, impl):
    module = triton_module("rodimus_kernels.triton_cross_entropy")
    logits = torch.randn(3, VOCABULARY, device=DEVICE) * 1e4
    logits[0, 20:] = -float("inf")
    logits[1, :17] = -float("inf")
    labels = torch.tensor([4, 30, -100], device=DEVICE)
    truth = logits.double().requires_grad_()
    loss = F.cross_entropy(truth, labels, reduction="none")
    loss.sum().backward()
    losses = module.rows(logits, labels, 0.0, -100, True)
    torch.testing.assert_close(losses[:, 1].double(), loss.detach(), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(logits.double(), truth.grad, rtol=1e-6, atol=1e-6)


def test_without_gradients_the_loss_is_the_same():
    hidden, weight, labels = make()
    with torch.no_grad():
        plain = linear_cross_entropy(hidden, weight, labels, z_loss=0.1)
    graded = linear_cross_entropy(hidden.requires_grad_(), weight, labels, z_loss=0.1)
    assert plain[0] == graded[0] and plain[1] == graded[1]


def test_without_gradients_none_are_taken(monkeypatch):
    """Parameters ask for them whether or not the mode does."""
    hidden, weight, labels = make()
    weight = torch.nn.Parameter(weight)
    monkeypatch.setattr(cross_entropy, "_add_product", None)
    with torch.no_grad():
        linear_cross_entropy(hidden, weight, labels)
    with pytest.raises(TypeError):
        linear_cross_entropy(hidden, weight, labels)


def test_the_loss_may_be_changed_in_place():
    hidden, weight, labels = make()
    loss, _ = linear_cross_entropy(hidden.requires_grad_(), weight, labels)
    loss /= 2
    loss.backward()
    assert hidden.grad.any()


def test_the_factor_of_a_bfloat16_gradient_is_not_rounded():
    """A mean over tokens multiplies every gradient by 1 / tokens: rounded to bfloat16 it would
    stretch all of them alike."""
    hidden, weight, labels = make(200, torch.bfloat16)
    hidden.requires_grad_(), weight.requires_grad_()
    loss, _ = linear_cross_entropy(hidden, weight, labels, impl="eager")
    grads = torch.autograd.grad(loss, (hidden, weight), retain_graph=True)
    third = torch.autograd.grad(loss, (hidden, weight), torch.tensor(1 / 3, device=DEVICE))
    for whole, part in zip(grads, third, strict=True):
        assert torch.equal(part, (whole.float() / 3).bfloat16())


@pytest.mark.parametrize("impl", IMPLS)
def test_a_mean_in_float16_is_finite_where_the_sum_is_not(impl):
    hidden = torch.full((80, 8), 1024.0, dtype=torch.float16, device=DEVICE)
    weight = torch.zeros(16, 8, dtype=torch.float16, device=DEVICE, requires_grad=True)
    labels = torch.zeros(len(hidden), dtype=torch.long, device=DEVICE)
    loss, _ = linear_cross_entropy(hidden, weight, labels, reduction="mean", impl=impl)
    loss.backward()
    # (softmax - onehot) x 1024, 80 times beyond float16's range
    expected = torch.full_like(weight, 64.0)
    expected[0] = 64.0 - 1024.0
    assert torch.allclose(weight.grad, expected, rtol=2**-10)


def test_opcheck():
    triton_module("rodimus_kernels.triton_cross_entropy")
    arguments = (torch.randn(4, VOCABULARY, device=DEVICE), make(4)[2], 0.1, -100, True)
    torch.library.opcheck(torch.ops.rodimus.cross_entropy_rows.default, arguments)


def test_chunks_hold_the_bytes_they_may_in_whole_tiles_of_rows():
    rows = lambda *shape: cross_entropy._chunk_rows(*shape, torch.device("cuda"))
    assert rows(2, 126464) == 4096 and rows(4, 126464) == 2048
    assert rows(2, 1 << 24) == 256


@pytest.mark.parametrize("impl", IMPLS)
def test_labels_of_any_integers(impl):
    hidden, weight, labels = make()
    expected = linear_cross_entropy(hidden, weight, labels, impl=impl)
    for dtype in (torch.int32, torch.int16, torch.int8):
        found = linear_cross_entropy(hidden, weight, labels.to(dtype), impl=impl)
        assert all(map(torch.equal, found, expected))


def test_frozen_head_gets_no_gradient():
    hidden, weight, labels = make()
    loss, _ = linear_cross_entropy(hidden.requires_grad_(), weight, labels)
    loss.backward()
    assert hidden.grad is not None and weight.grad is None


def test_logged_value_carries_no_gradient():
    hidden, weight, labels = make()
    _, logged = linear_cross_entropy(hidden.requires_grad_(), weight, labels, z_loss=0.1)
    assert not logged.requires_grad


@pytest.mark.parametrize("label", [-1, 37, 10**6])
def test_a_label_outside_the_vocabulary_is_seen_in_the_loss(label):
    """Where nothing can look at labels without waiting for the device."""
    module = triton_module("rodimus_kernels.triton_cross_entropy")
    logits = torch.randn(3, 37, device=DEVICE)
    labels = torch.tensor([5, label, -100], device=DEVICE)
    losses = module.rows(logits, labels, 0.1, -100, True)
    assert losses.isnan().any(1).tolist() == [False, True, False]


def test_bad_input_says_what_was_expected():
    hidden, weight, labels = make()
    with pytest.raises(ValueError, match=r"weight must have shape \[vocabulary, 16\]"):
        linear_cross_entropy(hidden, weight[:, :3], labels)
    with pytest.raises(ValueError, match=r"labels must have shape \[23\], got \(22,\)"):
        linear_cross_entropy(hidden, weight, labels[:-1])
    with pytest.raises(ValueError, match=r"labels must be in 0 .. 36 or -100, got 0 .. 37"):
        linear_cross_entropy(hidden, weight, labels.clamp(min=0).index_fill(0, torch.tensor(1), 37))
    for impl in ("reference", "eager", "auto"):
        with pytest.raises(ValueError, match="dtype of hidden, torch.float32, got torch.bfloat16"):
            linear_cross_entropy(hidden, weight.bfloat16(), labels, impl=impl)
    with pytest.raises(ValueError, match="hidden must be floating point, got torch.int64"):
        linear_cross_entropy(hidden.long(), weight.long(), labels)
    for wrong in (labels.float(), labels > 3):
        with pytest.raises(ValueError, match=f"labels must be integers, got {wrong.dtype}"):
            linear_cross_entropy(hidden, weight, wrong)
    with pytest.raises(ValueError, match="reduction must be 'sum' or 'mean', got 'max'"):
        linear_cross_entropy(hidden, weight, labels, reduction="max")
    with pytest.raises(ValueError, match="unknown impl 'fast'"):
        linear_cross_entropy(hidden, weight, labels, impl="fast")
