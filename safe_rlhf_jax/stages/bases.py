"""The bases of a stage's adapters, kept beside its checkpoints: adapters belong to no other."""

import json

from safe_rlhf_jax import config as cfg
from safe_rlhf_jax import storage
from safe_rlhf_jax.errors import ConfigError
from safe_rlhf_jax.stages.common import Run
from safe_rlhf_jax.stages.kinds import networks_of

BASES = "base.json"  # in the folder of a stage with adapters
Bases = dict[str, dict[str, str]]  # {network: {reference, digest}}


def bases_now(run: Run, stage: cfg.StageBase) -> Bases:
    """Returns the bases of a stage's adapters, as they are; empty without adapters."""
    if stage.adapters is None:
        return {}
    bases = {name: run.networks.origin(network.start)[0] for name, network in networks_of(run, stage).items()}
    return {name: {"reference": base, "digest": run.networks.base_name(base)} for name, base in bases.items()}


def check_bases(name: str, folder: storage.Path, now: Bases) -> None:
    """Checks that the adapters in a stage's checkpoints belong to the bases as they are.

    Raises:
        ConfigError: Names the base that has changed since.
    """
    then = json.loads(storage.read_text(folder / BASES))
    for network, base in now.items():
        if then[network]["digest"] != base["digest"]:
            raise ConfigError(
                f"{name}: {base['reference']!r}, the base of its {network}, has changed since the checkpoints in "
                f"{folder} were made (digest {then[network]['digest']}, now {base['digest']}): their adapters belong "
                "to the earlier one. Restore it, or move that folder away to train the stage anew"
            )
