"""all-MiniLM-L6-v2 in JAX, a BERT of six layers: embeddings of texts for the judge, without torch."""

import functools
import json
import pathlib
from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from safetensors.numpy import load_file
from tokenizers import Tokenizer

from benchmarks.preferences import batches

LONGEST = 256  # tokens that the model was trained with
# In cross-validation on the judge's part these tell more about safety than the last layer, trained to compare texts.
LAYERS = (4, 5)
Weights = Mapping[str, jax.Array]


def dense(x: jax.Array, weights: Weights, name: str) -> jax.Array:
    """Returns the product with a stored matrix, plus its bias."""
    return x @ weights[f"{name}.weight"].T + weights[f"{name}.bias"]


def layer_norm(x: jax.Array, weights: Weights, name: str) -> jax.Array:
    """Returns x with mean 0 and variance 1, scaled and shifted as stored."""
    return jax.nn.standardize(x, epsilon=1e-12) * weights[f"{name}.weight"] + weights[f"{name}.bias"]


@functools.partial(jax.jit, static_argnames=("layers", "heads"))
def mean_states(weights: Weights, tokens: jax.Array, mask: jax.Array, layers: int, heads: int) -> jax.Array:
    """Returns each text's mean state before the first and after every layer, f32[B, layers + 1, D].

    Args:
        weights: As stored.
        tokens: int32[B, S], padded on the right.
        mask: bool[B, S].
        layers: How many layers are run.
        heads: Number of heads of each.
    """
    # B: texts, S, T: positions, H: heads, K: width of a head
    rows, length = tokens.shape
    table = "embeddings.{}_embeddings.weight".format
    x = weights[table("word")][tokens] + weights[table("position")][:length] + weights[table("token_type")][0]
    states = [layer_norm(x, weights, "embeddings.LayerNorm")]
    for layer in range(layers):
        x, name = states[-1], f"encoder.layer.{layer}"
        q, k, v = (
            dense(x, weights, f"{name}.attention.self.{part}").reshape(rows, length, heads, -1)
            for part in ("query", "key", "value")
        )
        scores = jnp.einsum("BSHK,BTHK->BHST", q, k) / jnp.sqrt(q.shape[-1])
        attention = jax.nn.softmax(jnp.where(mask[:, None, None], scores, -jnp.inf))
        read = jnp.einsum("BHST,BTHK->BSHK", attention, v).reshape(x.shape)
        added = x + dense(read, weights, f"{name}.attention.output.dense")
        x = layer_norm(added, weights, f"{name}.attention.output.LayerNorm")
        inner = jax.nn.gelu(dense(x, weights, f"{name}.intermediate.dense"), approximate=False)
        states.append(
            layer_norm(x + dense(inner, weights, f"{name}.output.dense"), weights, f"{name}.output.LayerNorm")
        )
    return jnp.einsum("BLSD,BS->BLD", jnp.stack(states, 1), mask / mask.sum(-1, keepdims=True))


class MiniLM:
    """Embeddings: `minilm(texts)` returns f32[n, F], for each of `LAYERS` the mean state with norm 1.

    Args:
        folder: With config.json, tokenizer.json and model.safetensors.
    """

    def __init__(self, folder: pathlib.Path):
        config = json.loads((folder / "config.json").read_text())
        self.heads, self.width = config["num_attention_heads"], config["hidden_size"]
        self.weights = load_file(folder / "model.safetensors")
        self.tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        self.tokenizer.no_padding()
        self.tokenizer.enable_truncation(LONGEST)

    def __call__(self, texts: Sequence[str]) -> np.ndarray:
        """Returns the embedding of each text; of a long one, that of its beginning."""
        out = np.empty((len(texts), len(LAYERS), self.width), np.float32)
        for rows, tokens, mask in batches([encoding.ids for encoding in self.tokenizer.encode_batch(list(texts))]):
            states = mean_states(self.weights, tokens, mask, max(LAYERS), self.heads)
            out[rows] = np.asarray(states)[: len(rows), LAYERS]
        out /= np.linalg.norm(out, axis=-1, keepdims=True)
        return out.reshape(len(texts), -1)
