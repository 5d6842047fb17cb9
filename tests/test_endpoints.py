"""Answers from an endpoint: a small one that fails on demand, and our own server."""

import contextlib
import dataclasses
import http.server
import json
import socket
import threading
from types import SimpleNamespace

import pytest

from safe_rlhf_jax import endpoints
from safe_rlhf_jax.endpoints import Endpoint, EndpointError
from safe_rlhf_jax.errors import ConfigError, FileError


def asked(*contents):
    return [[{"role": "user", "content": content}] for content in contents]


class Fake(http.server.ThreadingHTTPServer):
    """Answers each request with its last message in capitals, after the failures that it is told to begin with.

    A failure is a status, or "gone" (the connection closes), or "page" (no JSON).
    """

    daemon_threads = True

    def __init__(self, failures=()):
        super().__init__(("127.0.0.1", 0), Handler)
        self.failures, self.requests, self.keys = list(failures), [], []
        self.url = f"http://127.0.0.1:{self.server_port}/v1"

    def handle_error(self, request, client_address):
        """A client that has gone is none of the test's business."""


class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.answer(200, {"object": "list", "data": [{"id": "small", "object": "model"}]})

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        content = body["messages"][-1]["content"]
        self.server.requests.append(content)
        self.server.keys.append(self.headers["Authorization"])
        failure = self.server.failures.pop(0) if self.server.failures else content if content == "gone" else None
        if failure == "gone":
            self.close_connection = True
        elif failure == "page":
            self.answer(200, "<html>", "text/html")
        elif failure:
            self.answer(failure, {"error": {"message": "not\nnow", "code": None}})
        else:
            message = {"role": "assistant", "content": content.upper()}
            choice = {"index": 0, "message": message, "finish_reason": "stop"}
            usage = {"prompt_tokens": 10, "completion_tokens": 2, "total_tokens": 12}
            head = {"id": "1", "object": "chat.completion", "created": 0, "model": "small"}
            self.answer(200, head | {"choices": [choice], "usage": usage})

    def answer(self, status, content, kind="application/json"):
        body = (content if isinstance(content, str) else json.dumps(content)).encode()
        self.send_response(status)
        for name, value in {"Content-Type": kind, "Content-Length": len(body), "retry-after-ms": 1}.items():
            self.send_header(name, str(value))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *arguments):
        pass


@pytest.fixture
def fake():
    with contextlib.ExitStack() as stack:

        def start(*failures):
            server = stack.enter_context(Fake(failures))
            thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
            thread.start()
            stack.callback(thread.join)
            stack.callback(server.shutdown)
            return server

        yield start


@pytest.fixture
def endpoint(tmp_path):
    def make(server, **settings):
        return Endpoint(
            getattr(server, "url", server), "small", cache=tmp_path / "answers", **({"retries": 2} | settings)
        )

    return make


def test_answers_come_in_the_order_of_the_questions_and_equal_ones_are_asked_once(fake, endpoint):
    server = fake()
    assert endpoint(server).answers(asked("a", "b", "a", "c"), temperature=0) == ["A", "B", "A", "C"]
    assert sorted(server.requests) == ["a", "b", "c"]


def test_a_kept_answer_is_not_asked_for_again(fake, endpoint):
    server = fake()
    endpoint(server).answers(asked("a", "b"), temperature=0.5, seed=1)
    later = endpoint(server)
    assert later.answers(asked("b", "c"), temperature=0.5, seed=1) == ["B", "C"]
    assert sorted(server.requests) == ["a", "b", "c"]
    assert (later.usage.requests, later.usage.answers, later.usage.cached) == (1, 2, 1)


@pytest.mark.parametrize("change", [{"seed": 2}, {"temperature": 1.0}, {"model": "other"}, {"contents": ["b"]}])
def test_another_question_is_asked(fake, endpoint, change):
    server, first = fake(), {"seed": 1, "temperature": 0.5}
    endpoint(server).answers(asked("a"), **first)
    other = endpoint(server)
    other.model = change.get("model", "small")
    other.answers(asked(*change.get("contents", ["a"])), **first | {k: v for k, v in change.items() if k in first})
    assert len(server.requests) == 2


@pytest.mark.parametrize("failures", [(429, 503), (500, 502), ("gone",)])
def test_what_passes_is_retried(fake, endpoint, failures):
    server = fake(*failures)
    maker = endpoint(server)
    assert maker.answers(asked("a")) == ["A"]
    assert len(server.requests) == maker.usage.requests == len(failures) + 1


def test_tokens_and_cost_are_counted_once_whichever_run_paid(fake, endpoint):
    server = fake()
    endpoint(server).answers(asked("a"))
    later = endpoint(server, price=(3.0, 500.0))
    later.answers(asked("a", "b"))
    later.answers(asked("b"))
    used = dataclasses.asdict(later.usage)
    assert used.pop("cost") == pytest.approx((20 * 3 + 4 * 500) / 1e6)
    assert used == {"requests": 1, "answers": 2, "cached": 1, "prompt_tokens": 20, "completion_tokens": 4}


def test_an_endpoint_that_fails_half_way_loses_nothing(fake, endpoint):
    server = fake()
    maker = endpoint(server, concurrency=1, retries=0)
    with pytest.raises(EndpointError, match="2 of 4 answers are in "):
        maker.answers(asked("a", "b", "gone", "c"))
    assert server.requests == ["a", "b", "gone"]
    assert endpoint(server).answers(asked("a", "b", "c")) == ["A", "B", "C"]
    assert server.requests == ["a", "b", "gone", "c"]


@pytest.mark.parametrize(
    ("failures", "settings", "message"),
    [
        ([503] * 3, {}, r"status 503 \(.*not now.*\)"),
        ([429] * 3, {}, r"still too many requests in 3 tries .* lower requests_per_minute"),
        ([401], {"key_env": "KEY"}, r"the key is refused .* check the environment variable KEY"),
        ([401], {}, r"the key is refused .* name its variable by key_env"),
        ([404], {}, r"no model 'small', or no such address .*; it has small"),
        ([400], {}, r"status 400 \(.*not now.*\)"),
        (["page"], {}, r"its answer is no chat completion; does the address end in /v1\?"),
        (["gone"], {"retries": 0}, r"cannot be reached in one try \(.*\): is it running\?"),
    ],
)
def test_an_endpoint_that_cannot_answer_is_one_clear_line(fake, endpoint, monkeypatch, failures, settings, message):
    monkeypatch.setenv("KEY", "secret")
    server = fake(*failures)
    with pytest.raises(EndpointError, match=message) as caught:
        endpoint(server, **settings).answers(asked("a"))
    assert str(caught.value).startswith(f"endpoint {server.url}: ")
    assert "\n" not in str(caught.value)
    assert "secret" not in str(caught.value)
    assert len(server.requests) == len(failures)


def test_an_endpoint_that_is_down_is_one_clear_line(endpoint):
    with pytest.raises(EndpointError, match=r"cannot be reached in one try \(.*refused.*\): is it running\?"):
        endpoint("http://127.0.0.1:9/v1", retries=0).answers(asked("a"))


def test_an_answer_that_takes_too_long_is_named(monkeypatch, endpoint):
    with socket.create_server(("127.0.0.1", 0)) as silent:  # accepts, and says nothing
        slow = endpoint(f"http://127.0.0.1:{silent.getsockname()[1]}/v1", retries=0, timeout_s=0.2)
        with pytest.raises(EndpointError, match=r"no answer in time in one try; raise timeout_s \(0\.2 s\)"):
            slow.answers(asked("a"))


def test_the_key_comes_from_the_variable_that_is_named_and_from_no_other(fake, endpoint, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "of somebody else")
    monkeypatch.setenv("JUDGE_KEY", "ours")
    server = fake()
    endpoint(server).answers(asked("a"))
    endpoint(server, key_env="JUDGE_KEY").answers(asked("b"))
    assert server.keys == ["Bearer none", "Bearer ours"]
    monkeypatch.setenv("JUDGE_KEY", "")
    with pytest.raises(ConfigError, match="no environment variable JUDGE_KEY, or it is empty"):
        endpoint(server, key_env="JUDGE_KEY")


def test_requests_keep_their_pace_retries_as_well(fake, endpoint, monkeypatch):
    slept = []
    monkeypatch.setattr(endpoints, "time", SimpleNamespace(monotonic=lambda: 100.0, sleep=slept.append))
    endpoint(fake(500), requests_per_minute=30).answers(asked("a", "b"))
    assert sorted(slept) == [2.0, 4.0]


def test_a_file_of_the_cache_that_holds_no_answer_is_named(fake, endpoint, tmp_path):
    server = fake()
    endpoint(server).answers(asked("a"))
    (file,) = (tmp_path / "answers").iterdir()
    assert json.loads(file.read_text())["request"]["messages"] == asked("a")[0]
    file.write_text("{}")
    with pytest.raises(FileError, match=f"{file.name}: holds no answer; remove it"):
        endpoint(server).answers(asked("a"))


def test_openai_is_an_extra(monkeypatch, endpoint):
    monkeypatch.setattr(endpoints.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"pip install 'safe_rlhf_jax\[judge\]'"):
        endpoint("http://127.0.0.1:9/v1")
