"""The commands of ``rodimus`` and their options.

Nothing heavy is imported here: each command loads what it needs when it runs.
"""

import argparse
import importlib
from collections.abc import Sequence

from . import __version__
from .devices import DEVICES
from .limits import Limits

API_KEY_VARIABLE = "RODIMUS_API_KEY"
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


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """Parse the arguments after ``rodimus``; ``command`` is the function to call with the result.

    For the commands that take settings of a training file, ``--section.key VALUE``, these are in
    ``settings``.
    """
    if argv[:1] == ["train"]:
        # its own parser answers --help, too, with the file's values
        return argparse.Namespace(command=_train, words=argv[1:])
    options, rest = build_parser().parse_known_args(argv)
    if rest:
        options.settings = rest
    return options


class _Parser(argparse.ArgumentParser):
    """Refuses arguments that it does not know, unless they are settings of a training file.

    argparse leaves them to the parser of all commands, whose usage is of no help with them."""

    def parse_known_args(self, args=None, namespace=None):
        options, rest = super().parse_known_args(args, namespace)
        if rest and "settings" not in options:
            self.error(f"unrecognized arguments: {' '.join(rest)}")
        return options, rest


def build_parser() -> argparse.ArgumentParser:
    """The parser of all commands but `train`, which it only lists."""
    parser = _Parser(
        prog="rodimus",
        description="Rodimus and Rodimus+ language models: train, generate, export.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"rodimus {__version__}")
    commands = _add_commands(parser)
    _add_generate(commands)
    _add_chat(commands)
    _add_serve(commands)
    _add_train(commands)
    _add_plan(commands)
    _add_plot(commands)
    _add_data(commands)
    _add_tokenizer(commands)
    _add_eval(commands)
    _add_export(commands)
    _add_env(commands)
    return parser


def _add_commands(parser: argparse.ArgumentParser):
    """Commands below a parser, which shows its help if none is given."""

    def show_help(options: argparse.Namespace) -> int:
        parser.print_help()
        return 2

    parser.set_defaults(command=show_help)
    return parser.add_subparsers(title="commands", metavar="COMMAND")


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
        help="talk with a chat model",
        description="Talk with a model. Its tokenizer must have a chat template. "
        "An empty line, /exit or the end of input leaves; /reset starts a new conversation; "
        "Ctrl-C ends a reply, or the conversation while there is none.",
    )
    add_model(parser)
    parser.add_argument("--system", default="", help="system message that opens the conversation")
    _add_sampling(parser, temperature=0.7, top_p=0.95, seed=None)
    parser.set_defaults(command=_lazily("rodimus.generation.terminal", "run_chat"))


def _add_serve(commands) -> None:
    parser = commands.add_parser(
        "serve",
        help="serve a model over HTTP with OpenAI's API",
        description="Serve a model over HTTP with OpenAI's API: /v1/completions, "
        f"/v1/chat/completions, /v1/models, /health, /metrics. {API_KEY_VARIABLE} in the "
        "environment, if set, is the key that clients must send.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add, limits, inf = parser.add_argument, Limits(), float("inf")
    positive, count = number(int, 1, inf, "at least 1"), number(int, 0, inf, "at least 0")
    add_model(parser)
    add("--host", default="127.0.0.1", help="address to listen on")
    add("--port", type=number(int, 0, 65535, "0 to 65535"), default=8000, help="port to listen on")
    add(
        "--name",
        default=None,
        help="the model's name for clients (default: that of its folder, or on the hub)",
    )
    add("--slots", type=positive, default=8, help="sequences that run at once")
    add("--max-waiting", type=count, default=64, help="requests that may wait; more get 429")
    add("--prefill-chunk", type=positive, default=512, help="prompt tokens read between two steps")
    add("--max-length", type=positive, default=None, help="most tokens of prompt and continuation")
    add(
        "--window-dtype",
        default="model",
        choices=("model", "int8"),
        help="dtype of values in the attention window; int8 takes about half the memory",
    )
    add(
        "--recent-states",
        type=count,
        default=8,
        help="recent states to keep, so that the next turn of a conversation, or the same "
        "prompt again, is not read from its start; a turn leaves two",
    )
    add("--max-prompt-tokens", type=positive, default=limits.prompt_tokens, help="longest prompt")
    add("--max-new-tokens", type=positive, default=limits.new_tokens, help="longest continuation")
    add(
        "--max-choices", type=positive, default=limits.choices, help="most answers: n times prompts"
    )
    add("--max-body-bytes", type=positive, default=limits.body_bytes, help="largest request")
    add(
        "--prefix",
        action="append",
        default=[],
        metavar="FILE",
        help="state file; prompts that begin with its tokens start from it. May be repeated",
    )
    add(
        "--allow-origin",
        action="append",
        default=[],
        metavar="ORIGIN",
        help="web page, such as http://localhost:3000, whose scripts may call the server; * for "
        "all. May be repeated",
    )
    add("--shutdown-seconds", type=count, default=30, help="time for running requests at the end")
    parser.set_defaults(command=_lazily("rodimus.generation.server", "run"))


def _add_train(commands) -> None:
    """For --help alone: ``parse`` passes the arguments of ``train`` on to it."""
    commands.add_parser("train", help="pretrain a model from a TOML file")


def _add_plan(commands) -> None:
    parser = commands.add_parser(
        "plan",
        help="estimate what a training run needs, without a GPU",
        description="Memory, operations, traffic and days of a training run, by arithmetic: "
        "nothing is measured and no GPU is needed.",
        epilog="--section.key VALUE changes a setting of the file, as for `rodimus train`",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("config", help="TOML file of the run")
    parser.add_argument("--gpus", type=int, default=8, help="number of GPUs")
    parser.add_argument("--gpu", choices=sorted(DEVICES), default="H100", help="kind of GPU")
    parser.add_argument(
        "--mfu",
        type=float,
        default=0.5,
        help="share of the peak assumed; with train.ac = full recomputation takes its part of it",
    )
    parser.set_defaults(command=_lazily("rodimus.train.plan", "run"), settings=[])


def _add_plot(commands) -> None:
    parser = commands.add_parser(
        "plot",
        help="draw loss, learning rate and throughput of a run",
        description="Draw loss, learning rate and throughput of a run.",
    )
    parser.add_argument("run", help="folder of a training run")
    parser.add_argument("--out", help="PNG file to write (default: RUN/loss.png)")
    parser.set_defaults(command=_lazily("rodimus.train.plot", "run"))


def _add_data(commands) -> None:
    parser = _add_member(
        commands,
        "data pack",
        "make token shards for training from text",
        "Turn text into token shards for training: exact copies dropped, split by document into "
        "train and val, checksummed.",
    )
    _add_source(parser)
    parser.add_argument("out", help="folder for train.json, val.json, shards and tokenizer")
    parser.add_argument(
        "--tokenizer",
        help="folder of a tokenizer, model or run, or owner/name on the hub; without it one is "
        "trained",
    )
    _add_learning(parser)
    parser.add_argument("--shard-tokens", type=int, default=1 << 28, help="tokens in one shard")
    parser.add_argument(
        "--overwrite", action="store_true", help="write into OUT even if it is not empty"
    )
    parser.set_defaults(command=_lazily("rodimus.train.pack", "run"))


def _add_tokenizer(commands) -> None:
    parser = _add_member(
        commands,
        "tokenizer train",
        "train a tokenizer on text",
        "Train the tokenizer that `rodimus data pack` would train on this text, for packs of its "
        "parts that share one. Documents that would be held out are not read.",
    )
    _add_source(parser)
    parser.add_argument("out", help="folder to write")
    _add_learning(parser)
    parser.set_defaults(command=_lazily("rodimus.train.pack", "run_tokenizer"))


def _add_member(commands, name, text, description) -> argparse.ArgumentParser:
    """The parser of a command of two words, which is alone in its group."""
    group, member = name.split()
    members = _add_commands(commands.add_parser(group, help=f"`{name}`: {text}"))
    return members.add_parser(
        member,
        help=text,
        description=description,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )


def _add_source(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "source",
        help="stdlib (Python's own sources), a txt, jsonl or parquet file, a folder, hf:NAME",
    )


def _add_learning(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--vocab-size", type=int, default=4096, help="of a trained tokenizer")
    parser.add_argument(
        "--tokenizer-sample", type=float, default=0.2, help="share of documents it is trained on"
    )
    parser.add_argument("--val-fraction", type=float, default=0.02, help="share held out")
    parser.add_argument("--field", default="text", help="text field of jsonl and parquet")


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
        help="longest piece of one forward pass; affects memory, not the result "
        "(default: %(default)s)",
    )
    add("--json", action="store_true", help="print JSON instead of tables")
    tasks = parser.add_argument_group("tasks of lm-evaluation-harness (pip install lm_eval[hf])")
    tasks.add_argument("--tasks", metavar="A,B", help="names, for example arc_easy,hellaswag")
    tasks.add_argument("--num-fewshot", type=count, metavar="N", help="examples in the prompt")
    tasks.add_argument(
        "--limit", type=at_least_one, metavar="N", help="questions of a task, to try it out"
    )
    tasks.add_argument(
        "--batch-size",
        type=at_least_one,
        default=8,
        metavar="N",
        help="questions in one forward pass (default: %(default)s)",
    )
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
    """Options of every command that runs a model: which model, where, and in which dtypes."""
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
        help="dtype of the weights; auto: as they were saved",
    )
    parser.add_argument(
        "--weight-dtype",
        choices=("int8", "int4"),
        help="round the matrices of linear layers to 8 bits, or those in the blocks to 4 (needs "
        "torchao): half or a third of the bytes that a token reads; faster only on a CPU",
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

    def add_number(name, kind, low, high, what, default, explanation):
        metavar = "N" if kind is int else "X"
        bounds = number(kind, low, high, what)
        add(f"--{name}", type=bounds, default=default, metavar=metavar, help=explanation)

    text = "most tokens of one text (default: %(default)s)"
    add_number("max-new-tokens", int, 1, inf, "at least 1", 256, text)
    text = "randomness: 0 takes the likeliest token every time (default: %(default)s)"
    add_number("temperature", float, 0, 100, "0 to 100", temperature, text)
    text = "sample among the N likeliest tokens only (default: all)"
    add_number("top-k", int, 0, inf, "at least 0", 0, text)
    text = (
        "sample among the likeliest tokens that make up this share, 0 among the likeliest alone"
        " (default: %(default)s)"
    )
    add_number("top-p", float, 0, 1, "0 to 1", top_p, text)
    text = "sample among tokens at least this likely, relative to the likeliest (default: all)"
    add_number("min-p", float, 0, 1, "0 to 1", 0.0, text)
    text = "above 1, make tokens that have occurred before less likely (default: 1)"
    add_number("repetition-penalty", float, 0.01, 100, "0.01 to 100", 1.0, text)
    text = "subtract this from the scores of tokens in the answer so far (default: 0)"
    add_number("presence-penalty", float, -2, 2, "-2 to 2", 0.0, text)
    text = "the same for each time that a token occurs in the answer (default: 0)"
    add_number("frequency-penalty", float, -2, 2, "-2 to 2", 0.0, text)
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


def _train(options: argparse.Namespace) -> int:
    return importlib.import_module("rodimus.train.__main__").main(options.words)
