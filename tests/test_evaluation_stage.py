"""What the evaluate stage holds and computes."""

import gc
from pathlib import Path

import jax
import pytest
import yaml

from safe_rlhf_jax import config as cfg
from safe_rlhf_jax.data.tokenizer import load_tokenizer
from safe_rlhf_jax.stages import Run, answers, evaluation
from safe_rlhf_jax.stages.sampling import warn_of_truncation
from tests.helpers import save_models, tiny_config

MINI = Path(__file__).parent / "configs" / "mini.yaml"
KEEP_BATCH = answers.keep_batch
TOKENIZER = load_tokenizer("demo")
CONFIG = tiny_config(vocab_size=TOKENIZER.vocab_size, hidden_size=16, num_layers=1, head_dim=4)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Three policies and two scorers behind paths."""
    folder = tmp_path_factory.mktemp("models")
    save_models(folder, "abc", CONFIG, TOKENIZER.hf)
    return folder


def run_of(tmp_path: Path, models: Path, policies: str = "a", limits=(16,), **settings) -> Run:
    stage = {
        "name": "evaluate", "kind": "evaluate", "policies": [f"path:{models}/{name}" for name in policies],
        "reward_model": f"path:{models}/reward", "cost_model": f"path:{models}/cost", "max_prompt_length": 24,
        "prompts": [{"name": "demo/prompts", "split": "test", "limit": limit} for limit in limits],
        "max_response_length": 3,
    }  # fmt: skip
    tmp_path.mkdir(exist_ok=True)
    tree = {"workdir": str(tmp_path / "run"), "template": "plain", "stages": [stage | settings]}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(tree | {"execution": {"dtype": "bfloat16"}}))
    return Run(cfg.load_config(tmp_path / "config.yaml", []))


@pytest.fixture
def batches(monkeypatch):
    """Rows of each batch of each set of prompts that `sample_policies` would have answered; nothing is computed."""
    rows = []

    def collect_samples(respond, batches, *_, **__):
        rows.append([len(batch.tokens) for batch, _ in batches])
        return []

    monkeypatch.setattr(answers.evaluate, "collect_samples", collect_samples)
    return rows


def sample(run: Run) -> answers.Answered:
    with jax.set_mesh(run.mesh):
        stage = run.config.stages[0]
        return answers.sample_policies(run, stage, answers.open_scorers(run, stage.scorers))


def test_evaluation_computes_as_many_rows_as_there_are_prompts_in_whole_shards(models, tmp_path, batches):
    run = run_of(tmp_path, models, limits=(16, 3, 40), batch_size=32)
    assert dict(run.mesh.shape)["data"] == 8
    sample(run)
    assert batches == [[16], [8], [32, 32]]


def alive() -> int:
    gc.collect()
    return sum(array.nbytes for array in jax.live_arrays())


def test_evaluation_holds_frozen_networks_once_as_they_are_multiplied_and_policies_one_at_a_time(
    models, tmp_path, batches, monkeypatch
):
    run, opened, before = run_of(tmp_path, models, "abc"), {}, alive()
    with jax.set_mesh(run.mesh):
        scorers = answers.open_scorers(run, {kind: f"path:{models}/{kind}" for kind in ("reward", "cost")})
        reference = run.networks.only_read(run.networks.open(f"path:{models}/a", "lm")[1]["params"])
    held = alive() - before
    assert {str(leaf.dtype) for leaf in jax.tree.leaves(reference)} == {"bfloat16", "float32"}  # norms
    del scorers, reference
    open_network = run.networks.open

    def recorded(name, head, **options):
        if head == "lm":
            opened.setdefault(Path(name).name, []).append(alive() - before)
        return open_network(name, head, **options)

    monkeypatch.setattr(run.networks, "open", recorded)
    sample(run)
    assert [(name, len(times)) for name, times in opened.items()] == [("a", 1), ("b", 1), ("c", 1)]
    assert opened["b"] == opened["c"] == [pytest.approx(held, abs=4096)]  # keys and the like
    assert len(batches) == 3


def test_killed_evaluation_answers_no_batch_twice_and_says_the_same(models, tmp_path, monkeypatch):
    def counting(death: int = 0):
        kept = []

        def keep_batch(file, batch):
            KEEP_BATCH(file, batch)
            kept.append(file.name)
            if len(kept) == death:
                raise KeyboardInterrupt

        monkeypatch.setattr(answers, "keep_batch", keep_batch)
        return kept

    settings = {"limits": (16, 3), "batch_size": 8}
    every = counting()
    whole = sample(run_of(tmp_path / "whole", models, "ab", **settings))
    killed = [run_of(tmp_path / "killed", models, "ab", **settings) for _ in range(2)]
    first = counting(death=6)
    with pytest.raises(KeyboardInterrupt):
        sample(killed[0])
    rest = counting()
    assert sample(killed[1]).policies == whole.policies
    assert (len(first), len(rest), len(every)) == (6, 2, 8)


def test_report_says_which_prompts_models_and_code_made_it_and_has_the_columns_of_the_prompts_oracle(models, tmp_path):
    run = run_of(tmp_path, models, "ab", temperature=0.5)
    report = evaluation.make_report(run, run.config.stages[0], {})
    assert report.provenance["prompts"] == "data demo/prompts (test)"
    assert report.provenance[f"policy path:{models}/b"] == "as it is"
    assert "temperature 0.5" in report.provenance["sampling"]
    assert report.provenance["code"].startswith("safe_rlhf_jax ")
    assert "harm_rate" in {measure.name for measure in report.measures}
    mini = Run(cfg.load_config(MINI, [f"workdir={tmp_path}/mini"]))
    made = evaluation.make_report(mini, mini.config.stages[-1], {}).provenance
    assert made["policy sft"] == "sft stage; init_from preset:tiny; data demo/sft (train)"
    (tmp_path / "own.jsonl").write_text('{"prompt": "mine"}\n')
    own = run_of(tmp_path, models, prompts=[{"name": f"{tmp_path}/own.jsonl"}])
    assert evaluation.make_report(own, own.config.stages[0], {}).measures == ()


def test_stage_warns_where_scorers_read_many_truncated_responses(models, tmp_path):
    run = run_of(tmp_path, models)
    stage = run.config.stages[0]
    for cut in (1, 3):
        warn_of_truncation(run, stage, [{"truncated": i < cut} for i in range(4)])
    (warning,) = run.warnings["evaluate"]
    assert "75% of the responses are cut at max_response_length 3" in warning
    assert "end_truncated: true" in warning
    ended = Run(cfg.load_config(tmp_path / "config.yaml", ["end_truncated=true"]))
    warn_of_truncation(ended, stage, [{"truncated": True}])
    assert ended.warnings == {}
