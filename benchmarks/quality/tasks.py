"""Tasks without downloads: associative recall, passkey retrieval, Python sources as bytes.

Each returns ``Batch(ids, targets)``: both long ``[B, T]``; a target of -100 is not asked for.
Everything is drawn from a generator, so a seed and a shape determine a batch on one kind of device.
"""

from __future__ import annotations

import os
import sysconfig
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch

IGNORED = -100


class Batch(NamedTuple):
    """Inputs, and the token that is asked for at each position."""

    ids: torch.Tensor
    targets: torch.Tensor


def _distinct(
    low: int, high: int, batch: int, count: int, generator: torch.Generator
) -> torch.Tensor:
    """``[batch, count]`` tokens of ``low .. high - 1``, all different within a row."""
    scores = torch.rand(batch, high - low, device=generator.device, generator=generator)
    return low + scores.topk(count, dim=1).indices


def mqar(
    batch: int,
    length: int,
    pairs: int,
    vocab: int,
    generator: torch.Generator,
    *,
    power: float = 0.01,
    random_fill: bool = True,
) -> Batch:
    """Multi-query associative recall, with the parameters of Zoology (arXiv 2312.04927).

    ``pairs`` keys and values alternate at the front. Later each key returns once, and there its
    value is asked for. The gap before a key's return follows a power law, so most return early.

    Args:
        batch, length: B and T.
        pairs: Keys and values, at most ``length // 4``.
        vocab: Keys come from 1 .. vocab / 2 - 1, values from vocab / 2 .. vocab - 1.
        generator: Its device is the batch's.
        power: Exponent ``a`` of the gap's density ``a g^(a - 1)``.
        random_fill: Fill the rest with random tokens, else with token 0.

    Raises:
        ValueError: more pairs than there is room, or than there are keys.
    """
    if not 1 <= pairs <= min(length // 4, vocab // 2 - 1):
        raise ValueError(
            f"pairs must be 1 .. {min(length // 4, vocab // 2 - 1)} for length {length} and vocab"
            f" {vocab}, got {pairs}"
        )
    device = generator.device
    keys = _distinct(1, vocab // 2, batch, pairs, generator)
    values = _distinct(vocab // 2, vocab, batch, pairs, generator)
    places = (length - 2 * pairs) // 2
    density = torch.arange(1, places + 1, device=device, dtype=torch.float64) ** (power - 1)
    # the largest of log p plus Gumbel noise are a sample without replacement
    noise = torch.rand(batch, places, device=device, generator=generator, dtype=torch.float64)
    gaps = (density.log() - (-noise.clamp_min(1e-300).log()).log()).topk(pairs, dim=1).indices
    where = 2 * pairs + 2 * gaps

    ids = torch.zeros(batch, length, dtype=torch.long, device=device)
    targets = torch.full_like(ids, IGNORED)
    ids[:, 0 : 2 * pairs : 2] = keys
    ids[:, 1 : 2 * pairs : 2] = values
    ids.scatter_(1, where, keys)
    targets.scatter_(1, where, values)
    if random_fill:
        fill = torch.randint(vocab, ids.shape, device=device, generator=generator)
        ids = torch.where(ids == 0, fill, ids)
    return Batch(ids, targets)


def passkey(batch: int, length: int, depth: float, vocab: int, generator: torch.Generator) -> Batch:
    """One key and its value among filler; the key returns as the last token.

    Args:
        batch, length: B and T, T at least 4.
        depth: Place of the pair, 0 at the front to 1 at the end.
        vocab: The lower half is filler, then a quarter of keys, a quarter of values.
        generator: Its device is the batch's.
    """
    if length < 4 or not 0 <= depth <= 1:
        raise ValueError(
            f"expected a length of at least 4 and a depth in 0 .. 1, got {length}, {depth}"
        )
    draw = lambda low, high, *shape: torch.randint(
        low, high, shape, device=generator.device, generator=generator
    )
    ids = draw(0, vocab // 2, batch, length)
    key, value = draw(vocab // 2, vocab * 3 // 4, batch), draw(vocab * 3 // 4, vocab, batch)
    place = round(depth * (length - 3))
    ids[:, place], ids[:, place + 1], ids[:, -1] = key, value, key
    targets = torch.full_like(ids, IGNORED)
    targets[:, -1] = value
    return Batch(ids, targets)


def python_sources(share: str, most: int = 2**24) -> torch.Tensor:
    """Bytes of the standard library's sources, uint8 ``[N]``, files separated by a zero.

    Its character tables are left out: they are so alike that a held-out one would not be new.

    Args:
        share: ``train``, or ``val``, which is one file in twenty by a checksum of its name.
        most: Stop after this many bytes.
    """
    if share not in ("train", "val"):
        raise ValueError(f"share must be 'train' or 'val', got {share!r}")
    held, parts = 0, []
    for path in _library_files():
        if (zlib.crc32(path.name.encode()) % 20 == 0) != (share == "val") or held >= most:
            continue
        text = path.read_bytes() + b"\0"
        parts.append(text)
        held += len(text)
    return torch.frombuffer(bytearray(b"".join(parts)[:most]), dtype=torch.uint8)


def _library_files() -> Iterator[Path]:
    """Sources of the standard library in a stable order, without tests and installed packages."""
    left_out = {"site-packages", "test", "tests", "idlelib", "encodings"}
    for folder, inside, files in os.walk(sysconfig.get_paths()["stdlib"]):
        inside[:] = sorted(set(inside) - left_out)
        yield from (Path(folder, name) for name in sorted(files) if name.endswith(".py"))


def language(source: torch.Tensor, batch: int, length: int, generator: torch.Generator) -> Batch:
    """Random windows of a text; every next byte is asked for."""
    starts = torch.randint(source.numel() - length - 1, (batch,), generator=generator)
    rows = torch.stack([source[start : start + length + 1] for start in starts.tolist()]).long()
    return Batch(rows[:, :-1].contiguous(), rows[:, 1:].contiguous())
