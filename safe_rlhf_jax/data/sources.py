"""Step 1 of the line: records, as lists of dictionaries.

Formats, recognised by their fields:
    supervised   messages: [{role, content}, …], or prompt + response, or Alpaca's instruction (+ input) + output
    preference   prompt, response_0, response_1, better_response_id             (PKU-SafeRLHF)
    safety       … and safer_response_id, is_response_0_safe, is_response_1_safe
    prompts      prompt (further fields may name its group)
"""

import gzip
import json
import pathlib
from collections.abc import Callable
from typing import Any

from safe_rlhf_jax.data import demo

Record = dict[str, Any]

DATASETS: dict[str, Callable[[str], list[Record]]] = {
    "demo/sft": demo.sft,
    "demo/preference": demo.preference,
    "demo/prompts": demo.prompts,
}


def read_records(name: str, split: str, limit: int | None = None) -> list[Record]:
    """Returns the records of a dataset, or of a local .json, .jsonl or .jsonl.gz file.

    Raises:
        ValueError: If there is no such dataset, split or file, or a line is not JSON; says where.
    """
    if name in DATASETS:
        try:
            records = DATASETS[name](split)
        except (KeyError, ValueError) as error:
            raise ValueError(f"data {name!r}: split {split!r}: {error}") from error
    else:
        path = pathlib.Path(name).expanduser()
        if not path.is_file():
            raise ValueError(f"data {name!r}: no such file, and no dataset of this name ({', '.join(DATASETS)})")
        records = read_json(path)
    if not records:
        raise ValueError(f"data {name!r}: split {split!r} has no records")
    return records[:limit]


def read_json(path: pathlib.Path) -> list[Record]:
    """Reads a JSON array, or one JSON object per line; gzip by suffix."""
    try:
        text = gzip.decompress(path.read_bytes()).decode() if path.suffix == ".gz" else path.read_text("utf-8")
    except (OSError, EOFError, UnicodeDecodeError) as error:
        raise ValueError(f"data {path}: cannot be read as UTF-8 text: {error}") from error
    if text.lstrip().startswith("["):
        records: list[Record] = json.loads(text)
        return records
    records = []
    for number, line in enumerate(text.splitlines(), 1):
        if line.strip():
            try:
                records.append(json.loads(line))
            except json.JSONDecodeError as error:
                raise ValueError(f"data {path}: line {number} is not JSON: {error}") from error
    return records
