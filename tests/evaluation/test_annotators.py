"""Several annotators: agreement beyond chance, who has none, and answers by a model of their errors."""

import sys

import numpy as np
import pytest

from safe_rlhf_jax.errors import ConfigError
from safe_rlhf_jax.evaluation.annotators import agreement, agreement_with_others, dawid_skene, majorities

ERRORS = {"careful": 0.05, "good": 0.15, "guesses": 0.5, "tosses": 0.5, "sleeps": 0.5}  # shares of wrong answers


def simulated(errors, n=80):
    """The right answers to tasks, and the votes of annotators who err."""
    rng = np.random.default_rng(0)
    truth = rng.integers(2, size=n)
    wrong = {name: rng.random(n) < share for name, share in errors.items()}
    return truth, [{name: int(right ^ flips[i]) for name, flips in wrong.items()} for i, right in enumerate(truth)]


def test_alpha_is_that_of_the_published_example_with_an_interval():
    pytest.importorskip("krippendorff")
    meg, owen = [0, 1, 0, 0, 0, 0, 0, 0, 1, 0], [1, 1, 1, 0, 0, 1, 0, 0, 0, 0]  # Krippendorff 2011, section A
    found = agreement([{"meg": one, "owen": other} for one, other in zip(meg, owen, strict=True)])
    assert found["alpha"] == pytest.approx(0.095, abs=5e-4)
    assert (found["n"], found["low"] < found["alpha"] < found["high"]) == (10, True)


def test_nothing_is_said_of_the_agreement_of_one_annotator_or_of_equal_answers():
    assert agreement([]) is agreement([{"a": 1}, {"b": 0}]) is agreement([{"a": 1, "b": 1}, {"a": 1, "b": 1}]) is None
    assert agreement_with_others([{"a": 1}, {"a": 0}]) == {}


def test_guessing_annotators_agree_with_the_others_by_chance_even_if_one_answer_is_usual():
    pytest.importorskip("krippendorff")
    _, tasks = simulated({"careful": 0.05, "good": 0.1, "fair": 0.2, "guesses": 0.5})
    found = agreement_with_others(tasks)
    assert {name for name, one in found.items() if one["low"] < 0.2} == {"guesses"}
    usual = [dict.fromkeys(("one", "two", "three"), int(i % 5 > 0)) | {"always": 1} for i in range(40)]
    found = agreement_with_others(usual)
    assert found["always"]["alpha"] < 0.1 < 0.9 < found["one"]["alpha"]


def test_dawid_skene_is_right_more_often_than_the_majority_where_most_annotators_guess():
    pytest.importorskip("crowdkit")
    truth, tasks = simulated(ERRORS)
    right = {of.__name__: np.mean(np.array(of(tasks)) == truth) for of in (majorities, dawid_skene)}
    assert right["dawid_skene"] > right["majorities"] + 0.05
    assert dawid_skene([{}, {"a": 1}, {}]) == [None, 1, None]


def test_majorities_are_those_of_crowd_kit_which_breaks_ties():
    aggregation, pandas = pytest.importorskip("crowdkit.aggregation"), pytest.importorskip("pandas")
    tasks = simulated(ERRORS)[1] + [{"good": 0, "guesses": 1}]
    rows = [(i, name, vote) for i, votes in enumerate(tasks) for name, vote in votes.items()]
    theirs = aggregation.MajorityVote().fit_predict(pandas.DataFrame(rows, columns=["task", "worker", "label"]))
    ours = majorities(tasks)
    assert ours[:-1] == theirs.sort_index().tolist()[:-1]
    assert ours[-1] is None


@pytest.mark.parametrize(("package", "function"), [("krippendorff", agreement), ("crowdkit", dawid_skene)])
def test_missing_library_is_one_line_that_names_the_extra(package, function, monkeypatch):
    for module in [name for name in sys.modules if name.partition(".")[0] == package]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ConfigError, match=r"need the package .*: pip install 'safe_rlhf_jax\[people\]'"):
        function([{"a": 0, "b": 1}, {"a": 1, "b": 1}])
