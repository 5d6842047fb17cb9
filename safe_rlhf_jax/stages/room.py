"""Room for the outputs of a run: writable folders, and enough disk space for checkpoints and exports."""

import functools
import math
from typing import Any

import jax

from safe_rlhf_jax import storage
from safe_rlhf_jax.errors import ConfigError
from safe_rlhf_jax.models.adapters import Adapted
from safe_rlhf_jax.models.config import Lora, ModelConfig
from safe_rlhf_jax.models.parameters import boxed_variables
from safe_rlhf_jax.models.transformer import CausalLM
from safe_rlhf_jax.stages.common import Run
from safe_rlhf_jax.stages.kinds import kind_of, networks_of
from safe_rlhf_jax.stages.networks import with_adapters

PARAMETER = 4  # bytes
TRAINED = 3 * PARAMETER  # with the two moments of AdamW in float32


def check_room(run: Run) -> None:
    """Checks that every unfinished stage can write its folder; warns if the disk seems too small for all of them.

    Raises:
        ConfigError: If a folder cannot be written.
    """
    free, needed = storage.free_bytes(run.config.workdir), 0
    size = functools.cache(lambda reference, lora: parameters(run.networks.config(reference), lora))
    for stage in run.config.stages:
        if run.result(stage.name) is not None:
            continue
        here = storage.standing(run.folder(stage.name))
        if not storage.can_write(here):
            raise ConfigError(f"{stage.name}: {here} cannot be written to; mend that, or set another workdir")
        if kind_of(stage).training is None:
            continue
        trained: Any = stage
        state = TRAINED * sum(size(network.start, trained.adapters) for network in networks_of(run, stage).values())
        # The checkpoint being written exists beside those that are kept.
        started = storage.is_folder(run.folder(stage.name) / "checkpoints")
        kept = 0 if started else trained.keep_checkpoints + (trained.keep_best is not None)
        needed += (kept + 1) * state + PARAMETER * size(trained.init_from, None)
        if needed > free:
            run.warn(
                stage.name,
                f"a checkpoint takes up to {state / 1e9:.3g} GB, and the stages up to here {needed / 1e9:.3g} GB with "
                f"their exports, but {free / 1e9:.3g} GB are free in workdir {run.config.workdir}. Make room, or lower "
                "keep_checkpoints",
            )


def parameters(config: ModelConfig, lora: Lora | None) -> int:
    """Returns the number of parameters of a language model that are trained: all, or those of adapters."""
    module: Any = CausalLM(with_adapters(config, lora))
    network = module if lora is None else Adapted(module, "")
    shapes = boxed_variables(network)
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(shapes))
