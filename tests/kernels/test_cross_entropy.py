"""The chunked loss against the formula with all logits, in float64."""

import pytest
import torch
import torch.nn.functional as F

from rodimus_kernels import cross_entropy, linear_cross_entropy
from rodimus_kernels.testing import assert_close, relative_error

VOCABULARY = 37


def make(tokens=23, dtype=torch.float32):
    labels = torch.randint(VOCABULARY, (tokens,))
    labels[::5] = -100
    hidden, weight = torch.randn(tokens, 16), torch.randn(VOCABULARY, 16)
    return hidden.to(dtype), weight.to(dtype), labels


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


# logits held at once: all, two chunks, one token at a time
@pytest.fixture(params=[1 << 24, 12 * VOCABULARY, 1], ids=["whole", "halves", "tokens"])
def chunks(request, monkeypatch):
    monkeypatch.setattr(cross_entropy, "_LOGITS_AT_ONCE", request.param)


@pytest.mark.parametrize("impl", cross_entropy.IMPLS)
@pytest.mark.parametrize("reduction", ["sum", "mean"])
@pytest.mark.parametrize("z_loss", [0.0, 0.3])
def test_matches_full_logits_with_gradients(chunks, impl, reduction, z_loss):
    inputs, options = make(), {"z_loss": z_loss, "reduction": reduction}
    actual = run(linear_cross_entropy, *inputs, torch.float32, impl=impl, **options)
    assert_close(actual, run(exact, *inputs, torch.float64, **options), 2e-6)


@pytest.mark.parametrize("impl", cross_entropy.IMPLS)
def test_another_ignore_index(impl):
    hidden, weight, labels = make()
    labels[labels == -100] = 3
    inputs = (hidden, weight, labels)
    actual = run(linear_cross_entropy, *inputs, torch.float32, impl=impl, ignore_index=3)
    assert_close(actual, run(exact, *inputs, torch.float64, ignore_index=3), 2e-6)


def test_half_precision_keeps_float32_logits():
    inputs = make(200, torch.bfloat16)
    loss, _ = linear_cross_entropy(*inputs)
    truth, _ = exact(inputs[0].double(), inputs[1].double(), inputs[2])
    # the CPU product rounds logits to 8 bits; their errors average out over the tokens
    assert loss.dtype == torch.float32 and relative_error(loss, truth) < 2e-3


def test_frozen_head_gets_no_gradient():
    hidden, weight, labels = make()
    loss, _ = linear_cross_entropy(hidden.requires_grad_(), weight, labels)
    loss.backward()
    assert hidden.grad is not None and weight.grad is None


def test_logged_value_carries_no_gradient():
    hidden, weight, labels = make()
    _, logged = linear_cross_entropy(hidden.requires_grad_(), weight, labels, z_loss=0.1)
    assert not logged.requires_grad


def test_bad_input_says_what_was_expected():
    hidden, weight, labels = make()
    with pytest.raises(ValueError, match=r"weight must have shape \[vocabulary, 16\]"):
        linear_cross_entropy(hidden, weight[:, :3], labels)
    with pytest.raises(ValueError, match=r"labels must have shape \[23\], got \(22,\)"):
        linear_cross_entropy(hidden, weight, labels[:-1])
    with pytest.raises(ValueError, match=r"labels must be in 0 .. 36 or -100, got 0 .. 37"):
        linear_cross_entropy(hidden, weight, labels.clamp(min=0).index_fill(0, torch.tensor(1), 37))
    with pytest.raises(ValueError, match="reduction must be 'sum' or 'mean', got 'max'"):
        linear_cross_entropy(hidden, weight, labels, reduction="max")
    with pytest.raises(ValueError, match="unknown impl 'fast'"):
        linear_cross_entropy(hidden, weight, labels, impl="fast")
