"""Masked reductions, last-token gather, and log-probabilities of responses: the only place that shifts by one."""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from safe_rlhf_jax.sharding import constrain
from safe_rlhf_jax.types import Packing, TokenIds

LOGITS_CHUNK = 128  # response positions whose logits are in memory at a time


def masked_mean(x: Float[Array, "B T"], mask: Bool[Array, "B T"]) -> Float[Array, ""]:
    """Mean over the tokens of each sequence, then over sequences.

    Source: PKU-Alignment/safe-rlhf `masked_mean`. Unlike there, a row without tokens counts as 0, not NaN.

    Args:
        x: f32[B, T].
        mask: bool[B, T], tokens that count.

    Returns:
        f32[].
    """
    return sequence_mean(x, mask).mean()


def sequence_mean(x: Float[Array, "B T"], mask: Bool[Array, "B T"]) -> Float[Array, " B"]:
    """Mean over the tokens of each sequence, f32[B]; 0 where a row has none."""
    return jnp.where(mask, x, 0.0).sum(-1) / jnp.maximum(mask.sum(-1), 1)


def last_index(mask: Bool[Array, "B L"]) -> Int[Array, " B"]:
    """Index of the last True of each row, i32[B]; 0 where a row has none."""
    length = mask.shape[-1]
    position = jnp.arange(length, dtype=jnp.int32)
    return jnp.max(jnp.where(mask, position[None, :], 0), axis=-1)


def gather_last(x: Float[Array, "B L"], mask: Bool[Array, "B L"]) -> Float[Array, " B"]:
    """Value at the last real token of each row, f32[B]."""
    return jnp.take_along_axis(x, last_index(mask)[:, None], axis=-1)[:, 0]


def is_any(tokens: Int[Array, "..."], ids: TokenIds) -> Bool[Array, "..."]:
    """Returns bool[…]: True where the token is one of `ids`."""
    return jnp.isin(tokens, jnp.asarray(ids, jnp.int32))


def ends_with(tokens: Int[Array, "B T"], mask: Bool[Array, "B T"], ids: TokenIds) -> Bool[Array, " B"]:
    """Returns bool[B]: True where the last real token is one of `ids`; False means that the response was truncated."""
    return is_any(jnp.take_along_axis(tokens, last_index(mask)[:, None], axis=-1)[:, 0], ids)


def with_ends(
    tokens: Int[Array, "B L"], mask: Bool[Array, "B L"], eos_id: TokenIds, end_id: int
) -> tuple[Int[Array, "B L+1"], Bool[Array, "B L+1"]]:
    """Returns sequences with one more column: `end_id` after those that end with none of `eos_id`, else no token."""
    truncated = ~ends_with(tokens, mask, eos_id)
    more = jnp.full((len(tokens), 1), end_id, tokens.dtype)
    return jnp.concatenate([tokens, more], 1), jnp.concatenate([mask, truncated[:, None]], 1)


def token_log_probs(logits: Float[Array, "B T V"], tokens: Int[Array, "B T"]) -> Float[Array, "B T"]:
    """Log-probability of each token under its logits, f32[B, T], nats."""
    logits = logits.astype(jnp.float32)
    taken = jnp.take_along_axis(logits, tokens[..., None], axis=-1)[..., 0]
    return taken - jax.nn.logsumexp(logits, axis=-1)


def next_token_log_probs(
    module: Any, params: Any, hidden: Float[Array, "B T D"], targets: Int[Array, "B T"], *, temperature: float = 1.0
) -> Float[Array, "B T"]:
    """Log-probability of `targets[:, t]` given the hidden state at t, in chunks over the sequence.

    At most `LOGITS_CHUNK` positions of logits are alive at a time, also in the backward pass, which recomputes them.
    No [B, T, V] array is ever in memory.

    Args:
        module: A `CausalLM`.
        params: Its parameters.
        hidden: f32[B, T, D], after the final norm.
        targets: i32[B, T].
        temperature: Divides the logits.

    Returns:
        f32[B, T], nats.
    """

    def chunk(h: Float[Array, "B C D"], y: Int[Array, "B C"]) -> Float[Array, "B C"]:
        logits = module.apply({"params": params}, h, method="unembed")
        return token_log_probs(logits / temperature if temperature != 1.0 else logits, y)

    length = targets.shape[1]
    if length <= LOGITS_CHUNK:
        return chunk(hidden, targets)
    pad = -length % LOGITS_CHUNK
    hidden = jnp.pad(hidden, ((0, 0), (0, pad), (0, 0)))
    targets = jnp.pad(targets, ((0, 0), (0, pad)))
    batch, padded = targets.shape
    chunks = padded // LOGITS_CHUNK
    hidden = hidden.reshape(batch, chunks, LOGITS_CHUNK, -1).swapaxes(0, 1)
    targets = targets.reshape(batch, chunks, LOGITS_CHUNK).swapaxes(0, 1)
    log_probs = jax.lax.map(lambda c: jax.checkpoint(chunk)(*c), (hidden, targets))
    return log_probs.swapaxes(0, 1).reshape(batch, padded)[:, :length]


def packed(
    tokens: Int[Array, "N L"], mask: Bool[Array, "N L"], packing: Packing | None
) -> tuple[Int[Array, "P W"], Bool[Array, "P W"] | Int[Array, "P W"]]:
    """Returns rows of several texts each, and the number of each token's text, 0 in padding; unpacked, the texts.

    A network that reads these numbers in place of a mask gives every token what it gives it in a row of its own
    (`models.positions.Mask`).
    """
    if packing is None:
        return tokens, mask
    sources = constrain(packing.sources, "batch", "length")
    texts = jnp.where(sources < 0, 0, sources // tokens.shape[1] + 1)
    return constrain(tokens.reshape(-1)[jnp.maximum(sources, 0)], "batch", "length"), texts


def unpacked(values: Float[Array, "P W"], packing: Packing | None, length: int) -> Float[Array, "N l"]:
    """Returns the values of each text's first tokens from those of its row, f32[N, length]; without packing, `values`.

    What stands after a text's end is of another text.
    """
    if packing is None:
        return values
    index = packing.starts[:, None] + jnp.arange(length, dtype=jnp.int32)[None]
    return constrain(values.reshape(-1).at[index].get(mode="clip"), "batch", "length")


def text_log_probs(
    module: Any, params: Any, tokens: Int[Array, "N L"], mask: Bool[Array, "N L"], packing: Packing | None = None
) -> Float[Array, "N l"]:
    """Log-probability of every token of texts but the first, f32[N, L − 1], nats; `next_token_log_probs` of a pass."""
    rows, texts = packed(tokens, mask, packing)
    hidden = module.apply({"params": params}, rows, texts, method="hidden")
    log_probs = next_token_log_probs(module, params, hidden[:, :-1], rows[:, 1:])
    if packing is None:
        return log_probs
    return unpacked(jnp.pad(log_probs, ((0, 0), (0, 1))), packing, tokens.shape[1] - 1)


def response_log_probs(
    module: Any,
    params: Any,
    tokens: Int[Array, "B L"],
    mask: Bool[Array, "B L"],
    *,
    prompt_length: int,
    temperature: float = 1.0,
    below: Float[Array, "B L D"] | None = None,
    hidden: Float[Array, "B l D"] | None = None,
) -> Float[Array, "B T"]:
    """Log-probability of each response token, f32[B, T], nats; t is the t-th response token.

    Token S + t is predicted from position S + t − 1: only this function and `response_values` shift by one. What was
    computed before for these tokens may be given: `below`, the output of the network's trunk, or `hidden`, its hidden
    states from column S − 1 on.
    """
    if hidden is None:
        given = () if below is None else (below,)
        hidden = module.apply({"params": params}, tokens, mask, prompt_length - 1, *given, method="hidden")
    return next_token_log_probs(module, params, hidden[:, :-1], tokens[:, prompt_length:], temperature=temperature)


def response_values(
    module: Any, params: Any, tokens: Int[Array, "B L"], mask: Bool[Array, "B L"], *, prompt_length: int,
    below: Float[Array, "B L D"] | None = None, hidden: Float[Array, "B l D"] | None = None,
) -> Float[Array, "B T"]:  # fmt: skip
    """Value of the state in which each response token is chosen, f32[B, T], in units of the signal.

    V_t is read at position S + t − 1, before the t-th response token is known. `below` and `hidden` are as in
    `response_log_probs`.
    """
    return head_outputs(module, {"params": params}, tokens, mask, prompt_length - 1, below, hidden)[:, :-1]


def sequence_scores(
    module: Any, variables: Any, tokens: Int[Array, "B L"], mask: Bool[Array, "B L"], *, first: int = 0,
    hidden: Float[Array, "B l D"] | None = None,
) -> Float[Array, " B"]:  # fmt: skip
    """Score of each whole sequence, f32[B]: the one at its last real token, which is in column `first` or later.

    `hidden` are its hidden states from that column on, if they were computed before.
    """
    return gather_last(head_outputs(module, variables, tokens, mask, first, None, hidden), mask[:, first:])


def head_outputs(
    module: Any, variables: Any, tokens: Int[Array, "B L"], mask: Bool[Array, "B L"], first: int,
    below: Float[Array, "B L D"] | None, hidden: Float[Array, "B l D"] | None,
) -> Float[Array, "B l"]:  # fmt: skip
    """Output of a score model at every token from column `first` on, f32[B, L − first]."""
    if hidden is not None:
        return module.apply(variables, hidden, tokens, mask, first, method="scores")
    return module.apply(variables, tokens, mask, first, *(() if below is None else (below,)))
