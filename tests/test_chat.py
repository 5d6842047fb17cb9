import io
import re
import subprocess
import sys
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from safe_rlhf_jax import chat
from safe_rlhf_jax.data.tokenizer import load_tokenizer
from safe_rlhf_jax.models import hf
from safe_rlhf_jax.ops import sequence_scores
from tests.helpers import make_lm, make_scorer, perturbed, tiny_config
from tests.tokenizers import make_tokenizer


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer("demo")


@pytest.fixture(scope="module")
def folders(tokenizer, tmp_path_factory):
    """Two policies, a reward and a cost model, as a run exports them."""
    root, config = tmp_path_factory.mktemp("models"), tiny_config(vocab_size=tokenizer.vocab_size)
    for seed, name in enumerate(["a", "b"]):
        module, variables = make_lm(config, seed)
        hf.save(root / name, module, perturbed(variables, seed), tokenizer.hf)
    for name in ("reward", "cost"):
        module, variables = make_scorer(name, config)
        hf.save(root / name, module, perturbed(variables), tokenizer.hf)
    return root


def talk(monkeypatch, capsys, lines, *arguments):
    """Runs the program on typed lines; returns its status, output and errors."""
    monkeypatch.setattr(sys, "stdin", io.StringIO("\n".join(lines) + "\n"))
    monkeypatch.setenv("COLUMNS", "200")
    status = chat.main([str(argument) for argument in arguments])
    captured = capsys.readouterr()
    return status, captured.out, captured.err


def test_two_policies_answer_side_by_side_with_scores(monkeypatch, capsys, folders):
    status, out, _ = talk(
        monkeypatch, capsys, ["hello"], folders / "a", folders / "b", "--reward", folders / "reward", "--cost",
        folders / "cost", "--max-tokens", 6, "--temperature", 0,
    )  # fmt: skip
    assert status == 0
    assert len(re.findall(r"reward [+-]\d+\.\d\d  cost [+-]\d+\.\d\d", out)) == 2


@pytest.mark.parametrize(
    ("flag", "model", "message"),
    [
        ("--reward", "b", "b: holds no score head"),
        ("--cost", "b", "b: holds no score head"),
        ("--reward", "cost", "score_type is 'cost', not 'reward'"),
        ("--cost", "reward", "score_type is 'reward', not 'cost'"),
    ],
)
def test_scores_are_shown_only_of_a_model_that_has_them(monkeypatch, capsys, folders, flag, model, message):
    status, _, errors = talk(monkeypatch, capsys, ["hello"], folders / "a", flag, folders / model)
    assert status == 1
    assert message in errors


def load(folders, *arguments):
    options = chat.parse_arguments([str(folders / "a"), "--max-tokens", "6", *map(str, arguments)])
    return chat.load_chat(options)


def test_score_is_the_scorers_own_at_the_last_token_of_the_answer(folders, tokenizer):
    session = load(folders, "--reward", folders / "reward")
    module, variables = hf.load(folders / "reward", "score")
    ids = tokenizer.encode("one two three four five")
    tokens = jnp.asarray([ids], jnp.int32)
    expected = sequence_scores(module, variables, tokens, jnp.ones_like(tokens, bool))[0]
    assert session.scorers["reward"].score_tokens([ids])[0] == pytest.approx(float(expected), abs=1e-5)


def test_a_scorer_with_another_tokenizer_reads_the_text_in_its_own_way(folders, tmp_path):
    template = (Path(__file__).parent / "data" / "chat_templates" / "chatml.jinja").read_text()
    tokens = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    own = make_tokenizer(tmp_path, tokens, "<|im_end|>", spaces=None, template=template)
    module, variables = make_scorer("reward", tiny_config(vocab_size=own.vocab_size, max_positions=256))
    hf.save(tmp_path, module, perturbed(variables), own.hf)
    session = load(folders, "--reward", tmp_path)
    session.say("hello", lambda: None)
    (speaker,) = session.speakers
    prompt, answer = speaker.history
    ids = own.hf.apply_chat_template([prompt, answer | {"content": speaker.text}], return_dict=False)
    ids = ids[: len(ids) - ids[::-1].index(own.hf.eos_token_id)]  # what a score is read behind
    expected = sequence_scores(module, perturbed(variables), jnp.asarray([ids]), jnp.ones((1, len(ids)), bool))[0]
    assert speaker.note.startswith(f"reward {float(expected):+.2f}")
    assert session.scorers["reward"].tokenizer.vocab_size != speaker.policy.tokenizer.vocab_size


def test_a_scorer_without_a_tokenizer_reads_as_the_policy_does(folders, tmp_path):
    hf.save(tmp_path, *make_scorer("cost", hf.load(folders / "a")[0].config))
    session = load(folders, "--cost", tmp_path)
    assert session.scorers["cost"].reads_as(session.speakers[0].policy)


def test_conversation_grows_and_is_forgotten(folders):
    session = load(folders)
    (speaker,) = session.speakers
    session.say("hello", lambda: None)
    session.say("again", lambda: None)
    assert [turn["role"] for turn in speaker.history] == ["user", "assistant"] * 2
    assert session.prompt_ids(speaker)[:1] == load_tokenizer("demo").encode("hello")[:1]
    session.forget()
    assert speaker.history == []


def test_regenerating_replaces_the_last_answer(folders):
    session = load(folders, "--temperature", 3)
    (speaker,) = session.speakers
    session.say("hello", lambda: None)
    first = speaker.history[-1]["content"]
    session.regenerate(lambda: None)
    assert [turn["role"] for turn in speaker.history] == ["user", "assistant"]
    assert speaker.history[-1]["content"] != first


def test_the_best_of_several_answers_is_kept_by_reward_within_the_cost_limit(folders):
    session = load(folders, "--temperature", 3, "--best-of", 4, "--reward", folders / "reward")
    (speaker,) = session.speakers
    seen, rewards, costs = [], iter([1.0, 3.0, 2.0, 0.0] * 2), iter([0.0, 1.0, -1.0, 5.0])

    class Given:
        def __init__(self, values):
            self.values = values

        def score_answers(self, policy, conversation, answers):
            return np.array([next(self.values) for _ in answers])

    def look():
        if speaker.note.startswith("answer") and (not seen or seen[-1][0] != speaker.note):
            seen.append([speaker.note, ""])
        if speaker.note.startswith("answer"):
            seen[-1][1] = speaker.text

    session.scorers = {"reward": Given(rewards)}
    session.say("hello", look)
    assert [note for note, _ in seen] == [f"answer {i} of 4" for i in (1, 2, 3, 4)]
    assert len({text for _, text in seen}) > 1
    assert speaker.text == seen[1][1]
    assert speaker.note.startswith("reward +3.00")
    session.scorers, seen[:] = {"reward": Given(rewards), "cost": Given(costs)}, []
    session.regenerate(look)
    assert speaker.text == seen[2][1]
    assert speaker.note.startswith("reward +2.00  cost -1.00")


def test_the_oldest_turns_go_when_a_conversation_grows_too_long(folders):
    session = load(folders)
    (speaker,) = session.speakers
    for _ in range(12):
        session.say("hello hello hello", lambda: None)
    assert 2 <= len(speaker.history) < 24
    assert len(session.prompt_ids(speaker)) < speaker.max_positions


def test_a_stopped_answer_keeps_what_there_is(folders):
    session = load(folders)

    def interrupt():
        raise KeyboardInterrupt

    session.say("hello", interrupt)
    assert len(session.speakers[0].policy.tokenizer.encode(session.speakers[0].text)) <= 2


@pytest.mark.parametrize(
    ("typed", "answer"),
    [
        ("/nonsense", "/nonsense: no such command"),
        ("/temperature hot", "/temperature 'hot': give a number"),
        ("/temperature -1", "/temperature '-1': give a number"),
        ("/regenerate", "There is no message to answer yet"),
        ("/help", "/reset"),
        ("word " * 80, "message of"),
    ],
)
def test_a_wrong_command_is_answered_and_the_talk_goes_on(monkeypatch, capsys, folders, typed, answer):
    status, out, _ = talk(monkeypatch, capsys, [typed, "/reset"], folders / "a", "--max-tokens", 2)
    assert status == 0
    assert answer in out
    assert "Conversation reset" in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["{root}/none"], "none: "),
        (["{root}/a", "--best-of", "4"], "--best-of 4: needs a reward model"),
        (["{root}/a", "--template", "fancy"], "template 'fancy': cannot be read"),
        (["sft", "--config", "configs/quickstart.yaml"], "stage 'sft' of configs/quickstart.yaml is not finished"),
    ],
)
def test_bad_arguments_are_one_clear_line(monkeypatch, capsys, folders, arguments, message):
    monkeypatch.setattr(chat, "talk", lambda session: pytest.fail("it talks"))
    if "--config" in arguments:
        from safe_rlhf_jax.stages.common import Run

        monkeypatch.setattr(Run, "result", lambda self, name: None)  # whatever has been trained here
    status, _, err = talk(monkeypatch, capsys, [], *(a.format(root=folders) for a in arguments))
    assert status == 1
    assert message in err
    assert err.count("\n") == 1


def test_a_scorer_with_a_smaller_vocabulary_is_refused(monkeypatch, capsys, folders, tmp_path):
    module, variables = make_scorer("cost", tiny_config(vocab_size=50))
    hf.save(tmp_path / "small", module, variables)
    status, _, err = talk(monkeypatch, capsys, [], folders / "a", "--cost", tmp_path / "small")
    assert status == 1
    assert "vocab_size 50 is smaller than the tokenizer's" in err


def test_help_starts_no_accelerator():
    code = (
        "import sys; from safe_rlhf_jax import chat\n"
        "try: chat.main(['--help'])\n"
        "except SystemExit: assert 'jax' not in sys.modules"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert "/regenerate" in out
