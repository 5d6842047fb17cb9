"""Rules about the code as a whole, read from its syntax trees: what may import what, how long a module may get."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = "safe_rlhf_jax"
MAX_LINES = 400

# Low to high. A module may import from its own level and from lower ones.
READINGS = (  # of a compiled program
    "chips", "collectives", "expectation", "floors", "flops", "hlo", "properties", "roofline", "traffic",
)  # fmt: skip
LEVELS = (
    {"types", "errors", "log", "storage", "host_memory"},
    {"ops", "sharding", "metrics", "processes", "endpoints", "compile_cache"},
    {"models"},
    {"optim", "inference", *(f"aot.{name}" for name in READINGS)},
    {"objectives", "rl", "evaluation", "data"},
    {"checkpoint", "loop", "performance", "config", "pipeline", "testing"},
    {"stages", "serving"},
    {"aot", "named_models"},
    {"cli", "train", "compile", "chat", "export", "inspect_data", "serve", "data.__main__"},
)
# Parts that may import even less: nothing of the package but this.
ONLY = {
    "types": set(),
    "errors": set(),
    "log": set(),
    "storage": set(),
    "data": {"data", "errors", "storage", "types"},
    "config": {"config", "errors", "models.config", "storage"},
}
FORBIDDEN_IMPORTS = {"pickle", "cPickle", "_pickle", "cloudpickle", "dill", "joblib", "shelve"}
FORBIDDEN_ARGUMENTS = {"trust_remote_code", "allow_pickle"}  # = True
# Only `storage` touches files. The others hold paths, join them and read their names.
FILE_MODULES = {"etils", "fcntl", "filelock", "fsspec", "glob", "mmap", "pathlib", "shutil", "tempfile"}
FILE_METHODS = {
    "exists", "expanduser", "fromfile", "glob", "is_dir", "is_file", "is_symlink", "iterdir", "memmap", "mkdir", "open",
    "read_bytes", "read_text", "rename", "resolve", "rglob", "rmdir", "stat", "tofile", "touch", "unlink",
    "write_bytes", "write_text",
}  # fmt: skip
OURS = ("storage.", "hf.resolve", "run.networks.open", "self.open")  # of the package, which ask storage
NO_FILES = (
    "os._exit", "os.cpu_count", "os.devnull", "os.environ", "os.getpid", "os.path.basename", "os.path.commonprefix",
    "os.sysconf",
)  # fmt: skip

LEVEL_OF = {part: level for level, parts in enumerate(LEVELS) for part in parts}


def module_name(path):
    """`rl.step` for safe_rlhf_jax/rl/step.py, `rl` for safe_rlhf_jax/rl/__init__.py, `` for the package itself."""
    parts = path.relative_to(ROOT / PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_name(path): path for path in sorted((ROOT / PACKAGE).rglob("*.py"))}


def parse(module):
    return ast.parse(MODULES[module].read_text(encoding="utf-8"))


def imports(tree, module="", *, is_package=False):
    """Full names of everything a module imports, wherever in it the import stands."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                here = [PACKAGE, *filter(None, module.split("."))]
                up = node.level - is_package
                base = ".".join([*here[: len(here) - up], *filter(None, [node.module])])
            yield from (f"{base}.{alias.name}" for alias in node.names)


def package_imports(module):
    """Modules of the package that `module` imports: `rl.step` for `from safe_rlhf_jax.rl.step import collect`."""
    found = set()
    for name in imports(parse(module), module, is_package=MODULES[module].name == "__init__.py"):
        head, _, rest = name.partition(".")
        if head == PACKAGE:
            while rest and rest not in MODULES:  # names inside a module, or a module that is not written yet
                shorter = rest.rpartition(".")[0]
                if not shorter:
                    break
                rest = shorter
            found.add(rest)
    return found


def part(module):
    return module if module in LEVEL_OF else module.partition(".")[0]


def violation(module, imported):
    """Why `module` must not import `imported`, or None."""
    own, other = part(module), part(imported)
    if other not in LEVEL_OF:  # a name in safe_rlhf_jax/__init__.py
        return None
    if own in ONLY:
        allowed = any(imported == name or imported.startswith(f"{name}.") for name in ONLY[own])
        return None if allowed else f"{own} may import only {sorted(ONLY[own]) or 'nothing of the package'}"
    if LEVEL_OF[other] > LEVEL_OF[own]:
        return f"{other} (level {LEVEL_OF[other]}) stands above {own} (level {LEVEL_OF[own]})"
    return None


@pytest.mark.parametrize("module", [name for name in MODULES if name])
def test_module_has_a_level(module):
    assert part(module) in LEVEL_OF, f"{module} is new: give it a place in LEVELS"


@pytest.mark.parametrize("module", [name for name in MODULES if part(name) in LEVEL_OF])
def test_module_imports_downwards(module):
    reasons = {name: violation(module, name) for name in package_imports(module)}
    assert not any(reasons.values()), {name: reason for name, reason in reasons.items() if reason}


@pytest.mark.parametrize("module", MODULES)
def test_module_can_be_read_in_one_sitting(module):
    lines = len(MODULES[module].read_text(encoding="utf-8").splitlines())
    assert lines <= MAX_LINES, f"{module} has {lines} lines, more than {MAX_LINES}: where is the seam?"


@pytest.mark.parametrize("module", MODULES)
def test_module_has_a_docstring(module):
    if not part(MODULES[module].stem).startswith("_") or MODULES[module].name == "__init__.py":
        assert ast.get_docstring(parse(module)), f"{MODULES[module].relative_to(ROOT)} has no docstring"


@pytest.mark.parametrize("module", MODULES)
def test_module_cannot_run_code_from_a_file(module):
    tree = parse(module)
    assert not {name.partition(".")[0] for name in imports(tree)} & FORBIDDEN_IMPORTS
    for node in ast.walk(tree):
        if isinstance(node, ast.keyword) and node.arg in FORBIDDEN_ARGUMENTS:
            false = isinstance(node.value, ast.Constant) and node.value.value is False
            assert false, f"{module}:{node.value.lineno} {node.arg} is not False"


def test_every_folder_with_modules_is_a_package():
    folders = {path.parent for path in MODULES.values()}
    assert not [str(folder.relative_to(ROOT)) for folder in folders if not (folder / "__init__.py").exists()]


@pytest.mark.parametrize(
    ("module", "imported", "allowed"),
    [
        ("rl.step", "types", True),
        ("rl.step", "objectives", True),
        ("models.hf", "rl.losses", False),
        ("data.loader", "data.examples", True),
        ("data.loader", "ops", False),
        ("config", "models.config", True),
        ("config", "models.hf", False),
        ("rl.lagrange", "config", False),
        ("stages", "config", True),
    ],
)
def test_rules_allow_and_forbid_what_they_say(module, imported, allowed):
    assert (violation(module, imported) is None) == allowed


def test_imports_are_found_in_every_form():
    tree = ast.parse("import a.b\nfrom ..x import y\ndef f():\n    from . import z\n    from safe_rlhf_jax import ops")
    assert set(imports(tree, "rl.step")) == {"a.b", f"{PACKAGE}.x.y", f"{PACKAGE}.rl.z", f"{PACKAGE}.ops"}


def file_uses(tree):
    """Yields what a module does with files without asking `storage`."""
    for name in imports(tree):
        if name.partition(".")[0] in FILE_MODULES or (name.startswith("os.") and name != "os.path"):
            yield name
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "open":
            yield f"open, line {node.lineno}"
        if isinstance(node, ast.Attribute):
            name = ast.unparse(node)
            method = node.attr in FILE_METHODS and not name.startswith(OURS)
            system = name.startswith("os.") and name != "os.path" and not name.startswith(NO_FILES)
            if method or system:
                yield f"{name}, line {node.lineno}"


@pytest.mark.parametrize("module", [name for name in MODULES if name != "storage"])
def test_only_storage_touches_files(module):
    uses = sorted(file_uses(parse(module)))
    assert not uses, f"{module}: {uses}: ask storage"


@pytest.mark.parametrize(
    ("code", "found"),
    [
        ("from pathlib import PurePath", True),
        ("def f():\n    import shutil", True),
        ("open(path)", True),
        ("(folder / 'a').read_text()", True),
        ("np.memmap(file)", True),
        ("os.replace(a, b)", True),
        ("os.path.exists(a)", True),
        ("from os.path import exists", True),
        ("archive.open(name)", True),
        ("path.resolve()", True),
        ("os.environ.setdefault('A', 'b')", False),
        ("storage.is_file(folder / 'a')", False),
        ("run.networks.open('sft', 'lm')", False),
        ("run.folder('a').open()", True),
        ("hf.resolve('folder')", False),
        ("path.name.replace('a', 'b')", False),
    ],
)
def test_uses_of_files_are_found(code, found):
    assert any(file_uses(ast.parse(code))) == found
