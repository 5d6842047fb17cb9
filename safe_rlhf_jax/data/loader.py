"""Batches as a function of (seed, step): nothing to save, nothing to fast-forward on resume."""

from typing import Any

import grain
import jax
import numpy as np

from safe_rlhf_jax.data.examples import Examples


class Batches:
    """Batches of a dataset in an order that is drawn anew in every epoch; an epoch's rest runs on into the next."""

    def __init__(self, examples: Examples, *, batch_size: int, seed: int):
        self.examples = examples
        self.batch_size = batch_size
        rows = grain.MapDataset.range(len(examples)).seed(seed % 2**32).shuffle().repeat()
        self.order = rows.batch(batch_size)

    def __call__(self, step: int) -> Any:
        """Returns the batch of a step: the examples' batch type with `batch_size` rows of host arrays."""
        rows = np.asarray(self.order[step])
        return jax.tree.map(lambda x: x[rows], self.examples.arrays)


def in_order(examples: Examples, batch_size: int) -> list[tuple[Any, int]]:
    """Returns all rows in order as (batch, valid rows); the last batch is filled up with copies of its first row."""
    out = []
    for start in range(0, len(examples), batch_size):
        rows = np.arange(start, min(start + batch_size, len(examples)))
        valid = len(rows)
        rows = np.concatenate([rows, np.full(batch_size - valid, rows[0])])
        out.append((jax.tree.map(lambda x, rows=rows: x[rows], examples.arrays), valid))
    return out
