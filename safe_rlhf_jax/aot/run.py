"""A run on devices that need not exist, whose arrays are shapes."""

import dataclasses
from collections.abc import Sequence
from typing import Any

from jax.sharding import Mesh

from safe_rlhf_jax import config as cfg
from safe_rlhf_jax import storage
from safe_rlhf_jax.config.messages import did_you_mean
from safe_rlhf_jax.data.tokenizer import Tokenizer, load_tokenizer
from safe_rlhf_jax.errors import ConfigError
from safe_rlhf_jax.models.config import PRESETS
from safe_rlhf_jax.sharding import make_mesh
from safe_rlhf_jax.stages.common import Run
from safe_rlhf_jax.stages.shapes import Shapes


def mesh_over(sizes: cfg.Mesh, devices: Sequence[Any]) -> Mesh:
    """Returns the mesh that a run has on these devices.

    Raises:
        ConfigError: If another axis than `data` would cross the network between hosts of GPUs: present, the GPUs of a
            host are a slice (see `make_mesh`); those of a topology do not say so.
    """
    mesh = make_mesh((sizes.data, sizes.fsdp, sizes.tensor), devices, sizes.decode)
    hosts = len({device.process_index for device in devices}) if devices[0].platform == "gpu" else 1
    if mesh.shape["data"] % hosts:
        raise ConfigError(
            f"mesh: data {mesh.shape['data']} does not divide into the {hosts} hosts that the GPUs are in; only data "
            f"crosses the network between hosts. Make it a multiple of {hosts}."
        )
    return mesh


class AbstractRun(Run):
    """A run on devices that need not exist."""

    def __init__(self, config: cfg.RunConfig, mesh: Mesh):
        """Takes the mesh; opens the tokenizer if it is on this machine, else only its size is known.

        Raises:
            ConfigError: If `assume` names no preset, or is missing while the tokenizer is not on this machine.
        """
        self.config = config
        self.mesh = mesh
        self.networks = Shapes(self)
        self.own = {}
        if config.assume is not None and config.assume not in PRESETS:
            hint = did_you_mean(config.assume, PRESETS)
            raise ConfigError(f"assume: preset {config.assume!r} is unknown; presets: {sorted(PRESETS)}{hint}")
        folder = storage.expanded(config.tokenizer.removeprefix("path:"))
        if config.tokenizer == "demo" or storage.is_folder(folder) or config.assume is None:
            self.tokenizer = load_tokenizer(config.tokenizer)
        else:
            size = PRESETS[config.assume]["vocab_size"]
            self.tokenizer = AbsentTokenizer(None, eos_id=2, pad_id=0, prefix=(), size=size)
        self.ends = self.tokenizer.ends


@dataclasses.dataclass(frozen=True)
class AbsentTokenizer(Tokenizer):
    """Placeholder for a tokenizer that is not on this machine; its EOS and padding ids change no shape."""

    size: int = 0

    @property
    def vocab_size(self) -> int:
        """Tokens."""
        return self.size

    def holes(self, rows: int) -> tuple[tuple[int, int], ...]:
        """Returns ranges of rows without a token."""
        return ((self.size, rows),) if rows > self.size else ()
