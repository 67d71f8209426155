"""The command ``rodimus``: what each command prints, and one clear line for bad input."""

import errno
import io
import json
import re
import shutil
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from huggingface_hub.utils import filter_repo_objects
from safetensors.torch import load_file, save_file

from rodimus import RodimusForCausalLM, cli, convert, env
from rodimus.errors import InputError
from rodimus.generation import Engine, Request, SamplingParams, terminal
from rodimus.generation.terminal import Conversation, run, stats
from rodimus.loading import load_model, load_tokenizer, weight_files
from rodimus.options import parse
from rodimus.train import __main__ as train
from rodimus_kernels import native
from tests import warm_python
from tests.checkpoints import (
    save_model,
    save_plain_tokenizer,
    save_released_tokenizer,
    tiny_config,
)
from tests.generation.helpers import begin_with


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A tiny Rodimus+ checkpoint in the released layout."""
    folder = tmp_path_factory.mktemp("checkpoint")
    save_model(folder)
    save_released_tokenizer(folder)
    return folder


@pytest.fixture(scope="module")
def model(checkpoint):
    """Its model."""
    return load_model(checkpoint)


@pytest.fixture(scope="module")
def tokenizer(checkpoint):
    """Its tokenizer."""
    return load_tokenizer(checkpoint)


def command(*arguments) -> int:
    """The exit code of a command line, run in this process."""
    try:
        return cli.main([str(argument) for argument in arguments])
    except SystemExit as stop:
        return stop.code


COMMANDS = ["", "generate", "chat", "serve", "plan", "plot", "data", "data pack", "eval", "export"]
COMMANDS += ["tokenizer", "tokenizer train"]


@pytest.mark.parametrize("name", [*COMMANDS, "env"])
def test_help_of_every_command(name, capsys):
    assert command(*name.split(), "--help") == 0
    text = capsys.readouterr().out
    assert text.startswith(f"usage: rodimus {name}".strip())
    assert all(len(line) < 100 for line in text.splitlines())
    unexplained = re.findall(r"^  (--\S+(?: \S+)*)\n(?! {6})", text, re.MULTILINE)
    assert not unexplained


@pytest.mark.parametrize("name", ["", "data", "tokenizer", "train"])
def test_without_a_command_help_is_shown(name, capsys):
    """The status is that of a usage error, for scripts."""
    assert command(*name.split()) == 2
    text = capsys.readouterr()
    assert text.out.startswith(f"usage: rodimus {name}".strip()) and not text.err


def found_here():
    """The environment in which a process finds what this one finds."""
    return {"PYTHONPATH": ":".join(sys.path)}


def test_documented_modules_need_no_import_of_their_own():
    named = ["convert.config_from_fla", "generation.Engine", "loading.load_model"]
    named += ["quantization.round_to_int4", "RodimusConfig"]
    found = ", ".join(f"rodimus.{name}" for name in named)
    code = f"import rodimus; print({found}); rodimus.modeling"
    run = warm_python.run("-c", code, env=found_here())
    assert run.stdout and "module 'rodimus' has no attribute 'modeling'" in run.stderr, run.stderr


SCRIPT = "import sys; sys.argv[0] = 'rodimus'; from rodimus.cli import main; sys.exit(main())"


@pytest.mark.parametrize("program", [("-c", SCRIPT), ("-m", "rodimus")], ids=["script", "-m"])
@pytest.mark.parametrize("name", ["", "serve", "plan", "data pack", "train"])
def test_help_comes_without_torch(program, name):
    """Not a time, which depends on the machine: what it must not import."""
    command = [sys.executable, "-X", "importtime", *program, *name.split(), "--help"]
    run = subprocess.run(command, capture_output=True, text=True, env=found_here())
    imported = {line.rpartition("|")[2].strip() for line in run.stderr.splitlines()}
    assert not {"torch", "transformers", "numpy"} & imported and "rodimus.cli" in imported
    assert run.returncode == 0 and run.stdout.startswith(f"usage: rodimus {name}")
    assert name or "commands:" in run.stdout


def test_programs_that_import_the_package_can_load_its_models(tmp_path):
    """Whatever they are called with."""
    package = tmp_path / "other"
    package.mkdir()
    (package / "__init__.py").write_text("import rodimus")
    code = "from transformers import AutoConfig; print(type(AutoConfig.for_model('rodimus')))"
    (package / "__main__.py").write_text(code)
    (package / "rodimus.py").write_text(code)
    for arguments in (["-m", "other", "rodimus"], ["-m", "other.rodimus"]):
        run = warm_python.run(*arguments, cwd=tmp_path, env=found_here())
        assert "RodimusConfig" in run.stdout, run.stderr


def test_training_gets_the_rest_of_the_line(monkeypatch):
    """Its parser is its own, --help included."""
    seen = []
    monkeypatch.setattr(train, "main", lambda words: seen.append(words) or 3)
    assert command("train", "run.toml", "--help", "--optim.lr", "1e-3") == 3
    assert seen == [["run.toml", "--help", "--optim.lr", "1e-3"]]


@pytest.mark.parametrize(
    "name, words",
    [("serve", ["model"]), ("generate", ["model", "--prompt", "x"]), ("data pack", ["a", "b"])],
)
def test_options_that_a_command_does_not_have_are_refused(name, words, capsys):
    """With the usage of that command, not of all."""
    assert command(*name.split(), *words, "--optim.lr", "1") == 2
    told = capsys.readouterr().err
    assert told.startswith(f"usage: rodimus {name} [-h]")
    assert told.endswith(f"rodimus {name}: error: unrecognized arguments: --optim.lr 1\n")


def test_generate_continues_the_prompt(checkpoint, model, tokenizer, capsys):
    arguments = ("generate", checkpoint, "--prompt", "hello world", "--max-new-tokens", 20)
    assert command(*arguments) == 0
    ids = tokenizer("hello world", return_tensors="pt").input_ids
    expected = model.generate(ids, max_new_tokens=20, do_sample=False)[0]
    assert capsys.readouterr().out == tokenizer.decode(expected, skip_special_tokens=True) + "\n"


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("weight_dtype", ["int8", "int4"])
def test_generate_with_quantized_weights(checkpoint, model, tokenizer, weight_dtype, capsys):
    arguments = ("generate", checkpoint, "--prompt", "hello", "--max-new-tokens", 20)
    assert command(*arguments, "--weight-dtype", weight_dtype) == 0
    ids = tokenizer("hello", return_tensors="pt").input_ids
    rounded = load_model(checkpoint, weight_dtype=weight_dtype)
    assert all(
        type(block.mixer.fc.weight) is not type(model.lm_head.weight)
        for block in rounded.model.layers
    )
    expected = rounded.generate(ids, max_new_tokens=20, do_sample=False)[0]
    assert capsys.readouterr().out == tokenizer.decode(expected, skip_special_tokens=True) + "\n"


@pytest.mark.parametrize("weight_dtype", ["int8", "int4"])
def test_quantized_weights_need_torchao(checkpoint, weight_dtype, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "torchao.quantization", None)
    monkeypatch.delitem(sys.modules, "rodimus.quantization", raising=False)
    arguments = ("generate", checkpoint, "--prompt", "hello", "--weight-dtype", weight_dtype)
    assert command(*arguments) == 2
    message = f"weights in {weight_dtype} need torchao (pip install torchao)"
    assert message in capsys.readouterr().err


def test_generate_reads_standard_input(checkpoint, capsys, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.StringIO("the quick brown"))
    assert command("generate", checkpoint, "--prompt", "-", "--max-new-tokens", 1) == 0
    assert capsys.readouterr().out.startswith("the quick brown")


def test_generate_wants_text_on_standard_input(checkpoint, capsys, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"ab\xff"), "utf-8"))
    assert command("generate", checkpoint, "--prompt", "-") == 2
    assert "standard input is no UTF-8 text at byte 2" in capsys.readouterr().err


def test_standard_input_may_be_closed(checkpoint, capsys, monkeypatch):
    monkeypatch.setattr("sys.stdin", None)
    assert command("generate", checkpoint, "--prompt", "-") == 2
    assert "there is no standard input" in capsys.readouterr().err
    assert command("chat", checkpoint) == 0


def test_generate_into_a_pipe_that_nobody_reads(checkpoint):
    """As in ``rodimus generate ... | head``. Nor do libraries that transformers imports, torchao
    among them, warn of each other: this process imports them itself."""
    arguments = ("generate", str(checkpoint), "--prompt", "hello", "--max-new-tokens", "50")
    run = subprocess.Popen(
        [sys.executable, "-m", "rodimus", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=found_here(),
    )
    run.stdout.close()
    error = run.stderr.read()
    assert (run.wait(), error) == (141, "")


@pytest.mark.parametrize("buffering", [-1, 0])
def test_output_that_cannot_be_written_is_an_error_of_one_line(
    checkpoint, buffering, capsys, monkeypatch
):
    """At once, as text that appears while it is made, or at the end, from the buffer; with
    PYTHONUNBUFFERED always at once."""
    generate = ("generate", checkpoint, "--prompt", "hello", "--max-new-tokens", 1)
    for arguments in (generate, ("env",), ("--help",), ("serve", "--help")):
        with open("/dev/full", "wb", buffering) as file:
            full = io.TextIOWrapper(file, write_through=not buffering)
            monkeypatch.setattr(sys, "stdout", full)
            assert command(*arguments) == 1
        error = capsys.readouterr().err
        assert error == "rodimus: error: cannot write the output: No space left on device\n"


@pytest.mark.parametrize("kind", [BrokenPipeError, OSError])
def test_an_error_of_another_file_keeps_its_traceback(kind, monkeypatch):
    """A full disk in the middle of a run, or a process of ours that has gone."""

    def run(options):
        print("begun")
        raise kind(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(env, "run", run)
    with pytest.raises(kind):
        cli.main(["env"])


def test_generate_without_standard_output(checkpoint, monkeypatch):
    monkeypatch.setattr(sys, "stdout", None)
    assert command("generate", checkpoint, "--prompt", "hello", "--max-new-tokens", 1) == 0


def test_generate_from_an_export_asks_no_question(checkpoint, tmp_path):
    """Its folder carries code; the script has not registered the package when it starts."""
    assert command("export", checkpoint, tmp_path / "out") == 0
    code = (
        "import sys; sys.argv = ['rodimus', 'generate', sys.argv[1], '--prompt', 'hello']\n"
        "from rodimus.cli import main; sys.exit(main())"
    )
    run = warm_python.run("-c", code, tmp_path / "out", env=found_here())
    assert run.returncode == 0 and run.stdout.startswith("hello"), run.stderr
    assert "custom code" not in run.stdout + run.stderr


def test_same_seed_same_text(checkpoint, capsys):
    texts = []
    for seed in (1, 1, 2):
        command("generate", checkpoint, "--prompt", "hello", "--temperature", 1, "--seed", seed)
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1] != texts[2]


def test_options_of_sampling_reach_the_engine(checkpoint, model, tokenizer, capsys):
    def text(*options):
        arguments = ("generate", checkpoint, "--prompt", "hello", "--max-new-tokens", 20)
        assert command(*arguments, *options) == 0
        return capsys.readouterr().out

    greedy = text()
    for option in (("--min-p", 1), ("--top-k", 1), ("--top-p", 1e-6), ("--top-p", 0)):
        assert text("--temperature", 1, *option) == greedy
    penalties = {"repetition": 3.0, "presence": 2.0, "frequency": 0.5}
    for name, value in penalties.items():
        sampling = SamplingParams(**{f"{name}_penalty": value})
        request = Request(tokenizer("hello").input_ids, 20, sampling)
        (penalised,) = Engine(model, tokenizer).generate([request])
        assert text(f"--{name}-penalty", value) == f"hello{penalised.text}\n" != greedy, name
    new = greedy.removeprefix("hello").removesuffix("\n")
    first, second = new[8:10], new[4]
    assert text("--stop", first) == f"hello{new[: new.index(first)]}\n"
    assert text("--stop", first, "--stop", second) == f"hello{new[: new.index(second)]}\n"


def test_text_comes_in_pieces(model, tokenizer):
    pieces = []
    ids = tokenizer("hello").input_ids
    request = Request(ids, 60, SamplingParams(temperature=1.0, seed=0))
    done = run(Engine(model, tokenizer), request, pieces.append)
    assert len([piece for piece in pieces if piece]) > 1
    assert "".join(pieces) == tokenizer.decode(done.tokens, skip_special_tokens=True)


def test_every_end_token_of_the_model_ends_the_text(checkpoint, model, tmp_path, capsys):
    tokenizer = load_tokenizer(checkpoint)
    ids = tokenizer("hello", return_tensors="pt").input_ids
    tokens = model.generate(ids, max_new_tokens=20, do_sample=False)[0].tolist()
    folder = shutil.copytree(checkpoint, tmp_path / "two_ends")
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [0, tokens[6]]}))
    assert command("generate", folder, "--prompt", "hello", "--max-new-tokens", 20) == 0
    # the text is without the token that ended it
    text = tokenizer.decode(tokens[: tokens.index(tokens[6], 1)], skip_special_tokens=True)
    assert capsys.readouterr().out == text + "\n"


def test_text_that_the_terminal_cannot_show_ends_nothing(checkpoint, monkeypatch):
    written = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written, encoding="ascii"))
    assert command("generate", checkpoint, "--prompt", "hello é", "--max-new-tokens", 1) == 0
    assert written.getvalue().startswith(b"hello ?")


def test_text_is_shown_at_once(monkeypatch):
    written = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written, encoding="utf-8"))
    terminal._write("é")
    assert written.getvalue() == "é".encode()
    # in a notebook's, for instance, text stays text
    monkeypatch.setattr(sys, "stdout", io.StringIO())
    terminal._write("é")
    assert sys.stdout.getvalue() == "é"


def test_stats_name_rates_and_bytes(checkpoint, capsys):
    command("generate", checkpoint, "--prompt", "hello", "--max-new-tokens", 8, "--stats")
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert re.fullmatch(
        r"prompt 1 tokens in [\d.]+ s = [\d.]+ tokens/s; "
        r"decode 7 tokens in [\d.]+ s = [\d.]+ tokens/s; state [\d,]+ bytes \(.*recurrent.*\)",
        line,
    )


def test_rates_are_of_what_was_read_and_made_meanwhile(model, tokenizer):
    engine = Engine(model, tokenizer)
    engine.add_prefix(engine.read([1, 2]))
    (done,) = engine.generate(Request([1, 2, 3, 4, 5], 5, stop_tokens=()))
    done.submitted, done.started, done.finished = 10.0, 12.0, 20.0
    assert stats(engine, done).startswith(
        "prompt 3 tokens in 2.000 s = 1.5 tokens/s; decode 4 tokens in 8.000 s = 0.5 tokens/s; "
    )
    # a clock may stand still, and a single token comes with the prompt
    (done,) = engine.generate(Request([1, 2, 3, 4, 5], 1))
    done.submitted = done.started
    assert stats(engine, done).startswith("prompt 3 tokens in 0.000 s = 3000000000.0 tokens/s; st")


def test_a_model_without_attention_has_no_bytes_of_a_window():
    engine = Engine(RodimusForCausalLM(tiny_config("rodimus")))
    (done,) = engine.generate(Request([1], 1))
    assert re.search(r"\(recurrent [\d,]+, convolution [\d,]+\)$", stats(engine, done))


def test_a_model_whose_numbers_are_not_finite_is_an_error():
    model = RodimusForCausalLM(tiny_config())
    model.lm_head.register_forward_hook(lambda *x: x[-1] * float("nan"))
    with pytest.raises(InputError, match="the model's logits hold NaN"):
        run(Engine(model), Request([1], 2), lambda text: None)


def test_only_attention_without_a_window_limits_the_length(checkpoint, model, tokenizer):
    no_window = {"num_heads": 4, "window_size": None}
    others = [tiny_config("rodimus"), tiny_config(attn_cfg=no_window)]
    models = [model, *map(RodimusForCausalLM, others)]
    engines = [terminal._engine(model, tokenizer, 7) for model in models]
    assert [engine.max_length for engine in engines] == [None, None, 7]
    assert {engine.slots for engine in engines} == {1}
    options = ["generate", str(checkpoint), "--prompt", "x", "--dtype", "bfloat16"]
    assert terminal.load(parse(options))[0].dtype == torch.bfloat16


def test_a_prompt_and_its_continuation_fill_a_model_without_a_window(tmp_path, capsys):
    save_model(tmp_path, attn_cfg={"num_heads": 4, "window_size": None})
    save_released_tokenizer(tmp_path)
    assert command("generate", tmp_path, "--prompt", "hello", "--max-new-tokens", 3) == 0


def test_stats_give_the_bytes_of_the_engines_state(checkpoint, model, capsys):
    """State 8 x 64 in float32, four inputs of the convolution, and a ring of whole tiles; the same
    after 40 tokens as after 10."""
    lines = []
    for new_tokens in (10, 40):
        options = ("--max-new-tokens", new_tokens, "--stats")
        assert command("generate", checkpoint, "--prompt", "hello world " * 10, *options) == 0
        lines.append(capsys.readouterr().err.strip().rpartition("; state ")[2])
    layers, width = 2, 32
    sizes = {
        "recurrent": layers * 8 * 2 * width * 4,
        "convolution": layers * 2 * width * 4 * 4,
        "window": layers * 64 * (width // 4 + width) * 4,
    }
    kinds = ", ".join(f"{kind} {size:,}" for kind, size in sizes.items())
    assert lines == [f"{sum(sizes.values()):,} bytes ({kinds})"] * 2


@pytest.fixture
def engine(model, tokenizer):
    return Engine(model, tokenizer, slots=1, recent_states=2)


def test_conversation_reads_nothing_twice(engine, model, tokenizer):
    """The second turn continues the state of the first, and says what a fresh one would say."""
    chat = Conversation(engine, SamplingParams(), 4, system="S")
    first = chat.reply("hello")
    assert first.prefix_tokens == 0
    before, kept = engine.prefixes
    assert before.tokens.tolist() == first.prompt.tolist()
    assert kept.tokens.tolist() == [*first.prompt.tolist(), *first.tokens[:-1]]
    # an answer that is read back as the tokens it was made of, as a trained model's is
    prompt = [*first.prompt.tolist(), *tokenizer(" world").input_ids]
    engine.prefixes.clear()
    engine.add_prefix(engine.read(prompt))
    chat.messages[-1]["content"] = " world"
    second = chat.reply("the quick")
    assert second.prefix_tokens == len(prompt)
    fresh = Engine(model, tokenizer).generate([Request(second.prompt, 4)])[0]
    assert second.tokens == fresh.tokens


def test_conversation_reads_a_reply_again_whose_tokens_differ(engine, model):
    chat = Conversation(engine, SamplingParams(), 4)
    assert chat.messages == []
    first = chat.reply("hello")
    chat.messages[-1]["content"] = " something else"
    second = chat.reply("x")
    assert second.prefix_tokens == len(first.prompt)
    fresh = Engine(model).generate([Request(second.prompt, 4)])[0]
    assert second.tokens == fresh.tokens


def test_conversation_starts_afresh_where_tokens_differ(engine):
    chat = Conversation(engine, SamplingParams(), 4)
    chat.reply("hello")
    chat.messages[0]["content"] = "something else"
    assert chat.reply("x").prefix_tokens == 0


def test_a_stopped_reply_stays_as_far_as_it_came(engine, model):
    chat, steps = Conversation(engine, SamplingParams(), 400), []
    reply = chat.reply("hello", steps.append, lambda: len(steps) == 3)
    assert reply.finish_reason == "cancelled" and not engine.has_work
    assert chat.messages[-1] == {"role": "assistant", "content": reply.text}
    _, kept = (state.tokens.tolist() for state in engine.prefixes)
    assert kept == [*reply.prompt.tolist(), *reply.tokens[:-1]] and len(reply.tokens) > 1
    prompt = [*kept, 5]
    (found,) = engine.generate([Request(prompt, 4)])
    assert found.prefix_tokens == len(kept)
    assert found.tokens == Engine(model).generate([Request(prompt, 4)])[0].tokens


def test_a_reply_stopped_before_its_first_token_is_forgotten(engine):
    chat = Conversation(engine, SamplingParams(), 4)
    chat.reply("hello")
    messages, prefixes = list(chat.messages), list(map(id, engine.prefixes))
    assert chat.reply("x", stop=lambda: True).finish_reason == "cancelled"
    assert chat.messages == messages and list(map(id, engine.prefixes)) == prefixes


def test_ctrl_c_ends_a_reply_and_not_the_chat(checkpoint, capsys, monkeypatch):
    lines, seen = iter(["hello", "again", "/exit"]), []
    # a process that was started in the background ignores it
    before = signal.getsignal(signal.SIGINT)

    def step(engine):
        seen.append(len(engine.running))
        if len(seen) == 3:
            signal.raise_signal(signal.SIGINT)
        return original(engine)

    original = Engine.step
    monkeypatch.setattr(Engine, "step", step)
    monkeypatch.setattr("builtins.input", lambda prompt: next(lines))
    assert command("chat", checkpoint, "--max-new-tokens", 8, "--stats") == 0
    assert capsys.readouterr().err.count("tokens/s") >= 2
    assert len(seen) < 2 * 8 and next(lines, None) is None
    assert signal.getsignal(signal.SIGINT) is before


def test_a_second_ctrl_c_interrupts():
    with terminal._Interrupts() as interrupts:
        signal.raise_signal(signal.SIGINT)
        assert interrupts.came()
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)


def test_replies_of_a_conversation_have_seeds_of_their_own(engine):
    chat = Conversation(engine, SamplingParams(temperature=1.0, seed=2**63 - 2), 12)
    seeds = [chat.reply("hello").request.sampling.seed for _ in range(2)]
    # after the last seed comes the first, as for the choices of one request to the server
    assert seeds == [2**63 - 1, 1]


def test_each_chat_has_a_seed_of_its_own_and_can_be_had_again(checkpoint, capsys, monkeypatch):
    def session(*options):
        """What was said, and the seed."""
        lines = iter(["hello", "again", "/exit"])
        monkeypatch.setattr("builtins.input", lambda prompt: next(lines))
        arguments = ("--max-new-tokens", 12, "--temperature", 1, "--stats", *options)
        assert command("chat", checkpoint, *arguments) == 0
        told = capsys.readouterr()
        (seed,) = set(re.findall(r"; seed (\d+)$", told.err, re.MULTILINE))
        return told.out, int(seed)

    first, second = session(), session()
    assert first[0] != second[0] and first[1] != second[1]
    assert session("--seed", first[1]) == first


def test_a_stop_string_ends_a_reply(engine):
    text = Conversation(engine, SamplingParams(), 12).reply("hello").text
    chat = Conversation(engine, SamplingParams(), 12, stop=(text[5],))
    reply = chat.reply("hello")
    assert reply.text == text[: text.index(text[5])] and reply.finish_reason == "stop"
    assert chat.messages[-1]["content"] == reply.text
    assert chat.reply("again").prefix_tokens > 0


def test_options_of_a_chat_reach_each_conversation(checkpoint, capsys, monkeypatch):
    begun, said, lines = [], [], iter(["hello", "/reset", " world ", " "])

    class Heard(Conversation):
        def __init__(self, engine, sampling, *options):
            begun.append((*options, sampling.seed, engine.prefixes.recent))
            super().__init__(engine, sampling, *options)

        def reply(self, text, write, stop):
            said.append(text)
            # Ctrl-C comes before the first token, of which there is nothing to say
            return super().reply(text, write, lambda: True)

    monkeypatch.setattr(terminal, "Conversation", Heard)
    monkeypatch.setattr("builtins.input", lambda prompt: next(lines))
    options = ("--max-new-tokens", 7, "--system", "S", "--stop", "x", "--stop", "yz", "--stats")
    options = (*options, "--seed", 0)
    assert command("chat", checkpoint, *options) == 0
    # after the prompt and after the reply
    assert begun == [(7, "S", ("x", "yz"), 0, 2)] * 2 and said == ["hello", "world"]
    assert "tokens/s" not in capsys.readouterr().err and next(lines, None) is None


def test_generate_takes_the_likeliest_tokens_and_chat_draws():
    fields = ("temperature", "top_p", "seed", "max_new_tokens")
    defaults = {"generate": (0, 1, 0, 256), "chat": (0.7, 0.95, None, 256)}
    for name, expected in defaults.items():
        options = parse([name, "model", *(["--prompt", "x"] if name == "generate" else [])])
        assert tuple(getattr(options, field) for field in fields) == expected


def test_a_template_writes_all_special_tokens_of_a_reply_itself(checkpoint, model):
    tokenizer = load_tokenizer(checkpoint)
    begin_with(tokenizer, 0)
    prompt = Conversation(Engine(model, tokenizer), SamplingParams(), 1).reply("hello").prompt
    assert tokenizer("hello").input_ids[0] == 0 != prompt[0]


def test_chat_until_an_empty_line(checkpoint, capsys, monkeypatch):
    lines = iter(["hello", "/reset", "world", ""])
    monkeypatch.setattr("builtins.input", lambda prompt: next(lines))
    assert command("chat", checkpoint, "--max-new-tokens", 3, "--stats") == 0
    assert capsys.readouterr().err.count("tokens/s") >= 2


def test_chat_wants_text(checkpoint, monkeypatch, capsys):
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"ab\xff\n"), "utf-8"))
    assert command("chat", checkpoint) == 2
    assert "the line is no UTF-8 text at byte 2" in capsys.readouterr().err


def test_standard_input_that_has_ended_is_an_empty_line(monkeypatch):
    monkeypatch.setattr("sys.stdin", io.StringIO())
    assert terminal._read_line() == ""


def test_chat_needs_a_template(tmp_path, capsys):
    save_model(tmp_path)
    save_plain_tokenizer(tmp_path)
    assert command("chat", tmp_path) == 2
    assert "has no chat template" in capsys.readouterr().err


def test_a_template_that_refuses_messages_is_an_error_of_one_line(tmp_path, capsys, monkeypatch):
    save_model(tmp_path)
    save_plain_tokenizer(tmp_path)
    (tmp_path / "chat_template.jinja").write_text("{{ raise_exception('no system here') }}")
    monkeypatch.setattr("builtins.input", lambda prompt: "hello")
    assert command("chat", tmp_path, "--system", "S") == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.endswith("do not fit the chat template: no system here")


def test_export_tells_where(checkpoint, tmp_path, capsys):
    assert command("export", checkpoint, tmp_path / "out") == 0
    assert capsys.readouterr().out.strip() == f"wrote {tmp_path / 'out'}"
    assert (tmp_path / "out" / "modeling_rodimus.py").is_file()


def test_generate_reads_flash_linear_attention(tmp_path, capsys):
    model = save_model(tmp_path)
    save_plain_tokenizer(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    save_file(convert.weights_to_fla(weights), tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(convert.config_to_fla(model.config.to_dict())))
    assert command("generate", tmp_path, "--prompt", "hello", "--max-new-tokens", 8) == 0
    tokenizer = load_tokenizer(tmp_path)
    ids = tokenizer("hello", return_tensors="pt").input_ids
    expected = model.generate(ids, max_new_tokens=8, do_sample=False, eos_token_id=1)[0]
    assert capsys.readouterr().out == tokenizer.decode(expected, skip_special_tokens=True) + "\n"


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """``(folder of owner/name there, revisions asked for)``; files are copied when asked for."""
    repository, revisions = tmp_path / "repository", []

    def download(name, *, allow_patterns, revision=None, ignore_patterns=None):
        assert name == "owner/name"
        revisions.append(revision)
        files = [str(path.relative_to(repository)) for path in repository.rglob("*.*")]
        patterns = {"allow_patterns": allow_patterns, "ignore_patterns": ignore_patterns}
        for file in filter_repo_objects(files, **patterns):
            (tmp_path / "snapshot" / file).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(repository / file, tmp_path / "snapshot" / file)
        return str(tmp_path / "snapshot")

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    return repository, revisions


def test_a_name_on_the_hub_brings_each_weight_once(hub, tmp_path):
    """Neither the older format beside safetensors nor what the Trainer kept of earlier steps."""
    repository, _ = hub
    for folder in (repository, repository / "checkpoint-10"):
        model = save_model(folder)
        save_plain_tokenizer(folder)
        torch.save(model.state_dict(), folder / "pytorch_model.bin")
    load_model("owner/name")
    found = {path.name for path in (tmp_path / "snapshot").iterdir()}
    files = {"config.json", "generation_config.json", "model.safetensors"}
    assert found == files | {"tokenizer.json", "tokenizer_config.json"}


def test_a_name_on_the_hub_with_the_older_format_alone(hub):
    repository, _ = hub
    model = save_model(repository)
    torch.save(model.state_dict(), repository / "pytorch_model.bin")
    (repository / "model.safetensors").unlink()
    again = load_model("owner/name").state_dict()
    assert all(torch.equal(again[name], tensor) for name, tensor in model.state_dict().items())


def test_a_name_on_the_hub_may_have_a_revision(hub):
    repository, revisions = hub
    save_model(repository)
    save_plain_tokenizer(repository)
    load_model("owner/name@v1.0")
    load_tokenizer("owner/name@refs/pr/3")
    load_tokenizer("owner/name")
    assert revisions == ["v1.0", "refs/pr/3", None]


def test_one_file_of_weights_beside_an_older_index_is_read(tmp_path):
    """Saved over shards, a model leaves their index, and transformers reads the one file."""
    save_model(tmp_path).save_pretrained(tmp_path / "tuned", max_shard_size="10KB")
    shards = list((tmp_path / "tuned").glob("model-*.safetensors"))
    assert len(weight_files(tmp_path / "tuned")) == len(shards) > 1
    model = load_model(tmp_path / "tuned")
    with torch.no_grad():
        model.model.norm_f.weight.add_(1)
    model.save_pretrained(tmp_path / "tuned")
    assert (tmp_path / "tuned" / "model.safetensors.index.json").is_file()
    again = load_model(tmp_path / "tuned")
    assert torch.equal(again.model.norm_f.weight, model.model.norm_f.weight)


def test_env_names_versions_and_every_operator(capsys):
    assert command("env") == 0
    text = capsys.readouterr().out
    assert f"torch          {torch.__version__}" in text
    for name in ("ddts_step", "shared_key_attention", "short_conv", "linear_cross_entropy"):
        (line,) = re.findall(rf"^  {name} .*$", text, re.MULTILINE)
        assert "fails" not in line
    assert "[reference" in text


def test_env_says_what_is_chosen(capsys, monkeypatch, caplog):
    """The module of a choice, all those that a compound operator is made of, and once, not as a
    warning too, why something cannot be chosen."""
    monkeypatch.setattr(native, "problem", lambda device_type: native._NOT_BUILT)
    native._say_if_not_built.cache_clear()
    found = {name: env.observe(call) for name, call in env.cases(torch.device("cpu")).items()}
    assert found["gated_ddts"] == "reference, ddts.eager"
    assert found["shared_key_attention"] == "shared_key_attention.sdpa"
    assert found["linear_cross_entropy"] == "cross_entropy"
    assert found["ddts_summary"] == "ddts.segments"
    assert found["blocks_step"] == found["short_conv_step"] == "reference"
    native._say_if_not_built.cache_clear()
    caplog.clear()
    assert command("env") == 0
    assert "no native: they are not built; build them with" in capsys.readouterr().out
    assert not [record for record in caplog.records if record.name.startswith("rodimus")]
    native._say_if_not_built.cache_clear()


def test_env_calls_every_operator_as_it_wants_to_be():
    for name, call in env.cases(torch.device("cpu")).items():
        assert not env.observe(call).startswith("fails"), name


def test_env_reports_what_a_compiler_says(monkeypatch, capsys):
    """Triton's errors are of no type that torch has."""

    class CompilationError(Exception):
        pass

    def operator(impl="auto"):
        raise CompilationError("at 3:1: no such shape\nand more")

    monkeypatch.setattr(env, "cases", lambda device: {"operator": partial(operator)})
    monkeypatch.setattr(sys.modules[__name__], "IMPLS", ("triton",), raising=False)
    assert command("env") == 0
    out = capsys.readouterr().out
    assert "fails: at 3:1: no such shape" in out and "[triton fails]" in out
    assert "no triton: CompilationError: at 3:1: no such shape" in out


def test_env_tests_every_public_operator():
    import rodimus_kernels

    no_operators = {"BlockWeights", "can_fuse_block", "implementations_used", "rope_tables"}
    no_operators |= {"int8_row_bytes", "ring_parts", "read_ring", "write_ring"}
    no_operators |= {"Int4Weight", "Int8Weight", "decode_weight", "quantize_int4"}
    no_operators |= {"multiplies_slowly"}
    public = set(rodimus_kernels.__all__) - no_operators
    assert set(env.cases(torch.device("cpu"))) == public


class TestBadInput:
    """One line on standard error that names what is wrong, exit code 2, no traceback."""

    @pytest.fixture
    def folder(self, tmp_path):
        """A checkpoint to break."""
        save_model(tmp_path)
        save_released_tokenizer(tmp_path)
        return tmp_path

    def refused(self, capsys, *arguments) -> str:
        """The one line."""
        capsys.readouterr()
        assert command(*arguments) == 2
        captured = capsys.readouterr()
        assert captured.out == "" and "Traceback" not in captured.err
        (line,) = captured.err.strip().splitlines()
        assert line.startswith("rodimus: error: ")
        return line

    def change_config(self, folder, **fields):
        """Overwrite fields of ``config.json``."""
        path = folder / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | fields))

    @pytest.mark.parametrize("name", ["generate", "chat", "export"])
    def test_missing_folder(self, name, tmp_path, capsys):
        arguments = {"generate": ["--prompt", "x"], "chat": [], "export": [tmp_path / "out"]}[name]
        line = self.refused(capsys, name, tmp_path / "nowhere", *arguments)
        assert "nowhere does not exist: expected a checkpoint folder" in line

    def test_name_that_no_hub_has(self, capsys):
        line = self.refused(capsys, "generate", "some-owner/some-model", "--prompt", "x")
        assert "no folder 'some-owner/some-model' here, and the hub does not give it: " in line

    def test_file_instead_of_folder(self, folder, capsys):
        path = folder / "config.json"
        assert "is a file" in self.refused(capsys, "generate", path, "--prompt", "x")

    def test_path_that_cannot_be_looked_at(self, folder, capsys, monkeypatch):
        """As one of a folder without permission, which root has everywhere; it may look like a name
        on the hub."""
        (folder / "owner").mkdir()
        monkeypatch.chdir(folder)
        for path in ("x" * 300, "owner/" + "x" * 300):
            line = self.refused(capsys, "generate", path, "--prompt", "x")
            assert line.endswith(f"cannot read {path}: File name too long")
            line = self.refused(capsys, "export", ".", path)
            assert "cannot write" in line and line.endswith("File name too long")

    def test_weights_without_permission(self, folder, capsys, monkeypatch):
        def forbid(path, *arguments, **options):
            if path.suffix == ".safetensors":
                raise PermissionError(errno.EACCES, "Permission denied", str(path))
            return original(path, *arguments, **options)

        original = Path.open
        monkeypatch.setattr(Path, "open", forbid)
        line = self.refused(capsys, "export", folder, folder / "out")
        assert line.endswith(f"cannot read {folder / 'model.safetensors'}: Permission denied")

    def test_folder_without_config(self, folder, capsys):
        (folder / "config.json").unlink()
        line = self.refused(capsys, "generate", folder, "--prompt", "x")
        assert "holds no config.json" in line

    @pytest.mark.parametrize("name", ["generate", "chat", "eval"])
    def test_adapter(self, name, tmp_path, capsys):
        (tmp_path / "adapter_config.json").write_text("{}")
        arguments = {"generate": ["--prompt", "x"], "chat": [], "eval": ["stdlib"]}[name]
        line = self.refused(capsys, name, tmp_path, *arguments)
        assert f"{tmp_path} is an adapter: merge it into its model" in line

    def test_checkpoint_of_a_run(self, tmp_path, capsys, monkeypatch):
        folder = tmp_path / "checkpoints" / "step-00000020"
        folder.mkdir(parents=True)
        monkeypatch.chdir(folder.parent)
        refused = lambda name: self.refused(capsys, "generate", name, "--prompt", "x")
        assert "holds no config.json" in refused(folder)
        (tmp_path / "model.json").write_text("{}")
        for name in (folder, folder.name):
            line = refused(name)
            assert f"is a checkpoint of a run: name {tmp_path}, or" in line
            assert f"`rodimus export {tmp_path} OUT --step 20`" in line
        (folder.parent / "other").mkdir()
        assert "holds no config.json" in refused("other")

    @pytest.mark.parametrize("name", ["export", "generate", "chat"])
    def test_config_that_is_no_json(self, name, folder, capsys):
        (folder / "config.json").write_text('{"d_model": 32,')
        arguments = {"export": [folder / "out"], "generate": ["--prompt", "x"], "chat": []}[name]
        line = self.refused(capsys, name, folder, *arguments)
        assert "config.json is not valid JSON" in line

    @pytest.mark.parametrize(
        "content, message",
        [
            (b'{"d_model": "\xff"}', "config.json is not valid JSON"),
            (b"[]", "config.json must hold a JSON object, got list"),
            (b"{}", "config.json is not the configuration of a model: it has no d_model"),
        ],
    )
    def test_config_that_is_none(self, folder, capsys, content, message):
        (folder / "config.json").write_bytes(content)
        assert message in self.refused(capsys, "generate", folder, "--prompt", "x")

    @pytest.mark.parametrize(
        "fields, message",
        [
            ({"model_type": "llama"}, "model_type must be one of rodimus, gla, qwen2, got 'llama'"),
            ({"block_type": "rodimus_max"}, "got 'rodimus_max'"),
            ({"attn_cfg": {"num_heads": 5}}, "d_model must be divisible by num_heads"),
            ({"mixer_cfg": {"mem_sise": 8}}, "did you mean 'mem_size'"),
            ({"mixer_cfg": {"mem_size": 16}}, "must be (32, 64), got (16, 64)"),
            ({"d_model": 64}, "must be (300, 64), got (300, 32)"),
            ({"vocab_size": 301}, "must be (301, 32), got (300, 32)"),
            ({"block_type": "rodimus"}, "do not fit config.json"),
            ({"model_type": "qwen2", "hidden_size": "x"}, "'hidden_size' expected int, got str"),
            ({"n_layer": 3}, "model.layers.2.mixer_norm.weight is missing"),
            ({"n_layer": 1}, "it gives a model without model.layers.1"),
            ({"tie_word_embeddings": False}, "lm_head.weight is missing"),
        ],
        ids=str,
    )
    def test_config_that_disagrees(self, folder, capsys, fields, message):
        self.change_config(folder, **fields)
        assert message in self.refused(capsys, "export", folder, folder / "out")

    def test_missing_weights(self, folder, capsys):
        (folder / "model.safetensors").unlink()
        line = self.refused(capsys, "export", folder, folder / "out")
        assert "holds no weights: expected model.safetensors" in line

    @pytest.mark.parametrize("kept", [0, 5, 100, 20_000])
    def test_truncated_weights(self, folder, capsys, kept):
        file = folder / "model.safetensors"
        file.write_bytes(file.read_bytes()[:kept])
        line = self.refused(capsys, "export", folder, folder / "out")
        assert f"{file} is damaged or cut short ({kept:,} bytes" in line

    def test_older_weight_format(self, folder, capsys):
        file = folder / "model.safetensors"
        torch.save(load_file(file), folder / "pytorch_model.bin")
        file.unlink()
        assert command("export", folder, folder / "out") == 0
        self.change_config(folder, n_layer=3)
        line = self.refused(capsys, "export", folder, folder / "again")
        assert "model.layers.2" in line and "is missing" in line

    def test_damaged_weights_in_the_older_format(self, folder, capsys):
        (folder / "model.safetensors").unlink()
        (folder / "pytorch_model.bin").write_bytes(b"PK not a checkpoint")
        line = self.refused(capsys, "export", folder, folder / "out")
        assert f"{folder / 'pytorch_model.bin'} cannot be read" in line

    @pytest.mark.parametrize("content", [{"model": {}, "epoch": 3}, []], ids=str)
    def test_other_content_in_the_older_format(self, folder, capsys, content):
        file = folder / "pytorch_model.bin"
        (folder / "model.safetensors").unlink()
        torch.save(content, file)
        line = self.refused(capsys, "export", folder, folder / "out")
        assert f"{file} must hold tensors by name, got" in line

    def test_missing_shard(self, folder, capsys):
        (folder / "model.safetensors").unlink()
        index = {"weight_map": {"model.embeddings.weight": "model-00001-of-00002.safetensors"}}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
        line = self.refused(capsys, "export", folder, folder / "out")
        assert "model-00001-of-00002.safetensors is missing" in line

    @pytest.mark.parametrize("weight_map", [None, {}, [], "x", {"a": 3}, {"a": {}}], ids=str)
    def test_damaged_index_of_weights(self, folder, capsys, weight_map):
        (folder / "model.safetensors").unlink()
        index = folder / "model.safetensors.index.json"
        index.write_text(json.dumps({"weight_map": weight_map}))
        line = self.refused(capsys, "export", folder, folder / "out")
        assert f"{index}: expected" in line and "weight_map" in line

    def test_missing_tokenizer(self, folder, capsys):
        (folder / "tokenizer.json").unlink()
        line = self.refused(capsys, "generate", folder, "--prompt", "x")
        assert "holds no tokenizer" in line

    def test_damaged_tokenizer(self, folder, capsys):
        (folder / "tokenizer.json").write_text("{}")
        line = self.refused(capsys, "generate", folder, "--prompt", "x")
        assert "the tokenizer cannot be read" in line

    def test_tokenizer_of_another_model(self, tmp_path, capsys):
        save_model(tmp_path, vocab_size=100)
        save_released_tokenizer(tmp_path)
        line = self.refused(capsys, "generate", tmp_path, "--prompt", "hello")
        assert "they do not belong together" in line

    def test_empty_prompt(self, folder, capsys):
        line = self.refused(capsys, "generate", folder, "--prompt", "")
        assert "the prompt has no tokens" in line

    def test_prompt_that_is_not_unicode(self, folder, capsys):
        line = self.refused(capsys, "generate", folder, "--prompt", "a\udcff")
        assert "the prompt is no UTF-8 text at character 1" in line

    @pytest.mark.parametrize(
        "tokens, message", [(10**14, "can't allocate memory"), (10**23, "max_length must be")]
    )
    def test_more_tokens_than_memory_holds(self, tmp_path, capsys, tokens, message):
        save_model(tmp_path, attn_cfg={"num_heads": 4, "window_size": None})
        save_released_tokenizer(tmp_path)
        arguments = ("generate", tmp_path, "--prompt", "x", "--max-new-tokens", tokens)
        assert message in self.refused(capsys, *arguments)

    def test_device_that_is_not_there(self, folder, capsys):
        arguments = ("generate", folder, "--prompt", "x", "--device")
        # torch keeps eight bits of a number
        for unknown in ("abacus", "meta", "cuda:128", "cuda:256"):
            assert "--device must be cpu" in self.refused(capsys, *arguments, unknown)
        if not torch.cuda.is_available():
            assert "sees no GPU" in self.refused(capsys, *arguments, "cuda")

    def test_flash_linear_attention_that_disagrees(self, tmp_path, capsys):
        model = save_model(tmp_path)
        weights = convert.weights_to_fla(load_file(tmp_path / "model.safetensors"))
        save_file(weights, tmp_path / "model.safetensors")
        config = convert.config_to_fla(model.config.to_dict()) | {"num_hidden_layers": 3}
        (tmp_path / "config.json").write_text(json.dumps(config))
        line = self.refused(capsys, "export", tmp_path, tmp_path / "out")
        assert "model.layers.2.mixer_norm.weight is missing" in line

    def test_flash_linear_attention_beyond_rodimus(self, tmp_path, capsys):
        config = convert.config_to_fla(tiny_config().to_dict()) | {"use_short_conv": False}
        (tmp_path / "config.json").write_text(json.dumps(config))
        line = self.refused(capsys, "export", tmp_path, tmp_path / "out")
        assert "use_short_conv must be True to be converted" in line

    @pytest.mark.parametrize(
        "option, value",
        [
            *(("--top-p", "2"), ("--max-new-tokens", "0"), ("--top-k", "x"), ("--min-p", "1.1")),
            *(("--temperature", "-1"), ("--temperature", "101"), ("--temperature", "nan")),
            *(("--repetition-penalty", "0"), ("--repetition-penalty", "101")),
            *(("--presence-penalty", "2.1"), ("--frequency-penalty", "-2.1")),
            *(("--seed", str(2**63)), ("--seed", "-1"), ("--temperature", "inf")),
            *(("--top-p", "-0.1"), ("--top-k", "-1"), ("--min-p", "-0.1"), ("--min-p", "nan")),
            *(("--presence-penalty", "-2.1"), ("--frequency-penalty", "2.1")),
        ],
    )
    def test_impossible_sampling(self, folder, capsys, option, value):
        assert command("generate", folder, "--prompt", "x", option, value) == 2
        assert option in capsys.readouterr().err.splitlines()[-1]

    def test_sampling_at_its_bounds(self):
        bounds = {"temperature": (0, 100), "top_p": (0, 1), "min_p": (0, 1), "top_k": (0, 2**63)}
        bounds |= {"repetition_penalty": (0.01, 100), "presence_penalty": (-2, 2)}
        bounds |= {"frequency_penalty": (-2, 2), "seed": (0, 2**63 - 1), "max_new_tokens": (1, 9)}
        for values in zip(*bounds.values(), strict=True):
            told = dict(zip(bounds, values, strict=True))
            words = [f"--{name.replace('_', '-')}={value}" for name, value in told.items()]
            options = vars(parse(["generate", "model", "--prompt=x", *words]))
            assert {name: options[name] for name in bounds} == told
        stop = ["x" * 256] * 16
        words = [f"--stop={text}" for text in stop]
        assert terminal._stop(parse(["generate", "model", "--prompt=x", *words])) == tuple(stop)

    def test_a_request_that_is_refused_shows_no_prompt(self, folder, capsys):
        options = ("--prompt", "x", "--max-new-tokens", 2**63)
        assert "below 2^63" in self.refused(capsys, "generate", folder, *options)

    @pytest.mark.parametrize("name", ["generate", "chat"])
    @pytest.mark.parametrize("stop", [[""], ["x" * 257], ["x"] * 17], ids=["empty", "long", "many"])
    def test_impossible_stop_strings(self, tmp_path, capsys, name, stop):
        """Said before the model is loaded: there is none."""
        options = [word for text in stop for word in ("--stop", text)]
        prompt = ["--prompt", "x"] if name == "generate" else []
        line = self.refused(capsys, name, tmp_path / "nowhere", *prompt, *options)
        assert "--stop takes at most 16 texts of 1 to 256 characters" in line
