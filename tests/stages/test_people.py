"""People as labellers: the tasks that they get, and what becomes of their answers."""

import csv
import json
import shutil
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest
import yaml

from safe_rlhf_jax import config as cfg
from safe_rlhf_jax.errors import DataError
from safe_rlhf_jax.metrics import read_jsonl
from safe_rlhf_jax.stages import Run
from safe_rlhf_jax.stages.labellers import Pair, consistent
from safe_rlhf_jax.stages.making import label_all
from safe_rlhf_jax.stages.people import WaitingForLabelsError, people_labels
from safe_rlhf_jax.stages.people import task as task_of
from tests.helpers import in_two_processes

PAIRS = [Pair([{"role": "user", "content": f"question {i}"}], f"yes {i}", f"no {i}", {}) for i in range(3)]
# Of Label Studio 1.23.2, which had imported tasks.json; three annotators answered and skipped through its API.
EXPORT = Path(__file__).parent / "label_studio_export.json"
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
    with pytest.raises(DataError, match=r"labels.json: is no export of the tasks \(KeyError.* the one named JSON"):
        people_labels(folder, PAIRS, "")


@pytest.fixture
def exported():
    """The pairs that Label Studio's export is of, in the order of the tasks."""
    tasks = sorted(json.loads(EXPORT.read_text()), key=lambda one: one["id"])
    fields = [(one["data"]["prompt"], one["data"]["response_a"], one["data"]["response_b"]) for one in tasks]
    pairs = [Pair([{"role": "user", "content": text}], *sides, {"category": "ab"[len(text) < 20]})
             for text, *sides in fields]  # fmt: skip
    assert [task_of(pair) for pair in pairs] == [one["data"] for one in tasks]  # what was imported came back
    return pairs


def test_export_of_label_studio_itself_is_read_with_all_annotators_and_without_the_skipped_task(exported, tmp_path):
    shutil.copy(EXPORT, tmp_path / "labels.json")
    labels = people_labels(tmp_path, exported, "")
    assert labels[0] == {
        "better_votes": [0, 1, 0], "better_response_id": 0, "safer_votes": [0, 0, 0], "safer_response_id": 0,
        "response_0_safe_votes": [1, 1, 1], "is_response_0_safe": True,
        "response_1_safe_votes": [0, 0, 0], "is_response_1_safe": False,
    }  # fmt: skip
    assert [len(one["better_votes"]) for one in labels] == [3, 3, 3, 2, 3, 3]
    assert [one.get("safer_votes") for one in labels[1:3]] == [[0, 0, 1], [0, 1, 0]]


def labelled(pairs, folder, **labeller):
    """What a stage says of pairs whose answers lie in its folder: records, metrics, agreement, warnings."""
    stage = {"name": folder.name, "kind": "label", "samples": {"name": "x"}, "labeller": {"kind": "people"} | labeller}
    run = Run(cfg.RunConfig(workdir=str(folder.parent), stages=[stage]))
    return *label_all(run, run.config.stages[0], pairs, folder), run.warnings.get(folder.name, [])


def test_agreement_is_reported_by_question_and_category(exported, tmp_path):
    pytest.importorskip("krippendorff")
    shutil.copy(EXPORT, tmp_path / "labels.json")
    _, metrics, about, warnings = labelled(exported, tmp_path)
    assert about["agreement"].keys() == {"helpfulness", "safety", "safe or not"}
    assert (about["agreement"]["helpfulness"]["n"], about["agreement"]["safe or not"]["n"]) == (6, 12)
    assert about["agreement"]["safe or not"]["alpha"] > 0.5 > about["agreement"]["safety"]["alpha"]
    assert metrics["alpha/safety"] == about["agreement"]["safety"]["alpha"]
    assert about["by_category"].keys() == {"a", "b"}
    assert about["annotators"]["safe or not"].keys() == {"1", "2", "3"}
    assert warnings == []  # six tasks are too few to name anybody


def test_annotators_near_chance_are_named_with_the_question(tmp_path):
    pytest.importorskip("krippendorff")
    pairs = [Pair([{"role": "user", "content": str(i)}], "yes", "no", {}) for i in range(24)]
    rows = [
        {"pair": task_of(pair)["pair"], "annotator": who, "better": "AB"[i % places], "safer": "AB"[i % 2]} | HARMLESS
        for i, pair in enumerate(pairs)
        for who, places in (("ada", 2), ("bo", 2), ("cy", 1))  # cy always says A
    ]
    with (tmp_path / "labels.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    *_, warnings = labelled(pairs, tmp_path)
    assert len(warnings) == 1
    assert "annotator cy is near chance on helpfulness: α with the others' majority is -0." in warnings[0]
    assert "24 answers" in warnings[0]


def test_aggregation_by_dawid_and_skene_labels_ties_as_well(folder):
    pytest.importorskip("crowdkit")
    tasks = json.loads((folder / "tasks.json").read_text())
    said = {"ada": "AAB", "bo": "AAB", "cy": "BAA"}  # task 0: cy is the one who errs
    answers = [
        [annotation(who, better=given[i], safer="A", **HARMLESS) for who, given in said.items()]
        for i in range(len(tasks))
    ]
    (folder / "labels.json").write_text(
        json.dumps([one | {"annotations": given} for one, given in zip(tasks, answers, strict=True)])
    )
    labels = people_labels(folder, PAIRS, "", "dawid_skene")
    assert [one["better_response_id"] for one in labels] == [0, 0, 1]
    assert labels[0]["better_votes"] == [0, 0, 1]
    assert all(one["is_response_1_safe"] is True for one in labels)


def test_one_annotator_needs_no_library_and_says_nothing_of_agreement(folder, monkeypatch):
    monkeypatch.setattr("safe_rlhf_jax.evaluation.annotators.library", None)
    export(folder, *([annotation(1, better="A", safer="B", **HARMLESS)] for _ in PAIRS))
    records, metrics, about, warnings = labelled(PAIRS, folder)
    assert (len(records), metrics, about, warnings) == (3, {}, {}, [])


def test_tasks_are_written_by_the_first_process_and_all_wait(tmp_path, monkeypatch):
    folders = tmp_path / "first", tmp_path / "other"

    def waits(folder):
        with pytest.raises(WaitingForLabelsError):
            people_labels(folder, PAIRS, "")
        return folder.exists()

    assert in_two_processes(monkeypatch, *(lambda folder=folder: waits(folder) for folder in folders)) == [True, False]


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
