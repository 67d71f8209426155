"""An exported folder in processes of its own: without our packages, and with them."""

import json
import os
import resource
import stat
import subprocess
import sys
from pathlib import Path
from unittest.mock import MagicMock

import pytest
import torch
from safetensors import safe_open

from rodimus import RodimusForCausalLM, RodimusForSequenceClassification, convert
from rodimus.errors import InputError
from rodimus.export import AUTO_MAP, export, write_model
from rodimus.loading import load_tokenizer
from tests import warm_python
from tests.checkpoints import (
    save_model,
    save_plain_tokenizer,
    save_released_tokenizer,
    tiny_config,
)
from tests.model.helpers import others_slow

ROOT = Path(__file__).parent.parent.parent
BLOCK_TYPES = ("rodimus", "rodimus_plus")

# Only what the test names can be imported; an editable install must not help either.
BLOCK = """
import sys
class Block:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {blocked!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)
sys.meta_path.insert(0, Block())
sys.path[:0] = {path!r}
"""
LOAD = """
import torch
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM
from transformers import AutoModelForSequenceClassification, AutoTokenizer
folder = {folder!r}
load = lambda auto: auto.from_pretrained(folder, trust_remote_code=True).eval()
ids = torch.arange(40)[None] % 290
"""


def run(script: str, tmp_path: Path, folder: Path, blocked: tuple[str, ...]) -> str:
    """Run a script in a process where some packages cannot be imported; its output."""
    path = [] if "rodimus_kernels" in blocked else [str(ROOT), str(ROOT / "kernels")]
    code = BLOCK.format(blocked=blocked, path=path) + LOAD.format(folder=str(folder)) + script
    env = os.environ | {"HF_MODULES_CACHE": str(tmp_path / "modules"), "OMP_NUM_THREADS": "1"}
    env.pop("PYTHONPATH", None)
    # what torch imports is there already in the other kind of process
    if "triton" in blocked:
        command = [sys.executable, "-c", code]
        process = subprocess.run(command, capture_output=True, text=True, env=env, cwd=tmp_path)
    else:
        process = warm_python.run("-c", code, env=env, cwd=tmp_path)
    assert process.returncode == 0, process.stderr
    return process.stdout


@pytest.fixture(params=others_slow("rodimus_plus", BLOCK_TYPES), scope="module")
def exported(request, tmp_path_factory):
    """``(folder, model)``: an export with the released tokenizer, and the model it came from."""
    root = tmp_path_factory.mktemp(request.param)
    model = save_model(root / "checkpoint", request.param)
    save_released_tokenizer(root / "checkpoint")
    return export(root / "checkpoint", root / "export"), model


def test_loads_with_torch_and_transformers_alone(exported, tmp_path):
    """All Auto classes, generation, the tokenizer; and what it saves is a complete folder again."""
    folder, model = exported
    script = """
model = load(AutoModelForCausalLM)
assert type(model).__module__.startswith("transformers_modules."), type(model)
assert type(load(AutoModelForCausalLM)) is type(model)
assert sys.modules.get("rodimus") is None and sys.modules.get("rodimus_kernels") is None
with torch.no_grad():
    logits = model(ids).logits
generated = model.generate(ids[:, :5], max_new_tokens=20, do_sample=False)
torch.save({"logits": logits, "generated": generated}, "result.pt")
print(type(load(AutoModel)).__name__, type(load(AutoModelForSequenceClassification)).__name__)
tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
print(len(tokenizer("hello").input_ids), tokenizer.padding_side, tokenizer.pad_token)
print(tokenizer.apply_chat_template([dict(role="user", content="q")], tokenize=False))
model.save_pretrained("again")
folder = "again"
with torch.no_grad():
    again = load(AutoModelForCausalLM)(ids).logits
print(type(load(AutoModel)).__name__, torch.equal(again, logits))
"""
    blocked = ("rodimus", "rodimus_kernels", "triton", "einops", "fla")
    output = run(script, tmp_path, folder, blocked).splitlines()
    assert output == [
        "RodimusModel RodimusForSequenceClassification",
        "1 left <|endoftext|>",
        "<role>HUMAN</role>q",
        "RodimusModel True",
    ]
    result = torch.load(tmp_path / "result.pt")
    ids = torch.arange(40)[None] % 290
    with torch.no_grad():
        expected = model(ids).logits
    torch.testing.assert_close(result["logits"], expected, rtol=0, atol=2e-5)
    generated = model.generate(ids[:, :5], max_new_tokens=20, do_sample=False)
    assert torch.equal(result["generated"], generated)


def test_a_classifier_loads_first_and_again(exported, tmp_path):
    """What it is made of must not need a trust of its own."""
    script = """
model = load(AutoModelForSequenceClassification)
assert model.config.pad_token_id is not None
ids = ids.view(4, 10)
model.save_pretrained("again")
folder = "again"
with torch.no_grad():
    again = load(AutoModelForSequenceClassification)(ids).logits
    print(model(ids).logits.equal(again), tuple(again.shape))
"""
    output = run(script, tmp_path, exported[0], ("rodimus", "rodimus_kernels"))
    assert output.splitlines()[-1] == "True (4, 2)"


@pytest.mark.parametrize("exported", ["rodimus_plus"], indirect=True)
def test_running_without_the_operators_is_said_once(exported, tmp_path):
    script = """
import logging
logging.basicConfig(stream=sys.stdout, format="%(levelname)s %(message)s")
for auto in (AutoModel, AutoModelForCausalLM, AutoModelForCausalLM):
    load(auto)
"""
    output = run(script, tmp_path, exported[0], ("rodimus", "rodimus_kernels"))
    assert output.count("rodimus_kernels is not installed") == 1
    assert "WARNING The model runs in plain torch" in output
    assert "plain torch" not in run(script, tmp_path, exported[0], ())


@pytest.mark.parametrize("exported", ["rodimus_plus"], indirect=True)
@pytest.mark.parametrize(
    "version",
    [
        "5.9.0",
        *(pytest.param(version, marks=pytest.mark.slow) for version in ("5.24.3", "5.25rc1")),
    ],
)
def test_a_transformers_that_was_not_tried_is_said(exported, version, tmp_path):
    """Nothing else holds it in its range where a folder is loaded by its own code."""
    script = f"""
import logging, transformers
logging.basicConfig(stream=sys.stdout, format="%(levelname)s %(message)s")
transformers.__version__ = {version!r}
load(AutoModelForCausalLM)
"""
    output = run(script, tmp_path, exported[0], ("rodimus",))
    line = f"WARNING expected transformers 5.17 to 5.24, got {version}"
    assert output.count(line) == (version != "5.24.3")


@pytest.mark.parametrize("exported", ["rodimus_plus"], indirect=True)
def test_operators_of_another_version_are_an_error_that_says_so(exported, tmp_path):
    """Never the reference in silence; nor is a package missing that they need."""
    script = """
import types
sys.modules["rodimus_kernels"] = types.ModuleType("rodimus_kernels")
try:
    load(AutoModelForCausalLM)
except ImportError as error:
    print(error)
"""
    output = run(script, tmp_path, exported[0], ("rodimus", "rodimus_kernels"))
    assert "the installed rodimus_kernels is of another version than transformers_modules" in output
    assert "cannot import name" in output and "Install the package rodimus" in output
    script = """
class Missing:
    def find_spec(self, name, path=None, target=None):
        if name == "rodimus_kernels":
            raise ModuleNotFoundError("No module named 'needed'", name="needed")
sys.meta_path.insert(0, Missing())
try:
    load(AutoModelForCausalLM)
except ModuleNotFoundError as error:
    print(error.name)
"""
    assert run(script, tmp_path, exported[0], ()).strip() == "needed"


@pytest.mark.parametrize("exported", ["rodimus_plus"], indirect=True)
def test_who_wins_where_more_is_installed(exported, tmp_path):
    """The operators are used; the package's classes win from its import on, and can win again.

    flash-linear-attention registers the same model type, and the last one to register wins.
    """
    folder, model = exported
    script = """
first, second = load(AutoModelForCausalLM), load(AutoModelForCausalLM)
assert type(first) is type(second)
code = sys.modules[type(first).__module__]
assert "rodimus" not in sys.modules
print(code.__name__.partition(".")[0], code.ddts.__module__.partition(".")[0])
with torch.no_grad():
    torch.save(first(ids).logits, "logits.pt")

import rodimus
third, fourth = load(AutoModelForCausalLM), load(AutoModelForCausalLM)
assert type(third) is type(fourth) is rodimus.RodimusForCausalLM
assert type(AutoConfig.from_pretrained(folder, trust_remote_code=True)) is rodimus.RodimusConfig
assert type(load(AutoModel)) is rodimus.RodimusModel
with torch.no_grad():
    assert torch.equal(first(ids).logits, third(ids).logits)

from transformers import PreTrainedConfig
class Other(PreTrainedConfig):
    model_type = "rodimus"
AutoConfig.register("rodimus", Other, exist_ok=True)
rodimus.register()
assert type(load(AutoModelForCausalLM)) is rodimus.RodimusForCausalLM
"""
    assert run(script, tmp_path, folder, ()).split() == ["transformers_modules", "rodimus_kernels"]
    with torch.no_grad():
        expected = model(torch.arange(40)[None] % 290).logits
    torch.testing.assert_close(torch.load(tmp_path / "logits.pt"), expected, rtol=0, atol=0)


@pytest.mark.parametrize("exported", ["rodimus_plus"], indirect=True)
def test_a_model_loaded_from_an_export_takes_its_code_along(exported, tmp_path):
    folder, _ = exported
    RodimusForCausalLM.from_pretrained(folder).save_pretrained(tmp_path / "tuned")
    code = {path.name: path.read_text() for path in folder.glob("*.py")}
    assert {path.name: path.read_text() for path in (tmp_path / "tuned").glob("*.py")} == code
    model = save_model(tmp_path / "plain")
    # where no code is named, trl asks for it nevertheless when it is given a folder
    assert not list((tmp_path / "plain").glob("*.py")) and model.config.auto_map == {}
    assert "auto_map" not in (tmp_path / "plain" / "config.json").read_text()


def test_a_classifier_of_a_released_folder_loads_by_its_own_code(tmp_path):
    """Such a folder names only some of the classes; what it names is kept."""
    named = {"AutoConfig": AUTO_MAP["AutoConfig"], "AutoModelForCausalLM": "other.Model"}
    config = tiny_config(num_labels=3, auto_map=named)
    model = RodimusForSequenceClassification(config).eval()
    model.save_pretrained(tmp_path / "tuned")
    saved = json.loads((tmp_path / "tuned" / "config.json").read_text())
    assert saved["auto_map"] == AUTO_MAP | named
    script = """
with torch.no_grad():
    torch.save(load(AutoModelForSequenceClassification)(ids).logits, "logits.pt")
"""
    run(script, tmp_path, tmp_path / "tuned", ("rodimus",))
    with torch.no_grad():
        expected = model(torch.arange(40)[None] % 290).logits
    torch.testing.assert_close(torch.load(tmp_path / "logits.pt"), expected, rtol=0, atol=0)


@pytest.mark.parametrize("exported", ["rodimus_plus"], indirect=True)
def test_only_the_main_process_takes_the_code_along(exported, tmp_path):
    model = RodimusForCausalLM.from_pretrained(exported[0])
    model.save_pretrained(tmp_path / "named", is_main_process=False)
    model.save_pretrained(tmp_path / "by place", False)
    assert not list(tmp_path.rglob("*.py"))


@pytest.mark.parametrize("exported", ["rodimus_plus"], indirect=True)
@pytest.mark.parametrize("way", ["save_pretrained", "push_to_hub"])
def test_an_upload_takes_the_code_along(exported, way, tmp_path, monkeypatch):
    folder, _ = exported
    model, hub = RodimusForCausalLM.from_pretrained(folder), MagicMock()
    hub.create_repo.return_value.repo_id = "someone/tuned"
    for module in ("transformers.modeling_utils", "transformers.utils.hub"):
        monkeypatch.setattr(f"{module}.hf_api", lambda: hub)
        monkeypatch.setattr(f"{module}.create_and_tag_model_card", MagicMock())
    if way == "push_to_hub":
        model.push_to_hub("someone/tuned")
    else:
        model.save_pretrained(tmp_path / "tuned", push_to_hub=True, repo_id="someone/tuned")
    uploaded = {file.path_in_repo for file in hub.create_commit.call_args.kwargs["operations"]}
    assert {path.name for path in folder.glob("*.py")} <= uploaded


@pytest.mark.parametrize("exported", ["rodimus_plus"], indirect=True)
def test_folder_is_complete_and_readable(exported):
    folder, _ = exported
    config = json.loads((folder / "config.json").read_text())
    assert config["auto_map"] == AUTO_MAP
    for reference in AUTO_MAP.values():
        assert (folder / f"{reference.partition('.')[0]}.py").is_file()
    with safe_open(folder / "model.safetensors", "pt") as weights:
        assert "lm_head.weight" not in weights.keys()
        assert "model.embeddings.weight" in weights.keys()
    tokenizer = json.loads((folder / "tokenizer_config.json").read_text())
    assert tokenizer["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert "auto_map" not in tokenizer
    modes = {stat.S_IMODE(file.stat().st_mode) & 0o044 for file in folder.iterdir()}
    assert modes == {0o044}


@pytest.mark.parametrize("exported", ["rodimus_plus"], indirect=True)
def test_code_is_copied_as_it_stands(exported):
    folder, _ = exported
    for name in ("configuration_rodimus.py", "modeling_rodimus.py"):
        assert (folder / name).read_bytes() == (ROOT / "rodimus" / name).read_bytes()
    reference = ROOT / "kernels" / "rodimus_kernels" / "reference.py"
    assert (folder / "reference_rodimus.py").read_bytes() == reference.read_bytes()


def test_tokenizer_without_template_stays_without(tmp_path):
    save_model(tmp_path / "checkpoint")
    save_plain_tokenizer(tmp_path / "checkpoint")
    folder = export(tmp_path / "checkpoint", tmp_path / "export")
    assert (folder / "tokenizer.json").is_file()
    assert not (folder / "chat_template.jinja").exists()


def test_every_chat_template_is_kept_readable_and_replaced(tmp_path):
    """All but the first lie in a folder, which is nobody's without its permissions."""
    save_model(tmp_path / "checkpoint")
    save_plain_tokenizer(tmp_path / "checkpoint")
    tokenizer = load_tokenizer(tmp_path / "checkpoint")
    tokenizer.chat_template = {"default": "{{ messages }}", "tools": "{{ tools }}"}
    tokenizer.save_pretrained(tmp_path / "checkpoint")
    for overwrite in (False, True):
        folder = export(tmp_path / "checkpoint", tmp_path / "export", overwrite=overwrite)
        assert load_tokenizer(folder).chat_template == tokenizer.chat_template
    (inner,) = (path for path in folder.iterdir() if path.is_dir())
    assert stat.S_IMODE(inner.stat().st_mode) == stat.S_IMODE(folder.stat().st_mode)
    (inner / "notes.txt").write_text("mine")
    with pytest.raises(InputError, match=f"it holds {inner.name}"):
        export(tmp_path / "checkpoint", folder, overwrite=True)


def test_a_pad_token_of_the_model_is_kept(tmp_path):
    save_model(tmp_path / "checkpoint", pad_token_id=5)
    save_plain_tokenizer(tmp_path / "checkpoint")
    folder = export(tmp_path / "checkpoint", tmp_path / "export")
    assert json.loads((folder / "config.json").read_text())["pad_token_id"] == 5


def test_dtypes_and_untied_heads_are_kept(tmp_path):
    model = save_model(tmp_path / "fp32", tie_word_embeddings=False)
    model.to(torch.bfloat16).save_pretrained(tmp_path / "checkpoint")
    folder = export(tmp_path / "checkpoint", tmp_path / "export")
    again, before = (
        RodimusForCausalLM.from_pretrained(path).state_dict()
        for path in (folder, tmp_path / "checkpoint")
    )
    assert again.keys() == before.keys() and "lm_head.weight" in again
    for name, tensor in before.items():
        assert again[name].dtype == tensor.dtype and torch.equal(again[name], tensor), name


def test_classifier_stays_a_classifier(tmp_path):
    model = RodimusForSequenceClassification(tiny_config(num_labels=3, pad_token_id=1))
    model.save_pretrained(tmp_path / "checkpoint")
    folder = export(tmp_path / "checkpoint", tmp_path / "export")
    again = RodimusForSequenceClassification.from_pretrained(folder)
    assert torch.equal(again.score.weight, model.score.weight)


@pytest.mark.parametrize("exported", ["rodimus_plus"], indirect=True)
def test_classifies_batches_and_generates_as_before(exported):
    """By the padding token, which the configuration of the checkpoint did not name."""
    folder, model = exported
    assert model.config.pad_token_id is None
    ids = torch.tensor([[1, 1, 7, 8], [5, 6, 1, 8], [5, 6, 7, 8]])
    mask = torch.tensor([[0, 0, 1, 1], [1] * 4, [1] * 4])
    classifier = RodimusForSequenceClassification.from_pretrained(folder).eval()
    again = RodimusForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        logits = classifier(ids, attention_mask=mask).logits
        alone = classifier(ids[:1, 2:]).logits
        assert torch.equal(again(ids).logits, model(ids).logits)
    torch.testing.assert_close(logits[:1], alone, rtol=1e-5, atol=1e-5)
    options = {"attention_mask": mask, "max_new_tokens": 20, "do_sample": False}
    assert torch.equal(again.generate(ids, **options), model.generate(ids, **options))


def test_converts_flash_linear_attention(tmp_path):
    from safetensors.torch import save_file

    model = save_model(tmp_path / "ours", "rodimus_plus")
    fla = tmp_path / "fla"
    fla.mkdir()
    weights = model.state_dict()
    del weights["lm_head.weight"]
    save_file(convert.weights_to_fla(weights), fla / "model.safetensors")
    config = convert.config_to_fla(model.config.to_dict())
    # as transformers 4 saves what equals its own default
    assert config.pop("tie_word_embeddings")
    (fla / "config.json").write_text(json.dumps(config))
    options = {"eos_token_id": [1, 7], "temperature": 0.5, "do_sample": True}
    (fla / "generation_config.json").write_text(json.dumps(options))
    folder = export(fla, tmp_path / "export")
    again = RodimusForCausalLM.from_pretrained(folder).eval()
    assert options.items() <= again.generation_config.to_dict().items()
    ids = torch.arange(40)[None]
    with torch.no_grad():
        torch.testing.assert_close(again(ids).logits, model(ids).logits, rtol=0, atol=0)
    (fla / "generation_config.json").write_text("{")
    with pytest.raises(InputError, match="fla.*generation_config.json"):
        export(fla, tmp_path / "other")


def test_quantised_weights_are_refused(tmp_path):
    save_model(tmp_path / "source")
    path = tmp_path / "source" / "config.json"
    config = json.loads(path.read_text()) | {"quantization_config": {"quant_method": "torchao"}}
    path.write_text(json.dumps(config))
    with pytest.raises(InputError, match="source holds quantised weights: export those they were"):
        export(tmp_path / "source", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_existing_folder_is_replaced_only_when_asked(tmp_path):
    save_model(tmp_path / "checkpoint")
    out = export(tmp_path / "checkpoint", tmp_path / "out")
    (out / "stale.json").touch()
    with pytest.raises(InputError, match="exists already"):
        export(tmp_path / "checkpoint", out)
    assert (out / "stale.json").exists()
    export(tmp_path / "checkpoint", out, overwrite=True)
    assert not (out / "stale.json").exists() and (out / "config.json").exists()


def test_nothing_but_an_export_is_ever_replaced(tmp_path):
    """Neither a folder of something else, nor a file, nor what is to be exported."""
    save_model(tmp_path / "models" / "checkpoint")
    for other in ("other", "run"):
        (tmp_path / other).mkdir()
        (tmp_path / other / "precious").touch()
    (tmp_path / "run" / "config.json").touch()
    (tmp_path / "run" / "checkpoints").mkdir()
    (tmp_path / "models" / "config.json").touch()
    for project in ("code", "repository"):
        (tmp_path / project).mkdir()
        (tmp_path / project / "config.json").touch()
    (tmp_path / "code" / "app.py").touch()
    (tmp_path / "repository" / ".git").mkdir()
    (tmp_path / "llama").mkdir()
    (tmp_path / "llama" / "config.json").write_text('{"model_type": "llama"}')
    (tmp_path / "llama" / "model.safetensors").touch()
    files = sorted(tmp_path.rglob("*"))
    for out, message in (
        ("other", "is no exported model"),
        ("code", r"is no exported model \(it holds app.py\)"),
        ("repository", r"is no exported model \(it holds .git\)"),
        ("run", "is no exported model"),
        ("llama", r"is no exported model \(its config.json is of the model_type 'llama'\)"),
        ("other/precious", "is no exported model"),
        ("models", "holds the checkpoint to export"),
        ("models/checkpoint", "holds the checkpoint to export"),
    ):
        with pytest.raises(InputError, match=message):
            export(tmp_path / "models" / "checkpoint", tmp_path / out, overwrite=True)
    assert sorted(tmp_path.rglob("*")) == files


def test_the_current_folder_and_mount_points_are_not_replaced(tmp_path, monkeypatch):
    save_model(tmp_path / "checkpoint")
    out = export(tmp_path / "checkpoint", tmp_path / "out")
    (out / "precious.json").touch()
    with monkeypatch.context() as patch, pytest.raises(InputError, match="is the current folder"):
        patch.chdir(out)
        export(tmp_path / "checkpoint", ".", overwrite=True)
    with monkeypatch.context() as patch, pytest.raises(InputError, match="is a mount point"):
        patch.setattr("pathlib.Path.is_mount", lambda path: path == out)
        patch.setattr("rodimus.export.load_model", None)
        export(tmp_path / "checkpoint", out, overwrite=True)
    assert (out / "precious.json").exists()


def test_failed_export_leaves_nothing_and_destroys_nothing(tmp_path, monkeypatch):
    save_model(tmp_path / "checkpoint")
    save_plain_tokenizer(tmp_path / "checkpoint")
    out = export(tmp_path / "checkpoint", tmp_path / "out")
    (out / "precious.json").touch()

    def fail(*arguments):
        raise OSError("No space left on device")

    replace = os.replace
    moved = lambda source, target: (fail if source.name == "new" else replace)(source, target)
    for name, broken in (("write_tokenizer", fail), ("os.replace", moved)):
        with monkeypatch.context() as patch, pytest.raises(InputError, match="No space"):
            patch.setattr(f"rodimus.export.{name}", broken)
            export(tmp_path / "checkpoint", out, overwrite=True)
        assert (out / "precious.json").exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint", "out"]


@pytest.mark.parametrize("is_blocked", [False, True], ids=["put back", "kept"])
def test_an_interrupted_replacement_destroys_nothing(tmp_path, monkeypatch, is_blocked):
    """Between the two moves, and where the old folder cannot be moved back either."""
    save_model(tmp_path / "checkpoint")
    out = export(tmp_path / "checkpoint", tmp_path / "out")
    (out / "precious.json").touch()
    replace = os.replace

    def interrupted(source, target):
        if source.name == "new":
            raise KeyboardInterrupt
        if source.name == "old" and is_blocked:
            raise OSError("Read-only file system")
        replace(source, target)

    stopped = InputError if is_blocked else KeyboardInterrupt
    with monkeypatch.context() as patch, pytest.raises(stopped) as told:
        patch.setattr("rodimus.export.os.replace", interrupted)
        export(tmp_path / "checkpoint", out, overwrite=True)
    (kept,) = tmp_path.rglob("precious.json")
    assert (kept.parent != out) == is_blocked
    assert not is_blocked or str(told.value).endswith(f"what was there is now {kept.parent}")


@pytest.mark.parametrize("overwrite", [False, True])
def test_what_appears_while_an_export_is_written_is_not_replaced(tmp_path, monkeypatch, overwrite):
    """By another export, or by anybody else."""
    save_model(tmp_path / "checkpoint")

    def meanwhile(model, folder):
        write_model(model, folder)
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "precious.txt").touch()

    monkeypatch.setattr("rodimus.export.write_model", meanwhile)
    with pytest.raises(InputError, match="is no exported model" if overwrite else "exists already"):
        export(tmp_path / "checkpoint", tmp_path / "out", overwrite=overwrite)
    assert (tmp_path / "out" / "precious.txt").exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint", "out"]


def test_a_disk_that_is_full_is_one_line(tmp_path):
    """Also where the writer of the weights finds it."""
    save_model(tmp_path / "model")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, limits[1]))
    try:
        with pytest.raises(InputError, match=r"^cannot write .*out: .*File too large[^\n]*$"):
            export(tmp_path / "model", tmp_path / "out")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
