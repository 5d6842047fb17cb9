"""Which metrics a stage has, known before it trains: what `keep_best` may name."""

from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from safe_rlhf_jax import config as cfg
from safe_rlhf_jax.config.messages import did_you_mean
from safe_rlhf_jax.data.examples import Examples, group_names
from safe_rlhf_jax.data.loader import in_order
from safe_rlhf_jax.errors import ConfigError
from safe_rlhf_jax.evaluation.evaluate import collect_samples
from safe_rlhf_jax.evaluation.statistics import summarize
from safe_rlhf_jax.stages.common import Run, oracle_for
from safe_rlhf_jax.stages.programs import abstract_twin, programs

SCORES = ("mean", "std", "accuracy", "calibration_error")
EVALUATED = {  # kind of a supervised stage -> what it measures on eval_data
    "sft": ("loss", "perplexity"),
    "reward": SCORES,
    "cost": (*SCORES, "sign_accuracy"),
    "dpo": ("loss", "accuracy", "margin", "chosen_log_ratio", "rejected_log_ratio"),
}


def check_keep_best(run: Run, stage: Any, loaded: Mapping[str, Examples]) -> None:
    """`keep_best` names a metric that the stage has, while nothing is lost yet.

    Args:
        run: The run.
        stage: The config of a stage.
        loaded: Its data by setting.

    Raises:
        ConfigError: With the nearest name, and all there are.
    """
    if getattr(stage, "keep_best", None) is None:
        return
    name = stage.keep_best.removeprefix("-")
    held_out = "eval_data" if isinstance(stage, cfg.SupervisedStage) else "eval_prompts"
    if name.startswith("eval/") and held_out not in loaded:
        raise ConfigError(f"{stage.name}: keep_best {name!r} is measured on {held_out}, which is not given")
    known = evaluation_metrics(run, stage, loaded) if name.startswith("eval/") else training_metrics(run, stage, loaded)
    if name not in known:
        raise ConfigError(
            f"{stage.name}: keep_best {name!r} is none of its metrics{did_you_mean(name, known)}; there are "
            f"{', '.join(sorted(known))}"
        )


def evaluation_metrics(run: Run, stage: Any, loaded: Mapping[str, Examples]) -> set[str]:
    """Returns the names of what a stage measures on held-out data."""
    if stage.kind in EVALUATED:
        return {f"eval/{name}" for name in EVALUATED[stage.kind]}
    prompts = loaded["eval_prompts"]

    def respond(batch: Any, key: jax.Array) -> dict[str, Any]:
        """An empty response to every prompt."""
        del key
        rows = len(batch.tokens)
        numbers = ("kl", *stage.scorers)
        return {"tokens": batch.tokens, "length": np.zeros(rows)} | dict.fromkeys(numbers, np.zeros(rows))

    samples = collect_samples(
        respond, in_order(prompts, run.eval_batch), prompts, key=jax.random.key(0), ends=(), decode=lambda _: "",
        split="test", group_field=stage.group_field, oracle=oracle_for(stage.eval_prompts),
    )  # fmt: skip
    return {f"eval/{name}" for name in summarize(samples) if "/" not in name}


def training_metrics(run: Run, stage: Any, loaded: Mapping[str, Examples]) -> set[str]:
    """Returns the names of the metrics of a step, from its shapes alone."""
    with jax.set_mesh(run.mesh):
        *_, last = programs(abstract_twin(run), stage)
        names = set(jax.eval_shape(last.function, *last.arguments)[1])
    groups = group_names(loaded["prompts"].records, stage.group_field) if isinstance(stage, cfg.RLStage) else ()
    shares = [name for name in names if name.startswith("train/unsafe_share")]
    return names | {f"{name}/{group}" for name in shares for group in groups if len(groups) > 1}
