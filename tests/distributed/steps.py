"""Some steps of PPO-Lagrangian on a mesh: in the process of the tests, or as a process of its own among others.

python tests/distributed/steps.py MESH CHECKPOINTS OUT [override …]      with MESH as in 2,2,2, or with `decode` 1,2,1,4
"""

import json
import sys
from pathlib import Path

import jax

from safe_rlhf_jax import config as cfg
from safe_rlhf_jax import processes, sharding
from safe_rlhf_jax.checkpoint import Checkpoints
from safe_rlhf_jax.rl.algorithms import ALGORITHMS
from safe_rlhf_jax.rl.step import collect, learn
from safe_rlhf_jax.sharding import fetch, make_mesh
from safe_rlhf_jax.stages import Run, reinforcement
from safe_rlhf_jax.stages.datasets import load_data
from safe_rlhf_jax.stages.networks import jit_step

CONFIG = Path(__file__).parent.parent / "configs" / "rl.yaml"
STEPS = 5
sharding.FETCHED_BYTES = 700  # so that what is fetched from other processes comes over in several slices


def take_steps(mesh, checkpoints, overrides):
    """Five steps, and a sixth: from the checkpoint of another mesh, or after saving one where there is none.

    Returns the metrics and sampled tokens of each step.
    """
    run = Run(cfg.load_config(CONFIG, [*overrides, f"execution.gather_to_decode={str(len(mesh) > 3).lower()}"]))
    run.mesh = make_mesh(mesh[:3], jax.devices() if -1 in mesh or max(mesh) > 1 else jax.devices()[:1], *mesh[3:])
    stage = run.config.stages[0]
    prompts = load_data(run, stage, "prompts")
    batch, key = reinforcement.prompt_batches(run, stage, prompts, 0), jax.random.key(0)
    metrics, tokens = [], []
    with jax.set_mesh(run.mesh):
        limits, groups = {"cost": (-0.2,)}, ("benign", "risky", "sensitive")
        hp = reinforcement.hyperparameters(run, stage, limits, groups)
        networks, state, frozen, _ = reinforcement.build_networks(run, stage, hp)
        generate = jax.jit(lambda params, prompts, key: collect(networks, hp, params, prompts, key))

        def learn_from(state, frozen, rollout, key):
            return learn(networks, ALGORITHMS["ppo_lag"], hp, state, frozen, rollout, None, key)

        update = jit_step(learn_from, state, run.mesh)
        for i in range(STEPS + 1):
            if i == STEPS:
                saved = Checkpoints(checkpoints)
                if saved.latest() is None:
                    saved.save(i, state, {})
                else:
                    state, at = saved.restore(state)
                    assert at == i
                saved.close()
            sample, learn_key = jax.random.split(jax.random.fold_in(key, i))
            rollout = generate(state.actor.params, batch(i), sample)
            tokens.append(fetch(rollout.tokens).tolist())
            state, measured = update(state, frozen, rollout, learn_key)
            metrics.append({name: float(value) for name, value in fetch(measured).items()})
    return {"metrics": metrics, "tokens": tokens}


if __name__ == "__main__":
    processes.start()
    mesh, checkpoints, out, *overrides = sys.argv[1:]
    result = take_steps(tuple(map(int, mesh.split(","))), checkpoints, overrides)
    if processes.is_main():
        Path(out).write_text(json.dumps(result))
