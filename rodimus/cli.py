"""The command ``rodimus``: its commands, their options, and how errors are shown.

Nothing heavy is imported here: each command loads what it needs when it runs.
"""

import argparse
import contextlib
import importlib
import io
import os
import sys
from collections.abc import Callable, Sequence
from typing import TextIO

from . import __version__
from .errors import InputError

EPILOG = """\
examples:
  rodimus train configs/train/demo_cpu.toml
  rodimus generate runs/demo/export --prompt "def fibonacci(n):" --stats
  rodimus chat path/to/checkpoint
  rodimus eval runs/demo runs/demo/data
  rodimus COMMAND --help
"""
EVAL_DESCRIPTION = """\
Measure how well a model predicts text: loss in nats a token, perplexity, and bits
per byte, which compares models of different tokenizers; also by position in the
document and by its length. Every token but a document's first is predicted once.
Documents are read whole, however long: the state is carried on from piece to piece.
"""
EVAL_EPILOG = """\
examples:
  rodimus eval runs/demo runs/demo/data              newest checkpoint of a run, held-out shards
  rodimus eval MODEL book.txt notes.jsonl --dtype bfloat16 --json
  rodimus eval MODEL --tasks arc_easy,hellaswag
"""
# Commands with a parser of their own, which gets everything after their name: module and help.
PASSED_ON = {
    "train": ("rodimus.train.__main__", "pretrain a model as a TOML file says"),
    "data pack": ("rodimus.train.pack", "make token shards for training from text"),
    "serve": ("rodimus.generation.server", "serve a model over HTTP as OpenAI's API does"),
    "plan": ("rodimus.train.plan", "estimate what a training run needs, without a GPU"),
    "plot": ("rodimus.train.plot", "draw loss, learning rate and throughput of a run"),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code: 0, 2 for bad input (told in one line), 1 where what
    it prints cannot be written, or that of a shell for a command that a signal ended: Ctrl-C (130),
    or a pipe that nobody reads (141)."""
    argv = list(sys.argv[1:] if argv is None else argv)
    # there is none where it was closed
    out = _Output(sys.stdout or io.StringIO())
    try:
        with contextlib.redirect_stdout(out):
            try:
                code = _run(argv)
            except SystemExit as stop:
                code = stop.code
            # the last words fail here, not while Python shuts down
            out.flush()
            return code or 0
    except InputError as error:
        print(f"rodimus: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    except OSError as error:
        if error is not out.error:
            raise
        # what is left in the buffer must not be tried again
        os.dup2(os.open(os.devnull, os.O_WRONLY), out.fileno())
        if isinstance(error, BrokenPipeError):
            return 141
        print(f"rodimus: error: cannot write the output: {error.strerror}", file=sys.stderr)
        return 1


def _run(argv: list[str]) -> int | None:
    for name, (module, _) in PASSED_ON.items():
        words = name.split()
        if argv[: len(words)] == words:
            return importlib.import_module(module).main(argv[len(words) :])
    options = build_parser().parse_args(argv)
    return options.command(options)


class _Output:
    """Standard output that remembers why it could not be written: the same error of a file that a
    command writes keeps its traceback."""

    def __init__(self, stream: TextIO):
        self.stream, self.error = stream, None

    def __getattr__(self, name: str):
        return getattr(self.stream, name)

    def write(self, text: str) -> int:
        return self._try(self.stream.write, text)

    def flush(self) -> None:
        self._try(self.stream.flush)

    def _try(self, function: Callable, *arguments):
        try:
            return function(*arguments)
        except OSError as error:
            self.error = error
            raise


def build_parser() -> argparse.ArgumentParser:
    """The parser of every command that is not passed on."""
    parser = argparse.ArgumentParser(
        prog="rodimus",
        description="Rodimus and Rodimus+ language models: train, generate, export.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"rodimus {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    _list_passed_on(commands)
    _add_generate(commands)
    _add_chat(commands)
    _add_eval(commands)
    _add_export(commands)
    _add_env(commands)
    return parser


def _list_passed_on(commands) -> None:
    """For --help alone: ``main`` passes these on before anything is parsed."""
    for name, (_, text) in PASSED_ON.items():
        group, _, member = name.partition(" ")
        parser = commands.add_parser(group, help=f"`{name}`: {text}" if member else text)
        if member:
            members = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
            members.add_parser(member, help=text)


def _add_generate(commands) -> None:
    parser = commands.add_parser(
        "generate",
        help="continue a text",
        description="Continue a text with a model; the text appears as it is made. A prompt may be "
        "of any length: memory does not grow with it once it is past the model's window.",
    )
    add_model(parser)
    parser.add_argument("--prompt", required=True, help="text to continue; - reads standard input")
    _add_sampling(parser, temperature=0.0, top_p=1.0, seed=0)
    parser.set_defaults(command=_lazily("rodimus.generation.terminal", "run_generate"))


def _add_chat(commands) -> None:
    parser = commands.add_parser(
        "chat",
        help="talk with a model that was trained to",
        description="Talk with a model. Its tokenizer must have a chat template. "
        "An empty line, /exit or the end of input leaves; /reset starts a new conversation; "
        "Ctrl-C ends a reply, or leaves where there is none.",
    )
    add_model(parser)
    parser.add_argument("--system", default="", help="what the model is told about its role first")
    _add_sampling(parser, temperature=0.7, top_p=0.95, seed=None)
    parser.set_defaults(command=_lazily("rodimus.generation.terminal", "run_chat"))


def _add_eval(commands) -> None:
    parser = commands.add_parser(
        "eval",
        help="loss, perplexity and bits per byte of a model on text",
        description=EVAL_DESCRIPTION,
        epilog=EVAL_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_model(parser)
    add = parser.add_argument
    add(
        "data",
        metavar="DATA",
        nargs="*",
        help="text (txt, md, py, jsonl, parquet; a folder of them; stdlib; hf:NAME), or token "
        "shards: a manifest, or the folder of `rodimus data pack`, which means its val.json",
    )
    _add_step(parser)
    add("--field", default="text", help="text field of jsonl and parquet (default: %(default)s)")
    inf = float("inf")
    at_least_one, count = number(int, 1, inf, "at least 1"), number(int, 0, inf, "at least 0")
    add(
        "--max-tokens",
        type=at_least_one,
        default=0,
        metavar="N",
        help="begin no document after N tokens of each DATA (default: read all)",
    )
    add(
        "--tokens-at-once",
        type=at_least_one,
        default=4096,
        metavar="N",
        help="longest piece of one forward pass; decides memory, not the result "
        "(default: %(default)s)",
    )
    add("--json", action="store_true", help="print JSON instead of tables")
    tasks = parser.add_argument_group("tasks of lm-evaluation-harness (pip install lm_eval[hf])")
    tasks.add_argument("--tasks", metavar="A,B", help="names, for example arc_easy,hellaswag")
    tasks.add_argument("--num-fewshot", type=count, metavar="N", help="examples in the prompt")
    tasks.add_argument(
        "--limit", type=at_least_one, metavar="N", help="questions of a task, to try it out"
    )
    tasks.add_argument("--batch-size", type=at_least_one, default=8, metavar="N")
    tasks.add_argument(
        "--max-length",
        type=at_least_one,
        metavar="N",
        help="tokens of prompt and answer, longer prompts are cut from the left (default: the "
        "model's max_position_embeddings)",
    )
    tasks.add_argument("--task-folder", metavar="FOLDER", help="folder of further task definitions")
    parser.set_defaults(command=_lazily("rodimus.evaluation.command", "run"))


def _add_export(commands) -> None:
    parser = commands.add_parser(
        "export",
        help="write a folder that loads with torch and transformers alone",
        description="Write a checkpoint as a folder that AutoModelForCausalLM.from_pretrained(OUT, "
        "trust_remote_code=True) loads without this package. CKPT may be a model, a training run, "
        "or a checkpoint of flash-linear-attention, which is converted.",
    )
    parser.add_argument(
        "checkpoint",
        metavar="CKPT",
        help="folder of a model or run, or owner/name[@revision] on the hub",
    )
    parser.add_argument("out", metavar="OUT", help="folder to write")
    _add_step(parser)
    parser.add_argument("--overwrite", action="store_true", help="replace OUT if it is an export")
    parser.set_defaults(command=_export)


def _add_env(commands) -> None:
    parser = commands.add_parser(
        "env",
        help="what is installed and which implementation each operator uses here, and why",
        description="Print versions, the device, which implementation each operator would choose "
        "here and why, and which optional packages are missing. Please add it to bug reports.",
    )
    parser.set_defaults(command=_lazily("rodimus.env", "run"))


def _add_step(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--step", type=int, help="checkpoint of a training run (default: the newest complete one)"
    )


def add_model(parser: argparse.ArgumentParser) -> None:
    """What every command that runs a model asks for: which, where, and in which dtypes."""
    parser.add_argument(
        "model",
        metavar="MODEL",
        help="folder of a model or run, or owner/name[@revision] on the hub",
    )
    parser.add_argument(
        "--device", default="auto", help="cpu, cuda, cuda:1; auto takes a GPU if there is one"
    )
    parser.add_argument(
        "--dtype",
        default="auto",
        choices=("auto", "float32", "bfloat16", "float16"),
        help="of the weights; auto: as they were saved",
    )
    parser.add_argument(
        "--weight-dtype",
        choices=("int8",),
        help="round the matrices of linear layers to 8 bits (needs torchao), half the bytes that a "
        "token reads; faster on a CPU alone",
    )


def number(kind: type, low: float, high: float, what: str):
    """A parser of numbers within bounds, for argparse."""

    def parse(text: str):
        value = kind(text)
        if not low <= value <= high:
            raise argparse.ArgumentTypeError(f"must be {what}, got {text}")
        return value

    parse.__name__ = kind.__name__
    return parse


def _add_sampling(
    parser: argparse.ArgumentParser, temperature: float, top_p: float, seed: int | None
) -> None:
    inf = float("inf")
    add = parser.add_argument
    add("--max-new-tokens", type=number(int, 1, inf, "at least 1"), default=256, metavar="N")
    add(
        "--temperature",
        type=number(float, 0, 100, "0 to 100"),
        default=temperature,
        metavar="X",
        help="randomness: 0 takes the likeliest token every time (default: %(default)s)",
    )
    add(
        "--top-k",
        type=number(int, 0, inf, "at least 0"),
        default=0,
        metavar="N",
        help="sample among the N likeliest tokens only (default: all)",
    )
    add(
        "--top-p",
        type=number(float, 1e-9, 1, "above 0 and at most 1"),
        default=top_p,
        metavar="X",
        help="sample among the likeliest tokens that make up this share (default: %(default)s)",
    )
    add(
        "--min-p",
        type=number(float, 0, 1, "0 to 1"),
        default=0.0,
        metavar="X",
        help="sample among tokens at least this likely, relative to the likeliest (default: all)",
    )
    add(
        "--repetition-penalty",
        type=number(float, 0.01, 100, "0.01 to 100"),
        default=1.0,
        metavar="X",
        help="make tokens that were there before less likely; 1 changes nothing (default)",
    )
    add(
        "--stop",
        action="append",
        default=[],
        metavar="TEXT",
        help="end before this text. May be repeated",
    )
    fresh = "a new one each time, which --stats prints"
    add(
        "--seed",
        type=number(int, 0, 2**63 - 1, "0 to 2^63 - 1"),
        default=seed,
        help=f"same seed, same text (default: {fresh if seed is None else seed})",
    )
    add("--stats", action="store_true", help="print tokens/s and the memory of the state")


def _lazily(module: str, function: str):
    return lambda options: getattr(importlib.import_module(module), function)(options)


def _export(options: argparse.Namespace) -> None:
    from transformers.utils import logging

    from .export import export

    logging.disable_progress_bar()
    out = export(options.checkpoint, options.out, step=options.step, overwrite=options.overwrite)
    print(f"wrote {out}")


if __name__ == "__main__":
    sys.exit(main())
