"""The kinds of stages, by the name that a config gives them. A new one is a schema, a file, and a line here."""

from safe_rlhf_jax import config as cfg
from safe_rlhf_jax.stages.audit import AUDIT
from safe_rlhf_jax.stages.certificate import CERTIFY
from safe_rlhf_jax.stages.common import Run
from safe_rlhf_jax.stages.comparison import JUDGE
from safe_rlhf_jax.stages.direct import DPO, MERGE
from safe_rlhf_jax.stages.dual import DUAL
from safe_rlhf_jax.stages.evaluation import EVALUATE
from safe_rlhf_jax.stages.kind import Kind
from safe_rlhf_jax.stages.making import LABEL, SAMPLE
from safe_rlhf_jax.stages.red_team import RED_TEAM
from safe_rlhf_jax.stages.reinforcement import RL
from safe_rlhf_jax.stages.rejection import REJECTION
from safe_rlhf_jax.stages.supervised import COST, REWARD, SFT
from safe_rlhf_jax.stages.trained import Trained

KINDS: dict[str, Kind] = {
    "sft": SFT,
    "reward": REWARD,
    "cost": COST,
    "dpo": DPO,
    "merge": MERGE,
    "rl": RL,
    "rejection_sampling": REJECTION,
    "dual": DUAL,
    "evaluate": EVALUATE,
    "sample": SAMPLE,
    "label": LABEL,
    "audit": AUDIT,
    "red_team": RED_TEAM,
    "certify": CERTIFY,
    "judge": JUDGE,
}


def kind_of(stage: cfg.StageBase) -> Kind:
    """Returns the record of a stage's kind."""
    return KINDS[stage.kind]


def networks_of(run: Run, stage: cfg.StageBase) -> dict[str, Trained]:
    """Returns the networks that a stage trains, by name; the first one is what it makes."""
    training = kind_of(stage).training
    return {} if training is None else training.networks(run, stage)


def idle_settings(stage: cfg.StageBase) -> dict[str, str]:
    """Returns {setting that a stage's kind does not use: reason}."""
    return kind_of(stage).idle(stage)
