"""People as labellers: tasks for Label Studio or a CSV file, and what they answered.

The run writes `tasks.json` (to import), `interface.xml` (the project's interface) and `tasks.csv`, and ends with status
75. With their answers as `labels.json` (Label Studio's JSON export) or `labels.csv` in the same folder, the same
command continues.
"""

import csv
import hashlib
import io
import json
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar
from xml.sax.saxutils import quoteattr

from safe_rlhf_jax import storage
from safe_rlhf_jax.data.records import majority
from safe_rlhf_jax.data.texts import shown
from safe_rlhf_jax.errors import DataError, UserError

QUESTIONS = {  # name of a question: (what is asked, the answers for 0 and 1, label that it makes)
    "better": ("Which response is more helpful?", ("A", "B"), "better_response_id"),
    "safer": ("Which response is safer?", ("A", "B"), "safer_response_id"),
    "harm_a": ("Is response A harmful?", ("harmful", "harmless"), "is_response_0_safe"),
    "harm_b": ("Is response B harmful?", ("harmful", "harmless"), "is_response_1_safe"),
}
SHOWN = {"prompt": "Conversation", "response_a": "Response A", "response_b": "Response B"}


class WaitingForLabelsError(UserError):
    """Nothing is wrong: the run ends until people have labelled its tasks, with status 75."""

    status: ClassVar[int] = 75


def identity(pair: Any) -> str:
    """Returns the name of a pair: a hash of its texts."""
    texts = [shown(pair.turns), *pair.responses]
    return hashlib.sha256(json.dumps(texts).encode()).hexdigest()[:16]


def task(pair: Any) -> dict[str, str]:
    """Returns what an annotator sees of a pair; its sides are in random order already."""
    texts = (shown(pair.turns), *pair.responses)
    return {"pair": identity(pair)} | dict(zip(SHOWN, texts, strict=True))


def interface(instruction: str) -> str:
    """Returns Label Studio's labelling interface."""
    texts = [f"  <Header value={quoteattr(instruction)}/>"]
    texts += [f'  <Header value="{title}"/>\n  <Text name="{name}" value="${name}"/>' for name, title in SHOWN.items()]
    asked = []
    for name, (question, answers, _) in QUESTIONS.items():
        choices = "".join(f'<Choice value="{answer}"/>' for answer in answers)
        asked.append(
            f'  <Header value="{question}"/>\n'
            f'  <Choices name="{name}" toName="prompt" choice="single" required="true">{choices}</Choices>'
        )
    return "\n".join(["<View>", *texts, *asked, "</View>", ""])


def write_tasks(folder: storage.Path, pairs: Sequence[Any], instruction: str) -> None:
    """Writes the tasks in both forms, and the interface."""
    tasks = [task(pair) for pair in pairs]
    storage.write(folder / "tasks.json", json.dumps([{"data": one} for one in tasks], ensure_ascii=False, indent=1))
    storage.write(folder / "interface.xml", interface(instruction))
    stream = io.StringIO()
    writer = csv.DictWriter(stream, ["pair", *SHOWN, "annotator", *QUESTIONS])
    writer.writeheader()
    writer.writerows(tasks)
    storage.write(folder / "tasks.csv", stream.getvalue())


Answers = dict[str, dict[str, dict[str, str]]]  # pair -> annotator -> question -> answer


def read_answers(folder: storage.Path) -> Answers | None:
    """Returns what people answered; None if there is no file of it yet.

    Raises:
        DataError: If a file cannot be read.
    """
    for name, read in {"labels.json": of_label_studio, "labels.csv": of_csv}.items():
        file = folder / name
        if storage.is_file(file):
            try:
                return read(storage.read_text(file))
            except (ValueError, KeyError, TypeError, AttributeError, csv.Error) as error:
                raise DataError(f"{file}: is no export of the tasks ({type(error).__name__}: {error})") from error
    return None


def of_label_studio(text: str) -> Answers:
    """Returns the answers of Label Studio's JSON export; skipped tasks have none."""
    found: Answers = {}
    for exported in json.loads(text):
        annotators = found.setdefault(str(exported["data"]["pair"]), {})
        for annotation in exported.get("annotations", []):
            if annotation.get("was_cancelled"):
                continue
            who = annotation.get("completed_by")
            name = str(who.get("email") or who.get("id")) if isinstance(who, dict) else str(who)
            chosen = {
                one["from_name"]: one["value"]["choices"][0] for one in annotation["result"] if one["type"] == "choices"
            }
            annotators[name] = {question: answer for question, answer in chosen.items() if question in QUESTIONS}
    return found


def of_csv(text: str) -> Answers:
    """Returns the answers of a filled in CSV file: a row for each task and annotator."""
    found: Answers = {}
    for row in csv.DictReader(io.StringIO(text.lstrip("\ufeff"))):
        answers = {name: row[name].strip() for name in QUESTIONS if (row[name] or "").strip()}
        found.setdefault(row["pair"], {})
        if answers:
            found[row["pair"]][(row.get("annotator") or "").strip() or "?"] = answers
    return found


def labels_of(answers: Mapping[str, Mapping[str, str]]) -> dict[str, Any]:
    """Returns the labels of a pair from the answers of its annotators: votes, and their majority.

    Raises:
        ValueError: If an answer is none of those that a question has.
    """
    labels: dict[str, Any] = {}
    for question, (_, words, label) in QUESTIONS.items():
        given = [one[question] for one in answers.values() if question in one]
        if unknown := [answer for answer in given if answer not in words]:
            raise ValueError(f"{question} is {unknown[0]!r}, none of {', '.join(words)}")
        if given:
            labels |= majority(label, [words.index(answer) for answer in given])
    return labels | {name: bool(value) for name, value in labels.items() if name.startswith("is_")}


def people_labels(folder: storage.Path, pairs: Sequence[Any], instruction: str) -> list[dict[str, Any]]:
    """Returns the labels of each pair by people; none for those that everybody skipped.

    Raises:
        WaitingForLabelsError: If they have not answered yet: the tasks are written.
        DataError: If the answers are of other tasks, or no answers.
    """
    answers = read_answers(folder)
    if answers is None:
        write_tasks(folder, pairs, instruction)
        raise WaitingForLabelsError(
            f"waiting for labels of {len(pairs)} pairs: import {folder / 'tasks.json'} into a Label Studio project "
            f"with the interface {folder / 'interface.xml'}, and export its JSON as {folder / 'labels.json'} (or fill "
            f"in {folder / 'tasks.csv'} and save it as labels.csv there); then run the same command again"
        )
    names = [identity(pair) for pair in pairs]
    if foreign := answers.keys() - set(names):
        raise DataError(
            f"{folder}: {len(foreign)} of {len(answers)} answered tasks are not of this stage, such as pair "
            f"{min(foreign)}: export the project that {folder / 'tasks.json'} was imported into"
        )
    found = []
    for name in names:
        try:
            found.append(labels_of(answers.get(name, {})))
        except ValueError as error:
            raise DataError(f"{folder}: pair {name}: {error}") from error
    return found
