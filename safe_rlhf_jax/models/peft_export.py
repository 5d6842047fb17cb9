"""PEFT folders out: an adapter as `peft`'s `PeftModel.from_pretrained` and vLLM open it, on its base."""

from collections.abc import Collection, Mapping
from typing import Any

import jax
import numpy as np
from flax.traverse_util import flatten_dict
from jax.experimental import multihost_utils

from safe_rlhf_jax import storage
from safe_rlhf_jax.models.config import Layout, Lora, ModelConfig, ScoreConfig
from safe_rlhf_jax.models.families import family
from safe_rlhf_jax.models.families.record import module_path
from safe_rlhf_jax.models.folders import ADAPTER, ADAPTER_WEIGHTS, GENERATION, SCORE, clear
from safe_rlhf_jax.models.json_out import as_json, config_fields, generation_fields
from safe_rlhf_jax.models.parameters import gather
from safe_rlhf_jax.models.peft import PREFIX, kernel_shapes, kind, linear_maps
from safe_rlhf_jax.models.peft_config import HEADS as SAVED
from safe_rlhf_jax.models.safetensors_io import Spec, write_file
from safe_rlhf_jax.models.score_layouts import FIELDS, HEADS, in_layout, score_weights
from safe_rlhf_jax.models.weights import Path, Shape, Weight, to_stored

Factors = dict[Path, tuple[np.ndarray, np.ndarray]]  # A f32[*in, r] and B f32[r, *out] of parameters


def write_adapter(
    folder: storage.Place,
    config: ModelConfig,
    form: Lora,
    adapter: Mapping[str, Any],
    *,
    base: str,
    score: ScoreConfig | None = None,
    head: Mapping[str, Any] | None = None,
    stats: Mapping[str, Any] | None = None,
    tokenizer: Any = None,
    ends: Collection[int] = (),
) -> storage.Path:
    """Writes a PEFT folder.

    All processes call this, and the first one writes. `adapter_config.json` is written last: a folder without it is not
    finished.

    Args:
        folder: Created if needed; a model in it is replaced.
        config: Of the network.
        form: Of the adapter.
        adapter: The tree of `lora_a` and `lora_b`.
        base: Folder or hub id of the base, for readers of the folder.
        score: Configuration of a score model's head; None for a language model.
        head: Its parameters {score_kernel, score_bias}.
        stats: Its normaliser, empty for a critic.
        tokenizer: A transformers tokenizer, saved beside the weights with its chat template.
        ends: Tokens that end a response, for generation_config.json.

    Returns:
        The folder.

    Raises:
        ModelError: If the head has no layout.
    """
    folder, this = storage.path(folder), family(config.family)
    leaves = {path: gather(leaf) for path, leaf in flatten_dict(adapter).items()}
    of_head: dict[Path, np.ndarray] = {(name,): gather(leaf) for name, leaf in (head or {}).items()}
    statistics = {name: gather(leaf) for name, leaf in (stats or {}).items()}
    tensors, fields = lora_tensors(config, form, leaves)
    fields |= {"base_model_name_or_path": base, "fan_in_fan_out": this.transposed}
    hf = config_fields(config.stored, this.config_to_hf(config), tokenizer)
    if score is None:
        fields |= {"task_type": "CAUSAL_LM", "modules_to_save": None}
        beside = {GENERATION: generation_fields(config.stored, hf, tokenizer, ends)}
    else:
        fields |= {"task_type": "SEQ_CLS", "modules_to_save": SAVED}
        layout: Layout = "beaver" if score.pad_id is None else "sequence_classification"
        spelled = in_layout(layout, this, score, of_head, statistics, hf)
        for name, weight in score_weights(spelled.score, layout).items():
            tensors[name.replace(f"{HEADS[layout]}.", "score.")] = to_stored(spelled.head, weight)
        tensors |= spelled.buffers
        kept = (*FIELDS, "architectures", "pad_token_id")
        beside = {SCORE: {name: spelled.fields[name] for name in kept if name in spelled.fields}}
    if jax.process_index() == 0:
        storage.make_folder(folder)
        clear(folder)
        specs = {PREFIX + k: Spec(v.shape, v.dtype, lambda v=v: v) for k, v in tensors.items()}  # type: ignore[misc]
        write_file(folder / ADAPTER_WEIGHTS, specs, writes=True)
        if tokenizer is not None:
            with storage.local_draft(folder) as local:
                tokenizer.save_pretrained(local)
        for file, contents in (beside | {ADAPTER: fields}).items():
            storage.write(folder / file, as_json(contents))
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(f"{folder} is written")
    return folder


def lora_tensors(
    config: ModelConfig, form: Lora, leaves: Mapping[Path, np.ndarray]
) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Returns the tensors of an adapter, without `PREFIX`, and the fields of `adapter_config.json` that describe them.

    Adapted parameters of a fused tensor share its A if theirs are equal; else it has the A of each below the other, and
    a block diagonal B. Its rank is then a multiple of the form's, and its alpha such that the scale is the form's.
    """
    maps, found = linear_maps(config), factors(config, leaves)
    kinds: dict[str, list[str]] = {}
    for module, weight in maps.items():
        if any((path, weight.layer) in found for path in weight.paths):
            kinds.setdefault(kind(module), []).append(module)
    tensors: dict[str, np.ndarray] = {}
    blocks: dict[str, int] = {}
    for name, modules in kinds.items():
        keys = [[(path, maps[module].layer) for path in maps[module].paths] for module in modules]
        parts = [{path: found[path, layer] for path, layer in of if (path, layer) in found} for of in keys]
        blocks[name] = max(number_of_as(part) for part in parts)
        for module, part in zip(modules, parts, strict=True):
            a, b = joined(part, maps[module], kernel_shapes(config), blocks[name] == 1)
            tensors |= {f"{module}.lora_A.weight": a, f"{module}.lora_B.weight": b}
    several = {name: n for name, n in blocks.items() if n > 1}
    layers = sorted({layer for _, layer in found if layer is not None})
    power = 0.5 if form.rank_stabilized else 1  # of the rank, by which alpha is divided
    fields = {
        "peft_type": "LORA",
        "inference_mode": True,
        "init_lora_weights": True,
        "bias": "none",
        "r": form.rank,
        "lora_alpha": plain(form.alpha),
        "lora_dropout": form.dropout,
        "use_rslora": form.rank_stabilized,
        "rank_pattern": {name: n * form.rank for name, n in several.items()},
        "alpha_pattern": {name: plain(form.alpha * n**power) for name, n in several.items()},
        "target_modules": target_names(kinds, {kind(module) for module in maps}),
        "layers_to_transform": layers if len(layers) < config.num_layers else None,
    }
    return tensors, fields


def factors(config: ModelConfig, leaves: Mapping[Path, np.ndarray]) -> dict[tuple[Path, int | None], Any]:
    """Returns A and B of each adapted parameter (by its scanned path) in each layer."""
    found: dict[tuple[Path, int | None], Any] = {}
    for path in kernel_shapes(config):
        module, names = ".".join(path[2:-1]), ("lora_a", "lora_b")
        if config.scan_layers and (*path[:-1], "lora_a") in leaves:
            a, b = (leaves[(*path[:-1], name)] for name in names)
            found |= {(path, layer): (a[i], b[i]) for i, layer in enumerate(range(config.num_layers)[-len(a) :])}
        for layer in () if config.scan_layers else range(config.num_layers):
            place = module_path(config, module, layer)
            if (*place, "lora_a") in leaves:
                found[path, layer] = tuple(leaves[(*place, name)] for name in names)
    return found


def number_of_as(parts: Factors) -> int:
    """Returns 1 if all parameters have the same A, else their number."""
    first, *others = (a for a, _ in parts.values())
    return 1 if all(np.array_equal(a, first) for a in others) else len(parts)


def joined(parts: Factors, weight: Weight, shapes: Mapping[Path, Shape], shared: bool) -> tuple[np.ndarray, np.ndarray]:
    """Returns `lora_A` [r, in] and `lora_B` [out, r] of a linear map, from the factors of its adapted parameters.

    Args:
        parts: A and B by path.
        weight: All parameters of the map.
        shapes: Of those, without the layer axis.
        shared: Whether one A is that of all.
    """
    matrices = [a.reshape(-1, a.shape[-1]).T for a, _ in parts.values()]
    a = matrices[0] if shared else np.concatenate(matrices)
    rank = len(matrices[0])
    rows = {path: 0 if shared else i * rank for i, path in enumerate(parts)}
    whole = {path: np.zeros((len(a), *shapes[path][weight.in_ndim :]), np.float32) for path in weight.paths}
    for path, (_, b) in parts.items():
        whole[path][rows[path] : rows[path] + rank] = b
    return np.ascontiguousarray(a), to_stored(whole, Weight(weight.paths, in_ndim=1, fusion=weight.fusion))


def target_names(adapted: Collection[str], kinds: Collection[str]) -> list[str]:
    """Returns names for `target_modules`: the last part (q_proj) where it means no other module of a layer."""
    last = {name: name.rpartition(".")[2] for name in kinds}
    others = {last[name] for name in kinds if name not in adapted}
    return sorted({name if last[name] in others else last[name] for name in adapted})


def plain(value: float) -> float | int:
    """Returns a whole number as such: readers expect an alpha without a decimal point."""
    return int(value) if float(value).is_integer() else value
