"""A real, pretrained chat model: it answers as in transformers, and stops by itself.

The folder is made by ../shared/tools/real_model.py from a package that carries the weights; without that script, or
without the package `gguf` that reads them, the test is skipped.
"""

import importlib.util
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from safe_rlhf_jax.pipeline import load_policy

pytestmark = [pytest.mark.reference, pytest.mark.slow]

SCRIPT = Path(__file__).parents[2].parent / "shared" / "tools" / "real_model.py"
LENGTH = 48
PROMPTS = [
    "What is the capital of France?", "Write one sentence about rain.", "Hello!", "How do I boil an egg?",
    "List three fruits.", "Explain gravity to a child.", "Who wrote Hamlet?", "What is 7 plus 5?", "Tell me a joke.",
    "Name a river in Egypt.", "Why is the sky blue?", "Translate 'good morning' to French.", "What do bees make?",
    "How many days are in a week?", "Give me a synonym for happy.", "What is the largest planet?", "Describe a cat.",
    "What should I eat for lunch?", "Is water wet?", "Say goodbye.",
]  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    if not SCRIPT.is_file():
        pytest.skip(f"{SCRIPT.name} is not here")
    if importlib.util.find_spec("gguf") is None:
        pytest.skip("the package gguf is not installed")
    made = tmp_path_factory.mktemp("smollm2")
    process = subprocess.run([sys.executable, str(SCRIPT), str(made)], capture_output=True, text=True, timeout=600)
    if process.returncode:
        pytest.skip(f"the model cannot be had: {process.stderr.strip().splitlines()[-1]}")
    return made


def test_greedy_answers_are_those_of_transformers_and_end_by_themselves(folder):
    import torch
    import transformers

    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    expected, ended = [], []
    for prompt in PROMPTS:
        turns = [{"role": "user", "content": prompt}]
        asked = tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_tensors="pt", return_dict=True)
        out = model.generate(**asked, max_new_tokens=LENGTH, do_sample=False)[0, asked["input_ids"].shape[1] :]
        expected.append(tokenizer.decode(out, skip_special_tokens=True))
        ended.append(int(out[-1]) == tokenizer.eos_token_id)
    policy = load_policy(str(folder))
    assert policy(PROMPTS, max_tokens=LENGTH, temperature=0.0) == expected
    assert np.sum(ended) >= 5
