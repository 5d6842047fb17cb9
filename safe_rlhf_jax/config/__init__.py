"""Schemas of a config file, and `load_config`.

Defaults live in the schemas, with unit and source; a YAML file holds what differs.
"""

from safe_rlhf_jax.config.algorithm import AlgorithmConfig, CalibratedLimit, KLConfig, Lagrange, PIDConfig
from safe_rlhf_jax.config.data import Data, Mixture, Schema, Share, is_set, parts_of
from safe_rlhf_jax.config.loading import dump, load_config
from safe_rlhf_jax.config.run import Execution, Mesh, RunConfig, Stage, references
from safe_rlhf_jax.config.sampling import SampledPrompts, multipliers
from safe_rlhf_jax.config.stages import (
    CostStage,
    DPOStage,
    DualStage,
    EvaluateStage,
    MergeStage,
    OptimizerConfig,
    PreferenceStage,
    RejectionStage,
    RewardStage,
    RLStage,
    SFTStage,
    StageBase,
    SupervisedStage,
    TrainingStage,
)
from safe_rlhf_jax.errors import ConfigError

__all__ = [
    "AlgorithmConfig", "CalibratedLimit", "ConfigError", "CostStage", "DPOStage", "Data", "DualStage", "EvaluateStage",
    "Execution", "KLConfig", "Lagrange", "MergeStage", "Mesh", "Mixture", "OptimizerConfig", "PIDConfig",
    "PreferenceStage", "RLStage", "RejectionStage", "RewardStage", "RunConfig", "SFTStage", "SampledPrompts", "Schema",
    "Share", "Stage", "StageBase", "SupervisedStage", "TrainingStage", "dump", "is_set", "load_config", "multipliers",
    "parts_of", "references",
]  # fmt: skip
