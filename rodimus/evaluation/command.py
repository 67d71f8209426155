"""The command ``rodimus eval``: loads, evaluates, prints a table or JSON."""

import argparse
import json
import math
import sys
from typing import Any

from transformers.utils import logging

from ..errors import InputError, first_line
from ..loading import find_device, load_model, load_tokenizer
from .documents import read
from .harness import run_tasks
from .likelihood import Tally, evaluate


def run(options: argparse.Namespace) -> None:
    """Evaluates as the command line says and prints the result.

    Raises:
        InputError: something given cannot be used.
    """
    if not options.data and not options.tasks:
        raise InputError("nothing to evaluate on: name DATA, or --tasks of lm-evaluation-harness")
    logging.disable_progress_bar()
    device = find_device(options.device)
    model = load_model(
        options.model,
        dtype=options.dtype,
        device=device,
        step=options.step,
        weight_dtype=options.weight_dtype,
    )
    if model.get_output_embeddings() is None:
        raise InputError(f"{options.model} has no language-model head: it predicts no tokens")
    result: dict[str, Any] = {
        "model": options.model,
        "dtype": str(model.dtype).removeprefix("torch."),
        "device": str(device),
    }
    try:
        if options.data:
            result["data"] = [_evaluate(model, source, options) for source in options.data]
        if options.tasks:
            result["tasks"] = run_tasks(
                model,
                load_tokenizer(options.model),
                options.tasks.split(","),
                num_fewshot=options.num_fewshot,
                limit=options.limit,
                batch_size=options.batch_size,
                max_length=options.max_length,
                task_folder=options.task_folder,
            )
    except ImportError as error:
        # an optional package is missing; the message says how to install it
        raise InputError(first_line(error)) from error
    print(json.dumps(result, indent=1, default=str) if options.json else render(result))


def _evaluate(model, source: str, options: argparse.Namespace) -> dict[str, Any]:
    documents = read(
        source,
        tokenizer=lambda: load_tokenizer(options.model),
        vocab_size=model.config.vocab_size,
        field=options.field,
    )
    on_terminal = sys.stderr.isatty()

    def report(tally: Tally) -> None:
        if on_terminal:
            print(f"\r{source}: {tally.tokens:,} tokens", end="", file=sys.stderr, flush=True)

    tally = evaluate(
        model,
        documents,
        tokens_at_once=options.tokens_at_once,
        max_tokens=options.max_tokens,
        report=report,
    )
    if on_terminal:
        print("\r\033[K", end="", file=sys.stderr, flush=True)
    if not tally.tokens:
        raise InputError(f"{source} holds no token to predict")
    if not math.isfinite(tally.nats):
        raise InputError(f"the loss of {options.model} on {source} is {tally.nats}")
    return {"source": source, **tally.summary()}


def render(result: dict[str, Any]) -> str:
    """The result as text."""
    lines = [f"{result['model']} in {result['dtype']} on {result['device']}"]
    for data in result.get("data", ()):
        lines += [
            "",
            f"{data['source']}: {data['documents']:,} documents, {data['tokens']:,} predicted "
            f"tokens, {'about ' * data['bytes_estimated']}{data['bytes']:,} bytes",
            f"loss {data['loss']:.4f} nats/token, perplexity {data['perplexity']:.2f}, "
            f"{data['bits_per_byte']:.4f} bits/byte",
            "",
            f"  {'position in document':<24}{'tokens':>12}{'loss':>9}",
            *(f"  {_range(b):<24}{b['tokens']:>12,}{b['loss']:>9.4f}" for b in data["by_position"]),
            "",
            f"  {'tokens of the document':<24}{'tokens':>12}{'loss':>9}{'bits/byte':>11}"
            f"{'documents':>11}",
            *(
                f"  {_range(b):<24}{b['tokens']:>12,}{b['loss']:>9.4f}{_bits(b):>11}"
                f"{b['documents']:>11,}"
                for b in data["by_length"]
            ),
        ]
    for task, metrics in result.get("tasks", {}).items():
        lines += ["", task]
        lines += [f"  {k:<28}{v:.4f}" for k, v in metrics.items() if isinstance(v, float)]
    return "\n".join(lines)


def _range(bucket: dict[str, Any]) -> str:
    return f"{bucket['from']:,} - {bucket['below'] - 1:,}"


def _bits(bucket: dict[str, Any]) -> str:
    return f"{bucket['bits_per_byte']:.4f}" if "bits_per_byte" in bucket else "-"
