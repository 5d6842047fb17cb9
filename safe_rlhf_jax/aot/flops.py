"""FLOPs counted from shapes, a multiply-add as two (XLA counts a scanned layer only once)."""

from safe_rlhf_jax.models.config import ModelConfig


def forward_flops(config: ModelConfig, sequences: int, length: int, logits: int) -> float:
    """FLOPs of a forward pass over `sequences` of `length` tokens with `logits` positions each read out."""
    c = config
    attention = c.hidden_size * c.head_dim * (2 * c.num_heads + 2 * c.num_kv_heads)
    feed_forward = (3 if c.gated else 2) * c.hidden_size * c.intermediate_size
    weights = c.num_layers * (attention + feed_forward)
    pairs = 2 * c.num_layers * c.num_heads * c.head_dim * length
    return 2.0 * sequences * (length * (weights + pairs) + logits * c.hidden_size * c.vocab_size)


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
    """
    length = prompt + response
    policy = forward_flops(config, batch, length, response)
    scorer = forward_flops(config, batch, length, 0)
    cached = 4.0 * batch * config.num_layers * config.num_heads * config.head_dim * length  # attention to the cache
    generation = forward_flops(config, batch, prompt, 1) + response * (forward_flops(config, batch, 1, 1) + cached)
    texts = forward_flops(config, batch, length, length) if ptx else 0.0
    return {
        "generation": generation,
        "scoring": (recompute + reference) * policy + (critics + scorers) * scorer,
        "update": 3 * epochs * (policy + critics * scorer + texts),
    }
