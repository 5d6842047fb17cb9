"""Preference models on held-out pairs, beside a bag of words and a linear probe on the same rows.

    python -m benchmarks.real.baselines [--dtype bfloat16] [--cost STAGE] [--reward STAGE] [--json FILE]

All are trained on the part "run" and tested on the part "test" (benchmarks/real/prepare.py). The bag of words is TF-IDF
over 1- and 2-grams with logistic regression; the probe is logistic regression on the last and the mean state of the
response's tokens in the frozen model. --cost and --reward add models that a run has trained: folders of their stages,
such as runs/real/safe_rlhf/cost. Needs `pip install -e '.[real]'`.
"""

import argparse
import hashlib
import json
import pathlib
import tempfile
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.preferences import Pairs, bag_of_words, batches, counts, linear_accuracy, network, show
from benchmarks.real.prepare import RUNS
from safe_rlhf_jax.data.sources import read_records
from safe_rlhf_jax.data.texts import encode
from safe_rlhf_jax.pipeline import Policy, load_policy

TASKS = {"cost": "safety", "reward": "helpful"}  # kind of model -> pairs
LONGEST = 256  # tokens that the probe reads: the last ones of a conversation
STRENGTHS = (1e-5, 1e-4, 1e-3, 1e-2)  # inverse L2 penalties of the probe, on standardised states


def pairs(task: str, part: str) -> Pairs:
    """Returns the pairs of a task and part."""
    return Pairs(read_records(str(RUNS / "data" / f"{TASKS[task]}_{part}.jsonl")))


def response_states(model: pathlib.Path, dtype: str, found: Pairs) -> np.ndarray:
    """Returns the last and the mean hidden state of every response, f32[2n, 2D]; computed once for a model and texts.

    Args:
        model: Folder of the frozen model.
        dtype: Of its matmuls.
        found: n pairs.
    """
    weights = (model / "model.safetensors").read_bytes()
    digest = hashlib.blake2b(json.dumps([dtype, found.conversations]).encode() + weights, digest_size=8)
    path = RUNS / "states" / f"{digest.hexdigest()}.npy"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=path.parent, delete=False) as file:
            np.save(file, computed_states(load_policy(str(model), dtype=dtype), found))
        pathlib.Path(file.name).rename(path)
    return np.load(path)


def computed_states(policy: Policy, found: Pairs) -> np.ndarray:
    """Returns what `response_states` does."""

    @jax.jit
    def states(variables: Any, tokens: jax.Array, mask: jax.Array, response: jax.Array) -> jax.Array:
        hidden = policy.module.apply(variables, tokens, mask, method="hidden")
        last = jnp.take_along_axis(hidden, (mask.sum(-1) - 1)[:, None, None], 1)[:, 0]
        mean = jnp.einsum("BLD,BL->BD", hidden, response / response.sum(-1, keepdims=True))
        return jnp.concatenate([last, mean], -1)

    texts = [encode(side, policy.template, policy.tokenizer) for pair in found.conversations for side in pair]
    ids, trained = ([getattr(text, field)[-LONGEST:] for text in texts] for field in ("ids", "trained"))
    out = np.empty((len(texts), 2 * policy.module.config.hidden_size), np.float32)
    for rows, tokens, mask in batches(ids):
        response = mask.copy()
        for i, row in enumerate(rows):
            response[i, : len(trained[row])] = trained[row]
        out[rows] = states(policy.variables, tokens, mask, response)[: len(rows)]
    return out


def probe(model: pathlib.Path, dtype: str, train: Pairs, test: Pairs) -> dict[str, Any]:
    """Logistic regression on the frozen model's states of the responses."""
    x, held_out = (response_states(model, dtype, found) for found in (train, test))
    mean, scale = x.mean(0), x.std(0)
    return linear_accuracy(train, test, (x - mean) / scale, (held_out - mean) / scale, STRENGTHS)


def compared(model: pathlib.Path, dtype: str, stages: dict[str, pathlib.Path | None]) -> dict[str, Any]:
    """Returns accuracies by task and model.

    Args:
        model: Folder of the frozen model.
        dtype: Of its matmuls.
        stages: For each task, the stage of a run that trained a model for it, if any.
    """
    out = {}
    for task, stage in stages.items():
        train, test = (pairs(task, part) for part in ("run", "test"))
        out[task] = {
            "rows": counts(train, test),
            "bag of words": bag_of_words(train, test),
            "probe": probe(model, dtype, train, test),
        } | ({"model": network(task, test, stage)} if stage else {})
    return out


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=pathlib.Path, default=RUNS / "model", metavar="FOLDER")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32", help="of the frozen model")
    for task in TASKS:
        parser.add_argument(f"--{task}", type=pathlib.Path, metavar="STAGE", help=f"folder of a {task} stage")
    parser.add_argument("--json", type=pathlib.Path, metavar="FILE", help="also write the figures here")
    options = parser.parse_args()
    figures = compared(options.model, options.dtype, {task: getattr(options, task) for task in TASKS})
    show(figures)
    if options.json:
        options.json.write_text(json.dumps(figures, indent=2) + "\n")


if __name__ == "__main__":
    main()
