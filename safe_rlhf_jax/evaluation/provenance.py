"""Which code and which libraries made a report."""

import importlib.metadata
import platform
import subprocess

import jax

from safe_rlhf_jax import storage

PACKAGE = storage.path(__file__).parent.parent


def code_version() -> str:
    """Returns the version of the package, and where it runs from a git checkout the commit."""
    try:
        version = importlib.metadata.version("safe_rlhf_jax")
    except importlib.metadata.PackageNotFoundError:  # a checkout that is not installed
        version = "not installed"
    tracked, commit = git("ls-files", "__init__.py"), git("rev-parse", "HEAD")
    if not (tracked and commit):  # a package may lie in the repository of something else
        return f"safe_rlhf_jax {version}"
    changed = ", with changes since" if git("status", "--porcelain", "--untracked-files=no", ".") else ""
    return f"safe_rlhf_jax {version}, commit {commit}{changed}"


def git(*arguments: str) -> str:
    """Returns what git says of the package's folder, nothing where it has nothing to say."""
    try:
        process = subprocess.run(["git", *arguments], cwd=PACKAGE, capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return process.stdout.strip() if process.returncode == 0 else ""


def machine() -> str:
    """Returns the interpreter, JAX and the devices."""
    devices = jax.devices()
    return f"Python {platform.python_version()}, JAX {jax.__version__}, {len(devices)} × {devices[0].device_kind}"
