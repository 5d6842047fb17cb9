"""What scores of truncated responses are worth: agreement of models with and without an end token after them.

    python -m benchmarks.real.truncated SAMPLES [--rows N] [--json FILE]

SAMPLES is the samples.jsonl of an evaluation; the first N responses of its first policy are read by the reward and the
cost model of the run and by those of the judges, which were trained on other pairs (configs/smollm2_135m). All four
were trained on whole responses. Two models of one kind should agree, and a reward and a cost should not say the same.
"""

import argparse
import json
import pathlib

import numpy as np

from benchmarks.real.prepare import RUNS
from benchmarks.rl_step import environment
from safe_rlhf_jax.data.conversations import encode
from safe_rlhf_jax.metrics import read_jsonl
from safe_rlhf_jax.pipeline import load_scorer

MODELS = {"cost": "run/cost", "reward": "run/reward", "judge's cost": "judges/cost", "judge's reward": "judges/reward"}
PAIRS = (("cost", "judge's cost"), ("reward", "judge's reward"), ("reward", "cost"))
RESULTS = pathlib.Path(__file__).parent.parent / "results" / "real_truncated.json"
BATCH = 32


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("samples", type=pathlib.Path, metavar="SAMPLES")
    parser.add_argument("--rows", type=int, default=128, metavar="N")
    parser.add_argument("--json", type=pathlib.Path, default=RESULTS, metavar="FILE")
    options = parser.parse_args()
    rows = read_jsonl(options.samples)
    rows = [row for row in rows if row["policy"] == rows[0]["policy"]][: options.rows]
    scores: dict[str, dict[str, np.ndarray]] = {"as they are": {}, "with an end": {}}
    for name, folder in MODELS.items():
        scorer = load_scorer(str(RUNS / folder / "adapter"), dtype="bfloat16")
        texts = []
        for row in rows:
            turns = [{"role": "user", "content": row["prompt"]}, {"role": "assistant", "content": row["response"]}]
            texts.append(encode(turns, scorer.template, scorer.tokenizer).ids)
        cut = [ids[:-1] if row["truncated"] else ids for ids, row in zip(texts, rows, strict=True)]
        for way, read in (("as they are", cut), ("with an end", texts)):
            parts = [scorer.score_tokens(read[i : i + BATCH]) for i in range(0, len(read), BATCH)]
            scores[way][name] = np.concatenate(parts)
        print(f"{name}: scored", flush=True)
    correlations = {
        way: {f"{a}, {b}": round(float(np.corrcoef(found[a], found[b])[0, 1]), 3) for a, b in PAIRS}
        for way, found in scores.items()
    }
    truncated = float(np.mean([row["truncated"] for row in rows]))
    result = {"rows": len(rows), "truncated": round(truncated, 3), "correlations": correlations}
    print(json.dumps(result, indent=1))
    options.json.write_text(json.dumps({"environment": environment()} | result, indent=1) + "\n")


if __name__ == "__main__":
    main()
