"""Rejection sampling, the one-shot dual and best-of-n as stages of a run, and what a kill leaves of them."""

import json
from pathlib import Path

import numpy as np
import pytest
import yaml
from matplotlib import image

from safe_rlhf_jax import config as cfg
from safe_rlhf_jax.config.repetition import expanded
from safe_rlhf_jax.data import demo
from safe_rlhf_jax.data.tokenizer import load_tokenizer
from safe_rlhf_jax.metrics import read_jsonl
from safe_rlhf_jax.models import hf
from safe_rlhf_jax.rl.dual import solve_dual
from safe_rlhf_jax.stages import Run, check_run
from safe_rlhf_jax.stages.constraints import initial_multiplier
from safe_rlhf_jax.stages.rejection import round_rows, rounds_before
from safe_rlhf_jax.stages.sampling import is_limited, some_of

ROUNDS = ("rejection_round_1", "rejection")
CONFIG = Path(__file__).parent.parent / "configs" / "sampling.yaml"
SAMPLING = "from tests import moments; moments.before('stages.rejection:choose', moments.death_at(3))\n"
TRAINING = """
from tests import moments
def stop(stage, step):
    if stage == "rejection" and step == 3:
        moments.wait_for_checkpoint({checkpoints!r}, 2)
        moments.die()
moments.after_log(stop)
"""


def tree_of(mini, workdir):
    """The config on the models of a finished run."""
    tree = yaml.safe_load(CONFIG.read_text())
    tree["workdir"] = str(workdir)
    for stage in tree["stages"]:
        stage |= {f"{name}_model": f"path:{mini}/{name}/export" for name in ("reward", "cost")}
        if stage.get("init_from") == "path:policy":
            stage["init_from"] = f"path:{mini}/sft/export"
        if "policies" in stage:
            stage["policies"][0] = f"path:{mini}/sft/export"
    return tree


@pytest.fixture(scope="module")
def sampling_run(mini_run, finished_run, tmp_path_factory):
    """A finished run: its folder, its config, and what it said."""
    folder = tmp_path_factory.mktemp("sampling")
    return finished_run(folder, tree_of(mini_run[0], folder / "run"))


def result(folder, stage):
    return json.loads((folder / stage / "result.json").read_text())


# --- Rejection sampling


def test_each_round_reports_what_more_samples_would_buy(sampling_run):
    for found in (result(sampling_run[0], name) for name in ROUNDS):
        assert [row["number"] for row in found["gain"]] == [1, 2, 4]
        best = [row["reward_max"] for row in found["gain"]]
        feasible = [row["feasible_share"] for row in found["gain"]]
        assert best == sorted(best)
        assert best[0] < best[-1]
        assert feasible == sorted(feasible)
        assert found["prompts"] == 40 == found["selected"] + found["dropped"]
        assert found["selected"] == pytest.approx(40 * feasible[-1])
        assert np.isfinite(found["metrics"]["eval/reward_mean"])
    figure = image.imread(sampling_run[0] / "rejection" / "best_of_n.png")
    assert figure[..., :3].std() > 0.05, "nothing is drawn"


def test_selected_responses_are_feasible_where_the_limit_is_about_the_prompt(sampling_run):
    group = {record["prompt"]: record["prompt_source"] for record in demo.prompts("test")}
    for name in ROUNDS:
        rows = read_jsonl(sampling_run[0] / name / "selected.jsonl")
        costs = {name: [row["cost"] for row in rows if group[row["prompt"]] == name] for name in set(group.values())}
        assert max(costs.pop("risky")) <= 0.0
        assert max(cost for others in costs.values() for cost in others) > 0.0
        tokenizer = load_tokenizer("demo")
        for row in rows:
            assert tokenizer.decode(row["response_ids"]) == row["response"]
            assert tokenizer.decode(row["prompt_ids"]).startswith(row["prompt"])
            assert row["truncated"] == (row["response_ids"][-1] != tokenizer.eos_id)


def test_each_round_starts_from_the_policy_of_the_round_before(sampling_run, mini_run):
    folders = (mini_run[0] / "sft", *(sampling_run[0] / name for name in ROUNDS))
    heads = [hf.load(path / "export")[1]["params"]["lm_head"]["kernel"] for path in folders]
    steps = [float(np.abs(b - a).mean()) for a, b in ((heads[0], heads[1]), (heads[1], heads[2]))]
    assert min(steps) > 1e-6
    assert np.abs(heads[2] - heads[0]).mean() > max(steps)


def test_killed_run_repeats_no_round_and_ends_with_the_same_policy(sampling_run, mini_run, train_process, tmp_path):
    tree = tree_of(mini_run[0], tmp_path / "run")
    tree["stages"] = tree["stages"][:1]
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(tree))
    first, folder = (tmp_path / "run" / name for name in ROUNDS)
    process = train_process(config=tmp_path / "config.yaml", prelude=SAMPLING)
    assert process.returncode == -9, process.stderr
    answered = first / "sampling.jsonl"
    assert len(answered.read_text().splitlines()) == 2
    with answered.open("a") as file:
        file.write('{"chosen": [')  # a line that was being written
    prelude = TRAINING.format(checkpoints=str(folder / "checkpoints"))
    process = train_process(config=tmp_path / "config.yaml", prelude=prelude)
    assert process.returncode == -9, process.stderr
    assert "rejection_round_1: sampling 3/3" in process.stdout
    assert "rejection_round_1: sampling 1/3" not in process.stdout
    before = {path: path.stat().st_mtime_ns for path in (first / "selected.jsonl", folder / "selected.jsonl")}
    process = train_process(config=tmp_path / "config.yaml")
    assert process.returncode == 0, process.stderr
    assert "rejection: continuing from step 2" in process.stdout
    assert "sampling" not in process.stdout.partition("rejection: done")[0]
    assert {path: path.stat().st_mtime_ns for path in before} == before
    whole, again = (hf.load(path / "rejection" / "export")[1] for path in (sampling_run[0], tmp_path / "run"))
    np.testing.assert_array_equal(whole["params"]["lm_head"]["kernel"], again["params"]["lm_head"]["kernel"])
    for name in ROUNDS:
        again, whole = result(tmp_path / "run", name), result(sampling_run[0], name)
        assert (again["gain"], again["metrics"]) == (whole["gain"], whole["metrics"])


def test_limit_that_no_response_meets_ends_with_what_to_change(mini_run, train_process, tmp_path):
    tree = tree_of(mini_run[0], tmp_path / "run")
    tree["stages"] = tree["stages"][:1]
    tree["stages"][0] |= {"cost_limit": -100.0, "constrained_groups": None}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(tree))
    process = train_process(config=tmp_path / "config.yaml")
    assert process.returncode == 1
    message = "rejection_round_1: none of 40 prompts has a response with cost ≤ -100.000 among 4; raise cost_limit or"
    assert message in process.stderr


@pytest.fixture
def run(mini_run, tmp_path):
    """Reads the config, edited."""

    def read(edit=lambda stages: None, name="run"):
        tree = tree_of(mini_run[0], tmp_path / name)
        edit({stage["name"]: stage for stage in tree["stages"]})
        (tmp_path / "config.yaml").write_text(yaml.safe_dump(tree))
        return Run(cfg.load_config(tmp_path / "config.yaml"))

    return read


def prompts_of(run, stage):
    from safe_rlhf_jax.stages.datasets import load_data

    return load_data(run, stage, "prompts")


def test_rounds_answer_the_next_prompts_and_come_back_only_when_all_have_been_answered(run):
    made = run()
    stage = made.config.stages[0]
    prompts = prompts_of(made, stage)
    rows = [row for number in (1, 2, 3, 4, 5, 6) for row in round_rows(stage, prompts, number, 0)]
    assert len(rows) == 240
    for start in range(0, 240, 48):
        assert sorted(rows[start : start + 48]) == list(range(48))
    whole = stage.model_copy(update={"prompts_per_round": None})
    assert sorted(round_rows(whole, prompts, 2, 0)) == list(range(48))


def test_rows_that_are_taken_keep_their_records(run):
    made = run()
    stage = made.config.stages[0]
    prompts = prompts_of(made, stage)
    limited = is_limited(stage, prompts)
    assert 0 < limited.sum() < len(prompts)
    taken = some_of(prompts, np.flatnonzero(limited).tolist())
    assert {record["prompt_source"] for record in taken.records} == {"risky"}
    ids = [tokens[mask].tolist() for tokens, mask in zip(taken.arrays.tokens, taken.arrays.mask, strict=True)]
    assert [made.tokenizer.decode(row)[: len(r["prompt"])] for row, r in zip(ids, taken.records, strict=True)] == [
        record["prompt"] for record in taken.records
    ]


# --- The dual


def test_dual_is_solved_on_samples_and_starts_the_multiplier_of_training(sampling_run):
    found = result(sampling_run[0], "dual")
    assert 0 < found["multiplier"] <= 5.0
    assert found["expected_cost"] == pytest.approx(0.0, abs=1e-6) or found["capped"] or found["multiplier"] == 0.0
    assert 1.0 <= found["effective_sample_size"] <= 4.0
    assert found["prompts"] == sum(record["prompt_source"] == "risky" for record in demo.prompts("test")[:64])
    assert f"multiplier at the start: {found['multiplier']:.4g} of stage dual" in sampling_run[2]
    assert result(sampling_run[0], "ppo_lag")["metrics"]["multiplier"] == pytest.approx(found["multiplier"], rel=1e-4)


def test_change_of_the_dual_stage_reaches_the_training_that_starts_from_it(run):
    before, after = run().hashes, run(lambda stages: stages["dual"].update(seed=5)).hashes
    assert {name for name in before if before[name] != after[name]} == {"dual", "ppo_lag"}


def test_rounds_of_a_config_are_stages_each_from_the_one_before(run):
    def edit(stages):
        stages["rejection"].update(rounds=3, train_on="all_rounds")

    made = run(edit)
    names = ["rejection_round_1", "rejection_round_2", "rejection"]
    found = made.config.stages[:3]
    assert [stage.name for stage in found] == names
    assert [stage.init_from for stage in found[1:]] == names[:2]
    assert [[one.name for one in rounds_before(made, stage)] for stage in found] == [[], names[:1], names[:2]]
    default = run(lambda stages: stages["rejection"].pop("rounds"))
    assert [stage.name for stage in default.config.stages[:3]] == names
    one = run(lambda stages: stages["rejection"].update(rounds=1)).config.stages
    assert [stage.name for stage in one[:2]] == ["rejection", "dual"]
    with pytest.raises(cfg.ConfigError, match=r"rejection: rounds: a number of rounds, 1 or more \(value 0\)"):
        run(lambda stages: stages["rejection"].update(rounds=0))


def test_rejection_in_a_repetition_goes_on_from_round_to_round():
    stage = {
        "name": "best_{round}", "kind": "rejection_sampling", "rounds": 1, "init_from": "best_{last}",
        "reward_model": "path:reward", "prompts": {"name": "demo/prompts"},
    }  # fmt: skip
    first = {"name": "best_0", "kind": "sft", "init_from": "preset:tiny", "data": {"name": "demo/sft"}}
    made = Run(cfg.RunConfig(workdir="x", stages=expanded([first, {"repeat": {"times": 2, "stages": [stage]}}])))
    assert [one.name for one in rounds_before(made, made.config.stages[-1])] == ["best_1"]


@pytest.mark.parametrize(
    ("found", "setting", "expected"),
    [
        (0.7, {}, 0.7),
        (0.0, {}, 0.01),  # log λ has no 0
        (0.0, {"multiplier": "projected"}, 0.0),
        (0.0, {"min_multiplier": 0.2}, 0.2),
        (7.0, {}, 5.0),
    ],
)
def test_multiplier_of_a_dual_stage_is_kept_within_the_bounds(run, monkeypatch, found, setting, expected):
    made = run()
    monkeypatch.setattr(made, "result", {"dual": {"multiplier": found}}.get)
    assert initial_multiplier(made, cfg.Lagrange(init="dual", **setting)) == expected
    assert initial_multiplier(made, cfg.Lagrange(init=2.0)) == 2.0
    with pytest.raises(cfg.ConfigError, match="stage 'none' is not finished"):
        initial_multiplier(made, cfg.Lagrange(init="none"))


def test_dual_of_costs_far_above_the_limit_is_refused():
    with pytest.raises(ValueError, match=r"Raise cost_limit, or responses_per_prompt, or lower kl_coeff"):
        solve_dual(
            np.zeros((2, 3)), np.ones((2, 3)), cost_limit=0.0, kl_coeff=0.1, divided=True, max_multiplier=5.0
        )  # fmt: skip


# --- Best of n in the evaluation


def test_best_of_n_is_a_row_of_its_own_and_within_the_limit_where_it_can_be(sampling_run):
    samples = read_jsonl(sampling_run[0] / "evaluate" / "samples.jsonl")
    by_row = {name: [s for s in samples if s["policy"] == name] for name in dict.fromkeys(s["policy"] for s in samples)}
    assert list(by_row)[1:] == ["rejection", "rejection, best of 4"]
    plain, best = by_row["rejection"], by_row["rejection, best of 4"]
    assert [s["prompt"] for s in plain] == [s["prompt"] for s in best]
    assert np.mean([s["cost"] > 0 for s in best]) < np.mean([s["cost"] > 0 for s in plain])
    assert all(s["kl"] is None for s in best)
    assert "rejection, best of 4" in (sampling_run[0] / "evaluate" / "report.html").read_text()


# --- What is refused before anything is trained


@pytest.mark.parametrize(
    ("stage", "setting", "parts"),
    [
        ("rejection", {"responses_per_prompt": 1}, ["stages.0.responses_per_prompt", "must be 2 or more", "1"]),
        ("dual", {"responses_per_prompt": 1}, ["stages.2.responses_per_prompt", "must be 2 or more"]),
        ("rejection", {"cost_model": None}, ["cost_limit does nothing: it limits the cost of cost_model"]),
        ("rejection", {"group_field": None}, ["constrained_groups needs group_field"]),
        ("rejection", {"top_k": 5}, ["stages.0.top_k", "another distribution"]),
        ("rejection", {"microbatches": 3}, ["batch_size 8 does not divide into microbatches 3", "6 or 9"]),
        ("rejection", {"prompt_batch_size": 12}, ["prompt_batch_size 12 does not divide", "8 or 16"]),
        ("rejection", {"max_response_length": 600}, ["init_from", "512 positions", "624 tokens"]),
        (
            "rejection",
            {"constrained_groups": ["rude"]},
            ["rejection_round_1: constrained_groups names ['rude']", "'risky'"],
        ),
        (
            "rejection",
            {"cost_limit": {"data": {"name": "demo/sft"}}},
            ["rejection_round_1: cost_limit", "labelled safe"],
        ),
        ("dual", {"kl_coeff": 0.2}, ["ppo_lag", "algorithm.lagrange.init names 'dual', whose kl_coeff is 0.2", "0.1"]),
        ("dual", {"cost_limit": 1.0}, ["whose cost_limit is 1.0, but here it is 0.0", "another problem"]),
        ("dual", {"target": "plain"}, ["whose target is 'plain'", "'ppo_lag' ends at that of 'safe_rlhf'"]),
        ("dual", {"name": "other"}, ["algorithm.lagrange.init names 'dual', which is no earlier stage of kind dual"]),
        ("evaluate", {"best_of": {"sft": 8}}, ["best_of names 'sft', which is none of its policies"]),
        ("evaluate", {"best_of": {"rejection": 1}}, ["best_of.rejection 1: must be 2 or more"]),
        ("evaluate", {"best_of": {}}, ["best_of_cost_limit 0.0 needs best_of"]),
    ],
)
def test_what_cannot_work_is_refused_before_the_first_stage(run, stage, setting, parts):
    with pytest.raises(cfg.ConfigError) as error:
        check_run(run(lambda stages: stages[stage].update(setting)))
    assert all(part in str(error.value) for part in parts), error.value


def test_measure_that_the_dual_does_not_solve_is_refused(run):
    def edit(stages):
        stages["ppo_lag"]["algorithm"]["lagrange"] |= {"measure": "cvar"}

    with pytest.raises(cfg.ConfigError, match="solves one limit of the mean cost"):
        run(edit)


def test_config_of_the_stages_is_valid_as_it_stands():
    assert [stage.kind for stage in cfg.load_config(CONFIG).stages] == [
        "rejection_sampling", "rejection_sampling", "dual", "rl", "evaluate",
    ]  # fmt: skip
