"""Records of the embedded world: prompts, demonstrations, and preference pairs from simulated annotators.

Every function draws from a fixed seed and returns the same records each time. Annotators know the oracles and err:
they prefer response i with probability σ(scale · (score_i − score_j)), and mislabel a response's safety now and then.
"""

import hashlib
import itertools
import math
import random
from collections.abc import Iterator
from typing import TypedDict

from safe_rlhf_jax.data.demo import world
from safe_rlhf_jax.data.demo.oracle import harm, helpfulness
from safe_rlhf_jax.data.demo.responses import corruption, demonstration
from safe_rlhf_jax.data.demo.world import Kind, Prompt
from safe_rlhf_jax.errors import DataError

# With these scales and this rate, annotators agree with the oracles as `annotator_accuracy` measures: about 85 % on
# helpfulness, 98 % on safe or unsafe.
HELPFULNESS_AGREEMENT_SCALE = 5.0
SAFETY_AGREEMENT_SCALE = 3.0
SAFETY_FLIP_RATE = 0.02

CORRUPTED_RESPONSE_RATE = 0.3  # of preference responses

_SFT_TRAIN_SIZE = 16000
_PREFERENCE_SIZES = {"train": 40000, "test": 2000}


class Message(TypedDict):
    """One turn."""

    role: str
    content: str


class SupervisedRecord(TypedDict):
    """A demonstration."""

    messages: list[Message]
    prompt_source: Kind


class PromptRecord(TypedDict):
    """A prompt with its kind as `prompt_source`, and its benign topic or harm category."""

    prompt: str
    prompt_source: Kind
    category: str


class Annotation(TypedDict):
    """The labels of a pair."""

    better_response_id: int
    safer_response_id: int
    is_response_0_safe: bool
    is_response_1_safe: bool


class PreferenceRecord(TypedDict):
    """The schema of PKU-SafeRLHF; `prompt_source` is the kind of prompt."""

    prompt: str
    response_0: str
    response_1: str
    prompt_source: Kind
    response_0_source: str
    response_1_source: str
    is_response_0_safe: bool
    is_response_1_safe: bool
    response_0_harm_category: dict[str, bool]
    response_1_harm_category: dict[str, bool]
    response_0_severity_level: int
    response_1_severity_level: int
    better_response_id: int
    safer_response_id: int
    response_0_sha256: str
    response_1_sha256: str


def prompts(split: str) -> list[PromptRecord]:
    """All distinct prompts of `train`, `test` or `redteam`, shuffled."""
    return [{"prompt": p.text, "prompt_source": p.kind, "category": p.category} for p in world.build_prompts(split)]


def sft(split: str) -> list[SupervisedRecord]:
    """Demonstrations of mixed quality: harmful on about half of the risky prompts, and seldom the best answer.

    Args:
        split: `train` (16000 records over all training prompts) or `test` (one per test prompt).

    Returns:
        Records of two messages, user and assistant.

    Raises:
        DataError: If the split is neither.
    """
    _check_split(split)
    rng = random.Random(f"sft/{split}")
    pool = world.build_prompts(split)
    size = _SFT_TRAIN_SIZE if split == "train" else len(pool)
    return [
        {
            "messages": [
                {"role": "user", "content": prompt.text},
                {"role": "assistant", "content": demonstration(prompt, rng)},
            ],
            "prompt_source": prompt.kind,
        }
        for prompt in itertools.islice(_endless(pool, rng), size)
    ]


def preference(split: str) -> list[PreferenceRecord]:
    """Pairs of responses, some of them corrupted, labelled by simulated annotators.

    Args:
        split: `train` (40000 records) or `test` (2000).

    Returns:
        Records whose two responses differ in text and in at least one of the oracles. A response labelled unsafe is
        never the safer one of a response labelled safe.

    Raises:
        DataError: If the split is neither.
    """
    _check_split(split)
    rng = random.Random(f"preference/{split}")
    pool = _endless(world.build_prompts(split), rng)
    records: list[PreferenceRecord] = []
    while len(records) < _PREFERENCE_SIZES[split]:
        prompt = next(pool)
        for _ in range(20):
            pair = _response(prompt, rng), _response(prompt, rng)
            if _is_comparable(prompt, pair[0][0], pair[1][0], rng):
                records.append(_annotate(prompt, pair, rng))
                break
    return records


def harm_score(response: str) -> int:
    """Severity of harm, 0 to 3, by which annotators rank safety; between two harmless responses they toss a coin."""
    return harm(response).severity


def annotator_accuracy(records: list[PreferenceRecord]) -> dict[str, float]:
    """Accuracy of the oracles on the labels: the ceiling for a reward or cost model on these records.

    Args:
        records: Preference records of this world.

    Returns:
        `helpfulness_ranking` and `safety_ranking`, the share of pairs where the label follows the oracle's order, a
        pair that the oracle ties counting one half; `safety_sign`, the share of responses whose safe label is right;
        and `helpfulness_ties` and `safety_ties`, the shares of tied pairs.

    Raises:
        ValueError: If there are no records.
    """
    if not records:
        raise ValueError("annotator_accuracy needs at least one record")
    better, safer, sign = [], [], []
    for record in records:
        prompt, pair = record["prompt"], (record["response_0"], record["response_1"])
        help_0, help_1 = (helpfulness(prompt, response) for response in pair)
        harm_0, harm_1 = (harm_score(response) for response in pair)
        better.append(_agreement(help_1 - help_0, record["better_response_id"]))
        safer.append(_agreement(harm_0 - harm_1, record["safer_response_id"]))
        sign += [(harm_0 == 0) == record["is_response_0_safe"], (harm_1 == 0) == record["is_response_1_safe"]]
    return {
        "helpfulness_ranking": sum(better) / len(better),
        "helpfulness_ties": better.count(0.5) / len(better),
        "safety_ranking": sum(safer) / len(safer),
        "safety_ties": safer.count(0.5) / len(safer),
        "safety_sign": sum(sign) / len(sign),
    }


def _check_split(split: str) -> None:
    if split not in ("train", "test"):
        raise DataError(f"split {split!r} is not one of 'train', 'test'")


def _endless(pool: list[Prompt], rng: random.Random) -> Iterator[Prompt]:
    """Cycles through the prompts, reshuffled in every pass."""
    while True:
        yield from rng.sample(pool, len(pool))


def _agreement(margin_1: float, label: int) -> float:
    """1 if the label picks the side with the margin, 0 if the other, one half if there is no margin."""
    return 0.5 if margin_1 == 0 else float((margin_1 > 0) == (label == 1))


def _response(prompt: Prompt, rng: random.Random) -> tuple[str, str]:
    """A response and its source."""
    if rng.random() < CORRUPTED_RESPONSE_RATE:
        return corruption(prompt, rng), "corruption"
    return demonstration(prompt, rng), "demonstration"


def _is_comparable(prompt: Prompt, response_0: str, response_1: str, rng: random.Random) -> bool:
    """Says whether the oracles distinguish the responses; keeps few pairs that only safety distinguishes."""
    if helpfulness(prompt.text, response_0) != helpfulness(prompt.text, response_1):
        return True
    return harm_score(response_0) != harm_score(response_1) and rng.random() < 0.3


def _prefers_1(margin: float, rng: random.Random) -> bool:
    """Bradley-Terry choice: true with probability σ(margin)."""
    return rng.random() < 1 / (1 + math.exp(-margin))


def annotation(prompt: str, responses: tuple[str, str], rng: random.Random, error_rate: float = 0.0) -> Annotation:
    """Labels of a simulated annotator, who knows the oracles and errs.

    Args:
        prompt: A prompt of this world.
        responses: Two texts.
        rng: Of the annotator's choices.
        error_rate: Share of labels that are flipped beside.

    Raises:
        ValueError: If the prompt is no prompt of this world.
    """
    help_margin = helpfulness(prompt, responses[1]) - helpfulness(prompt, responses[0])
    harm_margin = harm_score(responses[0]) - harm_score(responses[1])
    better = _prefers_1(HELPFULNESS_AGREEMENT_SCALE * help_margin, rng)
    safe_0, safe_1 = (harm(text).is_harmful == (rng.random() < SAFETY_FLIP_RATE) for text in responses)
    if error_rate:
        better, safe_0, safe_1 = (label != (rng.random() < error_rate) for label in (better, safe_0, safe_1))
    # The labels of one pair agree with each other: what is labelled safe is safer than what is labelled unsafe.
    safer = safe_1 if safe_0 != safe_1 else _prefers_1(SAFETY_AGREEMENT_SCALE * harm_margin, rng)
    return {
        "better_response_id": int(better),
        "safer_response_id": int(safer),
        "is_response_0_safe": safe_0,
        "is_response_1_safe": safe_1,
    }


def _annotate(prompt: Prompt, pair: tuple[tuple[str, str], tuple[str, str]], rng: random.Random) -> PreferenceRecord:
    (text_0, source_0), (text_1, source_1) = pair
    labels = annotation(prompt.text, (text_0, text_1), rng)
    safe_0, safe_1 = labels["is_response_0_safe"], labels["is_response_1_safe"]
    return {
        "prompt": prompt.text,
        "response_0": text_0,
        "response_1": text_1,
        "prompt_source": prompt.kind,
        "response_0_source": source_0,
        "response_1_source": source_1,
        "is_response_0_safe": safe_0,
        "is_response_1_safe": safe_1,
        "response_0_harm_category": _harm_labels(prompt, text_0, safe_0, rng),
        "response_1_harm_category": _harm_labels(prompt, text_1, safe_1, rng),
        "response_0_severity_level": 0 if safe_0 else max(1, harm(text_0).severity),
        "response_1_severity_level": 0 if safe_1 else max(1, harm(text_1).severity),
        "better_response_id": labels["better_response_id"],
        "safer_response_id": labels["safer_response_id"],
        "response_0_sha256": hashlib.sha256(text_0.encode()).hexdigest(),
        "response_1_sha256": hashlib.sha256(text_1.encode()).hexdigest(),
    }


def _harm_labels(prompt: Prompt, text: str, is_safe: bool, rng: random.Random) -> dict[str, bool]:
    """One flag per category; a response labelled unsafe without naming one gets the prompt's, or any."""
    category = None if is_safe else harm(text, prompt.text).category
    if not is_safe and category is None:
        category = prompt.category if prompt.kind != "benign" else rng.choice(world.HARM_CATEGORIES)
    return {name: name == category for name in world.HARM_CATEGORIES}
