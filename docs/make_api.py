"""Writes docs/api.md from the docstrings of what the package promises: `python docs/make_api.py`."""

import ast
import functools
import importlib
import inspect
import re
from pathlib import Path

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs" / "api.md"
HEAD = """# Python API

Written by `python docs/make_api.py` from docstrings; a test holds it to the code. What stands here is promised: names
and arguments stay as they are. Everything is imported from `safe_rlhf_jax`, as in `from safe_rlhf_jax import run`, and
is loaded when it is first asked for. Messages of a run go through `logging`, under the name `safe_rlhf_jax`;
`safe_rlhf_jax.log.show()` prints them as the command line does. A `storage.Place` is a string or a path, local or the
URI of an object store; a `storage.Path` that is local is a `pathlib.Path`.
"""
# Heading: names of the package, dotted where they stand in a module or a class.
SECTIONS = {
    "Runs": ("load_config", "run", "StageResult", "UserError"),
    "Policies and scorers": (
        "load_policy", "load_scorer", "Policy", "Policy.__call__", "Scorer", "Scorer.__call__", "hf.load", "hf.save",
    ),
    "Numerics": (
        "token_scores", "gae", "clipped_surrogate", "clipped_value_loss", "lagrangian_advantage",
        "ascend_log_multiplier", "bradley_terry_loss", "safety_loss",
    ),
}  # fmt: skip


def symbol(name: str) -> object:
    """Returns what a dotted name stands for."""
    return functools.reduce(getattr, name.split("."), importlib.import_module("safe_rlhf_jax"))


def definition(name: str) -> ast.FunctionDef | ast.ClassDef:
    """Returns the source of a symbol; the same on every version of Python, and whatever wraps it in a test."""
    found = symbol(name)
    node = ast.parse(Path(inspect.getmodule(found).__file__).read_text(encoding="utf-8"))
    for part in found.__qualname__.split("."):
        node = next(one for one in node.body if getattr(one, "name", None) == part)
    return node


def signature(name: str) -> str:
    """Returns a function with its arguments, or a class with its fields."""
    node = definition(name)
    if isinstance(node, ast.FunctionDef):
        return f"{name}({ast.unparse(node.args)}) -> {ast.unparse(node.returns)}"
    fields = [ast.unparse(one) for one in node.body if isinstance(one, ast.AnnAssign)]
    return f"class {name}({', '.join(map(ast.unparse, node.bases)) or ', '.join(fields)})"


def signatures() -> list[str]:
    """Returns all signatures, a line each."""
    return [signature(name) for names in SECTIONS.values() for name in names]


def shown(name: str) -> str:
    """Returns a symbol as a part of the page."""
    parts = re.split(r"^(Attributes|Args|Returns|Raises):\n", inspect.getdoc(symbol(name)), flags=re.MULTILINE)
    text = parts[0]
    for heading, body in zip(parts[1::2], parts[2::2], strict=True):
        entries = re.sub(r"^(\w+): ", r"- `\1`: ", inspect.cleandoc(body), flags=re.MULTILINE)
        text += f"**{heading}**\n\n{entries}\n\n"
    return f"### {name}\n\n```python\n{wrapped(signature(name))}\n```\n\n{text.rstrip()}\n"


def wrapped(line: str) -> str:
    """Returns a signature, an argument a line where it is long."""
    if len(line) <= 100:
        return line
    start, _, rest = line.partition("(")
    arguments, end = rest.rsplit(")", 1)
    return f"{start}(\n" + "".join(f"    {one},\n" for one in re.split(r", (?![^\[]*\])", arguments)) + f"){end}"


def page() -> str:
    """Returns the whole page."""
    parts = [HEAD]
    for heading, names in SECTIONS.items():
        parts += [f"## {heading}\n", *map(shown, names)]
    return "\n".join(parts)


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
