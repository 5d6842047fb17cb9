"""The certificate in words, and as a page."""

from collections.abc import Mapping, Sequence
from typing import Any

from safe_rlhf_jax.evaluation.certificates import CLOPPER_PEARSON
from safe_rlhf_jax.evaluation.page import Page, Section
from safe_rlhf_jax.evaluation.tables import NOTHING, Cell, Table

NOTE = (
    "Each row is one claim about one group of prompts. The bound holds for its row alone with confidence 1 − δ, "
    "the next column for all rows at once. p is the smallest δ at which the bound alone would meet the limit; "
    "after Holm it allows for all rows being tested at once. A claim holds where that is at most δ: the "
    "probability that a claim is called true that is not true is then at most δ. Student's t takes the costs to "
    "be nearly normal, empirical Bernstein to be independent and within the range, Clopper–Pearson to be "
    "independent. All of it is about prompts like these, and a cost is the opinion of the model or function that "
    "is named."
)


def verdict(policy: str, rows: Sequence[Mapping[str, Any]], delta: float) -> str:
    """One sentence: whether all claims hold, or which do not."""
    failed = [row for row in rows if not row["passes"]]
    if not failed:
        return f"{policy} meets its limits with confidence {1 - delta:g}: all {len(rows)} claims hold"
    found = f"{len(failed)} of {len(rows)} claims about {policy} do not hold"
    return f"no safe policy found: with confidence {1 - delta:g}, {found}: {'; '.join(map(line, failed))}"


def line(row: Mapping[str, Any]) -> str:
    """A claim with its numbers, for the log."""
    estimate, bound, limit = (shown(row, name) for name in ("estimate", "bound", "limit"))
    result = "holds" if row["passes"] else "does not hold"
    return (
        f"{row['group']}, {row['signal']}: {row['quantity']} {estimate}, at most {bound} ({row['by']}, n {row['n']}), "
        f"limit {limit}, p = {row['adjusted_p_value']:.3g} after Holm, {result}"
    )


def shown(row: Mapping[str, Any], name: str) -> str:
    """A number of a row, as a share where it is one."""
    if row[name] is None:
        return NOTHING
    return f"{row[name]:.2%}" if row["quantity"] == CLOPPER_PEARSON.quantity else f"{row[name]:.3f}"


def page(policy: str, rows: Sequence[Mapping[str, Any]], delta: float, **about: Any) -> Page:
    """The certificate as a page.

    Args:
        policy: Its name.
        rows: Of `certificate`.
        delta: δ.
        about: Title, warnings and provenance of the page.
    """
    heads = [
        "prompts", "signal", "quantity", "by", "n", "estimate", "bound", "bound, all at once", "limit", "p",
        "p after Holm", "holds",
    ]  # fmt: skip
    cells = [
        [Cell(str(row[name])) for name in ("group", "signal", "quantity", "by", "n")]
        + [Cell(shown(row, name)) for name in ("estimate", "bound", "bound_at_once", "limit")]
        + [Cell(f"{row[name]:.3g}") for name in ("p_value", "adjusted_p_value")]
        + [Cell("yes" if row["passes"] else "no")]
        for row in rows
    ]
    return Page(
        verdict=[verdict(policy, rows, delta) + "."], sections=[Section("Claims", NOTE, Table(heads, cells))], **about
    )
