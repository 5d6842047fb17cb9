"""Rejection sampling: sample n, score, keep the best feasible response, fine-tune on it. A stage is one round.

It writes `sampling.jsonl` (a line per sampled batch), `sampling.json` (gain from more samples) and `selected.jsonl`
(what it trains on) beside what every stage writes.
"""

import json
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from safe_rlhf_jax import config as cfg
from safe_rlhf_jax import storage
from safe_rlhf_jax.aot.floors import Reads, decoding_reads, weight_bytes
from safe_rlhf_jax.aot.flops import iteration_flops, trunk_flops, update_flops
from safe_rlhf_jax.data.examples import Examples, load_sampled
from safe_rlhf_jax.data.loader import shuffled
from safe_rlhf_jax.data.texts import shown
from safe_rlhf_jax.errors import UserError
from safe_rlhf_jax.inference.best_of_n import best_of_n, described_gain, gain_by_number
from safe_rlhf_jax.loop import TrainLoop, fit
from safe_rlhf_jax.metrics import write_jsonl
from safe_rlhf_jax.models.adapters import bases_of, whole
from safe_rlhf_jax.processes import any_process, barrier, is_main
from safe_rlhf_jax.stages.common import Run, export, profiled, report_data, weights, writers
from safe_rlhf_jax.stages.constraints import check_constraints, cost_limits
from safe_rlhf_jax.stages.datasets import take
from safe_rlhf_jax.stages.host_signals import HostSignal, open_scorers
from safe_rlhf_jax.stages.kind import Kind, Training
from safe_rlhf_jax.stages.networks import optimizer_of, with_adapters
from safe_rlhf_jax.stages.partial import keep_batch, kept_batches
from safe_rlhf_jax.stages.programs import TOTAL_STEPS, Program, array, put, random_key, texts
from safe_rlhf_jax.stages.reinforcement import make_evaluate, measured_on_prompts
from safe_rlhf_jax.stages.sampling import Sampled, is_limited, sampled, sampler_of, some_of
from safe_rlhf_jax.stages.supervised import jit_supervised, sft_step
from safe_rlhf_jax.types import Frozen, PromptBatch, SupervisedBatch, TrainState

LOGGER = logging.getLogger(__name__)

FIELDS = ("chosen", "rewards", "feasible")  # of a sampled batch


def run_rejection(run: Run, stage: cfg.RejectionStage, folder: storage.Path) -> dict[str, Any]:
    """Runs a round; its sampling is not repeated once it is done."""
    before = rounds_before(run, stage)
    number = len(before) + 1
    prompts = take(run, stage, "prompts")
    report_data(stage.name, prompts)
    limit = cost_limits(run, stage, "cost") if stage.cost_model else None
    module, start = run.networks.to_train(stage, stage.init_from, "lm")
    params = start.pop("params")
    scorers = open_scorers(run, stage.scorers, stage.adapters)
    reference = None  # KL is measured from the policy before the first round
    if stage.eval_prompts:
        reference = run.networks.to_train(stage, (*before, stage)[0].init_from, "lm")[1]["params"]
    evaluate_policy = make_evaluate(run, stage, module, reference, scorers)
    if not there(folder / "selected.jsonl"):
        sample = sampler_of(run, stage, module, scorers.modules)
        select(
            run, stage, lambda batch, key, params=params: sample(params, scorers.variables, batch, key), scorers.host,
            some_of(prompts, round_rows(stage, prompts, number, run.seed(stage))), number,
            None if limit is None else limit[0][0], folder,
        )  # fmt: skip
        barrier(f"{stage.name}: responses are selected")
    rounds = [*before, stage] if stage.train_on == "all_rounds" else [stage]
    rows = [row for one in rounds for row in selected(run, one)]
    state = fine_tune(run, stage, number, folder, module, params, rows, prompts.width, evaluate_policy)
    base = params.get("base")
    del params
    export(run, stage, folder, module, state, base)
    summary = json.loads(storage.read_text(folder / "sampling.json"))
    if is_main():
        from safe_rlhf_jax.evaluation import plots  # not before a figure is drawn: matplotlib takes half a second

        figure = plots.best_of_n_curves([*(gain_of(run, one) for one in before), summary["gain"]])
        with storage.writing(folder / "best_of_n.png") as stream:
            figure.savefig(stream, format="png")
    metrics = {f"sampling/{k}": v for k, v in summary["gain"][-1].items() if k != "number"}
    metrics |= {"sampling/selected_share": summary["selected"] / summary["prompts"]}
    found = summary | {"metrics": metrics | evaluate_policy(whole(state.params, base))}
    return found | ({} if limit is None else {"cost_limit": limit[0][0], "cost_limit_source": limit[1]})


def rounds_before(run: Run, stage: cfg.RejectionStage) -> list[cfg.RejectionStage]:
    """Returns the rounds that a round goes on from, the first one first."""
    stages = {other.name: other for other in run.config.stages}
    found: list[cfg.RejectionStage] = []
    here: Any = stage
    while (here := stages.get(getattr(here, "init_from", ""))) is not None:
        found += [here] if isinstance(here, cfg.RejectionStage) else []
    return found[::-1]


def selected(run: Run, stage: cfg.RejectionStage) -> list[dict[str, Any]]:
    """Returns the responses that a round has selected."""
    text = storage.read_text(run.folder(stage.name) / "selected.jsonl")
    return [json.loads(line) for line in text.splitlines()]


def gain_of(run: Run, stage: cfg.RejectionStage) -> list[dict[str, float]]:
    """Returns the gain from more samples in a finished round."""
    found: list[dict[str, float]] = (run.result(stage.name) or {})["gain"]
    return found


def there(path: storage.Path) -> bool:
    """Says whether a file exists for the process that writes; all processes must call it."""
    return bool(any_process(is_main() and storage.is_file(path)))


def round_rows(stage: cfg.RejectionStage, prompts: Examples, number: int, seed: int) -> list[int]:
    """Returns the prompts of a round: the next ones of an order that is reshuffled in every pass."""
    size = stage.prompts_per_round or len(prompts)
    order = shuffled(prompts, seed % 2**32, weights(stage.prompts))
    return [int(order[i]) for i in range((number - 1) * size, number * size)]


def select(
    run: Run, stage: cfg.RejectionStage, sample: Callable[..., Any], host: Mapping[str, HostSignal],
    prompts: Examples, number: int, limit: float | None, here: storage.Path,
) -> None:  # fmt: skip
    """Samples, scores and writes the best feasible response to each prompt; prompts without one are dropped.

    Raises:
        UserError: If no prompt has a feasible response.
    """
    key = jax.random.fold_in(jax.random.key(run.seed(stage)), number)
    answered = here / "sampling.jsonl"
    limited, batches = is_limited(stage, prompts), kept_batches(answered)
    name = f"{stage.name}: sampling"
    for rows, out in sampled(run, sample, prompts, stage.prompt_batch_size, key, name, host=host, start=len(batches)):
        batches.append(choose(run, prompts, limited, limit, rows, out))
        keep_batch(answered, batches[-1])
    chosen, rewards, feasible = ([row for batch in batches for row in batch[field]] for field in FIELDS)
    counts = {"prompts": len(prompts), "selected": len(chosen), "dropped": len(prompts) - len(chosen)}
    if not chosen:
        raise UserError(
            f"{stage.name}: none of {len(prompts)} prompts has a response with cost ≤ {limit:.3f} "
            f"among {stage.responses_per_prompt}; raise cost_limit or responses_per_prompt"
        )
    gain = gain_by_number(np.array(rewards), np.array(feasible))
    means = {f"selected_{k}": float(np.mean([row[k] for row in chosen])) for k in ("truncated", *stage.scorers)}
    LOGGER.info(f"{stage.name}: {described_gain(gain)}; {counts['dropped']} dropped")
    if is_main():
        storage.write(here / "sampling.json", json.dumps(counts | means | {"gain": gain}, indent=2) + "\n")
        write_jsonl(here / "selected.jsonl", chosen)


def choose(
    run: Run, prompts: Examples, limited: np.ndarray, limit: float | None, rows: np.ndarray, out: Sampled
) -> dict[str, Any]:
    """Returns `FIELDS` of a batch of prompts: chosen responses, all rewards, who is feasible."""
    # Without a limit every cost is feasible.
    costs = np.where(limited[rows][:, None], out["cost"], -np.inf) if "cost" in out else None
    best, possible = best_of_n(jnp.asarray(out["reward"]), None if costs is None else jnp.asarray(costs), limit)
    feasible = np.ones_like(out["reward"], bool) if costs is None else costs <= limit
    chosen = [
        selected_record(run, prompts, int(rows[i]), out, i, int(best[i]))
        for i in np.flatnonzero(np.asarray(possible)).tolist()
    ]
    return dict(zip(FIELDS, (chosen, out["reward"].tolist(), feasible.tolist()), strict=True))


def selected_record(run: Run, prompts: Examples, row: int, out: dict[str, Any], i: int, best: int) -> dict[str, Any]:
    """Returns a prompt with its chosen response: texts, scores, and the sampled tokens."""
    prompt = prompts.arrays.tokens[row][prompts.arrays.mask[row]].tolist()
    response = out["tokens"][i, best, : int(out["length"][i, best])].tolist()
    return {
        "prompt": shown(prompts.turns[row]),
        "response": run.tokenizer.decode(response),
        **{signal: float(out[signal][i, best]) for signal in ("reward", "cost") if signal in out},
        "truncated": not run.has_end(response),
        "prompt_ids": prompt,
        "response_ids": response,
    }


def fine_tune(
    run: Run, stage: cfg.RejectionStage, number: int, folder: storage.Path, module: Any, params: Any,
    rows: Sequence[Any], prompt_length: int, evaluate_policy: Callable[[Any], dict[str, float]],
) -> TrainState:  # fmt: skip
    """Trains a round: supervised fine-tuning on selected responses."""
    width = prompt_length + stage.max_response_length
    data = load_sampled(rows, width=width, pad_id=run.tokenizer.pad_id)
    total, seed = max(int(stage.epochs * len(data)) // stage.batch_size, 1), run.seed(stage) + number
    state, frozen, step = build_fine_tuning(run, stage, module, params, total)
    base = params.get("base")
    tokens_per_step = stage.batch_size * data.mean_tokens
    full_tokens = stage.batch_size * (stage.max_prompt_length + stage.max_response_length)
    final: TrainState = fit(
        TrainLoop(
            name=stage.name, total_steps=total, init=lambda: state, step=step,
            batch=run.batches(data, stage.batch_size, seed, None), frozen=frozen, seed=seed,
            checkpoint_every=stage.checkpoint_every, keep_checkpoints=stage.keep_checkpoints,
            keep_best=stage.keep_best, eval_every=stage.eval_every, patience=stage.patience,
            evaluate=lambda s: evaluate_policy(whole(s.params, base)), tokens=lambda _: tokens_per_step,
            flops=rejection_flops(run, stage, 1.0)["step"] / full_tokens, profile=profiled(stage),
        ),
        folder, writers=writers(run),
    )  # fmt: skip
    return final


def build_fine_tuning(
    run: Run, stage: cfg.RejectionStage, module: Any, params: Any, total_steps: int
) -> tuple[TrainState, Frozen, Callable[..., Any]]:
    """Returns the state of a policy before a round's first step, the frozen parameters, and the jitted step."""
    optimizer = optimizer_of(stage.optimizer, total_steps)
    state = run.networks.start(module, {"params": params}, optimizer)
    step = jit_supervised(run, stage, sft_step, module, optimizer, state)
    return state, Frozen(None, {}, bases_of((module, params))), step


def rejection_programs(run: Run, stage: cfg.RejectionStage) -> Iterator[Program]:
    """Yields the programs of sampling and scoring a batch of prompts, and of the fine-tuning step."""
    policy, variables = run.networks.to_train(stage, stage.init_from, "lm")
    scorers = open_scorers(run, stage.scorers, stage.adapters)
    sample, rows = sampler_of(run, stage, policy, scorers.modules), stage.prompt_batch_size
    group = array(rows, dtype=jnp.int32)
    batch = put(run, PromptBatch(**texts(rows, stage.max_prompt_length), group=group, row=group))
    reads = {
        "decoding": decoding_reads(
            policy.config, variables, rows=rows * stage.responses_per_prompt, prompt=stage.max_prompt_length,
            response=stage.max_response_length, mesh=run.mesh.shape,
        ),
        "scoring": Reads(weight_bytes(scorers.variables, policy.config.dtype), 1),
    }  # fmt: skip
    yield Program("sampling", sample, (variables["params"], scorers.variables, batch, random_key()), reads)
    state, frozen, step = build_fine_tuning(run, stage, policy, variables["params"], TOTAL_STEPS)
    length = stage.max_prompt_length + stage.max_response_length
    selected = SupervisedBatch(**texts(stage.batch_size, length), loss_mask=array(stage.batch_size, length))
    yield Program("step", step, (state, frozen, put(run, selected), random_key()))


def rejection_flops(run: Run, stage: cfg.RejectionStage, again: float) -> dict[str, float]:
    """Returns the FLOPs of sampling and scoring a batch of prompts, and of a fine-tuning step, by phase."""
    config = with_adapters(run.networks.config(stage.init_from), stage.adapters)
    length = stage.max_prompt_length + stage.max_response_length
    rows = stage.prompt_batch_size * stage.responses_per_prompt
    sampling = iteration_flops(
        config, rows, stage.max_prompt_length, stage.max_response_length, False, critics=0,
        scorers=len(stage.scorers), reference=False,
    )  # fmt: skip
    step = trunk_flops(config, stage.batch_size, length)
    step += update_flops(config, stage.batch_size, length, length, again)
    return {"generation": sampling["generation"], "scoring": sampling["scoring"], "step": step}


def rejection_tokens(stage: cfg.RejectionStage) -> int:
    """Returns the tokens of a sampled batch of prompts, and of a training batch of responses."""
    rows = stage.prompt_batch_size * stage.responses_per_prompt + stage.batch_size
    return rows * (stage.max_prompt_length + stage.max_response_length)


REJECTION = Kind(
    cfg.RejectionStage,
    run_rejection,
    check=check_constraints,
    training=Training(rejection_programs, rejection_flops, rejection_tokens, lambda *_: None, measured_on_prompts),
)
