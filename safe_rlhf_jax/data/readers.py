"""Step 1 of the line: the records of a file; an unreadable one has the reason and its place."""

import csv
import functools
import gzip
import io
import json
import logging
import re
import sys
import zlib
from collections import Counter
from collections.abc import Sequence
from typing import Any, NamedTuple

from safe_rlhf_jax import storage
from safe_rlhf_jax.data.formats import FORMATS
from safe_rlhf_jax.data.records import (
    RESERVED,
    UNUSABLE,
    Located,
    Record,
    Repeating,
    brief,
    flaw,
    located,
    one_line,
    printable,
)
from safe_rlhf_jax.errors import DataError

LOGGER = logging.getLogger(__name__)
SUFFIXES = (".json", ".jsonl", ".parquet", ".csv")  # each but parquet also with .gz
MAX_SHOWN = 300  # characters shown of an invalid record
SPACE = re.compile(r"[ \t\r\n]*")
SPACED_QUOTE = re.compile(r'[ \t]+"[^"]*"?\s*$')  # a value of a CSV file with a space before the quotes
CONTENTS = {  # first bytes of contents that do not match the file's name
    b"version https://git-lfs": "the pointer of git-lfs, not the file; run `git lfs pull`",
    b"\x1f\x8b": "compressed with gzip; its name must end in .gz",
    b"PK\x03\x04": "a zip archive, or a table of Excel; unpack it, or save it as CSV",
    b"\xd0\xcf\x11\xe0": "a table of Excel; save it as CSV",
    b"BZh": "compressed with bzip2; unpack it",
    b"\xfd7zXZ": "compressed with xz; unpack it",
    b"(\xb5/\xfd": "compressed with zstandard; unpack it",
    b"PAR1": "Parquet; its name must end in .parquet",
}


class NoRecordsError(DataError):
    """A file that is one object and holds no records, such as settings."""


class Problem(NamedTuple):
    """Why a line, a row or an item is no record."""

    reason: str  # reason for the count
    exactly: str  # follows "line 3" in an error
    shown: str = ""  # the contents there


def kind_of(path: storage.Path) -> str:
    """Returns the suffix that selects the reader of a file, or "" if it is no data file."""
    suffixes = [suffix.lower() for suffix in path.suffixes[-2:]]
    packed = suffixes[-1:] == [".gz"]
    kind = suffixes[0] if packed and len(suffixes) > 1 else "".join(suffixes[-1:])
    return kind if kind in SUFFIXES and not (packed and kind == ".parquet") else ""


def read_file(path: storage.Path) -> list[Record]:
    """Returns the records of a .json, .jsonl, .parquet or .csv file; gzip by suffix.

    Raises:
        DataError: If it cannot be read, with the line if there is one, or less than half of it can.
    """
    kind = kind_of(path)
    if not kind:
        raise DataError(f"data {path}: the name ends in none of {', '.join(SUFFIXES)} (or the same with .gz)")
    if kind == ".parquet":
        return read_parquet(path)
    content = read_bytes(path)
    return read_csv(path, content) if kind == ".csv" else read_json(path, content, kind)


def read_bytes(path: storage.Path) -> bytes:
    """Returns the content of a file that may be compressed.

    Raises:
        DataError: If it cannot be read, or its contents do not match its name.
    """
    try:
        content = storage.read_bytes(path)
        content = gzip.decompress(content) if path.suffix.lower() == ".gz" else content
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"data {path}: cannot be read: {error}") from error
    check_contents(path, content)
    encoding = json.detect_encoding(content)
    if not encoding.startswith("utf-8"):
        raise DataError(f"data {path}: this is no UTF-8 text, but perhaps {encoding.upper()}; convert the file")
    return content


def check_contents(path: storage.Path, content: bytes) -> None:
    """Checks that the first bytes of a file match its name.

    Raises:
        DataError: If they do not, with the fix.
    """
    for beginning, kind in CONTENTS.items():
        if content.startswith(beginning):
            raise DataError(f"data {path}: this is {kind}")


def decoded(path: storage.Path, content: bytes) -> str:
    """Returns the text of a file.

    Raises:
        DataError: If it is not UTF-8, with the line.
    """
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content[: error.start].count(b"\n") + 1
        raise DataError(f"data {path}: line {line} is not UTF-8 text: {error.reason}; convert the file") from error


def with_problems(
    path: storage.Path, unit: str, records: list[Located], problems: Sequence[tuple[int, Problem]], *, cut: bool = False
) -> list[Record]:
    """Returns records in order, with a record of the reason in the place of each problem.

    Args:
        path: Of the file.
        unit: Unit of the numbers: line or record.
        records: The readable ones.
        problems: With their numbers.
        cut: True if the file ends with a problem, in the middle of a line.

    Raises:
        DataError: If half of the file, or its end, cannot be read; names the first place.
    """
    if problems and (cut or len(problems) >= len(records)):
        number, problem = problems[-1 if cut else 0]
        end = "; there the file ends, as if it had been cut" if cut else ""
        raise DataError(f"data {path}: {unit} {number}{problem.exactly}{end}")
    source = f"{path}:" if unit == "line" else f"{path} {unit} "
    bad = [Located({unit: p.shown[:MAX_SHOWN], UNUSABLE: p.reason}, source, number) for number, p in problems]
    return [*sorted([*records, *bad], key=lambda record: record.number)]


# --- JSON


def without_repeats(pairs: list[tuple[str, Any]]) -> Record:
    """Returns an object of JSON; marks one with a duplicate key."""
    made = dict(pairs)
    if len(made) == len(pairs):
        return made
    return Repeating(made, next(key for key, count in Counter(key for key, _ in pairs).items() if count > 1))


def whole_number(digits: str) -> float:
    """Returns an integer, or a float if it is too long to be meaningful."""
    return int(digits) if len(digits) < MAX_SHOWN else float(digits)


DECODER = json.JSONDecoder(object_pairs_hook=without_repeats, parse_int=whole_number)


def values_of(text: str) -> list[Any]:
    """Returns the JSON values of a text, one or several in a row.

    Raises:
        json.JSONDecodeError: With the position.
    """
    values, at = [], SPACE.match(text).end()  # type: ignore[union-attr]
    while at < len(text):
        try:
            value, at = DECODER.raw_decode(text, at)
        except RecursionError:
            raise json.JSONDecodeError("Nested too deep", text, at) from None
        values.append(value)
        at = SPACE.match(text, at).end()  # type: ignore[union-attr]
    return values


def problem_of(value: Any) -> Problem | None:
    """Returns why a JSON value is no record, or None."""
    if found := flaw(value):
        return Problem(found, f": {found}")
    if not isinstance(value, dict):
        return Problem("no JSON object", f" is no JSON object: {brief(value)}", brief(value))
    if taken := set(RESERVED) & value.keys():
        reason = f"a column of the reserved name {min(taken)!r}"
        return Problem(reason, f" has {reason}")
    return None


def objects_of(line: bytes) -> list[Record] | Problem:
    """Returns the records of a line, usually one; or why it has none."""
    try:
        text = line.decode("utf-8-sig")
        values = values_of(text)
    except UnicodeDecodeError as error:
        return Problem("no UTF-8 text", f" is not UTF-8 text: {error.reason}; convert the file", ascii(line))
    except json.JSONDecodeError as error:
        return Problem(f"no JSON: {error.msg}", f", column {error.colno} is not JSON: {error.msg}", text)
    problem = next(filter(None, map(problem_of, values)), None)
    return values if problem is None else problem._replace(shown=text)


def read_json(path: storage.Path, content: bytes, kind: str) -> list[Record]:
    """Reads an object per line, or else JSON as a whole."""
    is_list = kind == ".json" and content.lstrip(b"\xef\xbb\xbf \t\r\n").startswith(b"[")
    lines = [] if is_list else content.split(b"\n")
    # Only line feeds end a line: JSON may contain other separators, such as U+2028, unescaped.
    found = [(number, objects_of(line)) for number, line in enumerate(lines, 1) if line.strip()]
    problems = [(number, made) for number, made in found if isinstance(made, Problem)]
    records = [
        Located(record, f"{path}:", number) for number, made in found if isinstance(made, list) for record in made
    ]
    alone = kind == ".json" and len(found) == 1
    if not found or alone or (problems[:1] == found[:1] and len(problems) >= len(records)):
        return read_whole(path, content, kind)
    cut = problems[-1:] == found[-1:] and not content.endswith(b"\n")
    return with_problems(path, "line", records, problems, cut=cut)


def read_whole(path: storage.Path, content: bytes, kind: str) -> list[Record]:
    """Reads JSON as a whole: a list of objects, an object with such a list, or several objects in a row."""
    text = decoded(path, content)
    try:
        values = values_of(text)
    except json.JSONDecodeError as error:
        where = f"line {error.lineno}, column {error.colno}"
        raise DataError(f"data {path}: {where} is not JSON: {error.msg}") from error
    if len(values) == 1 and isinstance(values[0], list):
        values = values[0]
    elif len(values) == 1 and isinstance(values[0], dict) and kind == ".json":
        values = held_by(path, values[0])
    elif any(isinstance(value, list) for value in values):
        wanted = "wanted one list of objects, or an object per line"
        raise DataError(f"data {path}: {len(values)} values, some of them lists; {wanted}")
    numbered = [(number, value, problem_of(value)) for number, value in enumerate(values, 1)]
    records = [Located(value, f"{path} record ", number) for number, value, problem in numbered if problem is None]
    return with_problems(path, "record", records, [(number, p) for number, _, p in numbered if p is not None])


def held_by(path: storage.Path, value: Record) -> list[Any]:
    """Returns the records of a file that is one object: itself, or the list of objects in it.

    Raises:
        DataError: If it is neither, with its keys; `NoRecordsError` if it contains nothing like records.
    """
    if isinstance(value, Repeating):
        raise DataError(f"data {path}: the key {value.key!r} stands twice in an object")
    parts = list(value.values())
    by_column = bool(parts) and (
        all(isinstance(part, dict) for part in parts)
        or all(isinstance(part, list) and not any(isinstance(item, dict) for item in part) for part in parts)
    )
    if not by_column and any(value.keys() >= set(format_.needs) for format_ in FORMATS.values()):
        return [value]
    lists = [
        name
        for name, part in value.items()
        if isinstance(part, list) and part and all(isinstance(item, dict) for item in part)
    ]
    if len(lists) == 1:
        LOGGER.info(printable(f"data {path}: one object; its list {lists[0]!r} is read"))
        return list(value[lists[0]])
    keys = brief(", ".join(value))
    wanted = "a list of objects, or an object per line" + " (orient='records' in pandas)" * by_column
    error = DataError if by_column or lists else NoRecordsError
    raise error(f"data {path}: one object with the keys {keys}; wanted {wanted}")


# --- CSV, Parquet


def read_csv(path: storage.Path, content: bytes) -> list[Record]:
    """Reads comma-separated values with a header; blank values are null."""
    csv.field_size_limit(sys.maxsize)  # texts may be long
    reader = csv.reader(io.StringIO(decoded(path, content), newline=""), strict=True)
    rows: list[tuple[int, list[str]]] = []
    line = 1
    try:
        for row in reader:
            rows += [(line, row)] if any(map(str.strip, row)) else []
            line = reader.line_num + 1
    except csv.Error as error:
        raise DataError(f"data {path}: line {line} is not CSV: {error}") from error
    if not rows:
        return []
    header = column_names(path, rows[0][1])
    if any(value for _, row in rows for name, value in zip(header, row, strict=False) if not name):
        LOGGER.info(printable(f"data {path}: columns without a name are left out"))
    records = []
    problems = []
    for number, row in rows[1:]:
        values = row if any(row[len(header) :]) else row[: len(header)]
        if any(map(SPACED_QUOTE.match, values)):
            wrong = "a quotation mark behind a space"
            problems.append((number, Problem(wrong, f": {wrong}; columns are divided by commas alone", ",".join(row))))
        elif len(values) == len(header):
            fields = {name: value or None for name, value in zip(header, values, strict=True) if name}
            records.append(Located(fields, f"{path}:", number))
        else:
            wrong = f"{len(row)} values under {len(header)} columns"
            problems.append((number, Problem(wrong, f": {wrong} {header}", ",".join(row))))
    cut = bool(problems) and problems[-1][0] == rows[-1][0] and not content.endswith((b"\n", b"\r"))
    return with_problems(path, "line", records, problems, cut=cut)


def column_names(path: storage.Path, header: Sequence[str]) -> list[str]:
    """Returns the names of columns.

    Raises:
        DataError: If two have one name, or one a reserved name, or they are not separated by commas.
    """
    names = [name.strip() for name in header]
    twice = [name for name, count in Counter(filter(None, names)).items() if count > 1]
    if twice:
        raise DataError(f"data {path}: there are two columns {twice[0]!r}; rename or remove one")
    if taken := set(RESERVED) & set(names):
        raise DataError(f"data {path}: there is a column of the reserved name {min(taken)!r}; rename it")
    if len(names) == 1 and re.search(r"[;\t|]", names[0]):
        raise DataError(f"data {path}: one column {names[0]!r}; columns are divided by commas")
    return names


@functools.cache
def pyarrow_parquet() -> Any:
    """Imports the Parquet reader, which takes a while."""
    import pyarrow.parquet

    return pyarrow.parquet


def read_parquet(path: storage.Path) -> list[Record]:
    """Reads a Parquet file."""
    try:
        beginning = storage.read_bytes(path, MAX_SHOWN)
    except OSError as error:
        raise DataError(f"data {path}: cannot be read: {error}") from error
    check_contents(path, beginning.removeprefix(b"PAR1"))
    try:
        with storage.local_copy(path) as file:
            names = pyarrow_parquet().read_schema(file).names
            rows = pyarrow_parquet().read_table(file).to_pylist() if len(set(names)) == len(names) else []
    except Exception as error:  # a damaged file may raise anything
        raise DataError(f"data {path}: cannot be read as Parquet: {one_line(error)}") from error
    column_names(path, names)
    return located(rows, f"{path} row ")
