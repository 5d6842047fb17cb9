"""Schemas of a config file, and `load_config`.

Defaults are in the schemas, with unit and source; a YAML file holds the differences.
"""

from safe_rlhf_jax.config.algorithm import AlgorithmConfig, CalibratedLimit, KLConfig, Lagrange, PIDConfig
from safe_rlhf_jax.config.assessing import PEOPLE, CertifyStage, Claim, JudgeStage
from safe_rlhf_jax.config.base import OptimizerConfig, StageBase, TrainingStage
from safe_rlhf_jax.config.data import Data, Mixture, Schema, Share, is_set, parts_of
from safe_rlhf_jax.config.loading import dump, load_config
from safe_rlhf_jax.config.making import (
    AuditStage,
    JudgeLabeller,
    Labelling,
    LabelStage,
    ModelLabeller,
    OracleLabeller,
    PeopleLabeller,
    RedTeamStage,
    SampleStage,
)
from safe_rlhf_jax.config.run import Execution, Mesh, RunConfig, Stage
from safe_rlhf_jax.config.sampled import DualStage, EvaluateStage, RejectionStage, RLStage
from safe_rlhf_jax.config.sampling import SampledPrompts
from safe_rlhf_jax.config.signals import EndpointFields, EndpointJudge, EndpointSignal, FunctionSignal, HostSignal
from safe_rlhf_jax.config.supervised import (
    CostStage,
    DPOStage,
    MergeStage,
    PreferenceStage,
    RewardStage,
    SFTStage,
    SupervisedStage,
)
from safe_rlhf_jax.config.uses import DataUse, ModelUse
from safe_rlhf_jax.errors import ConfigError

__all__ = [
    "PEOPLE", "AlgorithmConfig", "AuditStage", "CalibratedLimit", "CertifyStage", "Claim", "ConfigError",
    "CostStage", "DPOStage", "Data", "DataUse", "DualStage", "EndpointFields", "EndpointJudge", "EndpointSignal",
    "EvaluateStage", "Execution", "FunctionSignal", "HostSignal", "JudgeLabeller", "JudgeStage", "KLConfig",
    "LabelStage", "Labelling", "Lagrange", "MergeStage", "Mesh", "Mixture", "ModelLabeller", "ModelUse",
    "OptimizerConfig", "OracleLabeller", "PIDConfig", "PeopleLabeller", "PreferenceStage", "RLStage",
    "RedTeamStage", "RejectionStage", "RewardStage", "RunConfig", "SFTStage", "SampleStage", "SampledPrompts",
    "Schema", "Share", "Stage", "StageBase", "SupervisedStage", "TrainingStage", "dump", "is_set", "load_config",
    "parts_of",
]  # fmt: skip
