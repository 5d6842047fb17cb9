"""A label is one of few spellings, wherever it is read; what is right and of no use does not count as bad."""

import json

import numpy as np
import pytest

from safe_rlhf_jax.data.examples import load_pairs, load_prompts, load_supervised
from safe_rlhf_jax.data.formats import FORMATS, other_formats, recognise
from safe_rlhf_jax.data.records import LABELS, LEFT_OUT, UNUSABLE, LeftOut, Unusable, label_of
from safe_rlhf_jax.data.report import values_of
from safe_rlhf_jax.data.sources import read_records
from safe_rlhf_jax.data.templates import TEMPLATES
from safe_rlhf_jax.data.texts import paired
from safe_rlhf_jax.data.tokenizer import load_tokenizer
from safe_rlhf_jax.stages.direct import safe_first

PAIR = {
    "prompt": "how", "response_0": "so .", "response_1": "no .", "better_response_id": 0, "safer_response_id": 1,
    "is_response_0_safe": False, "is_response_1_safe": True,
}  # fmt: skip
IDS, TRUTHS = LABELS["better_response_id"], LABELS["is_safe"]
NONE = (None, "", "  ", float("nan"))
NO_ID = ("yes", "no", "safe", "unsafe", "2", 2, -1, 0.5, "one", [1], {"0": 1}, "01", "None", "response_1")
NO_TRUTH = ("maybe", "2", 2, -1, 0.5, [True], {}, "None", "nan", "not safe", "unsafe?", "y")


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer("demo")


@pytest.fixture
def read(tmp_path):
    def from_file(records, **options):
        (tmp_path / "data.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
        return read_records(str(tmp_path / "data.jsonl"), **options)

    return from_file


def load(kind, records, tokenizer, max_bad=0.0):
    options = {"max_length": 256, "where": "here", "max_bad": max_bad}
    if kind == "sft":
        return load_supervised(records, TEMPLATES["plain"], tokenizer, **options)
    return load_pairs(records, TEMPLATES["plain"], tokenizer, safety=kind == "cost", **options)


# --- Spellings


@pytest.mark.parametrize("field", LABELS)
def test_label_is_one_of_few_spellings_and_nothing_else(field):
    is_id = LABELS[field] is IDS
    spellings = {
        0: [0, 0.0, "0", "0.0", " 0 ", False, "False", "FALSE"],
        1: [1, 1.0, "1", "1.0", True, "true", "True "],
    }
    words = {0: ["no", "Unsafe", "No"], 1: ["yes", "YES", "safe"]}
    for label in (0, 1):
        for value in spellings[label] + (words[label] if not is_id else []):
            assert label_of({field: value}, field) == label
    for value in NO_ID if is_id else NO_TRUTH:
        with pytest.raises(Unusable) as reason:
            label_of({field: value}, field)
        assert str(reason.value).startswith(f"{field} is neither ")
        assert str(reason.value).endswith(repr(value))
    for value in NONE:
        with pytest.raises(Unusable, match=f"^missing {field}$"):
            label_of({field: value}, field)


@pytest.mark.parametrize("value", ["False", "unsafe", "0", 0, 0.0, False, "no"])
def test_answer_that_is_labelled_unsafe_is_never_trained(read, tokenizer, value):
    records = [
        {"prompt": "how", "response": "so .", "is_safe": value},
        {"prompt": "how", "response": "no .", "is_safe": 1},
    ]
    for found in (records, read(records)):
        data = load("sft", found, tokenizer)
        assert [record["response"] for record in data.records] == ["no ."]
        assert data.left_out == {"the response is labelled unsafe": 1}
        assert data.skipped == {}


@pytest.mark.parametrize(
    ("value", "reason"), [("maybe", "is_safe is neither true nor false, but 'maybe'"), (None, "missing is_safe")]
)
def test_answer_whose_label_cannot_be_read_is_never_trained(read, tokenizer, value, reason):
    records = [
        {"prompt": "how", "response": "so .", "is_safe": value},
        {"prompt": "how", "response": "no .", "is_safe": 1},
    ]
    for found in (records, read(records)):
        assert load("sft", found, tokenizer, max_bad=0.5).skipped == {reason: 1}


def test_labels_come_from_files_as_numbers_and_truth_values_whatever_their_spelling(read):
    spelled = PAIR | {
        "better_response_id": "0.0",
        "safer_response_id": 1.0,
        "is_response_0_safe": "No",
        "is_response_1_safe": "safe",
    }
    (record, unread) = read([spelled, spelled | {"safer_response_id": "second"}])
    assert record == PAIR
    assert [type(record[field]) for field in LABELS if field in record] == [int, int, bool, bool]
    assert unread["safer_response_id"] == "second"


@pytest.mark.parametrize("spelling", [(False, True), ("False", "True"), (0, 1), ("unsafe", "safe"), (0.0, 1.0)])
def test_every_spelling_makes_the_same_pairs_in_every_stage(read, tokenizer, spelling):
    unsafe, safe = spelling
    records = read([PAIR | {"is_response_0_safe": unsafe, "is_response_1_safe": safe}] * 2)
    assert load("cost", records, tokenizer).arrays.safer_is_safe.tolist() == [True, True]
    assert safe_first(records)[0][0]["better_response_id"] == 1
    assert [(record["is_response_0_safe"], record["is_response_1_safe"]) for record in records] == [(False, True)] * 2


def test_categories_of_a_record_are_those_that_are_labelled_true():
    record = {
        "category": {"a": True, "b": "False", "c": "true", "d": 0, "e": "1", "f": None},
        "x_category": "half \ud83c",
    }
    assert values_of(record, "category") == ["a", "c", "e", "half ?"]


# --- Votes


@pytest.mark.parametrize(
    ("votes", "better"),
    [([0, 1, 1], 1), ([0], 0), (["1", 1.0, 0], 1), ([1, None, 1, 0], 1), ("[0, 0, 1]", 0)],
)
def test_majority_of_the_votes_is_the_label(read, votes, better):
    record = {"prompt": "how", "response_0": "so .", "response_1": "no .", "better_votes": votes}
    (found,) = read([record])
    assert found["better_response_id"] == better
    assert set(found["better_votes"]) <= {0, 1}
    (found,) = read([record | {"better_response_id": 1 - better}])
    assert found["better_response_id"] == 1 - better


@pytest.mark.parametrize("votes", [[0, 1], [], [0, 1, 1, 0]])
def test_pair_on_which_annotators_are_divided_is_left_out(read, tokenizer, votes):
    divided = {field: value for field, value in PAIR.items() if field != "better_response_id"} | {"better_votes": votes}
    data = load("reward", read([divided, PAIR]), tokenizer)
    assert data.left_out == {"as many annotators prefer one response as the other": 1}
    assert len(data) == 1


def test_prompt_of_a_pair_that_is_left_out_is_still_a_prompt(tokenizer):
    records = [
        FORMATS["pandalm"].read(PANDALM | {"annotator1": 0}),
        FORMATS["pandalm"].read(PANDALM | {"annotator1": 1, "response2": ""}),
    ]
    options = {"max_length": 256, "where": "here", "max_bad": 0.0}
    assert len(load_prompts(records, TEMPLATES["plain"], tokenizer, **options)) == 2


def test_annotators_who_are_divided_on_one_label_leave_the_other_alone(read, tokenizer):
    records = read([{f: v for f, v in PAIR.items() if f != "better_response_id"} | {"better_votes": [0, 1]}, PAIR])
    assert len(load("cost", records, tokenizer)) == 2
    assert load("sft", records, tokenizer).left_out == {"as many annotators prefer one response as the other": 1}


@pytest.mark.parametrize("votes", [[2], ["yes"], 1, {"a": 1}])
def test_votes_that_cannot_be_read_are_counted(read, votes):
    assert UNUSABLE in read([PAIR | {"better_votes": votes}, PAIR])[0]


# --- Shares and weights


def soft(kind, records, tokenizer, max_bad=0.0, **options):
    options = {"max_length": 256, "where": "here", "max_bad": max_bad, "shares": True} | options
    return load_pairs(records, TEMPLATES["plain"], tokenizer, safety=kind == "cost", **options)


def test_shares_of_annotators_come_from_votes_from_shares_and_from_single_labels(read, tokenizer):
    voted_pair, shared = PAIR | {"better_votes": [1, 1, 0]}, PAIR | {"better_share": "0.25"}
    arrays = soft("reward", read([voted_pair, shared, PAIR]), tokenizer).arrays
    np.testing.assert_allclose(arrays.share, [2 / 3, 0.75, 1.0], rtol=1e-6)
    data = load("reward", read([voted_pair, shared, PAIR]), tokenizer)
    assert (data.arrays.share, data.arrays.weight) == (None, None)
    # The votes say that the second response of the first record is better, its label that the first one is.
    first, chosen = np.asarray(data.arrays.chosen.tokens), np.asarray(arrays.chosen.tokens)
    np.testing.assert_array_equal(chosen[0], np.asarray(data.arrays.rejected.tokens)[0])
    np.testing.assert_array_equal(chosen[1:], first[1:])


def test_safety_labels_are_shares_of_both_responses_in_the_order_of_the_pair(read, tokenizer):
    votes = {"safer_votes": [1, 1, 1, 0], "response_0_safe_votes": ["unsafe", "safe"], "response_1_safe_share": 0.9}
    (record,) = read([{k: v for k, v in PAIR.items() if k != "is_response_0_safe"} | votes])
    assert record["response_0_safe_votes"] == [0, 1]
    batch = soft("cost", [record], tokenizer).arrays
    found = [float(x[0]) for x in (batch.shares.safer, batch.shares.safer_is_safe, batch.shares.unsafer_is_safe)]
    np.testing.assert_allclose(found, [0.75, 0.9, 0.5], rtol=1e-6)
    assert (batch.safer_is_safe.tolist(), batch.unsafer_is_safe.tolist()) == ([True], [False])
    left_out = load("cost", [record, PAIR], tokenizer).left_out
    assert left_out == {"as many annotators call a response safe as unsafe": 1}


@pytest.mark.parametrize("tie", [{"better_votes": [0, 1]}, {"better_share": 0.5}])
def test_divided_annotators_train_on_shares_and_are_left_out_of_majorities(read, tokenizer, tie):
    records = read([{k: v for k, v in PAIR.items() if k != "better_response_id"} | tie, PAIR])
    assert soft("reward", records, tokenizer).arrays.share.tolist() == [0.5, 1.0]
    assert load("reward", records, tokenizer).left_out == {"as many annotators prefer one response as the other": 1}


@pytest.mark.parametrize("share", [-0.1, 1.1, "most", True, [0.5], {}, "nan"])
def test_share_that_is_none_is_counted_as_a_bad_record(read, share):
    (record, _) = read([PAIR | {"better_share": share}, PAIR])
    assert record[UNUSABLE].startswith("better_share is no share from 0 to 1, but ")


def test_majority_of_a_share_is_the_label_where_there_is_no_other(read):
    unlabelled = {k: v for k, v in PAIR.items() if k != "better_response_id"}
    labels = [read([unlabelled | {"better_share": s}])[0].get("better_response_id") for s in (0, 0.4, 0.5, 0.6, 1)]
    assert labels == [0, 0, None, 1, 1]
    assert read([PAIR | {"better_share": 0.9}])[0]["better_response_id"] == 0


def test_contradictory_labels_are_bad_and_divided_annotators_may_contradict_each_other(tokenizer):
    wrong = PAIR | {"safer_response_id": 0}
    reason = "the safer response is labelled unsafe, the other safe"
    assert soft("cost", [wrong, PAIR], tokenizer, max_bad=0.5).skipped == {reason: 1}
    assert len(soft("cost", [wrong | {"response_0_safe_votes": [0, 0, 1]}], tokenizer)) == 1


def test_weights_are_relative_to_their_mean(tokenizer):
    records = [PAIR | {"trust": w} for w in (1, "3", 0.0, 4.0)]
    data = load_pairs(
        records, TEMPLATES["plain"], tokenizer, safety=False, max_length=256, where="here", max_bad=0.0,
        weight_field="trust",
    )  # fmt: skip
    np.testing.assert_allclose(data.arrays.weight, [0.5, 1.5, 0.0, 2.0], rtol=1e-6)
    equal = soft("reward", [PAIR | {"trust": 0.3}] * 3, tokenizer, weight_field="trust").arrays.weight
    np.testing.assert_array_equal(equal, np.ones(3, np.float32))


@pytest.mark.parametrize("weight", [-1, "heavy", None, float("nan"), float("inf"), True])
def test_weight_that_is_none_is_counted_as_a_bad_record(tokenizer, weight):
    data = soft("reward", [PAIR | {"trust": weight}, PAIR | {"trust": 1}], tokenizer, 0.5, weight_field="trust")
    (reason,) = data.skipped
    assert "trust" in reason
    with pytest.raises(ValueError, match="trust is 0 in all records"):
        soft("reward", [PAIR | {"trust": 0}], tokenizer, weight_field="trust")


def test_labels_of_one_response_by_several_annotators_are_votes_of_the_pair_it_is_in():
    labels = {"a": (True, True, False), "b": (False,)}
    records = [{"prompt": "how", "response": r, "is_safe": label} for r, given in labels.items() for label in given]
    (pair,) = [record for record in paired(records) if LEFT_OUT not in record]
    assert pair["response_0_safe_votes"] == [1, 1, 0]
    assert "response_1_safe_votes" not in pair


DRAW = object()


def is_draw(record):
    with pytest.raises(LeftOut, match="as many annotators prefer one response as the other"):
        label_of(record, "better_response_id")
    return True


PANDALM = {"instruction": "how", "input": "", "response1": "so .", "response2": "no ."}


@pytest.mark.parametrize(
    ("choices", "votes", "better"),
    [((1, 2, 2), [0, 1, 1], 1), ((1, 0, 0), [0], 0), (("2", 2.0, "1"), [1, 1, 0], 1), ((1, None, 1), [0, 0], 0)],
)
def test_choices_of_annotators_are_votes_and_ties_are_none(choices, votes, better):
    raw = PANDALM | {f"annotator{i}": choice for i, choice in enumerate(choices, 1)}
    record = FORMATS["pandalm"].read(raw)
    assert (record["better_votes"], record["better_response_id"]) == (votes, better)


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"annotator1": 1, "annotator2": 2}, DRAW), ({"annotator1": 0}, DRAW), ({"annotator1": 3}, UNUSABLE),
        ({"annotator1": True}, UNUSABLE), ({"annotator1": "first"}, UNUSABLE),
        ({"annotator1": 1, "response2": " "}, LEFT_OUT), ({"annotator1": 1, "response2": True}, UNUSABLE),
    ],
)  # fmt: skip
def test_comparison_without_a_preference_is_left_out_or_counted(changes, field):
    record = FORMATS["pandalm"].read(PANDALM | changes)
    assert is_draw(record) if field is DRAW else field in record


@pytest.mark.parametrize(
    ("preference", "better"),
    [
        (1, 0),
        (2, 1),
        (1.2, 0),
        ("1.9", 1),
        (0, DRAW),
        (1.5, DRAW),
        (3, UNUSABLE),
        (None, UNUSABLE),
        (True, UNUSABLE),
    ],
)
def test_preference_of_alpaca_eval_is_one_or_two(preference, better):
    raw = {"instruction": "how", "output_1": "so .", "output_2": "no .", "preference": preference}
    record = FORMATS["alpaca_eval"].read(raw)
    assert is_draw(record) if better is DRAW else better in (record.get("better_response_id"), *record)


RATINGS = {
    "NaN": float("nan"), "inf": float("inf"), "text": "N/A", "null": None, "bool": True, "huge": 10**400, "list": [5],
}  # fmt: skip


@pytest.mark.parametrize("rating", RATINGS)
def test_completion_without_a_rating_decides_nothing(rating):
    scores = (RATINGS[rating], 2.0, 5.0)
    completions = [{"response": f"{s}", "fine-grained_score": s, "overall_score": 3.0} for s in scores]
    record = FORMATS["ultrafeedback"].read({"instruction": "how", "completions": completions})
    assert record[UNUSABLE] == "a completion without a score"


def test_ratings_may_be_written_as_text_and_completions_too():
    completions = [{"response": text, "overall_score": score} for text, score in (("so .", "4.5"), ("no .", "12"))]
    for written in (completions, json.dumps(completions), str(completions)):
        record = FORMATS["ultrafeedback"].read({"instruction": "how", "completions": written})
        assert (record["response_0"], record["response_1"]) == ("no .", "so .")
    record = FORMATS["ultrafeedback"].read({"instruction": "how", "completions": ["so .", "no ."]})
    assert record[UNUSABLE] == "a completion is no object with a response and a score"


# --- What is left out


def answers(prompts=20, per_prompt=7, safe=3):
    return [
        {"prompt": f"how {p}", "response": f"so {chr(97 + i)} .", "is_safe": i < safe}
        for p in range(prompts)
        for i in range(per_prompt)
    ]


def test_answers_without_a_partner_are_left_over_and_not_bad(tokenizer):
    data = load("cost", answers(), tokenizer)
    assert len(data) == 60
    assert data.skipped == {}
    assert data.left_out == {"no response with the other label to the same prompt": 20}
    data = load("sft", answers(), tokenizer)
    assert len(data) == 60
    assert (data.skipped, data.left_out) == ({}, {"the response is labelled unsafe": 80})


def test_nothing_but_left_out_records_is_an_error_that_says_so(tokenizer):
    with pytest.raises(
        ValueError, match=r"here: 0 of 140 records cannot be used \(\); 140 are left out \(no response with"
    ):
        load("cost", answers(safe=0), tokenizer)


def test_label_that_cannot_be_read_is_bad_also_among_single_answers(tokenizer):
    records = [*answers(), {"prompt": "how 0", "response": "x", "is_safe": "perhaps"}]
    data = load("cost", records, tokenizer, max_bad=0.1)
    assert data.skipped == {"is_safe is neither true nor false, but 'perhaps'": 1}


def test_majority_of_the_labels_of_one_response_counts():
    labels = {"a": (True, True, False), "b": (False, False), "c": (True, False)}
    records = [{"prompt": "how", "response": r, "is_safe": label} for r, given in labels.items() for label in given]
    made = paired(records)
    pairs = [(record["response_0"], record["response_1"]) for record in made if LEFT_OUT not in record]
    assert pairs == [("a", "b")]
    assert [record["response"] for record in made if LEFT_OUT in record] == ["a", "a", "b", "c", "c"]


def test_records_of_the_error_and_the_counts_say_where_they_were_read(read, tokenizer):
    records = [
        PAIR,
        PAIR | {"better_response_id": None},
        PAIR | {"response_1": "so ."},
        PAIR | {"better_response_id": ""},
    ]
    data = load("reward", read(records), tokenizer, max_bad=1.0)
    assert {reason: place.rpartition("/")[2] for reason, place in data.places.items()} == {
        "missing better_response_id": "data.jsonl:2", "identical responses": "data.jsonl:3",
    }  # fmt: skip
    with pytest.raises(ValueError, match=r"First: \S*data\.jsonl:2: \{.*; \S*data\.jsonl:3: \{"):
        load("reward", read(records), tokenizer)


def test_error_lists_a_few_of_many_reasons(tokenizer):
    records = [PAIR | {"better_response_id": f"value {i}"} for i in range(100)]
    with pytest.raises(ValueError, match="92 more reasons") as error:
        load("reward", records, tokenizer)
    assert len(str(error.value)) < 2500


# --- Formats that are not the only choice


@pytest.mark.parametrize(
    ("record", "format_", "others"),
    [
        ({"prompt": "a", "chosen": "b", "rejected": "c", "messages": [1]}, "trl_preference", ["messages"]),
        ({"prompt": "a", "chosen": "b", "rejected": "c", "messages": None}, "trl_preference", []),
        (
            {"prompt": "a", "response_0": "b", "response_1": "c", "chosen": "b", "rejected": "c"},
            "pku",
            ["trl_preference"],
        ),
        ({"prompt": "a", "completion": "b", "label": True}, "prompts", ["trl_completion"]),
        ({"instruction": "a", "output": "b", "prompt": "c"}, "alpaca", ["prompts"]),
        (PAIR | {"response": "a", "is_safe": True, "messages": [1]}, "pku", []),
    ],
)
def test_formats_that_would_read_other_columns_are_told(record, format_, others):
    assert recognise([record], None, "here") == format_
    told = other_formats([record], format_)
    assert set(others) <= set(told)
    assert bool(told) == bool(others)


def test_format_that_is_not_the_only_choice_is_said_and_the_others_columns_are_not_read(read, tokenizer, capsys):
    messages = [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}]
    (record,) = read([{"prompt": "how", "chosen": "so .", "rejected": "no .", "messages": messages, "score": 1}])
    assert "read as trl_preference; the columns also fit messages: `format` names another" in capsys.readouterr().out
    assert record.keys() == {"prompt", "response_0", "response_1", "better_response_id", "score"}
    (record,) = read([{"prompt": "how", "chosen": "so .", "rejected": "no .", "messages": messages}], format="messages")
    assert capsys.readouterr().out == ""
    assert record["messages"] == messages
