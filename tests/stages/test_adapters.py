"""Stages that train adapters: what they write, what they share, how they go on after a kill, and what is refused."""

import os
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

from safe_rlhf_jax import config as cfg
from safe_rlhf_jax.aot.run import AbstractRun
from safe_rlhf_jax.models import hf
from safe_rlhf_jax.models.adapters import trained
from safe_rlhf_jax.models.config import Lora
from safe_rlhf_jax.models.quantized import is_quantized
from safe_rlhf_jax.models.safetensors_io import Tensors
from safe_rlhf_jax.stages import Run
from safe_rlhf_jax.stages.reinforcement import build_networks, hyperparameters
from tests.helpers import stage_of

MINI = Path(__file__).parent.parent / "configs" / "mini_lora.yaml"
TRAINED = ("sft", "reward", "cost", "dpo", "ppo_lag", "best")


@pytest.fixture(scope="module")
def config(mini_run, tmp_path_factory):
    """The config with its base: the policy of the other small run."""
    file = tmp_path_factory.mktemp("config") / "mini_lora.yaml"
    file.write_text(MINI.read_text().replace("BASE", str(mini_run[0] / "sft" / "export")))
    return file


@pytest.fixture(scope="module")
def lora_run(config, tmp_path_factory, train_process):
    """A finished run of every stage."""
    workdir = tmp_path_factory.mktemp("lora") / "run"
    process = train_process(f"workdir={workdir}", config=config)
    assert process.returncode == 0, process.stderr
    return workdir, process


def tensors(folder):
    file = "adapter_model.safetensors" if (folder / "adapter_config.json").exists() else "model.safetensors"
    found = Tensors(folder, folder / file)
    return {name: np.array(found[name]) for name in found.entries}


def test_every_stage_that_trains_leaves_its_adapter_and_a_model(lora_run):
    for name in TRAINED:
        folder = lora_run[0] / name
        assert (folder / "adapter" / "adapter_config.json").exists(), name
        assert (folder / "export" / ("adapter_config.json" if name == "reward" else "config.json")).exists(), name
    for name, kind in (("sft", "lm"), ("ppo_lag", "lm"), ("cost", "score")):
        merged = flatten_dict(hf.load(lora_run[0] / name / "export", kind)[1]["params"])
        opened = flatten_dict(hf.load(lora_run[0] / name / "adapter", kind)[1]["params"])
        assert merged.keys() == opened.keys()
        for path, leaf in merged.items():
            np.testing.assert_allclose(leaf, opened[path], atol=1e-6)


def test_adapters_have_moved_and_the_base_has_not(lora_run, mini_run):
    base = tensors(mini_run[0] / "sft" / "export")
    for name in ("sft", "ppo_lag"):
        ours = tensors(lora_run[0] / name / "export")
        changed = {key for key in base if not np.array_equal(base[key], ours[key])}
        assert changed
        assert all(".layers.1." in key and key.endswith("proj.weight") for key in changed), changed


def test_checkpoints_hold_adapters_and_heads_only(lora_run, mini_run):
    size = lambda folder: sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())  # noqa: E731
    ours, whole = (size(run[0] / "ppo_lag" / "checkpoints") for run in (lora_run, mini_run))
    assert ours < 0.25 * whole


def networks_of(config, *overrides):
    run = Run(cfg.load_config(config, list(overrides)))
    stage = stage_of(run.config, "ppo_lag")
    with jax.set_mesh(run.mesh):
        hp = hyperparameters(run, stage, {"cost": (0.0,)}, ("all",))
        return run, *build_networks(run, stage, hp)


def test_six_roles_share_one_base_that_is_found_by_content(lora_run, config, mini_run, tmp_path):
    copy = tmp_path / "the same"
    shutil.copytree(mini_run[0] / "sft" / "export", copy)
    (copy / "README.md").write_text("another file beside the weights")
    elsewhere = config.read_text().replace(
        f'reward\n    kind: reward\n    init_from: "path:{mini_run[0] / "sft" / "export"}"',
        f'reward\n    kind: reward\n    init_from: "path:{copy}"',
    )
    assert str(copy) in elsewhere
    file = tmp_path / "config.yaml"
    file.write_text(elsewhere)
    _, networks, state, frozen, _ = networks_of(file, f"workdir={lora_run[0]}")
    assert len(frozen.bases) == 1
    modules = [networks.policy, *networks.scorers.values(), *networks.critics.values()]
    assert {module.base for module in modules} == set(frozen.bases)
    assert state.actor.params.keys() == {"adapter"}
    assert all(critic.params.keys() == {"adapter", "head"} for critic in state.critics.values())
    assert frozen.reference.keys() == {"adapter"}  # that of `sft`


@pytest.mark.parametrize(("reference", "kept"), [("sft", "sft"), ("base", None)])
def test_kl_may_be_measured_from_another_policy_than_the_one_that_goes_on(lora_run, config, mini_run, reference, kept):
    begin, base = (
        f"path:{lora_run[0] / 'ppo_lag' / 'adapter'}",
        f"path:{os.path.relpath(mini_run[0] / 'sft' / 'export')}",
    )
    reference = base if reference == "base" else reference
    stage = [f"stages.ppo_lag.init_from={begin}", f"stages.ppo_lag.reference={reference}"]
    run, _, state, frozen, _ = networks_of(config, f"workdir={lora_run[0]}", *stage)
    for policy, params in ((kept, frozen.reference), ("ppo_lag", state.actor.params)):
        expected = {} if policy is None else opened(run, lora_run[0] / policy / "adapter")
        jax.tree.map(np.testing.assert_array_equal, products(params), products(expected))
    abstract, stage = AbstractRun(run.config, run.mesh), stage_of(run.config, "ppo_lag")
    with jax.set_mesh(run.mesh):
        _, _, shapes, _ = build_networks(abstract, stage, hyperparameters(abstract, stage, {"cost": (0.0,)}, ("all",)))
    assert jax.tree.structure(shapes.reference) == jax.tree.structure(frozen.reference)


def opened(run, folder):
    with jax.set_mesh(run.mesh):
        form = stage_of(run.config, "ppo_lag").adapters
        return trained(run.networks.read(f"path:{folder}", "lm", lora=form)[1]["params"])


def products(params):
    """A·B by kernel, of a rank that does not matter."""
    found = flatten_dict(params)
    pairs = {path[:-1]: (a, found[(*path[:-1], "lora_b")]) for path, a in found.items() if path[-1] == "lora_a"}
    return {path: [np.tensordot(a, b, 1) for a, b in zip(*pair, strict=True)] for path, pair in pairs.items()}


def test_a_reference_on_another_base_is_refused(lora_run, config, mini_run):
    other = f"stages.ppo_lag.reference=path:{mini_run[0] / 'ppo_lag' / 'export'}"
    with pytest.raises(cfg.ConfigError, match="another base than init_from 'sft'; with lora both stand on one"):
        networks_of(config, f"workdir={lora_run[0]}", other)


@pytest.mark.parametrize("whole", [False, True])
def test_networks_without_contents_are_those_of_the_run(lora_run, config, whole):
    overrides = [f"workdir={lora_run[0]}", "mesh.data=1", "mesh.fsdp=2", "mesh.decode=2", "mesh.tensor=2"]
    overrides += ["execution.gather_to_decode=true", f"execution.whole_base={str(whole).lower()}"]
    run, _, state, frozen, _ = networks_of(config, *overrides)
    abstract = AbstractRun(run.config, run.mesh)
    stage = stage_of(run.config, "ppo_lag")
    with jax.set_mesh(run.mesh):
        hp = hyperparameters(abstract, stage, {"cost": (0.0,)}, ("all",))
        _, theirs, kept, _ = build_networks(abstract, stage, hp)

    def described(tree):
        return jax.tree.map(lambda x: (x.shape, x.dtype, x.sharding.spec), tree)

    assert described(theirs) == described(state)
    assert described(kept.scorers) == described(frozen.scorers)
    assert described(list(kept.bases.values())) == described(list(frozen.bases.values()))
    split = [str([leaf.sharding.spec for leaf in jax.tree.leaves(tree)]) for tree in (frozen.bases, state.actor.params)]
    assert ["decode" in axes for axes in split] == [not whole, True]
    assert all("fsdp" in axes and "tensor" in axes for axes in split)


def test_a_base_is_quantised_once_for_all_roles_and_what_it_loses_is_said(lora_run, config, caplog):
    caplog.set_level("INFO")
    _, _, _, frozen, _ = networks_of(config, f"workdir={lora_run[0]}", "execution.base=int8")
    (base,) = frozen.bases.values()
    kernels = [x for x in jax.tree.leaves(base, is_leaf=is_quantized) if is_quantized(x)]
    assert kernels
    assert all(kernel.qvalue.dtype == np.int8 for kernel in kernels)
    assert len([line for line in caplog.messages if "base int8: relative error of the" in line]) == 1


def test_a_whole_base_on_a_mesh_without_decode_is_refused(config):
    with pytest.raises(cfg.ConfigError, match=r"execution.whole_base does nothing: mesh.decode is 1"):
        cfg.load_config(config, ["execution.whole_base=true"])


def test_a_quantised_base_without_adapters_is_refused():
    mini = MINI.with_name("mini.yaml")
    with pytest.raises(cfg.ConfigError, match="a base that is trained itself cannot be quantised"):
        cfg.load_config(mini, ["execution.base=int8"])


def test_whole_models_may_score_beside_adapters_each_on_a_base_of_its_own(lora_run, config, mini_run):
    whole = f"path:{mini_run[0] / 'reward' / 'export'}"
    overrides = (f"workdir={lora_run[0]}", f"stages.ppo_lag.reward_model={whole}")
    _, networks, _, frozen, _ = networks_of(config, *overrides)
    assert len(frozen.bases) == 2
    assert networks.scorers["reward"].base == networks.critics["reward"].base != networks.policy.base
    assert frozen.scorers["reward"]["params"].keys() == {"head"}


def test_a_killed_run_continues_to_the_same_bits(lora_run, config, tmp_path, train_process):
    again = tmp_path / "run"
    shutil.copytree(lora_run[0], again)
    for name in ("result.json", "checkpoints/4", "export", "adapter"):
        path = again / "ppo_lag" / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    process = train_process(f"workdir={again}", config=config)
    assert process.returncode == 0, process.stderr
    assert "continuing from step 2" in process.stderr + process.stdout
    for part in ("adapter", "export"):
        ours, theirs = tensors(lora_run[0] / "ppo_lag" / part), tensors(again / "ppo_lag" / part)
        assert ours.keys() == theirs.keys()
        assert all(np.array_equal(ours[name], theirs[name]) for name in ours)


def test_a_checkpoint_is_continued_on_another_mesh(lora_run, config, tmp_path):
    from safe_rlhf_jax.train import main

    again = tmp_path / "run"
    shutil.copytree(lora_run[0], again)
    for name in ("result.json", "checkpoints/4", "export", "adapter"):
        path = again / "ppo_lag" / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    for name in ("best", "merged", "dual", "evaluate"):  # finished: their folders stay
        assert (again / name / "result.json").exists()
    mesh = ("mesh.data=2", "mesh.fsdp=2", "mesh.decode=2", "mesh.tensor=1")
    mesh += ("execution.gather_to_decode=true", "execution.whole_base=true")
    assert main(["--config", str(config), f"workdir={again}", *mesh]) in (None, 0)
    ours, theirs = tensors(lora_run[0] / "ppo_lag" / "adapter"), tensors(again / "ppo_lag" / "adapter")
    assert ours.keys() == theirs.keys()
    for name in ours:  # two steps apart, on other responses where rounding turned a token
        np.testing.assert_allclose(ours[name], theirs[name], atol=5e-3)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("stages.sft.lora.rank=0", "rank.*greater than 0"),
        ("stages.sft.lora.targets=[q_prj]", "no layer has 'q_prj'.*did you mean 'q_proj'"),
        ("stages.sft.init_from=preset:tiny", "a network without training"),
        ("stages.ppo_lag.lora.rank=3", "reward|init_from names 'sft', whose adapter does not fit.*rank 4"),
        ("stages.ppo_lag.lora.targets=[q_proj]", "does not fit.*lora.targets"),
        ("stages.ppo_lag.lora.dropout=0.1", "would measure the dropout"),
    ],
)
def test_adapters_that_cannot_be_trained_are_refused_in_one_line(config, override, message):
    with pytest.raises(cfg.ConfigError, match=f"(?s){message}"):
        cfg.load_config(config, [override])


def test_more_layers_than_the_model_has_are_refused(config):
    run = Run(
        cfg.load_config(
            config,
            ["stages.sft.lora.layers=9", *(f"stages.{name}.lora.layers=9" for name in ("dpo", "ppo_lag", "best"))],
        )
    )
    stage = stage_of(run.config, "sft")
    with pytest.raises(cfg.ConfigError, match="the model has 2 layers"), jax.set_mesh(run.mesh):
        run.networks.to_train(stage, stage.init_from, "lm")


def test_a_form_holds_what_fits():
    form = Lora(8, 16.0, ("q_proj", "v_proj"), 2)
    assert form.holds(Lora(4, 1.0, ("q_proj",), 1)) is None
    assert "rank 9" in form.holds(Lora(9, 1.0, ("q_proj",), 1))
    assert "k_proj" in form.holds(Lora(8, 1.0, ("k_proj",), 1))
    assert "layers" in form.holds(Lora(8, 1.0, ("q_proj",), None))
