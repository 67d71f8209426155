"""Peers in llama.cpp compute with the weights of the models here."""

import gguf
import pytest
import torch

from benchmarks import harness, llama, peers
from benchmarks.sizes import config_of

CPU = torch.device("cpu")
FAMILIES = {"qwen2": "qwen2-1.5b", "rwkv6": "rwkv6-1.6b"}
# a matrix of each that is written as it is, and one that is turned
SAMPLES = {
    "qwen2": [("blk.1.ffn_down.weight", "model.layers.1.mlp.down_proj.weight", False)],
    "rwkv6": [
        ("blk.1.time_mix_key.weight", "blocks.1.att.key.weight", False),
        ("blk.1.time_mix_decay_w2.weight", "blocks.1.att.time_decay_w2", True),
    ],
}


def load(family, dtype):
    try:
        return peers.load(FAMILIES[family], "tiny", dtype, CPU)
    except peers.Unavailable as reason:
        pytest.skip(f"{family}: {reason}")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_file_holds_every_weight(tmp_path, family, dtype):
    config = config_of(family, "tiny")
    if family == "rwkv6":
        # of a checkpoint, without the package that runs it
        weights = dict(peers._rwkv6_weights(config, dtype, 0))
    else:
        weights = load(family, dtype).named_weights()
    llama.write_gguf(tmp_path / "model.gguf", family, config, weights)
    held = {t.name: t for t in gguf.GGUFReader(tmp_path / "model.gguf").tensors}
    assert len(held) == len({t.data.ctypes.data for t in held.values()})
    head = "lm_head.weight" if config.get("tie_word_embeddings") else ""
    numbers = sum(x.numel() for name, x in weights.items() if name != head)
    assert sum(int(t.n_elements) for t in held.values()) == numbers
    for name, theirs, turned in SAMPLES[family]:
        expected = weights[theirs].T if turned else weights[theirs]
        # dimensions from the fastest on
        assert list(held[name].shape) == list(expected.shape)[::-1]
        found = torch.from_numpy(held[name].data.copy())
        found = found.view(torch.bfloat16) if dtype == torch.bfloat16 else found
        assert torch.equal(found.view(expected.shape), expected)
        assert (held[name].tensor_type.name == "BF16") == (dtype == torch.bfloat16)


@torch.inference_mode()
@pytest.mark.parametrize("family", FAMILIES)
def test_logits_are_those_of_the_first_engine(family):
    pytest.importorskip("llama_cpp")
    model = load(family, torch.float32)
    ids = peers.random_tokens(1, 40, model)
    peers.require_same_logits(model, ids, 5e-6)
    with pytest.raises(peers.Unavailable, match="logits differ"):
        peers.require_same_logits(model, ids, 0.0)


@torch.inference_mode()
@pytest.mark.parametrize("family", FAMILIES)
def test_reads_a_prompt_in_parts_and_starts_over(family, monkeypatch):
    pytest.importorskip("llama_cpp")
    model = load(family, torch.float32)
    ids = peers.random_tokens(1, 40, model)
    session = model.session(peers.LLAMA_CPP, 1, 64)
    whole = session.prefill(ids)
    monkeypatch.setattr(llama, "_PROMPT_BATCH", 16)
    torch.testing.assert_close(session.prefill(ids), whole, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_without_the_package_the_row_says_so(family, monkeypatch):
    model = load(family, torch.float32)
    monkeypatch.setattr(peers, "is_installed", lambda module: module != "llama_cpp")
    with pytest.raises(peers.Unavailable, match="llama-cpp-python is not installed"):
        model.session(peers.LLAMA_CPP, 1, 64)


def test_an_engine_with_other_logits_is_not_timed(monkeypatch):
    model = load("qwen2", torch.float32)
    first = model.session(model.engines[0], 1, 64)

    class Other:
        token = first.token

        def prefill(self, ids):
            return first.prefill(ids.flip(1))

        def decode(self, token):
            return first.decode(token)

    bench = harness.Bench("tiny", CPU, torch.float32, ("qwen2-1.5b",), None, 3, 0.0)
    monkeypatch.setattr(peers, "disagreement", lambda *_: 0.0)
    monkeypatch.setattr(model, "session", lambda e, *_: Other() if e == peers.LLAMA_CPP else first)
    with torch.inference_mode(), pytest.raises(peers.Unavailable, match="logits differ"):
        bench._check(model, peers.LLAMA_CPP)
