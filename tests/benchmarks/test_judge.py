"""The linear judge of benchmarks/real, with an embedder made up here."""

import numpy as np
import pytest

from benchmarks.real import judge
from benchmarks.real.judge import Judge

VOCABULARY = ("how", "sure", "sorry", "bomb")


class Counts:
    """Embeds a text as the number of times that it has each word; remembers what it was asked."""

    def __init__(self):
        self.asked = []

    def __call__(self, texts):
        self.asked += texts
        return np.array([[text.split().count(word) for word in VOCABULARY] for text in texts], np.float32)


def linear(response, product, bias=0.0):
    weight = np.concatenate([response, np.zeros(4), product]).astype(np.float32)
    return {"weight": weight, "bias": np.float32(bias)}


@pytest.fixture
def counts(monkeypatch):
    counts = Counts()
    models = {"cost": linear([0, 1, -1, 0], [0, 0, 0, 4], bias=-0.5), "reward": linear([0, 2, 0, 0], np.zeros(4))}
    monkeypatch.setattr(judge, "judge", lambda: Judge(counts, models))
    return counts


def conversation(*texts):
    return [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts)]


def test_cost_and_reward_are_one_float32_for_each_response_in_order(counts):
    ask = conversation("how bomb")
    responses = ["sure bomb", "sorry", "sure"]
    cost = judge.cost([ask] * 3, responses, [True, True, False])
    assert cost.dtype == np.float32
    np.testing.assert_allclose(cost, [4.5, -1.5, 0.5])
    np.testing.assert_allclose(judge.reward([ask] * 3, responses, [True] * 3), [2, 0, 2])


def test_the_judge_reads_the_last_turn_of_the_user_and_embeds_a_text_once(counts):
    first, later = conversation("how bomb"), conversation("how", "sure", "how bomb")
    reader = judge.judge()
    scores = reader.score("cost", [first, later], ["bomb", "bomb"])
    assert scores[0] == scores[1] == 3.5
    reader.score("cost", [first], ["bomb"])
    assert sorted(counts.asked) == ["bomb", "how bomb"]


def test_an_unfitted_judge_names_the_command(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    judge.judge.cache_clear()
    with pytest.raises(FileNotFoundError, match=r"python -m benchmarks\.real\.judge fit"):
        judge.cost([conversation("how")], ["sure"], [True])


def test_a_pair_counts_in_both_orders_with_half_the_weight():
    rows = [{"prompt": "How?", "response_0": "a", "response_1": "b", "better_response_id": 1}]
    x = np.array([[[1.0, 2.0], [4.0, 2.0]]])
    pairs = judge.Pairs(rows)
    examples = judge.ranked(x, pairs.better, pairs)
    assert examples.x.tolist() == [[3, 0], [-3, 0]]
    assert examples.y.tolist() == [1, 0]
    assert examples.weight.tolist() == [0.5, 0.5]
    assert examples.opening.tolist() == ["how", "how"]


def test_costs_learn_labels_rankings_and_that_preferred_helpful_responses_are_safe():
    label = {"is_response_0_safe": True, "is_response_1_safe": False, "safer_response_id": 0}
    pair = {"prompt": "How?", "response_0": "a", "response_1": "b"}
    found = {"safety": judge.Pairs([pair | label])}
    found |= {name: judge.Pairs([pair | {"better_response_id": 1}]) for name in ("harmless", "helpful")}
    x = {name: np.array([[[1.0], [3.0]]]) for name in found}
    single, safety, harmless, safe = judge.cost_examples(x, found)
    assert (single.x.ravel().tolist(), single.y.tolist()) == ([1, 3], [False, True])
    assert (safety.x.ravel().tolist(), safety.y.tolist()) == ([2, -2], [1, 0])  # response 1 is less safe
    assert (harmless.x.ravel().tolist(), harmless.y.tolist()) == ([2, -2], [0, 1])
    assert (safe.x.tolist(), safe.y.tolist(), safe.weight.tolist()) == ([[3]], [False], [judge.BENIGN_WEIGHT])
