"""Tokenizers that people bring: only in Python, only as a SentencePiece file, with holes, with several ends."""

import importlib.util
import json

import pytest
import sentencepiece

from safe_rlhf_jax.data.conversations import encode
from safe_rlhf_jax.data.templates import TEMPLATES
from safe_rlhf_jax.data.tokenizer import load_tokenizer
from tests.tokenizers import make_tokenizer

SPECIAL = ["<unk>", "<s>", "</s>"]


@pytest.fixture(scope="module")
def spoken(tmp_path_factory):
    """A folder as Llama's first ones: a SentencePiece file without a tokenizer.json."""
    folder = tmp_path_factory.mktemp("spoken")
    text = folder / "corpus.txt"
    text.write_text("how do i bake bread\nfirst mix the flour then wait\n" * 50)
    sentencepiece.SentencePieceTrainer.train(
        input=str(text), model_prefix=str(folder / "tokenizer"), vocab_size=60, model_type="bpe", byte_fallback=False,
        minloglevel=2,
    )  # fmt: skip
    config = {"tokenizer_class": "LlamaTokenizer", "eos_token": "</s>", "bos_token": "<s>", "unk_token": "<unk>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


def test_a_sentencepiece_file_is_read(spoken):
    tokenizer = load_tokenizer(str(spoken))
    assert tokenizer.decode(tokenizer.encode("how do i bake bread")) == "how do i bake bread"
    turns = [{"role": "user", "content": "how"}, {"role": "assistant", "content": "wait"}]
    ids = encode(turns, TEMPLATES["plain"], tokenizer).ids
    assert ids[-1] == tokenizer.eos_id


def test_without_its_package_a_sentencepiece_file_asks_for_it(spoken, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "sentencepiece" else find(name))
    monkeypatch.setattr("transformers.AutoTokenizer.from_pretrained", lambda *a, **k: 1 / 0)
    with pytest.raises(ValueError, match=r"tokenizer\.model is a SentencePiece file; .*safe_rlhf_jax\[sentencepiece\]"):
        load_tokenizer(str(spoken))


def test_a_tokenizer_that_exists_only_in_python_works(tmp_path):
    config = {"tokenizer_class": "ByT5Tokenizer", "eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config | {"extra_ids": 0}))
    tokenizer = load_tokenizer(str(tmp_path))
    assert tokenizer.decode(tokenizer.encode("über")) == "über"
    turns = [{"role": "user", "content": "how"}, {"role": "assistant", "content": "so </s> ."}]
    ids = encode(turns, TEMPLATES["plain"], tokenizer).ids
    assert ids.count(tokenizer.eos_id) == 1, "what stands in a message stays text"
    assert tokenizer.prefix == ()


def test_what_a_post_processor_appends_opens_no_text(tmp_path):
    tokenizer = make_tokenizer(tmp_path, SPECIAL, "</s>", spaces=None)
    content = json.loads((tmp_path / "tokenizer.json").read_text())
    content["post_processor"]["single"] = [
        {"Sequence": {"id": "A", "type_id": 0}}, {"SpecialToken": {"id": "<s>", "type_id": 0}}
    ]  # fmt: skip
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    assert tokenizer.prefix == (1,)
    assert load_tokenizer(str(tmp_path)).prefix == ()


def test_truncation_and_padding_that_are_saved_are_not_applied(tmp_path):
    make_tokenizer(tmp_path, SPECIAL, "</s>", spaces=None)
    content = json.loads((tmp_path / "tokenizer.json").read_text())
    content["truncation"] = {"direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 0}
    content["padding"] = {
        "strategy": {"Fixed": 64}, "direction": "Left", "pad_to_multiple_of": None, "pad_id": 0, "pad_type_id": 0,
        "pad_token": "<unk>",
    }  # fmt: skip
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    tokenizer = load_tokenizer(str(tmp_path))
    assert tokenizer.decode(tokenizer.encode("how do i bake the bread ?")) == "how do i bake the bread ?"
    assert 4 < len(tokenizer.encode("how do i bake the bread ?")) < 64


def test_holes_and_padding_are_the_rows_that_no_token_has(tmp_path):
    make_tokenizer(tmp_path, SPECIAL, "</s>", spaces=None)
    content = json.loads((tmp_path / "tokenizer.json").read_text())
    vocabulary = content["model"]["vocab"]
    last = max(vocabulary.values())
    moved = {token: i + 5 if i == last else i for token, i in vocabulary.items()}
    content["model"]["vocab"] = moved
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    tokenizer = load_tokenizer(str(tmp_path))
    assert tokenizer.vocab_size == last + 6
    assert tokenizer.holes(last + 6) == ((last, last + 5),)
    assert tokenizer.holes(last + 16) == ((last, last + 5), (last + 6, last + 16))
    assert tokenizer.holes(last) == ()


def test_ends_are_those_of_the_generation_config_that_the_tokenizer_knows(tmp_path):
    tokenizer = make_tokenizer(tmp_path, SPECIAL, "</s>", spaces=None)
    assert tokenizer.ends == (2,)
    for stored, ends in ((5, (2, 5)), ([2, 7, 10**6], (2, 7)), (None, (2,))):
        (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": stored}))
        assert load_tokenizer(str(tmp_path)).ends == ends
    (tmp_path / "config.json").write_text(json.dumps({"eos_token_id": [2, 8]}))
    assert load_tokenizer(str(tmp_path)).ends == (2, 8), "config.json counts where generation_config.json says nothing"


@pytest.mark.parametrize("stored", ["2", ["2", "7"], [2, None], [[2]], 2.0, {"a": 2}, True])
def test_ends_that_are_no_token_ids_are_refused(tmp_path, stored):
    make_tokenizer(tmp_path, SPECIAL, "</s>", spaces=None)
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": stored}))
    with pytest.raises(ValueError, match=r"generation_config\.json: eos_token_id is .*; write a token id, or a list"):
        load_tokenizer(str(tmp_path))


def test_tokenizers_differ_where_a_token_has_another_id(tmp_path):
    thoughts = ("<think>", "</think>")
    ours, same, base = (
        make_tokenizer(tmp_path / name, SPECIAL, "</s>", spaces=None, thoughts=given)
        for name, given in (("a", thoughts), ("b", thoughts), ("c", ()))
    )
    assert ours.differing(same) == ours.differing(base) == base.differing(ours) == []
    later = make_tokenizer(tmp_path / "d", SPECIAL, "</s>", spaces=None, thoughts=("<x>", "<y>", *thoughts))
    think = ours.hf.convert_tokens_to_ids(list(thoughts))
    assert ours.differing(later) == think
    content = json.loads((tmp_path / "c" / "tokenizer.json").read_text())
    content["model"]["vocab"] |= {token: i + 2 for token, i in zip(thoughts, think, strict=True)}  # behind two holes
    (tmp_path / "c" / "tokenizer.json").write_text(json.dumps(content))
    assert ours.differing(load_tokenizer(str(tmp_path / "c"))) == think


@pytest.mark.parametrize("spaces", [None, "first", "always", "never"])
def test_a_continuation_is_what_stands_behind_another_text(tmp_path, spaces):
    tokenizer = make_tokenizer(tmp_path, SPECIAL, "</s>", spaces=spaces)
    opened = tokenizer.encode("how")
    assert tokenizer.hf.decode([*opened, *tokenizer.continuation(" bread")]) == "how bread"
    assert tokenizer.hf.decode([*opened, *tokenizer.continuation("bread")]) == "howbread"
