"""How different texts are, by the word n-grams that they share; needs no model."""

import math
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from itertools import combinations, pairwise

import numpy as np

ALIKE = 0.5  # overlap from which two texts are in one cluster

Grams = frozenset[tuple[str, ...]]


def grams(text: str) -> Grams:
    """Returns the words of a text and its pairs of neighbours; case and punctuation do not count."""
    words = re.findall(r"\w+", text.casefold())
    return frozenset((*((word,) for word in words), *pairwise(words)))


def overlap(one: Grams, other: Grams) -> float:
    """Returns |A ∩ B| / |A ∪ B| of two texts' n-grams; 1 for two texts without words."""
    whole = len(one | other)
    return len(one & other) / whole if whole else 1.0


def self_similarity(texts: Iterable[str]) -> float:
    """Returns the mean overlap of all pairs of texts: 0 if no two share a word, 1 if all are the same or there is one.

    Args:
        texts: Such as all responses to one prompt.
    """
    found = [overlap(*pair) for pair in combinations(map(grams, texts), 2)]
    return float(np.mean(found)) if found else 1.0


def cluster_sizes(texts: Iterable[str]) -> list[int]:
    """Returns the sizes of clusters of texts: each joins the first whose first text it overlaps with by `ALIKE`."""
    leaders: list[Grams] = []
    members: Counter[int] = Counter()
    for text in map(grams, texts):
        near = (i for i, leader in enumerate(leaders) if overlap(text, leader) >= ALIKE)
        number = next(near, len(leaders))
        leaders += [text] if number == len(leaders) else []
        members[number] += 1
    return list(members.values())


def cluster_entropy(texts: Iterable[str]) -> float:
    """Returns the entropy over clusters of texts, in nats: 0 for one cluster, ln n for n texts that are all apart."""
    sizes = cluster_sizes(texts)
    return sum(-size / sum(sizes) * math.log(size / sum(sizes)) for size in sizes)


def distinct_n(texts: Iterable[str], n: int) -> float:
    """Distinct n-grams over all n-grams of whitespace-separated words; 0 if there are none.

    Source: Li et al., "A diversity-promoting objective function", https://arxiv.org/abs/1510.03055.
    Falls with the number of texts, so compare it only between policies on the same prompts.
    """
    total, distinct = 0, set()
    for text in texts:
        words = text.split()
        grams = [tuple(words[i : i + n]) for i in range(len(words) - n + 1)]
        total += len(grams)
        distinct.update(grams)
    return len(distinct) / total if total else 0.0


def same_opening(texts: Iterable[str], words: int = 2) -> float:
    """Largest share of the texts that begin with the same words, in any case; 0 without texts.

    A policy that has collapsed into one phrase, such as an evasion that no rule of refusals knows, shows here.
    """
    openings = Counter(tuple(text.lower().split(None, words)[:words]) for text in texts)
    return max(openings.values()) / openings.total() if openings else 0.0


def diversity(groups: Sequence[Sequence[str]]) -> dict[str, float]:
    """Returns how different the texts of each group are, averaged over groups of two texts or more.

    Args:
        groups: Such as the responses to each prompt. Compare only groups of as many texts.

    Returns:
        `distinct_1` and `distinct_2` (arXiv 1510.03055), `self_similarity`, `cluster_entropy`; nothing without such
        groups.
    """
    several = [texts for texts in groups if len(texts) > 1]
    measures = {
        "distinct_1": lambda texts: distinct_n(texts, 1),
        "distinct_2": lambda texts: distinct_n(texts, 2),
        "self_similarity": self_similarity,
        "cluster_entropy": cluster_entropy,
    }
    return {name: float(np.mean([of(texts) for texts in several])) for name, of in measures.items() if several}
