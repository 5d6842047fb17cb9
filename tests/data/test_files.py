"""Folders and files as editors, spreadsheets, pandas and downloads leave them: read as meant, or refused by name."""

import bz2
import contextlib
import gzip
import io
import json
import lzma
import os

import pytest

from safe_rlhf_jax.data.__main__ import main
from safe_rlhf_jax.data.files import split_of
from safe_rlhf_jax.data.records import UNUSABLE, place_of
from safe_rlhf_jax.data.sources import data_files, read_records

PAIRS = [{"prompt": f"how {i}", "response": f"so {i} ."} for i in range(6)]


def lines(records):
    return "".join(json.dumps(record) + "\n" for record in records)


@pytest.fixture
def folder(tmp_path):
    """Writes files, {name: content}; returns the folder."""

    def write(files):
        for name, content in files.items():
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
        return tmp_path

    return write


@pytest.fixture
def reads(folder):
    """Returns the records of one file with this content."""
    return lambda name, content: read_records(str(folder({name: content}) / name))


def prompts(records):
    return [record["prompt"] for record in records]


# --- Folders


def test_hidden_files_and_metadata_are_no_data_and_what_is_left_out_is_said(folder, capsys):
    path = folder(
        {
            "train.jsonl": lines(PAIRS[:2]),
            "more.CSV": "prompt,response\na,b\n",
            "test-00000-of-00001.jsonl": lines(PAIRS[2:3]),
            ".ipynb_checkpoints/train-checkpoint.jsonl": lines(PAIRS[3:]),
            "._train.jsonl": b"\x00\x05\x16\x07\x00\x02\x00\x00Mac OS X",
            ".cache/huggingface/a.jsonl": lines(PAIRS[3:]),
            "dataset_infos.json": '{"default": {"features": {}}}',
            "dataset_dict.json": '{"splits": ["train"]}',
            "state.json": "{}",
            "train.metadata.json": "{}",
            "trainer_state.json": "{}",
            "README.md": "# Data",
        }
    )
    assert prompts(read_records(str(path))) == ["a", "how 0", "how 1"]
    out = capsys.readouterr().out
    assert "hidden: ._train.jsonl, .cache/huggingface/a.jsonl, .ipynb_checkpoints/train-checkpoint.jsonl;" in out
    assert (
        "no data: README.md, dataset_dict.json, dataset_infos.json, state.json, train.metadata.json and 1 more;" in out
    )
    assert "split test: test-00000-of-00001.jsonl" in out
    assert f"data {path}: split train is more.CSV, train.jsonl; left out are " in out
    assert out.count("\n") == 1
    assert {file.name for file in data_files(str(path))} == {"train.jsonl", "more.CSV", "test-00000-of-00001.jsonl"}


@pytest.mark.parametrize(
    ("name", "split"),
    [
        ("testimonials.jsonl", "train"), ("values.jsonl", "train"), ("device_help.jsonl", "train"),
        ("evaluation.csv", "train"), ("latest.jsonl", "train"), ("validé.json", "train"), ("developers.json", "train"),
        ("test.jsonl", "test"), ("Test-0.jsonl", "test"), ("test2.json", "test"), ("val_a.jsonl", "val"),
        ("validation.jsonl.gz", "validation"), ("dev.csv", "dev"), ("pku_test.jsonl", "test"), ("a.eval.json", "eval"),
        ("test/a.jsonl", "test"), ("data/valid/part-0/a.jsonl", "valid"), ("test/train-0.jsonl", "train"),
        ("tests/a.jsonl", "train"), ("a.jsonl", "train"),
    ],
)  # fmt: skip
def test_split_is_a_whole_word_of_a_name(tmp_path, name, split):
    assert split_of((tmp_path / name).relative_to(tmp_path)) == split


def test_parts_that_are_missing_are_said(folder, capsys):
    path = folder({"train-00001-of-00003.jsonl": lines(PAIRS[:2]), "train-00002-of-00003.jsonl": lines(PAIRS[2:])})
    assert len(read_records(str(path))) == 6
    assert "; of 3 parts of train there are 2\n" in capsys.readouterr().out
    folder({"train-00000-of-00003.jsonl": lines(PAIRS[:1])})
    assert len(read_records(str(path))) == 7
    assert " parts of " not in capsys.readouterr().out


def test_settings_beside_data_are_left_out_and_said_and_tables_in_other_forms_are_not(folder, capsys):
    path = folder(
        {"a.jsonl": lines(PAIRS), "stats.json": '{"rows": 6, "sizes": [1]}', "vocab.json": '{"a": 0}', "b.json": "{}"}
    )
    assert len(read_records(str(path))) == 6
    out = capsys.readouterr().out
    for name, keys in (("stats.json", "rows, sizes"), ("vocab.json", "a"), ("b.json", "")):
        assert (
            f"{name}: one object with the keys '{keys}'; wanted a list of objects, or an object per line: left out"
            in out
        )
    with pytest.raises(ValueError, match="one object with the keys 'rows, sizes'"):
        read_records(str(path / "stats.json"))
    folder({"c.json": '{"prompt": ["a"], "response": ["b"]}'})
    with pytest.raises(ValueError, match=r"c\.json: one object with the keys 'prompt, response'"):
        read_records(str(path))


def test_folder_of_one_split_is_said_where_another_is_asked_for(folder):
    path = folder({"test/a.jsonl": lines(PAIRS[:1]), "notes.txt": ""})
    assert prompts(read_records(str(path), "test")) == ["how 0"]
    with pytest.raises(ValueError, match="split 'train' has no files; the folder has test"):
        read_records(str(path))


def test_files_of_a_folder_have_formats_of_their_own_and_empty_ones_are_said(folder, capsys):
    path = folder(
        {
            "a.jsonl": lines(PAIRS[:2]),
            "b.json": json.dumps([{"instruction": "c", "output": "d"}]),
            "c.jsonl": "",
        }
    )
    assert [record["response"] for record in read_records(str(path))] == ["so 0 .", "so 1 .", "d"]
    assert "c.jsonl': no records" in capsys.readouterr().out
    with pytest.raises(ValueError, match=r"b\.json': format 'demonstrations' needs the columns"):
        read_records(str(path), format="demonstrations")


def test_links_are_followed_to_files_and_said_where_they_lead_nowhere_or_to_folders(tmp_path, capsys):
    elsewhere, path = tmp_path / "elsewhere", tmp_path / "data"
    for folder_ in (elsewhere, path):
        folder_.mkdir()
    (elsewhere / "a.jsonl").write_text(lines(PAIRS[:1]))
    (path / "a.jsonl").symlink_to(elsewhere / "a.jsonl")
    (path / "more").symlink_to(elsewhere)
    assert prompts(read_records(str(path))) == ["how 0"]
    assert "linked folders: more" in capsys.readouterr().out
    (path / "b.jsonl").symlink_to(elsewhere / "gone.jsonl")
    with pytest.raises(ValueError, match=r"b\.jsonl: cannot be read: .*No such file"):
        read_records(str(path))


def test_name_that_is_no_text_stops_nothing(tmp_path):
    """As disks of other systems have them: a byte that is no UTF-8."""
    for name in (b"a\xe9.jsonl", b"test\xe9.jsonl", b"b\xe9.csv"):
        with open(os.path.join(os.fsencode(tmp_path), name), "wb") as file:
            file.write(
                b"prompt\nx\n" if name.endswith(b"csv") else (lines(PAIRS[:1]) + "[]\n" + lines(PAIRS[1:])).encode()
            )
    with contextlib.redirect_stdout(io.TextIOWrapper(io.BytesIO(), encoding="utf-8")) as out:
        assert main([str(tmp_path), "--max-bad-records", "0.5"]) == 0
        out.seek(0)
        assert "left out are" in out.read()


def test_folder_is_a_saved_data_set_only_with_its_tables(folder):
    assert len(read_records(str(folder({"a.jsonl": lines(PAIRS), "state.json": '{"step": 3}'})))) == 6


def test_files_beside_a_saved_data_set_are_said(folder, capsys):
    import datasets

    path = folder({"more/a.jsonl": lines(PAIRS)})
    datasets.Dataset.from_list(PAIRS[:2]).save_to_disk(path)
    assert len(read_records(str(path))) == 2
    assert "a folder that `datasets` has saved; left out are more/a.jsonl\n" in capsys.readouterr().out


def test_class_of_a_hub_data_set_is_its_name_whatever_its_number(tmp_path):
    import datasets

    labels = datasets.ClassLabel(names=["safe", "unsafe"])  # so that 0 means safe
    features = datasets.Features(
        {name: datasets.Value("string") for name in ("prompt", "response")} | {"is_safe": labels}
    )
    rows = [PAIRS[i] | {"is_safe": label} for i, label in enumerate((0, 1, None))]
    datasets.Dataset.from_list(rows, features=features).save_to_disk(tmp_path / "saved")
    assert [record["is_safe"] for record in read_records(str(tmp_path / "saved"))] == [True, False, None]


# --- JSON


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.json", json.dumps({"version": "1.1", "data": PAIRS}, indent=2)),
        ("a.json", json.dumps({"version": "1.1", "data": PAIRS})),
        ("a.json", "\n\n".join(json.dumps(record, indent=2) for record in PAIRS)),
        ("a.jsonl", "".join(json.dumps(record, indent=2) for record in PAIRS)),
        ("a.jsonl", "".join(map(json.dumps, PAIRS))),
        ("a.jsonl", "\r".join(map(json.dumps, PAIRS))),
        ("a.jsonl", "\n".join(json.dumps(PAIRS[i]) + json.dumps(PAIRS[i + 1]) for i in (0, 2, 4))),
        ("a.JSONL", lines(PAIRS)),
        ("a.jsonl", "\ufeff" + lines(PAIRS[:3]) + "\ufeff" + lines(PAIRS[3:])),
        ("a.Json.GZ", gzip.compress(lines(PAIRS).encode(), mtime=0)),
    ],
)
def test_json_is_read_in_all_its_forms(reads, name, content):
    assert reads(name, content) == PAIRS


def test_one_object_may_be_a_record_or_hold_them(reads, capsys):
    conversation = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}
    assert reads("a.json", json.dumps(conversation, indent=1)) == [conversation]
    assert reads("b.jsonl", json.dumps(conversation)) == [conversation]
    assert reads("c.json", json.dumps({"rows": [conversation]})) == [conversation]
    assert "one object; its list 'rows' is read" in capsys.readouterr().out


@pytest.mark.parametrize("orient", ["columns", "index", "split", "values", "list"])
def test_orients_of_pandas_other_than_records_are_refused_with_what_is_wanted(reads, orient):
    import pandas

    frame = pandas.DataFrame(PAIRS)
    content = json.dumps(frame.to_dict("list")) if orient == "list" else frame.to_json(orient=orient)
    with pytest.raises(ValueError, match=r"a\.json") as error:
        reads("a.json", content)
    assert "no JSON object" in str(error.value) or "one object with the keys" in str(error.value)
    assert ("orient='records'" in str(error.value)) == (orient != "values")
    assert reads("b.json", frame.to_json(orient="records")) == PAIRS
    assert prompts(reads("c.json", frame.to_json(orient="table"))) == prompts(PAIRS)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.json", '{"train": [{"a": 1}], "test": [{"a": 1}]}', "one object with the keys 'train, test'"),
        ("a.json", "{}", "one object with the keys ''"),
        ("a.json", '"text"', "no JSON object: 'text'"),
        (
            "a.jsonl",
            '[{"role": "user"}]\n[{"role": "user"}]\n',
            "2 values, some of them lists; wanted one list of objects",
        ),
        ("a.jsonl", '{"a": 1},\n{"a": 2},\n', "line 1, column 9 is not JSON"),
        ("a.json", "[" * 100_000, "is not JSON: Nested too deep"),
        ("a.json", '[{"a": ' + "[" * 60 + "]" * 60 + "}]", "nested more than 50 deep"),
        ("a.jsonl", "<!DOCTYPE html>\n<html>\n", "line 1, column 1 is not JSON"),
        ("a.jsonl", '{"unusable": 1, "prompt": "a"}\n', "reserved name .unusable."),
        ("a.json", '{"prompt": "a", "response": "b", "prompt": "c"}', "the key 'prompt' stands twice"),
        ("a.json", '{"data": [{"prompt": "a"}], "data": [{"prompt": "b"}]}', "the key 'data' stands twice"),
        ("a.jsonl", lines(PAIRS).encode("utf-16"), "no UTF-8 text, but perhaps UTF-16"),
        ("a.csv", "prompt,response\na,b\n".encode("utf-16-le"), "no UTF-8 text, but perhaps UTF-16-LE"),
        ("a.csv", "prompt,response\né,b\n".encode("latin-1"), "line 2 is not UTF-8"),
        ("a.json", gzip.compress(b"[]", mtime=0), r"compressed with gzip; its name must end in \.gz"),
        ("a.csv", b"PK\x03\x04rest", "a zip archive, or a table of Excel"),
        ("a.csv", b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1", "a table of Excel; save it as CSV"),
        ("a.jsonl", bz2.compress(lines(PAIRS).encode()), "compressed with bzip2; unpack it"),
        ("a.json", lzma.compress(lines(PAIRS).encode()), "compressed with xz; unpack it"),
        ("a.json", b"PAR1rest", r"Parquet; its name must end in \.parquet"),
        ("a.parquet", b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "pointer of git-lfs"),
        ("a.jsonl", b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "run `git lfs pull`"),
    ],
)
def test_file_that_is_something_else_says_what(reads, name, content, message):
    with pytest.raises(ValueError, match=message) as error:
        reads(name, content)
    assert name in str(error.value)
    assert "\n" not in str(error.value)


BROKEN = {
    '{"prompt": "a" "response": "b"}': "no JSON: Expecting ',' delimiter",
    "[1]": "no JSON object",
    "not json": "no JSON: Expecting value",
    '{"prompt": "a", "response": "b", "prompt": "c"}': "the key 'prompt' stands twice in an object",
    '{"prompt": "half \\ud83c", "response": "b"}': "half a character (a lone surrogate)",
    '{"prompt": "a", "left_out": 1}': "a column of the reserved name 'left_out'",
}


@pytest.mark.parametrize("broken", BROKEN)
@pytest.mark.parametrize("at", [0, 3])
def test_broken_line_is_one_record_that_cannot_be_used(reads, broken, at):
    text = lines(PAIRS[:at]) + broken + "\n" + lines(PAIRS[at:])
    records = reads("a.jsonl", text)
    assert [record for record in records if UNUSABLE not in record] == PAIRS
    assert records[at][UNUSABLE] == BROKEN[broken]
    assert place_of(records[at]).endswith(f"a.jsonl:{at + 1}: ")


def test_line_in_another_encoding_is_one_record_that_cannot_be_used(reads):
    records = reads("a.jsonl", lines(PAIRS).encode() + b'{"prompt": "\xe9", "response": "b"}\n')
    assert records[:6] == PAIRS
    assert records[6][UNUSABLE] == "no UTF-8 text"


def test_file_that_ends_in_the_midst_of_a_line_is_refused(reads):
    with pytest.raises(ValueError, match=r"a\.jsonl: line 6, column \d+ is not JSON: .*as if it had been cut"):
        reads("a.jsonl", lines(PAIRS)[:-9])
    with pytest.raises(ValueError, match=r"a\.csv: line 5: 1 values under 2 columns .*as if it had been cut"):
        reads("a.csv", "prompt,response\na,b\nc,d\ne,f\ng")
    assert len(reads("b.jsonl", lines(PAIRS)[:-1])) == 6


def test_long_integers_are_numbers(reads):
    records = reads("a.jsonl", lines(PAIRS) + '{"prompt": "a", "response": "b", "id": ' + "9" * 5000 + "}\n")
    assert records[6]["id"] == float("inf")


# --- CSV, Parquet


def test_blank_values_of_a_csv_file_are_null(reads):
    records = reads("a.csv", "prompt,response,is_safe,note\na,b,1.0,\nc,d,,x\n")
    assert records == [
        {"prompt": "a", "response": "b", "is_safe": True},
        {"prompt": "c", "response": "d", "is_safe": None, "note": "x"},
    ]


def test_index_blank_rows_and_blank_columns_of_a_spreadsheet_are_no_data(reads, capsys):
    records = reads("a.csv", ", prompt ,response,,\r\n0,a,b,,\r\n1,c,d,,\r\n,,,,\r\n")
    assert records == [{"prompt": "a", "response": "b"}, {"prompt": "c", "response": "d"}]
    assert "columns without a name are left out" in capsys.readouterr().out
    assert place_of(records[1]).endswith("a.csv:3: ")


def test_place_of_a_row_is_the_line_where_it_begins(reads):
    records = reads("a.csv", 'prompt,response\n"a\nb",c\nd,e\n')
    assert [place_of(record)[-9:] for record in records] == ["a.csv:2: ", "a.csv:4: "]


def test_row_of_another_length_is_one_record_that_cannot_be_used(reads):
    records = reads("a.csv", "prompt,response\na,b\nc,d,e\nf,g\n")
    assert [record.get(UNUSABLE) for record in records] == [None, "3 values under 2 columns", None]


def test_quotation_marks_behind_a_space_are_no_part_of_a_text(reads):
    records = reads("a.csv", 'prompt,response\na,b\n"c", "d"\ne, f\n')
    assert [record.get(UNUSABLE) for record in records] == [None, "a quotation mark behind a space", None]
    assert records[2]["response"] == " f"
    with pytest.raises(ValueError, match=r"line 2: a quotation mark behind a space; .* by commas alone"):
        reads("b.csv", 'prompt, response\n"how, a", "so, b"\n"why, a", "no"\n')


def test_rows_of_nothing_but_space_are_no_data(reads):
    assert reads("a.csv", " \n\nprompt,response\na,b\n ,  \nc,d\n") == [
        {"prompt": "a", "response": "b"},
        {"prompt": "c", "response": "d"},
    ]


@pytest.mark.parametrize(
    ("header", "message"),
    [
        ("prompt,response,response", r"a\.csv: there are two columns 'response'"),
        ("prompt, response,response ", "there are two columns 'response'"),
        ("prompt,response,unusable", "reserved name 'unusable'"),
        ("prompt;response;note", "columns are divided by commas"),
        ("prompt\tresponse\tnote", "columns are divided by commas"),
    ],
)
def test_columns_that_cannot_be_told_apart_are_refused(reads, header, message):
    with pytest.raises(ValueError, match=message):
        reads("a.csv", f"{header}\na,b,c\n")


def test_texts_of_a_csv_file_that_look_like_labels_stay_texts(reads):
    assert reads("a.csv", "prompt,response\n1,true\n0,false\n") == [
        {"prompt": "1", "response": "true"},
        {"prompt": "0", "response": "false"},
    ]


def test_long_fields_of_a_csv_file_are_read(reads):
    (record,) = reads("a.csv", f"prompt,response\na,{'b' * 300_000}\n")
    assert len(record["response"]) == 300_000


def test_parquet_with_two_columns_of_one_name_is_refused(tmp_path):
    import pyarrow
    import pyarrow.parquet

    table = pyarrow.table([["a"], ["b"], ["c"]], names=["prompt", "response", "response"])
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    with pytest.raises(ValueError, match="there are two columns 'response'"):
        read_records(str(tmp_path / "a.parquet"))


def test_union_of_columns_is_read_by_those_that_hold_something(tmp_path):
    """As Parquet has it, where every record has all columns: a format is what most of a file is; own names mix."""
    import pyarrow
    import pyarrow.parquet

    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    nothing = dict.fromkeys(("messages", "chosen", "rejected", "conversations", "completion", "is_safe"))
    rows = [nothing | record | {"label": float("nan")} for record in PAIRS] + [nothing | {"messages": messages}]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "a.parquet")
    records = read_records(str(tmp_path / "a.parquet"))
    assert records[:6] == PAIRS
    assert records[6]["messages"] == messages
    assert place_of(records[6]).endswith("a.parquet row 7: ")
