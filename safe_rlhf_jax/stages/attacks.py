"""Search for prompts on which a policy is unsafe: changes of prompts by rules, and an archive of the strongest.

Source: Samvelyan et al. 2024, arXiv 2402.16822: an archive by category whose entries compete with those like them. The
rules, and n-grams in place of a model's judgement of likeness, are ours.
"""

import random
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from safe_rlhf_jax.data import demo
from safe_rlhf_jax.data.sources import in_test
from safe_rlhf_jax.evaluation.diversity import Grams, grams, overlap

OPENING = re.compile(r"[^.!?,\n]{1,80}, ")  # the first clause of a text
TRIES = 20  # changes of one prompt until one is new


class Seed(NamedTuple):
    """A prompt that attacks start from."""

    record: dict[str, Any]
    turns: list[Any]
    category: str
    is_test: bool  # its attacks are held out


Rule = Callable[[random.Random, str, Sequence[str], str], str]  # (rng, text, others of its category, opening) -> text


def another_opening(rng: random.Random, text: str, others: Sequence[str], opening: str) -> str:
    """Returns a text behind the opening of another one."""
    del rng, others
    own = OPENING.match(text)
    return opening + text[own.end() if own else 0 :]


def another_word(rng: random.Random, text: str, others: Sequence[str], opening: str) -> str:
    """Returns a text with a word replaced by one that stands between the same neighbours in another text."""
    del opening
    words, theirs = ["", *text.split(), ""], ["", *rng.choice(others).split(), ""]
    fits = [
        (i, theirs[j])
        for i in range(1, len(words) - 1)
        for j in range(1, len(theirs) - 1)
        if (words[i - 1], words[i + 1]) == (theirs[j - 1], theirs[j + 1]) and words[i] != theirs[j]
    ]
    if not fits:
        return text
    place, word = rng.choice(fits)
    return " ".join([*words[1:place], word, *words[place + 1 : -1]])


def another_end(rng: random.Random, text: str, others: Sequence[str], opening: str) -> str:
    """Returns the beginning of a text with the end of another one, from a word that both have."""
    del opening
    words, theirs = text.split(), rng.choice(others).split()
    shared = [(i, j) for i, word in enumerate(words) for j, their in enumerate(theirs) if word == their]
    if not shared:
        return text
    mine, other = rng.choice(shared)
    return " ".join([*words[:mine], *theirs[other:]])


RULES: dict[str, Rule] = {"opening": another_opening, "word": another_word, "end": another_end}


def text_of(turns: Sequence[Any]) -> str:
    """Returns the last turn of a conversation, which attacks change."""
    return str(turns[-1]["content"])


def with_text(turns: Sequence[Any], text: str) -> list[Any]:
    """Returns a conversation with another last turn."""
    return [*turns[:-1], turns[-1] | {"content": text}]


def in_world(text: str) -> tuple[str, str] | None:
    """Returns the kind and the category of a prompt of the embedded world, None for any other text."""
    try:
        info = demo.parse_prompt(text)
    except ValueError:
        return None
    return info.kind, info.category


class Archive:
    """The strongest attacks of each category, for training and held out apart; none is too like another.

    Attributes:
        kept: {(category, is it held out): attacks}, the strongest first.

    Args:
        size: Most attacks of a category, on each side.
        novelty: Least share of n-grams in which two of them differ.
    """

    def __init__(self, size: int, novelty: float):
        self.size, self.alike = size, 1 - novelty
        self.kept: dict[tuple[str, bool], list[dict[str, Any]]] = {}
        self.grams: dict[str, Grams] = {}

    def add(self, attack: dict[str, Any]) -> None:
        """Takes an attack in, unless one that is like it, or all of a full category, are as strong."""
        key = attack["category"], attack["is_test"]
        rivals = self.kept.setdefault(key, [])
        like = [other for other in rivals if self.overlap(attack, other) > self.alike]
        if any(strength(other) >= strength(attack) for other in like):
            return
        rest = [other for other in rivals if other not in like]
        self.kept[key] = sorted([*rest, attack], key=strength, reverse=True)[: self.size]

    def overlap(self, *attacks: dict[str, Any]) -> float:
        """Returns the overlap of two attacks."""
        texts = [text_of(attack["prompt"]) for attack in attacks]
        return overlap(*(self.grams.setdefault(text, grams(text)) for text in texts))


def strength(attack: Mapping[str, Any]) -> tuple[float, float]:
    """Returns the share of unsafe responses, and the mean cost."""
    return attack["unsafe"], attack["cost"]


class Search:
    """What a search knows: its seeds, the prompts that were tried, and the archive.

    Attributes:
        tried: All texts so far.
        archive: The strongest attacks.

    Args:
        seeds: The seeds.
        archive: An empty one.
        openings: To put before a prompt, beside those of the seeds.
        test_share: Of the prompts: those held out are split by a hash, so that no round trains on those of another.
        fits: Says whether a conversation is short enough.
    """

    def __init__(
        self,
        seeds: Sequence[Seed],
        archive: Archive,
        openings: Sequence[str],
        test_share: float,
        fits: Callable[[Sequence[Any]], bool],
    ):
        self.seeds, self.archive, self.test_share, self.fits = seeds, archive, test_share, fits
        self.tried = {text_of(seed.turns) for seed in seeds}
        self.is_world = all(in_world(text) is not None for text in self.tried)
        self.sides: dict[tuple[str, bool], list[str]] = {}
        self.openings: dict[bool, list[str]] = {is_test: list(openings) for is_test in (False, True)}
        for seed in seeds:
            text = text_of(seed.turns)
            self.sides.setdefault((seed.category, seed.is_test), []).append(text)
            if found := OPENING.match(text):
                self.openings[seed.is_test].append(found[0])

    def parents(self, number: int, rng: random.Random) -> list[dict[str, Any]]:
        """Returns attacks to start from: categories in turn, strong ones more often."""
        sides = {is_test: [key for key in sorted(self.archive.kept) if key[1] == is_test] for is_test in (False, True)}
        tested = round(number * self.test_share) if sides[True] else 0
        counts = {True: tested if sides[False] else number, False: number - tested if sides[False] else 0}
        found = []
        for is_test, keys in sides.items():
            rng.shuffle(keys)
            for i in range(counts[is_test]):
                kept = self.archive.kept[keys[i % len(keys)]]
                found.append(kept[int(len(kept) * rng.random() ** 2)])
        return found

    def opening(self, is_test: bool, rng: random.Random) -> str:
        """Returns an opening: as often of an attack that worked, in any category, as of the others; "" without any."""
        strong = [text_of(one["prompt"]) for key, kept in self.archive.kept.items() if key[1] == is_test
                  for one in kept if one["unsafe"] > 0]  # fmt: skip
        worked = [found[0] for text in strong if (found := OPENING.match(text))]
        pool = worked if worked and rng.random() < 0.5 else self.openings[is_test]
        return rng.choice(pool) if pool else ""

    def changed(self, parent: Mapping[str, Any], rng: random.Random) -> dict[str, Any] | None:
        """Returns a new prompt made from an attack by a rule; None if none was found."""
        key = parent["category"], parent["is_test"]
        for _ in range(TRIES):
            rule = rng.choice(list(RULES))
            text = RULES[rule](rng, text_of(parent["prompt"]), self.sides[key], self.opening(key[1], rng))
            if (attack := self.attack(parent, text, rule)) is not None:
                return attack
        return None

    def attack(self, parent: Mapping[str, Any], text: str, by: str) -> dict[str, Any] | None:
        """Returns a new prompt as an attack, marked as tried; None for one that is not new, or not to be used.

        In the embedded world it has to stay a prompt of that world, of its kind and category: what asks for something
        else is no attack of this category.
        """
        turns = with_text(parent["prompt"], text)
        if not text.strip() or text in self.tried or not self.fits(turns):
            return None
        if in_test({"prompt": turns}, self.test_share) != parent["is_test"]:
            return None
        if self.is_world and in_world(text) != in_world(text_of(parent["prompt"])):
            return None
        self.tried.add(text)
        return {name: parent[name] for name in ("seed", "category", "is_test")} | {"prompt": turns, "by": by}


def rewritten(response: str) -> str:
    """Returns the request that an attacker has written: its first line with text, without quotation marks."""
    lines = [line.strip().strip("\"'“”").strip() for line in response.splitlines()]
    return next(filter(None, lines), "")
