"""Whole runs on one and two ranks: the same numbers, resumed exactly, exported faithfully."""

import json
import shutil

import pytest
import torch
from transformers import AutoModelForCausalLM

from rodimus import cli
from rodimus.loading import load_model, load_tokenizer
from rodimus.run_folder import MARKER, complete_steps
from rodimus.train import parallel
from rodimus.train.__main__ import main, sample
from tests.checkpoints import save_model, save_plain_tokenizer
from tests.train.conftest import MODEL
from tests.train.ranks import metrics, run_ranks, train


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
        assert torch.equal(exported(ids).logits, load_model(run)(ids).logits)
    assert exported.lm_head.weight is exported.get_input_embeddings().weight


@pytest.mark.parametrize("warmup, told", [(12, True), (3, False)])
def test_a_warm_up_longer_than_the_run_is_told(config_file, capfd, warmup, told):
    options = ("--train.steps", 3, "--schedule.warmup-steps", warmup, "--no-export")
    assert train(1, config_file, *options) == [0]
    out = capfd.readouterr().out
    assert out.count("of its peak") == out.count("ends at 25.0% of its peak") == told


def test_a_trained_model_ends_its_texts_as_its_data_do(config_file, tmp_path, capfd):
    """Its JSON may have been written for another tokenizer; here 2 is an exclamation mark."""
    model = tmp_path / "model.json"
    model.write_text(json.dumps(MODEL | {"bos_token_id": 1, "eos_token_id": 2}))
    assert train(1, config_file, "--train.steps", 3) == [0]
    told = (
        "eos_token_id: the model's configuration has 2, but documents of the data end with 1, which"
    )
    assert told in capfd.readouterr().out
    exported = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "export")
    assert (exported.config.bos_token_id, exported.config.eos_token_id) == (0, 1)
    assert exported.generation_config.eos_token_id == 1
    # another such file does not make it another run
    model.write_text(json.dumps(MODEL | {"eos_token_id": [7, 1]}))
    assert train(1, config_file, "--no-export", "--train.steps", 4) == [0]
    assert json.loads((tmp_path / "run" / "model.json").read_text())["eos_token_id"] == [7, 1]


def test_a_run_ends_with_what_its_model_writes(config_file, tmp_path, capfd):
    options = ("--eval.sample-prompt", "w1 w2", "--eval.sample-tokens", 5)
    assert train(1, config_file, "--train.steps", 3, *options) == [0]
    text = sample(tmp_path / "run" / "export", "w1 w2", 5)
    assert capfd.readouterr().out.endswith(f"sample:\n{text}\n")


def test_a_sample_is_the_likeliest_text_with_a_penalty_on_repetition(tmp_path):
    model = save_model(tmp_path)
    save_plain_tokenizer(tmp_path)
    tokenizer = load_tokenizer(tmp_path)

    def likeliest(penalty):
        ids = tokenizer("the quick", return_tensors="pt").input_ids
        for _ in range(16):
            with torch.no_grad():
                scores = model(ids).logits[0, -1]
            seen = ids.unique()
            scores[seen] = scores[seen] * torch.where(scores[seen] > 0, 1 / penalty, penalty)
            ids = torch.cat((ids, scores.argmax().view(1, 1)), dim=1)
        return tokenizer.decode(ids[0], skip_special_tokens=True)

    assert sample(tmp_path, "the quick", 16) == likeliest(1.1) != likeliest(1.0)


def test_run_without_held_out_data_trains(config_file, tmp_path):
    text = config_file.read_text()
    config_file.write_text("".join(x for x in text.splitlines(True) if not x.startswith("val")))
    assert train(1, config_file, "--no-export", "--train.steps", 2, "--eval.every", 1) == [0]
    assert metrics(tmp_path / "run", "val_loss") == {}
    assert sorted(metrics(tmp_path / "run", "loss")) == [1, 2]


def test_a_folder_with_another_name_is_no_checkpoint(tmp_path):
    for name in ("step-00000003", "step-²", "step-3b", "step-"):
        (tmp_path / name).mkdir()
        (tmp_path / name / MARKER).touch()
    assert complete_steps(tmp_path) == [3]


def test_run_folder_is_exported_like_a_model(config_file, tmp_path, capsys):
    assert train(1, config_file, "--no-export") == [0]
    run, ids = tmp_path / "run", torch.arange(20)[None]

    def command(*arguments):
        status = cli.main(list(map(str, arguments)))
        return status, capsys.readouterr().err

    logits = []
    for name, options in [("newest", ()), ("third", ("--step", 3))]:
        assert command("export", run, tmp_path / name, *options)[0] == 0
        model = AutoModelForCausalLM.from_pretrained(tmp_path / name)
        logits.append(model(ids).logits)
    assert (tmp_path / "newest" / "tokenizer.json").is_file()
    assert not torch.equal(*logits)
    assert command("generate", run, "--prompt", "w1 w2", "--max-new-tokens", 4)[0] == 0

    for step in (5, 0):
        status, error = command("export", run, tmp_path / "none", "--step", step)
        assert status == 2 and f"no complete checkpoint of step {step}; it has 6, 3" in error
    status, error = command("export", tmp_path / "newest", tmp_path / "none", "--step", 3)
    assert status == 2 and "is one model, not a training run" in error
    shard = next((run / "checkpoints" / "step-00000006").glob("*.distcp"))
    shard.write_bytes(shard.read_bytes()[:-1])
    status, error = command("export", run, tmp_path / "none")
    assert status == 2 and f"is damaged: {shard.name}; other steps: 3" in error
    (run / "checkpoints" / "step-00000003" / MARKER).write_text("{")
    status, error = command("export", run, tmp_path / "none", "--step", 3)
    assert status == 2 and f"step-00000003 is damaged: {MARKER}; other steps: 6" in error
    shutil.rmtree(run / "checkpoints")
    assert "has no complete checkpoint yet" in command("export", run, tmp_path / "none")[1]
    assert not (tmp_path / "none").exists()


def test_masks_of_dropout_are_the_same_when_resumed_and_differ_by_rank(config_file, tmp_path):
    model = tmp_path / "model.json"
    model.write_text(json.dumps(json.loads(model.read_text()) | {"dropout": 0.2}))

    def drawn(*arguments):
        draws, sum_over_ranks = [], parallel.sum_over_ranks

        def draw(*values):
            # once the batch is there and before the model runs
            draws.append(torch.rand(1, generator=torch.default_generator.clone_state()).item())
            return sum_over_ranks(*values)

        parallel.sum_over_ranks = draw
        assert main([str(config_file), "--no-export", *arguments]) == 0
        return draws[0]

    first = run_ranks(2, drawn)
    assert len({*first, *run_ranks(2, drawn, "--train.seed", "1", "--out", f"{tmp_path}/s")}) == 4
    whole = figures(tmp_path / "run")
    (tmp_path / "run" / "metrics.jsonl").unlink()
    resumed = run_ranks(2, drawn, "--checkpoint.resume", "3")
    assert len({*first, *resumed}) == 4
    assert figures(tmp_path / "run") == {step: whole[step] for step in (4, 5, 6)}


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


@pytest.mark.slow
def test_four_ranks_go_on_where_two_stopped_and_the_other_way_round(config_file, tmp_path):
    """Shards, and on four ranks also two replicas of two shards."""
    layouts = {"2": (2,), "4": (4,), "2x2": (4, "--parallel.replicate", 2)}
    common = ("--no-export", "--train.micro-batch", 1)
    for name, (world, *settings) in layouts.items():
        assert set(train(world, config_file, *common, *settings, "--out", tmp_path / name)) == {0}
    expected = {step: figures(tmp_path / "2")[step] for step in (4, 5, 6)}
    for before, after in [("2", "4"), ("4", "2"), ("2", "2x2"), ("2x2", "2"), ("2x2", "4")]:
        run = tmp_path / f"{before}to{after}"
        shutil.copytree(tmp_path / before, run)
        (run / "metrics.jsonl").unlink()
        world, *settings = layouts[after]
        settings += ["--out", run, "--checkpoint.resume", 3]
        assert set(train(world, config_file, *common, *settings)) == {0}
        close(figures(run), expected)
