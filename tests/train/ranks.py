"""Ranks as forked processes: a group starts in milliseconds, with the imports already done."""

import functools
import gc
import json
import multiprocessing
import os
import socket
import subprocess
import sys
import traceback
from pathlib import Path

import pytest
import torch
from transformers.conversion_mapping import get_checkpoint_conversion_mapping

from rodimus.train.__main__ import main
from rodimus.train.load import load_config

CONFIGS = Path(__file__).parents[2] / "configs"


def free_port():
    """A port of this machine that nothing listens on."""
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        return probe.getsockname()[1]


def run_ranks(world_size, work, *args, timeout=180):
    """Calls ``work(*args)`` in forked processes that form a group; returns the results by rank."""
    if torch.cuda.is_available():
        pytest.skip("no fork can use autograd where torch sees a GPU: CUDA_VISIBLE_DEVICES=")
    _prepare_forks()
    context = multiprocessing.get_context("fork")
    port, ranks = free_port(), []
    # a rank that collected a group of this process would wait for threads that no fork has
    gc.freeze()
    for rank in range(world_size):
        receive, send = context.Pipe(duplex=False)
        process = context.Process(target=_rank, args=(rank, world_size, port, send, work, args))
        process.start()
        send.close()
        ranks.append((process, receive))
    gc.unfreeze()
    results = []
    for process, receive in ranks:
        try:
            results.append(receive.recv() if receive.poll(timeout) else "timeout")
        except EOFError:
            process.join()
            results.append(f"died with {process.exitcode}")
    for process, _ in ranks:
        process.join(5)
        if process.is_alive():
            process.kill()
    for rank, result in enumerate(results):
        assert isinstance(result, tuple), f"rank {rank}: {result}"
    return [value for (value,) in results]


@functools.cache
def _prepare_forks():
    """What each would import and build at its first use."""
    load_config(CONFIGS / "train/ci_tiny.toml", ["--no-export"])
    get_checkpoint_conversion_mapping("rodimus")


def _rank(rank, world_size, port, send, work, args):
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(world_size),
        MASTER_ADDR="localhost",
        MASTER_PORT=str(port),
        # after a fork torch's pool may be missing where several threads ask for it first
        HF_DEACTIVATE_ASYNC_LOAD="1",
    )
    # nor do the parent's OpenMP threads exist here, and a second thread would wait for them
    torch.set_num_threads(1)
    try:
        send.send((work(*args),))
    except BaseException:
        send.send(traceback.format_exc())
    finally:
        send.close()
        # no clean-up of what belongs to the parent
        os._exit(0)


def train(world_size, config, *overrides, timeout=180):
    """Runs `rodimus train` on some ranks; returns the exit status of every rank."""
    return run_ranks(world_size, main, [str(config), *map(str, overrides)], timeout=timeout)


def train_alone(config, *overrides, timeout=180):
    """Runs `rodimus train` in a new process, as no fork can use a GPU; returns its exit status."""
    command = [sys.executable, "-m", "rodimus.train", str(config), *map(str, overrides)]
    return [subprocess.run(command, timeout=timeout).returncode]


def metrics(run, key):
    """``{step: value}`` of one figure of a run, later records winning."""
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return {row["step"]: row[key] for row in rows if key in row}
