"""What a quantised network loses, measured on a few texts."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from safe_rlhf_jax.models.quantized import is_quantized, stored_bytes
from safe_rlhf_jax.models.transformer import EXCLUDED, CausalLM, ScoreModel
from safe_rlhf_jax.types import Params


@dataclasses.dataclass(frozen=True)
class QuantizationError:
    """The error of a quantised network; `str` is a line for the log."""

    kind: str
    relative: float  # ‖Δ‖ / ‖y‖ of the outputs y over all real tokens
    kl: float | None  # nats per token, of the quantised next-token distribution from the other; None without one
    quantized_bytes: int
    bytes: int

    def __str__(self) -> str:
        lost = "scores" if self.kl is None else "logits"
        kl = "" if self.kl is None else f", KL {self.kl:.2g} nats per token"
        sizes = f"{self.quantized_bytes / 2**30:.3g} of {self.bytes / 2**30:.3g} GiB"
        return f"base {self.kind}: relative error of the {lost} {self.relative:.2g}{kl}, size {sizes}"


def error(
    module: CausalLM | ScoreModel,
    params: Params,
    quantized: Params,
    tokens: Int[Array, "B L"],
    mask: Bool[Array, "B L"],
) -> QuantizationError:
    """Returns the error of a quantised network against the unquantised one.

    Args:
        module: The network.
        params: Its parameters.
        quantized: `quantize` of them.
        tokens: i32[B, L], a few texts: the logits of both networks are in memory at a time.
        mask: bool[B, L], real tokens.
    """
    if isinstance(module, ScoreModel):  # a critic's scores are not normalised
        module = module.clone(score=dataclasses.replace(module.score, score_type="critic"))
    expected, actual = (outputs(module, p, tokens, mask) for p in (params, quantized))
    relative, kl = differences(expected, actual, mask)
    kind = next(x.qvalue.dtype.name for x in jax.tree.leaves(quantized, is_leaf=is_quantized) if is_quantized(x))
    is_lm = isinstance(module, CausalLM)
    return QuantizationError(
        kind, float(relative), float(kl) if is_lm else None, stored_bytes(quantized), stored_bytes(params)
    )


@functools.partial(jax.jit, static_argnames="module")
def outputs(
    module: CausalLM | ScoreModel, params: Params, tokens: Int[Array, "B L"], mask: Bool[Array, "B L"]
) -> Float[Array, "B L O"]:
    """Returns the logits f32[B, L, V] of a language model, or the scores f32[B, L, 1]."""
    found: Any = module.apply({"params": params}, tokens, mask)
    return found if isinstance(module, CausalLM) else found[:, :, None]


@jax.jit
def differences(
    expected: Float[Array, "B L O"], actual: Float[Array, "B L O"], mask: Bool[Array, "B L"]
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """Returns the relative error of outputs, and the mean divergence of the distributions that they are logits of."""
    real = mask[:, :, None] & (expected > EXCLUDED / 2)
    relative = norm(jnp.where(real, actual - expected, 0.0)) / norm(jnp.where(real, expected, 0.0))
    log_p, log_q = (jax.nn.log_softmax(logits) for logits in (expected, actual))
    divergence = (jnp.exp(log_p) * (log_p - log_q)).sum(-1)
    return relative, jnp.where(mask, divergence, 0.0).sum() / mask.sum()


def norm(x: jax.Array) -> jax.Array:
    """Returns the root of the sum of all squares."""
    return jnp.sqrt(jnp.square(x).sum())
