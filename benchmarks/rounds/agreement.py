"""How far the people agree who labelled a run: α by question and by annotator, as a figure of docs/rounds.md.

python -m benchmarks.rounds.agreement runs/rounds_people/label_1
"""

import argparse
import json
import pathlib
from typing import Any

from matplotlib.figure import Figure

from safe_rlhf_jax.stages.labellers import Pair
from safe_rlhf_jax.stages.people import about_annotators

FIGURE = pathlib.Path(__file__).parents[2] / "docs" / "images" / "agreement.png"


def pairs_of(folder: pathlib.Path) -> list[Pair]:
    """Returns the pairs that a stage has shown, with or without a label."""
    batches = [json.loads(line) for line in (folder / "batches.jsonl").read_text().splitlines()]
    return [Pair(one["prompt"], one["response_0"], one["response_1"], one) for records in batches for one in records]


def figure_of(about: dict[str, Any]) -> Figure:
    """Returns α with its intervals: a panel for each question, a line for all annotators and for each."""
    figure = Figure(figsize=(9, 2.2), layout="constrained")
    panels = figure.subplots(1, len(about["agreement"]), sharex=True, sharey=True)
    for panel, (question, together) in zip(panels, about["agreement"].items(), strict=True):
        rows = {"all": together} | about["annotators"][question]
        for place, one in enumerate(rows.values()):
            error = [[one["alpha"] - one["low"]], [one["high"] - one["alpha"]]]
            panel.errorbar(one["alpha"], place, xerr=error, fmt="o", capsize=3, color="C1" if place else "C0")
        panel.set_yticks(range(len(rows)), list(rows))
        panel.axvline(0, color="black", lw=0.7)
        panel.set(title=question, xlabel="α", xlim=(-0.4, 1.05))
    panels[0].invert_yaxis()
    return figure


def main() -> None:
    """Prints α, and writes the figure."""
    parser = argparse.ArgumentParser(description="How far the people agree who labelled a run.")
    parser.add_argument("folder", type=pathlib.Path, help="of a label stage")
    folder = parser.parse_args().folder
    about = about_annotators(folder, pairs_of(folder), "category")
    for question, one in about["agreement"].items():
        print(f"{question}: α {one['alpha']:.2f} ({one['low']:.2f} to {one['high']:.2f}), {one['n']} tasks")
    figure_of(about).savefig(FIGURE, dpi=110)


if __name__ == "__main__":
    main()
