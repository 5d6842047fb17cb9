"""The command that compiles ahead of time: what it reports, when it refuses, and that its advice is right."""

import importlib.util
import json
import re
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
import yaml
from flax.traverse_util import flatten_dict

from safe_rlhf_jax import compile as compile_command
from safe_rlhf_jax import config as cfg
from safe_rlhf_jax.aot import chips, search
from safe_rlhf_jax.aot.compile import step_flops, training_of
from safe_rlhf_jax.aot.flops import forward_flops
from safe_rlhf_jax.aot.run import AbstractRun
from safe_rlhf_jax.config import load_config
from safe_rlhf_jax.sharding import make_mesh
from safe_rlhf_jax.stages.common import Run
from safe_rlhf_jax.stages.host_signals import open_scorers
from safe_rlhf_jax.stages.reinforcement import build_networks, hyperparameters
from safe_rlhf_jax.stages.rejection import build_fine_tuning
from safe_rlhf_jax.stages.sampling import sampler_of
from tests.helpers import make_lm, stage_of, tiny_config

ROOT = Path(__file__).parent.parent.parent
MINI = Path(__file__).parent.parent / "configs" / "mini.yaml"
MEBI = 2**20


@pytest.fixture
def compile_mini(tmp_path, capsys):
    """Runs the command on one stage of the mini config; returns exit status, output, error and the JSON."""

    def run(*arguments, stage="sft"):
        file = tmp_path / "report.json"
        status = compile_command.main(
            ["--config", str(MINI), "--topology", "local", "--stage", stage, "--json", str(file), *arguments]
        )
        output = capsys.readouterr()
        return status, output.out, output.err, json.loads(file.read_text()) if file.exists() else None

    return run


@pytest.fixture
def small_chip(monkeypatch):
    """Gives the CPU devices the memory of a chip with so many bytes."""

    def install(hbm):
        monkeypatch.setitem(chips.CHIPS, "cpu", chips.Chip("test", 1e12, hbm, 1e11, 1e10, 0))

    return install


def test_the_report_has_memory_phases_and_collectives(compile_mini):
    status, table, _, report = compile_mini("mesh.fsdp=4", "mesh.tensor=2")
    assert status == 0
    (stage,) = report["stages"]
    (program,) = stage["programs"]
    assert stage["mesh"] == {"data": 1, "fsdp": 4, "decode": 1, "tensor": 2}
    assert program["memory"]["total"] > program["memory"]["argument"] > 0
    assert program["memory"]["capacity"] is None
    assert program["phases"]["step"]["flops"] > 0
    assert {row["axes"] for row in program["collectives"]} >= {"fsdp", "tensor"}
    assert "projected" not in stage  # a CPU is no chip of the table
    assert "HBM per device" in table
    assert "all-gather" in table


def test_a_known_chip_gives_a_projection_that_is_marked(compile_mini, small_chip):
    small_chip(2**40)
    status, table, _, report = compile_mini()
    assert status == 0
    projected = report["stages"][0]["projected"]
    seconds = report["stages"][0]["programs"][0]["phases"]["step"]["projected_seconds"]
    assert projected["step_seconds"] == seconds["phase"] == max(seconds.values())
    assert projected["tokens_per_second"] == pytest.approx(32 * 48 / projected["step_seconds"])
    assert 0 < projected["mfu"] < 1
    assert "projected, not measured" in table


@pytest.mark.slow
def test_what_does_not_fit_exits_with_1_and_the_advice_followed_fits(compile_mini, small_chip):
    settings = ("mesh.data=8",)
    _, _, _, report = compile_mini(*settings)
    memory = report["stages"][0]["programs"][0]["memory"]
    small_chip(memory["total"] - memory["temporary"] // 4)
    status, table, _, report = compile_mini(*settings)
    assert status == 1
    assert "does not fit" in table
    advice = report["stages"][0]["advice"]["overrides"]
    assert "fits with" in table
    status, _, _, report = compile_mini(*settings, *advice)
    assert status == 0
    assert report["stages"][0]["fits"]


@pytest.mark.slow
def test_search_lists_what_fits_best_first(compile_mini, small_chip):
    small_chip(2**40)
    status, table, progress, report = compile_mini("--search", "--meshes=2", "stages.sft.batch_size=8")
    assert status == 0
    found = report["stages"][0]["feasible"]
    assert len({variant["overrides"][1] for variant in found}) == 2
    seconds = [variant["projected"]["step_seconds"] for variant in found]
    assert seconds == sorted(seconds)
    assert all("execution.remat=none" in variant["overrides"] for variant in found)
    assert "execution.remat=none" in table
    assert progress.count(" GiB (") == 2


@pytest.mark.parametrize(
    ("capacity", "batch_size", "beside", "fits", "compiled"),
    [
        # It holds 100, and what stands beside; none needs 800 more, dots 400, full 100, with k microbatches a k-th.
        (1000, 64, 0, ["none 1"], ["none 1"]),
        (550, 64, 0, ["none 2", "dots 1"], ["none 1", "none 2", "dots 1"]),
        (250, 64, 0, ["none 8", "dots 4", "full 1"], ["none 1", "none 8", "dots 1", "dots 4", "full 1"]),
        (130, 64, 0, ["full 4"], ["none 1", "dots 1", "full 1", "full 4"]),
        (110, 64, 0, [], ["none 1", "dots 1", "full 1"]),
        (150, 512, 60, [], ["none 1", "none 32", "dots 1", "dots 16", "full 1", "full 4"]),
        (90, 64, 0, [], []),
    ],
)
def test_search_walks_to_the_fewest_microbatches_and_leaves_out_what_cannot_fit_or_is_beaten(
    monkeypatch, small_chip, capacity, batch_size, beside, fits, compiled
):
    done = []

    def compile_stage(config, stage, devices):
        done.append(f"{config.execution.remat} {stage.microbatches}")
        total = 100 + beside + {"none": 800, "dots": 400, "full": 100}[config.execution.remat] // stage.microbatches
        return {"fits": total <= capacity, "programs": [{"memory": {"total": total}}]}

    small_chip(capacity)
    monkeypatch.setattr(search, "compile_stage", compile_stage)
    monkeypatch.setattr(search, "held_bytes", lambda run, stage: 100)
    config = load_config(MINI, [f"stages.sft.batch_size={batch_size}"])
    found = search.variants(config, config.stages[0], jax.devices(), cfg.Mesh(data=8))
    assert [" ".join(o.rpartition("=")[2] for o in variant["overrides"][4:6]) for variant in found] == fits
    assert done == compiled


def test_where_nothing_fits_gathered_to_decode_the_advice_is_not_to_gather(monkeypatch):
    def compile_stage(config, stage, devices):
        fits = not config.execution.gather_to_decode and stage.microbatches >= 2
        return {"fits": fits, "programs": [{"memory": {"total": 0}}]}

    monkeypatch.setattr(search, "compile_stage", compile_stage)
    config = load_config(MINI, ["execution.gather_to_decode=true", "mesh.data=8", "stages.ppo_lag.batch_size=64"])
    stage = next(stage for stage in config.stages if stage.kind == "rl")
    advice = search.advise(config, stage, jax.devices())
    assert "execution.gather_to_decode=false" in advice["overrides"]
    assert f"stages.{stage.name}.microbatches=2" in advice["overrides"]


@pytest.mark.parametrize(
    ("override", "message"),
    [
        (
            "mesh.tensor=8",
            "num_heads 4, which does not divide into the mesh's tensor = 8; nearest tensor sizes that do: 4",
        ),
        ("mesh.tensor=4", "vocab_size 390, which does not divide.*tensor = 4; nearest tensor sizes that do: 3 or 5"),
        ("stages.sft.batch_size=12", "batch_size 12 does not divide.*nearest batches that do: 8 or 16"),
        ("assume=tinny", "assume: preset 'tinny' is unknown.*tiny"),
    ],
)
def test_what_does_not_divide_or_exist_is_refused_in_one_line(compile_mini, override, message):
    status, _, error, _ = compile_mini(override)
    assert status == 1
    assert error.count("\n") == 1
    assert re.search(message, error), error


def test_a_stage_that_is_not_there_is_refused_with_those_that_are(compile_mini):
    status, _, error, _ = compile_mini(stage="evaluate")
    assert status == 1
    assert "['sft', 'reward', 'cost', 'ppo_lag']" in error


def test_help_starts_no_accelerator():
    code = (
        "import sys\nfrom safe_rlhf_jax.compile import parse_arguments\n"
        "try: parse_arguments(['--help'])\nfinally: print(*sys.modules)"
    )
    process = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert "--topology" in process.stdout
    assert "jax" not in process.stdout.split()


@pytest.fixture(scope="module")
def mini(tmp_path_factory):
    return load_config(MINI, [f"workdir={tmp_path_factory.mktemp('run')}", "mesh.fsdp=4", "mesh.tensor=2"])


def described(tree):
    return jax.tree.map(lambda x: (x.shape, x.dtype, x.sharding), tree)


def test_the_program_of_shapes_is_the_program_of_training(mini):
    """Same text before XLA optimises it, so the same after."""
    run, stage = Run(mini), stage_of(mini, "sft")
    with jax.set_mesh(run.mesh):
        (real,) = training_of(stage).programs(run, stage)
        (program,) = training_of(stage).programs(AbstractRun(mini, run.mesh), stage)
        state, step = real.arguments[0], real.function
        batch = jax.tree.map(lambda x: run.put(jnp.zeros(x.shape, x.dtype)), program.arguments[2])
        text = step.lower(state, real.arguments[1], batch, jax.random.key(0)).as_text()
        assert program.function.lower(*program.arguments).as_text() == text
    assert described(program.arguments[0]) == described(state)


@pytest.mark.slow
def test_abstract_networks_have_the_shapes_and_shardings_of_real_ones(mini):
    """Of an RL stage whose models all come from a preset."""
    models = dict.fromkeys(("init_from", "reward_model", "cost_model"), "preset:tiny")
    stage = stage_of(mini, "ppo_lag").model_copy(update=models)
    real, abstract = Run(mini), AbstractRun(mini, make_mesh((1, 4, 2)))
    with jax.set_mesh(real.mesh):
        groups = ("benign", "risky", "sensitive")
        hp = hyperparameters(real, stage, {"cost": (0.0,)}, groups)
        assert described(build_networks(real, stage, hp)[1:3]) == described(build_networks(abstract, stage, hp)[1:3])


def test_flops_of_an_update_are_three_forward_passes_and_four_with_full_rematerialisation(mini):
    run, stage = AbstractRun(mini, make_mesh((1, 4, 2))), stage_of(mini, "ppo_lag")
    assert step_flops(run, stage, recomputed=True) == step_flops(run, stage, recomputed=False)
    full = mini.model_copy(update={"execution": mini.execution.model_copy(update={"remat": "full"})})
    again = step_flops(AbstractRun(full, run.mesh), stage, recomputed=True)
    assert again["update"] == pytest.approx(4 / 3 * step_flops(run, stage, recomputed=False)["update"])


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*_*b/*.yaml")), ids=lambda p: str(p.relative_to(ROOT)))
def test_configs_for_pods_are_valid_and_name_what_they_need(path):
    text = path.read_text()
    assert text.startswith("# ")
    assert "python -m safe_rlhf_jax.compile --config" in text
    config = load_config(path)
    assert yaml.safe_load(text)["assume"] == config.assume
    with jax.set_mesh(mesh := make_mesh((1, 1, 8))):
        run = AbstractRun(config.model_copy(update={"mesh": config.mesh.model_copy(update={"fsdp": 1})}), mesh)
        for stage in config.stages:
            assert next(iter(training_of(stage).programs(run, stage))).arguments


@pytest.mark.tpu
def test_a_program_for_a_chip_that_is_too_small_is_refused_with_advice(compile_mini):
    """The compiler itself says that memory is exhausted."""
    status, table, _, _ = compile_mini(
        "--topology", "v5e:2x2", "stages.sft.init_from=preset:small", "stages.sft.batch_size=4096",
        "stages.sft.max_length=512", "execution.dtype=bfloat16", "execution.scan_layers=true",
    )  # fmt: skip
    assert status == 1
    assert "does not fit" in table
    assert "fits with" in table


@pytest.mark.tpu
@pytest.mark.parametrize("topology", ["v5e:8x8", "v5p:2x2x4", "v6e:8x8"])
def test_every_mesh_finds_its_place_on_a_torus(topology):
    """Also one with an axis as long as two of the torus, or as half of one."""
    devices = compile_command.topology_devices(topology, 1)
    for mesh in search.shapes(len(devices), decode=True):
        assert make_mesh((mesh.data, mesh.fsdp, mesh.tensor), devices, mesh.decode).size == len(devices)


@pytest.mark.tpu
@pytest.mark.parametrize(("name", "message"), [("v4:2x2x1", "two devices are not supported"), ("v5e:3x", "names are")])
def test_a_topology_that_cannot_be_is_refused_in_one_line(compile_mini, name, message):
    status, _, error, _ = compile_mini("--topology", name)
    assert status == 1
    assert error.count("\n") == 1
    assert message in error


@pytest.mark.tpu
def test_data_alone_crosses_slices(monkeypatch):
    devices = compile_command.topology_devices("v5e:2x2", 2)
    mesh = make_mesh((-1, 2, 2), devices)
    slices = [{device.slice_index for device in row.flat} for row in mesh.devices]
    assert slices == [{0}, {1}]
    with pytest.raises(ValueError, match=r"data 1 does not divide into the 2 slices.*multiple of 2"):
        make_mesh((1, 4, 2), devices)


def test_the_scaling_page_is_what_the_script_makes_of_the_figures():
    spec = importlib.util.spec_from_file_location("scaling", ROOT / "benchmarks" / "scaling.py")
    scaling = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(scaling)
    assert len(scaling.figures(scaling.RUNS)) == len(scaling.RUNS)
    assert (ROOT / "docs" / "scaling.md").read_text() == scaling.page()


@pytest.fixture
def sampling(tmp_path):
    """The rejection stage of its config, on models of a preset."""
    config = load_config(MINI.with_name("sampling.yaml"), [f"workdir={tmp_path}", "mesh.fsdp=4", "mesh.tensor=2"])
    models = dict.fromkeys(("init_from", "reward_model", "cost_model"), "preset:tiny")
    return config, config.stages[0].model_copy(update=models)


def test_programs_of_rejection_sampling_are_those_of_its_run(sampling):
    config, stage = sampling
    real = Run(config)
    with jax.set_mesh(real.mesh):
        sample, step = training_of(stage).programs(AbstractRun(config, real.mesh), stage)
        policy, variables = real.networks.open("preset:tiny", "lm")
        scorers = open_scorers(real, stage.scorers)
        assert described(sample.arguments[:2]) == described((variables["params"], scorers.variables))
        batch = jax.tree.map(lambda x: real.put(jnp.zeros(x.shape, x.dtype)), sample.arguments[2])
        own = sampler_of(real, stage, policy, scorers.modules)
        text = own.lower(variables["params"], scorers.variables, batch, sample.arguments[3]).as_text()
        assert sample.function.lower(*sample.arguments).as_text() == text
        state, _, _ = build_fine_tuning(real, stage, policy, variables["params"], 1000)
        assert described(step.arguments[0]) == described(state)
        assert step.arguments[2].tokens.shape == (stage.batch_size, 24 + 8)


def test_flops_of_rejection_sampling_are_generation_two_scorers_and_three_passes_over_what_is_selected(sampling):
    config, stage = sampling
    run = AbstractRun(config, make_mesh((1, 4, 2)))
    flops = step_flops(run, stage, recomputed=False)
    model = run.networks.config("preset:tiny")
    assert flops["scoring"] == 2 * forward_flops(model, 16 * 4, 32, 0)
    assert flops["step"] == 3 * forward_flops(model, 8, 32, 32)


def test_rejection_sampling_is_reported_by_phase_and_the_dual_is_not_compiled(capsys, tmp_path):
    config = str(MINI.with_name("sampling.yaml"))
    models = [f"stages.0.{name}=preset:tiny" for name in ("init_from",)]
    models += [f"stages.0.{name}=path:absent" for name in ("reward_model", "cost_model")]
    arguments = ["--config", config, "--topology", "local", f"workdir={tmp_path}", "assume=tiny", *models]
    file = tmp_path / "report.json"
    assert compile_command.main([*arguments, "--stage", "rejection", "--json", str(file)]) == 0
    (stage,) = json.loads(file.read_text())["stages"]
    assert [list(program["phases"]) for program in stage["programs"]] == [["generation", "scoring"], ["step"]]
    assert compile_command.main([*arguments, "--stage", "dual"]) == 1
    assert (
        "no training stage of this config; there are ['rejection_round_1', 'rejection', 'ppo_lag']"
        in capsys.readouterr().err
    )


@pytest.mark.parametrize("gated", [True, False])
def test_flops_of_a_pass_are_those_of_its_matrices(gated):
    """Two for each weight of a matrix and token; attention's scores and sums beside them."""
    config = tiny_config(gated=gated, num_layers=3)
    params = flatten_dict(make_lm(config)[1]["params"])
    weights = sum(x.size for path, x in params.items() if "kernel" in path[-1] and "lm_head" not in path)
    scores = 2 * 2 * 3 * config.num_heads * config.head_dim * 16  # both products, of each of 16 tokens with all 16
    assert forward_flops(config, 5, 16, 0) == 5 * 16 * (2 * weights + scores)
