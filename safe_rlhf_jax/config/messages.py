"""Validation errors as one clear line each: the key as an override writes it, the value, what is allowed, the fix."""

import difflib
from collections.abc import Iterable, Sequence
from typing import Any, get_args, get_origin

import pydantic


def did_you_mean(word: str, words: Iterable[str], prefix: str = "") -> str:
    """Returns "; did you mean …?" with the nearest of `words`, or nothing if none is near."""
    nearest = difflib.get_close_matches(word, list(words), 1)
    return f"; did you mean {prefix + nearest[0]!r}?" if nearest else ""


def nearest_multiples(rows: int, parts: int) -> str:
    """Returns the multiples of `parts` on both sides of `rows`, in words."""
    low, high = rows // parts * parts, (rows // parts + 1) * parts
    return f"{low} or {high}" if low else str(high)


def nearest_divisors(value: int, parts: int) -> str:
    """Returns the divisors of `value` on both sides of `parts`, in words."""
    divisors = [n for n in range(1, value + 1) if value % n == 0]
    below, above = [n for n in divisors if n <= parts][-1:], [n for n in divisors if n > parts][:1]
    return " or ".join(str(n) for n in (*below, *above))


def explain_all(root: type[pydantic.BaseModel], errors: Sequence[Any]) -> str:
    """Returns one line per offending key of a config with schema `root`."""
    lines: dict[tuple[str, ...], str] = {}
    for error in errors:
        path, owners = follow(root, error["loc"], keep_last=error["type"] == "extra_forbidden")
        line = explain(error, path, owners)
        lines[path] = f"{lines[path]}; or: {error['msg']}" if path in lines else line
    # A union reports one error per member: if a member was recognised, the error inside it is enough.
    return "\n".join(
        line for path, line in lines.items() if not any(p != path and path and p[: len(path)] == path for p in lines)
    )


def explain(error: Any, path: tuple[str, ...], owners: Sequence[type[pydantic.BaseModel]]) -> str:
    """Turns one pydantic error into one line."""
    where, message = ".".join(path) or "config", error["msg"].removeprefix("Value error, ")
    kinds = [kind for owner in owners for kind in kinds_of(owner)]
    if error["type"] == "extra_forbidden":
        reasons = [getattr(owner, "refused", {}).get(path[-1]) for owner in owners]
        if any(reasons):
            return f"{where}: refused (value {error['input']!r}): {next(filter(None, reasons))}"
        keys = sorted({key for owner in owners for key in owner.model_fields})
        hint = did_you_mean(path[-1], keys, prefix="".join(f"{part}." for part in path[:-1]))
        return f"{where}: unknown key (value {error['input']!r}){hint or f'; keys here: {keys}'}"
    if error["type"] == "missing":
        return f"{where}: required, and missing"
    if error["type"] == "union_tag_not_found":
        return f"{where}.kind: required, and missing; one of {', '.join(kinds)}"
    if error["type"] == "union_tag_invalid":
        tag = error["ctx"]["tag"]
        return f"{where}.kind: {tag!r} is none of {', '.join(kinds)}{did_you_mean(tag, kinds)}"
    shown = "" if isinstance(error["input"], dict | tuple | list) else f" (value {error['input']!r})"
    return f"{where}: {message}{shown}" if path else message


def follow(
    root: type[pydantic.BaseModel], location: Sequence[Any], *, keep_last: bool
) -> tuple[tuple[str, ...], list[type[pydantic.BaseModel]]]:
    """Returns the keys of a pydantic location without union tags, and the schemas of the last key's lookup."""
    path, owners, here, of_mapping = [], [root], [root], False
    for i, part in enumerate(location):
        if of_mapping:  # a key that the user has chosen, which may be the name of a field elsewhere
            path.append(str(part))
            owners, of_mapping = here, False
            continue
        annotations = [schema.model_fields[part].annotation for schema in here if part in schema.model_fields]
        if isinstance(part, int):
            path.append(str(part))
            owners = here
        elif annotations:
            path.append(part)
            owners, here = here, [schema for a in annotations for schema in schemas_in(a)]
            of_mapping = any(map(holds_mapping, annotations))
        elif keep_last and i == len(location) - 1:
            path.append(part)
            owners = here
        else:
            here = [schema for schema in here if part in (schema.__name__, *kinds_of(schema))] or here
    return tuple(path), owners


def schemas_in(annotation: Any) -> list[type[pydantic.BaseModel]]:
    """Returns the schemas inside an annotation such as `tuple[A | B, ...] | None`."""
    if isinstance(annotation, type) and issubclass(annotation, pydantic.BaseModel):
        return [annotation]
    return [schema for argument in get_args(annotation) for schema in schemas_in(argument)]


def holds_mapping(annotation: Any) -> bool:
    """Says whether an annotation is a mapping, such as `dict[str, A]`, possibly with validators or None."""
    return get_origin(annotation) is dict or any(map(holds_mapping, get_args(annotation)))


def kinds_of(schema: type[pydantic.BaseModel]) -> tuple[str, ...]:
    """Returns the values that the key `kind` of a schema may have."""
    return get_args(schema.model_fields["kind"].annotation) if "kind" in schema.model_fields else ()
