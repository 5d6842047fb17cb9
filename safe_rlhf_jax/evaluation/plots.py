"""The report's figures. Each function takes plain data and returns a matplotlib `Figure`, or None without data.

Colours are Okabe and Ito's and Tol's, told apart with any colour vision. Policies, groups of prompts and labels have
different ones, so that a colour means the same thing in every figure; groups differ by marker too.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from safe_rlhf_jax.evaluation.statistics import Sample, largest, present, rate_by_category, select, wilson_interval

Policies = Mapping[str, Sequence[Sample]]

POLICY_COLOURS = ("#8a8a8a", "#0072B2", "#E69F00", "#56B4E9", "#000000", "#882255")  # the first one is SFT: grey
GROUP_STYLES = (
    ("#332288", "o"), ("#CC79A7", "^"), ("#999933", "s"), ("#661100", "D"), ("#44AA99", "v"), ("#AA4499", "P"),
    ("#6699CC", "X"), ("#777777", "*"),
)  # fmt: skip
LABEL_COLOURS = {"safe": "#009E73", "unsafe": "#D55E00", "chosen": "#0072B2", "rejected": "#E69F00"}
UNSAFE, LIMIT, INK, GRID = "#D55E00", "#882255", "#222222", "#e4e4e4"

# How to read each figure, for somebody who sees one for the first time. The first sentence is the heading.
CAPTIONS = {
    "headline": "Outcome. The short answer. Each bar is one policy on held-out prompts; the thin line is a 95 % "
    "confidence interval. An arrow says which direction is better; a good outcome is good in all of them at once.",
    "reward_cost": "Reward and cost, before and after. Each dot is one response to a held-out test prompt; left to "
    "right are the policies, first the starting point. Up is worse (the cost model finds it more harmful), right is "
    "better (the reward model finds it more helpful). Above the solid line, in the shaded region, a response counts "
    "as unsafe. Triangles on the edges are the means of each group of prompts.{limit} Safe RLHF should move the dots "
    "below the line and to the right.",
    "training": "Training. One value per step of reinforcement learning (faint), with a running mean (strong). λ is "
    "the price of cost: it rises while the mean cost is above the limit (dashed), falls when it is below, and should "
    "settle. The divergence says how far the policy has moved from where it started.",
    "harm_by_category": "Harm by category. Share of test prompts answered harmfully, by category, the worst before "
    "training on top; where groups say which prompts invite harm, only those count. Thin lines are 95 % intervals: "
    "with few prompts in a category they are wide.",
    "score_distributions": "The preference models. What the two preference models say about labelled held-out "
    "responses, which they never trained on. The further apart the two colours, the better the model separates them; "
    "the cost model should put safe responses below zero and unsafe ones above. In a reliability diagram, dots on "
    "the dotted line mean that a predicted 80 % comes true 80 % of the time; bigger dots hold more responses.",
}

# (key of the history, title, unit), in the order of the panels.
CURVES = (
    ("train/multiplier", "Multiplier λ", "λ"),
    ("train/mean_cost", "Mean cost the constraint sees", "cost (score units)"),
    ("train/cost", "Cost, all training prompts", "cost (score units)"),
    ("train/reward", "Reward, all training prompts", "reward (score units)"),
    ("train/kl", "Divergence from the reference", "KL (nats)"),
    ("train/response_length", "Response length", "tokens"),
)


def policy_colours(names: Sequence[str]) -> dict[str, str]:
    """One colour per policy, by position, so that it is the same in every figure."""
    return {name: POLICY_COLOURS[i % len(POLICY_COLOURS)] for i, name in enumerate(names)}


def reward_cost_scatter(
    policies: Policies, cost_limit: float | None = None, constrained_groups: Sequence[str] | None = None
) -> Figure | None:
    """Reward against cost of each test response, one panel per policy: the paper's before-and-after figure."""
    points = {name: _scored(select(samples, "test")) for name, samples in policies.items()}
    points = {name: samples for name, samples in points.items() if samples}
    if not points:
        return None
    figure, axes = _grid(1, len(points), width=4.4 * len(points) + 0.8, height=4.9, share=True)
    everything = [s for samples in points.values() for s in samples]
    x_range = _padded([float(s["reward"]) for s in everything])
    y_range = _padded([*(float(s["cost"]) for s in everything), 0.0, *([] if cost_limit is None else [cost_limit])])
    groups = largest((str(s["group"]) for s in everything), len(GROUP_STYLES))
    for ax, (name, samples) in zip(axes, points.items(), strict=True):
        ax.axhspan(0, max(y_range[1], 0), color=UNSAFE, alpha=0.07, lw=0, zorder=0)
        ax.axhline(0, color=INK, lw=1.1, zorder=2)
        if cost_limit is not None:
            ax.axhline(cost_limit, color=LIMIT, lw=1.4, ls=(0, (5, 3)), zorder=2)
        for (group, behind), (colour, marker) in zip(groups.items(), GROUP_STYLES, strict=False):
            members = select(samples, "test", behind)
            if not members:
                continue
            rewards, costs = present(members, "reward"), present(members, "cost")
            ax.scatter(rewards, costs, s=16, c=colour, marker=marker, alpha=0.45, lw=0, zorder=3, label=group)
            # The group's means, on the edges of the panel.
            edge: dict[str, Any] = {
                "c": colour,
                "s": 80,
                "edgecolors": "white",
                "lw": 0.8,
                "clip_on": False,
                "zorder": 5,
            }
            ax.scatter([np.mean(rewards)], [y_range[0]], marker="^", **edge)
            ax.scatter([x_range[0]], [np.mean(costs)], marker=">", **edge)
        ax.set_title(name, fontweight="bold", pad=22)
        note = f"cost > 0: {np.mean(np.asarray(present(samples, 'cost')) > 0):.0%} of all"
        constrained = present(select(samples, "test", constrained_groups or ()), "cost")
        if constrained:
            note += f", {np.mean(np.asarray(constrained) > 0):.0%} of {', '.join(constrained_groups or ())} prompts"
        ax.text(0.5, 1.02, note, transform=ax.transAxes, ha="center", va="bottom", fontsize=9, color="#555555")
        box = {"boxstyle": "round,pad=0.2", "fc": "white", "ec": "none", "alpha": 0.8}
        ax.text(0.98, 0.97, "unsafe", color=UNSAFE, ha="right", va="top", transform=ax.transAxes, bbox=box, zorder=6)
        ax.text(0.98, 0.04, "safe", color="#00795a", ha="right", transform=ax.transAxes, bbox=box, zorder=6)
        ax.set(xlabel="reward (reward-model score)", xlim=x_range, ylim=y_range)
    axes[0].set_ylabel("cost (cost-model score)")
    handles = _handles(axes)
    handles["safe boundary, cost = 0"] = axes[0].lines[0]
    if cost_limit is not None:
        where = f", on {', '.join(constrained_groups)} prompts" if constrained_groups else ""
        handles[f"cost limit {cost_limit:.2f} (for the mean{where})"] = axes[0].lines[1]
    legend = figure.legend(
        list(handles.values()), list(handles), loc="outside lower center", ncols=len(handles), frameon=False, fontsize=9
    )
    for handle in legend.legend_handles:
        if handle is not None:
            handle.set_alpha(1)
    return figure


def score_distributions(scorers: Mapping[str, Mapping[str, Any]], cost_limit: float | None = None) -> Figure | None:
    """Scores by label for the reward and the cost model, with reliability diagrams where given."""
    shown = {name: scorer for name, scorer in scorers.items() if any(map(len, scorer["scores_by_label"].values()))}
    if not shown:
        return None
    calibrated = [name for name, scorer in shown.items() if scorer.get("reliability")]
    columns = len(shown) + len(calibrated)
    figure, axes = _grid(1, columns, width=4.5 * columns, height=3.7)
    for ax, (name, scorer) in zip(axes, shown.items(), strict=False):
        groups = {label: np.asarray(v, dtype=np.float64) for label, v in scorer["scores_by_label"].items() if len(v)}
        bins = np.linspace(*_padded(np.concatenate(list(groups.values()))), 41).tolist()
        for i, (label, scores) in enumerate(groups.items()):
            colour = LABEL_COLOURS.get(label, POLICY_COLOURS[i + 1])
            text = f"{label} (mean {scores.mean():.2f}, n = {scores.size})"
            ax.hist(scores, bins, density=True, color=colour, alpha=0.35, label=text)
            ax.hist(scores, bins, density=True, color=colour, histtype="step", lw=1.3)
        if name == "cost":
            ax.axvline(0, color=INK, lw=1.1, label="safe boundary")
            if cost_limit is not None:
                ax.axvline(cost_limit, color=LIMIT, lw=1.4, ls=(0, (5, 3)), label=f"cost limit {cost_limit:.2f}")
        ax.set(title=f"{name.capitalize()} model by label", xlabel=f"{name} (score)", ylabel="density")
        ax.legend(frameon=False, fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.18), ncols=2)
    for ax, name in zip(axes[len(shown) :], calibrated, strict=True):
        confidence, accuracy, count = np.asarray(shown[name]["reliability"], dtype=np.float64).T
        ax.plot([0, 1], [0, 1], color="#999999", lw=1, ls=":", label="perfectly calibrated")
        ax.plot(confidence, accuracy, color="#0072B2", lw=1.3)
        ax.scatter(confidence, accuracy, s=20 + 180 * count / count.max(), color="#0072B2", alpha=0.6, lw=0)
        ax.set(title=f"{name.capitalize()} model reliability", xlim=(-0.04, 1.04), ylim=(-0.04, 1.04))
        ax.set(xlabel="predicted probability", ylabel="observed share")
        ax.legend(frameon=False, fontsize=8, loc="upper left")
    return figure


def training_curves(
    history: Mapping[str, Sequence[Mapping[str, Any]]],
    colours: Mapping[str, str],
    cost_limit: float | None = None,
) -> Figure | None:
    """λ, costs, reward, KL and length over the RL steps; a panel per metric that was recorded."""
    curves = {key: {name: _series(rows, key) for name, rows in history.items()} for key, _, _ in CURVES}
    panels = [curve for curve in CURVES if any(values.size for _, values in curves[curve[0]].values())]
    if not panels:
        return None
    columns = min(3, len(panels))
    rows = math.ceil(len(panels) / columns)
    figure, axes = _grid(rows, columns, width=4.1 * columns, height=2.7 * rows + 0.4)
    limited = "train/mean_cost" if any(key == "train/mean_cost" for key, _, _ in panels) else "train/cost"
    for ax, (key, title, unit) in zip(axes, panels, strict=False):
        for name, (steps, values) in curves[key].items():
            if not values.size:
                continue
            if values.size > 40:  # the noisy line stays visible behind its running mean
                ax.plot(steps, values, color=colours[name], lw=0.7, alpha=0.3)
                values = _running_mean(values, values.size // 20)
            ax.plot(steps, values, color=colours[name], lw=1.7, label=name)
        if key == limited and cost_limit is not None:
            line = ax.axhline(cost_limit, color=LIMIT, lw=1.4, ls=(0, (5, 3)))
            ax.legend([line], [f"cost limit {cost_limit:.2f}"], frameon=False, fontsize=8, loc="upper right")
        ax.set(title=title, xlabel="step (rollout batches)", ylabel=unit)
    for ax in axes[len(panels) :]:
        ax.set_visible(False)
    handles = _handles(axes)
    figure.legend(list(handles.values()), list(handles), loc="outside lower center", ncols=len(handles), frameon=False)
    return figure


def harm_by_category(policies: Policies, colours: Mapping[str, str]) -> Figure | None:
    """Harm rate on test prompts by category, a bar per policy, with 95 % Wilson intervals."""
    rates = {name: rate_by_category(samples) for name, samples in policies.items()}
    rates = {name: categories for name, categories in rates.items() if categories}
    if not rates:
        return None
    first = next(iter(rates.values()))
    categories = sorted({c for r in rates.values() for c in r}, key=lambda c: _ratio(first.get(c)))
    figure, (ax,) = _grid(1, 1, width=11.5, height=1.3 + 0.2 * len(categories) * (len(rates) + 0.8))
    thickness = 0.82 / len(rates)
    for i, (name, counts) in enumerate(rates.items()):
        where = [y + 0.41 - (i + 0.5) * thickness for y, c in enumerate(categories) if c in counts]
        bars = [counts[c] for c in categories if c in counts]
        shares = [harmful / n for harmful, n in bars]
        errors = np.abs(np.asarray([wilson_interval(harmful, n) for harmful, n in bars]).T - shares)
        ax.barh(where, shares, thickness * 0.9, color=colours[name], label=name)
        ax.errorbar(shares, where, xerr=errors, fmt="none", ecolor=INK, elinewidth=0.8, capsize=1.5)
    sizes = [max(r[c][1] for r in rates.values() if c in r) for c in categories]
    names = [f"{c.replace('_', ' ').replace(',', ', ')}  (n = {n})" for c, n in zip(categories, sizes, strict=True)]
    ax.set_yticks(range(len(categories)), names)
    ax.set(xlim=(0, 1), ylim=(-0.6, len(categories) - 0.4), xlabel="share of responses that are harmful, by the oracle")
    ax.set_title("Harm rate on test prompts, by category")
    ax.xaxis.set_major_formatter(PercentFormatter(1))
    ax.grid(visible=False, axis="y")
    figure.legend(loc="outside lower center", ncols=len(rates), frameon=False)
    return figure


def headline_bars(
    summaries: Mapping[str, Mapping[str, float]], colours: Mapping[str, str], metrics: Sequence[tuple[str, str, bool]]
) -> Figure | None:
    """One panel per (metric, title, is a share), a bar with a 95 % interval per policy."""
    shown = [m for m in metrics if any(m[0] in summary for summary in summaries.values())]
    if not shown:
        return None
    figure, axes = _grid(1, len(shown), width=3.0 * len(shown), height=3.3)
    for ax, (metric, title, is_share) in zip(axes, shown, strict=True):
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
        ax.set_xticks(range(len(summaries)), list(summaries), rotation=0 if len(summaries) < 4 else 30)
        ax.set_title(title, fontsize=10)
        ax.axhline(0, color=INK, lw=0.8)
        ax.grid(visible=False, axis="x")
        if is_share:
            ax.set_ylim(0, 1.08)
            ax.yaxis.set_major_formatter(PercentFormatter(1))
        else:
            ax.margins(y=0.14)
    return figure


def best_of_n_curves(rounds: Sequence[Sequence[Mapping[str, float]]]) -> Figure:
    """Expected best, best feasible and median reward of k samples, and how often one is feasible; a colour per round.

    Args:
        rounds: For each round the rows of `inference.best_of_n.gain_by_number`.
    """
    figure, (left, right) = _grid(1, 2, width=9.5, height=3.7)
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
    handles = _handles([left])
    figure.legend(list(handles.values()), list(handles), loc="outside lower center", ncols=len(handles), frameon=False)
    return figure


def _grid(rows: int, columns: int, *, width: float, height: float, share: bool = False) -> tuple[Figure, list[Axes]]:
    figure = Figure(figsize=(width, height), dpi=130, layout="constrained", facecolor="white")
    axes = list(figure.subplots(rows, columns, squeeze=False, sharex=share, sharey=share).ravel())
    for ax in axes:
        ax.spines[["top", "right"]].set_visible(False)
        ax.grid(color=GRID, lw=0.7)
        ax.set_axisbelow(True)
        ax.tick_params(labelsize=9, length=3)
    return figure, axes


def _handles(axes: Sequence[Axes]) -> dict[str, Any]:
    return {label: handle for ax in axes for handle, label in zip(*ax.get_legend_handles_labels(), strict=True)}


def _scored(samples: Sequence[Sample]) -> list[Sample]:
    return [s for s in samples if s.get("reward") is not None and s.get("cost") is not None]


def _padded(values: Sequence[float] | np.ndarray[Any, np.dtype[np.float64]]) -> tuple[float, float]:
    low, high = float(np.min(values)), float(np.max(values))
    pad = 0.06 * (high - low) or 0.5
    return low - pad, high + pad


def _ratio(count: tuple[float, int] | None) -> float:
    return count[0] / count[1] if count else -1.0


def _series(rows: Sequence[Mapping[str, Any]], key: str) -> tuple[Any, Any]:
    """Steps and finite values of one metric; rows without it are skipped, a missing step is the row number."""
    pairs = [(row.get("step", i), row[key]) for i, row in enumerate(rows) if row.get(key) is not None]
    finite = [(step, value) for step, value in pairs if math.isfinite(value)]
    return np.asarray([step for step, _ in finite]), np.asarray([value for _, value in finite], dtype=np.float64)


def _running_mean(values: Any, width: int) -> Any:
    """Centred mean over `width` values, over fewer at both ends."""
    kernel = np.ones(max(1, width), dtype=np.float64)
    return np.convolve(values, kernel, "same") / np.convolve(np.ones_like(values), kernel, "same")
