"""Data sets of `datasets` (hub ids and saved folders) and of `tensorflow-datasets`; imported on first use."""

import re
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from safe_rlhf_jax import storage
from safe_rlhf_jax.data.records import Record, one_line
from safe_rlhf_jax.errors import DataError


def read_hub(name: str, split: str) -> Sequence[Record]:
    """Reads `OWNER/NAME[@REVISION][:CONFIG]` from the Hugging Face hub, or its cache.

    Raises:
        DataError: If there is no such data set or split, or it cannot be fetched; names the fix.
    """
    import datasets

    found = re.fullmatch(r"([^@:]+)(?:@([^:]+))?(?::(.+))?", name)
    if found is None:
        raise DataError(f"data 'hf:{name}': write hf:OWNER/NAME[@REVISION][:CONFIG]")
    try:
        table = datasets.load_dataset(found[1], found[3], split=split, revision=found[2])
    except Exception as error:  # of many libraries
        raise DataError(
            f"data 'hf:{name}': split {split!r} cannot be loaded: {one_line(error)}. Check the name, the network and "
            "HF_HUB_OFFLINE; a private data set needs `hf auth login`; a downloaded folder can be named by its path."
        ) from error
    return rows_of(table)


def is_saved(path: storage.Path) -> bool:
    """Says whether a folder was written by `save_to_disk`, one data set or several."""
    return any(
        storage.is_file(path / name) and bool(storage.matching(path, table))
        for name, table in (("state.json", "*.arrow"), ("dataset_dict.json", "*/*.arrow"))
    )


def read_saved(path: storage.Path, split: str) -> Sequence[Record]:
    """Reads a folder written by `save_to_disk` of a data set, or of a dictionary of splits.

    Raises:
        DataError: If it cannot be read, or has no such split.
    """
    import datasets

    try:
        table = datasets.load_from_disk(str(path))  # of a URI too
    except Exception as error:
        raise DataError(f"data {path}: cannot be loaded: {one_line(error)}") from error
    splits = table if isinstance(table, datasets.DatasetDict) else {"train": table}
    if split not in splits:
        raise DataError(f"data {path}: split {split!r}: the folder has {', '.join(splits)}")
    return rows_of(splits[split])


def rows_of(table: Any) -> list[Record]:
    """Returns the rows of a data set, with class names in place of class numbers."""
    import datasets

    rows: list[Record] = table.to_list()
    for column, feature in table.features.items():
        if isinstance(feature, datasets.ClassLabel):
            for row in rows:
                row[column] = name_of_class(feature, row[column])
    return rows


def name_of_class(feature: Any, number: int | None) -> str | None:
    """Returns the name of a class, None if there is none (-1)."""
    return None if number is None or number < 0 else str(feature.int2str(number))


def read_tfds(name: str, split: str) -> Sequence[Record]:
    """Reads a data set of tensorflow-datasets through its `data_source`, which needs no TensorFlow.

    Raises:
        DataError: If the package is missing, or there is no such data set or split.
    """
    try:
        import tensorflow_datasets as tfds
    except ImportError as error:
        raise DataError(f"data 'tfds:{name}': needs tensorflow-datasets: pip install 'safe_rlhf_jax[tfds]'") from error
    try:
        source = tfds.data_source(name, split=split)
    except Exception as error:
        raise DataError(f"data 'tfds:{name}': split {split!r} cannot be loaded: {one_line(error)}") from error
    features = source.dataset_info.features
    return [
        {
            field: name_of_class(features[field], int(value))
            if isinstance(features[field], tfds.features.ClassLabel)
            else plain(value)
            for field, value in source[i].items()
        }
        for i in range(len(source))
    ]


def plain(value: Any) -> Any:
    """Returns text, numbers, lists and dictionaries for the bytes and arrays of tensorflow-datasets."""
    if isinstance(value, dict):
        if value and all(isinstance(column, np.ndarray | list) for column in value.values()):
            # A list of dictionaries arrives as a dictionary of lists.
            rows = zip(*(plain(column) for column in value.values()), strict=True)
            return [dict(zip(value, row, strict=True)) for row in rows]
        return {name: plain(item) for name, item in value.items()}
    if isinstance(value, np.ndarray | np.generic):
        return plain(value.tolist())
    if isinstance(value, bytes):
        return value.decode("utf-8")
    return [plain(item) for item in value] if isinstance(value, list) else value


HUBS: dict[str, Callable[[str, str], Sequence[Record]]] = {"hf": read_hub, "tfds": read_tfds}
