"""From logits to one token: greedy, temperature, top-k, top-p, repetition penalty."""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key

from safe_rlhf_jax.models.transformer import EXCLUDED
from safe_rlhf_jax.ops import token_log_probs


@dataclasses.dataclass(frozen=True)
class Sampling:
    """Sampling settings. The defaults sample from the model's own distribution."""

    temperature: float = 1.0  # 0 is greedy
    top_k: int = 0  # keep the k most probable tokens; 0 keeps all
    top_p: float = 1.0  # keep the smallest set of tokens whose probability reaches p
    repetition_penalty: float = 1.0  # > 1 makes tokens that have occurred less likely


def penalize_repetition(logits: Float[Array, "B V"], seen: Bool[Array, "B V"], penalty: float) -> Float[Array, "B V"]:
    """Divides positive and multiplies negative logits of seen tokens. Source: Keskar et al. 2019, arXiv 1909.05858."""
    return jnp.where(seen, jnp.where(logits > 0, logits / penalty, logits * penalty), logits)


def keep_top_k(logits: Float[Array, "B V"], k: int) -> Float[Array, "B V"]:
    """Excludes all but the k largest logits (and ties with the k-th)."""
    threshold = jax.lax.top_k(logits, k)[0][:, -1:]
    return jnp.where(logits < threshold, EXCLUDED, logits)


def keep_top_p(logits: Float[Array, "B V"], p: float | Float[Array, "B 1"]) -> Float[Array, "B V"]:
    """Excludes tokens outside the nucleus. Source: Holtzman et al. 2019, arXiv 1904.09751.

    A token stays when the probability of the tokens before it, most probable first, is below p; so one always stays.
    """
    ordered = -jnp.sort(-logits, axis=-1)
    probabilities = jax.nn.softmax(ordered, axis=-1)
    before = jnp.cumsum(probabilities, axis=-1) - probabilities
    threshold = jnp.min(jnp.where(before < p, ordered, jnp.inf), axis=-1, keepdims=True)
    return jnp.where(logits < threshold, EXCLUDED, logits)


def sample_token(
    key: jax.Array, logits: Float[Array, "B V"], seen: Bool[Array, "B V"] | None, sampling: Sampling
) -> tuple[Int[Array, " B"], Float[Array, " B"]]:
    """Chooses a token for each row.

    Args:
        key: Random key of this step.
        logits: f32[B, V].
        seen: bool[B, V], tokens that have occurred; needed for a repetition penalty only.
        sampling: Sampling settings.

    Returns:
        token i32[B], and its log-probability under the distribution it was drawn from, f32[B] in nats (greedy: under
        the softmax at temperature 1).
    """
    if sampling.repetition_penalty != 1.0 and seen is not None:
        logits = penalize_repetition(logits, seen, sampling.repetition_penalty)
    if sampling.temperature == 0.0:
        token = jnp.argmax(logits, axis=-1)
    else:
        if sampling.temperature != 1.0:
            logits = logits / sampling.temperature
        if sampling.top_k:
            logits = keep_top_k(logits, min(sampling.top_k, logits.shape[-1]))
        if sampling.top_p < 1.0:
            logits = keep_top_p(logits, sampling.top_p)
        token = jax.random.categorical(key, logits)
    token = token.astype(jnp.int32)
    return token, token_log_probs(logits[:, None], token[:, None])[:, 0]


def sample_rows(
    keys: Key[Array, " B"], logits: Float[Array, "B V"], temperature: Float[Array, " B"], top_p: Float[Array, " B"]
) -> Int[Array, " B"]:
    """Chooses a token for each row with its own key and settings, i32[B]; no row depends on another.

    Args:
        keys: Random keys of this step.
        logits: f32[B, V].
        temperature: f32[B], 0 is greedy.
        top_p: f32[B], 1 keeps all tokens.
    """
    scaled = logits / jnp.where(temperature > 0, temperature, 1.0)[:, None]
    nucleus = top_p[:, None]
    kept = jax.lax.cond(
        (top_p < 1).any(),  # sorting takes longer than all else here
        lambda: jnp.where(nucleus < 1, keep_top_p(scaled, nucleus), scaled),
        lambda: scaled,
    )
    sampled = jax.vmap(jax.random.categorical)(keys, kept)
    return jnp.where(temperature == 0, jnp.argmax(logits, axis=-1), sampled).astype(jnp.int32)
