"""Saving and restoring a run: torch's distributed checkpoints, plus proof that they are whole.

Every rank writes its shards and hashes them; a checkpoint counts once rank 0 has listed all
checksums in COMPLETE. Restoring checks them first: torch notices a truncated file but silently
loads flipped bits. A damaged checkpoint is set aside and the one before it is used.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import threading
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field, fields, replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_state_dict,
    set_state_dict,
)
from transformers import PreTrainedModel

from ..errors import InputError, first_line
from ..run_folder import (
    MARKER,
    complete_steps,
    damaged_files,
    recorded_checksums,
    sha256_file,
    step_folder,
)
from . import parallel, store
from .config import CheckpointSection, ScheduleSection, steps_of_run
from .schedule import lr_scale
from .status import leave_saved
from .units import in_unit

logger = logging.getLogger(__name__)
_PROGRESS = "progress.json"
DATA_ORDER = ("data.seq_len", "data.packing", "data.weights", "data.train", "train.seed")
"""Settings that decide which text is in which row, and in which order rows come."""
STARTED_AGAIN = ("SLURM_RESTART_COUNT", "TORCHELASTIC_RESTART_COUNT")
"""Environment variables that are positive in a job that Slurm or torchrun has restarted."""


@dataclass
class Progress:
    """Position of a run: together with weights and optimizer state, all that resuming needs."""

    step: int = 0
    """Optimizer steps done."""
    next_sample: int = 0
    """First sample of the next batch; beyond ``step`` batches if data was skipped."""
    tokens: int = 0
    """Training tokens of these steps."""
    guard: dict[str, Any] = field(default_factory=dict)
    """Running statistics of the guard."""


class Checkpointer:
    """Writes and reads the checkpoints of one run; every rank makes the same calls.

    Args:
        root: Folder of checkpoints.
        config: How many to keep, whether to write in the background, what to resume from.
        model: Sharded model.
        optimizers: Its optimizers.
        identity: What must agree between a checkpoint and the run that resumes from it.
        settings: What may differ between them; differences are reported.
        size: Bytes of one checkpoint, without a few small text files.
    """

    def __init__(
        self,
        root: Path,
        config: CheckpointSection,
        model: PreTrainedModel,
        optimizers: Sequence[torch.optim.Optimizer],
        identity: dict[str, Any],
        settings: dict[str, Any],
        size: int,
    ) -> None:
        self.root, self.config, self.size = root, config, size
        self.identity, self.settings = identity, settings
        self.model, self.optimizers = model, list(optimizers)
        # the writer thread's collectives must never mix with the training step's; the timeout is
        # longer than the watchdog's, whose report names the rank that hangs
        timeout = timedelta(seconds=config.timeout_s + 60)
        self.group = dist.new_group(backend="gloo", timeout=timeout)
        self.rank, self.world_size = dist.get_rank(), dist.get_world_size()
        self._writer: threading.Thread | None = None
        # progress at the last checkpoint that was written or read
        self._last: Progress | None = None
        self._has_failed = False

    def save(self, progress: Progress, *, wait: bool) -> bool:
        """Starts a checkpoint of this step; with ``wait`` it is complete on return. The last one is
        not written again if the run has not moved since.

        A failure to write (a full disk) is logged as an error on every rank, and training goes on.
        If the disk has no room for the new one beside all that are kept, or after a failure, the
        oldest (never the only one) is deleted before the new one is written instead of after.

        Returns:
            False if it was waited for and could not be written.
        """
        if progress == self._last and (not wait or self._is_written(progress.step)):
            return True
        self.wait()
        self._last = replace(progress)
        folder = step_folder(self.root, progress.step)
        about = {
            "progress": asdict(progress),
            "identity": self.identity,
            "settings": self.settings,
        }
        problem = self._from_main(lambda: self._prepare(folder))
        if problem:
            logger.error("checkpoint %s not written: %s", folder.name, problem)
            return not wait
        state = self._state()
        if self.config.async_save and not wait:
            # training goes on, so a copy is written: in pageable host memory, made synchronously
            state = DefaultStager(StagingOptions(False, False, False, False)).stage(state)
            self._writer = threading.Thread(
                target=self._write, args=(folder, about, state), name="checkpoint"
            )
            self._writer.start()
        else:
            self._write(folder, about, state)
        if not wait or self._is_written(progress.step):
            return True
        return self._from_main(self._may_make_room) and self.save(progress, wait=True)

    def _is_written(self, step: int) -> bool:
        self.wait()
        return self._from_main(lambda: _is_complete(step_folder(self.root, step)))

    def shortage(self) -> str | None:
        """A message if the disk cannot hold all checkpoints that are kept, or two if one is kept
        (it stays until the next is complete). For rank 0: others need not see the folder."""
        least = max(2, self.config.keep)
        with suppress(OSError):
            free = self._free() + len(complete_steps(self.root)) * self.size
            if free < least * self.size:
                (one, room), unit = in_unit("B", 1, self.size, free)
                return (
                    f"checkpoint.keep = {self.config.keep} takes {least} x {one} {unit} in"
                    f" {self.root}, which has room for {room} {unit}"
                )
        return None

    def _free(self) -> int:
        there = self.root if self.root.is_dir() else self.root.parent
        return shutil.disk_usage(there).free

    def _lack(self) -> list[str]:
        """A message if the disk has no room for one more checkpoint, else no message."""
        with suppress(OSError):
            free = self._free()
            if free < self.size:
                (room, one), unit = in_unit("B", 1, free, self.size)
                return [f"{room} {unit} are free, it takes {one} {unit}"]
        return []

    def _replaceable(self) -> list[Path]:
        """Checkpoints that the next one replaces; never the only one."""
        keep = max(1, self.config.keep - 1)
        return store.superseded(self.root, keep, self.config.keep_every)

    def _may_make_room(self) -> bool:
        with suppress(OSError):
            return bool(self._replaceable())
        return False

    def _prepare(self, folder: Path) -> str | None:
        """Makes room for a checkpoint; returns what went wrong, if anything."""
        try:
            if folder.exists():
                # left by an earlier start that went beyond the step this one resumed from
                store.remove(folder)
            lack = self._lack()
            if lack or self._has_failed:
                # also after a failure, because free space does not show a quota
                early = self._replaceable()
                for old in early:
                    store.remove(old)
                told = [f"{path.name} is deleted early" for path in early] + lack
                if told:
                    logger.warning("checkpoint %s: %s", folder.name, "; ".join(told))
        except OSError as failure:
            return reasons(failure, self.rank)[0]
        return None

    def wait(self) -> None:
        """Returns when no checkpoint is being written."""
        if self._writer is not None:
            self._writer.join()
            self._writer = None

    def _write(self, folder: Path, about: dict[str, Any], state: dict[str, Any]) -> None:
        errors, checksums = [], {}
        try:
            # no copying ahead: torch synchronises with the device for it, and in the writer thread
            # every rank would open the machine's first GPU
            writer = dcp.FileSystemWriter(folder, per_thread_copy_ahead=0)
            dcp.save(state, storage_writer=writer, process_group=self.group)
            checksums = self._hash_mine(folder, about)
        except (Exception, CheckpointException) as failure:
            # every rank must learn of any failure here, or the others wait forever
            errors = reasons(failure, self.rank)
        results: list[Any] = [None] * self.world_size
        try:
            dist.all_gather_object(results, (errors, checksums), group=self.group)
        except Exception as failure:
            # an exception in a thread would go unseen; the next collective ends the run
            told = "; ".join(errors) or failure
            logger.error("checkpoint %s not written: %s", folder.name, told)
            return
        errors = sorted({error for part, _ in results for error in part})
        self._has_failed |= bool(errors)
        if errors:
            # torch's writer reports a full disk as an unexpected position
            errors += self._lack() if self.rank == 0 else []
            logger.error("checkpoint %s not written: %s", folder.name, "; ".join(errors))
            if self.rank == 0:
                _discard(folder)
        elif self.rank == 0:
            checksums = {k: v for _, part in results for k, v in part.items()}
            try:
                _check_seen(folder, [part for _, part in results])
                store.mark_complete(folder, checksums)
            except OSError as failure:
                logger.error("checkpoint %s not written: %s", folder.name, failure)
                self._has_failed = True
                _discard(folder)
                return
            leave_saved()
            _point_to(folder)
            try:
                for old in store.superseded(self.root, self.config.keep, self.config.keep_every):
                    store.remove(old)
            except OSError as failure:
                logger.warning("older checkpoints not deleted: %s", failure)

    def _hash_mine(self, folder: Path, about: dict[str, Any]) -> dict[str, str]:
        mine = sorted(folder.glob(f"__{self.rank}_*.distcp"))
        if self.rank == 0:
            store.write_atomic(folder / _PROGRESS, json.dumps(about, indent=1))
            mine += [folder / _PROGRESS, folder / ".metadata"]
        return {path.name: sha256_file(path) for path in mine}

    def restore(self) -> Progress | None:
        """Loads what ``config.resume`` asks for; None if the run starts from scratch.

        A job that Slurm or torchrun has restarted always resumes from its newest checkpoint.

        Raises:
            InputError: the step asked for is missing or damaged, every checkpoint is damaged (they
                are set aside), the run exists although ``resume = never``, or the checkpoint is of
                another model, tokenizer or optimizer.
        """
        again: list[Any] = [None] * self.world_size
        mine = any(int(os.environ.get(name) or 0) for name in STARTED_AGAIN)
        # torchrun counts only the restarts of its own node
        dist.all_gather_object(again, mine, group=self.group)
        wanted = "auto" if any(again) else self.config.resume
        steps = self._from_main(lambda: complete_steps(self.root))
        if wanted == "never" and steps:
            raise InputError(f"checkpoint.resume = never, but {self.root} has step {steps[0]}")
        if wanted.isdecimal():
            return self._restore_step(int(wanted), steps)
        self._from_main(lambda: store.remove_incomplete(self.root))
        restored = self.restore_newest()
        if steps and restored is None:
            raise InputError(
                f"every checkpoint in {self.root} is damaged, the newest of step {steps[0]}; they"
                " are set aside, and the same command starts from step 0"
            )
        return restored

    def _restore_step(self, step: int, steps: list[int]) -> Progress:
        if step not in steps:
            have = ", ".join(map(str, steps)) or "none"
            raise InputError(f"no checkpoint of step {step} in {self.root}; it has {have}")
        folder = step_folder(self.root, step)
        damaged = self._damaged(folder)
        if damaged:
            raise InputError(f"{folder} is damaged: {', '.join(damaged)}")
        progress = self._load(folder)
        # later steps are of an abandoned branch: never resume from, roll back to or export them
        left = [step_folder(self.root, later) for later in steps if later > step]
        moved = self._from_main(lambda: [store.set_aside(folder, "left") for folder in left])
        for before, after in zip(left, moved, strict=True) if self.rank == 0 else ():
            logger.warning("resumed before %s: it is now %s", before.name, after.name)
        return progress

    def restore_newest(self) -> Progress | None:
        """Loads the newest sound checkpoint and moves damaged ones aside; None if there is none."""
        for step in self._from_main(lambda: complete_steps(self.root)):
            folder = step_folder(self.root, step)
            damaged = self._damaged(folder)
            if not damaged:
                return self._load(folder)
            moved = self._from_main(lambda folder=folder: store.set_aside(folder, "damaged").name)
            if self.rank == 0:
                logger.warning("%s is damaged (%s): now %s", folder.name, damaged[0], moved)
        return None

    def _damaged(self, folder: Path) -> list[str]:
        """Damaged files, found by all ranks together, each hashing its share."""
        if not self.config.verify:
            return []
        checksums = sorted(self._from_main(lambda: recorded_checksums(folder)).items())
        mine = dict(checksums[self.rank :: self.world_size])
        found: list[Any] = [None] * self.world_size
        dist.all_gather_object(found, damaged_files(folder, mine), group=self.group)
        return sum(found, []) if checksums else ["COMPLETE"]

    def _load(self, folder: Path) -> Progress:
        about = json.loads((folder / _PROGRESS).read_text())
        check_identity(about["identity"], self.identity, folder)
        saved = about.get("settings", {})
        told = changed_settings(saved, self.settings, folder)
        told += risen_rate(saved, self.settings, Progress(**about["progress"]))
        for message in told if self.rank == 0 else ():
            logger.warning(message)
        own = [dict(group) for optimizer in self.optimizers for group in optimizer.param_groups]
        state = self._state()
        try:
            dcp.load(state, checkpoint_id=folder, process_group=self.group)
        except CheckpointException as failure:
            told = "; ".join(reasons(failure, self.rank))
            raise InputError(f"{folder} cannot be read: {told}") from failure
        set_state_dict(
            self.model,
            self.optimizers,
            model_state_dict=state["model"],
            optim_state_dict=state["optim"],
            # the tied head is not stored a second time
            options=StateDictOptions(strict=False),
        )
        groups = [group for optimizer in self.optimizers for group in optimizer.param_groups]
        for group, configured in zip(groups, own, strict=True):
            # keep the checkpoint's moments, but use this run's weight decay and betas
            group.update({key: value for key, value in configured.items() if key != "params"})
        self._from_main(lambda: _point_to(folder))
        self._last = Progress(**about["progress"])
        return replace(self._last)

    def _state(self) -> dict[str, Any]:
        fresh = [optimizer for optimizer in self.optimizers if not optimizer.state]
        model, optim = get_state_dict(self.model, self.optimizers)
        # torch creates optimizer state by a dummy update, which must not count as a step of the run
        for count in (x["step"] for o in fresh for x in o.state.values() if "step" in x):
            count.zero_()
        for tied in self.model.all_tied_weights_keys:
            model.pop(tied, None)
        return {"model": model, "optim": optim}

    def _from_main(self, compute: Callable[[], Any]) -> Any:
        return parallel.from_main(compute, self.group)


def reasons(failure: BaseException, rank: int) -> list[str]:
    """What went wrong, one line per rank. Torch raises the failures of all ranks on every rank, as
    a ``CheckpointException``, which is not an ``Exception``."""
    failures = {rank: failure}
    if isinstance(failure, CheckpointException):
        failures = {rank: error for rank, (error, _) in failure.failures.items()}
    return [f"rank {r}: {type(e).__name__}: {first_line(e)}" for r, e in sorted(failures.items())]


def _check_seen(folder: Path, written: Sequence[Iterable[str]]) -> None:
    """Refuses a checkpoint of which this rank sees only a part; ``written``: file names by rank."""
    for rank, names in enumerate(written):
        if not all((folder / name).is_file() for name in names):
            raise FileNotFoundError(
                f"rank 0 does not see the files of rank {rank}: out must be a folder that all nodes"
                " share"
            )


def _is_complete(folder: Path) -> bool:
    try:
        return (folder / MARKER).is_file()
    except OSError as failure:
        logger.error("%s cannot be read: %s", folder, failure)
        return False


def _discard(folder: Path) -> None:
    try:
        store.remove(folder)
    except OSError as failure:
        logger.warning("%s not deleted: %s", folder.name, failure)


def _point_to(folder: Path) -> None:
    try:
        store.point_to(folder)
    except OSError as failure:
        logger.warning("%s does not name %s: %s", folder.parent / "latest", folder.name, failure)


def changed_settings(saved: dict[str, Any], current: dict[str, Any], folder: Path) -> list[str]:
    """Messages about the settings that differ from those in the checkpoint.

    Raises:
        InputError: the optimizer differs: the checkpoint holds the state of another one.
    """
    changed = [key for key in sorted(saved.keys() & current) if saved[key] != current[key]]
    if "optim.name" in changed:
        own, theirs = current["optim.name"], saved["optim.name"]
        raise InputError(f"{folder} was written with the optimizer {theirs}, this run has {own}")
    told = [f"resumed with {key} = {current[key]}, was {saved[key]}" for key in changed]
    if "model.weights" in changed:
        told.append("the run goes on with its own weights: model.weights is not read")
    if any(key in DATA_ORDER for key in changed):
        told.append("rows come in another order now: some are read again, others never")
    return told


def risen_rate(saved: dict[str, Any], current: dict[str, Any], progress: Progress) -> list[str]:
    """A message if the last step's learning rate is now far higher than it was in that step."""
    before, now = (_rate(settings, progress) for settings in (current | saved, current))
    if now <= 2 * before:
        return []
    return [
        f"the learning rate is at {now:.0%} of its peak again, after it had come down to"
        f" {before:.0%}: to extend a run, resume from before its decay (checkpoint.resume = STEP)"
    ]


def _rate(settings: dict[str, Any], progress: Progress) -> float:
    """Learning rate of the last step, as a share of the peak."""
    schedule = {f.name: settings[f"schedule.{f.name}"] for f in fields(ScheduleSection)}
    length = [settings[f"train.{name}"] for name in ("steps", "tokens", "global_batch_tokens")]
    steps = steps_of_run(*length, progress.step, progress.tokens)
    return lr_scale(progress.step - 1, steps, ScheduleSection(**schedule))


def check_identity(saved: dict[str, Any], current: dict[str, Any], folder: Path) -> None:
    """Refuses a checkpoint of another model or tokenizer. Fields that only one side has are not
    compared, because versions of transformers add different ones to every configuration.

    Raises:
        InputError: a value differs; the message names the first one.
    """
    for key in sorted(saved.keys() & current.keys()):
        if saved[key] != current[key]:
            raise InputError(
                f"{folder} is of another model: {key} must be {current[key]!r}, got {saved[key]!r}"
            )
