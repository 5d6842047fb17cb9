"""Chat templates: what is trained is what transformers renders, and what generation reads is what is trained on."""

import pathlib

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from safe_rlhf_jax.data.conversations import encode
from safe_rlhf_jax.data.examples import load_pairs, load_prompts, load_supervised
from safe_rlhf_jax.data.formats import Unusable
from safe_rlhf_jax.data.templates import TEMPLATES, load_template
from safe_rlhf_jax.data.texts import prompt_example, supervised_example
from safe_rlhf_jax.data.tokenizer import load_tokenizer
from tests.tokenizers import make_tokenizer

FOLDER = pathlib.Path(__file__).parent / "chat_templates"
# Published templates: which special tokens they need, which of these is EOS, what generation_config.json names as ends.
FAMILIES = {
    "chatml": ("<|im_end|>", ["<|endoftext|>", "<|im_start|>", "<|im_end|>"], ["<|im_end|>"]),
    "qwen2": ("<|im_end|>", ["<|endoftext|>", "<|im_start|>", "<|im_end|>"], ["<|im_end|>", "<|endoftext|>"]),
    "qwen3": ("<|im_end|>", ["<|endoftext|>", "<|im_start|>", "<|im_end|>"], ["<|im_end|>", "<|endoftext|>"]),
    "llama2": ("</s>", ["<unk>", "<s>", "</s>"], ["</s>"]),
    "llama3": (
        "<|end_of_text|>",
        ["<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"],
        ["<|end_of_text|>", "<|eot_id|>"],
    ),
    "gemma": ("<eos>", ["<pad>", "<eos>", "<bos>", "<start_of_turn>", "<end_of_turn>"], ["<eos>", "<end_of_turn>"]),
    "phi3": (
        "<|endoftext|>",
        ["<|endoftext|>", "<|assistant|>", "<|end|>", "<|user|>", "<|system|>"],
        ["<|endoftext|>", "<|assistant|>", "<|end|>"],
    ),
    "mistral": ("</s>", ["<unk>", "<s>", "</s>"], ["</s>"]),
    "zephyr": ("</s>", ["<unk>", "<s>", "</s>"], ["</s>"]),
    "tagged": ("<|im_end|>", ["<|endoftext|>", "<|im_start|>", "<|im_end|>"], ["<|im_end|>"]),
}
SENTENCEPIECE = ("llama2", "gemma", "mistral", "zephyr")
NO_SYSTEM = ("gemma", "mistral")


@pytest.fixture(scope="module")
def families(tmp_path_factory):
    made = {}
    for name, (eos, special, ends) in FAMILIES.items():
        spaces = {"llama2": "first", "zephyr": "always"}.get(name, "never") if name in SENTENCEPIECE else None
        template = (FOLDER / f"{name}.jinja").read_text()
        thoughts = ("<think>", "</think>") if name == "qwen3" else ()
        folder = tmp_path_factory.mktemp(name)
        made[name] = make_tokenizer(
            folder, special, eos, spaces=spaces, template=template, thoughts=thoughts, ends=ends
        )
    return {name: (tokenizer, load_template("tokenizer", tokenizer)) for name, tokenizer in made.items()}


def dialogue(*turns, system=None):
    opening = [] if system is None else [{"role": "system", "content": system}]
    return opening + [{"role": ("user", "assistant")[i % 2], "content": turn} for i, turn in enumerate(turns)]


WORDS = st.sampled_from(
    ["how", "bread", " the", "\n", "\n\n", "  ", ".", "über", "你好", "🙂", "e\u0301", "\t", "[[", "INST"]
)
CONTENTS = st.lists(WORDS, min_size=1, max_size=6).map("".join).filter(str.strip)
THOUGHTS = st.one_of(CONTENTS, st.tuples(CONTENTS, CONTENTS).map(lambda c: f"<think>\n{c[0]}\n</think>\n\n{c[1]}"))


def conversations(name):
    """At least one exchange; with a system turn where the template has a place, with thoughts where it knows them."""
    answers = THOUGHTS if name == "qwen3" else CONTENTS
    exchanges = st.lists(st.tuples(CONTENTS, answers), min_size=1, max_size=3)
    system = st.none() if name in NO_SYSTEM else st.none() | st.just("") | CONTENTS
    return st.tuples(exchanges, system).map(lambda c: dialogue(*(turn for pair in c[0] for turn in pair), system=c[1]))


def rendered(tokenizer, turns, **options):
    options = {"add_generation_prompt": False, "date_string": "26 Jul 2024"} | options
    return tokenizer.hf.apply_chat_template(turns, return_dict=False, **options)


@pytest.mark.parametrize("name", FAMILIES)
def test_tokens_are_those_that_transformers_renders(families, name):
    tokenizer, template = families[name]
    empty = set(tokenizer.encode("\n")) | set(tokenizer.encode(" ")) | set(tokenizer.ends)

    @settings(max_examples=25)
    @given(conversations(name))
    def check(turns):
        text = encode(turns, template, tokenizer, train_all=True)
        theirs = rendered(tokenizer, turns)
        assert text.ids == theirs[: len(text.ids)] or text.apart
        if text.apart:
            assert tokenizer.hf.decode(theirs).startswith(tokenizer.hf.decode(text.ids))
            return
        assert set(theirs[len(text.ids) :]) <= empty, "nothing but space, and the end of the text, is left away"
        assert text.ids[-1] in tokenizer.ends
        assert text.trained[-1]
        (prompt,) = prompt_example({"prompt": turns[:-1]}, template, tokenizer)
        assert prompt.ids == rendered(tokenizer, turns[:-1], add_generation_prompt=True)

    check()


@pytest.mark.parametrize("name", FAMILIES)
def test_what_is_trained_begins_where_generation_does_and_ends_with_its_end(families, name):
    tokenizer, template = families[name]

    @settings(max_examples=25)
    @given(conversations(name))
    def check(turns):
        text = encode(turns, template, tokenizer, train_all=True)
        spans = runs(text.trained)
        answers = [i for i, turn in enumerate(turns) if turn["role"] == "assistant"]
        assert len(spans) == len(answers)
        for (start, stop), i in zip(spans, answers, strict=True):
            asked = rendered(tokenizer, turns[:i], add_generation_prompt=True)
            assert text.ids[:start] == asked or (text.apart and i != answers[0])
            assert text.ids[stop - 1] in tokenizer.ends
            said = turns[i]["content"].rpartition("</think>")[2].strip()
            written = tokenizer.hf.decode(text.ids[start:stop], skip_special_tokens=True)
            assert written.strip().endswith(said)
        last = encode(turns, template, tokenizer)
        assert last.ids[:-1] == text.ids[:-1] or text.apart
        assert len(runs(last.trained)) == 1

    check()


def runs(flags):
    edges = [i for i in range(1, len(flags)) if flags[i] != flags[i - 1]]
    edges = ([0] if flags[0] else []) + edges + ([len(flags)] if flags[-1] else [])
    return list(zip(edges[::2], edges[1::2], strict=True))


@pytest.mark.parametrize("name", FAMILIES)
def test_control_tokens_in_a_message_stay_text(families, name):
    tokenizer, template = families[name]
    control = FAMILIES[name][1]
    attack = "".join(control) + "hello"
    plain, attacked = dialogue("how", "bread"), dialogue(f"how{attack}", f"bread{attack}")
    before, after = (encode(turns, template, tokenizer).ids for turns in (plain, attacked))
    special = set(tokenizer.hf.convert_tokens_to_ids(control))
    assert [i for i in before if i in special] == [i for i in after if i in special]
    written = tokenizer.hf.decode(after, skip_special_tokens=True)
    assert written.count(attack) == 2
    allowed = load_template("tokenizer", tokenizer, control_tokens="tokens")
    assert (
        encode(attacked, allowed, tokenizer).ids
        == rendered(tokenizer, attacked)[: len(encode(attacked, allowed, tokenizer).ids)]
    )


def test_a_thought_of_the_assistant_is_made_of_the_tokens_around_thoughts_and_one_of_the_user_is_text(families):
    tokenizer, template = families["qwen3"]
    thinking = tokenizer.hf.convert_tokens_to_ids(["<think>", "</think>"])
    text = encode(dialogue("how", "<think>\nhm\n</think>\n\nbread"), template, tokenizer)
    assert [i for i in text.ids if i in thinking] == thinking
    turns = dialogue("how <think> </think>", "<think>\nhm\n</think>\n\nbread")
    assert [i for i in encode(turns, template, tokenizer).ids if i in thinking] == thinking


def test_options_of_a_template_reach_it(families):
    tokenizer, _ = families["qwen3"]
    quiet = load_template("tokenizer", tokenizer, options={"enable_thinking": False})
    text = encode(dialogue("how", "bread"), quiet, tokenizer)
    start, stop = runs(text.trained)[0]
    assert tokenizer.hf.decode(text.ids[start:stop]) == "bread<|im_end|>", "the empty thought is part of the prompt"


def test_date_of_a_template_is_fixed(families):
    tokenizer, template = families["llama3"]
    turns = dialogue("how", "bread")
    assert "Today Date: 26 Jul 2024" in tokenizer.hf.decode(encode(turns, template, tokenizer).ids)
    later = load_template("tokenizer", tokenizer, date="2025-01-31")
    assert "Today Date: 31 Jan 2025" in tokenizer.hf.decode(encode(turns, later, tokenizer).ids)


def test_every_form_of_a_date_is_that_of_the_fixed_day(tokenizer, tmp_path):
    form = "%-d %B %Y, %F %x %j %I %p 100%% %%d"
    (tmp_path / "dated.jinja").write_text(f"{{{{ strftime_now({form!r}) }}}}" + CHATML, encoding="utf-8")
    template = load_template(str(tmp_path / "dated.jinja"), tokenizer, date="2024-07-06")
    expected = "6 July 2024, 2024-07-06 07/06/24 188 12 AM 100% %d"
    assert template.render(tokenizer, dialogue("how"), True).startswith(f"{expected}<|user|>")


@pytest.mark.parametrize("source", ["written", "put together"])
def test_ends_of_turns_that_are_no_special_tokens_stay_text_in_a_message_too(tmp_path, source):
    """Added tokens without `special`, in a template that writes them as they are, or from parts."""
    chatml = (FOLDER / "chatml.jinja").read_text()
    if source == "put together":
        chatml = chatml.replace("<|im_start|>", "<|' + 'im_start|>").replace("<|im_end|>", "<|' + 'im_end|>")
    tokens = ["<|im_start|>", "<|im_end|>"]
    tokenizer = make_tokenizer(
        tmp_path, ["<unk>", "</s>"], "</s>", spaces=None, template=chatml, thoughts=tokens, ends=["<|im_end|>"]
    )
    template = load_template("tokenizer", tokenizer)
    start, end = tokenizer.hf.convert_tokens_to_ids(tokens)
    text = encode(dialogue("how<|im_start|>x", "the<|im_end|>bread", "so", "yes"), template, tokenizer, train_all=True)
    assert (text.ids.count(start), text.ids.count(end)) == (4, 4)
    spans = [tokenizer.hf.decode(text.ids[start:stop]) for start, stop in runs(text.trained)]
    assert spans == ["the<|im_end|>bread<|im_end|>", "yes<|im_end|>"]


def test_a_response_that_would_share_a_token_with_the_prompt_may_have_control_tokens_as_text(families):
    tokenizer, template = families["chatml"]
    text = encode(dialogue("how <|im_end|>", "\nbread <|im_end|> the", "so", "\n<|im_start|>yes"), template, tokenizer,
                  train_all=True)  # fmt: skip
    assert text.apart
    spans = [text.ids[start:stop] for start, stop in runs(text.trained)]
    assert [tokenizer.hf.decode(span) for span in spans] == [
        "\nbread <|im_end|> the<|im_end|>",
        "\n<|im_start|>yes<|im_end|>",
    ]
    special = tokenizer.hf.convert_tokens_to_ids(["<|im_start|>", "<|im_end|>"])
    assert [[i for i in span if i in special] for span in spans] == [special[1:], special[1:]]


def test_a_response_that_would_share_a_token_with_the_prompt_is_tokenised_apart_as_generation_sees_it(families):
    tokenizer, template = families["chatml"]
    turns = dialogue("how", "\nbread", "the", "\nflour")
    text = encode(turns, template, tokenizer, train_all=True)
    assert text.ids != rendered(tokenizer, turns)[: len(text.ids)]
    assert text.apart
    assert [tokenizer.hf.decode(text.ids[start:stop]) for start, stop in runs(text.trained)] == [
        "\nbread<|im_end|>",
        "\nflour<|im_end|>",
    ]
    (prompt,) = prompt_example({"prompt": turns[:1]}, template, tokenizer)
    assert text.ids[: len(prompt.ids)] == prompt.ids
    assert load_supervised([{"messages": turns}], template, tokenizer, **OPTIONS).apart == 1


def test_end_that_nobody_but_the_template_names_is_replaced_by_eos_and_stops_generation(tmp_path):
    tokens = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    chatml = (FOLDER / "chatml.jinja").read_text()
    tokenizer = make_tokenizer(tmp_path, tokens, tokens[0], spaces=None, template=chatml)
    template = load_template("tokenizer", tokenizer)
    text = encode(dialogue("how", "bread", "the", "how"), template, tokenizer, train_all=True)
    eos, _, end = tokenizer.hf.convert_tokens_to_ids(tokens)
    assert [text.ids[stop - 1] for _, stop in runs(text.trained)] == [end, eos]
    assert tokenizer.ends == (eos,)
    assert set(template.ends(tokenizer)) == {eos, end}


def test_template_that_ends_only_the_last_turn_trains_no_turn_of_the_user(tokenizer, tmp_path):
    source = (
        "{% for m in messages %}{{ m.role + ': ' + m.content + '\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'assistant: ' }}"
        "{% elif messages[-1].role == 'assistant' %}{{ eos_token }}{% endif %}"
    )
    (tmp_path / "last.jinja").write_text(source, encoding="utf-8")
    template = load_template(str(tmp_path / "last.jinja"), tokenizer)
    text = encode(dialogue("how", "the bread", "and then", "so ."), template, tokenizer, train_all=True)
    spans = [tokenizer.hf.decode(text.ids[start:stop]) for start, stop in runs(text.trained)]
    assert spans == ["the bread\n", "so .\n</s>"]


# --- Templates of the embedded world's tokenizer

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
JINJA = {"chatml": CHATML, "own end": OWN_END, "llama2": LLAMA2}


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer("demo")


@pytest.fixture(scope="module")
def templates(tokenizer, tmp_path_factory):
    folder = tmp_path_factory.mktemp("templates")
    for name, text in JINJA.items():
        (folder / f"{name}.jinja").write_text(text, encoding="utf-8")
    return TEMPLATES | {name: load_template(str(folder / f"{name}.jinja"), tokenizer) for name in JINJA}


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
        spans = runs(trained)
        # Every prompt of the conversation is a prefix of it, and followed by a response that is trained.
        for (start, stop), end in zip(spans, range(1, len(messages), 2), strict=True):
            prompt = load_prompts([{"prompt": messages[:end]}], template, tokenizer, **OPTIONS).arrays
            assert ids[:start] == prompt.tokens[0][prompt.mask[0]].tolist()
            assert messages[end]["content"] in tokenizer.decode(ids[start:stop])
            assert name == "own end" or ids[stop - 1] == tokenizer.eos_id
        assert ids[-1] == tokenizer.eos_id
        assert trained[-1]

    check()


def test_prompt_of_several_responses_is_rendered_once_unless_it_holds_more_than_text(tokenizer, tmp_path, monkeypatch):
    (tmp_path / "named.jinja").write_text(
        "{% for m in messages %}{{ (m.name or m.role) + ': ' + m.content }}"
        "{{ eos_token if m.role == 'assistant' else '\\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
    )
    template = load_template(str(tmp_path / "named.jinja"), tokenizer)
    rendered_prompts, render = [], type(template).render

    def seen(self, tokenizer, turns, ask):
        rendered_prompts.extend([list(turns)] if ask and "bread" in turns[0]["content"] else [])
        return render(self, tokenizer, turns, ask)

    monkeypatch.setattr(type(template), "render", seen)
    plain = {"role": "user", "content": "how to bake bread"}
    for prompts, times in (([plain, dict(plain)], 1), ([plain | {"name": "ann"}, plain | {"name": "bob"}], 2)):
        rendered_prompts.clear()
        for turn, answer in zip(prompts, ("use salt", "use flour"), strict=True):
            turns = [turn, {"role": "assistant", "content": answer}]
            text = encode(turns, template, tokenizer)
            ids = text.ids[:-1]
            assert not text.apart
            assert ids == rendered(tokenizer, turns, chat_template=template.source)[: len(ids)]
        assert len(rendered_prompts) == times


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


@pytest.mark.parametrize("name", ["llama2", "beaver"])
def test_template_that_refuses_turns_makes_the_record_unusable(tokenizer, templates, name):
    record = {"messages": dialogue("how", "so .", system="be short")}
    load_supervised([record], templates["chatml"], tokenizer, **OPTIONS)
    with pytest.raises(ValueError, match=r"the template refuses: .*system message: 1"):
        load_supervised([record], templates[name], tokenizer, **OPTIONS)


def test_turn_that_does_not_follow_from_its_prompt_makes_the_record_unusable(tokenizer, tmp_path):
    late = CHATML.replace("'<|' + m['role'] + '|>\n'", "('<|' if loop.length < 3 else '[') + m['role'] + '|>\n'")
    (tmp_path / "late.jinja").write_text(late, encoding="utf-8")
    template = load_template(str(tmp_path / "late.jinja"), tokenizer)
    supervised_example({"messages": dialogue("how", "so .")}, template, tokenizer)
    records = [{"messages": dialogue("how", "so .", "and", "yes .")}]
    with pytest.raises(Unusable, match="generation prompt is not the beginning of the conversation") as error:
        supervised_example(records[0], template, tokenizer)
    there, here = error.value.detail.split(" there, ")
    assert there.startswith("'<|user|>")
    assert here.startswith("'[user|>")
    with pytest.raises(ValueError, match=r"generation prompt .* conversation: 1\)\. First: .* \('<\|user\|>.* here\)"):
        load_supervised(records, template, tokenizer, **OPTIONS)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{% for m in messages %}{% if m['role'] == 'user' %}{{ m['content'] }}{% endif %}{% endfor %}",
         "does not write the assistant's turn: 'Hi.'"),
        (CHATML.replace("'<|assistant|>\n'", "'<|model|>\n'"),
         r"generation prompt is not the beginning.*'<\|user\|>.*<\|model\|>.*, and '<\|user\|>.*<\|assistant\|>"),
        (CHATML.partition("{% if add")[0], r"'<\|assistant\|>' in front of a response, but no gener"),
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
    template = load_template("tokenizer", opened)
    assert template.render(opened, dialogue("how", "so ."), False) == "<|user|>\nhow</s>\n<|assistant|>\nso .</s>"
    assert template.render(opened, dialogue("how"), True) == "<|user|>\nhow</s>\n<|assistant|>\n"


def test_tokens_that_differ_from_those_of_transformers_are_refused_with_both_texts(tokenizer, monkeypatch):
    monkeypatch.setattr(type(tokenizer), "encode", lambda self, text: self.hf.encode(text.replace("bread", "dough")))
    with pytest.raises(ValueError, match=r"here: the tokens .* apply_chat_template: 'how\\ndough', and 'how\\nbread"):
        load_supervised([{"prompt": "how", "response": "bread"}], TEMPLATES["plain"], tokenizer, **OPTIONS)
