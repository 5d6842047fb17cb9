"""Safe RLHF on JAX: maximise reward subject to a constraint on expected cost.

`__all__` is the public API: its names and arguments stay as they are. Each name is imported on first access, so that
importing the package loads nothing heavy and starts no accelerator.
"""

import importlib
import os
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from safe_rlhf_jax.config import load_config
    from safe_rlhf_jax.errors import UserError
    from safe_rlhf_jax.models import hf
    from safe_rlhf_jax.objectives import bradley_terry_loss, safety_loss
    from safe_rlhf_jax.pipeline import Policy, Scorer, load_policy, load_scorer
    from safe_rlhf_jax.rl.advantages import gae, token_scores
    from safe_rlhf_jax.rl.lagrange import ascend_log_multiplier, lagrangian_advantage
    from safe_rlhf_jax.rl.losses import clipped_surrogate, clipped_value_loss
    from safe_rlhf_jax.train import StageResult, run

__version__: str
__all__ = [
    "Policy", "Scorer", "StageResult", "UserError", "__version__", "ascend_log_multiplier",
    "bradley_terry_loss", "clipped_surrogate", "clipped_value_loss", "gae", "hf", "lagrangian_advantage", "load_config",
    "load_policy", "load_scorer", "run", "safety_loss", "token_scores",
]  # fmt: skip

HOMES = {
    "config": ("load_config",),
    "errors": ("UserError",),
    "objectives": ("bradley_terry_loss", "safety_loss"),
    "pipeline": ("Policy", "Scorer", "load_policy", "load_scorer"),
    "rl.advantages": ("gae", "token_scores"),
    "rl.lagrange": ("ascend_log_multiplier", "lagrangian_advantage"),
    "rl.losses": ("clipped_surrogate", "clipped_value_loss"),
    "train": ("StageResult", "run"),
}  # module: its public names

# transformers opens tokenizers and configs here; its advice to install PyTorch is noise.
os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")


def __getattr__(name: str) -> Any:
    """Imports a public name."""
    if name == "__version__":
        from importlib.metadata import version

        return version(__name__)
    if name == "hf":
        return importlib.import_module(f"{__name__}.models.hf")
    for module, names in HOMES.items():
        if name in names:
            return getattr(importlib.import_module(f"{__name__}.{module}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    """Returns all names, including those that are not imported yet."""
    return sorted({*globals(), *__all__})
