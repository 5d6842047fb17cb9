"""Matches stored tensors against the model that config.json describes: names, shapes and number types.

Only headers are read, except for the two tensors that `tied_as_stored` compares. Any mismatch is an error that names
the tensor, and the fix if the name shows which tool wrote it.
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
# Buffers of older files, computed here: rotary frequencies, causal masks, positions.
BUFFERS = re.compile(r"(rotary_emb\.inv_freq|\.(attn|attention)\.(masked_)?bias|position_ids)$")
STATISTICS = ("normalizer.mean", "normalizer.var", "normalizer.count")
HEAD_WEIGHTS = tuple(f"{head}.weight" for head in HEADS.values())
TIE = '; if the head is the embedding, write "tie_word_embeddings": true into config.json'
INNER = "save the model that is inside it"
# Names that show which tool wrote them: the tool, and the fix.
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
    """Renames the tensors of a language model, in any stored spelling, to the family's names.

    As in transformers, a tied embedding may be stored as the head alone.
    """
    tensors.respell({name: family(config.family).spellings(name) for name in weight_map(untied(config), None)})
    embedding, head = shared(config)
    if config.tie_embeddings and embedding not in tensors.entries and head in tensors.entries:
        tensors.entries[embedding] = tensors.entries[head]


def shared(config: ModelConfig) -> tuple[str, str]:
    """Returns the stored names of embedding and head, which may be one tensor."""
    this = family(config.family)
    return f"{this.prefix}{this.embedding}.weight", f"{this.head}.weight"


def untied(config: ModelConfig) -> ModelConfig:
    """Returns the configuration with a separate language-model head."""
    return dataclasses.replace(config, tie_embeddings=False)


def tied_as_stored(tensors: Tensors, config: ModelConfig) -> ModelConfig:
    """Returns the configuration of a language model, untied if the stored head differs from the embedding.

    As in transformers, stored tensors override `tie_word_embeddings`, with a warning.
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
    """Checks that every parameter has a stored tensor and that no stored tensor would be dropped silently.

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
    """Checks that tensors hold floating-point numbers in the shapes of config.json.

    Args:
        tensors: Those of a folder.
        weights: {stored name: Weight} of the tensors to read.
        shapes: Of the parameters.
        config: Of the model.

    Raises:
        ModelError: Naming the first mismatch.
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
    """Returns the first names and the number of further ones."""
    ordered = sorted(names)
    more = f" (and {len(ordered) - most} more)" if len(ordered) > most else ""
    return ", ".join(map(repr, ordered[:most])) + more
