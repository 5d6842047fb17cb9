"""The wheel holds what a run needs, and runs where there is no checkout."""

import ast
import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
TINY = ("stages.sft.data.limit=64", "stages.sft.eval_data.limit=16", "stages.sft.epochs=1", "stages.sft.batch_size=16")
START = f"""
import safe_rlhf_jax
from safe_rlhf_jax import load_config, run
config = load_config("quickstart", {TINY!r})
run(config.model_copy(update={{"stages": config.stages[:1]}}))
print(safe_rlhf_jax.__file__, safe_rlhf_jax.__version__)
"""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """A wheel of the package, built from a copy: a build leaves its folders where the sources are."""
    source = tmp_path_factory.mktemp("source")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    for name in ("safe_rlhf_jax", "configs"):
        shutil.copytree(ROOT / name, source / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--no-index"]
    subprocess.run([*command, "--wheel-dir", str(source / "dist"), str(source)], check=True, capture_output=True)
    (built,) = (source / "dist").glob("*.whl")
    return built


@pytest.fixture(scope="module")
def outside(wheel, tmp_path_factory):
    """Runs Python in a folder that is no checkout, with the wheel's package and nothing of this one."""
    folder = tmp_path_factory.mktemp("outside")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder / "site")

    def run(*arguments):
        return subprocess.run(
            [sys.executable, *arguments], cwd=folder, env=os.environ | {"PYTHONPATH": str(folder / "site")},
            capture_output=True, text=True,
        )  # fmt: skip

    return folder, run


def test_wheel_holds_every_file_of_the_package_and_the_configs(wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        ours = archive.read("safe_rlhf_jax/configs/quickstart.yaml")
    assert ours == (ROOT / "configs" / "quickstart.yaml").read_bytes()
    configs = {f"safe_rlhf_jax/configs/{path.relative_to(ROOT / 'configs')}" for path in ROOT.glob("configs/**/*.yaml")}
    files = [path for path in ROOT.glob("safe_rlhf_jax/**/*") if path.is_file() and path.parent.name != "__pycache__"]
    package = {str(path.relative_to(ROOT)) for path in files}
    assert {"safe_rlhf_jax/py.typed", "safe_rlhf_jax/data/demo/tokenizer/tokenizer.json"} <= package
    assert not (configs | package) - names
    assert not {name.partition("/")[0] for name in names if "dist-info" not in name} - {"safe_rlhf_jax"}


def test_wheel_names_its_command(wheel, outside):
    folder, run = outside
    (entries,) = (folder / "site").glob("*.dist-info/entry_points.txt")
    assert "safe-rlhf-jax = safe_rlhf_jax.cli:main" in entries.read_text()
    process = run("-m", "safe_rlhf_jax.cli", "train", "--help")
    assert process.returncode == 0, process.stderr
    process = run("-m", "safe_rlhf_jax.cli", "train", "--config", "quickstar")
    assert re.fullmatch(r"error: --config quickstar: no such file; .* by name: .*\bquickstart\b.*\n", process.stderr)


def test_quickstart_starts_where_there_is_no_checkout(outside):
    folder, run = outside
    process = run("-c", START)
    assert process.returncode == 0, process.stderr
    assert process.stdout.endswith(f"{folder / 'site' / 'safe_rlhf_jax' / '__init__.py'} {PROJECT['version']}\n")
    assert (folder / "runs" / "quickstart" / "sft" / "export" / "model.safetensors").is_file()


def test_what_the_package_imports_is_declared():
    optional = PROJECT["optional-dependencies"]
    extras = [name for extra, names in optional.items() if extra not in ("dev", "torch") for name in names]
    declared = {re.match(r"[\w-]+", name)[0].lower() for name in (*PROJECT["dependencies"], *extras)}
    homes = importlib.metadata.packages_distributions()
    for path in (ROOT / "safe_rlhf_jax").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            modules = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            modules += [node.module] if isinstance(node, ast.ImportFrom) and not node.level else []
            for top in {module.partition(".")[0] for module in modules} - {*sys.stdlib_module_names, "safe_rlhf_jax"}:
                provided = {name.lower().replace("_", "-") for name in homes.get(top, [top])}
                assert provided & {name.replace("_", "-") for name in declared}, f"{path.name} imports {top}"
