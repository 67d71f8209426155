"""A captured decode step follows its model. What a graph replays is stood for by a copy of the
modules as they were, on the same weights."""

import copy

import pytest
import torch
from torch import nn
from torch.nn.modules import module as module_hooks

from rodimus.generation import Engine, Request
from rodimus.generation.decode import Decoder
from tests.generation.helpers import greedy, prompts_of


class Graph:
    """Replays the model as it was, whatever is attached to it or replaced in it later."""

    def __init__(self, decoder, size):
        parts = (*decoder.model.parameters(), *decoder.model.buffers())
        memo = {id(x): type(x)(x.detach()) for x in parts}
        self.decoder, self.size = copy.copy(decoder), size
        self.decoder.model = copy.deepcopy(decoder.model, memo)
        self.logits = torch.empty(size, decoder.model.config.vocab_size)

    def replay(self):
        self.logits.copy_(self.decoder._forward(self.size))


@pytest.fixture
def captures(monkeypatch):
    """The sizes of each capture."""
    seen = []

    def record(decoder, sizes):
        seen.append(sizes)
        graphs = {size: Graph(decoder, size) for size in sizes}
        return {size: (graph, graph.logits) for size, graph in graphs.items()}

    monkeypatch.setattr(Decoder, "_record", record)
    return seen


def captured_engine(model, slots=1) -> Engine:
    engine = Engine(model, slots=slots)
    engine.decoder._capture()
    return engine


class Adapted(nn.Module):
    """A layer with something added, as an adapter would."""

    def __init__(self, layer):
        super().__init__()
        self.layer, self.scales = layer, {"default": 0.3}

    def forward(self, x):
        y = self.layer(x)
        return y + self.scales["default"] * torch.roll(y, 1, -1)


def adapt(model):
    mixer = model.model.layers[0].mixer
    mixer.out_proj = Adapted(mixer.out_proj)


def hook(model):
    change = lambda module, args, output: 2 * output
    model.model.layers[1].mixer.fc.register_forward_hook(change)


def replace_weight(model):
    layer = model.model.layers[1].mixer.fc
    layer.weight = nn.Parameter(layer.weight.detach().flip(0))


def replace_data(model):
    weight = model.model.norm_f.weight
    weight.data = weight.detach() * torch.linspace(-2, 2, len(weight))


def patch_forward(model):
    embeddings = model.model.embeddings
    embeddings.forward = lambda ids: nn.Embedding.forward(embeddings, ids).flip(-1)


def change_attribute(model):
    for block in model.model.layers:
        block.mixer_norm.eps = 10.0


CHANGES = (adapt, hook, replace_weight, replace_data, patch_forward, change_attribute)


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_what_is_done_to_the_model_takes_part_in_the_next_request(model, captures, change, caplog):
    (prompt,) = prompts_of(6)
    engine, plain = captured_engine(model, slots=3), greedy(model, prompt, 20)
    assert engine.generate([Request(prompt, 20)])[0].tokens == plain
    assert captures == [[1, 2, 3]] and not caplog.records
    change(model)
    changed = greedy(model, prompt, 20)
    assert changed != plain
    for _ in range(2):
        assert engine.generate([Request(prompt, 20)])[0].tokens == changed
    assert len(captures) == 2
    assert caplog.messages == ["the model has changed since its decode step was captured"]


def test_what_an_adapter_says_of_itself_is_looked_at(plus, captures):
    (prompt,) = prompts_of(6)
    adapt(plus)
    engine = captured_engine(plus)
    plus.model.layers[0].mixer.out_proj.scales["default"] = -2.0
    assert engine.generate([Request(prompt, 20)])[0].tokens == greedy(plus, prompt, 20)
    assert len(captures) == 2


def test_settings_replaced_as_a_whole_are_looked_at(plus, captures):
    (prompt,) = prompts_of(6)
    adapt(plus)
    engine = captured_engine(plus)
    plus.model.layers[0].mixer.out_proj.scales = {"default": -2.0}
    assert engine.generate([Request(prompt, 20)])[0].tokens == greedy(plus, prompt, 20)
    plus.model.layers[0].mixer.out_proj.scales = {"default": float("-2.0")}
    plus.model.remembered = object()
    engine.generate([Request(prompt, 2)])
    assert len(captures) == 2


def test_a_hook_of_all_modules_is_looked_at(plus, captures):
    (prompt,) = prompts_of(6)
    engine, plain = captured_engine(plus), greedy(plus, prompt, 20)
    turn = lambda module, args, output: output.flip(-1) if type(module) is nn.Linear else None
    handle = module_hooks.register_module_forward_hook(turn)
    try:
        tokens = greedy(plus, prompt, 20)
        assert engine.generate([Request(prompt, 20)])[0].tokens == tokens != plain
    finally:
        handle.remove()


def test_weights_written_in_place_need_no_new_capture(model, captures):
    (prompt,) = prompts_of(6)
    engine = captured_engine(model)
    plain = engine.generate([Request(prompt, 20)])[0].tokens
    model.load_state_dict({name: x.flip(0) for name, x in model.state_dict().items()})
    found = engine.generate([Request(prompt, 20)])[0].tokens
    assert found == greedy(model, prompt, 20) != plain
    assert len(captures) == 1


def test_a_change_while_a_sequence_runs_disturbs_no_state(model, captures):
    """Until no slot is in use, steps run as they stand; then the step is captured again."""
    first, second, third = prompts_of(5, 9, 4)
    found = []
    for engine in (captured_engine(copy.deepcopy(model), slots=2), Engine(model, slots=2)):
        running = engine.submit(Request(first, 30))
        for _ in range(5):
            engine.step()
        hook(engine.model)
        later = engine.submit(Request(second, 12))
        while engine.has_work:
            engine.step()
            assert engine.decoder._graphs == {}
        found.append([running.tokens, later.tokens])
        found[-1].append(engine.generate([Request(third, 12)])[0].tokens)
    assert found[0] == found[1]
    assert captures == [[1, 2], [1, 2]]


def test_a_graph_never_reads_freed_memory(plus, captures):
    engine = captured_engine(plus)
    read = {x.data_ptr() for x in plus.parameters()}
    replace_weight(plus)
    replace_data(plus)
    kept = {x.data_ptr() for x in engine.decoder._captured._memory}
    assert read <= kept
    engine.generate([Request(prompts_of(3)[0], 2)])
    kept = {x.data_ptr() for x in engine.decoder._captured._memory}
    assert kept == {x.data_ptr() for x in plus.parameters()}
