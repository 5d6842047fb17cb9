"""A model's folder: found or downloaded, and what is in it. No weight is read here."""

import json
import warnings
from typing import Any

import jax

from safe_rlhf_jax import storage
from safe_rlhf_jax.errors import MissingModelError, ModelError

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
# What of a hub's repository is fetched, and what of it is not: second copies of the weights in other layouts.
WANTED = ("*.json", "*.safetensors", "*.jinja", "*.txt", "*.model")
SECOND_COPIES = ("*/*", "consolidated*")
TOKENIZER = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "spiece.model", "vocab.json", "merges.txt")
WEB_PAGE = "is a web page that was saved in place of the file; fetch it again (a gated model needs `hf auth login`)"
# First bytes, in lower case, of what stands in a file's place when something went wrong on the way.
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
ADAPTER = "adapter_config.json"
MERGE = "merge the adapter into its base and save that: `model.merge_and_unload().save_pretrained(FOLDER)`"


def say_once(message: str) -> None:
    """Warns of what is opened otherwise than its files say; of several processes the first one speaks."""
    if jax.process_index() == 0:
        warnings.warn(message, stacklevel=2)  # Python shows the same words once


# --- Folders ----------------------------------------------------------------------------------------------------------


def resolve(path_or_id: storage.Place) -> storage.Path:
    """Returns a local folder: the path itself, or the hub's snapshot in its cache (downloaded when missing).

    Raises:
        MissingModelError: If there is neither, saying what to do.
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
    """Returns the hub's snapshot of a model; what its index names in folders below is fetched too."""
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
        ModelError: If the folder is an adapter, or something else stands in place of this file or the tokenizer's.
    """
    if storage.is_file(folder / ADAPTER):
        raise ModelError(
            f"{folder}: {ADAPTER} says that this is a PEFT adapter; {MERGE}. If the weights here are merged already, "
            f"remove {ADAPTER} and adapter_model.safetensors"
        )
    if not storage.is_file(folder / "config.json"):
        below = sorted(path.parent.name for path in storage.matching(folder, "*/config.json"))
        there = f"there is one in {', '.join(below[:5])}: name that folder" if below else "or one half written"
        raise MissingModelError(f"{folder}: no config.json; not a Hugging Face model folder, {there}")
    for path in filter(storage.is_file, (folder / name for name in TOKENIZER)):  # others open it and say less
        if reason := stray(path):
            raise ModelError(f"{path} {reason}")
    return read_json(folder / "config.json")


def stray(path: storage.Path) -> str | None:
    """Returns what a file holds in place of its contents: a pointer, a web page, nothing; None for any other."""
    start = storage.read_bytes(path, 64).lstrip().lower()
    if not start:
        return "is empty; fetch it again"
    return next((reason for opening, reason in STRAYS.items() if start.startswith(opening)), None)


def read_json(path: storage.Path) -> dict[str, Any]:
    """Returns the object in a JSON file.

    Raises:
        ModelError: If it holds none, naming the file.
    """
    if reason := stray(path):
        raise ModelError(f"{path} {reason}")
    try:
        value = json.loads(
            storage.read_bytes(path).decode("utf-8-sig")
        )  # editors of Windows put a mark before the text
    except (ValueError, RecursionError) as error:
        raise ModelError(f"{path}: not valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise ModelError(f"{path}: holds a {type(value).__name__}, not an object")
    return value


# --- Weights ----------------------------------------------------------------------------------------------------------


def read_index(folder: storage.Path) -> dict[str, str]:
    """Returns {tensor: file} of a folder's index, files relative to the folder; nothing where there is no index.

    Raises:
        ModelError: If it says no such thing.
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
    """Returns the files that hold a folder's tensors.

    Raises:
        MissingModelError: If there are none, saying what is there instead.
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
    """Returns what a folder without weights holds in their place, and what to do."""
    for patterns, meaning in IN_PLACE_OF_WEIGHTS.items():
        found = [str(path.relative_to(folder)) for path in storage.matching(folder, *patterns)]
        if found:
            more = f" and {len(found) - 3} more" if len(found) > 3 else ""
            return meaning.format(", ".join(found[:3]) + more)
    return "no weights are here"
