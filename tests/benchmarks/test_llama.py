"""Peers in llama.cpp compute with the weights of the models here."""

import pytest
import torch

from benchmarks import harness, peers
from benchmarks.peers import guard, llama, rwkv
from benchmarks.sizes import config_of

gguf = pytest.importorskip("gguf")

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


def load(family, dtype, **options):
    try:
        return peers.load(FAMILIES[family], "tiny", dtype, CPU, **options)
    except peers.Unavailable as reason:
        pytest.skip(f"{family}: {reason}")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_file_holds_every_weight(tmp_path, family, dtype):
    config = config_of(family, "tiny")
    if family == "rwkv6":
        # of a checkpoint, without the package that runs it
        weights = dict(rwkv.random_checkpoint(config, dtype))
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


@pytest.mark.parametrize("family", FAMILIES)
def test_a_file_weight_dtype_has_what_a_converter_rounds(tmp_path, family):
    config = config_of(family, "tiny")
    if family == "rwkv6":
        weights = dict(rwkv.random_checkpoint(config, torch.bfloat16))
    else:
        weights = load(family, torch.bfloat16).named_weights()
    sizes = llama.write_gguf(tmp_path / "model.gguf", family, config, weights, in_8_bits=True)
    held = {t.name: t for t in gguf.GGUFReader(tmp_path / "model.gguf").tensors}
    assert sizes == {name: t.n_bytes for name, t in held.items()}
    kinds = {name: t.tensor_type.name for name, t in held.items()}
    small = [n for n in kinds if "time_mix_w" in n or "time_mix_decay_w" in n]
    assert {kinds[n] for n in small} <= {"BF16"} and bool(small) == (family == "rwkv6")
    for name, theirs, turned in SAMPLES[family]:
        if turned:
            continue
        assert kinds[name] == "Q8_0"
        exact = weights[theirs].float().unflatten(1, (-1, 32))
        found = gguf.quants.dequantize(held[name].data, held[name].tensor_type)
        error = (torch.from_numpy(found).view(exact.shape) - exact).abs()
        # half a step, and the scale is a float16
        assert (error <= exact.abs().amax(-1, keepdim=True) * (0.5 / 127 + 2**-11)).all()
    assert {kinds[n] for n in ("token_embd.weight", "output_norm.weight")} == {"Q8_0", "F32"}


# of all bytes that a token reads in 16 bits, and how far logits may be from those
ROUNDED = {"int8": (0.5, 0.7, 0.5), "int4": (0.25, 0.7, 0.9)}


@torch.inference_mode()
@pytest.mark.parametrize("weight_dtype", ROUNDED)
@pytest.mark.parametrize("family", FAMILIES)
def test_rounded_logits_are_near_and_rounded(family, weight_dtype):
    pytest.importorskip("llama_cpp")
    low, high, limit = ROUNDED[weight_dtype]
    model = load(family, torch.bfloat16, weight_dtype=weight_dtype)
    ids = peers.random_tokens(1, 40, model)
    peers.require_same_logits(model, ids, 0.2)
    rounded, exact = (
        logits.double()
        for logits in (
            model.session(peers.LLAMA_CPP, 1, 64).prefill(ids),
            model.llama_cpp_logits(ids),
        )
    )
    # the model without rounding is gone, and the library still says what it does
    said = len(model.in_llama_cpp.log)
    model.session(peers.LLAMA_CPP, 1, 64)
    assert len(model.in_llama_cpp.log) > said
    assert 1e-3 < (rounded - exact).norm() / exact.norm() < limit
    weight_bytes, token_bytes = model.bytes_in(peers.LLAMA_CPP)
    assert low < token_bytes / model.token_bytes < high and token_bytes <= weight_bytes


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
    monkeypatch.setattr(guard, "is_installed", lambda module: module != "llama_cpp")
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
