"""Every model of the comparison runs, decodes what it prefills, and keeps the bytes it should."""

import contextlib
import functools
import time
import types

import pytest
import torch

from benchmarks import machine, peers, sizes
from benchmarks.peers import huggingface, interface, rwkv

CPU = torch.device("cpu")
CONTEXT = 48


@functools.cache
def load(name):
    try:
        return peers.load(name, "tiny", torch.float32, CPU)
    except peers.Unavailable as reason:
        pytest.skip(f"{name}: {reason}")


@pytest.fixture(params=[entry.name for entry in peers.CATALOGUE])
def model(request):
    return load(request.param)


@torch.inference_mode()
def test_decoding_equals_prefilling(model):
    for engine in model.engines:
        if engine == peers.LLAMA_CPP and not peers.is_installed("llama_cpp"):
            continue
        session = model.session(engine, 1, 2 * CONTEXT)
        assert peers.disagreement(session, peers.random_tokens(1, 20, model)) < 1e-5


@torch.inference_mode()
@pytest.mark.parametrize("weight_dtype", ["int8", "int4"])
@pytest.mark.parametrize("name", peers.OURS)
def test_quantized_weights_are_counted_as_they_are_read(name, weight_dtype):
    pytest.importorskip("torchao")
    model = peers.load(name, "tiny", torch.bfloat16, CPU, weight_dtype=weight_dtype)
    plain = peers.load(name, "tiny", torch.bfloat16, CPU)
    expected = 0
    for layer, module in plain.model.named_modules():
        own = list(module.parameters(recurse=False))
        if isinstance(module, torch.nn.Linear):
            wide = "ch_gate" in layer or "mem_gate" in layer or "head" in layer
            if weight_dtype == "int8" or wide:
                expected += module.weight.numel() + 4 * module.out_features
            else:
                # units of 128 weights in 64 bytes with four scales
                expected += module.out_features * -(-module.in_features // 128) * (64 + 4 * 2)
            own.remove(module.weight) if module.bias is None else own.pop(0)
        # the embedding is not read
        if not isinstance(module, torch.nn.Embedding):
            expected += sum(map(interface.bytes_of, own))
    assert model.token_bytes == expected < 0.7 * plain.token_bytes
    assert model.body_parameters == plain.body_parameters
    assert model.forward_flops(1, 8, logits=1) == plain.forward_flops(1, 8, logits=1)
    session = model.session("engine", 1, 2 * CONTEXT)
    assert peers.disagreement(session, peers.random_tokens(1, 20, model)) < 0.1


@torch.inference_mode()
def test_the_past_matters(model):
    """Random weights must not make the models deaf to everything but the last token."""
    session = model.session(model.engines[0], 1, CONTEXT)
    ids = peers.random_tokens(1, 20, model)
    with_past, without = session.prefill(ids), session.prefill(ids[:, -1:])
    assert (with_past - without).norm() > 0.01 * with_past.norm()


@torch.inference_mode()
def test_state_bytes_equal_the_formula(model):
    session = model.session(model.engines[0], 1, 2 * CONTEXT)
    session.fill(CONTEXT)
    assert session.state_bytes() == model.expected_state(1, CONTEXT)
    session.step()
    assert session.state_bytes() == model.expected_state(1, CONTEXT + 1)


@torch.inference_mode()
def test_state_of_recurrent_models_does_not_grow(model):
    if model.family in ("qwen2", "qwen3_next"):
        pytest.skip("keeps keys and values of every token")
    session = model.session(model.engines[0], 1, 4 * CONTEXT)
    session.fill(CONTEXT)
    before = session.state_bytes()
    session.fill(3 * CONTEXT)
    assert session.state_bytes() == before


@torch.inference_mode()
def test_greedy_steps_choose_the_largest_logit(model):
    session = model.session(model.engines[0], 1, CONTEXT)
    logits = session.prefill(peers.random_tokens(1, 10, model))
    session.token.copy_(logits.argmax(-1, keepdim=True))
    token = session.token.clone()
    session.step()
    fresh = model.session(model.engines[0], 1, CONTEXT)
    fresh.prefill(peers.random_tokens(1, 10, model))
    assert session.token.item() == fresh.decode(token).argmax().item()


def test_full_scale_has_the_published_number_of_parameters():
    expected = {
        "rodimus-plus-1.6b": 1_607_095_296,
        "rodimus-1.4b": 1_531_551_744,
        "qwen2-1.5b": 1_543_714_304,
    }
    for name, count in expected.items():
        model_class, config, _ = huggingface._classes(peers.entry(name), "full", CPU)
        with torch.device("meta"):
            model = model_class(config)
        parameters = {id(p): p.numel() for p in model.parameters()}
        assert sum(parameters.values()) == count, name


def test_full_scale_of_rwkv6_has_the_published_number_of_parameters():
    full = sizes.config_of("rwkv6", "full")
    with torch.device("meta"):
        count = sum(w.numel() for _, w in rwkv.random_checkpoint(full, torch.bfloat16))
    assert count == 1_599_873_024


def test_what_cannot_run_here_says_why():
    with pytest.raises(peers.Unavailable, match="runs on a GPU only"):
        peers.load("fla-rodimus-plus-1.6b", "tiny", torch.float32, CPU)
    with pytest.raises(peers.Unavailable, match="has the engines"):
        load("qwen2-1.5b").session("graph", 1, 8)
    with pytest.raises(peers.Unavailable, match="KeyError: 'lost'"):
        peers.guarded(lambda: {}["lost"])
    with pytest.raises(ValueError, match="expected a model of"):
        peers.load("gpt-5", "tiny", torch.float32, CPU)


def test_a_folder_of_that_name_is_no_package(tmp_path, monkeypatch):
    (tmp_path / "flash_thing/cute").mkdir(parents=True)
    (tmp_path / "flash_thing/cute/__init__.py").write_text("")
    monkeypatch.syspath_prepend(str(tmp_path))
    assert not peers.is_installed("flash_thing") and peers.is_installed("flash_thing.cute")
    assert not peers.is_installed("no_such.thing") and peers.is_installed("torch")


def test_a_model_that_does_not_fit_is_not_built(monkeypatch):
    monkeypatch.setattr(machine, "memory_bytes", lambda device: 10**9)
    with pytest.raises(peers.Unavailable, match=r"needs 3\.4 GB, 1\.0 GB are free"):
        peers.load("qwen2-1.5b", "full", torch.bfloat16, CPU)


def test_random_weights_have_no_zero_matrix():
    weights = dict(load("qwen2-1.5b").model.named_parameters())
    assert all(w.float().std() > 0 for name, w in weights.items() if w.dim() > 1)


def test_a_call_that_takes_too_long_is_interrupted_whatever_it_catches():
    def hangs():
        with contextlib.suppress(Exception):
            while True:
                time.sleep(0.01)

    with pytest.raises(peers.Unavailable, match=r"too slow: not done after 0\.1 s"):
        peers.guarded(hangs, 0.1)
    # the alarm is gone, and one inside another leaves the interruption to it
    time.sleep(0.15)
    with pytest.raises(peers.Unavailable, match="too slow"):
        peers.guarded(lambda: peers.guarded(hangs), 0.1)


class Recorded(huggingface.GraphSession):
    """Replays on the CPU: the step itself, or what a stale recording would do."""

    def __init__(self, session, stale):
        super().__init__(session)
        self.stale, self.steps = stale, 0

    def run(self, steps):
        self.session.run(steps + (0 if self.steps else peers.WARM_UP_STEPS))
        self.steps += steps
        if self.stale and self.steps > steps:
            self.session.token.zero_()


@torch.inference_mode()
@pytest.mark.parametrize("name", ["rodimus-1.4b", "rodimus-plus-1.6b"])
@pytest.mark.parametrize("stale", [False, True])
def test_replays_that_do_not_give_the_tokens_of_the_step_are_refused(monkeypatch, stale, name):
    model = load(name)
    plain = model.session
    graph = lambda engine, *size: (
        Recorded(plain("static", *size), stale) if engine == "graph" else plain(engine, *size)
    )
    monkeypatch.setattr(model, "session", graph)
    raises = pytest.raises(peers.Unavailable, match="other tokens than the step")
    with raises if stale else contextlib.nullcontext():
        peers.require_replay(model, peers.random_tokens(1, 20, model))


class Replayed(huggingface.GraphSession):
    """Replays of places on the CPU: the same ones again, or the next."""

    def __init__(self, session, moves):
        super().__init__(session)
        self.moves, self.places = moves, None

    def run(self, steps):
        if self.places is None:
            self._warm_up()
            self.places = self.session.cache.get_seq_length()
        if not self.moves:
            self.session.rewind(self.places)
        self.session.run(steps)


@torch.inference_mode()
@pytest.mark.parametrize("moves", [False, True])
def test_replays_of_a_prefix_are_of_the_places_at_hand(monkeypatch, moves):
    model = load("qwen2-1.5b")
    made = lambda engine, *size: Replayed(
        huggingface.HuggingFaceSession(model, engine, *size), moves
    )
    monkeypatch.setattr(model, "session", made)
    raises = pytest.raises(peers.Unavailable, match="other tokens than the step")
    with raises if moves else contextlib.nullcontext():
        peers.require_replay(model, peers.random_tokens(1, 20, model), "prefix")


@torch.inference_mode()
def test_attention_to_a_prefix_gets_what_is_written_and_no_mask(monkeypatch):
    model, asked = load("qwen2-1.5b"), []
    attend = torch.nn.functional.scaled_dot_product_attention

    def noted(query, key, value, **options):
        if query.shape[2] == 1:
            asked.append((key.shape[2], options.get("attn_mask")))
        return attend(query, key, value, **options)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", noted)
    session = huggingface.HuggingFaceSession(model, "prefix", 2, CONTEXT + 8)
    ids = peers.random_tokens(2, 20, model)
    assert peers.disagreement(session, ids) < 1e-5
    assert set(asked) == {(20, None)}
    session.fill(CONTEXT)
    assert session.state_bytes() == model.expected_state(2, CONTEXT)
    before = session.cache.layers[0].buffers[0].data_ptr()
    session.run(8)
    assert session.cache.get_seq_length() == CONTEXT + 8
    assert session.cache.layers[0].keys.data_ptr() == before, "written in place"


@torch.inference_mode()
def test_a_filled_static_cache_is_as_long_and_as_large_as_a_read_one():
    model = load("rodimus-plus-1.6b")
    filled, read = (model.session("static", 1, CONTEXT) for _ in range(2))
    filled.fill(CONTEXT - 4)
    read.prefill(peers.random_tokens(1, CONTEXT - 4, model))
    assert filled.state_bytes() == read.state_bytes()
    for session in (filled, read):
        session.step()
        assert session.cache.get_seq_length() == CONTEXT - 3


@torch.inference_mode()
@pytest.mark.parametrize(("engine", "places"), [("static", CONTEXT + 2), ("prefix", CONTEXT)])
def test_a_rewound_cache_gives_the_same_tokens_in_the_same_place(engine, places):
    model = load("qwen2-1.5b")
    assert [e for e in (*model.engines, "prefix") if model.rewinds(e)] == ["static", "prefix"]
    session = huggingface.HuggingFaceSession(model, engine, 1, CONTEXT + 2)
    session.fill(CONTEXT)
    assert session.cache.layers[0].keys.shape[2] == places
    token = session.token.clone()
    tokens = []
    for _ in range(3):
        session.rewind(CONTEXT)
        session.token.copy_(token)
        session.run(2)
        assert session.cache.get_seq_length() == CONTEXT + 2
        tokens.append(session.token.item())
    assert len(set(tokens)) == 1


def test_tensors_of_a_cache_are_found_under_the_names_of_flash_linear_attention():
    state, taps, keys, values = (torch.zeros(n) for n in (2, 3, 4, 5))
    layer = types.SimpleNamespace(
        keys=None,
        state={
            "recurrent_state": state,
            "attn_state": (keys, values),
            "conv_state": taps,
            "ffn_state": None,
        },
    )
    states, cached = huggingface._tensors(layer)
    assert states == [state, taps] and cached == [keys, values]
