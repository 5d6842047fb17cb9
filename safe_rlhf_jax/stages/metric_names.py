"""Names of a stage's metrics, known before it trains, for `keep_best`."""

from collections.abc import Mapping

import jax

from safe_rlhf_jax import config as cfg
from safe_rlhf_jax.config.messages import did_you_mean
from safe_rlhf_jax.data.examples import Examples
from safe_rlhf_jax.errors import ConfigError
from safe_rlhf_jax.stages.common import Run
from safe_rlhf_jax.stages.kind import Training
from safe_rlhf_jax.stages.programs import of_shapes


def check_keep_best(run: Run, stage: cfg.TrainingStage, training: Training, loaded: Mapping[str, Examples]) -> None:
    """Checks, before training, that `keep_best` names a metric of the stage.

    Args:
        run: The run.
        stage: The config of a stage.
        training: The record of its kind.
        loaded: Its data by setting.

    Raises:
        ConfigError: With the nearest name, and all names.
    """
    if stage.keep_best is None:
        return
    name = stage.keep_best.removeprefix("-")
    evaluated = name.startswith("eval/")
    if evaluated and stage.held_out not in loaded:
        raise ConfigError(f"{stage.name}: keep_best {name!r} is measured on {stage.held_out}, which is not given")
    if evaluated:
        known = {f"eval/{one}" for one in training.measured(run, stage, loaded)}
    else:
        known = training_metrics(run, stage, training, loaded)
    if name not in known:
        raise ConfigError(
            f"{stage.name}: keep_best {name!r} is none of its metrics{did_you_mean(name, known)}; there are "
            f"{', '.join(sorted(known))}"
        )


def training_metrics(
    run: Run, stage: cfg.TrainingStage, training: Training, loaded: Mapping[str, Examples]
) -> set[str]:
    """Returns the names of the metrics of a step, from its shapes alone."""
    with jax.set_mesh(run.mesh):
        *_, last = training.programs(of_shapes(run), stage)
        names: set[str] = set(jax.eval_shape(last.function, *last.arguments)[1])
    groups = training.groups(stage, loaded)
    shares = [name for name in names if name.startswith("train/unsafe_share")]
    return names | {f"{name}/{group}" for name in shares for group in groups if len(groups) > 1}
