"""The networks that a stage trains: what each starts from, and its place in checkpoints."""

import dataclasses
from typing import Any, Literal

from safe_rlhf_jax import config as cfg
from safe_rlhf_jax.models.config import Layout, ScoreConfig, ScoreType
from safe_rlhf_jax.rl.algorithms import ALGORITHMS
from safe_rlhf_jax.stages.common import Run
from safe_rlhf_jax.stages.constraints import constraints_of


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


def one_policy(run: Run, stage: cfg.TrainingStage) -> dict[str, Trained]:
    """Returns the network of a stage that trains a policy alone."""
    del run
    return {"policy": Trained(stage.init_from)}


def one_scorer(run: Run, stage: cfg.PreferenceStage) -> dict[str, Trained]:
    """Returns the network of a stage that trains a reward or cost model."""
    return {stage.kind: Trained(stage.init_from, "score", score_config(run, stage), layout=stage.export_layout)}


def policy_and_critics(run: Run, stage: cfg.RLStage) -> dict[str, Trained]:
    """Returns the networks of an RL stage."""
    critics = {
        f"{signal}_critic": Trained(start, "score", score_type="critic", place=("critics", signal))
        for signal, start in critic_starts(run, stage).items()
    }
    return {"policy": Trained(stage.init_from, place=("actor",))} | critics


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
    policy, or is no model of the step.
    """
    if ALGORITHMS[stage.algorithm.name].baseline is not None:
        return {}
    scored = {"reward": "reward"} | {
        s: "reward" if one.of == "reward" else s for s, one in constraints_of(stage).items()
    }
    found = {signal: stage.scorers.get(score, stage.init_from) for signal, score in scored.items()}
    return {s: stage.critics.get(s) or (stage.init_from if own in run.own else own) for s, own in found.items()}
