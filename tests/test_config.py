"""A config that cannot run ends in one clear message, before anything is trained."""

import json
from pathlib import Path

import pytest
import yaml

from safe_rlhf_jax import config as cfg
from safe_rlhf_jax import train
from tests.helpers import stage_of

MINI = Path(__file__).parent / "configs" / "mini.yaml"
ROOT = Path(__file__).parent.parent


@pytest.fixture
def refuse(tmp_path, capsys, monkeypatch):
    """Runs a config that must fail; returns its one message."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("JAX_NUM_PROCESSES", "1")  # other tests have touched the devices: too late to look for a cluster

    def run(*overrides, config=MINI):
        workdir = tmp_path / "run"
        assert train.main(["--config", str(config), f"workdir={workdir}", *overrides]) == 1
        out, error = capsys.readouterr()
        assert error.startswith("error: ")
        assert "Traceback" not in error
        assert "done in" not in out, "a stage was trained first"
        assert not workdir.exists(), "a stage was started first"
        return error

    return run


@pytest.fixture
def edited(tmp_path):
    """Writes the mini config after `edit` has changed its tree."""

    def write(edit):
        tree = yaml.safe_load(MINI.read_text())
        edit(tree)
        path = tmp_path / "edited.yaml"
        path.write_text(yaml.safe_dump(tree))
        return path

    return write


# --- Keys and types


@pytest.mark.parametrize(
    ("override", "parts"),
    [
        (
            "stages.ppo_lag.algorithm.lagrange.lrr=1",
            ["stages.3.algorithm.lagrange.lrr", "'stages.3.algorithm.lagrange.lr'"],
        ),
        ("stages.sft.optimizer.max_grad_nrom=1", ["'stages.0.optimizer.max_grad_norm'"]),
        ("stages.sft.batch_sise=8", ["stages.0.batch_sise", "'stages.0.batch_size'"]),
        ("sed=8", ["sed: unknown key", "'seed'"]),
        ("stages.ppo_lag.algorithm.lagrange.cost_limit={data: {nme: x}}", ["cost_limit.data.nme", "data.name'"]),
        ("stages.0.zzz=1", ["stages.0.zzz: unknown key", "keys here:", "init_from"]),
    ],
)
def test_unknown_key_is_named_with_the_nearest_one_in_full(refuse, override, parts):
    message = refuse(override)
    assert all(part in message for part in parts), message
    assert ".rl." not in message, "the path is none that an override could use"


@pytest.mark.parametrize("key", ["top_k", "top_p", "repetition_penalty", "greedy"])
def test_sampling_that_trains_on_another_distribution_is_refused_with_the_reason(refuse, key):
    message = refuse(f"stages.ppo_lag.{key}=1")
    assert f"stages.3.{key}" in message
    assert "another distribution" in message


def test_evaluation_may_sample_as_it_likes():
    config = cfg.load_config(MINI, ["stages.evaluate.top_k=5", "stages.evaluate.temperature=0"])
    assert stage_of(config, "evaluate").top_k == 5


@pytest.mark.parametrize(
    ("override", "parts"),
    [
        ("stages.sft.batch_size=many", ["stages.0.batch_size", "integer", "'many'"]),
        ("stages.sft.optimizer.lr=-1", ["stages.0.optimizer.lr", "greater than 0"]),
        ("stages.sft.optimizer.lr=.inf", ["stages.0.optimizer.lr", "finite"]),
        ("template=bever", ["template", "'beaver'", "'bever'"]),
        ("stages.ppo_lag.algorithm.lagrange.cost_limit=low", ["stages.3.algorithm.lagrange.cost_limit", "'low'"]),
        (
            "stages.ppo_lag.algorithm.lagrange.max_multiplier=0.5",
            ["algorithm.lagrange", "init 1.0", "max_multiplier 0.5"],
        ),
        (
            "stages.ppo_lag.algorithm.constraints={lr: {tail: 1}}",
            ["stages.3.algorithm.constraints.lr.tail", "less than 1"],
        ),
        ("stages.sft.kind=sfd", ["stages.0.kind", "'sfd'", "did you mean 'sft'"]),
        ("stages=[]", ["stages", "at least 1"]),
        ("stages=null", ["stages"]),
        ("stages.evaluate.policies=[]", ["stages.4.policies", "at least 1"]),
    ],
)
def test_wrong_value_is_named_with_what_is_allowed(refuse, override, parts):
    message = refuse(override)
    assert all(part in message for part in parts), message
    assert message.count("\n") == 1, "more than one line for one mistake"


def test_two_mistakes_are_reported_at_once(refuse):
    message = refuse("stages.sft.batch_size=0", "stages.cost.epochs=no")
    assert "stages.0.batch_size" in message
    assert "stages.2.epochs" in message


def test_missing_name_and_kind_are_named(refuse, edited):
    assert "stages.1.name: required, and missing" in refuse(config=edited(lambda t: t["stages"][1].pop("name")))
    message = refuse(config=edited(lambda t: t["stages"][1].pop("kind")))
    kinds = (
        "sft, reward, cost, dpo, merge, rl, rejection_sampling, dual, evaluate, sample, label, audit, red_team, "
        "certify, judge"
    )
    assert f"stages.1.kind: required, and missing; one of {kinds}" in message


# --- What stages say of each other


@pytest.mark.parametrize(
    ("overrides", "parts"),
    [
        (["stages.ppo_lag.reward_model=rewrd"], ["ppo_lag", "reward_model", "'rewrd'", "did you mean 'reward'"]),
        (["stages.sft.init_from=cost"], ["sft", "init_from", "no earlier stage"]),
        (["stages.ppo_lag.cost_model=reward"], ["cost_model", "a reward stage", "cost"]),
        (["stages.cost.name=reward"], ["name 'reward' is taken"]),
        (["stages.sft.init_from=preset:tinny"], ["preset 'tinny'", "did you mean 'tiny'"]),
        (["stages.ppo_lag.algorithm.lagrange.init=0"], ["lagrange.init", "must be > 0", "ppo"]),
        (["stages.ppo_lag.algorithm.lagrange.init=-1"], ["lagrange.init", "must be > 0"]),
        (["stages.ppo_lag.algorithm.lagrange={multiplier: pid, init: -1}"], ["lagrange.init", "must be ≥ 0"]),
        (
            ["stages.ppo_lag.cost_model=null"],
            ["algorithm.lagrange does nothing: it limits the cost of cost_model, which is not given; leave it out"],
        ),
        (
            ["stages.ppo_lag.cost_model=null", "stages.ppo_lag.algorithm={name: ppo_lag}"],
            ["'ppo_lag' needs cost_model"],
        ),
        (
            ["stages.ppo_lag.algorithm.constraints={toxic: {cost_limit: 0}}"],
            ["algorithm.constraints.toxic limits a cost that no model measures", "cost_models.toxic"],
        ),
        (["stages.ppo_lag.cost_models={toxic: reward}"], ["cost_models.toxic names 'reward'", "a reward stage"]),
        (
            ["stages.ppo_lag.cost_model=null", "stages.ppo_lag.algorithm={name: reward_shaping}"],
            ["'reward_shaping' weighs a cost", "cost_model"],
        ),
        (["stages.ppo_lag.algorithm.name=rloo_lag"], ["'rloo_lag'", "responses_per_prompt is 1", "2 or more"]),
        (["stages.ppo_lag.algorithm.name=p3o_lag"], ["'p3o_lag'", "responses_per_prompt is 1", "must be 2"]),
        (
            ["stages.ppo_lag.algorithm.name=p3o_lag", "stages.ppo_lag.responses_per_prompt=4"],
            ["responses_per_prompt is 4", "must be 2"],
        ),
        (
            ["stages.ppo_lag.algorithm.name=grpo_lag", "stages.ppo_lag.responses_per_prompt=4"],
            ["'grpo_lag'", "kl.place: k2"],
        ),
        (["stages.ppo_lag.algorithm.kl={target: 3, schedule: linear}"], ["algorithm.kl", "both move kl_coeff"]),
        (["stages.ppo_lag.algorithm.kl={refresh_every: 3, average: 0.1}"], ["both move the reference"]),
        (["stages.ppo_lag.algorithm.lagrange={measure: rectified, cost_limit: -1}"], ["never negative", "≥ 0"]),
        (
            ["stages.ppo_lag.algorithm.lagrange={group_limits: {risky: 0, rude: 1}}"],
            ["group_limits names ['rude']", "'benign', 'risky', 'sensitive'"],
        ),
        (
            ["stages.ppo_lag.group_field=null", "stages.ppo_lag.algorithm.lagrange={group_limits: {risky: 0}}"],
            ["group_limits needs group_field"],
        ),
        (["stages.ppo_lag.group_field=null"], ["constrained_groups needs group_field"]),
        (["stages.ppo_lag.algorithm.ptx_coeff=1"], ["needs ptx data"]),
    ],
)
def test_stages_that_do_not_fit_are_refused(refuse, overrides, parts):
    message = refuse(*overrides)
    assert all(part in message for part in parts), message


@pytest.mark.parametrize(
    ("overrides", "nearest"),
    [
        (["stages.ppo_lag.batch_size=10", "stages.ppo_lag.algorithm.minibatches=4"], "8 or 12"),
        (["stages.ppo_lag.batch_size=3", "stages.ppo_lag.algorithm.minibatches=4"], "4"),
        (["stages.sft.batch_size=32", "stages.sft.microbatches=5"], "30 or 35"),
        (["stages.reward.batch_size=36"], "32 or 40"),  # the tests have eight devices
    ],
)
def test_batch_that_does_not_divide_names_the_nearest_that_do(refuse, overrides, nearest):
    message = refuse(*overrides)
    assert "does not divide" in message
    assert message.rstrip().endswith(f"nearest batches that do: {nearest}")


# --- What only the data, the models and the machine can tell


@pytest.mark.parametrize(
    ("override", "parts"),
    [
        (
            "stages.ppo_lag.max_response_length=500",
            ["ppo_lag", "512 positions", "524 tokens", "max_response_length 500"],
        ),
        ("stages.evaluate.max_prompt_length=505", ["evaluate", "512 positions", "513 tokens"]),
        ("stages.cost.max_length=513", ["cost", "512 positions", "513 tokens"]),
        ("stages.evaluate.prompts.1.split=redtem", ["demo/prompts", "'redtem'"]),
        ("stages.cost.data.split=validation", ["demo/preference", "'validation'", "'train', 'test'"]),
        ("stages.ppo_lag.prompts.name=demo/promts", ["'demo/promts'", "did you mean 'demo/prompts'"]),
        ("stages.cost.data.name=no/such.jsonl", ["no/such.jsonl", "no such file"]),
        ("stages.reward.data.name=demo/sft", ["reward", "response_0 is missing", "None is left"]),
        ("stages.ppo_lag.group_field=topic", ["group_field 'topic' is missing", "prompt_source"]),
        ("stages.ppo_lag.algorithm.lagrange.constrained_groups=[risk]", ["['risk']", "'benign', 'risky', 'sensitive'"]),
        ("stages.ppo_lag.algorithm.lagrange.cost_limit.data.name=demo/sft", ["cost_limit", "labelled safe"]),
        ("stages.ppo_lag.max_prompt_length=2", ["longer than max_prompt_length", "None is left"]),
        ("stages.ppo_lag.cost_model=path:no/such/folder", ["no/such/folder", "no such folder"]),
        ("tokenizer=no/such/folder", ["tokenizer 'no/such/folder'", "cannot be opened"]),
        ("mesh.data=3", ["mesh", "3 devices", "8 are present"]),
        ("mesh.tensor=16", ["mesh", "8 are present"]),
    ],
)
def test_mistake_in_a_late_stage_surfaces_before_the_first_trains(refuse, override, parts):
    message = refuse(override)
    assert all(part in message for part in parts), message


def test_language_model_is_no_reward_model(refuse, tmp_path):
    (tmp_path / "lm").mkdir()
    config = {
        "model_type": "llama", "vocab_size": 1000, "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1,
        "num_attention_heads": 1, "max_position_embeddings": 128,
    }  # fmt: skip
    (tmp_path / "lm" / "config.json").write_text(json.dumps(config))
    message = refuse(f"stages.ppo_lag.reward_model=path:{tmp_path / 'lm'}")
    assert "score_type None" in message
    (tmp_path / "lm" / "config.json").write_text(json.dumps(config | {"vocab_size": 7}))
    assert "embeds 7 tokens" in refuse(f"stages.sft.init_from=path:{tmp_path / 'lm'}")


# --- The file and the command line


def test_file_that_is_missing_or_no_yaml_is_named(refuse, tmp_path):
    assert "no such file" in refuse(config=tmp_path / "none.yaml")
    broken = tmp_path / "broken.yaml"
    broken.write_text("stages: [}")
    assert "not valid YAML" in refuse(config=broken)
    broken.write_bytes(b"title: \xff")
    assert "not valid YAML" in refuse(config=broken)
    broken.write_text("just a line")
    assert "a mapping of keys, not str" in refuse(config=broken)


@pytest.mark.parametrize(
    ("override", "part"),
    [
        ("seed", "write dotted.key=value"),
        ("stages.nosuch.epochs=1", "neither an index below 5 nor one of ['sft', 'reward'"),
        ("stages.9.epochs=1", "neither an index below 5"),
        ("workdir.deep=1", "below a plain value"),
        ("workdir.deep.deeper=1", "below a plain value"),
        ("seed=[1", "not valid YAML"),
    ],
)
def test_override_that_cannot_be_applied_is_named(refuse, override, part):
    message = refuse(override)
    assert part in message
    assert repr(override) in message


def test_overrides_reach_stages_by_index_and_by_name():
    config = cfg.load_config(MINI, ["stages.2.epochs=7", "stages.ppo_lag.algorithm.lagrange.lr=5e-2", "seed=3"])
    assert config.stages[2].epochs == 7
    assert config.stages[3].algorithm.lagrange.lr == 0.05
    assert config.seed == 3


def test_dumped_config_loads_as_the_run_up_to_its_stage(tmp_path):
    config = cfg.load_config(MINI)
    (tmp_path / "config.yaml").write_text(cfg.dump(config, stage_of(config, "ppo_lag")))
    again = cfg.load_config(tmp_path / "config.yaml")
    assert again.stages == config.stages[:4]
    assert again.execution == config.execution


@pytest.mark.parametrize("path", sorted(ROOT.glob("configs/**/*.yaml")), ids=lambda path: path.name)
def test_shipped_config_is_valid(path):
    cfg.load_config(path)
