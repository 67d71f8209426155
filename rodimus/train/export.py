"""From a run's checkpoint to a HuggingFace folder: ``python -m rodimus.train.export RUN OUT``.

Reads the sharded checkpoint in one process, whatever the number of ranks that wrote it.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import warnings
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp

from .. import RodimusConfig, RodimusForCausalLM
from ..errors import InputError
from ..export import write_model
from . import store


def load_trained(run: str | Path, step: int | None = None) -> RodimusForCausalLM:
    """Builds the model of a run with the weights of a checkpoint, on the CPU in fp32.

    Args:
        run: Folder of the run.
        step: Which checkpoint; default the newest.

    Raises:
        InputError: the run has no such checkpoint, or the checkpoint is damaged.
    """
    root = Path(run) / "checkpoints"
    folder = store.latest_folder(root) if step is None else store.step_folder(root, step)
    if folder is None or not store.recorded_checksums(folder):
        raise InputError(f"{run} has no complete checkpoint{'' if step is None else f' {step}'}")
    damaged = store.damaged_files(folder, store.recorded_checksums(folder))
    if damaged:
        raise InputError(f"{folder} is damaged: {', '.join(damaged)}")
    model = RodimusForCausalLM(RodimusConfig.from_json_file(str(Path(run) / "model.json")))
    weights = model.state_dict()
    for tied in model.all_tied_weights_keys:
        weights.pop(tied, None)
    with warnings.catch_warnings():
        # torch remarks that there is no process group: none is wanted
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        dcp.load({"model": weights}, checkpoint_id=folder, no_dist=True)
    model.load_state_dict(weights, strict=False)
    return model.eval()


def export_run(run: str | Path, out: str | Path, step: int | None = None) -> Path:
    """Writes weights, configuration, code and tokenizer of a run as a HuggingFace folder.

    Args:
        run: Folder of the run.
        out: Folder to write; files in it are replaced.
        step: Which checkpoint; default the newest.

    Returns:
        ``out``.

    Raises:
        InputError: as ``load_trained``.
    """
    run, out = Path(run), Path(out)
    model = load_trained(run, step)
    out.mkdir(parents=True, exist_ok=True)
    write_model(model, out)
    if (run / "tokenizer").is_dir():
        shutil.copytree(run / "tokenizer", out, dirs_exist_ok=True)
    return out


@torch.no_grad()
def sample(folder: str | Path, prompt: str, new_tokens: int) -> str:
    """Text of ``prompt`` and its most likely continuation by an exported model."""
    from ..loading import load_model, load_tokenizer

    model, tokenizer = load_model(Path(folder)).eval(), load_tokenizer(Path(folder))
    ids = tokenizer(prompt, return_tensors="pt").input_ids
    out = model.generate(
        ids,
        max_new_tokens=new_tokens,
        do_sample=False,
        repetition_penalty=1.1,
        pad_token_id=tokenizer.eos_token_id,
    )
    return tokenizer.decode(out[0], skip_special_tokens=True)


def main(argv: list[str] | None = None) -> int:
    """Runs the command; returns its exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m rodimus.train.export",
        description="Write a training checkpoint as a HuggingFace folder.",
    )
    parser.add_argument("run", help="folder of the run")
    parser.add_argument("out", help="folder to write")
    parser.add_argument("--step", type=int, help="which checkpoint (default: the newest)")
    options = parser.parse_args(argv)
    try:
        print(f"wrote {export_run(options.run, options.out, options.step)}")
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
