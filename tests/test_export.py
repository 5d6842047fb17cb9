"""Models from checkpoints: of any stage, at any step, while the run is going on, without touching it."""

import json
import re
import shutil

import chex
import jax
import pytest
import yaml

from safe_rlhf_jax import config as cfg
from safe_rlhf_jax import export
from safe_rlhf_jax.checkpoint import Checkpoints
from safe_rlhf_jax.errors import ConfigError
from safe_rlhf_jax.models import hf
from safe_rlhf_jax.models.peft import read_adapter
from safe_rlhf_jax.models.peft_heads import read_head
from safe_rlhf_jax.sharding import fetch
from safe_rlhf_jax.stages import Run, prepare, reinforcement, run_stage
from safe_rlhf_jax.stages.bases import bases_now
from safe_rlhf_jax.stages.common import export as export_stage
from safe_rlhf_jax.stages.kinds import networks_of
from safe_rlhf_jax.stages.networks import optimizer_of
from tests.helpers import make_scorer, perturbed, stage_of

LENGTHS = {"max_prompt_length": 24, "max_response_length": 8}
LORA = {"rank": 2, "targets": ["q_proj", "down_proj"], "layers": 1}


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return tmp_path_factory.mktemp("export")


@pytest.fixture(scope="module")
def config(root):
    """A run whose stages train whole networks and adapters."""
    sampling = {
        "init_from": "sft",
        "reward_model": f"path:{root}/scorer",
        "prompts": {"name": "demo/prompts"},
    } | LENGTHS
    stages = [
        {"name": "sft", "kind": "sft", "init_from": "preset:tiny", "data": {"name": "demo/sft"}, "max_length": 48},
        {"name": "cost", "kind": "cost", "init_from": "sft", "data": {"name": "demo/preference"}, "max_length": 48}
        | {"lora": LORA, "normalize": True},
        {"name": "rl", "kind": "rl", "cost_model": "cost", "lora": LORA} | sampling,
        {"name": "rounds", "kind": "rejection_sampling", "rounds": 1} | sampling,
        {"name": "merge", "kind": "merge", "init_from": "sft", "other": "rl"},
    ]  # fmt: skip
    file = root / "config.yaml"
    tree = {"workdir": str(root / "run"), "execution": {"scan_layers": False}, "mesh": {"data": 1, "fsdp": 8}}
    file.write_text(yaml.safe_dump(tree | {"stages": stages}))
    return file


@pytest.fixture(scope="module")
def run(root, config):
    """Checkpoints and exports as the loops of the stages would write them, on a mesh of eight devices."""
    run = Run(cfg.load_config(config))
    hf.save(root / "scorer", *scorer_of(run), run.tokenizer.hf)
    with jax.set_mesh(run.mesh):
        saved(run, "sft", {"": [1, 3]})
        saved(run, "cost", {"": [2, 4]})
        saved(run, "rounds", {"": [2]})
    return run


def scorer_of(run):
    module, variables = make_scorer("reward", run.networks.config("sft"))
    return module, perturbed(variables)


def saved(run, name, steps):
    """Writes checkpoints {folder: steps} of a stage that trains one network, all different, and its `export/`."""
    stage, folder = stage_of(run.config, name), run.folder(name)
    prepare(run, stage, folder, bases_now(run, stage))
    module, variables = networks_of(run, stage)[stage.makes].at_start(run, stage)
    state = run.networks.start(module, variables, optimizer_of(stage.optimizer, 10))
    for below, numbers in steps.items():
        checkpoints = Checkpoints(folder / below / "checkpoints")
        for step in numbers:
            state = state.replace(params=perturbed({"params": state.params}, step)["params"])
            checkpoints.save(step, state, {})
        checkpoints.close()
    base = variables["params"].get("base")
    export_stage(run, stage, folder, module, state, base, getattr(stage, "export_layout", None))


def exported(config, out, *arguments):
    """Exports; returns the files by name."""
    shutil.rmtree(out, ignore_errors=True)
    assert export.main(["--config", str(config), "--out", str(out), *arguments]) == 0
    return files(out)


def files(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def everything(folder):
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*")}


@pytest.fixture
def refusal(config, tmp_path, capsys):
    """Exports in vain; returns the one line of the error."""

    def refused(*arguments, out=tmp_path / "out", file=config):
        assert export.main(["--config", str(file), "--out", str(out), *arguments]) == 1
        error = capsys.readouterr().err
        assert error.count("\n") == 1, error
        return error

    return refused


@pytest.mark.parametrize(
    ("stage", "arguments", "made"),
    [("sft", [], "export"), ("rounds", [], "export"), ("cost", [], "export"), ("cost", ["--form", "peft"], "adapter")],
)
def test_export_of_the_newest_checkpoint_is_that_of_the_stage_file_by_file(
    run, config, tmp_path, stage, arguments, made
):
    found, expected = exported(config, tmp_path / "out", stage, *arguments), files(run.folder(stage) / made)
    assert found.keys() == expected.keys()
    assert [name for name in expected if found[name] != expected[name]] == []


def test_an_earlier_step_is_another_model(run, config, tmp_path):
    older, newer = (exported(config, tmp_path / step, "cost", "--step", step, "--form", "peft") for step in "24")
    assert [name for name in newer if older[name] != newer[name]] == ["adapter_model.safetensors"]
    first, last = (exported(config, tmp_path / step, "sft", "--step", step) for step in "13")
    assert [name for name in last if first[name] != last[name]] == ["model.safetensors"]


def test_a_mesh_that_is_not_here_is_none_of_the_export(run, config, tmp_path):
    assert exported(config, tmp_path / "out", "sft", "mesh.fsdp=64") == files(run.folder("sft") / "export")


def test_run_that_is_going_on_is_not_touched(run, config, tmp_path, capsys):
    """A newer checkpoint is being written, another is cut off."""
    checkpoints = run.folder("sft") / "checkpoints"
    shutil.copytree(checkpoints / "3", checkpoints / "5.orbax-checkpoint-tmp-1")
    shutil.copytree(checkpoints / "3", checkpoints / "4")
    for file in (checkpoints / "4").rglob("d/*"):
        file.unlink()
    before = everything(run.folder("sft"))
    try:
        found = exported(config, tmp_path / "out", "sft")
        assert everything(run.folder("sft")) == before
    finally:
        shutil.rmtree(checkpoints / "4")
        shutil.rmtree(checkpoints / "5.orbax-checkpoint-tmp-1")
    assert found == files(run.folder("sft") / "export")
    assert "step 4: " in (out := capsys.readouterr().out)
    assert "step 3 is taken" in out


def test_every_network_of_an_rl_stage_is_exported_from_its_state(run, config, tmp_path):
    """The critic of the reward starts from a whole scorer, a base of its own, that of the cost from an adapter."""
    stage, folder = stage_of(run.config, "rl"), run.folder("rl")
    prepare(run, stage, folder, bases_now(run, stage))
    with jax.set_mesh(run.mesh):
        hp = reinforcement.hyperparameters(run, stage, {"cost": (0.0,)}, ("all",))
        _, state, _, _ = reinforcement.build_networks(run, stage, hp)
        checkpoints = Checkpoints(folder / "checkpoints")
        checkpoints.save(7, state, {})
        checkpoints.close()
    states = {"policy": state.actor} | {f"{signal}_critic": one for signal, one in state.critics.items()}
    assert states.keys() == {"policy", "reward_critic", "cost_critic"}
    bases = json.loads((folder / "base.json").read_text())
    assert [bases[name]["reference"] for name in states] == ["sft", f"path:{config.parent}/scorer", "sft"]
    for name, one in states.items():
        exported(config, tmp_path / name, "rl", "--network", name, "--form", "peft")
        exported(config, tmp_path / "merged", "rl", "--network", name)
        found, head = read_adapter(tmp_path / name), "lm" if name == "policy" else "score"
        assert found.base == str(run.model_folder(bases[name]["reference"]))
        base = hf.inspect(
            found.base, head, score_type="critic", scan_layers=False, trunk=lambda config: config.num_layers - 1
        ).module.config
        chex.assert_trees_all_equal(found.params(base, stage.adapters), fetch(one.params["adapter"]))
        if name != "policy":
            chex.assert_trees_all_equal(read_head(found, base)[1], fetch(one.params["head"]))
        chex.assert_trees_all_close(*(hf.load(tmp_path / form, head)[1] for form in (name, "merged")), atol=1e-6)


def test_a_base_that_changed_since_the_checkpoint_is_refused(run, config, refusal):
    file, stage = run.folder("sft") / "export" / "config.json", stage_of(run.config, "cost")
    before, text = everything(run.folder("cost")), file.read_text()
    try:
        file.write_text(text + " ")
        assert "'sft', the base of its cost, has changed since the checkpoints in" in refusal("cost")
        with pytest.raises(ConfigError, match=r"'sft', the base of its cost, has changed since"):
            run_stage(Run(cfg.load_config(config)), stage)
        assert everything(run.folder("cost")) == before
    finally:
        file.write_text(text)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["sfd"], "stage 'sfd': not in this config; there are sft, cost, rl, rounds, merge; did you mean 'sft'?"),
        (["merge"], "stage 'merge': kind merge trains nothing, so it has no checkpoints; sft, cost, rl, rounds do"),
        (["cost", "--step", "3"], "/cost/checkpoints; there are 2, 4"),
        (["sft", "--form", "peft"], "--form peft: stage 'sft' has no lora"),
        (["cost", "--network", "policy"], "--network policy: stage 'cost' trains cost"),
        (["cost", "stages.cost.lora.alpha=8"], "stages.cost.lora.alpha 8.0: the stage was run with 32.0; give"),
        (["cost", "execution.scan_layers=true"], "execution.scan_layers True: the stage was run with False; give"),
        (["cost", "workdir=elsewhere"], "stage 'cost': no checkpoint in elsewhere/cost yet"),
    ],
)
def test_what_cannot_be_exported_is_one_clear_line(run, refusal, arguments, message):
    assert message in refusal(*arguments)


def test_a_checkpoint_of_another_network_is_refused_with_the_array(run, refusal, monkeypatch):
    monkeypatch.setattr(export, "check_settings", lambda *_: None)
    assert re.search(
        r"step 4: .*'lora_a'\] is float32\[\d+, 2\]; the network of this config has float32\[\d+, 3\]",
        refusal("cost", "stages.cost.lora.rank=3"),
    )
    smaller = refusal("cost", "stages.cost.lora.targets=[q_proj]")
    assert "['down_proj']['lora_a'] is float32[" in smaller
    assert "has no such array" in smaller


def test_a_folder_that_holds_anything_is_not_written_to(run, refusal, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "config.json").write_text("{}")
    assert "out: holds config.json; name a new or empty folder" in refusal("sft")
    assert "is a file; name a new or empty folder" in refusal("sft", out=tmp_path / "out" / "config.json")
    inside = run.folder("rl") / "export"
    assert "/rl, the folder of a stage; name one outside of it" in refusal("sft", out=inside)
    assert not inside.exists()
    assert files(tmp_path / "out") == {"config.json": b"{}"}
