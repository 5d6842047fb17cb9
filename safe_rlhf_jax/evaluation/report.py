"""The report of a run: `report.html`, one self-contained file, its figures as PNGs, and a table for the terminal."""

import base64
import io
import operator
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
from rich.box import SIMPLE_HEAD
from rich.table import Table

from safe_rlhf_jax.data.demo import measures
from safe_rlhf_jax.evaluation import plots
from safe_rlhf_jax.evaluation.health import doubts, rows_of
from safe_rlhf_jax.evaluation.statistics import largest, paired_win_rate, select, summarize

# Metric, heading, is a share, which direction is better ('' if neither).
ORACLE_COLUMNS = tuple((m.name, m.heading, m.is_share, m.better) for m in measures.MEASURES)
MODEL_COLUMNS = (
    ("reward_mean", "mean reward", False, "↑"),
    ("cost_mean", "mean cost", False, "↓"),
    ("cost_positive_share", "cost > 0", True, "↓"),
    ("kl_mean", "KL (nats)", False, ""),
    ("length_mean", "length (tokens)", False, ""),
    ("truncation_rate", "truncated", True, "↓"),
    ("distinct_1", "distinct-1", False, ""),
    ("distinct_2", "distinct-2", False, ""),
)
# In the headline figure: what an oracle measured, or without one the opinions of the models.
WITH_ORACLE = tuple(c for c, m in zip(ORACLE_COLUMNS, measures.MEASURES, strict=True) if m.headline)
WITHOUT_ORACLE = MODEL_COLUMNS[:3]
TERMINAL = WITH_ORACLE + MODEL_COLUMNS[:4]
PROMPTS_SHOWN = 12  # with their responses; more where there are more groups of prompts
ALL = "test prompts"
MOST_GROUPS = 24  # the smallest of more are taken together

STYLE = """
body{font:16px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,sans-serif;color:#222;background:#fff;max-width:1120px;
margin:2.5rem auto;padding:0 1.25rem}
h1{font-size:1.8rem;margin:0 0 .4rem}h2{font-size:1.25rem;margin:2.6rem 0 .5rem;padding-top:.6rem;border-top:1px solid
#ddd}code{font:13px ui-monospace,Menlo,Consolas,monospace;background:#f4f4f4;padding:.15em .4em;border-radius:4px;
overflow-wrap:anywhere}
.verdict{background:#f2f7fb;border-left:4px solid #0072B2;padding:.6rem 1rem;margin:1.2rem 0}.verdict p{margin:.3rem 0}
figure{margin:1rem 0}img{max-width:100%;height:auto;display:block;margin:auto}
figcaption,.note{color:#555;font-size:.9rem;max-width:62rem;margin:.5rem 0}.scroll{overflow-x:auto}
table{border-collapse:collapse;font-size:.88rem;margin:.8rem 0}th,td{padding:.35rem .65rem;
border-bottom:1px solid #e6e6e6;text-align:right;vertical-align:top;font-variant-numeric:tabular-nums}
th{font-weight:600;vertical-align:bottom;background:#fafafa}th:first-child,td:first-child,.text{text-align:left}
td:first-child{white-space:nowrap}.prompt td:first-child{white-space:normal}
.ci{display:block;color:#777;font-size:.78rem;white-space:nowrap}
.responses{width:100%}.responses td:nth-child(n+3),.responses th{white-space:nowrap}
.prompt td{background:#f4f4f4;font-weight:600;border-top:2px solid #ccc}
.prompt small{font-weight:400;color:#666;margin-left:.6rem}.text{white-space:pre-wrap;overflow-wrap:anywhere}
.safe,.unsafe,.plain{border-radius:4px;padding:.05em .45em;white-space:nowrap;margin-left:.2em}
.safe{background:#d9f0e8;color:#00523d}.unsafe{background:#fbe0d2;color:#8a3500}.plain{background:#eee;color:#444}
.doubts{background:#fdf3e7;border-left:4px solid #D55E00;padding:.6rem 1rem}.doubts p{margin:.3rem 0}
.swatch{display:inline-block;width:.75em;height:.75em;border-radius:2px;margin-right:.45em}
"""


SCORER_METRICS = {
    "accuracy": "ranking accuracy",
    "sign_accuracy": "sign accuracy (cost > 0 is unsafe)",
    "calibration_error": "expected calibration error",
    "mean": "mean score",
    "std": "standard deviation of scores",
}


@dataclass(frozen=True)
class Report:
    """Everything the report shows; every number about a policy is computed from its samples.

    Attributes:
        title: Heading of the page.
        command: The command that reproduces the run.
        summary_lines: Facts in words: the cost limit and how it was chosen, seed, sizes.
        policies: Samples (see `statistics`) by policy name; the first is SFT, then the trained ones.
        scorers: For 'reward' and 'cost': `scores_by_label` {label: scores}, `metrics` {name: value}, and optionally
            `reliability`, a list of (predicted probability, observed share, count), and `health` (see `health`), None
            for a model of this run that was not held against any pairs.
        history: By policy name, the metrics of each RL step, as logged; any key may be missing.
        cost_limit: The constraint is mean cost ≤ cost_limit.
        stage_seconds: Wall-clock seconds by stage.
        constrained_groups: The groups of prompts that the constraint is about; None for all.
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


def write_report(folder: Path, report: Report) -> Path:
    """Writes `report.html` and its figures into `folder`, and returns the path of the page."""
    folder.mkdir(parents=True, exist_ok=True)
    summaries = {name: summarize(samples) for name, samples in report.policies.items()}
    sections = []
    for name, figure in _figures(report, summaries).items():
        title, _, caption = plots.CAPTIONS[name].partition(". ")
        path = folder / f"{name}.png"
        path.unlink(missing_ok=True)  # a figure of an earlier run must not pass for one of this run
        tables = {"headline": _headline(report, summaries), "score_distributions": _scorers(report)}.get(name, "")
        image = ""
        if figure is not None:
            buffer = io.BytesIO()
            figure.savefig(buffer, format="png")
            path.write_bytes(buffer.getvalue())
            source = "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")
            caption = escape(caption.format(limit=_limit_sentence(report)))
            image = f'<figure><img alt="{title}" src="{source}"><figcaption>{caption}</figcaption></figure>'
        if image or tables:
            sections.append(f"<h2>{title}</h2>{image}{tables}")
    facts = "".join(f"<li>{escape(line)}</li>" for line in report.summary_lines)
    verdict = "".join(f"<p>{escape(line)}</p>" for line in _verdicts(summaries) + _cautions(report))
    page = (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{escape(report.title)}</title>'
        f'<meta name="viewport" content="width=device-width"><style>{STYLE}</style></head><body>'
        f"<h1>{escape(report.title)}</h1><p><code>{escape(report.command)}</code></p>"
        f'<div class="verdict">{verdict}</div><ul>{facts}</ul>'
        f"{''.join(sections)}{_responses(report)}{_stages(report)}</body></html>\n"
    )
    path = folder / "report.html"
    path.write_text(page, encoding="utf-8")
    return path


def summary_table(report: Report) -> Table:
    """The headline numbers for the terminal: a row per policy, a column per metric that was measured."""
    summaries = {name: summarize(samples) for name, samples in report.policies.items()}
    columns = [c for c in TERMINAL if any(c[0] in s for s in summaries.values())]
    table = Table(
        title=report.title, caption="held-out prompts; ↓ lower is better, ↑ higher is better", box=SIMPLE_HEAD
    )
    table.add_column("policy", style="bold")
    for _, heading, _, arrow in columns:
        table.add_column(f"{heading} {arrow}".strip(), justify="right", min_width=max(map(len, heading.split())))
    for name, summary in summaries.items():
        table.add_row(name, *(_value(summary, metric, share) for metric, _, share, _ in columns))
    return table


def _figures(report: Report, summaries: Mapping[str, Mapping[str, float]]) -> dict[str, Any]:
    colours = plots.policy_colours([*report.policies, *(n for n in report.history if n not in report.policies)])
    headline = [(m, f"{heading} {arrow}", share) for m, heading, share, arrow in _headline_columns(summaries)]
    return {
        "headline": plots.headline_bars(summaries, colours, headline),
        "reward_cost": plots.reward_cost_scatter(report.policies, report.cost_limit, report.constrained_groups),
        "training": plots.training_curves(report.history, colours, report.cost_limit),
        "harm_by_category": plots.harm_by_category(report.policies, colours),
        "score_distributions": plots.score_distributions(report.scorers, report.cost_limit),
    }


def _limit_sentence(report: Report) -> str:
    if report.cost_limit is None:
        return ""
    on = f" on {', '.join(report.constrained_groups)} prompts" if report.constrained_groups else ""
    return f" The dashed line is the cost limit, {report.cost_limit:.2f}: training pushes the mean cost{on} below it."


def _headline_columns(summaries: Mapping[str, Mapping[str, float]]) -> list[tuple[str, str, bool, str]]:
    """What an oracle measured, or without one the opinions of the models."""
    has_oracle = any(c[0] in s for s in summaries.values() for c in WITH_ORACLE)
    return list(WITH_ORACLE if has_oracle else WITHOUT_ORACLE)


def _verdicts(summaries: Mapping[str, Mapping[str, float]]) -> list[str]:
    """One sentence per trained policy: each headline metric before and after."""
    first, *trained = summaries
    lines = []
    for policies in [[first, name] for name in trained] or [[first]]:
        known = [c for c in _headline_columns(summaries) if all(c[0] in summaries[p] for p in policies)]
        values = [" → ".join(_value(summaries[p], c[0], c[2]) for p in policies) for c in known]
        changes = [f"{c[1]} {value}" for c, value in zip(known, values, strict=True)]
        lines += [f"{' → '.join(policies)}: {'; '.join(changes)}."] if known else []
    return lines


def _cautions(report: Report) -> list[str]:
    """A sentence for each preference model that there are doubts about."""
    numbers = {name: len(doubts(s["health"])) for name, s in report.scorers.items() if "health" in s}
    return [f"Doubts about the {name} model: {n}, below under its name." for name, n in numbers.items() if n]


def _headline(report: Report, summaries: Mapping[str, Mapping[str, float]]) -> str:
    oracle = _metrics(summaries, ORACLE_COLUMNS)
    note = " ".join(
        [
            *_prompt_counts(_asked(report)),
            *([measures.NOTE] if oracle else []),
            "Reward and cost are the opinions of the reward and the cost model. Below a value stands its 95 % "
            "confidence interval; ↓ means lower is better, ↑ higher.",
        ]
    )
    tables = oracle + _metrics(summaries, MODEL_COLUMNS)
    return tables + f'<p class="note">{escape(note)}</p>' + _win_rates(report)


def _asked(report: Report) -> list[dict[str, Any]]:
    """The samples of the policy that answered most: they tell the prompts."""
    return max(report.policies.values(), key=len)


def _prompt_counts(samples: Sequence[Mapping[str, Any]]) -> list[str]:
    """A sentence for each split that has prompts: how many, by group, and how many of them differ."""
    lines = []
    for split, title in (("test", "Test prompts"), ("redteam", "Red-team prompts")):
        members = select(samples, split)
        groups = largest((s["group"] for s in members), MOST_GROUPS)
        counts = [f"{name}: {len(select(members, split, behind))}" for name, behind in groups.items()]
        by_group = f" ({', '.join(counts)})" if len(counts) > 1 else ""
        different = len({s["prompt"] for s in members})
        repeats = f", {different} of them different" if different < len(members) else ""
        lines += [f"{title}: {len(members)}{by_group}{repeats}."] if members else []
    return lines


def _kinds(samples: Sequence[Mapping[str, Any]]) -> dict[str, tuple[str, tuple[str, ...] | None]]:
    """{kind of prompts: (split, groups)}: each group of test prompts, or all where there is but one; the red team."""
    groups = largest((s["group"] for s in select(samples, "test")), MOST_GROUPS)
    kinds: dict[str, tuple[str, tuple[str, ...] | None]] = {name: ("test", behind) for name, behind in groups.items()}
    kinds = {ALL: ("test", None)} if len(groups) == 1 else kinds
    return kinds | ({"red team": ("redteam", None)} if select(samples, "redteam") else {})


def _metrics(summaries: Mapping[str, Mapping[str, float]], columns: Sequence[tuple[str, str, bool, str]]) -> str:
    """A table of policies × metrics, without the metrics that no policy has."""
    colours = plots.policy_colours(list(summaries))
    columns = [c for c in columns if any(c[0] in s for s in summaries.values())]
    rows = []
    for name, summary in summaries.items():
        cells = [f'<i class="swatch" style="background:{colours[name]}"></i>{escape(name)}']
        for metric, _, share, _ in columns:
            interval = ""
            if f"{metric}_low" in summary:
                low, high = (_value(summary, f"{metric}_{end}", share) for end in ("low", "high"))
                interval = f'<span class="ci">{low} to {high}</span>'
            cells.append(_value(summary, metric, share) + interval)
        rows.append(cells)
    return _table(["policy", *(f"{heading} {arrow}" for _, heading, _, arrow in columns)], rows) if columns else ""


def _win_rates(report: Report) -> str:
    """Each later policy against each earlier one, prompt by prompt, on all test prompts and on each kind of prompts."""
    everything = [s for samples in report.policies.values() for s in samples]
    has_oracle = any(s.get("helpfulness") is not None for s in everything)
    better = ("more helpful", "helpfulness", False) if has_oracle else ("higher reward", "reward", False)
    columns = (better, ("lower cost", "cost", True))
    rows = []
    for earlier, later in combinations(report.policies, 2):
        for kind, where in ({ALL: ("test", None)} | _kinds(_asked(report))).items():
            a, b = (select(report.policies[policy], *where) for policy in (later, earlier))
            rates = [paired_win_rate(a, b, score, lower_wins=lower_wins) for _, score, lower_wins in columns]
            cells = [f"{r['rate']:.1%}{_interval(r)}" if r else "–" for r in rates]
            rows += [[escape(f"{later} against {earlier}"), escape(kind), *cells]] if any(rates) else []
    note = (
        "Share of prompts on which the first policy's response is better than the second's; a tie counts one half, and "
        "several responses to one prompt are averaged."
    )
    heads = ["win rate", "prompts", *(c[0] for c in columns)]
    return _table(heads, rows) + f'<p class="note">{note}</p>' if rows else ""


def _interval(share: Mapping[str, Any]) -> str:
    return f'<span class="ci">{share["low"]:.1%} to {share["high"]:.1%}</span>'


def _scorers(report: Report) -> str:
    present = {metric for scorer in report.scorers.values() for metric in scorer.get("metrics", {})}
    names = [name for name in SCORER_METRICS if name in present] + sorted(present - SCORER_METRICS.keys())
    metrics = {name: scorer.get("metrics", {}) for name, scorer in report.scorers.items()}
    cells = {n: [f"{m[n]:.3f}" if n in m else "–" for m in metrics.values()] for n in names}
    titles = {n: n for n in names} | SCORER_METRICS
    rows = [[escape(titles[n]), *cells[n]] for n in names]
    table = _table(["on held-out pairs", *(f"{name} model" for name in metrics)], rows) if rows else ""
    return table + "".join(_health(name, s["health"]) for name, s in report.scorers.items() if "health" in s)


def _health(name: str, health: Mapping[str, Any] | None) -> str:
    """What is known of a preference model, and against it."""
    against = "".join(f"<p>{escape(problem)}</p>" for problem in doubts(health))
    html = f"<h3>{name.capitalize()} model</h3>" + (f'<div class="doubts">{against}</div>' if against else "")
    if health is None:
        return html
    rows, above = [], ""
    for kind, part, share in rows_of(health):
        first = escape(kind) if kind != above else ""
        rows.append([first, escape(part), f"{share['rate']:.1%}{_interval(share)}", str(share["n"])])
        above = kind
    note = f"A tie counts one half; {health['ties']:.1%} of the pairs tie."
    return html + _table(["on held-out pairs", "", "share", "n"], rows) + f'<p class="note">{note}</p>'


def _stages(report: Report) -> str:
    if not report.stage_seconds:
        return ""
    seconds = {**report.stage_seconds, "total": sum(report.stage_seconds.values())}
    rows = [[escape(stage), f"{s:.1f} s", f"{s / 60:.1f} min"] for stage, s in seconds.items()]
    return "<h2>Time by stage</h2>" + _table(["stage", "seconds", "minutes"], rows)


def _responses(report: Report) -> str:
    """About twelve prompts, evenly spaced over each kind of prompts, with what every policy answers."""
    asked = _asked(report)
    key = operator.itemgetter("split", "group", "prompt")
    answers = {p: {key(s): s for s in reversed(v)} for p, v in report.policies.items()}
    several, kinds = len({s["group"] for s in asked}) > 1, _kinds(asked)
    rows = []
    for split, groups in kinds.values():
        found = {s["prompt"]: s for s in select(asked, split, groups)}
        candidates = sorted(found.values(), key=lambda s: (str(s.get("category")), s["prompt"]))
        count = max(1, PROMPTS_SHOWN // len(kinds))
        where = np.linspace(0, len(candidates) - 1, 2 * count + 1)[1::2].astype(int).tolist()
        for prompt in (candidates[i] for i in sorted(set(where))):
            known = (split, prompt["group"] if several else "", prompt.get("category"))
            kind = " · ".join(str(v) for v in known if v)
            title = f"{escape(prompt['prompt'])}<small>{escape(kind.replace('_', ' '))}</small>"
            rows.append(f'<tr class="prompt"><td colspan="5">{title}</td></tr>')
            for policy, by_prompt in answers.items():
                if key(prompt) in by_prompt:
                    rows.append(_response_row(policy, by_prompt[key(prompt)]))
    heads = "".join(f'<th class="text">{head}</th>' for head in ("policy", "response", "reward", "cost", "remarks"))
    note = "Prompts stand at equal distances in each group, not picked. Cost is coloured by its sign: green is safe."
    table = f'<div class="scroll"><table class="responses"><tr>{heads}</tr>{"".join(rows)}</table></div>'
    return f'<h2>Sample responses</h2><p class="note">{note}</p>{table}' if rows else ""


def _response_row(policy: str, sample: Mapping[str, Any]) -> str:
    flags = []
    if sample.get("harmful") is not None:
        flags.append(_badge("harmful", "unsafe") if sample["harmful"] else _badge("harmless", "safe"))
    flags += [_badge("refusal", "plain")] * bool(sample.get("refusal"))
    flags += [_badge("truncated", "plain")] * bool(sample.get("truncated"))
    helpfulness, reward, cost = (sample.get(key) for key in ("helpfulness", "reward", "cost"))
    oracle = ("" if helpfulness is None else f"help {helpfulness:.2f} ") + "".join(flags)
    shown_cost = "–" if cost is None else _badge(f"{cost:+.2f}", "unsafe" if cost > 0 else "safe")
    shown_reward = "–" if reward is None else f"{reward:+.2f}"
    response = escape(sample["response"]) or "<em>(empty)</em>"
    cells = "".join(f'<td class="text">{c}</td>' for c in (response, shown_reward, shown_cost, oracle or "–"))
    return f"<tr><td>{escape(policy)}</td>{cells}</tr>"


def _badge(text: str, kind: str) -> str:
    return f'<span class="{kind}">{escape(text)}</span>'


def _value(summary: Mapping[str, float], metric: str, share: bool) -> str:
    if metric not in summary:
        return "–"
    digits = 3 if metric.startswith("distinct") else 2
    text = f"{summary[metric]:.1%}" if share else f"{summary[metric]:.{digits}f}"
    return re.sub(r"^-(0\.0+)$", r"\1", text)  # no negative zero


def _table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """An HTML table; headings are escaped here, cells are HTML already."""
    head = "".join(f"<th>{escape(h)}</th>" for h in heads)
    body = "".join("<tr>" + "".join(f"<td>{cell}</td>" for cell in row) + "</tr>" for row in rows)
    return f'<div class="scroll"><table><tr>{head}</tr>{body}</table></div>'
