"""The training loop. ``Trainer.step`` is one optimizer step, whole and on one screen."""

from __future__ import annotations

import json
import logging
import math
import os
import shutil
import time
from collections import Counter
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedConfig, PreTrainedModel

from ..errors import InputError
from ..files import write_atomic
from ..loading import model_class
from . import guard, parallel
from .batches import Prefetcher, TrainData, check_held_out, open_sources, verify_share
from .checkpoint import Checkpointer, Progress
from .config import ModelSection, TrainConfig, steps_of_run
from .context import check_splits, model_inputs
from .evaluate import Evaluation, Evaluator
from .flops import hardware_flops, train_flops
from .load import to_toml
from .metrics import Meter, RunLog, peak_flops, require_trackers
from .optim import (
    build_optimizers,
    checkpoint_bytes,
    clip,
    gradient_shards,
    set_lr,
    squared_norm,
)
from .plot import read_metrics
from .schedule import lr_scale
from .shards import TokenShards
from .signals import TERMINATED, Signals
from .watchdog import Watchdog
from .weights import (
    REMARKS,
    ExistingWeights,
    has_begun,
    read_model_config,
    take_marks,
    weights_name,
)

logger = logging.getLogger(__name__)


# exit status of a run whose last checkpoint could not be written
NOT_SAVED = 1


class Trainer:
    """One run: the constructor checks and builds everything, ``run`` does the work.

    Args:
        config: The resolved run.
        ranks: This process among the others.

    Raises:
        InputError: something in the configuration, the data or the checkpoints does not fit.
    """

    def __init__(self, config: TrainConfig, ranks: parallel.Ranks) -> None:
        self.config, self.ranks, self.out = config, ranks, Path(config.out)
        self.accumulation = config.accumulation(ranks.world_size)
        # one answer for all ranks: a shared file system may show some of them an older state
        begun = parallel.from_main(lambda: has_begun(config), ranks.patient)
        model_config, train, val = parallel.together(lambda: open_inputs(config, begun), ranks)
        self.told = take_marks(model_config, train[0])
        if config.data.verify:
            parallel.together(
                lambda: verify_share(train + val, ranks.rank, ranks.world_size), ranks
            )
        self.existing = None
        if config.model.weights:
            self.existing = ExistingWeights(config, model_config, train[0], ranks)
            if not begun:
                self.existing.read()
        data = TrainData(
            train,
            config.data,
            rows=config.rows,
            seed=config.train.seed,
            rank=ranks.share[0],
            world_size=ranks.share[1],
        )
        self.batches = Prefetcher(data.batch, stride=config.rows)
        self.watchdog = Watchdog(
            ranks.rank, ranks.world_size, config.parallel.timeout_s, config.checkpoint.timeout_s
        )
        self.evaluate = None
        if val:
            self.evaluate = Evaluator(
                val,
                config.data,
                tokens=config.eval.tokens,
                micro_batch=config.train.micro_batch,
                ranks=ranks,
                compiled=config.train.compile,
            )

        with torch.device("meta"):
            model = model_class(model_config)(model_config)
        self.n_parameters = model.num_parameters()
        self.has_dropout = any(v for k, v in model_config.to_dict().items() if "dropout" in k)
        self.meter = meter_of(model, model_config, config, ranks)
        self.model = parallel.build_model(model, config, ranks)
        self.optimizers = build_optimizers(self.model, config.optim)
        self.checkpoints = Checkpointer(
            self.out / "checkpoints",
            config.checkpoint,
            self.model,
            self.optimizers,
            identity_of(model_config, train[0]),
            settings_of(config, train, ranks.device),
            checkpoint_bytes(self.model, config.optim),
        )
        self.progress = self.checkpoints.restore()
        if self.progress is None:
            self.progress = Progress()
            if self.existing is not None:
                self.existing.give_to(self.model)
        self.guard = guard.Guard(config.guard, self.progress.guard)
        self.returns: Counter[int] = Counter()
        self.signals = Signals()
        # whether any rank was asked, as of the last step or of the evaluation after it
        self.asked_to_end = self.asked_to_save = False
        self.log = RunLog(self.out, config.log, self.progress.step, enabled=ranks.is_main)
        parallel.together(
            lambda: save_settings(config, model_config, train[0]) if ranks.is_main else None, ranks
        )

    @property
    def steps(self) -> int:
        """Optimizer steps of the whole run; batches of earlier starts may have had another
        size."""
        train, done = self.config.train, self.progress
        length = train.steps, train.tokens, train.global_batch_tokens
        return steps_of_run(*length, done.step, done.tokens)

    def step(self) -> dict[str, float]:
        """One optimizer step over the global batch; returns its figures."""
        progress, config = self.progress, self.config
        self.watchdog.beat(f"loading data of step {progress.step + 1}")
        began = time.perf_counter()
        batch = self.batches.get(progress.next_sample)
        waited = time.perf_counter() - began
        lr = config.optim.lr * lr_scale(progress.step, self.steps, config.schedule)
        set_lr(self.optimizers, lr)
        if self.has_dropout:
            seed_dropout(config.train.seed, progress.step, self.ranks.rank)

        self.watchdog.beat(f"computing step {progress.step + 1}")
        # a micro-batch's loss is its sum divided by the predicted tokens of the whole global batch
        labelled = float((batch.labels >= 0).sum()) / self.ranks.per_row
        predicted = parallel.sum_over_ranks([labelled], self.ranks.device)[0]
        predicted = predicted.round().clamp_min(1).float()
        # when compiled, all rows are passed as packed: otherwise the first batch of either kind
        # would be compiled anew, while the other ranks wait
        packed = [
            config.train.compile or micro.is_packed()
            for micro in batch.split(config.train.micro_batch)
        ]
        total = torch.zeros((), device=self.ranks.device)
        micro_batches = batch.to(self.ranks.device).split(config.train.micro_batch)
        for i, micro in enumerate(micro_batches):
            parallel.mark_micro_step(self.model, last=i == self.accumulation - 1)
            out = self.model(
                **model_inputs(micro, self.ranks.context, is_packed=packed[i]),
                num_items_in_batch=predicted,
                z_loss=config.train.z_loss,
                use_cache=False,
                loss_only=True,
            )
            out.loss.backward()
            total += out.cross_entropy.detach()
        shards = gradient_shards(self.model)
        # each replica has the whole gradient
        squares = squared_norm(shards) / config.parallel.replicate
        asked = take_requests(self.signals)
        sums = parallel.sum_over_ranks([total, squares, *asked], self.ranks.device)
        clip(shards, sums[1].sqrt(), config.train.max_grad_norm)
        # the only place where a step waits for the device: the guard decides whether to update
        mean_loss, square, terminate, save = sums.tolist()
        grad_norm = math.sqrt(square)
        self.asked_to_end = terminate > 0
        self.asked_to_save |= save > 0

        values = {"loss": mean_loss, "lr": lr, "grad_norm": grad_norm}
        try:
            verdict = self.guard.judge(progress.step + 1, mean_loss, grad_norm)
        except guard.RunStopped:
            self.log.record(progress.step + 1, **values, bad=1.0)
            raise
        if verdict == guard.OK:
            for optimizer in self.optimizers:
                optimizer.step()
        for optimizer in self.optimizers:
            optimizer.zero_grad()
        progress.step += 1
        progress.next_sample += config.rows
        progress.tokens += config.train.global_batch_tokens
        self.meter.add(config.train.global_batch_tokens, waited)
        self.verdict = verdict
        return values | {"bad": float(verdict != guard.OK)}

    def run(self, signals: Signals) -> int:
        """Trains to the end, or to SIGTERM; returns the exit status."""
        self.signals = signals
        self.greet()
        self.watchdog.start()
        config, steps = self.config, self.steps
        self.meter.reset(self.progress.step)
        if self.lacks_evaluation():
            self.held_out(signals)
            if self.asked_to_end:
                return TERMINATED
        while self.progress.step < steps:
            values = self.step()
            step = self.progress.step
            if step % config.log.every == 0 or step == steps:
                values |= self.meter.read(step, steps)
                self.log.progress(step, steps, values)
            self.log.record(step, **values)
            if self.verdict == guard.ROLLBACK and self.roll_back():
                continue
            is_last = step == steps
            due = step % config.checkpoint.every == 0 or is_last
            due |= self.asked_to_save or self.asked_to_end
            self.asked_to_save = False
            # save first: an evaluation that fails must not lose the steps before it
            is_saved = not due or self.save(wait=is_last or self.asked_to_end)
            if is_saved and not self.asked_to_end and (step % config.eval.every == 0 or is_last):
                self.held_out(signals)
                is_saved = not self.asked_to_end or self.save(wait=True)
            if not is_saved:
                self.log.say(f"the checkpoint of step {step}, the last, could not be written")
                return NOT_SAVED
            if self.asked_to_end:
                self.log.say(f"terminated: checkpoint of step {step} is complete")
                return TERMINATED
        return 0

    def save(self, *, wait: bool) -> bool:
        """Starts a checkpoint, unless this step has one already; False if it was waited for and not
        written."""
        self.progress.guard = self.guard.state()
        with self.watchdog.paused(f"saving step {self.progress.step}"):
            return self.checkpoints.save(self.progress, wait=wait)

    def asked(self, signals: Signals) -> tuple[bool, bool]:
        """Whether any rank was asked to terminate, and to save; the same answer on every rank."""
        terminate, save = parallel.reduce_sum(take_requests(signals))
        return terminate > 0, save > 0

    def held_out(self, signals: Signals) -> Evaluation | None:
        """Evaluates and reports, saving between batches when asked to; None without held-out data
        or when interrupted."""
        if self.evaluate is None:
            return None

        def interrupted() -> bool:
            self.watchdog.beat(f"evaluating after step {self.progress.step}")
            self.asked_to_end, save = self.asked(signals)
            if save and not self.asked_to_end:
                self.save(wait=False)
            return self.asked_to_end

        result = self.evaluate(self.model, interrupted)
        if result is not None:
            self.log.say(
                f"held out: loss {result.loss:.4f}, {result.bits_per_byte:.3f} bits/byte "
                f"({result.tokens:,} tokens)"
            )
            self.log.record(
                self.progress.step,
                val_loss=result.loss,
                val_bits_per_byte=result.bits_per_byte,
            )
        self.meter.reset(self.progress.step)
        return result

    def lacks_evaluation(self) -> bool:
        """Whether the run was terminated during the evaluation after its last step; the same answer
        on every rank."""
        if self.evaluate is None or self.progress.step != self.steps:
            return False
        is_missing = self.ranks.is_main
        if is_missing:
            with suppress(InputError):
                known = {row["step"] for row in read_metrics(self.out) if "val_loss" in row}
                is_missing = self.progress.step not in known
        return parallel.reduce_sum([float(is_missing)])[0] > 0

    def roll_back(self) -> bool:
        """Returns to the last checkpoint and goes on with the data after the spike; False if there
        is no checkpoint.

        Raises:
            RunStopped: this is the ``guard.max_bad_steps``-th return to that checkpoint, so other
                data does not help.
        """
        bad_in_a_row = self.guard.seen.bad_in_a_row
        next_sample = self.progress.next_sample
        with self.watchdog.paused("rolling back"):
            self.checkpoints.wait()
            restored = self.checkpoints.restore_newest()
        if restored is None:
            logger.warning("no checkpoint to roll back to: the update is skipped instead")
            return False
        self.returns[restored.step] += 1
        if self.returns[restored.step] >= self.config.guard.max_bad_steps:
            raise guard.RunStopped(
                f"stopped: {self.returns[restored.step]} spikes after the checkpoint of step"
                f" {restored.step}, each on other data"
            )
        self.progress = restored
        self.progress.next_sample = next_sample
        self.guard = guard.Guard(self.config.guard, restored.guard)
        self.guard.seen.bad_in_a_row = bad_in_a_row
        self.meter.reset(self.progress.step)
        return True

    def greet(self) -> None:
        """Says what is about to happen."""
        dtype = parallel.resolve_dtype(self.config.train.dtype, self.ranks.device)
        self.log.say(
            f"{self.n_parameters / 1e6:.2f} M parameters, {self.ranks.world_size} x "
            f"{self.ranks.device.type}, {str(dtype).removeprefix('torch.')}, "
            f"{self.config.train.global_batch_tokens:,} tokens a step "
            f"({self.accumulation} micro-steps of {self.config.train.micro_batch} rows), "
            f"{self.steps:,} steps"
        )
        steps, warmup_steps = self.steps, self.config.schedule.warmup_steps
        if warmup_steps > steps:
            self.log.say(
                f"the learning rate ends at {steps / warmup_steps:.1%} of its peak, still rising:"
                f" schedule.warmup_steps is {warmup_steps:,}, the run has {steps:,} steps"
            )
        shortage = self.checkpoints.shortage() if self.ranks.is_main else None
        for line in (*self.told, *(self.existing.told if self.existing else ()), shortage):
            if line:
                self.log.say(line)
        if self.progress.step:
            self.log.say(f"resumed after step {self.progress.step}")
        if self.progress.step >= self.steps:
            self.log.say(f"nothing is left to train: the run has {self.steps:,} steps")

    def close(self) -> None:
        """Waits for the checkpoint in flight and stops the threads."""
        self.watchdog.close()
        self.batches.close()
        self.checkpoints.wait()
        self.log.close()


def open_inputs(
    config: TrainConfig, begun: bool
) -> tuple[PreTrainedConfig, list[TokenShards], list[TokenShards]]:
    """The model's configuration, the training data and the held-out data, as this machine has them;
    creates the folder of the run. ``begun``: whether the run has a checkpoint.

    Raises:
        InputError: something is missing, or does not fit the rest.
    """
    require_trackers(config.log)
    make_folder(Path(config.out))
    model = read_model_config(config, begun)
    train = open_sources(config.data.train, weighted=bool(config.data.weights))
    val = open_sources(config.data.val) if config.data.val else []
    for source in train + val:
        if source.path.parent.samefile(config.out):
            raise InputError(f"out is the folder of {source.path}: a run needs one of its own")
        source.check_vocabulary(model.vocab_size)
    check_held_out(train, val)
    check_splits(config, model)
    return model, train, val


def take_requests(signals: Signals) -> list[float]:
    """Whether this rank was asked to end, and to save, as 0 or 1; requests that arrive later wait
    for the next exchange between ranks."""
    save = signals.save
    if save:
        signals.save = False
    return [float(signals.terminate), float(save)]


def meter_of(
    model: PreTrainedModel, shapes: PreTrainedConfig, config: TrainConfig, ranks: parallel.Ranks
) -> Meter:
    """A meter for a run with this model, which is not sharded yet."""
    recompute = config.train.ac == "full"
    return Meter(
        ranks.world_size,
        useful=train_flops(model, shapes, config.data.seq_len).total,
        spent=hardware_flops(model, shapes, config.data.seq_len, recompute=recompute),
        peak=peak_flops(ranks.device),
    )


def seed_dropout(seed: int, step: int, rank: int) -> None:
    """Seeds torch for one step of one rank, so that dropout masks differ between steps and ranks,
    and a resumed run draws the same ones as an uninterrupted run."""
    (word,) = np.random.SeedSequence((seed, step, rank)).generate_state(1)
    torch.manual_seed(int(word))


def make_folder(path: Path) -> None:
    """Creates the folder of a run if it is missing.

    Raises:
        InputError: it cannot be created, or it or what a run writes in it is not writable.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(
            f"cannot create the folder of the run, {path}: {error.strerror}"
        ) from error
    for written in (path, path / "checkpoints", path / "metrics.jsonl"):
        if written.exists() and not os.access(written, os.W_OK):
            raise InputError(f"the run needs to write to {written}, and cannot")


def identity_of(model: PreTrainedConfig, source: TokenShards) -> dict[str, Any]:
    """What a checkpoint must share with the run that resumes from it."""
    values = {k: v for k, v in model.to_dict().items() if k not in REMARKS}
    values["tokenizer_sha256"] = source.manifest.tokenizer_sha256
    return json.loads(json.dumps(values))


def settings_of(
    config: TrainConfig, sources: list[TokenShards], device: torch.device
) -> dict[str, Any]:
    """Settings that decide the result of a run but may change when it is resumed. Data are compared
    by their number of tokens, not by path; the dtype is the one the device computes in."""
    sections = {name: getattr(config, name) for name in ("data", "optim", "schedule", "guard")}
    values = {f"{name}.{k}": v for name, part in sections.items() for k, v in vars(part).items()}
    for key in ("steps", "tokens", "global_batch_tokens", "seed", "z_loss", "max_grad_norm"):
        values[f"train.{key}"] = getattr(config.train, key)
    dtype = parallel.resolve_dtype(config.train.dtype, device)
    values["train.dtype"] = str(dtype).removeprefix("torch.")
    values["data.train"] = [f"{source.manifest.n_tokens:,} tokens" for source in sources]
    values["model.weights"] = weights_name(config)
    for key in ("data.val", "data.verify"):
        del values[key]
    return json.loads(json.dumps(values))


def save_settings(config: TrainConfig, model: PreTrainedConfig, source: TokenShards) -> None:
    """Writes the resolved configurations of run and model, and the tokenizer, to the run's folder.

    `rodimus train OUT/config.toml` resumes the run from that copy, whose ``checkpoint.resume`` is
    always auto.

    Raises:
        InputError: they cannot be written.
    """
    out = Path(config.out)
    config = replace(
        config,
        model=ModelSection("model.json", weights_name(config)),
        checkpoint=replace(config.checkpoint, resume="auto"),
    )
    tokenizer = source.path.parent / "tokenizer"
    try:
        write_atomic(out / "model.json", json.dumps(model.to_dict(), indent=2) + "\n")
        write_atomic(out / "config.toml", to_toml(config))
        if tokenizer.is_dir():
            shutil.copytree(tokenizer, out / "tokenizer", dirs_exist_ok=True)
    except (OSError, UnicodeError) as error:
        raise InputError(f"cannot write the settings of the run to {out}: {error}") from error
