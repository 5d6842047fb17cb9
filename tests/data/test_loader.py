"""A batch is a function of seed and step, and every epoch visits every row once."""

from collections import Counter

import numpy as np
import pytest

from safe_rlhf_jax.data.examples import Examples
from safe_rlhf_jax.data.loader import Batches, in_order
from safe_rlhf_jax.types import PromptBatch


def rows(n):
    """A dataset whose row i holds the token i."""
    tokens = np.arange(n, dtype=np.int32)[:, None]
    batch = PromptBatch(tokens, np.ones((n, 1), bool), np.arange(n, dtype=np.int32) % 3)
    return Examples(batch, [{} for _ in range(n)], {}, 0)


def order(batches, steps):
    return np.concatenate([batches(step).tokens[:, 0] for step in steps]).tolist()


def test_batch_depends_on_seed_and_step_alone():
    first, second = Batches(rows(20), batch_size=4, seed=5), Batches(rows(20), batch_size=4, seed=5)
    assert order(first, range(9)) == [row for step in range(9) for row in order(second, [step])]
    assert order(second, [7]) == order(first, [7]) == order(first, [7]), "steps before have changed it"


def test_all_fields_of_a_row_stay_together():
    batch = Batches(rows(20), batch_size=4, seed=0)(3)
    assert (batch.group == batch.tokens[:, 0] % 3).all()


@pytest.mark.parametrize(("n", "batch_size"), [(20, 4), (21, 4), (7, 16), (1, 8)])
def test_every_epoch_has_every_row_once(n, batch_size):
    seen = order(Batches(rows(n), batch_size=batch_size, seed=1), range(-(-4 * n // batch_size)))
    for epoch in range(4):
        assert sorted(seen[epoch * n : (epoch + 1) * n]) == list(range(n))


def test_epochs_and_seeds_differ_in_order():
    def epoch(seed, i):
        return tuple(order(Batches(rows(30), batch_size=10, seed=seed), range(3 * i, 3 * i + 3)))

    orders = {epoch(seed, i) for seed in (0, 1, 2, 2**32 - 1) for i in range(3)}
    assert len(orders) == 12
    assert tuple(range(30)) not in orders


def test_rows_move_between_places_evenly():
    first = Counter(order(Batches(rows(4), batch_size=4, seed=0), range(60))[::4])
    assert len(first) == 4
    assert min(first.values()) > 4


@pytest.mark.parametrize("n", [1, 7, 8, 9, 24])
def test_in_order_covers_every_row_once_in_full_batches(n):
    batches = in_order(rows(n), 8)
    assert [row for batch, valid in batches for row in batch.tokens[:valid, 0].tolist()] == list(range(n))
    assert all(batch.tokens.shape == (8, 1) for batch, _ in batches)
