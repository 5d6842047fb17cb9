"""Step 1 of the line: the data files of a folder, by split."""

import logging
import re
from collections import Counter
from collections.abc import Sequence

from safe_rlhf_jax import storage
from safe_rlhf_jax.data.readers import SUFFIXES, kind_of
from safe_rlhf_jax.data.records import printable
from safe_rlhf_jax.errors import DataError

LOGGER = logging.getLogger(__name__)
# A split's name as a whole word: no letter directly before or after it.
SPLIT = re.compile(r"(?<![^\W\d_])(train|test|validation|valid|val|dev|eval)(?![^\W\d_])")
METADATA = re.compile(r"(dataset_(info|infos|dict)|croissant|datapackage|(.*[._-])?(metadata|state|config))\.json")
PART_OF = re.compile(r"(.+)-\d+-of-(\d+)(\..+)")
MAX_NAMED = 5  # files of a kind that are left out


def files_of(path: storage.Path, split: str) -> list[storage.Path]:
    """Returns the data files behind a path: the file itself, or those of a folder that belong to a split.

    A file of a folder belongs to the split in its name as a whole word (`test-00000-of-00001.parquet`), else to that in
    the nearest folder's name (`test/a.jsonl`), else to "train". Several files, and those left out, are printed.

    Raises:
        DataError: If a folder has none, or another split than "train" of a single file is requested.
    """
    if storage.is_file(path):
        if split != "train":
            raise DataError(f"data {path}: split {split!r}: a file has no splits; set test_share, or name another file")
        return [path]
    splits, others = files_in(path)
    if split not in splits:
        have = ", ".join(sorted(splits)) or f"no {', '.join(SUFFIXES)} files"
        raise DataError(f"data {path}: split {split!r} has no files; the folder has {have}")
    others |= {f"split {name}": files for name, files in splits.items() if name != split}
    left_out = [f"{kind}: {named(path, files)}" for kind, files in sorted(others.items())]
    said = [f"split {split} is {named(path, splits[split])}", *missing_parts(splits[split])]
    said += [f"left out are {'; '.join(left_out)}"] if left_out else []
    if len(splits[split]) > 1 or len(said) > 1:
        LOGGER.info(printable(f"data {path}: {'; '.join(said)}"))
    return splits[split]


def missing_parts(files: Sequence[storage.Path]) -> list[str]:
    """Returns the missing ones of files with a total in their names, as `train-00000-of-00002.parquet`."""
    matches = [(match, file.parent) for file in files if (match := PART_OF.fullmatch(file.name))]
    found = Counter((match[1], int(match[2]), match[3], folder) for match, folder in matches)
    return [f"of {parts} parts of {name} there are {have}" for (name, parts, *_), have in found.items() if have < parts]


def files_in(path: storage.Path) -> tuple[dict[str, list[storage.Path]], dict[str, list[storage.Path]]]:
    """Returns the data files of a folder by split, and its other files by kind."""
    splits: dict[str, list[storage.Path]] = {}
    others: dict[str, list[storage.Path]] = {}
    for file in storage.below(path):
        inner = file.relative_to(path)
        if storage.is_folder(file):
            if storage.is_link(file):
                others.setdefault("linked folders", []).append(file)
        elif any(part.startswith(".") for part in inner.parts):
            others.setdefault("hidden", []).append(file)
        elif not kind_of(file) or METADATA.fullmatch(file.name.lower()):
            others.setdefault("no data", []).append(file)
        else:
            splits.setdefault(split_of(inner), []).append(file)
    return splits, others


def split_of(inner: storage.Path) -> str:
    """Returns the split of a file of a folder, by its path inside the folder."""
    words = (SPLIT.search(part.lower()) for part in reversed(inner.parts))
    return next((word[1] for word in words if word), "train")


def named(path: storage.Path, files: Sequence[storage.Path]) -> str:
    """Returns the names of files of a folder, the first few of many."""
    names = ", ".join(str(file.relative_to(path)) for file in files[:MAX_NAMED])
    return names + (f" and {len(files) - MAX_NAMED} more" if len(files) > MAX_NAMED else "")
