"""The command line, and what a run of every stage leaves behind."""

import ctypes
import json
import os
import shutil
import subprocess
import sys
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import yaml
from transformers import AutoTokenizer

from safe_rlhf_jax import config as cfg
from safe_rlhf_jax import host_memory, train
from safe_rlhf_jax.data import demo
from safe_rlhf_jax.data.conversations import encode
from safe_rlhf_jax.data.tokenizer import load_tokenizer
from safe_rlhf_jax.inference.generate import generate
from safe_rlhf_jax.inference.sampling import Sampling
from safe_rlhf_jax.metrics import read_jsonl
from safe_rlhf_jax.models import hf
from safe_rlhf_jax.ops import sequence_scores
from safe_rlhf_jax.stages.common import Run
from safe_rlhf_jax.types import PromptBatch

STAGES = ("sft", "reward", "cost", "ppo_lag", "evaluate")


def test_help_starts_neither_jax_nor_anything_slow():
    code = (
        "import sys\nfrom safe_rlhf_jax import train\n"
        "try:\n    train.main(['--help'])\nexcept SystemExit as stop:\n    assert stop.code == 0\n"
        "assert not {'jax', 'transformers', 'pydantic'} & set(sys.modules)"
    )
    process = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "--config FILE" in process.stdout
    assert "dotted.key=value" in process.stdout


def test_stages_draw_with_what_they_have_not_loaded_before():
    code = "import sys\nimport safe_rlhf_jax.stages\nassert 'jax' in sys.modules and 'matplotlib' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


ALLOCATOR = """
import ctypes, sys, threading
from safe_rlhf_jax.host_memory import keep_freed_memory, return_freed_memory

libc = ctypes.CDLL(None)
libc.sbrk.restype = libc.malloc.restype = ctypes.c_void_p
libc.free.argtypes = [ctypes.c_void_p]
keep_freed_memory()

def allocate():
    blocks = [libc.malloc(ctypes.c_size_t(size)) for size in (2**26, 5 * 2**29)]  # of more than 2 GiB too
    if None in blocks:
        sys.exit("the machine gives no block of this size")
    top = libc.sbrk(0)
    for block in blocks:
        assert block < top, "mapped, and so given back when it is freed"
        libc.free(block)
    assert libc.sbrk(0) == top

thread = threading.Thread(target=allocate)
thread.start()
thread.join()
allocate()
kept = libc.sbrk(0)
return_freed_memory(above=0.99)
assert libc.sbrk(0) == kept
return_freed_memory()
assert libc.sbrk(0) < kept
"""


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "gnu_get_libc_version"), reason="not glibc")
def test_freed_memory_is_kept_of_every_thread_and_size():
    environment = {name: value for name, value in os.environ.items() if name != "LD_PRELOAD"}
    done = subprocess.run([sys.executable, "-c", ALLOCATOR], capture_output=True, text=True, env=environment)
    if "gives no block" in done.stderr:
        pytest.skip(done.stderr.strip())
    assert done.returncode == 0, done.stderr


def test_freed_memory_is_kept_before_jax_starts_its_threads():
    code = (
        "import sys\nfrom safe_rlhf_jax import train\nseen = []\n"
        "train.is_cpu_alone = lambda: sys.argv[1] == 'cpu'\n"
        "train.keep_freed_memory = lambda: seen.append('jax' in sys.modules)\n"
        "train.main(['--config', 'none'])\nassert seen == [False] * (sys.argv[1] == 'cpu'), seen"
    )
    for platform in ("cpu", "any"):
        subprocess.run([sys.executable, "-c", code, platform], check=True)


def test_freed_memory_goes_back_only_where_much_of_it_is_kept(monkeypatch):
    trimmed = []
    libc = SimpleNamespace(malloc_trim=trimmed.append)
    monkeypatch.setattr(host_memory.ctypes, "CDLL", lambda _: libc)
    monkeypatch.setattr(host_memory, "kept_memory", lambda _: 3)
    monkeypatch.setattr(host_memory, "machine_memory", lambda: 10)
    host_memory.return_freed_memory(above=0.4)
    assert trimmed == []
    host_memory.return_freed_memory(above=0.2)
    host_memory.return_freed_memory()
    assert trimmed == [0, 0]


def test_allocated_memory_does_not_count_as_kept():
    libc = ctypes.CDLL(None)
    if not hasattr(libc, "mallinfo2") or "LD_PRELOAD" in os.environ:
        pytest.skip("not glibc 2.33")
    before = host_memory.kept_memory(libc)
    block = np.ones(2**27)  # a GiB, touched
    assert host_memory.kept_memory(libc) - before < 2**28
    assert block.all()
    assert host_memory.machine_memory() > 2**28


@pytest.mark.parametrize(
    ("platforms", "plugins", "alone"),
    [("", [], True), ("", ["cuda"], False), ("cpu", ["cuda"], True), ("cuda", [], False)],
)
def test_backend_is_known_before_jax_is_imported(platforms, plugins, alone, monkeypatch):
    monkeypatch.setenv("JAX_PLATFORMS", platforms)
    monkeypatch.setattr(host_memory.importlib.metadata, "entry_points", lambda group: plugins)
    monkeypatch.setattr(host_memory.importlib.util, "find_spec", lambda _: None)
    assert host_memory.is_cpu_alone() == alone


def test_command_without_a_config_is_a_usage_error():
    with pytest.raises(SystemExit) as stop:
        train.main([])
    assert stop.value.code == 2


@pytest.mark.parametrize("stage", STAGES)
def test_each_stage_leaves_a_result_and_a_config_that_loads(mini_run, stage):
    folder = mini_run[0] / stage
    result = json.loads((folder / "result.json").read_text())
    assert result["seconds"] > 0
    assert result["metrics"]
    assert all(np.isfinite(value) for value in result["metrics"].values())
    assert cfg.load_config(folder / "config.yaml").stages[-1].name == stage
    assert (folder / "config_hash").read_text() == result["config_hash"]


@pytest.mark.parametrize(("stage", "head"), [("sft", "lm"), ("reward", "score"), ("cost", "score"), ("ppo_lag", "lm")])
def test_each_export_loads_back_with_its_tokenizer(mini_run, stage, head):
    folder = mini_run[0] / stage / "export"
    module, variables = hf.load(folder, head)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    text = demo.prompts("test")[0]["prompt"]
    ids = jnp.array([tokenizer(text)["input_ids"]], jnp.int32)
    out = module.apply(variables, ids, jnp.ones(ids.shape, bool))
    assert out.shape == ids.shape + ((len(tokenizer),) if head == "lm" else ())
    assert np.isfinite(out).all()
    if head == "score":
        assert module.score.score_type == stage
    assert tokenizer.decode(ids[0]) == text


@pytest.mark.parametrize("stage", ["sft", "ppo_lag"])
def test_an_export_reads_and_ends_texts_as_it_was_trained_to(mini_run, stage):
    run = Run(cfg.load_config(mini_run[0] / stage / "config.yaml"))
    messages = [{"role": "user", "content": "how do i cook"}, {"role": "assistant", "content": "with water"}]
    reopened = load_tokenizer(str(mini_run[0] / stage / "export"))
    assert reopened.ends == run.ends
    trained = encode(messages, run.template, run.tokenizer).ids
    for ask, turns, ids in (False, messages, trained), (True, messages[:1], None):
        theirs = reopened.hf.apply_chat_template(turns, add_generation_prompt=ask, return_dict=False)
        assert theirs == (ids or trained[: len(theirs)])


@pytest.mark.reference
def test_an_exported_policy_generates_the_same_greedy_tokens_in_transformers(mini_run):
    import torch
    from transformers import AutoModelForCausalLM

    folder, length = mini_run[0] / "ppo_lag" / "export", 12
    tokenizer = AutoTokenizer.from_pretrained(folder, padding_side="left")
    texts = [record["prompt"] for record in demo.prompts("test")[:16]]
    rows = tokenizer(texts, padding=True, return_tensors="np")
    tokens, mask = jnp.asarray(rows["input_ids"], jnp.int32), jnp.asarray(rows["attention_mask"], bool)
    assert not mask.all()
    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    expected = theirs.generate(
        torch.tensor(rows["input_ids"]), attention_mask=torch.tensor(rows["attention_mask"]), max_new_tokens=length,
        do_sample=False,
    ).numpy()  # fmt: skip
    module, variables = hf.load(folder)
    rollout = generate(
        module, variables["params"], PromptBatch(tokens, mask, jnp.zeros(len(texts), jnp.int32)), jax.random.key(0),
        response_length=length, eos_id=tokenizer.eos_token_id, pad_id=tokenizer.pad_token_id,
        sampling=Sampling(temperature=0.0),
    )  # fmt: skip
    np.testing.assert_array_equal(rollout.tokens[:, : expected.shape[1]], expected)
    assert len(np.unique(expected[:, tokens.shape[1] :])) > 3


def test_an_exported_cost_model_in_both_layouts_loads_back_with_equal_scores(mini_run, tmp_path):
    module, variables = hf.load(mini_run[0] / "cost" / "export", "score")
    texts = AutoTokenizer.from_pretrained(mini_run[0] / "cost" / "export")(
        [f"{record['prompt']} {record['response_0']}" for record in demo.preference("test")[:16]],
        padding=True, padding_side="right", return_tensors="np",
    )  # fmt: skip
    batch = jnp.asarray(texts["input_ids"], jnp.int32), jnp.asarray(texts["attention_mask"], bool)
    expected = sequence_scores(module, variables, *batch)
    assert np.ptp(expected) > 0
    hf.save(tmp_path / "beaver", module, variables)
    with pytest.warns(UserWarning, match=r"score\.bias"):
        hf.save(tmp_path / "classifier", module, variables, layout="sequence_classification")
    for folder, architecture in (("beaver", "LlamaForScore"), ("classifier", "LlamaForSequenceClassification")):
        assert hf.read_config(tmp_path / folder)["architectures"] == [architecture]
        again, loaded = hf.load(tmp_path / folder, "score")
        assert again.score.score_type == "cost"
        np.testing.assert_allclose(sequence_scores(again, loaded, *batch), expected, rtol=1e-6)


def test_training_moved_the_policy(mini_run):
    (_, before), (_, after) = (hf.load(mini_run[0] / stage / "export", "lm") for stage in ("sft", "ppo_lag"))
    assert not np.allclose(before["params"]["lm_head"]["kernel"], after["params"]["lm_head"]["kernel"], atol=1e-6)


def test_cost_limit_is_reported_with_how_it_was_chosen(mini_run):
    result = json.loads((mini_run[0] / "ppo_lag" / "result.json").read_text())
    assert np.isfinite(result["cost_limit"])
    assert "risky" in result["cost_limit_source"]
    assert "50%" in result["cost_limit_source"]


def test_evaluation_has_a_sample_of_every_policy_for_every_prompt_and_a_report(mini_run):
    folder = mini_run[0] / "evaluate"
    samples = [json.loads(line) for line in (folder / "samples.jsonl").read_text().splitlines()]
    for policy in ("sft", "ppo_lag"):
        prompts = [sample["prompt"] for sample in samples if sample["policy"] == policy]
        assert prompts == [r["prompt"] for r in demo.prompts("test")[:32] + demo.prompts("redteam")[:16]]
    report = (folder / "report.html").read_text()
    assert "ppo_lag" in report
    assert "Safe RLHF" in report
    assert "report at" in mini_run[1].stdout


def test_first_step_has_ratio_one_and_no_kl(mini_run):
    first = read_jsonl(mini_run[0] / "ppo_lag" / "metrics.jsonl")[0]
    # Exactly 0 in rl/test_step.py; between two programs, scoring and update may round differently on some CPUs.
    assert first["train/first_ratio_gap"] < 1e-6
    assert first["train/kl"] == pytest.approx(0, abs=1e-5)


def test_finished_stages_are_skipped_and_changed_ones_run_again_with_those_after_them(
    mini_run, train_process, tmp_path
):
    shutil.copytree(mini_run[0], tmp_path / "run", ignore=shutil.ignore_patterns("ppo_lag", "evaluate"))
    run = tmp_path / "run"
    tree = yaml.safe_load((mini_run[0] / "cost" / "config.yaml").read_text())
    config = tmp_path / "three.yaml"
    config.write_text(yaml.safe_dump(tree | {"workdir": str(run)}))
    before = {name: (run / name / "config_hash").read_text() for name in ("sft", "reward", "cost")}
    unchanged = train_process(config=config)
    assert unchanged.returncode == 0, unchanged.stderr
    assert unchanged.stdout.count("finished, config unchanged; skipped") == 3
    layout = "stages.reward.export_layout=sequence_classification"
    changed = train_process("stages.reward.optimizer.lr=1e-4", layout, config=config)
    assert changed.returncode == 0, changed.stderr
    assert changed.stdout.count("finished, config unchanged; skipped") == 2
    assert "reward: the config has changed" in changed.stdout
    assert (run / f"reward.{before['reward']}" / "result.json").exists()
    assert (run / "reward" / "config_hash").read_text() != before["reward"]
    module, _ = hf.load(run / "reward" / "export", "score")  # in a layout without a bias, so it was trained without
    assert hf.read_config(run / "reward" / "export")["architectures"] == ["LlamaForSequenceClassification"]
    assert (module.score.bias, module.score.pad_id) == (False, load_tokenizer("demo").pad_id)
