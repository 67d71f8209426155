"""`rodimus train CONFIG` and `torchrun -m rodimus.train CONFIG`: one run from start to export.

Exit status: 0 the run is done, 1 the guard stopped it or its last checkpoint could not be written,
2 bad input, 143 terminated after a checkpoint (the same command resumes). ``status`` also writes it
to a file.
"""

from __future__ import annotations

import logging
import os
import sys
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import InputError
from .config import TrainConfig
from .status import leave, leave_crashed

if TYPE_CHECKING:
    from .parallel import Ranks

USAGE = """usage: rodimus train CONFIG.toml [--section.key VALUE ...]
       torchrun --nproc-per-node N -m rodimus.train CONFIG.toml [--section.key VALUE ...]

Pretrain a model as CONFIG.toml says. Start the same command again to resume.
`rodimus train CONFIG.toml --help` lists every setting with its value in that file."""


def main(argv: list[str] | None = None) -> int:
    """Runs one training process; returns its exit status."""
    argv = sys.argv[1:] if argv is None else list(argv)
    if not argv or argv[0] in ("-h", "--help"):
        print(USAGE)
        return 0 if argv else 2
    is_main = _is_main()
    logging.basicConfig(format="%(levelname)s %(message)s")
    try:
        status = train(argv[0], argv[1:])
    except InputError as error:
        # all ranks fail alike, or all ranks of one machine: one rank of each machine reports it
        if is_main:
            print(f"rodimus train: error: {error}", file=sys.stderr)
        elif os.environ.get("LOCAL_RANK") == "0":
            print(f"rodimus train: error: rank {os.environ['RANK']}: {error}", file=sys.stderr)
        status = 2
    except Exception:
        leave_crashed()
        raise
    leave(status)
    return status


def _is_main() -> bool:
    return os.environ.get("RANK", "0") == "0"


def train(path: str, overrides: list[str]) -> int:
    """Trains, exports and samples; returns the exit status."""
    from .load import load_config

    config = load_config(path, overrides)
    from . import parallel

    ranks = parallel.start(config.parallel, config.train.device)
    with ExitStack() as held:
        parallel.together(lambda: hold(config, held) if ranks.is_main else None, ranks)
        status = run(config, ranks)
        if status == 0 and ranks.is_main:
            finish(config)
    return status


def hold(config: TrainConfig, held: ExitStack) -> None:
    """Keeps other runs out of this run's folder; a new folder that stays empty is deleted."""
    from .loop import make_folder
    from .store import alone

    out = Path(config.out)
    is_new = not out.exists()
    make_folder(out)
    held.enter_context(alone(out, is_new=is_new))


def run(config: TrainConfig, ranks: Ranks) -> int:
    """Trains and leaves the process group, so that no rank waits for an export; the exit status."""
    from . import parallel
    from .guard import RunStopped
    from .loop import Trainer
    from .signals import TERMINATED, Signals

    with Signals() as signals:
        trainer = Trainer(config, ranks)
        try:
            status = trainer.run(signals)
        except RunStopped as stopped:
            trainer.log.say(str(stopped))
            status = 1
        except InputError as error:
            # only this rank found the error; the others end when this process does
            print(f"rodimus train: error: rank {ranks.rank}: {error}", file=sys.stderr)
            return 2
        finally:
            trainer.close()
        # now: a launcher may kill this process when another ends, a scheduler during the export
        leave(TERMINATED if status == 0 and config.export else status)
    parallel.stop()
    return status


def finish(config: TrainConfig) -> None:
    """Exports the trained model and prints a sample of its text."""
    if not config.export:
        return
    from transformers.utils import logging as transformers_logging

    from ..export import export

    transformers_logging.disable_progress_bar()
    folder = export(config.out, Path(config.out) / "export", overwrite=True)
    print(f"exported {folder}", flush=True)
    if config.eval.sample_prompt:
        try:
            text = sample(folder, config.eval.sample_prompt, config.eval.sample_tokens)
        except InputError as error:
            # the run is done and exported all the same
            text = f"none: {error}"
        print(f"sample:\n{text}", flush=True)


def sample(folder: Path, prompt: str, new_tokens: int) -> str:
    """Returns ``prompt`` followed by its greedy continuation by an exported model.

    Raises:
        InputError: the model predicts tokens but cannot generate.
    """
    from ..loading import load_model, load_tokenizer

    model, tokenizer = load_model(folder), load_tokenizer(folder)
    if not model.can_generate():
        raise InputError(f"{folder}: {type(model).__name__} is trained and evaluated here, not run")
    ids = tokenizer(prompt, return_tensors="pt").input_ids
    out = model.generate(
        ids,
        max_new_tokens=new_tokens,
        do_sample=False,
        repetition_penalty=1.1,
        pad_token_id=tokenizer.eos_token_id,
    )
    return tokenizer.decode(out[0], skip_special_tokens=True)


if __name__ == "__main__":
    sys.exit(main())
