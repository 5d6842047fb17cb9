"""Safetensors one tensor at a time: memory-mapped for reading, streamed for writing.

A file is the length of its header (u64), the header {name: {dtype, shape, data_offsets}} in JSON, and the numbers.
Source: https://huggingface.co/docs/safetensors.
"""

import dataclasses
import itertools
import json
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from safe_rlhf_jax import storage
from safe_rlhf_jax.errors import ModelError
from safe_rlhf_jax.models.folders import INDEX, WEIGHTS, read_index, stray, weight_files

DTYPES = {name: jnp.dtype(dtype) for name, dtype in {
    "F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16", "I64": "int64",
}.items()}  # fmt: skip
NAMES = {dtype: name for name, dtype in DTYPES.items()}
MAX_HEADER = 10**8  # bytes, as in the library: a larger size is no header
PART = 2**18  # numbers compared at once


# --- In ---------------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Entry:
    """Location of a stored tensor."""

    file: storage.Path
    dtype: str
    shape: tuple[int, ...]
    offset: int  # bytes


class Tensors:
    """The tensors of a folder, each memory-mapped on access: only the parts that are read enter memory.

    Args:
        folder: With `model.safetensors`, or several files and their index.
        files: Other files of the folder, to be read in place of those.

    Raises:
        FileNotFoundError: If there are no safetensors, or a file in the index is missing.
        ModelError: If a file is truncated or no safetensors, or two files hold one tensor.
    """

    def __init__(self, folder: storage.Path, *files: storage.Path):
        self.folder = folder
        self.entries: dict[str, Entry] = {}
        for file in files or weight_files(folder):
            found = read_header(file)
            for name in found.keys() & self.entries.keys():
                both = " and ".join(str(entry.file.relative_to(folder)) for entry in (self.entries[name], found[name]))
                raise ModelError(f"{folder}: tensor {name!r} stands in {both}; fetch or save the folder again")
            self.entries |= found

    def promised(self, names: Sequence[str]) -> str:
        """Describes the files in which the index places missing tensors."""
        files = {} if storage.is_file(self.folder / WEIGHTS) else read_index(self.folder)
        found = [f"{files[name]} should hold {name!r}" for name in names if name in files]
        return f"; {INDEX} says that {', '.join(found[:3])}: fetch the folder again" if found else ""

    def respell(self, spellings: Mapping[str, Sequence[str]]) -> None:
        """Renames tensors that are stored under another spelling."""
        for name, others in spellings.items():
            found = [other for other in others if other in self.entries]
            if found and name not in self.entries:
                self.entries[name] = self.entries.pop(found[0])

    def __getitem__(self, name: str) -> np.ndarray:
        """Returns a tensor, read-only."""
        entry = self.entries[name]
        if entry.dtype not in DTYPES:
            raise ModelError(f"{self.folder}: tensor {name!r} is stored as {entry.dtype}; readable are {[*DTYPES]}")
        return storage.read_array(entry.file, DTYPES[entry.dtype], entry.shape, entry.offset)

    def get(self, name: str, default: Any) -> Any:
        """Returns a tensor, or `default` if there is none."""
        return self[name] if name in self.entries else default

    def equal(self, first: str, second: str) -> bool:
        """Says whether two tensors hold the same numbers; reads both in parts, up to the first difference."""
        if self.entries[first] == self.entries[second]:
            return True
        a, b = self[first], self[second]
        if a.shape != b.shape:
            return False
        a, b = a.reshape(-1), b.reshape(-1)
        numbers = (lambda x: x.view(np.uint8)) if a.dtype == b.dtype else (lambda x: x.astype(np.float64))
        parts = (slice(i, i + PART) for i in range(0, a.size, PART))
        return all(np.array_equal(numbers(a[part]), numbers(b[part])) for part in parts)


def read_header(file: storage.Path) -> dict[str, Entry]:
    """Returns {tensor: location} of a file, whose tensors must be contiguous and fill it.

    Raises:
        ModelError: If they do not.
    """
    if reason := stray(file):
        raise ModelError(f"{file}: truncated, or no safetensors file: it {reason}")
    size = storage.status(file).size
    with storage.reading(file) as stream:
        start = 8 + int.from_bytes(stream.read(8), "little")
        if start > min(size, MAX_HEADER):
            raise ModelError(f"{file}: truncated, or no safetensors file ({size} bytes); fetch it again")
        try:
            header = json.loads(stream.read(start - 8))
            header.pop("__metadata__", None)
            spans = sorted((*map(int, tensor["data_offsets"]), name) for name, tensor in header.items())
            entries = {
                name: Entry(file, str(header[name]["dtype"]), tuple(map(int, header[name]["shape"])), start + begin)
                for begin, _, name in spans
            }
        except (ValueError, RecursionError, TypeError, LookupError, AttributeError, OverflowError) as error:
            raise ModelError(f"{file}: no safetensors file: {error}; fetch it again") from error
    end = start + max((end for _, end, _ in spans), default=0)
    if end != size:
        raise ModelError(f"{file}: truncated: {size} bytes where its header says {end}; fetch it again")
    for (_, before, _), (begin, end, name) in itertools.pairwise([(0, 0, ""), *spans]):
        entry = entries[name]
        dtype = DTYPES.get(entry.dtype)
        fits = dtype is None or end - begin == math.prod(entry.shape) * dtype.itemsize
        if begin != before or end < begin or min(entry.shape, default=0) < 0 or not fits:
            raise ModelError(
                f"{file}: tensor {name!r}: {entry.dtype} {list(entry.shape)} does not stand from byte {begin} to {end} "
                f"after what ends at {before}; fetch it again"
            )
    return entries


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


def write_tensors(folder: storage.Path, specs: Mapping[str, Spec], *, max_bytes: int, writes: bool = True) -> None:
    """Writes tensors into as few files as `max_bytes` allows, one tensor at a time, with an index for several files.

    Args:
        folder: An existing folder.
        specs: By name, in the order in which they are made.
        max_bytes: Of a file, unless one tensor is larger.
        writes: False if another process writes: every tensor is still made, as all processes gather it.
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
        storage.write(folder / INDEX, json.dumps(index, indent=2) + "\n")


def write_file(path: storage.Path, specs: Mapping[str, Spec], writes: bool) -> None:
    """Writes one file."""
    # The widest numbers first, so that every tensor is aligned.
    ordered = dict(sorted(specs.items(), key=lambda item: -item[1].dtype.itemsize))
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}  # required by transformers
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
    with storage.writing(path) as stream:
        stream.write(len(text).to_bytes(8, "little") + text)
        for spec in ordered.values():
            stream.write(np.ascontiguousarray(spec.make()).reshape(-1).view(np.uint8).data)
