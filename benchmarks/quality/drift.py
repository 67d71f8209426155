"""Whether anything drifts over a long context: ``python -m benchmarks.quality.drift``.

Models with random weights read up to 131,072 random tokens in chunks. At powers of two it records
how large the recurrent states are, how far logits in bfloat16 are from those in float32 with the
same weights, and how far logits of tokens decoded one by one are from those of the same tokens read
at once. An error that grew with the context would be a defect, whatever the weights.

On a CPU the models have the shape of the `make demo` model, on a GPU those of the 1.6B and 1.4B.
"""

from __future__ import annotations

import argparse
import copy
import math
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from transformers import DynamicCache

from rodimus import RodimusConfig, RodimusForCausalLM

from .. import machine, peers, records, sizes

FIRST, MOST = 2**10, 2**17
COMPARED = 16
"""Tokens after each length whose logits are compared."""


def shape(block_type: str, scale: str) -> RodimusConfig:
    """The demo's shape with that block, or the published one."""
    if scale == "full":
        return RodimusConfig(**sizes.config_of(block_type, scale))
    path = machine.ROOT / "configs" / "model" / "rodimus_plus_2m.json"
    config = RodimusConfig.from_json_file(path).to_dict()
    return RodimusConfig(**{**config, "block_type": block_type})


def made(config: RodimusConfig, device: torch.device) -> dict[torch.dtype, RodimusForCausalLM]:
    """One model in two dtypes, with the same weights, rounded to bfloat16."""
    torch.manual_seed(peers.SEED)
    rounded = RodimusForCausalLM(config).eval().to(device, torch.bfloat16)
    return {torch.float32: copy.deepcopy(rounded).float(), torch.bfloat16: rounded}


class Reader:
    """A model that reads a text in parts, with its state after what it has read."""

    def __init__(self, model: RodimusForCausalLM):
        self.model, self.cache = model, DynamicCache(config=model.config)

    @torch.no_grad()
    def read(self, ids: torch.Tensor, kept: int = 1) -> torch.Tensor:
        """Reads more tokens ``[T]``; logits ``[kept, vocab]`` of the last of them, float64."""
        output = self.model(
            ids[None], past_key_values=self.cache, use_cache=True, logits_to_keep=kept
        )
        return output.logits[0].double()

    def after(self, ids: torch.Tensor, *, one_by_one: bool) -> torch.Tensor:
        """Logits of more tokens, without moving on: read at once or one by one."""
        here = self.cache
        self.cache = copy.deepcopy(here)
        try:
            if one_by_one:
                return torch.cat([self.read(token) for token in ids.split(1)])
            return self.read(ids, kept=len(ids))
        finally:
            self.cache = here

    def state_norm(self) -> float:
        """Norm of the recurrent states of all layers."""
        states = (x for layer in self.cache.layers for x in layer.recurrent_states.values())
        return math.sqrt(sum(x.double().square().sum().item() for x in states))


def distance(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Relative error."""
    return ((found - expected).norm() / expected.norm()).item()


def drifts(
    models: dict[torch.dtype, RodimusForCausalLM], ids: torch.Tensor, first: int
) -> Iterator[dict[str, float]]:
    """The figures at each length: ``first``, and twice the length before.

    Args:
        models: From ``made``.
        ids: ``[T]``, ``COMPARED`` more than the last length.
        first: The first length, and the tokens of a chunk.
    """
    exact, rounded = (Reader(models[dtype]) for dtype in (torch.float32, torch.bfloat16))
    last, length = len(ids) - COMPARED, first
    for end in range(first, last + 1, first):
        for reader in (exact, rounded):
            reader.read(ids[end - first : end])
        if end != length:
            continue
        length *= 2
        asked = ids[end : end + COMPARED]
        at_once = exact.after(asked, one_by_one=False)
        yield {
            "length": end,
            "state_norm": exact.state_norm(),
            "bfloat16": distance(rounded.after(asked, one_by_one=False), at_once),
            "one_by_one": distance(exact.after(asked, one_by_one=True), at_once),
        }


def row(block_type: str, scale: str, device: torch.device, first: int, most: int) -> dict[str, Any]:
    """The row of a model."""
    config = shape(block_type, scale)
    generator = torch.Generator().manual_seed(peers.SEED)
    ids = torch.randint(config.vocab_size, (most + COMPARED,), generator=generator).to(device)
    told = []
    for point in drifts(made(config, device), ids, first):
        print(block_type, point, flush=True)
        told.append(point)
    return records.row(block_type, block_type, "dynamic", points=told)


def main(arguments: list[str] | None = None) -> int:
    """Write the record of both models."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, help="folder for the record")
    parser.add_argument("--first", type=int, default=FIRST, help="first length, and a chunk")
    parser.add_argument("--most", type=int, default=MOST, help="last length")
    options = parser.parse_args(arguments)
    if not 0 < options.first <= options.most:
        parser.error(f"--first must be 1 .. {options.most}, got {options.first}")
    device = machine.device()
    scale = "full" if device.type == "cuda" else "demo"
    # the commit is that of the code that runs, whatever is committed meanwhile
    about, load, others = machine.describe(device), machine.load_now(), machine.Others()
    rows = [
        row(name, scale, device, options.first, options.most)
        for name in ("rodimus_plus", "rodimus")
    ]
    record = records.make(
        "drift",
        f"{scale}-t{options.most}",
        settings={"scale": scale, "seed": peers.SEED, "context": options.most},
        machine=about,
        rows=rows,
        load=(load, others.cores()),
    )
    folder = options.out or machine.RESULTS / machine.folder_name(about["name"])
    print(f"wrote {records.write(record, folder).name}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
