"""Constraints between config and step: limits chosen and checked, groups of prompts, windows and multipliers."""

import functools
import json
import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from safe_rlhf_jax import config as cfg
from safe_rlhf_jax import storage
from safe_rlhf_jax.data import examples
from safe_rlhf_jax.data.loader import in_order
from safe_rlhf_jax.data.texts import paired
from safe_rlhf_jax.evaluation import evaluate
from safe_rlhf_jax.optim import schedule
from safe_rlhf_jax.rl.algorithms import ALGORITHMS
from safe_rlhf_jax.rl.constraints import Constraint, Measure, by_group, mean, rate, rectified, spectral, tail
from safe_rlhf_jax.rl.lagrange import LOG, PENALTY, PROJECTED, Multiplier, pid_multiplier
from safe_rlhf_jax.stages.common import Run, described, read_length, report_data
from safe_rlhf_jax.stages.datasets import keep, take
from safe_rlhf_jax.stages.host_signals import HostSignal
from safe_rlhf_jax.stages.judges import by_text
from safe_rlhf_jax.stages.small_data import data_warnings

LOGGER = logging.getLogger(__name__)

LEAST_LOG_MULTIPLIER = 0.01  # start of log λ if a dual stage finds λ* = 0


Limited = cfg.RLStage | cfg.RejectionStage | cfg.DualStage  # stages with limits of costs


def constraints_of(stage: Limited) -> dict[str, cfg.Lagrange]:
    """Returns {cost signal: its constraint}; empty for an algorithm without constraints."""
    algorithm = getattr(stage, "algorithm", None)
    return stage.limits if algorithm is None or ALGORITHMS[algorithm.name].constrained else {}


def initial_multiplier(run: Run, lagrange: cfg.Lagrange) -> float:
    """Returns the initial λ, from a dual stage if `init` names one, within the bounds of this constraint."""
    if not isinstance(lagrange.init, str):
        return lagrange.init
    found = run.networks.multiplier(lagrange.init)
    if found is None:  # a number changes no shape
        return 1.0
    floor = LEAST_LOG_MULTIPLIER if lagrange.multiplier == "log" else 0.0
    low, high = max(lagrange.min_multiplier or 0.0, floor), lagrange.max_multiplier or float("inf")
    used = min(max(found, low), high)
    note = "" if used == found else f", moved to {used:.4g}, within [{low:.4g}, {high:.4g}]"
    LOGGER.info(f"multiplier at the start: {found:.4g} of stage {lagrange.init}{note}")
    return used


def compensation_warning(
    stage: cfg.RLStage, limits: dict[str, tuple[tuple[float, ...], str]]
) -> Callable[[dict[str, float]], str | None]:
    """Returns warning(metrics): mean cost within its limit although many responses cost more than 0."""

    def warning(metrics: dict[str, float]) -> str | None:
        for signal, lagrange in constraints_of(stage).items():
            suffix, limit = signal.removeprefix("cost"), limits[signal][0][0]
            share, reached = metrics.get(f"train/unsafe_share{suffix}", 0.0), metrics.get(f"train/mean_cost{suffix}")
            upper = lagrange.of == "cost" and lagrange.bound == "at_most" and lagrange.measure != "rate"
            if upper and reached is not None and reached <= limit and share > lagrange.warn_unsafe_share:
                return (
                    f"the mean cost {reached:.3f} is within the limit {limit:.3f}, yet {share:.0%} of the constrained "
                    "responses cost more than 0: very safe responses pay for unsafe ones. Name the prompts the "
                    "constraint is about (algorithm.lagrange.constrained_groups), or lower the limit."
                )
        return None

    return warning


def cost_limits(
    run: Run, stage: Limited, signal: str, host: Mapping[str, HostSignal] | None = None
) -> tuple[tuple[float, ...], str]:
    """Returns d of every slot and its origin; refuses a limit that the cost model cannot reach, before training.

    Args:
        run: The run.
        stage: The stage.
        signal: The limited cost.
        host: Signals from the host, which no model of the stage scores.

    Raises:
        ValueError: For an unreachable limit, naming the floor.
    """
    lagrange, data = stage.limits[signal], labelled_data(run, stage, signal)
    costs: dict[str, list[float]] = {}
    if data is not None:
        asked = (host or {}).get(signal)
        costs = written_costs(run, stage, signal, data) or (
            labelled_costs(run, stage, signal, data) if asked is None else asked_costs(run, asked, data)
        )
    setting: Any = lagrange.cost_limit if lagrange.group_limits is None else tuple(lagrange.group_limits.values())
    if not isinstance(setting, cfg.CalibratedLimit):
        limits = setting if isinstance(setting, tuple) else (setting,)
        for limit in limits if costs else ():
            evaluate.check_reachable(limit, costs["safe"], field=limit_field(stage, signal))
        return limits, "as configured"
    limit = evaluate.calibrated_limit(costs["safe"], costs["unsafe"], setting.margin)
    evaluate.check_reachable(limit, costs["safe"], field=limit_field(stage, signal))
    groups = lagrange.constrained_groups
    filtered = len(named_records(run, stage, signal, setting.data)) < len(run.records(setting.data))
    where = f" to {', '.join(groups)} prompts" if groups and filtered else ""
    source = (
        f"mean cost of {len(costs['safe'])} responses{where} labelled safe, plus {setting.margin:.0%} of the gap to "
        f"the {len(costs['unsafe'])} labelled unsafe, by the cost model"
    )
    LOGGER.info(f"{stage.name}: {signal.replace('/', ' ')} limit {limit:.3f} ({source})")
    return (limit,), source


def limit_field(stage: Limited, signal: str) -> str:
    """Returns the setting that holds the limit of a cost."""
    return stage.limit_field(signal, "cost_limit" if stage.limits[signal].group_limits is None else "group_limits")


def asked_costs(run: Run, score: HostSignal, data: examples.Examples) -> dict[str, list[float]]:
    """Returns the scores of labelled responses by a signal from the host, {safe, unsafe}."""
    scores = np.concatenate(by_text(run, score, data))
    safe = np.concatenate([data.arrays.safer_is_safe, data.arrays.unsafer_is_safe])
    return {"safe": scores[safe].tolist(), "unsafe": scores[~safe].tolist()}


def written_costs(run: Run, stage: Limited, signal: str, data: examples.Examples) -> dict[str, list[float]] | None:
    """Returns what the stage of a cost model has found on its `eval_data`, {safe, unsafe}, if that is this data."""
    name = stage.scorers.get(signal, "")
    file = run.folder(name) / "scores.json"
    if isinstance(stage.limits[signal].cost_limit, cfg.CalibratedLimit) or not storage.is_file(file):
        return None
    found: dict[str, list[float]] = json.loads(storage.read_text(file))["scores_by_label"]
    texts = 2 * len(data.arrays.safer_is_safe)
    return found if run.result(name) and len(found["safe"]) + len(found["unsafe"]) == texts else None


def labelled_costs(run: Run, stage: Limited, signal: str, data: examples.Examples) -> dict[str, list[float]]:
    """Returns a cost model's scores of labelled responses, {safe, unsafe}."""
    report_data(f"{stage.name}: cost_limit", data)
    module, variables = run.networks.read(stage.scorers[signal], "score", score_type="cost")
    score = evaluate.make_score(module)
    batches = in_order(data, run.rows(data))
    out = evaluate.evaluate_pairs(lambda texts: run.get(score(variables, run.put(texts))), batches)
    by_label: dict[str, list[float]] = out["scores_by_label"]
    return by_label


def labelled_data(
    run: Run, stage: Limited, signal: str, get: Callable[..., examples.Examples] = take
) -> examples.Examples | None:
    """Returns the labelled pairs for calibrating a limit, or for checking a fixed one before training.

    A fixed limit is compared with the `eval_data` of the stage that trains its cost model; without it, or if its
    responses have one label only, it is not checked, and the run says so.

    Raises:
        ConfigError: If a limit is to be calibrated, but no response is labelled safe, or none unsafe.
    """
    lagrange, limit_of = stage.limits[signal], limit_field(stage, signal)
    calibrated = isinstance(lagrange.cost_limit, cfg.CalibratedLimit)
    cost = next((other for other in run.config.stages if other.name == stage.scorers.get(signal)), None)
    data: Any = getattr(lagrange.cost_limit, "data", None) or getattr(cost, "eval_data", None)
    if data is None or not (lagrange.in_cost_units or calibrated):
        return None
    records = paired(named_records(run, stage, signal, data))
    if len(labels_of(records, "is_response_0_safe", "is_response_1_safe")) == 2:
        load = functools.partial(load_labelled, data=data, signal=signal)
        pairs = get(run, stage, f"labelled by {signal}", load)
        if len({*pairs.arrays.safer_is_safe.tolist(), *pairs.arrays.unsafer_is_safe.tolist()}) == 2:
            return pairs
    on = f" on {', '.join(lagrange.named)} prompts" if lagrange.named else ""
    found = labels_of(records, "is_response_0_safe", "is_response_1_safe", "is_safe")
    has = {0: "has no labels", 1: f"has only {'safe' if found == {True} else 'unsafe'} ones", 2: "has no such pair"}
    if calibrated:
        raise cfg.ConfigError(
            f"{stage.name}: {limit_of}: {described(data)} needs responses labelled safe and responses labelled unsafe"
            f"{on}, in pairs or under one prompt; it {has[len(found)]}"
        )
    run.warn(
        stage.name,
        f"whether {limit_of} can be reached is not checked: that takes responses labelled safe and responses labelled "
        f"unsafe{on}, and eval_data of {stage.scorers[signal]} {has[len(found)]}",
    )
    return None


def load_labelled(run: Run, stage: Limited, field: str, *, data: cfg.Mixture, signal: str) -> examples.Examples:
    """Returns labelled pairs on prompts that a constraint names.

    Evaluation data of a cost model is read as in its stage, which has checked how much of it is usable.
    """
    del field  # may belong to another stage
    model = stage.scorers.get(signal, "")  # "": a signal from the host, which reads texts
    cost: Any = next((other for other in run.config.stages if other.name == model), None)
    own = cost is None or data != cost.eval_data
    length = stage.max_prompt_length + stage.max_response_length if own else cost.max_length
    encoding = run.encoding(model)
    return examples.load_pairs(
        named_records(run, stage, signal, data),
        encoding.template,
        encoding.tokenizer,
        safety=True,
        max_length=read_length(run, model, length),
        where=f"{stage.name}: cost_limit {described(data)}",
        max_bad=run.config.max_bad_records if own else 1.0,
    )


def named_records(run: Run, stage: Limited, signal: str, data: cfg.Mixture) -> list[Any]:
    """Returns records on prompts that a constraint names; on all prompts if the data has no groups."""
    records, field, groups = run.records(data), str(stage.group_field), stage.limits[signal].named
    if groups and any(field in record for record in records):
        return [record for record in records if str(record.get(field)) in groups]
    return records


def labels_of(records: Sequence[Any], *fields: str) -> set[bool]:
    """Returns the safety labels that occur in fields of records."""
    labels = (record.get(field) for record in records for field in fields)
    return {bool(label) for label in labels if label in (True, False)}


def check_groups(stage: Limited, groups: tuple[str, ...]) -> None:
    """Checks that the prompts have the groups that the constraints name.

    Raises:
        ConfigError: With the existing groups.
    """
    for signal, lagrange in constraints_of(stage).items():
        unknown = [name for name in lagrange.named or () if name not in groups]
        if unknown:
            field = "constrained_groups" if lagrange.group_limits is None else "group_limits"
            raise cfg.ConfigError(
                f"{stage.name}: {stage.limit_field(signal, field)} names {unknown}, but {stage.group_field!r} of the "
                f"prompts that can be used has {list(groups)}"
            )


def check_constraints(run: Run, stage: Limited, loaded: Mapping[str, examples.Examples]) -> None:
    """Checks that usable prompts have the groups of the limits, and that labelled data exists for calibration."""
    constraints = constraints_of(stage)
    if constraints:
        check_groups(stage, examples.group_names(loaded["prompts"].records, stage.group_field))
    for signal, lagrange in constraints.items():
        data = labelled_data(run, stage, signal, keep)
        if isinstance(lagrange.cost_limit, cfg.CalibratedLimit) and data is not None:
            field = f"{stage.limit_field(signal, 'cost_limit')}.data"
            for warning in data_warnings(stage, field, stage.datasets()[field], data):
                run.warn(stage.name, warning)


def measure_of(lagrange: cfg.Lagrange) -> Measure:
    """Returns the measure of a constraint."""
    measures: dict[str, Measure] = {
        "mean": mean,
        "rectified": rectified(lagrange.threshold),
        "rate": rate(lagrange.threshold),
        "cvar": tail(lagrange.tail),
        "spectral": spectral(lagrange.power),
    }
    return measures[lagrange.measure]


def multiplier_of(lagrange: cfg.Lagrange) -> Multiplier:
    """Returns the update rule of a constraint's λ."""
    pid = pid_multiplier(**lagrange.pid.model_dump())
    return {"log": LOG, "projected": PROJECTED, "pid": pid, "penalty": PENALTY}[lagrange.multiplier]


def constraint_of(
    stage: cfg.RLStage, lagrange: cfg.Lagrange, limits: tuple[float, ...], groups: tuple[str, ...]
) -> Constraint:
    """Returns a constraint in the form used by the step."""
    separate = lagrange.group_limits is not None
    return Constraint(
        limit=limits,
        lr=schedule(lagrange.schedule, lr=lagrange.lr, warmup_ratio=0.0, total_steps=stage.steps),
        multiplier=multiplier_of(lagrange),
        measure=measure_of(lagrange),
        delta=lagrange.delta,
        sign=+1 if lagrange.bound == "at_most" else -1,
        of=None if lagrange.of == "cost" else lagrange.of,
        slots=by_group(groups, lagrange.named, separate=separate),
        names=tuple(lagrange.group_limits) if lagrange.group_limits is not None else ("",),
        every=lagrange.every,
        delay=lagrange.delay,
        max_multiplier=lagrange.max_multiplier,
        min_multiplier=lagrange.min_multiplier or 0.0,
    )
