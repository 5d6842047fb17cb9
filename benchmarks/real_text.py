"""Real text on small models from scratch, beside a bag of words on the same rows.

    python benchmarks/real_text.py tokenizer     byte-level BPE from the training text: runs/real_text/tokenizer
    python -m safe_rlhf_jax.train --config configs/real_text/small.yaml
    python benchmarks/real_text.py table [--json FILE]     held-out accuracy of the runs and of the bag of words

The bag of words is TF-IDF over 1- and 2-grams with logistic regression (`pip install scikit-learn`). Rows are split by
prompt, and several rows share a prompt: intervals resample prompts, not rows.
"""

import argparse
import json
import pathlib
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import yaml

from safe_rlhf_jax.data.sources import read_records
from safe_rlhf_jax.data.texts import answered, encode, prompt_turns, safety_labels, two_responses
from safe_rlhf_jax.pipeline import load_scorer

FILES = {
    "cost": "pku_saferlhf_safety_pairs.jsonl.gz",
    "harmless": "hh_rlhf_harmless_base_test.jsonl.gz",
    "sft": "alpaca_en_demo.json",
}
LABEL = {"cost": "safer_response_id", "harmless": "better_response_id"}
TEST_SHARE = 0.2  # as in configs/real_text
VOCABULARY = 4096
RUNS = pathlib.Path("runs/real_text")


def records(data: pathlib.Path, task: str, split: str) -> list[dict[str, Any]]:
    """Returns the rows that a stage of configs/real_text reads."""
    rows = read_records(str(data / FILES[task]), split, test_share=TEST_SHARE)
    return [row for row in rows if "unusable" not in row]


def texts(value: Any) -> Iterator[str]:
    """Yields every text in a record."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list | tuple):
        for part in value.values() if isinstance(value, dict) else value:
            yield from texts(part)


def train_tokenizer(data: pathlib.Path) -> None:
    """Trains a byte-level BPE on the training rows and saves it where the configs look for it."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY, special_tokens=["<pad>", "</s>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    tokenizer.train_from_iterator(
        (t for task in FILES for r in records(data, task, "train") for t in texts(r)), trainer
    )
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>", pad_token="<pad>")
    fast.save_pretrained(RUNS / "tokenizer")
    print(f"{RUNS / 'tokenizer'}: {len(fast)} tokens")


class Pairs:
    """Labelled pairs of a task: conversations [n][2], the index of the better response, safety labels."""

    def __init__(self, task: str, rows: list[dict[str, Any]]):
        self.conversations, better, safe, prompts = [], [], [], []
        for row in rows:
            label, _, *responses = two_responses(row, LABEL[task])
            turns = prompt_turns(row)
            if all(response.strip() for response in responses) and len(turns) % 2:
                self.conversations.append([answered(turns, response) for response in responses])
                better.append(label)
                safe.append(safety_labels(row) if task == "cost" else (False, False))
                prompts.append(json.dumps(turns))
        self.better, self.safe = np.array(better), np.array(safe)
        self.prompt = np.unique(prompts, return_inverse=True)[1]

    def flat(self) -> list[str]:
        """Returns the text of both sides of every pair, one after the other."""
        return [" ".join(turn["content"] for turn in side) for pair in self.conversations for side in pair]


def interval(hits: np.ndarray, prompt: np.ndarray, resamples: int = 2000) -> list[float]:
    """95 % bootstrap interval of a mean over rows, prompts resampled."""
    rng, count = np.random.default_rng(0), prompt.max() + 1
    total, size = np.bincount(prompt, hits, count), np.bincount(prompt, minlength=count)
    drawn = rng.integers(count, size=(resamples, count))
    means = total[drawn].sum(1) / size[drawn].sum(1)
    return [round(float(q), 4) for q in np.quantile(means, [0.025, 0.975])]


def accuracy(task: str, pairs: Pairs, ranking: np.ndarray, sign: np.ndarray | None) -> dict[str, Any]:
    """Returns accuracies: `ranking` float[n] > 0 prefers response 1, `sign` float[n, 2] > 0 says safe."""
    # A tie is half right: of some pairs nothing is left to compare once they are cut to the length limit.
    right = {"ranking": np.where(ranking == 0, 0.5, (ranking > 0) == (pairs.better == 1))}
    if task == "cost" and sign is not None:
        right["sign"] = ((sign > 0) == pairs.safe).mean(-1)
    return {
        name: {"accuracy": round(float(hits.mean()), 4), "interval": interval(hits, pairs.prompt)}
        for name, hits in right.items()
    }


def bag_of_words(task: str, train: Pairs, test: Pairs) -> dict[str, Any]:
    """TF-IDF with logistic regression: on differences for the ranking, on single texts for the sign."""
    from scipy.sparse import vstack
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import LogisticRegression

    vectorizer = TfidfVectorizer(ngram_range=(1, 2), min_df=2, sublinear_tf=True)
    x, held_out = vectorizer.fit_transform(train.flat()), vectorizer.transform(test.flat())
    difference, better = x[1::2] - x[0::2], train.better
    both = vstack([difference, -difference]), np.concatenate([better, 1 - better])  # the order of a pair says nothing
    ranker = LogisticRegression(max_iter=2000, fit_intercept=False).fit(*both)
    sign = None
    if task == "cost":
        classifier = LogisticRegression(max_iter=2000).fit(x, train.safe.ravel())
        sign = classifier.decision_function(held_out).reshape(-1, 2)
    return accuracy(task, test, ranker.decision_function(held_out[1::2] - held_out[0::2]), sign)


def network(task: str, test: Pairs, stage: pathlib.Path) -> dict[str, Any]:
    """Scores the held-out rows with an exported reward or cost model, as its stage cuts them."""
    config = yaml.safe_load((stage / "config.yaml").read_text())
    length = next(s["max_length"] for s in find_stages(config) if s["name"] == stage.name)
    scorer = load_scorer(str(stage / "export"), template=config["template"])
    ids = [encode(side, scorer.template, scorer.tokenizer).ids[:length] for pair in test.conversations for side in pair]
    order = sorted(range(len(ids)), key=lambda i: len(ids[i]))
    scores = np.empty(len(ids))
    for start in range(0, len(ids), 64):
        rows = order[start : start + 64]
        batch = [ids[i] for i in rows] + [ids[rows[0]]] * (64 - len(rows))
        scores[rows] = scorer.score_tokens(batch)[: len(rows)]
    goodness = (-scores if task == "cost" else scores).reshape(-1, 2)
    return accuracy(task, test, goodness[:, 1] - goodness[:, 0], goodness)


def find_stages(config: dict[str, Any]) -> list[dict[str, Any]]:
    """Returns the stages of a stored config."""
    return config["stages"] if isinstance(config["stages"], list) else [config["stages"]]


def table(data: pathlib.Path) -> dict[str, Any]:
    """Returns accuracies by task and model."""
    out: dict[str, Any] = {}
    for task in LABEL:
        train, test = (Pairs(task, records(data, task, split)) for split in ("train", "test"))
        out[task] = {
            "rows": {"train": len(train.better), "test": len(test.better), "test prompts": int(test.prompt.max()) + 1},
            "bag of words": bag_of_words(task, train, test),
        }
        for export in sorted(RUNS.glob(f"*/{task}/export")):
            out[task][export.parent.parent.name] = network(task, test, export.parent)
    return out


def show(figures: dict[str, Any], write: Callable[[str], None]) -> None:
    """Writes the table of docs/results.md."""
    for task, models in figures.items():
        rows = models["rows"]
        write(
            f"\n{task}: {rows['train']} pairs to train on, {rows['test']} held out ({rows['test prompts']} prompts)\n"
        )
        write("| model | ranking accuracy | sign accuracy |\n|---|---|---|")
        write(f"| majority | 0.500 | {'0.500' if task == 'cost' else ''} |")  # one of each pair is better, one safe
        for name, model in models.items():
            if name != "rows":
                cells = [
                    "{:.3f} ({:.3f} to {:.3f})".format(model[kind]["accuracy"], *model[kind]["interval"])
                    if kind in model else "" for kind in ("ranking", "sign")
                ]  # fmt: skip
                write(f"| {name} | {' | '.join(cells)} |")


def main() -> None:
    """Runs one command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=["tokenizer", "table"])
    parser.add_argument("--data", type=pathlib.Path, default=pathlib.Path("../shared/data"), metavar="FOLDER")
    parser.add_argument("--json", type=pathlib.Path, metavar="FILE", help="also write the figures here")
    options = parser.parse_args()
    if options.command == "tokenizer":
        return train_tokenizer(options.data)
    figures = table(options.data)
    show(figures, print)
    if options.json:
        options.json.write_text(json.dumps(figures, indent=2) + "\n")


if __name__ == "__main__":
    main()
