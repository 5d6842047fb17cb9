"""FLOPs counted from shapes, a multiply-add as two (XLA counts a scanned layer only once)."""

import dataclasses

from safe_rlhf_jax.models.config import ModelConfig


def forward_flops(config: ModelConfig, sequences: int, length: int, logits: int) -> float:
    """FLOPs of a forward pass over `sequences` of `length` tokens with `logits` positions each read out."""
    c = config
    sizes = matrices(c)
    weights = c.num_layers * sum(inputs * outputs for inputs, outputs in sizes.values())
    if c.lora is not None:
        low_rank = sum(inputs + outputs for name, (inputs, outputs) in sizes.items() if name in c.lora.targets)
        weights += (c.num_layers - c.trunk) * c.lora.rank * low_rank
    pairs = 2 * c.num_layers * c.num_heads * c.head_dim * length
    return 2.0 * sequences * (length * (weights + pairs) + logits * c.hidden_size * c.vocab_size)


def matrices(config: ModelConfig) -> dict[str, tuple[int, int]]:
    """Returns {linear map of a layer: (inputs, outputs)}."""
    width, heads, shared = config.hidden_size, config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    found = {"q_proj": (width, heads), "k_proj": (width, shared), "v_proj": (width, shared), "o_proj": (heads, width)}
    found |= {"up_proj": (width, config.intermediate_size), "down_proj": (config.intermediate_size, width)}
    return found | ({"gate_proj": (width, config.intermediate_size)} if config.gated else {})


def above_trunk(config: ModelConfig) -> ModelConfig:
    """Returns the configuration of the layers above the trunk, as if they were a model."""
    return dataclasses.replace(config, num_layers=config.num_layers - config.trunk, trunk=0)


def update_flops(config: ModelConfig, sequences: int, length: int, logits: int, again: float) -> float:
    """FLOPs of the passes of an update, whose backward pass costs two forward passes.

    With adapters it costs one: no gradient of the base is computed. Layers below the adapters have no backward pass.

    Args:
        config: Of the network.
        sequences: Texts.
        length: Their tokens.
        logits: Positions of each that are read out.
        again: Factor of the backward pass's recomputation on all three passes.
    """
    passes = 3 * again - (config.lora is not None)
    return passes * forward_flops(above_trunk(config), sequences, length, logits)


def trunk_flops(config: ModelConfig, sequences: int, length: int) -> float:
    """FLOPs of a pass through the layers below the adapters."""
    lower = dataclasses.replace(config, num_layers=config.trunk, trunk=0, lora=None)
    return forward_flops(lower, sequences, length, 0)


def iteration_flops(
    config: ModelConfig,
    batch: int,
    prompt: int,
    response: int,
    recompute: bool,
    *,
    critics: int = 2,
    scorers: int = 2,
    epochs: int = 1,
    ptx: bool = False,
    reference: bool = True,
    again: float = 1.0,
) -> dict[str, float]:
    """FLOPs of generation, scoring and update of one RL iteration: a backward pass costs two forward passes.

    Args:
        config: Of all networks.
        batch: Sequences.
        prompt: S, tokens.
        response: T, tokens; every response is counted at its full length.
        recompute: Old log-probabilities are computed by a separate forward pass.
        critics: Number of critics.
        scorers: Number of reward and cost models.
        epochs: Passes over the rollout.
        ptx: Add a language-modelling loss on the same number of texts.
        reference: Compute log-probabilities under the reference.
        again: As in `update_flops`.
    """
    length, upper = prompt + response, above_trunk(config)
    policy = forward_flops(upper, batch, length, response)
    scorer = forward_flops(upper, batch, length, 0)
    cached = 4.0 * batch * config.num_layers * config.num_heads * config.head_dim * length  # attention to the cache
    generation = forward_flops(config, batch, prompt, 1) + response * (forward_flops(config, batch, 1, 1) + cached)
    updates = update_flops(config, batch, length, response, again)
    updates += critics * update_flops(config, batch, length, 0, again)
    if ptx:
        updates += trunk_flops(config, batch, length) + update_flops(config, batch, length, length, again)
    trunk = trunk_flops(config, batch, length)  # once, for scoring and update
    return {
        "generation": generation,
        "scoring": trunk + (recompute + reference) * policy + (critics + scorers) * scorer,
        "update": epochs * updates,
    }
