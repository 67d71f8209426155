"""Whole runs on one and two ranks: the same numbers, resumed exactly, exported faithfully."""

import shutil

import pytest
import torch
from transformers import AutoModelForCausalLM

from rodimus.train.export import load_trained
from rodimus.train.store import complete_steps
from tests.train.ranks import metrics, train


def figures(run):
    """Loss and gradient norm by step."""
    loss, norm = metrics(run, "loss"), metrics(run, "grad_norm")
    return {step: (loss[step], norm[step]) for step in loss}


def close(a, b, rel=1e-5):
    assert a.keys() == b.keys()
    for step in a:
        assert a[step] == pytest.approx(b[step], rel=rel), step


def test_loss_falls_and_export_equals_the_trained_model(config_file, tmp_path):
    assert train(1, config_file, "--train.steps", 12) == [0]
    run = tmp_path / "run"
    loss = metrics(run, "loss")
    assert loss[12] < loss[1] - 1.0
    # a begin mark and an end mark a document: fewer bits a byte than nats a token say
    assert 0 < metrics(run, "val_bits_per_byte")[12] < metrics(run, "val_loss")[12] / 0.69
    exported = AutoModelForCausalLM.from_pretrained(run / "export")
    ids = torch.arange(20)[None]
    with torch.no_grad():
        assert torch.equal(exported(ids).logits, load_trained(run)(ids).logits)
    assert exported.lm_head.weight is exported.get_input_embeddings().weight


def test_ranks_agree_and_a_resumed_run_equals_the_undisturbed_one(config_file, tmp_path):
    whole = {}
    for world in (1, 2):
        out = tmp_path / f"w{world}"
        assert set(train(world, config_file, "--no-export", "--out", out)) == {0}
        assert complete_steps(out / "checkpoints") == [6, 3]
        whole[world] = figures(out)
    close(whole[1], whole[2])
    for before, after in [(1, 1), (2, 2), (1, 2), (2, 1)]:
        run = tmp_path / f"{before}to{after}"
        shutil.copytree(tmp_path / f"w{before}", run)
        (run / "metrics.jsonl").unlink()
        resume = ("--no-export", "--out", run, "--checkpoint.resume", 3)
        assert set(train(after, config_file, *resume)) == {0}
        resumed = figures(run)
        expected = {step: whole[before][step] for step in (4, 5, 6)}
        if before == after:
            assert resumed == expected
        else:
            close(resumed, expected)
