"""Streaming decoding: the host pulls one token at a time, unlike `generate`."""

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from safe_rlhf_jax.errors import UserError
from safe_rlhf_jax.inference.generate import decoding_module
from safe_rlhf_jax.inference.sampling import Sampling, sample_token
from safe_rlhf_jax.models.transformer import CausalLM
from safe_rlhf_jax.types import Params, TokenIds

MIN_COLUMNS = 32


def round_up(tokens: int) -> int:
    """Returns the next power of two, at least `MIN_COLUMNS`: fewer widths, fewer programs to compile."""
    return max(MIN_COLUMNS, 1 << (tokens - 1).bit_length())


def columns(tokens: int, most: int) -> int:
    """Returns `round_up(tokens)`, at most `most`: padding must not make a text too long."""
    return min(round_up(tokens), most)


class Stream:
    """A policy that answers one prompt at a time.

    Args:
        module: The language model.
        params: Its parameters.
        eos_id: The token, or tokens, that end a response.
    """

    def __init__(self, module: CausalLM, params: Params, *, eos_id: TokenIds):
        self.params, self.ends = params, set(np.atleast_1d(eos_id).tolist())

        self.most = module.config.generated_length

        @partial(jax.jit, static_argnums=3)
        def prefill(params: Params, tokens: jax.Array, mask: jax.Array, length: int) -> Any:
            return module.apply({"params": params}, tokens, mask, length, method="prefill")

        @partial(jax.jit, donate_argnums=4)
        def decode(params: Params, token: jax.Array, position: jax.Array, visible: jax.Array, cache: Any,
                   slot: jax.Array) -> Any:  # fmt: skip
            decoder = decoding_module(module)
            return decoder.apply({"params": params}, token, position, visible, cache, slot, method="decode")

        self.prefill, self.decode = prefill, decode
        self.sample = jax.jit(partial(sample_token, seen=None), static_argnames="sampling")

    def __call__(self, prompt: Sequence[int], key: jax.Array, *, sampling: Sampling, max_tokens: int) -> Iterator[int]:
        """Yields the tokens of a response, its end token included, as soon as each is chosen.

        Args:
            prompt: Token ids.
            key: Random key; token t uses `fold_in(key, t)`, as `generate` does.
            sampling: Sampling settings, without a repetition penalty.
            max_tokens: Maximum number of response tokens.

        Raises:
            UserError: If prompt and response do not fit into the positions of the model.
        """
        if len(prompt) + max_tokens > self.most:
            raise UserError(f"{len(prompt)} + {max_tokens} tokens exceed the {self.most} that the model generates in")
        width = columns(len(prompt), self.most - max_tokens)
        length = min(width + round_up(max_tokens), self.most)
        tokens, mask = np.zeros((1, width), np.int32), np.zeros((1, width), bool)
        tokens[0, width - len(prompt) :], mask[0, width - len(prompt) :] = prompt, True
        logits, cache = self.prefill(self.params, tokens, mask, length)
        visible = np.zeros((1, length), bool)
        visible[:, :width] = mask
        for t in range(max_tokens):
            token, _ = self.sample(jax.random.fold_in(key, t), logits, sampling=sampling)
            yield int(token[0])
            if int(token[0]) in self.ends or t + 1 == max_tokens:
                return
            visible[:, width + t] = True
            position = jnp.array([len(prompt) + t], jnp.int32)
            logits, cache = self.decode(self.params, token, position, visible.copy(), cache, jnp.int32(width + t))
