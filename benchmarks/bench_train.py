"""Training step: forward, backward and AdamW; tokens per second and share of the matrix rate."""

import contextlib
import dataclasses
import gc
import json
import random
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from . import operators, peers
from .harness import Bench, Target, dtype_name


def points(memory_bytes: float) -> list[tuple[int, int]]:
    """Batch and length of steps of 16,384 tokens, or half as many on a GPU of 80 GB, which has no
    room for more beside the weights of every model."""
    tokens = 16384 if memory_bytes >= 100e9 else 8192
    return [*dict.fromkeys((tokens // n, n) for n in (4096, tokens, 2048, 8192))]


POINTS = {
    "tiny": [(2, 64)],
    # a step of a 1.5B model takes minutes and 20 GB on a CPU
    "cpu": [],
    "cuda": points(
        torch.cuda.get_device_properties(0).total_memory
        if torch.cuda.is_available()
        else float("inf")
    ),
}

LAUNCHES = ("compiled", "recorded")
"""Other ways to launch a step on a GPU: from compiled blocks, and as one recorded graph."""

TRAINER = "trainer"
"""The whole step of `rodimus train` on one rank."""


def prepare(
    bench: Bench,
    model: peers.Model,
    engine: str,
    batch: int,
    length: int,
    optimizers: dict[str, torch.optim.Optimizer] | None = None,
) -> Target:
    """One optimizer step on random tokens; the weights stay in the benchmark's dtype.

    Args:
        engine: The model's own engine, or one of ``LAUNCHES``.
        optimizers: Optimizers by model name; missing ones are made and added.
    """
    if not isinstance(model, peers.HuggingFaceModel):
        raise peers.Unavailable(f"{model.name} by its package has no backward")
    network = model.model.train().requires_grad_(True)
    on_gpu = bench.device.type == "cuda"
    optimizers = {} if optimizers is None else optimizers
    if model.name not in optimizers:
        options = {"lr": 1e-6, "fused": True, "capturable": on_gpu}
        optimizers[model.name] = torch.optim.AdamW(network.parameters(), **options)
    optimizer = optimizers[model.name]
    ids = peers.random_tokens(batch, length, model)
    arguments = {"labels": ids, "use_cache": False}
    if model.name in peers.OURS or model.family == "qwen2":
        # the chunked loss, which never holds all logits; targets do not matter for the time
        arguments = {"shift_labels": ids, "use_cache": False}
        arguments |= {"num_items_in_batch": ids.numel(), "loss_only": True}
    if model.family == "qwen2":
        # its loss needs positions; ours would look for packed documents in them and wait
        positions = torch.arange(length, device=ids.device).expand(batch, -1)
        # causal, without a mask: while a graph is recorded transformers would make a dense one
        arguments |= {"position_ids": positions, "attention_mask": {"full_attention": None}}

    def step() -> None:
        network(ids, **arguments).loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    # backward is twice forward
    facts = {"flops": 3 * model.forward_flops(batch, length, logits=length)}
    return Target(model, engine, launched(engine, step, network), facts)


def launched(engine: str, step: Callable[[], None], network: torch.nn.Module) -> Callable[[], None]:
    """The step, launched as ``engine`` says and run once. A model that cannot be launched that way
    is skipped with a reason, even one of ours."""
    if engine not in LAUNCHES:
        return step
    launch = {"compiled": compiled, "recorded": recorded}[engine]

    def tried() -> Callable[[], None]:
        run = launch(step, network)
        run()
        return run

    try:
        return peers.guarded(tried)
    except peers.Fault as reason:
        raise peers.Unavailable(str(reason)) from reason


def compiled(
    step: Callable[[], None], network: torch.nn.Module, backend: str = "inductor"
) -> Callable[[], None]:
    """The step with every block compiled, as ``train.compile`` does. Blocks are restored after each
    call, because other targets of the model take turns with it."""
    names = network._no_split_modules or ()
    blocks = [block for block in network.modules() if type(block).__name__ in names]
    if not blocks:
        raise peers.Unavailable("the model does not name its blocks")
    for block in blocks:
        block.compile(backend=backend)
    calls = [block._compiled_call_impl for block in blocks]

    def run() -> None:
        try:
            for block, call in zip(blocks, calls, strict=True):
                block._compiled_call_impl = call
            step()
        finally:
            for block in blocks:
                block._compiled_call_impl = None

    for block in blocks:
        block._compiled_call_impl = None
    return run


def recorded(step: Callable[[], None], network: torch.nn.Module) -> Callable[[], None]:
    """The whole step as one CUDA graph: forward, backward and the update of the weights."""
    stream, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
    outside = torch.cuda.current_stream()
    stream.wait_stream(outside)
    with torch.cuda.stream(stream):
        for _ in range(3):
            step()
    outside.wait_stream(stream)
    # a recording has its own memory pool
    torch.cuda.empty_cache()
    try:
        with torch.cuda.graph(graph):
            step()
    except BaseException:
        # the gradients are in memory that was never written
        network.zero_grad(set_to_none=True)
        torch.cuda.set_stream(outside)
        raise

    def run(graph=graph, reads=step) -> None:
        """Replays the graph; ``reads`` keeps alive the tokens that the graph reads."""
        graph.replay()

    return run


@contextlib.contextmanager
def in_trainer(
    bench: Bench, model: peers.Model, batch: int, length: int, recomputed: str = "none"
) -> Iterator[Target]:
    """One step of the loop of `rodimus train`: its own float32 weights, sharded over one rank,
    products in the benchmark's dtype, rows of several documents read from shards, the guard.

    Operations are counted as in ``prepare``, where a row is one document and nothing is computed
    twice.

    Args:
        recomputed: Which activations are recomputed, as in ``train.ac``; part of the engine's name.
    """
    from rodimus.train import config as sections
    from rodimus.train import parallel
    from rodimus.train.loop import Trainer
    from rodimus.train.plan import make_plan

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        shape = model.model.config.to_dict()
        (folder / "model.json").write_text(json.dumps(shape))
        write_documents(folder, model.vocab_size, batch, length)
        config = sections.TrainConfig(
            out=str(folder / "run"),
            model=sections.ModelSection(str(folder / "model.json")),
            data=sections.DataSection((str(folder / "train.json"),), seq_len=length),
            train=sections.TrainSection(
                steps=10**6,
                global_batch_tokens=batch * length,
                micro_batch=batch,
                dtype=dtype_name(bench.dtype),
                device=bench.device.type,
                ac=recomputed,
            ),
            optim=sections.OptimSection(lr=1e-6),
            guard=sections.GuardSection(spike_sigma=0.0),
        )
        ranks = parallel.start(config.parallel, config.train.device)
        trainer = None
        try:
            trainer = Trainer(config, ranks)
            facts = {"flops": 3 * model.forward_flops(batch, length, logits=length)}
            facts["planned_bytes"] = sum(make_plan(config, 1, mfu=1.0).memory.values())
            engine = TRAINER if recomputed == "none" else f"{TRAINER}-{recomputed}"
            yield Target(model, engine, trainer.step, facts)
        finally:
            if trainer is not None:
                trainer.close()
            parallel.stop()


def write_documents(folder: Path, vocab_size: int, batch: int, length: int) -> None:
    """Token shards of random documents, of up to half a row each, for a few batches."""
    from rodimus.train.shards import ShardWriter

    writer, lengths = ShardWriter(folder, "train", vocab_size), random.Random(peers.SEED)
    generator = torch.Generator().manual_seed(peers.SEED)
    left = 4 * batch * length + 1
    while left > 0:
        size = min(left, lengths.randint(1, max(1, length // 2)))
        writer.add(torch.randint(vocab_size, (size,), generator=generator).numpy(), size)
        left -= size
    about = {"bos_token_id": None, "eos_token_id": None}
    writer.close(**about, tokenizer_sha256="none", source="random tokens")


def alone(bench: Bench, name: str) -> Bench:
    """The run with one model; the others are freed, and loaded again when they are asked for."""
    for other in bench.models.keys() - {name}:
        del bench.models[other]
    clear(bench)
    return dataclasses.replace(bench, names=(name,))


def clear(bench: Bench) -> None:
    """Free the memory of unreferenced objects."""
    gc.collect()
    if bench.device.type == "cuda":
        torch.cuda.empty_cache()


@contextlib.contextmanager
def _put_back(bench: Bench) -> Iterator[None]:
    """Afterwards makes every model ready to decode again, even if its step failed."""
    try:
        yield
    finally:
        for model in bench.models.values():
            if isinstance(model, peers.HuggingFaceModel):
                model.model.zero_grad(set_to_none=True)
                model.model.eval().requires_grad_(False)


def measure(
    bench: Bench,
    benchmark,
    found,
    batch: int,
    length: int,
    group: str,
    case: str,
    *,
    by_itself: bool = False,
) -> list:
    """Time what ``Bench.targets`` found and write the record; returns its rows.

    Args:
        by_itself: The trainer has the GPU's memory for itself, so its peak can be held to the plan.
    """
    targets, skipped = found
    tokens, rounds = batch * length, bench.few_rounds
    rows, used = bench.time_targets(benchmark, targets, skipped, tokens=tokens, rounds=rounds)
    timed = {row["target"]: row for row in rows}
    for target in targets if bench.device.type == "cuda" else ():
        # an untimed step alone, to see what it allocates and where its time goes
        if target.engine != "recorded":
            timed[target.name]["step_bytes"] = operators.peak_bytes(target.call, bench.device)
            if by_itself:
                peak = torch.cuda.max_memory_allocated(bench.device)
                timed[target.name]["of_plan"] = peak / timed[target.name]["planned_bytes"]
        if target.model.name in peers.OURS:
            timed[target.name] |= operators.kernels(target.call)
    settings = {"batch": batch, "context": length, **used}
    return bench.record(group, case, settings, rows)["rows"]


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_train(bench, benchmark, start, point):
    batch, length = point
    case = bench.case(batch, length)
    start("train", case, bench.names)
    with _put_back(bench):
        found = bench.targets(
            lambda model, engine: prepare(bench, model, engine, batch, length),
            lambda model: model.engines[:1],
        )
        rows = measure(bench, benchmark, found, batch, length, "train", case)
    assert any(row["status"] == "measured" for row in rows)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("name", [entry.name for entry in peers.CATALOGUE])
def test_launches(bench, benchmark, start, name):
    """One model at a time: a recorded step keeps the memory of its activations."""
    if bench.device.type != "cuda" or name not in bench.names:
        pytest.skip("only a GPU waits for what launches its kernels")
    batch, length = POINTS["tiny" if bench.scale == "tiny" else "cuda"][0]
    case = f"{bench.case(batch, length)}-{name}"
    start("launch", case)
    one, optimizers = alone(bench, name), {}
    with _put_back(bench):
        found = one.targets(
            lambda model, engine: prepare(one, model, engine, batch, length, optimizers),
            lambda model: (*model.engines[:1], *LAUNCHES),
        )
        measure(one, benchmark, found, batch, length, "launch", case)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("name", peers.OURS)
def test_trainer(bench, benchmark, start, name):
    """One model at a time: the trainer has its own weights and an optimizer, in float32."""
    if bench.scale == "full" and bench.device.type != "cuda" or name not in bench.names:
        pytest.skip("a step of a 1.5B model takes minutes on a CPU")
    batch, length = POINTS["tiny" if bench.scale == "tiny" else "cuda"][0]
    case = f"{bench.case(batch, length)}-{name}"
    start(TRAINER, case)
    one = alone(bench, name)
    with _put_back(bench), contextlib.ExitStack() as opened:

        def target(model: peers.Model, engine: str) -> Target:
            if engine == TRAINER:
                return opened.enter_context(in_trainer(one, model, batch, length))
            return prepare(one, model, engine, batch, length)

        found = one.targets(target, lambda model: (*model.engines[:1], TRAINER))
        rows = measure(one, benchmark, found, batch, length, TRAINER, case)
    assert all(row["status"] == "measured" for row in rows) or bench.scale == "full"
