"""Batches as a function of (seed, step): nothing to save, nothing to fast-forward on resume."""

from collections.abc import Sequence
from typing import Any

import grain
import jax
import numpy as np

from safe_rlhf_jax.data.examples import Examples
from safe_rlhf_jax.errors import DataError


class Batches:
    """Batches of a dataset in an order that is reshuffled in every epoch; the rest of an epoch continues into the next.

    The rows of a step do not depend on the number of processes: process i of n gets the i-th of n equal slices.

    Args:
        examples: The dataset.
        batch_size: Rows of a step, all processes together.
        seed: Of the order.
        weights: Of the parts of a mixture: shares of the rows drawn, in proportion, whatever the parts' sizes.
        process_index: Index of this process.
        process_count: Number of processes.

    Raises:
        DataError: If the batch does not divide into the processes, or a part of a mixture has no usable record.
    """

    def __init__(
        self,
        examples: Examples,
        *,
        batch_size: int,
        seed: int,
        weights: Sequence[float] | None = None,
        process_index: int = 0,
        process_count: int = 1,
    ):
        if batch_size % process_count:
            raise DataError(f"batch_size {batch_size} does not divide into {process_count} processes")
        self.examples = examples
        self.share = slice(
            process_index * batch_size // process_count, (process_index + 1) * batch_size // process_count
        )
        self.order = shuffled(examples, seed % 2**32, weights).batch(batch_size)

    def __call__(self, step: int) -> Any:
        """Returns this process's rows of a step: the examples' batch type, host arrays."""
        rows = np.asarray(self.order[step])[self.share]
        return jax.tree.map(lambda x: x[rows], self.examples.arrays)


def shuffled(examples: Examples, seed: int, weights: Sequence[float] | None) -> Any:
    """Returns an endless sequence of row numbers, reshuffled in every epoch, with random access."""
    if weights is None:
        return grain.MapDataset.range(len(examples)).seed(seed).shuffle().repeat()
    parts = [np.flatnonzero(examples.parts == i) for i in range(len(weights))]
    empty = [i for i, rows in enumerate(parts) if not len(rows)]
    if empty:
        raise DataError(f"part {empty[0]} of the mixture has no record that can be used")
    orders = [grain.MapDataset.source(rows.tolist()).seed(seed + i).shuffle().repeat() for i, rows in enumerate(parts)]
    return grain.MapDataset.mix(orders, weights=list(weights))


def in_order(examples: Examples, batch_size: int) -> list[tuple[Any, int]]:
    """Returns all rows in order as (batch, valid rows); the last batch is padded with copies of its first row."""
    out = []
    for start in range(0, len(examples), batch_size):
        rows = np.arange(start, min(start + batch_size, len(examples)))
        valid = len(rows)
        rows = np.concatenate([rows, np.full(batch_size - valid, rows[0])])
        out.append((jax.tree.map(lambda x, rows=rows: x[rows], examples.arrays), valid))
    return out
