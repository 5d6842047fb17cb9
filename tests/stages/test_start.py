"""What is known before the first stage trains is said then: of limits, groups, held-out data, small data, metrics."""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import jax
import pytest
import yaml

from safe_rlhf_jax import config as cfg
from safe_rlhf_jax.metrics import read_jsonl
from safe_rlhf_jax.rl.algorithms import ALGORITHMS
from safe_rlhf_jax.stages import Run, check_run
from safe_rlhf_jax.stages.constraints import cost_limits, labelled_data
from safe_rlhf_jax.stages.datasets import load_data
from safe_rlhf_jax.stages.held_out import warn_of_overlap
from safe_rlhf_jax.stages.kinds import idle_settings, kind_of
from safe_rlhf_jax.stages.metric_names import training_metrics
from safe_rlhf_jax.stages.room import check_room
from safe_rlhf_jax.stages.supervised import cost_batch, reward_batch
from safe_rlhf_jax.stages.trained import critic_starts
from tests.helpers import stage_of

ROOT = Path(__file__).parent.parent.parent
CONFIGS = sorted([*ROOT.glob("configs/**/*.yaml"), *ROOT.glob("tests/configs/*.yaml")])
LENGTHS = {"max_prompt_length": 24, "max_response_length": 24}


def jsonl(path, records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return str(path)


def qa(labels=(True, False), prompts=range(40)):
    """One answer with each label to every prompt."""
    return [
        {"prompt": f"what of {i}", "response": f"{label} answer {i}", "is_safe": label}
        for i in prompts
        for label in labels
    ]


def pairs(prompts=range(40), **fields):
    """Pairs with all labels; which response is the better and the safe one alternates."""
    return [
        {"prompt": f"what of {i}", "response_0": f"one {i}", "response_1": f"another {i}"}
        | {"better_response_id": i % 2, "safer_response_id": i % 2}
        | {"is_response_0_safe": i % 2 == 0, "is_response_1_safe": i % 2 == 1}
        | fields
        for i in prompts
    ]


@pytest.fixture
def run(tmp_path):
    """Makes a run of stages; those that it needs are filled in."""

    def make(*stages, **options):
        data = {"name": "demo/preference", "split": "test", "limit": 64}
        pairs_ = {"init_from": "preset:tiny", "data": data, "max_length": 48}
        models = {"reward_model": "reward", "cost_model": "cost", **LENGTHS}
        sampling = {"init_from": "preset:tiny", "prompts": {"name": "demo/prompts", "limit": 64}} | models
        common = {
            "sft": {"init_from": "preset:tiny", "data": {"name": "demo/sft", "limit": 64}, "max_length": 48},
            **dict.fromkeys(("reward", "cost", "dpo"), pairs_),
            **dict.fromkeys(("rl", "rejection_sampling", "dual"), sampling),
            "evaluate": models,
        }
        tree = {"workdir": str(tmp_path / "run"), "execution": {"scan_layers": False}} | options
        tree["stages"] = [{"name": stage["kind"]} | common[stage["kind"]] | stage for stage in stages]
        (tmp_path / "config.yaml").write_text(yaml.safe_dump(tree))
        return Run(cfg.load_config(tmp_path / "config.yaml"))

    return make


def warnings(run):
    """Everything that is said of a run's stages before they start."""
    check_run(run)
    return [f"{stage}: {text}" for stage, texts in run.warnings.items() for text in texts]


REWARD, COST = {"kind": "reward"}, {"kind": "cost"}


# --- Limits on the data of another stage


def test_fixed_limit_is_held_against_single_answers_that_the_cost_model_is_evaluated_on(run, tmp_path):
    data = {"name": jsonl(tmp_path / "qa.jsonl", qa())}
    limit = {"algorithm": {"lagrange": {"cost_limit": 5.0}}}
    made = run(REWARD, {"kind": "cost", "data": data, "eval_data": data}, {"kind": "rl", **limit})
    check_run(made)
    pairs_ = labelled_data(made, stage_of(made.config, "rl"), "cost")
    assert len(pairs_) == 40
    assert pairs_.arrays.safer_is_safe.all()
    assert not pairs_.arrays.unsafer_is_safe.any()


def test_fixed_limit_is_held_against_the_scores_that_the_stage_of_the_cost_model_has_written(
    run, tmp_path, monkeypatch
):
    data = {"name": jsonl(tmp_path / "qa.jsonl", qa())}
    limits = lambda made: cost_limits(made, stage_of(made.config, "rl"), "cost")  # noqa: E731
    stages = (REWARD, {"kind": "cost", "data": data, "eval_data": data})
    made = run(*stages, {"kind": "rl", "algorithm": {"lagrange": {"cost_limit": -5.0}}})
    folder = made.folder("cost")
    folder.mkdir(parents=True)
    scores = lambda *_: {"safe": [-9.0] * 40, "unsafe": [2.0] * 40}  # noqa: E731
    monkeypatch.setattr("safe_rlhf_jax.stages.constraints.labelled_costs", scores)

    def write(count):
        found = {"scores_by_label": {"safe": [-1.0] * count, "unsafe": [2.0] * count}}
        (folder / "scores.json").write_text(json.dumps(found))

    write(40)
    assert limits(made)[0] == (-5.0,)  # the stage is not finished
    (folder / "result.json").write_text(json.dumps({"config_hash": made.hashes["cost"]}))
    with pytest.raises(ValueError, match="below what the cost model can reach"):
        limits(made)
    write(39)  # of other data
    assert limits(made)[0] == (-5.0,)


@pytest.mark.parametrize("label", [True, False])
@pytest.mark.parametrize("shape", ["pairs", "qa"])
def test_fixed_limit_is_not_checked_where_responses_have_one_label_and_the_run_says_so(run, tmp_path, label, shape):
    alike = pairs(is_response_0_safe=label, is_response_1_safe=label) if shape == "pairs" else qa([label])
    held_out = {"name": jsonl(tmp_path / "test.jsonl", alike)}
    stage = {"kind": "rl", "algorithm": {"lagrange": {"cost_limit": 5.0}}}
    made = run(REWARD, {"kind": "cost", "eval_data": held_out}, stage)
    assert cost_limits(made, stage_of(made.config, "rl"), "cost") == ((5.0,), "as configured")
    (said,) = made.warnings["rl"]
    assert "whether algorithm.lagrange.cost_limit can be reached is not checked" in said
    assert said.endswith(f"eval_data of cost has only {'safe' if label else 'unsafe'} ones")


def test_limit_is_calibrated_on_single_answers(run, tmp_path, monkeypatch):
    data = {"name": jsonl(tmp_path / "qa.jsonl", qa())}
    limit = {"algorithm": {"lagrange": {"cost_limit": {"data": data, "margin": 0.5}}}}
    made = run(REWARD, {"kind": "cost", "data": data}, {"kind": "rl", **limit})
    check_run(made)
    scores = lambda run, stage, signal, data: {"safe": [-1.0] * len(data), "unsafe": [2.0] * len(data)}  # noqa: E731
    monkeypatch.setattr("safe_rlhf_jax.stages.constraints.labelled_costs", scores)
    (limits, source) = cost_limits(made, stage_of(made.config, "rl"), "cost")
    assert limits == (0.5,)
    assert "mean cost of 40 responses labelled safe" in source


@pytest.mark.parametrize("alike", [qa([True]), pairs(is_response_0_safe=True, is_response_1_safe=True)])
def test_limit_that_is_to_be_calibrated_needs_both_labels(run, tmp_path, alike):
    data = {"name": jsonl(tmp_path / "safe.jsonl", alike)}
    limit = {"algorithm": {"lagrange": {"cost_limit": {"data": data}}}}
    made = run(REWARD, COST, {"kind": "rl", **limit}, max_bad_records=1.0)
    with pytest.raises(cfg.ConfigError, match=r"algorithm\.lagrange\.cost_limit: data .*safe\.jsonl \(train\) needs"):
        check_run(made)


def test_fixed_limit_is_held_against_a_mixture_read_as_the_cost_model_reads_it(run, tmp_path):
    """Texts that fit the cost model's `max_length`, and not the lengths of the RL stage."""
    long = [record | {"prompt": record["prompt"] + " and so on" * 12} for record in pairs()]
    names = [jsonl(tmp_path / f"{i}.jsonl", long[i::2]) for i in (0, 1)]
    data = [{"name": name} for name in names]
    limit = {"algorithm": {"lagrange": {"cost_limit": 5.0}}, "max_prompt_length": 16, "max_response_length": 8}
    made = run(REWARD, {"kind": "cost", "data": data, "eval_data": data, "max_length": 256}, {"kind": "rl", **limit})
    check_run(made)
    assert len(labelled_data(made, stage_of(made.config, "rl"), "cost")) == 40


# --- Groups


@pytest.mark.parametrize("kind", ["rl", "rejection_sampling"])
def test_groups_are_those_of_the_prompts_that_are_left(run, tmp_path, kind):
    records = [{"prompt": f"what of {i}", "kind_of": "common"} for i in range(40)]
    records.append({"prompt": "and so on and on " * 40, "kind_of": "rare"})
    prompts = {"prompts": {"name": jsonl(tmp_path / "prompts.jsonl", records)}, "group_field": "kind_of"}
    named = {"constrained_groups": ["rare"]}
    stage = {"algorithm": {"lagrange": named}} if kind == "rl" else named
    with pytest.raises(cfg.ConfigError, match=r"names \['rare'\], but 'kind_of' .* has \['common'\]"):
        check_run(run(REWARD, COST, {"kind": kind, **prompts, **stage}))
    kept = {"max_prompt_length": 300}
    check_run(run(REWARD, COST, {"kind": kind, **prompts, **stage, **kept}))


# --- Settings that do nothing


@pytest.mark.parametrize(
    ("setting", "said"),
    [
        ({"algorithm": {"lagrange": {"cost_limit": 0.0, "group_limits": {"risky": 0.0}}}}, "lagrange: cost_limit does"),
        ({"algorithm": {"lagrange": {"threshold": 1.0}}}, "threshold does nothing: it is of measure 'rectified'"),
        ({"algorithm": {"lagrange": {"tail": 0.9}}}, "tail does nothing: it is of measure 'cvar'"),
        ({"algorithm": {"lagrange": {"power": 3.0}}}, "power does nothing: it is of measure 'spectral'"),
        ({"algorithm": {"lagrange": {"multiplier": "penalty", "lr": 0.1}}}, "lr does nothing: λ of multiplier"),
        ({"algorithm": {"lagrange": {"measure": "rate", "warn_unsafe_share": 0.1}}}, "warn_unsafe_share does nothing"),
        ({"algorithm": {"lagrange": {"pid": {"derivative": 1.0}}}}, "pid does nothing: its gains are of multiplier"),
        ({"algorithm": {"name": "ppo", "lagrange": {"lr": 0.2}}}, "algorithm.lagrange does nothing: algorithm 'ppo'"),
        ({"algorithm": {"name": "ppo", "constraints": {"a": {}}}, "cost_models": {"a": "cost"}}, "constraints does"),
        ({"algorithm": {"kl_coeff": 0.0, "kl": {"target": 3.0}}}, "kl.target does nothing: it moves kl_coeff"),
        ({"algorithm": {"kl_coeff": 0.0, "kl": {"schedule": "linear"}}}, "kl.schedule does nothing"),
        ({"algorithm": {"kl": {"gain": 0.2}}}, "gain does nothing: it is of the controller that keeps to target"),
        ({"algorithm": {"cost_weight": 1.0}}, "algorithm.cost_weight does nothing: algorithm 'ppo_lag' takes no fixed"),
        ({"algorithm": {"name": "cgpo", "lagrange": {"lr": 0.2}}}, "algorithm.lagrange does nothing: algorithm 'cgpo'"),
        ({"algorithm": {"name": "rloo_lag", "gamma": 0.9}, "responses_per_prompt": 2}, "algorithm.gamma does nothing"),
        ({"algorithm": {"name": "rloo_lag"}, "responses_per_prompt": 2, "critic": {"lr": 1e-5}}, "critic does nothing"),
        ({"algorithm": {"name": "p3o_lag", "dual_clip": 3.0}, "responses_per_prompt": 2}, "algorithm.dual_clip does"),
        ({"algorithm": {"name": "p3o_lag", "max_sampler_weight": 2.0}, "responses_per_prompt": 2}, "sampler_weight"),
        ({"algorithm": {"old_log_probs": "sampled", "max_sampler_weight": 2.0}}, "max_sampler_weight does nothing"),
        ({"ptx": {"name": "demo/sft"}}, "ptx does nothing: algorithm.ptx_coeff is 0"),
        ({"eval_every": 5}, "eval_every does nothing: there is no eval_prompts"),
        ({"eval_prompts": {"name": "demo/prompts", "split": "test", "weight": 2.0}}, "weight does nothing: every"),
        ({"cost_model": None, "algorithm": {"name": "ppo_lag", "lagrange": {}}}, "it limits the cost of cost_model"),
    ],
)  # fmt: skip
def test_setting_of_rl_that_would_change_nothing_is_refused_with_the_reason(run, setting, said):
    stage = {"kind": "rl", "group_field": "prompt_source", **setting}
    with pytest.raises(cfg.ConfigError) as error:
        check_run(run(REWARD, COST, stage))
    assert said in str(error.value)
    assert "leave it out" in str(error.value)


@pytest.mark.parametrize(
    ("stage", "said"),
    [
        ({"kind": "sft", "eval_every": 5}, "eval_every does nothing: there is no eval_data"),
        ({"kind": "dpo", "multiplier": 1.0}, "multiplier does nothing: preference is 'helpfulness'"),
        (
            {"kind": "sft", "eval_data": [{"name": "demo/sft", "weight": 1}, {"name": "demo/sft", "weight": 2}]},
            "weight",
        ),
    ],
)
def test_setting_of_other_stages_that_would_change_nothing_is_refused(run, stage, said):
    with pytest.raises(cfg.ConfigError, match="does nothing") as error:
        run(stage)
    assert said in str(error.value)


@pytest.mark.parametrize("sampling", [{"temperature": 0}, {"top_k": 1}])
def test_best_of_responses_that_are_all_the_same_is_refused(run, sampling):
    policy = {"kind": "evaluate", "policies": ["sft"], "prompts": [{"name": "demo/prompts", "split": "test"}]}
    run({"kind": "sft"}, REWARD, COST, policy | sampling)
    with pytest.raises(cfg.ConfigError, match=r"best_of does nothing: .* all responses to a prompt are the same"):
        run({"kind": "sft"}, REWARD, COST, policy | {"best_of": {"sft": 4}} | sampling)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: f"{path.parent.name}-{path.name}")
def test_config_that_a_stage_leaves_loads_as_it_was_and_has_no_setting_that_does_nothing(path, tmp_path):
    config = cfg.load_config(path)
    for i, stage in enumerate(config.stages, 1):
        (tmp_path / "config.yaml").write_text(cfg.dump(config, stage, idle_settings))
        again = cfg.load_config(tmp_path / "config.yaml")
        assert again.stages == config.stages[:i]
        assert not [field for one in again.stages for field in idle_settings(one) if cfg.is_set(one, field)]


@pytest.mark.parametrize("name", ALGORITHMS)
def test_config_of_every_algorithm_loads_again(run, tmp_path, name):
    paired = {"responses_per_prompt": 2, "cost_model": "cost"} if ALGORITHMS[name].baseline else {}
    config = run(REWARD, COST, {"kind": "rl", "algorithm": {"name": name}} | paired).config
    stage = stage_of(config, "rl")
    (tmp_path / "again.yaml").write_text(cfg.dump(config, stage, idle_settings))
    assert stage_of(cfg.load_config(tmp_path / "again.yaml"), "rl") == stage
    assert ("lagrange" in (tmp_path / "again.yaml").read_text()) == ALGORITHMS[name].constrained


# --- λ* of another problem

START = {"kind": "rl", "algorithm": {"lagrange": {"init": "dual"}}}


@pytest.mark.parametrize(
    ("dual", "rl", "said"),
    [
        ({}, {"init_from": "sft"}, "init_from is 'preset:tiny', but here it is 'sft'"),
        ({"temperature": 0.5}, {}, "temperature is 0.5, but here it is 1.0"),
        ({"max_response_length": 16}, {}, "max_response_length is 16, but here it is 24"),
        ({"max_prompt_length": 16}, {}, "max_prompt_length is 16"),
        ({"long_prompts": "truncate_left"}, {}, "long_prompts is 'truncate_left'"),
        ({"prompts": {"name": "demo/prompts", "split": "test"}}, {}, "prompts is [('demo/prompts', 'test'"),
        ({}, {"prompts": [{"name": "demo/prompts"}, {"name": "demo/sft"}]}, "prompts is [('demo/prompts', 'train'"),
        (
            {"prompts": [{"name": "demo/prompts", "limit": 9}, {"name": "demo/sft"}]},
            {"prompts": [{"name": "demo/prompts"}, {"name": "demo/sft"}]},
            "prompts is [('demo/prompts', 9,",
        ),
        ({"cost_limit": 1.0}, {}, "cost_limit is 1.0, but here it is 0.0"),
        ({"kl_coeff": 0.1}, {}, "kl_coeff is 0.1, but here it is 0.01"),
        ({"cost_model": "other"}, {}, "cost_model is 'other', but here it is 'cost'"),
        (
            {"group_field": "prompt_source", "constrained_groups": ["risky"]}, {},
            "constrained_groups is ('risky',), but here it is None",
        ),
    ],
)  # fmt: skip
def test_multiplier_of_another_problem_is_refused(run, dual, rl, said):
    stages = [{"kind": "sft"}, REWARD, COST, {"kind": "cost", "name": "other"}, {"kind": "dual"} | dual, START | rl]
    with pytest.raises(cfg.ConfigError, match=r"init names 'dual', whose .* that of another problem") as error:
        run(*stages)
    assert said in str(error.value)


def test_multiplier_from_some_of_the_prompts_is_that_of_the_problem(run):
    run(REWARD, COST, {"kind": "dual", "prompts": {"name": "demo/prompts:0.5", "limit": 30}}, START)


# --- Data that is held out


def overlap(run, *stages, **options):
    """What is said of prompts that are trained on and measured."""
    return [text for text in warnings(run(*stages, **options)) if "trained on is measured" in text]


def test_prompts_that_are_trained_on_and_measured_are_counted_whatever_their_file_is_called(run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    jsonl(tmp_path / "a.jsonl", pairs())
    (tmp_path / "b.jsonl").symlink_to("a.jsonl")
    cost = {"kind": "cost", "data": {"name": "a.jsonl"}}
    for name in ("a.jsonl", "./a.jsonl", str(tmp_path / "a.jsonl"), "b.jsonl"):
        (said,) = overlap(run, cost | {"eval_data": {"name": name}})
        assert "cost: eval_data: 40 of 40 records (100%)" in said
        assert "open with a prompt of cost.data" in said
    (said,) = overlap(run, cost | {"data": {"name": "a.jsonl:0.5"}, "eval_data": {"name": "a.jsonl"}})
    assert "20 of 40 records (50%)" in said
    (said,) = overlap(run, cost | {"data": {"name": "a.jsonl", "limit": 10}, "eval_data": {"name": "a.jsonl"}})
    assert "10 of 40 records (25%)" in said
    world = {"name": "demo/preference", "split": "test", "limit": 50}
    mixture = [world, {"name": "a.jsonl", "limit": 30, "unique": "prompt"}]
    (said,) = overlap(run, cost | {"data": mixture, "eval_data": {"name": "b.jsonl"}})
    assert "30 of 40 records (75%)" in said


def test_data_that_one_share_splits_is_held_out(run, tmp_path):
    name = jsonl(tmp_path / "a.jsonl", pairs(range(400)))
    split = {"data": {"name": name, "test_share": 0.2}, "eval_data": {"name": name, "test_share": 0.2, "split": "test"}}
    prompts = {"prompts": split["data"], "eval_prompts": split["eval_data"]}
    policy = {"kind": "evaluate", "policies": ["rl"], "prompts": [split["eval_data"]]}
    assert not overlap(run, REWARD | split, COST | split, {"kind": "rl", **prompts}, policy)


def test_evaluation_on_prompts_that_a_stage_before_was_trained_on_is_said_with_their_share(run, tmp_path):
    name = jsonl(tmp_path / "a.jsonl", pairs(range(200)))
    rl = {"kind": "rl", "prompts": {"name": name, "test_share": 0.1}}
    test = {"name": name, "test_share": 0.3, "split": "test"}
    policy = {"kind": "evaluate", "policies": ["rl"], "prompts": [{"name": "demo/prompts", "split": "test"}, test]}
    scored = {"data": {"name": jsonl(tmp_path / "b.jsonl", pairs(range(200, 240)))}}
    made = run(REWARD | scored, COST | scored, rl, policy)
    (said,) = [text for text in warnings(made) if "trained on is measured" in text]
    trained, measured = made.records(cfg.Data(**rl["prompts"])), made.records(cfg.Data(**test))
    shared = len({record["prompt"] for record in trained} & {record["prompt"] for record in measured})
    assert 0 < shared < len(measured)
    assert f"evaluate: prompts.1: {shared} of {len(measured)} records" in said
    assert "rl.prompts" in said


def test_what_a_model_behind_a_path_was_trained_on_is_known_from_the_config_beside_it(run, tmp_path):
    name = jsonl(tmp_path / "a.jsonl", pairs())
    before = run({"kind": "sft", "name": "first", "data": {"name": name}})
    folder = tmp_path / "earlier" / "first"
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(cfg.dump(before.config, before.config.stages[0], idle_settings))
    made = run({"kind": "sft", "init_from": f"path:{folder}/export", "eval_data": {"name": name}})
    warn_of_overlap(made, made.config.stages[0])
    (said,) = made.warnings["sft"]
    assert "40 of 40 records" in said
    assert "first.data" in said
    (folder / "config.yaml").write_text("stages: of another version")
    made = run({"kind": "sft", "init_from": f"path:{folder}/export", "eval_data": {"name": name}})
    warn_of_overlap(made, made.config.stages[0])
    assert not made.warnings


def test_limit_calibrated_on_what_the_cost_model_has_seen_more_than_once_is_said(run, tmp_path):
    data = {"name": jsonl(tmp_path / "a.jsonl", pairs())}
    rl = {"kind": "rl", "algorithm": {"lagrange": {"cost_limit": {"data": data}}}}
    assert not overlap(run, REWARD, {"kind": "cost", "data": data, "epochs": 1}, rl)
    (said,) = overlap(run, REWARD, {"kind": "cost", "data": data, "epochs": 2}, rl | {"prompts": data})
    assert "rl: algorithm.lagrange.cost_limit.data: 40 of 40 records" in said
    assert "open with a prompt of cost.data:" in said
    assert not overlap(run, REWARD, {"kind": "cost", "epochs": 2}, rl | {"prompts": data})


@pytest.mark.parametrize(
    ("train", "test", "said"),
    [
        ({"name": "a.jsonl:0.5", "test_share": 0.1}, {"test_share": 0.3, "split": "test"}, "test_share 0.1 and 0.3"),
        ({"name": "./a.jsonl"}, {"test_share": 0.3, "split": "test"}, "test_share None and 0.3"),
        ({"test_share": 0.3}, {"name": "./a.jsonl", "test_share": 0.3}, "both read the split 'train'"),
    ],
)
def test_one_stage_that_splits_its_data_in_two_ways_is_refused(run, tmp_path, monkeypatch, train, test, said):
    monkeypatch.chdir(tmp_path)
    jsonl(tmp_path / "a.jsonl", pairs())
    with pytest.raises(cfg.ConfigError, match="data and eval_data") as error:
        run({"kind": "cost", "data": {"name": "a.jsonl"} | train, "eval_data": {"name": "a.jsonl"} | test})
    assert said in str(error.value)


def test_share_of_the_training_split_is_no_other_split_than_a_published_one(run):
    run({"kind": "cost", "data": {"name": "demo/preference", "test_share": 0.2, "limit": 40},
         "eval_data": {"name": "demo/preference", "split": "test", "limit": 40}})  # fmt: skip


def test_shipped_world_measures_nothing_that_it_trains_on(tmp_path):
    config = cfg.load_config(ROOT / "configs" / "quickstart.yaml", [f"workdir={tmp_path}"])
    made = Run(config)
    for stage in config.stages:
        warn_of_overlap(made, stage)
    assert not made.warnings


# --- Small data


@pytest.mark.parametrize(
    ("stages", "said"),
    [
        (
            [{"kind": "sft", "data": {"name": "demo/sft", "limit": 5}, "epochs": 1, "batch_size": 32}],
            ["data has 5 records", "batch_size 32: a step takes each 6.4 times, and epochs: 1 makes 1 of them"],
        ),
        (
            [REWARD, COST, {"kind": "rl", "prompts": {"name": "demo/prompts", "limit": 6}}],
            ["prompts has 6 records", "fewer than batch_size 16", "2.7 times"],
        ),
        (
            [REWARD, COST, {"kind": "rl", "ptx": {"name": "demo/sft", "limit": 20}, "responses_per_prompt": 2,
             "algorithm": {"ptx_coeff": 1.0}}],
            ["ptx has 20 records", "batch_size·responses_per_prompt 32", "Lower batch_size to 10"],
        ),
        (
            [REWARD, COST, {"kind": "rejection_sampling", "prompts_per_round": 10}],
            ["prompts has 10 records", "fewer than batch_size 32"],
        ),
        (
            [{"kind": "sft", "eval_data": {"name": "demo/sft", "split": "test", "limit": 16}}],
            ["eval_data has 16 records", "± 24 points"],
        ),
        (
            [{"kind": "sft"}, REWARD, COST, {"kind": "evaluate", "policies": ["sft"],
             "prompts": [{"name": "demo/prompts", "split": "test", "limit": 4}]}],
            ["evaluate: prompts.0 has 4 records", "± 49 points"],
        ),
    ],
)  # fmt: skip
def test_data_that_is_too_small_is_said_with_what_it_means(run, stages, said):
    found = warnings(run(*stages))
    assert any(all(part in text for part in said) for text in found), found


def test_data_that_is_large_enough_is_passed_without_a_word(run, tmp_path):
    enough = {"data": {"name": jsonl(tmp_path / "train.jsonl", pairs(range(500)))}}
    enough |= {"eval_data": {"name": jsonl(tmp_path / "test.jsonl", pairs(range(500, 1000)))}}
    rl = {"kind": "rl", "eval_prompts": {"name": "demo/prompts", "split": "test"}}
    assert warnings(run({"kind": "sft"}, REWARD | enough, COST | enough, rl)) == []


@pytest.mark.parametrize(
    ("kind", "fields", "said"),
    [
        ("reward", {"better_response_id": 0}, "better_response_id is 0 in all 40 records: right if"),
        ("dpo", {"better_response_id": 1}, "better_response_id is 1 in all 40 records: right if"),
        ("cost", {"safer_response_id": 0, "is_response_0_safe": True}, "safer_response_id is 0 in all 40 records"),
        (
            "cost", {"is_response_0_safe": True, "is_response_1_safe": True},
            "all 80 responses are labelled safe: the cost model learns to call every response safe",
        ),
        ("cost", {"is_response_0_safe": False, "is_response_1_safe": False}, "all 80 responses are labelled unsafe"),
    ],
)  # fmt: skip
def test_labels_that_are_all_alike_are_said(run, tmp_path, kind, fields, said):
    data = {"name": jsonl(tmp_path / "a.jsonl", pairs(**fields))}
    (text,) = [text for text in warnings(run({"kind": kind, "data": data})) if " all " in text]
    assert said in text


def test_order_that_a_format_makes_is_no_lost_label(run, tmp_path):
    chosen = [{"prompt": f"what of {i}", "chosen": f"one {i}", "rejected": f"another {i}"} for i in range(40)]
    stages = [
        {"kind": "reward", "data": {"name": jsonl(tmp_path / "a.jsonl", chosen)}},
        {"kind": "cost", "data": {"name": jsonl(tmp_path / "b.jsonl", qa())}},
    ]
    assert warnings(run(*stages)) == []


def test_held_out_pairs_with_one_label_are_said(run, tmp_path):
    data = {
        "name": jsonl(tmp_path / "a.jsonl", pairs(range(100, 140), is_response_0_safe=True, is_response_1_safe=True))
    }
    (text,) = warnings(run({"kind": "cost", "eval_data": data}))
    assert "eval_data: no response is labelled unsafe: of such responses nothing is measured" in text


def test_limit_calibrated_on_few_responses_is_said(run, tmp_path):
    data = {"name": jsonl(tmp_path / "a.jsonl", pairs(range(10)))}
    found = warnings(run(REWARD, COST, {"kind": "rl", "algorithm": {"lagrange": {"cost_limit": {"data": data}}}}))
    said = (
        "cost_limit.data: the limit is calibrated on only 10 responses labelled safe and 10 responses labelled unsafe"
    )
    assert any(said in text for text in found), found


def test_pairs_that_are_alike_when_cut_are_said_with_what_to_do(run, tmp_path):
    long = "and so on " * 40
    alike = pairs(range(30), response_0=long + "one", response_1=long + "another")
    data = {"name": jsonl(tmp_path / "a.jsonl", [*pairs(range(30, 60)), *alike])}
    with pytest.raises(ValueError, match=r"identical within max_length: 30\).* Raise|raise max_length"):
        check_run(run({"kind": "reward", "data": data}))
    found = warnings(run({"kind": "reward", "data": data}, max_bad_records=0.6))
    said = "data: 30 of 60 pairs are left out, whose responses are identical where max_length 48 cuts them"
    assert any(said in text and "Raise max_length" in text for text in found), found
    limit = {"algorithm": {"lagrange": {"cost_limit": {"data": data}}}}
    found = warnings(run(REWARD, COST, {"kind": "rl"} | limit, max_bad_records=0.6))
    said = "cost_limit.data: 30 of 60 pairs are left out, whose responses are identical where max_response_length 24"
    assert any(said in text for text in found), found


def test_part_of_a_weighted_mixture_without_a_usable_record_is_refused(run, tmp_path):
    empty = {"name": jsonl(tmp_path / "a.jsonl", [{"prompt": "what", "response": ""}] * 3), "weight": 1.0}
    mixture = [{"name": "demo/sft", "limit": 64, "weight": 3.0}, empty]
    with pytest.raises(cfg.ConfigError, match=r"sft: data\.1 has a weight, but none of its records can be used"):
        check_run(run({"kind": "sft", "data": mixture}))


# --- Room


def test_disk_that_is_too_small_for_checkpoints_is_said_before_the_run(run, monkeypatch):
    rl = {"kind": "rl", "algorithm": {"name": "ppo"}, "keep_best": "train/reward"}
    made = run({"kind": "sft"}, REWARD, COST, rl)
    check_room(made)
    assert not made.warnings
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=100e6))
    check_room(made)
    # Half a million parameters of 12 bytes: three checkpoints of each stage before it, then four of two networks.
    (said,) = made.warnings["rl"]
    assert "a checkpoint takes up to 0.012 GB, and the stages up to here 0.11 GB" in said
    assert "0.1 GB are free in workdir" in said
    (Path(made.config.workdir) / "rl" / "checkpoints").mkdir(parents=True)
    resumed = run({"kind": "sft"}, REWARD, COST, rl)
    check_room(resumed)
    assert not resumed.warnings


def test_folder_that_cannot_be_written_is_refused_before_the_run(run, tmp_path):
    made = run({"kind": "sft"})
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "sft").write_text("a file")
    with pytest.raises(cfg.ConfigError, match=r"sft: .*/run/sft cannot be written to"):
        check_run(made)


# --- profile


@pytest.mark.parametrize("stage", [{"kind": "sft", "batch_size": 16, "epochs": 1}, {"kind": "rl", "steps": 4}])
def test_profile_of_steps_that_a_stage_does_not_have_is_refused_before_it_trains(run, stage):
    def stages(start):
        with_profile = stage | {"profile": {"start": start, "steps": 2}}
        return [with_profile] if stage["kind"] == "sft" else [REWARD, COST, with_profile]

    check_run(run(*stages(3)))
    with pytest.raises(cfg.ConfigError, match=r"profile.start 4 and profile.steps 2 end at step 5, .* has 4; lower"):
        check_run(run(*stages(4)))


@pytest.mark.parametrize(("profile", "said"), [({"start": 1}, "profile.start"), ({"steps": 0}, "profile.steps"),
                                               ({"step": 3}, "did you mean 'stages.0.profile.steps'")])  # fmt: skip
def test_profile_that_is_none_is_refused(run, profile, said):
    with pytest.raises(cfg.ConfigError, match=said):
        run({"kind": "sft", "profile": profile})


def test_profile_changes_no_result(run):
    without, with_ = (run({"kind": "sft"} | more).hashes for more in ({}, {"profile": {"start": 2}}))
    assert without == with_


# --- keep_best


@pytest.mark.parametrize(
    ("stage", "said"),
    [
        ({"kind": "cost", "keep_best": "eval/accuracy"}, "is measured on eval_data, which is not given"),
        ({"kind": "reward", "keep_best": "train/acuracy"}, "did you mean 'train/accuracy'"),
        ({"kind": "sft", "keep_best": "-train/accuracy"}, "there are train/grad_norm, train/loss, train/perplexity"),
        ({"kind": "sft", "keep_best": "eval/los", "eval_data": {"name": "demo/sft", "limit": 50}}, "'eval/loss'"),
    ],
)
def test_metric_that_a_stage_does_not_have_is_refused_before_it_trains(run, stage, said):
    with pytest.raises(cfg.ConfigError, match="keep_best") as error:
        check_run(run(stage))
    assert said in str(error.value)


def test_metric_of_rl_is_known_before_training(run):
    test = {"name": "demo/prompts", "split": "test", "limit": 40}
    for metric, said in (("train/rewad", "did you mean 'train/reward'"), ("eval/cost_mea", "'eval/cost_mean'")):
        with pytest.raises(cfg.ConfigError, match="keep_best") as error:
            check_run(run(REWARD, COST, {"kind": "rl", "keep_best": metric, "eval_prompts": test}))
        assert said in str(error.value)
    check_run(run(REWARD, COST, {"kind": "rl", "keep_best": "-eval/cost_mean", "eval_prompts": test}))


def test_what_was_said_of_the_data_stands_in_the_results_and_in_the_report(mini_run):
    cost = json.loads((mini_run[0] / "cost" / "result.json").read_text())
    assert any("16 of 16 records (100%)" in text for text in cost["warnings"])
    assert f"cost: warning: {cost['warnings'][0]}" in mini_run[1].stdout.partition("done in")[0]
    report = (mini_run[0] / "evaluate" / "report.html").read_text()
    assert "cost: eval_data: 16 of 16 records (100%)" in report
    assert "evaluate: prompts.0: 32 of 32 records (100%)" in report


def measured(folder, prefix):
    records = read_jsonl(folder / "metrics.jsonl")
    return {name for record in records for name in record if name.startswith(prefix)}


@pytest.mark.parametrize("kind", ["reward", "cost"])
@pytest.mark.parametrize("settings", [{}, {"labels": "shares"}, {"labels": "shares", "weight_field": "trust"}])
def test_a_batch_of_annotated_pairs_is_what_its_program_was_compiled_for(run, tmp_path, kind, settings):
    pair = {
        "prompt": "how", "response_0": "so .", "response_1": "no .", "better_votes": [0, 1, 1],
        "safer_votes": [0, 0, 1],
        "response_0_safe_votes": [1, 1, 0], "is_response_1_safe": False, "trust": 2,
    }  # fmt: skip
    file = {"name": jsonl(tmp_path / "pairs.jsonl", [pair] * 4)}
    made = run({"kind": kind, "data": file, "eval_data": file, "batch_size": 4, **settings})
    stage = stage_of(made.config, kind)
    loaded = load_data(made, stage, "data").arrays
    expected = {"reward": reward_batch, "cost": cost_batch}[kind](stage)
    assert jax.tree.structure(loaded) == jax.tree.structure(expected)
    assert [x.dtype for x in jax.tree.leaves(loaded)] == [x.dtype for x in jax.tree.leaves(expected)]
    held_out = load_data(made, stage, "eval_data")
    plain = held_out.arrays.share if kind == "reward" else held_out.arrays.shares
    assert (plain, held_out.arrays.weight) == (None, None)
    assert "accuracy_split" in kind_of(stage).training.measured(made, stage, {"eval_data": held_out})


def test_a_limit_of_the_reward_needs_no_cost_model_and_has_a_critic_that_starts_from_the_reward_model(run):
    proxy = {"of": "reward", "cost_limit": 2.0, "measure": "mean"}
    made = run(REWARD, {"kind": "rl", "cost_model": None, "algorithm": {"constraints": {"proxy": proxy}}})
    check_run(made)
    stage = stage_of(made.config, "rl")
    assert critic_starts(made, stage) == {"reward": "reward", "cost/proxy": "reward"}
    names = training_metrics(made, stage, kind_of(stage).training, {"prompts": load_data(made, stage, "prompts")})
    assert {"train/mean_cost/proxy", "train/multiplier/proxy", "train/cost/proxy_critic_loss"} <= names
    assert "train/unsafe_share/proxy" not in names


@pytest.mark.parametrize(
    ("algorithm", "said"),
    [
        ({"lagrange": {"of": "reward"}}, "limit the reward by algorithm.constraints.NAME"),
        ({"constraints": {"a": {"of": "reward"}}}, "name no model for it in cost_models.a"),
        ({"lagrange": {"measure": "rate", "cost_limit": 1.5}}, "must be a number in [0, 1)"),
        ({"lagrange": {"bound": "at_least", "cost_limit": {"data": {"name": "demo/preference"}}}}, "as a number"),
        ({"name": "repo"}, "set algorithm.lagrange.measure to 'rectified' or 'rate'"),
    ],
)
def test_constraint_that_cannot_hold_is_refused_with_the_fix(run, algorithm, said):
    models = {"cost_models": {"a": "cost"}} if "constraints" in algorithm else {}
    with pytest.raises((cfg.ConfigError, ValueError)) as error:
        check_run(run(REWARD, COST, {"kind": "rl", "algorithm": algorithm} | models))
    assert said in str(error.value)


def test_names_known_before_training_are_those_of_a_run(mini_run):
    made = Run(cfg.load_config(ROOT / "tests" / "configs" / "mini.yaml", [f"workdir={mini_run[0]}"]))
    for stage in (stage_of(made.config, name) for name in ("sft", "reward", "cost", "ppo_lag")):
        loaded = {"prompts": load_data(made, stage, "prompts")} if stage.kind == "rl" else {}
        training = kind_of(stage).training
        assert training_metrics(made, stage, training, loaded) == measured(mini_run[0] / stage.name, "train/")
        if stage.kind != "rl":
            result = json.loads((mini_run[0] / stage.name / "result.json").read_text())
            assert {f"eval/{name}" for name in training.measured(made, stage, {})} == set(result["metrics"])
