"""Tokens, masks and padding of examples; unusable records are counted by reason, and fatal above a limit."""

import json

import numpy as np
import pytest

from safe_rlhf_jax.data import demo
from safe_rlhf_jax.data.examples import load_pairs, load_prompts, load_supervised
from safe_rlhf_jax.data.templates import TEMPLATES
from safe_rlhf_jax.data.tokenizer import load_tokenizer

PLAIN = TEMPLATES["plain"]
PROMPTS = ["how do i start baking with the bread", "how do i do theft act delta"]
ANSWERS = ["order the bread .", "sorry i cannot help with that ."]


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer("demo")


@pytest.fixture(scope="module")
def variants(tmp_path_factory):
    """Tokenizers that pad with EOS, that have no padding token, and that open every text with BOS."""
    folder = tmp_path_factory.mktemp("tokenizers")

    def make(name, edit_config=lambda c: None, edit=lambda t: None):
        from transformers import AutoTokenizer

        AutoTokenizer.from_pretrained(demo.TOKENIZER_PATH).save_pretrained(folder / name)
        for file, change in (("tokenizer_config.json", edit_config), ("tokenizer.json", edit)):
            content = json.loads((folder / name / file).read_text())
            change(content)
            (folder / name / file).write_text(json.dumps(content))
        return load_tokenizer(str(folder / name))

    def template(*single):
        def edit(content):
            special = {t["content"]: t["id"] for t in content["added_tokens"]}
            piece = [
                {"Sequence": {"id": "A", "type_id": 0}} if s == "A" else {"SpecialToken": {"id": s, "type_id": 0}}
                for s in single
            ]
            content["post_processor"]["single"] = piece
            content["post_processor"]["special_tokens"] = {
                s: {"id": s, "ids": [special[s]], "tokens": [s]} for s in single if s != "A"
            }

        return edit

    return {
        "pad is eos": make("eos", lambda c: c.update(pad_token="</s>")),
        "no pad": make("none", lambda c: c.pop("pad_token")),
        "bos": make("bos", edit=template("<s>", "A")),
        "bos and eos": make("both", edit=template("<s>", "A", "</s>")),
    }


def dialogue(*turns):
    return [{"role": ("user", "assistant")[i % 2], "content": turn} for i, turn in enumerate(turns)]


def pair_record(**changes):
    return {
        "prompt": PROMPTS[1], "response_0": ANSWERS[0], "response_1": ANSWERS[1], "better_response_id": 0,
        "safer_response_id": 1, "is_response_0_safe": False, "is_response_1_safe": True,
    } | changes  # fmt: skip


def supervised(records, tokenizer, *, template=PLAIN, max_length=64, max_bad=0.0):
    return load_supervised(records, template, tokenizer, max_length=max_length, where="here", max_bad=max_bad)


def pairs(records, tokenizer, *, safety=True, max_length=64, max_bad=0.0):
    return load_pairs(records, PLAIN, tokenizer, safety=safety, max_length=max_length, where="here", max_bad=max_bad)


def prompts(records, tokenizer, *, max_length=64, max_bad=0.0, **options):
    return load_prompts(records, PLAIN, tokenizer, max_length=max_length, where="here", max_bad=max_bad, **options)


# --- Tokens


@pytest.mark.parametrize("name", sorted(TEMPLATES))
def test_training_sees_the_prompt_as_generation_does(tokenizer, name):
    for prompt, answer in zip(PROMPTS, ANSWERS, strict=True):
        row = supervised([{"prompt": prompt, "response": answer}], tokenizer, template=TEMPLATES[name], max_length=256)
        ids = row.arrays.tokens[0][row.arrays.mask[0]].tolist()
        seen = tokenizer.encode(TEMPLATES[name].render(tokenizer, dialogue(prompt), True))
        assert ids == seen + tokenizer.encode(answer) + [tokenizer.eos_id]
        generated = load_prompts(
            [{"prompt": prompt}], TEMPLATES[name], tokenizer, max_length=256, where="here", max_bad=0.0
        )
        assert generated.arrays.tokens[0][generated.arrays.mask[0]].tolist() == seen


def test_demo_prompt_and_response_tokenise_alike_apart_and_together(tokenizer):
    for record in demo.sft("test")[:100]:
        prompt, answer = (message["content"] for message in record["messages"])
        prompt = PLAIN.render(tokenizer, dialogue(prompt), True)
        assert tokenizer.encode(prompt) + tokenizer.encode(answer) == tokenizer.encode(prompt + answer)


def test_every_text_that_is_not_cut_ends_with_eos_inside_the_mask(tokenizer):
    data = pairs(demo.preference("test")[:200], tokenizer, max_length=24, max_bad=1.0)
    cut = 0
    for side in (data.arrays.safer, data.arrays.unsafer):
        for tokens, mask, response in zip(side.tokens, side.mask, side.response_mask, strict=True):
            last = mask.sum() - 1
            assert response[last]
            if tokens[last] == tokenizer.eos_id:
                assert (tokens[mask] == tokenizer.eos_id).sum() == 1
            else:
                assert last == 23
                cut += 1
    assert cut == data.truncated > 0


def test_only_turns_of_the_assistant_are_trained(tokenizer):
    messages = dialogue(PROMPTS[0], ANSWERS[0], PROMPTS[1], ANSWERS[1])
    row = supervised([{"messages": messages}], tokenizer).arrays
    expected = [
        i
        for text, trained in (
            (PROMPTS[0] + "\n", False),
            (ANSWERS[0], True),
            (PROMPTS[1] + "\n", False),
            (ANSWERS[1], True),
        )
        for i in [trained] * (len(tokenizer.encode(text)) + trained)
    ]
    assert row.loss_mask[0][row.mask[0]].tolist() == expected
    assert (row.tokens[0][row.loss_mask[0]] == tokenizer.eos_id).sum() == 2
    assert not row.loss_mask[~row.mask].any()


def test_each_field_that_holds_a_demonstration_gives_the_same_row(tokenizer):
    records = [
        {"messages": dialogue(PROMPTS[0], ANSWERS[0])},
        {"prompt": PROMPTS[0], "response": ANSWERS[0]},
        {"prompt": dialogue(PROMPTS[0]), "response": ANSWERS[0], "is_safe": True},
        pair_record(prompt=PROMPTS[0]),
    ]
    rows = supervised(records, tokenizer).arrays.tokens
    assert (rows == rows[0]).all()


def test_braces_in_a_text_are_no_format(tokenizer):
    text = TEMPLATES["beaver"].render(tokenizer, dialogue("{content} {0} {{ x }}"), True)
    assert text == "BEGINNING OF CONVERSATION: USER: {content} {0} {{ x }} ASSISTANT:"


@pytest.mark.parametrize("name", ["pad is eos", "no pad"])
def test_padding_with_eos_changes_no_mask(tokenizer, variants, name):
    assert variants[name].pad_id == variants[name].eos_id == tokenizer.eos_id != tokenizer.pad_id
    records = demo.sft("test")[:50]
    here, there = supervised(records, tokenizer).arrays, supervised(records, variants[name]).arrays
    assert (here.mask == there.mask).all()
    assert (here.loss_mask == there.loss_mask).all()
    assert (here.tokens == there.tokens)[here.mask].all()
    assert (there.tokens[~there.mask] == tokenizer.eos_id).all()
    here, there = prompts(records_of_prompts(), tokenizer).arrays, prompts(records_of_prompts(), variants[name]).arrays
    assert (here.mask == there.mask).all()


def records_of_prompts():
    return demo.prompts("test")[:50]


@pytest.mark.parametrize("name", ["bos", "bos and eos"])
def test_bos_opens_training_and_generation_once(tokenizer, variants, name):
    bos = variants[name].hf.bos_token_id
    assert variants[name].prefix == (bos,)
    assert tokenizer.prefix == ()
    row = supervised([{"messages": dialogue(*PROMPTS[:1], *ANSWERS[:1])}], variants[name]).arrays
    ids = row.tokens[0][row.mask[0]].tolist()
    assert ids[0] == bos
    assert ids.count(bos) == 1
    assert ids.count(tokenizer.eos_id) == 1
    assert not row.loss_mask[0, 0]
    generated = prompts([{"prompt": PROMPTS[0]}], variants[name]).arrays
    seen = generated.tokens[0][generated.mask[0]].tolist()
    assert seen == ids[: len(seen)]


def test_decoding_gives_the_text_back_without_special_tokens(tokenizer):
    text = "sorry i cannot help with that ."
    assert tokenizer.decode([*tokenizer.encode(text), tokenizer.eos_id, tokenizer.pad_id]) == text


def test_tokenizer_that_is_missing_is_named(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(ValueError, match="tokenizer 'no/such/folder': cannot be opened"):
        load_tokenizer("no/such/folder")


# --- Lengths and padding


def test_prompts_are_padded_on_the_left(tokenizer):
    data = prompts(records_of_prompts(), tokenizer).arrays
    assert data.mask[:, -1].all()
    assert (np.diff(data.mask.astype(int), axis=1) >= 0).all(), "padding between real tokens"
    assert (data.tokens[~data.mask] == tokenizer.pad_id).all()


def test_responses_are_padded_on_the_right_and_pairs_to_one_width(tokenizer):
    data = pairs(demo.preference("test")[:50], tokenizer)
    assert data.arrays.safer.tokens.shape == data.arrays.unsafer.tokens.shape
    for mask in data.masks:
        assert (np.diff(mask.astype(int), axis=1) <= 0).all()


def test_long_prompts_are_dropped_or_lose_their_start_as_set(tokenizer):
    records = records_of_prompts()
    lengths = [len(tokenizer.encode(record["prompt"] + "\n")) for record in records]
    limit = int(np.median(lengths))
    long = sum(length > limit for length in lengths)
    assert 0 < long < len(records)
    dropped = prompts(records, tokenizer, max_length=limit, max_bad=1.0)
    assert dropped.skipped == {"longer than max_prompt_length": long}
    assert dropped.records == [r for r, n in zip(records, lengths, strict=True) if n <= limit]
    with pytest.raises(ValueError, match=f"longer than max_prompt_length: {long}"):
        prompts(records, tokenizer, max_length=limit, max_bad=0.0)
    cut = prompts(records, tokenizer, max_length=limit, long_prompts="truncate_left")
    assert cut.truncated == long
    assert cut.records == records
    longest = int(np.argmax(lengths))
    assert cut.arrays.tokens[longest].tolist() == tokenizer.encode(records[longest]["prompt"] + "\n")[-limit:]


def test_prompt_that_leaves_no_room_for_a_response_is_unusable(tokenizer):
    record = {"prompt": PROMPTS[0], "response": ANSWERS[0]}
    size = len(tokenizer.encode(PROMPTS[0] + "\n"))
    assert supervised([record], tokenizer, max_length=size + 1).truncated == 1
    with pytest.raises(ValueError, match="the prompt fills max_length: 1"):
        supervised([record], tokenizer, max_length=size)


def test_pair_that_differs_only_beyond_the_limit_is_unusable(tokenizer):
    record = pair_record(response_0="order the bread .", response_1="order the delta .")
    size = len(tokenizer.encode(record["prompt"] + "\norder the"))
    with pytest.raises(ValueError, match="identical within max_length: 1"):
        pairs([record], tokenizer, max_length=size)
    assert len(pairs([record], tokenizer, max_length=size + 1)) == 1


# --- Labels


@pytest.mark.parametrize("better", [0, 1])
def test_labels_decide_the_sides(tokenizer, better):
    data = pairs([pair_record(better_response_id=better)], tokenizer, safety=False).arrays
    for side, i in ((data.chosen, better), (data.rejected, 1 - better)):
        assert tokenizer.decode(side.tokens[0][side.response_mask[0]]) == ANSWERS[i]
    safety = pairs([pair_record(), pair_record(is_response_0_safe=True)], tokenizer).arrays
    assert tokenizer.decode(safety.safer.tokens[0][safety.safer.response_mask[0]]) == ANSWERS[1]
    assert safety.safer_is_safe.tolist() == [True, True]
    assert safety.unsafer_is_safe.tolist() == [False, True]


def test_groups_are_numbered_by_name(tokenizer):
    records = [{"prompt": "a b", "kind": kind} for kind in ("x", "z", "y", "x")]
    assert prompts(records, tokenizer, group_field="kind").arrays.group.tolist() == [0, 2, 1, 0]
    assert prompts(records, tokenizer).arrays.group.tolist() == [0] * 4
    with pytest.raises(ValueError, match="group_field 'kin' is missing"):
        prompts(records, tokenizer, group_field="kin")


# --- Unusable records

BAD_SUPERVISED = {
    "no messages": {"text": "x"},
    "turns that do not alternate": {"messages": dialogue("a", "b")[::-1]},
    "the last turn is not the assistant's": {"messages": dialogue("a", "b", "c")},
    "messages is no list": {"messages": None},
    "no response": {"prompt": "a", "response": " "},
    "prompt is missing or no text": {"prompt": None, "response": "b"},
    "no prompt": {"prompt": "", "response": "b"},
    "response is missing or no text": {"prompt": "a", "response": 3},
    "missing is_safe": {"prompt": "a", "response": "b", "is_safe": None},
    "is_safe is neither true nor false, but 'maybe'": {"prompt": "a", "response": "b", "is_safe": "maybe"},
    "missing better_response_id": pair_record(better_response_id=None),
}
BAD_PAIRS = {
    "response_1 is missing or no text": pair_record(response_1=None),
    "missing safer_response_id": {k: v for k, v in pair_record().items() if k != "safer_response_id"},
    "safer_response_id is neither 0 nor 1": pair_record(safer_response_id="one"),
    "identical responses": pair_record(response_0=ANSWERS[1]),
    "the safer response is labelled unsafe": pair_record(safer_response_id=0),
    "missing is_response_0_safe": pair_record(is_response_0_safe=None),
    "is_response_1_safe is neither true nor false, but 2": pair_record(is_response_1_safe=2),
    "no response": pair_record(response_0=""),
    "prompt is missing or no text": pair_record(prompt=3),
}


def check_reason(load, reason, bad, good, tokenizer):
    data = load([bad] + [good] * 9, tokenizer, max_bad=0.1)
    assert len(data) == 9
    ((counted, count),) = data.skipped.items()
    assert counted.startswith(reason)
    assert count == 1
    with pytest.raises(ValueError, match=rf"here: 1 of 10 records cannot be used \({reason}.*: 1\)\. First: ") as error:
        load([bad] + [good] * 9, tokenizer, max_bad=0.09)
    assert json.dumps(bad)[:40] in str(error.value)
    assert "max_bad_records (0.09)" in str(error.value)


@pytest.mark.parametrize("reason", BAD_SUPERVISED)
def test_unusable_demonstration_is_counted_by_reason_and_fatal_above_the_limit(tokenizer, reason):
    check_reason(supervised, reason, BAD_SUPERVISED[reason], {"messages": dialogue("a", "b")}, tokenizer)


@pytest.mark.parametrize("reason", BAD_PAIRS)
def test_unusable_pair_is_counted_by_reason_and_fatal_above_the_limit(tokenizer, reason):
    check_reason(pairs, reason, BAD_PAIRS[reason], pair_record(), tokenizer)


def test_unusable_prompt_is_counted_by_reason_and_fatal_above_the_limit(tokenizer):
    check_reason(prompts, "prompt is missing or no text", {"text": "x"}, {"prompt": "a"}, tokenizer)


def test_long_bad_record_is_shown_in_part(tokenizer):
    with pytest.raises(ValueError, match="None is left") as error:
        prompts([{"text": "x" * 10_000}], tokenizer)
    assert len(str(error.value)) < 600
