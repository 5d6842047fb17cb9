"""Streaming decoding of a batch whose rows have their own sampling settings and keys, a few tokens at a time."""

import dataclasses
from collections.abc import Iterator
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from safe_rlhf_jax.inference.generate import decoding_module
from safe_rlhf_jax.inference.sampling import sample_rows
from safe_rlhf_jax.models.transformer import CausalLM
from safe_rlhf_jax.ops import is_any
from safe_rlhf_jax.types import Params, TokenIds

CHUNK = 8  # tokens of each row between two looks of the host


class RowSettings(NamedTuple):
    """How each row is sampled. Nothing of it is compiled in."""

    seed: Any  # u32[B]
    choice: Any  # u32[B]  index among the responses to one prompt with one seed
    temperature: Any  # f32[B]  0 is greedy
    top_p: Any  # f32[B]


@struct.dataclass
class RowState:
    """The carry of the decode loop."""

    t: jax.Array  # i32[]  response tokens chosen so far
    logits: jax.Array  # f32[B, V]  of the next token
    length: jax.Array  # i32[B]  response tokens so far, the end included
    done: jax.Array  # bool[B]  an end was chosen, or the host has enough
    prompt_mask: jax.Array  # bool[B, S]
    cache: Any


class RowStream:
    """A policy that answers a batch of prompts, chunk by chunk.

    A row's response depends neither on the other rows nor on their number, up to rounding. With choice 0 it is that of
    `generate` for the prompt alone with `jax.random.key(seed)`.

    Args:
        module: The language model.
        params: Its parameters.
        eos_id: The token, or tokens, that end a response.
        response_length: T, the most response tokens.
    """

    def __init__(self, module: CausalLM, params: Params, *, eos_id: TokenIds, response_length: int):
        self.params, self.response_length = params, response_length

        @jax.jit
        def start(params: Params, tokens: jax.Array, mask: jax.Array) -> RowState:
            rows, width = tokens.shape
            logits, cache = module.apply({"params": params}, tokens, mask, width + response_length, method="prefill")
            nothing = jnp.zeros((rows,), jnp.int32)
            return RowState(jnp.int32(0), logits, nothing, nothing > 0, mask, cache)

        @partial(jax.jit, donate_argnums=1)
        def advance(
            params: Params, state: RowState, settings: RowSettings, alive: jax.Array
        ) -> tuple[RowState, jax.Array, jax.Array]:
            """Returns the state, the tokens of the chunk i32[B, CHUNK] and their number i32[B]."""
            rows, width = state.prompt_mask.shape
            first, before = state.t, state.length
            end = jnp.minimum(first + CHUNK, response_length)
            keys = jax.vmap(row_key)(settings.seed, settings.choice)
            column = jnp.arange(width + response_length, dtype=jnp.int32)
            full_prompt = jnp.pad(state.prompt_mask, ((0, 0), (0, response_length)))
            prompt_size = state.prompt_mask.sum(-1, dtype=jnp.int32)

            def step(carry: tuple[RowState, jax.Array]) -> tuple[RowState, jax.Array]:
                state, chunk = carry
                step_keys = jax.vmap(jax.random.fold_in, (0, None))(keys, state.t)
                token = sample_rows(step_keys, state.logits, settings.temperature, settings.top_p)
                slot = width + state.t
                visible = full_prompt | ((column >= width) & (column <= slot))[None]
                logits, cache = decoding_module(module).apply(
                    {"params": params}, token, prompt_size + state.t, visible, state.cache, slot, method="decode"
                )
                state = dataclasses.replace(
                    state,
                    t=state.t + 1,
                    logits=logits,
                    length=state.length + ~state.done,
                    done=state.done | is_any(token, eos_id),
                    cache=cache,
                )
                return state, chunk.at[:, state.t - 1 - first].set(token)

            state, chunk = jax.lax.while_loop(
                lambda carry: (carry[0].t < end) & ~carry[0].done.all(),
                step,
                (dataclasses.replace(state, done=state.done | ~alive), jnp.zeros((rows, CHUNK), jnp.int32)),
            )
            return state, chunk, state.length - before

        self.start, self.advance = start, advance

    def __call__(
        self, tokens: np.ndarray, mask: np.ndarray, settings: RowSettings, alive: np.ndarray
    ) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Yields the next tokens of every row, and how many of them count.

        Args:
            tokens: i32[B, S], left-padded prompts.
            mask: bool[B, S].
            settings: Sampling settings of the rows.
            alive: bool[B], rows that are wanted; the caller may clear it between two chunks.

        Yields:
            i32[B, CHUNK] and i32[B].
        """
        state = self.start(self.params, tokens, mask)
        for _ in range(0, self.response_length, CHUNK):
            state, chunk, count = self.advance(self.params, state, settings, alive.copy())
            yield np.asarray(chunk), np.asarray(count)
            if not alive.any():
                return


def row_key(seed: jax.Array, choice: jax.Array) -> jax.Array:
    """Returns the key of one of the responses with a seed: the first has the seed's own."""
    key = jax.random.key(seed)
    return jnp.where(choice > 0, jax.random.fold_in(key, choice), key)
