"""`rodimus eval` on text, shards, runs, and with lm-evaluation-harness where it is installed."""

import importlib.util
import json
import math
import re
import shutil
import sys
from types import SimpleNamespace

import numpy as np
import pytest

from rodimus import cli
from rodimus.evaluation.documents import Document
from rodimus.evaluation.likelihood import evaluate
from rodimus.loading import load_model, load_tokenizer, vocabulary_size
from rodimus.peers import GLAConfig, GLAForCausalLM
from rodimus.train.pack import pack
from rodimus.train.shards import ShardWriter
from rodimus.train.tokenizer import train_tokenizer
from tests.checkpoints import TEXT, save_model, save_plain_tokenizer
from tests.device import ON_BOTH

TEXTS = [*TEXT[:3], "hello " * 60, "the quick brown fox " * 20, "x"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model, texts as jsonl and as single files, and the same texts packed to shards."""
    folder = tmp_path_factory.mktemp("eval")
    save_model(folder / "model")
    save_plain_tokenizer(folder / "model")
    lines = "".join(json.dumps({"body": text}) + "\n" for text in TEXTS)
    (folder / "texts.jsonl").write_text(lines)
    (folder / "texts").mkdir()
    for i, text in enumerate(TEXTS):
        (folder / "texts" / f"{i}.txt").write_text(text)
    pack(
        str(folder / "texts"),
        folder / "shards",
        tokenizer=str(folder / "model"),
        val_fraction=0.0,
    )
    return folder


@pytest.fixture
def evaluated(capsys, device):
    """Results of `rodimus eval ... --json` on the test's device."""

    def evaluated(*arguments):
        command = ["eval", *map(str, arguments), "--json", "--device", device.type]
        assert cli.main(command) == 0
        return json.loads(capsys.readouterr().out)

    return evaluated


@pytest.fixture
def refused(capsys):
    """The one line of a command that fails."""

    def refused(*arguments):
        assert cli.main(["eval", *map(str, arguments)]) == 2
        (line,) = capsys.readouterr().err.strip().splitlines()
        return line

    return refused


@ON_BOTH
def test_text_jsonl_and_shards_give_the_same_figures(folder, evaluated, device):
    result = evaluated(
        folder / "model",
        *(folder / "texts", folder / "texts.jsonl", folder / "shards" / "train.json"),
        *("--field", "body", "--tokens-at-once", 50),
    )
    text, jsonl, shards = result["data"]
    assert (result["dtype"], result["device"]) == ("float32", device.type)
    assert text["documents"] == len(TEXTS)
    assert text["bytes"] == sum(len(t) for t in TEXTS)
    for name in ("documents", "tokens", "bytes", "loss", "bits_per_byte"):
        assert shards[name] == pytest.approx(text[name], rel=1e-6)
        assert jsonl[name] == pytest.approx(text[name], rel=1e-6)
    assert text["perplexity"] == pytest.approx(math.exp(text["loss"]))


def test_bytes_of_single_documents_are_not_made_up(folder, evaluated, capsys, tmp_path):
    """Shards hold their sum alone, and these two differ in bytes per token."""
    (tmp_path / "a.txt").write_text("hello " * 30)
    (tmp_path / "b.txt").write_text("\U0001f642\x07" * 300)
    options = {"tokenizer": str(folder / "model"), "val_fraction": 0.0}
    pack(str(tmp_path), tmp_path / "shards", **options)
    shards = (folder / "model", tmp_path / "shards" / "train.json")
    text, packed, cut = (
        evaluated(*arguments)["data"][0]
        for arguments in ((folder / "model", tmp_path), shards, (*shards, "--max-tokens", 1))
    )
    assert len(text["by_length"]) == len(packed["by_length"]) == 2
    assert all("bits_per_byte" in row for row in text["by_length"])
    assert not any("bits_per_byte" in row for row in packed["by_length"])
    assert packed["bits_per_byte"] == pytest.approx(text["bits_per_byte"], rel=1e-6)
    assert [x["bytes_estimated"] for x in (text, packed, cut)] == [False, False, True]
    assert cli.main(["eval", *map(str, shards), "--max-tokens", "1"]) == 0
    out = capsys.readouterr().out
    assert "1 documents" in out and f"about {cut['bytes']:,} bytes" in out
    assert re.search(r"tokens of the document .*\n .* -  +1$", out.strip())


@ON_BOTH
def test_bfloat16_is_close_and_says_so(folder, evaluated):
    arguments = (folder / "model", folder / "texts")
    exact, rounded = evaluated(*arguments), evaluated(*arguments, "--dtype", "bfloat16")
    assert rounded["dtype"] == "bfloat16"
    assert rounded["data"][0]["loss"] != exact["data"][0]["loss"]
    assert rounded["data"][0]["loss"] == pytest.approx(exact["data"][0]["loss"], rel=0.02)


def test_table_names_every_figure(folder, evaluated, capsys):
    (data,) = evaluated(folder / "model", folder / "texts")["data"]
    assert cli.main(["eval", str(folder / "model"), str(folder / "texts")]) == 0
    out = capsys.readouterr().out
    assert "texts: 6 documents" in out
    assert (
        f"loss {data['loss']:.4f} nats/token, perplexity {data['perplexity']:.2f}, "
        f"{data['bits_per_byte']:.4f} bits/byte\n"
    ) in out
    assert out.count("  0 - 127   ") == 2


def test_what_cannot_be_evaluated_is_one_line(folder, refused, tmp_path):
    model = folder / "model"
    assert "nothing to evaluate on" in refused(model)
    assert "holds token shards but no val.json" in refused(model, folder / "shards")
    assert "must have a string field 'text', got body" in refused(model, folder / "texts.jsonl")
    assert "none is not there: a source is stdlib" in refused(model, tmp_path / "none")
    assert f"cannot read {'x' * 300}: File name too long" in refused(model, "x" * 300)
    assert "cannot read token shards" in refused(model, tmp_path / "none.json")
    (tmp_path / "empty.txt").write_text("")
    assert "holds no token to predict" in refused(model, tmp_path / "empty.txt")
    writer = ShardWriter(tmp_path / "marks", "val", 300)
    writer.add([7], 1)
    writer.close(bos_token_id=None, eos_token_id=None, tokenizer_sha256="", source="test")
    assert "holds no token to predict" in refused(model, tmp_path / "marks")
    n_ids = vocabulary_size(load_tokenizer(model))
    save_model(tmp_path / "narrow", vocab_size=n_ids - 1)
    save_plain_tokenizer(tmp_path / "narrow")
    line = refused(tmp_path / "narrow", folder / "texts")
    assert f"the tokenizer has {n_ids} tokens, the model {n_ids - 1}" in line
    broken = save_model(tmp_path / "broken")
    broken.lm_head.weight.data.fill_(math.nan)
    broken.save_pretrained(tmp_path / "broken")
    shards = folder / "shards" / "train.json"
    assert f"the loss of {tmp_path / 'broken'} on {shards} is nan" in refused(
        tmp_path / "broken", shards
    )
    save_model(tmp_path / "small", vocab_size=100)
    assert "the model one of 100" in refused(tmp_path / "small", shards)
    shutil.copytree(folder / "shards", tmp_path / "damaged")
    binary = tmp_path / "damaged" / "train-00000.bin"
    binary.write_bytes(bytes([binary.read_bytes()[0] ^ 1]) + binary.read_bytes()[1:])
    assert "is damaged" in refused(model, tmp_path / "damaged" / "train.json")


def test_shards_of_another_tokenizer_are_refused(folder, refused, tmp_path):
    shutil.copytree(folder / "shards", tmp_path / "other")
    train_tokenizer(["other text " * 9], 280).save_pretrained(tmp_path / "other" / "tokenizer")
    line = refused(folder / "model", tmp_path / "other" / "train.json")
    assert re.search(
        r"train.json has other tokens than the model .*'<\|begin\|>' must be no token, got 0", line
    )
    save_model(tmp_path / "without")
    assert cli.main(["eval", str(tmp_path / "without"), str(tmp_path / "other/train.json")]) == 0


def test_missing_harness_says_how_to_get_it(folder, refused, monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    line = refused(folder / "model", "--tasks", "arc_easy")
    assert 'pip install "lm_eval[hf]"' in line


def test_options_of_tasks_reach_the_harness(folder, evaluated, monkeypatch):
    """In its place one that answers with what it was given."""

    def answer(**options):
        kept = {key: options[key] for key in ("tasks", "num_fewshot", "limit")}
        adapter = options["model"]
        assert adapter.loglikelihood_rolling([]) is False and adapter.add_bos_token is None
        return {"results": {"given": kept | adapter.options}}

    class Adapter:
        add_bos_token = None

        def __init__(self, *, pretrained, tokenizer, **options):
            self.options = options

        def loglikelihood_rolling(self, requests):
            return self.add_bos_token

    class Manager:
        all_tasks, all_subtasks = ["one", "other", "ones"], ["one", "other"]

        def __init__(self, include_path):
            assert include_path == "folder"

    for name, found in (
        ("lm_eval", {"simple_evaluate": answer}),
        ("lm_eval.models.huggingface", {"HFLM": Adapter}),
        ("lm_eval.tasks", {"TaskManager": Manager}),
    ):
        monkeypatch.setitem(sys.modules, name, SimpleNamespace(**found))
    options = "--tasks ot*,o* --task-folder folder --num-fewshot 2 --limit 3 --batch-size 5"
    options += " --max-length 64"
    assert evaluated(folder / "model", *options.split())["tasks"]["given"] == {
        "tasks": ["other", "one"],
        **{"num_fewshot": 2, "limit": 3, "batch_size": 5, "max_length": 64},
        "softmax_dtype": "float32",
    }


@pytest.mark.parametrize("option", [("--limit", "0"), ("--limit", "-3"), ("--num-fewshot", "-1")])
def test_numbers_of_the_harness_are_checked(option, capsys):
    assert cli.main(["eval", "model", "--tasks", "arc_easy", *option]) == 2
    assert f"argument {option[0]}: must be at least" in capsys.readouterr().err


TASK = """
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}}}
test_split: test
"""
QUESTIONS = """
output_type: multiple_choice
doc_to_text: question
doc_to_choice: [" world", " fox"]
doc_to_target: answer
metric_list: [{metric: acc}]
"""
SAYINGS = QUESTIONS.replace("multiple_choice", "generate_until").replace("acc", "exact_match")
PERPLEXITY = """
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: text
metric_list: [{metric: bits_per_byte}]
"""
HARNESS = pytest.mark.skipif(
    importlib.util.find_spec("lm_eval") is None, reason="lm_eval not installed"
)


def write_task(folder, name, asked, rows):
    """A definition of a task, and the rows that it asks about."""
    data = folder / f"{name}.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / f"{name}.yaml").write_text(TASK.format(name=name, file=data) + asked)


@pytest.fixture
def task_folder(tmp_path):
    """A task that compares answers, one that asks for text, and a group of the first."""
    for name, asked in (("two_words", QUESTIONS), ("sayings", SAYINGS)):
        write_task(tmp_path, name, asked, [{"question": "hello", "answer": 0}])
    (tmp_path / "group.yaml").write_text("{group: two_worded, task: [two_words]}")
    return tmp_path


@HARNESS
@pytest.mark.filterwarnings("ignore")
def test_a_model_that_writes_no_text_gets_no_task_that_asks_for_it(task_folder, capsys):
    config = GLAConfig(
        hidden_size=16, num_hidden_layers=1, num_heads=1, intermediate_size=16, vocab_size=300
    )
    model = task_folder / "model"
    GLAForCausalLM(config).save_pretrained(model)
    save_plain_tokenizer(model)
    arguments = ["eval", str(model), "--task-folder", str(task_folder), "--tasks"]
    assert cli.main([*arguments, "two_words"]) == 0
    capsys.readouterr()
    assert cli.main([*arguments, "two_words,sayings"]) == 2
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert line.endswith("sayings asks for generated text, GLAForCausalLM has none")


@HARNESS
@pytest.mark.filterwarnings("ignore")
def test_questions_that_cannot_be_had_are_one_line(folder, capsys, monkeypatch):
    def unreachable(**options):
        raise ConnectionError("Couldn't reach 'allenai/ai2_arc' on the Hub")

    monkeypatch.setattr("lm_eval.simple_evaluate", unreachable)
    assert cli.main(["eval", str(folder / "model"), "--tasks", "arc_easy"]) == 2
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert "questions cannot be had: Couldn't reach 'allenai/ai2_arc'" in line


@HARNESS
@pytest.mark.filterwarnings("ignore")
def test_harness_scores_as_the_model_does(folder, evaluated, tmp_path):
    import torch

    rows = [{"question": q, "answer": i % 2} for i, q in enumerate(["hello", "the quick brown"])]
    write_task(tmp_path, "two_words", QUESTIONS, rows)
    arguments = ("--tasks", "two_words", "--task-folder", tmp_path)
    scored = evaluated(folder / "model", *arguments)["tasks"]["two_words"]["acc,none"]

    model, tokenizer = load_model(folder / "model"), load_tokenizer(folder / "model")

    def score(question, answer):
        ids = tokenizer(question + answer, return_tensors="pt").input_ids
        start = tokenizer(question, return_tensors="pt").input_ids.shape[1]
        with torch.no_grad():
            scores = model(ids).logits[0, start - 1 : -1].log_softmax(-1)
        return scores.gather(-1, ids[0, start:, None]).sum().item()

    right = [
        (score(r["question"], " fox") > score(r["question"], " world")) == bool(r["answer"])
        for r in rows
    ]
    assert scored == sum(right) / 2


@HARNESS
@pytest.mark.filterwarnings("ignore")
def test_a_pattern_means_tasks_and_no_groups_of_them(folder, evaluated, capsys, task_folder):
    arguments = (folder / "model", "--task-folder", task_folder, "--tasks")
    assert list(evaluated(*arguments, "two_w*,two_words")["tasks"]) == ["two_words"]
    assert "two_words" in evaluated(*arguments, "two_worded")["tasks"]
    assert cli.main(["eval", *map(str, arguments), "three_w*"]) == 2
    assert capsys.readouterr().err.endswith("has no task three_w*\n")


@HARNESS
@pytest.mark.filterwarnings("ignore")
def test_a_text_longer_than_the_model_was_trained_on_needs_to_be_asked_for(task_folder, capsys):
    save_model(task_folder / "model", max_position_embeddings=64)
    save_plain_tokenizer(task_folder / "model")
    arguments = ["eval", str(task_folder / "model"), "--task-folder", str(task_folder)]
    arguments += ["--tasks", "sayings", "--json"]
    assert cli.main(arguments) == 2
    told = capsys.readouterr().err
    assert "sequence length (64); --max-length N allows more\n" in told
    assert "Traceback" not in told
    assert cli.main([*arguments, "--max-length", "1024"]) == 0


@HARNESS
@pytest.mark.filterwarnings("ignore")
def test_bits_per_byte_of_the_harness_are_our_own(evaluated, tmp_path):
    """A begin mark is put before a text once, and nobody has to predict it."""
    save_model(tmp_path / "model")
    train_tokenizer(["other text " * 9], 280).save_pretrained(tmp_path / "model")
    texts = ["hello world, all of you", "the quick brown fox"]
    write_task(tmp_path, "perplexity", PERPLEXITY, [{"text": text} for text in texts])
    arguments = ("--tasks", "perplexity", "--task-folder", tmp_path)
    found = evaluated(tmp_path / "model", *arguments)["tasks"]["perplexity"]["bits_per_byte,none"]

    model, tokenizer = load_model(tmp_path / "model"), load_tokenizer(tmp_path / "model")
    assert tokenizer(texts[0]).input_ids[0] == tokenizer.bos_token_id
    # as a text of its own is read, but for the end mark
    documents = [
        Document(np.array(tokenizer(text).input_ids), len(text.encode())) for text in texts
    ]
    expected = evaluate(model, documents).summary()["bits_per_byte"]
    assert found == pytest.approx(expected, rel=1e-5)
