"""Every pytree that crosses a function boundary, and the axis legend.

Axis legend, used in the whole package:

    B sequences   S prompt length   T response length   L = S + T   M minibatch   V vocabulary
    D model width   H query heads   K key/value heads   N layers   W cost window   G slots of a constraint

Prompts are left-padded to S and responses fill the last T columns. Every per-token array of a response
is [B, T], and index t means "the t-th response token". Scores are in reward-model units, KL in nats.
A *signal* is `reward`, `cost`, or `cost/<name>` where there are several; dictionaries keyed by signal carry whatever
exists once per signal.
"""

from typing import Any

import jax
from flax import struct

Params = Any  # nested dict of arrays
TokenIds = int | tuple[int, ...]  # one token, or any of several
Signals = dict[str, jax.Array]
Metrics = dict[str, jax.Array]


@struct.dataclass
class Packing:
    """Where the N texts of a batch, each [L], lie in P rows that several of them share (`ops.packed`).

    N is B, or 2B of pairs: the first sides, then the second.
    """

    sources: jax.Array  # i32[P, W]  index of each column's token among the N·L; −1 is padding
    starts: jax.Array  # i32[N]  index of each text's first token among the P·W columns


@struct.dataclass
class SupervisedBatch:
    """Texts for SFT and PTX. Right-padded."""

    tokens: jax.Array  # i32[B, L]
    mask: jax.Array  # bool[B, L]  real tokens
    loss_mask: jax.Array  # bool[B, L]  tokens in the loss (responses and their EOS)
    packing: Packing | None = None  # None: each text is a row


@struct.dataclass
class Sequences:
    """Prompt and response texts. Right-padded."""

    tokens: jax.Array  # i32[B, L]
    mask: jax.Array  # bool[B, L]  real tokens
    response_mask: jax.Array  # bool[B, L]  response tokens, EOS included


@struct.dataclass
class PreferenceBatch:
    """Pairs of responses to one prompt, ranked by helpfulness."""

    chosen: Sequences
    rejected: Sequences
    margin: jax.Array | None = None  # f32[B]  target margin of DPO, in units of β·log-ratio
    share: jax.Array | None = None  # f32[B]  of annotators who prefer `chosen`; None: all
    weight: jax.Array | None = None  # f32[B]  in the loss; None: 1
    packing: Packing | None = None  # None: each text is a row


@struct.dataclass
class SafetyShares:
    """Shares of annotators for each label of pairs ranked by harmlessness."""

    safer: jax.Array  # f32[B]  who call the first response the safer one
    safer_is_safe: jax.Array  # f32[B]
    unsafer_is_safe: jax.Array  # f32[B]


@struct.dataclass
class SafetyBatch:
    """Pairs of responses to one prompt, ranked by harmlessness, each with a safety label."""

    safer: Sequences
    unsafer: Sequences
    safer_is_safe: jax.Array  # bool[B]
    unsafer_is_safe: jax.Array  # bool[B]
    shares: SafetyShares | None = None  # None: all annotators agree with the labels
    weight: jax.Array | None = None  # f32[B]  in the loss; None: 1
    packing: Packing | None = None  # None: each text is a row


@struct.dataclass
class PromptBatch:
    """Prompts to respond to. Left-padded."""

    tokens: jax.Array  # i32[B, S]
    mask: jax.Array  # bool[B, S]
    group: jax.Array  # i32[B]  index of the prompt's group (see `group_field`), 0 without groups
    row: jax.Array | None = None  # i32[B]  row of the data set, for signals that need its text
    ptx: SupervisedBatch | None = None


@struct.dataclass
class Rollout:
    """Sampled responses."""

    tokens: jax.Array  # i32[B, L]
    mask: jax.Array  # bool[B, L]  real tokens, from lengths; EOS included
    sampler_log_probs: jax.Array  # f32[B, T]  of the sampled tokens, as computed by the sampler
    group: jax.Array  # i32[B]  group of the prompt

    @property
    def prompt_length(self) -> int:
        """Columns of the prompts, S."""
        return int(self.tokens.shape[-1] - self.sampler_log_probs.shape[-1])


@struct.dataclass
class ScoredRollout:
    """A rollout with log-probabilities, scores and values."""

    rollout: Rollout
    log_probs: jax.Array  # f32[B, T]
    ref_log_probs: jax.Array  # f32[B, T]
    scores: Signals  # f32[B]
    values: Signals  # f32[B, T]
    below: dict[str, jax.Array] = struct.field(default_factory=dict)  # [B, L, D]  output of each base's trunk


@struct.dataclass
class Experience:
    """A rollout with advantages and returns, the input of the update."""

    rollout: Rollout
    log_probs: jax.Array  # f32[B, T]
    ref_log_probs: jax.Array  # f32[B, T]
    values: Signals  # f32[B, T]  of signals that have a critic
    advantages: Signals  # f32[B, T]
    returns: Signals  # f32[B, T]  of signals that have a critic
    below: dict[str, jax.Array] = struct.field(default_factory=dict)  # [B, L, D]  output of each base's trunk
    violates: Signals = struct.field(default_factory=dict)  # bool[B]  by cost signal, for an algorithm that splits rows


@struct.dataclass
class TrainState:
    """One trained network."""

    step: jax.Array  # i32[]  optimizer steps taken
    params: Params
    opt_state: Any
    stats: Params  # score normaliser {mean, var, count}, {} without one


@struct.dataclass
class CostWindow:
    """The newest costs of constrained prompts, newest last; in a constraint with a leading axis of slots [G]."""

    recent: jax.Array  # f32[W]
    count: jax.Array  # i32[]  how many of the last entries are filled


@struct.dataclass
class ConstraintState:
    """State of a constraint, one row per slot (one, or one per group of prompts)."""

    window: CostWindow  # f32[G, W], i32[G]
    multiplier: dict[str, jax.Array]  # f32[G, …]  log λ, or λ with the state of its controller


@struct.dataclass
class MovingReference:
    """A reference policy that follows the actor."""

    params: Params
    age: jax.Array  # f32[]  iterations since its parameters were the actor's, on average


@struct.dataclass
class RLState:
    """Everything an RL run needs to continue."""

    step: jax.Array  # i32[]  iterations done
    actor: TrainState
    critics: dict[str, TrainState]
    constraints: dict[str, ConstraintState]  # by cost signal
    kl_coeff: jax.Array | None = None  # f32[]  β, if a controller moves it
    reference: MovingReference | None = None  # if it moves; else `Frozen.reference`


@struct.dataclass
class Frozen:
    """Parameters that no step changes. Arguments of the step, never closures."""

    reference: Params
    scorers: dict[str, Any]  # {signal: variables of a ScoreModel}
    bases: dict[str, Params] = struct.field(default_factory=dict)  # of networks with adapters, by name
