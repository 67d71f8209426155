"""A run that starts from weights that exist: to the bit, checked first, read once."""

import contextlib
import io
import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from rodimus import RodimusConfig, RodimusForCausalLM, RodimusModel
from rodimus.errors import InputError
from rodimus.export import export
from rodimus.loading import load_model
from rodimus.peers import PEERS
from rodimus.run_folder import complete_steps
from rodimus.train import parallel
from rodimus.train.__main__ import main
from rodimus.train.load import load_config
from rodimus.train.loop import Trainer
from rodimus.train.plan import make_plan
from rodimus.train.signals import Signals
from rodimus.train.weights import stored
from tests.train.conftest import MODEL, RUN
from tests.train.ranks import metrics, run_ranks, train
from tests.train.test_peers import fields


@pytest.fixture(scope="module")
def base(tmp_path_factory, packed):
    """Folder of a finished run, and in it the same model as ``export``."""
    folder = tmp_path_factory.mktemp("base")
    (folder / "model.json").write_text(json.dumps(MODEL))
    (folder / "run.toml").write_text(RUN.format(out=folder / "run", data=packed))
    assert train(1, folder / "run.toml") == [0]
    return folder / "run"


@pytest.fixture
def from_weights(config_file):
    """Writes the run's file with ``weights``, in place of a configuration of its own."""

    def write(weights):
        text = config_file.read_text().replace('config = "model.json"', f'weights = "{weights}"')
        config_file.write_text(text)
        return config_file

    return write


def give_tokenizer(folder, base):
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(base / "export" / name, folder)


def save(folder, base, model, **options):
    """A folder of a model that was not trained here."""
    model.save_pretrained(folder, **options)
    give_tokenizer(folder, base)
    return folder


def rodimus(**changes):
    torch.manual_seed(7)
    return RodimusForCausalLM(RodimusConfig(**(MODEL | changes)))


def peer(kind):
    config_class, model_class = PEERS[kind]
    torch.manual_seed(7)
    return model_class(config_class.from_dict(fields(kind)))


def said_to_be_bfloat16(folder, base):
    """A configuration says what a model is loaded in, not what its file holds."""
    save(folder, base, rodimus())
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"dtype": "bfloat16"}))
    return folder


FOLDERS = {
    "export": lambda folder, base: base / "export",
    "run": lambda folder, base: base,
    "exported again": lambda folder, base: export(base / "export", folder),
    "bfloat16": lambda folder, base: save(folder, base, rodimus().bfloat16()),
    "said to be bfloat16": said_to_be_bfloat16,
    "in parts": lambda folder, base: save(folder, base, rodimus(), max_shard_size="20KB"),
    "own head": lambda folder, base: save(folder, base, rodimus(tie_word_embeddings=False)),
    "one block type": lambda folder, base: save(folder, base, rodimus(block_type="rodimus")),
    "gla": lambda folder, base: save(folder, base, peer("gla")),
    "qwen2": lambda folder, base: save(folder, base, peer("qwen2")),
}


def first_weights(path, *overrides):
    """What a run holds before its first step."""
    config = load_config(path, list(map(str, overrides)))
    trainer = Trainer(config, parallel.start(config.parallel, "cpu"))
    assert trainer.progress.step == 0
    weights = {name: x.full_tensor() for name, x in trainer.model.state_dict().items()}
    trainer.close()
    return {name: x.detach().numpy() for name, x in weights.items()}


@pytest.mark.parametrize("kind", FOLDERS)
def test_first_weights_are_those_of_the_folder_to_the_bit(kind, base, from_weights, tmp_path):
    folder = FOLDERS[kind](tmp_path / "weights", base)
    expected = load_model(folder, dtype=torch.float32).state_dict()
    path = from_weights(folder)
    for world_size in (1, 2):
        for weights in run_ranks(world_size, first_weights, path):
            assert weights.keys() == expected.keys()
            for name, value in weights.items():
                assert torch.equal(torch.from_numpy(value), expected[name]), name
    assert make_plan(load_config(path), 2, mfu=0.5).parameters == sum(
        value.numel() for name, value in stored(load_model(folder)).items()
    )


@pytest.mark.slow
def test_replicas_start_alike(base, from_weights):
    expected = load_model(base / "export", dtype=torch.float32).state_dict()
    options = ("--parallel.replicate", 2, "--train.micro-batch", 1)
    for weights in run_ranks(4, first_weights, from_weights(base / "export"), *options):
        for name, value in weights.items():
            assert torch.equal(torch.from_numpy(value), expected[name]), name


def test_training_goes_on_as_from_a_model_loaded_by_hand(base, config_file, tmp_path):
    def by_hand():
        config = load_config(config_file, ["--out", str(tmp_path / "hand"), "--no-export"])
        trainer = Trainer(config, parallel.start(config.parallel, "cpu"))
        weights = load_model(base / "export", dtype=torch.float32).state_dict()
        with torch.no_grad():
            for name, parameter in trainer.model.named_parameters():
                parameter.to_local().copy_(weights[name])
        with Signals() as signals:
            status = trainer.run(signals)
        trainer.close()
        return status

    run = tmp_path / "run"
    assert run_ranks(1, by_hand) == [0]
    assert train(1, config_file, "--no-export", "--model.weights", base / "export") == [0]
    for name in ("loss", "grad_norm", "val_loss"):
        assert metrics(run, name) == metrics(tmp_path / "hand", name)
    # three times as near to the end of the schedule as the run before began
    assert metrics(run, "loss")[1] < metrics(base, "loss")[1] - 0.5


def test_ranks_that_share_rows_start_from_weights_too(base, figures):
    weights = ("--model.weights", base / "export")
    one = figures(1, *weights)
    assert figures(2, *weights, "--parallel.context-parallel", 2) == pytest.approx(one, rel=1e-5)
    assert figures(1) != pytest.approx(one, rel=1e-2)


def output_of(*arguments):
    """Exit status of `rodimus train`, and what it said."""
    with (
        contextlib.redirect_stdout(io.StringIO()) as out,
        contextlib.redirect_stderr(io.StringIO()) as err,
    ):
        status = main(list(map(str, arguments)))
    return status, out.getvalue() + err.getvalue()


def told(path, *overrides):
    """Exit status, and what one rank said."""
    return run_ranks(1, output_of, path, "--no-export", *overrides)[0]


def test_a_resumed_run_does_not_read_them_again(base, from_weights, tmp_path):
    weights, run = tmp_path / "weights", tmp_path / "run"
    shutil.copytree(base / "export", weights)
    path = from_weights(weights)
    assert train(1, path, "--no-export") == [0]
    expected = metrics(run, "loss")
    shutil.rmtree(weights)
    for again in (path, run / "config.toml"):
        (run / "metrics.jsonl").unlink()
        status, said = told(again, "--checkpoint.resume", 3)
        assert status == 0 and "weights" not in said
        assert metrics(run, "loss") == {step: expected[step] for step in (4, 5, 6)}
    # no checkpoint is sound: told twice the run begins again, for which they are needed
    for step in (3, 6):
        (run / "checkpoints" / f"step-0000000{step}" / "COMPLETE").write_text("{")
    for problem in ("is damaged, the newest of step 6", f"{weights} does not exist"):
        status, said = told(run / "config.toml", "--checkpoint.resume", "auto")
        assert status == 2 and problem in said


def test_rank_0_knows_whether_a_run_has_begun(base, from_weights, tmp_path, monkeypatch):
    """A file system may show another rank its checkpoints later."""
    folder, run = tmp_path / "weights", tmp_path / "run"
    shutil.copytree(base / "export", folder)
    path = from_weights(folder)
    assert train(1, path, "--no-export", "--train.steps", 3) == [0]
    shutil.rmtree(folder)
    monkeypatch.setattr(
        "rodimus.train.weights.complete_steps",
        lambda root: complete_steps(root) if os.environ["RANK"] == "0" else [],
    )
    assert train(2, path, "--no-export", timeout=30) == [0, 0]
    assert sorted(metrics(run, "loss")) == [1, 2, 3, 4, 5, 6]


def test_other_weights_are_reported_where_a_run_is_resumed(base, from_weights, caplog):
    path = from_weights(base / "export")
    assert main([str(path), "--no-export", "--train.steps", "3"]) == 0
    assert main([str(path), "--no-export", "--model.weights", "elsewhere"]) == 0
    elsewhere = Path("elsewhere").absolute()
    assert f"resumed with model.weights = {elsewhere}, was {base / 'export'}" in caplog.messages
    assert "the run goes on with its own weights: model.weights is not read" in caplog.messages


def test_what_is_converted_and_what_differs_is_said(base, from_weights, tmp_path, packed):
    folder = save(tmp_path / "weights", base, rodimus().bfloat16())
    status, said = told(from_weights(folder), "--train.steps", 1)
    assert status == 0
    assert f"starts from the weights in {folder} (bfloat16" in said

    (folder / "tokenizer.json").unlink()
    (tmp_path / "other.json").write_text(json.dumps(MODEL | {"norm_epsilon": 1e-4}))
    options = ("--model.config", tmp_path / "other.json", "--out", tmp_path / "other")
    status, said = told(tmp_path / "run.toml", "--train.steps", 1, *options)
    assert status == 0
    assert "model.config has norm_epsilon = 0.0001, that of the weights has 1e-05" in said
    assert f"{folder} has no tokenizer" in said


def cut(folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1])


def change_weights(folder, change):
    path = folder / "model.safetensors"
    weights = load_file(path)
    change(weights)
    save_file(weights, path, {"format": "pt"})


def rename(weights):
    weights["model.norm_g.weight"] = weights.pop("model.norm_f.weight")


def drop(weights):
    del weights["model.norm_f.weight"]


def quantize(weights):
    weights["model.layers.0.mixer.fc.weight"] = torch.ones(128, 32, dtype=torch.int8)


def exchange_tokens(folder):
    path = folder / "tokenizer.json"
    tokenizer = json.loads(path.read_text())
    vocab = tokenizer["model"]["vocab"]
    a, b = (next(token for token, at in vocab.items() if at == place) for place in (100, 200))
    vocab[a], vocab[b] = vocab[b], vocab[a]
    path.write_text(json.dumps(tokenizer))


def base_model_alone(folder):
    RodimusModel(RodimusConfig(**MODEL)).save_pretrained(folder)


def three_layers(folder):
    rodimus(n_layer=3).save_pretrained(folder)


def own_head(folder):
    rodimus(tie_word_embeddings=False).save_pretrained(folder)


FAULTS = {
    "is damaged or cut short": cut,
    "a model without model.norm_g.weight": lambda folder: change_weights(folder, rename),
    "model.norm_f.weight is missing": lambda folder: change_weights(folder, drop),
    "holds weights in I8": lambda folder: change_weights(folder, quantize),
    "has other tokens than": exchange_tokens,
    "n_layer must be 3, got 2": three_layers,
    "tie_word_embeddings must be False, got True": own_head,
    "must be a language model's": base_model_alone,
    "does not exist: expected a checkpoint folder": shutil.rmtree,
}


@pytest.mark.parametrize("message", FAULTS)
def test_what_does_not_fit_is_one_error_before_a_model_is_built(
    message, base, config_file, tmp_path, monkeypatch
):
    folder = tmp_path / "weights"
    shutil.copytree(base / "export", folder)
    FAULTS[message](folder)

    def too_late(*_):
        raise AssertionError("the model is built already")

    monkeypatch.setattr(parallel, "build_model", too_late)
    for world_size in (1, 2):
        options = ("--model.weights", folder)
        told = run_ranks(world_size, output_of, config_file, *options)
        assert [status for status, _ in told] == [2] * world_size
        assert message in told[0][1] and told[0][1].count("\n") == 1
        assert str(folder) in told[0][1]


def test_a_folder_is_relative_to_the_file_that_names_it(config_file, tmp_path, monkeypatch):
    text = config_file.read_text()

    def weights(value):
        config_file.write_text(text.replace("[model]", f'[model]\nweights = "{value}"'))
        return load_config(config_file).model.weights

    monkeypatch.chdir("/")
    assert weights("some/where/else") == str(tmp_path / "some/where/else")
    assert weights("owner/name") == "owner/name"
    (tmp_path / "owner" / "name").mkdir(parents=True)
    assert weights("owner/name") == str(tmp_path / "owner" / "name")
    config_file.write_text(text.replace('config = "model.json"', ""))
    with pytest.raises(InputError, match=r"model.config must name .* or model.weights a folder"):
        load_config(config_file)
