"""KL regularisation towards the reference: the coefficient β, the KL term in signals or loss, a moving reference."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float

from safe_rlhf_jax.ops import masked_mean
from safe_rlhf_jax.types import MovingReference

MAX_ERROR = 0.2  # bound on the controller's relative error


def k2(log_ratio: Float[Array, "B T"]) -> Float[Array, "B T"]:
    """½·k²: on policy, its gradient as a loss is that of KL(π ‖ π_ref) at each token."""
    return 0.5 * jnp.square(log_ratio)


def k3(log_ratio: Float[Array, "B T"]) -> Float[Array, "B T"]:
    """e^{−k} − 1 + k: an estimate of KL(π ‖ π_ref) that is never negative; as a loss it pulls on KL(π_ref ‖ π)."""
    return jnp.exp(-log_ratio) - 1.0 + log_ratio


# Source: Schulman 2020, http://joschu.net/blog/kl-approx.html
KL_LOSSES: dict[str, Callable[[jax.Array], jax.Array]] = {"k2": k2, "k3": k3}


@dataclasses.dataclass(frozen=True)
class KLControl:
    """Scalars as in the config, which has their sources."""

    loss: Callable[[jax.Array], jax.Array] | None = None  # None: the KL term is in the signals
    schedule: optax.Schedule | None = None  # share of β by iteration; None: always 1
    target: float | None = None  # the controller's target, nats per response; None: no controller
    gain: float = 0.1
    refresh_every: int | None = None  # iterations
    average: float | None = None  # share of the actor in the reference, per iteration

    @property
    def moves_reference(self) -> bool:
        """True if the reference moves and is part of the state."""
        return self.refresh_every is not None or self.average is not None


def kl_loss(
    control: KLControl, log_probs: Float[Array, "B T"], ref_log_probs: Float[Array, "B T"], mask: Bool[Array, "B T"]
) -> Float[Array, ""]:
    """The KL term of the policy loss, per token, in nats; 0 if it is in the signals."""
    if control.loss is None:
        return jnp.float32(0.0)
    return masked_mean(control.loss(jnp.where(mask, log_probs - ref_log_probs, 0.0)), mask)


def adapt(coeff: Float[Array, ""], kl: Float[Array, ""], *, target: float, gain: float) -> Float[Array, ""]:
    """β ← β·(1 + K·clip(KL/target − 1, ±0.2)).

    Source: Ziegler et al. 2019, arXiv 1909.08593, section 2.2.

    Args:
        coeff: β.
        kl: Measured on the rollout, nats per response.
        target: In the same unit.
        gain: K.
    """
    error = jnp.clip(kl / target - 1.0, -MAX_ERROR, MAX_ERROR)
    return coeff * (1.0 + gain * error)


def start_reference(params: Any) -> MovingReference:
    """Returns a moving reference: a copy of the parameters, of age 0."""
    return MovingReference(params=jax.tree.map(jnp.copy, params), age=jnp.zeros((), jnp.float32))


def move_reference(control: KLControl, reference: MovingReference, actor: Any, step: jax.Array) -> MovingReference:
    """π_ref ← (1 − w)·π_ref + w·actor: w = 1 every `refresh_every` iterations and 0 between, or always `average`.

    The age, in iterations, follows the same average: after a refresh it is 0.

    Args:
        control: Sets one of the two.
        reference: Before.
        actor: Parameters of the actor, after this iteration's updates.
        step: Iterations done, this one included.
    """
    weight = jnp.float32(control.average or 0.0)
    if control.refresh_every is not None:
        weight = (step % control.refresh_every == 0).astype(jnp.float32)
    params = jax.tree.map(lambda old, new: (1.0 - weight) * old + weight * new, reference.params, actor)
    return MovingReference(params=params, age=(1.0 - weight) * (reference.age + 1.0))
