"""Chat templates: what is trained is what generation produces, and what generation reads is what is trained on."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from safe_rlhf_jax.data.examples import load_pairs, load_prompts, load_supervised
from safe_rlhf_jax.data.templates import TEMPLATES, load_template
from safe_rlhf_jax.data.tokenizer import load_tokenizer

# As chat templates are written, with EOS at the end of a turn, another end, and around a trimmed text.
CHATML = (
    "{% for m in messages %}{{ '<|' + m['role'] + '|>\n' + m['content'] + eos_token + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
)
OWN_END = CHATML.replace("eos_token", "'<|end|>'")
LLAMA2 = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}{{ '[INST] ' + m['content'] + ' [/INST]' }}"
    "{% elif m['role'] == 'assistant' %}{{ ' ' + m['content'] | trim + ' ' + eos_token }}"
    "{% else %}{{ raise_exception('no system message') }}{% endif %}{% endfor %}"
)
THINKING = CHATML.replace(
    "m['content'] + eos_token", "('<think></think>' if m['role'] == 'assistant' else '') + m['content'] + eos_token"
)
JINJA = {"chatml": CHATML, "own end": OWN_END, "llama2": LLAMA2, "thinking": THINKING}


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer("demo")


@pytest.fixture(scope="module")
def templates(tokenizer, tmp_path_factory):
    folder = tmp_path_factory.mktemp("templates")
    for name, text in JINJA.items():
        (folder / f"{name}.jinja").write_text(text, encoding="utf-8")
    return TEMPLATES | {name: load_template(str(folder / f"{name}.jinja"), tokenizer) for name in JINJA}


def dialogue(*turns):
    return [{"role": ("user", "assistant")[i % 2], "content": turn} for i, turn in enumerate(turns)]


OPTIONS = {"max_length": 512, "where": "here", "max_bad": 0.0}
NAMES = [*TEMPLATES, *JINJA]


@pytest.mark.parametrize("name", NAMES)
def test_prompt_and_response_are_tokenised_as_generation_sees_them(tokenizer, templates, name):
    template = templates[name]
    words = st.lists(st.sampled_from(["how", "do", "bread", ".", "e", "the bread"]), min_size=1, max_size=4)

    @given(st.lists(words.map(" ".join), min_size=2, max_size=6).filter(lambda turns: len(turns) % 2 == 0))
    def check(turns):
        messages = dialogue(*turns)
        row = load_supervised([{"messages": messages}], template, tokenizer, **OPTIONS).arrays
        ids, trained = row.tokens[0][row.mask[0]].tolist(), row.loss_mask[0][row.mask[0]].tolist()
        # Every prompt of the conversation is a prefix of it, and followed by a response that is trained.
        for end in range(1, len(messages), 2):
            prompt = load_prompts([{"prompt": messages[:end]}], template, tokenizer, **OPTIONS).arrays
            asked = prompt.tokens[0][prompt.mask[0]].tolist()
            assert ids[: len(asked)] == asked
            assert trained[len(asked)]
            assert not trained[len(asked) - 1]
            answer = ids[len(asked) : ids.index(tokenizer.eos_id, len(asked)) + 1]
            assert all(trained[len(asked) : len(asked) + len(answer)])
            assert tokenizer.decode(answer).endswith(messages[end]["content"])
        assert len(runs(trained)) == len(messages) // 2
        assert ids[-1] == tokenizer.eos_id
        assert trained[-1]

    check()


def runs(flags):
    out, before = [], False
    for flag in flags:
        if flag and not before:
            out.append([])
        if flag:
            out[-1].append(flag)
        before = flag
    return out


def test_jinja_text_is_what_transformers_renders(tokenizer, templates):
    messages = dialogue("how do i bake", "with the bread .", "and then", "so .")
    for name in ("chatml", "llama2", "thinking"):
        whole = tokenizer.hf.apply_chat_template(messages, chat_template=JINJA[name], tokenize=False)
        segments = templates[name].segments(messages)
        text = "".join(segment.text + ("</s>" if segment.is_response else "") for segment in segments)
        assert text.replace(" </s>", "</s>") == whole.rstrip("\n").replace(" </s>", "</s>")


def test_bos_of_a_template_is_not_written_twice(tokenizer, templates):
    row = load_supervised([{"messages": dialogue("how", "so .")}], templates["llama2"], tokenizer, **OPTIONS).arrays
    assert row.tokens[0].tolist().count(tokenizer.hf.bos_token_id) == 1


def test_only_the_last_response_of_a_pair_is_trained(tokenizer, templates):
    record = {
        "prompt": dialogue("how", "so .", "and"), "response_0": "yes .", "response_1": "no .", "better_response_id": 1
    }  # fmt: skip
    data = load_pairs([record], templates["chatml"], tokenizer, safety=False, **OPTIONS).arrays
    for side, text in ((data.chosen, "no .</s>"), (data.rejected, "yes .</s>")):
        assert tokenizer.hf.decode(side.tokens[0][side.response_mask[0]].tolist()) == text


def test_template_that_refuses_turns_makes_the_record_unusable(tokenizer, templates):
    record = {"messages": [{"role": "system", "content": "be short"}, *dialogue("how", "so .")]}
    load_supervised([record], templates["chatml"], tokenizer, **OPTIONS)
    with pytest.raises(ValueError, match="the template refuses: no system message: 1"):
        load_supervised([record], templates["llama2"], tokenizer, **OPTIONS)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{% for m in messages %}{% if m['role'] == 'user' %}{{ m['content'] }}{% endif %}{% endfor %}",
         "does not write the assistant's turn"),
        (CHATML.replace("'<|assistant|>\n'", "'<|model|>\n'"), "generation prompt is not the beginning"),
        ("{% for m in messages %}{{ m['content'] }", "the template refuses"),
        ("{{ raise_exception('never') }}", "the template refuses: never"),
    ],
)  # fmt: skip
def test_template_that_cannot_be_trained_with_is_refused(tokenizer, tmp_path, text, message):
    (tmp_path / "bad.jinja").write_text(text, encoding="utf-8")
    with pytest.raises(ValueError, match=rf"template '.*bad\.jinja': .*{message}"):
        load_template(str(tmp_path / "bad.jinja"), tokenizer)


def test_template_that_is_missing_is_named(tokenizer, tmp_path):
    with pytest.raises(ValueError, match="template 'tokenizer': the tokenizer has no chat template"):
        load_template("tokenizer", tokenizer)
    with pytest.raises(ValueError, match=r"none\.jinja': cannot be read"):
        load_template(str(tmp_path / "none.jinja"), tokenizer)


def test_template_of_the_tokenizer_is_used(tmp_path):
    own = load_tokenizer("demo").hf
    own.chat_template = CHATML
    own.save_pretrained(tmp_path)
    opened = load_tokenizer(str(tmp_path))
    segments = load_template("tokenizer", opened).segments(dialogue("how", "so ."))
    assert [(s.text, s.is_response) for s in segments] == [
        ("<|user|>\nhow</s>\n<|assistant|>\n", False),
        ("so .", True),
    ]
