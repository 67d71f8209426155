"""The scripts that start several training processes, on the smallest configuration."""

import contextlib
import os
import random
import re
import runpy
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from rodimus.train.store import complete_steps, step_folder
from tests.train.ranks import free_port, metrics

ROOT = Path(__file__).parent.parent.parent
CONFIG = str(ROOT / "configs" / "train" / "ci_tiny.toml")


@pytest.fixture
def environment(tmp_path):
    """That of a machine without a GPU, where ``torchrun`` is this Python's."""
    (tmp_path / "bin").mkdir()
    program = tmp_path / "bin" / "torchrun"
    program.write_text(f'#!/bin/bash\nexec {sys.executable} -m torch.distributed.run "$@"\n')
    program.chmod(0o755)
    return os.environ | {
        "PATH": f"{program.parent}:{os.environ['PATH']}",
        "PYTHONPATH": os.pathsep.join(sys.path),
        "CUDA_VISIBLE_DEVICES": "",
        "OMP_NUM_THREADS": "1",
    }


def ranks_of(node):
    """Process ids of what torchrun has started."""
    return [
        int(pid) for pid in Path(f"/proc/{node.pid}/task/{node.pid}/children").read_text().split()
    ]


@pytest.fixture
def two_nodes(environment, packed):
    """Starts a run on two nodes, both this machine, of one process each, as replicas of each other;
    gives what they print when they have ended."""

    def start(run, *options, meanwhile=lambda nodes: None, **variables):
        given = environment | {"MASTER_ADDR": "localhost", "MASTER_PORT": str(free_port())}
        given |= {"NODES": "2", "GPUS_PER_NODE": "1"} | variables
        command = ["bash", str(ROOT / "scripts" / "train_multinode.sh"), CONFIG, "--no-export"]
        command += ["--data.train", str(packed / "train.json")]
        command += ["--data.val", str(packed / "val.json"), "--out", str(run)]
        command += ["--parallel.replicate", "2", *options]
        output = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        # in the group of this process, which a time limit ends as one
        nodes = [subprocess.Popen(command, env=given, **output) for _ in range(2)]
        try:
            meanwhile(nodes)
            said = [node.communicate(timeout=240)[0] for node in nodes]
        finally:
            for node in nodes:
                if node.poll() is None:
                    for pid in (node.pid, *ranks_of(node)):
                        with contextlib.suppress(ProcessLookupError):
                            os.kill(pid, signal.SIGKILL)
        assert [node.returncode for node in nodes] == [0, 0], "\n".join(said)
        return said

    return start


@pytest.mark.slow
def test_two_nodes_meet_and_train_one_run(two_nodes, tmp_path):
    run = tmp_path / "run"
    said = two_nodes(run, "--train.steps", "3")
    assert sum("2 x cpu" in text for text in said) == 1, "rank 0 alone says it"
    assert list(metrics(run, "loss")) == [1, 2, 3] and list(metrics(run, "val_loss")) == [3]
    assert complete_steps(run / "checkpoints") == [3]


@pytest.mark.slow
def test_two_nodes_go_on_where_a_rank_was_killed(two_nodes, tmp_path):
    run = tmp_path / "run"

    def kill(nodes):
        while not (run / "checkpoints" / "latest").exists():
            assert all(node.poll() is None for node in nodes)
            time.sleep(0.1)
        (rank,) = ranks_of(nodes[1])
        os.kill(rank, signal.SIGKILL)

    options = ["--train.steps", "60", "--checkpoint.every", "5", "--log.every", "1"]
    said = two_nodes(run, *options, meanwhile=kill, MAX_RESTARTS="1")
    assert sum("resumed after step" in text for text in said) == 1
    assert list(metrics(run, "loss")) == list(range(1, 61))


@pytest.mark.slow
def test_a_run_in_chaos_ends_as_one_undisturbed(environment):
    command = [sys.executable, str(ROOT / "scripts" / "chaos.py"), "--events", "3", "--steps", "20"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "all 20 losses equal to the bit: True" in done.stdout
    assert re.search(r"\n  3 \w+", done.stdout), "three events"


@pytest.mark.parametrize("how", ["truncate", "flip"])
def test_chaos_damages_no_checkpoint_but_the_newest_of_several(how, tmp_path):
    """Without a sound one a run ends with status 2, and starts over when it is told to again."""
    damage = runpy.run_path(str(ROOT / "scripts" / "chaos.py"))["damage"]

    def contents():
        return {path.parent.name: path.read_bytes() for path in tmp_path.glob("*/*/data")}

    for step in (5, 10):
        folder = step_folder(tmp_path / "checkpoints", step)
        folder.mkdir(parents=True)
        for name in ("data", "COMPLETE"):
            (folder / name).write_bytes(b"12345678")
        before = contents()
        damage(tmp_path, how, random.Random(0))
        changed = [name for name, data in contents().items() if data != before[name]]
        assert changed == ([] if step == 5 else ["step-00000010"])


@pytest.mark.parametrize("given, port", [({}, 29400), ({"MASTER_PORT": "4711"}, 4711)])
def test_nodes_meet_where_they_are_told_to(environment, given, port, tmp_path):
    (tmp_path / "bin" / "torchrun").write_text('#!/bin/bash\necho "$@"\n')
    for name in ("MASTER_ADDR", "MASTER_PORT", "NODES", "GPUS_PER_NODE", "MAX_RESTARTS"):
        environment.pop(name, None)
    command = ["bash", str(ROOT / "scripts" / "train_multinode.sh"), "run.toml", "--optim.lr", "1"]
    options = {"env": environment | given, "capture_output": True, "text": True}
    done = subprocess.run(command, **options)
    assert done.returncode == 1 and "MASTER_ADDR: must name the first node" in done.stderr
    options["env"] |= {"MASTER_ADDR": "node0", "NODES": "2"}
    assert subprocess.run(command, **options).stdout == (
        f"--nnodes 2 --nproc-per-node 8 --max-restarts 0 --rdzv-backend c10d --rdzv-endpoint"
        f" node0:{port} --rdzv-id rodimus -m rodimus.train run.toml --optim.lr 1\n"
    )
