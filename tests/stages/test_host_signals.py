"""Scorers with a tokenizer or template of their own, in every stage that scores."""

import json
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import pytest
import yaml

from safe_rlhf_jax import config as cfg
from safe_rlhf_jax.data.conversations import encode
from safe_rlhf_jax.data.tokenizer import load_tokenizer
from safe_rlhf_jax.metrics import read_jsonl
from safe_rlhf_jax.models import hf
from safe_rlhf_jax.pipeline import load_policy, load_scorer
from safe_rlhf_jax.stages import Run, check_run, reinforcement, run_stage
from safe_rlhf_jax.stages.datasets import load_data
from safe_rlhf_jax.stages.host_signals import ScorerSignal, called_once, open_scorers
from tests.helpers import in_two_processes, make_lm, make_scorer, perturbed, tiny_config
from tests.tokenizers import make_tokenizer

CHATML = (Path(__file__).parent.parent / "data" / "chat_templates" / "chatml.jinja").read_text()
TOKENS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
STAGES = """
- name: ppo_lag
  kind: rl
  steps: 2
  batch_size: 8
  responses_per_prompt: 2
  algorithm: {lagrange: {cost_limit: 0.0, constrained_groups: [risky], window: 16}}
  actor: {lr: 1.0e-3, warmup_ratio: 0}
- name: rejection
  kind: rejection_sampling
  rounds: 1
  responses_per_prompt: 2
  prompt_batch_size: 8
  batch_size: 8
  cost_limit: 100.0
- {name: dual, kind: dual, responses_per_prompt: 2, batch_size: 8, cost_limit: 0.0, kl_coeff: 1.0}
"""
COMMON = {
    "init_from": "preset:tiny", "reward_model": "OWN", "cost_model": "SHARED", "group_field": "prompt_source",
    "prompts": {"name": "demo/prompts", "split": "test", "limit": 16}, "max_prompt_length": 24,
    "max_response_length": 6,
}  # fmt: skip


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A reward model that reads ChatML of its own tokenizer, and a cost model that reads the run's."""
    folder = tmp_path_factory.mktemp("scorers")
    tokenizer = make_tokenizer(folder / "own", TOKENS, "<|im_end|>", spaces=None, template=CHATML)
    config = tiny_config(vocab_size=tokenizer.vocab_size, max_positions=256)
    module, variables = make_scorer("reward", config)
    hf.save(folder / "own", module, perturbed(variables), tokenizer.hf)
    demo = load_tokenizer("demo")
    module, variables = make_scorer("cost", tiny_config(vocab_size=demo.vocab_size, max_positions=64))
    hf.save(folder / "shared", module, perturbed(variables), demo.hf)
    return folder


@pytest.fixture(scope="module")
def finished(folders, tmp_path_factory):
    """A run of every stage that samples and scores."""
    workdir = tmp_path_factory.mktemp("run")
    names = {"OWN": f"path:{folders}/own", "SHARED": f"path:{folders}/shared"}
    common = {name: names.get(value, value) if isinstance(value, str) else value for name, value in COMMON.items()}
    stages = [common | stage for stage in yaml.safe_load(STAGES)]
    scored = {name: common[name] for name in ("reward_model", "cost_model", "max_prompt_length", "max_response_length")}
    stages.append(
        {"name": "evaluate", "kind": "evaluate", "policies": ["ppo_lag"], "prompts": [common["prompts"]],
         "batch_size": 8, "best_of": {"ppo_lag": 2}} | scored
    )  # fmt: skip
    pairs = {"name": "demo/preference", "split": "test", "limit": 16}
    stages.append(
        {"name": "dpo", "kind": "dpo", "init_from": "preset:tiny", "data": pairs, "preference": "lagrangian",
         "epochs": 1, "batch_size": 8, "max_length": 48, "reward_model": common["reward_model"],
         "cost_model": common["cost_model"]}
    )  # fmt: skip
    tree = {"workdir": str(workdir), "execution": {"scan_layers": False}, "stages": stages}
    file = workdir / "config.yaml"
    file.write_text(yaml.safe_dump(tree))
    run = Run(cfg.load_config(file, []))
    check_run(run)
    for stage in run.config.stages:
        run_stage(run, stage)
    return run, workdir


def test_only_the_scorer_with_another_tokenizer_is_read_in_its_own_way(finished, folders):
    run, _ = finished
    assert list(run.own) == [f"path:{folders}/own"]
    scorers = open_scorers(run, {"reward": f"path:{folders}/own", "cost": f"path:{folders}/shared"})
    assert (list(scorers.modules), list(scorers.host)) == (["cost"], ["reward"])


def test_score_is_that_of_the_text_in_the_scorers_own_template(finished, folders):
    run, _ = finished
    signal = ScorerSignal(run, f"path:{folders}/own", "reward")
    prompts, responses = ["how do i bake", "the bread", "x"], ["first mix", "then wait . " * 9, "yes"]
    turns = [[{"role": "user", "content": prompt}] for prompt in prompts] + [[{"role": "user", "content": "y"}]] * 5
    expected = load_scorer(f"{folders}/own", template="tokenizer")(prompts, responses)
    found = signal(turns, responses + ["no"] * 5, [True] * 8)[:3]
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


def test_response_that_was_cut_off_is_scored_without_an_end_and_an_empty_one_is_scored(finished, folders):
    run, _ = finished
    signal = ScorerSignal(run, f"path:{folders}/own", "reward")
    turns = [{"role": "user", "content": "how"}]
    end = run.own[f"path:{folders}/own"].tokenizer.eos_id
    whole, cut, empty = (signal.text(turns, *rest).ids for rest in (("so", True), ("so", False), ("", True)))
    assert whole[-1] == end
    assert cut == whole[:-1]
    assert empty[-1] == end
    signal.run = SimpleNamespace(config=SimpleNamespace(end_truncated=True))
    assert signal.text(turns, "so", False).ids == whole


def test_text_longer_than_the_scorer_reads_loses_its_beginning_and_that_is_said_once(finished, folders, capsys):
    run, _ = finished
    signal = ScorerSignal(run, f"path:{folders}/own", "reward")
    turns = [{"role": "user", "content": "x " * 200}]
    assert [len(signal.text(turns, "so", True).ids) for _ in range(2)] == [256, 256]
    assert capsys.readouterr().out.count("lose their beginning") == 1


def test_rewards_of_a_rollout_are_those_of_the_decoded_responses(finished, folders):
    """The samples of the evaluation, scored once more by the pipeline."""
    _, workdir = finished
    samples = [json.loads(line) for line in (workdir / "evaluate" / "samples.jsonl").read_text().splitlines()]
    scorer = load_scorer(f"{folders}/own")
    rows = []
    for sample in samples:
        turns = [{"role": "user", "content": sample["prompt"]}, {"role": "assistant", "content": sample["response"]}]
        ids = encode(turns, scorer.template, scorer.tokenizer).ids
        rows.append(ids[:-1] if sample["truncated"] else ids)
    np.testing.assert_allclose([s["reward"] for s in samples], scorer.score_tokens(rows), rtol=1e-4, atol=1e-4)
    chosen = {(s["policy"], s["prompt"]) for s in samples}
    assert len({policy for policy, _ in chosen}) == 2, "the policy, and the best of two responses"


def test_every_stage_has_rewards_that_differ_and_are_finite(finished):
    _, workdir = finished
    rewards = [row["train/reward"] for row in read_jsonl(workdir / "ppo_lag" / "metrics.jsonl")]
    assert np.isfinite(rewards).all()
    assert len(set(rewards)) == 2
    selected = read_jsonl(workdir / "rejection" / "selected.jsonl")
    assert len({row["reward"] for row in selected}) > 4
    assert np.isfinite(json.loads((workdir / "dual" / "result.json").read_text())["multiplier"])
    assert json.loads((workdir / "dpo" / "result.json").read_text())["kind"] == "dpo"


def test_critic_of_such_a_signal_starts_from_the_actor_or_from_the_model_that_is_named(finished, folders):
    run, _ = finished
    stage = run.config.stages[0]
    named = stage.model_copy(update={"critics": {"reward": f"path:{folders}/shared"}})
    networks = []
    for one in (stage, named):
        hp = reinforcement.hyperparameters(run, one, {"cost": (0.0,)}, ("benign", "risky", "sensitive"))
        with jax.set_mesh(run.mesh):
            networks.append(reinforcement.build_networks(run, one, hp)[0])
    assert networks[0].critics["reward"].config.hidden_size == 128
    assert networks[1].critics["reward"].config.hidden_size == 48
    assert networks[0].critics["cost"].config.hidden_size == 48
    assert list(networks[0].scorers) == ["cost"]


def checked(tmp_path, folders, tokenizer, reward, **settings):
    """Checks a run of RL whose policy is new, with the tokenizer in a folder."""
    stage = COMMON | {"name": "ppo", "kind": "rl", "reward_model": f"path:{reward}", "steps": 1}
    stage |= {"algorithm": {"name": "ppo"}, "cost_model": None} | settings
    tree = {"workdir": str(tmp_path / "run"), "tokenizer": str(tokenizer), "stages": [stage]}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(tree))
    run = Run(cfg.load_config(tmp_path / "config.yaml", []))
    check_run(run)
    return run


def test_scorer_without_rows_for_the_tokens_of_its_template_is_refused(folders, tmp_path):
    """ChatML was added to a tokenizer, and the embedding was not enlarged."""
    tokens = ["<unk>", "</s>"]
    own = make_tokenizer(tmp_path / "own", tokens, "</s>", spaces=None, template=CHATML, thoughts=TOKENS[1:])
    config = tiny_config(vocab_size=own.vocab_size - 2, max_positions=256)
    hf.save(tmp_path / "own", *make_scorer("reward", config), own.hf)
    message = r"reward_model .* embeds \d+ tokens, but its template writes token '<\|im_start\|>' \(\d+\), for which"
    with pytest.raises(cfg.ConfigError, match=message):
        checked(tmp_path, folders, folders / "shared", tmp_path / "own")


def test_scorer_that_lacks_a_token_of_the_runs_template_does_not_read_as_the_run_does(folders, tmp_path):
    tokens = ["<unk>", "</s>"]
    run = make_tokenizer(tmp_path / "run", tokens, "</s>", spaces=None, template=CHATML, thoughts=TOKENS[1:])
    base = make_tokenizer(tmp_path / "base", tokens, "</s>", spaces=None)
    config = tiny_config(vocab_size=run.vocab_size + 8, max_positions=256)
    hf.save(tmp_path / "base", *make_scorer("reward", config), base.hf)
    with pytest.raises(cfg.ConfigError, match=r"base' has a tokenizer of its own, without a chat template; say how"):
        checked(tmp_path, folders, tmp_path / "run", tmp_path / "base")


def test_prompt_that_a_scorer_cannot_read_is_unusable(folders, tmp_path):
    refuses = "{% if messages[0].role == 'system' %}{{ raise_exception('no system message') }}{% endif %}" + CHATML
    own = make_tokenizer(tmp_path / "own", TOKENS, "<|im_end|>", spaces=None, template=refuses)
    hf.save(tmp_path / "own", *make_scorer("reward", tiny_config(vocab_size=own.vocab_size, max_positions=256)), own.hf)
    turns = [{"role": "user", "content": "how"}]
    prompts = [turns] * 39 + [[{"role": "system", "content": "be short"}, *turns]]
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in prompts))
    data = {"prompts": {"name": str(tmp_path / "prompts.jsonl")}, "group_field": None}
    run = checked(tmp_path, folders, folders / "shared", tmp_path / "own", **data)
    loaded = load_data(run, run.config.stages[0], "prompts")
    assert len(loaded) == 39
    assert list(loaded.skipped) == [f"path:{tmp_path}/own: the template refuses: no system message"]


def test_policy_with_another_tokenizer_is_refused(folders, tmp_path):
    tokenizer = make_tokenizer(tmp_path / "policy", TOKENS, "<|im_end|>", spaces=None, template=CHATML)
    hf.save(tmp_path / "policy", *make_lm(tiny_config(vocab_size=600, max_positions=256)), tokenizer.hf)
    stage = COMMON | {"name": "ppo_lag", "kind": "rl", "init_from": f"path:{tmp_path}/policy", "steps": 1}
    stage |= {"reward_model": f"path:{folders}/own", "cost_model": f"path:{folders}/shared"}
    tree = {"workdir": str(tmp_path / "run"), "stages": [stage]}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(tree))
    with pytest.raises(cfg.ConfigError, match=r"init_from .* another tokenizer than the run's 'demo'"):
        check_run(Run(cfg.load_config(tmp_path / "config.yaml", [])))


def test_scorer_without_a_template_asks_for_one(folders, tmp_path):
    tokenizer = make_tokenizer(tmp_path / "own", TOKENS, "<|im_end|>", spaces=None)
    hf.save(tmp_path / "own", *make_scorer("reward", tiny_config(vocab_size=tokenizer.vocab_size)), tokenizer.hf)
    stage = COMMON | {"name": "ppo_lag", "kind": "rl", "reward_model": f"path:{tmp_path}/own", "steps": 1}
    stage |= {"cost_model": f"path:{folders}/shared"}
    tree = {"workdir": str(tmp_path / "run"), "stages": [stage], "template": "tokenizer"}
    tree["tokenizer"] = str(tmp_path / "demo")
    demo = load_tokenizer("demo").hf
    demo.chat_template = "{% for m in messages %}{{ m.content + '\n' + eos_token }}{% endfor %}"
    demo.save_pretrained(tmp_path / "demo")
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(tree))
    with pytest.raises(
        cfg.ConfigError, match=r"own' has a tokenizer of its own, without a chat template; .* templates: "
    ):
        Run(cfg.load_config(tmp_path / "config.yaml", []))
    tree["templates"] = {f"path:{tmp_path}/own": "beaver"}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(tree))
    run = Run(cfg.load_config(tmp_path / "config.yaml", []))
    assert run.own[f"path:{tmp_path}/own"].template.source.startswith("{{ 'BEGINNING OF CONVERSATION")


def test_template_of_a_model_that_is_in_no_stage_is_refused(finished):
    _, workdir = finished
    with pytest.raises(cfg.ConfigError, match=r"templates names 'path:typo', which no stage uses"):
        cfg.load_config(workdir / "config.yaml", ["templates={'path:typo': beaver}"])


def test_policy_of_the_run_talks_as_it_was_trained(finished):
    _, workdir = finished
    policy = load_policy(f"{workdir}/ppo_lag/export", template="tokenizer")
    assert len(policy(["how do i bake"], max_tokens=4)) == 1


def test_function_is_called_by_the_first_process_and_all_have_its_scores(monkeypatch):
    called = []

    def function(conversations, responses, ended, records):
        called.append(responses)
        return np.array([float(len(text)) for text in responses], np.float32)

    rows = [[]], ["three"], [True], [{}]
    one, other = in_two_processes(monkeypatch, *[lambda: called_once(function)(*rows)] * 2)
    assert one.tolist() == other.tolist() == [5.0]
    assert called == [["three"]]
