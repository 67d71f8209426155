"""Every file in configs/ parses, names a model that builds, and learns where it is small enough."""

import shutil
import sys
import sysconfig
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch

from rodimus.loading import model_class, read_config
from rodimus.train.batches import open_sources
from rodimus.train.load import load_config, to_toml
from rodimus.train.pack import pack
from rodimus.train.plan import make_plan
from rodimus.train.shards import TokenShards
from tests.device import ON_BOTH
from tests.train.ranks import metrics, train, train_alone

ROOT = Path(__file__).parents[2] / "configs"
RUNS = sorted(p for p in (ROOT / "train").glob("*.toml") if not p.name.startswith("base"))
# 1.4B and 1.6B: as the original code builds them (tests/goldens); 4B: of its published shapes; no
# released weights were read. The others are what their names say
PARAMETERS = {
    "rodimus_1b4": 1_531_551_744,
    "rodimus_plus_1b6": 1_607_095_296,
    "rodimus_plus_4b": 4_786_527_232,
    "rodimus_plus_340m": 334_752_384,
    "rodimus_plus_130m": 131_477_120,
    "rodimus_plus_2m": 1_899_968,
    "rodimus_plus_ci": 171_520,
    "gla_340m": 334_629_888,
    "qwen2_340m": 334_838_784,
}


@pytest.mark.parametrize("path", RUNS, ids=lambda p: p.stem)
def test_run_parses_and_divides(path):
    config = load_config(path)
    assert Path(config.model.config).is_file()
    assert config.steps > config.schedule.warmup_steps
    large = config.train.global_batch_tokens > 100_000
    plan = make_plan(config, 8 if large else 1, mfu=0.5)
    assert plan.parameters == PARAMETERS[Path(config.model.config).stem]


def test_the_data_of_the_large_runs_lie_where_pack_puts_them(packed, tmp_path, monkeypatch):
    for source in ("books", "code"):
        shutil.copytree(packed, tmp_path / "data" / source)
    monkeypatch.chdir(tmp_path)
    data = load_config(ROOT / "train" / "rodimus_plus_130m.toml").data
    for part, patterns in (("train", data.train), ("val", data.val)):
        found = [str(source.path) for source in open_sources(patterns)]
        assert found == [f"data/{source}/{part}.json" for source in ("books", "code")]


def test_every_model_file_is_used_and_counted():
    files = {p.stem for p in (ROOT / "model").glob("*.json")}
    assert files == set(PARAMETERS)
    assert files == {Path(load_config(p).model.config).stem for p in RUNS}


@pytest.mark.parametrize("name", PARAMETERS)
def test_model_has_its_parameter_count(name):
    with torch.device("meta"):
        config = read_config(ROOT / "model" / f"{name}.json")
        model = model_class(config)(config)
    assert model.num_parameters() == PARAMETERS[name]


@pytest.mark.parametrize("name", ["gla_340m", "qwen2_340m"])
def test_peer_differs_in_nothing_but_the_model(name):
    """The same data, steps and optimiser, and parameters within 0.1%."""
    ours, peer = (load_config(ROOT / "train" / f"{n}.toml") for n in ("rodimus_plus_340m", name))
    assert replace(peer, model=ours.model, out=ours.out) == ours
    assert PARAMETERS[name] == pytest.approx(PARAMETERS["rodimus_plus_340m"], rel=1e-3)


def bits_per_byte_of_frequencies(data):
    """What the held-out text costs a model that knows how often each token occurs, and no more."""

    def counts(shards):
        return sum(np.bincount(ids, minlength=shards.manifest.vocab_size) for ids in shards.tokens)

    val = TokenShards(data / "val.json")
    known = counts(TokenShards(data / "train.json")) + 1  # none is impossible
    return -(counts(val) @ np.log2(known / known.sum())) / val.manifest.n_bytes


@ON_BOTH
def test_tiny_run_learns_python(tmp_path, device):
    """And goes on from a checkpoint on a GPU; on a CPU test_run.py has that, to the bit."""
    data, run, on_gpu = tmp_path / "data", tmp_path / "run", device.type == "cuda"
    source = Path(sysconfig.get_paths()["stdlib"]) / "asyncio"
    pack(str(source), data, vocab_size=512, tokenizer_sample=0.5, val_fraction=0.1)
    config = load_config(ROOT / "train" / "ci_tiny.toml")
    shards = {"train": (str(data / "train.json"),), "val": (str(data / "val.json"),)}
    config = replace(
        config,
        out=str(run),
        export=False,
        data=replace(config.data, **shards),
        train=replace(config.train, device=device.type),
        log=replace(config.log, every=20),
        checkpoint=replace(config.checkpoint, every=20 if on_gpu else config.checkpoint.every),
    )
    # no options: tyro, which reads them, may be missing where the GPU is
    written = tmp_path / "run.toml"
    written.write_text(to_toml(config))
    start = train_alone if on_gpu else partial(train, 1)
    assert start(written, timeout=240) == [0]
    # 0.73 to 0.78 of it measured (sources of Python 3.10 to 3.13); equally likely tokens: 1.2
    reached = metrics(run, "val_bits_per_byte")[40]
    assert reached < 0.8 * bits_per_byte_of_frequencies(data)
    if on_gpu:
        (run / "metrics.jsonl").unlink()
        resumed = replace(config, checkpoint=replace(config.checkpoint, resume="20"))
        written.write_text(to_toml(resumed))
        assert start(written, timeout=240) == [0]
        assert min(metrics(run, "loss")) == 21
        # a GPU may add in another order
        assert metrics(run, "val_bits_per_byte")[40] == pytest.approx(reached, rel=1e-3)


@pytest.mark.slow
def test_demo_learns_python_in_a_minute(tmp_path):
    """An eighth of `make demo`: the same data, tokenizer, model and settings."""
    data = tmp_path / "data"
    pack("stdlib", data, val_fraction=0.05)
    overrides = ("--out", tmp_path / "run", "--no-export", "--train.steps", 100)
    overrides += ("--schedule.warmup-steps", 10, "--eval.tokens", 32768)
    overrides += ("--data.train", data / "train.json", "--data.val", data / "val.json")
    assert train(1, ROOT / "train" / "demo_cpu.toml", *overrides, timeout=400) == [0]
    # 2.193 measured on the sources of Python 3.11 (bf16), 0.76 of what their frequencies cost; 0.85
    # on those of 3.12, which hold out other files
    is_3_11 = sys.version_info[:2] == (3, 11)
    limit = 2.3 if is_3_11 else 0.9 * bits_per_byte_of_frequencies(data)
    assert metrics(tmp_path / "run", "val_bits_per_byte")[100] < limit


def test_the_demo_asks_for_no_gpu():
    """Its two processes would want two."""
    assert load_config(ROOT / "train" / "demo_cpu.toml").train.device == "cpu"
