"""Batches as a function of (seed, step): nothing to save, nothing to fast-forward on resume."""

import dataclasses
import functools
import logging
from collections.abc import Sequence
from typing import Any

import grain
import jax
import numpy as np

from safe_rlhf_jax.data.examples import ROUND, Examples, sides_of
from safe_rlhf_jax.data.packing import SIMULATED, chosen_rows, pack
from safe_rlhf_jax.errors import DataError
from safe_rlhf_jax.types import PromptBatch

LOGGER = logging.getLogger(__name__)

CUTS = 4  # most widths of the batches of a dataset: each is compiled
NARROWEST = 64  # columns
GROUPED = 16  # batches among which rows are sorted by length


class Batches:
    """Batches of a dataset in an order that is reshuffled in every epoch; the rest of an epoch continues into the next.

    The rows of a step do not depend on the number of processes: process i of n gets the i-th of n equal slices. A batch
    is as wide as its longest text needs (see `width_of`).

    Args:
        examples: The dataset.
        batch_size: Rows of a step, all processes together.
        seed: Of the order.
        weights: Of the parts of a mixture: shares of the rows drawn, in proportion, whatever the parts' sizes.
        group_by_length: Batches hold texts of similar length: of every 16 batches in random order the rows are sorted
            by length, and the batches shuffled.
        packed: (shards of the batch, microbatches): texts share rows (`types.Packing`); None: they do not.
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
        group_by_length: bool = False,
        packed: tuple[int, int] | None = None,
        process_index: int = 0,
        process_count: int = 1,
    ):
        if batch_size % process_count:
            raise DataError(f"batch_size {batch_size} does not divide into {process_count} processes")
        self.examples, self.process_index, self.process_count = examples, process_index, process_count
        self.share = slice(
            process_index * batch_size // process_count, (process_index + 1) * batch_size // process_count
        )
        self.seed, self.sides = seed % 2**32, side_sizes(examples.arrays)
        self.sizes = self.sides.max(0)
        self.together = GROUPED if group_by_length else 1
        self.order = shuffled(examples, self.seed, weights).batch(batch_size * self.together)
        self.batches = functools.lru_cache(maxsize=1)(self.sorted_by_length)
        self.rows = None
        if packed is not None:
            coming = range(min(-(-len(examples) // batch_size), SIMULATED))
            sizes = [self.sides[:, self.batches(step)[0]] for step in coming]
            self.rows, share = chosen_rows(sizes, int(self.sizes.max()), multiple=packed[0], parts=packed[1])
            LOGGER.info(
                f"texts packed into {self.rows.count} rows of {' or '.join(map(str, self.rows.widths))} columns: "
                f"{share:.0%} are real tokens"
            )

    def __call__(self, step: int) -> Any:
        """Returns this process's rows of a step: the examples' batch type, host arrays."""
        group, index = divmod(step, self.together)
        rows = self.batches(group)[index]
        if self.rows is not None:
            packing = pack(self.sides[:, rows], self.examples.width, self.rows)
            mine = jax.tree.map(lambda x: np.split(x, self.process_count)[self.process_index], packing)
            batch = jax.tree.map(lambda x: x[rows[self.share]], self.examples.arrays)
            return dataclasses.replace(batch, packing=mine)
        return cut(self.examples.arrays, rows[self.share], int(self.sizes[rows].max()))

    def sorted_by_length(self, group: int) -> np.ndarray:
        """Returns the rows of a group of consecutive batches, i64[batches, batch]; those of one keep their order."""
        rows = np.asarray(self.order[group])
        if self.together == 1:
            return rows[None]
        batches = rows[np.argsort(self.sizes[rows], kind="stable")].reshape(self.together, -1)
        shuffled: np.ndarray = np.random.default_rng((self.seed, group)).permutation(batches)
        return shuffled


def side_sizes(arrays: Any) -> np.ndarray:
    """Returns the tokens of each text, i64[sides, N]."""
    return np.stack([np.asarray(side.mask).sum(-1) for side in sides_of(arrays)])


def sizes_of(arrays: Any) -> np.ndarray:
    """Returns the tokens of each row, of the longer side of a pair: i64[N]."""
    return side_sizes(arrays).max(0)


def width_of(longest: int, whole: int) -> int:
    """Returns the columns of a batch: the narrowest of at most four widths that hold its longest text.

    Args:
        longest: Tokens of the longest text.
        whole: Columns of the dataset.
    """
    step = max(NARROWEST, -(-whole // (CUTS * ROUND)) * ROUND)
    return min(-(-longest // step) * step, whole)


def cut(arrays: Any, rows: np.ndarray, longest: int) -> Any:
    """Returns rows of a dataset, without columns that are padding in all of them; prompts have theirs on the left."""
    width = width_of(longest, sides_of(arrays)[0].mask.shape[1])
    columns = slice(-width, None) if isinstance(arrays, PromptBatch) else slice(width)
    return jax.tree.map(lambda x: x[rows] if x.ndim == 1 else x[rows][:, columns], arrays)


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


def in_order(examples: Examples, batch_size: int) -> list[tuple[Any, np.ndarray]]:
    """Returns all rows as (batch, their indices), in order of their widths and then of the dataset.

    The last batch is padded with copies of its first row, which have no index.
    """
    sizes = sizes_of(examples.arrays)
    order = np.argsort([width_of(int(size), examples.width) for size in sizes], kind="stable")
    out = []
    for start in range(0, len(examples), batch_size):
        rows = order[start : start + batch_size]
        filled = np.concatenate([rows, np.full(batch_size - len(rows), rows[0])])
        out.append((cut(examples.arrays, filled, int(sizes[rows].max())), rows))
    return out


def in_rows(parts: Sequence[np.ndarray], batches: Sequence[tuple[Any, np.ndarray]]) -> np.ndarray:
    """Returns results of the batches of `in_order`, each [batch, …], as one array in the order of the dataset."""
    rows = np.concatenate([rows for _, rows in batches])
    values = np.concatenate([np.asarray(part)[: len(rows)] for part, (_, rows) in zip(parts, batches, strict=True)])
    out = np.empty_like(values)
    out[rows] = values
    return out
