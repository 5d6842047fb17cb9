"""The served policy as the `openai` client sees it."""

import json
import threading
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor

import jax
import numpy as np
import openai
import pytest

from safe_rlhf_jax.data.conversations import encode
from safe_rlhf_jax.endpoints import Endpoint, EndpointError
from safe_rlhf_jax.inference.sampling import Sampling
from safe_rlhf_jax.pipeline import load_policy, load_scorer
from safe_rlhf_jax.types import PromptBatch
from tests.helpers import compilations
from tests.serving.conftest import KEY


@pytest.fixture(scope="module")
def policy(models):
    return load_policy(str(models / "policy"))


def wait_until(condition):
    """Waits for what another thread is about to do."""
    for _ in range(3000):
        if condition():
            return
        time.sleep(0.01)
    raise AssertionError("it never came true")


USER = {"role": "user", "content": "hello"}
LONG = {"role": "user", "content": "hello " * 100}


def error_of(caught):
    return caught.value.body | {"status": caught.value.status_code}


def streamed(chunks):
    """{choice: (text, reason of the end)} and the usage of a stream."""
    texts, reasons, usage = {}, {}, None
    for chunk in chunks:
        usage = chunk.usage or usage
        for choice in chunk.choices:
            texts[choice.index] = texts.get(choice.index, "") + (choice.delta.content or "")
            reasons[choice.index] = choice.finish_reason or reasons.get(choice.index)
    return {i: (text, reasons[i]) for i, text in texts.items()}, usage


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_answer_is_that_of_the_policy_with_the_same_seed(served, policy, temperature):
    given = served.chat("one two three", temperature=temperature, seed=5, max_tokens=12)
    (expected,) = policy(["one two three"], max_tokens=12, temperature=temperature, seed=5)
    assert given.choices[0].message.content == expected
    assert given.choices[0].message.role == "assistant"


def test_a_conversation_with_a_system_turn_and_text_parts_is_read(served, policy):
    turns = [
        {"role": "developer", "content": "be brief"},
        {"role": "user", "content": [{"type": "text", "text": "hel"}, {"type": "text", "text": "lo"}]},
        {"role": "assistant", "content": "yes"},
        {"role": "user", "content": "again"},
    ]
    given = served.client().chat.completions.create(model="policy", messages=turns, temperature=0, max_tokens=8)
    turns[:2] = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "hello"}]
    assert [given.choices[0].message.content] == policy([turns], max_tokens=8, temperature=0)


@pytest.mark.parametrize("temperature", [0.0, 1.3])
def test_streamed_answer_equals_the_whole_one(served, temperature):
    settings = {"temperature": temperature, "seed": 7, "n": 3, "top_p": 0.9}
    whole = served.chat(**settings)
    chunks, usage = streamed(served.chat(**settings, stream=True, stream_options={"include_usage": True}))
    assert chunks == {c.index: (c.message.content, c.finish_reason) for c in whole.choices}
    assert usage == whole.usage
    assert len({c.message.content for c in whole.choices}) == (3 if temperature else 1)


def test_a_stream_begins_before_the_answer_is_complete(served):
    stream, counts = served.engine.stream, []

    def counted(*arguments):
        for chunk in stream(*arguments):
            counts.append(1)
            assert gate.acquire(timeout=60)
            yield chunk

    gate = threading.Semaphore(1)
    served.engine.stream = counted
    try:
        chunks = iter(served.chat(stream=True))
        text = ""
        while not text:
            text = next(chunks).choices[0].delta.content or ""
        assert len(counts) <= 2
    finally:
        gate.release(100)
        served.engine.stream = stream
    list(chunks)
    assert len(counts) == 3


def test_tokens_are_counted_and_the_end_has_its_reason(served, policy):
    cut = served.chat(max_tokens=3)
    assert cut.choices[0].finish_reason == "length"
    assert (cut.usage.completion_tokens, cut.usage.total_tokens) == (3, 3 + cut.usage.prompt_tokens)
    ends = [served.chat(seed=seed, temperature=2) for seed in range(8)]
    reasons = {c.choices[0].finish_reason for c in ends}
    assert {c.usage.completion_tokens == 24 for c in ends if c.choices[0].finish_reason == "length"} <= {True}
    assert reasons <= {"stop", "length"}


def test_an_answer_ends_before_a_stop(served):
    free = served.chat().choices[0].message.content
    stop = free.split()[2]
    at = free.index(stop)
    given = served.chat(stop=[stop, "never said"])
    assert (given.choices[0].message.content, given.choices[0].finish_reason) == (free[:at], "stop")
    assert given.usage.completion_tokens < served.chat().usage.completion_tokens
    assert streamed(served.chat(stop=stop, stream=True))[0] == {0: (free[:at], "stop")}


def test_scores_stand_beside_the_answer(served, models, policy):
    whole = served.chat(n=2, temperature=1, seed=1)
    chunks = [choice for chunk in served.chat(n=2, temperature=1, seed=1, stream=True) for choice in chunk.choices]
    assert {c.index: c.scores for c in whole.choices} == {c.index: c.scores for c in chunks if c.finish_reason}
    turns = [{"role": "user", "content": "hello"}]
    prompts = [np.array([encode(turns, policy.template, policy.tokenizer).ids], np.int32)]
    batch = PromptBatch(*prompts, np.ones_like(*prompts, bool), np.zeros(1, np.int32))
    tokens, mask = policy.generate(policy.variables["params"], batch, jax.random.key(1), 24, Sampling())
    for signal in ("reward", "cost"):
        expected = load_scorer(str(models / signal)).score_answers(policy, turns, [tokens[mask].tolist()])
        assert whole.choices[0].scores[signal] == pytest.approx(expected[0], abs=1e-4)


def test_score_of_an_answer_cut_by_a_stop_is_that_of_its_text(served, models):
    stop = served.chat().choices[0].message.content.split()[2]
    choice = served.chat(stop=stop).choices[0]
    reward = load_scorer(str(models / "reward"))
    assert choice.scores["reward"] == pytest.approx(reward(["hello"], [choice.message.content])[0], abs=1e-4)


def test_an_answer_without_text_has_no_score(served):
    first = served.chat().choices[0].message.content[:1]
    choice = served.chat(stop=first).choices[0]
    assert (choice.message.content, choice.scores) == ("", {"reward": None, "cost": None})


def test_concurrent_requests_are_answered_together_and_each_as_if_alone(served):
    contents = ["hello", "one two three", "four five six seven eight"]
    alone = [served.chat(content).choices[0].message.content for content in contents]
    with served.held() as (calls, go), ThreadPoolExecutor(4) as pool:
        first = pool.submit(served.chat, "first")
        wait_until(lambda: calls == [1])
        others = [pool.submit(served.chat, content) for content in contents[:2]]
        wait_until(lambda: len(served.engine.waiting) == 2)
        go.set()
        together = [other.result().choices[0].message.content for other in others]
        first.result()
    assert calls == [1, 2]
    assert together == alone[:2]
    with served.held() as (calls, go), ThreadPoolExecutor(4) as pool:
        first = pool.submit(served.chat, "first", n=4)
        wait_until(lambda: calls == [4])
        settings = [{"temperature": 0.0, "n": 1}, {"temperature": 1.5, "top_p": 0.7, "n": 3}]
        others = [pool.submit(served.chat, contents[2], **given) for given in settings]
        wait_until(lambda: len(served.engine.waiting) == 2)
        go.set()
        assert others[0].result().choices[0].message.content == alone[2]
        others[1].result()
    assert calls == [4, 4]


def test_nothing_is_compiled_after_the_start(served):
    with compilations() as compiled:
        served.chat("hello there", temperature=0.37, top_p=0.81, seed=9, max_tokens=5, n=2)
        served.chat("hello " * 12, temperature=0.5, n=3, stop="a")
    assert compiled == []


def test_a_full_queue_says_when_to_come_again(served):
    with served.held() as (calls, go), ThreadPoolExecutor(4) as pool:
        running = [pool.submit(served.chat)]
        wait_until(lambda: calls == [1])
        running += [pool.submit(served.chat) for _ in range(2)]
        wait_until(lambda: len(served.engine.waiting) == 2)
        with pytest.raises(openai.RateLimitError) as caught:
            served.chat()
        go.set()
        assert len({future.result().choices[0].message.content for future in running}) == 1
    assert error_of(caught)["code"] == "queue_full"
    assert int(caught.value.response.headers["retry-after"]) >= 1


def test_nothing_is_generated_for_a_client_that_has_gone(served):
    with served.held() as (calls, go), ThreadPoolExecutor(4) as pool:
        first = pool.submit(served.chat)
        wait_until(lambda: calls == [1])
        served.chat(stream=True).close()
        with pytest.raises(openai.APITimeoutError):
            served.client(timeout=0.2).chat.completions.create(model="policy", messages=[USER])
        wait_until(lambda: [job.cancelled for job in served.engine.waiting] == [True, True])
        go.set()
        first.result()
        served.chat()
    assert calls == [1, 1]


def test_a_batch_that_fails_is_an_error_of_the_server_which_goes_on(served):
    stream = served.engine.stream

    def fails(*arguments):
        raise FloatingPointError("of the device")

    served.engine.stream = fails
    try:
        with pytest.raises(openai.InternalServerError) as caught:
            served.chat()
        with pytest.raises(openai.APIError, match="the batch failed"):
            list(served.chat(stream=True))
    finally:
        served.engine.stream = stream
    assert error_of(caught)["code"] == "internal_error"
    assert served.chat().choices


@pytest.mark.parametrize("key", ["wrong", "correct horse battery", "schön"])
def test_a_wrong_key_is_refused(served, key):
    request = urllib.request.Request(f"{served.url}/models", headers={"Authorization": f"Bearer {key}".encode()})
    with pytest.raises(urllib.error.HTTPError) as caught:
        urllib.request.urlopen(request)
    assert caught.value.code == 401
    assert json.load(caught.value)["error"]["code"] == "invalid_api_key"


def test_without_a_key_there_is_only_health(served):
    url = served.url.removesuffix("/v1")
    assert json.load(urllib.request.urlopen(f"{url}/health")) == {"status": "ok", "waiting": 0}
    for path in ("/v1/models", "/v1/models/policy"):
        with pytest.raises(urllib.error.HTTPError, match="401"):
            urllib.request.urlopen(url + path)
    with pytest.raises(openai.AuthenticationError):
        served.client("wrong").chat.completions.create(model="policy", messages=[{"role": "user", "content": "a"}])


def test_models_are_listed(served):
    assert [model.id for model in served.client().models.list()] == ["policy"]
    assert served.client().models.retrieve("policy").owned_by == "safe_rlhf_jax"
    with pytest.raises(openai.NotFoundError, match="here is 'policy' only"):
        served.client().models.retrieve("gpt")


@pytest.mark.parametrize(
    ("fields", "param", "message"),
    [
        ({"messages": [LONG]}, "messages", "tokens, more than the limit of 80"),
        ({"messages": []}, "messages", "[]"),
        ({"messages": [USER, USER]}, "messages", "alternate"),
        ({"messages": [USER, {"role": "assistant", "content": "a"}]}, "messages", "the last turn is from assistant"),
        ({"messages": [{"role": "tool", "content": "a"}]}, "messages", "'tool'"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages", "image_url"),
        ({"messages": [{"role": "user", "content": "\ud800"}]}, "messages", "half a character"),
        ({"max_tokens": 25}, "max_tokens", "25, more than the limit of 24"),
        ({"max_completion_tokens": 99}, "max_completion_tokens", "99, more than the limit of 24"),
        ({"max_tokens": 0}, "max_tokens", "greater than or equal to 1"),
        ({"n": 5}, "n", "5, more than the limit of 4"),
        ({"temperature": 2.5}, "temperature", "2.5: Input should be less than or equal to 2"),
        ({"temperature": "hot"}, "temperature", "'hot'"),
        ({"top_p": 0}, "top_p", "greater than 0"),
        ({"seed": -1}, "seed", "greater than or equal to 0"),
        ({"stop": ["a"] * 5}, "stop", "at most 4"),
        ({"stop": ["a" * 300]}, "stop.0", "at most 256"),
        ({"tools": [{"type": "function"}]}, "tools", "is not supported"),
        ({"logprobs": True}, "logprobs", "is not supported"),
        ({"presence_penalty": 0.5}, "presence_penalty", "0.5: is not supported"),
        ({"response_format": {"type": "json_object"}}, "response_format", "is not supported"),
        ({"top_k": 4}, "top_k", "no such field is supported"),
        ({"\ud800": 4}, "\\ud800", "no such field is supported"),
    ],
)
def test_a_request_that_cannot_be_answered_as_asked_names_the_field(served, fields, param, message):
    body = json.dumps({"model": "policy", "messages": [USER]} | fields).encode()
    with pytest.raises(urllib.error.HTTPError) as caught:
        urllib.request.urlopen(post(served, body))
    error = json.load(caught.value)["error"]
    assert (caught.value.code, error["type"], error["param"]) == (400, "invalid_request_error", param)
    assert message in error["message"]
    assert error["message"].startswith(param) or param in error["message"]


def post(served, body, path="/chat/completions"):
    headers = {"Authorization": f"Bearer {KEY}", "Content-Type": "application/json"}
    return urllib.request.Request(served.url + path, body, headers)


@pytest.mark.parametrize(
    ("body", "path", "status", "message"),
    [
        (b"{", "/chat/completions", 400, "the body is no JSON"),
        (b"[" * 100_000, "/chat/completions", 400, "the body is no JSON"),
        (b"[]", "/chat/completions", 400, "the body is [], no object"),
        (b" " * 2**21, "/chat/completions", 413, "larger than 1048576 bytes"),
        (b'{"model": "other", "messages": [{}]}', "/chat/completions", 404, "here is 'policy' only"),
        (b"{}", "/completions", 404, "/v1/completions"),
    ],
)
def test_other_wrong_requests_are_errors_of_the_same_form(served, body, path, status, message):
    with pytest.raises(urllib.error.HTTPError) as caught:
        urllib.request.urlopen(post(served, body, path))
    assert caught.value.code == status
    assert message in json.load(caught.value)["error"]["message"]


def test_fields_that_change_nothing_are_taken(served):
    given = served.chat(
        user="me", seed=None, frequency_penalty=0, presence_penalty=0.0, logit_bias={}, tools=[], store=False,
        response_format={"type": "text"},
    )  # fmt: skip
    assert given.choices[0].message.content == served.chat().choices[0].message.content


def test_endpoint_client_asks_the_server_and_keeps_its_answers(served, monkeypatch, tmp_path):
    monkeypatch.setenv("SERVED_KEY", KEY)
    endpoint = Endpoint(served.url, "policy", cache=tmp_path, key_env="SERVED_KEY", concurrency=2)
    conversations = [[USER], [{"role": "user", "content": "one two three"}]] * 2
    answers = endpoint.answers(conversations, temperature=0)
    assert answers == [served.chat(turns[0]["content"]).choices[0].message.content for turns in conversations]
    assert (endpoint.usage.requests, endpoint.usage.answers) == (2, 2)
    with pytest.raises(EndpointError, match="max_tokens: 25, more than the limit of 24"):
        endpoint.answers(conversations, max_tokens=25)
    monkeypatch.setenv("SERVED_KEY", "another")
    with pytest.raises(EndpointError, match=r"the key is refused .*SERVED_KEY"):
        Endpoint(served.url, "policy", cache=tmp_path, key_env="SERVED_KEY").answers([[USER]])
    monkeypatch.setenv("SERVED_KEY", KEY)
    with pytest.raises(EndpointError, match=r"here is 'policy' only.*; it has policy"):
        Endpoint(served.url, "gpt", cache=tmp_path, key_env="SERVED_KEY").answers([[USER]])
