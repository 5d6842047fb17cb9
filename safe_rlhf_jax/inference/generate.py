"""Step 4 of the line: prompts in, rollout out. Prefill once, then decode in a `while_loop`, all on the device."""

import contextlib
import dataclasses
import itertools
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from safe_rlhf_jax.inference.sampling import Sampling, sample_token
from safe_rlhf_jax.models.adapters import LanguageModel, merged, unstacked
from safe_rlhf_jax.models.attention import KVCache
from safe_rlhf_jax.models.parameters import boxed_variables, cast_matrices
from safe_rlhf_jax.models.quantized import dequantize, quantize
from safe_rlhf_jax.models.transformer import Cache
from safe_rlhf_jax.ops import is_any
from safe_rlhf_jax.sharding import constrain, decoding_layout, platform, whole
from safe_rlhf_jax.types import Params, PromptBatch, Rollout, TokenIds

SEGMENTS, SEGMENT = 4, 64  # loops over the tokens of a response, and the fewest tokens of one


@struct.dataclass
class DecodeState:
    """The carry of the decode loop."""

    logits: jax.Array  # f32[B, V]  of the next token
    tokens: jax.Array  # i32[B, T]  responses; pad after the end
    log_probs: jax.Array  # f32[B, T]  of the chosen tokens; 0 after the end
    length: jax.Array  # i32[B]  response tokens so far, the end included
    done: jax.Array  # bool[B]  an end was chosen
    seen: jax.Array | None  # bool[B, V]  tokens that occurred, only for a repetition penalty
    cache: Any


def generate(
    module: LanguageModel,
    params: Params,
    prompts: PromptBatch,
    key: jax.Array,
    *,
    response_length: int,
    eos_id: TokenIds,
    pad_id: int,
    sampling: Sampling,
    num_responses: int = 1,
    early_exit: bool = True,
) -> Rollout:
    """Samples responses to left-padded prompts.

    The loop ends as soon as every row has chosen an end. Masks come from lengths: the end belongs to the response,
    everything after it is padding, and `pad_id == eos_id` is fine.

    Args:
        module: The language model.
        params: Its parameters.
        prompts: B prompts of S columns.
        key: Random key; step t uses `fold_in(key, t)`.
        response_length: T, the most response tokens.
        eos_id: The token, or tokens, that end a response.
        pad_id: Token that fills the columns after the end.
        sampling: Sampling settings.
        num_responses: n responses per prompt; they share one prefill and are adjacent rows.
        early_exit: False runs all T steps; the result is the same.

    Returns:
        A `Rollout` of B·n rows.
    """
    batch, prompt_length = prompts.tokens.shape
    rows, length = batch * num_responses, prompt_length + response_length
    repeat = lambda x: jnp.repeat(x, num_responses, axis=0)  # noqa: E731

    with contextlib.ExitStack() as layout:
        if module.config.merge_to_decode:
            if platform() == "gpu" and module.config.scan_layers:  # every token would copy each layer out of the stack
                module, params = merged(*unstacked(module, params))
                params = cast_matrices(params, module.config.dtype)
            else:
                module, params = merged(module, params)
        if module.config.gather_to_decode:
            params = gathered(module, dequantize(params, module.config.dtype))
            layout.enter_context(decoding_layout())
        if module.config.decode_weights is not None:
            params = quantize(params, module.config.decode_weights)
        prompts = dataclasses.replace(prompts, tokens=by_rows(prompts.tokens), mask=by_rows(prompts.mask))
        ends = segments(response_length)
        logits, cache = module.apply(
            {"params": params}, prompts.tokens, prompts.mask, length, prompt_length + ends[0], method="prefill"
        )
        if num_responses > 1:
            batch_axis = 1 if module.config.scan_layers else 0
            logits = repeat(logits)
            cache = jax.tree.map(lambda x: jnp.repeat(x, num_responses, axis=batch_axis), cache)
        prompt_mask = repeat(prompts.mask)
        prompt_tokens = repeat(prompts.tokens)
        prompt_size = prompt_mask.sum(-1, dtype=jnp.int32)
        row = jnp.arange(rows)
        seen = None
        if sampling.repetition_penalty != 1.0:
            counts = jnp.zeros((rows, logits.shape[-1]), jnp.int32).at[row[:, None], prompt_tokens].add(prompt_mask)
            seen = counts > 0
        decoder = decoding_module(module)

        def loop(state: DecodeState, start: int, tokens: int) -> DecodeState:
            """Chooses tokens from number `start` on; counts its own, so that a program says how many they are."""

            def not_finished(carry: tuple[jax.Array, DecodeState]) -> jax.Array:
                more = carry[0] < tokens - start
                return more & ~carry[1].done.all() if early_exit else more

            def choose(carry: tuple[jax.Array, DecodeState]) -> tuple[jax.Array, DecodeState]:
                return carry[0] + 1, step(start + carry[0], carry[1], tokens)

            state = dataclasses.replace(state, cache=grown(state.cache, prompt_length + tokens))
            return jax.lax.while_loop(not_finished, choose, (jnp.int32(0), state))[1]

        def step(t: jax.Array, state: DecodeState, tokens: int) -> DecodeState:
            """Chooses token number t; the cache has columns for the prompts and `tokens` response tokens."""
            token, log_prob = sample_token(jax.random.fold_in(key, t), state.logits, state.seen, sampling)
            alive = ~state.done
            token = jnp.where(alive, token, pad_id)
            slot = prompt_length + t
            full_prompt = jnp.pad(prompt_mask, ((0, 0), (0, tokens)))
            column = jnp.arange(prompt_length + tokens, dtype=jnp.int32)
            visible = full_prompt | ((column >= prompt_length) & (column <= slot))[None]
            logits, cache = decoder.apply(
                {"params": params}, token, prompt_size + t, visible, state.cache, slot, method="decode"
            )
            return DecodeState(
                logits=logits,
                tokens=state.tokens.at[:, t].set(token),
                log_probs=state.log_probs.at[:, t].set(jnp.where(alive, log_prob, 0.0)),
                length=state.length + alive.astype(jnp.int32),
                done=state.done | is_any(token, eos_id) & alive,
                seen=None if state.seen is None else state.seen.at[row, token].max(alive),
                cache=cache,
            )

        state = DecodeState(
            logits=logits,
            tokens=jnp.full((rows, response_length), pad_id, jnp.int32),
            log_probs=jnp.zeros((rows, response_length), jnp.float32),
            length=jnp.zeros((rows,), jnp.int32),
            done=jnp.zeros((rows,), bool),
            seen=seen,
            cache=cache,
        )
        with jax.named_scope("decoding"):  # by this name its traffic is told from that of the prefill
            for first, tokens in itertools.pairwise([0, *ends]):
                state = loop(state, first, tokens)
        responses, log_probs, size = map(by_rows, (state.tokens, state.log_probs, state.length))
    response_mask = jnp.arange(response_length, dtype=jnp.int32)[None] < size[:, None]
    rollout = Rollout(
        tokens=jnp.concatenate([prompt_tokens, responses], axis=1),
        mask=jnp.concatenate([prompt_mask, response_mask], axis=1),
        sampler_log_probs=log_probs,
        group=repeat(prompts.group),
    )
    return jax.tree.map(by_rows, rollout)


def decoding_module(module: LanguageModel) -> LanguageModel:
    """Returns the module that decodes: on a GPU, weights at an index that varies are copied out of their stack."""
    if platform() != "gpu":
        return module
    return module.clone(config=dataclasses.replace(module.config, unroll_layers=True))


def segments(response_length: int) -> list[int]:
    """Returns the response tokens at the end of each loop, before which the cache grows: a token reads all of it.

    At most `SEGMENTS` loops of at least `SEGMENT` tokens, since each is compiled.
    """
    count = max(1, min(SEGMENTS, response_length // SEGMENT))
    return [-(-response_length * (i + 1) // count) for i in range(count)]


def grown(cache: Cache, columns: int) -> Cache:
    """Returns a cache of all layers with that many columns."""
    return jax.tree.map(lambda kept: kept.grown(columns), cache, is_leaf=lambda x: isinstance(x, KVCache))


def by_rows(x: jax.Array) -> jax.Array:
    """Splits an array along its first dimension, the rows of a batch."""
    return constrain(x, "batch", *(None,) * (x.ndim - 1))


def gathered(module: Any, params: Params) -> Params:
    """Returns a copy of the parameters gathered over `fsdp` and in the layout of decoding, matrices in `dtype`."""

    def gather(x: jax.Array, boxed: Any) -> jax.Array:
        split = constrain(x, *boxed.names)  # cast before it is sent
        with decoding_layout():
            return whole(constrain(split, *boxed.names), *boxed.names)

    return jax.tree.map(gather, cast_matrices(params, module.config.dtype), boxed_variables(module)["params"])
