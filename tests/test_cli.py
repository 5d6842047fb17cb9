"""The console script, and what command lines say of errors: one line of those a user can act on, all of the others."""

import builtins
import subprocess
import sys
import traceback

import pytest

from safe_rlhf_jax import __version__, cli, errors
from safe_rlhf_jax.errors import ConfigError, DataError, MissingModelError, ModelError, NonFiniteError, UserError

DATA = "from safe_rlhf_jax.data import sources\nsources.DATASETS['demo/sft'] = lambda split: "


def script(*arguments):
    """The console script in a process of its own; says on its last line what heavy packages it has loaded."""
    code = f"import sys\nsys.argv = ['/somewhere/bin/safe-rlhf-jax', *{arguments!r}]\nfrom safe_rlhf_jax import cli\n"
    code += "try:\n    sys.exit(cli.main())\n"
    code += "finally:\n    print({'jax', 'numpy', 'pydantic', 'transformers'} & set(sys.modules))"
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)


@pytest.mark.parametrize("command", cli.COMMANDS)
def test_help_of_every_command_is_that_of_its_module_and_loads_nothing_heavy(command):
    process = script(command, "--help")
    assert process.returncode == 0, process.stderr
    assert process.stdout.startswith(f"usage: safe-rlhf-jax {command} ")
    assert "--config" in process.stdout
    assert process.stdout.endswith("set()\n")


def test_script_names_its_commands_and_its_version():
    process = script("--help")
    assert all(f"\n  {command} " in process.stdout for command in cli.COMMANDS)
    assert process.stdout.endswith("set()\n")
    assert script("--version").stdout == f"safe-rlhf-jax {__version__}\nset()\n"


def test_unknown_command_is_a_usage_error():
    process = script("trian")
    assert process.returncode == 2
    assert "invalid choice: 'trian'" in process.stderr


def test_command_is_named_as_it_was_called(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["/somewhere/safe_rlhf_jax/train.py"])
    assert cli.prog("train") == "python -m safe_rlhf_jax.train"


@pytest.mark.parametrize(
    "error",
    [
        ConfigError("words"), DataError("words"), ModelError("words"), MissingModelError("words"),
        NonFiniteError("words"),
        OSError("words"), FileNotFoundError(2, "No such file", "words.yaml"),
    ],
    ids=lambda error: type(error).__name__,
)  # fmt: skip
def test_error_that_a_user_can_act_on_is_one_line(error, capsys):
    assert cli.exit_status(lambda: throw(error)) == 1
    out, printed = capsys.readouterr()
    assert out == ""
    assert printed == f"error: {error}\n"


@pytest.mark.parametrize(
    "error",
    [ValueError("zip()"), FloatingPointError("nan"), KeyError("x"), OSError(5, "Input/output error")],
    ids=lambda error: type(error).__name__,
)
def test_any_other_error_keeps_its_traceback(error):
    with pytest.raises(type(error)):
        cli.exit_status(lambda: throw(error))


def throw(error):
    raise error


def test_errors_are_what_programs_caught_before():
    assert issubclass(UserError, ValueError)
    assert issubclass(MissingModelError, FileNotFoundError)
    assert issubclass(NonFiniteError, FloatingPointError)


def test_unexpected_error_inside_a_run_keeps_its_traceback(train_process, tmp_path):
    process = train_process(f"workdir={tmp_path}", prelude=DATA + "list(zip([1], [], strict=True))")
    assert process.returncode == 1
    assert process.stderr.startswith("Traceback")
    assert process.stderr.endswith("ValueError: zip() argument 2 is shorter than argument 1\n")


def test_intended_error_inside_a_run_is_one_line(train_process, tmp_path):
    process = train_process(f"workdir={tmp_path}", prelude=DATA + "{}[split]")
    assert process.returncode == 1
    assert process.stderr == "error: data 'demo/sft': split 'train': 'train'\n"


def test_tracebacks_name_the_built_in_error_that_an_error_is():
    shown = {errors.DataError: "ValueError", errors.ModelError: "ValueError", errors.FileError: "OSError"}
    shown |= {errors.MissingModelError: "FileNotFoundError", errors.NonFiniteError: "FloatingPointError"}
    for error, name in shown.items():
        assert traceback.format_exception_only(error("what")) == [f"{name}: what\n"]
        assert issubclass(error, getattr(builtins, name))
