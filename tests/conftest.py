"""One CPU that looks like eight devices, strict broadcasting, and shapes and dtypes checked at every call."""

import fcntl
import functools
import importlib.metadata
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

# Before jax starts a backend. Tests compile much and compute little, so XLA's CPU compiler optimises little.
COMPILE_FAST = ["--xla_backend_optimization_level=0", "--xla_cpu_parallel_codegen_split_count=1"]
if importlib.metadata.version("jaxlib").startswith("0.10."):  # later compilers have one emitter, and die of the flag
    COMPILE_FAST.append("--xla_cpu_use_fusion_emitters=false")
for flag in ["--xla_force_host_platform_device_count=8", *COMPILE_FAST]:
    if flag.partition("=")[0] not in os.environ.get("XLA_FLAGS", ""):
        os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {flag}".strip()
os.environ["JAX_PLATFORMS"] = "cpu"
# What several tests have in common is compiled once: all workers, and the processes they start, inherit the folder.
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    compiled = tempfile.TemporaryDirectory(prefix="compiled")  # removed when this process ends
    os.environ["JAX_COMPILATION_CACHE_DIR"] = compiled.name
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.1"

import hypothesis
import jax
import pytest
import yaml
from flax import struct
from jaxtyping import install_import_hook

from safe_rlhf_jax import cli, log
from tests import moments

PACKAGE = Path(__file__).parent.parent / "safe_rlhf_jax"
# Called for every record, with strings and dicts, which mypy sees; the check would take longer than the call.
RECORDS = ("conversations", "formats", "records", "texts", "turns")
UNHOOKED = tuple(
    f"safe_rlhf_jax.{name}"
    for name in ("types", "metrics", "train", "data.demo", *(f"data.{part}" for part in RECORDS))
)


def hooked_modules() -> list[str]:
    """Modules whose functions are checked. Packages are left out: hooking one would hook all that is in it."""
    paths = [path for path in PACKAGE.rglob("*.py") if path.name != "__init__.py"]
    names = [".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts) for path in sorted(paths)]
    return [name for name in names if not f"{name}.".startswith(tuple(f"{skipped}." for skipped in UNHOOKED))]


def unchecked(make_dataclass):
    """`struct.dataclass` whose instances may hold anything: jax unflattens pytrees with leaves that are no arrays."""

    @functools.wraps(make_dataclass)
    def wrapper(*args, **kwargs):
        result = make_dataclass(*args, **kwargs)
        if not isinstance(result, type):  # called with keywords only: it returned the decorator
            return unchecked(result)
        result.__no_type_check__ = True
        return result

    return wrapper


struct.dataclass = unchecked(struct.dataclass)
# As type checkers see it, an int is a float too.
install_import_hook(hooked_modules(), "beartype.beartype(conf=beartype.BeartypeConf(is_pep484_tower=True))")

jax.config.update("jax_numpy_rank_promotion", "raise")

cli.collect_garbage_rarely()

# Compiling inside an example takes longer than any deadline, and a failure must come back on the next run.
hypothesis.settings.register_profile("jax", deadline=None, derandomize=True, database=None)
hypothesis.settings.load_profile("jax")

log.show()  # as the command lines do

NEEDS = {
    "reference": ("torch", "torch is not installed (extra `torch`)"),
    "tpu": ("libtpu", "libtpu is not installed"),
    "gpu_aot": ("jax_cuda12_plugin", "jax-cuda12-plugin is not installed (extra `gpu-aot`)"),
}


def pytest_collection_modifyitems(items):
    """Skips tests whose marker names a package that is not here; starts with those that take longest."""
    items.sort(key=lambda item: item.get_closest_marker("slow") is None)
    for marker, (package, reason) in NEEDS.items():
        if importlib.util.find_spec(package) is None:
            for item in items:
                if item.get_closest_marker(marker):
                    item.add_marker(pytest.mark.skip(reason=reason))


MINI = Path(__file__).parent / "configs" / "mini.yaml"


@pytest.fixture(scope="session")
def train_process():
    """Runs the command line in a process of its own, with one device; `optimised`: with all of LLVM's passes."""
    environment = dict(os.environ)
    environment |= {"JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0", "PYTHONPATH": str(PACKAGE.parent)}

    def run(*overrides, config=MINI, prelude="", timeout=300, optimised=False):
        code = f"{prelude}\nimport sys\nfrom safe_rlhf_jax.train import main\nsys.exit(main())"
        command = [sys.executable, "-c", code, "--config", str(config), *overrides]
        flags = {"XLA_FLAGS": "" if optimised else " ".join(COMPILE_FAST)}
        return moments.checked(
            subprocess.run(command, env=environment | flags, capture_output=True, text=True, timeout=timeout)
        )

    return run


@pytest.fixture(scope="session")
def finished_run(train_process):
    """Runs a config given as a tree, by a file in a folder; returns the run's folder, the file and what was said."""

    def run(folder, tree):
        (folder / "config.yaml").write_text(yaml.safe_dump(tree))
        process = train_process(config=folder / "config.yaml")
        assert process.returncode == 0, process.stderr
        return folder / "run", folder / "config.yaml", process.stdout

    return run


@pytest.fixture(scope="session")
def mini_run(tmp_path_factory, worker_id, train_process):
    """A finished run of every stage, one for all workers: its folder, and the process that made it."""
    temporary = tmp_path_factory.getbasetemp()
    folder = (temporary if worker_id == "master" else temporary.parent) / "mini"
    with open(f"{folder}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (folder / "process.json").exists():
            process = train_process(f"workdir={folder / 'run'}")
            assert process.returncode == 0, process.stderr
            said = {"args": process.args, "returncode": 0, "stdout": process.stdout, "stderr": process.stderr}
            (folder / "process.json").write_text(json.dumps(said))
    return folder / "run", subprocess.CompletedProcess(**json.loads((folder / "process.json").read_text()))
