"""Packed rows against rows of one text and batches of similar lengths: shares of real tokens, tokens per second.

    python -m benchmarks.packing [--config benchmarks/configs/packing.yaml] [--steps 3] [--json FILE] [KEY=VALUE ...]
    python -m benchmarks.packing --table      writes the table of benchmarks/README.md from the file

The share is that of an epoch. The batches that are timed are the first ones of the three ways in turn, in one process,
after one untimed run of each, which compiles.
"""

import argparse
import json
import pathlib
import time
from typing import Any

import jax
import numpy as np

from benchmarks.rl_step import environment
from benchmarks.rounds.jobs import write_section
from safe_rlhf_jax.config import load_config
from safe_rlhf_jax.data.examples import Examples, sides_of
from safe_rlhf_jax.data.loader import Batches
from safe_rlhf_jax.sharding import row_shards
from safe_rlhf_jax.stages.common import Run
from safe_rlhf_jax.stages.datasets import take
from safe_rlhf_jax.stages.kinds import KINDS
from safe_rlhf_jax.stages.supervised import build_supervised, total_steps

ROOT = pathlib.Path(__file__).parent.parent
CONFIG = "benchmarks/configs/packing.yaml"
RESULT = "benchmarks/results/packing.json"


def ways(run: Run, stage: Any, data: Examples) -> dict[str, Batches]:
    """Returns the batches of each way."""
    options = {"unpacked": {}, "grouped by length": {"group_by_length": True},
               "packed": {"packed": (row_shards(run.mesh), stage.microbatches)}}  # fmt: skip
    return {
        name: Batches(data, batch_size=stage.batch_size, seed=run.seed(stage), **option)  # type: ignore[arg-type]
        for name, option in options.items()
    }


def tokens_of(batch: Any) -> tuple[int, int]:
    """Returns (real tokens, columns that are computed) of a batch."""
    masks = [side.mask for side in sides_of(batch)]
    columns = sum(mask.size for mask in masks) if batch.packing is None else batch.packing.sources.size
    return int(sum(mask.sum() for mask in masks)), int(columns)


def measured(run: Run, stage: Any, steps: int) -> dict[str, Any]:
    """Measures one stage."""
    task_of: Any = KINDS[stage.kind].run
    (task,) = task_of.args
    data = take(run, stage, "data", task.load)
    found: dict[str, Any] = {"texts": len(data) * task.sides, "tokens_per_text": data.mean_tokens / task.sides}
    found |= {"max_length": stage.max_length, "batch_size": stage.batch_size, "ways": {}}
    batches = ways(run, stage, data)
    _, state, frozen, step = build_supervised(task, run, stage, total_steps(stage, data))
    for name, batch in batches.items():
        counts = np.array([tokens_of(batch(i)) for i in range(max(len(data) // stage.batch_size, 1))])
        found["ways"][name] = {"real_share": float(counts[:, 0].sum() / counts[:, 1].sum())}
    seconds: dict[str, list[float]] = {name: [] for name in batches}
    key = jax.random.key(0)
    for timed in (False, True):
        for i in range(steps):
            for name, batch in batches.items():
                put = run.put(batch(i))
                start = time.perf_counter()
                state, metrics = step(state, frozen, put, key)
                jax.block_until_ready(metrics)
                if timed:
                    seconds[name].append(time.perf_counter() - start)
    for name, batch in batches.items():
        real = [tokens_of(batch(i))[0] for i in range(steps)]
        found["ways"][name] |= {"seconds": seconds[name], "real_tokens_per_second": sum(real) / sum(seconds[name])}
    rate = {name: way["real_tokens_per_second"] for name, way in found["ways"].items()}
    found["ratio"] = {name: rate["packed"] / rate[name] for name in rate if name != "packed"}
    return found


def table(result: dict[str, Any]) -> str:
    """Returns the table of a result."""
    lines = [
        f"SmolLM2-135M with adapters of rank 16 on the last 10 layers, {result['cores']} cores ({result['cpu']}), "
        f"{result['dtype']}, commit {result['commit']}:\n",
        "| data | records per step | real tokens: a row each | by length | packed | real tokens/s: a row each "
        "| by length | packed | packed ÷ a row each | packed ÷ by length |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for name, found in result["stages"].items():
        ways, ratio = found["ways"], found["ratio"]
        cells = [f"{name}, {found['tokens_per_text']:.0f} tokens of at most {found['max_length']}", found["batch_size"]]
        cells += [f"{100 * way['real_share']:.0f} %" for way in ways.values()]
        cells += [f"{way['real_tokens_per_second']:.0f}" for way in ways.values()]
        cells += [f"{ratio[name]:.2f}" for name in ("unpacked", "grouped by length")]
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default=CONFIG)
    parser.add_argument("--steps", type=int, default=3, help="batches that are timed")
    parser.add_argument("--json", type=pathlib.Path, default=ROOT / RESULT)
    parser.add_argument("--table", action="store_true", help="write the table instead of measuring")
    parser.add_argument("overrides", nargs="*", metavar="dotted.key=value")
    options = parser.parse_args()
    if options.table:
        write_section("packing", table(json.loads(options.json.read_text())), ROOT / "benchmarks" / "README.md")
        return
    config = load_config(options.config, options.overrides)
    run = Run(config)
    result: dict[str, Any] = {
        **environment(), "config": options.config, "overrides": options.overrides, "dtype": config.execution.dtype,
        "stages": {},
    }  # fmt: skip
    with jax.set_mesh(run.mesh):
        for stage in config.stages:
            result["stages"][stage.name] = measured(run, stage, options.steps)
            print(stage.name, json.dumps(result["stages"][stage.name], indent=1), flush=True)
            options.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
