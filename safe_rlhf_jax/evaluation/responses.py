"""Selected prompts of an evaluation, with the responses of every policy."""

import operator
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from safe_rlhf_jax.evaluation.statistics import Sample, asked, kinds_of_prompts, plain, present, select

Policies = Mapping[str, Sequence[Sample]]

PICKED = 4  # of each sort
MOST_PROMPTS = 160  # in the page; the selected ones, and equally many others of each kind, at equal distances
BEST, WORST, CHANGED, UNSAFE = "best", "worst", "most changed", "an unsafe response"

KEY = operator.itemgetter("split", "group", "prompt")


class Answers(NamedTuple):
    """A prompt with the response of each policy."""

    prompt: str
    kind: str  # group, or red team
    category: str
    tags: list[str]
    picked: bool  # worth reading: the best, the worst or the most changed
    responses: dict[str, Sample]


def answers_of(policies: Policies) -> list[Answers]:
    """Prompts with all responses: first the best, the worst and the most changed ones, then others."""
    prompts = asked(policies)
    by_policy = {name: {KEY(s): s for s in reversed(samples)} for name, samples in policies.items()}
    several = len({s["group"] for s in prompts}) > 1
    candidates: dict[Hashable, tuple[str, Sample]] = {}
    for kind, where in kinds_of_prompts(prompts).items():
        found = {
            KEY(s): s for s in sorted(select(prompts, *where), key=lambda s: (str(s.get("category")), s["prompt"]))
        }
        candidates |= {key: (kind, sample) for key, sample in found.items()}
    tags = picked(by_policy, list(candidates))
    chosen = [*tags, *(key for key in spread({k: kind for k, (kind, _) in candidates.items()}) if key not in tags)]
    out = []
    for key in chosen[:MOST_PROMPTS]:
        kind, sample = candidates[key]
        responses = {name: found[key] for name, found in by_policy.items() if key in found}
        unsafe = [UNSAFE] if any(is_unsafe(response) for response in responses.values()) else []
        shown = kind if several or sample["split"] != "test" else ""
        category = plain(str(sample.get("category") or ""))
        why = tags.get(key, [])
        out.append(Answers(sample["prompt"], shown, category, why + unsafe, bool(why), responses))
    return out


def is_unsafe(sample: Sample) -> bool:
    """Says whether a response is harmful by the oracle, or by its cost if there is no oracle."""
    harmful = sample.get("harmful")
    return (sample.get("cost") or 0.0) > 0 if harmful is None else bool(harmful)


def picked(by_policy: Mapping[str, Mapping[Any, Sample]], keys: Sequence[Hashable]) -> dict[Hashable, list[str]]:
    """{prompt: why it is worth reading}: the last policy's best and worst, and the largest changes since the first.

    Reward and cost are measured in standard deviations; better is a higher reward − cost, and a change is the distance
    in both.
    """
    first, last = next(iter(by_policy.values())), list(by_policy.values())[-1]
    place = standardised([s for samples in by_policy.values() for s in samples.values()])
    answered = [key for key in keys if key in last]
    by_value = sorted(answered, key=lambda key: place(last[key])[0] - place(last[key])[1])
    tags: dict[Hashable, list[str]] = {}
    half = max(1, min(PICKED, len(by_value) // 2))
    for key in by_value[::-1][:half]:
        tags.setdefault(key, []).append(BEST)
    for key in [key for key in by_value if key not in tags][:half]:
        tags.setdefault(key, []).append(WORST)
    if len(by_policy) > 1:
        both = [key for key in answered if key in first]
        change = {key: float(np.hypot(*np.subtract(place(last[key]), place(first[key])))) for key in both}
        for key in sorted(both, key=lambda key: -change[key])[:PICKED]:
            tags.setdefault(key, []).append(CHANGED)
    return tags


def standardised(samples: Sequence[Sample]) -> Callable[[Sample], tuple[float, float]]:
    """Returns place(sample): its reward and its cost in standard deviations, 0 where it has none."""
    scale = {key: float(np.std(present(samples, key) or [0.0])) or 1.0 for key in ("reward", "cost")}
    return lambda sample: ((sample.get("reward") or 0.0) / scale["reward"], (sample.get("cost") or 0.0) / scale["cost"])


def spread(kinds: Mapping[Hashable, str]) -> list[Hashable]:
    """Prompts at equal distances in each kind, of all kinds in turn."""
    members: dict[str, list[Hashable]] = {}
    for key, kind in kinds.items():
        members.setdefault(kind, []).append(key)
    out: list[tuple[int, Hashable]] = []
    room = MOST_PROMPTS
    for i, keys in enumerate(sorted(members.values(), key=len)):  # unused places of small kinds go to the large ones
        count = min(len(keys), room // (len(members) - i))
        room -= count
        where = sorted(set(np.linspace(0, len(keys) - 1, count).astype(int).tolist()))
        out += [(turn, keys[j]) for turn, j in enumerate(where)]
    return [key for _, key in sorted(out, key=lambda entry: entry[0])]
