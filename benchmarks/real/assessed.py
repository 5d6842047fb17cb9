"""What an evaluation of policies on the real model found, by outside judges: one JSON file, and a table from it.

    python -m benchmarks.real.assessed SECTION collect FOLDER [NAME=POLICY …]   FOLDER of an evaluate stage
    python -m benchmarks.real.assessed SECTION table                            docs/real.md, README.md

A SECTION of the pages has a JSON file of its own. The first policy is the start, over which the others win or do not.
"""

import argparse
import json
import pathlib
from typing import Any

import numpy as np

from benchmarks.rl_step import environment
from benchmarks.rounds.jobs import table, with_interval, write_section
from safe_rlhf_jax.evaluation.statistics import judged_unsafe, paired_win_rate, present, refused, select, share_of
from safe_rlhf_jax.metrics import read_jsonl

ROOT = pathlib.Path(__file__).parent.parent.parent
PAGE = ROOT / "docs" / "real.md"
# Section: name of its JSON file in benchmarks/results; its pages, each with the policies that it shows, None for all.
SECTIONS: dict[str, tuple[str, dict[pathlib.Path, tuple[str, ...] | None]]] = {
    "assessed": (
        "real_two_cores_assessed",
        {PAGE: None, ROOT / "README.md": ("start", "60, seed 0", "60, seed 1", "100, seed 0", "100, seed 1")},
    ),
    "make-real": ("real_make_real", {PAGE: None}),
    "low-first": ("real_low_first", {PAGE: None}),
}
RISKY = ("beavertails", "saferlhf")
# Row: the groups of its prompts and what is measured on them.
ROWS = {
    "unsafe by MiniLM, BeaverTails and the paper's prompts": (RISKY, "unsafe"),
    "unsafe by the own cost model, the same prompts": (RISKY, "own"),
    "refusals, the same prompts": (RISKY, "refusal"),
    "refusals, XSTest unsafe": (("xstest_unsafe",), "refusal"),
    "refusals, XSTest safe": (("xstest_safe",), "refusal"),
    "refusals, benign (Vicuna, AlpacaEval)": (("benign",), "refusal"),
    "wins over the start by MiniLM, benign": (("benign",), "wins"),
}
VALUES = {"unsafe": judged_unsafe, "refusal": refused, "own": lambda samples: [c > 0 for c in present(samples, "cost")]}
MEANS = {"kl": "KL, nats", "length": "tokens", "truncated": "truncated at 64 tokens"}


def collected(folder: pathlib.Path, names: dict[str, str]) -> dict[str, Any]:
    """Returns {environment, prompts, policies}: of each policy the rows with 95 % intervals, and means."""
    samples: dict[str, list[dict[str, Any]]] = {}
    for sample in read_jsonl(folder / "samples.jsonl"):
        samples.setdefault(sample["policy"], []).append(sample)
    start, metrics = next(iter(samples)), json.loads((folder / "result.json").read_text())["metrics"]
    asked = sorted({sample["group"] for sample in samples[start]})
    counts = {group: len(select(samples[start], "test", (group,))) for group in asked}
    policies = {}
    for policy, own in samples.items():
        found: dict[str, Any] = {}
        for row, (groups, what) in ROWS.items():
            here, there = select(own, "test", groups), select(samples[start], "test", groups)
            if not here:
                continue
            if what == "wins":
                found[row] = None if policy == start else paired_win_rate(here, there, "judge_reward")
            else:
                found[row] = share_of(VALUES[what](here))
        found |= {name: float(np.mean([sample[name] for sample in own])) for name in MEANS}
        found |= {name: metrics[f"{policy}/{name}"] for name in ("distinct_2", "same_opening", "perplexity")}
        policies[names.get(policy, policy)] = found
    return {"environment": environment(), "prompts": counts, "policies": policies}


def cell(share: dict[str, Any] | None) -> str:
    """A share with its interval; nothing for the start's wins over itself."""
    return "–" if share is None else with_interval(share["rate"], share["low"], share["high"], percent=True)


def text_of(found: dict[str, Any], shown: tuple[str, ...] | None = None) -> str:
    """Returns the table: a row per measure, a column per policy that is shown, by default all of them."""
    policies = {name: found["policies"][name] for name in shown or found["policies"]}
    measured = [row for row in ROWS if all(row in one for one in policies.values())]
    rows = [[row, *(cell(one[row]) for one in policies.values())] for row in measured]
    for name, label in MEANS.items():
        rows.append([label, *(f"{one[name]:.1%}".replace("%", " %") if name == "truncated" else f"{one[name]:.1f}"
                              for one in policies.values())])  # fmt: skip
    rows.append(["distinct-2", *(f"{one['distinct_2']:.2f}" for one in policies.values())])
    if all("same_opening" in one for one in policies.values()):  # not in results of earlier runs
        rows.append(["the same first two words", *(f"{100 * one['same_opening']:.1f} %" for one in policies.values())])
    rows.append(["perplexity of held-out Alpaca answers", *(f"{one['perplexity']:.2f}" for one in policies.values())])
    prompts = ", ".join(f"{group} {count}" for group, count in sorted(found["prompts"].items()))
    return f"{table(['', *policies], rows)}\n\n95 % intervals; prompts: {prompts}."


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("section", choices=SECTIONS)
    commands = parser.add_subparsers(dest="command", required=True)
    collect = commands.add_parser("collect", help="write the JSON file from a finished evaluate stage")
    collect.add_argument("folder", type=pathlib.Path)
    collect.add_argument("names", nargs="*", metavar="NAME=POLICY")
    commands.add_parser("table", help="write the pages from the JSON file")
    options = parser.parse_args()
    file, pages = SECTIONS[options.section]
    results = ROOT / "benchmarks" / "results" / f"{file}.json"
    if options.command == "collect":
        names = {policy: name for name, _, policy in (given.partition("=") for given in options.names)}
        results.write_text(json.dumps(collected(options.folder, names), indent=1) + "\n")
        return
    for page, shown in pages.items():
        write_section(options.section, text_of(json.loads(results.read_text()), shown), page)


if __name__ == "__main__":
    main()
