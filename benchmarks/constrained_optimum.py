"""Trains in a world whose constrained optimum is known, with the learner that trains language models, and compares.

    python benchmarks/constrained_optimum.py --json benchmarks/results/constrained_optimum.json

The world: safe_rlhf_jax/testing/worlds.py. The cases, and how near each has to come: optimum.py beside it.
"""

import argparse
import json
import pathlib
import time
from typing import Any

import jax

from safe_rlhf_jax.testing.faults import FAULTS, run_fault
from safe_rlhf_jax.testing.optimum import CASES, ERRORS, run_case


def worst(results: list[dict[str, Any]]) -> dict[str, float]:
    """The largest of each error over the runs."""
    return {name: max(result[name] for result in results) for name in ERRORS if name in results[0]}


def tables(report: dict[str, Any]) -> str:
    """Markdown: the largest errors of every case and fault, and each run of `ppo_lag` beside its optimum."""
    lines = ["| case | within | regret | \\|E[c] − d\\| | λ/λ* − 1 | oscillation of λ |", "|---|---|---|---|---|---|"]
    for name, entry in report["cases"].items():
        cells = []
        for error in ERRORS:
            scale, unit = (1, "") if error == "violation" else (100, " %")
            pair = [scale * entry[key][error] for key in ("worst", "bounds") if error in entry[key]]
            cells.append(f"{pair[0]:.2g}{unit} ({pair[1]:.2g})" if pair else "–")
        within_ = sum(run["within"] for run in entry["runs"])
        lines.append(f"| {name} | {within_} of {len(entry['runs'])} | {' | '.join(cells)} |")
    lines += ["", "| fault planted in `ppo_lag` | regret, least to largest | within |", "|---|---|---|"]
    for name, entry in report["faults"].items():
        regrets = [run["regret"] for run in entry["runs"]]
        within_ = sum(run["within"] for run in entry["runs"])
        lines.append(f"| {name} | {min(regrets):.1%} to {max(regrets):.1%} | {within_} of {len(regrets)} |")
    lines += ["", "| seed | λ at the start | E[r] | E[c] | d | KL | λ | regret |", "|---|---|---|---|---|---|---|---|"]
    for run in report["cases"]["ppo_lag"]["runs"]:
        beside = [f"{run[key]['reached']:.4f} ({run[key]['optimum']:.4f})" for key in ("reward", "cost", "kl")]
        multiplier = f"{run['multiplier']['reached'][0]:.4f} ({run['multiplier']['optimum'][0]:.4f})"
        cells = [*beside[:2], f"{run['limit'][0]:.4f}", beside[2], multiplier, f"{run['regret']:.3%}"]
        lines.append(f"| {run['seed']} | {run['start']} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--json", type=pathlib.Path)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument(
        "--only", nargs="*", choices=[*CASES, *FAULTS], help="of the report in --json, run these anew and keep the rest"
    )
    parser.add_argument("--table", type=pathlib.Path, help="print the tables of a finished report, and train nothing")
    args = parser.parse_args()
    if args.table:
        print(tables(json.loads(args.table.read_text())), end="")
        return
    report: dict[str, Any] = {"jax": jax.__version__, "backend": jax.default_backend(), "cases": {}, "faults": {}}
    if args.only and args.json and args.json.exists():
        report = json.loads(args.json.read_text())
    for name in args.only or [*CASES, *FAULTS]:
        begun, seeds = time.perf_counter(), range(args.seeds)
        results = run_case(CASES[name], seeds) if name in CASES else run_fault(name, seeds)
        case = CASES.get(name, CASES["ppo_lag"])
        report["cases" if name in CASES else "faults"][name] = {
            "target": (case.optimum.__doc__ or "").split("\n")[0],
            "bounds": {error: getattr(case, error) for error in worst(results)},
            "worst": worst(results),
            "runs": results,
        }
        for key, names in (("cases", CASES), ("faults", FAULTS)):
            report[key] = {name: report[key][name] for name in names if name in report[key]}
        shown = "  ".join(f"{key} {value:.4f}" for key, value in worst(results).items())
        passed, seconds = sum(r["within"] for r in results), time.perf_counter() - begun
        print(f"{name}: {passed} of {len(results)} within; worst {shown}  ({seconds:.0f} s)", flush=True)
        if args.json:
            args.json.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
