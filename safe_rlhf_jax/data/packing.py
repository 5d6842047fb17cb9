"""Texts of a batch in rows that several of them share, so that hardly any column is padding.

The batch itself stays what it is: its rows are gathered, and results are put back, within the step (`ops.packed`).
"""

import dataclasses
import math
from collections.abc import Sequence

import numpy as np

from safe_rlhf_jax.data.examples import ROUND
from safe_rlhf_jax.types import Packing

WIDTHS = 4  # of rows: each is compiled
SHARES = (1.0, 0.9, 0.8, 0.7, 0.6)  # of the rows that an average batch would fill, each as long as the longest text
WIDEST = 2  # of a row, in lengths of the longest text
SIMULATED = 64  # batches that the widths are chosen from


@dataclasses.dataclass(frozen=True)
class Rows:
    """The shapes of packed rows.

    Attributes:
        count: Rows of a batch.
        widths: Their columns, ascending; a batch takes the first that holds its texts.
        parts: Equal parts of a batch that are packed apart: microbatches.
    """

    count: int
    widths: tuple[int, ...]
    parts: int

    def width_for(self, needed: int) -> int:
        """Returns the columns of a batch that needs so many; beyond the widest, in steps of an eighth of it."""
        step = max(-(-self.widths[-1] // 8), ROUND)
        wider = -(-(needed - self.widths[-1]) // step) * step + self.widths[-1]
        return next((width for width in self.widths if width >= needed), wider)


def assigned(sizes: np.ndarray, rows: int) -> tuple[np.ndarray, int]:
    """Distributes texts over rows: the longest first, each to the first row with room (first-fit decreasing).

    Source: Johnson 1973, at the narrowest width, a multiple of 8, at which all texts find room.

    Returns:
        The row of each text, i64[N], and the width.
    """
    order, row_of = np.argsort(-sizes, kind="stable"), np.zeros(len(sizes), np.int64)
    width = -(-max(int(sizes.max()), -(-int(sizes.sum()) // rows)) // ROUND) * ROUND
    while True:
        room = np.full(rows, width)
        for text in order:
            row = int(np.argmax(room >= sizes[text]))
            room[row] -= sizes[text]
            row_of[text] = row
        if room.min() >= 0:
            return row_of, width
        width += ROUND


def by_part(sizes: np.ndarray, parts: int) -> list[np.ndarray]:
    """Returns the sizes of the texts of each microbatch, first sides and then second ones.

    Args:
        sizes: i64[sides, B]; part i of `optim.split` holds rows i, i + parts, …
        parts: Number of microbatches.
    """
    return [sizes[:, part::parts].reshape(-1) for part in range(parts)]


def columns_needed(sizes: np.ndarray, count: int, parts: int) -> int:
    """Returns the columns that hold the texts of a batch, i64[sides, B], in so many rows for each part."""
    return max(assigned(part, count)[1] for part in by_part(sizes, parts))


def best_widths(needed: Sequence[int]) -> tuple[tuple[int, ...], float]:
    """Returns at most `WIDTHS` widths, each batch in the narrowest that holds it, with the fewest columns in all.

    Args:
        needed: Columns that each batch needs.

    Returns:
        The widths, ascending, and the sum of the batches' columns.
    """
    sizes = sorted(needed)
    found: list[tuple[float, tuple[int, ...]]] = [(0, ()), *((math.inf, ()) for _ in sizes)]
    for _ in range(WIDTHS):  # found[j]: the fewest columns of the j smallest batches, and their widths
        found = [found[0]] + [
            min((found[i][0] + (j - i) * sizes[j - 1], (*found[i][1], sizes[j - 1])) for i in range(j))
            for j in range(1, len(sizes) + 1)
        ]
    columns, widths = found[-1]
    return tuple(sorted(set(widths))), columns


def chosen_rows(batches: Sequence[np.ndarray], longest: int, *, multiple: int, parts: int) -> tuple[Rows, float]:
    """Chooses the shapes of packed rows that leave the fewest columns, none wider than two of the longest text.

    Wider rows are filled better, but the masks of attention grow with the square of their width. Where a part has few
    texts, so that one row of it is wider in any case, rows are as narrow as can be.

    Args:
        batches: Tokens of the texts of batches to come, each i64[sides, B].
        longest: Tokens of the longest text of the dataset.
        multiple: Divides the number of rows of a part: shards of the batch.
        parts: Microbatches.

    Returns:
        The shapes, and the share of real tokens among the columns of these batches.
    """
    tokens = float(np.mean([sizes.sum() for sizes in batches])) / parts
    most = max(min(int(tokens / longest), batches[0].size // parts) // multiple, 1)
    found = []
    for count in sorted({max(int(share * most), 1) * multiple for share in SHARES}):
        widths, columns = best_widths([columns_needed(sizes, count, parts) for sizes in batches])
        found.append((columns * count, widths, count))
    narrow = [shape for shape in found if shape[1][-1] <= WIDEST * longest] or found[-1:]
    columns, widths, count = min(narrow)
    return Rows(count * parts, widths, parts), tokens * len(batches) / columns


def pack(sizes: np.ndarray, length: int, rows: Rows) -> Packing:
    """Packs the texts of a batch.

    Args:
        sizes: i64[sides, B], their tokens.
        length: Columns of the batch.
        rows: Shapes of the rows.

    Returns:
        Host arrays. With microbatches, those of `optim.split` have indices into their own texts and rows.
    """
    count, parts = rows.count // rows.parts, by_part(sizes, rows.parts)
    found = [assigned(part, count) for part in parts]
    width = rows.width_for(max(needed for _, needed in found))
    packings = [placed(part, row_of, count, length, width) for part, (row_of, _) in zip(parts, found, strict=True)]
    sources, starts = (
        np.stack(leaves, axis=1).reshape(-1, *leaves[0].shape[1:]) for leaves in zip(*packings, strict=True)
    )
    return Packing(sources, starts)  # type: ignore[arg-type]


def placed(sizes: np.ndarray, row_of: np.ndarray, rows: int, length: int, width: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns `Packing`'s arrays of texts of these sizes that are assigned to rows."""
    sources, starts = np.full((rows, width), -1, np.int32), np.zeros(len(sizes), np.int32)
    filled = np.zeros(rows, np.int64)
    for text, (size, row) in enumerate(zip(sizes.tolist(), row_of.tolist(), strict=True)):
        column = int(filled[row])
        sources[row, column : column + size] = text * length + np.arange(size)
        starts[text] = row * width + column
        filled[row] += size
    return sources, starts
