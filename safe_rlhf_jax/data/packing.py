"""Texts of a batch in rows that several of them share, so that hardly any column is padding.

The batch itself stays what it is: its rows are gathered, and results are put back, within the step (`ops.packed`).
"""

import dataclasses
import heapq
from collections.abc import Sequence

import numpy as np

from safe_rlhf_jax.types import Packing

WIDTHS = 4  # of rows: each is compiled
ROUND = 8  # columns: widths are rounded up to a multiple
SIMULATED = 128  # batches that the widths are chosen from


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


def assigned(sizes: np.ndarray, rows: int) -> tuple[list[list[int]], int]:
    """Distributes texts over rows, the longest first, each to the emptiest row (Graham 1969).

    Returns:
        The texts of each row, and the tokens of the fullest.
    """
    fill = [(0, row) for row in range(rows)]
    texts: list[list[int]] = [[] for _ in range(rows)]
    for text in np.argsort(-sizes, kind="stable").tolist():
        used, row = heapq.heappop(fill)
        texts[row].append(text)
        heapq.heappush(fill, (used + int(sizes[text]), row))
    return texts, max(used for used, _ in fill)


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


def chosen_rows(batches: Sequence[np.ndarray], longest: int, *, multiple: int, parts: int) -> Rows:
    """Chooses the shapes of packed rows.

    Rows are about as long as the longest text, and as many as hold an average batch; the widths are quantiles of what
    the batches need.

    Args:
        batches: Tokens of the texts of batches to come, each i64[sides, B].
        longest: Tokens of the longest text of the dataset.
        multiple: Divides the number of rows of a part: shards of the batch.
        parts: Microbatches.
    """
    tokens, texts = np.mean([sizes.sum() for sizes in batches]) / parts, batches[0].size // parts
    count = min(max(int(tokens / longest) // multiple, 1), max(texts // multiple, 1)) * multiple
    needed = [columns_needed(sizes, count, parts) for sizes in batches]
    quantiles = np.quantile(needed, np.arange(1, WIDTHS + 1) / WIDTHS, method="higher")
    widths = sorted({-(-int(width) // ROUND) * ROUND for width in quantiles})
    return Rows(count * parts, tuple(widths), parts)


def pack(sizes: np.ndarray, length: int, rows: Rows) -> Packing:
    """Packs the texts of a batch.

    Args:
        sizes: i64[sides, B], their tokens.
        length: Columns of the batch.
        rows: Shapes of the rows.

    Returns:
        Host arrays. With microbatches, those of `optim.split` have indices into their own texts and rows.
    """
    count = rows.count // rows.parts
    width = rows.width_for(columns_needed(sizes, count, rows.parts))
    packings = [placed(part, assigned(part, count)[0], length, width) for part in by_part(sizes, rows.parts)]
    sources, starts = (
        np.stack(leaves, axis=1).reshape(-1, *leaves[0].shape[1:]) for leaves in zip(*packings, strict=True)
    )
    return Packing(sources, starts)  # type: ignore[arg-type]


def placed(sizes: np.ndarray, texts: Sequence[Sequence[int]], length: int, width: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns `Packing`'s arrays of texts that are assigned to rows."""
    sources, starts = np.full((len(texts), width), -1, np.int32), np.zeros(len(sizes), np.int32)
    for row, members in enumerate(texts):
        column = 0
        for text in members:
            size = int(sizes[text])
            sources[row, column : column + size] = text * length + np.arange(size)
            starts[text] = row * width + column
            column += size
    return sources, starts


def real_share(batches: Sequence[np.ndarray], rows: Rows) -> float:
    """Returns the share of real tokens among the columns of packed batches, as in `chosen_rows`."""
    count = rows.count // rows.parts
    columns = [rows.count * rows.width_for(columns_needed(sizes, count, rows.parts)) for sizes in batches]
    return float(sum(sizes.sum() for sizes in batches) / sum(columns))
