"""What a long run meets: signals, kills, damaged files, bad numbers, wrong input."""

import contextlib
import errno
import io
import json
import logging
import multiprocessing
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch._inductor import async_compile
from torch.distributed.checkpoint import FileSystemWriter, filesystem
from torch.utils._pytree import tree_leaves

from rodimus import RodimusConfig, RodimusForCausalLM, run_folder
from rodimus.errors import InputError
from rodimus.run_folder import sha256_file
from rodimus.train import checkpoint, guard, loop, parallel, signals, store, watchdog
from rodimus.train import metrics as run_metrics
from rodimus.train.__main__ import main
from rodimus.train.batches import TrainData
from rodimus.train.checkpoint import (
    Checkpointer,
    Progress,
    changed_settings,
    check_identity,
    risen_rate,
)
from rodimus.train.config import (
    CheckpointSection,
    EvalSection,
    GuardSection,
    LogSection,
    ScheduleSection,
    TrainSection,
)
from rodimus.train.evaluate import Evaluation, Evaluator
from rodimus.train.load import load_config
from rodimus.train.pack import pack
from rodimus.train.parallel import start
from rodimus.train.shards import TokenShards
from rodimus.train.watchdog import Watchdog
from tests.train.conftest import MODEL, RUN
from tests.train.ranks import metrics, run_ranks, train


@pytest.fixture(scope="module")
def trained(tmp_path_factory, packed):
    """A finished run of 6 steps on one rank, with checkpoints of steps 3 and 6."""
    folder = tmp_path_factory.mktemp("trained")
    (folder / "model.json").write_text(json.dumps(MODEL))
    (folder / "run.toml").write_text(RUN.format(out=folder / "run", data=packed))
    assert train(1, folder / "run.toml", "--no-export") == [0]
    return folder


@pytest.fixture
def copied(trained, tmp_path):
    """``(config file, run folder)`` of a copy of the finished run."""
    shutil.copytree(trained / "run", tmp_path / "run")
    return trained / "run.toml", tmp_path / "run"


def flip_a_bit(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 4
    path.write_bytes(data)


def stderr_of(arguments):
    """Exit status of `rodimus train` and what it wrote to stderr."""
    with contextlib.redirect_stderr(io.StringIO()) as err:
        status = main(arguments)
    return status, err.getvalue()


def logged(arguments):
    """Exit status of `rodimus train` and what it logs of checkpoints."""
    told = logging.Handler()
    messages, told.emit = [], lambda record: messages.append(record.getMessage())
    logging.getLogger("rodimus.train.checkpoint").addHandler(told)
    return main(arguments), messages


def warnings_of(arguments):
    """What `rodimus train` warns of where it reads a checkpoint."""
    status, messages = logged(arguments)
    assert status == 0
    return messages


def stdout_of(arguments):
    """What `rodimus train` says."""
    with contextlib.redirect_stdout(io.StringIO()) as out:
        main(arguments)
    return out.getvalue()


def resumed_losses(config, run, *overrides):
    """Losses of the steps that a resumed run trained."""
    (run / "metrics.jsonl").unlink()
    assert train(1, config, "--no-export", "--out", run, *overrides) == [0]
    return metrics(run, "loss")


def test_flipped_bit_is_found_set_aside_and_the_run_goes_on(copied, trained):
    config, run = copied
    flip_a_bit(next((run / "checkpoints" / "step-00000006").glob("*.distcp")))
    expected = metrics(trained / "run", "loss")
    assert resumed_losses(config, run) == {step: expected[step] for step in (4, 5, 6)}
    assert (run / "checkpoints" / "step-00000006.damaged").is_dir()
    assert store.complete_steps(run / "checkpoints") == [6, 3]


def test_a_checkpoint_that_cannot_be_read_is_damage(copied, trained, monkeypatch):
    def read(path):
        if path.parent.name == "step-00000006" and path.suffix == ".distcp":
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return sha256_file(path)

    config, run = copied
    monkeypatch.setattr(run_folder, "sha256_file", read)
    expected = metrics(trained / "run", "loss")
    assert resumed_losses(config, run) == {step: expected[step] for step in (4, 5, 6)}
    assert (run / "checkpoints" / "step-00000006.damaged").is_dir()


def test_ranks_agree_though_one_of_them_cannot_read_the_marker(copied, monkeypatch):
    def read(folder):
        return {} if os.environ["RANK"] == "1" else run_folder.recorded_checksums(folder)

    config, run = copied
    monkeypatch.setattr(checkpoint, "recorded_checksums", read)
    assert train(2, config, "--no-export", "--out", run, timeout=30) == [0, 0]
    assert store.complete_steps(run / "checkpoints") == [6, 3]


def test_each_rank_hashes_a_share_and_all_learn_of_all_damage(tmp_path):
    """A step that is asked for by number is checked, too."""
    folder = store.step_folder(tmp_path, 3)
    folder.mkdir()
    names = [f"__{i}_0.distcp" for i in range(6)]
    for name in names:
        (folder / name).write_text(name)
    store.mark_complete(folder, {name: sha256_file(folder / name) for name in names})
    for name in names[1:5]:
        flip_a_bit(folder / name)

    def refused():
        torch.distributed.init_process_group("gloo")
        config = CheckpointSection(resume="3")
        with pytest.raises(InputError) as error:
            Checkpointer(tmp_path, config, None, (), {}, {}, 0).restore()
        return str(error.value)

    # those of rank 0 first
    damaged = ", ".join(names[i] for i in (2, 4, 1, 3))
    assert run_ranks(2, refused) == [f"{folder} is damaged: {damaged}"] * 2


def test_truncated_file_and_unreadable_marker_are_damage(copied):
    config, run = copied
    shard = next((run / "checkpoints" / "step-00000006").glob("*.distcp"))
    shard.write_bytes(shard.read_bytes()[:-100])
    (run / "checkpoints" / "step-00000003" / "COMPLETE").write_text("{")
    again = [str(config), "--out", str(run), "--no-export"]
    ((status, told),) = run_ranks(1, stderr_of, again)
    assert status == 2 and "is damaged, the newest of step 6; they are set" in told
    # nothing starts over by itself; told again, it does
    assert sorted(resumed_losses(config, run)) == [1, 2, 3, 4, 5, 6]


def test_resuming_before_the_newest_step_leaves_the_later_ones(copied, trained):
    config, run = copied
    checkpoints = run / "checkpoints"
    expected = metrics(trained / "run", "loss")
    found = resumed_losses(config, run, "--checkpoint.resume", "3", "--train.steps", "5")
    assert found == {step: expected[step] for step in (4, 5)}
    assert (checkpoints / "step-00000006.left").is_dir()
    assert store.complete_steps(checkpoints) == [5, 3]
    assert (checkpoints / "latest").read_text() == "step-00000005"


@pytest.mark.parametrize(
    "variable, resume",
    [
        ("SLURM_RESTART_COUNT", "3"),
        ("TORCHELASTIC_RESTART_COUNT", "never"),
        pytest.param("SLURM_RESTART_COUNT", "never", marks=pytest.mark.slow),
        pytest.param("TORCHELASTIC_RESTART_COUNT", "3", marks=pytest.mark.slow),
    ],
)
def test_a_job_that_is_started_again_goes_on(copied, variable, resume, monkeypatch):
    config, run = copied
    options = ["--out", run, "--no-export", "--checkpoint.resume", resume, "--train.steps", "7"]
    monkeypatch.setenv(variable, "1")
    assert train(1, config, *options) == [0]
    assert store.complete_steps(run / "checkpoints") == [7, 6, 3]
    assert not list((run / "checkpoints").glob("*.left"))


def test_a_job_goes_on_though_one_node_alone_counts_its_start_again(copied):
    """torchrun counts those of its own ranks."""
    config, run = copied

    def started():
        if os.environ["RANK"] == "1":
            os.environ["TORCHELASTIC_RESTART_COUNT"] = "1"
        options = ["--no-export", "--checkpoint.resume", "never", "--train.steps", "7"]
        return main([str(config), "--out", str(run), *options])

    assert run_ranks(2, started, timeout=60) == [0, 0]
    assert store.complete_steps(run / "checkpoints") == [7, 6, 3]


def test_a_checkpoint_cut_short_that_was_not_verified_is_one_line(copied, capfd):
    config, run = copied
    for path in (run / "checkpoints" / "step-00000006").glob("*.distcp"):
        os.truncate(path, path.stat().st_size // 2)
    options = ["--out", run, "--no-export", "--train.steps", "7", "--checkpoint.no-verify"]
    assert train(2, config, *options) == [2, 2]
    error = capfd.readouterr().err
    assert "Traceback" not in error
    assert re.search("error: .*step-00000006 cannot be read: rank 0: ", error)


@pytest.mark.parametrize(
    "batch, steps, tokens",
    [
        (512, 5, 1408),
        pytest.param(256, 6, 1152, marks=pytest.mark.slow),
        pytest.param(64, 15, 1152, marks=pytest.mark.slow),
    ],
)
def test_tokens_are_those_of_batches_of_either_size(copied, batch, steps, tokens):
    """The three steps before had 128 each."""
    config, run = copied
    options = ["--checkpoint.resume", "3", "--train.global-batch-tokens", str(batch)]
    options += ["--train.micro-batch", "2", "--train.steps", "0", "--train.tokens", "1152"]
    assert list(resumed_losses(config, run, *options)) == list(range(4, steps + 1))
    progress = store.step_folder(run / "checkpoints", steps) / "progress.json"
    assert json.loads(progress.read_text())["progress"]["tokens"] == tokens


def test_the_step_at_which_the_guard_stops_is_recorded(config_file, tmp_path):
    def stops():
        def judge(self, step, loss, grad_norm):
            if step == 2:
                raise guard.RunStopped("enough")
            return "ok"

        guard.Guard.judge = judge
        return main([str(config_file), "--no-export"])

    assert run_ranks(2, stops) == [1, 1]
    assert metrics(tmp_path / "run", "bad") == {1: 0.0, 2: 1.0}
    assert metrics(tmp_path / "run", "loss")[2] > 0


def test_the_settings_of_a_run_resume_it(copied):
    """Not what its last start was told to resume from."""
    config, run = copied
    options = ["--out", run, "--no-export", "--checkpoint.resume", "3"]
    assert train(1, config, *options) == [0]
    assert train(1, run / "config.toml", "--train.steps", "7") == [0]
    assert store.complete_steps(run / "checkpoints") == [7, 6, 3]
    assert len(list((run / "checkpoints").glob("*.left*"))) == 1


def test_the_pointer_is_to_what_is_there(copied, config_file, tmp_path):
    config, run = copied
    latest = run / "checkpoints" / "latest"
    flip_a_bit(next((run / "checkpoints" / "step-00000006").glob("*.distcp")))
    assert train(1, config, "--out", run, "--no-export", "--train.steps", "3") == [0]
    assert latest.read_text() == "step-00000003"

    def full():
        def refuse(folder):
            raise OSError(28, "No space left on device")

        store.point_to = refuse
        return main([str(config_file), "--no-export", "--out", str(tmp_path / "other")])

    assert run_ranks(2, full) == [0, 0]
    assert store.complete_steps(tmp_path / "other" / "checkpoints") == [6, 3]


def test_kill_in_the_middle_of_a_save_loses_only_the_steps_since(config_file, tmp_path, trained):
    run = tmp_path / "run"

    def killed():
        hash_mine = Checkpointer._hash_mine

        def die_at_step_6(self, folder, about):
            if folder.name == "step-00000006":
                os.kill(os.getpid(), signal.SIGKILL)
            return hash_mine(self, folder, about)

        Checkpointer._hash_mine = die_at_step_6
        return main([str(config_file), "--no-export"])

    with pytest.raises(AssertionError, match="died with -9"):
        run_ranks(1, killed)
    assert (run / "checkpoints" / "step-00000006").is_dir()
    assert store.complete_steps(run / "checkpoints") == [3]
    expected = metrics(trained / "run", "loss")
    assert resumed_losses(config_file, run) == {step: expected[step] for step in (4, 5, 6)}


def test_failed_save_leaves_the_older_checkpoint_and_the_run_alive(config_file, tmp_path):
    def disk_full_at_step_3():
        write = store.write_atomic

        def refuse(path, text):
            if "step-00000003" in str(path):
                raise OSError(28, "No space left on device")
            write(path, text)

        store.write_atomic = refuse
        return main([str(config_file), "--no-export"])

    assert run_ranks(2, disk_full_at_step_3) == [0, 0]
    assert store.complete_steps(tmp_path / "run" / "checkpoints") == [6]


@pytest.mark.parametrize(
    "world_size, option, failing",
    [
        (1, "async-save", 3),
        (1, "no-async-save", 6),
        (2, "async-save", 6),
        pytest.param(1, "async-save", 6, marks=pytest.mark.slow),
        pytest.param(1, "no-async-save", 3, marks=pytest.mark.slow),
        pytest.param(2, "async-save", 3, marks=pytest.mark.slow),
    ],
)
def test_weights_that_cannot_be_written(config_file, tmp_path, world_size, option, failing):
    """In torch's own writer, whose error for it is no ``Exception``."""

    def small_disk():
        write = Checkpointer._write

        def limited(self, folder, *arguments):
            limits = resource.getrlimit(resource.RLIMIT_FSIZE)
            if folder.name == f"step-0000000{failing}":
                resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))
            try:
                write(self, folder, *arguments)
            finally:
                resource.setrlimit(resource.RLIMIT_FSIZE, limits)

        Checkpointer._write = limited
        return logged([str(config_file), "--no-export", f"--checkpoint.{option}"])

    (status, told), *others = run_ranks(world_size, small_disk)
    assert status == (1 if failing == 6 else 0) and all(other[0] == status for other in others)
    folders = (tmp_path / "run" / "checkpoints").glob("step-*")
    assert [folder.name for folder in folders] == [f"step-0000000{9 - failing}"]
    (line,) = [line for line in told if "not written" in line]
    assert line.startswith(f"checkpoint step-0000000{failing} not written: rank 0: OSError: ")
    assert "\n" not in line and "File too large" in line


def on_a_disk_for(checkpoints, is_told, arguments):
    """Status of a run whose disk holds so many checkpoints and may say so, what it logs, and what
    was complete whenever one was begun."""
    hash_mine, write, begun = Checkpointer._hash_mine, Checkpointer._write, []

    def free(self):
        return max(0, int((checkpoints - len(list(self.root.glob("step-*")))) * self.size))

    def full(self, folder, about):
        if free(self) == 0:
            raise OSError(28, "No space left on device")
        return hash_mine(self, folder, about)

    def watched(self, *arguments):
        begun.append(store.complete_steps(self.root))
        return write(self, *arguments)

    Checkpointer._hash_mine, Checkpointer._write = full, watched
    Checkpointer._free = free if is_told else lambda self: 1 << 60
    return *logged(arguments), begun


@pytest.fixture
def saves_each_step(config_file):
    return [str(config_file), "--no-export", "--checkpoint.every", "1"]


@pytest.mark.parametrize("is_told", [True, False], ids=["free space", "quota"])
def test_a_disk_for_those_that_are_kept_is_enough(saves_each_step, tmp_path, is_told):
    """The oldest goes before the next is written; under a quota, from the first that fails on."""
    ((status, told, begun),) = run_ranks(1, on_a_disk_for, 3.9, is_told, saves_each_step)
    assert status == 0
    failed = [line for line in told if "not written" in line]
    early = [line for line in told if "is deleted early" in line]
    if is_told:
        assert not failed and begun == [[], [1], [2, 1], [3, 2], [4, 3], [5, 4]]
        assert early[0].startswith("checkpoint step-00000004: step-00000001 is deleted early; ")
    else:
        (line,) = failed
        assert line.startswith("checkpoint step-00000004 not written: ") and "No space" in line
        assert begun == [[], [1], [2, 1], [3, 2, 1], [3, 2], [5, 3]]
    assert store.complete_steps(tmp_path / "run" / "checkpoints")[0] == 6


def test_the_last_checkpoint_is_tried_once_more_where_room_can_be_made(copied):
    """As when every start of a job ends at its time limit, under a quota."""
    config, run = copied
    arguments = [str(config), "--out", str(run), "--no-export", "--train.steps", "8"]
    arguments += ["--checkpoint.every", "10", "--checkpoint.keep", "2"]
    (status, told, begun), _ = run_ranks(2, on_a_disk_for, 2.9, False, arguments)
    assert status == 0 and begun == [[6, 3], [6]]
    assert len([line for line in told if "step-00000008 not written" in line]) == 1
    assert store.complete_steps(run / "checkpoints") == [8, 6]


@pytest.mark.parametrize("keep", [1, 2])
def test_the_only_checkpoint_is_not_deleted_for_the_next(saves_each_step, tmp_path, keep):
    arguments = [*saves_each_step, "--checkpoint.keep", str(keep)]
    ((status, told, begun),) = run_ranks(1, on_a_disk_for, 1.9, True, arguments)
    assert status == 1 and begun == [[], *[[1]] * 5]
    assert store.complete_steps(tmp_path / "run" / "checkpoints") == [1]
    assert told[0] == "checkpoint step-00000002: 482.5 kB are free, it takes 536.1 kB"
    figures = "0.0 kB are free, it takes 536.1 kB"
    assert re.fullmatch(f"checkpoint step-00000002 not written: .*No space.*; {figures}", told[1])


def test_a_disk_that_is_too_small_is_told_at_the_start(config_file):
    def begin():
        Checkpointer._free = lambda self: int(2.5 * self.size)
        return stdout_of([str(config_file), "--train.steps", "1", "--no-export"])

    (told,) = run_ranks(1, begin)
    assert "checkpoint.keep = 3 takes 3 x 0.5 MB in " in told


@pytest.mark.parametrize(
    "keep, free, there, is_enough",
    [
        (3, 250, 0, False),
        (3, 300, 0, True),
        # the only one stays until the next is complete
        (1, 150, 0, False),
        (1, 200, 0, True),
        # those that are there make room for the next
        (3, 150, 2, True),
        (3, 150, 1, False),
    ],
)
def test_a_disk_holds_what_is_kept(tmp_path, monkeypatch, keep, free, there, is_enough):
    """The folder of checkpoints is made with the first."""

    def usage(path):
        assert path.is_dir()
        return SimpleNamespace(free=free)

    checkpoints = object.__new__(Checkpointer)
    checkpoints.root, checkpoints.size = tmp_path / "checkpoints", 100
    checkpoints.config = CheckpointSection(keep=keep)
    for step in range(there):
        folder = store.step_folder(checkpoints.root, step)
        folder.mkdir(parents=True)
        store.mark_complete(folder, {})
    monkeypatch.setattr(checkpoint.shutil, "disk_usage", usage)
    assert (checkpoints.shortage() is None) == is_enough


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_the_size_of_a_checkpoint_is_known_before_it_is_written(config_file, optimizer):
    def sizes():
        config = load_config(config_file, ["--optim.name", optimizer])
        trainer = loop.Trainer(config, start(config.parallel, "cpu"))
        tensors = tree_leaves(trainer.checkpoints._state())
        return trainer.checkpoints.size, sum(
            4 * x.numel() for x in tensors if isinstance(x, torch.Tensor) and x.ndim
        )

    for planned, written in run_ranks(2, sizes):
        assert planned == written > 0


STALE = OSError(errno.ESTALE, os.strerror(errno.ESTALE))


@pytest.mark.parametrize("world_size", [pytest.param(1, marks=pytest.mark.slow), 2])
@pytest.mark.parametrize("what", ["found", "removed", "discarded"])
def test_a_stale_folder_is_a_checkpoint_not_written(config_file, tmp_path, what, world_size):
    """Whatever rank 0 asks of the file system beside what it writes."""
    root = tmp_path / "run" / "checkpoints"

    def stale(method):
        def fails(path, *arguments):
            if path.name == "step-00000003":
                raise STALE
            return method(path, *arguments)

        return fails

    def run():
        if what == "found":
            Path.exists = stale(Path.exists)
        else:
            store.remove = stale(store.remove)
        if what == "discarded":
            Checkpointer._hash_mine = failing(Checkpointer._hash_mine)
        if what == "removed":
            # by now those of killed runs are gone
            left = root / "step-00000003"
            loop.Trainer.greet = lambda self: left.mkdir(parents=True, exist_ok=True)
        return logged([str(config_file), "--no-export"])

    def failing(method):
        return lambda self, folder, about: stale(lambda _: method(self, folder, about))(folder)

    results = run_ranks(world_size, run)
    assert [status for status, _ in results] == [0] * world_size
    for _, told in results:
        line = next(line for line in told if "not written" in line)
        assert line.startswith("checkpoint step-00000003 not written: rank 0: OSError: ")
        assert "Stale file handle" in line
    assert store.complete_steps(root) == [6]


def test_a_last_checkpoint_that_is_not_seen_is_no_success(config_file):
    def run():
        is_file = Path.is_file

        def fails(path):
            if path.name == "COMPLETE" and path.parent.name == "step-00000006":
                raise STALE
            return is_file(path)

        Path.is_file = fails
        return main([str(config_file), "--no-export"])

    assert run_ranks(2, run) == [1, 1]


def test_an_old_checkpoint_that_cannot_be_deleted_is_left(config_file, tmp_path):
    def refused():
        def refuse(folder):
            raise OSError(30, "Read-only file system")

        store.remove = refuse
        return main([str(config_file), "--no-export", "--checkpoint.keep", "1"])

    assert run_ranks(2, refused) == [0, 0]
    assert store.complete_steps(tmp_path / "run" / "checkpoints") == [6, 3]


def test_a_checkpoint_of_another_run_that_is_linked_stays_whole(tmp_path):
    """Where its turn to be deleted comes, the link goes alone."""
    theirs, link = tmp_path / "theirs", store.step_folder(tmp_path / "checkpoints", 3)
    theirs.mkdir()
    store.mark_complete(theirs, {})
    link.parent.mkdir()
    link.symlink_to(theirs)
    assert store.complete_steps(link.parent) == [3]
    store.remove(link)
    assert not link.is_symlink()
    assert (theirs / "COMPLETE").is_file()


def test_the_newest_checkpoints_are_kept_and_those_at_multiples(config_file, tmp_path):
    options = "--train.steps 7 --checkpoint.every 1 --checkpoint.keep 1 --checkpoint.keep-every 3"
    assert train(1, config_file, "--no-export", *options.split()) == [0]
    assert store.complete_steps(tmp_path / "run" / "checkpoints") == [7, 6, 3]


@pytest.mark.parametrize("file", ["progress.json", "COMPLETE"])
def test_a_last_checkpoint_that_is_not_written_is_no_success(copied, file):
    """It is tried again where the oldest can make room, and only then."""
    config, run = copied

    def disk_full_at_step_7():
        write, refused = store.write_atomic, []

        def refuse(path, text):
            if path.name == file and "step-00000007" in f"{path} {text}":
                refused.append(path)
                raise OSError(28, "No space left on device")
            write(path, text)

        store.write_atomic = refuse
        options = ["--out", str(run), "--train.steps", "7", "--checkpoint.keep", "2"]
        return main([str(config), *options]), len(refused)

    assert run_ranks(2, disk_full_at_step_7) == [(1, 2), (1, 0)]
    assert store.complete_steps(run / "checkpoints") == [6]
    assert not (run / "export").exists()


def test_a_place_that_cannot_be_prepared_is_a_checkpoint_not_written(tmp_path, monkeypatch):
    """Which matters where it is waited for, also after it was begun in the background."""
    checkpoints = object.__new__(Checkpointer)
    checkpoints.root, checkpoints.config = tmp_path, CheckpointSection()
    checkpoints._writer = checkpoints._last = None
    checkpoints.identity, checkpoints.settings = {}, {}
    monkeypatch.setattr(checkpoints, "_from_main", lambda compute: compute())
    monkeypatch.setattr(checkpoints, "_prepare", lambda folder: "Stale file handle")
    assert checkpoints.save(Progress(3), wait=False)
    assert not checkpoints.save(Progress(3), wait=True)
    assert not checkpoints.save(Progress(6), wait=True)


def test_a_folder_that_nodes_do_not_share_is_no_checkpoint(config_file, tmp_path):
    """Each rank writes on a disk of its own."""

    def alone():
        out = tmp_path / os.environ["RANK"]
        return logged([str(config_file), "--no-export", "--out", str(out)])

    (status, told), other = run_ranks(2, alone)
    assert (status, *other) == (1, 1, [])
    assert told == [
        f"checkpoint step-0000000{step} not written: rank 0 does not see the files of rank 1:"
        " out must be a folder that all nodes share"
        for step in (3, 6)
    ]
    assert not list(tmp_path.glob("*/checkpoints/*/COMPLETE"))


def test_a_checkpoint_that_is_deleted_in_part_does_not_count(tmp_path, monkeypatch):
    folder = store.step_folder(tmp_path, 3)
    folder.mkdir()
    store.mark_complete(folder, {})
    monkeypatch.setattr(store.shutil, "rmtree", lambda path, **_: None)
    store.remove(folder)
    assert folder.is_dir() and store.complete_steps(tmp_path) == []


def test_every_checkpoint_that_is_set_aside_is_kept(tmp_path):
    for end in ("damaged", "damaged2", "damaged3"):
        folder = store.step_folder(tmp_path, 3)
        folder.mkdir()
        (folder / "progress.json").write_text(end)
        moved = store.set_aside(folder, "damaged")
        assert moved.name == f"step-00000003.{end}" and not folder.exists()
        assert (moved / "progress.json").read_text() == end


def test_a_full_disk_costs_the_metrics_and_no_more(config_file, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "metrics.jsonl").symlink_to("/dev/full")
    assert train(1, config_file, "--no-export") == [0]
    assert store.complete_steps(tmp_path / "run" / "checkpoints") == [6, 3]


@pytest.mark.parametrize("where", ["a full disk", "a pipe that nobody reads"])
def test_what_cannot_be_shown_does_not_end_a_run(config_file, tmp_path, where):
    def mute():
        if where == "a full disk":
            write = os.open("/dev/full", os.O_WRONLY)
        else:
            read, write = os.pipe()
            os.close(read)
        sys.stdout = open(write, "w")
        return main([str(config_file), "--no-export"])

    assert run_ranks(1, mute) == [0]
    assert store.complete_steps(tmp_path / "run" / "checkpoints") == [6, 3]
    assert list(metrics(tmp_path / "run", "val_loss")) == [6]


def test_a_record_after_half_a_line_is_kept(copied):
    config, run = copied
    path = run / "metrics.jsonl"
    path.write_bytes(path.read_bytes()[:-9])
    assert train(1, config, "--out", run, "--no-export", "--checkpoint.resume", 3) == [0]
    assert path.read_bytes().count(b'{"step": 4, ') == 2
    assert sum(line.startswith('{"step": 4, ') for line in path.read_text().splitlines()) == 2


@pytest.mark.parametrize("step", [3, 6])
def test_an_evaluation_that_fails_costs_no_step(config_file, tmp_path, trained, step):
    """Of a run that saves and evaluates after the same ones, the last among them."""

    def failing():
        evaluate = Evaluator.__call__

        def fail(self, model, stop):
            if int(max(metrics(tmp_path / "run", "loss"))) == step:
                raise torch.OutOfMemoryError("of the held-out rows")
            return evaluate(self, model, stop)

        Evaluator.__call__ = fail
        with pytest.raises(torch.OutOfMemoryError):
            main([str(config_file), "--no-export", "--eval.every", "3"])
        return store.complete_steps(tmp_path / "run" / "checkpoints")

    assert run_ranks(1, failing) == [[*range(step, 0, -3)]]
    (tmp_path / "run" / "metrics.jsonl").unlink()
    assert train(1, config_file, "--no-export") == [0]
    expected = metrics(trained / "run", "loss")
    rest = {k: v for k, v in expected.items() if k > step}
    assert metrics(tmp_path / "run", "loss") == rest
    assert list(metrics(tmp_path / "run", "val_loss")) == [6]


def test_evaluation_leaves_no_trace_in_training(config_file, tmp_path, trained):
    assert train(1, config_file, "--no-export", "--eval.every", 1) == [0]
    assert metrics(tmp_path / "run", "loss") == metrics(trained / "run", "loss")
    assert len(metrics(tmp_path / "run", "val_loss")) == 6


@pytest.mark.parametrize("during", ["training", "evaluation"])
def test_sigterm_saves_at_that_step_and_the_rest_is_exact(during, config_file, tmp_path, trained):
    run = tmp_path / "run"

    def terminated_at_step_2():
        def send(method):
            def wrapped(self, *args, **kwargs):
                steps = self.progress.step if isinstance(self, loop.Trainer) else 1
                # one rank alone is told, as a scheduler may do
                if steps == 1 and os.environ["RANK"] == "1":
                    os.kill(os.getpid(), signal.SIGTERM)
                return method(self, *args, **kwargs)

            return wrapped

        if during == "training":
            loop.Trainer.step = send(loop.Trainer.step)
        else:
            Evaluator.__call__ = send(Evaluator.__call__)
        return main([str(config_file), "--no-export", "--eval.every", "2"])

    assert run_ranks(2, terminated_at_step_2) == [143, 143]
    assert store.complete_steps(run / "checkpoints") == [2]
    (run / "metrics.jsonl").unlink()
    assert train(1, config_file, "--no-export") == [0]
    expected, resumed = metrics(trained / "run", "loss"), metrics(run, "loss")
    assert sorted(resumed) == [3, 4, 5, 6]
    for step, loss in resumed.items():
        assert loss == pytest.approx(expected[step], rel=1e-5)


def test_a_run_terminated_in_its_last_evaluation_makes_it_up(config_file, tmp_path, trained):
    run = tmp_path / "run"

    def terminated():
        evaluate = Evaluator.__call__

        def interrupted(self, *args):
            if os.environ["RANK"] == "1":
                os.kill(os.getpid(), signal.SIGTERM)
            return evaluate(self, *args)

        Evaluator.__call__ = interrupted
        return main([str(config_file), "--no-export"])

    # in the evaluation after the last step, and again in that of the restart
    for _ in range(2):
        assert run_ranks(2, terminated) == [143, 143]
        assert store.complete_steps(run / "checkpoints") == [6, 3]
        assert metrics(run, "val_loss") == {}
    for _ in range(2):
        assert train(2, config_file, "--no-export") == [0, 0]
        assert (run / "metrics.jsonl").read_text().count("val_loss") == 1
    expected = metrics(trained / "run", "val_loss")
    assert metrics(run, "val_loss") == pytest.approx(expected, rel=1e-5)


def signal_in_step_2(number, times, config):
    """A run in which the last rank is sent a signal in its second step."""
    step = loop.Trainer.step

    def interrupted(self):
        if self.progress.step == 1 and self.ranks.rank == self.ranks.world_size - 1:
            for _ in range(times):
                os.kill(os.getpid(), number)
        return step(self)

    loop.Trainer.step = interrupted
    return main([str(config), "--no-export"])


def test_sigusr1_saves_and_training_goes_on(config_file, tmp_path, trained):
    assert run_ranks(2, signal_in_step_2, signal.SIGUSR1, 1, config_file) == [0, 0]
    assert store.complete_steps(tmp_path / "run" / "checkpoints") == [6, 3, 2]
    loss, expected = metrics(tmp_path / "run", "loss"), metrics(trained / "run", "loss")
    for step in expected:
        assert loss[step] == pytest.approx(expected[step], rel=1e-5)


def sigusr1_in_batches(count, *arguments):
    """A run in which the last rank is sent SIGUSR1 in so many batches of the evaluation after its
    second step; gives its status, and which steps had checkpoints when each batch of it began."""
    nats, seen = Evaluator._nats, []

    def asked(self, model, batch):
        if os.environ["RANK"] == "1" and len(seen) < count:
            os.kill(os.getpid(), signal.SIGUSR1)
        seen.append(store.complete_steps(Path(arguments[-1]) / "checkpoints"))
        return nats(self, model, batch)

    Evaluator._nats = asked
    return main([*arguments[:-1], "--no-export", "--eval.every", "2", "--out", arguments[-1]]), seen


def test_sigusr1_in_an_evaluation_saves_within_it(config_file, tmp_path):
    """What one at the boundary of its step has, to the bit; and the evaluation changes nothing."""
    asked, undisturbed = tmp_path / "asked", tmp_path / "undisturbed"
    options = [str(config_file), "--checkpoint.every"]
    results = run_ranks(2, sigusr1_in_batches, 1, *options, "100", str(asked))
    expected = run_ranks(2, sigusr1_in_batches, 0, *options, "2", str(undisturbed))
    assert [status for status, _ in results + expected] == [0] * 4
    (_, seen), (_, seen_undisturbed) = results[0], expected[0]
    assert len(seen) == len(seen_undisturbed) >= 3 * 2
    # before the second batch of the first evaluation
    assert seen[:2] == [[], [2]] and seen_undisturbed[:2] == [[2], [2]]
    for key in ("loss", "val_loss"):
        assert metrics(asked, key) == metrics(undisturbed, key)
    first, second = (
        run_folder.recorded_checksums(store.step_folder(run / "checkpoints", 2))
        for run in (asked, undisturbed)
    )
    # names the save itself
    del first[".metadata"], second[".metadata"]
    assert first == second and len(first) == 3
    resumed = ["--no-export", "--out", asked, "--checkpoint.resume", 2]
    losses = metrics(asked, "loss")
    (asked / "metrics.jsonl").unlink()
    assert train(2, config_file, *resumed) == [0, 0]
    assert metrics(asked, "loss") == {step: losses[step] for step in (3, 4, 5, 6)}


@pytest.mark.parametrize("option", ["--checkpoint.async-save", "--checkpoint.no-async-save"])
def test_a_step_is_saved_once(config_file, tmp_path, option):
    """Asked for twice in one evaluation; due before others."""

    def saves():
        write, written = Checkpointer._write, []

        def counted(self, folder, *arguments):
            written.append(folder.name)
            return write(self, folder, *arguments)

        Checkpointer._write = counted
        options = ("--checkpoint.every", "4", option, str(tmp_path / "run"))
        return sigusr1_in_batches(2, str(config_file), *options)[0], written

    once = [f"step-0000000{step}" for step in (2, 4, 6)]
    assert run_ranks(2, saves) == [(0, once)] * 2


def test_sigusr1_in_an_evaluation_that_is_made_up_leaves_the_checkpoint(copied):
    """It is there; to write it again would delete it first."""
    config, run = copied
    kept = run / "checkpoints" / "step-00000006"
    lines = (run / "metrics.jsonl").read_text().splitlines()
    (run / "metrics.jsonl").write_text("\n".join(x for x in lines if "val_loss" not in x) + "\n")
    before = (kept / "COMPLETE").stat().st_mtime_ns
    results = run_ranks(2, sigusr1_in_batches, 1, str(config), str(run))
    assert [status for status, _ in results] == [0, 0] and len(results[0][1]) >= 2
    assert (kept / "COMPLETE").stat().st_mtime_ns == before


def test_sigusr1_during_an_exchange_is_for_the_next(monkeypatch):
    def exchange(values):
        signals_of_run.save = True
        return values

    signals_of_run = signals.Signals()
    monkeypatch.setattr(loop.parallel, "reduce_sum", exchange)
    asked = [loop.Trainer.asked(None, signals_of_run) for _ in range(2)]
    assert asked == [(False, False), (False, True)]


def test_a_terminal_that_closes_ends_a_run_as_sigterm_does(config_file, tmp_path):
    """But one that was started under nohup."""

    def started(handler):
        # as the tests themselves may be
        signal.signal(signal.SIGHUP, handler)
        return signal_in_step_2(signal.SIGHUP, 1, config_file)

    assert run_ranks(2, started, signal.SIG_DFL) == [143, 143]
    assert store.complete_steps(tmp_path / "run" / "checkpoints") == [2]
    (tmp_path / "run").rename(tmp_path / "first")
    assert run_ranks(1, started, signal.SIG_IGN) == [0]
    assert store.complete_steps(tmp_path / "run" / "checkpoints") == [6, 3]


def test_sigterm_sent_twice_at_once_saves_all_the_same(config_file, tmp_path):
    """By the scheduler to every process, and by the launcher that passes it on."""
    assert run_ranks(1, signal_in_step_2, signal.SIGTERM, 2, config_file) == [143]
    assert store.complete_steps(tmp_path / "run" / "checkpoints") == [2]


def test_second_sigterm_ends_at_once(config_file, tmp_path, monkeypatch):
    monkeypatch.setattr(signals, "TOGETHER_S", 0.0)
    with pytest.raises(AssertionError, match="died with 143"):
        run_ranks(1, signal_in_step_2, signal.SIGTERM, 2, config_file)
    assert store.complete_steps(tmp_path / "run" / "checkpoints") == []
    assert sorted(metrics(tmp_path / "run", "loss")) == [1]


def test_signals_mean_after_a_run_what_they_meant_before_it():
    """Otherwise none would end the export that follows."""

    def meanings():
        return [signal.getsignal(x) for x in (signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP)]

    before, woken = meanings(), signal.set_wakeup_fd(-1)
    with signals.Signals():
        assert signal.getsignal(signal.SIGTERM) != before[0]
    assert meanings() == before and signal.set_wakeup_fd(woken) == -1


def test_sigusr1_ends_no_process_that_a_run_has_started(tmp_path, monkeypatch):
    """Slurm sends it to all of a job: also to those that compile for a GPU, for whose answer a run
    would wait forever, and to that of a tracker."""
    children = []

    def begin(**named):
        children.append(subprocess.Popen(["sleep", "60"]))
        return SimpleNamespace(id="first", define_metric=lambda *names, **options: None)

    monkeypatch.setattr(async_compile, "maybe_warm_pool", begin)
    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=begin))
    with signals.Signals():
        parallel.compile_blocks([], torch.device("cuda"))
        run_metrics._wandb(tmp_path)
        begin()
    for child in children:
        child.send_signal(signal.SIGUSR1)
        child.terminate()
    ended = [-signal.SIGTERM, -signal.SIGTERM, -signal.SIGUSR1]
    assert [child.wait(30) for child in children] == ended


def test_second_sigterm_ends_a_rank_that_waits_for_another():
    """Python calls no handler while the main thread is in a collective."""

    def rank():
        signals.TOGETHER_S = 0.2
        torch.distributed.init_process_group("gloo")
        if os.environ["RANK"] == "1":
            time.sleep(4)
            return
        with signals.Signals():
            own = os.getpid()
            for delay in (0.2, 1.0):
                threading.Timer(delay, os.kill, (own, signal.SIGTERM)).start()
            torch.distributed.barrier()

    with pytest.raises(AssertionError, match="rank 0: died with 143"):
        run_ranks(2, rank, timeout=8)


def test_rank_0_keeps_the_store_until_every_rank_has_reached_it(monkeypatch):
    """It ends at once where its data are damaged."""
    store = torch.distributed.distributed_c10d._get_default_store

    def late():
        if os.environ["RANK"] == "1":
            time.sleep(1)
        return store()

    def rank():
        torch.distributed.init_process_group("gloo")
        monkeypatch.setattr(torch.distributed.distributed_c10d, "_get_default_store", late)
        Watchdog(int(os.environ["RANK"]), 2, timeout_s=60.0, save_s=60.0).start()

    assert run_ranks(2, rank, timeout=20) == [None, None]


def test_beats_are_told_while_the_store_is_waited_for():
    """A new group of ranks is made by waiting for it."""

    def rank():
        torch.distributed.init_process_group("gloo")
        watchdog = Watchdog(0, 2, timeout_s=60.0, save_s=60.0)
        watchdog.start()
        store = torch.distributed.distributed_c10d._get_default_store()
        store.set_timeout(timedelta(seconds=6))
        threading.Thread(target=store.get, args=("never",), daemon=True).start()
        time.sleep(0.5)
        began = time.monotonic()
        watchdog._store.set("beat/0", "1")
        return time.monotonic() - began

    assert run_ranks(1, rank)[0] < 2


def test_a_run_of_wandb_goes_on_where_it_was(tmp_path, monkeypatch):
    asked, sent = [], []

    def init(**named):
        asked.append(named["id"])

        def define_metric(*names, **options):
            asked.append((names, options))

        name = named["id"] or "first"
        return SimpleNamespace(id=name, log=sent.append, define_metric=define_metric)

    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=init))
    for step in (7, 3):
        run_metrics._wandb(tmp_path)(step, {"loss": 1.0})
    by_step = (("*",), {"step_metric": "step"})
    assert asked == [None, by_step, "first", by_step]
    # without a step of W&B's own, which may only grow
    assert sent == [{"loss": 1.0, "step": 7}, {"loss": 1.0, "step": 3}]


def test_a_tracker_that_fails_does_not_end_a_run(config_file, tmp_path, monkeypatch, caplog):
    """Whatever it raises, told once; the records of the run itself go on."""

    def fail(values):
        raise RuntimeError("the service has died")

    def init(**named):
        return SimpleNamespace(id="first", log=fail, define_metric=lambda *_, **__: None)

    def tracked():
        status = main([str(config_file), "--no-export", "--log.wandb"])
        return status, [line for line in caplog.messages if "service" in line]

    module = SimpleNamespace(init=init, __spec__=SimpleNamespace())
    monkeypatch.setitem(sys.modules, "wandb", module)
    assert run_ranks(1, tracked) == [(0, ["wandb: not written: the service has died"])]
    assert len(metrics(tmp_path / "run", "loss")) == 6


def test_events_of_a_branch_that_was_left_are_purged(tmp_path, monkeypatch):
    made = []
    events = SimpleNamespace(SummaryWriter=lambda *a, **b: made.append((a, b)))
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", events)
    run_metrics._tensorboard(tmp_path, 7)
    assert made == [((str(tmp_path / "tensorboard"),), {"purge_step": 8})]


@pytest.mark.slow
def test_rank_that_hangs_is_reported_by_name(config_file, tmp_path, capfd):
    def one_rank_stands_still():
        batch = TrainData.batch

        def stuck(self, first):
            if os.environ["RANK"] == "1" and first >= 8:
                time.sleep(60)
            return batch(self, first)

        TrainData.batch = stuck
        return main([str(config_file), "--no-export", "--parallel.timeout-s", "5"])

    began = time.monotonic()
    with pytest.raises(AssertionError, match="died with 1"):
        run_ranks(2, one_rank_stands_still)
    assert time.monotonic() - began < 45
    reports = [line for line in capfd.readouterr().err.splitlines() if "no progress" in line]
    assert any("behind the others: rank 1 (" in line for line in reports), reports
    assert any("at: loading data of step 3" in line for line in reports), reports


def test_a_rank_that_hangs_ends_though_rank_0_has_ended(monkeypatch, capsys):
    """Rank 0 keeps the store of the beats."""

    class Gone:
        def fail(self, *args):
            raise torch.distributed.DistNetworkError("connection reset by peer")

        set = check = get = fail

    watchdog = Watchdog(1, 2, timeout_s=0.1, save_s=60.0)
    watchdog._store = Gone()
    watchdog.beat("loading data of step 3")
    monkeypatch.setattr(os, "_exit", sys.exit)
    with pytest.raises(SystemExit, match="1"):
        watchdog._watch()
    assert "at: loading data of step 3; the beats of the others" in capsys.readouterr().err


def test_the_rank_with_the_fewest_beats_is_blamed():
    """One that has not told of any has none."""
    watchdog, beats = Watchdog(0, 3, timeout_s=60.0, save_s=60.0), {}
    watchdog._store = SimpleNamespace(check=lambda keys: keys[0] in beats, get=beats.get)
    for rank, count in enumerate((12, 9, 9)):
        beats[f"beat/{rank}"] = f"{count}\nrank {rank} (n, pid 7)\nstep {count}".encode()
    both = "rank 1 (n, pid 7) at: step 9; rank 2 (n, pid 7) at: step 9"
    assert watchdog._blame() == f"behind the others: {both}"
    beats["beat/0"] = beats["beat/1"]
    assert watchdog._blame().startswith("none is behind: ")
    del beats["beat/2"]
    assert watchdog._blame() == "behind the others: rank 2 at: start"


def test_a_save_that_fails_ends_its_longer_limit_too():
    watchdog = Watchdog(0, 1, timeout_s=5.0, save_s=60.0)
    with pytest.raises(InputError), watchdog.paused("saving step 3"):
        assert watchdog._limit == 60.0
        raise InputError("no")
    assert watchdog._limit == 5.0 and watchdog._where == "after saving step 3"


@pytest.mark.parametrize(
    "slow", ["open_inputs", pytest.param("verify_share", marks=pytest.mark.slow)]
)
def test_a_slow_disk_at_the_start_is_no_hang(config_file, monkeypatch, slow):
    """The ranks wait longer than in training, where limits are a twentieth here."""
    work = getattr(loop, slow)

    def slowly(*args):
        if os.environ["RANK"] == "1":
            time.sleep(8)
        return work(*args)

    monkeypatch.setattr(loop, slow, slowly)
    monkeypatch.setattr(parallel, "timedelta", lambda **given: timedelta(**given) / 20)
    options = ("--parallel.timeout-s", 30, "--train.steps", 1, "--no-export")
    assert train(2, config_file, *options) == [0, 0]


def test_a_slow_disk_is_no_hang(config_file, tmp_path):
    """Saving and rolling back may take longer than the watchdog waits."""
    late = [0]

    def slow(name):
        method = getattr(Checkpointer, name)

        def slowly(self, *args):
            late[0] += 60
            # the watchdog looks every two seconds
            time.sleep(2.5)
            return method(self, *args)

        setattr(Checkpointer, name, slowly)

    def saves_and_rolls_back():
        # by its own clock: a limit of a second would be reached on a busy machine, too
        clock = {"monotonic": lambda: time.monotonic() + late[0], "sleep": time.sleep}
        watchdog.time = SimpleNamespace(**clock)
        slow("_write")
        slow("_load")
        options = ("--parallel.timeout-s", "8", "--train.micro-batch", "1")
        return spike_in_step(5, str(config_file), *options)

    assert run_ranks(2, saves_and_rolls_back) == [0, 0]
    rows = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    steps = [row["step"] for row in map(json.loads, rows) if "bad" in row]
    assert steps == [1, 2, 3, 4, 5, 4, 5, 6]


def test_a_save_without_end_ends_the_run(config_file, tmp_path):
    def stuck():
        def for_ever(self, *args):
            time.sleep(60)

        if os.environ["RANK"] == "1":
            Checkpointer._hash_mine = for_ever
        return main([str(config_file), "--no-export", "--checkpoint.timeout-s", "2"])

    with pytest.raises(AssertionError, match="rank 0: died with 1"):
        run_ranks(2, stuck)
    assert store.complete_steps(tmp_path / "run" / "checkpoints") == []


def nan_in_steps(bad, config, *options):
    """A run in which the gradients of the last rank are NaN in some steps."""
    forward, step = RodimusForCausalLM.forward, loop.Trainer.step
    now = {}

    def remember_the_step(self):
        now["poisoned"] = self.progress.step + 1 in bad and os.environ["RANK"] == "1"
        return step(self)

    def poisoned(self, *args, **kwargs):
        out = forward(self, *args, **kwargs)
        if now["poisoned"]:
            out.loss = out.loss * float("nan")
        return out

    loop.Trainer.step, RodimusForCausalLM.forward = remember_the_step, poisoned
    return main([str(config), "--no-export", *options])


def test_nan_on_one_rank_makes_all_ranks_skip_that_step(config_file, tmp_path):
    assert run_ranks(2, nan_in_steps, {2, 4}, config_file) == [0, 0]
    assert metrics(tmp_path / "run", "bad") == {1: 0, 2: 1, 3: 0, 4: 1, 5: 0, 6: 0}
    loss = metrics(tmp_path / "run", "loss")
    assert loss[6] < loss[1]
    assert "NaN" not in (tmp_path / "run" / "metrics.jsonl").read_text()


def test_a_save_before_the_first_update_leaves_no_trace(config_file, tmp_path):
    """The optimizer has no state yet, and torch makes one."""
    losses = []
    for every in ("1", "100"):
        options = ("--checkpoint.every", every, "--out", str(tmp_path / every))
        assert run_ranks(2, nan_in_steps, {1}, config_file, *options) == [0, 0]
        losses.append(metrics(tmp_path / every, "loss"))
    del losses[0][1], losses[1][1]
    assert losses[0] == losses[1]


@pytest.mark.parametrize("most", [2, 3])
def test_so_many_bad_steps_in_a_row_stop_every_rank(config_file, tmp_path, most):
    options = ("--guard.max-bad-steps", str(most)) if most != 3 else ()
    assert run_ranks(2, nan_in_steps, {2, 3, 4, 5}, config_file, *options) == [1, 1]
    bad = metrics(tmp_path / "run", "bad")
    assert bad == {1: 0.0} | dict.fromkeys(range(2, most + 2), 1.0)


def spike_in_step(step, *arguments, every=1000):
    """Train with a loss of 50 more in one step, and every so many after it, to be rolled back."""
    guard._WARMUP = 2
    forward, seen = RodimusForCausalLM.forward, []

    def spiking(self, *args, **kwargs):
        out = forward(self, *args, **kwargs)
        seen.append(1)
        # two micro-steps a step
        if len(seen) >= 2 * step and (len(seen) - 2 * step) % (2 * every) == 0:
            out.cross_entropy = out.cross_entropy + 50
        return out

    RodimusForCausalLM.forward = spiking
    return main([*arguments, "--no-export", "--guard.on-spike", "rollback"])


def test_spike_rolls_back_and_goes_round_the_data(config_file, tmp_path):
    assert run_ranks(1, spike_in_step, 5, str(config_file)) == [0]
    last = tmp_path / "run" / "checkpoints" / "step-00000006" / "progress.json"
    progress = json.loads(last.read_text())["progress"]
    # steps 4 and 5 were trained twice, the second time on rows that had not been read
    assert progress["step"] == 6
    assert progress["next_sample"] == (6 + 2) * 4
    rows = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    bad = [(r["step"], r["bad"]) for r in map(json.loads, rows) if "bad" in r]
    assert bad == [(1, 0), (2, 0), (3, 0), (4, 0), (5, 1), (4, 0), (5, 0), (6, 0)]


@pytest.fixture
def trainer():
    """One after its fifth step, with all that it calls written down in ``done``."""
    trainer, done = object.__new__(loop.Trainer), []
    trainer.done, trainer.model, trainer.returns = done, None, Counter()
    trainer.config = SimpleNamespace(guard=GuardSection(on_spike="rollback"))
    trainer.progress = Progress(step=5, next_sample=20, tokens=640)
    trainer.watchdog = SimpleNamespace(
        start=lambda: None, paused=lambda where: contextlib.nullcontext()
    )
    trainer.meter = SimpleNamespace(reset=lambda step: done.append(("throughput", step)))
    trainer.log = SimpleNamespace(say=lambda line: None, record=lambda step, **values: None)
    return trainer


def test_a_rollback_waits_for_what_is_written_and_unlearns(trainer):
    """All but how many steps in a row were bad, which goes on."""
    learned = {"mean": 2.0, "variance": 0.1, "good": 60, "bad_in_a_row": 0}
    restored = Progress(step=3, next_sample=12, tokens=384, guard=learned)
    trainer.checkpoints = SimpleNamespace(
        wait=lambda: trainer.done.append("written"),
        restore_newest=lambda: trainer.done.append("read") or restored,
    )
    trainer.guard = guard.Guard(trainer.config.guard, learned | {"good": 62, "bad_in_a_row": 2})
    assert trainer.roll_back()
    assert trainer.done == ["written", "read", ("throughput", 3)]
    assert trainer.progress == Progress(step=3, next_sample=20, tokens=384, guard=learned)
    assert trainer.guard.state() == learned | {"bad_in_a_row": 2}


@pytest.mark.parametrize("is_written, status", [(True, 143), (False, loop.NOT_SAVED)])
def test_a_run_that_is_told_to_end_waits_for_its_checkpoint(trainer, is_written, status):
    sections = {"log": LogSection(), "checkpoint": CheckpointSection(), "eval": EvalSection()}
    trainer.config = SimpleNamespace(train=TrainSection(steps=9), **sections)
    trainer.asked_to_save, trainer.verdict = False, guard.OK
    trainer.greet = trainer.lacks_evaluation = lambda: False

    def step():
        trainer.progress.step += 1
        trainer.asked_to_end = True
        return {}

    def save(wait):
        trainer.done.append((trainer.progress.step, wait))
        return is_written

    trainer.step, trainer.save = step, save
    assert trainer.run(signals.Signals()) == status
    assert trainer.done == [("throughput", 5), (6, True)]


def test_throughput_leaves_out_the_evaluation(trainer):
    trainer.evaluate = lambda model, stop: Evaluation(2.0, 1.0, 10)
    trainer.held_out(signals.Signals())
    assert trainer.done == [("throughput", 5)]


def test_sigusr1_in_a_step_that_is_rolled_back_is_for_the_next(config_file, tmp_path):
    def asked_in_the_spike():
        step = loop.Trainer.step

        def interrupted(self):
            if self.progress.step == 4 and not self.returns:
                os.kill(os.getpid(), signal.SIGUSR1)
            return step(self)

        loop.Trainer.step = interrupted
        return spike_in_step(5, str(config_file))

    assert run_ranks(1, asked_in_the_spike) == [0]
    assert store.complete_steps(tmp_path / "run" / "checkpoints") == [6, 4, 3]


def test_rolling_back_to_one_checkpoint_ends(config_file, tmp_path):
    """With a good step before every spike, so that none follows another."""

    def spikes_without_end():
        return spike_in_step(5, str(config_file), every=2)

    assert run_ranks(1, spikes_without_end) == [1]
    rows = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    bad = [(r["step"], r["bad"]) for r in map(json.loads, rows) if "bad" in r]
    assert bad[3:] == 3 * [(4, 0), (5, 1)]


def test_spike_without_a_checkpoint_skips_the_update_and_nothing_else(config_file, tmp_path):
    """The last step, whose checkpoint is the only one, must still be saved."""
    arguments = (str(config_file), "--checkpoint.every", "100")
    assert run_ranks(1, spike_in_step, 6, *arguments) == [0]
    assert metrics(tmp_path / "run", "bad")[6] == 1
    checkpoints = tmp_path / "run" / "checkpoints"
    assert [x.parent.name for x in checkpoints.glob("*/COMPLETE")] == ["step-00000006"]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["--checkpoint.resume", "5"], "no checkpoint of step 5 in"),
        (["--checkpoint.resume", "never"], "checkpoint.resume = never, but"),
        (["--train.micro-batch", "3"], "do not divide by 1 ranks x train.micro_batch 3"),
        (["--data.seq-len", "65536", "--train.global-batch-tokens", "131072"], "needs a shard of"),
        (["--model.config", "none.json"], "none.json: No such file"),
        (["--data.train", "none.json"], f"no token shards at {Path('none.json').absolute()}"),
        (["--out", "/dev/null/run"], "cannot create the folder of the run, /dev/null/run: Not"),
        (["--log.wandb"], "log.wandb needs wandb: pip install wandb"),
        (["--optim.lrr", "1"], "did you mean --optim.lr?"),
        (["--optim.lr", "inf"], "optim.lr must be finite, got inf"),
        (["--parallel.timeout-s", "inf"], "parallel.timeout_s must lie in [1, 1e+09], got inf"),
    ],
)
def test_wrong_input_is_one_line_and_status_2(copied, overrides, message, monkeypatch):
    config, run = copied
    monkeypatch.setitem(sys.modules, "wandb", None)
    ((status, error),) = run_ranks(1, stderr_of, [str(config), "--out", str(run), *overrides])
    assert status == 2
    assert message in error
    assert error.count("\n") == 1


def test_a_run_is_not_written_among_its_data(config_file, packed, tmp_path):
    """Both have a tokenizer, and what is found in the folder would be taken for a run."""
    out = shutil.copytree(packed, tmp_path / "data")
    before = sorted(out.rglob("*"))
    arguments = [str(config_file), "--data.train", str(out / "train.json"), "--out", str(out)]
    ((status, error),) = run_ranks(1, stderr_of, arguments)
    assert status == 2
    assert f"out is the folder of {out / 'train.json'}: a run needs one of its own" in error
    assert sorted(out.rglob("*")) == before


@pytest.mark.parametrize("wrong", [["--log.wandb"], ["--data.train", "none.json"]], ids=" ".join)
def test_a_run_that_does_not_start_leaves_no_folder(config_file, tmp_path, monkeypatch, wrong):
    """But one that was there is left."""
    monkeypatch.setitem(sys.modules, "wandb", None)
    run = tmp_path / "run"
    assert train(2, config_file, *wrong) == [2, 2]
    assert not run.exists()
    run.mkdir()
    assert train(1, config_file, *wrong) == [2]
    assert run.is_dir()


def test_what_one_rank_alone_cannot_read_ends_every_rank(config_file):
    """A file that one machine has not."""

    def missing_on_rank_1():
        read = loop.read_model_config

        def fail(*args):
            if os.environ["RANK"] == "1":
                raise InputError("no model.json here")
            return read(*args)

        loop.read_model_config = fail
        return stderr_of([str(config_file), "--no-export"])

    results = run_ranks(2, missing_on_rank_1)
    assert results == [(2, "rodimus train: error: no model.json here\n"), (2, "")]


def test_what_is_held_out_is_not_trained_on(config_file, packed):
    """A glob may name both."""
    data = str(packed / "*.json")
    ((status, error),) = run_ranks(1, stderr_of, [str(config_file), "--data.train", data])
    assert status == 2 and "val.json is named by data.train and by data.val" in error


def test_what_is_held_out_has_the_tokens_of_the_training_data(config_file, tmp_path):
    (tmp_path / "text.jsonl").write_text('{"text": "these are"}\n{"text": "other tokens"}\n')
    other = tmp_path / "other" / "train.json"
    pack(str(tmp_path / "text.jsonl"), other.parent, vocab_size=300, val_fraction=0)
    ((status, error),) = run_ranks(1, stderr_of, [str(config_file), "--data.val", str(other)])
    assert status == 2 and f"{other} must have " in error and error.count("\n") == 1


def test_damaged_shard_is_told_once_and_ends_every_rank(config_file, packed, tmp_path):
    """Either rank may be the one that checks the damaged file."""
    shutil.copytree(packed, tmp_path / "data")
    for name in ("train-00000.bin", "train-00000.idx"):
        flip_a_bit(tmp_path / "data" / name)
        data = str(tmp_path / "data" / "train.json")
        results = run_ranks(2, stderr_of, [str(config_file), "--data.train", data])
        assert [status for status, _ in results] == [2, 2]
        told = "".join(error for _, error in results)
        assert told.count(f"{name} is damaged: sha256 must be") == told.count("\n") == 1
        shutil.copy(packed / name, tmp_path / "data" / name)


def test_bad_data_of_one_rank_names_rank_file_and_offset(
    config_file, packed, tmp_path, monkeypatch
):
    """Not verified at the start, so found when it is read."""
    shutil.copytree(packed, tmp_path / "data")
    file = tmp_path / "data" / "train-00000.bin"
    file.write_bytes(b"\xff" * file.stat().st_size)
    options = ["--data.train", str(tmp_path / "data" / "train.json"), "--data.no-verify"]
    monkeypatch.setenv("RODIMUS_STATUS_FILE", str(tmp_path / "status"))
    results = run_ranks(2, stderr_of, [str(config_file), *options])
    for rank, (status, error) in enumerate(results):
        assert status == 2
        message = rf"rodimus train: error: rank {rank}: .*train-00000.bin: id 65535 at byte \d+"
        assert re.match(message, error)
    assert (tmp_path / "status").read_text() == "2\n"


def test_a_run_whose_settings_cannot_be_kept_ends_every_rank(config_file, tmp_path):
    """A folder stands in the way, or a byte of the command line is no UTF-8."""
    (tmp_path / "run" / "model.json").mkdir(parents=True)
    for options in ([], ["--out", f"{tmp_path}/other", "--eval.sample-prompt", "\udcff"]):
        results = run_ranks(2, stderr_of, [str(config_file), "--no-export", *options])
        assert [status for status, _ in results] == [2, 2]
        assert "cannot write the settings of the run to" in results[0][1]


@pytest.mark.parametrize("name", ["", "checkpoints", "metrics.jsonl"])
def test_what_a_run_cannot_write_to_is_named_at_its_start(tmp_path, monkeypatch, name):
    """Such as what a container's root has left."""
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "metrics.jsonl").touch()
    loop.make_folder(tmp_path)
    theirs = tmp_path / name
    monkeypatch.setattr(loop.os, "access", lambda path, mode: path != theirs)
    with pytest.raises(InputError, match=f"needs to write to {re.escape(str(theirs))}, and cannot"):
        loop.make_folder(tmp_path)


@pytest.mark.parametrize("world_size", [1, 2])
def test_a_second_run_into_a_folder_is_refused_until_the_first_has_ended(copied, world_size):
    """Killed or done; what the first one has is left alone."""
    config, run = copied
    unfinished = run / "checkpoints" / "step-00000009"
    unfinished.mkdir()
    again = [str(config), "--out", str(run), "--no-export"]
    context = multiprocessing.get_context("fork")
    holds = context.Event()
    first = context.Process(target=_hold, args=(run, holds))
    first.start()
    try:
        assert holds.wait(60)
        results = run_ranks(world_size, stderr_of, again)
        told = f"rodimus train: error: another process is at work in {run}: wait for its end\n"
        assert results == [(2, told)] + [(2, "")] * (world_size - 1)
        assert unfinished.is_dir()
    finally:
        first.kill()
        first.join()
    assert train(world_size, config, "--out", run, "--no-export") == [0] * world_size
    assert not unfinished.exists()


def _hold(run, holds):
    with store.alone(run):
        holds.set()
        time.sleep(600)


def test_checkpoint_of_another_model_is_refused(copied, tmp_path):
    config, run = copied
    other = (config.parent / "model.json").read_text().replace('"mem_size": 8', '"mem_size": 16')
    (tmp_path / "other.json").write_text(other)

    def attempt():
        overrides = ["--out", str(run), "--model.config", str(tmp_path / "other.json")]
        settings = load_config(config, overrides)
        try:
            loop.Trainer(settings, start(settings.parallel, "cpu"))
        except InputError as error:
            return str(error)

    (message,) = run_ranks(1, attempt)
    assert "is of another model: mixer_cfg must be" in message


def identity(tokenizer, **changes):
    source = SimpleNamespace(manifest=SimpleNamespace(tokenizer_sha256=tokenizer))
    return loop.identity_of(RodimusConfig(**MODEL | changes), source)


def test_checkpoint_of_another_tokenizer_is_refused():
    with pytest.raises(InputError, match="another model: tokenizer_sha256 must be 'a', got 'b'"):
        check_identity(identity("b"), identity("a"), Path("step"))


def test_fields_of_another_transformers_do_not_make_another_model():
    """One that it has more, and one that it has no longer."""
    for width in (32, 64):
        saved = identity("a", d_model=width) | {"field_of_old_times": True}
        del saved["chunk_size_feed_forward"]
        with pytest.raises(InputError) if width == 64 else contextlib.nullcontext() as error:
            check_identity(saved, identity("a"), Path("step"))
    assert "d_model must be 32, got 64" in str(error.value)


def test_another_optimizer_is_refused_and_other_settings_are_told(copied):
    config, run = copied
    again = [str(config), "--out", str(run), "--no-export"]
    ((status, told),) = run_ranks(1, stderr_of, [*again, "--optim.name", "muon"])
    assert status == 2 and told.count("\n") == 1
    assert "was written with the optimizer adamw, this run has muon" in told
    changes = ["--optim.lr", "0.25", "--train.seed", "5", "--train.steps", "7"]
    changes += ["--train.dtype", "bfloat16", "--guard.on-spike", "stop"]
    (told,) = run_ranks(1, warnings_of, [*again, *changes])
    assert told == [
        "resumed with guard.on_spike = stop, was skip",
        "resumed with optim.lr = 0.25, was 0.01",
        "resumed with train.dtype = bfloat16, was float32",
        "resumed with train.seed = 5, was 0",
        "resumed with train.steps = 7, was 6",
        "rows come in another order now: some are read again, others never",
        "the learning rate is at 100% of its peak again, after it had come down to 0%: to extend a"
        " run, resume from before its decay (checkpoint.resume = STEP)",
    ]


def test_other_settings_of_the_optimizer_are_applied(copied):
    config, run = copied

    def groups(*overrides):
        settings = load_config(config, ["--out", str(run), *overrides])
        trainer = loop.Trainer(settings, start(settings.parallel, "cpu"))
        moments = [float(s["exp_avg"].norm()) for s in trainer.optimizers[0].state.values()]
        found = [(g["weight_decay"], g["betas"]) for g in trainer.optimizers[0].param_groups]
        trainer.close()
        return found, any(moments)

    changes = ("--optim.weight-decay", "0.5", "--optim.betas", "0.8", "0.9")
    ((found, has_moments),) = run_ranks(1, groups, *changes)
    assert found == [(0.5, (0.8, 0.9)), (0.0, (0.8, 0.9))] and has_moments


def test_a_checkpoint_that_tells_no_settings_is_resumed():
    assert changed_settings({}, {"optim.name": "muon", "optim.lr": 1.0}, Path("step")) == []


@pytest.mark.parametrize("step, steps, told", [(6, 6, 0), (3, 12, 0), (6, 12, 1)])
def test_a_rate_that_rises_after_its_decay_is_told(step, steps, told):
    """Not where the checkpoint does not tell what the rate was."""
    saved = {f"schedule.{k}": v for k, v in vars(ScheduleSection(warmup_steps=2)).items()}
    saved |= {"train.steps": 6, "train.tokens": 0, "train.global_batch_tokens": 128}
    current, progress = saved | {"train.steps": steps}, Progress(step, tokens=128 * step)
    messages = risen_rate(saved, current, progress)
    assert sum("of its peak again" in message for message in messages) == told
    assert risen_rate({}, current, progress) == []


def test_a_finished_run_says_that_nothing_is_left(copied):
    config, run = copied
    (out,) = run_ranks(1, stdout_of, [str(config), "--out", str(run), "--no-export"])
    assert "nothing is left to train: the run has 6 steps" in out


def test_shards_of_a_larger_vocabulary_are_refused(packed):
    source = TokenShards(packed / "train.json")
    with pytest.raises(InputError, match=r"has a vocabulary of \d+, the model one of 200"):
        source.check_vocabulary(200)


def test_training_goes_on_while_a_checkpoint_is_written(config_file, tmp_path, trained):
    """The copy is taken at the save; steps that follow do not leak into it."""

    def slow_writer():
        threads = []
        write_data = FileSystemWriter.write_data

        def slowly(self, *args):
            threads.append(threading.current_thread() is threading.main_thread())
            time.sleep(0.3)
            return write_data(self, *args)

        FileSystemWriter.write_data = slowly
        status = main([str(config_file), "--no-export", "--checkpoint.async-save"])
        return status, threads

    results = run_ranks(2, slow_writer)
    assert [status for status, _ in results] == [0, 0]
    # step 3 in the background, the last step waited for
    assert results[0][1] == [False, True]
    run = tmp_path / "run"
    (run / "metrics.jsonl").unlink()
    assert train(1, config_file, "--no-export", "--checkpoint.resume", 3) == [0]
    expected, resumed = metrics(trained / "run", "loss"), metrics(run, "loss")
    for step, loss in resumed.items():
        assert loss == pytest.approx(expected[step], rel=1e-5)
    assert torch.isfinite(torch.tensor(list(resumed.values()))).all()


@pytest.mark.parametrize("option", ["--checkpoint.async-save", "--checkpoint.no-async-save"])
def test_a_checkpoint_is_written_without_the_device(config_file, tmp_path, monkeypatch, option):
    """The thread that writes has the first GPU of the machine, whichever is this rank's."""
    asked = []

    class Device:
        """As torch's module of a device, which writes down what it is asked."""

        def __getattr__(self, name):
            asked.append(name)
            return lambda *_: contextlib.nullcontext() if name == "stream" else self

    class Torch:
        """torch, with a GPU."""

        cuda = SimpleNamespace(is_available=lambda: True, Stream=None)

        def __getattr__(self, name):
            return getattr(torch, name)

    def saved():
        monkeypatch.setattr(filesystem, "torch", Torch())
        monkeypatch.setattr(filesystem, "_get_available_device_type", lambda: "cuda")
        monkeypatch.setattr(filesystem, "_get_device_module", lambda _: Device())
        return main([str(config_file), "--no-export", option]), asked

    assert run_ranks(1, saved) == [(0, [])]
    assert store.complete_steps(tmp_path / "run" / "checkpoints") == [6, 3]
