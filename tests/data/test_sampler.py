import numpy as np
import pytest

from project.data.loader import BatchSampler


def batches(**options):
    return list(BatchSampler(**({"rows": 103, "batch_size": 8, "shuffle": True, "seed": 5} | options)))


def test_shuffled_order_changes_with_epoch_and_seed_and_nothing_else():
    sampler = BatchSampler(103, 8, shuffle=True, seed=5)
    first = [[row for _, row in batch] for batch in sampler]
    sampler.set_epoch(1)
    second = [[row for _, row in batch] for batch in sampler]
    sampler.set_epoch(0)
    assert [[row for _, row in batch] for batch in sampler] == first != second
    assert batches(seed=6) != batches()


def test_training_leaves_out_the_incomplete_batch_and_evaluation_does_not():
    assert [len(b) for b in batches()] == [8] * 12
    assert [len(b) for b in batches(shuffle=False)] == [8] * 12 + [7]
    assert [row for b in batches(shuffle=False) for _, row in b] == list(range(103))


@pytest.mark.parametrize("world_size", [2, 3, 5])
@pytest.mark.parametrize(
    "order", [{"shuffle": True}, {"shuffle": False}, {"shuffle": True, "weights": np.arange(1.0, 104.0)}]
)
def test_ranks_share_the_same_global_batches_without_repeats(world_size, order):
    whole = batches(**order)
    ranks = [batches(**order, rank=rank, world_size=world_size) for rank in range(world_size)]
    assert {len(rank) for rank in ranks} == {len(whole)}  # no rank waits for another
    for number, batch in enumerate(whole):
        assert sorted(key for rank in ranks for key in rank[number]) == sorted(batch)


def test_order_continues_at_a_batch_of_an_epoch():
    whole = BatchSampler(103, 8, shuffle=True, seed=5)
    whole.set_epoch(2)
    expected = list(whole)
    assert {epoch for batch in expected for epoch, _ in batch} == {2}  # the epoch travels with the row
    again = BatchSampler(103, 8, shuffle=True, seed=5)
    again.start_from(2, 7)
    assert list(again) == expected[7:]
    assert list(again) == expected  # the next time, from the start
