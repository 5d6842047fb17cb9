"""Results of a stage that are kept batch by batch, a line each, so that a killed run continues with the next batch."""

import json
from typing import Any

from safe_rlhf_jax import storage
from safe_rlhf_jax.processes import barrier, is_main


def kept_batches(path: storage.Path) -> list[Any]:
    """Returns the batches that a killed run has kept; an unfinished last line is dropped, from the file too."""
    if is_main():
        try:
            whole = storage.read_lines(path)
        except FileNotFoundError:
            whole = []
        storage.write_lines(path, whole)
    barrier(f"{path} is whole")
    return [json.loads(line) for line in storage.read_lines(path)]


def keep_batch(path: storage.Path, batch: Any) -> None:
    """Keeps one more batch."""
    if is_main():
        storage.append_lines(path, [json.dumps(batch, ensure_ascii=False)])
