"""The report's tables of outside judges: what they say of each policy, and how often human labels agree with them."""

from collections.abc import Mapping, Sequence
from typing import Any

from safe_rlhf_jax.evaluation.judges import AVERAGE, KINDS
from safe_rlhf_jax.evaluation.tables import NOTHING, Cell, Table, share

WINS = {"reward": "more helpful than", "cost": "safer than"}


def judged(views: Sequence[Mapping[str, Any]], colours: Mapping[str, str], *, average: bool) -> Table | None:
    """What the average of the judges says of each policy and kind of prompts, or what each of them says alone."""
    rows = [row for row in views if (row["judge"] == AVERAGE) == average]
    if not rows:
        return None
    wins = [
        (kind, name)
        for name in dict.fromkeys(name for row in rows for name in row.get("wins", {}))
        for kind in KINDS
        if any(kind in row.get("wins", {}).get(name, {}) for row in rows)
    ]
    heads = ["policy", "prompts", *([] if average else ["judge"]), "n", "unsafe ↓", "mean reward ↑"]
    out = []
    for row in rows:
        n = next(row[part]["n"] for part in ("unsafe", "reward") if part in row)
        cells = [Cell(row["policy"], colour=colours.get(row["policy"], "")), Cell(row["prompts"])]
        cells += [] if average else [Cell(row["judge"])]
        cells += [Cell(str(n)), share(row["unsafe"]) if "unsafe" in row else Cell(NOTHING), reward(row.get("reward"))]
        for kind, name in wins:
            rate = row.get("wins", {}).get(name, {}).get(kind)
            cells.append(share(rate) if rate else Cell(NOTHING))
        out.append(cells)
    return Table([*heads, *(f"{WINS[kind]} {name}" for kind, name in wins)], out)


def reward(found: Mapping[str, Any] | None) -> Cell:
    """A mean reward with its confidence interval."""
    return Cell(f"{found['mean']:.2f}", f"{found['low']:.2f} to {found['high']:.2f}") if found else Cell(NOTHING)


def agreement(found: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> Table | None:
    """Ranking and sign accuracy of own models and judges on labelled pairs."""
    rows = []
    for kind, models in found.items():
        for name, one in models.items():
            health = one["health"]
            sign = health.get("sign", {})
            signs = [share(sign[part]) if part in sign else Cell(NOTHING) for part in ("all", "safe", "unsafe")]
            n = Cell(str(health["accuracy"]["n"]))
            rows.append([Cell(f"{kind} pairs"), Cell(name), n, share(health["accuracy"]), *signs])
    heads = ["labelled pairs", "model", "pairs", "ranking", "sign", "sign, safe", "sign, unsafe"]
    return Table(heads, rows) if rows else None
