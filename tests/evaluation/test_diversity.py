"""How different texts are, on written texts."""

import math

import pytest

from safe_rlhf_jax.evaluation.diversity import (
    cluster_entropy,
    cluster_sizes,
    distinct_n,
    diversity,
    grams,
    overlap,
    same_opening,
    self_similarity,
)

SAME = ["The cat sat down.", "the cat sat, down", "THE CAT SAT DOWN!"]
APART = ["The cat sat down.", "Prices rose again", "Nobody knows why"]


def test_texts_overlap_by_words_and_pairs_of_neighbours():
    assert grams("The cat, the dog.") == {("the",), ("cat",), ("dog",), ("the", "cat"), ("cat", "the"), ("the", "dog")}
    assert overlap(grams("a b c"), grams("a b d")) == pytest.approx(3 / 7)  # a, b, ab of a, b, c, d, ab, bc, bd
    assert overlap(grams("a b"), grams("b a")) == pytest.approx(2 / 4)  # the order counts
    assert overlap(grams("..."), grams("")) == 1.0


def test_self_similarity_is_1_for_the_same_text_and_0_for_texts_without_a_common_word():
    assert self_similarity(SAME) == self_similarity(SAME[:1]) == 1.0
    assert self_similarity(APART) == 0.0
    assert self_similarity(["a b c", "a b d", "e f g"]) == pytest.approx((3 / 7 + 0 + 0) / 3)


def test_entropy_over_clusters_counts_ways_to_answer_not_texts():
    assert cluster_sizes([*SAME, APART[1]]) == [3, 1]
    assert cluster_entropy(SAME) == 0.0
    assert cluster_entropy(APART) == pytest.approx(math.log(3))
    assert cluster_entropy([*SAME, APART[1]]) == pytest.approx(-(0.75 * math.log(0.75) + 0.25 * math.log(0.25)))


def test_diversity_is_a_mean_over_prompts_with_several_responses():
    found = diversity([SAME[:2], APART[:2], ["alone"], []])
    assert found["self_similarity"] == pytest.approx(0.5)
    assert found["cluster_entropy"] == pytest.approx(math.log(2) / 2)
    assert found["distinct_1"] == pytest.approx((8 / 8 + 7 / 7) / 2, abs=0.15)
    assert diversity([["alone"]]) == {}


def test_distinct_n_counts_over_all_texts():
    assert distinct_n(["a b a", "a b"], 1) == 2 / 5
    assert distinct_n(["a b a", "a b"], 2) == 2 / 3  # ab, ba, ab
    assert distinct_n(["a", ""], 2) == 0.0


def test_same_opening_is_the_largest_share_in_any_case():
    evasive = ["The answer is not available.", "the\nanswer depends", "There is no answer", "The", ""]
    assert same_opening(evasive) == 2 / 5
    assert same_opening(evasive[2:]) == 1 / 3
    assert same_opening([]) == 0.0
