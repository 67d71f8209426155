"""One token of the model of `make demo` on a CPU: in the engine, whose step is one call for all
blocks, and through the model's modules, as with adapters or hooks.

Its 8 MB of weights stay in the cache: what is timed is the overhead around the products.
"""

import functools

import torch
from transformers import DynamicCache

from rodimus import RodimusConfig, RodimusForCausalLM
from rodimus.generation.engine import Engine, Request

from . import machine, operators, peers, records
from .operators import Call

CONFIG = machine.ROOT / "configs" / "model" / "rodimus_plus_2m.json"
STEPS = 16
"""Tokens of one timed call."""

# (batch, context)
POINTS = {"tiny": [(1, 16)], "cpu": [(1, 128)], "cuda": []}


def demo(device: torch.device) -> RodimusForCausalLM:
    """The model with random weights, in float32 as `rodimus generate` runs it on a CPU."""
    torch.manual_seed(peers.SEED)
    return RodimusForCausalLM(RodimusConfig.from_json_file(CONFIG)).eval().to(device)


class Modules:
    """Greedy decoding through the modules of a model, with the cache of transformers."""

    def __init__(self, model: RodimusForCausalLM, prompt: torch.Tensor):
        self.model, self.cache = model, DynamicCache(config=model.config)
        # a hook may do anything, so with one the model runs its blocks one by one
        self.hook = model.model.layers[0].register_forward_hook(lambda *_: None)
        self.token = self._read(prompt)

    @torch.no_grad()
    def _read(self, ids: torch.Tensor) -> torch.Tensor:
        output = self.model(ids, past_key_values=self.cache, use_cache=True, logits_to_keep=1)
        return output.logits[:, -1].argmax(-1, keepdim=True)

    def step(self) -> None:
        """One token."""
        self.token = self._read(self.token)


def calls_of(prompt: torch.Tensor, room: int) -> dict[str, Call]:
    """Steps of the engine and of the modules, after a check that both give the same tokens.

    Args:
        prompt: ``[1, T]``.
        room: Number of tokens that the engine may generate.
    """
    engine = Engine(demo(prompt.device), slots=1, max_length=prompt.shape[1] + room)
    generation = engine.submit(Request(prompt[0].tolist(), room, stop_tokens=()))
    modules = Modules(demo(prompt.device), prompt)
    engine.step()
    found = [int(modules.token)]
    for _ in range(STEPS):
        engine.step()
        modules.step()
        found.append(int(modules.token))
    assert generation.tokens[: len(found)] == found, "the two ways give different tokens"
    run = lambda step: [step() for _ in range(STEPS)]
    ways = {"demo/engine": engine.step, "demo/modules": modules.step}
    return {name: Call(functools.partial(run, step), runs=STEPS) for name, step in ways.items()}


def test_demo(bench, benchmark, start, point):
    batch, context = point
    case = f"b{batch}-t{context}-float32"
    start("demo", case)
    ids = torch.randint(4096, point, generator=torch.Generator().manual_seed(peers.SEED))
    calls = calls_of(ids.to(bench.device), room=STEPS * (4 * bench.rounds + 16))
    rows, rounds = operators.measure(bench, benchmark, calls)
    settings = {"batch": batch, "context": context, "steps": STEPS, **rounds}
    assert records.measured(bench.record("demo", case, settings | {"dtype": "float32"}, rows))
