"""Reliability of a preference model: its measurements on held-out pairs, and reasons not to build on it.

*Accuracy* is the share of pairs whose preferred response gets the higher reward, or the lower cost. A tie counts one
half, as a coin would. Every accuracy is {rate, low, high, n} with the ends of its 95 % Wilson interval.
"""

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from safe_rlhf_jax.data.records import SHARES, VOTES, Record
from safe_rlhf_jax.evaluation.statistics import largest, share_of, win_rate, wins

Health = dict[str, Any]

BINS = 5  # with as many pairs in each
KINDS_OF_PAIRS = ("unanimous", "split")  # by their annotators
MOST_FIELDS = 8
MOST_VALUES = 12  # of a field; the rarest are grouped
MOST_CHARACTERS = 60  # of a value; longer ones are texts
# Fields that make up a record and define no kinds of records.
OWN_FIELDS = {
    "prompt", "response", "response_0", "response_1", "better_response_id", "safer_response_id", "is_safe",
    "is_response_0_safe", "is_response_1_safe",
}  # fmt: skip

FEW_PAIRS = 100  # below, accuracy is known to no better than ± 10 points
NEARLY_ALL = 0.9  # agreement with a rule above which the rule explains the model
SIGNS = {
    "safe": ("below", "safe responses count as harm, and a cost limit asks for something else than safety"),
    "unsafe": ("above", "unsafe responses pass for safe, and a cost limit lets them through"),
}


def pairs_health(
    preferred: np.ndarray,
    other: np.ndarray,
    lengths: tuple[np.ndarray, np.ndarray],
    records: Sequence[Record],
    label: str,
) -> Health:
    """Measures a model's ranking of held-out pairs.

    Args:
        preferred: f[n], the model's reward, or negated cost, of the response that the label prefers.
        other: f[n], the same of the other response.
        lengths: i[n] each, tokens of the two responses.
        records: Of the pairs; their fields define the kinds for accuracy by kind. May be empty.
        label: Field of the records that says which response is preferred.

    Returns:
        `accuracy`; `ties`, their share; `by_margin`, accuracy over fifths of the pairs by the margin of the scores,
        and `by_length_difference` by preferred − other, in tokens, each with `from` and `to`; `length_alone` (see
        `length_rule`); `by_field` {field: {value: accuracy}}; with several
        annotators `annotators` (see `annotators_of`).
    """
    right = wins(preferred, other)
    longer_by = lengths[0] - lengths[1]
    found = annotators_of(records, label, right)
    return {
        "accuracy": share_of(right),
        "ties": float(np.mean(preferred == other)),
        "by_margin": by_fifths(np.abs(preferred - other), right),
        "by_length_difference": by_fifths(longer_by, right),
        "length_alone": length_rule(longer_by, preferred - other),
        "by_field": by_field(records, right),
    } | ({"annotators": found} if found else {})


def by_fifths(values: np.ndarray, right: np.ndarray) -> list[dict[str, Any]]:
    """Accuracy over fifths of the pairs, from the least value to the largest; equal values stay together."""
    cuts = np.unique(np.quantile(values, np.arange(1, BINS) / BINS, method="inverted_cdf"))
    which = np.searchsorted(cuts, values)
    members = [which == i for i in range(len(cuts) + 1)]
    return [
        {"from": float(values[m].min()), "to": float(values[m].max())} | share_of(right[m]) for m in members if m.any()
    ]


def length_rule(longer_by: np.ndarray, margin: np.ndarray) -> dict[str, Any]:
    """Measures the accuracy of length as a rule.

    Args:
        longer_by: i[n], tokens of the preferred response − tokens of the other.
        margin: f[n], score of the preferred response − score of the other.

    Returns:
        `rule`, "longer" or "shorter", whichever is right more often, with its accuracy; `agreement`, the share of the
        pairs of different length in which the model agrees with the rule; absent without such pairs.
    """
    nothing = np.zeros_like(longer_by)
    sign = 1 if win_rate(longer_by, nothing)["rate"] >= 0.5 else -1
    out = {"rule": "longer" if sign > 0 else "shorter"} | win_rate(sign * longer_by, nothing)
    differ = longer_by != 0
    if differ.any():
        out["agreement"] = share_of(wins(np.sign(sign * longer_by * margin)[differ], nothing[differ]))
    return out


def by_field(records: Sequence[Record], right: np.ndarray) -> dict[str, dict[str, Any]]:
    """Accuracy by the values of those fields that sort the records into kinds, each value on two pairs or more."""
    rows: dict[str, dict[str, list[int]]] = defaultdict(lambda: defaultdict(list))
    for i, record in enumerate(records):
        for field, values in kinds_of(record).items():
            for value in values:
                rows[field][value].append(i)
    sorting = {
        field: members
        for field, members in rows.items()
        if 2 <= len(members) <= len(records) / 2 and max(map(len, members)) <= MOST_CHARACTERS
    }
    out = {}
    for field, members in list(sorting.items())[:MOST_FIELDS]:
        shown = largest((value for value, where in members.items() for _ in where), MOST_VALUES)
        out[field] = {
            name: share_of(right[sorted({i for value in values for i in members[value]})])
            for name, values in shown.items()
        }
    return out


def kinds_of(record: Record) -> dict[str, set[str]]:
    """The values of a record's further fields: of {category: bool} the true ones; those of both responses together."""
    out: dict[str, set[str]] = defaultdict(set)
    for field, value in record.items():
        name = field.removeprefix("response_0_").removeprefix("response_1_")
        if field in OWN_FIELDS:
            continue
        if isinstance(value, dict):
            out[name] |= {str(kind) for kind, holds in value.items() if holds is True}
        elif isinstance(value, str | int):
            out[name].add(str(value))
    return out


def annotators_of(records: Sequence[Record], label: str, right: np.ndarray) -> dict[str, Any]:
    """Measures the agreement of annotators, and the model's accuracy where they agree and where they do not.

    Args:
        records: Those with two votes or more, or with the share of votes, count.
        label: Field that the annotators decide.
        right: f[n], 1 where the model is right.

    Returns:
        `agreement`: the probability that two annotators of a pair agree, the mean over pairs with votes; accuracy on
        `unanimous` and on `split` pairs. Each is absent where there is no such pair.
    """
    votes = {
        i: Counter(vote for vote in as_list(record.get(VOTES[label])) if vote in (0, 1))
        for i, record in enumerate(records)
    }
    several = {i: count for i, count in votes.items() if count.total() > 1}
    alike = [sum(k * (k - 1) for k in v.values()) / (v.total() * (v.total() - 1)) for v in several.values()]
    shares = {i: record[SHARES[label]] for i, record in enumerate(records) if not votes[i] and SHARES[label] in record}
    split = {i: len(count) == 2 for i, count in several.items()} | {i: 0 < s < 1 for i, s in shares.items()}
    kinds = {name: [i for i, is_split in split.items() if is_split == (name == "split")] for name in KINDS_OF_PAIRS}
    found = {"agreement": share_of(alike)} if alike else {}
    return found | {name: share_of(right[rows]) for name, rows in kinds.items() if rows}


def as_list(value: Any) -> list[Any]:
    """The members of a list, none of anything else."""
    return list(value) if isinstance(value, list | tuple) else []


def sign_health(costs: np.ndarray, is_safe: np.ndarray) -> dict[str, Any]:
    """Measures the sign accuracy of costs on labelled responses; a cost of exactly 0 is wrong.

    Args:
        costs: f[n].
        is_safe: bool[n].

    Returns:
        Sign accuracy of all responses and, where there are any, of those labelled `safe` and `unsafe`; `base_rate`, the
        accuracy of always guessing the commoner label, which is `guess`.
    """
    right = np.where(is_safe, costs < 0, costs > 0)
    classes = {"safe": is_safe, "unsafe": ~is_safe}
    out: dict[str, Any] = {"all": share_of(right)}
    out |= {name: share_of(right[rows]) for name, rows in classes.items() if rows.any()}
    guess = max(classes, key=lambda name: int(classes[name].sum()))
    return out | {"base_rate": {"guess": guess} | share_of(classes[guess])}


def doubts(health: Mapping[str, Any] | None) -> list[str]:
    """Returns reasons not to build on a preference model, each with its meaning and a fix.

    Args:
        health: Of `evaluate_pairs`; None where there were no held-out pairs.
    """
    if health is None:
        return [
            "nothing is known about it, as its stage has no eval_data; hold pairs out (test_share splits a file by "
            "prompt) and give them as eval_data"
        ]
    accuracy, length, sign = health["accuracy"], health["length_alone"], health.get("sign", {})
    notes = []
    if accuracy["n"] < FEW_PAIRS:
        half = 100 * (accuracy["high"] - accuracy["low"]) / 2
        notes.append(
            f"there are only {accuracy['n']} held-out pairs: accuracy is known only to ± {half:.0f} points; hold out "
            f"{FEW_PAIRS} or more"
        )
    if accuracy["high"] < 0.5:
        notes.append(
            f"accuracy is {described(accuracy)}, worse than a coin: it prefers what the labels reject, and a policy "
            "trained on it gets worse; look whether the labels of data or eval_data are turned round"
        )
    elif accuracy["low"] <= 0.5:
        notes.append(
            f"accuracy is {described(accuracy)}, no better than a coin: as far as these pairs can tell it has learned "
            "nothing, and a policy trained on it follows noise; look at its data and its learning rate, or train longer"
        )
    agreement = length.get("agreement", {"rate": 0.0})
    if agreement["rate"] >= NEARLY_ALL and accuracy["low"] <= length["rate"]:
        notes.append(
            f"it chooses the {length['rule']} response in {agreement['rate']:.0%} of {agreement['n']} pairs of "
            f"different length, and its accuracy, {described(accuracy)}, is not above the {length['rate']:.1%} of that "
            f"rule alone: a policy trained on it learns to write {length['rule']} responses; give it data in which "
            "length does not tell which response is better"
        )
    for name, (side, meaning) in SIGNS.items():
        if sign and name not in sign:
            notes.append(
                f"no held-out response is labelled {name}: nothing is known of its sign there, which a cost limit "
                "stands on; hold out responses with both labels"
            )
        elif sign and sign[name]["low"] <= 0.5:
            notes.append(
                f"of {sign[name]['n']} responses labelled {name} it puts {described(sign[name])} {side} 0, no better "
                f"than a coin: {meaning}; look how many responses of each label its data has, or train longer"
            )
    return notes


def rows_of(health: Mapping[str, Any]) -> list[tuple[str, str, Mapping[str, Any]]]:
    """Returns every accuracy of a model's health as (field, value, accuracy)."""
    length, annotators, sign = health["length_alone"], health.get("annotators", {}), health.get("sign", {})
    rows = [
        ("ranking", "all held-out pairs", health["accuracy"]),
        ("ranking", f"by the rule that {length['rule']} is better", length),
    ]
    if "agreement" in length:
        rows.append(("ranking", "chooses as that rule, where lengths differ", length["agreement"]))
    rows += [("by score difference", f"{b['from']:.2f} to {b['to']:.2f}", b) for b in health["by_margin"]]
    rows += [
        ("by length, preferred − other", f"{b['from']:+.0f} to {b['to']:+.0f} tokens", b)
        for b in health["by_length_difference"]
    ]
    for field, values in health["by_field"].items():
        rows += [(f"by {field.replace('_', ' ')}", value.replace("_", " "), share) for value, share in values.items()]
    titles = {"agreement": "agreement of two", "unanimous": "accuracy, all agree", "split": "accuracy, they differ"}
    rows += [("annotators", titles[name], share) for name, share in annotators.items()]
    if sign:
        rows += [("sign", f"responses labelled {name}", sign[name]) for name in SIGNS if name in sign]
        rows += [("sign", "all responses", sign["all"])]
        rows += [("sign", f"always guessing {sign['base_rate']['guess']}", sign["base_rate"])]
    return rows


def described(share: Mapping[str, Any]) -> str:
    """A share with its interval, in words."""
    return f"{share['rate']:.1%} ({share['low']:.1%} to {share['high']:.1%})"
