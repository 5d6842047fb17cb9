"""Safetensors one tensor at a time: mapped on the way in, streamed on the way out.

A file is the length of its header (u64), the header {name: {dtype, shape, data_offsets}} in JSON, and the numbers.
Source: https://huggingface.co/docs/safetensors.
"""

import dataclasses
import json
import math
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
DTYPES = {name: jnp.dtype(dtype) for name, dtype in {
    "F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16", "I64": "int64",
}.items()}  # fmt: skip
NAMES = {dtype: name for name, dtype in DTYPES.items()}


def read_json(path: pathlib.Path) -> dict[str, Any]:
    """Returns the object in a JSON file.

    Raises:
        ValueError: If it holds none, naming the file.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: not valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path}: holds a {type(value).__name__}, not an object")
    return value


# --- In ---------------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Entry:
    """Where a tensor stands."""

    file: pathlib.Path
    dtype: str
    shape: tuple[int, ...]
    offset: int  # bytes


class Tensors:
    """The tensors of a folder. Each is mapped when it is asked for: only what is then read of it enters memory.

    Args:
        folder: With `model.safetensors`, or several files and their index.

    Raises:
        FileNotFoundError: If there are no safetensors, or a file that the index names is missing.
        ValueError: If a file is cut off or no safetensors.
    """

    def __init__(self, folder: pathlib.Path):
        self.folder = folder
        self.entries: dict[str, Entry] = {}
        for file in weight_files(folder):
            self.entries |= read_header(file)

    def rename(self, spellings: Mapping[str, Sequence[str]]) -> None:
        """Gives tensors that are stored under another spelling their name."""
        for name, others in spellings.items():
            found = [other for other in others if other in self.entries]
            if found and name not in self.entries:
                self.entries[name] = self.entries.pop(found[0])

    def __getitem__(self, name: str) -> np.ndarray:
        """Returns a tensor, read-only."""
        entry = self.entries[name]
        if entry.dtype not in DTYPES:
            raise ValueError(f"{self.folder}: tensor {name!r} is stored as {entry.dtype}; readable are {[*DTYPES]}")
        return np.memmap(entry.file, DTYPES[entry.dtype], "r", entry.offset, entry.shape).view(np.ndarray)

    def get(self, name: str, default: Any) -> Any:
        """Returns a tensor, or `default` where there is none."""
        return self[name] if name in self.entries else default


def weight_files(folder: pathlib.Path) -> list[pathlib.Path]:
    """Returns the files that hold a folder's tensors."""
    if (folder / WEIGHTS).is_file():
        return [folder / WEIGHTS]
    if not (folder / INDEX).is_file():
        pickled = sorted(path.name for suffix in ("bin", "pt", "pth") for path in folder.glob(f"*.{suffix}"))
        there = f"only pickled weights ({', '.join(pickled)}), which are never opened: " if pickled else ""
        fix = "save them as safetensors with transformers' save_pretrained" if pickled else "no weights are here"
        raise FileNotFoundError(f"{folder}: neither {WEIGHTS} nor {INDEX}; {there}{fix}")
    files = [folder / name for name in sorted(set(read_json(folder / INDEX)["weight_map"].values()))]
    missing = [file.name for file in files if not file.is_file()]
    if missing:
        raise FileNotFoundError(f"{folder}: {INDEX} names {', '.join(missing)}, not present; fetch the folder again")
    return files


def read_header(file: pathlib.Path) -> dict[str, Entry]:
    """Returns {tensor: where it stands} of a file, which is as long as its header says.

    Raises:
        ValueError: If it is not.
    """
    size = file.stat().st_size
    with file.open("rb") as stream:
        start = 8 + int.from_bytes(stream.read(8), "little")
        if start > size:
            raise ValueError(f"{file}: truncated, or no safetensors file ({size} bytes); fetch it again")
        try:
            header = json.loads(stream.read(start - 8))
        except ValueError as error:
            raise ValueError(f"{file}: no safetensors file: {error}") from error
    header.pop("__metadata__", None)
    end = start + max((tensor["data_offsets"][1] for tensor in header.values()), default=0)
    if end != size:
        raise ValueError(f"{file}: truncated: {size} bytes where its header says {end}; fetch it again")
    return {
        name: Entry(file, tensor["dtype"], tuple(tensor["shape"]), start + tensor["data_offsets"][0])
        for name, tensor in header.items()
    }


# --- Out --------------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Spec:
    """A tensor to write."""

    shape: tuple[int, ...]
    dtype: np.dtype
    make: Callable[[], np.ndarray]

    @property
    def nbytes(self) -> int:
        """Size in bytes."""
        return math.prod(self.shape) * self.dtype.itemsize


def write_tensors(folder: pathlib.Path, specs: Mapping[str, Spec], *, max_bytes: int, writes: bool = True) -> None:
    """Writes tensors into as few files as `max_bytes` allows, one tensor at a time, and an index if files are several.

    Args:
        folder: Exists.
        specs: By name, in the order in which they are made.
        max_bytes: Of a file, unless one tensor is larger.
        writes: False where another process writes: every tensor is made, as all processes take part in gathering it.
    """
    groups: list[dict[str, Spec]] = [{}]
    for name, spec in specs.items():
        if groups[-1] and sum(s.nbytes for s in groups[-1].values()) + spec.nbytes > max_bytes:
            groups.append({})
        groups[-1][name] = spec
    single = len(groups) == 1
    files = {WEIGHTS if single else f"model-{i:05}-of-{len(groups):05}.safetensors": g for i, g in enumerate(groups, 1)}
    for file, group in files.items():
        write_file(folder / file, group, writes)
    if writes and not single:
        index = {
            "metadata": {"total_size": sum(spec.nbytes for spec in specs.values())},
            "weight_map": {name: file for file, group in files.items() for name in group},
        }
        (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n")


def write_file(path: pathlib.Path, specs: Mapping[str, Spec], writes: bool) -> None:
    """Writes one file."""
    # The widest numbers first: then each tensor stands where its numbers are aligned.
    ordered = dict(sorted(specs.items(), key=lambda item: -item[1].dtype.itemsize))
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}  # what transformers asks for
    offset = 0
    for name, spec in ordered.items():
        header[name] = {"dtype": NAMES[spec.dtype], "shape": spec.shape, "data_offsets": [offset, offset + spec.nbytes]}
        offset += spec.nbytes
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    if not writes:
        for spec in ordered.values():
            spec.make()
        return
    with path.open("wb") as stream:
        stream.write(len(text).to_bytes(8, "little") + text)
        for spec in ordered.values():
            stream.write(np.ascontiguousarray(spec.make()).reshape(-1).view(np.uint8).data)
