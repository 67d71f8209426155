"""The tests' own ranks."""

import gc

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
