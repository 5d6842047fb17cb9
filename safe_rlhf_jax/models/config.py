"""What a network is made of: sizes and switches, independent of any file format."""

import dataclasses
from typing import Literal

RematPolicy = Literal["none", "dots", "full"]
ScoreType = Literal["reward", "cost", "critic"]


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """A decoder-only transformer of the Llama kind, and how to run it.

    Axis legend: V `vocab_size`, D `hidden_size`, F `intermediate_size`, N `num_layers`, H `num_heads`,
    K `num_kv_heads`, C `head_dim`.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    max_positions: int  # tokens
    family: str = "llama"  # Hugging Face `model_type`
    rope_theta: float = 10000.0
    norm_eps: float = 1e-6
    attention_bias: bool = False
    mlp_bias: bool = False
    tie_embeddings: bool = False
    initializer_range: float = 0.02
    # How to run it; none of these changes a result beyond rounding.
    dtype: str = "float32"  # of matmuls and activations; parameters stay as they are stored
    scan_layers: bool = True  # one compiled layer, scanned; False unrolls, faster for small models
    remat: RematPolicy = "none"  # what the backward pass recomputes


@dataclasses.dataclass(frozen=True)
class ScoreConfig:
    """A linear head over the decoder that gives every token a score, and its normaliser.

    Source: REFERENCE section 1.2. `affine` (x − μ)/σ for rewards; `scale` x/σ for costs, which keeps the sign that
    separates safe from unsafe; critics are never normalised.
    """

    score_type: ScoreType
    bias: bool = True
    normalize: bool = False  # apply the normaliser to the scores
    momentum: float | None = None  # of an exponential moving average; None keeps running mean and variance


PRESETS: dict[str, dict[str, int]] = {
    # The quickstart's model: half a million parameters.
    "tiny": {
        "hidden_size": 128, "intermediate_size": 352, "num_layers": 2, "num_heads": 4, "num_kv_heads": 4,
        "head_dim": 32, "max_positions": 128,
    },
    # 38 million parameters without the embeddings.
    "small": {
        "hidden_size": 512, "intermediate_size": 1408, "num_layers": 12, "num_heads": 8, "num_kv_heads": 8,
        "head_dim": 64, "max_positions": 1024,
    },
}  # fmt: skip
