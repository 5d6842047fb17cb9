"""Whatever stands in a file, reading it gives records or one line that names it, and only what a format allows is used.

`allowed` says what that is, from the raw record and by other means than the code: nothing of `formats` is used.
"""

import copy
import csv
import gzip
import io
import itertools
import json
import math
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from safe_rlhf_jax.data.examples import load_pairs, load_prompts, load_supervised
from safe_rlhf_jax.data.sources import read_records
from safe_rlhf_jax.data.templates import TEMPLATES
from safe_rlhf_jax.data.texts import shown
from safe_rlhf_jax.data.tokenizer import load_tokenizer
from tests.data.test_formats import SAMPLES

WRITTEN = re.compile(r"""\[\{['"]role['"]: ['"](user|assistant)""")  # turns written as text
NUMBERS = itertools.count()
KINDS = ("sft", "reward", "cost", "prompts")
SUFFIXES = (".json", ".jsonl", ".csv", ".parquet", ".json.gz", ".jsonl.gz", ".csv.gz")
FALSE = ("0", "0.0", "false")
TRUE = ("1", "1.0", "true")
UNSAFE, SAFE = (*FALSE, "no", "unsafe"), (*TRUE, "yes", "safe")

TEXTS = st.one_of(
    st.text(st.characters(exclude_categories=()), max_size=8),  # lone surrogates and control characters too
    st.sampled_from(
        [
            "", " ", "1", "0.0", "true", "No", "safe", "maybe", "nan", "so .", "a\x00b", "\ud83c", "\\ud83c", "[",
            "[{'role': 'user', 'content': 'a'}]", '[{"role": "assistant", "content": "b"}]', "[{'role': 'user'}\n {}]",
            "\n\nHuman: a\n\nAssistant:", "\n\nHuman: a\n\nAssistant: b", "Human: a\nAssistant: b", "Say ASSISTANT:",
        ]
    ),
)  # fmt: skip
NAMES = st.one_of(TEXTS, st.sampled_from(["role", "content", "from", "value", "type", "text", "response", "unusable"]))
VALUES = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), TEXTS, st.just(10**400), st.integers(0, 2)),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(NAMES, inner, max_size=3)),
    max_leaves=6,
)


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer("demo")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("fuzzed")


def read(folder, suffix, content):
    """The records of a file with this content; None where it was refused, by one line that names it."""
    path = folder / f"{next(NUMBERS)}{suffix}"
    path.write_bytes(content)
    try:
        return read_records(str(path))
    except ValueError as error:
        problem = str(error)
    finally:
        path.unlink()
    assert path.name in problem
    assert "\n" not in problem
    return None


def used(kind, records, tokenizer):
    """The records that a stage takes of these."""
    options = {"max_length": 256, "where": "here", "max_bad": 1.0}
    try:
        if kind == "sft":
            return load_supervised(records, TEMPLATES["plain"], tokenizer, **options).records
        if kind == "prompts":
            data = load_prompts(records, TEMPLATES["plain"], tokenizer, **options)
            return [record | {"prompt": shown(turns)} for record, turns in zip(data.records, data.turns, strict=True)]
        return load_pairs(records, TEMPLATES["plain"], tokenizer, safety=kind == "cost", **options).records
    except ValueError as error:
        problem = str(error)
    assert "None is left" in problem
    assert "\n" not in problem
    problem.encode()
    return []


# --- Bytes


def contents(suffix):
    """A sound file of records, of every format."""
    records = [record for _, record, _ in SAMPLES.values()]
    if suffix.startswith(".parquet"):
        from tests.data.test_sources import parquet

        return parquet(records[:1])
    if suffix.startswith(".csv"):
        return b'prompt,response_0,response_1,better_response_id\nhow,"so, .",no .,0\nwhy,yes .,no .,1\n'
    text = "\n".join(map(json.dumps, records)) if suffix.startswith(".jsonl") else json.dumps(records, indent=1)
    return text.encode()


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_bytes_are_read_or_refused_by_name(folder, tokenizer, suffix):
    sound = contents(suffix)

    @settings(max_examples=60)
    @given(st.data())
    def check(data):
        start, end = sorted(data.draw(st.tuples(*[st.integers(0, len(sound))] * 2)))
        inserted = data.draw(st.binary(max_size=6))
        how = data.draw(st.sampled_from(["anything", "cut", "replaced", "packed"]))
        content = {
            "anything": inserted,
            "cut": sound[:end],
            "replaced": sound[:start] + inserted + sound[end if end < start + 9 else start :],
            "packed": sound,
        }[how]
        if suffix.endswith(".gz"):
            content = gzip.compress(content, mtime=0)
            content = content[: data.draw(st.integers(0, len(content)))] if how == "packed" else content
        records = read(folder, suffix, content)
        for kind in KINDS if records else ():
            used(kind, records, tokenizer)

    check()


# --- Values


def changed(data, record):
    """A copy of a record in which one value, at any depth, is another."""
    record = copy.deepcopy(record)
    place = record
    while True:
        key = data.draw(st.sampled_from(list(place) if isinstance(place, dict) else range(len(place))))
        if not isinstance(place[key], dict | list) or not place[key] or data.draw(st.booleans()):
            break
        place = place[key]
    if isinstance(place, dict) and data.draw(st.integers(0, 4)) == 0:
        del place[key]
    else:
        place[key] = data.draw(VALUES)
    return record


@pytest.mark.parametrize("name", SAMPLES)
def test_only_what_a_format_allows_is_used(folder, tokenizer, name):
    format_, sound, _ = SAMPLES[name]

    @settings(max_examples=25)
    @given(st.data())
    def check(data):
        raw = [sound | {"tag": 0}, changed(data, sound | {"tag": 1}), sound | {"tag": 2}]
        raw[1]["tag"] = 1
        suffix = data.draw(st.sampled_from([".jsonl", ".json", ".csv"]))
        if suffix == ".csv":
            spelled_as = data.draw(st.sampled_from([str, json.dumps]))
            content = table(raw, spelled_as)
            raw = [{name: in_table(name, value, spelled_as) for name, value in record.items()} for record in raw]
        else:
            content = ("\n".join(map(json.dumps, raw)) if suffix == ".jsonl" else json.dumps(raw)).encode()
        read_ = read(folder, suffix, content)
        assert read_ is not None or suffix == ".csv", "two of three records are sound"
        for kind in KINDS if read_ else ():
            for record in used(kind, read_, tokenizer):
                told = raw[int(record["tag"])]
                assert allowed(format_, kind, told, record), (kind, told, record)

    check()


def in_table(name, value, spelled_as):
    """What a value is in a table: text, but for turns and for lists in columns that hold nothing else."""
    if isinstance(value, list | dict):
        turns = value if isinstance(value, list) else [value]
        known = ("user", "assistant", "human", "gpt", "system")
        are_turns = any(
            {"role", "content"} <= turn.keys() or turn.get("role") in known or turn.get("from") in known
            for turn in turns
            if isinstance(turn, dict)
        )
        return (
            value if name in ("messages", "conversations", "completions", "turns") or are_turns else spelled_as(value)
        )
    return "" if value is None else str(value)


def table(records, spelled_as):
    """CSV of records; what stands in none of the columns of the first is lost."""
    out = io.StringIO(newline="")
    writer = csv.DictWriter(out, list(records[0]), extrasaction="ignore")
    writer.writeheader()
    for record in records:
        writer.writerow({k: spelled_as(v) if isinstance(v, list | dict) else v for k, v in record.items()})
    return out.getvalue().encode(errors="surrogatepass")


def allowed(format_, kind, raw, record):
    """Says whether a stage may use a record in this form, by what the raw record says."""
    strings = set(strings_in(raw))
    if kind == "prompts":  # turns are written out for people
        return from_raw(re.sub(r"(?:^|\n\n)(user|assistant|system): ", " ", record["prompt"]), strings)
    prompt = record["prompt"] if record.get("prompt") is not None else record["messages"]
    turns = prompt if isinstance(prompt, list) else [{"role": "user", "content": prompt}]
    spoken = [turn for turn in turns if turn["role"] != "system"]
    used_texts = [prompt, *(record.get(name) for name in ("response", "response_0", "response_1"))]
    if any(isinstance(text, str) and text in raw.values() and WRITTEN.match(text) for text in used_texts):
        return False
    ours = kind == "sft" and "messages" in record
    if any(turn["role"] != ("user", "assistant")[i % 2] for i, turn in enumerate(spoken)) or (ours and len(spoken) % 2):
        return False
    if not all(from_raw(turn["content"], strings) for turn in turns):
        return False
    if ours:
        return True
    if kind == "sft" and "response" in record:
        labelled_unsafe = format_ == "qa" and spelled(raw.get("is_safe")) not in SAFE
        return from_raw(record["response"], strings) and not labelled_unsafe
    responses = [record["response_0"], record["response_1"]]
    if kind == "sft":
        better = record["better_response_id"]
        return from_raw(responses[better], strings) and prefers(format_, raw, responses[better], responses[1 - better])
    if responses[0] == responses[1] or not all(from_raw(response, strings) for response in responses):
        return False
    if kind == "cost":
        safer, *safe = (raw.get(name) for name in ("safer_response_id", "is_response_0_safe", "is_response_1_safe"))
        if spelled(safer) not in TRUE + FALSE or any(spelled(label) not in SAFE + UNSAFE for label in safe):
            return False
        i = int(spelled(safer) in TRUE)
        return spelled(safe[i]) in SAFE or spelled(safe[1 - i]) in UNSAFE
    better = record["better_response_id"]
    return prefers(format_, raw, responses[better], responses[1 - better])


def prefers(format_, raw, better, worse):
    """Says whether a raw record prefers one response to the other."""
    if format_ == "pku":
        i = int(spelled(raw["better_response_id"]) in TRUE)
        known = spelled(raw["better_response_id"]) in TRUE + FALSE
        return known and from_raw(better, set(strings_in(raw[f"response_{i}"])))
    if format_ == "pandalm":
        votes = [float(raw[f"annotator{i}"] or 0) for i in (1, 2, 3) if f"annotator{i}" in raw]
        if any(vote not in (0, 1, 2) for vote in votes):
            return False
        return better == raw["response1" if votes.count(1) > votes.count(2) else "response2"]
    if format_ == "alpaca_eval":
        return better == raw["output_1" if float(raw["preference"]) < 1.5 else "output_2"]
    if format_ == "ultrafeedback":
        names = ("fine-grained_score", "overall_score", "score")
        name = next(n for n in names if any(completion.get(n) is not None for completion in raw["completions"]))
        scores = [(float(completion[name]), completion.get("response")) for completion in raw["completions"]]
        best = max(score for score, text in scores if text == better)
        return all(math.isfinite(score) for score, _ in scores) and (best, better) == max(scores, key=lambda s: s[0])
    sides = [set(strings_in(raw[side])) for side in ("chosen", "rejected")]
    return from_raw(better, sides[0]) and (not worse.strip() or from_raw(worse, sides[1]))


def spelled(value):
    return str(value).strip().lower()


def from_raw(text, strings):
    """Says whether a text that is used stands in the raw record: whole, in a transcript, or joined from parts."""
    if not text.strip():
        return False
    text.encode()  # no half of a character
    return any(text in string for string in strings) or all(
        any(word in string for string in strings) for word in text.split(" ")
    )


def strings_in(value):
    """Yields the texts in a value, also those in a list that is written as text."""
    if isinstance(value, dict | list):
        for item in value.values() if isinstance(value, dict) else value:
            yield from strings_in(item)
    elif isinstance(value, str):
        yield value
