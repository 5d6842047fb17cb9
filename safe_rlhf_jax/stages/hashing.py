"""Hashes of a stage's inputs, by content: its result is valid as long as none of them has changed."""

import contextlib
import hashlib
import importlib.util
import json
from collections.abc import Iterable, Sequence
from typing import Any

from safe_rlhf_jax import config as cfg
from safe_rlhf_jax import storage
from safe_rlhf_jax.data.sources import data_files
from safe_rlhf_jax.models import hf
from safe_rlhf_jax.models.folders import is_adapter, read_index
from safe_rlhf_jax.models.peft import read_adapter
from safe_rlhf_jax.processes import first_says, is_main

MODEL_FILES = ("*.safetensors", "*.json", "*.jinja", "*.model", "*.txt")  # of a folder, that determine its outputs
DIGESTS = ".digests.json"  # in the workdir: digests of large files, by path, size and time


def stage_hashes(config: cfg.RunConfig, shared: Sequence[Any], files: "Digests") -> dict[str, str]:
    """Returns 12 hex digits for each stage: of its settings, data, models and `shared`, on the first process.

    Settings that change no result (`Schema.without_effect`) and the mesh are left out.

    Args:
        config: Of the run.
        shared: Further inputs of all stages, beside seed and execution: tokenizer, template.
        files: Digests of files.
    """
    names = [stage.name for stage in config.stages]
    hashes = dict.fromkeys(names, "0" * 12)
    if is_main():
        for stage in config.stages:
            named = (
                *(use.reference for use in stage.models().values()),
                *stage.multipliers().values(),
                *stage.makers(),
            )
            upstream = [hashes[name] if name in hashes else model_identity(name, files) for name in named]
            read = [path for part in stage.parts() if part.maker is None for path in data_files(part.name)]
            data = {str(path): files.of(path) for path in read}
            data |= {name: files.of(storage.expanded(name)) for name in stage.files()}
            parts = (hashed(stage), config.seed, hashed(config.execution), *shared, data, upstream)
            parts += ("end_truncated",) if config.end_truncated and hasattr(stage, "max_response_length") else ()
            hashes[stage.name] = config_hash(*parts)
    found = first_says("".join(hashes.values()))
    return {name: found[12 * i : 12 * i + 12] for i, name in enumerate(names)}


def config_hash(*parts: Any) -> str:
    """Returns 12 hex digits that change when any part changes."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:12]


def hashed(value: Any) -> Any:
    """Returns a schema as plain values, without the settings that change no result."""
    if isinstance(value, cfg.Schema):
        fields = dict(value)
        return {name: hashed(fields[name]) for name in fields.keys() - value.without_effect()}
    if isinstance(value, dict):
        return {name: hashed(item) for name, item in value.items()}
    return [hashed(item) for item in value] if isinstance(value, tuple | list) else value


def model_identity(reference: str, files: "Digests") -> Any:
    """Returns the identity of a model: the contents of a folder, the commit of a hub id, the source of a function."""
    prefix, _, rest = reference.partition(":")
    if prefix == "function":
        return reference, source_digest(rest.partition(":")[0], files)
    folder = storage.expanded(rest)
    if prefix == "hf" and not storage.is_folder(folder):  # an existing folder takes precedence over a hub id
        try:
            return reference, hf.resolve(rest).name  # the hub's cache names a snapshot by its commit
        except FileNotFoundError:
            return reference  # the check says so, where the model is needed
    if prefix not in ("path", "hf"):
        return reference
    found: dict[str, Any] = {str(path.relative_to(folder)): files.of(path) for path in model_files(folder)}
    if is_adapter(folder):  # its base is a part of it
        with contextlib.suppress(ValueError, FileNotFoundError):  # the check says so, where the model is needed
            base = read_adapter(folder).base
            found["base"] = model_identity(
                ("path:" if storage.is_folder(storage.expanded(base)) else "hf:") + base, files
            )
    return found


def source_digest(module: str, files: "Digests") -> str:
    """Returns the digest of a Python module's file; "" if there is none."""
    spec = None
    with contextlib.suppress(ImportError, ValueError):  # the check says so, where the function is needed
        spec = importlib.util.find_spec(module)
    return files.of(storage.path(spec.origin)) if spec is not None and spec.origin else ""


def model_files(folder: storage.Path) -> list[storage.Path]:
    """Returns the files of a folder that determine its model, including those in subfolders by the index."""
    found = set(storage.matching(folder, *MODEL_FILES))
    with contextlib.suppress(ValueError):  # the check says so, where the model is needed
        found |= {folder / file for file in read_index(folder).values()}
    return sorted(found)


def base_digest(folder: str, files: "Digests") -> str:
    """Returns 12 hex digits of a model's weights and configuration, on the first process; of a hub id, its commit."""
    where = hf.resolve(folder)
    names = sorted({*storage.matching(where, "*.safetensors"), where / "config.json"})
    return first_says(config_hash([files.of(path) for path in names]) if is_main() else "0" * 12)


class Digests:
    """SHA-256 of files, remembered by path, size and times of the last change.

    Times of the contents, which copies may inherit from the original, and of the file itself.

    Args:
        cache: The file of the cache; it need not exist.
    """

    def __init__(self, cache: storage.Path):
        self.cache = cache
        self.found: dict[str, str] = {}
        try:
            self.known: dict[str, str] = json.loads(storage.read_text(cache))
        except (OSError, ValueError):
            self.known = {}

    def of(self, path: storage.Path) -> str:
        """Returns the digest of a file; "" if it is not a file."""
        if not storage.is_file(path):
            return ""
        status = storage.status(path)
        key = f"{storage.real(path)} {status.size} {status.modified} {status.changed}"
        if key not in self.found:
            self.found[key] = self.known.get(key) or digest(path)
        return self.found[key]

    def save(self) -> None:
        """Writes the digests, for the next run."""
        if self.found == self.known:
            return
        with contextlib.suppress(OSError):  # such as a folder of another user: the next run reads the files again
            storage.write(self.cache, json.dumps(self.found))


def digest(path: storage.Path) -> str:
    """Returns the SHA-256 of a file."""
    with storage.reading(path) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def text_digest(texts: Iterable[str]) -> str:
    """Returns the SHA-256 of several texts."""
    return hashlib.sha256("\0".join(texts).encode("utf-8", "surrogatepass")).hexdigest()
