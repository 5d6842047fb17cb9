"""Fields of `config.json` that all families read and write alike: sizes, activations, rotary positions, windows."""

import math
from collections.abc import Iterator, Mapping
from typing import Any

from safe_rlhf_jax.models.config import Activation, ModelConfig, RopeScaling
from safe_rlhf_jax.models.families.record import Fields, unsupported

# Names of activations; names on one line are the same function. The first one is written.
ACTIVATIONS: dict[Activation, tuple[str, ...]] = {
    "silu": ("silu", "swish"),
    "gelu": ("gelu", "gelu_python"),
    "gelu_tanh": ("gelu_pytorch_tanh", "gelu_new", "gelu_fast", "gelu_python_tanh", "gelu_accurate"),
    "relu": ("relu",),
}


def read_common(f: Fields, **switches: Any) -> ModelConfig:
    """Reads the fields of every family: sizes and numbers. `switches` are further fields of the configuration."""
    heads = f["num_attention_heads"]
    common = {
        "family": f.values["model_type"],
        "vocab_size": f["vocab_size"],
        "hidden_size": f["hidden_size"],
        "intermediate_size": f.get("intermediate_size", 4 * f["hidden_size"]),
        "num_layers": f["num_hidden_layers"],
        "num_heads": heads,
        "num_kv_heads": f.get("num_key_value_heads", heads),
        "head_dim": f.get("head_dim", f["hidden_size"] // heads),
        "max_positions": f.get("max_position_embeddings", 2048),
        "norm_eps": f.get("norm_eps", 1e-5),
        "tie_embeddings": f["tie_word_embeddings"],
        "initializer_range": f["initializer_range"],
    }
    if "activation" not in switches:
        common["activation"] = read_activation(f)
    config = ModelConfig(**(common | switches))
    if config.num_heads % config.num_kv_heads:
        raise unsupported("num_key_value_heads", config.num_kv_heads, f"a divisor of the {heads} heads")
    if config.tie_embeddings and config.lm_head_bias:
        raise unsupported("tie_word_embeddings", True, "False, because the head of this family has a bias")
    return config


def write_common(config: ModelConfig) -> dict[str, Any]:
    """Returns the fields that `read_common` reads."""
    return {
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "max_position_embeddings": config.max_positions,
        "norm_eps": config.norm_eps,
        "tie_word_embeddings": config.tie_embeddings,
        "initializer_range": config.initializer_range,
        "hidden_act": ACTIVATIONS[config.activation][0],
    }


def read_activation(f: Fields) -> Activation:
    """Reads `hidden_act`."""
    for ours, theirs in ACTIVATIONS.items():
        if f["hidden_act"] in theirs:
            return ours
    name = f.spelling.get("hidden_act", "hidden_act")
    raise unsupported(str(name), f["hidden_act"], [name for names in ACTIVATIONS.values() for name in names])


# --- Rotary positions -------------------------------------------------------------------------------------------------

# Fields of `rope_parameters` without scaling.
UNSCALED = ("rope_type", "type", "rope_theta", "partial_rotary_factor", "original_max_position_embeddings")


def read_rope(f: Fields, *, partial: bool = False) -> dict[str, Any]:
    """Reads `rope_parameters` (older: `rope_theta`, `rope_scaling`); `partial`: rotary dimensions may be partial."""
    rope = f["rope_parameters"]
    if nested := sorted(name for name, value in rope.items() if isinstance(value, dict)):
        raise unsupported("rope_parameters", nested, "one for all layers, as this model_type has it")
    switches: dict[str, Any] = {"rope_theta": positive(rope, "rope_theta"), "rope_scaling": read_scaling(f, rope)}
    fraction = 1.0 if rope.get("partial_rotary_factor") is None else positive(rope, "partial_rotary_factor")
    turned = int(f.get("head_dim", f["hidden_size"] // f["num_attention_heads"]) * fraction)
    if fraction != 1.0:
        if not partial or turned % 2:
            raise unsupported("partial_rotary_factor", fraction, "an even part of a head" if partial else (1.0,))
        switches["rotary_dim"] = turned
    scaling = switches["rope_scaling"]
    if scaling and scaling.kind == "longrope":
        for name, factors in (("short_factor", scaling.short_factors), ("long_factor", scaling.long_factors)):
            if len(factors) != turned // 2:
                raise unsupported(f"rope_parameters.{name}", f"of length {len(factors)}", f"{turned // 2} numbers")
    return switches


def positive(rope: dict[str, Any], name: str) -> float:
    """Reads a positive number."""
    value: Any = rope.get(name)
    if type(value) not in (int, float) or not 0 < value < math.inf:
        raise unsupported(f"rope_parameters.{name}", value, "a positive number")
    return float(value)


def contradictions(hf: Mapping[str, Any], used: Mapping[str, Any]) -> Iterator[str]:
    """Yields contradictions between the older and the present spelling of rotary positions.

    Args:
        hf: `config.json` as stored.
        used: Its fields as understood, in the present spelling.
    """
    rope = used.get("rope_parameters", {})
    rope = rope.get("full_attention", rope)
    older, given = hf.get("rope_scaling") or {}, hf.get("rope_parameters") or {}
    stated = [(name, "rope_theta", hf.get(name)) for name in ("rope_theta", "rotary_emb_base")]
    if older:
        given = given.get("full_attention") or given
        stated += [(f"rope_parameters.{name}", name, value) for name, value in given.items()]
    for field, name, value in stated:
        if name in rope and value not in (None, rope[name]):
            yield (
                f"config.json: {field} is {value!r}, but by another field {rope[name]!r}, which is used, as in "
                "transformers. Remove the one that is wrong"
            )


def read_scaling(f: Fields, rope: dict[str, Any]) -> RopeScaling | None:
    """Reads the scaling of rotary frequencies."""
    kind = rope.get("rope_type", "default")
    match kind:
        case "default":
            unread = {k: v for k, v in rope.items() if k not in UNSCALED and v not in (None, 1.0)}
            if unread:
                raise unsupported("rope_parameters", unread, "with a rope_type that says what it is")
            return None
        case "linear" | "dynamic":
            return RopeScaling(kind, positive(rope, "factor"))
        case "llama3":
            low, high = positive(rope, "low_freq_factor"), positive(rope, "high_freq_factor")
            if high <= low:
                raise unsupported("rope_parameters.high_freq_factor", high, f"more than low_freq_factor, {low}")
            return RopeScaling(
                kind,
                positive(rope, "factor"),
                original_positions=int(positive(rope, "original_max_position_embeddings")),
                low_freq_factor=low,
                high_freq_factor=high,
            )
        case "longrope":
            original = int(positive(rope, "original_max_position_embeddings"))
            if original == 1:
                raise unsupported("rope_parameters.original_max_position_embeddings", original, "2 or more")
            factor = rope.get("factor") or f["max_position_embeddings"] / original
            usual = math.sqrt(1 + math.log(factor) / math.log(original)) if factor > 1 else 1.0
            return RopeScaling(
                kind,
                original_positions=original,
                short_factors=tuple(map(float, rope["short_factor"])),
                long_factors=tuple(map(float, rope["long_factor"])),
                attention_factor=float(rope.get("attention_factor") or usual),
            )
    raise unsupported("rope_parameters", kind, ("default", "linear", "dynamic", "llama3", "longrope"))


def write_rope(config: ModelConfig, *, partial: bool = False) -> dict[str, Any]:
    """Returns the fields that `read_rope` reads, in the older and in the present spelling."""
    fraction = {}
    if partial:
        share = (config.rotary_dim or config.head_dim) / config.head_dim
        if int(config.head_dim * share) != (config.rotary_dim or config.head_dim):  # readers round down
            share = math.nextafter(share, 1.0)
        fraction = {"partial_rotary_factor": share}
    scaling = write_scaling(config.rope_scaling)
    rope = {"rope_type": "default"} | scaling | {"rope_theta": config.rope_theta} | fraction
    older = {"rope_theta": config.rope_theta} | ({"rope_scaling": scaling} if scaling else {}) | fraction
    return older | {"rope_parameters": rope}


def write_scaling(scaling: RopeScaling | None) -> dict[str, Any]:
    """Returns the fields that `read_scaling` reads; none for unscaled frequencies."""
    if scaling is None:
        return {}
    fields: dict[str, Any] = {"rope_type": scaling.kind}
    if scaling.kind != "longrope":
        fields["factor"] = scaling.factor
    if scaling.kind in ("llama3", "longrope"):
        fields["original_max_position_embeddings"] = scaling.original_positions
    if scaling.kind == "llama3":
        fields |= {"low_freq_factor": scaling.low_freq_factor, "high_freq_factor": scaling.high_freq_factor}
    if scaling.kind == "longrope":
        fields |= {"short_factor": list(scaling.short_factors), "long_factor": list(scaling.long_factors)}
        fields["attention_factor"] = scaling.attention_factor
    return fields


# --- Windows ----------------------------------------------------------------------------------------------------------


def read_windows(f: Fields) -> tuple[int | None, ...]:
    """Reads `layer_types` and `sliding_window`: the window of each layer, or nothing if no layer has one."""
    kinds, window = f["layer_types"], f.get("sliding_window")
    for kind in kinds:
        if kind not in ("full_attention", "sliding_attention"):
            raise unsupported("layer_types", kind, ("full_attention", "sliding_attention"))
    if "sliding_attention" not in kinds:
        return ()
    if window is None:
        raise unsupported("sliding_window", None, "a number of tokens, because layer_types has sliding_attention")
    return tuple(window if kind == "sliding_attention" else None for kind in kinds)


def write_windows(config: ModelConfig) -> dict[str, Any]:
    """Returns the fields that `read_windows` reads."""
    windows = config.windows or (None,) * config.num_layers
    return {
        "sliding_window": next((window for window in windows if window is not None), None),
        "layer_types": ["full_attention" if window is None else "sliding_attention" for window in windows],
    }
