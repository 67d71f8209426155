"""The batch script of Slurm: which ends of a run start it again."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from rodimus.train import __main__ as program
from rodimus.train import guard, loop
from rodimus.train.store import complete_steps, step_folder
from tests import warm_python
from tests.train.ranks import free_port, run_ranks

ROOT = Path(__file__).parent.parent.parent
# starts each task of a node
SRUN = """#!/bin/bash
while [[ $1 == -* ]]; do shift; done
for ((i = 0; i < ${SLURM_NTASKS:=1}; i++)); do
    SLURM_NTASKS=$SLURM_NTASKS SLURM_PROCID=$i SLURM_LOCALID=$i "$@" & tasks+=($!)
done
# meanwhile
status=0
for task in "${tasks[@]}"; do wait $task || status=$?; done
exit $status
"""


@pytest.fixture
def slurm(tmp_path):
    """Runs the script in a folder of its own; gives its status and what it asked of scontrol."""
    (tmp_path / "bin").mkdir()
    (tmp_path / "scripts").symlink_to(ROOT / "scripts")
    asked = tmp_path / "asked"

    def program(name, text):
        path = tmp_path / "bin" / name
        path.write_text(text)
        path.chmod(0o755)

    def run(*arguments, srun=SRUN, python=None, node="node0", **variables):
        program("srun", srun)
        program("python", python or f'#!/bin/bash\nexec {warm_python.executable()} "$@"\n')
        program("scontrol", f'#!/bin/bash\necho "$@" >> {asked}\necho {node}\n')
        path = [str(tmp_path / "bin"), os.environ["PATH"]]
        environment = os.environ | {
            **{"PATH": ":".join(path), "PYTHONPATH": ":".join(sys.path)},
            **{"SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "node[0-1]"},
            **variables,
        }
        command = ["bash", "scripts/train.slurm", *arguments]
        done = subprocess.run(
            command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120
        )
        assert not list(tmp_path.glob(".rodimus-status*")), "it leaves its file behind"
        requests = asked.read_text().splitlines() if asked.exists() else []
        requests = [line for line in requests if "hostnames" not in line]
        asked.unlink(missing_ok=True)
        return done.returncode, requests, done.stderr

    return run


def test_each_task_is_a_rank(slurm, tmp_path):
    said = 'echo "$RANK $LOCAL_RANK $WORLD_SIZE $MASTER_ADDR $*" >> ranks'
    tasks = {"SLURM_NTASKS": "2", "SLURM_NTASKS_PER_NODE": "2", "SLURM_GPUS_ON_NODE": "2"}
    python = f"#!/bin/bash\n{said}\nexit 7\n"
    status, requests, _ = slurm("run.toml", "--train.steps", "3", python=python, **tasks)
    assert (status, requests) == (7, [])
    expected = [f"{i} {i} 2 node0 -m rodimus.train run.toml --train.steps 3" for i in range(2)]
    assert sorted((tmp_path / "ranks").read_text().splitlines()) == expected


@pytest.mark.slow
def test_ranks_that_are_terminated_save_and_are_queued_again(slurm, config_file, tmp_path):
    """Two real ranks, each told by the scheduler once there is a first step."""
    metrics = tmp_path / "run" / "metrics.jsonl"
    terminate = f'(until [ -s {metrics} ]; do sleep 0.1; done; kill -TERM "${{tasks[@]}}") &'
    srun = SRUN.replace("# meanwhile", terminate)
    tasks = {"SLURM_NTASKS": "2", "MASTER_PORT": str(free_port()), "CUDA_VISIBLE_DEVICES": ""}
    arguments = (str(config_file), "--train.steps", "100000", "--checkpoint.every", "100000")
    status, requests, said = slurm(*arguments, srun=srun, node="localhost", **tasks)
    assert (status, requests) == (143, ["requeue 7"]), said
    root = tmp_path / "run" / "checkpoints"
    (step,) = complete_steps(root)
    # of each rank
    assert {path.name[:3] for path in step_folder(root, step).glob("*.distcp")} == {"__0", "__1"}


def test_a_task_that_is_asked_to_save_before_it_trains_goes_on(slurm):
    """Python has a handler when all is imported and the ranks have met; USR1 would end it."""
    python = "#!/bin/bash\nkill -USR1 $$\nexit 7\n"
    assert slurm("run.toml", python=python)[0] == 7


def test_a_task_for_each_gpu(slurm):
    status, requests, said = slurm("x", SLURM_NTASKS_PER_NODE="1", SLURM_GPUS_ON_NODE="8")
    assert (status, requests) == (2, [])
    assert said == "train.slurm: expected one task per GPU, got 1 tasks and 8 GPUs per node\n"


def test_ranks_get_the_cores_of_the_job(slurm, tmp_path):
    srun = f'#!/bin/bash\necho "$SRUN_CPUS_PER_TASK" > {tmp_path}/cores\n'
    slurm("run.toml", srun=srun, SLURM_CPUS_PER_TASK="8")
    assert (tmp_path / "cores").read_text() == "8\n"


def test_each_job_has_a_port_of_its_own(slurm, tmp_path, monkeypatch):
    """Two of them may share a node; a port that is given is taken."""
    monkeypatch.delenv("MASTER_PORT", raising=False)
    srun = f'#!/bin/bash\necho "$MASTER_PORT" >> {tmp_path}/ports\n'
    for job in ("7", "1200008"):
        slurm("run.toml", srun=srun, SLURM_JOB_ID=job)
    slurm("run.toml", srun=srun, MASTER_PORT="29400")
    assert (tmp_path / "ports").read_text().split() == ["20007", "20008", "29400"]


def test_a_typo_is_not_queued_again(slurm, tmp_path):
    (tmp_path / "run.toml").write_text("[train]\nstepz = 3\n")
    status, requests, said = slurm("run.toml")
    assert (status, requests) == (2, [])
    assert "did you mean 'train.steps'?" in said


@pytest.mark.parametrize("ended, requests", [("143", ["requeue 7"]), ("0", []), ("1", [])])
def test_a_run_says_itself_how_it_ended(slurm, ended, requests):
    """Whatever srun makes of it."""
    srun = f'#!/bin/bash\necho {ended} > "$RODIMUS_STATUS_FILE"\nexit {min(int(ended), 1)}\n'
    assert slurm("run.toml", srun=srun)[:2] == (int(ended), requests)


@pytest.mark.parametrize("status", [1, 137, 143])
def test_a_run_that_says_nothing_has_crashed(slurm, tmp_path, status):
    """143 then is that of a node that was terminated for the others; and an old file counts for
    nothing."""
    (tmp_path / ".rodimus-status-7").write_text("143\n")
    srun = f"#!/bin/bash\nexit {status}\n"
    assert slurm("run.toml", srun=srun)[:2] == (status, [])


@pytest.mark.parametrize("status", [1, 137, 143])
def test_a_crash_after_a_checkpoint_is_started_again(slurm, status):
    srun = f'#!/bin/bash\necho saved > "$RODIMUS_STATUS_FILE"\nexit {status}\n'
    assert slurm("run.toml", srun=srun)[:2] == (status, ["requeue 7"])


@pytest.mark.parametrize("every, said", [(2, "saved\n"), (100, "1\n")])
@pytest.mark.parametrize("writes", ["--checkpoint.async-save", "--checkpoint.no-async-save"])
def test_a_run_says_that_it_has_saved(config_file, tmp_path, monkeypatch, every, said, writes):
    """Also where a resumed run crashes before its next checkpoint: then it says nothing of it."""
    status, step = tmp_path / "status", loop.Trainer.step
    monkeypatch.setenv("RODIMUS_STATUS_FILE", str(status))

    def fail_at(limit):
        def fails(self):
            if self.progress.step == limit:
                raise RuntimeError("NCCL error")
            return step(self)

        monkeypatch.setattr(loop.Trainer, "step", fails)
        with pytest.raises(RuntimeError, match="NCCL error"):
            program.main([str(config_file), "--checkpoint.every", str(every), writes])

    run_ranks(1, fail_at, 3)
    assert status.read_text() == said
    # as the batch script does between two starts
    status.unlink()
    run_ranks(1, fail_at, 3)
    assert status.read_text() == "1\n"


def test_a_run_that_is_stopped_is_not_started_again(config_file, tmp_path, monkeypatch):
    """Though it has saved: the guard would stop it again."""
    monkeypatch.setenv("RODIMUS_STATUS_FILE", str(tmp_path / "status"))

    def stopped(self, signals):
        self.step()
        self.save(wait=True)
        assert (tmp_path / "status").read_text() == "saved\n"
        raise guard.RunStopped("stopped")

    monkeypatch.setattr(loop.Trainer, "run", stopped)
    assert run_ranks(1, program.main, [str(config_file)]) == [1]
    assert (tmp_path / "status").read_text() == "1\n"


def test_fifty_times_are_enough(slurm):
    srun = '#!/bin/bash\necho 143 > "$RODIMUS_STATUS_FILE"\nexit 1\n'
    assert slurm("run.toml", srun=srun, SLURM_RESTART_COUNT="49")[1] == ["requeue 7"]
    assert slurm("run.toml", srun=srun, SLURM_RESTART_COUNT="50")[1] == []


@pytest.mark.parametrize("failure, said", [(SystemExit, "143\n"), (RuntimeError, "1\n")])
def test_a_run_ended_at_its_export_is_started_again(
    failure, said, config_file, tmp_path, monkeypatch
):
    """By a signal, which leaves no time to say so; not by an error, which would come again."""

    def fail(config):
        raise failure

    def run():
        monkeypatch.setenv("RODIMUS_STATUS_FILE", str(tmp_path / "status"))
        monkeypatch.setattr(program, "finish", fail)
        with pytest.raises(failure):
            program.main([str(config_file), "--train.steps", "1"])

    run_ranks(1, run)
    assert (tmp_path / "status").read_text() == said


def test_rank_0_alone_says_it(tmp_path, monkeypatch, capsys):
    path = tmp_path / "status"
    monkeypatch.setenv("RODIMUS_STATUS_FILE", str(path))
    monkeypatch.setattr(program, "train", lambda *arguments: 143)
    monkeypatch.setenv("RANK", "1")
    assert program.main(["run.toml"]) == 143 and not path.exists()
    monkeypatch.setenv("RANK", "0")
    assert program.main(["run.toml"]) == 143 and path.read_text() == "143\n"
    monkeypatch.undo()
    assert program.main(["nowhere.toml"]) == 2 and path.read_text() == "143\n"
