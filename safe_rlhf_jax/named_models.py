"""Policies and scorers by name, for command lines: stages of a finished run, folders, hub ids."""

from typing import Any

from safe_rlhf_jax import config as cfg
from safe_rlhf_jax.errors import ConfigError
from safe_rlhf_jax.models import hf
from safe_rlhf_jax.pipeline import Policy, Scorer, load_policy, load_scorer
from safe_rlhf_jax.stages.common import Run
from safe_rlhf_jax.stages.encoding import has_tokenizer


class NamedModels:
    """Opens models by name; each reads texts as its run does, or as its folder says, or else as the first policy.

    Args:
        config: File of a finished run, whose stages may be named.
        template: Of all models; by default the run's, or the folder's.
        dtype: Of the networks.
    """

    def __init__(self, config: str | None, template: str | None, dtype: str):
        self.config, self.template, self.dtype = config, template, dtype
        self.run = Run(cfg.load_config(config), config) if config else None
        self.stages = {stage.name: stage for stage in self.run.config.stages} if self.run else {}
        self.first: Policy | None = None

    def policy(self, name: str) -> Policy:
        """Opens a policy: the name of a stage, `path:FOLDER`, `hf:OWNER/NAME`, or either without its prefix."""
        policy = load_policy(self.folder(name), **self.read_as(name))
        self.first = self.first or policy
        return policy

    def scorer(self, name: str, signal: Any) -> Scorer:
        """Opens a scorer, "reward" or "cost", named as a policy is."""
        return load_scorer(self.folder(name), **self.read_as(name), score_type=signal)

    def last_trained(self, signal: str) -> str | None:
        """Returns the last finished stage of the run that made a model of a signal."""
        made = [name for name, stage in self.stages.items() if stage.makes == signal and self.run]
        return next((name for name in reversed(made) if self.run and self.run.result(name)), None)

    def folder(self, name: str) -> str:
        """Returns the folder or hub id of a name.

        Raises:
            ConfigError: If it is a stage that is not finished.
        """
        if self.run is None or name not in self.stages:
            return name.removeprefix("path:").removeprefix("hf:")
        if self.run.result(name) is None:
            raise ConfigError(f"stage {name!r} of {self.config} is not finished; train it first")
        return self.run.model_folder(name)

    def read_as(self, name: str) -> dict[str, Any]:
        """Returns a model's encoding: the run's for its stages, else the folder's, or else the first policy's."""
        like: Any = self.run if name in self.stages else None
        if like is None and self.first is not None and not has_tokenizer(hf.resolve(self.folder(name))):
            like = self.first
        own = {"template": self.template or like.template, "tokenizer": like.tokenizer} if like else {}
        return {"template": self.template, "dtype": self.dtype} | own
