"""Repetition of stages in a config: `repeat: {times: 3, stages: […]}` among the stages stands for flat stages.

In names and values `{round}` is the number of the round, from 1, and `{last}` the one before. An item of a list with
`{each}` is repeated for every round so far: `data: [{name: "stage:label_{each}"}]` mixes the labels of all of them.

A stage of rejection sampling is one round. One with `rounds: N`, 3 where it is not given, stands for N of them.
"""

from typing import Any

from safe_rlhf_jax.errors import ConfigError

ROUND, LAST, EACH = "{round}", "{last}", "{each}"
REJECTION, REJECTION_ROUNDS = "rejection_sampling", 3


def expanded(stages: Any) -> Any:
    """Returns the flat stages of a raw config; anything else than a list as it is.

    Raises:
        ConfigError: If a repetition is none, or would make two stages of one name.
    """
    if not isinstance(stages, list):
        return stages
    flat: list[Any] = []
    for i, entry in enumerate(stages):
        flat += rounds_of(entry, f"stages.{i}.repeat") if is_repetition(entry) else [entry]
    return [one for stage in flat for one in rejection_rounds(stage)]


def rejection_rounds(stage: Any) -> list[Any]:
    """Returns the stages of a raw stage of rejection sampling: the last round has its name; any other as it is."""
    if not isinstance(stage, dict) or stage.get("kind") != REJECTION:
        return [stage]
    rounds, name = stage.get("rounds", REJECTION_ROUNDS), stage.get("name")
    if not isinstance(rounds, int) or isinstance(rounds, bool) or rounds < 1:
        raise ConfigError(f"{name}: rounds: a number of rounds, 1 or more (value {rounds!r})")
    if rounds == 1:
        return [stage | {"rounds": 1}]
    names = [*(f"{name}_round_{number}" for number in range(1, rounds)), name]
    starts = [stage.get("init_from"), *names[:-1]]
    return [stage | {"rounds": 1, "name": one, "init_from": start} for one, start in zip(names, starts, strict=True)]


def is_repetition(entry: Any) -> bool:
    """Says whether an entry of the stages is a repetition."""
    return isinstance(entry, dict) and "repeat" in entry


def rounds_of(entry: dict[str, Any], where: str) -> list[Any]:
    """Returns the stages of all rounds of a repetition, one round after the other."""
    repeat = entry["repeat"]
    if set(entry) != {"repeat"} or not isinstance(repeat, dict) or set(repeat) != {"times", "stages"}:
        raise ConfigError(f"{where}: write `- repeat: {{times: 3, stages: […]}}`, with nothing beside")
    times, stages = repeat["times"], repeat["stages"]
    if not isinstance(times, int) or isinstance(times, bool) or times < 1:
        raise ConfigError(f"{where}.times: a number of rounds, 1 or more (value {times!r})")
    if not isinstance(stages, list) or not stages:
        raise ConfigError(f"{where}.stages: a list of stages")
    for i, stage in enumerate(stages):
        if is_repetition(stage):
            raise ConfigError(f"{where}.stages.{i}: a repetition inside a repetition; write its rounds out")
        name = stage.get("name") if isinstance(stage, dict) else None
        if isinstance(name, str) and ROUND not in name:
            raise ConfigError(
                f"{where}.stages.{i}.name {name!r} is the same in every round; put {ROUND} into it: {name}_{ROUND}"
            )
    return [
        in_round(stage, number, f"{where}.stages.{i}")
        for number in range(1, times + 1)
        for i, stage in enumerate(stages)
    ]


def in_round(value: Any, number: int, where: str) -> Any:
    """Returns a raw value as it is in a round."""
    found = of_each(replaced(value, {ROUND: number, LAST: number - 1}), number)
    if holds(found, EACH):
        raise ConfigError(f"{where}: {EACH} stands for several rounds and is right only in an item of a list")
    return found


def of_each(value: Any, number: int) -> Any:
    """Returns a raw value with the items of lists that hold `{each}` repeated for the rounds 1 to `number`."""
    if isinstance(value, dict):
        return {key: of_each(item, number) for key, item in value.items()}
    if not isinstance(value, list):
        return value
    items = [of_each(item, number) for item in value]
    rounds = range(1, number + 1)
    return [
        one for item in items for one in ([replaced(item, {EACH: k}) for k in rounds] if holds(item, EACH) else [item])
    ]


def replaced(value: Any, numbers: dict[str, int]) -> Any:
    """Returns a raw value with every placeholder in its texts replaced; a text that is nothing else is the number."""
    if isinstance(value, dict):
        return {replaced_text(key, numbers): replaced(item, numbers) for key, item in value.items()}
    if isinstance(value, list):
        return [replaced(item, numbers) for item in value]
    return numbers[value] if isinstance(value, str) and value in numbers else replaced_text(value, numbers)


def replaced_text(value: Any, numbers: dict[str, int]) -> Any:
    """Returns a text with every placeholder replaced, and what is no text as it is."""
    for placeholder, number in numbers.items() if isinstance(value, str) else ():
        value = value.replace(placeholder, str(number))
    return value


def holds(value: Any, placeholder: str) -> bool:
    """Says whether a placeholder stands anywhere in a raw value."""
    if isinstance(value, dict):
        return any(holds(item, placeholder) for pair in value.items() for item in pair)
    if isinstance(value, list):
        return any(holds(item, placeholder) for item in value)
    return isinstance(value, str) and placeholder in value
