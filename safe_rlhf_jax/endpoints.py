"""Answers from any OpenAI-compatible endpoint: cached by content, retried, rate limited, counted."""

import dataclasses
import hashlib
import importlib.util
import json
import os
import threading
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from safe_rlhf_jax import storage
from safe_rlhf_jax.errors import ConfigError, FileError, UserError

Messages = Sequence[Mapping[str, Any]]  # [{role, content}, …]
Record = dict[str, Any]  # of an answer in the cache


class EndpointError(UserError):
    """An endpoint that does not answer; the message names it, the reason and the fix."""


@dataclasses.dataclass
class Usage:
    """What the answers took. Tokens and cost are of all answers that were given, whichever run paid for them."""

    requests: int = 0  # sent, those that were retried included
    answers: int = 0  # to different questions
    cached: int = 0  # of these answers
    prompt_tokens: int = 0
    completion_tokens: int = 0
    cost: float = 0.0  # in the currency of the prices


class Pace:
    """Spreads requests evenly over time.

    Args:
        per_minute: Most requests in a minute; None: no limit.
    """

    def __init__(self, per_minute: float | None):
        self.interval = 60 / per_minute if per_minute else 0.0
        self.lock, self.next = threading.Lock(), 0.0

    def wait(self) -> None:
        """Waits until the next request may be sent."""
        with self.lock:
            now = time.monotonic()
            start = max(self.next, now)
            self.next = start + self.interval
        if start > now:
            time.sleep(start - now)


class Endpoint:
    """A model behind an OpenAI-compatible endpoint.

    An answer is kept in a file of its own, named by the model, the messages and the sampling settings (not by the
    address: another server under the same name needs another folder). Whoever asks again gets the same answer; for
    several answers to one question give each its own `seed`.

    Args:
        base_url: Such as `http://127.0.0.1:8000/v1`.
        model: Its name there.
        cache: Folder for the answers.
        key_env: Environment variable with the key; None: the endpoint needs none.
        timeout_s: Of one request, in seconds.
        retries: Further tries after a timeout, a lost connection, 429 or 5xx, after pauses that double or that the
            endpoint asks for.
        requests_per_minute: Most requests in a minute, retries included; None: no limit.
        concurrency: Requests at once.
        price: Of a million tokens of prompts, and of answers.

    Raises:
        ConfigError: If the key is not in the environment, or the package `openai` is missing.
    """

    def __init__(
        self,
        base_url: str,
        model: str,
        *,
        cache: storage.Place,
        key_env: str | None = None,
        timeout_s: float = 60.0,
        retries: int = 4,
        requests_per_minute: float | None = None,
        concurrency: int = 8,
        price: tuple[float, float] = (0.0, 0.0),
    ):
        if importlib.util.find_spec("openai") is None:
            raise ConfigError(f"endpoint {base_url}: needs the package openai: pip install 'safe_rlhf_jax[judge]'")
        if key_env is not None and not os.environ.get(key_env):
            raise ConfigError(
                f"endpoint {base_url}: no key: there is no environment variable {key_env}, or it is empty"
            )
        import openai

        self.base_url, self.model, self.key_env, self.price = base_url, model, key_env, price
        self.cache, self.concurrency, self.retries = storage.path(cache), concurrency, retries
        self.pace, self.lock = Pace(requests_per_minute), threading.Lock()
        self.usage, self.counted = Usage(), set[str]()
        self.client = openai.OpenAI(
            base_url=base_url,
            api_key=os.environ[key_env] if key_env else "none",  # else the client would send OPENAI_API_KEY
            timeout=timeout_s,
            max_retries=retries,
            http_client=openai.DefaultHttpxClient(event_hooks={"request": [self.before_request]}),
        )

    def before_request(self, request: Any) -> None:
        """Counts a request, a retry as well, and waits for its turn."""
        with self.lock:
            self.usage.requests += 1
        self.pace.wait()

    def answers(self, conversations: Sequence[Messages], **sampling: Any) -> list[str]:
        """Returns the answer to each conversation; equal ones are asked once.

        Args:
            conversations: Messages that end with the user.
            **sampling: Fields of the request: `temperature`, `max_tokens`, `seed`, ….

        Raises:
            EndpointError: If the endpoint fails; the answers so far are in the cache.
            FileError: If a file of the cache holds no answer.
        """
        requests = [{"model": self.model, "messages": list(messages)} | sampling for messages in conversations]
        names = [digest(request) for request in requests]
        found = {name: kept for name in dict.fromkeys(names) if (kept := self.kept(name)) is not None}
        for name, record in found.items():
            self.count(name, record, cached=True)
        missing = {name: request for name, request in zip(names, requests, strict=True) if name not in found}
        failures: list[BaseException] = []  # after the first, nothing more is sent

        def ask(name: str) -> None:
            if not failures:
                try:
                    found[name] = self.ask(name, missing[name])
                except Exception as error:
                    failures.append(error)

        with ThreadPoolExecutor(self.concurrency) as pool:  # at its end all that was sent is in the cache
            try:
                list(pool.map(ask, missing))
            except BaseException as interrupt:
                failures.append(interrupt)
                raise
        if failures:
            progress = f"{len(found)} of {len(set(names))} answers are in {self.cache}"
            raise self.explained(failures[0], progress) from failures[0]
        return [found[name]["answer"] for name in names]

    def ask(self, name: str, request: dict[str, Any]) -> Record:
        """Asks the endpoint once; returns the answer's record, which is in the cache by then."""
        completion = self.client.chat.completions.create(**request)
        choices = getattr(completion, "choices", None)  # a page that is no JSON is returned as text
        if not choices:
            raise EndpointError(
                f"endpoint {self.base_url}: its answer is no chat completion; does the address end in /v1?"
            )
        record = {
            "request": request,
            "answer": choices[0].message.content or "",
            "finish_reason": choices[0].finish_reason,
            "prompt_tokens": completion.usage.prompt_tokens if completion.usage else 0,
            "completion_tokens": completion.usage.completion_tokens if completion.usage else 0,
        }
        storage.write(self.file(name), json.dumps(record, indent=1))
        self.count(name, record, cached=False)
        return record

    def count(self, name: str, record: Record, *, cached: bool) -> None:
        """Adds an answer to the usage, once."""
        with self.lock:
            if name in self.counted:
                return
            self.counted.add(name)
            usage, tokens = self.usage, (record["prompt_tokens"], record["completion_tokens"])
            usage.answers += 1
            usage.cached += cached
            usage.prompt_tokens += tokens[0]
            usage.completion_tokens += tokens[1]
            usage.cost += sum(price * number / 1e6 for price, number in zip(self.price, tokens, strict=True))

    def file(self, name: str) -> storage.Path:
        """Returns the file of an answer."""
        return self.cache / f"{name}.json"

    def kept(self, name: str) -> Record | None:
        """Returns an answer's record from the cache, None if it is not there.

        Raises:
            FileError: If the file holds something else.
        """
        file = self.file(name)
        if not storage.is_file(file):
            return None
        try:
            record: Record = json.loads(storage.read_text(file))
            if isinstance(record["answer"], str) and record["prompt_tokens"] + record["completion_tokens"] >= 0:
                return record
        except (ValueError, KeyError, TypeError):
            pass
        raise FileError(f"{file}: holds no answer; remove it, and the endpoint is asked again")

    def explained(self, error: BaseException, progress: str) -> BaseException:
        """Returns an error of the client as one line that says what to do; any other error unchanged."""
        import openai

        tries = f"{self.retries + 1} tries" if self.retries else "one try"
        said = " ".join(str(getattr(error, "message", error)).split())[:300]
        match error:
            case openai.APITimeoutError():
                text = f"no answer in time in {tries}; raise timeout_s ({self.client.timeout} s), or lower concurrency"
            case openai.APIConnectionError():
                text = f"cannot be reached in {tries} ({error.__cause__ or said}): is it running?"
            case openai.AuthenticationError() | openai.PermissionDeniedError():
                fix = (
                    f"check the environment variable {self.key_env}" if self.key_env else "name its variable by key_env"
                )
                text = f"the key is refused ({said}); {fix}"
            case openai.NotFoundError():
                text = f"no model {self.model!r}, or no such address ({said}){self.offered()}"
            case openai.RateLimitError():
                text = f"still too many requests in {tries} ({said}); lower requests_per_minute or concurrency"
            case openai.APIStatusError():
                text = f"status {error.status_code} ({said})"
            case _:
                return error
        return EndpointError(f"endpoint {self.base_url}: {text}; {progress}")

    def offered(self) -> str:
        """Returns the models that the endpoint has, for an error."""
        import openai

        try:
            return f"; it has {', '.join(sorted(model.id for model in self.client.models.list())[:20])}"
        except openai.OpenAIError:
            return ""


def digest(request: Mapping[str, Any]) -> str:
    """Returns the name of a request: a hash of its contents."""
    return hashlib.sha256(json.dumps(request, sort_keys=True).encode()).hexdigest()
