"""Prompts and responses in the spellings people have: read as meant, or counted with the true reason."""

import json

import numpy as np
import pandas
import pytest

from safe_rlhf_jax.data.examples import load_pairs, load_prompts, load_supervised
from safe_rlhf_jax.data.records import UNUSABLE
from safe_rlhf_jax.data.sources import read_records
from safe_rlhf_jax.data.templates import TEMPLATES
from safe_rlhf_jax.data.tokenizer import load_tokenizer


def turn(role, content, **more):
    return {"role": role, "content": content, **more}


USER, ANSWER = turn("user", "how"), turn("assistant", "so .")
CHAT = [USER, ANSWER]
PART, IMAGE = {"type": "text", "text": "how"}, {"type": "image_url", "image_url": {"url": "x"}}


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer("demo")


@pytest.fixture
def read(tmp_path):
    """Reads records from JSON lines, or a frame of pandas from the CSV that it writes."""

    def from_file(content, **options):
        path = tmp_path / ("data.csv" if isinstance(content, pandas.DataFrame) else "data.jsonl")
        if isinstance(content, pandas.DataFrame):
            content.to_csv(path)
        else:
            path.write_text("".join(json.dumps(record) + "\n" for record in content))
        return read_records(str(path), **options)

    return from_file


def load(kind, records, tokenizer, max_bad=1.0):
    options = {"max_length": 256, "where": "here", "max_bad": max_bad}
    if kind == "sft":
        return load_supervised(records, TEMPLATES["plain"], tokenizer, **options)
    if kind == "prompts":
        return load_prompts(records, TEMPLATES["plain"], tokenizer, **options)
    return load_pairs(records, TEMPLATES["plain"], tokenizer, safety=kind == "cost", **options)


# --- Turns


@pytest.mark.parametrize(
    "messages",
    [
        [turn("user", [PART]), ANSWER],
        [
            turn("user", [{"type": "text", "text": "h"}, {"type": "text", "text": "ow"}]),
            turn("assistant", [PART | {"text": "so ."}]),
        ],
        [turn("Human", "how"), turn("GPT", "so .")],
        [{"from": "human", "value": "how"}, {"from": "gpt", "value": "so ."}],
        [turn("user", "how", tool_calls=None, name=None, images=[]), turn("assistant", "so .", function_call=None)],
        [{"role": "user", "content": "how", "from": None, "value": None}, ANSWER],
    ],
)
def test_turns_are_read_in_every_spelling(read, messages):
    for record in ({"messages": messages}, {"messages": json.dumps(messages)}, {"messages": str(messages)}):
        assert read([record]) == [{"messages": CHAT}]
    assert read([{"conversations": messages}]) == [{"messages": CHAT}]
    (record,) = read([{"prompt": messages[:1], "completion": messages[1:]}])
    assert record == {"prompt": "how", "response": "so ."}
    (record,) = read([{"prompt": messages[:1], "response_0": messages[1:], "response_1": messages[1]}])
    assert record == {"prompt": "how", "response_0": "so .", "response_1": "so ."}


REASONS = {
    "content has a part of type 'image_url', and only text can be read": [turn("user", [PART, IMAGE]), ANSWER],
    "content has a part of type None, and only text can be read": [turn("user", [{"text": "how"}]), ANSWER],
    "content has a part of type text without a text": [turn("user", [PART | {"text": None}]), ANSWER],
    "content is a list, with 'how' for a part": [turn("user", ["how"]), ANSWER],
    "content is no text, but 7": [turn("user", 7), ANSWER],
    "a turn that calls tools": [USER, turn("assistant", None, tool_calls=[{"name": "x"}]), turn("tool", "y"), ANSWER],
    "a turn is from 'tool', neither human, gpt nor system": [USER, turn("tool", "y"), ANSWER],
    "a turn is from nobody, neither human, gpt nor system": [{"content": "how"}, ANSWER],
    "a turn has both role and from": [USER | {"from": "human"}, ANSWER],
    "no prompt": [turn("user", None), ANSWER],
    "no response": [USER, turn("assistant", [])],
    "messages is no list of turns": USER,
    "messages is a list written as text that cannot be read": "[{'role': 'user', 'content': 'how'}\n {'role': 'gpt'}]",
    "turns that do not alternate between user and assistant": [ANSWER, *CHAT],
    "the last turn is not the assistant's": [USER, ANSWER, USER],
    "a turn with weight 0, while all turns of the assistant are trained": [USER, ANSWER | {"weight": 0}],
    "a turn with weight 0.5, neither 0 nor 1": [USER, ANSWER | {"weight": 0.5}],
    "a turn has both content and value": [USER | {"value": "why"}, ANSWER],
    "a turn with images, and only text can be read": [USER | {"images": ["a.png"]}, ANSWER],
    "half a character (a lone surrogate)": str([turn("user", "\ud83c"), ANSWER]).replace("\ud83c", "\\ud83c"),
}


@pytest.mark.parametrize("reason", REASONS)
def test_turns_that_cannot_be_used_are_counted_with_the_true_reason(read, tokenizer, reason):
    data = load("sft", read([{"messages": REASONS[reason]}, {"messages": CHAT}]), tokenizer)
    assert data.skipped == {reason: 1}
    assert len(data) == 1


def test_content_of_parts_is_counted_with_the_true_reason_where_records_come_from_code(tokenizer):
    data = load("sft", [{"messages": [turn("user", [PART, IMAGE]), ANSWER]}, {"messages": CHAT}], tokenizer)
    assert data.skipped == {"content has a part of type 'image_url', and only text can be read": 1}


@pytest.mark.parametrize("unique", [None, "prompt", "record"])
@pytest.mark.parametrize("share", [None, 0.5])
def test_odd_records_neither_stop_nor_merge_with_others(read, tokenizer, unique, share):
    odd = [{"messages": messages} for messages in REASONS.values()]
    records = [*odd, *({"messages": [turn("user", f"how {c}"), ANSWER]} for c in "abcdef")]
    sides = [
        read(records, split=split, unique=unique, test_share=share) for split in ("train", "test")[: 2 if share else 1]
    ]
    assert sum(UNUSABLE in record for side in sides for record in side) >= 6
    opened = [str(record["messages"][0]["content"]) for side in sides for record in side if UNUSABLE not in record]
    assert set(opened) >= {f"how {c}" for c in "abcdef"}


@pytest.mark.parametrize(
    "told", [{"weight": "0.0"}, {"weight": False}, {"train": False}, {"training": "no"}, {"loss": 0}]
)
def test_turn_that_is_not_to_be_trained_is_counted_in_every_spelling(read, tokenizer, told):
    data = load("sft", read([{"messages": [USER, ANSWER | told]}, {"messages": CHAT}]), tokenizer)
    assert data.skipped == {"a turn with weight 0, while all turns of the assistant are trained": 1}
    trained = [USER | {"loss": 0}, ANSWER | {"weight": 1.0, "train": True, "loss": 0.7}]
    assert len(load("sft", read([{"messages": trained}]), tokenizer)) == 1


# --- Turns written as text


def test_turns_that_a_table_has_written_as_text_are_turns_again(read, tokenizer):
    frame = pandas.DataFrame(
        {"prompt": [[USER]] * 2, "chosen": [[ANSWER]] * 2, "rejected": [[ANSWER | {"content": "no ."}]] * 2}
    )
    pair = {"prompt": "how", "response_0": "so .", "response_1": "no .", "better_response_id": 0}
    assert read(frame) == [pair, pair]
    assert read(frame.map(json.dumps)) == [pair, pair]


def test_turns_of_numpy_have_no_commas_and_are_counted_or_read_but_never_text(read, tokenizer):
    """What pandas makes of lists in Parquet, and writes to CSV."""
    two = np.array([USER, ANSWER, turn("user", "why")], dtype=object)
    frame = pandas.DataFrame({"prompt": [two, np.array([USER])], "response": ["so .", "so ."]})
    records = read(frame)
    assert records[0][UNUSABLE] == "prompt is a list written as text that cannot be read"
    assert records[1] == {"prompt": "how", "response": "so ."}


@pytest.mark.parametrize(
    "text",
    [
        '{"value": 3, "unit": "m"}', '[{"content": 1}]', '{"role": "admin"}', "[{'a': 1}]", "[1, 2]", "{'role': }",
        '{"type": "object"}', "[see role: content]", '[INST] say {"role": "user"}', '{"n": x, "m": [{"role": "user"}]}',
        '{"from": "A", "to": "B"}', "import x\n[{'role': 1}]",
    ],
)  # fmt: skip
def test_texts_that_are_lists_or_objects_of_other_things_stay_texts(read, text):
    assert read([{"prompt": text, "response": text}]) == [{"prompt": text, "response": text}]


def test_nothing_that_is_written_as_text_is_run(read, tmp_path):
    text = f"[{{'role': 'user', 'content': open({str(tmp_path / 'made')!r}, 'w').write('x')}}]"
    assert (
        read([{"prompt": text, "response": "b"}])[0][UNUSABLE] == "prompt is a list written as text that cannot be read"
    )
    assert not (tmp_path / "made").exists()


@pytest.mark.parametrize(
    "text", ["[" * 5000 + "]" * 5000, "[{'role': " + "-" * 10_000, "[{'role': 'user', 'content': " + "(" * 300]
)
def test_text_that_no_parser_can_take_is_counted(read, text):
    assert UNUSABLE in read([{"messages": text}, {"messages": CHAT}])[0]


# --- Transcripts


@pytest.mark.parametrize(
    "prompt",
    [
        "\n\nHuman: hi\n\nAssistant: yes ?\n\nHuman: how\n\nAssistant:",
        "Human: hi\n\nAssistant: yes ?\n\nHuman: how\n\nAssistant: ",
    ],
)
@pytest.mark.parametrize("answer", ["so .", " so .", "\n\nAssistant: so .", "so .\n"])
def test_prompt_that_is_a_transcript_becomes_turns_in_every_format(read, prompt, answer):
    turns = [turn("user", "hi"), turn("assistant", "yes ?"), USER]
    for raw, fields in (
        (
            {"chosen": answer, "rejected": " no ."},
            {"response_0": "so .", "response_1": "no .", "better_response_id": 0},
        ),
        ({"completion": answer}, {"response": "so ."}),
        ({"response": answer}, {"response": "so ."}),
        ({"response_0": answer, "response_1": "no ."}, {"response_0": "so .", "response_1": "no ."}),
        ({}, {}),
    ):
        assert read([{"prompt": prompt} | raw]) == [{"prompt": turns} | fields]


def test_transcripts_of_windows_are_transcripts(read):
    asked = "\r\n\r\nHuman: hi\r\n\r\nAssistant: yes ?\r\n\r\nHuman: how\r\n\r\nAssistant:"
    pair = {"response_0": "so .", "response_1": "no .", "better_response_id": 0}
    turns = {"prompt": [turn("user", "hi"), turn("assistant", "yes ?"), USER]}
    assert read([{"chosen": asked + " so .", "rejected": asked + " no ."}]) == [turns | pair]
    assert read([{"prompt": asked, "chosen": " so .", "rejected": " no ."}]) == [turns | pair]
    assert UNUSABLE in read([{"prompt": asked, "response": "so .\r\n\r\nHuman: why"}])[0]


def test_prompt_that_two_texts_share_is_no_transcript_in_silence(read):
    asked = "Human: how\nAssistant: "
    (record,) = read([{"chosen": asked + "so .", "rejected": asked + "no ."}])
    assert record[UNUSABLE] == "prompt is a transcript whose turns are not divided by an empty line"


def test_transcript_of_one_question_is_its_text(read):
    assert read([{"prompt": "\n\nHuman: how\n\nAssistant:"}]) == [{"prompt": "how"}]
    assert read([{"prompt": "\n\nHuman: how"}]) == [{"prompt": "how"}]


def test_sides_that_are_whole_conversations_hold_the_prompt(read):
    raw = {"prompt": "how", "chosen": CHAT, "rejected": [USER, ANSWER | {"content": "no ."}]}
    assert read([raw]) == [{"prompt": "how", "response_0": "so .", "response_1": "no .", "better_response_id": 0}]
    assert "the prompt does not stand" in read([raw | {"prompt": "another"}, raw])[0][UNUSABLE]


def test_sides_that_are_whole_transcripts_are_read_as_such(read):
    asked = "\n\nHuman: how\n\nAssistant:"
    raw = {"prompt": asked, "chosen": f"{asked} so .", "rejected": f"{asked} no ."}
    assert read([raw]) == [{"prompt": "how", "response_0": "so .", "response_1": "no .", "better_response_id": 0}]
    assert "the prompt does not stand" in read([raw | {"prompt": "another"}, raw])[0][UNUSABLE]


@pytest.mark.parametrize(
    ("prompt", "response", "reason"),
    [
        ("Human: how\nAssistant: so\nHuman: why\nAssistant:", "so .", "not divided by an empty line"),
        ("BEGINNING OF CONVERSATION: USER: how ASSISTANT:", "so .", "prompt ends with the opening of a response"),
        ("A chat.\n\nHuman: how\n\nAssistant:", "so .", "prompt ends with the opening of a response"),
        ("### Instruction:\nhow\n\n### Response:\n", "so .", "prompt ends with the opening of a response"),
        ("<|im_start|>user\nhow<|im_end|>\n<|im_start|>assistant\n", "so .", "the opening of a response"),
        ("<start_of_turn>user\nhow<end_of_turn>\n<start_of_turn>model\n", "so .", "the opening of a response"),
        ("<|start_header_id|>assistant<|end_header_id|>\n\n", "so .", "prompt ends with the opening of a response"),
        ("<|user|>\nhow</s>\n<|assistant|>\n", "so .", "prompt ends with the opening of a response"),
        ("[INST] how [/INST]", "so .", "prompt ends with the opening of a response"),
        ("\n\nHuman: how\n\nAssistant:", "so .\n\nHuman: why", "response goes on with further turns"),
    ],
)
def test_transcript_that_cannot_be_read_is_counted(read, prompt, response, reason):
    records = read([{"prompt": prompt, "response": response}, {"prompt": "how", "response": "so ."}])
    assert reason in records[0][UNUSABLE]
    assert UNUSABLE not in records[1]


@pytest.mark.parametrize(
    "text",
    [
        "Human: what is it ?", "Is an assistant: a person ?", "Human rights", "Name the assistant", "a\n\nHuman: b",
        "[INST] is what ?", "What is <|im_start|>assistant in a template ?", "### Response: yes or no ?",
    ],
)  # fmt: skip
def test_prompt_that_speaks_of_humans_and_assistants_is_no_transcript(read, text):
    assert read([{"prompt": text}]) == [{"prompt": text}]


# --- Nulls, other types


def test_prompt_is_not_guessed_where_its_column_is_null(read, tokenizer):
    pair = {"prompt": "how", "chosen": "I think so .", "rejected": "I think no ."}
    data = load("reward", read([pair | {"prompt": None}, pair]), tokenizer)
    assert data.skipped == {"prompt is missing or no text": 1}


@pytest.mark.parametrize("value", [3, True, None, float("nan"), {"a": 1}, [], ["x"]])
def test_texts_of_another_type_are_counted(read, tokenizer, value):
    records = read(
        [
            {"prompt": "how", "response": value},
            {"prompt": value, "response": "so ."},
            {"prompt": "how", "response": "so ."},
        ]
    )
    assert len(load("sft", records, tokenizer)) == 1


def test_bytes_of_a_table_are_no_text(tmp_path, tokenizer):
    pandas.DataFrame({"prompt": [b"how", b"why"], "response": ["so .", "no ."]}).to_parquet(tmp_path / "a.parquet")
    with pytest.raises(ValueError, match=r"prompt is missing or no text \(bytes\): 2\)\. First: \S*a\.parquet row 1: "):
        load("sft", read_records(str(tmp_path / "a.parquet")), tokenizer)


def test_control_characters_stay_in_a_text(read, tokenizer):
    (record,) = read([{"prompt": "a\x00b\x1b[0m", "response": "c\x07"}])
    assert record == {"prompt": "a\x00b\x1b[0m", "response": "c\x07"}
    assert len(load("sft", [record], tokenizer)) == 1
