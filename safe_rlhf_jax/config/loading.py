"""Loads a config file, with overrides, as a `RunConfig`, and dumps it."""

from collections.abc import Callable, Collection, Sequence
from typing import Any

import pydantic
import yaml

from safe_rlhf_jax import storage
from safe_rlhf_jax.config.base import StageBase
from safe_rlhf_jax.config.data import written
from safe_rlhf_jax.config.messages import explain_all
from safe_rlhf_jax.config.packaged import config_file
from safe_rlhf_jax.config.repetition import expanded
from safe_rlhf_jax.config.run import RunConfig
from safe_rlhf_jax.errors import ConfigError


def load_config(path: storage.Place, overrides: Sequence[str] = ()) -> RunConfig:
    """Reads a YAML config, applies `dotted.key=value` overrides, and validates the result.

    Args:
        path: The file, or the name of one in the package, such as "quickstart".
        overrides: Such as `stages.1.algorithm.lagrange.lr=0.05`; stages by index in the file or by name, those of a
            round too; values are YAML.

    Returns:
        The config, frozen.

    Raises:
        ConfigError: Names the field, the value and the nearest valid key.
    """
    file = config_file(path)
    try:
        tree = yaml.safe_load(storage.read_text(file))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: not valid YAML: {error}") from error
    if not isinstance(tree, dict):
        raise ConfigError(f"{path}: a config is a mapping of keys, not {type(tree).__name__}")
    of_rounds = [override for override in overrides if not is_written(tree, override)]
    for override in overrides:
        if override not in of_rounds:
            apply_override(tree, override)
    if "stages" in tree:
        tree["stages"] = expanded(tree["stages"])
    for override in of_rounds:
        apply_override(tree, override)
    try:
        return RunConfig.model_validate(tree)
    except pydantic.ValidationError as error:
        raise ConfigError(f"{path}: {explain_all(RunConfig, error.errors())}") from None


def is_written(tree: dict[str, Any], override: str) -> bool:
    """Says whether an override is for what stands in the file, and not for a stage that a repetition makes."""
    first, _, rest = override.partition("=")[0].partition(".")
    stages, name = tree.get("stages"), rest.partition(".")[0]
    if first != "stages" or not rest or not isinstance(stages, list):
        return True
    return name.isdigit() or any(isinstance(stage, dict) and stage.get("name") == name for stage in stages)


def apply_override(tree: dict[str, Any], override: str) -> None:
    """Sets one dotted key in the raw tree.

    Raises:
        ConfigError: If it is not `key=value`, or a path leads nowhere.
    """
    key, equals, text = override.partition("=")
    if not equals:
        raise ConfigError(f"override {override!r}: write dotted.key=value")
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"override {override!r}: the value is not valid YAML: {error}") from error
    node: Any = tree
    *parents, last = key.split(".")
    for part in parents:
        if isinstance(node, list):
            node = node[list_index(node, part, override)]
        elif isinstance(node, dict):
            node = node.setdefault(part, {})
        else:
            raise ConfigError(f"override {override!r}: {part!r} lies below a plain value")
    if isinstance(node, list):
        node[list_index(node, last, override)] = value
    elif isinstance(node, dict):
        node[last] = value
    else:
        raise ConfigError(f"override {override!r}: {last!r} lies below a plain value")


def list_index(items: list[Any], part: str, override: str) -> int:
    """Returns the index of a list entry given as a number or by its `name`."""
    names = [item.get("name") if isinstance(item, dict) else None for item in items]
    if part.isdigit() and int(part) < len(items):
        return int(part)
    if part in names:
        return names.index(part)
    raise ConfigError(f"override {override!r}: {part!r} is neither an index below {len(items)} nor one of {names}")


def dump(run: RunConfig, stage: StageBase, idle: Callable[[Any], Collection[str]] = lambda _: ()) -> str:
    """Returns a YAML config of the run up to this stage; running it again changes nothing.

    Defaults are written out, except settings without effect, which are refused when given.

    Args:
        run: The config.
        stage: The last stage of the returned config.
        idle: stage -> dotted settings that its algorithm does not use.
    """
    stages = run.stages[: [s.name for s in run.stages].index(stage.name) + 1]
    tree = written(run) | {"stages": [written(one, idle(one)) for one in stages]}
    text: str = yaml.safe_dump(tree, sort_keys=False, allow_unicode=True)
    return text
