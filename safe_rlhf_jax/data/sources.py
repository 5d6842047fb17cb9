"""Step 1 of the line: records, as lists of dictionaries, from files, folders, hubs and the embedded world.

`formats` says which fields a record has.
"""

import difflib
import functools
import hashlib
import json
import pathlib
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from safe_rlhf_jax.data import demo, hubs
from safe_rlhf_jax.data.files import files_of, read_file
from safe_rlhf_jax.data.formats import FORMATS, PART, Record, recognise

DATASETS: dict[str, Callable[[str], Any]] = {  # name -> (split -> records)
    "demo/sft": demo.sft,
    "demo/preference": demo.preference,
    "demo/prompts": demo.prompts,
}


def read_records(
    name: str,
    split: str = "train",
    limit: int | None = None,
    *,
    test_share: float | None = None,
    format: str | None = None,
    fields: Mapping[str, str] | None = None,
    unique: str | None = None,
) -> list[Record]:
    """Returns the records of a data set, in the fields of `formats`.

    Args:
        name: A key of `DATASETS`, a file or folder, `hf:OWNER/NAME[@REVISION][:CONFIG]` or `tfds:NAME`; a share of it
            may follow after a colon, such as `:0.5`, `:1/3` or `:2`.
        split: Which part of it.
        limit: Takes the first records only.
        test_share: Makes the splits "train" and "test" by a hash of the prompt: none is on both sides.
        format: A key of `FORMATS`; None recognises it by the columns.
        fields: {field: column} renames columns before anything else.
        unique: "record" leaves out records that repeat an earlier one, "prompt" those that repeat its prompt.

    Raises:
        ValueError: If there is no such data set, split or file, or it cannot be read; says where.
    """
    stamps = tuple((str(path), path.stat().st_mtime_ns, path.stat().st_size) for path in data_files(name))
    records, _ = read_all(name, split, test_share, format, tuple((fields or {}).items()), unique, stamps)
    return list(records[:limit])


@functools.lru_cache(maxsize=16)  # stages share data sets
def read_all(
    name: str,
    split: str,
    test_share: float | None,
    format: str | None,
    fields: tuple[tuple[str, str], ...],
    unique: str | None,
    stamps: tuple[tuple[str, int, int], ...],
) -> tuple[tuple[Record, ...], str]:
    """Returns all records of `read_records`, and which format they had; `stamps` tell whether files have changed."""
    del stamps
    source, share = split_share(name)
    where = f"data {name!r}"
    if test_share is not None and split not in ("train", "test"):
        raise ValueError(f"{where}: split {split!r}: with test_share there are 'train' and 'test'")
    raw = read_source(source, "train" if test_share is not None else split)
    if not raw:
        raise ValueError(f"{where}: split {split!r} has no records")
    raw = renamed(raw, fields, where)
    recognised = recognise(raw, format, where)
    records = [FORMATS[recognised].read(record) for record in raw]
    if test_share is not None:
        records = [record for record in records if in_test(record, test_share) == (split == "test")]
    if unique is not None:
        records = without_repeats(records, prompt_key if unique == "prompt" else record_key)
    records = take_share(records, share)
    if not records:
        raise ValueError(f"{where}: split {split!r} has no records left after test_share, unique and share")
    return tuple(records), recognised


def split_share(name: str) -> tuple[str, float]:
    """Returns the name without its share, and the share.

    Raises:
        ValueError: If the share is not positive.
    """
    found = re.fullmatch(r"(.+):(\d*\.?\d+)(?:/(\d+))?", name)
    if found is None:
        return name, 1.0
    share = float(found[2]) / float(found[3] or 1) if found[3] is None or int(found[3]) else 0.0
    if share <= 0:
        raise ValueError(f"data {name!r}: the share after the colon must be above 0")
    return found[1], share


def read_source(name: str, split: str) -> Sequence[Record]:
    """Returns the records of a source as they stand."""
    if name in DATASETS:
        try:
            records: Sequence[Record] = DATASETS[name](split)
        except (KeyError, ValueError) as error:
            raise ValueError(f"data {name!r}: split {split!r}: {error}") from error
        return records
    prefix, _, rest = name.partition(":")
    if rest and prefix in hubs.HUBS:
        return hubs.HUBS[prefix](rest, split)
    path = local_path(name)
    if path is None:
        nearest = difflib.get_close_matches(name, DATASETS, 1)
        hint = f"; did you mean {nearest[0]!r}?" if nearest else ""
        raise ValueError(f"data {name!r}: no such file, and no dataset of this name ({', '.join(DATASETS)}){hint}")
    if hubs.is_saved(path):
        return hubs.read_saved(path, split)
    return [record for file in files_of(path, split) for record in read_file(file)]


def local_path(name: str) -> pathlib.Path | None:
    """Returns the file or folder behind a name, or None where it is none."""
    path = pathlib.Path(split_share(name)[0]).expanduser()
    return path if name not in DATASETS and path.exists() else None


def data_files(name: str) -> list[pathlib.Path]:
    """Returns the local files behind a name, those of all splits."""
    path = local_path(name)
    return sorted(path.rglob("*")) if path is not None and path.is_dir() else [path] if path is not None else []


def renamed(records: Sequence[Record], fields: Sequence[tuple[str, str]], where: str) -> Sequence[Record]:
    """Returns records with columns under the names of fields.

    Raises:
        ValueError: If no record has a column.
    """
    if not fields:
        return records
    columns = {column for record in records for column in record}
    missing = [column for _, column in fields if column not in columns]
    if missing:
        raise ValueError(f"{where}: fields names the columns {missing}; there are {sorted(columns)}")
    field_of = {column: field for field, column in fields}
    hidden = set(field_of.values())  # a column in the place of a field that is renamed
    return [
        {field_of.get(name, name): value for name, value in record.items() if name in field_of or name not in hidden}
        for record in records
    ]


def opening(record: Record) -> str:
    """Returns the first turn of the user, without regard to case and space."""
    turns = next((record[field] for field in ("prompt", "messages") if record.get(field)), "")
    if isinstance(turns, list):
        users = [turn for turn in turns if isinstance(turn, dict) and turn.get("role") == "user"]
        turns = users[0].get("content") if users else ""
    return " ".join(str(turns).casefold().split())


def in_test(record: Record, share: float) -> bool:
    """Says whether a record is held out: a function of how its conversation opens, the same in every file."""
    digest = hashlib.blake2b(opening(record).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") < share * 2**64


def prompt_key(record: Record) -> str:
    """Returns what two records with one prompt have in common."""
    turns = record.get("prompt") or (record.get("messages") or [])[:-1]
    return json.dumps(turns, sort_keys=True, default=str)


def record_key(record: Record) -> str:
    """Returns what two records with one text have in common."""
    texts = [record.get(field) for field in ("messages", "prompt", "response", "response_0", "response_1")]
    return json.dumps(texts, sort_keys=True, default=str)


def without_repeats(records: Sequence[Record], key: Callable[[Record], str]) -> list[Record]:
    """Returns the first record of every key."""
    first: dict[str, Record] = {}
    for record in records:
        first.setdefault(key(record), record)
    return list(first.values())


def take_share(records: list[Record], share: float) -> list[Record]:
    """Returns whole copies and a random rest, the same every time, in the order of the file."""
    copies, rest = divmod(round(share * len(records)), len(records)) if records else (0, 0)
    chosen = np.random.default_rng(0).permutation(len(records))[:rest]
    return records * copies + [records[i] for i in np.sort(chosen)]


def mix(parts: Sequence[list[Record]]) -> list[Record]:
    """Returns the records of a weighted mixture; each says which part it is of."""
    return [record | {PART: i} for i, records in enumerate(parts) for record in records]
