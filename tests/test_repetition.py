"""Repetition of stages in a config: what its placeholders become, and which mistakes are named."""

import pytest
import yaml

from safe_rlhf_jax import config as cfg

ROUNDS = """
workdir: runs/x
stages:
  - {name: policy_0, kind: sft, init_from: "preset:tiny", data: {name: demo/sft}}
  - repeat:
      times: 3
      stages:
        - {name: "sample_{round}", kind: sample, policies: ["policy_{last}"], prompts: {name: demo/prompts},
           seed: "{round}"}
        - {name: "label_{round}", kind: label, samples: {name: "stage:sample_{round}"}, labeller: {kind: oracle}}
        - {name: "reward_{round}", kind: reward, init_from: policy_0,
           data: [{name: demo/preference}, {name: "stage:label_{each}"}]}
        - {name: "policy_{round}", kind: rl, init_from: "policy_{last}", reward_model: "reward_{round}",
           prompts: {name: demo/prompts}, algorithm: {name: ppo}}
"""


@pytest.fixture
def load(tmp_path):
    """Loads a text as a config, with overrides."""

    def loaded(text=ROUNDS, *overrides):
        (tmp_path / "config.yaml").write_text(text)
        return cfg.load_config(tmp_path / "config.yaml", overrides)

    return loaded


def test_rounds_are_flat_stages_with_their_numbers(load):
    stages = {stage.name: stage for stage in load().stages}
    rounds = [f"{kind}_{i}" for i in (1, 2, 3) for kind in ("sample", "label", "reward", "policy")]
    assert list(stages) == ["policy_0", *rounds]
    assert stages["sample_2"].policies == ("policy_1",)
    assert stages["sample_2"].seed == 2
    assert stages["policy_3"].init_from == "policy_2"


def test_item_of_each_round_mixes_all_rounds_so_far(load):
    stages = {stage.name: stage for stage in load().stages}
    for i in (1, 2, 3):
        names = [part.name for part in stages[f"reward_{i}"].data]
        assert names == ["demo/preference", *(f"stage:label_{k}" for k in range(1, i + 1))]


def test_overrides_reach_the_repetition_and_the_stages_of_a_round(load):
    stages = {stage.name: stage for stage in load(ROUNDS, "stages.1.repeat.times=2", "stages.policy_2.steps=7").stages}
    assert "policy_3" not in stages
    assert (stages["policy_1"].steps, stages["policy_2"].steps) == (200, 7)


def test_written_config_of_a_stage_is_flat_and_loads_again(load, tmp_path):
    run = load()
    text = cfg.dump(run, run.stages[-1])
    assert "repeat" not in text
    assert load(text).stages == run.stages


def edited(change):
    tree = yaml.safe_load(ROUNDS)
    change(tree["stages"])
    return yaml.safe_dump(tree)


@pytest.mark.parametrize(
    ("change", "parts"),
    [
        (lambda s: s[1]["repeat"].pop("times"), ["stages.1.repeat", "times: 3"]),
        (lambda s: s[1].update(name="x"), ["stages.1.repeat", "nothing beside"]),
        (lambda s: s[1]["repeat"].update(times=0), ["stages.1.repeat.times", "value 0"]),
        (lambda s: s[1]["repeat"].update(times=True), ["stages.1.repeat.times", "value True"]),
        (lambda s: s[1]["repeat"].update(stages=[]), ["stages.1.repeat.stages"]),
        (lambda s: s[1]["repeat"]["stages"].append({"repeat": {}}), ["stages.1.repeat.stages.4", "inside"]),
        (
            lambda s: s[1]["repeat"]["stages"][0].update(name="sample"),
            ["'sample'", "same in every round"],
        ),
        (lambda s: s[1]["repeat"]["stages"][3].update(init_from="policy_{each}"), ["{each}", "item of a list"]),
        (lambda s: s[1]["repeat"]["stages"][3].update(init_from="poliy_{last}"), ["'poliy_0'", "no earlier stage"]),
    ],
)
def test_mistake_in_a_repetition_is_named(load, change, parts):
    with pytest.raises(cfg.ConfigError) as caught:
        load(edited(change))
    assert all(part in str(caught.value) for part in parts), caught.value


# --- Data that stages make


@pytest.mark.parametrize(
    ("override", "parts"),
    [
        ("stages.label_1.samples={name: 'stage:sampel_1'}", ["samples", "'sampel_1'", "no earlier stage", "sample_1"]),
        ("stages.label_1.samples={name: 'stage:sample_2'}", ["'sample_2'", "no earlier stage"]),
        ("stages.reward_1.data={name: 'stage:sample_1'}", ["'sample_1'", "a sample stage", "prompts", "reward"]),
        ("stages.reward_1.data={name: 'stage:policy_0'}", ["'policy_0'", "no data"]),
    ],
)
def test_data_of_a_stage_that_makes_none_is_refused(load, override, parts):
    with pytest.raises(cfg.ConfigError) as caught:
        load(ROUNDS, override)
    assert all(part in str(caught.value) for part in parts), caught.value


def test_share_of_the_data_of_a_stage_is_a_share_of_its_file():
    data = cfg.Data(name="stage:label_1:0.5", test_share=0.1)
    assert data.maker == "label_1"
    assert data.found_in("runs/x/label_1/data.jsonl").name == "runs/x/label_1/data.jsonl:0.5"
    assert cfg.Data(name="runs/stage:1.jsonl").maker is None
