"""Model folders: find or download them, and read their JSON files. No weight is read here."""

import json
import warnings
from typing import Any

import jax

from safe_rlhf_jax import storage
from safe_rlhf_jax.errors import MissingModelError, ModelError

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
# Files of a hub repository to fetch, and to skip: second copies of the weights in other layouts.
WANTED = ("*.json", "*.safetensors", "*.jinja", "*.txt", "*.model")
SECOND_COPIES = ("*/*", "consolidated*")
TOKENIZER = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "spiece.model", "vocab.json", "merges.txt")
WEB_PAGE = "is a web page that was saved in place of the file; fetch it again (a gated model needs `hf auth login`)"
# First bytes, in lower case, of files left by a failed download.
STRAYS = {
    b"version https://git-lfs": "is a pointer of Git LFS in place of the file; fetch it with `git lfs pull`",
    b"<!doctype html": WEB_PAGE,
    b"<html": WEB_PAGE,
}
SAVE = "with transformers' save_pretrained"
IN_PLACE_OF_WEIGHTS = {
    (f"*/{WEIGHTS}", f"*/{INDEX}"): "there are weights in a folder below ({}): name that, with its config.json",
    ("*.safetensors",): f"there are {{}}: fetch the index that belongs to them, or save the model again {SAVE}",
    ("global_step*", "*fsdp_*", "*.distcp"): (
        "there is a checkpoint of DeepSpeed or FSDP ({}): make whole weights of it (`zero_to_fp32.py`, `accelerate "
        f"merge-weights`) and save them {SAVE}"
    ),
    ("*.bin", "*.pt", "*.pth"): f"only pickled weights ({{}}), which are never opened: save them as safetensors {SAVE}",
    ("*.gguf",): "there are {}, which are not opened: fetch the model that they were made from",
}
# Files of a PEFT folder: its config, its weights, and what we add about a score head.
ADAPTER, ADAPTER_WEIGHTS, SCORE = "adapter_config.json", "adapter_model.safetensors", "score_config.json"
GENERATION = "generation_config.json"
MERGE = "merge the adapter into its base and save that: `model.merge_and_unload().save_pretrained(FOLDER)`"


def say_once(message: str) -> None:
    """Warns, on the first process, of a model that is opened otherwise than its files say."""
    if jax.process_index() == 0:
        warnings.warn(message, stacklevel=2)  # Python shows the same message once


# --- Folders ----------------------------------------------------------------------------------------------------------


def resolve(path_or_id: storage.Place) -> storage.Path:
    """Returns a local folder: the path itself, or the hub's snapshot in its cache (downloaded when missing).

    Raises:
        MissingModelError: If there is neither; names the fix.
    """
    folder = storage.expanded(path_or_id)
    if storage.is_folder(folder):
        return folder
    if storage.is_file(folder):
        raise MissingModelError(f"{path_or_id}: is a file; name the folder that holds it and its config.json")
    if len(folder.parts) != 2:
        raise MissingModelError(f"{path_or_id}: no such folder, and not a hub id of the form owner/name")
    try:
        return download(str(path_or_id))
    except Exception as error:
        raise MissingModelError(
            f"{path_or_id}: no such folder, and not available from the hub ({' '.join(str(error).split())}). Check the "
            "id; log in with `hf auth login` if it is gated or private; with HF_HUB_OFFLINE=1 or without a network it "
            f"must be in the cache already (`hf download {path_or_id}`); or give a local folder."
        ) from error


def download(hub_id: str) -> storage.Path:
    """Returns the hub's snapshot of a model, with the files in subfolders that its index names."""
    from huggingface_hub import snapshot_download

    patterns: dict[str, Any] = {"allow_patterns": [*WANTED], "ignore_patterns": [*SECOND_COPIES]}
    folder = storage.path(snapshot_download(hub_id, **patterns))
    below = sorted({file for file in read_index(folder).values() if "/" in file})
    if below:
        snapshot_download(hub_id, revision=folder.name, allow_patterns=below)
    return folder


def read_config(folder: storage.Path) -> dict[str, Any]:
    """Returns `config.json`.

    Raises:
        MissingModelError: If the folder has none.
        ModelError: If this file or the tokenizer's has other contents.
    """
    if not storage.is_file(folder / "config.json"):
        below = sorted(path.parent.name for path in storage.matching(folder, "*/config.json"))
        there = f"there is one in {', '.join(below[:5])}: name that folder" if below else "or one half written"
        raise MissingModelError(f"{folder}: no config.json; not a Hugging Face model folder, {there}")
    for path in filter(storage.is_file, (folder / name for name in TOKENIZER)):  # clearer than later errors
        if reason := stray(path):
            raise ModelError(f"{path} {reason}")
    return read_json(folder / "config.json")


def is_adapter(folder: storage.Path) -> bool:
    """Says whether a folder is a PEFT adapter.

    Raises:
        ModelError: If it holds the weights of a model as well.
    """
    found = storage.is_file(folder / ADAPTER)
    if found and any(storage.is_file(folder / name) for name in (WEIGHTS, INDEX)):
        raise ModelError(
            f"{folder}: {ADAPTER} says that this is a PEFT adapter, but the weights of a model are here too. If they "
            f"are merged, remove {ADAPTER} and {ADAPTER_WEIGHTS}; if they are the base, move the adapter elsewhere"
        )
    return found


def stray(path: storage.Path) -> str | None:
    """Describes the wrong contents of a file: a pointer, a web page, nothing; None for any other file."""
    start = storage.read_bytes(path, 64).lstrip().lower()
    if not start:
        return "is empty; fetch it again"
    return next((reason for opening, reason in STRAYS.items() if start.startswith(opening)), None)


def read_json(path: storage.Path) -> dict[str, Any]:
    """Returns the object in a JSON file.

    Raises:
        ModelError: If there is none, naming the file.
    """
    if reason := stray(path):
        raise ModelError(f"{path} {reason}")
    try:
        value = json.loads(storage.read_bytes(path).decode("utf-8-sig"))  # Windows editors write a byte order mark
    except (ValueError, RecursionError) as error:
        raise ModelError(f"{path}: not valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise ModelError(f"{path}: holds a {type(value).__name__}, not an object")
    return value


def clear(folder: storage.Path) -> None:
    """Removes the model or adapter in a folder: of an older save, and partial files of a killed run."""
    names = ("config.json", GENERATION, ADAPTER, INDEX, WEIGHTS, ADAPTER_WEIGHTS, SCORE)
    patterns = "model-*.safetensors", f"model*{storage.PARTIAL}", f"adapter_model*{storage.PARTIAL}"
    for file in [folder / name for name in names] + storage.matching(folder, *patterns):
        storage.remove(file)


# --- Weights ----------------------------------------------------------------------------------------------------------


def read_index(folder: storage.Path) -> dict[str, str]:
    """Returns {tensor: file} of a folder's index, files relative to the folder; empty without an index.

    Raises:
        ModelError: If the index holds no such mapping.
    """
    path = folder / INDEX
    if not storage.is_file(path):
        return {}
    found = read_json(path).get("weight_map")
    if not found or not isinstance(found, dict) or not all(isinstance(file, str) for file in found.values()):
        raise ModelError(f"{path}: no weight_map {{tensor: file}}; fetch the index again, or save the model again")
    for file in found.values():
        if file.startswith("/") or ".." in file.split("/"):
            raise ModelError(f"{path}: weight_map names {file!r}, which is not in the folder")
    return found


def weight_files(folder: storage.Path) -> list[storage.Path]:
    """Returns the weight files of a folder.

    Raises:
        MissingModelError: If there are none; names what is there instead.
    """
    if storage.is_file(folder / WEIGHTS):
        if others := sorted(path.name for path in storage.matching(folder, "model-*-of-*.safetensors")):
            say_once(f"{folder}: {WEIGHTS} is opened, as in transformers; {', '.join(others[:3])} are not")
        return [folder / WEIGHTS]
    files = sorted(set(read_index(folder).values()))
    if not files:
        raise MissingModelError(f"{folder}: neither {WEIGHTS} nor {INDEX}; {what_else(folder)}")
    missing = [file for file in files if not storage.is_file(folder / file)]
    if missing:
        raise MissingModelError(f"{folder}: {INDEX} names {', '.join(missing)}, not present; fetch the folder again")
    return [folder / file for file in files]


def what_else(folder: storage.Path) -> str:
    """Describes a folder without weights: its contents, and the fix."""
    for patterns, meaning in IN_PLACE_OF_WEIGHTS.items():
        found = [str(path.relative_to(folder)) for path in storage.matching(folder, *patterns)]
        if found:
            more = f" and {len(found) - 3} more" if len(found) > 3 else ""
            return meaning.format(", ".join(found[:3]) + more)
    return "no weights are here"
