"""`safe-rlhf-jax serve` as a process, and what it refuses at its start."""

import importlib.util
import re
import socket
import subprocess
import sys

import openai
import pytest

from safe_rlhf_jax import serve
from safe_rlhf_jax.models import hf
from tests.helpers import make_scorer, tiny_config
from tests.serving.conftest import Served

SMALL = ("--port", "0", "--max-prompt", "40", "--max-tokens", "64", "--batch", "1")


def test_sigterm_lets_what_runs_and_waits_come_to_its_end(models):
    command = [sys.executable, "-m", "safe_rlhf_jax.serve", f"path:{models / 'policy'}", *SMALL]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    said = ""
    while "serving" not in said:
        said = process.stdout.readline()
        assert said, process.stderr.read()
    served = Served(url=re.search(r"http://\S+/v1", said)[0], model=f"path:{models / 'policy'}")
    running = [served.chat(stream=True, stream_options={"include_usage": True}) for _ in range(3)]
    chunks = [[next(stream)] for stream in running]
    process.terminate()
    for stream, own in zip(running, chunks, strict=True):
        own += stream
    assert {own[-1].usage.completion_tokens for own in chunks} == {chunks[0][-1].usage.completion_tokens}
    assert all(own[-2].choices[0].finish_reason for own in chunks)
    assert process.wait(300) == 0, process.stderr.read()
    with pytest.raises(openai.APIConnectionError):
        served.chat()


@pytest.fixture
def bad_models(models, tmp_path):
    """A scorer with few positions, which reads as the policy does."""
    config = hf.load(models / "policy")[0].config
    hf.save(tmp_path / "short", *make_scorer("cost", tiny_config(vocab_size=config.vocab_size, max_positions=32)))
    return models, tmp_path / "short"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["{models}/policy", "--host", "0.0.0.0"], "--host 0.0.0.0: others can reach it; name a variable with a key"),
        (["{models}/policy", "--host", "example.org"], "--host example.org: others can reach it"),
        (["{models}/policy", "--key-env", "NO_SUCH_KEY"], "--key-env NO_SUCH_KEY: no such environment variable"),
        (["{models}/policy", "--port", "{taken}"], "--port {taken}: "),
        (["{models}/policy", "--port", "99999"], "--port 99999: "),
        (["{models}/none"], "none: no such folder"),
        (["{models}/policy", "--scorer", "cost={models}/reward"], "score_type is 'reward', not 'cost'"),
        (["{models}/policy", "--max-tokens", "128"], "and a prompt of 1 tokens exceed the 128 positions"),
        (["{models}/policy", "--max-tokens", "20", "--scorer", "cost={short}", "--max-prompt", "20"],
         "exceed the 32 positions of cost"),
    ],
)  # fmt: skip
def test_what_cannot_be_served_is_one_clear_line_at_the_start(monkeypatch, capsys, bad_models, arguments, message):
    models, short = bad_models
    monkeypatch.setattr("safe_rlhf_jax.serving.engine.Engine.start", lambda self: pytest.fail("it starts"))
    with socket.create_server(("127.0.0.1", 0)) as other:
        names = {"models": models, "short": short, "taken": other.getsockname()[1]}
        given = [argument.format(**names) for argument in arguments]
        if "--port" not in given:
            given += ["--port", "0"]
        assert serve.main(given) == 1
        error = capsys.readouterr().err
        assert message.format(**names) in error
        assert error.count("\n") == 1


@pytest.mark.parametrize(
    ("options", "key"),
    [
        ("p", None),
        ("p --host ::1", None),
        ("p --host localhost", None),
        ("p --key-env SERVE_KEY", "secret"),
        ("p --host 0.0.0.0 --key-env SERVE_KEY", "secret"),
        ("p --host 0.0.0.0 --without-key", None),
    ],
)
def test_a_key_is_needed_where_others_can_reach_the_server(monkeypatch, options, key):
    monkeypatch.setenv("SERVE_KEY", "secret")
    assert serve.key_of(serve.parse_arguments(options.split())) == key


@pytest.mark.parametrize("options", ["p --scorer harm=x", "p --scorer cost", "p --batch 0", "p --max-tokens many"])
def test_a_wrong_option_is_a_usage_error(capsys, options):
    with pytest.raises(SystemExit, match="2"):
        serve.parse_arguments(options.split())
    assert "error: argument --" in capsys.readouterr().err


def test_starlette_and_uvicorn_are_an_extra(monkeypatch, capsys, models):
    found = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *more: None if name == "uvicorn" else found(name, *more)
    )
    assert serve.main([str(models / "policy")]) == 1
    assert "pip install 'safe_rlhf_jax[serve]'" in capsys.readouterr().err
