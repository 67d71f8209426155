"""The examples in README and docs, run as they stand.

Names of checkpoints in them stand for tiny models with random weights here.
"""

import json
import re
from pathlib import Path

import pytest
import torch
from torch import nn

import rodimus
from rodimus.export import export
from tests.checkpoints import save_model, save_released_tokenizer
from tests.model.helpers import NO_ROLLBACK

ROOT = Path(__file__).parent.parent
BLOCK = re.compile(r"```python\n(.*?)```", re.DOTALL)
AUTO_MAP = {
    "AutoConfig": "configuration_rodimus.RodimusConfig",
    "AutoModelForCausalLM": "modeling_rodimus.RodimusForCausalLM",
}


def text_of(document: str) -> str:
    return (ROOT / document).read_text(encoding="utf-8")


def run_examples(document: str, names: dict[str, str] | None = None) -> dict:
    """Run all examples of a document one after another; what they leave behind."""
    blocks = BLOCK.findall(text_of(document))
    assert blocks, f"{document} has no example"
    space: dict = {}
    for block in blocks:
        for name, stands_for in (names or {}).items():
            block = block.replace(name, stands_for)
        exec(compile(block, document, "exec"), space)
    return space


def save_released(folder: Path, **fields) -> None:
    """As on the hub: the configuration and the tokenizer name code that is not in the folder."""
    save_model(folder, **fields)
    save_released_tokenizer(folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"auto_map": AUTO_MAP}))


@pytest.fixture
def names(tmp_path, monkeypatch) -> dict[str, str]:
    """What the names in the examples stand for; they run in an empty folder."""
    monkeypatch.chdir(tmp_path)
    save_released(tmp_path / "large")
    save_released(tmp_path / "small", n_layer=1)
    export(tmp_path / "large", tmp_path / "export")
    return {
        "codefuse-ai/Rodimus-Plus-Coder-4B-Chat": str(tmp_path / "large"),
        "codefuse-ai/Rodimus-Plus-Coder-1.6B-Chat": str(tmp_path / "small"),
        "runs/demo/export": str(tmp_path / "export"),
    }


def test_readme(names, capsys):
    """The engine gives the text of ``generate``; a released folder needs no trusted code."""
    space = run_examples("README.md", names)
    printed, generation = capsys.readouterr().out, space["generation"]
    assert len(generation.text) > 10 and printed.count(generation.text) == 2
    assert type(space["model"]) is rodimus.RodimusForCausalLM
    assert space["model"].dtype == torch.bfloat16


@pytest.mark.parametrize("dtype", ["bfloat16", pytest.param("float32", marks=pytest.mark.slow)])
def test_huggingface(names, dtype):
    for package in ("accelerate", "peft"):
        pytest.importorskip(package, reason=f"{package} is not installed")
    space = run_examples("docs/huggingface.md", names | {"torch.bfloat16": f"torch.{dtype}"})
    assert space["draft"].dtype == getattr(torch, dtype)
    assert space["rows"].shape == space["same"].shape
    if dtype == "float32":
        assert torch.equal(space["rows"], space["same"])
        assert torch.equal(space["looked_up"], space["assisted"])
        texts = space["tokenizer"].batch_decode(space["rows"], skip_special_tokens=True)
        assert texts == [row["generated_text"] for (row,) in space["texts"]]
    heads, length = 4, space["text"].input_ids.shape[1]
    assert [tuple(w.shape) for w in space["weights"]] == [(1, heads, length, length)] * 2
    assert space["trainer"].state.global_step == 2
    end = space["tokenizer"].eos_token_id
    assert all(row["input_ids"][-1] == end for row in space["trainer"].train_dataset)
    assert space["scores"].shape == (2, 2)
    tuned = {name for name, p in space["tuned"].named_parameters() if "lora_" in name}
    assert not tuned, "merged"


def test_packed_and_padded_documents_train_as_documents_alone(names):
    """The loss of the collator of the example, and of rows that are padded as it says there, is the
    mean over the tokens of every document."""
    from transformers import AutoModelForCausalLM, AutoTokenizer, DataCollatorWithFlattening

    folder = names["codefuse-ai/Rodimus-Plus-Coder-4B-Chat"]
    model = AutoModelForCausalLM.from_pretrained(folder)
    documents = [list(range(10, 17)), [20, 21], list(range(30, 50))]
    rows = [{"input_ids": ids} for ids in documents]
    batch = DataCollatorWithFlattening()(rows)
    tokenizer = AutoTokenizer.from_pretrained(folder, padding_side="right")
    rows = tokenizer.pad(rows, return_tensors="pt")
    labels = rows.input_ids.masked_fill(rows.attention_mask == 0, -100)
    with torch.no_grad():
        packed, padded = model(**batch).loss, model(**rows, labels=labels).loss
        rows = [torch.tensor([ids]) for ids in documents]
        losses = [model(row, labels=row).loss * (row.shape[1] - 1) for row in rows]
    alone = sum(losses) / sum(len(ids) - 1 for ids in documents)
    torch.testing.assert_close(packed, alone, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(padded, alone, rtol=1e-5, atol=1e-5)


def test_what_generation_refuses(names):
    """Guesses for a batch, or with a static cache: transformers says no."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(names["codefuse-ai/Rodimus-Plus-Coder-4B-Chat"])
    ids = torch.arange(10, 22)[None]
    options = {"max_new_tokens": 4, "prompt_lookup_num_tokens": 2}
    with pytest.raises(ValueError, match="batch_size"):
        model.generate(ids.repeat(2, 1), **options)
    with pytest.raises(ValueError, match=NO_ROLLBACK):
        model.generate(ids, cache_implementation="static", **options)


def test_names_of_linear_layers(names):
    """The table of modules for adapters names every linear layer but the head."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(names["codefuse-ai/Rodimus-Plus-Coder-4B-Chat"])
    linears = [name for name, m in model.named_modules() if isinstance(m, nn.Linear)]
    table = (
        text_of("docs/huggingface.md").partition("| modules | where |\n")[2].partition("\n\n")[0]
    )
    cells = [row.split("|")[1] for row in table.splitlines()[1:]]
    said = {name for cell in cells for name in re.findall(r"`([\w.]+)`", cell)}
    leaves = {re.search(r"([a-z_]+(\.\d)?)$", name)[1] for name in linears}
    assert said == leaves - {"lm_head"}


def test_ddts():
    space = run_examples("docs/kernels/ddts.md")
    batch, length, keys, values = (space[name] for name in "BTKV")
    assert space["log_decay"].shape == (batch, length, 1, keys) and (space["log_decay"] <= 0).all()
    assert space["log_decay"].dtype == space["state"].dtype == torch.float32
    assert space["o"].shape == (batch, length, 1, values)
    assert space["state"].shape == (batch, 1, keys, values)
    assert space["next_o"].shape == (batch, 1, values)
    assert all(space[name].grad.isfinite().all() for name in ("select", "temper", "v"))


def test_shared_key_attention():
    """The last step against the ring is the last token of the sequence."""
    space = run_examples("docs/kernels/shared_key_attention.md")
    assert space["o"].shape == tuple(space[name] for name in "BTHD")
    torch.testing.assert_close(space["next_o"], space["o"][:, -1:], rtol=1e-5, atol=1e-5)
    assert space["v"].grad.isfinite().all()
