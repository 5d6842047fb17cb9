"""A batch is a function of seed and step, and every epoch visits every row once."""

from collections import Counter

import numpy as np
import pytest

from safe_rlhf_jax.data.examples import Examples
from safe_rlhf_jax.data.loader import GROUPED, Batches, in_order, in_rows, width_of
from safe_rlhf_jax.types import PromptBatch, SupervisedBatch


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
    assert [row for batch, valid in batches for row in batch.tokens[: len(valid), 0].tolist()] == list(range(n))
    assert all(batch.tokens.shape == (8, 1) for batch, _ in batches)


def texts(lengths, width, *, left=False):
    """A dataset whose row i has lengths[i] tokens i, padded on the right, or prompts padded on the left."""
    mask = np.arange(width) < np.asarray(lengths)[:, None]
    mask = mask[:, ::-1] if left else mask
    tokens = np.where(mask, np.arange(len(lengths))[:, None], -1).astype(np.int32)
    made = PromptBatch(tokens, mask, np.zeros(len(lengths), np.int32)) if left else SupervisedBatch(tokens, mask, mask)
    return Examples(made, [{} for _ in lengths], {}, 0)


@pytest.mark.parametrize("left", [False, True])
def test_a_batch_is_as_wide_as_its_longest_text_needs_and_loses_no_token(left):
    lengths = np.random.default_rng(0).integers(1, 257, 64)
    batches = Batches(texts(lengths, 256, left=left), batch_size=2, seed=0)
    widths = set()
    for step in range(96):
        batch = batches(step)
        rows = batch.tokens.max(-1)
        assert (batch.mask.sum(-1) == lengths[rows]).all()
        assert (batch.tokens[batch.mask] == np.repeat(rows, lengths[rows])).all()
        assert batch.tokens.shape[1] == width_of(int(lengths[rows].max()), 256)
        widths.add(batch.tokens.shape[1])
    assert widths == {64, 128, 192, 256}


def test_widths_are_four_at_most_and_none_is_narrow():
    for whole in (24, 64, 100, 192, 300, 512, 1000):
        widths = {width_of(longest, whole) for longest in range(1, whole + 1)}
        assert len(widths) <= 4
        assert max(widths) == whole
        assert min(widths) >= min(64, whole)


def test_every_process_has_the_width_of_the_whole_batch():
    data = texts([5, 200, 6, 7], 256)
    parts = [Batches(data, batch_size=4, seed=0, process_index=i, process_count=4)(0) for i in range(4)]
    assert {part.tokens.shape for part in parts} == {(1, 256)}


def test_batches_of_similar_lengths_have_less_padding_and_the_same_rows():
    lengths = np.random.default_rng(0).integers(1, 257, 16 * 8)
    whole, grouped = (Batches(texts(lengths, 256), batch_size=8, seed=3, group_by_length=by) for by in (False, True))

    def seen(batches):
        found = [batches(step) for step in range(GROUPED)]
        return sorted(int(i) for batch in found for i in batch.tokens.max(-1)), sum(batch.mask.size for batch in found)

    (rows, columns), (same_rows, fewer) = seen(whole), seen(grouped)
    assert rows == same_rows == list(range(16 * 8))
    assert fewer < 0.75 * columns
    order = [grouped(step).tokens.shape[1] for step in range(GROUPED)]
    assert order != sorted(order), "the batches are not shuffled"
    assert (
        grouped(20).tokens == Batches(texts(lengths, 256), batch_size=8, seed=3, group_by_length=True)(20).tokens
    ).all()


def test_results_in_order_of_width_come_back_in_the_order_of_the_dataset():
    lengths = [200, 3, 130, 70, 4, 255, 5]
    batches = in_order(texts(lengths, 256), 2)
    assert [batch.tokens.shape[1] for batch, _ in batches] == [64, 128, 256, 256]
    parts = [batch.mask.sum(-1) for batch, _ in batches]
    assert in_rows(parts, batches).tolist() == lengths
