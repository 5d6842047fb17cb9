"""Every published format, from a record with its real field names through to the rows a stage trains on."""

import json

import pytest

from safe_rlhf_jax.data.examples import load_pairs, load_prompts, load_supervised
from safe_rlhf_jax.data.formats import FORMATS, UNUSABLE, recognise
from safe_rlhf_jax.data.sources import read_records
from safe_rlhf_jax.data.templates import TEMPLATES
from safe_rlhf_jax.data.tokenizer import load_tokenizer

BEAVER, PLAIN = TEMPLATES["beaver"], TEMPLATES["plain"]
HARM = {"Violence": True, "Privacy Violation": False}
PKU = {
    "prompt": "how", "response_0": "no .", "response_1": "yes .", "prompt_source": "BeaverTails",
    "response_0_source": "Alpaca-7B", "response_1_source": "Alpaca-7B", "is_response_0_safe": True,
    "is_response_1_safe": False, "response_0_harm_category": {**HARM, "Violence": False},
    "response_1_harm_category": HARM, "response_0_severity_level": 0, "response_1_severity_level": 2,
    "better_response_id": 1, "safer_response_id": 0, "response_0_sha256": "0", "response_1_sha256": "1",
}  # fmt: skip


def without(record, *fields):
    return {name: value for name, value in record.items() if name not in fields}


def turn(role, text, *names):
    who, what = names or ("role", "content")
    return {who: role, what: text}


def scored(*scores, name="fine-grained_score"):
    texts = ("so .", "yes .", "no .")
    completions = [
        {"model": "m", "response": text, "overall_score": 5.0, name: s} for s, text in zip(scores, texts, strict=False)
    ]
    return {"source": "evol", "instruction": "how", "models": ["m"], "completions": completions}


USER, ANSWER = turn("user", "how"), turn("assistant", "so .")
HUMAN, GPT = turn("human", "how", "from", "value"), turn("gpt", "so .", "from", "value")
TRANSCRIPT = "\n\nHuman: hi\n\nAssistant: yes ?\n\nHuman: how\n\nAssistant: "
DIALOGUE = [turn("user", "hi"), turn("assistant", "yes ?"), USER]

# name of the format, record, and what stages get of it: {kind: texts after the prompt}, and the prompt
SAMPLES = {
    "PKU-SafeRLHF": ("pku", PKU, {"reward": ("yes .", "no ."), "cost": ("no .", "yes ."), "sft": ("yes .",)}),
    "PKU-SafeRLHF-30K": (
        "pku",
        without(PKU, "prompt_source", "response_0_harm_category", "response_0_severity_level"),
        {"reward": ("yes .", "no ."), "cost": ("no .", "yes .")},
    ),
    "PKU-SafeRLHF-single-dimension": ("pku", without(PKU, "safer_response_id"), {"reward": ("yes .", "no .")}),
    "PKU-SafeRLHF-QA": (
        "qa",
        {"prompt": "how", "response": "so .", "is_safe": True, "harm_category": HARM, "severity_level": 0},
        {"sft": ("so .",)},
    ),
    "PKU-SafeRLHF-prompt": ("prompts", {"prompt": "how", "prompt_source": "x"}, {}),
    "BeaverTails": ("qa", {"prompt": "how", "response": "so .", "category": HARM, "is_safe": True}, {"sft": ("so .",)}),
    "HH": (
        "hh",
        {"chosen": TRANSCRIPT + "so .", "rejected": TRANSCRIPT + "no ."},
        {"reward": ("so .", "no ."), "sft": ("so .",)},
    ),
    "HH red team": (
        "hh_red_team",
        {
            "min_harmlessness_score_transcript": -1.0,
            "num_params": "52B",
            "model_type": "rlhf",
            "rating": 4.0,
            "task_description": "a task",
            "task_description_harmlessness_score": 0.2,
            "red_team_member_id": 1,
            "is_upworker": True,
            "tags": None,
            "transcript": "\n\nHuman: how\n\nAssistant: no\n\nHuman: oh",
        },
        {},
    ),
    "Alpaca": ("alpaca", {"instruction": "how", "input": "", "output": "so ."}, {"sft": ("so .",)}),
    "Alpaca, input": (
        "alpaca",
        {"instruction": "how", "input": "to", "output": "so .", "text": ""},
        {"sft": ("so .",)},
    ),
    "Alpaca, preference": (
        "alpaca_preference",
        {"instruction": "how", "input": "to", "chosen": "so .", "rejected": "no ."},
        {"reward": ("so .", "no ."), "sft": ("so .",)},
    ),
    "ShareGPT": ("sharegpt", {"id": "1", "conversations": [HUMAN, GPT]}, {"sft": ("so .",)}),
    "ShareGPT preference": (
        "sharegpt",
        {"conversations": [HUMAN], "chosen": GPT, "rejected": GPT | {"value": "no ."}},
        {"reward": ("so .", "no ."), "sft": ("so .",)},
    ),
    "messages": ("messages", {"messages": [USER, ANSWER]}, {"sft": ("so .",)}),
    "TRL preference": (
        "trl_preference",
        {"prompt": "how", "chosen": "so .", "rejected": "no ."},
        {"reward": ("so .", "no ."), "sft": ("so .",)},
    ),
    "TRL preference, turns": (
        "trl_preference",
        {"prompt": DIALOGUE, "chosen": [ANSWER], "rejected": [ANSWER | {"content": "no ."}]},
        {"reward": ("so .", "no .")},
    ),
    "TRL implicit, text": (
        "trl_implicit",
        {"chosen": "how do i so .", "rejected": "how do i no ."},
        {"reward": ("so .", "no .")},
    ),
    "TRL implicit, turns": (
        "trl_implicit",
        {"chosen": [*DIALOGUE, ANSWER], "rejected": [*DIALOGUE, ANSWER | {"content": "no ."}]},
        {"reward": ("so .", "no .")},
    ),
    "TRL completion": ("trl_completion", {"prompt": "how", "completion": "so ."}, {"sft": ("so .",)}),
    "TRL completion, turns": (
        "trl_completion",
        {"prompt": DIALOGUE, "completion": [ANSWER]},
        {"sft": ("so .",)},
    ),
    "UltraFeedback": (
        "ultrafeedback",
        scored(2.0, 4.5, 1.25),
        {"reward": ("yes .", "no ."), "sft": ("yes .",)},
    ),
    "UltraFeedback binarized": (
        "trl_preference",
        {
            "prompt": "how",
            "prompt_id": "0",
            "chosen": [USER, ANSWER],
            "messages": [USER, ANSWER],
            "rejected": [USER, ANSWER | {"content": "no ."}],
            "score_chosen": 9.0,
            "score_rejected": 5.0,
        },
        {"reward": ("so .", "no ."), "sft": ("so .",)},
    ),
    "PandaLM": (
        "pandalm",
        {
            "idx": 0,
            "cmp_key": "a_b",
            "instruction": "how",
            "input": "to",
            "response1": "so .",
            "response2": "no .",
            "annotator1": 1,
            "annotator2": 0,
            "annotator3": 1,
        },
        {"reward": ("so .", "no ."), "sft": ("so .",)},
    ),
    "AlpacaEval": (
        "alpaca_eval",
        {
            "instruction": "how",
            "output_1": "so .",
            "output_2": "no .",
            "generator_1": "a",
            "generator_2": "b",
            "preference": 2,
            "annotator": "c",
        },
        {"reward": ("no .", "so ."), "sft": ("no .",)},
    ),
    "AlpacaEval outputs": (
        "alpaca",
        {"instruction": "how", "dataset": "d", "output": "so .", "generator": "g"},
        {"sft": ("so .",)},
    ),
    "Alpaca, earlier turns": (
        "alpaca",
        {"instruction": "how", "input": "", "output": "so .", "system": "", "history": [["hi", "yes ?"]]},
        {"sft": ("so .",)},
    ),
    "Vicuna's questions": ("questions", {"question_id": 1, "category": "generic", "turns": ["how", "why"]}, {}),
    "SimpleSafetyTests": (
        "safety_tests",
        {"id": "sst_001", "harm_area": "x", "category": "y", "prompts_final": "how"},
        {},
    ),
    "XSTest": ("prompts", {"id": "1", "prompt": "how", "type": "homonyms", "label": "safe", "focus": "kill"}, {}),
    "Do-Not-Answer": ("prompts", {"risk_area": "x", "prompt": "how", "intents": ["y"]}, {}),
    "OpenAI moderation": ("prompts", {"prompt": "how", "S": 0, "SH": 1, "S3": 0}, {}),
    "own": ("demonstrations", {"prompt": "how", "response": "so ."}, {"sft": ("so .",)}),
}
PROMPTS = {
    **dict.fromkeys(("Alpaca, input", "Alpaca, preference", "PandaLM"), "how to"), "TRL implicit, text": "how do i",
    **dict.fromkeys(("HH", "TRL preference, turns", "TRL implicit, turns", "TRL completion, turns"), DIALOGUE),
    "Alpaca, earlier turns": DIALOGUE,
}  # fmt: skip


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer("demo")


@pytest.fixture
def written(tmp_path):
    """Writes records to a file; returns its path."""

    def write(*records):
        (tmp_path / "data.json").write_text(json.dumps(records), encoding="utf-8")
        return str(tmp_path / "data.json")

    return write


def load(kind, records, tokenizer, template=PLAIN):
    options = {"max_length": 256, "where": "here", "max_bad": 0.0}
    if kind == "sft":
        return load_supervised(records, template, tokenizer, **options)
    if kind == "prompts":
        return load_prompts(records, template, tokenizer, **options)
    return load_pairs(records, template, tokenizer, safety=kind == "cost", **options)


def sides(arrays):
    names = ("chosen", "rejected", "safer", "unsafer")
    return [getattr(arrays, name) for name in names if hasattr(arrays, name)] or [arrays]


def texts(row, tokenizer):
    """(what is not trained, what is) of the first row."""
    trained = getattr(row, "loss_mask", None)
    trained = row.response_mask[0] if trained is None else trained[0]
    plain = row.tokens[0][row.mask[0] & ~trained], row.tokens[0][trained]
    return tuple(tokenizer.hf.decode(ids.tolist(), clean_up_tokenization_spaces=False) for ids in plain)


def rendered(name, template, tokenizer):
    """The prompt of a sample, as generation sees it."""
    prompt = PROMPTS.get(name, "how")
    turns = prompt if isinstance(prompt, list) else [turn("user", prompt)]
    return template.render(tokenizer, turns, True)


@pytest.mark.parametrize("name", SAMPLES)
def test_format_is_recognised_and_feeds_its_stages(written, tokenizer, name):
    format_, record, kinds = SAMPLES[name]
    assert recognise([record], None, "here") == format_
    records = read_records(written(record))
    assert records == read_records(written(record), format=format_)
    shown = [tokenizer.hf.decode(tokenizer.encode(rendered(name, PLAIN, tokenizer)))]
    for kind, responses in kinds.items():
        data = load(kind, records, tokenizer)
        for side, response in zip(sides(data.arrays), responses, strict=True):
            assert texts(side, tokenizer) == (shown[0], response + tokenizer.hf.eos_token)
    data = load("prompts", records, tokenizer)
    ids = data.arrays.tokens[0][data.arrays.mask[0]]
    assert tokenizer.hf.decode(ids.tolist(), clean_up_tokenization_spaces=False) == shown[0]


def test_every_format_has_a_sample():
    assert {format_ for format_, _, _ in SAMPLES.values()} == set(FORMATS)


def test_labels_of_responses_and_categories_stay_with_the_record(written, tokenizer):
    (record,) = read_records(written(PKU))
    assert record == PKU
    data = load("cost", [record], tokenizer)
    assert data.arrays.safer_is_safe.tolist() == [True]
    assert data.arrays.unsafer_is_safe.tolist() == [False]
    (record,) = read_records(written(SAMPLES["HH red team"][1]))
    assert record["rating"] == 4.0
    assert record["prompt"] == "how"


def test_every_turn_of_messages_is_trained_but_only_the_last_of_a_preference(tokenizer):
    conversation = [*DIALOGUE, ANSWER]
    for record, expected in (({"messages": conversation}, 2), ({"prompt": DIALOGUE, "response": "so ."}, 1)):
        row = load("sft", [record], tokenizer).arrays
        assert (row.tokens[0][row.loss_mask[0]] == tokenizer.eos_id).sum() == expected
        assert (row.tokens[0] == tokenizer.eos_id).sum() == 2


def test_safe_and_unsafe_answers_to_one_prompt_become_safety_pairs(tokenizer):
    def answer(prompt, text, safe):
        return {"prompt": prompt, "response": text, "is_safe": safe}

    records = [
        answer("a", "bad .", False),
        answer("a", "fine .", True),
        answer("b", "so .", True),
        answer("a", "x", True),
    ]
    options = {"max_length": 64, "where": "here", "max_bad": 1.0}
    data = load_pairs(records, PLAIN, tokenizer, safety=True, **options)
    assert len(data) == 1
    assert data.skipped == {}
    assert data.left_out == {"no response with the other label to the same prompt": 2}
    assert texts(data.arrays.safer, tokenizer)[1] == "fine .</s>"
    assert texts(data.arrays.unsafer, tokenizer)[1] == "bad .</s>"
    assert data.arrays.safer_is_safe.tolist() == [True]
    assert data.arrays.unsafer_is_safe.tolist() == [False]


def test_system_message_is_written_where_the_template_has_a_place(tokenizer):
    record = {"messages": [turn("system", "be short"), USER, ANSWER]}
    assert texts(load("sft", [record], tokenizer).arrays, tokenizer)[0].startswith("be short\nhow\n")
    with pytest.raises(ValueError, match="the template refuses: it has no place for a system message: 1"):
        load("sft", [record], tokenizer, BEAVER)


BAD = {
    "no transcript of Human": {"chosen": "a\n\nAssistant: b", "rejected": "\n\nHuman: a\n\nAssistant: c"},
    "chosen and rejected part before the last turn": {
        "chosen": "\n\nHuman: a\n\nAssistant: b", "rejected": "\n\nHuman: x\n\nAssistant: c",
    },
    "the last turn is not the assistant's": {
        "chosen": "\n\nHuman: a\n\nAssistant: b\n\nHuman: c", "rejected": "\n\nHuman: a\n\nAssistant: b\n\nHuman: d",
    },
    "turns that do not alternate": {
        "chosen": "\n\nHuman: a\n\nHuman: x\n\nAssistant: b", "rejected": "\n\nHuman: a\n\nHuman: x\n\nAssistant: c",
    },
    "no response": {"chosen": "\n\nHuman: a\n\nAssistant: ", "rejected": "\n\nHuman: a\n\nAssistant: c"},
    "identical responses": {"prompt": "a", "chosen": "b", "rejected": "b"},
    "response_1 is missing or no text": {"prompt": "a", "response_0": "b", "response_1": 3, "better_response_id": 0},
    "better_response_id is neither 0 nor 1": PKU | {"better_response_id": 2},
    "chosen is no list of turns": {"prompt": "a", "chosen": 3, "rejected": "c"},
    "a turn is from 'tool'": {
        "conversations": [turn("tool", "a", "from", "value")], "chosen": GPT, "rejected": GPT | {"value": "no"},
    },
    "conversations is no list of turns": {"conversations": "a", "chosen": GPT, "rejected": GPT},
    "all completions have one score": scored(2.0, 2.0),
    "a completion without a score": scored(2.0, "N/A"),
    "fewer than two completions": scored(2.0),
}  # fmt: skip


@pytest.mark.parametrize("reason", BAD)
def test_record_that_cannot_be_read_is_counted_by_reason(written, tokenizer, reason):
    with pytest.raises(ValueError, match=rf"here: 1 of 1 records cannot be used \({reason}.*: 1\)\. First: ") as error:
        load("reward", read_records(written(BAD[reason])), tokenizer)
    assert "\n" not in str(error.value)


def test_unknown_columns_are_listed_with_the_formats(written):
    with pytest.raises(ValueError, match=r"columns \['answer', 'question'\] fit no known format") as error:
        read_records(written({"question": "a", "answer": "b"}))
    assert all(name in str(error.value) for name in FORMATS)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"format": "alpacca"}, "format 'alpacca' is unknown"),
        ({"format": "alpaca"}, r"needs the columns \['instruction', 'output'\]; there are \['answer', 'question'\]"),
        ({"fields": {"prompt": "query"}}, r"names the columns \['query'\]; there are \['answer', 'question'\]"),
    ],
)
def test_format_or_column_that_is_not_there_is_named(written, options, message):
    with pytest.raises(ValueError, match=message):
        read_records(written({"question": "a", "answer": "b"}), **options)


def test_columns_can_be_renamed(written):
    name = written({"question": "a", "answer": "b", "prompt": None, "response": "old"})
    renamed = read_records(name, fields={"prompt": "question", "response": "answer", "answer": "response"})
    assert renamed == [{"prompt": "a", "response": "b", "answer": "old"}]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"prompt": "question", "response": "question"}, r"reads the column 'question' as \['prompt', 'response'\]"),
        (
            {"response": "question"},
            r"reads 'question' as 'response', and there is a column 'response'; .*\{other: response",
        ),
    ],
)
def test_column_of_several_meanings_is_refused(written, fields, message):
    with pytest.raises(ValueError, match=message):
        read_records(written({"question": "a", "response": "b"}), fields=fields)


def test_named_format_wins_over_the_recognised_one(written):
    record = {"prompt": "a", "completion": "b", "response": "c"}
    assert read_records(written(record))[0]["response"] == "b"
    assert read_records(written(record), format="demonstrations")[0]["response"] == "c"


@pytest.mark.parametrize("blank", [None, "", " ", "<noinput>", "<NoInput> "])
def test_input_and_system_that_say_nothing_are_none(written, blank):
    system = " " if blank else blank
    (record,) = read_records(written({"instruction": "how", "input": blank, "output": "so .", "system": system}))
    assert record == {"prompt": "how", "response": "so ."}


@pytest.mark.parametrize("value", [0, False, {}, [], "nan", "NaN", "<NA>"])
def test_input_that_is_no_text_or_what_pandas_writes_for_none_is_counted(written, value):
    good = {"instruction": "how", "input": "", "output": "so ."}
    read = read_records(written(good, good | {"input": value}))
    assert [UNUSABLE in record for record in read] == [False, True]


@pytest.mark.parametrize("field", ["prompt", "response"])
def test_text_that_pandas_writes_for_a_missing_one_is_counted(written, field):
    good = {"prompt": "how", "response": "so ."}
    reason = f"{field} is 'nan', as pandas writes what is missing: 1"
    with pytest.raises(ValueError, match=reason):
        load("sft", read_records(written(good, good | {field: "nan"})), load_tokenizer("demo"))


def test_prompt_is_not_guessed_from_two_texts_where_a_column_may_hold_it(written, tokenizer):
    """As in Intel/orca_dpo_pairs."""
    record = {"system": "", "question": "how", "chosen": "I think so .", "rejected": "I think no ."}
    (read,) = read_records(written(record))
    assert read[UNUSABLE] == "chosen and rejected beside 'question', which `fields` should name if it is the prompt"
    (read,) = read_records(written(record), fields={"prompt": "question"})
    assert (read["prompt"], read["response_0"]) == ("how", "I think so .")


def test_conversations_beside_an_instruction_hold_the_prompt_themselves(written):
    sides = {"chosen": [USER, ANSWER], "rejected": [USER, ANSWER | {"content": "no ."}]}
    for beside in ("instruction", "question"):
        (read,) = read_records(written({beside: "how"} | sides))
        assert (read["prompt"], read["response_0"]) == ("how", "so .")


def test_side_that_is_missing_is_called_so(written):
    good = {"prompt": "how", "chosen": "so .", "rejected": "no ."}
    assert read_records(written(good, good | {"chosen": None}))[1][UNUSABLE] == "chosen is missing"


@pytest.mark.parametrize("unlabelled", [{}, {"label": None}])
def test_completions_with_labels_are_no_demonstrations_though_some_lack_one(written, unlabelled):
    labelled = {"prompt": "how", "completion": "no .", "label": False}
    read = read_records(written({"prompt": "how", "completion": "so ."} | unlabelled, labelled))
    assert not any("response" in record for record in read)
    (read,) = read_records(written({"prompt": "how", "completion": "so ."} | unlabelled))
    assert read["response"] == "so ."


ANSWERS = [
    {"prompt": "how", "completion": "so ."},
    {"instruction": "how", "output": "so ."},
    {"messages": [USER, ANSWER]},
    {"conversations": [HUMAN, GPT]},
]


@pytest.mark.parametrize("answer", ANSWERS)
def test_answer_that_is_labelled_unsafe_is_trained_in_no_format(written, tokenizer, answer):
    read = read_records(written(answer | {"is_safe": True}, answer | {"is_safe": "unsafe"}))
    data = load("sft", read, tokenizer)
    assert len(data) == 1
    assert data.left_out == {"the response is labelled unsafe": 1}
    assert len(load("prompts", read, tokenizer)) == 2
    with pytest.raises(ValueError, match="is_safe is neither true nor false, but 'maybe'"):
        load("sft", read_records(written(answer, answer | {"is_safe": "maybe"})), tokenizer)
