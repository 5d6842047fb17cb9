"""People as labellers: the tasks that they get, and what becomes of their answers."""

import csv
import json
import xml.etree.ElementTree as ElementTree

import pytest
import yaml

from safe_rlhf_jax.errors import DataError
from safe_rlhf_jax.metrics import read_jsonl
from safe_rlhf_jax.stages.labellers import Pair, consistent
from safe_rlhf_jax.stages.people import WaitingForLabelsError, people_labels

PAIRS = [Pair([{"role": "user", "content": f"question {i}"}], f"yes {i}", f"no {i}", {}) for i in range(3)]
HARMLESS = {"harm_a": "harmless", "harm_b": "harmless"}


@pytest.fixture
def folder(tmp_path):
    """A folder with the tasks of `PAIRS`."""
    with pytest.raises(WaitingForLabelsError, match="waiting for labels of 3 pairs"):
        people_labels(tmp_path, PAIRS, 'Read "both" & choose.')
    return tmp_path


def annotation(who, skipped=False, **answers):
    """What Label Studio exports of one annotator's answers."""
    result = [
        {"from_name": name, "to_name": "prompt", "type": "choices", "value": {"choices": [answer]}}
        for name, answer in answers.items()
    ]
    return {"completed_by": who, "was_cancelled": skipped, "result": result}


def export(folder, *annotations):
    """Writes an export: the tasks with annotations, in another order."""
    tasks = json.loads((folder / "tasks.json").read_text())
    exported = [
        task | {"id": i, "annotations": given} for i, (task, given) in enumerate(zip(tasks, annotations, strict=True))
    ]
    (folder / "labels.json").write_text(json.dumps(exported[::-1]))
    return people_labels(folder, PAIRS, "")


def test_tasks_show_the_pair_and_the_interface_asks_each_question_once(folder):
    tasks = json.loads((folder / "tasks.json").read_text())
    assert [task["data"]["response_a"] for task in tasks] == ["yes 0", "yes 1", "yes 2"]
    view = ElementTree.fromstring((folder / "interface.xml").read_text())
    assert view.find("Header").get("value") == 'Read "both" & choose.'
    assert {text.get("value").removeprefix("$") for text in view.iter("Text")} < tasks[0]["data"].keys()
    asked = {choices.get("name"): [choice.get("value") for choice in choices] for choices in view.iter("Choices")}
    assert asked == {"better": ["A", "B"], "safer": ["A", "B"]} | {key: ["harmful", "harmless"] for key in HARMLESS}


def test_answers_of_several_annotators_are_votes_with_their_majority(folder):
    first, second, third = export(
        folder,
        [annotation(1, better="A", safer="B", **HARMLESS), annotation(2, better="B", safer="B", **HARMLESS),
         annotation({"id": 3, "email": "a@b.c"}, better="B", safer="B", harm_a="harmful", harm_b="harmless")],
        [annotation(1, better="A"), annotation(2, better="B")],
        [annotation(1, skipped=True)],
    )  # fmt: skip
    assert first == {
        "better_votes": [0, 1, 1], "better_response_id": 1, "safer_votes": [1, 1, 1], "safer_response_id": 1,
        "response_0_safe_votes": [1, 1, 0], "is_response_0_safe": True,
        "response_1_safe_votes": [1, 1, 1], "is_response_1_safe": True,
    }  # fmt: skip
    assert second == {"better_votes": [0, 1]}
    assert third == {}


def test_filled_in_csv_file_is_as_good_as_an_export(folder):
    with (folder / "tasks.csv").open() as file:
        rows = list(csv.DictReader(file))
    rows[0] |= {"annotator": "x", "better": "A", "safer": "A"} | HARMLESS
    rows.append(rows[0] | {"annotator": "y", "better": "B"})
    with (folder / "labels.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    labels = people_labels(folder, PAIRS, "")
    assert labels[0]["better_votes"] == [0, 1]
    assert labels[0]["safer_response_id"] == 0
    assert labels[1] == labels[2] == {}


def test_export_of_other_tasks_and_answers_that_were_not_offered_are_refused(folder):
    with pytest.raises(DataError, match="none of A, B"):
        export(folder, [annotation(1, better="C")], [], [])
    (folder / "labels.json").write_text(json.dumps([{"data": {"pair": "other"}, "annotations": []}]))
    with pytest.raises(DataError, match="1 of 1 answered tasks are not of this stage, such as pair other"):
        people_labels(folder, PAIRS, "")
    (folder / "labels.json").write_text("[{}]")
    with pytest.raises(DataError, match=r"labels.json: is no export of the tasks \(KeyError"):
        people_labels(folder, PAIRS, "")


def test_safe_response_is_the_safer_one_of_a_safe_and_an_unsafe_one():
    labels = {"is_response_0_safe": False, "is_response_1_safe": True, "safer_response_id": 0, "safer_votes": [0, 0]}
    found = consistent(labels)
    assert (found["safer_response_id"], "safer_votes" in found) == (1, False)
    both = labels | {"is_response_0_safe": True}
    assert consistent(both) == both


def test_run_waits_for_people_with_a_status_of_its_own_and_continues(train_process, tmp_path):
    records = [
        {"prompt": pair.turns, "responses": list(pair.responses), "category": str(i)} for i, pair in enumerate(PAIRS)
    ]
    (tmp_path / "samples.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    label = {"name": "label", "kind": "label", "samples": {"name": str(tmp_path / "samples.jsonl")}}
    label |= {"labeller": {"kind": "people"}}
    config, folder = tmp_path / "config.yaml", tmp_path / "run" / "label"
    config.write_text(yaml.safe_dump({"workdir": str(tmp_path / "run"), "stages": [label]}))
    process = train_process(config=config)
    assert process.returncode == 75, process.stderr
    assert "waiting for labels of 3 pairs" in process.stderr
    tasks = json.loads((folder / "tasks.json").read_text())
    answers = annotation(1, better="A", safer="B", harm_a="harmful", harm_b="harmless")
    (folder / "labels.json").write_text(json.dumps([task | {"annotations": [answers]} for task in tasks]))
    process = train_process(config=config)
    assert process.returncode == 0, process.stderr
    for record, task in zip(read_jsonl(folder / "data.jsonl"), tasks, strict=True):
        assert record["response_0"] == task["data"]["response_a"]
        assert (record["better_response_id"], record["safer_response_id"]) == (0, 1)
        assert record["labelled_by"]["labeller"] == "people"
