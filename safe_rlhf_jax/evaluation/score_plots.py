"""The report's figures about single responses: their scores, lengths and harm."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from safe_rlhf_jax.evaluation.plots import (
    GROUP_STYLES,
    INK,
    LABEL_COLOURS,
    LIMIT,
    PANEL,
    UNSAFE,
    WIDTH,
    grid,
    handles_of,
    legend_below,
    padded,
    short,
)
from safe_rlhf_jax.evaluation.statistics import (
    QUADRANTS,
    Counts,
    Sample,
    largest,
    main_samples,
    present,
    quadrants,
    scored,
    wilson_interval,
)
from safe_rlhf_jax.evaluation.tables import POLICY_COLOURS

Policies = Mapping[str, Sequence[Sample]]

QUADRANT_COLOURS = ("#009E73", "#A6D8C7", "#F3B58F", UNSAFE)
DASHES = (0, (5, 3))


def reward_cost_scatter(
    policies: Policies, cost_limit: float | None = None, constrained_groups: Sequence[str] | None = None
) -> Figure | None:
    """Reward against cost of each test response, one panel per policy: the paper's before-and-after figure."""
    points = {name: samples for name, v in policies.items() if (samples := scored(main_samples(v)))}
    if not points:
        return None
    columns = len(points) if len(points) < 3 else 2 if len(points) == 4 else 3
    rows = math.ceil(len(points) / columns)
    figure, axes = grid(rows, columns, width=WIDTH, height=4.2 * rows + 0.6, share=True)
    everything = [s for samples in points.values() for s in samples]
    x_range = padded([float(s["reward"]) for s in everything])
    y_range = padded([*(float(s["cost"]) for s in everything), 0.0, *([] if cost_limit is None else [cost_limit])])
    groups = largest((str(s["group"]) for s in everything), len(GROUP_STYLES))
    for ax, (name, samples) in zip(axes, points.items(), strict=False):
        draw_limits(ax, cost_limit)
        ax.axhspan(0, max(y_range[1], 0), color=UNSAFE, alpha=0.07, lw=0, zorder=0)
        for (group, behind), (colour, marker) in zip(groups.items(), GROUP_STYLES, strict=False):
            members = [s for s in samples if s["group"] in behind]
            if members:
                label = "responses" if list(groups) == ["all"] else short(group)
                draw_group(ax, members, label=label, colour=colour, marker=marker, corner=(x_range[0], y_range[0]))
        ax.set_title(short(name), fontweight="bold", pad=20)
        costs = present(samples, "cost")
        note = f"cost > 0: {np.mean(np.asarray(costs) > 0):.0%} of {len(costs)}"
        constrained = present([s for s in samples if s["group"] in (constrained_groups or ())], "cost")
        if constrained:
            note += f", {np.mean(np.asarray(constrained) > 0):.0%} of {', '.join(constrained_groups or ())} prompts"
        ax.text(0.5, 1.02, note, transform=ax.transAxes, ha="center", va="bottom", fontsize=9, color="#555555")
        box = {"boxstyle": "round,pad=0.2", "fc": "white", "ec": "none", "alpha": 0.8}
        ax.text(0.98, 0.97, "unsafe", color=UNSAFE, ha="right", va="top", transform=ax.transAxes, bbox=box, zorder=6)
        ax.text(0.98, 0.04, "safe", color="#00795a", ha="right", transform=ax.transAxes, bbox=box, zorder=6)
        ax.set(xlabel="reward (reward-model score)", xlim=x_range, ylim=y_range)
    for ax in axes[len(points) :]:
        ax.set_visible(False)
    for ax in axes[::columns]:
        ax.set_ylabel("cost (cost-model score)")
    handles = handles_of(axes)
    handles["safe boundary, cost = 0"] = axes[0].lines[0]
    if cost_limit is not None:
        where = f", on {', '.join(constrained_groups)} prompts" if constrained_groups else ""
        handles[f"cost limit {cost_limit:.2f} (for the mean{where})"] = axes[0].lines[1]
    for handle in legend_below(figure, handles).legend_handles:
        if handle is not None:
            handle.set_alpha(1)
    return figure


def draw_limits(ax: Axes, cost_limit: float | None) -> None:
    """Draws the safe boundary and the cost limit into a panel whose vertical axis is the cost."""
    ax.axhline(0, color=INK, lw=1.1, zorder=2)
    if cost_limit is not None:
        ax.axhline(cost_limit, color=LIMIT, lw=1.4, ls=DASHES, zorder=2)


def draw_group(
    ax: Axes, samples: Sequence[Sample], *, label: str, colour: str, marker: str, corner: tuple[float, float]
) -> None:
    """Draws a group's responses, and its means on the edges of the panel."""
    rewards, costs = present(samples, "reward"), present(samples, "cost")
    ax.scatter(rewards, costs, s=16, c=colour, marker=marker, alpha=0.45, lw=0, zorder=3, label=label)
    edge: dict[str, Any] = {"c": colour, "s": 80, "edgecolors": "white", "lw": 0.8, "clip_on": False, "zorder": 5}
    ax.scatter([np.mean(rewards)], [corner[1]], marker="^", **edge)
    ax.scatter([corner[0]], [np.mean(costs)], marker=">", **edge)


def quadrant_bars(policies: Policies) -> Figure | None:
    """Shares of the four quadrants, a bar per policy; helpful is above the median reward of the first policy."""
    first = present(main_samples(next(iter(policies.values()))), "reward")
    if not first:
        return None
    shares = {name: quadrants(main_samples(samples), float(np.median(first))) for name, samples in policies.items()}
    shares = {name: found for name, found in shares.items() if found}
    figure, (ax,) = grid(1, 1, width=WIDTH, height=1.3 + 0.42 * len(shares))
    for y, found in enumerate(shares.values()):
        left = 0.0
        for name, colour in zip(QUADRANTS, QUADRANT_COLOURS, strict=True):
            ax.barh(y, found[name], 0.68, left, color=colour, label=name)
            if found[name] >= 0.04:
                dark = colour in (QUADRANT_COLOURS[0], QUADRANT_COLOURS[-1])
                place: dict[str, Any] = {
                    "ha": "center",
                    "va": "center",
                    "fontsize": 9,
                    "color": "white" if dark else INK,
                }
                ax.text(left + found[name] / 2, y, f"{found[name]:.0%}", **place)
            left += found[name]
    ax.set_yticks(range(len(shares)), [short(name) for name in shares])
    ax.set(xlim=(0, 1), xlabel="share of responses")
    ax.invert_yaxis()
    ax.xaxis.set_major_formatter(PercentFormatter(1))
    ax.grid(visible=False, axis="y")
    legend_below(figure, handles_of([ax]))
    return figure


def violins(
    policies: Policies, colours: Mapping[str, str], panels: Sequence[tuple[str, str]], cost_limit: float | None = None
) -> Figure | None:
    """Distributions over responses, a violin per policy with its quartiles.

    Args:
        policies: Samples by policy.
        colours: By policy.
        panels: (key of a sample, title) each.
        cost_limit: Drawn where the key is the cost, as is the safe boundary.
    """
    chosen = {name: main_samples(samples) for name, samples in policies.items()}
    shown = [panel for panel in panels if any(present(samples, panel[0]) for samples in chosen.values())]
    if not shown:
        return None
    figure, axes = grid(1, len(shown), width=WIDTH, height=1.4 + 0.5 * len(policies))
    for ax, (key, title) in zip(axes, shown, strict=True):
        for y, (name, samples) in enumerate(chosen.items()):
            values = np.asarray(present(samples, key))
            if not values.size:
                continue
            drawn: dict[str, Any] = ax.violinplot(values, [y], orientation="horizontal", widths=0.8, showextrema=False)
            for body in drawn["bodies"]:
                body.set(facecolor=colours[name], alpha=0.45, edgecolor=colours[name])
            low, middle, high = np.quantile(values, [0.25, 0.5, 0.75])
            ax.plot([low, high], [y, y], color=INK, lw=3, solid_capstyle="butt")
            ax.plot(middle, y, "o", color="white", markeredgecolor=INK, ms=5)
        if key == "cost":
            ax.axvline(0, color=INK, lw=1.1, label="safe boundary")
            if cost_limit is not None:
                ax.axvline(cost_limit, color=LIMIT, lw=1.4, ls=DASHES, label=f"cost limit {cost_limit:.2f}")
        ax.set_yticks(range(len(chosen)), [short(name) if ax is axes[0] else "" for name in chosen])
        ax.set(xlabel=title, ylim=(len(chosen) - 0.4, -0.6))
        ax.grid(visible=False, axis="y")
    handles = handles_of(axes)
    if handles:
        legend_below(figure, handles)
    return figure


def breakdown_bars(breakdowns: Mapping[str, Counts], colours: Mapping[str, str]) -> Figure | None:
    """Shares by row, a bar per policy with its 95 % Wilson interval, and a panel per breakdown."""
    if not breakdowns:
        return None
    policies = {policy: None for rows in breakdowns.values() for counts in rows.values() for policy in counts}
    heights = [0.9 + 0.17 * len(rows) * (len(policies) + 0.9) for rows in breakdowns.values()]
    figure, axes = grid(len(breakdowns), 1, width=WIDTH, height=sum(heights) + 0.5, heights=heights)
    thickness = 0.82 / len(policies)
    for ax, (title, rows) in zip(axes, breakdowns.items(), strict=True):
        names = sorted(rows, key=lambda row: ratio(next(iter(rows[row].values()))))
        for i, policy in enumerate(policies):
            bars = [(y, *rows[name][policy]) for y, name in enumerate(names) if rows[name][policy][1]]
            where = [y + 0.41 - (i + 0.5) * thickness for y, _, _ in bars]
            shares = np.asarray([true / n for _, true, n in bars])
            errors = np.abs(np.asarray([wilson_interval(true, n) for _, true, n in bars]).reshape(-1, 2).T - shares)
            ax.barh(where, shares, thickness * 0.9, color=colours[policy], label=short(policy))
            ax.errorbar(shares, where, xerr=errors, fmt="none", ecolor=INK, elinewidth=0.8, capsize=1.5)
        sizes = [max(n for _, n in rows[name].values()) for name in names]
        ax.set_yticks(range(len(names)), [f"{short(c)}  (n = {n})" for c, n in zip(names, sizes, strict=True)])
        ax.set(xlim=(0, 1), ylim=(-0.6, len(names) - 0.4), title=title[:1].upper() + title[1:])
        ax.xaxis.set_major_formatter(PercentFormatter(1))
        ax.grid(visible=False, axis="y")
    legend_below(figure, handles_of(axes[:1]))
    return figure


def ratio(count: tuple[float, int]) -> float:
    """The share of a count, −1 for no count."""
    return count[0] / count[1] if count[1] else -1.0


def label_distributions(scorers: Mapping[str, Mapping[str, Any]], cost_limit: float | None = None) -> Figure | None:
    """Scores by label for the reward and the cost model, with reliability diagrams where given."""
    shown = {name: scorer for name, scorer in scorers.items() if any(map(len, scorer["scores_by_label"].values()))}
    if not shown:
        return None
    calibrated = [name for name, scorer in shown.items() if scorer.get("reliability")]
    columns = 2 if calibrated else len(shown)
    rows = math.ceil((len(shown) + len(calibrated)) / columns)
    figure, axes = grid(rows, columns, width=PANEL * 1.5 * columns, height=3.5 * rows)
    for ax, (name, scorer) in zip(axes, shown.items(), strict=False):
        groups = {label: np.asarray(v, dtype=np.float64) for label, v in scorer["scores_by_label"].items() if len(v)}
        bins = np.linspace(*padded(np.concatenate(list(groups.values()))), 41).tolist()
        for i, (label, scores) in enumerate(groups.items()):
            colour = LABEL_COLOURS.get(label, POLICY_COLOURS[i + 1])
            text = f"{label} (mean {scores.mean():.2f}, n = {scores.size})"
            ax.hist(scores, bins, density=True, color=colour, alpha=0.35, label=text)
            ax.hist(scores, bins, density=True, color=colour, histtype="step", lw=1.3)
        if name == "cost":
            ax.axvline(0, color=INK, lw=1.1, label="safe boundary")
            if cost_limit is not None:
                ax.axvline(cost_limit, color=LIMIT, lw=1.4, ls=DASHES, label=f"cost limit {cost_limit:.2f}")
        ax.set(title=f"{name.capitalize()} model by label", xlabel=f"{name} (score)", ylabel="density")
        ax.legend(frameon=False, fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.18), ncols=2)
    for ax, name in zip(axes[len(shown) :], calibrated, strict=False):
        confidence, accuracy, count = np.asarray(shown[name]["reliability"], dtype=np.float64).T
        ax.plot([0, 1], [0, 1], color="#999999", lw=1, ls=":", label="perfectly calibrated")
        ax.plot(confidence, accuracy, color="#0072B2", lw=1.3)
        ax.scatter(confidence, accuracy, s=20 + 180 * count / count.max(), color="#0072B2", alpha=0.6, lw=0)
        ax.set(title=f"{name.capitalize()} model reliability", xlim=(-0.04, 1.04), ylim=(-0.04, 1.04))
        ax.set(xlabel="predicted probability", ylabel="observed share")
        ax.legend(frameon=False, fontsize=8, loc="upper left")
    for ax in axes[len(shown) + len(calibrated) :]:
        ax.set_visible(False)
    return figure
