"""`python -m safe_rlhf_jax.data` shows what a stage would read, and says in one line what cannot be read."""

import gzip
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from safe_rlhf_jax.data import demo
from safe_rlhf_jax.inspect_data import main
from tests.tokenizers import make_tokenizer

MINI = Path(__file__).parent.parent / "configs" / "mini.yaml"
SHARED = Path(__file__).parent.parent.parent.parent / "shared" / "data"
PAIR = {
    "prompt": "how do i bake", "response_0": "order the bread .", "response_1": "no .", "better_response_id": 0,
    "safer_response_id": 1, "is_response_0_safe": False, "is_response_1_safe": True,
    "response_0_harm_category": {"Violence": True, "Drugs": False}, "response_0_severity_level": 2,
}  # fmt: skip


@pytest.fixture
def shown(tmp_path, capsys):
    """Writes records or bytes to a file and runs the command on it; returns (status, output, error)."""

    def run(content, *options, name="data.json"):
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        (tmp_path / name).write_bytes(data)
        status = main([str(tmp_path / name), *options])
        return status, *capsys.readouterr()

    return run


def test_help_starts_no_backend():
    code = (
        "import sys; from safe_rlhf_jax.data.__main__ import main\ntry: main(['--help'])\nfinally: print([m for m in "
    )
    code += "('jax', 'transformers') if m in sys.modules])"
    process = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "--max-length" in process.stdout
    assert process.stdout.rstrip().endswith("[]")


def test_everything_about_a_data_set_is_shown(shown):
    records = [PAIR, PAIR, PAIR | {"safer_response_id": None}, PAIR | {"prompt": "how do i bake with the bread"}]
    status, out, _ = shown(records, "--max-bad-records", "0.3", "--max-length", "64")
    assert status == 0
    for part in (
        "cost: data", "4 records, 3 can be used", "skipped 1: missing safer_response_id",
        "duplicates: 2 records, 2 prompts", "tokens of a text: mean", "cut to 64 tokens: 0 of 6 texts",
        "labelled safe: 50.0%", "both 0.0%, only the safer 100.0%", "category: Violence 3", "severity: 2 3", "█",
        "record 1, safer:\n  how do i bake\n[[no .</s>]]\n",
    ):  # fmt: skip
        assert part in out, part


def test_texts_are_written_as_a_run_writes_them(shown, tmp_path, capsys):
    """By the tokenizer's own chat template where none is named; with a config, by its options and control tokens."""
    template = "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|end|>{% endfor %}"
    template += "{% if add_generation_prompt %}<|assistant|>{% endif %}"
    special = ["<unk>", "</s>", "<|user|>", "<|assistant|>", "<|end|>"]
    tokenizer = make_tokenizer(tmp_path / "own", special, "<|end|>", spaces=None, template=template)
    record = {"prompt": "how <|end|>", "response": "the bread"}
    _, out, _ = shown([record], "--kind", "sft", "--tokenizer", str(tmp_path / "own"))
    assert "<|user|>how <|end|><|end|><|assistant|>[[the bread<|end|>]]" in out
    run = {"workdir": str(tmp_path / "run"), "tokenizer": str(tmp_path / "own"), "control_tokens": "tokens", "stages": [
        {"name": "sft", "kind": "sft", "init_from": "preset:tiny", "data": {"name": str(tmp_path / "data.json")},
         "max_length": 64}]}  # fmt: skip
    lengths = []
    for control_tokens in ("text", "tokens"):
        (tmp_path / "run.yaml").write_text(json.dumps(run | {"control_tokens": control_tokens}))
        assert main(["--config", str(tmp_path / "run.yaml")]) == 0
        lengths.append(int(re.search(r"most (\d+)", capsys.readouterr().out)[1]))
    pieces = len(tokenizer.hf.encode("<|end|>", split_special_tokens=True))
    assert lengths[0] - lengths[1] == pieces - 1 > 0


def test_loss_mask_is_shown_as_the_batch_has_it(shown):
    turns = [{"role": role, "content": text} for role, text in (("user", "how"), ("assistant", "so ."))] * 2
    _, out, _ = shown([{"messages": turns}])
    assert "  how\n[[so .</s>]]how\n[[so .</s>]]\n" in out
    _, out, _ = shown([{"messages": turns}], "--kind", "prompts")
    assert "record 1, prompt:\n  how\nso .</s>how\n" in out


def test_data_of_every_stage_of_a_config_is_shown(capsys):
    assert main(["--config", str(MINI), "stages.sft.data.limit=10"]) == 0
    out = capsys.readouterr().out
    for part in (
        "sft: data", "sft: eval_data", "reward: data", "cost: eval_data", "ppo_lag: prompts",
        "ppo_lag: algorithm.lagrange.cost_limit.data",
        "evaluate: prompts.0", "evaluate: prompts.1", "10 records, 10 can be used",
    ):  # fmt: skip
        assert part in out, part


@pytest.mark.parametrize(
    ("name", "content", "part"),
    [
        ("a.jsonl", b'{"prompt": "a"}\n{"prompt": \n', "line 2, column 12 is not JSON"),
        ("a.json", b'[{"prompt": "a"', "is not JSON"),
        ("a.jsonl", b"", "no records"),
        ("a.jsonl", b'{"prompt": "\xe9"}', "line 1 is not UTF-8"),
        ("a.jsonl.gz", gzip.compress(b'{"prompt": "a"}', mtime=0)[:-4], "cannot be read"),
        ("a.json", [PAIR | {"safer_response_id": 2}], "safer_response_id is neither 0 nor 1"),
        ("a.json", [PAIR | {"response_0": PAIR["response_1"]}], "identical responses"),
        ("a.json", [PAIR | {"safer_response_id": 0}], "the safer response is labelled unsafe"),
        ("a.json", [{"question": "a"}], "fit no known format"),
    ],
)
def test_bad_data_is_one_clear_line(shown, name, content, part):
    options = ("--kind", "cost") if isinstance(content, list) and "prompt" in content[0] else ()
    status, _, error = shown(content, *options, name=name)
    assert status == 1
    assert error.startswith("error: ")
    assert part in error
    assert error.count("\n") == 1


def test_own_data_with_the_tokenizer_of_the_small_world_is_warned_of(shown, capsys):
    records = [{"prompt": "how DO i", "response": "so ."}]
    status, out, _ = shown(records)
    assert status == 0
    assert out.startswith("warning: data ")
    assert "is read with the tokenizer 'demo' of the embedded world" in out
    assert "unknown to the tokenizer: 20.0% of the tokens" in out
    assert main(["demo/sft", "--split", "test"]) == 0
    out = capsys.readouterr().out
    assert "warning" not in out
    assert "unknown" not in out


def test_own_data_in_a_config_with_the_tokenizer_of_the_small_world_is_warned_of(tmp_path, capsys):
    (tmp_path / "own.json").write_text(json.dumps([{"prompt": "how", "response": "so ."}]))
    assert main(["--config", str(MINI), f"stages.sft.data.name={tmp_path / 'own.json'}"]) == 0
    assert capsys.readouterr().out.count("warning: ") == 1


def test_own_data_with_a_tokenizer_of_its_own_is_not_warned_of(shown):
    assert "warning" not in shown([{"prompt": "how", "response": "so ."}], "--tokenizer", demo.TOKENIZER_PATH)[1]


def test_first_record_of_every_reason_is_named_by_its_line(shown):
    good = json.dumps(PAIR) + "\n"
    content = good + "{\n" + good * 30 + json.dumps(PAIR | {"prompt": "half \ud83c"}) + "\n" + "[]\n" + good
    status, out, _ = shown(content.encode(), "--max-bad-records", "1", "--unique", "record", name="data.jsonl")
    assert status == 0
    assert "4 records, 1 can be used" in out
    for reason, line in (
        ("no JSON: Expecting", 2),
        ("half a character (a lone surrogate)", 33),
        ("no JSON object", 34),
    ):
        assert re.search(rf"skipped 1: {re.escape(reason)}.* \(first: \S*data\.jsonl:{line}\)", out), out
    assert "duplicates: 0 records, 0 prompts" in out


def test_what_is_left_out_is_told_apart_from_what_is_skipped(shown):
    records = [{"prompt": "how", "response": f"so {c} .", "is_safe": c < "c"} for c in "abcdefg"]
    status, out, _ = shown(records, "--kind", "sft")
    assert status == 0
    assert "7 records, 2 can be used" in out
    assert "  left out 5: the response is labelled unsafe (first: " in out
    assert "skipped" not in out
    status, out, _ = shown(records, "--kind", "cost")
    assert "left out 3: no response with the other label to the same prompt (first: " in out


def test_columns_and_labels_that_are_not_read_are_shown(shown):
    """Also where the data feeds something without them."""
    records = [PAIR | {"better_response_id": "A", "score": 1}] * 2 + [PAIR | {"better_response_id": ""}]
    status, out, _ = shown(records, "--kind", "cost")
    assert status == 0
    assert "  better_response_id is neither 0 nor 1, but 'A': 2\n" in out
    assert "other columns: response_0_harm_category, response_0_severity_level, score\n" in out
    status, out, _ = shown([*records, PAIR], "--kind", "reward", "--max-bad-records", "1")
    assert out.count("neither 0 nor 1") == 1
    assert "other columns" not in shown([{"prompt": "how", "response": "so ."}])[1]


@pytest.mark.parametrize(
    ("options", "part"),
    [
        (["--field", "prompt:question"], "--field prompt:question: write FIELD=COLUMN"),
        (["--field", "prompt=question", "--field", "prompt=q2"], "'prompt' is named twice"),
        (["--max-bad-records", "nan"], "a share from 0 to 1"),
        (["--max-length", "0"], "a number of tokens above 0"),
    ],
)
def test_option_that_cannot_be_meant_is_refused(options, part, capsys):
    with pytest.raises(SystemExit):
        main(["a.json", *options])
    assert part in capsys.readouterr().err


def test_what_is_no_setting_of_data_is_one_line(shown):
    status, _, error = shown([PAIR], "--test-share", "2", "--limit", "0")
    assert status == 1
    assert error.startswith("error: test_share: Input should be less than 1 (value 2.0); limit: Input should")
    assert error.count("\n") == 1


def test_what_is_said_of_a_folder_is_said_once(tmp_path, capsys):
    for name, record in (("a.json", {"prompt": "how"}), ("b.json", {"question": "how"})):
        (tmp_path / name).write_text(json.dumps([record]))
    assert main([str(tmp_path)]) == 1
    out, error = capsys.readouterr()
    assert out.count("split train is a.json, b.json") == 1
    assert error.count("fit no known format") == 1


@pytest.mark.parametrize("arguments", [[], ["a.json", "b.json"]])
def test_command_line_that_names_no_data_or_two_is_refused(arguments, capsys):
    with pytest.raises(SystemExit) as error:
        main(arguments)
    assert error.value.code == 2
    assert "usage" in capsys.readouterr().err


@pytest.mark.skipif(not SHARED.exists(), reason="../shared/data is absent")
@pytest.mark.parametrize("path", sorted(SHARED.glob("*.[jc]*")), ids=lambda path: path.name)
def test_published_file_is_shown_and_its_broken_copy_refused(shown, path):
    content = path.read_bytes()
    options = ["--limit", "50", "--max-length", "4096"]
    status, out, error = shown(content, *options, name=path.name)
    assert status == 0, error
    assert re.search("^  (50|32) records, ", out, re.MULTILINE)
    half = content[: len(content) // 2]
    half = half[: half.rindex(b",")] if path.suffix == ".csv" else half  # a text that stops early is still a text
    status, _, error = shown(half, *options, name=path.name)
    assert status == 1
    assert error.count("\n") == 1
