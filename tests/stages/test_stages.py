"""Stages: what decides whether one runs again, and steps that compile once."""

from collections import Counter
from pathlib import Path

import chex
import jax
import jax.numpy as jnp
import pytest

from safe_rlhf_jax import config as cfg
from safe_rlhf_jax.models.safetensors_io import Tensors
from safe_rlhf_jax.rl.algorithms import ALGORITHMS
from safe_rlhf_jax.sharding import replicated
from safe_rlhf_jax.stages import Run, reinforcement, unused
from safe_rlhf_jax.stages.datasets import load_data
from safe_rlhf_jax.stages.kinds import KINDS
from safe_rlhf_jax.stages.supervised import build_supervised
from tests.helpers import compilations, stage_of

MINI = Path(__file__).parent.parent / "configs" / "mini.yaml"


def hashes(*overrides):
    return Run(cfg.load_config(MINI, overrides)).hashes


def changed(*overrides):
    before, after = hashes(), hashes(*overrides)
    return {name for name in before if before[name] != after[name]}


def test_change_of_a_stage_reaches_the_stages_that_use_it_and_no_others():
    assert changed("workdir=elsewhere", "title=other") == set()
    assert changed("stages.cost.epochs=2") == {"cost", "ppo_lag", "evaluate"}
    assert changed("stages.evaluate.top_k=3") == {"evaluate"}
    assert changed("seed=1") == {"sft", "reward", "cost", "ppo_lag", "evaluate"}


def test_kl_is_measured_from_the_reference_if_one_is_named(mini_run):
    begin = f"stages.ppo_lag.init_from=path:{mini_run[0] / 'ppo_lag' / 'export'}"

    def networks(*overrides):
        run = Run(cfg.load_config(MINI, [f"workdir={mini_run[0]}", begin, *overrides]))
        stage = stage_of(run.config, "ppo_lag")
        with jax.set_mesh(run.mesh):
            hp = reinforcement.hyperparameters(run, stage, {"cost": (0.0,)}, ("benign", "risky", "sensitive"))
            _, state, frozen, _ = reinforcement.build_networks(run, stage, hp)
            return run.networks.read("sft", "lm")[1]["params"], state.actor.params, frozen.reference

    sft, actor, reference = networks("stages.ppo_lag.reference=sft")
    chex.assert_trees_all_equal(reference, sft)
    chex.assert_trees_all_equal(networks()[2], actor)
    assert any((a != b).any() for a, b in zip(jax.tree.leaves(actor), jax.tree.leaves(sft), strict=True))
    assert changed("stages.ppo_lag.reference=sft") == {"ppo_lag", "evaluate"}
    with pytest.raises(cfg.ConfigError, match=r"reference does nothing: the actor makes the reference"):
        cfg.load_config(MINI, ["stages.ppo_lag.reference=sft", "stages.ppo_lag.algorithm.kl.average=0.1"])


def test_packing_is_no_change_of_a_result_and_has_no_use_for_grouping():
    assert changed("stages.cost.packing=true") == set()
    with pytest.raises(cfg.ConfigError, match="group_by_length has no use with packing"):
        cfg.load_config(MINI, ["stages.cost.packing=true", "stages.cost.group_by_length=true"])


@pytest.mark.parametrize(("name", "microbatches"), [("sft", 1), ("reward", 1), ("cost", 2)])
def test_a_stage_takes_the_same_steps_with_packing_in_fewer_columns(tmp_path, name, microbatches):
    def trained(packing):
        folder = f"stages.{name}.init_from=preset:tiny"
        overrides = [f"workdir={tmp_path}", folder, f"stages.{name}.microbatches={microbatches}"]
        run = Run(cfg.load_config(MINI, [*overrides, f"stages.{name}.packing={packing}"]))
        stage = stage_of(run.config, name)
        (task,) = KINDS[stage.kind].run.args
        data = load_data(run, stage, "data")
        batches = run.batches(data, stage.batch_size, 0, None, False, microbatches if packing else None)
        _, state, frozen, step = build_supervised(task, run, stage, 2)
        for i in range(2):
            state, metrics = step(state, frozen, batches(i), jax.random.key(0))
        columns = batches(0).packing.sources.size if packing else data.width * stage.batch_size * task.sides
        return jax.device_get(metrics), columns

    with jax.set_mesh(Run(cfg.load_config(MINI, [f"workdir={tmp_path}"])).mesh):
        (plain, columns), (packed, fewer) = trained(False), trained(True)
    assert fewer < 0.8 * columns
    for metric, value in plain.items():
        assert abs(packed[metric] - value) < 1e-3 * (1 + abs(value)), metric


def test_change_of_a_data_file_is_a_change_of_its_stage(tmp_path):
    file = tmp_path / "data.jsonl"
    file.write_text('{"prompt": "a"}\n')
    override = f"stages.ppo_lag.prompts.name={file}"
    before = hashes(override)
    file.write_text('{"prompt": "b"}\n')
    after = hashes(override)
    assert {name for name in before if before[name] != after[name]} == {"ppo_lag", "evaluate"}


def test_folder_is_moved_to_a_name_that_is_free(tmp_path):
    assert unused(tmp_path / "a") == tmp_path / "a"
    (tmp_path / "a").mkdir()
    (tmp_path / "a.2").mkdir()
    assert unused(tmp_path / "a") == tmp_path / "a.3"


@pytest.mark.parametrize("fuse", [True, False])
def test_second_step_does_not_recompile_and_nothing_is_transferred(mini_run, fuse):
    overrides = [f"workdir={mini_run[0]}", f"stages.ppo_lag.fuse={fuse}"]
    run = Run(cfg.load_config(MINI, overrides))
    stage = stage_of(run.config, "ppo_lag")
    prompts = load_data(run, stage, "prompts")
    batch = reinforcement.prompt_batches(run, stage, prompts, 0)
    with jax.set_mesh(run.mesh):
        limits, groups = {"cost": (0.0,)}, ("benign", "risky", "sensitive")
        hp = reinforcement.hyperparameters(run, stage, limits, groups)
        networks, state, frozen, _ = reinforcement.build_networks(run, stage, hp)
        step = reinforcement.compile_step(run, stage, networks, ALGORITHMS["ppo_lag"], hp, state)
        batches, keys = [batch(i) for i in range(3)], jax.random.split(jax.random.key(0), 3)
        keys = [jax.device_put(key, replicated(run.mesh)) for key in keys]
        state, _ = step(state, frozen, batches[0], keys[0])
        with compilations() as found, jax.transfer_guard("disallow"):
            for i in (1, 2):
                state, _ = step(state, frozen, batches[i], keys[i])
        assert not found
    assert int(state.step) == 3


def test_frozen_networks_in_the_dtype_of_the_matmuls_score_the_same():
    run = Run(cfg.load_config(MINI, ["execution.dtype=bfloat16"]))
    tokens = jnp.arange(24, dtype=jnp.int32).reshape(2, 12)
    mask = jnp.ones((2, 12), bool)
    with jax.set_mesh(run.mesh):
        module, variables = run.networks.open("preset:tiny", "score", score_type="reward")
        frozen = variables | {"params": run.networks.only_read(variables["params"])}
        apply = jax.jit(module.apply)
        assert (apply(variables, tokens, mask) == apply(frozen, tokens, mask)).all()
    size = lambda tree: sum(leaf.nbytes for leaf in jax.tree.leaves(tree))  # noqa: E731
    assert size(frozen["params"]) < 0.51 * size(variables["params"])


def test_a_folder_is_read_once_however_many_networks_start_from_it(mini_run, monkeypatch):
    """The models of a run: a policy, and scorers from which critics start."""
    run = Run(cfg.load_config(MINI, [f"workdir={mini_run[0]}"]))
    stage, read = stage_of(run.config, "ppo_lag"), []
    get = Tensors.__getitem__
    monkeypatch.setattr(Tensors, "__getitem__", lambda self, name: read.append((self.folder, name)) or get(self, name))

    with jax.set_mesh(run.mesh):
        for reference, head in ((stage.init_from, "lm"), (stage.reward_model, "score"), (stage.cost_model, "score")):
            run.networks.open(reference, head)
        alone = Counter(read)
        read.clear()
        hp = reinforcement.hyperparameters(run, stage, {"cost": (0.0,)}, ("benign", "risky", "sensitive"))
        _, state, frozen, _ = reinforcement.build_networks(run, stage, hp)
    assert set(state.critics) == {"reward", "cost"}
    assert Counter(read) == alone
    critic, scorer = state.critics["cost"].params, frozen.scorers["cost"]["params"]
    chex.assert_trees_all_equal(critic, scorer)
    assert not any(a is b for a, b in zip(jax.tree.leaves(critic), jax.tree.leaves(scorer), strict=True))
