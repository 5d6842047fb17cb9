"""A judge behind an endpoint as a labeller: what it is asked, and what its verdicts become."""

import pytest

from safe_rlhf_jax import config as cfg
from safe_rlhf_jax.endpoints import EndpointError
from safe_rlhf_jax.errors import DataError
from safe_rlhf_jax.stages import Run
from safe_rlhf_jax.stages.judge_labeller import Judge, of_verdicts, read_constitution, verdict
from safe_rlhf_jax.stages.labellers import Pair
from tests.helpers import in_two_processes


class Endpoint:
    """An endpoint whose judge finds the longer response better, the shorter one safer, and "bad" harmful."""

    model = "judge"

    def __init__(self, answer=None):
        self.asked, self.answer = [], answer
        self.usage = None

    def answers(self, conversations, **sampling):
        assert sampling["temperature"] == 0.0
        texts = [turns[-1]["content"] for turns in conversations]
        self.asked += texts
        return [self.answer or self.judged(text) for text in texts]

    def judged(self, text):
        if "Is the response harmful?" in text:
            return "Harmful." if "bad" in text.split("Response:")[1].split("Is the")[0] else "harmless"
        first, second = text.split("Response A:")[1].split("Which response")[0].split("Response B:")
        longer = "A" if len(first.strip()) > len(second.strip()) else "B"
        shorter = "B" if longer == "A" else "A"
        return longer if "more helpful" in text.rsplit("Which", 1)[1] else f"{shorter} is safer"


@pytest.fixture
def judge(tmp_path, monkeypatch):
    """Makes a judge of an endpoint."""

    def make(endpoint, max_bad=0.05, constitution=None):
        monkeypatch.setattr("safe_rlhf_jax.stages.judge_labeller.Endpoint", lambda *_, **__: endpoint)
        labeller = {"kind": "judge", "base_url": "http://x/v1", "model": "judge", "constitution": constitution}
        stage = {"kind": "label", "name": "label", "samples": {"name": "x"}, "labeller": labeller}
        config = cfg.RunConfig(workdir=str(tmp_path), max_bad_records=max_bad, stages=[stage])
        return Judge(Run(config), "label", config.stages[0].labeller)

    return make


PAIRS = [
    Pair([{"role": "user", "content": "Tell me."}], "a long answer that is bad", "short", {}),
    Pair([{"role": "user", "content": "Tell me."}], "short", "a longer answer", {}),
]


def test_pair_is_compared_in_both_orders_for_both_questions_and_each_side_classified(judge):
    endpoint = Endpoint()
    labels = judge(endpoint)(PAIRS, 0)
    assert len(endpoint.asked) == 12
    assert labels[0] == {
        "better_votes": [0, 0], "better_response_id": 0, "safer_votes": [1, 1], "safer_response_id": 1,
        "is_response_0_safe": False, "is_response_1_safe": True,
    }  # fmt: skip
    assert (labels[1]["better_response_id"], labels[1]["safer_response_id"]) == (1, 0)


def test_single_response_takes_one_request_and_has_a_cost_unless_there_is_no_verdict(judge):
    endpoint = Endpoint()
    turns = [PAIRS[0].turns] * 2
    rows = (turns, PAIRS[0].responses, [True, True], [{}, {}])
    assert judge(endpoint).costs(*rows) == [1.0, -1.0]
    assert len(endpoint.asked) == 2
    assert judge(Endpoint("perhaps"), max_bad=1.0).costs(*rows) == [None, None]


def test_judge_that_always_names_the_first_response_prefers_neither():
    labels = of_verdicts([0, 0, 0, 0, 1, 1])
    assert labels["better_votes"] == [0, 1]
    assert "better_response_id" not in labels
    assert "safer_response_id" not in labels


def test_answers_that_are_no_verdicts_leave_no_label_and_end_the_run_above_the_limit(judge):
    assert of_verdicts([None, 0, 0, 1, 1, None]) == {"safer_votes": [0, 0], "safer_response_id": 0}
    assert judge(Endpoint("I cannot say"), max_bad=1.0)(PAIRS, 0) == [{}, {}]
    with pytest.raises(DataError, match="12 of 12 answers of judge are no verdict, such as 'I cannot say'"):
        judge(Endpoint("I cannot say"))(PAIRS, 0)


@pytest.mark.parametrize(
    ("answer", "words", "index"),
    [
        ("A", ("A", "B"), 0), (" B.", ("A", "B"), 1), ("Response A", ("A", "B"), 0), ("A or B", ("A", "B"), None),
        ("a matter of taste", ("A", "B"), None), ("Harmless.", ("harmful", "harmless"), 1), ("", ("A", "B"), None),
    ],
)  # fmt: skip
def test_verdict_is_the_one_word_that_an_answer_names(answer, words, index):
    assert verdict(answer, words) == index


def test_constitution_is_read_from_a_file_and_changes_the_digest(judge, tmp_path):
    file = tmp_path / "own.yaml"
    file.write_text("helpfulness: be brief\nsafety: be kind\n")
    endpoint = Endpoint()
    own = judge(endpoint, constitution=str(file))
    own(PAIRS[:1], 0)
    assert "be brief" in endpoint.asked[0]
    assert "be kind" in endpoint.asked[-1]
    assert own.digest != judge(endpoint).digest
    file.write_text("helpfulness: be brief\n")
    with pytest.raises(cfg.ConfigError, match=r"own.yaml: write principles under helpfulness and safety"):
        read_constitution(str(file))
    with pytest.raises(cfg.ConfigError, match=r"none.yaml: cannot be read"):
        read_constitution(str(tmp_path / "none.yaml"))


def test_error_of_the_endpoint_is_the_users(judge):
    class Down(Endpoint):
        def answers(self, conversations, **sampling):
            raise EndpointError("endpoint http://x/v1: cannot be reached")

    with pytest.raises(EndpointError, match="cannot be reached"):
        judge(Down())(PAIRS, 0)


def test_judge_is_asked_by_the_first_process_and_all_have_its_labels(judge, monkeypatch):
    endpoints = Endpoint(), Endpoint("perhaps")
    judges = [judge(endpoint) for endpoint in endpoints]
    one, other = in_two_processes(monkeypatch, *(lambda who=who: who(PAIRS, 0) for who in judges))
    assert one == other
    assert other[1]["better_response_id"] == 1
    assert [len(endpoint.asked) for endpoint in endpoints] == [12, 0]
