"""The tests' own ranks."""

import gc

import torch
from torch import distributed

from tests.train.ranks import run_ranks


def test_a_rank_does_not_collect_the_groups_of_its_parent():
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    cycle = [distributed.group.WORLD]
    cycle.append(cycle)
    gc.disable()
    try:
        distributed.destroy_process_group()
        del cycle
        # without end where the rank ends the group: its threads are the parent's
        run_ranks(1, gc.collect, timeout=10)
    finally:
        gc.enable()


def test_a_rank_does_not_wait_for_the_threads_of_its_parent():
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        _in_parallel()
        # without end where the rank asks for a second thread
        run_ranks(1, _in_parallel, timeout=10)
    finally:
        torch.set_num_threads(threads)


def _in_parallel():
    torch.ones(1_000_000).exp()
    torch.ones(500, 500) @ torch.ones(500, 500)
