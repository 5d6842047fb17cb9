"""Packed rows hold every token of a batch once, in a few shapes, with hardly any padding."""

import numpy as np
import pytest

from safe_rlhf_jax.data.examples import Examples, sides_of
from safe_rlhf_jax.data.loader import Batches
from safe_rlhf_jax.optim import split
from safe_rlhf_jax.types import PreferenceBatch, Sequences, SupervisedBatch

WIDTH = 96


def texts(lengths, first):
    """Texts whose tokens are all different."""
    mask = np.arange(WIDTH) < np.asarray(lengths)[:, None]
    tokens = np.where(mask, first + np.arange(mask.size).reshape(mask.shape), 0).astype(np.int32)
    return tokens, mask, mask


def dataset(n, sides, seed=0):
    """Texts of lengths as they are found: log-normal."""
    lengths = np.random.default_rng(seed).lognormal(3, 0.6, (sides, n)).astype(int).clip(2, WIDTH)
    if sides == 1:
        arrays = SupervisedBatch(*texts(lengths[0], 1))
    else:
        arrays = PreferenceBatch(*(Sequences(*texts(row, 1 + i * n * WIDTH)) for i, row in enumerate(lengths)))
    return Examples(arrays, [{} for _ in range(n)], {}, 0)


@pytest.mark.parametrize("sides", [1, 2])
@pytest.mark.parametrize(("shards", "parts"), [(1, 1), (4, 1), (1, 2), (4, 2)])
def test_every_token_of_a_part_is_in_its_rows_once_and_texts_are_contiguous(sides, shards, parts):
    batches = Batches(dataset(200, sides), batch_size=32, seed=0, packed=(shards, parts))
    for step in range(8):
        batch = batches(step)
        rows = batch.packing.sources.shape[0]
        assert rows % (shards * parts) == 0
        pieces = split(batch, parts)
        for i in range(parts):
            tokens, mask = (
                np.concatenate([getattr(side, name)[i] for side in sides_of(pieces)]) for name in ("tokens", "mask")
            )
            sources, starts = pieces.packing.sources[i], pieces.packing.starts[i]
            assert sorted(sources[sources >= 0]) == np.flatnonzero(mask.reshape(-1)).tolist()
            packed = np.where(sources < 0, 0, tokens.reshape(-1)[sources]).reshape(-1)
            for text, real, start in zip(tokens, mask, starts, strict=True):
                assert packed[start : start + real.sum()].tolist() == text[real].tolist()


@pytest.mark.parametrize("sides", [1, 2])
def test_nine_tenths_of_the_columns_are_real_tokens_in_four_widths_at_most(sides):
    batches = Batches(dataset(1000, sides), batch_size=32, seed=1, packed=(1, 1))
    found = [batches(step) for step in range(31)]
    real = sum(side.mask.sum() for batch in found for side in sides_of(batch))
    shapes = {batch.packing.sources.shape for batch in found}
    assert real > 0.9 * sum(batch.packing.sources.size for batch in found)
    assert len({rows for rows, _ in shapes}) == 1
    assert len(shapes) <= 4


def test_rows_are_those_of_a_step_without_packing_and_processes_have_equal_slices():
    data = dataset(100, 2)
    plain, packed = Batches(data, batch_size=16, seed=3), Batches(data, batch_size=16, seed=3, packed=(4, 1))
    assert (plain(2).chosen.tokens.max(1) == packed(2).chosen.tokens.max(1)).all()
    parts = [Batches(data, batch_size=16, seed=3, packed=(4, 1), process_index=i, process_count=4)(2) for i in range(4)]
    for name in ("sources", "starts"):
        together = np.concatenate([getattr(part.packing, name) for part in parts])
        assert (together == getattr(packed(2).packing, name)).all()


def test_a_batch_beyond_the_widest_row_takes_a_wider_one():
    batches = Batches(dataset(100, 1), batch_size=16, seed=0, packed=(1, 1))
    widest = batches.rows.widths[-1]
    wider = batches.rows.width_for(widest + 1)
    assert widest < wider <= 1.25 * widest
    assert batches.rows.width_for(wider) == wider
