"""What a step costs beside its arithmetic: waits of the host, passes that a norm can make."""

import contextlib
import json

import pytest
import torch
from torch._dynamo.utils import counters
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from rodimus import RodimusConfig, RodimusForCausalLM, RodimusModel
from rodimus.modeling_rodimus import RodimusBlock
from rodimus.train import optim, parallel
from rodimus.train.load import load_config
from rodimus.train.loop import Trainer
from rodimus.train.rows import IGNORE, Batch
from rodimus.train.signals import Signals
from tests.train.conftest import MODEL
from tests.train.ranks import run_ranks

BLOCK_TYPES = ("rodimus", "rodimus_plus")


def rows(*lengths, seq_len=32):
    """Positions ``[1, seq_len]`` of documents that fill a row."""
    assert sum(lengths) == seq_len
    return torch.cat([torch.arange(n) for n in lengths])[None]


PACKED, WHOLE = rows(5, 20, 7), rows(32)


# -- who waits for the device --------------------------------------------------------------------


@pytest.mark.parametrize("positions", [PACKED, WHOLE, torch.cat((WHOLE, PACKED)), rows(1, 31)])
def test_rows_known_to_be_packed_or_not_give_the_same_to_the_bit(positions):
    batch = Batch(torch.arange(32).expand_as(positions), positions, positions)
    assert batch.is_packed() == (positions is not WHOLE)
    for block_type in BLOCK_TYPES:
        torch.manual_seed(0)
        model = RodimusForCausalLM(RodimusConfig(**MODEL | {"block_type": block_type}))
        outcomes = []
        for known in (None, batch.is_packed()):
            model.zero_grad()
            options = {"position_ids": positions, "is_packed": known, "use_cache": False}
            out = model(batch.input_ids, shift_labels=batch.labels, **options)
            out.loss.backward()
            outcomes.append((out.logits, *(p.grad for p in model.parameters())))
        assert all(map(torch.equal, *outcomes))


def test_losses_are_those_of_packed_documents(config_file):
    """In training and evaluation, against a model that looks for documents itself."""

    def losses():
        config = load_config(config_file)
        trainer = Trainer(config, parallel.start(config.parallel, "cpu"))
        plain = RodimusForCausalLM(trainer.model.config)
        plain.load_state_dict({k: x.full_tensor() for k, x in trainer.model.state_dict().items()})

        def mean(batches):
            nats, count = 0.0, 0
            for ids, labels, positions in batches:
                options = {"position_ids": positions, "num_items_in_batch": 1, "loss_only": True}
                nats += plain(ids, shift_labels=labels, use_cache=False, **options).loss.item()
                count += (labels >= 0).sum().item()
            return nats / count

        evaluate, size = trainer.evaluate, config.train.micro_batch
        rows = [evaluate._batch(first) for first in range(0, len(evaluate.rows), size)]
        expected = mean([trainer.batches.get(0)]), mean(rows)
        held_out = trainer.evaluate(trainer.model, lambda: False).loss
        found, batch = (held_out, trainer.step()["loss"]), trainer.batches.get(0)
        # nor is a batch without a label divided by none
        blank = batch._replace(labels=torch.full_like(batch.labels, IGNORE))
        trainer.batches.get = lambda first: blank
        assert trainer.step()["loss"] == 0.0
        return expected, found

    ((training, evaluation), found) = run_ranks(1, losses)[0]
    assert found == pytest.approx((evaluation, training), rel=1e-6)


def test_what_is_said_of_packing_must_fit():
    model, ids = RodimusForCausalLM(RodimusConfig(**MODEL)), torch.arange(32)[None]
    with pytest.raises(ValueError, match="packed rows .is_packed. need position_ids"):
        model(ids, is_packed=True)
    with pytest.raises(ValueError, match="is_packed. take neither a cache nor a mask"):
        model(ids, position_ids=PACKED, attention_mask=torch.ones_like(ids), is_packed=True)


@pytest.fixture
def without_values(operators_of_a_gpu, monkeypatch):
    """Runs a step of a model on packed rows by the operators of a GPU, on tensors without values:
    reading one raises. Returns the launches of our operators."""
    # the model reads no values where it sees that there are none
    monkeypatch.setattr(torch.Tensor, "is_meta", False)

    def step(block_type, **known):
        changes = {"block_type": block_type, "mixer_cfg": MODEL["mixer_cfg"] | {"mem_size": 64}}
        with torch.device("meta"):
            model = RodimusForCausalLM(RodimusConfig(**MODEL | changes)).train()
            ids = torch.zeros(2, 32, dtype=torch.long)
            options = {"loss_only": True, "num_items_in_batch": 64, "use_cache": False, **known}
            options |= {"position_ids": torch.zeros_like(ids), "shift_labels": ids}
            with torch.profiler.profile() as profile:
                model(ids, **options).loss.backward()
        return {e.key for e in profile.key_averages() if e.key.startswith("rodimus::")}

    return step


@pytest.mark.parametrize("block_type", BLOCK_TYPES)
@pytest.mark.parametrize("is_packed", [True, False])
def test_no_value_is_read_where_packing_is_known(block_type, is_packed, without_values):
    launched = without_values(block_type, is_packed=is_packed)
    attends = {f"rodimus::shared_key_attention{end}" for end in ("", "_backward")}
    assert {"rodimus::short_conv", "rodimus::ddts_chunk_backward"} <= launched
    assert (attends & launched == attends) == (block_type == "rodimus_plus")


@pytest.mark.parametrize("block_type", BLOCK_TYPES)
def test_values_are_read_where_packing_is_not_known(block_type, without_values):
    with pytest.raises(RuntimeError, match="cannot be called on meta tensors"):
        without_values(block_type)


def test_packing_of_one_micro_batch_makes_no_graph_of_its_own(config_file, graphs_only):
    """Every rank would compile it at its own step, while the others wait."""
    shapes = MODEL | {"block_type": "rodimus"}
    (config_file.parent / "model.json").write_text(json.dumps(shapes))

    def steps(*overrides):
        # what a process has compiled before changes how many graphs it makes
        torch._dynamo.reset()
        counters.clear()
        config = load_config(config_file, list(overrides))
        trainer = Trainer(config, parallel.start(config.parallel, "cpu"))
        get, made, kinds, losses = trainer.batches.get, [], [], []

        def third_begins_unpacked(first):
            batch = get(first)
            if len(made) == 2:
                batch.position_ids[:2] = torch.arange(32)
            kinds.extend(micro.is_packed() for micro in batch.split(2))
            return batch

        trainer.batches.get = third_begins_unpacked
        for _ in range(4):
            losses.append(trainer.step()["loss"])
            made.append(counters["stats"]["unique_graphs"])
        evaluate = trainer.evaluate
        packed, blank = map(evaluate._batch, (0, len(evaluate.rows)))
        kinds += [packed.is_packed(), blank.is_packed()]
        evaluate._batch = lambda first: blank if first else packed
        losses.append(evaluate(trainer.model, lambda: False).loss)
        made.append(counters["stats"]["unique_graphs"])
        trainer.close()
        return kinds, made, losses

    ((kinds, made, losses),) = run_ranks(1, steps, "--train.compile")
    assert kinds[:5] == [*[True] * 4, False] and kinds[-2:] == [True, False]
    # the last is without gradients
    assert made == [1, 1, 1, 1, 2]
    assert losses == pytest.approx(run_ranks(1, steps)[0][2], rel=1e-6)


class NoReading(TorchDispatchMode):
    """No operator gives the host a value of a tensor, and none takes a sharded tensor, whose
    dispatch takes the host long."""

    READS = ("_local_scalar_dense", "item", "nonzero", "is_nonzero", "equal", "masked_select")

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        assert func.overloadpacket.__name__ not in self.READS, f"{func} makes the host wait"
        assert not any(issubclass(kind, DTensor) for kind in types), f"{func} of shards"
        return func(*args, **(kwargs or {}))


@pytest.fixture
def from_batch_to_figures(monkeypatch):
    """Forbids reading from where the batch goes to the device to where its figures are read; the
    list of what was read there."""
    forbidden, figures = contextlib.ExitStack(), []
    to, sums, model_forward = Batch.to, parallel.sum_over_ranks, RodimusForCausalLM.forward

    def no_reading(batch, device):
        assert device == torch.device("cpu")
        forbidden.enter_context(NoReading())
        return to(batch, device)

    def read(values, device):
        summed = sums(values, device)
        if len(values) > 1:
            forbidden.close()
            figures.append(summed)
        return summed

    def forward(self, *args, **kwargs):
        # its own reading is looked for above; on a CPU it looks at labels, for nobody waits there
        with _disable_current_modes():
            return model_forward(self, *args, **kwargs)

    monkeypatch.setattr(RodimusForCausalLM, "forward", forward)
    monkeypatch.setattr(Batch, "to", no_reading)
    monkeypatch.setattr(parallel, "sum_over_ranks", read)
    yield figures
    forbidden.close()


def test_a_step_reads_its_figures_once(config_file, from_batch_to_figures):
    """Packed rows, two micro-steps, sharded parameters."""

    def steps():
        config = load_config(config_file)
        trainer = Trainer(config, parallel.start(config.parallel, "cpu"))
        assert trainer.accumulation == 2 and trainer.batches.get(0).is_packed()
        losses = [trainer.step()["loss"] for _ in range(2)]
        trainer.close()
        return losses, len(from_batch_to_figures)

    ((losses, read),) = run_ranks(1, steps)
    assert read == 2 and losses[1] != losses[0]


def test_a_step_exchanges_figures_twice(config_file, monkeypatch):
    """Labels before it, loss, gradient and signals after it, on the device of the ranks."""

    def steps():
        config = load_config(config_file)
        trainer = Trainer(config, parallel.start(config.parallel, "cpu"))
        exchanged, all_reduce = [], torch.distributed.all_reduce

        def counted(tensor, *args, **kwargs):
            exchanged.append((tensor.device, len(tensor)))
            return all_reduce(tensor, *args, **kwargs)

        monkeypatch.setattr(torch.distributed, "all_reduce", counted)
        monkeypatch.setattr(trainer, "held_out", lambda signals: None)
        monkeypatch.setattr(trainer, "save", lambda wait: True)
        assert trainer.run(Signals()) == 0
        trainer.close()
        return [len(exchanged), *exchanged[:3]]

    device = torch.device("cpu")
    assert run_ranks(2, steps) == [[2 * 6, (device, 1), (device, 4), (device, 1)]] * 2


def test_shards_are_updated_as_sharded_parameters_are(figures, monkeypatch):
    """By AdamW: beside Muon all but the matrices inside blocks."""
    for options in ((), ("--optim.name", "muon"), ("--parallel.replicate", 2)):
        by_shards = figures(2, *options, "--train.micro-batch", 1)
        with monkeypatch.context() as patches:
            patches.setattr(optim, "ShardAdamW", torch.optim.AdamW)
            assert figures(2, *options, "--train.micro-batch", 1) == by_shards


# -- a block's last sum, in the next norm --------------------------------------------------------


def nothing(model):
    pass


def attach_hook(model):
    model.model.layers[1].register_forward_hook(lambda module, args, stream: 2 * stream)


def attach_hook_inside(model):
    model.model.layers[1].mixer_norm.register_forward_hook(lambda module, args, y: 2 * y)


def attach_backward_hook(model):
    model.model.layers[1].register_full_backward_hook(lambda module, dx, dy: None)


def patch_forward(model):
    block = model.model.layers[1]
    block.forward = lambda *args, **kwargs: 2 * type(block).forward(block, *args, **kwargs)


def forget_to_register(model):
    del vars(model.model.layers[1])["forward_unsummed"]


def two_ways(config_file, overrides, change=nothing):
    """``(loss, gradients, blocks called)`` of two micro-steps, the first of packed rows: with each
    sum made by its block, and with sums left to the next norm where they may be, as on a GPU."""
    config = load_config(config_file, list(map(str, overrides)))
    ranks = parallel.start(config.parallel, "cpu")
    with torch.device("meta"):
        model = RodimusForCausalLM(RodimusConfig(**MODEL))
    model = parallel.build_model(model, config, ranks)
    change(model)
    calls, call, outcomes = [], RodimusBlock.__call__, []
    RodimusBlock.__call__ = lambda self, *args, **named: (
        calls.append(self) or call(self, *args, **named)
    )
    torch.manual_seed(ranks.rank)
    ids = torch.randint(3, 300, (2, 2, 32))
    positions = torch.cat((PACKED, WHOLE)), torch.cat((WHOLE, WHOLE))
    may_leave = RodimusModel._blocks_are_plain
    for leaves in (False, True):
        RodimusModel._sums_in_norms = lambda self, stream, layout, leaves=leaves: (
            leaves and may_leave(self, stream)
        )
        calls.clear()
        model.zero_grad()
        loss = 0.0
        for i in range(2):
            parallel.mark_micro_step(model, last=i == 1)
            options = {"position_ids": positions[i], "is_packed": i == 0, "use_cache": False}
            options |= {"loss_only": True, "num_items_in_batch": 128}
            out = model(ids[i], shift_labels=ids[i], **options)
            out.loss.backward()
            loss += out.loss.item()
        grads = {name: p.grad.full_tensor().numpy() for name, p in model.named_parameters()}
        outcomes.append((loss, grads, len(calls)))
    parallel.stop()
    return outcomes


@pytest.mark.parametrize(
    "reshard, dtype",
    [
        ("true", "float32"),
        ("false", "bfloat16"),
        pytest.param("true", "bfloat16", marks=pytest.mark.slow),
        pytest.param("false", "float32", marks=pytest.mark.slow),
    ],
)
@pytest.mark.parametrize("world_size, replicate", [(1, 1), (2, 1), (2, 2)])
def test_sharded_blocks_leave_their_sums_to_the_next_norm(
    config_file, world_size, replicate, reshard, dtype
):
    options = ("--train.dtype", dtype, "--parallel.reshard-after-forward", reshard)
    options += ("--parallel.replicate", replicate)
    for outcomes in run_ranks(world_size, two_ways, config_file, options):
        (loss, grads, called), (left_loss, left_grads, left_called) = outcomes
        assert (called, left_called) == (2 * MODEL["n_layer"], 0)
        assert left_loss == loss
        # as in tests/model/test_sums_between_blocks.py; a sum of two bfloat16 terms rounds once
        rtol, atol = (1e-4, 1e-6) if dtype == "float32" else (2**-6, 2**-8)
        for name, grad in grads.items():
            torch.testing.assert_close(left_grads[name], grad, rtol=rtol, atol=atol, msg=name)


CHANGES = [attach_hook, attach_hook_inside, attach_backward_hook, patch_forward, forget_to_register]


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_whatever_else_is_attached_keeps_its_say(config_file, change):
    ((plain, left),) = run_ranks(1, two_ways, config_file, (), change)
    assert left[0] == plain[0] and left[2] == plain[2] == 2 * MODEL["n_layer"]


@pytest.mark.parametrize("option", [("--train.ac", "full"), ("--train.ac", "selective")])
def test_checkpointed_blocks_are_called(config_file, option):
    ((plain, left),) = run_ranks(1, two_ways, config_file, option)
    assert left[0] == plain[0] and left[2] == plain[2] >= 2 * MODEL["n_layer"]
