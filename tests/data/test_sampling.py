import json
from collections import Counter
from itertools import chain
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fmfa.data.sampling import IdentityBatches, RandomBatches
from fmfa.errors import ConfigError

REFERENCE = json.loads((Path(__file__).parents[1] / "fixtures" / "ivt_tables.json").read_text())["sampler"]


@given(rows=st.integers(8, 200), share=st.integers(1, 12), world=st.integers(1, 4))
@settings(max_examples=100, deadline=None)
def test_random_batches_see_every_row_once(rows, share, world):
    size = share * world
    ranks = [RandomBatches(rows, size, seed=3, rank=rank, world_size=world) for rank in range(world)]
    joint = [flat(parts) for parts in zip(*ranks, strict=True)]
    single = [list(batch) for batch in RandomBatches(rows, size, seed=3)]
    seen = flat(joint)
    lost = rows % world
    assert len(seen) == len(set(seen)) == rows - lost
    assert seen == flat(single)[: rows - lost]  # the slices of all ranks are the batch of one process
    assert {len(batch) for batch in joint[:-1]} <= {size}
    assert len(ranks[0]) == len(joint) == -(-(rows - lost) // size)


def flat(lists):
    return list(chain.from_iterable(lists))


def batches(sampler, epoch=0, first=0):
    sampler.set_epoch(epoch, first)
    return list(sampler)


SAMPLERS = [
    lambda seed: RandomBatches(100, 8, seed=seed),
    lambda seed: IdentityBatches(np.repeat(np.arange(20), 9), 3, 4, seed=seed),
]


@pytest.mark.parametrize("make", SAMPLERS)
def test_batches_depend_on_seed_and_epoch_only(make):
    sampler = make(0)
    first = batches(sampler, 0)
    assert batches(sampler, 1) != first
    assert batches(sampler, 0) == first
    assert list(sampler) == first
    assert batches(make(0), 0) == first
    assert batches(make(1), 0) != first
    assert all(type(row) is int for row in first[0])


@pytest.mark.parametrize("make", SAMPLERS)
def test_an_epoch_starts_at_any_batch(make):
    whole = batches(make(5), 2)
    for first in (0, 1, len(whole) - 1, len(whole)):
        assert batches(make(5), 2, first) == whole[first:]
    sampler = make(5)
    sampler.set_epoch(2, 3)
    assert len(sampler) == len(whole)


@given(
    sizes=st.lists(st.integers(1, 11), min_size=4, max_size=15),
    instances=st.integers(1, 4),
    share=st.integers(1, 2),
    world=st.integers(1, 2),
    seed=st.integers(0, 5),
)
@settings(max_examples=150, deadline=None)
def test_identity_batches(sizes, instances, share, world, seed):
    names = [7 * i + 3 for i in range(len(sizes))]  # with gaps
    identities = np.random.default_rng(seed).permutation(np.repeat(names, sizes))
    P = share * world
    ranks = [IdentityBatches(identities, P, instances, seed=seed, rank=rank, world_size=world) for rank in range(world)]
    joint = [flat(parts) for parts in zip(*ranks, strict=True)]
    assert joint == batches(IdentityBatches(identities, P, instances, seed=seed))

    groups_left = {name: max(size // instances, 1) for name, size in zip(names, sizes)}
    for batch in joint:
        of_group = identities[np.array(batch).reshape(P, instances)]
        assert (of_group == of_group[:, :1]).all()
        assert len(set(of_group[:, 0])) == P
        groups_left |= {int(name): groups_left[int(name)] - 1 for name in of_group[:, 0]}
    assert min(groups_left.values()) >= 0
    assert sum(left > 0 for left in groups_left.values()) < P  # not stopped early

    times = Counter(row for batch in joint for row in batch)
    enough = {name for name, size in zip(names, sizes) if size >= instances}
    assert all(count == 1 for row, count in times.items() if identities[row] in enough)
    assert all(len(batch) == P * instances for batch in joint)


def test_rows_of_small_identities_are_drawn_with_replacement_and_differently():
    sampler = IdentityBatches([5, 5, 9, 9, 9], 2, 4, seed=0)
    drawn = [tuple(sorted(row for row in batches(sampler, epoch)[0] if row < 2)) for epoch in range(200)]
    assert Counter(map(sum, drawn)).keys() == {0, 1, 2, 3, 4}  # binomial over two rows
    assert 50 < Counter(map(sum, drawn))[2] < 100


def test_identities_and_left_out_rows_vary():
    sampler = IdentityBatches(np.repeat(np.arange(6), 5), 2, 4, seed=0)
    drawn = Counter(row for epoch in range(300) for batch in batches(sampler, epoch) for row in batch)
    assert set(drawn) == set(range(30))
    assert min(drawn.values()) > 200  # 240 expected: four of five rows an epoch
    assert max(drawn.values()) < 280


def test_identities_of_a_batch_are_drawn_uniformly():
    sampler = IdentityBatches(np.repeat(np.arange(8), 4), 2, 2, seed=0)
    firsts = Counter(row // 4 for epoch in range(400) for row in batches(sampler, epoch)[0])
    assert set(firsts) == set(range(8))
    assert min(firsts.values()) > 140  # 200 expected
    assert max(firsts.values()) < 260


def test_as_many_batches_as_the_reference():
    size, instances = REFERENCE["batch_size"], REFERENCE["num_instances"]
    sampler = IdentityBatches(REFERENCE["pids"], size // instances, instances, seed=0)
    ours, theirs = batches(sampler), REFERENCE["indices_seed0"]
    assert sum(map(len, ours)) == len(theirs) == 40
    identities = np.array(REFERENCE["pids"])
    for drawn in (flat(ours), theirs):
        groups = identities[np.array(drawn).reshape(-1, instances)]
        assert (groups == groups[:, :1]).all()
        assert (groups[::2, 0] != groups[1::2, 0]).all()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: RandomBatches(10, 5, seed=0, world_size=2), "equal shares for 2 processes"),
        (lambda: RandomBatches(10, 0, seed=0), "equal shares"),
        (lambda: RandomBatches(0, 4, seed=0), "0 rows do not fill"),
        (lambda: IdentityBatches([1, 1, 2], 3, 4, seed=0), "the data has 2"),
        (lambda: IdentityBatches([1, 1, 2], 1, 4, seed=0, world_size=2), "shared by 2"),
        (lambda: IdentityBatches([], 1, 1, seed=0), "the data has 0"),
    ],
)
def test_impossible_batches_are_refused(make, message):
    with pytest.raises(ConfigError, match=message):
        make()
