"""Provenance of a report: code and libraries."""

import importlib.metadata
import platform
import subprocess

import jax

from safe_rlhf_jax import storage

PACKAGE = storage.path(__file__).parent.parent


def code_version() -> str:
    """Returns the version of the package, with the commit if it runs from a git checkout."""
    try:
        version = importlib.metadata.version("safe_rlhf_jax")
    except importlib.metadata.PackageNotFoundError:  # a checkout that is not installed
        version = "not installed"
    tracked, commit = git("ls-files", "__init__.py"), git("rev-parse", "HEAD")
    if not (tracked and commit):  # a package may be inside another project's repository
        return f"safe_rlhf_jax {version}"
    changed = ", with changes since" if git("status", "--porcelain", "--untracked-files=no", ".") else ""
    return f"safe_rlhf_jax {version}, commit {commit}{changed}"


def git(*arguments: str) -> str:
    """Returns the output of git in the package's folder, empty on failure."""
    try:
        process = subprocess.run(["git", *arguments], cwd=PACKAGE, capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return process.stdout.strip() if process.returncode == 0 else ""


def machine() -> str:
    """Returns the interpreter, JAX and the devices."""
    devices = jax.devices()
    return f"Python {platform.python_version()}, JAX {jax.__version__}, {len(devices)} × {devices[0].device_kind}"
