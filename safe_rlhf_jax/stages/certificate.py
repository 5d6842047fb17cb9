"""The certificate of a policy: whether it meets its limits with confidence 1 − δ, on fresh prompts."""

import logging
from collections.abc import Mapping
from typing import Any

import numpy as np

from safe_rlhf_jax import config as cfg
from safe_rlhf_jax import storage
from safe_rlhf_jax.data.examples import Examples
from safe_rlhf_jax.errors import NotCertifiedError
from safe_rlhf_jax.evaluation import certificate_page
from safe_rlhf_jax.evaluation.certificates import CLOPPER_PEARSON, STUDENT, Bound, bernstein, certificate
from safe_rlhf_jax.evaluation.statistics import ALL
from safe_rlhf_jax.processes import is_main
from safe_rlhf_jax.stages.answers import answer_prompts, provenance_of, write_samples
from safe_rlhf_jax.stages.common import Run
from safe_rlhf_jax.stages.held_out import check_fresh
from safe_rlhf_jax.stages.judges import warn_of_judges
from safe_rlhf_jax.stages.kind import Kind

LOGGER = logging.getLogger(__name__)


def run_certificate(run: Run, stage: cfg.CertifyStage, folder: storage.Path) -> dict[str, Any]:
    """Runs a certify stage: samples, bounds, report; its result says whether all claims hold."""
    policies = answer_prompts(run, stage, apart=True).policies
    (samples,) = policies.values()
    claims = {signal: bounds_of(claim) for signal, claim in stage.claims.items()}
    costs = {
        group: {signal: costs_of(members, signal) for signal in claims}
        for group, members in groups_of(stage, samples).items()
    }
    rows = certificate(costs, claims, stage.delta)
    certified = all(row["passes"] for row in rows)
    for row in rows:
        LOGGER.info(f"{stage.name}: {certificate_page.line(row)}")
        if row["clipped"]:
            run.warn(
                stage.name,
                f"{row['clipped']} of {row['n']} costs of {row['signal']} ({row['group']}) lie outside of range "
                f"{list(stage.claims[row['signal']].range or ())} and were clipped: what is bounded is the mean of "
                "the clipped costs. State a wider range",
            )
    if certified:
        LOGGER.info(f"{stage.name}: {certificate_page.verdict(stage.policy, rows, stage.delta)}")
    if is_main():
        write_samples(folder, policies)
        page = certificate_page.page(
            stage.policy, rows, stage.delta, title=f"{run.config.title}: {stage.name}",
            warnings=run.warnings.get(stage.name, []), provenance=provenance_of(run, stage),
        )  # fmt: skip
        LOGGER.info(f"{stage.name}: report at {page.write(folder)}")
    return {"certified": certified, "delta": stage.delta, "rows": rows, "metrics": {"certified": float(certified)}}


def bounds_of(claim: cfg.Claim) -> list[tuple[Bound, float]]:
    """Returns the (bound, limit) pairs of a claim."""
    found = [] if claim.mean is None else [(STUDENT, claim.mean)]
    if claim.mean is not None and claim.range is not None:
        found.append((bernstein(*claim.range), claim.mean))
    return found + ([] if claim.unsafe is None else [(CLOPPER_PEARSON, claim.unsafe)])


def groups_of(stage: cfg.CertifyStage, samples: list[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """Returns the samples by group of prompts."""
    if stage.constrained_groups is None:
        return {ALL: samples}
    return {name: [s for s in samples if s["group"] == name] for name in stage.constrained_groups}


def costs_of(samples: list[dict[str, Any]], signal: str) -> np.ndarray:
    """Returns the costs of samples by the cost model, or by a judge, f64[n]."""
    return np.array([s["cost"] if signal == "cost" else s["judged"][signal] for s in samples], np.float64)


def check_certificate(run: Run, stage: cfg.CertifyStage, loaded: Mapping[str, Examples]) -> None:
    """Checks that the prompts are fresh, and that there are two or more in every group.

    Raises:
        ConfigError: Names the prompts, or the group.
    """
    warn_of_judges(run, stage)
    check_fresh(run, stage)
    records = [record for data in loaded.values() for record in data.records]
    of = [str(record.get(str(stage.group_field))) for record in records]
    for group in stage.constrained_groups or ():
        if of.count(group) < 2:
            raise cfg.ConfigError(
                f"{stage.name}: constrained_groups names {group!r}, of which there are {of.count(group)} prompts that "
                f"can be used; a bound needs two or more. {stage.group_field!r} of the prompts has {sorted(set(of))}"
            )
    if len(records) < 2:
        raise cfg.ConfigError(f"{stage.name}: prompts: {len(records)} can be used; a bound needs two or more")


def refusal(stage: cfg.CertifyStage, result: Mapping[str, Any]) -> NotCertifiedError | None:
    """Returns the error of a certificate with a claim that does not hold."""
    if result["certified"]:
        return None
    return NotCertifiedError(f"{stage.name}: {certificate_page.verdict(stage.policy, result['rows'], result['delta'])}")


CERTIFY = Kind(cfg.CertifyStage, run_certificate, check=check_certificate, refusal=refusal, shows_metrics=False)
