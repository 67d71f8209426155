"""A tiny corpus and a tiny Rodimus+ run on it."""

import json
import random
import sys
from functools import partialmethod

import pytest
import torch

from rodimus.train.pack import pack
from tests.train.ranks import metrics, train

MODEL = {
    "block_type": "rodimus_plus",
    "d_model": 32,
    "n_layer": 2,
    "vocab_size": 300,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 1,
    "tie_word_embeddings": True,
    "residual_in_fp32": True,
    "rescale_prenorm_residual": True,
    "mixer_cfg": {"d_conv": 4, "expand_ratio": 2.0, "input_gate_low_rank": 4, "mem_size": 8},
    "attn_cfg": {"num_heads": 2, "num_heads_k": 1, "num_heads_v": 2, "window_size": 16},
}
RUN = """
out = "{out}"
[model]
config = "model.json"
[data]
train = ["{data}/train.json"]
val = ["{data}/val.json"]
seq_len = 32
[train]
steps = 6
global_batch_tokens = 128
micro_batch = 2
dtype = "float32"
[optim]
lr = 1e-2
[schedule]
warmup_steps = 2
[checkpoint]
every = 3
async_save = false
[eval]
every = 100
tokens = 256
[log]
every = 1
"""
SHORT = ("--train.steps", 3, "--no-export", "--schedule.warmup-steps", 0, "--eval.every", 3)


@pytest.fixture(scope="session")
def packed(tmp_path_factory):
    """Folder of token shards: short documents of words that follow each other in a fixed way."""
    folder = tmp_path_factory.mktemp("packed")
    words, rng = [f"w{i}" for i in range(40)], random.Random(0)
    texts = []
    for _ in range(400):
        at, text = rng.randrange(40), []
        for _ in range(rng.randrange(3, 40)):
            text.append(words[at])
            at = (at * 7 + rng.randrange(3)) % 40
        texts.append(" ".join(text))
    (folder / "text.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in texts))
    pack(str(folder / "text.jsonl"), folder / "data", vocab_size=300, val_fraction=0.1)
    return folder / "data"


@pytest.fixture
def config_file(tmp_path, packed):
    """TOML file of a run of 6 steps into ``tmp_path / "run"``."""
    (tmp_path / "model.json").write_text(json.dumps(MODEL))
    path = tmp_path / "run.toml"
    path.write_text(RUN.format(out=tmp_path / "run", data=packed))
    return path


@pytest.fixture
def figures(config_file, tmp_path):
    """Losses, gradient norms and held-out loss of a short run with some settings changed."""

    def figures(world_size, *overrides, timeout=200):
        run = tmp_path / f"run{len(list(tmp_path.iterdir()))}"
        statuses = train(world_size, config_file, *SHORT, "--out", run, *overrides, timeout=timeout)
        assert set(statuses) == {0}
        names = ("loss", "grad_norm", "val_loss", "val_bits_per_byte")
        return [value for name in names for _, value in sorted(metrics(run, name).items())]

    return figures


@pytest.fixture
def graphs_only(monkeypatch):
    """Blocks are compiled to graphs, not to code, which takes minutes when nothing is cached."""
    graphs = partialmethod(torch.nn.Module.compile, backend="aot_eager")
    monkeypatch.setattr(torch.nn.Module, "compile", graphs)


@pytest.fixture
def operators_of_a_gpu(monkeypatch):
    """Tensors without values are given to the operators of a GPU."""
    for name, module in list(sys.modules.items()):
        if name.startswith("rodimus_kernels.") and hasattr(module, "runs_triton"):
            monkeypatch.setattr(module, "runs_triton", lambda device: device.type == "meta")
    # there is no autocast of tensors without values
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda device: False)
