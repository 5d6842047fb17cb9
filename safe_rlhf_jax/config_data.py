"""Schemas of data, and what all schemas share."""

from typing import Annotated, Any, ClassVar, Literal

import pydantic
from pydantic import Field, PositiveFloat, PositiveInt

Share = Annotated[float, Field(ge=0.0, le=1.0)]
TEMPLATE_NAMES = ("plain", "beaver", "alpaca", "tokenizer")


class Schema(pydantic.BaseModel):
    """Frozen, and an unknown key is an error."""

    model_config = pydantic.ConfigDict(frozen=True, extra="forbid", protected_namespaces=(), allow_inf_nan=False)
    refused: ClassVar[dict[str, str]] = {}  # keys that one might expect here -> why there are none
    unhashed: ClassVar[frozenset[str]] = frozenset()  # keys that change no result: a run goes on with other values


class Data(Schema):
    """Where records come from (docs/data.md)."""

    name: str  # a key of DATASETS, a file or folder, hf:OWNER/NAME[:CONFIG] or tfds:NAME; `:SHARE` may follow
    split: str = "train"
    test_share: Annotated[float, Field(gt=0.0, lt=1.0)] | None = None  # makes splits train and test, by prompt
    limit: PositiveInt | None = None  # take the first records only
    format: str | None = None  # a key of FORMATS; null: recognised by the columns
    fields: dict[str, str] = {}  # {field: column}: columns that go by another name
    unique: Literal["record", "prompt"] | None = None  # leave out what repeats an earlier record, or its prompt
    weight: PositiveFloat | None = None  # in a mixture: share of the rows drawn; null: as many as there are records


def weights_agree(parts: "Data | tuple[Data, ...]") -> "Data | tuple[Data, ...]":
    """Either every part of a mixture has a weight, or none."""
    if isinstance(parts, tuple) and len({part.weight is None for part in parts}) > 1:
        raise ValueError("some parts of the mixture have a weight and some have none; give one to each, or to none")
    return parts


Mixture = Annotated[
    Data | Annotated[tuple[Data, ...], Field(min_length=1)], pydantic.AfterValidator(weights_agree)
]  # one data set, or several that are mixed


def parts_of(data: Data | tuple[Data, ...] | None) -> tuple[Data, ...]:
    """Returns the parts of a mixture, one for a single data set, none for None."""
    return data if isinstance(data, tuple) else (data,) if data is not None else ()


def check_held_out(where: str, stage: Any) -> None:
    """Data that one stage trains on and evaluates on is split in one place."""
    for train, test in (("data", "eval_data"), ("prompts", "eval_prompts")):
        for data in parts_of(getattr(stage, train, None)):
            for held_out in parts_of(getattr(stage, test, None)):
                if data.name == held_out.name and data.test_share != held_out.test_share:
                    raise ValueError(
                        f"{where}: {train} and {test} read {data.name!r} with test_share {data.test_share} and "
                        f"{held_out.test_share}; with one test_share no prompt is in both"
                    )
