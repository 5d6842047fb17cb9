"""Policies from pairs without sampling: DPO and its relatives, and the merging of two policies."""

import dataclasses
import functools
import logging
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from safe_rlhf_jax import config as cfg
from safe_rlhf_jax import objectives, storage
from safe_rlhf_jax.data import examples
from safe_rlhf_jax.data.formats import UNUSABLE, Record, Unusable
from safe_rlhf_jax.data.loader import in_order, in_rows
from safe_rlhf_jax.data.texts import safety_labels
from safe_rlhf_jax.evaluation import evaluate
from safe_rlhf_jax.models import hf
from safe_rlhf_jax.models.adapters import Adapted, LanguageModel, whole
from safe_rlhf_jax.optim import gradient_step
from safe_rlhf_jax.stages.common import Run, export_errors, read_length
from safe_rlhf_jax.stages.datasets import load_records
from safe_rlhf_jax.stages.kind import Kind
from safe_rlhf_jax.stages.programs import array, one_side, packing
from safe_rlhf_jax.stages.supervised import Task, supervised_kind
from safe_rlhf_jax.types import Frozen, Params, PreferenceBatch, TrainState

LOGGER = logging.getLogger(__name__)

LEFT_OUT = "both responses are unsafe"


def load_direct(run: Run, stage: cfg.DPOStage, field: str) -> examples.Examples:
    """Returns the pairs of a DPO stage, chosen and rejected by its labels; `lagrangian` has yet to rank them."""
    records: Sequence[Record] = run.records(stage.datasets()[field].data)
    left_out = 0
    if stage.preference == "safe_helpfulness":
        records, left_out = safe_first(records)
    pairs = load_records(run, stage, field, records)
    arrays = pairs.arrays
    if stage.reads == "cost":
        arrays = PreferenceBatch(arrays.safer, arrays.unsafer)
    if stage.safety_margin:
        unsafe = np.array([sum(safety_labels(record)) == 1 for record in pairs.records])
        arrays = dataclasses.replace(arrays, margin=(stage.safety_margin * unsafe).astype(np.float32))
    gone = pairs.left_out | ({LEFT_OUT: left_out} if left_out else {})
    return dataclasses.replace(pairs, arrays=arrays, left_out=gone)


def safe_first(records: Sequence[Record]) -> tuple[list[Record], int]:
    """Returns pairs with safe responses preferred over unsafe ones, and the number of dropped pairs of two unsafe ones.

    Source: Kim et al. 2025 (arXiv 2505.20065), the safety-aware transformation of SafeDPO's data.
    """
    out, left_out = [], 0
    for record in records:
        if UNUSABLE in record:
            out.append(record)
            continue
        try:
            safe = safety_labels(record)
        except Unusable as reason:
            out.append(record | {UNUSABLE: str(reason)})
            continue
        if not any(safe):
            left_out += 1
        else:
            out.append(record if all(safe) else record | {"better_response_id": safe.index(True)})
    return out, left_out


def rank_by_models(run: Run, stage: cfg.DPOStage, pairs: examples.Examples) -> examples.Examples:
    """Returns pairs; with `lagrangian`, the chosen response has the higher R − λC by the models of the stage.

    Source: Liu et al. 2024 (arXiv 2403.02475, C-DPO), which samples the label from σ of the difference; here it is the
    sign, as with `label_smoothing` 0.
    """
    if stage.preference != "lagrangian":
        return pairs
    values = np.zeros((2, len(pairs)), np.float32)
    for kind, model, weight in (("reward", stage.reward_model, 1.0), ("cost", stage.cost_model, -stage.multiplier)):
        module, variables = run.networks.read(str(model), "score", score_type=kind)  # type: ignore[arg-type]
        score = evaluate.make_score(module)
        batches = in_order(read := as_read_by(run, stage, str(model), pairs), run.rows(read))
        for side, name in enumerate(("chosen", "rejected")):
            parts = [run.get(score(variables, run.put(getattr(batch, name)))) for batch, _ in batches]
            values[side] += weight * in_rows(parts, batches)
    swap = values[1] > values[0]
    arrays = pairs.arrays

    def pick(first: Any, second: Any) -> Any:
        return jax.tree.map(lambda a, b: np.where(swap[:, None], b, a), first, second)

    LOGGER.info(
        f"{stage.name}: the models turn {swap.mean():.1%} of {len(pairs)} pairs round (λ = {stage.multiplier:g})"
    )
    ranked = PreferenceBatch(pick(arrays.chosen, arrays.rejected), pick(arrays.rejected, arrays.chosen))
    return dataclasses.replace(pairs, arrays=ranked)


def as_read_by(run: Run, stage: cfg.DPOStage, model: str, pairs: examples.Examples) -> examples.Examples:
    """Returns pairs in a scorer's encoding: unchanged, or encoded again if it has its own.

    Raises:
        ValueError: If one of them cannot be encoded.
    """
    if model not in run.own:
        return pairs
    encoding, where = run.encoding(model), f"{stage.name}: pairs as {model} reads them"
    options: dict[str, Any] = {"max_length": read_length(run, model, stage.max_length), "where": where, "max_bad": 0.0}
    return examples.load_pairs(pairs.records, encoding.template, encoding.tokenizer, safety=False, **options)


def direct_step(
    stage: cfg.DPOStage, module: LanguageModel, optimizer: optax.GradientTransformation
) -> Callable[..., Any]:
    """Returns the step of DPO; `frozen` is the reference's parameters."""

    def step(
        state: TrainState, frozen: Params, batch: PreferenceBatch, key: jax.Array
    ) -> tuple[TrainState, dict[str, jax.Array]]:
        del key

        def loss(params: Params, part: PreferenceBatch) -> tuple[jax.Array, dict[str, jax.Array]]:
            ratios = objectives.pair_log_ratios(module, params, frozen, part)
            return objectives.direct_loss(*ratios, part.margin, **loss_options(stage))

        state, metrics = gradient_step(loss, state, batch, optimizer, microbatches=stage.microbatches)
        return state, {f"train/{name}": value for name, value in metrics.items()}

    return step


def reference_of(run: Run, stage: cfg.DPOStage, module: Any, variables: dict[str, Any]) -> Params:
    """Returns the parameters of the reference, without its base."""
    out: Params = run.networks.reference_of(stage, module, variables["params"])
    return out


def direct_batch(stage: cfg.DPOStage) -> PreferenceBatch:
    """Returns a batch at its full length, without contents."""
    margin = array(stage.batch_size, dtype=jnp.float32) if stage.safety_margin else None
    one = one_side(stage.batch_size, stage.max_length)
    return PreferenceBatch(one, one, margin, packing=packing(stage, 2 * stage.batch_size))


def loss_options(stage: cfg.DPOStage) -> dict[str, Any]:
    """Returns the scalars of a stage's loss."""
    return {"beta": stage.beta, "label_smoothing": stage.label_smoothing, "squared": stage.loss == "ipo"}


def direct_evaluate(
    run: Run, stage: cfg.DPOStage, module: LanguageModel, frozen: Frozen, pairs: examples.Examples
) -> Callable[[TrainState], dict[str, Any]]:
    """Returns evaluate(state): the loss and its metrics on held-out pairs."""
    batches = in_order(pairs, run.rows(pairs))
    ratios = jax.jit(functools.partial(objectives.pair_log_ratios, module))
    reference = (
        whole(frozen.reference, frozen.bases.get(module.base)) if isinstance(module, Adapted) else frozen.reference
    )

    def evaluate_state(state: TrainState) -> dict[str, Any]:
        parts = [run.get(ratios(state.params, reference, run.put(batch))) for batch, _ in batches]
        chosen, rejected = (jnp.asarray(in_rows(side, batches)) for side in zip(*parts, strict=True))
        margin = pairs.arrays.margin
        loss, metrics = objectives.direct_loss(
            chosen, rejected, None if margin is None else jnp.asarray(margin), **loss_options(stage)
        )
        return {"metrics": {name: float(value) for name, value in (metrics | {"loss": loss}).items()}}

    return evaluate_state


def run_merge(run: Run, stage: cfg.MergeStage, folder: storage.Path) -> dict[str, Any]:
    """Runs a merge stage: parameters (1 − w)·a + w·b.

    Source: Wachi et al. 2024 (arXiv 2404.11049), P-SACPO, after Wortsman et al. 2022 (arXiv 2203.05482).
    """
    module, first = run.networks.open(stage.init_from, "lm")
    _, second = run.networks.open(stage.other, "lm")
    w = stage.weight
    params = jax.tree.map(lambda a, b: (1 - w) * a + w * b, first["params"], second["params"])
    with export_errors(folder / "export"):
        hf.save(folder / "export", module, {"params": params}, run.tokenizer.hf, ends=run.ends)
    return {"metrics": {}}


DPO = supervised_kind(
    cfg.DPOStage,
    Task(
        "lm",
        direct_step,
        direct_evaluate,
        batch=direct_batch,
        measured=("loss", "accuracy", "margin", "chosen_log_ratio", "rejected_log_ratio"),
        load=load_direct,
        prepare=rank_by_models,
        frozen=reference_of,
        sides=2,
        frozen_passes=1,
    ),
)
MERGE = Kind(cfg.MergeStage, run_merge)
