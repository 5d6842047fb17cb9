"""Real text on small models from scratch, beside a bag of words on the same rows.

    python -m benchmarks.real_text tokenizer     byte-level BPE from the training text: runs/real_text/tokenizer
    python -m safe_rlhf_jax.train --config configs/real_text/small.yaml
    python -m benchmarks.real_text table [--json FILE]     held-out accuracy of the runs and of the bag of words

The bag of words is TF-IDF over 1- and 2-grams with logistic regression (`pip install scikit-learn`). Rows are split by
prompt, and several rows share a prompt: intervals resample prompts, not rows.
"""

import argparse
import json
import pathlib
from collections.abc import Iterator
from typing import Any

from benchmarks.preferences import Pairs, bag_of_words, counts, network, show
from safe_rlhf_jax.data.sources import read_records

FILES = {
    "cost": "pku_saferlhf_safety_pairs.jsonl.gz",
    "harmless": "hh_rlhf_harmless_base_test.jsonl.gz",
    "sft": "alpaca_en_demo.json",
}
KIND = {"cost": "cost", "harmless": "reward"}  # task -> kind of its models
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


def table(data: pathlib.Path) -> dict[str, Any]:
    """Returns accuracies by task and model."""
    out: dict[str, Any] = {}
    for task in KIND:
        train, test = (Pairs(records(data, task, split)) for split in ("train", "test"))
        out[task] = {
            "rows": counts(train, test),
            "bag of words": bag_of_words(train, test),
        }
        for export in sorted(RUNS.glob(f"*/{task}/export")):
            out[task][export.parent.parent.name] = network(KIND[task], test, export.parent)
    return out


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
    show(figures)
    if options.json:
        options.json.write_text(json.dumps(figures, indent=2) + "\n")


if __name__ == "__main__":
    main()
