"""Step 1 of the line, first half: local files as lists of dictionaries; what cannot be read says where."""

import csv
import functools
import gzip
import io
import json
import pathlib
import sys
import zlib
from typing import Any

from safe_rlhf_jax.data.formats import Record

SUFFIXES = (".json", ".jsonl", ".parquet", ".csv")  # each but parquet also with .gz
SPLITS = ("train", "test", "validation", "valid", "val", "dev", "eval")  # what names of files in a folder begin with


def files_of(path: pathlib.Path, split: str) -> list[pathlib.Path]:
    """Returns the data files behind a path: the file itself, or those of a folder that belong to a split.

    A file of a folder belongs to the split that its name begins with (`test-00000-of-00001.parquet`), else to "train".

    Raises:
        ValueError: If a folder has none, or a file is asked for another split than "train".
    """
    if path.is_file():
        if split != "train":
            raise ValueError(
                f"data {path}: split {split!r}: a file has no splits; set test_share, or name another file"
            )
        return [path]
    found = sorted(file for file in path.rglob("*") if file.is_file() and kind_of(file))
    by_split: dict[str, list[pathlib.Path]] = {}
    for file in found:
        named = next((name for name in SPLITS if file.name.lower().startswith(name)), "train")
        by_split.setdefault(named, []).append(file)
    if split not in by_split:
        have = ", ".join(sorted(by_split)) or f"no {', '.join(SUFFIXES)} files"
        raise ValueError(f"data {path}: split {split!r} has no files; the folder has {have}")
    return by_split[split]


def kind_of(path: pathlib.Path) -> str:
    """Returns the suffix that says how a file is read, or "" where it is no data file."""
    suffix = path.with_suffix("").suffix if path.suffix == ".gz" else path.suffix
    return suffix if suffix in SUFFIXES and (suffix, path.suffix) != (".parquet", ".gz") else ""


def read_file(path: pathlib.Path) -> list[Record]:
    """Returns the records of a .json, .jsonl, .parquet or .csv file; gzip by suffix.

    Raises:
        ValueError: If it cannot be read, with the line where there is one.
    """
    kind = kind_of(path)
    if not kind:
        raise ValueError(f"data {path}: the name ends in none of {', '.join(SUFFIXES)} (or the same with .gz)")
    if kind == ".parquet":
        return read_parquet(path)
    text = read_text(path)
    return read_csv(path, text) if kind == ".csv" else read_json(path, text)


def read_text(path: pathlib.Path) -> str:
    """Returns the text of a file that may be compressed."""
    try:
        content = path.read_bytes()
        content = gzip.decompress(content) if path.suffix == ".gz" else content
    except (OSError, EOFError, zlib.error) as error:
        raise ValueError(f"data {path}: cannot be read: {error}") from error
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content[: error.start].count(b"\n") + 1
        raise ValueError(f"data {path}: line {line} is not UTF-8 text: {error.reason}; convert the file") from error


def read_json(path: pathlib.Path, text: str) -> list[Record]:
    """Reads a JSON array of objects, or one JSON object per line."""
    if text.lstrip().startswith("["):
        located, unit = list(enumerate(parse(path, text, 1), 1)), "record"
    else:
        # Only line feeds end a line: JSON may hold other separators, such as U+2028, as they are.
        located = [(n, parse(path, line, n)) for n, line in enumerate(text.split("\n"), 1) if line.strip()]
        unit = "line"
    for number, record in located:
        if not isinstance(record, dict):
            raise ValueError(f"data {path}: {unit} {number} is no JSON object: {str(record)[:80]!r}")
    return [record for _, record in located]


def parse(path: pathlib.Path, text: str, line: int) -> Any:
    """Returns a JSON value that begins on a line of a file."""
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        where = f"line {line + error.lineno - 1}, column {error.colno}"
        raise ValueError(f"data {path}: {where} is not JSON: {error.msg}") from error


def read_csv(path: pathlib.Path, text: str) -> list[Record]:
    """Reads comma-separated values with a header; columns that hold only 0 and 1, or true and false, are labels."""
    csv.field_size_limit(sys.maxsize)  # texts may be long
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    rows: list[list[str]] = []
    header: list[str] | None = None
    try:
        for row in reader:
            if header is None:
                header = row
            elif row and len(row) != len(header):
                raise ValueError(
                    f"data {path}: line {reader.line_num}: {len(row)} values under {len(header)} columns {header}"
                )
            elif row:
                rows.append(row)
    except csv.Error as error:
        raise ValueError(f"data {path}: line {reader.line_num} is not CSV: {error}") from error
    columns = [label_values(list(column)) for column in zip(*rows, strict=True)]
    return [dict(zip(header or [], values, strict=True)) for values in zip(*columns, strict=True)]


def label_values(column: list[str]) -> list[Any]:
    """Returns the labels of a column of labels, the text of any other."""
    for labels in ({"0": 0, "1": 1}, {"true": True, "false": False}):
        if {text.lower() for text in column} <= labels.keys():
            return [labels[text.lower()] for text in column]
    return column


@functools.cache
def pyarrow_parquet() -> Any:
    """Returns the reader of Parquet, which takes a while to import."""
    import pyarrow.parquet

    return pyarrow.parquet


def read_parquet(path: pathlib.Path) -> list[Record]:
    """Reads a Parquet file."""
    import pyarrow

    try:
        records: list[Record] = pyarrow_parquet().read_table(path).to_pylist()
    except (OSError, pyarrow.ArrowException) as error:
        raise ValueError(f"data {path}: cannot be read as Parquet: {error}") from error
    return records
