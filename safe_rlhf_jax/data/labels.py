"""Labels of pairs as arrays: the majority of their annotators, or the share of them; and weights of pairs."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from safe_rlhf_jax.data.records import Record, label_of, number_in, share_of
from safe_rlhf_jax.errors import DataError
from safe_rlhf_jax.types import PreferenceBatch, SafetyBatch, SafetyShares, Sequences

Read = Callable[[Record, str], float]  # (record, label) -> share of annotators for 1; 0 or 1 if it is the majority


def label_reader(*, shares: bool) -> Read:
    """Returns how a label is read: as the share of annotators, or as their majority."""
    return share_of if shares else label_of


def check_weight(record: Record, field: str) -> float:
    """Returns the weight of a record.

    Raises:
        Unusable: If it is no number ≥ 0.
    """
    return number_in(record, field, math.inf, "weight, a number ≥ 0")


def weights_of(records: Sequence[Record], field: str, where: str) -> np.ndarray:
    """Returns the weights of records over their mean, f32[N].

    Raises:
        DataError: If all are 0.
    """
    weights = np.array([check_weight(record, field) for record in records], np.float32)
    if not weights.any():
        raise DataError(f"{where}: {field} is 0 in all records; give some of them a weight")
    return weights / weights.mean()


def preference_batch(
    chosen: Sequences, rejected: Sequences, records: Sequence[Record], weight: Any, *, shares: bool
) -> PreferenceBatch:
    """Returns all pairs with the shares of annotators who prefer the chosen response, if asked for."""
    return PreferenceBatch(
        chosen, rejected, share=agreeing(records, "better_response_id") if shares else None, weight=weight
    )


def safety_batch(
    safer: Sequences, unsafer: Sequences, records: Sequence[Record], weight: Any, *, shares: bool
) -> SafetyBatch:
    """Returns all pairs with the labels of both responses, and the shares of annotators for them, if asked for."""
    read = label_reader(shares=shares)
    first = np.array([int(read(record, "safer_response_id") > 0.5) for record in records])
    safe: Any = np.array([[read(record, f"is_response_{i}_safe") for i in (0, 1)] for record in records], np.float32)
    rows = np.arange(len(first))
    of_safer, of_other = safe[rows, first], safe[rows, 1 - first]
    soft = SafetyShares(agreeing(records, "safer_response_id"), of_safer, of_other) if shares else None
    return SafetyBatch(safer, unsafer, of_safer > 0.5, of_other > 0.5, soft, weight)


def agreeing(records: Sequence[Record], label: str) -> Any:
    """Returns the shares of annotators that agree with their majority, f32[N]; half in a tie."""
    share = np.array([share_of(record, label) for record in records], np.float32)
    return np.maximum(share, 1.0 - share)
