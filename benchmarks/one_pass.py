"""HBM traffic and bytes sent of scoring with adapters: one pass over the roles of a base against a pass each.

    python benchmarks/one_pass.py --topology h100:8 --json benchmarks/results/one_pass.json

Compiles the scoring of configs/llama_3_8b/ppo_lag_lora.yaml (reference, reward model, cost model, two critics and the
actor on one base) over `fsdp`, ahead of time, both ways; figures of a topology are added to the file.
"""

import argparse
import json
import pathlib
import subprocess
from typing import Any

import jax
import jax.numpy as jnp

from safe_rlhf_jax.aot.chips import chip_of
from safe_rlhf_jax.aot.roofline import analyse
from safe_rlhf_jax.aot.run import AbstractRun
from safe_rlhf_jax.compile import topology_devices
from safe_rlhf_jax.config import load_config
from safe_rlhf_jax.rl import rollout
from safe_rlhf_jax.sharding import make_mesh
from safe_rlhf_jax.stages.programs import array, put, texts
from safe_rlhf_jax.stages.reinforcement import build_networks, hyperparameters
from safe_rlhf_jax.types import Rollout

ROOT = pathlib.Path(__file__).parent.parent
CONFIG = "configs/llama_3_8b/ppo_lag_lora.yaml"
together = rollout.hidden_of_roles


def separately(module: Any, roles: Any, *rest: Any) -> list[jax.Array]:
    """A pass for each role; the barriers keep the compiler from joining them."""
    states, order = [], jnp.zeros(())
    for role in roles:
        role, order = jax.lax.optimization_barrier((role, order))
        (state,) = together(module, [role], *rest)
        state, order = jax.lax.optimization_barrier((state, order))
        states.append(state)
    return states


def figures(topology: str) -> dict[str, Any]:
    """Compiles scoring both ways."""
    config = load_config(ROOT / CONFIG, ["stages.ppo_lag.microbatches=4"])
    (stage,) = config.stages
    devices = topology_devices(topology, 1)
    run = AbstractRun(config, make_mesh((1, len(devices), 1), devices))
    found: dict[str, Any] = {}
    with jax.set_mesh(run.mesh):
        hp = hyperparameters(run, stage, {"cost": (0.0,)}, ("all",))
        networks, state, frozen, _ = build_networks(run, stage, hp)
        rows, length = stage.rows, stage.max_prompt_length + hp.response_length
        numbers = {"sampler_log_probs": array(rows, hp.response_length, dtype=jnp.float32)}
        part = put(run, Rollout(**texts(rows, length), **numbers, group=array(rows, dtype=jnp.int32)))

        def score(state: Any, frozen: Any, part: Rollout) -> Any:
            return rollout.score_rollout(
                networks.on(frozen.bases), state, frozen, part, temperature=1.0,
                recompute_log_probs=True, slices=hp.minibatches * hp.microbatches,
            )  # fmt: skip

        for name, roles in {"one pass": together, "a pass each": separately}.items():
            rollout.hidden_of_roles = roles  # type: ignore[assignment]
            compiled = jax.jit(lambda *a: score(*a)).lower(state, frozen, part).compile()
            report = analyse(
                compiled, mesh_shape=run.mesh.shape, devices=devices, chip=chip_of(devices[0]), flops={"scoring": 0.0}
            )
            sent = {}
            for collective in report["collectives"]:
                sent[collective["kind"]] = sent.get(collective["kind"], 0) + collective["bytes"]
            found[name] = {
                "hbm_bytes": sum(phase["hbm_bytes"] for phase in report["phases"].values()),
                "sent_bytes": sent,
                "temporary_bytes": report["memory"]["temporary"],
            }
    return found


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--topology", required=True, help="such as h100:8 or v6e:2x4")
    parser.add_argument("--json", type=pathlib.Path, default=ROOT / "benchmarks/results/one_pass.json")
    options = parser.parse_args()
    result = json.loads(options.json.read_text()) if options.json.exists() else {"config": CONFIG, "topologies": {}}
    commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=True)
    result["topologies"][options.topology] = {"commit": commit.stdout.strip()} | figures(options.topology)
    options.json.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result["topologies"][options.topology], indent=1))


if __name__ == "__main__":
    main()
