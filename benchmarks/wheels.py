"""Gathers the packages that benchmarks/device.sh may have to install on a machine without network.

    python benchmarks/wheels.py build/wheels [--python 3.12] [--present FILE]

The releases are those of requirements-dev.lock. What JAX itself needs stays out, since JAX is found there, and so do
packages that only read data sets of a hub and Parquet files. `requirements.txt` in the folder says what is to be there.
"""

import argparse
import importlib.metadata
import pathlib
import re
import subprocess
import sys
import tomllib

from packaging.markers import Marker
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = pathlib.Path(__file__).parent.parent
FOUND = {"jax", "jaxlib", "numpy", "scipy", "ml-dtypes", "opt-einsum"}
UNREAD = {"datasets", "tensorflow-datasets", "importlib-resources", "pyarrow"}  # imported by what asks for them
TESTS = {"chex", "pytest"}  # some steps are tests
PLATFORMS = [f"manylinux_2_{minor}_x86_64" for minor in range(5, 40)] + ["manylinux2014_x86_64", "manylinux1_x86_64"]
LOCKED = re.compile(r"^(\S+)==\S+?(?: ; (.*?))? \\\n(?:    --hash.*\n)+", re.MULTILINE)


def roots() -> dict[str, Requirement]:
    """What the steps import, by name, in the versions that pyproject.toml allows."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    used = {canonicalize_name(one.name): one for one in map(Requirement, project["dependencies"])}
    tests = {canonicalize_name(one.name): one for one in map(Requirement, project["optional-dependencies"]["dev"])}
    return {k: v for k, v in used.items() if k not in FOUND | UNREAD} | {k: tests[k] for k in sorted(TESTS)}


def present(path: pathlib.Path) -> dict[str, str]:
    """Versions by name of what a machine has, "" where they are not said: lines such as `pip list --format=freeze`."""
    lines = [line.split("#")[0].strip().partition("==") for line in path.read_text().splitlines()]
    return {canonicalize_name(name): version for name, _, version in lines if name}


def needed(requirements: list[Requirement], there: dict[str, str], markers: dict[str, str]) -> set[str]:
    """Names of the packages and of all that they need, less what is there in a version that will do.

    What a package needs is said by the one that is installed here.
    """
    found: set[tuple[str, str]] = set()  # name and extra
    pending = list(requirements)
    while pending:
        one = pending.pop()
        name = canonicalize_name(one.name)
        enough = name in there and (not there[name] or there[name] in one.specifier)
        new = {(name, extra) for extra in ("", *one.extras)} - found
        if name in FOUND or enough or not new:
            continue
        found |= new
        for more in map(Requirement, importlib.metadata.requires(name) or ()):
            if not more.marker or any(more.marker.evaluate(markers | {"extra": extra}) for _, extra in new):
                pending.append(more)
    return {name for name, _ in found}


def locked(names: set[str], markers: dict[str, str]) -> str:
    """The lines of the lock for these packages, hashes included, without markers: those have been looked at."""
    lines = []
    for match in LOCKED.finditer((ROOT / "requirements-dev.lock").read_text()):
        name, marker = match.groups()
        if canonicalize_name(name) in names and (not marker or Marker(marker).evaluate(markers)):
            lines.append(match[0].replace(f" ; {marker}", "", 1))
    return "".join(lines)


def target(python: str) -> dict[str, str]:
    """Environment markers of that Python on Linux."""
    return {"python_version": python, "python_full_version": f"{python}.0", "sys_platform": "linux", "os_name": "posix",
            "platform_system": "Linux", "platform_machine": "x86_64"}  # fmt: skip


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=pathlib.Path)
    parser.add_argument("--python", default="3.12", help="version of that machine's Python (default %(default)s)")
    parser.add_argument("--present", type=pathlib.Path, metavar="FILE", help="packages that need not travel: what "
                        "`pip list --format=freeze` says there, or names alone")  # fmt: skip
    options = parser.parse_args()
    folder, markers, wanted = options.folder, target(options.python), roots()
    there = present(options.present) if options.present else {}
    folder.mkdir(parents=True, exist_ok=True)
    for old in folder.glob("*.whl"):
        old.unlink()
    (folder / "requirements.txt").write_text("".join(f"{one}\n" for one in wanted.values()))
    (folder / "locked.txt").write_text(locked(needed([*wanted.values()], there, markers), markers))
    subprocess.run(
        [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:", "--require-hashes",
         f"--python-version={options.python}", "--implementation=cp", *(f"--platform={name}" for name in PLATFORMS),
         f"--dest={folder}", f"--requirement={folder / 'locked.txt'}"], check=True,
    )  # fmt: skip
    sizes = [path.stat().st_size for path in folder.glob("*.whl")]
    print(f"{folder}: {len(sizes)} wheels, {sum(sizes) / 2**20:.1f} MiB, for Python {options.python} on x86-64 Linux")


if __name__ == "__main__":
    main()
