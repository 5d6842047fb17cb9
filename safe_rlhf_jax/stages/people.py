"""People as labellers: tasks for Label Studio or a CSV file, and what they answered.

The run writes `tasks.json` (to import), `interface.xml` (the project's interface) and `tasks.csv`, and ends with status
75. With their answers as `labels.json` (Label Studio's JSON export) or `labels.csv` in the same folder, the same
command continues.
"""

import csv
import hashlib
import io
import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, ClassVar
from xml.sax.saxutils import quoteattr

import numpy as np

from safe_rlhf_jax import storage
from safe_rlhf_jax.data.records import VOTES
from safe_rlhf_jax.data.texts import shown
from safe_rlhf_jax.errors import DataError, UserError
from safe_rlhf_jax.evaluation.annotators import AGGREGATIONS, agreement, agreement_with_others, is_near_chance
from safe_rlhf_jax.processes import of_first

QUESTIONS = {  # name of a question: (what is asked, the answers for 0 and 1, label that it makes)
    "better": ("Which response is more helpful?", ("A", "B"), "better_response_id"),
    "safer": ("Which response is safer?", ("A", "B"), "safer_response_id"),
    "harm_a": ("Is response A harmful?", ("harmful", "harmless"), "is_response_0_safe"),
    "harm_b": ("Is response B harmful?", ("harmful", "harmless"), "is_response_1_safe"),
}
LABELS = {  # by the names of questions in results
    "helpfulness": ("better_response_id",),
    "safety": ("safer_response_id",),
    "safe or not": ("is_response_0_safe", "is_response_1_safe"),
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


def read_answers(folder: storage.Path) -> Answers:
    """Returns what people answered.

    Raises:
        DataError: If the file cannot be read.
    """
    files = [folder / name for name in READERS if storage.is_file(folder / name)]
    if not files:
        raise DataError(f"{folder}: there is no {' or '.join(READERS)} any more; put the answers back")
    file = files[0]
    try:
        return READERS[file.name](storage.read_text(file))
    except (ValueError, KeyError, TypeError, AttributeError, csv.Error) as error:
        raise DataError(
            f"{file}: is no export of the tasks ({type(error).__name__}: {error}); of Label Studio's formats it is "
            "the one named JSON"
        ) from error


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


READERS = {"labels.json": of_label_studio, "labels.csv": of_csv}

Given = dict[str, list[dict[str, int]]]  # {label: [{annotator: 0 or 1} of each pair]}


def votes_of(answers: Answers, names: Sequence[str], where: str) -> Given:
    """Returns the votes on each label of each pair.

    Raises:
        DataError: If an answer is none of those that a question has.
    """
    votes: Given = {label: [] for _, _, label in QUESTIONS.values()}
    for name in names:
        for question, (_, words, label) in QUESTIONS.items():
            given = {who: said[question] for who, said in answers.get(name, {}).items() if question in said}
            if unknown := [answer for answer in given.values() if answer not in words]:
                raise DataError(f"{where}: pair {name}: {question} is {unknown[0]!r}, none of {', '.join(words)}")
            votes[label].append({who: words.index(answer) for who, answer in given.items()})
    return votes


def labels_of(votes: Given, aggregation: str) -> list[dict[str, Any]]:
    """Returns the labels of each pair: its votes, and what they say together."""
    labels: list[dict[str, Any]] = [{} for _ in votes["better_response_id"]]
    for names in LABELS.values():  # a question that is asked of both responses has one set of errors
        each = [(name, row) for name in names for row in range(len(labels))]
        said = AGGREGATIONS[aggregation]([votes[name][row] for name, row in each])
        for (name, row), answer in zip(each, said, strict=True):
            if votes[name][row]:
                labels[row][VOTES[name]] = list(votes[name][row].values())
            if answer is not None:
                labels[row][name] = bool(answer) if name.startswith("is_") else answer
    return labels


def read_votes(folder: storage.Path, pairs: Sequence[Any]) -> Given:
    """Returns the votes on each pair, of a folder with answers.

    Raises:
        DataError: If the answers are of other tasks, or no answers.
    """
    answers, names = read_answers(folder), [identity(pair) for pair in pairs]
    if foreign := answers.keys() - set(names):
        raise DataError(
            f"{folder}: {len(foreign)} of {len(answers)} answered tasks are not of this stage, such as pair "
            f"{min(foreign)}: export the project that {folder / 'tasks.json'} was imported into"
        )
    return votes_of(answers, names, str(folder))


def people_labels(
    folder: storage.Path, pairs: Sequence[Any], instruction: str, aggregation: str = "majority"
) -> list[dict[str, Any]]:
    """Returns the labels of each pair by people; none for those that everybody skipped.

    All processes of a run call it; the first one writes the tasks.

    Raises:
        WaitingForLabelsError: If they have not answered yet: the tasks are written.
        DataError: If the answers are of other tasks, or no answers.
        ConfigError: If a package that aggregates them is missing.
    """

    def answered() -> np.ndarray:
        found = any(storage.is_file(folder / name) for name in READERS)
        if not found:
            write_tasks(folder, pairs, instruction)
        return np.array(found)

    if not of_first(answered, np.array(False)):
        raise WaitingForLabelsError(
            f"waiting for labels of {len(pairs)} pairs: import {folder / 'tasks.json'} into a Label Studio project "
            f"with the interface {folder / 'interface.xml'}, and export its JSON as {folder / 'labels.json'} (or fill "
            f"in {folder / 'tasks.csv'} and save it as labels.csv there); then run the same command again"
        )
    return labels_of(read_votes(folder, pairs), aggregation)


def about_annotators(folder: storage.Path, pairs: Sequence[Any], by: str) -> dict[str, Any]:
    """Returns how far several annotators agree: all of them, by category, and each with the others.

    Args:
        folder: With their answers.
        pairs: That were labelled.
        by: The field of a record with its category.

    Returns:
        {"agreement": {question: result of `agreement`}, "by_…": {category: the same}, "annotators": {question:
        {annotator: the same}}}; without what cannot be said, so that it is empty for a single annotator.
    """
    pairs = list({identity(pair): pair for pair in pairs}.values())
    votes, categories = read_votes(folder, pairs), [str(pair.record.get(by, "")) for pair in pairs]

    def tasks(question: str, category: str | None = None) -> list[dict[str, int]]:
        rows = [row for row, found in enumerate(categories) if category in (None, found)]
        return [votes[label][row] for label in LABELS[question] for row in rows]

    def agreed(category: str | None = None) -> dict[str, Any]:
        found = {question: agreement(tasks(question, category)) for question in LABELS}
        return {question: one for question, one in found.items() if one is not None}

    parts = {category: found for category in sorted(set(categories)) if (found := agreed(category))}
    each = {question: found for question in LABELS if (found := agreement_with_others(tasks(question)))}
    return {"agreement": agreed(), f"by_{by}": parts, "annotators": each} if each else {}


def near_chance(about: Mapping[str, Any]) -> Iterator[str]:
    """Yields a warning of each annotator who answers a question near chance."""
    for question, each in about.get("annotators", {}).items():
        for name, one in each.items():
            if is_near_chance(one):
                yield (
                    f"annotator {name} is near chance on {question}: α with the others' majority is {one['alpha']:.2f} "
                    f"({one['low']:.2f} to {one['high']:.2f}, {one['n']} answers); leave the answers out, or have "
                    "them given again"
                )
