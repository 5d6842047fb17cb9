"""Records are read as they stand, or refused with the place where they cannot be."""

import contextlib
import gzip
import io
import json
import re
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

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


def parquet(records):
    import pyarrow
    import pyarrow.parquet

    buffer = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(records), buffer)
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.jsonl", lines(RECORDS).encode()),
        ("a.jsonl", b"\xef\xbb\xbf" + lines(RECORDS).replace("\n", "\r\n\n").encode()),
        ("a.jsonl.gz", gzip.compress(lines(RECORDS).encode(), mtime=0)),
        ("a.json", json.dumps(RECORDS, indent=1).encode()),
        ("a.json.gz", gzip.compress(json.dumps(RECORDS).encode(), mtime=0)),
        ("a.csv", 'prompt\none\n"two\u2028lines"\nthree\n'.encode()),
        ("a.csv.gz", gzip.compress("prompt\none\ntwo\u2028lines\nthree\n".encode(), mtime=0)),
        ("a.parquet", parquet(RECORDS)),
    ],
)
def test_file_is_read_in_each_format(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    assert read_records(str(tmp_path / name), "train") == RECORDS
    assert read_records(str(tmp_path / name), "train", 2) == RECORDS[:2]


def test_labels_of_a_csv_file_are_numbers_and_texts_stay_text(tmp_path):
    text = (
        'prompt,response_0,response_1,better_response_id,is_response_0_safe\n7,"a, ""b""\nc",d,1,True\n8,x,y,0,false\n'
    )
    (tmp_path / "a.csv").write_text(text)
    first, second = read_records(str(tmp_path / "a.csv"))
    assert first == {
        "prompt": "7", "response_0": 'a, "b"\nc', "response_1": "d", "better_response_id": 1, "is_response_0_safe": True
    }  # fmt: skip
    assert (second["better_response_id"], second["is_response_0_safe"]) == (0, False)


@pytest.mark.parametrize(
    ("name", "content", "parts"),
    [
        ("a.jsonl", b'{"a": 1}\n\n{"a": 2\n', ["line 3, column 8", "not JSON"]),
        ("a.json", b'[{"a": 1},\n {"a" 2}]', ["line 2, column 7", "not JSON"]),
        ("a.jsonl", b'{"a": 1}\n[2]\n', ["line 2", "no JSON object", "[2]"]),
        ("a.json", b'[{"a": 1}, "two"]', ["record 2", "no JSON object", "two"]),
        ("a.jsonl", b'{"a": "b"}\n{"a": "\xff"}', ["line 2", "not UTF-8"]),
        ("a.jsonl.gz", gzip.compress(b'{"a": "\xff"}', mtime=0), ["line 1", "not UTF-8"]),
        ("a.jsonl.gz", b'{"a": 1}', ["cannot be read"]),
        ("a.jsonl.gz", gzip.compress(b'{"a": 1}' * 99, mtime=0)[:-9], ["cannot be read"]),
        ("a.jsonl", b"", ["no records"]),
        ("a.json", b"[]", ["no records"]),
        ("a.csv", b"", ["no records"]),
        ("a.csv", b"prompt\n", ["no records"]),
        ("a.csv", b"prompt,response\na,b\nc\n", ["line 3", "1 values under 2 columns"]),
        ("a.csv", b'prompt\n"a\n', ["is not CSV"]),
        ("a.parquet", b"PAR1 no more", ["cannot be read as Parquet"]),
        ("a.parquet", parquet(RECORDS)[:-9], ["cannot be read as Parquet"]),
        ("a.txt", b"one\n", ["ends in none of .json, .jsonl, .parquet, .csv"]),
    ],
)
def test_file_that_cannot_be_read_says_where(tmp_path, name, content, parts):
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(ValueError, match=name.replace(".", r"\.")) as error:
        read_records(str(path), "train")
    assert all(part in str(error.value) for part in parts), error.value
    assert "\n" not in str(error.value)


def test_folder_gives_the_files_of_a_split(tmp_path):
    (tmp_path / "part").mkdir()
    for name, text in {"train-0.jsonl": "a", "part/more.jsonl": "b", "test.jsonl": "c", "notes.txt": "d"}.items():
        (tmp_path / name).write_text(lines([{"prompt": text}]))
    assert {record["prompt"] for record in read_records(str(tmp_path))} == {"a", "b"}
    assert read_records(str(tmp_path), "test") == [{"prompt": "c"}]
    with pytest.raises(ValueError, match=r"split 'dev' has no files; the folder has test, train"):
        read_records(str(tmp_path), "dev")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"has no \.json"):
        read_records(str(tmp_path / "empty"))


def test_file_that_changes_is_read_again(tmp_path):
    (tmp_path / "a.jsonl").write_text(lines(RECORDS[:1]))
    assert len(read_records(str(tmp_path / "a.jsonl"))) == 1
    (tmp_path / "a.jsonl").write_text(lines(RECORDS))
    assert len(read_records(str(tmp_path / "a.jsonl"))) == 3


# --- Hubs


def test_saved_data_set_is_read_by_split(tmp_path):
    import datasets

    table = datasets.Dataset.from_list(RECORDS)
    table.save_to_disk(tmp_path / "one")
    datasets.DatasetDict(train=table, test=table.select([0])).save_to_disk(tmp_path / "both")
    assert read_records(str(tmp_path / "one")) == RECORDS
    assert read_records(str(tmp_path / "both"), "test") == RECORDS[:1]
    with pytest.raises(ValueError, match=r"split 'dev': the folder has train, test"):
        read_records(str(tmp_path / "both"), "dev")


def test_hub_id_is_loaded_by_datasets(tmp_path, monkeypatch):
    (tmp_path / "owner" / "name").mkdir(parents=True)
    (tmp_path / "owner" / "name" / "train.jsonl").write_text(lines(RECORDS))
    monkeypatch.chdir(tmp_path)  # a folder of this name stands for the hub
    assert read_records("hf:owner/name") == RECORDS
    assert len(read_records("hf:owner/name:1/3")) == 1
    with pytest.raises(ValueError, match=r"data 'hf:owner/name': split 'dev' cannot be loaded: .*HF_HUB_OFFLINE"):
        read_records("hf:owner/name", "dev")


def test_data_set_of_tensorflow_datasets_is_read_without_tensorflow(tmp_path, monkeypatch):
    tfds = pytest.importorskip("tensorflow_datasets")
    (tmp_path / "answers").mkdir()
    (tmp_path / "answers" / "__init__.py").touch()
    (tmp_path / "answers" / "answers_dataset_builder.py").write_text(TFDS_BUILDER)
    monkeypatch.syspath_prepend(tmp_path)
    from answers.answers_dataset_builder import Builder

    Builder(data_dir=tmp_path / "data", file_format="array_record").download_and_prepare()
    tfds.core.add_data_dir(tmp_path / "data")
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    assert read_records("tfds:answers", "train") == [{"messages": turns, "severity": 2, "kind": "b"}] * 3
    assert "tensorflow" not in sys.modules
    with pytest.raises(ValueError, match="data 'tfds:no_such': split 'train' cannot be loaded"):
        read_records("tfds:no_such")


TFDS_BUILDER = """
import numpy as np
import tensorflow_datasets as tfds

class Builder(tfds.core.GeneratorBasedBuilder):
    VERSION = tfds.core.Version("1.0.0")

    def _info(self):
        turn = {"role": tfds.features.Text(), "content": tfds.features.Text()}
        features = {"messages": tfds.features.Sequence(turn), "severity": tfds.features.Scalar(dtype=np.int64)}
        features["kind"] = tfds.features.ClassLabel(names=["a", "b"])
        return self.dataset_info_from_configs(features=tfds.features.FeaturesDict(features))

    def _split_generators(self, _):
        return {"train": self._generate_examples()}

    def _generate_examples(self):
        turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
        for i in range(3):
            yield i, {"messages": turns, "severity": 2, "kind": "b"}
"""


# --- Splits, shares, repeats


def test_held_out_prompts_are_on_one_side_only(tmp_path):
    @given(st.lists(st.tuples(st.sampled_from("abcdefghijkl"), st.sampled_from("xy")), min_size=1), st.floats(0.1, 0.9))
    def check(pairs, share):
        records = [{"prompt": prompt * 3, "response": response} for prompt, response in pairs]
        (tmp_path / "a.jsonl").write_text(lines(records))
        sides = {}
        for split in ("train", "test"):
            sides[split] = []
            with contextlib.suppress(ValueError):  # of a side that is empty
                sides[split] = read_records(str(tmp_path / "a.jsonl"), split, test_share=share)
        assert not {r["prompt"] for r in sides["train"]} & {r["prompt"] for r in sides["test"]}
        together = sides["train"] + sides["test"]
        assert sorted(map(str, together)) == sorted(map(str, records))

    check()


def test_conversations_that_open_alike_are_on_one_side(tmp_path):
    def opened(i, more):
        turns = [{"role": "system", "content": "s"}, {"role": "user", "content": f" Question  {i} "}]
        return {"messages": [*turns, {"role": "assistant", "content": more}]}

    records = [opened(i, more) for i in range(40) for more in "ab"] + [{"prompt": f"question {i}"} for i in range(40)]
    (tmp_path / "chats.jsonl").write_text(lines(records[:80]))
    (tmp_path / "prompts.jsonl").write_text(lines(records[80:]))
    held_out = [
        {re.findall(r"\d+", str(r))[0] for r in read_records(str(tmp_path / name), "test", test_share=0.5)}
        for name in ("chats.jsonl", "prompts.jsonl")
    ]
    assert held_out[0] == held_out[1]
    assert 10 < len(held_out[0]) < 30


@pytest.mark.parametrize(("share", "count"), [("0.5", 10), ("1/4", 5), (".1", 2), ("2", 40), ("1.5", 30), ("1", 20)])
def test_share_of_a_data_set_is_the_same_every_time(tmp_path, share, count):
    (tmp_path / "a.jsonl").write_text(lines([{"prompt": str(i)} for i in range(20)]))
    name = f"{tmp_path / 'a.jsonl'}:{share}"
    prompts = [record["prompt"] for record in read_records(name)]
    assert len(prompts) == count
    assert len(set(prompts)) == min(count, 20)
    assert prompts == [record["prompt"] for record in read_records(name)]


@pytest.mark.parametrize("share", ["0", "0.0", "1/0"])
def test_share_must_be_positive(tmp_path, share):
    with pytest.raises(ValueError, match="the share after the colon must be above 0"):
        read_records(f"demo/sft:{share}")


def test_repeats_are_left_out_by_record_or_by_prompt(tmp_path):
    records = [{"prompt": p, "response": r} for p, r in ("ab", "ab", "ac", "bb")]
    (tmp_path / "a.jsonl").write_text(lines(records))
    kept = {unique: read_records(str(tmp_path / "a.jsonl"), unique=unique) for unique in (None, "record", "prompt")}
    assert kept == {None: records, "record": records[1:], "prompt": [records[0], records[3]]}


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
    assert data.arrays.loss_mask.any(1).all()


@needs("hh_rlhf_harmless_base_test.jsonl.gz")
def test_published_transcripts_become_batches(tokenizer):
    records = read_records(str(SHARED / "hh_rlhf_harmless_base_test.jsonl.gz"), "train", 200)
    options = {"max_length": 4096, "where": "hh", "max_bad": 0.05}
    pairs = load_pairs(records, TEMPLATES["beaver"], tokenizer, safety=False, **options)
    assert len(pairs) >= 190
    assert any(isinstance(record["prompt"], list) for record in pairs.records), "none of several turns: take more"
    assert len(load_supervised(records, TEMPLATES["beaver"], tokenizer, **options)) == len(pairs)


@needs("dpo_en_demo.json.gz")
def test_published_conversations_become_batches(tokenizer):
    records = read_records(str(SHARED / "dpo_en_demo.json.gz"))
    options = {"max_length": 8192, "where": "dpo", "max_bad": 0.05}
    pairs = load_pairs(records, TEMPLATES["plain"], tokenizer, safety=False, **options)
    assert len(pairs) >= 290
    with pytest.raises(ValueError, match="the template refuses: it has no place for a system message: 80"):
        load_pairs(records, TEMPLATES["beaver"], tokenizer, safety=False, **options)
