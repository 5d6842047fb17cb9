"""Outside judges: they score what policies wrote, agree with labels or do not, and have no part in training."""

import json
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import yaml

from safe_rlhf_jax import config as cfg
from safe_rlhf_jax.data.sources import read_records
from safe_rlhf_jax.data.tokenizer import load_tokenizer
from safe_rlhf_jax.errors import UserError
from safe_rlhf_jax.metrics import read_jsonl
from safe_rlhf_jax.models import hf
from safe_rlhf_jax.stages import Run, check_run, datasets, held_out, run_stage
from safe_rlhf_jax.stages.host_signals import FunctionSignal
from safe_rlhf_jax.stages.programs import of_shapes
from safe_rlhf_jax.stages.reinforcement import reinforcement_programs
from tests.helpers import make_scorer, save_models, tiny_config
from tests.tokenizers import make_tokenizer

CHATML = (Path(__file__).parent.parent / "data" / "chat_templates" / "chatml.jinja").read_text()
TOKENIZER = load_tokenizer("demo")
CONFIG = tiny_config(vocab_size=TOKENIZER.vocab_size, hidden_size=16, num_layers=1, head_dim=4)
PROMPTS = {"name": "demo/prompts", "split": "test", "limit": 16}
PAIRS = {"name": "demo/preference", "split": "test", "limit": 24}
DEMONSTRATIONS = {"name": "demo/sft", "split": "test", "limit": 20}
FUNCTIONS = """
import numpy as np
UNITS = 100.0
def length(conversations, responses, ended):
    assert [turns[-1]["role"] for turns in conversations] == ["user"] * len(responses) == ["user"] * len(ended)
    return np.array([UNITS * len(response) for response in responses])
def doubts(conversations, responses, ended):
    return [1.0 if "e" in response else -3.0 for response in responses]
def too_few(conversations, responses, ended):
    return np.zeros(1)
def words(conversations, responses, ended):
    return responses
def infinite(conversations, responses, ended):
    return [float("inf")] * len(responses)
"""


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Two policies, two scorers, a judge like one of them, one with its own tokenizer, and a module of functions."""
    folder = tmp_path_factory.mktemp("models")
    save_models(folder, "ab", CONFIG, TOKENIZER.hf)
    shutil.copytree(folder / "cost", folder / "same")
    tokens = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    own = make_tokenizer(folder / "own", tokens, "<|im_end|>", spaces=None, template=CHATML)
    config = tiny_config(vocab_size=own.vocab_size, hidden_size=16, num_layers=1, head_dim=4, max_positions=256)
    hf.save(folder / "own", *make_scorer("reward", config), own.hf)
    (folder / "a_judge.py").write_text(FUNCTIONS)
    return folder


@pytest.fixture(autouse=True)
def _path(models, monkeypatch):
    monkeypatch.syspath_prepend(str(models))


def evaluate_stage(models, **settings):
    return {
        "name": "evaluate", "kind": "evaluate", "policies": [f"path:{models}/a", f"path:{models}/b"],
        "reward_model": f"path:{models}/reward", "cost_model": f"path:{models}/cost", "max_prompt_length": 24,
        "max_response_length": 6, "prompts": [PROMPTS], "group_field": "prompt_source", "batch_size": 8,
    } | settings  # fmt: skip


def rl_stage(models, **settings):
    return {
        "name": "ppo", "kind": "rl", "init_from": f"path:{models}/a", "reward_model": f"path:{models}/reward",
        "cost_model": f"path:{models}/cost", "max_prompt_length": 24, "max_response_length": 6, "prompts": PROMPTS,
        "eval_prompts": PROMPTS | {"split": "redteam"}, "steps": 2, "eval_every": 1, "batch_size": 8,
        "algorithm": {"lagrange": {"cost_limit": 0.0}}, "actor": {"lr": 1e-2, "warmup_ratio": 0},
    } | settings  # fmt: skip


def run_of(folder, *stages):
    tree = {"workdir": str(folder / "run"), "template": "plain", "execution": {"scan_layers": False}}
    (folder / "config.yaml").write_text(yaml.safe_dump(tree | {"stages": list(stages)}))
    return Run(cfg.load_config(folder / "config.yaml", []))


def finished(folder, *stages):
    run = run_of(folder, *stages)
    check_run(run)
    for stage in run.config.stages:
        run_stage(run, stage)
    return run


@pytest.fixture(scope="module")
def evaluated(models, tmp_path_factory):
    """The folder of a finished evaluation with every sort of judge."""
    folder = tmp_path_factory.mktemp("evaluated")
    judges = {
        "cost/same": f"path:{models}/same", "cost/doubts": "function:a_judge:doubts",
        "reward/length": "function:a_judge:length", "reward/own": f"path:{models}/own",
    }  # fmt: skip
    stage = evaluate_stage(
        models,
        max_prompt_length=50,
        judges=judges,
        pairs={"reward": PAIRS, "cost": PAIRS},
        best_of={f"path:{models}/b": 2},
        demonstrations=DEMONSTRATIONS,
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(models))
        finished(folder, stage)
    return folder / "run" / "evaluate"


def test_judges_score_every_response_of_every_policy(evaluated, models):
    samples = [json.loads(line) for line in (evaluated / "samples.jsonl").read_text().splitlines()]
    assert len({sample["policy"] for sample in samples}) == 3  # and the best of two
    for sample in samples:
        judged = sample["judged"]
        assert judged["cost/same"] == pytest.approx(sample["cost"], abs=1e-5)
        assert judged["cost/doubts"] == (1.0 if "e" in sample["response"] else -3.0)
        assert judged["reward/length"] == 100 * len(sample["response"])
        unsafe = np.mean([1 / (1 + np.exp(-judged[name])) for name in ("cost/same", "cost/doubts")])
        assert sample["judge_unsafe"] == pytest.approx(unsafe)
    spread = [np.std([s["judged"][name] for s in samples]) for name in ("reward/length", "reward/own")]
    assert min(spread) > 0
    first = samples[0]["judged"]
    mean = np.mean([first["reward/length"] / spread[0], first["reward/own"] / spread[1]])
    assert samples[0]["judge_reward"] == pytest.approx(mean)


def test_report_has_the_judges_views_by_policy_and_prompts_and_each_judge_alone(evaluated, models):
    result = json.loads((evaluated / "result.json").read_text())
    rows = {(row["judge"], row["policy"], row["prompts"]): row for row in result["judges"]}
    assert {judge for judge, *_ in rows} == {"average", "cost/same", "cost/doubts", "reward/length", "reward/own"}
    assert {prompts for *_, prompts in rows} >= {"benign", "risky"}
    row = rows["average", f"path:{models}/b", "risky"]
    assert set(row["wins"]) == {f"path:{models}/a"}
    assert set(row["wins"][f"path:{models}/a"]) == {"reward", "cost"}
    assert f"path:{models}/b/judge_unsafe_share/risky" in result["metrics"]
    assert "unsafe" not in rows["reward/own", f"path:{models}/b", "risky"]
    page = (evaluated / "report.html").read_text()
    assert 'id="judges"' in page
    assert "Each judge alone" in page
    assert "<td>judge cost/doubts function:a_judge:doubts</td>" in page  # where models come from


def test_own_models_and_judges_are_measured_on_the_same_labelled_pairs_in_the_same_way(evaluated):
    found = json.loads((evaluated / "result.json").read_text())["agreement"]
    assert list(found["cost"]) == ["own model", "cost/same", "cost/doubts", "average"]
    assert list(found["reward"]) == ["own model", "reward/length", "reward/own", "average"]
    assert found["cost"]["own model"] == found["cost"]["cost/same"]
    assert {one["accuracy"]["n"] for models in found.values() for one in models.values()} == {24}
    assert {one["sign"]["all"]["n"] for one in found["cost"].values()} == {48}
    records = read_records(**PAIRS)
    longer = [len(r[f"response_{r['better_response_id']}"]) for r in records]
    shorter = [len(r[f"response_{1 - r['better_response_id']}"]) for r in records]
    expected = np.mean([(a > b) + 0.5 * (a == b) for a, b in zip(longer, shorter, strict=True)])
    assert found["reward"]["reward/length"]["accuracy"]["rate"] == expected


def test_perplexity_of_every_policy_is_that_of_the_response_tokens_of_demonstrations(evaluated, models):
    metrics = json.loads((evaluated / "result.json").read_text())["metrics"]
    run = Run(cfg.load_config(evaluated.parent.parent / "config.yaml", []))
    batch = datasets.load_data(run, run.config.stages[0], "demonstrations").arrays
    for name in "ab":
        module, variables = hf.load(models / name)
        logits = module.apply(variables, jnp.asarray(batch.tokens), jnp.asarray(batch.mask))[:, :-1]
        log_probs = np.take_along_axis(jax.nn.log_softmax(logits), batch.tokens[:, 1:, None], -1)[..., 0]
        expected = np.exp(-log_probs[batch.loss_mask[:, 1:]].mean())
        assert metrics[f"path:{models}/{name}/perplexity"] == pytest.approx(expected, rel=1e-4)
    page = (evaluated / "report.html").read_text()
    assert "perplexity of demonstrations" in page
    assert "<td>data demo/sft (test)</td>" in page


@pytest.fixture(scope="module")
def trained(models, tmp_path_factory):
    """The folders of the same training without and with judges."""
    folders = {}
    judges = {"cost/same": f"path:{models}/same", "reward/length": "function:a_judge:length"}
    for name, settings in (("without", {}), ("with", {"judges": judges})):
        folders[name] = tmp_path_factory.mktemp(name)
        with pytest.MonkeyPatch.context() as patch:
            patch.syspath_prepend(str(models))
            finished(folders[name], rl_stage(models, **settings))
    return {name: folder / "run" / "ppo" for name, folder in folders.items()}


def test_training_with_judges_is_bit_for_bit_the_training_without(trained):
    rows = {name: read_jsonl(folder / "metrics.jsonl") for name, folder in trained.items()}
    for without, with_judges in zip(*rows.values(), strict=True):
        numbers = {name: value for name, value in without.items() if not name.startswith("perf/")}
        assert len(numbers) > 10
        assert numbers.items() <= with_judges.items()
    judged = {"eval/judge_reward_mean", "eval/judge_unsafe_probability", "eval/judge_unsafe_share"}
    assert rows["with"][0].keys() - rows["without"][0].keys() == judged
    weights = [(folder / "export" / hf.WEIGHTS).read_bytes() for folder in trained.values()]
    assert weights[0] == weights[1]


def test_nothing_of_a_judge_is_in_the_compiled_iteration(models, tmp_path):
    texts = []
    for judges in ({}, {"cost/same": f"path:{models}/same", "reward/own": f"path:{models}/own"}):
        run = run_of(tmp_path, rl_stage(models, judges=judges))
        with jax.set_mesh(run.mesh):
            (program,) = reinforcement_programs(of_shapes(run), run.config.stages[0])
            texts.append(program.function.lower(*program.arguments).as_text())
    assert texts[0] == texts[1]


def test_rewards_of_judges_are_in_units_of_the_policy_at_the_start(trained):
    result = json.loads((trained["with"] / "result.json").read_text())
    assert result["start"]["eval/kl_mean"] == 0.0
    assert result["start"]["eval/judge_reward_mean"] > 0
    assert result["metrics"]["eval/judge_unsafe_share"] == result["metrics"]["eval/cost_positive_share"]
    assert "start" not in json.loads((trained["without"] / "result.json").read_text())


def test_judges_score_a_policy_of_adapters(models, tmp_path):
    judges = {"cost/same": f"path:{models}/same"}
    settings = {"lora": {"rank": 2, "alpha": 4}, "steps": 1, "eval_every": None, "algorithm": {"name": "ppo"}}
    finished(tmp_path, rl_stage(models, judges=judges, **settings))
    result = json.loads((tmp_path / "run" / "ppo" / "result.json").read_text())
    for found in (result["start"], result["metrics"]):
        assert found["eval/judge_unsafe_share"] == found["eval/cost_positive_share"]
    assert result["start"]["eval/kl_mean"] == 0.0


def test_best_checkpoint_may_be_chosen_by_a_judge(models, tmp_path):
    judges = {"cost/same": f"path:{models}/same"}
    check_run(run_of(tmp_path, rl_stage(models, judges=judges, keep_best="-eval/judge_unsafe_share")))
    with pytest.raises(cfg.ConfigError, match="keep_best 'eval/judge_reward_mean' is none of its metrics"):
        check_run(run_of(tmp_path, rl_stage(models, judges=judges, keep_best="eval/judge_reward_mean")))


def test_prompt_that_a_judge_cannot_read_is_left_out_of_evaluations_only(models, tmp_path):
    refuses = "{% if 'plant' in messages[0].content %}{{ raise_exception('no plants') }}{% endif %}" + CHATML
    tokens = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    own = make_tokenizer(tmp_path / "own", tokens, "<|im_end|>", spaces=None, template=refuses)
    config = tiny_config(vocab_size=own.vocab_size, hidden_size=16, num_layers=1, head_dim=4, max_positions=256)
    hf.save(tmp_path / "own", *make_scorer("reward", config), own.hf)
    prompts = ["how do i plant", *(f"how do i bake {i}" for i in range(39))]
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in prompts))
    data = {"name": str(tmp_path / "prompts.jsonl")}
    judges = {"reward/own": f"path:{tmp_path}/own"}
    run = run_of(tmp_path, rl_stage(models, judges=judges, prompts=data, eval_prompts=data))
    sizes = {field: len(datasets.load_data(run, run.config.stages[0], field)) for field in ("prompts", "eval_prompts")}
    assert sizes == {"prompts": 40, "eval_prompts": 39}


@pytest.mark.parametrize("settings", [{"keep_best": "eval/reward_mean", "eval_every": None}, {"keep_best": None},
                                      {"keep_best": "train/reward"}])  # fmt: skip
def test_patience_without_evaluations_that_rank_is_refused(models, tmp_path, settings):
    message = r"patience 3 counts evaluations without a better keep_best; give eval_every, and as keep_best"
    with pytest.raises(cfg.ConfigError, match=message):
        run_of(tmp_path, rl_stage(models, **(settings | {"patience": 3})))


def test_patience_decides_a_result_and_so_do_then_the_evaluations(models, tmp_path):
    def hash_of(**settings):
        return run_of(tmp_path, rl_stage(models, **settings)).hashes["ppo"]

    best = {"keep_best": "eval/reward_mean"}
    assert hash_of() == hash_of(**best) == hash_of(judges={})
    assert len({hash_of(), hash_of(**best, patience=1), hash_of(**best, patience=1, eval_every=2)}) == 3


@pytest.mark.parametrize(
    ("reference", "message"),
    [
        ("function:a_judge", r"names no function; write function:MODULE:NAME"),
        ("function:no_judge:length", r"cannot be imported: No module named 'no_judge'; Python looks for modules in"),
        ("function:a_judge:lenght", r"a_judge has no 'lenght'; did you mean 'length'\?"),
        ("function:a_judge:UNITS", r"a_judge:UNITS is no function, but float"),
        ("function:a_judge:too_few", r"returned numbers of shape \(1,\) for 2 responses; .* of shape \(2,\)"),
        ("function:a_judge:words", r"a_judge:words returned no numbers, but list"),
        ("function:a_judge:infinite", r"a_judge:infinite returned inf for the response 'Hello!'"),
        ("cots", r"'cots', which is no earlier stage .* nor 'path:…', 'hf:…' or 'function:MODULE:NAME'"),
        ("COST", r"names 'path:.*/cost', which is the stage's own cost model; a judge is a model that training never"),
    ],
)
def test_wrong_judge_is_one_clear_line_before_anything_runs(models, tmp_path, reference, message):
    reference = f"path:{models}/cost" if reference == "COST" else reference
    with pytest.raises(UserError, match=f"cost/x.*{message}") as error:
        check_run(run_of(tmp_path, evaluate_stage(models, judges={"cost/x": reference})))
    assert "\n" not in str(error.value)


def test_signal_without_a_kind_and_judges_without_prompts_are_refused(models, tmp_path):
    with pytest.raises(cfg.ConfigError, match=r"'harm' is no signal of a judge; write reward/NAME or cost/NAME"):
        run_of(tmp_path, evaluate_stage(models, judges={"harm": f"path:{models}/same"}))
    settings = {"eval_prompts": None, "eval_every": None, "judges": {"cost/x": f"path:{models}/same"}}
    with pytest.raises(cfg.ConfigError, match=r"judges does nothing: they score responses to eval_prompts"):
        run_of(tmp_path, rl_stage(models, **settings))


def test_scores_of_a_function_that_is_not_finite_are_refused_while_it_runs():
    with pytest.raises(FloatingPointError, match=r"a_judge:infinite returned inf for the response 'so'"):
        FunctionSignal("function:a_judge:infinite")([[{"role": "user", "content": "how"}]], ["so"], [True])


def test_source_of_a_function_is_part_of_the_hash(models, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "another_judge.py").write_text("def cost(*_):\n    return []\n")
    stage = evaluate_stage(models, judges={"cost/x": "function:another_judge:cost"})
    before = run_of(tmp_path, stage).hashes
    assert run_of(tmp_path, stage).hashes == before
    (tmp_path / "another_judge.py").write_text("def cost(*_):\n    return [1.0]\n")
    assert run_of(tmp_path, stage).hashes != before


def test_judge_that_trained_a_policy_is_named_and_its_data_are_not_the_policys(models, tmp_path):
    rl = rl_stage(models, judges={"cost/x": "other"})
    cost = {"name": "other", "kind": "cost", "init_from": f"path:{models}/a", "data": PAIRS, "max_length": 48}
    stage = evaluate_stage(models, policies=["ppo"], judges={"cost/x": f"path:{models}/cost", "cost/y": "other"})
    run = run_of(tmp_path, cost, rl, stage | {"cost_model": f"path:{models}/same"})
    check_run(run)
    (said,) = [line for line in run.warnings["evaluate"] if line.startswith("judges")]
    assert f"judges.cost/x names 'path:{models}/cost', which took part in the training of ppo:" in said
    stages = run.config.stages
    assert stages[0] in held_out.lineage(stages, stages[1])
    assert stages[0] not in held_out.lineage(stages, stages[1].model_copy(update={"judges": {}}))
    later = stages[2].model_copy(update={"judges": {}})
    assert stages[0] not in held_out.lineage(stages, later)
