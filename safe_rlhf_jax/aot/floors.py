"""What a phase cannot go below, from shapes alone: a projection that reads less has counted wrongly.

A pass over a network reads every matrix once, an optimizer step reads and writes what it trains, and a decoded token
reads the weights and the keys and values of the tokens before it. What arrives over wires need not be written to HBM,
so of a matrix that is split over `fsdp` only the device's own part counts.
"""

import contextlib
import dataclasses
import math
import re
from collections.abc import Mapping
from typing import Any

import jax
from jax.sharding import NamedSharding

from safe_rlhf_jax.aot.hlo import Module
from safe_rlhf_jax.models.attention import empty_cache
from safe_rlhf_jax.models.config import ModelConfig
from safe_rlhf_jax.models.quantized import bits, quantize, stored_bytes
from safe_rlhf_jax.sharding import decoding_layout, parts

LOOKED_UP = {"embedding", "position_embedding"}  # a pass reads the rows of its tokens only


@dataclasses.dataclass(frozen=True)
class Reads:
    """Bytes that a device moves to or from HBM again and again."""

    bytes: float
    times: int

    def least(self, fast: int) -> float:
        """Returns the bytes that all of the times move, where `fast` of them can stay in the memory of the core."""
        return self.times * max(0.0, self.bytes - fast)


def weight_bytes(params: Any, dtype: Any, *, tied: bool = False, copied: bool = False) -> float:
    """Returns the bytes per device of the weights that a pass reads.

    Args:
        params: Arrays or shapes with shardings.
        dtype: That the pass computes in; what is wider may be read from a copy in it.
        tied: The embedding is the matrix of the logits as well.
        copied: As decoding reads them, from a copy that is gathered over `fsdp` and split over `decode`.
    """
    total = 0.0
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        names = {str(getattr(key, "key", getattr(key, "name", key))) for key in path}
        if tied or not names & LOOKED_UP:
            total += elements(leaf, copied) * min(bits(leaf.dtype), bits(dtype)) / 8
    return total


def elements(leaf: Any, copied: bool = False) -> float:
    """Returns the elements per device of an array, or of its copy for decoding."""
    if not isinstance(leaf.sharding, NamedSharding):
        return math.prod(leaf.shape)
    axes = {axis for part in leaf.sharding.spec for axis in (part if isinstance(part, tuple) else (part,))} - {None}
    if copied:
        axes = axes - {"fsdp"} | ({"decode"} if "tensor" in axes else set())
    return math.prod(leaf.shape) / math.prod(leaf.sharding.mesh.shape[axis] for axis in axes)


def cache_bytes(config: ModelConfig, rows: float, prompt: int, response: int, tensor: int) -> float:
    """Returns the bytes per device of the keys and values that a decoded token reads, on average over a response."""
    windows = config.windows or (None,) * config.num_layers
    filled = range(prompt + 1, prompt + response + 1)  # the token's own included
    seen = sum(min(n, window or n) for n in filled for window in windows) / response
    token = stored_bytes(jax.eval_shape(lambda: empty_cache(config, 1, 1)))  # of one layer, all of its heads
    return rows * seen * token / math.gcd(config.num_kv_heads, tensor)


def decoding_reads(
    config: ModelConfig, params: Any, *, rows: int, prompt: int, response: int, mesh: Mapping[str, int]
) -> Reads:
    """Returns what decoding reads: for every token the weights and the cache.

    Args:
        config: Of the policy.
        params: Its parameters, with those of its base.
        rows: Responses on all devices.
        prompt: S, tokens.
        response: T, tokens.
        mesh: Sizes of the mesh axes.
    """
    if config.decode_weights is not None:
        params = quantize(params, config.decode_weights)
    weights = weight_bytes(params, config.dtype, tied=config.tie_embeddings, copied=config.gather_to_decode)
    with decoding_layout() if config.gather_to_decode else contextlib.nullcontext():
        own, heads = rows / parts("batch", mesh), parts("kv_heads", mesh)
    return Reads(weights + cache_bytes(config, own, prompt, response, heads), response)


def iteration_reads(
    policy: Any, hp: Any, state: Any, frozen: Any, rows: int, prompt: int, mesh: Mapping[str, int]
) -> dict[str, Reads]:
    """Returns what the phases of an RL iteration cannot go below.

    Args:
        policy: Its module.
        hp: Hyperparameters.
        state: What is trained, with optimizer states.
        frozen: All other networks.
        rows: Responses on all devices.
        prompt: S, tokens.
        mesh: Sizes of the mesh axes.
    """
    trained, config = [state.actor, *state.critics.values()], policy.config
    base = frozen.bases.get(getattr(policy, "base", None), {})
    decoding = decoding_reads(
        config, [state.actor.params, base], rows=rows, prompt=prompt, response=hp.response_length, mesh=mesh
    )
    scored = [frozen, *(network.params for network in trained[0 if hp.recompute_log_probs else 1 :])]
    states = sum(elements(x) * x.dtype.itemsize for x in jax.tree.leaves(trained))
    return {
        "decoding": decoding,
        "scoring": Reads(weight_bytes(scored, config.dtype), hp.minibatches * hp.microbatches),
        "update": Reads(2 * states, hp.minibatches * hp.epochs),  # read and written
    }


def program_bytes(module: Module) -> float:
    """Returns the bytes of a program's arguments and results, but of embeddings and of what it returns as it came."""
    entry = module.computations[module.entry]
    root = next(i for i in entry if i.is_root)
    used = {name for i in entry if not (i.is_root and i.opcode == "tuple") for name in i.operands}
    arguments = {i.name: i.bytes for i in entry if i.opcode == "parameter"}
    unchanged = sum(size for name, size in arguments.items() if name in root.operands)
    looked_up = {i.name for i in entry if LOOKED_UP & set(re.split(r"\W+", i.op_name))}
    read = sum(size for name, size in arguments.items() if name in used - looked_up)
    return read + root.bytes - unchanged
