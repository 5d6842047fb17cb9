"""Verbalized sampling: answers with stated probabilities in one response, on written texts."""

import pytest

from safe_rlhf_jax import config as cfg
from safe_rlhf_jax.metrics import read_jsonl, write_jsonl
from safe_rlhf_jax.stages import Run, making, sampling
from safe_rlhf_jax.stages.verbalized import answers_in, instructed


def answer(text, probability):
    return f"<response><text>{text}</text><probability>{probability}</probability></response>"


@pytest.mark.parametrize(
    ("response", "answers", "failures"),
    [
        (answer("A bear.", 0.3) + "\n" + answer("Two\nbears.", ".05"), [("A bear.", 0.3), ("Two\nbears.", 0.05)], {}),
        ("Sure! Here they are:\n" + answer(" A bear. ", "30 %") + "\nHope it helps.", [("A bear.", 0.3)], {}),
        (answer("A bear.", 0.3).upper(), [("A BEAR.", 0.3)], {}),
        (answer("A bear.", 0.3) * 2, [("A bear.", 0.3)], {"repeated": 1}),
        (answer("A bear.", "likely"), [], {"no probability": 1}),
        (answer("A bear.", 3), [], {"probability above 1": 1}),
        (answer("", 0.3) + answer("A bear.", 0.2), [("A bear.", 0.2)], {"no text": 1}),
        (answer("A bear.", 0.3) + "<response><text>Two be", [("A bear.", 0.3)], {"unfinished": 1}),
        ("<response><text>One" + answer("A bear.", 0.3), [("A bear.", 0.3)], {"unfinished": 1}),
        ("1. A bear (0.3)\n2. Two bears (0.2)", [], {"no answer": 1}),
        ("", [], {"no answer": 1}),
    ],
)
def test_answers_are_read_and_failures_counted_by_reason(response, answers, failures):
    assert answers_in(response) == (answers, failures)


def test_last_turn_asks_for_several_answers_and_the_others_stay():
    before = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "A joke."}]
    system, last = instructed(before, 5)
    assert system == before[0]
    assert last["role"] == "user"
    assert last["content"].startswith("A joke.\n\nGive 5 different answers")
    assert answers_in(last["content"])[0] == [("the answer", 0.2)]  # the form that it shows is one that is read


def sample_of(folder, prompts, **settings):
    write_jsonl(folder / "prompts.jsonl", [{"prompt": text, "category": text[:1]} for text in prompts])
    stage = {"name": "sample", "kind": "sample", "policies": ["path:a", "path:b"], "batch_size": 2}
    stage |= {"prompts": {"name": str(folder / "prompts.jsonl")}} | settings
    return Run(cfg.RunConfig(workdir=str(folder / "run"), stages=[stage]))


def test_both_ways_are_kept_and_their_diversity_is_compared_on_as_many_answers(tmp_path, monkeypatch):
    run = sample_of(tmp_path, ["one", "two"], verbalized=3)
    told = {"path:a": answer("yes then", 0.5) + answer("no never", 0.25), "path:b": "I would rather not."}

    def respond(run, stage, policy, prompts, file, key, number=None):
        texts = ["yes then", "yes then"] if number is None else [told[policy]]
        return [[{"text": text, "ended": True} for text in texts] for _ in prompts.records]

    monkeypatch.setattr(making, "responses_of", respond)
    monkeypatch.setattr(making, "asked", lambda run, stage, policy, turns: prompts_of(run, turns))
    metrics = making.run_sample(run, run.config.stages[0], run.folder("sample"))["metrics"]
    first = read_jsonl(run.folder("sample") / "data.jsonl")[0]
    assert first["responses"] == [*["yes then"] * 4, "yes then", "no never"]
    assert first["policies"] == ["path:a", "path:a", "path:b", "path:b", "path:a", "path:a"]
    assert first["probabilities"] == [None, None, None, None, 0.5, 0.25]
    assert (metrics["direct/self_similarity"], metrics["verbalized/self_similarity"]) == (1.0, 0.0)
    assert metrics["direct/cluster_entropy"] == 0.0 < metrics["verbalized/cluster_entropy"]
    assert metrics["verbalized/distinct_1"] == 1.0 == 2 * metrics["direct/distinct_1"]
    assert metrics["verbalized/found"] == pytest.approx(2 / 3 / 2)  # the other policy stated none
    assert metrics["verbalized/no_answer"] == 2.0
    assert metrics["verbalized/mass"] == 0.75


def prompts_of(run, turns):
    from safe_rlhf_jax.data.examples import load_prompts

    records = [{"prompt": list(one), "row": row} for row, one in enumerate(turns)]
    return load_prompts(records, run.template, run.tokenizer, max_length=4096, where="test", max_bad=0.0)


def test_every_prompt_has_its_own_responses_whatever_the_lengths_of_the_prompts(tmp_path, monkeypatch):
    prompts = [f"plan {'x' * (100 * (i % 3))} {'abcdefghij'[i]}" for i in range(10)]  # batches are in order of lengths
    run = sample_of(tmp_path, prompts, max_prompt_length=256, policies=["path:a"], batch_size=8)
    stage = run.config.stages[0]

    def respond(params, scorers, batch, key):
        rows = [[[int(row) + 4] * 3] * 2 for row in batch.row]
        return {"tokens": making.jax.numpy.array(rows), "length": making.jax.numpy.full((len(rows), 2), 3)}

    monkeypatch.setattr(sampling, "sampler_of", lambda *_: respond)
    monkeypatch.setattr(run.networks, "read", lambda *_: (None, {"params": None}), raising=False)
    making.run_sample(run, stage, run.folder("sample"))
    for again in range(2):  # once more from what is kept
        for row, record in enumerate(read_jsonl(run.folder("sample") / "data.jsonl")):
            assert record["responses"] == [run.tokenizer.decode([row + 4] * 3)] * 2, again
        making.run_sample(run, stage, run.folder("sample"))
