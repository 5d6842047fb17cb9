"""The scalars of an iteration."""

import dataclasses

from safe_rlhf_jax.rl.constraints import Constraint
from safe_rlhf_jax.rl.kl import KLControl
from safe_rlhf_jax.types import TokenIds

IN_SIGNALS = KLControl()


@dataclasses.dataclass(frozen=True)
class Hyperparameters:
    """The scalars of an iteration; names and units as in the config, which has their sources."""

    response_length: int  # T, tokens
    eos_id: TokenIds  # tokens that end a response
    pad_id: int
    end_id: int | None = None  # read by scorers after a truncated response
    num_responses: int = 1
    temperature: float = 1.0
    recompute_log_probs: bool = True
    max_sampler_weight: float | None = None  # above which an importance weight of a sampled token is cut
    kl_coeff: float = 0.01
    kl: KLControl = IN_SIGNALS
    gamma: float = 1.0
    gae_lambda: float = 0.95
    clip_range_ratio: float = 0.2
    clip_range_score: float = 50.0
    clip_range_value: float = 5.0
    dual_clip: float | None = None
    whiten: bool = False
    entropy_coeff: float = 0.0
    missing_eos_penalty: float = 0.0
    cost_weight: float = 1.0  # ν, for algorithms that subtract the cost from the reward
    ptx_coeff: float = 0.0
    epochs: int = 1
    minibatches: int = 1
    microbatches: int = 1
    stop_kl: float | None = None  # nats per token from the sampler; early stopping of a rollout's updates
    critic_warmup: int = 0  # iterations in which the actor is frozen
    constraints: dict[str, Constraint] = dataclasses.field(default_factory=dict)  # by cost signal
    groups: tuple[str, ...] = ("all",)  # names of the prompt groups, by index

    @property
    def signals(self) -> tuple[str, ...]:
        """Signals that have advantages: the reward, and one cost per constraint."""
        return ("reward", *self.constraints)
