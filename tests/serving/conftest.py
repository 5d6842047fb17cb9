"""A tiny policy with a reward and a cost model, served over HTTP from a thread of this process."""

import argparse
import contextlib
import socket
import threading

import openai
import pytest
import uvicorn

from safe_rlhf_jax.data.tokenizer import load_tokenizer
from safe_rlhf_jax.serve import load_engine, parse_arguments
from safe_rlhf_jax.serving.app import make_app
from tests.helpers import save_models, tiny_config

KEY = "correct horse"


@pytest.fixture(scope="session")
def models(tmp_path_factory):
    """Folders `policy`, `reward` and `cost`."""
    root, tokenizer = tmp_path_factory.mktemp("served"), load_tokenizer("demo")
    config = tiny_config(vocab_size=tokenizer.vocab_size, max_positions=128)
    save_models(root, ["policy"], config, tokenizer.hf)
    return root


class Served(argparse.Namespace):
    """A running server: its `url`, and the `engine` behind it."""

    model = "policy"

    def client(self, key=KEY, **more):
        return openai.OpenAI(base_url=self.url, api_key=key, **({"max_retries": 0} | more))

    def chat(self, content="hello", *, temperature=0.0, **more):
        messages = [{"role": "user", "content": content}]
        return self.client().chat.completions.create(
            model=self.model, messages=messages, temperature=temperature, **more
        )

    @contextlib.contextmanager
    def held(self):
        """Holds the device back before the next batch; yields its calls: the number of answers in each."""
        generate, go, calls = self.engine.generate, threading.Event(), []

        def held_back(answers):
            calls.append(len(answers))
            assert go.wait(60)
            generate(answers)

        self.engine.generate = held_back
        try:
            yield calls, go
        finally:
            go.set()
            del self.engine.generate


@contextlib.contextmanager
def at_address(engine, before=lambda app: app):
    """Serves an engine, whose thread runs, on a free port; `before` wraps the application."""
    bound = socket.create_server(("127.0.0.1", 0))
    app = before(make_app(engine, "policy", KEY))
    server = uvicorn.Server(uvicorn.Config(app, lifespan="off", log_level="warning"))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [bound]})
    thread.start()
    try:
        yield Served(url=f"http://127.0.0.1:{bound.getsockname()[1]}/v1", engine=engine)
    finally:
        server.should_exit = True
        thread.join()
        engine.close()


@pytest.fixture(scope="session")
def served(models):
    """The server: prompts of up to 80 tokens, responses of up to 24, four answers at once, two requests waiting."""
    arguments = f"{models / 'policy'} --max-prompt 80 --max-tokens 24 --batch 4 --queue 2".split()
    scorers = [f"--scorer={signal}={models / signal}" for signal in ("reward", "cost")]
    engine = load_engine(parse_arguments([*arguments, *scorers]))
    engine.start()
    with at_address(engine) as found:
        yield found
