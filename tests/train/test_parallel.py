"""Sharding, replicas, activation checkpointing and compilation change speed, never the numbers."""

import contextlib
import copy
import inspect
import math
import platform
import resource
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path

import pytest
import torch
from torch import distributed, is_tensor
from torch._dynamo.utils import counters
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import distribute_tensor
from torch.distributed.tensor.debug import CommDebugMode
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers.modeling_layers import GradientCheckpointingLayer

from rodimus import RodimusConfig, RodimusForCausalLM
from rodimus.errors import InputError
from rodimus.loading import model_class, read_config
from rodimus.modeling_rodimus import RodimusBlock
from rodimus.train import loop, parallel
from rodimus.train.config import OptimSection, ParallelSection
from rodimus.train.load import load_config
from rodimus.train.optim import ShardMuon, build_optimizers
from rodimus.train.plan import activation_bytes
from tests.train.conftest import MODEL
from tests.train.ranks import metrics, run_ranks, train

CONFIGS = Path(__file__).parents[2] / "configs" / "model"


def test_activation_checkpointing_changes_nothing(figures):
    plain = figures(1)
    for mode in ("full", "selective"):
        assert figures(1, "--train.ac", mode) == pytest.approx(plain, rel=1e-6)


def test_selective_checkpointing_does_not_run_the_recurrence_again():
    """Counted in batched products, of which the chunked DDTS consists."""
    products = {}
    for mode in ("none", "selective", "full"):
        model = RodimusForCausalLM(RodimusConfig(**{**MODEL, "vocab_size": 320})).train()
        parallel.checkpoint_activations(model, mode)
        ids = torch.arange(64).view(2, 32)
        with torch.profiler.profile() as profile:
            model(ids, labels=ids, use_cache=False).loss.backward()
        products[mode] = sum(e.count for e in profile.key_averages() if e.key == "aten::bmm")
    assert products["none"] == products["selective"] < products["full"]


def test_selective_checkpointing_keeps_what_is_costly_for_its_size():
    """Products, attention and recurrence; of ours neither norms nor gates nor the convolution."""
    for name in parallel.SAVED_OPS:
        namespace, name = name.split("::")
        assert hasattr(getattr(torch.ops, namespace), name), name
    ours = {name for name in parallel.SAVED_OPS if name.startswith("rodimus::")}
    assert ours == {f"rodimus::{x}" for x in ("ddts_chunk", "ddts_eager", "shared_key_attention")}
    assert {"aten::mm", "aten::addmm", "aten::bmm"} <= parallel.SAVED_OPS


class Allocations(TorchDispatchMode):
    """Remembers what operators allocate, without keeping it."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        given = {x.untyped_storage()._cdata for x in tree_leaves((args, kwargs)) if is_tensor(x)}
        for x in filter(is_tensor, tree_leaves(out)):
            storage = x.untyped_storage()
            if storage._cdata not in given:
                self.seen.append((StorageWeakRef(storage), storage.nbytes()))
        return out

    def alive(self):
        """Bytes that something still needs."""
        return sum(size for storage, size in self.seen if not storage.expired())


@pytest.fixture
def kept(operators_of_a_gpu):
    """Bytes that a block keeps of a token for backward, by checkpointing, on a GPU."""

    def after_forward(config, mode, layers, length=4096):
        config = copy.deepcopy(config)
        config.num_hidden_layers = layers
        with torch.device("meta"):
            model = model_class(config)(config).train().bfloat16()
            parallel.checkpoint_activations(model, mode)
            ids = torch.zeros(1, length, dtype=torch.long)
            options = {"position_ids": ids, "num_items_in_batch": length, "loss_only": True}
            if config.model_type == "rodimus":
                options["is_packed"] = True
            with Allocations() as allocations:
                loss = model(ids, shift_labels=ids, use_cache=False, **options).loss
        assert loss.requires_grad
        return allocations.alive() / length

    def kept(config, mode):
        return after_forward(config, mode, 2) - after_forward(config, mode, 1)

    return kept


@pytest.mark.parametrize("name", ["rodimus_plus_1b6", "rodimus_1b4", "gla_340m"])
def test_a_block_keeps_what_is_planned(name, kept):
    """But for the last state of a row."""
    config = read_config(CONFIGS / f"{name}.json")
    sizes = {mode: kept(config, mode) for mode in ("none", "selective", "full")}
    for mode, size in sizes.items():
        assert size == pytest.approx(activation_bytes(config, mode), rel=0.01), mode
    assert sizes["selective"] < 0.65 * sizes["none"]
    assert sizes["full"] == 4 * config.hidden_size


@pytest.fixture
def calls_are_checkpointed(monkeypatch):
    """As transformers did before 5.24; since then it is a block's forward."""

    def call(self, *args, **kwargs):
        inner = partial(torch.nn.Module.__call__, self, **kwargs)
        if self.gradient_checkpointing and self.training:
            return self._gradient_checkpointing_func(inner, *args)
        return inner(*args)

    monkeypatch.setattr(RodimusBlock, "__call__", call, raising=False)
    monkeypatch.setattr(RodimusBlock, "forward", inspect.unwrap(RodimusBlock.forward))
    if "__init_subclass__" in vars(GradientCheckpointingLayer):
        monkeypatch.delattr(GradientCheckpointingLayer, "__init_subclass__")


def second_of_two_steps(config_file, variants):
    """``(loss, gradients, launches by operator, frames compiled)`` of each variant."""
    ranks = parallel.start(ParallelSection(), "cpu")
    torch.manual_seed(ranks.rank)
    ids, positions = torch.randint(3, 300, (2, 32)), torch.arange(32).expand(2, -1) % 20
    options = {"position_ids": positions, "is_packed": True, "use_cache": False}
    outcomes = []
    for overrides in variants:
        counters.clear()
        torch._dynamo.reset()
        with torch.device("meta"):
            model = RodimusForCausalLM(RodimusConfig(**MODEL))
        model = parallel.build_model(model, load_config(config_file, list(overrides)), ranks)
        for profile in (contextlib.nullcontext(), torch.profiler.profile()):
            model.zero_grad()
            with profile:
                out = model(ids, shift_labels=ids, num_items_in_batch=9, loss_only=True, **options)
                out.loss.backward()
        grads = torch.cat([p.grad.full_tensor().flatten() for p in model.parameters()])
        launches = {e.key: e.count for e in profile.key_averages()}
        outcomes.append((out.loss.item(), grads.numpy(), launches, counters["frames"]["ok"]))
    parallel.stop()
    return outcomes


def check_compiled_checkpointing(config_file, world_size):
    """The recurrence is run again where checkpointing is full, norms in both modes; and the
    compiler knows it, so that no policy is asked about what it has fused."""
    variants = [(), *(("--train.ac", mode, "--train.compile") for mode in ("selective", "full"))]
    for plain, *compiled in run_ranks(world_size, second_of_two_steps, config_file, variants):
        assert plain[3] == 0
        for outcome, times in zip(compiled, (1, 2), strict=True):
            loss, grads, launches, frames = outcome
            assert frames and loss == pytest.approx(plain[0], rel=1e-6)
            torch.testing.assert_close(*map(torch.from_numpy, (grads, plain[1])))
            assert launches["rodimus::ddts_eager"] == times * plain[2]["rodimus::ddts_eager"]
            assert launches["aten::rsqrt"] > plain[2]["aten::rsqrt"]


def test_compiled_blocks_know_their_checkpoints(config_file, graphs_only):
    check_compiled_checkpointing(config_file, 1)


@pytest.mark.slow
def test_compiled_blocks_know_their_checkpoints_whatever_transformers_does(
    config_file, graphs_only, calls_are_checkpointed
):
    check_compiled_checkpointing(config_file, 2)


def test_replicas_equal_shards(figures):
    """Two micro-steps, so that one of them goes without the exchange between replicas."""
    both = ("--train.micro-batch", 1)
    replicated = figures(2, *both, "--parallel.replicate", 2)
    assert replicated == pytest.approx(figures(2, *both), rel=1e-5)


def test_two_replicas_of_two_shards_equal_one_rank(figures):
    replicated = figures(4, "--train.micro-batch", 1, "--parallel.replicate", 2)
    assert replicated == pytest.approx(figures(1), rel=1e-5)


def test_muon_sees_whole_matrices_on_any_number_of_ranks(figures):
    """Its bf16 iteration amplifies rounding, so later steps agree less closely."""
    one, two = (figures(world, "--optim.name", "muon") for world in (1, 2))
    assert two == pytest.approx(one, rel=2e-2)


def test_muon_of_replicas_exchanges_what_muon_of_one_does():
    def stepped(*shape):
        def step():
            distributed.init_process_group("gloo")
            mesh = init_device_mesh(
                "cpu", shape, mesh_dim_names=("replicate", "shard")[-len(shape) :]
            )
            torch.manual_seed(0)
            model = torch.nn.Module()
            model.layers = torch.nn.ModuleList([torch.nn.Linear(64, 128, bias=False)])
            model.norm = torch.nn.RMSNorm(8)
            layer = fully_shard(model.layers[0], mesh=mesh)
            muon = build_optimizers(model, OptimSection(name="muon", lr=0.1))[0]
            for _ in range(2):
                layer(torch.randn(5, 64)).square().sum().backward()
                with CommDebugMode() as exchanged:
                    muon.step()
            weight = layer.weight.full_tensor().tolist()
            return weight, exchanged.get_total_counts()

        return run_ranks(math.prod(shape), step)

    alone = stepped(2)
    assert alone[0][1] > 0
    assert stepped(2, 2) == 2 * alone


@pytest.mark.parametrize("shape", [(1,), (2,), (4,), (2, 2)])
def test_muon_is_that_of_one_process_and_exchanges_twice_a_round(shape):
    """A round is one matrix for each rank of a replica; some ranks have no rows of the smallest."""
    shapes = [(6, 10), (10, 6), (5, 3), (64, 32), (2, 8), (32, 64), (7, 7)]

    def step():
        distributed.init_process_group("gloo")
        mesh = init_device_mesh("cpu", shape, mesh_dim_names=("replicate", "shard")[-len(shape) :])
        torch.manual_seed(0)
        whole = [torch.nn.Parameter(torch.randn(size)) for size in shapes]
        sharded = torch.nn.ParameterList([p.detach().clone() for p in whole])
        sharded = list(fully_shard(sharded, mesh=mesh).parameters())
        options = {"lr": 0.1, "momentum": 0.9, "adjust_lr_fn": "match_rms_adamw"}
        expected, muon = torch.optim.Muon(whole, **options), ShardMuon(sharded, **options)
        for _ in range(3):
            for p, shard in zip(whole, sharded, strict=True):
                p.grad = torch.randn_like(p)
                shard.grad = distribute_tensor(p.grad, shard.device_mesh, shard.placements)
            expected.step()
            with CommDebugMode() as exchanged:
                muon.step()
        for p, shard in zip(whole, sharded, strict=True):
            assert torch.equal(shard.full_tensor(), p)
            (name, mean), (own_name, own) = *expected.state[p].items(), *muon.state[shard].items()
            assert own_name == name and torch.equal(own.full_tensor(), mean)
        return exchanged.get_total_counts()

    exchanges = 2 * math.ceil(len(shapes) / shape[-1]) if shape[-1] > 1 else 0
    assert set(run_ranks(math.prod(shape), step)) == {exchanges}


def test_muon_resumes_on_any_number_of_ranks(config_file, tmp_path):
    muon = ("--optim.name", "muon", "--no-export")
    assert train(1, config_file, *muon) == [0]
    expected = metrics(tmp_path / "run", "loss")
    for world in (2, 4):
        (tmp_path / "run" / "metrics.jsonl").unlink()
        options = (*muon, "--train.micro-batch", 1, "--checkpoint.resume", 3)
        assert set(train(world, config_file, *options)) == {0}
        losses = metrics(tmp_path / "run", "loss")
        assert losses == pytest.approx({step: expected[step] for step in (4, 5, 6)}, rel=2e-2)


@pytest.mark.parametrize("reshard, gathers", [("true", 2 * 2 + 1), ("false", 2 + 1)])
def test_embedding_and_head_are_gathered_once(config_file, reshard, gathers):
    """For a forward and backward of two blocks, of which each may be gathered twice."""

    def gathered():
        options = ["--parallel.reshard-after-forward", reshard, "--train.micro-batch", "1"]
        config = load_config(config_file, options)
        trainer = loop.Trainer(config, parallel.start(config.parallel, "cpu"))
        trainer.step()
        with torch.profiler.profile() as profile:
            trainer.step()
        trainer.close()
        counts = {e.key: e.count for e in profile.key_averages()}
        return counts["c10d::_allgather_base_"] / trainer.accumulation

    assert run_ranks(2, gathered) == [gathers] * 2


def test_gradients_and_the_stream_stay_in_float32_where_products_do_not(config_file):
    def policies():
        shard, seen = parallel.fully_shard, set()

        def look(module, **options):
            policy = options["mp_policy"]
            seen.add((policy.param_dtype, policy.reduce_dtype, policy.cast_forward_inputs))
            return shard(module, **options)

        parallel.fully_shard = look
        config = load_config(config_file, ["--train.dtype", "bfloat16"])
        with torch.device("meta"):
            model = RodimusForCausalLM(RodimusConfig(**MODEL))
        parallel.build_model(model, config, parallel.start(config.parallel, "cpu"))
        return seen

    assert run_ranks(1, policies) == [{(torch.bfloat16, torch.float32, False)}]


def test_every_group_waits_as_long_as_all_ranks_do():
    """Those of torch's own meshes end a collective before the watchdog can say who hangs."""

    def timeouts():
        config = ParallelSection(replicate=2, context_parallel=2, timeout_s=5000)
        ranks = parallel.start(config, "cpu")
        groups = [distributed.group.WORLD, ranks.context, *ranks.mesh.get_all_groups()]
        members = [distributed.get_process_group_ranks(group) for group in groups]
        backends = [group._get_backend(torch.device("cpu")) for group in groups]
        waits = {backend.options._timeout for backend in backends}
        # rank 0 holds the store, with which others may still make their groups
        parallel.stop()
        return ranks.rank, members, waits

    for rank, members, waits in run_ranks(4, timeouts):
        first = rank - rank % 2
        neighbours, across = [first, first + 1], [rank % 2, rank % 2 + 2]
        assert members == [[0, 1, 2, 3], neighbours, across, neighbours]
        # torch 2.15 cuts a millisecond off
        assert {round(wait.total_seconds(), 2) for wait in waits} == {5060}


def test_files_are_allowed_before_groups_are_made():
    """Gloo keeps a connection to every rank, in every group."""

    def limits():
        resource.setrlimit(resource.RLIMIT_NOFILE, (256, most))
        make, seen = distributed.init_process_group, []

        def look(*args, **named):
            seen.append(resource.getrlimit(resource.RLIMIT_NOFILE)[0])
            return make(*args, **named)

        distributed.init_process_group = look
        parallel.start(ParallelSection(), "cpu")
        return seen

    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    assert run_ranks(1, limits) == [[most]]


def test_auto_dtype_follows_the_hardware(monkeypatch):
    cpu = torch.device("cpu")
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)
    assert parallel.resolve_dtype("auto", cpu) == torch.float32
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: True)
    assert parallel.resolve_dtype("auto", cpu) == torch.bfloat16
    assert parallel.resolve_dtype("float32", cpu) == torch.float32


def heap() -> tuple[int, int]:
    """Where the heap of this process begins and ends."""
    maps = Path("/proc/self/maps").read_text().splitlines()
    parts = [line.split()[0].split("-") for line in maps if line.endswith("[heap]")]
    return int(parts[0][0], 16), int(parts[-1][1], 16)


def allocate_and_free() -> tuple[bool, int]:
    """Whether a block is of the heap, and by how much that has grown when it is free.

    Other threads of the process may make it grow; what is given back makes it shrink.
    """
    parallel.keep_freed_memory()
    block = torch.empty(30 << 20, dtype=torch.uint8)
    (low, high), place = heap(), block.data_ptr()
    del block
    return low <= place < high, heap()[1] - high


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc has mallopt")
def test_freed_memory_is_kept():
    """In a process with nothing behind its heap; a fork of this one may have."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as fresh:
        of_the_heap, grown = fresh.submit(allocate_and_free).result()
    assert of_the_heap and grown >= 0


def test_replicas_must_divide_the_ranks(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "3")
    with pytest.raises(InputError, match="parallel.replicate = 2 does not divide 3 ranks"):
        parallel.start(ParallelSection(replicate=2), "cpu")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_missing_gpu_is_an_error():
    with pytest.raises(InputError, match="torch sees no CUDA device"):
        parallel.start(ParallelSection(), "cuda")


def test_more_ranks_than_gpus_is_an_error(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setenv("LOCAL_RANK", "0")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    with pytest.raises(InputError, match="2 ranks on this machine, but torch sees 1 GPU"):
        parallel.start(ParallelSection(), "auto")
