"""Running a model in pieces, padded and packed, to compare with one forward."""

from collections.abc import Sequence

import torch
from torch import Tensor

from tests.device import here
from tests.model.helpers import random_ids

TABLE = "ways of running, against one full forward (max |a - b| / max |b|)"
# fp32, logits of order 10: shapes of matrix products differ, and with them the order of sums
BOUND = 1e-5
# bf16, L2 error over that of as many roundings elsewhere, which is about the same: their sum over
# thousands of numbers hardly depends on the way each of them goes. Measured 0.87 to 1.08; a second
# error of 3/4 the size of all roundings makes it sqrt(1 + 9 / 16)
SHARE = 1.25

# 1 a real token, 0 padding; the window of the tiny models sees 9 keys and the convolution 4 inputs
PADDINGS = {
    "left": ("1" * 24, "0" * 9 + "1" * 15, "0" * 22 + "11"),
    "right": ("1" * 24, "1" * 15 + "0" * 9, "11" + "0" * 22),
    "both": ("0" * 3 + "1" * 20 + "0", "0" * 6 + "1" * 7 + "0" * 11, "0" + "1" * 20 + "000"),
    "interior": ("111" + "00" + "1" * 19, "1" * 8 + "0" * 13 + "111", "011011101001" * 2),
}


@torch.no_grad()
def full(model, ids: Tensor) -> Tensor:
    """Logits of one forward over whole, unpadded rows: what every way is compared with."""
    return model(ids, use_cache=False).logits


@torch.no_grad()
def in_pieces(model, ids: Tensor, sizes: Sequence[int], cache=None, mask=None, **options) -> Tensor:
    """Logits of ``ids`` fed through a cache in pieces of the given sizes."""
    assert sum(sizes) == ids.shape[1]
    logits, end = [], 0
    for size in sizes:
        start, end = end, end + size
        visible = None if mask is None else mask[:, :end]
        out = model(
            ids[:, start:end],
            attention_mask=visible,
            past_key_values=cache,
            use_cache=True,
            **{name: value[:, start:end] for name, value in options.items()},
        )
        cache = out.past_key_values
        logits.append(out.logits)
    return torch.cat(logits, 1)


def padded_batch(kind: str, tail: int = 0) -> tuple[Tensor, Tensor]:
    """``(ids, mask)`` of three rows, then ``tail`` real tokens; padding holds random tokens."""
    rows = [[int(bit) for bit in pattern] + [1] * tail for pattern in PADDINGS[kind]]
    mask = here(torch.tensor(rows))
    return random_ids(*mask.shape, seed=len(kind)), mask


def rows_alone(model, ids: Tensor, mask: Tensor) -> Tensor:
    """Logits of the real tokens of each row, run alone, concatenated: ``[tokens, vocab]``."""
    rows = (row[real.bool()] for row, real in zip(ids, mask, strict=True))
    return torch.cat([full(model, row[None])[0] for row in rows])


def positions_of(mask: Tensor) -> Tensor:
    """Position of each real token among the real tokens of its row, as generate() counts them."""
    return (mask.cumsum(-1) - 1).clamp(min=0)


def packed_positions(lengths: Sequence[int]) -> Tensor:
    """Positions ``[1, T]`` that restart at 0 at each document."""
    return here(torch.cat([torch.arange(length) for length in lengths])[None])


def documents_alone(model, ids: Tensor, lengths: Sequence[int]) -> Tensor:
    """Logits ``[1, T, vocab]`` of the documents of one row, each run alone."""
    return torch.cat([full(model, piece) for piece in ids.split(list(lengths), dim=1)], 1)
