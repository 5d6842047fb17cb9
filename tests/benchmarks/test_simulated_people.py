"""The people of a run that benchmarks/simulated_people.py plays answer what waits, in Label Studio's form."""

import numpy as np
import pytest

from benchmarks.simulated_people import ANNOTATORS, label
from safe_rlhf_jax.data import demo
from safe_rlhf_jax.stages.labellers import Pair
from safe_rlhf_jax.stages.people import WaitingForLabelsError, people_labels


def test_answers_are_read_as_votes_of_three_annotators_who_err_and_skip(tmp_path):
    records = [record for record in demo.preference("test") if record["prompt_source"] == "risky"][:200]
    pairs = [
        Pair([{"role": "user", "content": record["prompt"]}], record["response_0"], record["response_1"], {})
        for record in records
    ]
    with pytest.raises(WaitingForLabelsError):
        people_labels(tmp_path, pairs, "Read.")
    assert label(tmp_path) == len({repr(pair) for pair in pairs})
    labels = people_labels(tmp_path, pairs, "Read.")
    votes = [len(one.get("better_votes", ())) for one in labels]
    assert max(votes) == len(ANNOTATORS)
    assert len(ANNOTATORS) - 0.5 < np.mean(votes) < len(ANNOTATORS)
    safe = [
        (one["response_0_safe_votes"], record["is_response_0_safe"])
        for one, record in zip(labels, records, strict=True)
        if "response_0_safe_votes" in one
    ]
    assert np.mean([(np.mean(given) > 0.5) == label for given, label in safe]) > 0.9
    assert 0.05 < np.mean([len(set(given)) > 1 for given, _ in safe]) < 0.4
