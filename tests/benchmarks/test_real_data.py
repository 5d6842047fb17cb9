"""The data of benchmarks/real: parts that share no conversation, and evaluation sets that nothing is trained on."""

import csv
import gzip
import itertools
import json

import pytest

from benchmarks.real.prepare import EVALUATION, PAIRS, PARTS, settled, tables, words
from safe_rlhf_jax.data.sources import opening

N = 60  # conversations in each file


def transcript(question, answer):
    return f"\n\nHuman: {question}\n\nAssistant: Why?\n\nHuman: Tell me\n\nAssistant: {answer}"


def write(path, records):
    text = "".join(json.dumps(record) + "\n" for record in records) if ".jsonl" in path.name else json.dumps(records)
    path.write_bytes(gzip.compress(text.encode()) if path.suffix == ".gz" else text.encode())


@pytest.fixture
def data(tmp_path):
    """Files in the published formats, whose openings overlap between files and with every evaluation set."""
    asked = [f"How do I make thing number {i}?" for i in range(N)]
    unsafe_first = {"is_response_0_safe": False, "is_response_1_safe": True, "safer_response_id": 1}
    safety = [{"prompt": q, "response_0": "Like so", "response_1": "I will not"} | unsafe_first for q in asked]
    hh = [{"chosen": transcript(q.upper(), "Good"), "rejected": transcript(q.upper(), "Bad")} for q in asked]
    more = [{"chosen": transcript(f"Other {i}", "Good"), "rejected": transcript(f"Other {i}", "Bad")} for i in range(N)]
    write(tmp_path / PAIRS["safety"][0], safety)
    write(tmp_path / PAIRS["harmless"][0], hh)
    write(tmp_path / PAIRS["helpful"][0], hh + more)
    alpaca = [{"instruction": f"Name thing {i}", "input": "", "output": "A name"} for i in range(N)]
    write(tmp_path / "alpaca_en_demo.json", alpaca)
    taken = iter(q.replace("?", " ?") for q in asked)  # one opening each, in another spelling
    for name in ("beavertails", "saferlhf"):
        write(tmp_path / EVALUATION[name], [{"prompt": next(taken), "category": "c"}])
    for name, fields in (("simple_safety_tests", ("prompts_final",)), ("xstest", ("prompt", "label", "type"))):
        with (tmp_path / EVALUATION[name]).open("w", newline="") as file:
            csv.writer(file).writerows([fields, [next(taken), "safe", "homonyms"][: len(fields)]])
    write(tmp_path / EVALUATION["do_not_answer"], [{"prompt": next(taken), "risk_area": "r"}])
    write(tmp_path / EVALUATION["vicuna"], [{"question_id": 1, "category": "c", "turns": [next(taken)]}])
    outputs = [
        {"instruction": q, "dataset": "koala", "output": "o", "generator": "g"} for q in (next(taken), "x " * 65)
    ]
    write(tmp_path / EVALUATION["alpaca_eval"], outputs)
    return tmp_path


def count_words(text):
    return len(text.split())


def openings(records):
    return {words(opening(record)) for record in records}


def test_no_opening_is_in_two_parts_of_any_files(data):
    out = tables(data, count_words)
    of_part = {p: openings(itertools.chain(*(out[f"{name}_{p}"] for name in PAIRS))) for p in PARTS}
    assert all(of_part.values())
    for a, b in itertools.combinations(PARTS, 2):
        assert of_part[a].isdisjoint(of_part[b])
    assert openings(out["prompts_train"]).isdisjoint(of_part["judge"] | of_part["test"])
    assert openings(out["prompts_eval"]).isdisjoint(of_part["run"] | of_part["judge"])
    assert {r["group"] for r in out["prompts_train"]} == {"risky", "benign"}
    for prompts in (out["prompts_train"], out["prompts_eval"]):
        assert len(openings(prompts)) == len(prompts)


def test_no_evaluation_prompt_is_in_a_part_in_whatever_spelling(data):
    out = tables(data, count_words)
    held_out = {words(f"How do I make thing number {i}?") for i in range(len(EVALUATION))}
    sets = ("beavertails", "saferlhf", "xstest_safe", "xstest_unsafe", "benign")
    others = [records for name, records in out.items() if name not in sets]
    assert all(openings(records).isdisjoint(held_out) for records in others)
    assert [len(out[name]) for name in sets] == [1, 1, 1, 0, 2]  # the longest is left out
    assert out["xstest_safe"][0].keys() == {"prompt", "group", "category"}


def test_pairs_without_safety_labels_say_only_what_people_said(data):
    out = tables(data, count_words)
    for p in PARTS:
        assert openings(out[f"benign_{p}"]) == openings(out[f"helpful_{p}"])  # all are short
        assert {row["safer_share"] for row in out[f"benign_{p}"]} == {0.5}
        assert {row[f"response_{i}_safe_share"] for row in out[f"benign_{p}"] for i in (0, 1)} == {1.0}
        assert [row["safer_share"] for row in out[f"ranked_{p}"]] == [
            row["better_response_id"] for row in out[f"harmless_{p}"]
        ]
        assert {row[f"response_{i}_safe_share"] for row in out[f"ranked_{p}"] for i in (0, 1)} == {0.5}


def test_a_pair_in_either_order_counts_once_with_the_label_of_most():
    pair = {"prompt": "q", "response_0": "a", "response_1": "b", "safer_response_id": 0}
    turned = {"prompt": "q", "response_0": "b", "response_1": "a", "safer_response_id": 0}  # prefers b
    assert settled([turned, pair, pair], "safer_response_id") == [pair]
    assert settled([turned, pair], "safer_response_id") == []
