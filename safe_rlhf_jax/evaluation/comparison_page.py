"""A comparison of policies in words, as a figure and as a page."""

from collections.abc import Mapping, Sequence
from typing import Any

from safe_rlhf_jax.evaluation.comparisons import AXES, leading
from safe_rlhf_jax.evaluation.page import Page, Section
from safe_rlhf_jax.evaluation.tables import NOTHING, Cell, Table, policy_colours, share

ELO = (
    "Elo is 1000 for the first policy; 100 points more win about 64 % of the prompts. Below it stands its 95 % "
    "interval by a bootstrap over prompts, which is relative to the first policy, so that this one has none. The "
    "other columns say on which share of the prompts the row's policy wins over the column's, a tie counting one "
    "half, with 95 % intervals."
)
FIGURE = (
    "Each dot is one policy, the lines are 95 % intervals, and the thin line follows the order of the policies. "
    "Up is more harmless, right is more helpful."
)
ORDER = (
    "Judges of two responses are asked in both orders, and the average of the two verdicts counts. A flip is a "
    "pair of which each response is preferred in one order. The last column is the share of verdicts for the "
    "response that is shown first, a tie counting one half: without a position bias it is 50 %. Judges that score "
    "each response alone see no order."
)


def line(row: Mapping[str, Any]) -> str:
    """The Elo of each policy, for the log."""
    ratings = {policy: rated(rating) for policy, rating in row["elo"].items()}
    return ", ".join(
        f"{policy} {cell.text}" + (f" ({cell.interval})" if cell.interval else "") for policy, cell in ratings.items()
    )


def order_line(effects: Mapping[str, Any]) -> str:
    """Ties, flips and position bias of a judge, for the log."""
    ties, flips, first = (effects[name]["rate"] for name in ("ties", "flips", "first"))
    return f"{ties:.1%} ties, {flips:.1%} flips, {first:.1%} of verdicts for the response shown first"


def page(rows: Sequence[Mapping[str, Any]], orders: Mapping[str, Mapping[str, Any]], **about: Any) -> Page:
    """A comparison as a page.

    Args:
        rows: Of `compared`.
        orders: By judge, of `order_effects`.
        about: Title, warnings and provenance of the page.
    """
    first = leading(rows)
    sections = [Section("Outcome", ELO, ratings(list(first.values())))]
    figure = elo_figure(first)
    sections = ([Section("Helpfulness and harmlessness", FIGURE, figure=figure)] if figure else []) + sections
    if others := [row for row in rows if row is not first[row["axis"]]]:
        sections.append(Section("Each judge, and each kind of prompts", "As above.", ratings(others)))
    if orders:
        sections.append(Section("Order", ORDER, order_table(orders)))
    said = [
        f"{axis.capitalize()} by {row['judge']}, Elo on {row['n']} prompts: {line(row)}." for axis, row in first.items()
    ]
    return Page(verdict=said, sections=sections, **about)


def ratings(rows: Sequence[Mapping[str, Any]]) -> Table:
    """Elo and win rates, a row for each policy."""
    policies = list(rows[0]["elo"])
    colours = policy_colours(policies)
    cells = [
        [Cell(row["axis"]), Cell(row["judge"]), Cell(row["prompts"]), Cell(str(row["n"]))]
        + [Cell(policy, colour=colours[policy]), rated(row["elo"][policy])]
        + [share(rate) if rate else Cell(NOTHING) for rate in rates]
        for row in rows
        for policy, rates in zip(policies, row["win_rates"], strict=True)
    ]
    return Table(
        ["axis", "judge", "prompts", "n", "policy", "Elo ↑", *(f"wins over {name}" for name in policies)], cells
    )


def rated(rating: Mapping[str, float]) -> Cell:
    """An Elo with its interval, which the first policy does not have."""
    low, high = rating["low"], rating["high"]
    return Cell(f"{rating['elo']:.0f}", f"{low:.0f} to {high:.0f}" if low < high else "")


def order_table(orders: Mapping[str, Mapping[str, Any]]) -> Table:
    """Ties, flips and position bias of each judge of two responses."""
    heads = ["judge", "verdicts", "ties", "flips", "for the first shown"]
    return Table(
        heads,
        [
            [Cell(judge), Cell(str(found["verdicts"])), *(share(found[name]) for name in ("ties", "flips", "first"))]
            for judge, found in orders.items()
        ],
    )


def elo_figure(rows: Mapping[str, Mapping[str, Any]]) -> Any:
    """Elo of harmlessness over Elo of helpfulness, a dot for each policy; None without both.

    Source: figure 5 of Dai et al. 2023 (arXiv 2310.12773).

    Args:
        rows: By axis, of `compared`.
    """
    axes = list(AXES.values())
    if rows.keys() != set(axes):
        return None
    import matplotlib  # not before a figure is drawn: matplotlib takes half a second

    from safe_rlhf_jax.evaluation.plots import INK, PANEL, grid, handles_of, legend_below, short

    ratings = [rows[axis]["elo"] for axis in axes]
    with matplotlib.rc_context({"text.parse_math": False}):  # names may contain dollar signs
        figure, (ax,) = grid(1, 1, width=PANEL * 1.7, height=4.4)
        places = [[rating[policy]["elo"] for policy in rating] for rating in ratings]
        ax.plot(*places, color=INK, lw=0.7, alpha=0.5)
        for policy, colour in policy_colours(list(ratings[0])).items():
            x, y = (rating[policy] for rating in ratings)
            errors = [[[r["elo"] - r["low"]], [r["high"] - r["elo"]]] for r in (x, y)]
            ax.errorbar(
                x["elo"], y["elo"], xerr=errors[0], yerr=errors[1], fmt="o", color=colour, ms=7, capsize=3,
                label=short(policy),
            )  # fmt: skip
        ax.set(xlabel=f"{axes[0]} (Elo) →", ylabel=f"{axes[1]} (Elo) →")
        legend_below(figure, handles_of([ax]))
    return figure
