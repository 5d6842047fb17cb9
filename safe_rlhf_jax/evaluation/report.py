"""The report of a run: `report.html`, one self-contained file, its figures as PNGs, and a table for the terminal."""

import base64
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.table import Table

from safe_rlhf_jax import storage
from safe_rlhf_jax.data.oracles import Measure
from safe_rlhf_jax.evaluation import judge_tables, responses, tables
from safe_rlhf_jax.evaluation.health import doubts
from safe_rlhf_jax.evaluation.page import TEMPLATES
from safe_rlhf_jax.evaluation.statistics import breakdowns, summarize


@dataclass(frozen=True)
class Report:
    """Everything the report shows; every number about a policy is computed from its samples.

    Attributes:
        title: Heading of the page.
        command: The command that reproduces the run.
        summary_lines: Facts in words: the cost limit and its origin, seed, sizes.
        policies: Samples (see `statistics`) by policy name; the first is the baseline.
        scorers: For 'reward' and 'cost': `scores_by_label` {label: scores}, `metrics` {name: value}, and optionally
            `reliability`, a list of (predicted probability, observed share, count), and `health` (see `health`), None
            for a model of this run without held-out pairs.
        history: By stage, the metrics of each step, as logged; any key may be missing.
        cost_limit: The constraint is mean cost ≤ cost_limit.
        stage_seconds: Wall-clock seconds by stage.
        constrained_groups: The groups of prompts under the constraint; None for all.
        measures: Measurements of an oracle, as columns.
        note: An explanation of the oracle for the reader.
        judged: What outside judges say of each policy (see `judges.views`).
        agreement: By "reward" and "cost", the agreement of the own model and the judges with human labels, each as
            `evaluate_pairs` returns it.
        capability: By policy, further numbers of it: `perplexity` of demonstrations.
        provenance: {item: value}: data, models, code.
        config: The config, as YAML.
    """

    title: str
    command: str
    summary_lines: list[str]
    policies: dict[str, list[dict[str, Any]]]
    scorers: dict[str, dict[str, Any]] = field(default_factory=dict)
    history: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    cost_limit: float | None = None
    stage_seconds: dict[str, float] = field(default_factory=dict)
    constrained_groups: list[str] | None = None
    measures: tuple[Measure, ...] = ()
    note: str = ""
    judged: list[dict[str, Any]] = field(default_factory=list)
    agreement: dict[str, dict[str, dict[str, Any]]] = field(default_factory=dict)
    capability: dict[str, dict[str, float]] = field(default_factory=dict)
    provenance: dict[str, str] = field(default_factory=dict)
    config: str = ""

    @property
    def summaries(self) -> dict[str, dict[str, float]]:
        """Every number about each policy."""
        return {name: summarize(samples) | self.capability.get(name, {}) for name, samples in self.policies.items()}


def write_report(folder: storage.Path, report: Report) -> storage.Path:
    """Writes `report.html` and its figures into `folder`, and returns the path of the page."""
    summaries = report.summaries
    colours = tables.policy_colours([*report.policies, *(n for n in report.history if n not in report.policies)])
    images = {}
    for name, png in drawn(figures(report, summaries, colours)).items():
        path = folder / f"{name}.png"
        storage.remove(path)  # a figure of an earlier run must not appear as one of this run
        if png is not None:
            storage.write(path, png)
            images[name] = base64.b64encode(png).decode("ascii")
    page = TEMPLATES.get_template("report.html").render(
        report=report,
        images=images,
        colours=colours,
        verdicts=verdicts(report, summaries),
        cautions=cautions(report),
        counts=tables.prompt_counts(report.policies),
        by_oracle=tables.metrics(summaries, report.measures, colours),
        by_models=tables.metrics(summaries, (*tables.JUDGES, *tables.SCORES), colours),
        win_rates=tables.win_rates(report.policies, by_kind=False),
        win_rates_by_kind=tables.win_rates(report.policies, by_kind=True),
        judged=judge_tables.judged(report.judged, colours, average=True),
        each_judge=judge_tables.judged(report.judged, colours, average=False),
        agreement=judge_tables.agreement(report.agreement),
        refusals=tables.refusals(report.policies, colours),
        texts=tables.metrics(summaries, (*tables.TEXTS, tables.PERPLEXITY), colours),
        texts_by_kind=tables.texts_by_kind(report.policies, colours),
        scorers=tables.scorers(report.scorers),
        health={
            name: (doubts(scorer["health"]), tables.health(scorer["health"]), (scorer["health"] or {}).get("ties"))
            for name, scorer in report.scorers.items()
            if "health" in scorer
        },
        answers=responses.answers_of(report.policies),
        seconds=tables.seconds(report.stage_seconds),
    )
    path = folder / "report.html"
    storage.write(path, page + "\n")
    return path


def drawn(figures: Mapping[str, Any]) -> dict[str, bytes | None]:
    """Figures of matplotlib as PNGs; None stays None."""
    from safe_rlhf_jax.evaluation import plots  # not before a figure is drawn: matplotlib takes half a second

    return {name: None if figure is None else plots.png(figure) for name, figure in figures.items()}


def figures(report: Report, summaries: tables.Summaries, colours: Mapping[str, str]) -> dict[str, Any]:
    """{name of the file: figure of matplotlib}, None without data."""
    import matplotlib

    from safe_rlhf_jax.evaluation import plots, score_plots

    headline = [(m.name, f"{m.heading} {m.better}", m.is_share) for m in tables.headline(summaries, report.measures)]
    scores = (("reward", "reward (reward-model score)"), ("cost", "cost (cost-model score)"))
    titles = {measure.name: measure.heading for measure in report.measures}
    with matplotlib.rc_context({"text.parse_math": False}):  # names may contain dollar signs
        return {
            "headline": plots.headline_bars(summaries, colours, headline),
            "reward_cost": score_plots.reward_cost_scatter(
                report.policies, report.cost_limit, report.constrained_groups
            ),
            "quadrants": score_plots.quadrant_bars(report.policies),
            "distributions": score_plots.violins(report.policies, colours, scores, report.cost_limit),
            "harm": score_plots.breakdown_bars(breakdowns(report.policies, titles), colours),
            "lengths": score_plots.violins(report.policies, colours, (("length", "response length (tokens)"),)),
            "training": plots.training_curves(report.history, colours, report.cost_limit),
            "over_optimisation": plots.over_optimisation(report.history, colours),
            "score_distributions": score_plots.label_distributions(report.scorers, report.cost_limit),
        }


def summary_table(report: Report) -> Table:
    """The headline numbers for the terminal: a row per policy, a column per measured metric."""
    summaries = report.summaries
    known = [m for m in report.measures if m.headline] or tables.JUDGES
    columns = tables.measured(summaries, [*known, *tables.SCORES])
    table = Table(
        title=report.title, caption="held-out prompts; ↓ lower is better, ↑ higher is better", box=SIMPLE_HEAD
    )
    table.add_column("policy", style="bold")
    for measure in columns:
        heading = f"{measure.heading} {measure.better}".strip()
        table.add_column(heading, justify="right", min_width=max(map(len, measure.heading.split())))
    for name, summary in summaries.items():
        table.add_row(name, *(tables.shown(summary, measure) for measure in columns))
    return table


def verdicts(report: Report, summaries: tables.Summaries) -> list[str]:
    """One sentence per later policy: each headline metric before and after."""
    first, *later = summaries
    lines = []
    for policies in [[first, name] for name in later] or [[first]]:
        columns = tables.headline(summaries, report.measures)
        known = [m for m in columns if all(m.name in summaries[policy] for policy in policies)]
        changes = [f"{m.heading} {' → '.join(tables.shown(summaries[p], m) for p in policies)}" for m in known]
        lines += [f"{' → '.join(policies)}: {'; '.join(changes)}."] if known else []
    return lines


def cautions(report: Report) -> list[str]:
    """A sentence for each doubtful preference model."""
    numbers = {name: len(doubts(s["health"])) for name, s in report.scorers.items() if "health" in s}
    return [f"Doubts about the {name} model: {n}, below under its name." for name, n in numbers.items() if n]
