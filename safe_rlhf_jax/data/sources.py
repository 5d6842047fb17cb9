"""Step 1 of the line: records, as lists of dictionaries, from files, folders, hubs and the embedded world.

`formats` defines the fields of a record.
"""

import difflib
import functools
import hashlib
import json
import logging
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from safe_rlhf_jax import storage
from safe_rlhf_jax.data import demo, hubs
from safe_rlhf_jax.data.files import files_in, files_of, named
from safe_rlhf_jax.data.formats import FORMATS, other_formats, recognise
from safe_rlhf_jax.data.readers import NoRecordsError, read_file
from safe_rlhf_jax.data.records import PART, UNUSABLE, Record, columns_of, like, located, printable
from safe_rlhf_jax.errors import DataError, UserError

LOGGER = logging.getLogger(__name__)
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
        split: Name of the split.
        limit: Takes the first records only.
        test_share: Creates the splits "train" and "test" by a hash of the prompt: none is on both sides.
        format: A key of `FORMATS`; None recognises it by the columns.
        fields: {field: column} renames columns before anything else; no two columns become one.
        unique: "record" drops records that repeat an earlier one, "prompt" those that repeat its prompt.

    Raises:
        DataError: If there is no such data set, split or file, or it cannot be read; names the place.
    """
    stamps = tuple(map(stamp, data_files(name)))
    records = read_all(name, split, test_share, format, tuple((fields or {}).items()), unique, stamps)
    return list(records[:limit])


def stamp(path: storage.Path) -> tuple[str, int, int, int]:
    """Returns a value that changes when a file does."""
    try:
        return str(path), *storage.status(path)
    except OSError as error:
        raise DataError(f"data {path}: cannot be read: {error}") from error


@functools.lru_cache(maxsize=16)  # stages share data sets
def read_all(
    name: str,
    split: str,
    test_share: float | None,
    format: str | None,
    fields: tuple[tuple[str, str], ...],
    unique: str | None,
    stamps: tuple[tuple[str, int, int, int], ...],
) -> tuple[Record, ...]:
    """Returns all records of `read_records`; `stamps` identify the state of the files."""
    del stamps
    source, share = split_share(name)
    where = f"data {name!r}"
    if test_share is not None and split not in ("train", "test"):
        raise DataError(f"{where}: split {split!r}: with test_share there are 'train' and 'test'")
    found = read_source(source, "train" if test_share is not None else split)
    if not found:
        raise DataError(f"{where}: split {split!r} has no records")
    tables = renamed(found, fields, where)
    records = [record for place, raw in tables.items() for record in in_format(place, raw, format)]
    if test_share is not None:
        records = [record for record in records if in_test(record, test_share) == (split == "test")]
    if unique is not None:
        records = without_repeats(records, prompt_key if unique == "prompt" else record_key)
    records = take_share(records, share)
    if not records:
        raise DataError(f"{where}: split {split!r} has no records left after test_share, unique and share")
    return tuple(records)


def in_format(where: str, raw: Sequence[Record], name: str | None) -> list[Record]:
    """Returns the records of one table in the fields of `formats`; prints a format that was not the only choice."""
    recognised = recognise(raw, name, where)
    others = other_formats(raw, recognised) if name is None else []
    if others:
        said = f"read as {recognised}; the columns also fit {', '.join(others)}: `format` names another"
        LOGGER.info(printable(f"{where}: {said}"))
    return [FORMATS[recognised].read(record) for record in raw]


def split_share(name: str) -> tuple[str, float]:
    """Returns the name without its share, and the share.

    Raises:
        DataError: If the share is not positive.
    """
    found = re.fullmatch(r"(.+):(\d*\.?\d+)(?:/(\d+))?", name)
    if found is None:
        return name, 1.0
    share = float(found[2]) / float(found[3] or 1) if found[3] is None or int(found[3]) else 0.0
    if share <= 0:
        raise DataError(f"data {name!r}: the share after the colon must be above 0")
    return found[1], share


def read_source(name: str, split: str) -> dict[str, Sequence[Record]]:
    """Returns the raw records of a source, by place: of a folder, each file."""
    path = local_path(name)
    if path is not None and not hubs.is_saved(path):
        read = read_files(files_of(path, split))
        empty = [where for where, records in read.items() if not records]
        if empty and len(read) > len(empty):
            LOGGER.info(printable(f"{', '.join(empty)}: no records"))
        return {where: records for where, records in read.items() if records}
    records = located(read_named(name, path, split), f"{name} record ")
    return {f"data {name!r}": records} if records else {}


def read_files(files: Sequence[storage.Path]) -> dict[str, Sequence[Record]]:
    """Returns the records of files by place; among several, a file without records is printed and skipped."""
    read: dict[str, Sequence[Record]] = {}
    for file in files:
        try:
            read[f"data '{file}'"] = read_file(file)
        except NoRecordsError as error:
            if len(files) == 1:
                raise
            LOGGER.info(printable(f"{error}: left out"))
    return read


def read_named(name: str, path: storage.Path | None, split: str) -> Sequence[Record]:
    """Returns the records of a data set that is no file: of `DATASETS`, a hub, or a folder saved by `datasets`."""
    if path is not None:
        if beside := [file for files in files_in(path)[0].values() for file in files]:
            said = f"a folder that `datasets` has saved; left out are {named(path, beside)}"
            LOGGER.info(printable(f"data {path}: {said}"))
        return hubs.read_saved(path, split)
    if name in DATASETS:
        try:
            records: Sequence[Record] = DATASETS[name](split)
        except (KeyError, UserError) as error:
            raise DataError(f"data {name!r}: split {split!r}: {error}") from error
        return records
    prefix, _, rest = name.partition(":")
    if rest and prefix in hubs.HUBS:
        return hubs.HUBS[prefix](rest, split)
    nearest = difflib.get_close_matches(name, DATASETS, 1)
    hint = f"; did you mean {nearest[0]!r}?" if nearest else ""
    raise DataError(f"data {name!r}: no such file, and no dataset of this name ({', '.join(DATASETS)}){hint}")


def demo_tokenizer_warning(tokenizer: str, names: Sequence[str]) -> str | None:
    """Returns a warning if other data is used with the tokenizer of the embedded world, else None.

    Args:
        tokenizer: As named in the config or on the command line.
        names: Of the data sets.
    """
    others = [name for name in names if not name.startswith("demo/")]
    if tokenizer != "demo" or not others:
        return None
    return (
        f"data {others[0]!r} is read with the tokenizer 'demo' of the embedded world: it knows the words of that world,"
        " cuts others into small letters and loses the rest. Lengths and texts are not those of a real model; name the "
        "tokenizer of yours"
    )


def local_path(name: str) -> storage.Path | None:
    """Returns the file or folder behind a name, or None if it is neither."""
    path = storage.expanded(split_share(name)[0])
    return path if name not in DATASETS and (storage.is_file(path) or storage.is_folder(path)) else None


def data_files(name: str) -> list[storage.Path]:
    """Returns the local files behind a name, those of all splits."""
    path = local_path(name)
    if path is None or storage.is_file(path):
        return [path] if path is not None else []
    if hubs.is_saved(path):
        return storage.below(path)
    return sorted(file for files in files_in(path)[0].values() for file in files)


def renamed(
    tables: Mapping[str, Sequence[Record]], fields: Sequence[tuple[str, str]], where: str
) -> Mapping[str, Sequence[Record]]:
    """Returns records with columns renamed to fields.

    Raises:
        DataError: If no record has a column, or two columns would have one name, or one column two.
    """
    if not fields:
        return tables
    column_of = dict(fields)
    field_of = {column: field for field, column in fields}
    columns = set().union(*(columns_of(records) for records in tables.values()))
    if missing := [column for column in field_of if column not in columns]:
        raise DataError(f"{where}: fields names the columns {missing}; there are {sorted(columns)}")
    if len(field_of) < len(fields):
        twice = next(column for column in field_of if list(column_of.values()).count(column) > 1)
        raise DataError(f"{where}: fields reads the column {twice!r} as {[f for f, c in fields if c == twice]}")
    if taken := [field for field, column in fields if field in columns - field_of.keys()]:
        raise DataError(
            f"{where}: fields reads {column_of[taken[0]]!r} as {taken[0]!r}, and there is a column {taken[0]!r}; give "
            f"that another name, such as {{other: {taken[0]}}}"
        )

    def under_fields(record: Record) -> Record:
        hidden = column_of.keys() - field_of.keys()  # empty columns
        return like(record, {field_of.get(name, name): value for name, value in record.items() if name not in hidden})

    return {place: [under_fields(record) for record in records] for place, records in tables.items()}


def opening(record: Record) -> str:
    """Returns the first turn of the user, normalised in case and space."""
    turns = next((record[field] for field in ("prompt", "messages") if record.get(field)), "")
    if isinstance(turns, list):
        users = [turn for turn in turns if isinstance(turn, dict) and turn.get("role") == "user"]
        turns = users[0].get("content") if users else ""
    return " ".join(str(turns).casefold().split())


def in_test(record: Record, share: float) -> bool:
    """Says whether a record is held out: a function of the opening of its conversation, the same in every file."""
    digest = hashlib.blake2b(opening(record).encode(errors="surrogatepass"), digest_size=8).digest()
    return int.from_bytes(digest, "big") < share * 2**64


def prompt_key(record: Record) -> str:
    """Returns a key shared by records with the same prompt."""
    turns, messages = record.get("prompt"), record.get("messages")
    return written(turns or (messages[:-1] if isinstance(messages, list) else messages))


def record_key(record: Record) -> str:
    """Returns a key shared by records with the same text."""
    return written([record.get(field) for field in ("messages", "prompt", "response", "response_0", "response_1")])


def written(value: Any) -> str:
    """Returns a value as text, the same for equal values."""
    return json.dumps(value, sort_keys=True, default=str)


def without_repeats(records: Sequence[Record], key: Callable[[Record], str]) -> list[Record]:
    """Returns the first record of every key, and all unreadable ones, which are counted later."""
    first: dict[str, Record] = {}
    for i, record in enumerate(records):
        first.setdefault(f"unusable {i}" if UNUSABLE in record else key(record), record)
    return list(first.values())


def take_share(records: list[Record], share: float) -> list[Record]:
    """Returns whole copies and a random rest, the same every time, in the order of the file."""
    copies, rest = divmod(round(share * len(records)), len(records)) if records else (0, 0)
    chosen = np.random.default_rng(0).permutation(len(records))[:rest]
    return records * copies + [records[i] for i in np.sort(chosen)]


def mix(parts: Sequence[list[Record]]) -> list[Record]:
    """Returns the records of a weighted mixture, each with its part."""
    return [record | {PART: i} for i, records in enumerate(parts) for record in records]
