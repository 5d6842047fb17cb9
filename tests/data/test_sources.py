"""Records are read as they stand, or refused with the place where they cannot be."""

import gzip
import json
from pathlib import Path

import pytest

from safe_rlhf_jax.data.examples import load_pairs, load_prompts, load_supervised
from safe_rlhf_jax.data.sources import DATASETS, read_records
from safe_rlhf_jax.data.templates import TEMPLATES
from safe_rlhf_jax.data.tokenizer import load_tokenizer

RECORDS = [{"prompt": "one"}, {"prompt": "two\u2028lines"}, {"prompt": "three"}]
SHARED = Path(__file__).parent.parent.parent.parent / "shared" / "data"


def needs(name):
    return pytest.mark.skipif(not (SHARED / name).exists(), reason=f"../shared/data/{name} is absent")


def lines(records):
    return "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.jsonl", lines(RECORDS).encode()),
        ("a.jsonl", b"\xef\xbb\xbf" + lines(RECORDS).replace("\n", "\r\n\n").encode()),
        ("a.jsonl.gz", gzip.compress(lines(RECORDS).encode())),
        ("a.json", json.dumps(RECORDS, indent=1).encode()),
        ("a.json.gz", gzip.compress(json.dumps(RECORDS).encode())),
    ],
)
def test_file_is_read_in_each_format(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    assert read_records(str(tmp_path / name), "train") == RECORDS
    assert read_records(str(tmp_path / name), "train", 2) == RECORDS[:2]


@pytest.mark.parametrize(
    ("name", "content", "parts"),
    [
        ("a.jsonl", b'{"a": 1}\n\n{"a": 2\n', ["line 3, column 8", "not JSON"]),
        ("a.json", b'[{"a": 1},\n {"a" 2}]', ["line 2, column 7", "not JSON"]),
        ("a.jsonl", b'{"a": 1}\n[2]\n', ["line 2", "no JSON object", "[2]"]),
        ("a.json", b'[{"a": 1}, "two"]', ["record 2", "no JSON object", "two"]),
        ("a.jsonl", b'{"a": "\xff"}', ["UTF-8"]),
        ("a.jsonl.gz", b'{"a": 1}', ["cannot be read"]),
        ("a.jsonl.gz", gzip.compress(b'{"a": 1}' * 99)[:-9], ["cannot be read"]),
        ("a.jsonl", b"", ["no records"]),
        ("a.json", b"[]", ["no records"]),
    ],
)
def test_file_that_cannot_be_read_says_where(tmp_path, name, content, parts):
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(ValueError, match=name.replace(".", r"\.")) as error:
        read_records(str(path), "train")
    assert all(part in str(error.value) for part in parts), error.value


def test_split_of_a_file_is_refused_rather_than_ignored(tmp_path):
    (tmp_path / "a.jsonl").write_text(lines(RECORDS))
    with pytest.raises(ValueError, match="a file has no splits"):
        read_records(str(tmp_path / "a.jsonl"), "test")


def test_caller_cannot_change_what_the_next_one_reads():
    read_records("demo/prompts", "test").clear()
    assert len(read_records("demo/prompts", "test")) > 0


def test_a_dataset_is_one_line_to_add(monkeypatch):
    monkeypatch.setitem(DATASETS, "mine", lambda split: [{"prompt": split}])
    assert read_records("mine", "half") == [{"prompt": "half"}]


# --- Published formats


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer("demo")


@needs("pku_saferlhf_safety_pairs.jsonl.gz")
def test_published_safety_pairs_become_batches(tokenizer):
    name = str(SHARED / "pku_saferlhf_safety_pairs.jsonl.gz")
    options = {"max_length": 512, "where": "pku", "max_bad": 0.05}
    pairs = load_pairs(read_records(name, "train", 200), TEMPLATES["beaver"], tokenizer, safety=True, **options)
    assert len(pairs) >= 190
    # Every pair has exactly one safe response, and it is the safer one.
    assert pairs.arrays.safer_is_safe.all()
    assert not pairs.arrays.unsafer_is_safe.any()
    assert (pairs.arrays.safer.response_mask.any(1) & pairs.arrays.unsafer.response_mask.any(1)).all()
    with pytest.raises(ValueError, match="missing better_response_id: 200"):
        load_pairs(read_records(name, "train", 200), TEMPLATES["beaver"], tokenizer, safety=False, **options)
    prompts = load_prompts(read_records(name, "train", 200), TEMPLATES["beaver"], tokenizer, **options)
    assert len(prompts) >= 190


@needs("alpaca_en_demo.json")
def test_published_instructions_become_batches(tokenizer):
    records = read_records(str(SHARED / "alpaca_en_demo.json"), "train", 200)
    data = load_supervised(records, TEMPLATES["alpaca"], tokenizer, max_length=2048, where="alpaca", max_bad=0.05)
    assert len(data) >= 190
    assert any(record.get("input") for record in data.records), "none of them has an input: take more"
    assert data.arrays.loss_mask.any(1).all()
