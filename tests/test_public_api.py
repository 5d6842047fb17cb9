"""What `from safe_rlhf_jax import …` promises: names, arguments, docstrings, and that `run` is the command line."""

import ast
import importlib.util
import inspect
import re
import subprocess
import sys
from pathlib import Path

import pytest

import safe_rlhf_jax
from safe_rlhf_jax import UserError, load_config, load_policy, run

ROOT = Path(__file__).parent.parent
FROZEN = ROOT / "tests" / "public_api.txt"
spec = importlib.util.spec_from_file_location("make_api", ROOT / "docs" / "make_api.py")
make_api = importlib.util.module_from_spec(spec)
spec.loader.exec_module(make_api)

NAMES = [name for names in make_api.SECTIONS.values() for name in names]
FUNCTIONS = [name for name in NAMES if isinstance(make_api.definition(name), ast.FunctionDef)]
TINY = ("stages.sft.data.limit=64", "stages.sft.eval_data.limit=16", "stages.sft.epochs=1", "stages.sft.batch_size=16")


def python(code):
    """Output of a process of its own."""
    process = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return process.stdout + process.stderr


def test_names_and_arguments_are_those_that_were_promised():
    """A line that changes here breaks somebody's program: write it anew only where that is meant, and say so."""
    assert make_api.signatures() == FROZEN.read_text(encoding="utf-8").splitlines()


def test_every_public_name_has_its_place_on_the_page_and_its_home():
    assert {name.partition(".")[0] for name in NAMES} | {"__version__"} == set(safe_rlhf_jax.__all__)
    homes = {f"safe_rlhf_jax.{home}" for home in safe_rlhf_jax.HOMES} | {"safe_rlhf_jax.models"}
    (block,) = (n for n in ast.parse(inspect.getsource(safe_rlhf_jax)).body if isinstance(n, ast.If))
    assert {node.module for node in block.body} == homes
    assert {alias.name for node in block.body for alias in node.names} | {"__version__"} == set(safe_rlhf_jax.__all__)


@pytest.mark.parametrize("name", NAMES)
def test_public_name_has_a_docstring_of_whole_sentences(name):
    first = inspect.getdoc(make_api.symbol(name)).split("\n\n")[0]
    assert re.search(r"[.:)]$", first)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_docstring_of_a_public_function_has_its_sections(name):
    text, arguments = inspect.getdoc(make_api.symbol(name)), make_api.definition(name).args
    named = [argument.arg for argument in (*arguments.args, *arguments.kwonlyargs) if argument.arg != "self"]
    section = text.partition("Args:\n")[2].partition("\n\n")[0]
    assert re.findall(r"^    (\w+): ", section, re.MULTILINE) == named
    assert "\nReturns:\n" in text


def test_page_is_what_the_docstrings_say():
    assert make_api.PAGE.read_text(encoding="utf-8") == make_api.page(), "run: python docs/make_api.py"


def test_importing_the_package_loads_nothing_heavy():
    out = python("import sys, safe_rlhf_jax; print({'jax', 'numpy', 'pydantic', 'transformers'} & set(sys.modules))")
    assert out == "set()\n"


def test_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="'safe_rlhf_jax' has no attribute 'runn'"):
        _ = safe_rlhf_jax.runn


def test_version_is_that_of_the_project():
    assert f'\nversion = "{safe_rlhf_jax.__version__}"\n' in (ROOT / "pyproject.toml").read_text()


def test_run_returns_what_the_stages_left_and_runs_again_in_the_same_process(tmp_path):
    config = load_config("quickstart", [f"workdir={tmp_path / 'run'}", *TINY])
    config = config.model_copy(update={"stages": config.stages[:1]})
    results = run(config)
    assert list(results) == ["sft"]
    assert (results["sft"].kind, results["sft"].folder) == ("sft", tmp_path / "run" / "sft")
    assert results["sft"].metrics["eval/loss"] > 0
    policy = load_policy(str(results["sft"].export))
    assert len(policy(["how do i bake"], max_tokens=4)) == 1
    assert run(config) == results


def test_run_raises_what_the_command_line_prints(tmp_path, capsys):
    with pytest.raises(UserError, match=r"stages\.0\.epoch: unknown key .* did you mean 'stages\.0\.epochs'"):
        run("quickstart", [f"workdir={tmp_path}", "stages.sft.epoch=1"])
    with pytest.raises(UserError, match="give them to load_config"):
        run(load_config("quickstart"), ["seed=1"])
    with pytest.raises(UserError, match=r"by name: .*quickstart"):
        run("quickstar")
    assert capsys.readouterr() == ("", "")


def test_library_says_nothing_by_itself(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"prompt": "a"}\n')
    (tmp_path / "b.jsonl").write_text('{"prompt": "b"}\n')
    code = "from safe_rlhf_jax.data.sources import read_records\n"
    code += "from safe_rlhf_jax.data.tokenizer import load_tokenizer\nload_tokenizer('demo')\n"
    code += f"read_records({str(tmp_path)!r})\n"
    assert python(code) == ""
    said = f"data {tmp_path}: split train is a.jsonl, b.jsonl\n"
    assert python(f"from safe_rlhf_jax import log\nlog.show()\n{code}") == said
