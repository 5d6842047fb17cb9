"""Model families: the spelling of our configuration and parameters in a Hugging Face `model_type`."""

import copy
import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from safe_rlhf_jax.errors import ModelError
from safe_rlhf_jax.models.config import ModelConfig
from safe_rlhf_jax.models.weights import Fusion, Path, Weight

# Our name of a field, if families differ -> theirs; None: they have no such field.
Spelling = dict[str, str | None]

# Fields that change no logit: token ids, dropout (never applied here), outputs, labels, training settings.
UNUSED = {
    *("transformers_version", "architectures", "model_type", "_name_or_path", "dtype", "torch_dtype", "problem_type"),
    *("return_dict", "output_attentions", "output_hidden_states", "chunk_size_feed_forward", "id2label", "label2id"),
    *("use_cache", "bos_token_id", "eos_token_id", "pad_token_id", "pretraining_tp", "slow_but_exact", "is_decoder"),
    *("attention_dropout", "hidden_dropout", "resid_pdrop", "embd_pdrop", "attn_pdrop", "classifier_dropout"),
    *("resid_dropout", "embed_dropout", "dropout", "layerdrop", "reorder_and_upcast_attn", "summary_type"),
    *("summary_use_proj", "summary_activation", "summary_proj_to_labels", "summary_first_dropout"),
}
# Numbers that cannot be zero, by our names.
SIZES = (
    *("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim"),
    "query_pre_attn_scalar",
)
ACCEPTED: dict[str, tuple[Any, ...]] = {"is_encoder_decoder": (False,), "quantization_config": (None,)}


class Fields:
    """The fields of a `config.json` by our names; records the fields that were read."""

    def __init__(self, values: dict[str, Any], spelling: Spelling):
        self.values, self.spelling = values, spelling
        self.read: set[str] = set()

    def get(self, name: str, default: Any = None) -> Any:
        """Returns a field, or `default` if it is missing or null."""
        theirs = self.spelling.get(name, name)
        if theirs is None:
            return default
        self.read.add(theirs)
        value = self.values.get(theirs)
        return default if value is None else value

    def __getitem__(self, name: str) -> Any:
        value = self.get(name)
        if value is None:
            raise ModelError(f"config.json: field {self.spelling.get(name, name)!r} is missing")
        return value


def unsupported(field: str, value: Any, supported: Any) -> ModelError:
    """Returns the error for a value that is not implemented."""
    return ModelError(f"config.json: {field} {value!r} is not supported; supported: {supported}")


def completed(hf: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Returns a `config.json` as read by transformers, with defaults and in the present spelling; and the defaults.

    Raises:
        ModelError: If transformers refuses it.
    """
    from transformers import CONFIG_MAPPING

    theirs = CONFIG_MAPPING[hf["model_type"]]
    try:
        config = theirs.from_dict(copy.deepcopy(dict(hf)))  # a copy: nested fields are completed in place
    except Exception as error:  # of several unrelated classes
        raise ModelError(f"config.json: {' '.join(str(error).split())}") from error
    return config.to_dict(), theirs().to_dict()


@dataclasses.dataclass(frozen=True)
class Family:
    """The particulars of one `model_type`."""

    causal_lm: str  # architecture names
    score: str
    prefix: str  # of the decoder's tensors
    # Stored module, `{}` for the number of the layer -> ours; several for a fused tensor.
    names: dict[str, str | tuple[str, ...]]
    read: Callable[[Fields], ModelConfig]
    write: Callable[[ModelConfig], dict[str, Any]]  # fields of config.json by our names
    spelling: Spelling = dataclasses.field(default_factory=dict)
    accepted: Mapping[str, tuple[Any, ...]] = dataclasses.field(default_factory=dict)  # values a field may have
    fusion: Fusion = "blocks"
    transposed: bool = False  # linear maps of the layers are stored [in, out]
    head: str = "lm_head"

    @property
    def embedding(self) -> str:
        """Stored name of the token embedding, without prefix."""
        return next(stored for stored, ours in self.names.items() if ours == "embedding")

    def config_from_hf(self, hf: Mapping[str, Any]) -> ModelConfig:
        """Reads a `config.json`, in the spelling of any version of transformers.

        Raises:
            ModelError: For a switch that is not implemented, naming the field.
        """
        for name in {*SIZES, *(str(self.spelling.get(name)) for name in SIZES)}:
            if isinstance(size := hf.get(name), int) and size < 1:
                raise unsupported(name, size, "a positive number")
        values, defaults = completed(hf)
        accepted = ACCEPTED | dict(self.accepted)
        for field, supported in accepted.items():
            if field in values and values[field] not in supported:
                raise unsupported(field, values[field], supported)
        fields = Fields(values, self.spelling)
        config = self.read(fields)
        for field in defaults.keys() - fields.read - accepted.keys() - UNUSED:
            if values[field] != defaults[field]:
                raise unsupported(field, values[field], f"({defaults[field]!r},)")
        return config

    def config_to_hf(self, config: ModelConfig) -> dict[str, Any]:
        """Returns the fields of a `config.json`."""
        fields = {"model_type": config.family} | self.write(config)
        spelled = {self.spelling.get(name, name): value for name, value in fields.items()}
        return {name: value for name, value in spelled.items() if name is not None}

    def decoder_weights(self, config: ModelConfig) -> dict[str, Weight]:
        """Returns {name without prefix: Weight} of the decoder."""
        present = modules(config)
        weights = {}
        for stored, ours in self.names.items():
            parts = (ours,) if isinstance(ours, str) else ours
            for param, suffix, in_ndim in present.get(parts[0], ()):
                for layer in range(config.num_layers) if "{}" in stored else (None,):
                    paths = tuple((*module_path(config, part, layer), *param) for part in parts)
                    row = layer_place(config, layer)[1] if layer is not None and config.scan_layers else None
                    weights[f"{stored.format(layer)}.{suffix}"] = Weight(
                        paths, row, in_ndim, self.fusion, self.transposed
                    )
        return weights

    def head_weights(self, config: ModelConfig) -> dict[str, Weight]:
        """Returns {name: Weight} of the head of a language model; a tied one has none."""
        if config.tie_embeddings:
            return {}
        weights = {f"{self.head}.weight": Weight((("lm_head", "kernel"),), in_ndim=1)}
        if config.lm_head_bias:
            weights[f"{self.head}.bias"] = Weight((("lm_head", "bias"),), in_ndim=0)
        return weights

    def spellings(self, name: str) -> tuple[str, ...]:
        """Returns the possible stored names of a tensor: its own, and those in files of the bare decoder."""
        bare = name.partition(".")[2] if name.startswith(self.prefix) else name.replace(f"{self.head}.", "lm_head.")
        return name, bare


def module_path(config: ModelConfig, module: str, layer: int | None) -> Path:
    """Returns the path of a module's parameters: in layer `layer`, or in the decoder for None."""
    if layer is None:
        return ("decoder", module)
    stack, row = layer_place(config, layer)
    return ("decoder", stack if config.scan_layers else f"{stack}_{row}", *module.split("."))


def layer_place(config: ModelConfig, layer: int) -> tuple[str, int]:
    """Returns the stack that holds a layer, and its row there."""
    return ("trunk", layer) if layer < config.trunk else ("layers", layer - config.trunk)


Parameters = tuple[tuple[Path, str, int | None], ...]  # of a module: name, stored name, `Weight.in_ndim`


def modules(config: ModelConfig) -> dict[str, Parameters]:
    """Returns the modules of a decoder and the parameters of each."""

    def linear(bias: bool, in_ndim: int = 1) -> Parameters:
        kernel: Parameters = ((("kernel",), "weight", in_ndim),)
        return (*kernel, (("bias",), "bias", 0)) if bias else kernel

    c = config
    table: Parameters = (((), "weight", None),)
    norm: Parameters = ((("weight",), "weight", None),)
    if c.norm == "layer":
        norm = (*norm, (("bias",), "bias", None))
    found = {"embedding": table, "input_norm": norm}
    if c.positions == "learned":
        found["position_embedding"] = table
    if c.embedding_width != c.hidden_size:
        found |= {"project_in": linear(False), "project_out": linear(False)}
    if c.embedding_norm:
        found["embedding_norm"] = norm
    if c.final_norm:
        found["final_norm"] = norm
    if c.block != "parallel_shared":
        found["post_attention_norm"] = norm
    if c.block == "sandwich":
        found |= {"attention_output_norm": norm, "mlp_output_norm": norm}
    if c.qk_norm:
        found |= {"attention.q_norm": norm, "attention.k_norm": norm}
    out_bias = c.attention_bias if c.attention_out_bias is None else c.attention_out_bias
    found |= {f"attention.{name}_proj": linear(c.attention_bias) for name in "qkv"}
    found["attention.o_proj"] = linear(out_bias, in_ndim=2)
    found |= {f"mlp.{name}_proj": linear(c.mlp_bias) for name in ("gate", "up", "down") if c.gated or name != "gate"}
    return found
