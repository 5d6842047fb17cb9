"""Labelled pairs, and the accuracy on them of exported models and of linear ones, with intervals."""

import json
import pathlib
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import yaml

from benchmarks.rounds.jobs import with_interval
from safe_rlhf_jax.data.records import UNUSABLE, Record
from safe_rlhf_jax.data.texts import answered, encode, prompt_turns, safety_labels, two_responses
from safe_rlhf_jax.pipeline import load_scorer


class Pairs:
    """Labelled pairs, those without an empty response: conversations [n][2], which response is better, safety labels.

    Attributes:
        prompts: [n] turns before the response.
        responses: [n][2].
        better: int[n], the index of the safer or more helpful response.
        safe: bool[n, 2], or None without labels.
        prompt: int[n], the same for rows with one prompt.
    """

    def __init__(self, rows: Iterable[Record]):
        self.prompts, self.responses, better, safe = [], [], [], []
        for row in rows:
            if UNUSABLE in row:
                continue
            label = "safer_response_id" if "safer_response_id" in row else "better_response_id"
            index, _, *responses = two_responses(row, label)
            turns = prompt_turns(row)
            if all(response.strip() for response in responses) and len(turns) % 2:
                self.prompts.append(turns)
                self.responses.append(responses)
                better.append(index)
                safe += [safety_labels(row)] if "is_response_0_safe" in row else []
        self.better, self.safe = np.array(better), np.array(safe) if safe else None
        self.prompt = np.unique([json.dumps(turns) for turns in self.prompts], return_inverse=True)[1]

    @property
    def conversations(self) -> list[list[list[Any]]]:
        """The complete conversations, [n][2]."""
        return [
            [answered(turns, response) for response in pair]
            for turns, pair in zip(self.prompts, self.responses, strict=True)
        ]

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


def accuracy(pairs: Pairs, ranking: np.ndarray, sign: np.ndarray | None = None) -> dict[str, Any]:
    """Returns accuracies: `ranking` float[n] > 0 prefers response 1, `sign` float[n, 2] > 0 says safe."""
    # A tie is half right: of some pairs nothing is left to compare once they are cut to the length limit.
    right = {"ranking": np.where(ranking == 0, 0.5, (ranking > 0) == (pairs.better == 1))}
    if pairs.safe is not None and sign is not None:
        right["sign"] = ((sign > 0) == pairs.safe).mean(-1)
    return {
        name: {"accuracy": round(float(hits.mean()), 4), "interval": interval(hits, pairs.prompt)}
        for name, hits in right.items()
    }


def both_orders(difference: Any, better: np.ndarray) -> tuple[Any, np.ndarray]:
    """Returns features and labels of pairs in both orders: the order of a pair says nothing."""
    from scipy.sparse import issparse, vstack

    stack = vstack if issparse(difference) else np.concatenate
    return stack([difference, -difference]), np.concatenate([better, 1 - better])


def linear_accuracy(
    train: Pairs, test: Pairs, x: Any, held_out: Any, strengths: Sequence[float] = (1.0,)
) -> dict[str, Any]:
    """Logistic regression: on differences for the ranking, on single responses for the sign.

    Args:
        train: n pairs.
        test: m pairs.
        x: Features of the training responses, [2n, F], both of a pair one after the other.
        held_out: Those of the test's, [2m, F].
        strengths: Inverse L2 penalties to choose from, by cross-validation over the training prompts.
    """
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import GridSearchCV, GroupKFold

    def fitted(x: Any, y: np.ndarray, prompt: np.ndarray, **settings: Any) -> Any:
        model = LogisticRegression(max_iter=2000, **settings)
        return GridSearchCV(model, {"C": strengths}, cv=GroupKFold(5)).fit(x, y, groups=prompt)

    difference = both_orders(x[1::2] - x[0::2], train.better)
    ranker = fitted(*difference, np.tile(train.prompt, 2), fit_intercept=False)
    sign = None
    if train.safe is not None:
        classifier = fitted(x, train.safe.ravel(), np.repeat(train.prompt, 2))
        sign = classifier.decision_function(held_out).reshape(-1, 2)
    return accuracy(test, ranker.decision_function(held_out[1::2] - held_out[0::2]), sign)


def bag_of_words(train: Pairs, test: Pairs) -> dict[str, Any]:
    """TF-IDF over 1- and 2-grams with logistic regression."""
    from sklearn.feature_extraction.text import TfidfVectorizer

    vectorizer = TfidfVectorizer(ngram_range=(1, 2), min_df=2, sublinear_tf=True)
    x = vectorizer.fit_transform(train.flat())
    return linear_accuracy(train, test, x, vectorizer.transform(test.flat()))


def network(kind: str, test: Pairs, stage: pathlib.Path) -> dict[str, Any]:
    """Scores pairs with an exported model, as its stage cuts them.

    Args:
        kind: "reward" or "cost".
        test: The pairs.
        stage: Folder of the stage, with config.yaml and export/.
    """
    config = yaml.safe_load((stage / "config.yaml").read_text())
    stages = config["stages"] if isinstance(config["stages"], list) else [config["stages"]]
    length = next(s["max_length"] for s in stages if s["name"] == stage.name)
    scorer = load_scorer(str(stage / "export"), template=config["template"])
    ids = [encode(side, scorer.template, scorer.tokenizer).ids[:length] for pair in test.conversations for side in pair]
    scores = np.empty(len(ids))
    for rows, tokens, mask in batches(ids):
        scores[rows] = np.asarray(scorer.score(scorer.variables, tokens, mask))[: len(rows)]
    goodness = (-scores if kind == "cost" else scores).reshape(-1, 2)
    return accuracy(test, goodness[:, 1] - goodness[:, 0], goodness)


def batches(
    ids: Sequence[Sequence[int]], size: int = 2048, step: int = 32
) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Yields texts of like length together, as (their indices [n], tokens int32[B, W], mask bool[B, W]).

    Rows are padded on the right to a multiple of `step`; a batch that is not full repeats its first row.

    Args:
        ids: Token ids of each text.
        size: Tokens of a batch, B · W.
        step: Widths are its multiples: the fewer there are, the fewer programs are compiled.
    """
    widths = np.array([-(-len(row) // step) * step for row in ids])
    for width in np.unique(widths):
        of_width, count = np.flatnonzero(widths == width), max(1, size // width)
        for start in range(0, len(of_width), count):
            rows = of_width[start : start + count]
            tokens, mask = np.zeros((count, width), np.int32), np.zeros((count, width), bool)
            for i in range(count):
                row = ids[rows[i if i < len(rows) else 0]]
                tokens[i, : len(row)], mask[i, : len(row)] = row, True
            yield rows, tokens, mask


def counts(train: Pairs, test: Pairs) -> dict[str, int]:
    """Returns the numbers that `show` puts above a table."""
    return {"train": len(train.better), "test": len(test.better), "test prompts": int(test.prompt.max()) + 1}


def show(figures: dict[str, Any]) -> None:
    """Prints accuracies with their intervals: {task: {"rows": …, model: accuracy(…)}}."""
    for task, models in figures.items():
        rows = models["rows"]
        print(f"\n{task}: {rows['train']} pairs to train on, {rows['test']} held out", end="")
        print(f" ({rows['test prompts']} prompts)\n\n| model | ranking accuracy | sign accuracy |\n|---|---|---|")
        print(f"| majority | 0.500 | {'0.500' if task == 'cost' else ''} |")  # one of each pair is better, one safe
        for name, model in models.items():
            if name != "rows":
                kinds = [model.get(kind) for kind in ("ranking", "sign")]
                cells = [with_interval(kind["accuracy"], *kind["interval"]) if kind else "" for kind in kinds]
                print(f"| {name} | {' | '.join(cells)} |")
