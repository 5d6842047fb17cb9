"""The report's tables, as cells of text: numbers and headings."""

import re
from collections.abc import Callable, Mapping, Sequence
from itertools import combinations
from typing import Any, NamedTuple

from safe_rlhf_jax.data.oracles import Measure
from safe_rlhf_jax.evaluation.health import rows_of
from safe_rlhf_jax.evaluation.statistics import (
    ALL,
    REDTEAM,
    TEST,
    Sample,
    asked,
    judged_unsafe,
    kinds_of_prompts,
    largest,
    paired_win_rate,
    plain,
    refused,
    select,
    share_of,
    summarize,
)

Summaries = Mapping[str, Mapping[str, float]]

JUDGES = (
    Measure("judge_unsafe_share", "unsafe, outside judges", True, "↓"),
    Measure("judge_reward_mean", "reward, outside judges", False, "↑"),
)
SCORES = (
    Measure("reward_mean", "mean reward", False, "↑"),
    Measure("cost_mean", "mean cost", False, "↓"),
    Measure("cost_positive_share", "cost > 0", True, "↓"),
    Measure("kl_mean", "KL (nats)", headline=False),
)
TEXTS = (
    Measure("length_mean", "length (tokens)"),
    Measure("truncation_rate", "truncated", True, "↓"),
    Measure("distinct_1", "distinct-1"),
    Measure("distinct_2", "distinct-2"),
    Measure("same_opening", "same opening", True),
)
PERPLEXITY = Measure("perplexity", "perplexity of demonstrations", False, "↓")
SCORER_METRICS = {
    "accuracy": "ranking accuracy",
    "sign_accuracy": "sign accuracy (cost > 0 is unsafe)",
    "calibration_error": "expected calibration error",
    "mean": "mean score",
    "std": "standard deviation of scores",
}
NOTHING = "–"
# The first policy is the baseline: grey.
POLICY_COLOURS = ("#8a8a8a", "#0072B2", "#E69F00", "#56B4E9", "#000000", "#882255", "#117733", "#B58900")


class Cell(NamedTuple):
    """One cell: its text, below it a confidence interval, before it a colour."""

    text: str
    interval: str = ""
    colour: str = ""


class Table(NamedTuple):
    """Headings and rows."""

    heads: Sequence[str]
    rows: Sequence[Sequence[Cell]]


def policy_colours(names: Sequence[str]) -> dict[str, str]:
    """One colour per policy, by position, so that it is the same in every table and figure."""
    return {name: POLICY_COLOURS[i % len(POLICY_COLOURS)] for i, name in enumerate(names)}


def measured(summaries: Summaries, measures: Sequence[Measure]) -> list[Measure]:
    """The measures of at least one policy."""
    return [measure for measure in measures if any(measure.name in summary for summary in summaries.values())]


def headline(summaries: Summaries, oracle: Sequence[Measure]) -> list[Measure]:
    """Measurements of an oracle; without one the judges' and scores of the models."""
    found = measured(summaries, [m for m in oracle if m.headline])
    return found or measured(summaries, [m for m in (*JUDGES, *SCORES) if m.headline])


def shown(summary: Mapping[str, float], measure: Measure) -> str:
    """A number in the report's format."""
    if measure.name not in summary:
        return NOTHING
    digits = 3 if measure.name.startswith("distinct") else 2
    text = f"{summary[measure.name]:.1%}" if measure.is_share else f"{summary[measure.name]:.{digits}f}"
    return re.sub(r"^-(0\.0+)$", r"\1", text)  # no negative zero


def metrics(summaries: Summaries, measures: Sequence[Measure], colours: Mapping[str, str]) -> Table | None:
    """Policies × measures, without the measures that no policy has."""
    measures = measured(summaries, measures)
    rows = []
    for name, summary in summaries.items():
        cells = [Cell(name, colour=colours[name])]
        for measure in measures:
            ends = [shown(summary, measure._replace(name=f"{measure.name}_{end}")) for end in ("low", "high")]
            cells.append(Cell(shown(summary, measure), "" if NOTHING in ends else " to ".join(ends)))
        rows.append(cells)
    return Table(["policy", *(f"{m.heading} {m.better}".strip() for m in measures)], rows) if measures else None


def prompt_counts(policies: Mapping[str, Sequence[Sample]]) -> list[str]:
    """A sentence for each non-empty split: the number of prompts, by group, and of distinct ones."""
    lines = []
    for split, title in ((TEST, "Test prompts"), (REDTEAM, "Red-team prompts")):
        members = select(asked(policies), split)
        groups = largest((s["group"] for s in members), len(kinds_of_prompts(members)))
        counts = [f"{name}: {len(select(members, split, behind))}" for name, behind in groups.items()]
        by_group = f" ({', '.join(counts)})" if len(counts) > 1 else ""
        different = len({s["prompt"] for s in members})
        repeats = f", {different} of them different" if different < len(members) else ""
        lines += [f"{title}: {len(members)}{by_group}{repeats}."] if members else []
    return lines


def win_rates(policies: Mapping[str, Sequence[Sample]], *, by_kind: bool) -> Table | None:
    """Each later policy against each earlier one, prompt by prompt: on all test prompts, or on each kind of prompts."""
    kinds = kinds_of_prompts(asked(policies))
    if by_kind and kinds.keys() == {ALL}:
        return None  # there is only one
    has_oracle = any(s.get("helpfulness") is not None for samples in policies.values() for s in samples)
    better = ("more helpful", "helpfulness", False) if has_oracle else ("higher reward", "reward", False)
    columns = (better, ("lower cost", "cost", True))
    rows = []
    for earlier, later in combinations(policies, 2):
        for kind, where in (kinds if by_kind else {ALL: (TEST, None)}).items():
            a, b = (select(policies[policy], *where) for policy in (later, earlier))
            rates = [paired_win_rate(a, b, score, lower_wins=lower_wins) for _, score, lower_wins in columns]
            if any(rates):
                cells = [share(rate) if rate else Cell(NOTHING) for rate in rates]
                rows.append([Cell(f"{later} against {earlier}"), Cell(kind), *cells])
    return Table(["win rate", "prompts", *(head for head, *_ in columns)], rows) if rows else None


def by_kind(
    policies: Mapping[str, Sequence[Sample]], cells_of: Callable[[list[Sample]], list[Cell]], colours: Mapping[str, str]
) -> list[list[Cell]]:
    """A row of cells for each policy on each kind of prompts."""
    kinds = kinds_of_prompts(asked(policies))
    return [
        [Cell(name, colour=colours[name]), Cell(kind), *cells_of(select(samples, *where))]
        for name, samples in policies.items()
        for kind, where in kinds.items()
    ]


def texts_by_kind(policies: Mapping[str, Sequence[Sample]], colours: Mapping[str, str]) -> Table | None:
    """Length and diversity on each kind of prompts, where there are several."""
    if len(kinds_of_prompts(asked(policies))) < 2:
        return None

    def cells(samples: list[Sample]) -> list[Cell]:
        summary = summarize([{**sample, "split": TEST} for sample in samples])
        return [Cell(shown(summary, measure)) for measure in TEXTS]

    heads = [f"{measure.heading} {measure.better}".strip() for measure in TEXTS]
    return Table(["policy", "prompts", *heads], by_kind(policies, cells, colours))


def refusals(policies: Mapping[str, Sequence[Sample]], colours: Mapping[str, str]) -> Table | None:
    """Refusals on each kind of prompts, headed by who read them; beside them the judges' view, if there are judges."""
    everything = [sample for samples in policies.values() for sample in samples]
    readers = sorted({str(sample["refusal_by"]) for sample in everything if sample.get("refusal_by")})
    columns = [(f"refusals, by the {' or the '.join(readers)}", refused), ("unsafe, by the judges", judged_unsafe)]
    columns = [(head, values) for head, values in columns if values(everything)]

    def cells(samples: list[Sample]) -> list[Cell]:
        known = [values(samples) for _, values in columns]
        return [share(share_of(values)) if values else Cell(NOTHING) for values in known]

    heads = ["policy", "prompts", *(head for head, _ in columns)]
    return Table(heads, by_kind(policies, cells, colours)) if readers else None


def share(found: Mapping[str, Any]) -> Cell:
    """A share with its confidence interval."""
    return Cell(f"{found['rate']:.1%}", f"{found['low']:.1%} to {found['high']:.1%}")


def scorers(found: Mapping[str, Mapping[str, Any]]) -> Table | None:
    """Metrics of the preference models on held-out pairs."""
    values = {name: scorer.get("metrics", {}) for name, scorer in found.items()}
    names: set[str] = {metric for metrics in values.values() for metric in metrics}
    ordered = [name for name in SCORER_METRICS if name in names] + sorted(names - SCORER_METRICS.keys())
    rows = [
        [Cell(SCORER_METRICS.get(n, n)), *(Cell(f"{m[n]:.3f}" if n in m else NOTHING) for m in values.values())]
        for n in ordered
    ]
    return Table(["on held-out pairs", *(f"{name} model" for name in values)], rows) if rows else None


def health(found: Mapping[str, Any] | None) -> Table | None:
    """Accuracy of a preference model by kinds of pairs."""
    if found is None:
        return None
    rows: list[list[Cell]] = []
    above = ""
    for kind, part, rate in rows_of(found):
        rows.append([Cell(kind if kind != above else ""), Cell(plain(part)), share(rate), Cell(str(rate["n"]))])
        above = kind
    return Table(["on held-out pairs", "", "share", "n"], rows)


def seconds(by_stage: Mapping[str, float]) -> Table | None:
    """Time by stage, and in all."""
    rows = {**by_stage, "total": sum(by_stage.values())}
    cells = [[Cell(name), Cell(f"{s:.1f} s"), Cell(f"{s / 60:.1f} min")] for name, s in rows.items()]
    return Table(["stage", "seconds", "minutes"], cells) if by_stage else None
