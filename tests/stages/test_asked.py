"""Signals from the host in RL: functions and endpoints between sampling and learning."""

import json
import sys
import threading

import jax
import numpy as np
import pytest
import yaml

from safe_rlhf_jax import config as cfg
from safe_rlhf_jax.data.tokenizer import load_tokenizer
from safe_rlhf_jax.errors import UserError
from safe_rlhf_jax.metrics import read_jsonl
from safe_rlhf_jax.models import hf
from safe_rlhf_jax.stages import Run, asked, check_run, reinforcement, run_stage
from safe_rlhf_jax.stages.host_signals import given_scores
from safe_rlhf_jax.stages.judge_labeller import read_constitution
from safe_rlhf_jax.stages.programs import of_shapes
from safe_rlhf_jax.types import Rollout
from tests.helpers import save_models, tiny_config
from tests.test_endpoints import Fake, Handler

TOKENIZER = load_tokenizer("demo")
CONFIG = tiny_config(vocab_size=TOKENIZER.vocab_size, hidden_size=16, num_layers=1, head_dim=4, max_positions=96)
ONE = {"cost": {"function": "a:b"}}
JUDGE = {"base_url": "http://x/v1", "model": "m"}
PROMPTS = {"name": "demo/prompts", "split": "test", "limit": 16}
FUNCTIONS = '''
import pathlib
import time
import numpy as np
HERE = pathlib.Path(__file__).parent
ASKED = []
FAIL = []
def letters(conversations, responses, ended):
    """How often the letter e stands in a response, about 0."""
    ASKED.extend(zip([str(turns) for turns in conversations], responses, ended))
    return np.array([response.count("e") - 1.0 for response in responses])
def scored(conversations, responses, ended):
    """The cost model itself, behind a function."""
    from safe_rlhf_jax.data.conversations import encode
    from safe_rlhf_jax.pipeline import load_scorer
    scorer = load_scorer(str(HERE / "cost"), template="beaver")
    rows = []
    for turns, response, whole in zip(conversations, responses, ended):
        ids = encode([*turns, {"role": "assistant", "content": response}], scorer.template, scorer.tokenizer).ids
        rows.append(ids if whole else ids[:-1])
    return scorer.score_tokens(rows)
def counted(conversations, responses, ended):
    """No function of the texts: it counts them, except those of the check."""
    if FAIL:
        FAIL.pop(0)()
    if "Hello!" in responses:
        return [0.0] * len(responses)
    ASKED.extend(responses)
    return [float(len(ASKED) - i) for i in range(len(responses))]
def category(conversations, responses, ended, records):
    """Reads a field of the record."""
    assert [turns[-1]["content"] for turns in conversations] == [record["prompt"] for record in records]
    return [float(len(record["prompt_source"])) for record in records]
def fails(conversations, responses, ended):
    ASKED.extend(responses)
    if FAIL:
        FAIL.pop(0)()
    return np.array([len(response) - 8.0 for response in responses])
def hangs(conversations, responses, ended):
    time.sleep(3600)
def raises(conversations, responses, ended):
    raise KeyError("politeness")
def too_few(conversations, responses, ended):
    return np.zeros(1)
def not_numbers(conversations, responses, ended):
    return responses
def not_finite(conversations, responses, ended):
    return [float("nan")] * len(responses)
'''


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A policy, a reward and a cost model, and a module of functions."""
    folder = tmp_path_factory.mktemp("models")
    save_models(folder, "a", CONFIG, TOKENIZER.hf)
    (folder / "signals_here.py").write_text(FUNCTIONS)
    return folder


@pytest.fixture(autouse=True)
def functions(models, monkeypatch):
    """The module of functions, as new."""
    monkeypatch.syspath_prepend(str(models))
    monkeypatch.delitem(sys.modules, "signals_here", raising=False)
    monkeypatch.setattr(asked, "PAUSE_S", 0.0)
    import signals_here

    return signals_here


def rl_stage(models, **settings):
    return {
        "name": "ppo", "kind": "rl", "init_from": f"path:{models}/a", "reward_model": f"path:{models}/reward",
        "max_prompt_length": 24, "max_response_length": 6, "prompts": PROMPTS, "steps": 3, "batch_size": 8,
        "algorithm": {"lagrange": {"cost_limit": -0.5, "window": 16}}, "actor": {"lr": 1e-2, "warmup_ratio": 0},
    } | settings  # fmt: skip


def run_of(folder, *stages, **settings):
    tree = {"workdir": str(folder / "run"), "template": "plain", "execution": {"scan_layers": False}} | settings
    (folder / "config.yaml").write_text(yaml.safe_dump(tree | {"stages": list(stages)}))
    return Run(cfg.load_config(folder / "config.yaml", []))


def finished(folder, *stages, **settings):
    run = run_of(folder, *stages, **settings)
    check_run(run)
    for stage in run.config.stages:
        run_stage(run, stage)
    return folder / "run" / "ppo"


def numbers(folder):
    """The metrics of every step, without the speed."""
    rows = read_jsonl(folder / "metrics.jsonl")
    return [{name: value for name, value in row.items() if not name.startswith("perf/")} for row in rows]


def test_function_that_is_the_cost_model_trains_as_the_cost_model(models, tmp_path):
    """λ, the window, the critic and the policy move alike, whoever computes the cost."""
    found = []
    for name, settings in {
        "model": {"cost_model": f"path:{models}/cost"},
        "function": {"signals": {"cost": {"function": "signals_here:scored"}}},
    }.items():
        (tmp_path / name).mkdir()
        templates = {"templates": {f"path:{models}/cost": "beaver"}} if name == "model" else {}  # it reads texts too
        found.append(numbers(finished(tmp_path / name, rl_stage(models, **settings), **templates)))
    for with_model, with_function in zip(*found, strict=True):
        assert with_model.keys() == with_function.keys()
        assert "train/cost_value" in with_model
        for name, value in with_model.items():
            assert with_function[name] == pytest.approx(value, rel=2e-3, abs=2e-4), name
    multipliers = [row["train/multiplier"] for row in found[1]]
    assert len({1.0, *multipliers}) == 4, "λ has not moved: the test shows nothing"


def test_cost_of_a_function_falls_and_the_critic_starts_from_the_actor(models, tmp_path):
    stage = rl_stage(
        models,
        signals={"cost/letters": {"function": "signals_here:letters"}},
        algorithm={"constraints": {"letters": {"cost_limit": -0.9, "lr": 0.5, "window": 64}}, "kl_coeff": 0.0},
        steps=25, batch_size=32, eval_prompts=PROMPTS, eval_every=25,
        actor={"lr": 2e-2, "warmup_ratio": 0, "schedule": "constant"}, critic={"lr": 1e-2, "schedule": "constant"},
    )  # fmt: skip
    folder = finished(tmp_path, stage)
    rows = read_jsonl(folder / "metrics.jsonl")
    costs = [row["train/cost/letters"] for row in rows]
    assert np.mean(costs[-5:]) < np.mean(costs[:3]) - 0.5
    multipliers = [row["train/multiplier/letters"] for row in rows]
    assert multipliers[-1] < max(multipliers) > 1, "λ rises until the limit is met"
    metrics = json.loads((folder / "result.json").read_text())["metrics"]
    assert metrics["eval/cost_mean/letters"] == pytest.approx(-1, abs=0.2), "at best no letter e"
    assert metrics["eval/unsafe_share/letters"] == 0


COUNTED = {"signals": {"cost": {"function": "signals_here:counted", "retries": 0}}}


@pytest.fixture(scope="module")
def whole(models, tmp_path_factory):
    """A run whose costs are other ones at every call: only answers that were kept can give them again."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(models))
        patch.delitem(sys.modules, "signals_here", raising=False)
        return finished(tmp_path_factory.mktemp("whole"), rl_stage(models, **COUNTED))


def assert_same(folder, other):
    assert numbers(folder) == numbers(other)
    weights = [(one / "export" / hf.WEIGHTS).read_bytes() for one in (folder, other)]
    assert weights[0] == weights[1]


def test_run_that_is_killed_between_sampling_and_learning_ends_with_the_same_bits(models, whole, tmp_path, monkeypatch):
    answers, batches = asked.Asked.answers, []

    def killed_at_the_third(self, rows):
        found = answers(self, rows)
        batches.append(len(rows))
        if len(batches) == 3:  # the check, the first step, and the second one
            raise KeyboardInterrupt
        return found

    stage = rl_stage(models, **COUNTED, checkpoint_every=1)
    with monkeypatch.context() as patch:
        patch.setattr(asked.Asked, "answers", killed_at_the_third)
        with pytest.raises(KeyboardInterrupt):
            finished(tmp_path, stage)
    assert len((tmp_path / "run" / "ppo" / "answers_cost.jsonl").read_text().splitlines()) == 2
    assert_same(finished(tmp_path, stage), whole)


def interrupted():
    """A failure of any sort."""
    raise RuntimeError("the service\nis down")


def test_failure_of_a_function_saves_the_step_and_the_same_command_ends_with_the_same_bits(
    models, whole, tmp_path, functions
):
    functions.FAIL[:] = [lambda: None, lambda: None, interrupted]  # the check, the first step, the second one
    message = (
        r"^ppo: signals\.cost: function:signals_here:counted raised RuntimeError: the service is down in one try "
        r"\(.*test_asked\.py:\d+\); mend the function; step 1 is saved, the same command continues$"
    )
    with pytest.raises(UserError, match=message):
        finished(tmp_path, rl_stage(models, **COUNTED))
    assert [int(path.name) for path in (tmp_path / "run" / "ppo" / "checkpoints").iterdir()] == [1]
    assert_same(finished(tmp_path, rl_stage(models, **COUNTED)), whole)


def test_function_is_tried_again_after_an_error_and_a_timeout(functions):
    settings = {"function": "signals_here:fails", "timeout_s": 0.2}
    functions.FAIL[:] = [interrupted, lambda: functions.time.sleep(30)]
    rows = ([[{"role": "user", "content": "how"}]], ["so"], [True], [{}])
    assert asked.PatientFunction(cfg.FunctionSignal(**settings))(*rows) == [-6.0]
    assert functions.ASKED == ["so"] * 3


def test_text_is_asked_about_once_and_a_changed_end_or_conversation_is_another_text(functions, tmp_path):
    def ask(*rows):
        signal = asked.Asked("x", asked.PatientFunction(settings), tmp_path / "answers.jsonl")
        return signal(*map(list, zip(*rows, strict=True))).tolist()

    settings = cfg.FunctionSignal(function="signals_here:letters")
    how, why = ([{"role": "user", "content": text}] for text in ("how", "why"))
    assert ask((how, "see", True, {}), (how, "see", True, {"id": 1}), (how, "so", True, {})) == [1.0, 1.0, -1.0]
    assert len(functions.ASKED) == 2, "a record that is not read makes no other text"
    assert ask((how, "see", True, {}), (how, "see", False, {}), (why, "see", True, {})) == [1.0] * 3
    assert len(functions.ASKED) == 4
    with (tmp_path / "answers.jsonl").open("a") as file:
        file.write('{"unfinished')
    assert ask((how, "see", False, {})) == [1.0]
    assert len(functions.ASKED) == 4


def test_function_that_names_records_reads_the_fields_of_the_prompts(models, tmp_path):
    run = run_of(tmp_path, rl_stage(models, signals={"cost": {"function": "signals_here:category"}}))
    check_run(run)
    prompts = run.loaded["ppo", "prompts"]
    (signal,) = asked.open_signals(run, run.config.stages[0]).values()
    scores = signal(prompts.turns, ["so"] * 16, [True] * 16, prompts.records)
    assert scores.tolist() == [float(len(record["prompt_source"])) for record in prompts.records]
    assert len(set(scores.tolist())) > 1


@pytest.mark.parametrize(
    ("signal", "message"),
    [
        ({"function": "signals_here"}, r"names no function; write MODULE:NAME \(value 'signals_here'\)"),
        ({"function": "a:b", "timeout": 3}, r"unknown key .*did you mean 'stages\.0\.signals\.cost\.timeout_s'"),
        ({"function": "no_module:score"}, r"cannot be imported: No module named 'no_module'; Python looks for modules"),
        ({"function": "signals_here:leters"}, r"signals_here has no 'leters'; did you mean 'letters'\?"),
        ({"function": "signals_here:too_few"}, r"returned numbers of shape \(1,\) for 2 responses; .* of shape \(2,\)"),
        ({"function": "signals_here:not_numbers"}, r"returned no numbers, but list"),
        ({"function": "signals_here:not_finite"}, r"returned nan for the response 'Hello!'"),
        ({"function": "signals_here:raises"}, r"raised KeyError: 'politeness' in 3 tries .*signals_here\.py:\d+\)"),
        (
            {"function": "signals_here:hangs", "timeout_s": 0.05, "retries": 1},
            r"signals_here:hangs has not answered within timeout_s 0\.05 in 2 tries; raise it",
        ),
        ({"base_url": "http://127.0.0.1:9/v1", "model": "judge", "retries": 0}, r"cannot be reached in one try"),
        ({"base_url": "http://x/v1"}, r"\.model: required, and missing"),
        (JUDGE | {"key_env": "NO_SUCH_KEY"}, r"no environment variable NO_SUCH_KEY"),
        (JUDGE | {"question": "Is it rude?"}, r"no place for the text; write {response}"),
        (JUDGE | {"question": "Rude? {response}"}, r"question needs answers"),
        (JUDGE | {"answers": {"yes": 1, "no": 1}}, r"need two different scores"),
        (JUDGE | {"answers": {"not ok": 1, "ok": 0}}, r"answers names 'not ok'"),
        (JUDGE | {"answers": {True: 1, False: 0}}, r"YAML reads yes and no as true and false; write them in quotes"),
        (JUDGE | {"answers": {"yes": 1, "no": 0}, "constitution": "c.yaml"}, r"constitution does nothing: answers are"),
    ],
)  # fmt: skip
def test_wrong_signal_is_one_clear_line_before_anything_runs(models, tmp_path, signal, message):
    with pytest.raises(UserError, match=f"signals.cost.*{message}") as error:
        check_run(run_of(tmp_path, rl_stage(models, signals={"cost": signal})))
    assert "\n" not in str(error.value)
    assert not (tmp_path / "run" / "ppo").exists()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"signals": {"harm": {"function": "a:b"}}}, "'harm' is no signal; write reward, cost or cost/NAME"),
        ({"reward_model": None, "signals": ONE}, "reward_model is required, and missing; .* by signals.reward"),
        ({"signals": ONE | {"reward": ONE["cost"]}}, "signals.reward and reward_model are one signal; leave out one"),
        (
            {"signals": ONE | {"cost/a": {"function": "a:b"}}, "cost_models": {"a": "path:x"}},
            "signals.cost/a and cost_models.a are one signal",
        ),
        (
            {"signals": {"reward": JUDGE}, "reward_model": None},
            "reward: without a question and answers, a judge says whether a response is harmful",
        ),
        ({"signals": {}, "algorithm": {}}, "needs cost_model"),
        (
            {"algorithm": {"constraints": {"a": {}}}},
            "constraints.a limits a cost that no model measures; .* or a function or an endpoint in signals.cost/a",
        ),
        (
            {"signals": ONE, "eval_prompts": PROMPTS, "judges": {"cost/x": "function:a:b"}},
            "judges.cost/x names 'function:a:b', which is the stage's own cost model",
        ),
    ],
)  # fmt: skip
def test_signals_that_do_not_fit_the_stage_are_refused(models, tmp_path, settings, message):
    with pytest.raises(UserError, match=message):
        check_run(run_of(tmp_path, rl_stage(models, **settings)))


def test_stage_without_host_signals_is_one_program_with_the_hash_that_it_had(models, tmp_path):
    model = {"cost_model": f"path:{models}/cost"}
    names = []
    for settings in (model, {"signals": {"cost": {"function": "signals_here:letters"}}}):
        run = run_of(tmp_path, rl_stage(models, **settings))
        with jax.set_mesh(run.mesh):
            programs = list(reinforcement.reinforcement_programs(of_shapes(run), run.config.stages[0]))
        names.append([program.name for program in programs])
    assert names == [["iteration"], ["generation", "learning"]]
    hashes = [run_of(tmp_path, rl_stage(models, **model, **more)).hashes["ppo"] for more in ({}, {"signals": {}})]
    assert hashes[0] == hashes[1]
    signals = [{"function": "signals_here:letters"} | more for more in ({}, {"timeout_s": 5, "retries": 0})]
    hashes = [run_of(tmp_path, rl_stage(models, signals={"cost": signal})).hashes["ppo"] for signal in signals]
    assert hashes[0] == hashes[1]


@pytest.mark.parametrize("model", ["cost", "a"])
def test_critic_may_start_from_a_cost_model_or_a_policy_in_a_folder(models, tmp_path, model):
    signals = {"signals": {"cost": {"function": "signals_here:letters"}}}
    check_run(run_of(tmp_path, rl_stage(models, **signals, critics={"cost": f"path:{models}/{model}"})))


def test_best_checkpoint_may_be_chosen_by_a_function(models, tmp_path):
    function = {"function": "signals_here:letters"}
    stage = rl_stage(
        models, signals={"reward": function, "cost/e": function}, reward_model=None, algorithm={"name": "ppo"}
    )
    evaluated = {"eval_prompts": PROMPTS, "eval_every": 1}
    for best in ("train/reward", "-train/unsafe_share/e", "-eval/cost_mean/e", "eval/reward_mean"):
        check_run(run_of(tmp_path, stage | evaluated | {"keep_best": best}))
    with pytest.raises(cfg.ConfigError, match="keep_best 'eval/cost_mean/d' is none of its metrics; did you mean"):
        check_run(run_of(tmp_path, stage | evaluated | {"keep_best": "eval/cost_mean/d"}))


def test_limit_is_calibrated_by_a_functions_costs_of_labelled_responses(models, tmp_path):
    limit = {"data": {"name": "demo/preference", "split": "test", "limit": 40}, "margin": 0.5}
    lagrange = {"lagrange": {"cost_limit": limit}}
    signal = {"cost": {"function": "signals_here:letters"}}
    run = run_of(tmp_path, rl_stage(models, signals=signal, algorithm=lagrange, max_response_length=64))
    check_run(run)
    stage = run.config.stages[0]
    data = run.loaded["ppo", "labelled by cost"]
    (cost,), source = reinforcement.cost_limits(run, stage, "cost", asked.open_signals(run, stage))
    texts = {True: [], False: []}
    for record in data.records:
        for i in (0, 1):
            texts[record[f"is_response_{i}_safe"]].append(record[f"response_{i}"].count("e") - 1.0)
    safe, unsafe = np.mean(texts[True]), np.mean(texts[False])
    assert cost == pytest.approx(safe + 0.5 * (unsafe - safe))
    assert "labelled safe" in source


@pytest.mark.parametrize("mesh", [{"data": 8}, {"data": 2, "fsdp": 2, "tensor": 2}])
def test_scores_stand_with_their_rows_on_every_mesh(models, tmp_path, mesh):
    run = run_of(tmp_path, rl_stage(models, signals={"cost": {"function": "signals_here:letters"}}), mesh=mesh)
    check_run(run)
    stage, prompts = run.config.stages[0], run.loaded["ppo", "prompts"]
    rng = np.random.default_rng(0)
    tokens, lengths = rng.integers(5, 200, (16, 6)).astype(np.int32), rng.integers(1, 7, 16)
    mask = np.concatenate([np.ones((16, 24), bool), np.arange(6) < lengths[:, None]], 1)
    whole = np.concatenate([np.zeros((16, 24), np.int32), tokens], 1)
    rollout = Rollout(whole, mask, np.zeros((16, 6), np.float32), np.zeros(16, np.int32))
    batch = prompts.arrays.replace(**{f: getattr(prompts.arrays, f)[:8] for f in ("tokens", "mask", "group", "row")})
    given = given_scores(run, asked.open_signals(run, stage), prompts, num_responses=2)
    scores = given(run.put(rollout), run.put(batch))["cost"]
    texts = [TOKENIZER.decode(row[:length]) for row, length in zip(tokens, lengths, strict=True)]
    assert scores.tolist() == [text.count("e") - 1.0 for text in texts]
    assert len(set(scores.tolist())) > 2
    assert scores.sharding.mesh == run.mesh


class Guard(Handler):
    """Calls a response with an e in it unsafe; fails while there are failures left."""

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.requests.append(json.dumps(body["messages"]))
        if len(self.server.requests) in self.server.failures:
            self.answer(503, {"error": {"message": "busy", "code": None}})
            return
        content = "unsafe\nS1" if "e" in body["messages"][-1]["content"] else "safe"
        message = {"role": "assistant", "content": content}
        choice = {"index": 0, "message": message, "finish_reason": "stop"}
        head = {"id": "1", "object": "chat.completion", "created": 0, "model": "guard"}
        self.answer(200, head | {"choices": [choice], "usage": None})


@pytest.fixture
def guard():
    """A guard model behind an endpoint."""
    with Fake() as server:
        server.RequestHandlerClass = Guard
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def test_guard_model_behind_an_endpoint_is_a_cost_and_nothing_is_asked_twice_after_it_failed(models, tmp_path, guard):
    signal = {"base_url": guard.url, "model": "guard", "answers": {"unsafe": 1, "safe": -1}, "retries": 0}
    guard.failures = [2 + 8 + 4]  # in the second step, after the check
    with pytest.raises(UserError, match=r"ppo: signals.cost: endpoint .* status 503 .*; step 1 is saved, the same"):
        finished(tmp_path, rl_stage(models, signals={"cost": signal}))
    folder = finished(tmp_path, rl_stage(models, signals={"cost": signal}))
    assert len(guard.requests) == len(set(guard.requests)) + 1 <= 2 + 3 * 8 + 1, "the one that failed, twice"
    assert {json.loads(messages)[-1]["role"] for messages in guard.requests} == {"assistant"}
    answers = [json.loads(line) for line in (folder / "answers_cost.jsonl").read_text().splitlines()]
    costs = [row["train/cost"] for row in numbers(folder)]
    assert costs == pytest.approx([np.mean(list(batch.values())) for batch in answers], abs=1e-6)


def test_question_holds_the_texts_as_they_are_and_an_answer_without_a_score_counts_as_the_worst(models, tmp_path):
    question = "{conversation}\n---\n{response}\nIs it polite? {yes}"
    settings = JUDGE | {"question": question, "answers": {"yes": -1, "no": 2}}
    run = run_of(tmp_path, rl_stage(models, signals={"cost": settings}), max_bad_records=0.5)
    for is_cost, worst in ((True, 2.0), (False, -1.0)):
        signal = asked.ScoredAnswers(run, "x", run.config.stages[0].signals["cost"], is_cost)
        turns = [{"role": "user", "content": "say {response}"}]
        (message,) = signal.messages(turns, "{conversation}")
        assert message["content"].endswith("say {response}\n---\n{conversation}\nIs it polite? {yes}")
        signal.endpoint.answers = lambda *_, **__: ["Yes.", "perhaps"]
        assert signal([turns] * 2, ["a", "b"], [True] * 2).tolist() == [-1.0, worst]
        signal.endpoint.answers = lambda *_, **__: ["perhaps"]
        with pytest.raises(UserError, match=r"2 of 3 answers of m are no verdict, such as 'perhaps'"):
            signal([turns], ["c"], [True])


def test_judge_without_a_question_is_asked_by_the_constitution_whether_a_response_is_harmful(models, tmp_path):
    run = run_of(tmp_path, rl_stage(models, signals={"cost": JUDGE}))
    signal = asked.ScoredAnswers(run, "x", run.config.stages[0].signals["cost"], True)
    (message,) = signal.messages([{"role": "user", "content": "how"}], "so")
    assert message["content"].startswith(read_constitution(None)["safety"])
    assert "how" in message["content"]
    signal.endpoint.answers = lambda *_, **__: ["Harmful", "harmless"]
    assert signal([[]] * 2, ["a", "b"], [True] * 2).tolist() == [1.0, -1.0]
