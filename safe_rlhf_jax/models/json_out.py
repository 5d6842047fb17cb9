"""Fields of the JSON files beside weights that we write."""

import json
from collections.abc import Collection, Mapping
from typing import Any

from safe_rlhf_jax.models.folders import GENERATION

TOKEN_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")
# Fields of a stored JSON file that do not apply to the files we write.
STALE = ("auto_map", "quantization_config", "transformers_version")


def config_fields(stored: Mapping[str, Any], described: dict[str, Any], tokenizer: Any) -> dict[str, Any]:
    """Returns the fields of config.json.

    Args:
        stored: {file: contents} of the JSON files that the model was loaded with; further fields of it are kept.
        described: Those of the network.
        tokenizer: Of transformers, or None.
    """
    return with_token_ids(without_stale(stored.get("config.json", {})) | described, tokenizer)


def generation_fields(
    stored: Mapping[str, Any], hf: Mapping[str, Any], tokenizer: Any, ends: Collection[int]
) -> dict[str, Any]:
    """Returns the fields of generation_config.json.

    Args:
        stored: As in `config_fields`.
        hf: The fields of config.json.
        tokenizer: Of transformers, or None.
        ends: Tokens that end a response, if there are several.
    """
    ids = {name: hf[name] for name in TOKEN_IDS if name in hf}
    fields = with_token_ids(ids | without_stale(stored.get(GENERATION, {})), tokenizer)
    return fields | ({"eos_token_id": sorted(ends)} if len(ends) > 1 else {})


def without_stale(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the fields that still apply."""
    return {name: value for name, value in fields.items() if name not in STALE}


def with_token_ids(fields: Mapping[str, Any], tokenizer: Any) -> dict[str, Any]:
    """Returns the fields with the tokenizer's special tokens; keeps a list of end tokens that contains its EOS."""
    out = dict(fields)
    for name in TOKEN_IDS:
        ours, stored = getattr(tokenizer, name, None), out.get(name)
        if ours is not None and ours not in (stored if isinstance(stored, list) else [stored]):
            out[name] = ours
    return out


def as_json(value: Mapping[str, Any]) -> str:
    """Returns a JSON file's text."""
    return json.dumps(value, indent=2, sort_keys=True) + "\n"
