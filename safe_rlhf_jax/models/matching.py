"""Stored tensors beside the model that config.json describes: each has its place, its shape and its kind of number.

Only headers are read, but for the two tensors that `tied_as_stored` compares. Whatever does not match is an error that
names the tensor, and what to do where the name tells who wrote it.
"""

import dataclasses
import re
from collections.abc import Collection, Iterable, Mapping

from safe_rlhf_jax.errors import ModelError
from safe_rlhf_jax.models.config import Layout, ModelConfig, ScoreConfig
from safe_rlhf_jax.models.families import family
from safe_rlhf_jax.models.folders import MERGE, say_once
from safe_rlhf_jax.models.safetensors_io import Tensors
from safe_rlhf_jax.models.score_layouts import HEADS, score_weights
from safe_rlhf_jax.models.weights import Path, Shape, Weight, layerless, stored_shape

FLOATS = ("F64", "F32", "F16", "BF16")
# Buffers of older files, which are computed: rotary frequencies, causal masks, positions.
BUFFERS = re.compile(r"(rotary_emb\.inv_freq|\.(attn|attention)\.(masked_)?bias|position_ids)$")
STATISTICS = ("normalizer.mean", "normalizer.var", "normalizer.count")
HEAD_WEIGHTS = tuple(f"{head}.weight" for head in HEADS.values())
TIE = '; if the head is the embedding, write "tie_word_embeddings": true into config.json'
INNER = "save the model that is inside it"
# Names that tell who wrote them: who that is, and what to do.
FOREIGN = {
    r"(^|\.)(lora_\w+|base_layer|modules_to_save)\.|^base_model\.model\.": ("was saved through PEFT", MERGE),
    r"(^|\.)_orig_mod\.": (
        "has the prefix of torch.compile",
        f"{INNER}: `model._orig_mod.save_pretrained(FOLDER)`",
    ),
    r"^module\.": (
        "has the prefix of DistributedDataParallel or DeepSpeed",
        f"{INNER}: `model.module.save_pretrained(FOLDER)`",
    ),
    r"(^|\.)(_fsdp_wrapped_module\.|_checkpoint_wrapped_module\.|_?flat_param)": (
        "was saved through FSDP",
        "save the full state dict, under the model's own names",
    ),
    r"^pretrained_model\.": (
        "has the prefix of TRL's models with a value head",
        f"{INNER}: `model.pretrained_model.save_pretrained(FOLDER)`",
    ),
    r"^(v_head|value_head|rm_head|reward_head|regression_layer|regression_head|classifier)\.": (
        "is of a head that only its own class can read",
        "remove it from a language model; a reward model is opened whose head is 'score.weight' [1, D], as in "
        "transformers' …ForSequenceClassification",
    ),
    r"(^|\.)(language_model|vision_tower|vision_model|visual|multi_modal_projector|audio_tower)\.": (
        "is of a model that reads more than text",
        f"{INNER}: its language model, with the text_config of config.json",
    ),
    r"\.(qweight|qzeros|g_idx|scales|weight_scale(_inv)?|input_scale|absmax|quant_map|quant_state\..*|SCB)$": (
        "is of quantised weights",
        "open the model before it was quantised",
    ),
    r"^(tok_embeddings\.|output\.weight|layers\.\d+\.(attention\.w|feed_forward\.w))": (
        "is in the layout of the model's authors",
        "fetch the model in transformers' layout, or convert it with transformers' script",
    ),
}


def weight_map(config: ModelConfig, score: ScoreConfig | None, layout: Layout = "beaver") -> dict[str, Weight]:
    """Returns {stored name: Weight} of a whole model."""
    this = family(config.family)
    weights = {this.prefix + name: weight for name, weight in this.decoder_weights(config).items()}
    if score is not None:
        return weights | score_weights(score, layout)
    return weights | this.head_weights(config)


def respell(tensors: Tensors, config: ModelConfig) -> None:
    """Gives the tensors of a language model, under whichever spelling they are stored, the family's names.

    As in transformers, a tied embedding may be stored as the head alone.
    """
    tensors.respell({name: family(config.family).spellings(name) for name in weight_map(untied(config), None)})
    embedding, head = shared(config)
    if config.tie_embeddings and embedding not in tensors.entries and head in tensors.entries:
        tensors.entries[embedding] = tensors.entries[head]


def shared(config: ModelConfig) -> tuple[str, str]:
    """Returns the stored names of the embedding and of the head, which may be one tensor."""
    this = family(config.family)
    return f"{this.prefix}{this.embedding}.weight", f"{this.head}.weight"


def untied(config: ModelConfig) -> ModelConfig:
    """Returns a configuration whose language model has a head of its own."""
    return dataclasses.replace(config, tie_embeddings=False)


def tied_as_stored(tensors: Tensors, config: ModelConfig) -> ModelConfig:
    """Returns the configuration of a language model, untied where the head that is stored is not the embedding.

    As in transformers, what is stored counts more than `tie_word_embeddings`; that is said.
    """
    embedding, head = shared(config)
    if not config.tie_embeddings or head not in tensors.entries or tensors.equal(embedding, head):
        return config
    say_once(
        f"{tensors.folder}: tie_word_embeddings is true, by config.json or by default, but tensor {head!r} is stored "
        f"and differs from {embedding!r}: it is used, untied, as in transformers. If that is right, write "
        '"tie_word_embeddings": false into config.json'
    )
    return untied(config)


def match_names(tensors: Tensors, needed: Collection[str], config: ModelConfig) -> None:
    """Every parameter is stored, and nothing is that we would leave out unknowingly.

    Raises:
        ModelError: Naming the tensors.
    """
    known = {*needed, *weight_map(untied(config), None), *STATISTICS}
    missing = [name for name in needed if name not in tensors.entries]
    unknown = [name for name in tensors.entries if name not in known and not BUFFERS.search(name)]
    for pattern, (what, fix) in FOREIGN.items():
        if found := [name for name in unknown if re.search(pattern, name)]:
            raise ModelError(f"{tensors.folder}: tensor {listed(found, 1)} {what}; {fix}")
    for name in missing:
        for ending in family(config.family).spellings(name):
            for other in (other for other in unknown if other.endswith(f".{ending}")):
                prefix = other.removesuffix(ending)
                raise ModelError(
                    f"{tensors.folder}: tensor {other!r} is {ending!r} behind the prefix {prefix!r}; {INNER}"
                )
    if missing:
        hint = tensors.promised(missing)
        if not hint and missing == [shared(config)[1]]:
            heads = listed(name for name in unknown if name in HEAD_WEIGHTS)
            hint = f"; {heads} is not: this is a reward or cost model" if heads else TIE
        raise ModelError(f"{tensors.folder}: tensor {listed(missing)} is missing{hint}")
    if unknown:
        raise ModelError(
            f"{tensors.folder}: tensor {listed(unknown)} has no place in the model that config.json describes; without "
            "it the results would be wrong"
        )


def match_shapes(
    tensors: Tensors, weights: Mapping[str, Weight], shapes: Mapping[Path, Shape], config: ModelConfig
) -> None:
    """Tensors hold floating-point numbers, as many as config.json says.

    Args:
        tensors: Those of a folder.
        weights: {stored name: Weight} of what is read.
        shapes: Of the parameters.
        config: Of the model.

    Raises:
        ModelError: Naming the first tensor that does not.
    """
    for name, weight in weights.items():
        entry, expected = tensors.entries[name], stored_shape(layerless(shapes, weight), weight)
        where = f"{tensors.folder}: tensor {name!r}"
        if entry.dtype not in FLOATS:
            raise ModelError(
                f"{where} is stored as {entry.dtype}; weights are read as {', '.join(FLOATS)}. Open the model before "
                "it was quantised"
            )
        if entry.shape == expected:
            continue
        hint = ""
        if entry.shape == (0,):
            hint = (
                ": a place that DeepSpeed ZeRO-3 has left empty; gather the weights (`zero_to_fp32.py`, or "
                "stage3_gather_16bit_weights_on_model_save) and save them again"
            )
        elif expected[:1] == (config.vocab_size,) and entry.shape[1:] == expected[1:]:
            hint = f' (vocab_size {config.vocab_size}); if the weights are right, write "vocab_size": {entry.shape[0]}'
        raise ModelError(f"{where} has shape {entry.shape}; config.json asks for {expected}{hint}")


def listed(names: Iterable[str], most: int = 3) -> str:
    """Returns the first names, and how many more there are."""
    ordered = sorted(names)
    more = f" (and {len(ordered) - most} more)" if len(ordered) > most else ""
    return ", ".join(map(repr, ordered[:most])) + more
