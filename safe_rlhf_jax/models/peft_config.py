"""`adapter_config.json` of PEFT: what is read of it, and what is refused because it makes another map than W + s·B·A.

Names, defaults and rules are those of peft's `LoraConfig` and `check_target_module_exists`.
"""

import math
import re
from collections.abc import Mapping
from typing import Any

from safe_rlhf_jax.errors import ModelError
from safe_rlhf_jax.models.folders import MERGE

TASKS = ("CAUSAL_LM", "SEQ_CLS", None)
HEADS = ("classifier", "score")  # in `modules_to_save` of every SEQ_CLS adapter
# Starts that leave the base as it is; others (PiSSA, OLoRA, CorDA, LoftQ, LoRA-GA) have changed it.
STARTS = (True, False, None, "gaussian", "eva", "orthogonal", "mica")
# Fields that are read, and fields that change no result. Any other one must be at rest: null, false or empty.
READ = {
    *("peft_type", "task_type", "base_model_name_or_path", "revision", "r", "lora_alpha", "use_rslora", "rank_pattern"),
    *("alpha_pattern", "target_modules", "exclude_modules", "layers_to_transform", "lora_dropout", "modules_to_save"),
    *("init_lora_weights", "bias"),
}
UNUSED = {
    *("auto_mapping", "peft_version", "inference_mode", "fan_in_fan_out", "layers_pattern", "megatron_core"),
    *("qalora_group_size", "eva_config", "corda_config", "lora_ga_config", "velora_config", "ensure_weight_tying"),
    "runtime_config",
}


def check_fields(fields: Mapping[str, Any]) -> None:
    """Checks that a config is that of a LoRA on linear maps.

    Raises:
        ModelError: Naming the field, its value and the fix.
    """
    for name, supported in (("peft_type", ("LORA",)), ("task_type", TASKS), ("bias", ("none", None))):
        if (value := fields.get(name)) not in supported:
            raise unsupported(name, value, f"; supported: {', '.join(map(repr, supported[:2]))}")
    if not isinstance(fields.get("base_model_name_or_path"), str) or not fields["base_model_name_or_path"]:
        raise ModelError("base_model_name_or_path is missing: write the folder or the hub id of the base there")
    if fields.get("revision") not in (None, "main"):
        raise ModelError(
            f"revision {fields['revision']!r} of {fields['base_model_name_or_path']!r} is not fetched: download it, "
            "write its folder as base_model_name_or_path, and revision null"
        )
    start = fields.get("init_lora_weights", True)
    if start not in STARTS:
        raise ModelError(
            f"init_lora_weights {start!r} has changed the base: convert the adapter to one of the plain base "
            "(`path_initial_model_for_weight_conversion` of peft's save_pretrained), or " + MERGE
        )
    heads = HEADS if fields.get("task_type") == "SEQ_CLS" else ()
    if others := [name for name in fields.get("modules_to_save") or () if name not in heads]:
        raise unsupported("modules_to_save", others)
    for name, value in fields.items():
        if name not in READ | UNUSED and value:  # use_dora, say
            raise unsupported(name, value)
    check_numbers(fields)


def check_numbers(fields: Mapping[str, Any]) -> None:
    """Checks ranks, alphas, layers and patterns.

    Raises:
        ModelError: Naming the field and its value.
    """
    ranks = {"r": fields.get("r")} | patterns(fields, "rank_pattern")
    alphas: dict[str, Any] = {"lora_alpha": fields.get("lora_alpha")} | patterns(fields, "alpha_pattern")
    for name, rank in ranks.items():
        if type(rank) is not int or rank < 1:
            raise ModelError(f"{name} is {rank!r}; a rank is a whole number from 1 on")
    for name, alpha in alphas.items():
        if type(alpha) not in (int, float) or not 0 < alpha < math.inf:
            raise ModelError(f"{name} is {alpha!r}; write a positive number")
    layers = fields.get("layers_to_transform")
    if layers is not None and not all(
        type(layer) is int for layer in (layers if isinstance(layers, list) else [layers])
    ):
        raise ModelError(f"layers_to_transform is {layers!r}; write the numbers of layers")
    for name in ("target_modules", "exclude_modules"):
        value = fields.get(name)
        if value is not None and not isinstance(value, str | list):
            raise ModelError(f"{name} is {value!r}; write names of modules, or a regular expression")
    for pattern in (*ranks, *alphas, *(fields[name] for name in ("target_modules", "exclude_modules")
                                       if isinstance(fields.get(name), str))):  # fmt: skip
        try:
            re.compile(pattern)
        except re.error as error:
            raise ModelError(f"{pattern!r} is no regular expression: {error}") from error


def patterns(fields: Mapping[str, Any], name: str) -> dict[str, Any]:
    """Returns {regular expression of modules: value} of a field.

    Raises:
        ModelError: If it is something else.
    """
    found = fields.get(name) or {}
    if not isinstance(found, dict):
        raise ModelError(f"{name} is {found!r}; write {{module: number}}")
    return found


def unsupported(name: str, value: Any, supported: str = "") -> ModelError:
    """Returns the error for a value that is not implemented."""
    return ModelError(f"{name} {value!r} is not supported{supported}; {MERGE}")


def scale_of(fields: Mapping[str, Any], module: str) -> tuple[int, float]:
    """Returns rank r and scale s of a module: alpha / r, or alpha / √r with `use_rslora`."""

    def of(default: str, name: str) -> Any:
        found = patterns(fields, name)
        return next((found[key] for key in found if re.match(rf"(.*\.)?({key})$", module)), fields[default])

    rank, alpha = of("r", "rank_pattern"), of("lora_alpha", "alpha_pattern")
    return rank, alpha / (math.sqrt(rank) if fields.get("use_rslora") else rank)


def targeted(fields: Mapping[str, Any], module: str, layer: int | None) -> bool:
    """Says whether a config names a linear map in a layer."""

    def among(names: str | list[str]) -> bool:
        if isinstance(names, str):
            return re.fullmatch(names, module) is not None
        return any(f".{module}".endswith(f".{name}") for name in names)

    targets, layers = fields.get("target_modules") or [], fields.get("layers_to_transform")
    if among(fields.get("exclude_modules") or []):
        return False
    if targets == "all-linear":
        return True
    within = layers in (None, []) or layer in (layers if isinstance(layers, list) else [layers])
    return among(targets) and (within or isinstance(targets, str) or module in targets)
