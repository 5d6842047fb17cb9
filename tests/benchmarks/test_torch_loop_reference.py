"""The PyTorch loop of benchmarks/torch_loop.py computes what ours does, on the same weights and rollout."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import rl_step, torch_loop
from safe_rlhf_jax.models import hf
from safe_rlhf_jax.rl.algorithms import ALGORITHMS
from safe_rlhf_jax.rl.rollout import score_rollout
from safe_rlhf_jax.rl.step import estimate_advantages
from safe_rlhf_jax.rl.update import update_networks
from safe_rlhf_jax.types import Rollout

torch = pytest.importorskip("torch")
pytestmark = pytest.mark.reference

PROMPT, RESPONSE, ROWS = 5, 6, 4
MODEL = {
    "vocab_size": 40, "hidden_size": 32, "intermediate_size": 48, "num_layers": 2, "num_heads": 4, "num_kv_heads": 2,
    "head_dim": 8, "max_positions": 16, "scan_layers": False, "initializer_range": 0.2,
}  # fmt: skip
SPEC = {"model": MODEL, "batch_size": ROWS, "prompt_length": PROMPT, "response_length": RESPONSE, "minibatches": 1}


def carry_over(network, folder, module, variables):
    """Loads our weights into a network of transformers."""
    from safetensors.torch import load_file  # imports torch

    tensors = load_file(hf.save(folder, module, variables) / hf.WEIGHTS)
    network.load_state_dict(
        {k.replace("score_head.", "score."): v for k, v in tensors.items() if not k.startswith("normalizer.")}
    )


def test_scores_losses_and_gradients_equal_ours(tmp_path):
    networks, hp, state, frozen, _ = rl_step.build(SPEC, recompute=True)
    loop = torch_loop.TorchLoop(SPEC, compiled=False)
    carry_over(loop.actor, tmp_path / "actor", networks.policy, {"params": state.actor.params})
    carry_over(loop.reference, tmp_path / "reference", networks.policy, {"params": frozen.reference})
    for s in torch_loop.SIGNALS:
        carry_over(loop.critics[s], tmp_path / f"{s}_critic", networks.critics[s], {"params": state.critics[s].params})
        carry_over(loop.scorers[s], tmp_path / s, networks.scorers[s], frozen.scorers[s])

    rng = np.random.default_rng(0)
    tokens = rng.integers(3, MODEL["vocab_size"], (ROWS, PROMPT + RESPONSE))
    mask = np.arange(PROMPT + RESPONSE) >= np.array([0, 2, 1, 0])[:, None]
    rollout = Rollout(
        jnp.asarray(tokens, jnp.int32), jnp.asarray(mask), jnp.zeros((ROWS, RESPONSE)), jnp.zeros(ROWS, jnp.int32)
    )
    score = jax.jit(lambda rollout: score_rollout(
        networks, state, frozen, rollout, temperature=1.0, recompute_log_probs=True, slices=1
    ))  # fmt: skip
    ours, theirs_rollout = score(rollout), (torch.tensor(tokens), torch.tensor(mask).long())
    theirs = loop.scoring(theirs_rollout)
    pairs = [(ours.log_probs, theirs["old"]), (ours.ref_log_probs, theirs["reference"])]
    pairs += [(ours.scores[s], theirs["scores"][s]) for s in torch_loop.SIGNALS]
    pairs += [(ours.values[s], theirs["values"][s]) for s in torch_loop.SIGNALS]
    for expected, actual in pairs:
        np.testing.assert_allclose(actual.numpy(), expected, atol=2e-5)

    noise = rng.normal(0, 0.3, (ROWS, RESPONSE)).astype(np.float32)  # so that some ratios are clipped
    ours = dataclasses.replace(ours, log_probs=ours.log_probs + noise)
    theirs["old"] = theirs["old"] + torch.tensor(noise)
    algorithm = ALGORITHMS["ppo_lag"]
    update = jax.jit(lambda state, scored: update_networks(
        networks, algorithm, hp, state, estimate_advantages(algorithm, hp, state, scored)[0], None, jax.random.key(0)
    )[1])  # fmt: skip
    expected, actual = update(state, ours), loop.update(theirs_rollout, theirs)
    assert expected["clip_fraction"] > 0.1
    for name, ours_name in {"actor": "actor", "reward": "reward_critic", "cost": "cost_critic"}.items():
        loss, norm = actual[name]
        np.testing.assert_allclose(loss, expected[f"{ours_name}_loss"], rtol=1e-4, atol=1e-6)
        np.testing.assert_allclose(norm, expected[f"{ours_name}_grad_norm"], rtol=1e-4)


def test_the_cache_gives_what_a_whole_pass_does(monkeypatch):
    monkeypatch.setattr(torch, "multinomial", lambda probabilities, _: probabilities.argmax(-1, keepdim=True))
    loop = torch_loop.TorchLoop(SPEC, compiled=False)
    for _ in range(2):  # the second time in a used cache
        tokens, mask = loop.generation()
    assert tokens.shape == mask.shape == (ROWS, PROMPT + RESPONSE)
    with torch.no_grad():
        best = loop.actor(tokens).logits[:, PROMPT - 1 : -1].argmax(-1)
    assert (tokens[:, PROMPT:] == best).all()
    loop.iteration()
