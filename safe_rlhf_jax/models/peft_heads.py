"""Score heads of PEFT folders: reward and cost models (SEQ_CLS).

peft stores the head's kernel, `score.weight` [1, D]. A bias and the statistics of a normaliser are further tensors,
which peft ignores: scores that it computes lack both. `score_config.json` holds what config.json says of scores
elsewhere (`score_layouts`). It is not named config.json: transformers would take the folder for a whole model.
"""

import re
from typing import Any

import numpy as np

from safe_rlhf_jax import storage
from safe_rlhf_jax.models import folders
from safe_rlhf_jax.models.config import ModelConfig, ScoreConfig, ScoreType
from safe_rlhf_jax.models.families import family
from safe_rlhf_jax.models.folders import ADAPTER_WEIGHTS, SCORE, is_adapter, read_json
from safe_rlhf_jax.models.matching import match_shapes
from safe_rlhf_jax.models.peft import SCORES, StoredAdapter, read_adapter
from safe_rlhf_jax.models.safetensors_io import Entry, Tensors
from safe_rlhf_jax.models.score_layouts import (
    ARCHITECTURES,
    BIAS,
    FIELDS,
    HEADS,
    KERNEL,
    read_score_config,
    read_statistics,
    score_weights,
    stored_layout,
)
from safe_rlhf_jax.models.weights import Path, Shape, from_stored

LABELS = ("id2label", "label2id", "num_labels")


def config_folder(folder: storage.Path) -> storage.Path:
    """Returns the folder whose config.json describes the network: of a PEFT folder, that of its base."""
    return read_adapter(folder).base_folder() if is_adapter(folder) else folder


def tokenizer_folder(folder: storage.Path) -> storage.Path:
    """Returns the folder that holds a model's tokenizer: of a PEFT folder without one, that of its base."""
    has_one = any(storage.is_file(folder / name) for name in folders.TOKENIZER)
    return folder if has_one else config_folder(folder)


def read_config(folder: storage.Path) -> dict[str, Any]:
    """Returns `config.json`; of a PEFT folder that of its base, with the fields of the adapter's own score head.

    Raises:
        MissingModelError: If there is none.
        ModelError: If a file has other contents.
    """
    hf = folders.read_config(config_folder(folder))
    if not is_adapter(folder) or not read_adapter(folder).scores:
        return hf
    own = score_fields(folder)
    layout = ARCHITECTURES["sequence_classification"]
    architecture = family(str(hf.get("model_type") or "")).score.replace(ARCHITECTURES["beaver"], layout)
    kept = {name: value for name, value in hf.items() if name not in (*FIELDS, *LABELS)}
    return kept | {"architectures": [architecture]} | own


def score_fields(folder: storage.Path) -> dict[str, Any]:
    """Returns what a PEFT folder says of its score head beyond its tensors: `score_config.json`, else `config.json`."""
    found = [name for name in (SCORE, "config.json") if storage.is_file(folder / name)]
    own = read_json(folder / found[0]) if found else {}
    names = (*FIELDS, "pad_token_id") + (("architectures",) if stored_layout(own) else ())
    return {name: own[name] for name in names if name in own}


def head_entries(adapter: StoredAdapter) -> dict[str, Entry]:
    """Returns the tensors of an adapter's score head by their names in the layout that it is read in."""
    head = HEADS[stored_layout(score_fields(adapter.folder)) or "sequence_classification"]
    entries = {name: entry for name, entry in adapter.tensors.entries.items() if name.startswith(SCORES)}
    return {re.sub(r"^score\.", f"{head}.", name): entry for name, entry in entries.items()}


def over_base(adapter: StoredAdapter) -> Tensors:
    """Returns the tensors of the base, with the adapter's score head in place of any of its own."""
    tensors = Tensors(adapter.base_folder())
    if adapter.scores:
        kept = {name: entry for name, entry in tensors.entries.items() if not name.startswith(SCORES)}
        tensors.entries = kept | head_entries(adapter)
    return tensors


def read_head(
    adapter: StoredAdapter, config: ModelConfig, score_type: ScoreType | None = None
) -> tuple[ScoreConfig, dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Returns the score head of an adapter: configuration, parameters by name, statistics of the normaliser.

    Args:
        adapter: Of a reward or cost model.
        config: Of the base.
        score_type: Overrides the stored one; a critic has no statistics.

    Raises:
        ModelError: If a field, a shape or a number is not supported.
    """
    hf, tensors = read_config(adapter.folder), Tensors(adapter.folder, adapter.folder / ADAPTER_WEIGHTS)
    tensors.entries = head_entries(adapter)
    score = read_score_config(hf, tensors.entries, score_type, None)
    shapes: dict[Path, Shape] = {KERNEL: (config.embedding_width, 1), BIAS: (1,)}
    weights = score_weights(score, stored_layout(hf, tensors.entries) or "sequence_classification")
    match_shapes(tensors, weights, shapes, config)
    head: dict[str, np.ndarray] = {}
    for name, weight in weights.items():
        head |= {path[0]: part for path, part in from_stored(tensors[name].astype(np.float32), shapes, weight).items()}
    return score, head, {} if score.score_type == "critic" else read_statistics(hf, tensors)
