"""The networks that a stage trains: what each starts from, its place in checkpoints, the base it stands on."""

import dataclasses
import json
from typing import Any, Literal

from safe_rlhf_jax import config as cfg
from safe_rlhf_jax import storage
from safe_rlhf_jax.errors import ConfigError
from safe_rlhf_jax.models.config import Layout, ScoreConfig, ScoreType
from safe_rlhf_jax.rl.algorithms import ALGORITHMS
from safe_rlhf_jax.stages.common import Run
from safe_rlhf_jax.stages.constraints import constraints_of

BASES = "base.json"  # in the folder of a stage with adapters
Bases = dict[str, dict[str, str]]  # {network: {reference, digest}} of the bases of a stage's adapters


@dataclasses.dataclass(frozen=True)
class Trained:
    """A network that a stage trains.

    Attributes:
        start: The model that it starts from.
        head: Of the network.
        score: Configuration of the scores of a reward or cost model.
        score_type: Opens the scores as another kind.
        place: Of its state within that of the stage.
        layout: Of the export of a score model.
    """

    start: str
    head: Literal["lm", "score"] = "lm"
    score: ScoreConfig | None = None
    score_type: ScoreType | None = None
    place: tuple[str, ...] = ()
    layout: Layout | None = None

    def at_start(self, run: Run, stage: cfg.TrainingStage) -> tuple[Any, dict[str, Any]]:
        """Returns the network and its variables before the first step."""
        return run.networks.to_train(stage, self.start, self.head, score=self.score, score_type=self.score_type)


def trained_networks(run: Run, stage: cfg.TrainingStage) -> dict[str, Trained]:
    """Returns the networks by name; the first one is what the stage makes."""
    if isinstance(stage, cfg.RLStage):
        critics = {
            f"{signal}_critic": Trained(start, "score", score_type="critic", place=("critics", signal))
            for signal, start in critic_starts(run, stage).items()
        }
        return {"policy": Trained(stage.init_from, place=("actor",))} | critics
    assert stage.makes is not None
    if isinstance(stage, cfg.PreferenceStage):
        score, layout = score_config(run, stage), stage.export_layout
        return {stage.makes: Trained(stage.init_from, "score", score, layout=layout)}
    return {stage.makes: Trained(stage.init_from)}


def score_config(run: Run, stage: cfg.PreferenceStage) -> ScoreConfig:
    """Returns the scores of a reward or cost model to be trained."""
    other = stage.export_layout == "sequence_classification"  # no bias, score at the last token that is not padding
    pad_id = run.tokenizer.pad_id if other else None
    return ScoreConfig(
        stage.kind, bias=not other, normalize=stage.normalize, momentum=stage.normalizer_momentum, pad_id=pad_id
    )


def critic_starts(run: Run, stage: cfg.RLStage) -> dict[str, str]:
    """Returns {signal: initial model of its critic}; empty for an algorithm without critics.

    It is the model that `critics` names, else its scorer, or the actor's if the scorer reads other tokens than the
    policy.
    """
    if ALGORITHMS[stage.algorithm.name].baseline is not None:
        return {}
    found = {signal: stage.scorers[signal] for signal in ("reward", *constraints_of(stage))}
    return {s: stage.critics.get(s) or (stage.init_from if own in run.own else own) for s, own in found.items()}


# --- Bases ------------------------------------------------------------------------------------------------------------


def bases_now(run: Run, stage: cfg.StageBase) -> Bases:
    """Returns the bases of a stage's adapters, as they are; empty without adapters."""
    if not isinstance(stage, cfg.TrainingStage) or stage.adapters is None:
        return {}
    bases = {name: run.networks.origin(network.start)[0] for name, network in trained_networks(run, stage).items()}
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
