"""The report's figures about policies as a whole and about training, and what all figures share.

Each function takes plain data and returns a matplotlib `Figure`, or None without data.

Colours are Okabe and Ito's and Tol's, distinct for any colour vision. Policies, groups of prompts and labels have
different ones, so that a colour means the same in every figure; groups also differ by marker.
"""

import io
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from safe_rlhf_jax.evaluation.tables import POLICY_COLOURS

GROUP_STYLES = (
    ("#332288", "o"), ("#CC79A7", "^"), ("#999933", "s"), ("#661100", "D"), ("#44AA99", "v"), ("#AA4499", "P"),
    ("#6699CC", "X"), ("#777777", "*"),
)  # fmt: skip
LABEL_COLOURS = {"safe": "#009E73", "unsafe": "#D55E00", "chosen": "#0072B2", "rejected": "#E69F00"}
UNSAFE, LIMIT, INK, GRID = "#D55E00", "#882255", "#222222", "#e4e4e4"
WIDTH, PANEL = (
    11.0,
    3.66,
)  # inches of a figure and of one of three panels: as wide as the page, so that text is as large

# (key of the history, title, unit), in the order of the panels.
CURVES = (
    ("train/multiplier", "Multiplier λ", "λ"),
    ("train/mean_cost", "Mean cost the constraint sees", "cost (score units)"),
    ("train/cost", "Cost, all training prompts", "cost (score units)"),
    ("train/reward", "Reward, all training prompts", "reward (score units)"),
    ("train/kl", "Divergence from the reference", "KL (nats)"),
    ("train/response_length", "Response length", "tokens"),
)
PARTED = {  # {title: unit} of own scores against judges'
    "Reward, own (—) and judges' (- -)": "gain (standard deviations)",
    "Unsafe, own cost > 0 (—) and judges' (- -)": "share of responses",
}
LOSS = "train/loss"  # of stages that learn from data: a panel each, since their losses and steps are not comparable


def training_curves(
    history: Mapping[str, Sequence[Mapping[str, Any]]],
    colours: Mapping[str, str],
    cost_limit: float | None = None,
) -> Figure | None:
    """λ, costs, reward, KL, length and losses over the steps; a panel per recorded metric."""
    recorded = (*CURVES, *named_curves(history))
    curves = {title: {name: _series(rows, key) for name, rows in history.items()} for key, title, _ in recorded}
    losses = {f"Loss, {short(name)}": {name: _series(rows, LOSS)} for name, rows in history.items()}
    named = [*recorded, *((LOSS, title, "loss") for title in losses)]
    curves |= losses
    panels = [curve for curve in named if any(values.size for _, values in curves[curve[1]].values())]
    if not panels:
        return None
    columns = min(3, len(panels))
    rows = math.ceil(len(panels) / columns)
    figure, axes = grid(rows, columns, width=PANEL * columns, height=2.5 * rows + 0.5)
    limited = "train/mean_cost" if any(key == "train/mean_cost" for key, _, _ in panels) else "train/cost"
    for ax, (key, title, unit) in zip(axes, panels, strict=False):
        for name, (steps, values) in curves[title].items():
            if not values.size:
                continue
            if values.size > 40:  # the noisy line stays visible behind its running mean
                ax.plot(steps, values, color=colours[name], lw=0.7, alpha=0.3)
                values = _running_mean(values, values.size // 20)
            ax.plot(steps, values, color=colours[name], lw=1.7, label=short(name))
        if key == limited and cost_limit is not None:
            line = ax.axhline(cost_limit, color=LIMIT, lw=1.4, ls=(0, (5, 3)))
            ax.legend([line], [f"cost limit {cost_limit:.2f}"], frameon=False, fontsize=8, loc="best")
        ax.set(title=title, xlabel="step", ylabel=unit)
    for ax in axes[len(panels) :]:
        ax.set_visible(False)
    legend_below(figure, handles_of(axes))
    return figure


def named_curves(history: Mapping[str, Sequence[Mapping[str, Any]]]) -> list[tuple[str, str, str]]:
    """The curves of multipliers and costs with a name of their own, `train/cost/NAME`, as in `CURVES`."""
    keys = dict.fromkeys(key for rows in history.values() for row in rows for key in row)
    return [
        (key, f"{title}: {key.removeprefix(f'{general}/')}", unit)
        for general, title, unit in CURVES[:3]
        for key in sorted(keys)
        if key.startswith(f"{general}/")
    ]


def headline_bars(
    summaries: Mapping[str, Mapping[str, float]], colours: Mapping[str, str], metrics: Sequence[tuple[str, str, bool]]
) -> Figure | None:
    """One panel per (metric, title, is a share), a bar with a 95 % interval per policy."""
    shown = [m for m in metrics if any(m[0] in summary for summary in summaries.values())]
    if not shown:
        return None
    names = [short(name, 24) for name in summaries]
    crowded = len(names) > 3 or sum(map(len, names)) > 40  # letters that stand below a panel side by side
    columns = min(3 if crowded or len(shown) > 4 else 4, len(shown))
    rows = math.ceil(len(shown) / columns)
    width = min(WIDTH, PANEL * columns)
    figure, axes = grid(rows, columns, width=width, height=(3.5 if crowded else 2.9) * rows)
    for ax in axes[len(shown) :]:
        ax.set_visible(False)
    for ax, (metric, title, is_share) in zip(axes, shown, strict=False):
        for i, (name, summary) in enumerate(summaries.items()):
            if metric not in summary:
                continue
            value = summary[metric]
            low, high = summary.get(f"{metric}_low", value), summary.get(f"{metric}_high", value)
            errors = [[max(0.0, value - low)], [max(0.0, high - value)]]
            ax.bar(i, value, 0.66, color=colours[name])
            ax.errorbar(i, value, yerr=errors, fmt="none", ecolor=INK, elinewidth=1.1, capsize=4)
            text = f"{value:.1%}" if is_share else f"{value:.2f}"
            end, offset = (high, (0, 3)) if value >= 0 else (low, (0, -12))
            ax.annotate(text, (i, end), offset, textcoords="offset points", ha="center", fontsize=9, fontweight="bold")
        slanted: dict[str, Any] = {"rotation": 30, "ha": "right", "rotation_mode": "anchor"} if crowded else {}
        ax.set_xticks(range(len(names)), names, **slanted)
        ax.set_title(title, fontsize=10)
        ax.axhline(0, color=INK, lw=0.8)
        ax.grid(visible=False, axis="x")
        if is_share:
            ax.set_ylim(0, 1.08)
            ax.yaxis.set_major_formatter(PercentFormatter(1))
        else:
            ax.margins(y=0.14)
    return figure


def over_optimisation(history: Mapping[str, Sequence[Mapping[str, Any]]], colours: Mapping[str, str]) -> Figure | None:
    """Own scores against the judges' over √KL, as a stage trains: where the two part, it games its own models.

    Rewards are gains since the start, in standard deviations over its responses; of the cost it is the share of unsafe
    responses. None without judges.

    Source: Gao et al., "Scaling laws for reward model overoptimization", https://arxiv.org/abs/2210.10760.

    Args:
        history: By stage, the metrics of its evaluations, those of the start first.
        colours: By stage.
    """
    found = {name: over_kl(rows) for name, rows in history.items()}
    panels = [title for title in PARTED if any(title in curves for curves in found.values())]
    if not panels:
        return None
    figure, axes = grid(1, len(panels), width=PANEL * 1.5 * len(panels), height=3.7)
    for ax, title in zip(axes, panels, strict=True):
        for name, curves in found.items():
            for (label, values), style in zip(curves.get(title, {}).items(), ("-", "--"), strict=False):
                x, y = np.asarray(values).T
                ax.plot(x, y, style, color=colours[name], marker="o", ms=4, label=f"{short(name)}, {label}")
        ax.set(title=title, xlabel="√KL from the start (√nats)", ylabel=PARTED[title])
    legend_below(figure, handles_of(axes))
    return figure


def over_kl(rows: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, list[tuple[float, float]]]]:
    """{title of `PARTED`: {"own" or "judges": (√KL, value) of each evaluation}}, where judges have been asked."""
    evaluations = [row for row in rows if "eval/kl_mean" in row]
    judged = {key for row in evaluations for key in row if key.startswith("eval/judge_")}
    if not judged:
        return {}
    start = evaluations[0]
    spread = start.get("eval/reward_std") or 1.0
    gains = {"own": ("eval/reward_mean", spread), "judges": ("eval/judge_reward_mean", 1.0)}
    shares = {"own": ("eval/cost_positive_share", 1.0), "judges": ("eval/judge_unsafe_share", 1.0)}
    found: dict[str, dict[str, list[tuple[float, float]]]] = {}
    for title, curves in zip(PARTED, (gains, shares), strict=True):
        if curves["judges"][0] not in judged:
            continue
        for label, (key, unit) in curves.items():
            first = start.get(key, 0.0) if curves is gains else 0.0
            points = [(row["eval/kl_mean"], row[key]) for row in evaluations if row.get(key) is not None]
            if points:
                values = [(math.sqrt(max(kl, 0.0)), (value - first) / unit) for kl, value in points]
                found.setdefault(title, {})[label] = values
    return found


def best_of_n_curves(rounds: Sequence[Sequence[Mapping[str, float]]]) -> Figure:
    """Expected best, best feasible and median reward of k samples, and how often one is feasible; a colour per round.

    Args:
        rounds: For each round the rows of `inference.best_of_n.gain_by_number`.
    """
    figure, (left, right) = grid(1, 2, width=9.5, height=3.7)
    for i, rows in enumerate(rounds):
        numbers, colour = [row["number"] for row in rows], POLICY_COLOURS[1 + i % (len(POLICY_COLOURS) - 1)]
        left.plot(numbers, [row["reward_max"] for row in rows], color=colour, marker="o", label=f"round {i + 1}")
        left.plot(numbers, [row["reward_median"] for row in rows], color=colour, marker="o", ls="--")
        left.plot(numbers, [row["reward_selected"] for row in rows], color=colour, marker="o", ls=":")
        right.plot(numbers, [row["feasible_share"] for row in rows], color=colour, marker="o")
    left.set(title="Reward of n: best (—), best feasible (···), median (- -)", ylabel="reward (score units)")
    right.set(title="A response within the cost limit among n", ylabel="share of prompts", ylim=(0, 1.04))
    right.yaxis.set_major_formatter(PercentFormatter(1))
    for ax in (left, right):
        ax.set_xscale("log", base=2)
        ax.set_xlabel("n, responses per prompt")
        ax.set_xticks([row["number"] for row in rounds[0]], [f"{row['number']:.0f}" for row in rounds[0]])
    legend_below(figure, handles_of([left]))
    return figure


def grid(
    rows: int, columns: int, *, width: float, height: float, share: bool = False, heights: Sequence[float] | None = None
) -> tuple[Figure, list[Axes]]:
    """A figure, and its panels row by row."""
    figure = Figure(figsize=(width, height), dpi=130, layout="constrained", facecolor="white")
    made = figure.subplots(rows, columns, squeeze=False, sharex=share, sharey=share, height_ratios=heights)
    if rows > 1:
        figure.set_layout_engine("constrained", h_pad=0.1)
    axes = list(made.ravel())
    for ax in axes:
        ax.spines[["top", "right"]].set_visible(False)
        ax.grid(color=GRID, lw=0.7)
        ax.set_axisbelow(True)
        ax.tick_params(labelsize=9, length=3)
    return figure, axes


def png(figure: Figure) -> bytes:
    """A figure as a PNG."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return buffer.getvalue()


def short(name: str, most: int = 36) -> str:
    """A name that fits beside a bar; matplotlib hides names with a leading underscore."""
    name = f" {name}" if name.startswith("_") else name
    return name if len(name) <= most else f"{name[: most // 2 - 1]}…{name[-most // 2 :]}"


def legend_below(figure: Figure, handles: Mapping[str, Any]) -> Any:
    """A legend under the panels, with enough rows for its texts."""
    rows = math.ceil(sum(len(label) + 8 for label in handles) / (13 * figure.get_figwidth()))  # 13 letters an inch
    columns = math.ceil(len(handles) / rows)
    return figure.legend(
        list(handles.values()), list(handles), loc="outside lower center", ncols=columns, frameon=False, fontsize=9
    )


def handles_of(axes: Sequence[Axes]) -> dict[str, Any]:
    """{label: its artist} of all panels."""
    return {label: handle for ax in axes for handle, label in zip(*ax.get_legend_handles_labels(), strict=True)}


def padded(values: Sequence[float] | np.ndarray[Any, np.dtype[np.float64]]) -> tuple[float, float]:
    """The range of values with a margin on both sides."""
    low, high = float(np.min(values)), float(np.max(values))
    pad = 0.06 * (high - low) or 0.5
    return low - pad, high + pad


def _series(rows: Sequence[Mapping[str, Any]], key: str) -> tuple[Any, Any]:
    """Steps and finite values of one metric; rows without it are skipped, a missing step is the row number."""
    pairs = [(row.get("step", i), row[key]) for i, row in enumerate(rows) if row.get(key) is not None]
    finite = [(step, value) for step, value in pairs if math.isfinite(value)]
    return np.asarray([step for step, _ in finite]), np.asarray([value for _, value in finite], dtype=np.float64)


def _running_mean(values: Any, width: int) -> Any:
    """Centred mean over `width` values, over fewer at both ends."""
    kernel = np.ones(max(1, width), dtype=np.float64)
    return np.convolve(values, kernel, "same") / np.convolve(np.ones_like(values), kernel, "same")
