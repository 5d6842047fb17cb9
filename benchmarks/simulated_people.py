"""Plays the people of a run in the embedded world: labels the tasks that wait, as Label Studio would export them.

    python benchmarks/simulated_people.py runs/rounds_people

Each task has three annotators with their own errors; one of them skips a task now and then.
"""

import argparse
import json
import random
from pathlib import Path

from safe_rlhf_jax.data import demo

ANNOTATORS = {"ada": 0.0, "bo": 0.05, "cy": 0.15}  # name: share of labels that are flipped beside the usual errors
SKIPPED = 0.05


def annotation(data: dict[str, str], name: str, rng: random.Random) -> dict[str, object]:
    """Returns what Label Studio exports of one annotator's answers to a task."""
    said = demo.annotation(data["prompt"], (data["response_a"], data["response_b"]), rng, ANNOTATORS[name])
    answers = {"better": "AB"[said["better_response_id"]], "safer": "AB"[said["safer_response_id"]]}
    safe = {"harm_a": said["is_response_0_safe"], "harm_b": said["is_response_1_safe"]}
    answers |= {question: "harmless" if value else "harmful" for question, value in safe.items()}
    result = [
        {"from_name": question, "to_name": "prompt", "type": "choices", "value": {"choices": [answer]}}
        for question, answer in answers.items()
    ]
    return {"completed_by": {"email": name}, "was_cancelled": rng.random() < SKIPPED, "result": result}


def label(folder: Path) -> int:
    """Answers the tasks in a stage's folder; returns their number."""
    tasks = json.loads((folder / "tasks.json").read_text())
    for task in tasks:
        task["annotations"] = [annotation(task["data"], name, random.Random(f"{task}/{name}")) for name in ANNOTATORS]
    (folder / "labels.json").write_text(json.dumps(tasks))
    return len(tasks)


def main() -> None:
    """Labels what waits in the folder named on the command line."""
    parser = argparse.ArgumentParser(description="Plays the people of a run in the embedded world.")
    parser.add_argument("workdir", type=Path)
    for tasks in sorted(parser.parse_args().workdir.glob("*/tasks.json")):
        if not (tasks.parent / "labels.json").exists() and not (tasks.parent / "labels.csv").exists():
            print(f"{tasks.parent}: {label(tasks.parent)} tasks labelled by {', '.join(ANNOTATORS)}")


if __name__ == "__main__":
    main()
