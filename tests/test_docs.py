"""What the documents say of the code is so: links, names, defaults, configs, and the snippets of docs/adding.md."""

import ast
import importlib
import itertools
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from safe_rlhf_jax import config as cfg
from safe_rlhf_jax.config import load_config
from safe_rlhf_jax.data import formats, sources
from safe_rlhf_jax.models import families, hf
from safe_rlhf_jax.rl import algorithms
from safe_rlhf_jax.sharding import LOGICAL_RULES

ROOT = Path(__file__).parent.parent
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])


def page(name):
    return (ROOT / name).read_text(encoding="utf-8")


def between(text, mark):
    return text.split(f"<!-- {mark} -->")[1].split(f"<!-- /{mark} -->")[0]


def rows(table):
    """Cells of a markdown table's body."""
    lines = [line.strip().strip("|").split("|") for line in table.strip().splitlines()]
    return [[cell.strip() for cell in cells] for cells in lines[2:]]


def snippet(name):
    """The fenced python block of docs/adding.md that begins with `# tested: name`."""
    blocks = re.findall(r"```python\n(.*?)```", page("docs/adding.md"), re.DOTALL)
    (found,) = [block for block in blocks if block.startswith(f"# tested: {name}\n")]
    return found


def defined(path):
    """Functions, classes and constants at the top of a file, by name."""
    found = {}
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
        names = [getattr(node, "name", None), *(getattr(target, "id", None) for target in targets)]
        found |= {name: node for name in names if name}
    return found


def reached(path, name):
    """Every name that stands in a function, and in what it names of its own file, and so on."""
    nodes, seen, todo = defined(path), set(), {name}
    while todo:
        node = nodes.get(todo.pop())
        mentioned = {getattr(part, "id", getattr(part, "attr", None)) for part in ast.walk(node)} if node else set()
        todo |= mentioned - seen
        seen |= mentioned
    return seen


@pytest.mark.parametrize("path", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_relative_links_resolve(path):
    text = re.sub(r"```.*?```", "", path.read_text(encoding="utf-8"), flags=re.DOTALL)
    for target in re.findall(r"\]\(([^)#\s]+)[^)]*\)", text):
        if "://" in target:
            continue
        assert (path.parent / target).resolve().exists(), f"{path.relative_to(ROOT)} links to {target}"


def test_functions_named_in_algorithms_exist():
    named = set(re.findall(r"`((?:[a-z_]+\.)+(?:[A-Z][A-Za-z]+\.)?[A-Za-z_]+)`", page("docs/algorithms.md")))
    named = {name for name in named if not name.endswith((".py", ".sh"))}
    assert len(named) > 25
    for name in named:
        module, owner, member = re.fullmatch(r"([a-z_.]+?)\.(?:([A-Z][A-Za-z]+)\.)?([A-Za-z_]+)", name).groups()
        place = importlib.import_module(f"safe_rlhf_jax.{module}")
        place = getattr(place, owner) if owner else place
        assert hasattr(place, member) or member in place.__annotations__, name


def test_functions_of_the_line_are_in_the_files_beside_them():
    table = page("docs/architecture.md").split("## The line")[1].split("Steps 4 to 9")[0]
    for _, _, names, files in rows(table):
        paths = [(ROOT / "docs" / link).resolve() for link in re.findall(r"\]\(([^)]+)\)", files)]
        text = "".join(path.read_text(encoding="utf-8") for path in paths)
        for name in re.findall(r"`(\w+)`", names):
            assert re.search(rf"^(?:def |class |    def |){name}\b", text, re.MULTILINE), (name, files)


def test_each_function_on_the_way_to_the_multiplier_leads_to_the_next():
    way = []
    for file, function in rows(between(page("README.md"), "hops")):
        way.append((ROOT / re.search(r"\]\(([^)]+)\)", file)[1], re.match(r"`(\w+)`", function)[1]))
    assert len(way) > 5
    for (path, name), (_, following) in itertools.pairwise(way):
        assert following in reached(path, name), f"{name} in {path.relative_to(ROOT)} does not lead to {following}"
    assert way[0][1] == "main"
    assert way[-1][1] in defined(way[-1][0])


def test_sharding_table_is_the_code():
    table = {
        re.match(r"`(\w+)`", logical)[1]: tuple(re.findall(r"`(\w+)`", mesh))
        for logical, mesh in rows(between(page("docs/architecture.md"), "logical-rules"))
    }
    assert table == LOGICAL_RULES


def test_defaults_in_algorithms_are_those_of_the_config():
    knobs = rows(between(page("docs/algorithms.md"), "knobs"))
    assert knobs
    for setting, default, _ in knobs:
        schema, field = setting.strip("`").split(".")
        assert str(getattr(cfg, schema).model_fields[field].default) == default, setting


def test_every_difference_is_listed():
    listed = re.findall(r"^\| (Q\d+) \|", page("docs/parity.md"), re.MULTILINE)
    assert listed == [f"Q{i}" for i in range(1, 30)]


def test_settings_named_in_parity_exist():
    schemas = [s for s in vars(cfg).values() if isinstance(s, type) and issubclass(s, cfg.Schema)]
    keys = {key for schema in schemas for key in schema.model_fields}
    for cell in re.findall(r"^\| Q\d+ .*\| ([^|]+) \|$", page("docs/parity.md"), re.MULTILINE):
        for setting in re.findall(r"`([a-z_.]+)", cell):
            assert set(setting.split(".")) <= keys, setting


def test_config_of_the_readme_is_valid(tmp_path):
    (text,) = re.findall(r"```yaml\n(.*?)```", page("README.md"), re.DOTALL)
    (tmp_path / "mine.yaml").write_text(text, encoding="utf-8")
    run = load_config(tmp_path / "mine.yaml")
    assert [stage.kind for stage in run.stages] == ["sft", "reward", "cost", "rl", "evaluate"]


def test_make_targets_of_the_readme_exist():
    targets = set(re.findall(r"^([a-z-]+):", page("Makefile"), re.MULTILINE))
    for name in ("README.md", "CONTRIBUTING.md"):
        assert set(re.findall(r"`make ([a-z-]+)`", page(name))) <= targets


@pytest.mark.parametrize("name", ["dataset", "format", "family", "algorithm"])
def test_snippet_is_at_most_ten_lines_of_code(name):
    code = [
        line for line in snippet(name).splitlines() if line.strip() and not line.startswith(("#", "import", "from"))
    ]
    assert len(code) <= 10


def test_dataset_snippet_adds_a_dataset(monkeypatch):
    monkeypatch.setattr(sources, "DATASETS", dict(sources.DATASETS))
    exec(snippet("dataset"), {})
    assert sources.read_records("arithmetic", "test")[0] == {"prompt": "50 plus one", "response": "51"}
    with pytest.raises(ValueError, match="split 'dev'"):
        sources.read_records("arithmetic", "dev")


def test_format_snippet_adds_a_format(monkeypatch):
    monkeypatch.setitem(formats.FORMATS, "quiz", None)  # so that it is taken out again
    exec(snippet("format"), {})
    record = {"question": "how", "a": "so", "b": "not", "right": "b"}
    assert formats.recognise([record], None, "here") == "quiz"
    pair = {"prompt": "how", "response_0": "so", "response_1": "not", "better_response_id": 1}
    assert formats.FORMATS["quiz"].read(record) == pair
    assert formats.FORMATS["quiz"].read(record | {"right": "c"})[formats.UNUSABLE] == "right is neither a nor b"


def test_formats_of_the_table_are_those_of_the_code():
    table = rows(between(page("docs/data.md"), "formats"))
    listed = [(name.strip("`"), tuple(re.findall(r"`(\w+)`", columns))) for name, columns, *_ in table]
    assert listed == [(name, format_.needs) for name, format_ in formats.FORMATS.items()]


def test_keys_of_data_in_the_docs_are_those_of_the_schema():
    keys = set(re.findall(r"^\| `(\w+)`(?:, `(\w+)`)? \| ", page("docs/data.md"), re.MULTILINE))
    listed = {key for pair in keys for key in pair if key} & set(cfg.Data.model_fields)
    assert listed == set(cfg.Data.model_fields)


def test_family_snippet_opens_and_saves_a_model(monkeypatch, tmp_path):
    from tests.helpers import make_lm, tiny_config

    monkeypatch.setattr(families, "FAMILIES", dict(families.FAMILIES))
    exec(snippet("family"), {})
    module, variables = make_lm(tiny_config(family="seed_oss", attention_bias=True, attention_out_bias=False))
    hf.save(tmp_path, module, variables)
    assert hf.read_config(tmp_path)["architectures"] == ["SeedOssForCausalLM"]
    assert hf.load(tmp_path, scan_layers=False)[0].config == module.config


def test_algorithm_snippet_runs_an_iteration_and_reaches_its_optimum(monkeypatch):
    import jax

    from tests.rl.world import make_rollout, make_world

    monkeypatch.setitem(algorithms.ALGORITHMS, "ppo_lag_plain", None)  # so that it is taken out again
    exec(snippet("algorithm"), {})
    world = make_world("ppo_lag_plain")
    key = jax.random.key(0)
    state, metrics = jax.eval_shape(world.learn, world.state, world.frozen, make_rollout(), None, key)
    assert set(state.critics) == {"reward", "cost"}
    assert "train/cost_critic_loss" in metrics
    assert "train/multiplier" in metrics
    exec(snippet("algorithm-test"), {})


@pytest.mark.slow
def test_kind_of_stage_that_is_added_by_the_diff_runs_after_another_and_is_checked(tmp_path):
    """In a copy of the package."""
    text = page("docs/adding.md")
    diff, file, config = (
        re.search(pattern, text, re.DOTALL)[1]
        for pattern in (
            r"```diff\n(--- a/safe_rlhf_jax/config/run.py.*?)```",
            r"```python\n# kind\n(.*?)```",
            r"```yaml\n# tested: kind\n(.*?)```",
        )
    )
    shutil.copytree(ROOT / "safe_rlhf_jax", tmp_path / "safe_rlhf_jax")
    subprocess.run(["git", "apply", "-"], input=diff, text=True, cwd=tmp_path, check=True)
    (tmp_path / "safe_rlhf_jax" / "stages" / "perplexity.py").write_text(file)
    (tmp_path / "config.yaml").write_text(config)

    code = """
from safe_rlhf_jax.train import main
command = ["--config", "config.yaml", "workdir=run"]
print([main([*command, *more]) for more in (["stages.measured.policy=stf"], [], [])])
"""
    environment = os.environ | {"PYTHONPATH": str(tmp_path)}
    process = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert process.stdout.endswith("[1, 0, 0]\n"), process.stderr
    assert "policy names 'stf', which is no earlier stage" in process.stderr
    result = json.loads((tmp_path / "run" / "measured" / "result.json").read_text())
    assert result["metrics"]["eval/perplexity"] > 1
    assert process.stdout.count("measured: finished, config unchanged; skipped") == 1
