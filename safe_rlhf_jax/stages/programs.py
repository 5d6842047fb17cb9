"""Programs of a stage without its weights and data, from shapes with shardings.

The builders are those of training; only the arrays have no contents, so the compiled programs are the same.
"""

import copy
import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from safe_rlhf_jax.aot.floors import Reads
from safe_rlhf_jax.sharding import batch_sharding, with_shardings
from safe_rlhf_jax.stages.common import Run
from safe_rlhf_jax.stages.shapes import Shapes
from safe_rlhf_jax.types import Packing, Sequences

# Named scopes of the programs of a stage that samples, by the name of the program.
PHASES = {
    "iteration": ("generation", "scoring", "update"),
    "generation": ("generation",),
    "learning": ("scoring", "update"),
    "sampling": ("generation", "scoring"),
}
TOTAL_STEPS = 1000  # of a supervised stage, whose data is not read: only used in the learning-rate schedule


@dataclasses.dataclass(frozen=True)
class Program:
    """A jitted function with its arguments in training."""

    name: str
    function: Any  # what `jax.jit` returns
    arguments: tuple[Any, ...]  # shapes with shardings
    reads: Mapping[str, Reads] = dataclasses.field(default_factory=dict)  # what phases, and decoding, cannot go below


def of_shapes(run: Run) -> Run:
    """Returns a run on the same devices whose arrays have no contents."""
    twin = copy.copy(run)
    twin.networks = Shapes(twin)
    return twin


def array(*shape: int, dtype: Any = bool) -> Any:
    """Returns an array without contents."""
    return jax.ShapeDtypeStruct(shape, dtype)


def texts(rows: int, length: int) -> dict[str, Any]:
    """Returns the arrays common to all batches of texts."""
    return {"tokens": array(rows, length, dtype=jnp.int32), "mask": array(rows, length)}


def one_side(rows: int, length: int) -> Sequences:
    """Returns one side of a batch of pairs."""
    return Sequences(**texts(rows, length), response_mask=array(rows, length))


def packing(stage: Any, count: int) -> Packing | None:
    """Returns where so many texts lie in packed rows, at their full length: each fills one."""
    if not stage.packing:
        return None
    return Packing(array(count, stage.max_length, dtype=jnp.int32), array(count, dtype=jnp.int32))


def put(run: Run, batch: Any) -> Any:
    """Gives a batch the sharding that `Run.put` would."""
    return with_shardings(batch, jax.tree.map(lambda _: batch_sharding(run.mesh), batch))


def random_key() -> Any:
    """Returns the shape of a random key."""
    return jax.eval_shape(lambda: jax.random.key(0))
