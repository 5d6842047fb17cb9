"""Chat completions as OpenAI writes them: requests that are checked, answers, chunks and errors as objects.

Settings that would change a result and are not supported are refused, never ignored.
"""

import secrets
import time
from collections.abc import Mapping
from typing import Annotated, Any

import pydantic
from pydantic import Field

from safe_rlhf_jax.data.records import brief

# Fields that change no result.
IGNORED = (
    "user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key", "prompt_cache_retention",
)  # fmt: skip
# Fields that are not supported: their values that ask for nothing, beside null.
NEUTRAL: Mapping[str, tuple[Any, ...]] = {
    "frequency_penalty": (0,),
    "presence_penalty": (0,),
    "logit_bias": ({},),
    "logprobs": (False,),
    "modalities": (["text"],),
    "response_format": ({"type": "text"},),
    "tool_choice": ("none", "auto"),
    "tools": ([],),
    "parallel_tool_calls": (True, False),
    "functions": ([],),
    "function_call": ("none", "auto"),
}
Stop = Annotated[str, Field(min_length=1, max_length=256)]


def several(value: Any) -> Any:
    """Returns one text as a list; any other value unchanged."""
    return [value] if isinstance(value, str) else value


class Refused(Exception):
    """A request that is answered with an error.

    Args:
        status: Of HTTP.
        message: Names the field, the value and the limit.
        param: The field.
        code: OpenAI's word for the error.
        headers: Of the answer.
    """

    def __init__(self, status: int, message: str, *, param: str | None = None, code: str | None = None, **headers: str):
        super().__init__(message)
        self.status, self.param, self.code = status, param, code
        self.headers = {name.replace("_", "-"): value for name, value in headers.items()}

    @property
    def body(self) -> dict[str, Any]:
        """The error object."""
        kinds = {401: "authentication_error", 429: "rate_limit_error", 500: "server_error"}
        kind = kinds.get(self.status, "invalid_request_error")
        param = self.param and self.param.encode(errors="backslashreplace").decode()  # half a character is none
        return {"error": {"message": str(self), "type": kind, "param": param, "code": self.code}}


class StreamOptions(pydantic.BaseModel):
    """Of a streamed answer."""

    include_usage: bool = False
    include_obfuscation: bool = False


class ChatRequest(pydantic.BaseModel):
    """The fields of a request that are supported, with OpenAI's defaults."""

    model_config = pydantic.ConfigDict(strict=True, extra="forbid", frozen=True)

    model: str
    messages: Annotated[list[dict[str, Any]], Field(min_length=1)]
    temperature: Annotated[float, Field(ge=0, le=2)] = 1.0
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    n: Annotated[int, Field(ge=1)] = 1
    seed: Annotated[int, Field(ge=0, lt=2**32)] | None = None
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    stop: Annotated[list[Stop], Field(max_length=4), pydantic.BeforeValidator(several)] = Field(default_factory=list)
    stream: bool = False
    stream_options: StreamOptions = StreamOptions()


def read_request(body: Any) -> ChatRequest:
    """Returns a request.

    Args:
        body: The parsed JSON.

    Raises:
        Refused: If a field is wrong, unknown, or would change the result and is not supported.
    """
    if not isinstance(body, dict):
        raise Refused(400, f"the body is {brief(body)}, no object")
    given = {name: value for name, value in body.items() if value is not None and name not in IGNORED}
    for name in NEUTRAL.keys() & given.keys():
        if (value := given.pop(name)) not in NEUTRAL[name]:
            raise Refused(400, f"{name}: {brief(value)}: is not supported", param=name, code="unsupported_parameter")
    for name in given.keys() - ChatRequest.model_fields.keys():
        raise Refused(400, f"{brief(name)}: no such field is supported", param=name, code="unknown_parameter")
    try:
        return ChatRequest(**given)
    except pydantic.ValidationError as error:
        wrong = error.errors(include_url=False)[0]
        place = ".".join(map(str, wrong["loc"]))
        value = "" if wrong["type"] == "missing" else f"{brief(wrong['input'])}: "
        raise Refused(400, f"{place}: {value}{wrong['msg']}", param=place, code="invalid_value") from error


class Reply:
    """Writes the answer to one request as OpenAI's objects.

    Args:
        model: Its name.
        prompt_tokens: Of the prompt.
    """

    def __init__(self, model: str, prompt_tokens: int):
        self.prompt_tokens = prompt_tokens
        self.head = {"id": f"chatcmpl-{secrets.token_hex(12)}", "created": int(time.time()), "model": model}

    def usage(self, completion_tokens: int) -> dict[str, int]:
        """Returns the counted tokens; those of answers have their end among them."""
        total = self.prompt_tokens + completion_tokens
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": completion_tokens,
            "total_tokens": total,
        }

    def whole(self, choices: list[dict[str, Any]], completion_tokens: int) -> dict[str, Any]:
        """Returns an answer in one piece."""
        usage = self.usage(completion_tokens)
        return self.head | {"object": "chat.completion", "choices": choices, "usage": usage}

    def chunk(self, *choices: dict[str, Any], **more: Any) -> dict[str, Any]:
        """Returns a part of a streamed answer."""
        return self.head | {"object": "chat.completion.chunk", "choices": list(choices)} | more
