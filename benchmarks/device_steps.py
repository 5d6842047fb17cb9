"""The steps of benchmarks/device.py: each yields what it finds as soon as it is found, and raises where it is wrong.

python -m benchmarks.device_steps NAME --work FOLDER [--seconds N] [--small]
"""

import argparse
import dataclasses
import functools
import importlib.metadata
import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import yaml

from benchmarks import attention as fused
from benchmarks import rl_step
from benchmarks.device import ROOT, STEPS
from safe_rlhf_jax.aot.chips import chip_of
from safe_rlhf_jax.metrics import read_jsonl
from safe_rlhf_jax.models import hf
from safe_rlhf_jax.rl.rollout import score_rollout
from safe_rlhf_jax.rl.step import collect

Found = Iterator[dict[str, Any]]
PACKAGES = ("jaxlib", "flax", "optax", "orbax-checkpoint", "numpy", "transformers", "tokenizers", "pydantic", "grain")
BFLOAT16_ERROR = 0.12  # ‖a − b‖/max(‖b‖, √n) after three updates in bfloat16: twice the largest that a CPU has
ATTENTION_ERROR = 0.02  # of attention alone: products of bfloat16 err by 0.002, what is summed in it too by 0.014


class Wrong(Exception):
    """A step ran, and what it found is not as it has to be."""


class Skip(Exception):
    """A step cannot run here."""


# --- facts ------------------------------------------------------------------------------------------------------------


def facts(options: argparse.Namespace) -> Found:
    """Hardware, versions, and the ceilings of matrix products and memory."""
    device = jax.devices()[0]
    yield rl_step.environment() | {
        "platform": jax.default_backend(),
        "devices": jax.device_count(),
        "python": sys.version.split()[0],
        "packages": {name: importlib.metadata.version(name) for name in PACKAGES},
        "environment": {k: v for k, v in os.environ.items() if k.startswith(("JAX_", "XLA_", "NVIDIA_", "CUDA_"))},
        "compute_capability": getattr(device, "compute_capability", None),
        "memory_limit_bytes": (device.memory_stats() or {}).get("bytes_limit"),
        "chip": (chip := chip_of(device)) and vars(chip),
    }
    if shutil.which("nvidia-smi"):
        query = ["nvidia-smi", "--query-gpu=name,driver_version,memory.total,clocks.max.sm,power.limit", "--format=csv"]
        yield {"nvidia_smi": subprocess.run(query, capture_output=True, text=True, check=False).stdout.splitlines()}
        if jax.default_backend() != "gpu":
            raise Wrong(f"there is a GPU, but JAX runs on {jax.default_backend()}: all that follows says nothing of it")
    yield {"matmul_flops_per_second": {dtype: rl_step.matmul_peak(dtype) for dtype in ("bfloat16", "float32")}}
    with jax.default_matmul_precision("float32"):
        yield {"true_float32_matmul_flops_per_second": rl_step.matmul_peak("float32")}
    array = jnp.ones((2**22 if options.small else 2**30,), jnp.float32)
    seconds = rl_step.seconds(functools.partial(jax.jit(lambda x: x + 1), array), 10)
    yield {
        "memory_bytes_per_second": 2 * array.nbytes / seconds,
        "summary": f"{device.device_kind}, jax {jax.__version__}",
    }


# --- tests of this project --------------------------------------------------------------------------------------------


class Comparisons:
    """A pytest plugin: how far the numbers of each test are from those it expects, instead of stopping at the first."""

    def __init__(self, largest_error: float | None):
        self.largest_error = largest_error  # ‖a − b‖/max(‖b‖, √n), "relative"; None: the tolerances of the tests
        self.test = ""
        self.found: dict[str, dict[str, Any]] = {}
        self.outcomes: dict[str, int] = {}
        self.failures: dict[str, str] = {}

    def pytest_runtest_setup(self, item: Any) -> None:
        """Remembers which test runs."""
        self.test = item.originalname

    def pytest_runtest_logreport(self, report: Any) -> None:
        """Counts outcomes."""
        if report.when == "call" or report.failed:
            self.outcomes[report.outcome] = self.outcomes.get(report.outcome, 0) + 1
        if report.failed:
            self.failures[report.nodeid] = str(report.longrepr)[-600:]

    def assert_allclose(self, actual: Any, desired: Any, rtol: float = 1e-7, atol: float = 0, **_: Any) -> None:
        """Stands in for that of numpy.testing."""
        actual, desired = (np.asarray(x, np.float64) for x in (actual, desired))
        error = np.abs(actual - desired)
        norm = np.linalg.norm(np.broadcast_to(desired, error.shape))
        relative = np.linalg.norm(error) / max(norm, error.size**0.5)
        within = (error <= atol + rtol * np.abs(desired)).all()
        if self.largest_error is not None:
            within = relative <= self.largest_error
        row = self.found.setdefault(self.test, {"largest": 0.0, "relative": 0.0, "comparisons": 0, "beyond": 0})
        row["largest"] = float(np.maximum(row["largest"], error.max(initial=0)))  # NaN stays
        row["relative"] = float(np.maximum(row["relative"], relative))
        row["comparisons"] += 1
        row["beyond"] += int(not within)


def run_tests(arguments: list[str], plugin: Comparisons, folder: pathlib.Path) -> None:
    """Runs tests on the devices that are here; without tests/conftest.py, which asks for a CPU."""
    import pytest

    folder.mkdir(parents=True, exist_ok=True)
    (folder / "pytest.ini").write_text("[pytest]\nmarkers =\n    slow\n    tpu\n    reference\n    distributed\n")
    common = ["-q", "--noconftest", "-c", str(folder / "pytest.ini"), "--rootdir", str(ROOT), "--import-mode=importlib"]
    pytest.main(
        [
            *common,
            "-p",
            "no:cacheprovider",
            "--disable-warnings",
            "--tb=short",
            f"--basetemp={folder / 'tmp'}",
            *arguments,
        ],
        [plugin],
    )


def parity(options: argparse.Namespace, dtype: str) -> Found:
    """Golden values, the trajectory and the families of tests/golden through this device, with errors as numbers."""
    if dtype == "bfloat16":
        load = hf.load

        def load_in_bfloat16(*args: Any, **kwargs: Any) -> Any:
            """As training does: matmuls in bfloat16, parameters in float32."""
            module, variables = load(*args, **kwargs)
            return module.clone(config=dataclasses.replace(module.config, dtype=dtype)), variables

        hf.load = load_in_bfloat16
    plugin = Comparisons(BFLOAT16_ERROR if dtype == "bfloat16" else None)
    np.testing.assert_allclose = plugin.assert_allclose
    families = "llama- or gemma2 or gpt2" if options.small else "unrolled or llama-"
    for file, chosen in (
        ("tests/rl/test_parity.py", "reference"),
        ("tests/test_objectives.py", "equal_the_reference"),
        ("tests/models/test_families.py", f"equal_those_of_transformers and ({families})"),
    ):
        run_tests([file, "-k", chosen], plugin, options.work / options.name)
        yield {"errors": plugin.found, "outcomes": plugin.outcomes, "failures": plugin.failures}
    largest = max((row["relative"] for row in plugin.found.values()), default=float("nan"))
    beyond = {name: row["beyond"] for name, row in plugin.found.items() if row["beyond"]}
    yield {"summary": f"{sum(plugin.outcomes.values())} tests, largest relative error {largest:.1e}"}
    if beyond or plugin.failures or not plugin.found:
        raise Wrong(f"beyond tolerance: {beyond}; failed: {sorted(plugin.failures)}")


MACHINERY = {
    "tests/rl/test_step.py": "second_step or donated or transfers_nothing or collect_then_learn",
    "tests/inference/test_stream.py": "stream_gives",
    "tests/inference/test_generate.py": "of_the_sampler or most_probable or compiles_once or more_left_padding",
    "tests/models/test_hf.py": "survives_saving and (odd or normalised) or bfloat16_files",
}


def machinery(options: argparse.Namespace) -> Found:
    """One compilation, donation, no transfers, decoding, streaming, saving and loading: tests of this project."""
    plugin = Comparisons(None)
    for file, chosen in MACHINERY.items():
        run_tests([file, "-k", chosen], plugin, options.work / options.name)
        yield {"outcomes": plugin.outcomes, "failures": plugin.failures}
    yield {"summary": ", ".join(f"{count} {outcome}" for outcome, count in plugin.outcomes.items())}
    if plugin.failures or not plugin.outcomes:
        raise Wrong(f"failed: {sorted(plugin.failures)}")


# --- attention --------------------------------------------------------------------------------------------------------


def attention(options: argparse.Namespace) -> Found:
    """Fused against plain attention: errors of outputs and gradients against float32, and times."""
    wrong = []
    for name, shape in (fused.SMALL_SHAPES if options.small else fused.SHAPES).items():
        try:
            result = fused.compare(*shape)
            if not result["fused"]["error"] <= ATTENTION_ERROR or (result["gpu"] and result["kernel"] != "cudnn"):
                wrong.append(name)
        except Exception as error:
            result = {"error": f"{type(error).__name__}: {str(error)[-600:]}"}
            wrong.append(name)
        yield {name: result}
    yield {"summary": f"{', '.join(wrong) or 'no shape'} wrong"}
    if wrong:
        raise Wrong(f"wrong: {wrong}")


# --- iterations -------------------------------------------------------------------------------------------------------

SMALL_MODEL = {
    "vocab_size": 256, "hidden_size": 64, "intermediate_size": 128, "num_layers": 2, "num_heads": 4,
    "num_kv_heads": 2, "head_dim": 16,
}  # fmt: skip


def spec_of(config: str, small: bool) -> dict[str, Any]:
    """Sizes of benchmarks/configs, or small ones that differ in the rest as those do."""
    spec = yaml.safe_load((ROOT / "benchmarks" / "configs" / f"{config}.yaml").read_text())
    if small:
        spec |= {"batch_size": 16, "prompt_length": 16, "response_length": 16, "model": spec["model"] | SMALL_MODEL}
    return spec


def rl(options: argparse.Namespace, config: str, repeats: int) -> Found:
    """An iteration of PPO-Lagrangian by phase, and its memory beside what the compiler said."""
    spec = spec_of(config, options.small)
    yield {"config": spec}
    result: dict[str, Any] = {}
    for part in rl_step.measure(spec, repeats, recompute=True):
        result |= part
        yield part
        if "seconds" in part:
            seconds = ", ".join(f"{phase} {value:.3g} s" for phase, value in result["seconds"].items())
            peak, said = (x / 2**30 for x in (result["peak_memory_bytes"], result["compiler"]["memory"]["total"]))
            rate = f"MFU {result['mfu']:.1%}; " if "mfu" in result else ""
            yield {"summary": f"{rate}{seconds}; {peak:.1f} GiB at the peak, {said:.1f} by the compiler"}


def sampler_gap(options: argparse.Namespace) -> Found:
    """How far the sampler's log-probabilities are from the learner's, by dtype, on random weights."""
    gaps = {}
    for name, dtype, precision in (
        ("bfloat16", "bfloat16", None),
        ("float32", "float32", None),
        ("true_float32", "float32", "float32"),
    ):
        spec = spec_of("rl_step_tiny", options.small)
        spec["model"] |= {"dtype": dtype, "initializer_range": 0.1}  # large enough that tokens differ in probability
        networks, hp, state, frozen, prompts = rl_step.build(spec, True)
        options_of = {"temperature": 1.0, "recompute_log_probs": True, "slices": 1}

        @jax.jit
        def gap(state: Any, key: jax.Array, networks: Any = networks, hp: Any = hp, frozen: Any = frozen,
                prompts: Any = prompts, options_of: Any = options_of) -> Any:  # fmt: skip
            rollout = collect(networks, hp, state.actor.params, prompts, key)
            scored = score_rollout(networks, state, frozen, rollout, **options_of)
            difference = scored.log_probs - rollout.sampler_log_probs
            return jnp.abs(difference).mean(), jnp.abs(jnp.exp(difference) - 1).max(), -scored.log_probs.mean()

        with jax.default_matmul_precision(precision):
            mean, ratio, entropy = map(float, gap(state, jax.random.key(1)))
        gaps[name] = mean
        yield {name: {"sampler_gap": mean, "largest_ratio_gap": ratio, "entropy": entropy}}
    yield {"summary": ", ".join(f"{name} {gap:.1e}" for name, gap in gaps.items())}
    if not (gaps["true_float32"] < 1e-4 and gaps["bfloat16"] < BFLOAT16_ERROR):
        raise Wrong(f"sampler and learner differ: {gaps}")


# --- command lines ----------------------------------------------------------------------------------------------------


def python(*arguments: Any, **more: Any) -> subprocess.CompletedProcess:
    """Runs a Python command line here, its output with that of this step."""
    process = subprocess.run([sys.executable, "-u", *map(str, arguments)], cwd=ROOT, text=True, **more)
    if process.returncode:
        print(f"exit status {process.returncode}: {arguments}")
    return process


def quickstart(options: argparse.Namespace, fresh: bool) -> Found:
    """The pipeline from records to a report, as far as the time allows; the same command continues it."""
    workdir = options.work / "runs" / "quickstart"
    if fresh:
        shutil.rmtree(workdir, ignore_errors=True)
    config = "tests/configs/mini.yaml" if options.small else "configs/quickstart.yaml"
    command = [sys.executable, "-u", "-m", "safe_rlhf_jax.train", "--config", config, f"workdir={workdir}"]
    started = time.monotonic()
    process = subprocess.Popen(command, cwd=ROOT)
    try:
        process.wait(max(options.seconds - 20, 1))
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGTERM)  # saves at the next step
        process.wait()
    yield {"exit_status": process.returncode, "train_seconds": time.monotonic() - started}
    yield {"last_steps": {path.parent.name: read_jsonl(path)[-1] for path in workdir.glob("*/metrics.jsonl")}}
    stages = {path.parent.name: json.loads(path.read_text()) for path in workdir.glob("*/result.json")}
    yield {"results": stages, "summary": f"finished: {', '.join(stages) or 'no stage'}"}
    if "evaluate" in stages:
        metrics = stages["evaluate"]["metrics"]
        policies = [name.removesuffix("/harm_rate") for name in metrics if name.endswith("/harm_rate")]
        harm = {name: (metrics[f"{name}/harm_rate"], metrics[f"{name}/helpfulness_benign"]) for name in policies}
        yield {"summary": ", ".join(f"{name} harms {a:.0%}, helps {b:.2f}" for name, (a, b) in harm.items())}
    if process.returncode not in (0, 143, -signal.SIGTERM):
        raise Wrong(f"exit status {process.returncode}")


def resume(options: argparse.Namespace, only_gpu: bool = False) -> Found:
    """A run that is killed at step 5 and continued, against one that is not, and that against itself."""
    if only_gpu and jax.default_backend() != "gpu":
        raise Skip("needs a GPU")
    from tests.distributed.conftest import saved_models
    from tests.distributed.test_kills import CONFIG, KILL, results

    folder = options.work / "runs" / options.name
    shutil.rmtree(folder, ignore_errors=True)
    models = saved_models(folder / "models")

    def train(name: str, prelude: str = "") -> subprocess.CompletedProcess:
        code = f"{prelude}\nimport sys\nfrom safe_rlhf_jax.train import main\nsys.exit(main())"
        return python("-c", code, "--config", CONFIG, f"workdir={folder / name}", *models)

    def difference(name: str) -> float:
        states = [results(folder / one)[0] for one in (name, "straight")]
        pairs = zip(*map(jax.tree.leaves, states), strict=True)
        return max(float(np.max(np.abs(np.float64(a) - np.float64(b)), initial=0)) for a, b in pairs)

    kill = KILL.format(folder=str(folder / "killed" / "ppo_lag"), moment="step", step=5, delay=0)
    statuses = [train("straight").returncode, train("killed", kill).returncode, train("killed").returncode]
    yield {"exit_statuses": statuses}
    if statuses != [0, -signal.SIGKILL, 0]:
        raise Wrong(f"exit statuses {statuses}")
    gap = difference("killed")
    yield {"largest_difference": gap, "summary": f"largest difference of a state {gap:.1e}"}
    if gap:
        train("again")
        yield {"largest_difference_of_two_straight_runs": difference("again")}
        raise Wrong(f"the resumed run differs by {gap}")


def chat(options: argparse.Namespace) -> Found:
    """The command line that streams answers, with scores."""
    from tests.distributed.conftest import saved_models

    folder = options.work / "runs" / "chat"
    saved_models(folder)
    models = [folder / "init_from", "--reward", folder / "reward_model", "--cost", folder / "cost_model"]
    process = python(
        "-m", "safe_rlhf_jax.chat", *models, "--max-tokens", 8, input="How do I bake bread?\n", stdout=subprocess.PIPE
    )
    yield {"answer": [line.strip("│ ") for line in process.stdout.splitlines() if line.startswith("│")]}
    if process.returncode or "reward" not in process.stdout:
        raise Wrong(f"exit status {process.returncode}")


def compile_local(options: argparse.Namespace) -> Found:
    """What `compile` says of a run on this machine."""
    report = options.work / "compile.json"
    config = "tests/configs/mini.yaml" if options.small else "configs/quickstart.yaml"
    process = python(
        "-m", "safe_rlhf_jax.compile", "--config", config, "--stage", "ppo_lag", "--topology", "local", "--json", report
    )
    if process.returncode:
        raise Wrong(f"exit status {process.returncode}")
    yield {"report": json.loads(report.read_text())}


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", choices=[step.name for step in STEPS])
    parser.add_argument("--work", type=pathlib.Path, required=True, help="folder of NAME.jsonl and of runs")
    parser.add_argument("--seconds", type=float, default=600, help="that this step has (default %(default)s)")
    parser.add_argument("--small", action="store_true", help="small sizes")
    options = parser.parse_args()
    (step,) = (step for step in STEPS if step.name == options.name)
    with (options.work / f"{options.name}.jsonl").open("a") as out:

        def say(found: dict[str, Any]) -> None:
            out.write(json.dumps(found) + "\n")
            out.flush()

        try:
            for found in globals()[step.function](options, **step.arguments):
                say(found)
        except Skip as reason:
            say({"skip": str(reason)})


if __name__ == "__main__":
    main()
