"""Step 1 of the line: records, as lists of dictionaries.

Formats, recognised by their fields:
    supervised   messages: [{role, content}, …], or prompt + response, or Alpaca's instruction (+ input) + output
    preference   prompt, response_0, response_1, better_response_id             (PKU-SafeRLHF)
    safety       … and safer_response_id, is_response_0_safe, is_response_1_safe
    prompts      prompt (further fields may name its group)
"""

import difflib
import functools
import gzip
import json
import pathlib
import zlib
from collections.abc import Callable
from typing import Any

from safe_rlhf_jax.data import demo

Record = dict[str, Any]

DATASETS: dict[str, Callable[[str], Any]] = {  # name -> (split -> records)
    "demo/sft": demo.sft,
    "demo/preference": demo.preference,
    "demo/prompts": demo.prompts,
}


def read_records(name: str, split: str, limit: int | None = None) -> list[Record]:
    """Returns the records of a dataset, or of a local .json, .jsonl or .jsonl.gz file.

    Raises:
        ValueError: If there is no such dataset, split or file, or a line is not JSON; says where.
    """
    return list(read_all(name, split)[:limit])


@functools.lru_cache(maxsize=16)  # stages share datasets
def read_all(name: str, split: str) -> tuple[Record, ...]:
    """Returns all records of `read_records`."""
    if name in DATASETS:
        try:
            records = DATASETS[name](split)
        except (KeyError, ValueError) as error:
            raise ValueError(f"data {name!r}: split {split!r}: {error}") from error
    else:
        path = pathlib.Path(name).expanduser()
        if not path.is_file():
            nearest = difflib.get_close_matches(name, DATASETS, 1)
            hint = f"; did you mean {nearest[0]!r}?" if nearest else ""
            raise ValueError(f"data {name!r}: no such file, and no dataset of this name ({', '.join(DATASETS)}){hint}")
        if split != "train":
            raise ValueError(f"data {name!r}: split {split!r}: a file has no splits; name another file instead")
        records = read_json(path)
    if not records:
        raise ValueError(f"data {name!r}: split {split!r} has no records")
    return tuple(records)


def read_json(path: pathlib.Path) -> list[Record]:
    """Reads a JSON array of objects, or one JSON object per line; gzip by suffix.

    Raises:
        ValueError: If it is neither, with the line.
    """
    try:
        content = path.read_bytes()
        text = (gzip.decompress(content) if path.suffix == ".gz" else content).decode("utf-8-sig")
    except (OSError, EOFError, zlib.error, UnicodeDecodeError) as error:
        raise ValueError(f"data {path}: cannot be read as UTF-8 text: {error}") from error
    if text.lstrip().startswith("["):
        rows = parse(path, text, 1)
        located = list(enumerate(rows, 1))
        unit = "record"
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
