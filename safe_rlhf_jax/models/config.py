"""Configuration of a network: sizes and switches, independent of any file format."""

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal

RematPolicy = Literal["none", "dots", "full"]
ScoreType = Literal["reward", "cost", "critic"]
Layout = Literal["beaver", "sequence_classification"]  # of score models in Hugging Face folders: models/score_layouts
Positions = Literal["rotary", "learned", "alibi"]
Activation = Literal["silu", "gelu", "gelu_tanh", "relu"]
# The update of the residual stream x in a layer, with norms n and n':
#   pre_norm          x += attention(n(x)), then x += mlp(n'(x))
#   post_norm         x = n(x + attention(x)), then x = n'(x + mlp(x))
#   sandwich          as pre_norm, with both outputs normalised too
#   parallel          x += attention(n(x)) + mlp(n'(x))
#   parallel_shared   x += attention(n(x)) + mlp(n(x))
Block = Literal["pre_norm", "post_norm", "sandwich", "parallel", "parallel_shared"]


@dataclasses.dataclass(frozen=True)
class RopeScaling:
    """Scaling of rotary frequencies for texts longer than those of pretraining.

    `dynamic` and `longrope` depend on the length of the text; they are fixed only up to `ModelConfig.fixed_length`.
    """

    kind: Literal["linear", "dynamic", "llama3", "longrope"]
    factor: float = 1.0
    original_positions: int = 0  # tokens; llama3 and longrope
    low_freq_factor: float = 1.0  # llama3
    high_freq_factor: float = 1.0
    short_factors: tuple[float, ...] = ()  # longrope: one for each pair
    long_factors: tuple[float, ...] = ()
    attention_factor: float = 1.0  # of cosine and sine


TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")  # the `Linear`s of a layer


@dataclasses.dataclass(frozen=True)
class Lora:
    """Low-rank adapters: y = x·W + s·(x·A)·B with a frozen W, in PEFT's terms.

    Source: Hu et al. 2021, arXiv 2106.09685; `rank_stabilized`: Kalajdzievski 2023, arXiv 2312.03732.
    """

    rank: int
    alpha: float
    targets: tuple[str, ...] = TARGETS
    layers: int | None = None  # the last so many layers have adapters; None: all
    dropout: float = 0.0  # of x before A, in training
    rank_stabilized: bool = False

    def holds(self, other: "Lora") -> str | None:
        """Returns why adapters of another form do not fit into this one; None if they do."""
        if other.rank > self.rank:
            return f"rank {other.rank} is more than lora.rank {self.rank}"
        if missing := [name for name in other.targets if name not in self.targets]:
            return f"it adapts {', '.join(missing)}, which lora.targets leaves out"
        if self.layers is not None and (other.layers is None or other.layers > self.layers):
            return f"it adapts {other.layers or 'all'} layers, more than lora.layers {self.layers}"
        return None

    @property
    def scale(self) -> float:
        """s: alpha / rank, or alpha / √rank if rank-stabilised."""
        return self.alpha / (self.rank**0.5 if self.rank_stabilized else self.rank)


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """A decoder-only transformer and its execution. The defaults of the switches make it a Llama.

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
    initializer_range: float = 0.02
    # Positions
    positions: Positions = "rotary"
    rope_theta: float = 10000.0
    rope_scaling: RopeScaling | None = None
    local_rope_theta: float | None = None  # of layers with a window, without scaling; None: as the others
    rotary_dim: int | None = None  # rotated leading dimensions of a head; None: all
    rotary_interleaved: bool = False  # pairs are neighbours (x_2i, x_2i+1) rather than halves (x_i, x_i+C/2)
    position_offset: int = 0  # row of position 0 in a learned table
    # Embedding
    tie_embeddings: bool = False
    embedding_size: int | None = None  # width of token embeddings, if projections lead to D and back
    embedding_norm: bool = False
    scale_embedding: bool = False  # by √D
    lm_head_bias: bool = False
    logit_softcap: float | None = None  # s·tanh(logit / s)
    # Norms and the order of things in a layer
    norm: Literal["rms", "layer"] = "rms"
    norm_eps: float = 1e-6
    norm_unit_offset: bool = False  # scale by 1 + w
    final_norm: bool = True
    block: Block = "pre_norm"
    # Attention
    attention_bias: bool = False
    attention_out_bias: bool | None = None  # None: as `attention_bias`
    attention_scale: float | None = None  # of q·k; None: 1/√C
    attention_softcap: float | None = None
    qk_norm: bool = False  # of each head's queries and keys, before rotation
    windows: tuple[int | None, ...] = ()  # keys per query in each layer, its own included; empty: all, everywhere
    # MLP
    activation: Activation = "silu"
    gated: bool = True
    mlp_bias: bool = False
    # Execution; none of these changes a result beyond rounding.
    dtype: str = "float32"  # of matmuls and activations; parameters keep their stored dtype
    scan_layers: bool = True  # one compiled layer, scanned; False unrolls, faster for small models
    unroll_layers: bool = False  # a scan of layers is compiled as so many layers, on the same stacked parameters
    remat: RematPolicy = "none"  # recomputed in the backward pass
    merge_to_decode: bool = True  # generation keeps a copy of adapted layers, merged; on a GPU of all, unstacked
    gather_to_decode: bool = False  # generation keeps a copy of the parameters gathered over `fsdp`
    decode_weights: Literal["int8"] | None = None  # generation keeps a copy of the layers' kernels in 8 bits
    decode_cache: Literal["int8"] | None = None  # keys and values are kept in 8 bits
    lora: Lora | None = None  # adapters: a collection of variables beside the parameters, which are a frozen base then
    vmapped: bool = False  # runs under `jax.vmap`, over the adapters of several networks
    trunk: int = 0  # leading layers that never have an adapter, a stack of their own where layers are scanned
    # Ranges [start, stop) of rows without a token in the tokenizer (embeddings are padded to round sizes): never
    # sampled and in no softmax.
    unused_rows: tuple[tuple[int, int], ...] = ()
    # {file: contents} of the original JSON files: `hf.save` keeps their unused fields.
    stored: Mapping[str, Any] = dataclasses.field(default_factory=dict, compare=False, repr=False)

    @property
    def embedding_width(self) -> int:
        """Width of token embeddings, and of the hidden states read by the heads."""
        return self.embedding_size or self.hidden_size

    @property
    def fixed_length(self) -> int | None:
        """Number of tokens up to which the encoding of a prefix does not depend on later tokens; None: unlimited."""
        if self.rope_scaling is None or self.rope_scaling.kind not in ("dynamic", "longrope"):
            return None
        return self.max_positions if self.rope_scaling.kind == "dynamic" else self.rope_scaling.original_positions

    @property
    def generated_length(self) -> int:
        """Maximum tokens of prompt and response in generation, whose cache keeps encoded tokens."""
        return min(self.max_positions, self.fixed_length or self.max_positions)


@dataclasses.dataclass(frozen=True)
class ScoreConfig:
    """A linear head over the decoder with a score per token, and its normaliser.

    Source: REFERENCE section 1.2. `affine` (x − μ)/σ for rewards; `scale` x/σ for costs, which keeps the sign that
    separates safe from unsafe; critics: never.
    """

    score_type: ScoreType
    bias: bool = True
    normalize: bool = False  # apply the normaliser to the scores
    momentum: float | None = None  # of an exponential moving average; None keeps running mean and variance
    # The score of a text is at its last token with another id than this, as in transformers' sequence
    # classification; None: at its last real token.
    pad_id: int | None = None


PRESETS: dict[str, dict[str, Any]] = {
    # The quickstart's model: half a million parameters.
    "tiny": {
        "hidden_size": 128, "intermediate_size": 352, "num_layers": 2, "num_heads": 4, "num_kv_heads": 4,
        "head_dim": 32, "max_positions": 512,
    },
    # Three million parameters without the embeddings: configs/real_text.
    "mini": {
        "hidden_size": 256, "intermediate_size": 704, "num_layers": 4, "num_heads": 4, "num_kv_heads": 4,
        "head_dim": 64, "max_positions": 512,
    },
    # 38 million parameters without the embeddings.
    "small": {
        "hidden_size": 512, "intermediate_size": 1408, "num_layers": 12, "num_heads": 8, "num_kv_heads": 8,
        "head_dim": 64, "max_positions": 1024,
    },
    # Shapes of released models, with their vocabularies: to start from scratch, or to compile without their weights.
    "llama_7b": {
        "vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 11008, "num_layers": 32, "num_heads": 32,
        "num_kv_heads": 32, "head_dim": 128, "max_positions": 2048,
    },
    "llama_3_8b": {
        "vocab_size": 128256, "hidden_size": 4096, "intermediate_size": 14336, "num_layers": 32, "num_heads": 32,
        "num_kv_heads": 8, "head_dim": 128, "max_positions": 131072, "rope_theta": 500000.0, "norm_eps": 1e-5,
    },
    "llama_3_70b": {
        "vocab_size": 128256, "hidden_size": 8192, "intermediate_size": 28672, "num_layers": 80, "num_heads": 64,
        "num_kv_heads": 8, "head_dim": 128, "max_positions": 131072, "rope_theta": 500000.0, "norm_eps": 1e-5,
    },
}  # fmt: skip
