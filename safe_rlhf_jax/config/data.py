"""Schemas of data, and the base of all schemas."""

import re
from collections.abc import Collection
from typing import Annotated, Any, ClassVar, Literal

import pydantic
from pydantic import Field, PositiveFloat, PositiveInt

from safe_rlhf_jax import storage

Share = Annotated[float, Field(ge=0.0, le=1.0)]
STAGE = "stage:"  # before the name of a stage that makes data
Delta = Annotated[float, Field(gt=0.0, lt=1.0)]  # δ: the probability with which a confidence bound may be wrong
TEMPLATE_NAMES = ("plain", "beaver", "alpaca", "tokenizer")


class Schema(pydantic.BaseModel):
    """Frozen; an unknown key is an error, and so is a setting that would change nothing."""

    model_config = pydantic.ConfigDict(frozen=True, extra="forbid", protected_namespaces=(), allow_inf_nan=False)
    refused: ClassVar[dict[str, str]] = {}  # keys that a user might expect here -> why they do not exist
    unhashed: ClassVar[frozenset[str]] = frozenset()  # keys that change no result: a run continues with other values
    # Keys of this class that are younger than finished runs: at its default each means what was done before it existed.
    added: ClassVar[frozenset[str]] = frozenset()

    def without_effect(self) -> frozenset[str]:
        """Returns the keys that change no result, as they are set."""
        fields = type(self).model_fields
        added = frozenset[str]().union(*(vars(schema).get("added", ()) for schema in type(self).__mro__))
        default = {name: fields[name].get_default(call_default_factory=True) for name in added}
        return self.unhashed | {name for name in added if getattr(self, name) == default[name]}

    def idle(self) -> dict[str, str]:
        """Returns {setting, possibly dotted: why it has no effect with the others}."""
        return {}

    @pydantic.model_validator(mode="after")
    def nothing_is_idle(self) -> "Schema":
        """Checks that no given setting is without effect: it would indicate that something else was meant."""
        for path, reason in self.idle().items():
            if is_set(self, path):
                raise ValueError(f"{path} does nothing: {reason}; leave it out")
        return self


def is_set(schema: Schema, path: str) -> bool:
    """Says whether a config gives a setting, by its dotted path; null and an empty mapping do not."""
    here: Any = schema
    for name in path.split("."):
        if name not in here.model_fields_set:
            return False
        here = getattr(here, name)
    return here is not None and here != {}


def written(value: Any, idle: Collection[str] = ()) -> Any:
    """Returns plain data with defaults written out, except settings without effect."""
    if isinstance(value, Schema):
        idle = {*idle, *value.idle()}
        plain = {}
        for name, item in value:
            if name not in idle:
                plain[name] = written(item, [path[len(name) + 1 :] for path in idle if path.startswith(f"{name}.")])
        return plain
    if isinstance(value, dict):
        return {name: written(item) for name, item in value.items()}
    return [written(item) for item in value] if isinstance(value, tuple) else value


class Data(Schema):
    """The source of records (docs/data.md)."""

    # A key of DATASETS, a file or folder, hf:OWNER/NAME[:CONFIG], tfds:NAME, or stage:NAME, the records that an earlier
    # stage makes; `:SHARE` may follow.
    name: str
    split: str = "train"
    test_share: Annotated[float, Field(gt=0.0, lt=1.0)] | None = None  # makes splits train and test, by prompt
    limit: PositiveInt | None = None  # take the first records only
    format: str | None = None  # a key of FORMATS; null: recognised by the columns
    fields: dict[str, str] = {}  # {field: column}: columns with another name
    unique: Literal["record", "prompt"] | None = None  # drop repetitions of an earlier record, or of its prompt
    weight: PositiveFloat | None = None  # in a mixture: share of the rows drawn; null: proportional to the records

    @property
    def maker(self) -> str | None:
        """The stage of the run that makes the records; None if they exist before it."""
        return self.name.split(":")[1] if self.name.startswith(STAGE) else None

    def found_in(self, file: storage.Place) -> "Data":
        """Returns the data of a stage as those of the file that it has written; a share of it stays one."""
        return self.model_copy(update={"name": f"{file}{self.name.removeprefix(f'{STAGE}{self.maker}')}"})


def weights_agree(parts: "Data | tuple[Data, ...]") -> "Data | tuple[Data, ...]":
    """Checks that every part of a mixture has a weight, or none."""
    if len({part.weight is None for part in parts_of(parts)}) > 1:
        raise ValueError("some parts of the mixture have a weight and some have none; give one to each, or to none")
    return parts


def no_weights(parts: Any) -> Any:
    """Checks that data which is read once, from the first record to the last, has no weights."""
    if any(part.weight is not None for part in parts_of(parts)):
        raise ValueError("weight does nothing: every record is read once; leave it out")
    return parts


def parts_of(data: "Data | tuple[Data, ...] | None") -> "tuple[Data, ...]":
    """Returns the parts of a mixture, one for a single data set, none for None."""
    return data if isinstance(data, tuple) else (data,) if data is not None else ()


Parts = Data | Annotated[tuple[Data, ...], Field(min_length=1)]
Mixture = Annotated[Parts, pydantic.AfterValidator(weights_agree)]  # one data set, or several that are mixed
ReadOnce = Annotated[Parts, pydantic.AfterValidator(no_weights)]  # the same, read once
Single = Annotated[Data, pydantic.AfterValidator(no_weights)]  # one data set, read once


def source(name: str) -> str:
    """Returns the source behind a data set's name, without its share and in a canonical spelling."""
    if name.startswith(STAGE):
        return ":".join(name.split(":")[:2])
    bare = re.sub(r":\d*\.?\d+(/\d+)?$", "", name)
    return bare if storage.is_remote(bare) else str(storage.real(storage.expanded(bare)))
