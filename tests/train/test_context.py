"""Rows in pieces on several ranks equal whole rows on one: logits, gradients, training."""

from dataclasses import dataclass

import pytest
import torch
import torch.distributed as dist

from rodimus import RodimusConfig, RodimusForCausalLM
from rodimus.errors import InputError
from rodimus.train import parallel
from rodimus.train.config import ParallelSection
from rodimus.train.context import Context
from rodimus.train.load import load_config
from tests.model.golden_data import l2_error
from tests.train.conftest import MODEL
from tests.train.ranks import run_ranks

LENGTH = 48
# on 2 ranks pieces are 24 tokens, on 4 they are 12: documents end inside, at and one after an edge
DOCUMENTS = ((5, 19, 23, 1), (40, 8))


@dataclass(frozen=True)
class Case:
    """A model and how its rows are packed; ``window`` counts the query itself."""

    block_type: str = "rodimus_plus"
    window: int | None = 9
    packed: bool = True
    ac: str = "none"
    dtype: torch.dtype = torch.float32

    def model(self):
        attn = MODEL["attn_cfg"] | {"window_size": self.window and 2 * (self.window - 1)}
        config = MODEL | {"block_type": self.block_type, "attn_cfg": attn, "vocab_size": 61}
        torch.manual_seed(0)
        model = RodimusForCausalLM(RodimusConfig(**config)).to(self.dtype).train()
        with torch.no_grad():
            # states that decay within a row, and gates that differ by channel
            for name, parameter in model.named_parameters():
                parameter.add_(0.3 * torch.randn_like(parameter) * ("proj" in name))
        parallel.checkpoint_activations(model, self.ac)
        return model

    def rows(self):
        """``(ids, shifted labels, positions)``, ``[2, LENGTH]`` each."""
        torch.manual_seed(1)
        ids = torch.randint(3, 61, (2, LENGTH + 1))
        labels = ids[:, 1:].clone()
        labels[0, 3:6] = -100
        positions = torch.arange(LENGTH).repeat(2, 1)
        if self.packed:
            rows = [torch.cat([torch.arange(n) for n in lengths]) for lengths in DOCUMENTS]
            positions = torch.stack(rows)
        return ids[:, :-1], labels, positions


CASES = [
    Case(),
    Case(packed=False),
    # on 4 ranks the window reaches over two ranks before
    Case(window=22),
    Case(window=22, packed=False, ac="full"),
    Case(window=None, ac="selective"),
    Case(window=None, packed=False),
    Case("rodimus"),
    Case("rodimus", packed=False),
    Case(dtype=torch.float64),
    Case(window=22, packed=False, dtype=torch.float64),
]


def logits_and_gradients(cases):
    """Results of each case as arrays, on this rank of the group: logits of its piece, gradients of
    all ranks together."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    results = []
    for case in cases:
        model, (ids, labels, positions) = case.model(), case.rows()
        if dist.get_world_size() == 1:
            out = model(input_ids=ids, position_ids=positions, shift_labels=labels, use_cache=False)
        else:
            context = Context(dist.group.WORLD, positions)
            ids, labels = context.piece(ids), context.piece(labels)
            # the sum over the ranks below is divided by this rank's mean
            out = model(input_ids=ids, shift_labels=labels, context=context)
        logits = out.logits
        nats = torch.nn.functional.cross_entropy(
            logits.flatten(0, 1), labels.flatten(), ignore_index=-100, reduction="sum"
        )
        nats.backward()
        grads = {}
        for name, parameter in model.named_parameters():
            dist.all_reduce(parameter.grad)
            grads[name] = parameter.grad.numpy()
        results.append((logits.detach().numpy(), grads))
    dist.destroy_process_group()
    return results


@pytest.fixture(scope="module")
def whole():
    return run_ranks(1, logits_and_gradients, CASES)[0]


def error(actual, expected):
    return l2_error(torch.as_tensor(actual), torch.as_tensor(expected))


@pytest.mark.parametrize("world_size", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_pieces_equal_the_whole_row(world_size, whole):
    ranks = run_ranks(world_size, logits_and_gradients, CASES)
    for i, (case, (logits, grads)) in enumerate(zip(CASES, whole, strict=True)):
        limit = 1e-5 if case.dtype == torch.float32 else 1e-12
        pieces = [torch.as_tensor(rank[i][0]) for rank in ranks]
        errors = {"logits": error(torch.cat(pieces, 1), logits)}
        errors |= {name: error(ranks[0][i][1][name], grads[name]) for name in grads}
        worst = max(errors, key=errors.get)
        print(f"{world_size} ranks, {case}: {worst} {errors[worst]:.1e}")
        assert errors[worst] < limit, (case, worst, errors[worst])


def test_every_piece_needs_the_one_before(whole):
    """The comparison above could not pass with pieces that ignore each other."""
    model, (ids, _, positions) = CASES[1].model(), CASES[1].rows()
    alone = model(input_ids=ids[:, 24:], position_ids=positions[:, 24:], use_cache=False).logits
    assert error(alone.detach(), whole[1][0][:, 24:]) > 1e-2


def test_context_says_what_it_cannot_do():
    def attempt():
        dist.init_process_group("gloo")
        messages = []
        for arguments in ({"labels": True}, {"position_ids": True}, {"length": 7}):
            try:
                model, (ids, labels, positions) = CASES[0].model(), CASES[0].rows()
                length = arguments.pop("length", LENGTH)
                context = Context(dist.group.WORLD, positions[:, :length])
                given = {"labels": labels, "position_ids": positions}
                given = {name: context.piece(given[name]) for name in arguments}
                model(input_ids=context.piece(ids), context=context, **given)
            except ValueError as failure:
                messages.append(str(failure))
        return messages

    for shifted, excluded, divided in run_ranks(2, attempt):
        assert "context needs shift_labels" in shifted
        assert "context excludes attention_mask, position_ids" in excluded
        assert divided == "rows of 7 tokens do not divide over 2 ranks"


def test_training_in_pieces_equals_training_on_whole_rows(figures):
    assert figures(2, "--parallel.context-parallel", 2) == pytest.approx(figures(1), rel=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize(
    "world_size, pieces, settings",
    [
        (4, 2, ("--train.micro-batch", 1)),
        (4, 4, ("--train.ac", "selective")),
        (4, 2, ("--train.micro-batch", 1, "--parallel.replicate", 2)),
    ],
    ids=["two rows at once", "selective", "replicas"],
)
def test_training_in_pieces_with(figures, world_size, pieces, settings):
    split = figures(world_size, "--parallel.context-parallel", pieces, *settings)
    assert split == pytest.approx(figures(1), rel=1e-5)


@pytest.mark.slow
def test_compiled_training_in_pieces(figures):
    """With the default backend, which takes minutes where it has nothing cached."""
    split = figures(2, "--parallel.context-parallel", 2, "--train.compile", timeout=600)
    assert split == pytest.approx(figures(1), rel=1e-5)


def test_pieces_must_divide_ranks_and_rows(monkeypatch, config_file):
    monkeypatch.setenv("WORLD_SIZE", "3")
    with pytest.raises(InputError, match="parallel.context_parallel = 2 does not divide 3 ranks"):
        parallel.start(ParallelSection(context_parallel=2), "cpu")
    config = load_config(config_file, ["--parallel.context-parallel", "2"])
    assert [config.accumulation(world) for world in (2, 4)] == [2, 1]
    with pytest.raises(InputError, match=r"8 ranks x train.micro_batch 2 / parallel.context_paral"):
        config.accumulation(8)
    config_file.write_text(config_file.read_text() + "[parallel]\ncontext_parallel = 3\n")
    with pytest.raises(InputError, match=r"data.seq_len = 32 must be a multiple of parallel.con"):
        load_config(config_file)
