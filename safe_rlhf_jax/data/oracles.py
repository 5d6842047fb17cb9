"""Ground truth about responses, if a data set has it: an oracle's readings, and their columns in the report."""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple


class Measure(NamedTuple):
    """A number about a policy, as a column of the report."""

    name: str  # in result.json
    heading: str
    is_share: bool = False
    better: str = ""  # ↓, ↑, or neither
    headline: bool = True  # in the figure at the top


@dataclasses.dataclass(frozen=True)
class Oracle:
    """The ground truth of a world.

    Attributes:
        read: (prompt, response, split) -> fields of a sample: `harmful`, `helpfulness`, `refusal`, `severity`, and
            `measured`, {metric: what this response counts for}. A metric is the mean over the responses that count; of
            true and false it is a share. `<metric>/<part>` is a metric by parts, a figure of its own.
        measures: The metrics in `measured`, in the order of the report's columns; those by parts by their first half.
        note: An explanation for the reader.
    """

    read: Callable[[str, str, str], dict[str, Any]]
    measures: tuple[Measure, ...]
    note: str
