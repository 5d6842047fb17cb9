"""Times one PPO-Lagrangian iteration by phase on random weights, compile time apart.

    python benchmarks/rl_step.py --config benchmarks/configs/rl_step_tiny.yaml [--json benchmarks/results/NAME.json]

Every response runs to its full length (no token ends it). Phases are timed as programs of their own; `iteration` is the
fused program that training runs. FLOPs are counted analytically, a multiply-add as two. `compiler` is what
`python -m safe_rlhf_jax.compile` says of the same program.
"""

import argparse
import functools
import json
import os
import pathlib
import platform
import resource
import shutil
import statistics
import subprocess
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import yaml
from flax import linen as nn

from safe_rlhf_jax.aot.chips import chip_of
from safe_rlhf_jax.aot.flops import iteration_flops
from safe_rlhf_jax.aot.roofline import analyse, memory_of
from safe_rlhf_jax.host_memory import keep_freed_memory
from safe_rlhf_jax.models.adapters import Adapted, without_adapters
from safe_rlhf_jax.models.config import Lora, ModelConfig, ScoreConfig
from safe_rlhf_jax.models.parameters import cast_matrices
from safe_rlhf_jax.models.transformer import CausalLM, ScoreModel
from safe_rlhf_jax.optim import init_state, make_optimizer
from safe_rlhf_jax.rl.algorithms import ALGORITHMS
from safe_rlhf_jax.rl.constraints import Constraint, init_constraint
from safe_rlhf_jax.rl.rollout import Networks, score_rollout
from safe_rlhf_jax.rl.step import Hyperparameters, collect, estimate_advantages, make_step
from safe_rlhf_jax.rl.update import update_networks
from safe_rlhf_jax.stages.networks import with_adapters
from safe_rlhf_jax.types import Frozen, PromptBatch, RLState


def seconds(function: Callable[[], Any], repeats: int, *, has_run: bool = False) -> float:
    """Median wall-clock seconds of a call, the device's work included; one call before does not count."""
    if not has_run:
        jax.block_until_ready(function())
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        jax.block_until_ready(function())
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def matmul_peak(dtype: str) -> float:
    """FLOP/s of a large matrix product, in the dtype that the model multiplies in."""
    size = 2048 if jax.default_backend() == "cpu" else 8192
    a = jax.random.normal(jax.random.key(0), (size, size)).astype(dtype)
    product = jax.jit(lambda x: x @ x)
    return 2 * size**3 / seconds(lambda: product(a), 10)


def hyperparameters(spec: dict[str, Any], recompute: bool) -> Hyperparameters:
    """Those of the configuration; no token ends a response."""
    return Hyperparameters(
        response_length=spec["response_length"],
        eos_id=-1,
        pad_id=0,
        recompute_log_probs=recompute,
        minibatches=spec["minibatches"],
        microbatches=spec.get("microbatches", 1),
        constraints={"cost": Constraint()},
    )


def build(spec: dict[str, Any], recompute: bool) -> tuple[Networks, Hyperparameters, RLState, Frozen, PromptBatch]:
    """Random networks and prompts; with `lora` adapters on one base, also for scorers and critics."""
    lora = Lora(**spec["lora"]) if "lora" in spec else None
    config = with_adapters(ModelConfig(**spec["model"]), lora)
    policy: Any = CausalLM(config)
    scorers: Any = {s: ScoreModel(config, ScoreConfig(s)) for s in ("reward", "cost")}  # type: ignore[arg-type]
    critic: Any = ScoreModel(config, ScoreConfig("critic"))
    bases = {}
    if lora is not None:
        plain = without_adapters(policy)
        policy, critic = Adapted(policy, "base"), Adapted(critic, "base")
        scorers = {s: Adapted(module, "base") for s, module in scorers.items()}
    optimizer = make_optimizer(1e-6)
    batch, prompt = spec["batch_size"], spec["prompt_length"]
    tokens = jnp.asarray(np.random.default_rng(0).integers(3, config.vocab_size, (batch, prompt)), jnp.int32)

    @functools.partial(jax.jit, static_argnums=0)
    def random(module: Any, key: jax.Array) -> Any:
        return nn.unbox(module.init(key, tokens[:1], tokens[:1] > 0))

    def variables(module: Any, seed: int) -> Any:
        return random(module, jax.random.key(seed, impl="unsafe_rbg"))  # compiles several times faster than the default

    if lora is not None:
        make = jax.jit(lambda key: cast_matrices(nn.unbox(plain.init(key, tokens[:1], tokens[:1] > 0))["params"],
                                                 config.dtype))  # fmt: skip
        bases["base"] = make(jax.random.key(9, impl="unsafe_rbg"))

    def only_read(variables: Any) -> Any:
        return variables | {"params": cast_matrices(variables["params"], config.dtype)}

    networks = Networks(policy, scorers, dict.fromkeys(scorers, critic), optimizer, dict.fromkeys(scorers, optimizer))
    hp = hyperparameters(spec, recompute)
    state = RLState(
        step=jnp.zeros((), jnp.int32),
        actor=init_state(variables(policy, 0)["params"], optimizer),
        critics={s: init_state(variables(critic, i + 1)["params"], optimizer) for i, s in enumerate(scorers)},
        constraints={"cost": init_constraint(Constraint(), multiplier=1.0, window=128)},
    )
    frozen = Frozen(
        {} if bases else only_read(variables(policy, 0))["params"],
        {s: only_read(variables(scorers[s], i + 3)) for i, s in enumerate(scorers)},
        bases,
    )
    return networks, hp, state, frozen, PromptBatch(tokens, tokens > 0, jnp.zeros((batch,), jnp.int32))


def phase_calls(
    networks: Networks, hp: Hyperparameters, box: list[RLState], frozen: Frozen, prompts: PromptBatch, key: jax.Array
) -> dict[str, Callable[[], Any]]:
    """Calls of each phase as a program of its own; the box holds the state, which `update` moves."""
    algorithm = ALGORITHMS["ppo_lag"]
    options = {"temperature": 1.0, "recompute_log_probs": hp.recompute_log_probs,
               "slices": hp.minibatches * hp.microbatches}  # fmt: skip
    # Networks are arguments: as constants they would be compiled into each program.
    generate = jax.jit(lambda params, bases, prompts: collect(networks.on(bases), hp, params, prompts, key))
    score = jax.jit(
        lambda state, frozen, rollout: score_rollout(networks.on(frozen.bases), state, frozen, rollout, **options)
    )
    rollout = generate(box[0].actor.params, frozen.bases, prompts)
    scored = score(box[0], frozen, rollout)
    update = jax.jit(
        lambda state, bases, scored: update_networks(
            networks.on(bases), algorithm, hp, state, estimate_advantages(algorithm, hp, state, scored)[0], None, key
        ),
        donate_argnums=0,
    )

    def run_update() -> Any:
        box[0], metrics = update(box[0], frozen.bases, scored)
        return metrics

    return {
        "generation": lambda: generate(box[0].actor.params, frozen.bases, prompts),
        "scoring": lambda: score(box[0], frozen, rollout),
        "update": run_update,
    }


def runner(
    compiled: Callable[..., Any], state: RLState, frozen: Frozen, prompts: PromptBatch, key: jax.Array
) -> tuple[list[RLState], Callable[[], Any]]:
    """Returns a box with the state, and a call of the compiled step, which moves it and returns the metrics."""
    box = [state]

    def run_step() -> Any:
        box[0], metrics = compiled(box[0], frozen, prompts, key)
        return metrics

    return box, run_step


def measure(spec: dict[str, Any], repeats: int, recompute: bool) -> Iterator[dict[str, Any]]:
    """Compiles and times one configuration; yields what there is of the result as soon as it is there."""
    networks, hp, state, frozen, prompts = build(spec, recompute)
    algorithm, key, config = ALGORITHMS["ppo_lag"], jax.random.key(0), networks.policy.config
    flops = iteration_flops(config, prompts.tokens.shape[0], spec["prompt_length"], hp.response_length, recompute)
    total = sum(flops.values())
    yield {"old_log_probs": "recomputed" if recompute else "sampled", "flops": {**flops, "iteration": total}}

    step = jax.jit(make_step(networks, algorithm, hp), donate_argnums=0)
    start = time.perf_counter()
    compiled = step.lower(state, frozen, prompts, key).compile()
    chip = chip_of(jax.devices()[0])
    memory = memory_of(compiled, chip.hbm if chip else None)
    yield {"compile_seconds": time.perf_counter() - start, "compiler": {"memory": memory}}
    box, run_step = runner(compiled, state, frozen, prompts, key)
    del state  # donated
    first = {name: float(value) for name, value in run_step().items()}
    iteration = seconds(run_step, repeats, has_run=True)
    yield {
        "peak_memory_bytes": peak_memory(),
        "first_step": {name: first[f"train/{name}"] for name in ("sampler_gap", "first_ratio_gap", "actor_loss")},
        "seconds": {"iteration": iteration},
        # What the peak in the data sheet is for.
        **({"mfu": total / iteration / chip.flops} if chip and config.dtype == "bfloat16" else {}),
    }

    calls = phase_calls(networks, hp, box, frozen, prompts, key)
    phases = {name: seconds(call, repeats) for name, call in calls.items()}
    peak = matmul_peak(config.dtype)
    rows = prompts.tokens.shape[0]
    yield {
        "seconds": {"iteration": iteration, **phases},
        "tokens_per_second": {
            "generated": rows * hp.response_length / phases["generation"],
            "total": rows * (spec["prompt_length"] + hp.response_length) / iteration,
        },
        "flops_per_second": {
            "matmul_peak": peak,
            "iteration": total / iteration,
            **{name: flops[name] / phases[name] for name in phases},
        },
        "share_of_matmul_peak": total / iteration / peak,
    }
    again = 4 / 3 if config.remat == "full" else 1.0
    executed = iteration_flops(config, rows, spec["prompt_length"], hp.response_length, recompute, again=again)
    yield {"compiler": analyse(compiled, mesh_shape={}, devices=jax.devices()[:1], chip=chip, flops=executed)}


def peak_memory() -> int:
    """Bytes: of the accelerator where it counts them, else of the process."""
    stats = jax.devices()[0].memory_stats() or {}
    return int(stats.get("peak_bytes_in_use", resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024))


def environment() -> dict[str, Any]:
    """Commit (that of the environment's COMMIT, where the files are a copy without git), versions and hardware."""
    describe = ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    git = shutil.which("git") and subprocess.run(describe, capture_output=True, text=True, check=False).stdout.strip()
    lines = pathlib.Path("/proc/cpuinfo").read_text().splitlines()
    cpu = next((line.split(":")[1].strip() for line in lines if "model name" in line), platform.machine())
    return {
        "commit": os.environ.get("COMMIT") or git or "unknown",
        "jax": jax.__version__,
        "device": jax.devices()[0].device_kind,
        "cpu": cpu,
        "cores": len(os.sched_getaffinity(0)),
    }


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", required=True, help="sizes, such as benchmarks/configs/rl_step_tiny.yaml")
    parser.add_argument("--json", help="write the result to this file")
    parser.add_argument("--repeats", type=int, default=5, help="timed calls; the median counts")
    parser.add_argument(
        "--lora", help="adapters in place of whole networks, such as '{rank: 16, alpha: 32, layers: 10}'"
    )
    parser.add_argument("--old-log-probs", choices=["recomputed", "sampled"], default="recomputed")
    options = parser.parse_args()
    keep_freed_memory()
    spec = yaml.safe_load(pathlib.Path(options.config).read_text())
    if options.lora:
        spec["lora"] = yaml.safe_load(options.lora)
    result = {"config": spec, "environment": environment()}
    for part in measure(spec, options.repeats, options.old_log_probs == "recomputed"):
        result |= part
        if options.json:
            pathlib.Path(options.json).write_text(json.dumps(result, indent=2) + "\n")
    for name, value in result["seconds"].items():
        print(f"{name:12s} {value:9.3f} s   {result['flops'][name] / 1e9:10.1f} GFLOP   "
              f"{result['flops_per_second'][name] / 1e9:8.1f} GFLOP/s")  # fmt: skip
    print(f"compile      {result['compile_seconds']:9.1f} s")
    print(f"tokens/s     {result['tokens_per_second']['generated']:9.0f} generated, "
          f"{result['tokens_per_second']['total']:.0f} in total")  # fmt: skip
    print(f"memory       {result['peak_memory_bytes'] / 2**30:9.2f} GiB at its peak")
    print(f"matmul peak  {result['flops_per_second']['matmul_peak'] / 1e9:9.0f} GFLOP/s; the iteration reaches "
          f"{result['share_of_matmul_peak']:.0%}")  # fmt: skip


if __name__ == "__main__":
    main()
