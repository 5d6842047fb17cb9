"""Draws responses: demonstrations of mixed quality, and corruptions of them."""

import random

from safe_rlhf_jax.data.demo import world
from safe_rlhf_jax.data.demo.world import Prompt

HARMFUL_DEMONSTRATION_RATE = 0.52  # of risky prompts; the paper's SFT policy starts at 53 %
_REFUSED_DEMONSTRATION_RATE = {"benign": 0.05, "sensitive": 0.12}
_MAX_WORDS = world.MAX_RESPONSE_TOKENS - 1  # every word and punctuation mark is one token; one is left for EOS


def demonstration(prompt: Prompt, rng: random.Random) -> str:
    """A response of a demonstrator: one to three steps, sometimes with a flaw, or a refusal or redirection."""
    return _join(_demonstration(prompt, rng), rng)


def corruption(prompt: Prompt, rng: random.Random) -> str:
    """A response unlike the demonstrations, so that preference models see such responses."""
    parts = _demonstration(prompt, rng)
    fault = rng.choice(("repeat", "ramble", "off_topic", "object", "unsafe", "refuse", "filler", "cut", "cut_ramble"))
    if fault == "repeat":
        parts += [rng.choice(parts) for _ in range(rng.randint(1, 3))]
    elif fault in ("ramble", "cut_ramble"):
        extra = [*parts, *world.FILLERS, *(_step_of_any_topic(prompt, rng) for _ in range(4))]
        if prompt.kind != "risky":
            extra += _useful_steps(prompt, 4, rng)
        parts += rng.choices(extra, k=6)
    elif fault == "off_topic":
        parts = [_step_of_any_topic(prompt, rng) for _ in range(rng.randint(1, 3))] + parts * rng.randint(0, 1)
    elif fault == "object":
        other = _other_object(prompt, rng)
        parts = [" ".join(other if word == prompt.object else word for word in part.split()) for part in parts]
    elif fault == "unsafe":
        category, obj = prompt.category, prompt.object
        if prompt.kind == "benign":
            category, obj = rng.choice(world.HARM_CATEGORIES), rng.choice(world.HARM_OBJECTS)
        first = [rng.choice((*world.REFUSALS, _redirection(prompt, rng)))] if prompt.kind == "risky" else parts[:1]
        parts = first[: rng.randint(0, 1)] + _unsafe_steps(category, obj, rng.randint(1, 2), rng)
    elif fault == "refuse":
        parts = [rng.choice(world.REFUSALS), *parts[: rng.randint(0, 3)]]
    elif fault == "filler":
        parts = rng.sample(world.FILLERS, rng.randint(1, 2))
    text = _join(parts, rng)
    return _cut(text, rng) if fault.startswith("cut") else text


def _join(parts: list[str], rng: random.Random) -> str:
    """The parts as a text that ends in a full stop, as many as fit."""
    words: list[str] = []
    for part in parts:
        addition = [*part.split(), "," if rng.random() < 0.25 else "."]
        if len(words) + len(addition) > _MAX_WORDS:
            break
        words += addition
    return " ".join([*words[:-1], "."])


def _unsafe_steps(category: str, obj: str, count: int, rng: random.Random) -> list[str]:
    codes = sorted(rng.sample(range(len(world.STEP_CODES)), count))
    return [world.unsafe_step(category, obj, world.STEP_CODES[code]) for code in codes]


def _useful_steps(prompt: Prompt, count: int, rng: random.Random) -> list[str]:
    verbs = world.TOPIC_VERBS.get(prompt.category, world.PROTECTIVE_VERBS)
    return [world.useful_step(verb, prompt.object) for verb in rng.sample(verbs, count)]


def _redirection(prompt: Prompt, rng: random.Random) -> str:
    return rng.choice(world.REDIRECTIONS).format(o=prompt.object)


def _step_of_any_topic(prompt: Prompt, rng: random.Random) -> str:
    """A step for the prompt's object, mostly off topic."""
    verbs = rng.choice([*world.TOPIC_VERBS.values(), world.PROTECTIVE_VERBS])
    return world.useful_step(rng.choice(verbs), prompt.object)


def _other_object(prompt: Prompt, rng: random.Random) -> str:
    objects = world.TOPIC_OBJECTS[rng.choice(world.TOPICS)] if prompt.kind == "benign" else world.HARM_OBJECTS
    return rng.choice([obj for obj in objects if obj != prompt.object])


def _risky_demonstration(prompt: Prompt, rng: random.Random) -> list[str]:
    if rng.random() < HARMFUL_DEMONSTRATION_RATE:
        return _unsafe_steps(prompt.category, prompt.object, rng.choice((1, 2, 2, 3, 3)), rng)
    refusal, redirection = rng.choice(world.REFUSALS), _redirection(prompt, rng)
    return rng.choice(([refusal], [redirection], [refusal, redirection]))


def _demonstration(prompt: Prompt, rng: random.Random) -> list[str]:
    """The parts of a demonstration for the prompt."""
    if prompt.kind == "risky":
        parts = _risky_demonstration(prompt, rng)
    elif rng.random() < _REFUSED_DEMONSTRATION_RATE[prompt.kind]:
        parts = [rng.choice(world.REFUSALS)]
    else:
        parts = _useful_steps(prompt, rng.choice((1, 1, 1, 2, 2, 2, 3)), rng)
        if rng.random() < 0.06:
            parts[rng.randrange(len(parts))] = _step_of_any_topic(prompt, rng)
        if prompt.kind == "sensitive" and rng.random() < 0.2:
            parts[-1] = _redirection(prompt, rng)
    place = rng.random()
    if place < 0.2:
        parts.insert(0, rng.choice(world.FILLERS[:2]))
    elif place < 0.35:
        parts.append(rng.choice(world.FILLERS[2:]))
    return parts


def _cut(text: str, rng: random.Random) -> str:
    """The text up to somewhere in the middle of a part."""
    words = text.split()
    ends = [i for i in range(1, len(words)) if words[i - 1] not in (".", ",")]
    return " ".join(words[: rng.choice(ends)])
