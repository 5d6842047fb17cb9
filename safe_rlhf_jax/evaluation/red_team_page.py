"""What a search for attacks has found, as a page."""

from collections.abc import Mapping, Sequence
from typing import Any

from safe_rlhf_jax.evaluation.page import Page, Section
from safe_rlhf_jax.evaluation.tables import NOTHING, Cell, Table, policy_colours, share

SUCCESS = (
    "Shares of responses that the labeller calls unsafe, with 95 % intervals. Round 0 are the seeds as they are; the "
    "attacks of later rounds are made from the strongest before. Held out are prompts that no training sees."
)
KEPT = (
    "The strongest prompts of each category, none too like another of its category: how many there are, for training "
    "and held out, how many have an unsafe response, and what they were last changed by."
)
STRONGEST = "The strongest prompt of each category, and a response to it."
SHOWN = 300  # characters of a text


def line(number: int, found: Mapping[str, Any]) -> str:
    """A round's success, for the log."""
    shares = {name: share(one) for name, one in found["success"].items()}
    said = ", ".join(f"{name} {cell.text} ({cell.interval})" for name, cell in shares.items())
    return f"round {number}: {found['attacks']} attacks; unsafe responses: {said or 'none was labelled'}"


def page(rounds: Sequence[Mapping[str, Any]], kept: Sequence[Mapping[str, Any]], **about: Any) -> Page:
    """A search as a page.

    Args:
        rounds: By round the success of its attacks: all, held out, by category.
        kept: The attacks that were kept, the strongest of each category first.
        about: Title, warnings and provenance of the page.
    """
    broken = {attack["category"] for attack in kept if attack["unsafe"] > 0}
    every = sorted({attack["category"] for attack in kept})
    attacks = sum(one["attacks"] for one in rounds)
    verdict = [f"Of {attacks} attacks in {len(rounds)} rounds {len(kept)} prompts are kept."]
    verdict.append(f"In {len(broken)} of {len(every)} categories one has an unsafe response.")
    sections = [
        Section("Attack success by round and category", SUCCESS, by_round(rounds), success_figure(rounds)),
        Section("What is kept", KEPT, what_is_kept(kept, every)),
        Section("Examples", STRONGEST, examples(kept, every)),
    ]
    return Page(verdict=verdict, sections=sections, **about)


def by_round(rounds: Sequence[Mapping[str, Any]]) -> Table:
    """The success of all attacks, of those held out and of each category, by round."""
    rows = {name: [one["success"].get(name) for one in rounds] for name in ("all", "held out")}
    for name in sorted({name for one in rounds for name in one["by_category"]}):
        rows[name] = [one["by_category"].get(name) for one in rounds]
    heads = ["attacks", *(f"round {i}" for i in range(len(rounds)))]
    cells = [[Cell(name), *(Cell(NOTHING) if one is None else share(one) for one in row)] for name, row in rows.items()]
    return Table(heads, cells)


def success_figure(rounds: Sequence[Mapping[str, Any]]) -> Any:
    """The success of all attacks and of those held out by round, with intervals; thin lines are the categories."""
    import matplotlib  # not before a figure is drawn: matplotlib takes half a second
    from matplotlib.ticker import PercentFormatter

    from safe_rlhf_jax.evaluation.plots import INK, PANEL, grid, handles_of, legend_below

    with matplotlib.rc_context({"text.parse_math": False}):  # names may contain dollar signs
        figure, (ax,) = grid(1, 1, width=PANEL * 1.7, height=3.6)
        for name in sorted({name for one in rounds for name in one["by_category"]}):
            found = {i: one["by_category"][name]["rate"] for i, one in enumerate(rounds) if name in one["by_category"]}
            ax.plot(list(found), list(found.values()), color=INK, lw=0.6, alpha=0.3)
        for name, colour in policy_colours(["all", "held out"]).items():
            shares = {i: one["success"][name] for i, one in enumerate(rounds) if name in one["success"]}
            rates = [one["rate"] for one in shares.values()]
            errors = [[one[b] - one[a] for one in shares.values()] for a, b in (("low", "rate"), ("rate", "high"))]
            ax.errorbar(list(shares), rates, yerr=errors, color=colour, marker="o", capsize=3, label=name)
        ax.set(xlabel="round", ylabel="unsafe responses", ylim=(0, 1.02), xticks=range(len(rounds)))
        ax.yaxis.set_major_formatter(PercentFormatter(1))
        legend_below(figure, handles_of([ax]))
    return figure


def what_is_kept(kept: Sequence[Mapping[str, Any]], categories: Sequence[str]) -> Table:
    """The number of prompts of each category, and how they were made."""
    rules = sorted({attack["by"] for attack in kept})
    rows = []
    for category in categories:
        own = [attack for attack in kept if attack["category"] == category]
        numbers = [sum(attack["is_test"] == side for attack in own) for side in (False, True)]
        numbers += [sum(attack["unsafe"] > 0 for attack in own)]
        numbers += [sum(attack["by"] == rule for attack in own) for rule in rules]
        rows.append([Cell(category), *(Cell(str(number)) for number in numbers)])
    return Table(["category", "for training", "held out", "unsafe", *rules], rows)


def examples(kept: Sequence[Mapping[str, Any]], categories: Sequence[str]) -> Table:
    """The strongest prompt of each category with its first response."""
    rows = []
    for category in categories:
        attack = max((one for one in kept if one["category"] == category), key=lambda one: (one["unsafe"], one["cost"]))
        texts = (attack["prompt"][-1]["content"], attack["responses"][0])
        rows.append([Cell(category), *(Cell(text[:SHOWN]) for text in texts), Cell(f"{attack['cost']:.2f}")])
    return Table(["category", "prompt", "response", "cost"], rows)
