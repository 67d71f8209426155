"""The run's TOML file: strict reading, overrides, round trip."""

import io
import json

import pytest

from rodimus.errors import InputError
from rodimus.files import write_atomic
from rodimus.train.config import TrainConfig, steps_of_run
from rodimus.train.load import build, load_config, to_toml
from rodimus.train.weights import read_model_config
from tests.model.golden_data import golden_config
from tests.train.conftest import MODEL
from tests.train.test_peers import fields

MINIMAL = """
out = "runs/x"
[model]
config = "model.json"
[data]
train = ["train.json"]
seq_len = 64
[train]
steps = 10
global_batch_tokens = 1024
[optim]
lr = 3e-4
"""


@pytest.fixture
def write(tmp_path):
    def write(text, name="run.toml"):
        path = tmp_path / name
        path.write_text(text)
        return path

    return write


def test_reads_numbers_and_resolves_the_model_file(write, tmp_path):
    config = load_config(write(MINIMAL + "[checkpoint]\nresume = 3"))
    assert config.optim.lr == 3e-4
    assert config.checkpoint.resume == "3"
    assert config.model.config == str(tmp_path / "model.json")
    assert config.rows == 16


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[optim]\nlrr = 1.0", "unknown key 'optim.lrr', did you mean 'optim.lr'?"),
        ("[train]\nsteps = 'ten'", "train.steps must be int, got str 'ten'"),
        ("[data]\ntrain = ['a']\nweights = [0.0]", "data.weights needs 1 positive numbers"),
        (
            "[data]\ntrain = ['a']\npacking = 'bestfit'\nmask_doc_start = false",
            "data.packing = bestfit needs data.mask_doc_start",
        ),
        (
            "[train]\nsteps = 5\nglobal_batch_tokens = 0\n"
            "[model]\nconfig = 'm'\n[data]\ntrain = ['a']",
            "train.global_batch_tokens must be a multiple of data.seq_len = 2048, got 0",
        ),
        ("[train]\nsteps = true", "train.steps must be int, got bool True"),
        ("[data]\ntrain = 'a.json'", "data.train must be a list"),
        ("[optim]\nbetas = [0.9]", "optim.betas must have 2 entries, got [0.9]"),
        ("extends = ['a.toml']", "extends must be one path, got ['a.toml']"),
        ("lr = 1.0", "unknown key 'lr', did you mean 'optim.lr'?"),
        ("[data]\ntrain=['a']\npacking = 'tight'", "data.packing must be one of concat, bestfit"),
        ("[train]\nsteps = 5\ntokens = 5", "exactly one of train.steps and train.tokens"),
        ("[train]\nsteps = -5\ntokens = 5", "train.steps must be at least 0, got -5"),
        ("[checkpoint]\nresume = 'yes'", "checkpoint.resume must be auto, never or a step"),
        ("[checkpoint]\nresume = '²'", "checkpoint.resume must be auto, never or a step, got '²'"),
    ],
)
def test_bad_value_is_one_line(text, message, write):
    with pytest.raises(InputError) as error:
        load_config(write(text))
    assert message in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("--out=", "out must name a folder, got ''"),
        ("--optim.lrr 1", "Unrecognized options: --optim.lrr, 1, did you mean --optim.lr?"),
        ("--optim.lr abc", "Error parsing --optim.lr: could not convert string to float: 'abc'"),
        ("--optim.betas 0.9", "Missing value for argument '--optim.betas'. Expected 2 values."),
        ("--optim.betas 0.9 1", "optim.betas and optim.muon_momentum must lie in [0, 1)"),
        ("--train.micro-batch 0", "train.micro_batch must be at least 1, got 0"),
        ("--train.z-loss -1", "train.z_loss must be at least 0, got -1.0"),
        ("--optim.eps 0", "optim.eps must be at least 1e-37, got 0.0"),
        ("--optim.eps 1e-50", "optim.eps must be at least 1e-37, got 1e-50"),
        ("--schedule.final-lr-frac 2", "schedule.final_lr_frac must lie in [0, 1], got 2.0"),
        ("--parallel.timeout-s 0", "parallel.timeout_s must lie in [1, 1e+09], got 0.0"),
        ("--parallel.timeout-s 1e10", "parallel.timeout_s must lie in [1, 1e+09], got 1"),
        ("--checkpoint.timeout-s 1e15", "checkpoint.timeout_s must lie in [1, 1e+09], got 1"),
        ("--schedule.warmup-steps -1", "schedule.warmup_steps must be at least 0, got -1"),
        ("--train.global-batch-tokens 1000", "must be a multiple of data.seq_len = 64, got 1000"),
        ("--train.device tpu", "train.device must be one of auto, cpu, cuda, got 'tpu'"),
    ],
)
def test_bad_override_is_one_line(override, message, write, monkeypatch):
    """Also where a plain locale has no lines for a box."""
    path, told = write(MINIMAL), []
    for encoding in ("utf-8", "ascii"):
        monkeypatch.setattr("sys.stdout", io.TextIOWrapper(io.BytesIO(), encoding=encoding))
        with pytest.raises(InputError) as error:
            load_config(path, override.split())
        told.append(str(error.value))
    assert told[0] == told[1]
    assert message in told[0]
    assert "\n" not in told[0]


def test_options_change_a_whole_run(write):
    path = write(MINIMAL.replace('train = ["train.json"]', ""))
    message = r"data.train must name .* \(in .*run.toml alone: options change a whole run\)$"
    with pytest.raises(InputError, match=message):
        load_config(path, ["--data.train", "x/train.json"])
    with pytest.raises(InputError, match="data.train must name at least one manifest$"):
        load_config(path)


def test_help_explains_files_that_are_no_run_by_themselves(write, capsys):
    """With what is right in them: a base of other files, a wrong type, an unknown key."""
    base = MINIMAL.replace("steps = 10", "")
    typos = MINIMAL.replace("lr = 3e-4", 'lr = "a"\nbetas = [0.5, 0.6]\nbeta = 1')
    wrong = {
        base: "exactly one of train.steps",
        typos: "optim.lr must be float",
        f"eval = 3{typos}": "eval must be a table, got 3",
    }
    for text, problem in wrong.items():
        path = write(text)
        with pytest.raises(SystemExit) as stop:
            load_config(path, ["--train.seed", "1", "--help"])
        assert not stop.value.code
        shown = capsys.readouterr().out
        assert f"run.toml is not a whole run: {problem}" in shown
        assert "--data.seq-len INT" in shown and "(default: 64)" in shown
        assert ("(default: 0.5 0.6)" in shown) == ("betas" in text)


def test_missing_file_and_bad_syntax_are_named(write, tmp_path):
    with pytest.raises(InputError, match="cannot read config"):
        load_config(tmp_path / "none.toml")
    # a run has one within
    (tmp_path / "config.toml").touch()
    with pytest.raises(InputError, match=r"Is a directory; did you mean .*config.toml\?"):
        load_config(tmp_path)
    with pytest.raises(InputError, match="not valid TOML"):
        load_config(write("[optim\nlr=1"))


def test_a_file_may_begin_with_a_byte_order_mark(write):
    """Some editors of Windows write one."""
    assert load_config(write("\ufeff" + MINIMAL)) == load_config(write(MINIMAL))


def test_a_path_in_a_file_may_begin_at_home(write, tmp_path, monkeypatch):
    """Where no shell has seen it: a run into a folder named ~ is nobody's wish."""
    monkeypatch.setenv("HOME", str(tmp_path))
    text = MINIMAL.replace('"runs/x"', '"~/x"').replace('train = ["', 'train = ["~/d/*.json", "')
    config = load_config(write(text.replace('"model.json"', '"~/m.json"')))
    assert config.out == str(tmp_path / "x")
    assert config.model.config == str(tmp_path / "m.json")
    assert config.data.train[0] == str(tmp_path / "d" / "*.json")
    assert not config.data.train[1].startswith(str(tmp_path))


def test_child_replaces_keys_of_its_parent(write):
    write(MINIMAL, "base.toml")
    child = 'extends = "base.toml"\n[optim]\nlr = 1.0\n[train]\nseed = 3'
    config = load_config(write(child, "child.toml"))
    assert (config.optim.lr, config.train.steps, config.train.seed) == (1.0, 10, 3)


def test_file_that_extends_itself_is_an_error(write):
    with pytest.raises(InputError, match="extends itself"):
        load_config(write('extends = "run.toml"'))


def test_overrides_win_over_the_file(write):
    path = write(MINIMAL)
    config = load_config(path, ["--optim.lr", "1e-2", "--data.no-mask-doc-start"])
    assert config.optim.lr == 1e-2
    assert config.data.mask_doc_start is False
    assert config.train.steps == 10


def test_resolved_config_reads_back_equal(write, tmp_path):
    prompt = 'a "quoted" \\ \n \x07 \x7f é \U0001f642'
    options = ["--optim.betas", "0.8", "0.99", "--eval.sample-prompt", prompt]
    config = load_config(write(MINIMAL), options)
    assert config.eval.sample_prompt == prompt
    write_atomic(tmp_path / "resolved.toml", to_toml(config))
    assert load_config(tmp_path / "resolved.toml") == config


def test_batch_must_divide_over_ranks(write):
    config = load_config(write(MINIMAL), ["--train.micro-batch", "4"])
    assert [config.accumulation(w) for w in (1, 2, 4)] == [4, 2, 1]
    with pytest.raises(InputError, match="do not divide by 3 ranks"):
        config.accumulation(3)


def test_tokens_round_up_to_steps():
    config = build(
        TrainConfig,
        {
            "model": {"config": "m.json"},
            "data": {"train": ["a"], "seq_len": 8},
            "train": {"tokens": 65, "global_batch_tokens": 32},
        },
    )
    assert config.steps == 3
    # after five others, or none where these have seen as much or more
    assert steps_of_run(0, 65, 32, done=5, seen=0) == 8
    assert steps_of_run(0, 65, 32, done=5, seen=65) == steps_of_run(0, 65, 32, 5, 160) == 5


MODELS = {
    "rodimus": MODEL,
    "released": golden_config("rodimus"),
    "gla": fields("gla"),
    "qwen2": fields("qwen2"),
}


@pytest.mark.parametrize("kind", MODELS)
def test_a_key_of_the_model_that_means_nothing_is_an_error(write, kind):
    """Not one that transformers or the released code writes, or another name of a known one."""
    said = {"architectures": ["X"], "auto_map": {}, "transformers_version": "4.44.2"}
    said |= {"torch_dtype": "bfloat16", "_name_or_path": "x", "eos_token_id": 1}
    said |= {"rope_theta": 1e4} if kind == "qwen2" else {}
    config = load_config(write(MINIMAL))
    write(json.dumps(MODELS[kind] | said), "model.json")
    model = read_model_config(config, begun=False)
    write(json.dumps(model.to_dict()), "model.json")
    assert read_model_config(config, begun=False).to_dict() == model.to_dict()
    write(json.dumps(MODELS[kind] | {"num_layers": 2}), "model.json")
    known = "n_layer" if model.model_type == "rodimus" else "num_hidden_layers"
    with pytest.raises(InputError, match=f"json: unknown key 'num_layers', .* '{known}'"):
        read_model_config(config, begun=False)
    write(json.dumps(MODELS[kind] | {"zzz": 2}), "model.json")
    with pytest.raises(InputError, match="unknown key 'zzz'; known: .*vocab_size"):
        read_model_config(config, begun=False)
