"""The programs of a stage without its weights and data: what a run would compile, made of shapes and shardings.

The builders are those of training (`build_supervised`, `build_networks`, `jit_programs`); only the arrays have no
contents. So what is compiled here is what runs.
"""

import copy
import dataclasses
import math
import pathlib
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from safe_rlhf_jax import config as cfg
from safe_rlhf_jax.config.messages import did_you_mean
from safe_rlhf_jax.data.tokenizer import Tokenizer, load_tokenizer
from safe_rlhf_jax.errors import ConfigError
from safe_rlhf_jax.models.config import PRESETS
from safe_rlhf_jax.rl.algorithms import ALGORITHMS
from safe_rlhf_jax.sharding import batch_sharding, with_shardings
from safe_rlhf_jax.stages.common import Run, open_model
from safe_rlhf_jax.stages.constraints import constraints_of
from safe_rlhf_jax.stages.host_signals import open_scorers
from safe_rlhf_jax.stages.reinforcement import build_networks, hyperparameters, is_fused, jit_programs
from safe_rlhf_jax.stages.rejection import build_fine_tuning
from safe_rlhf_jax.stages.sampling import sampler_of
from safe_rlhf_jax.stages.supervised import build_supervised
from safe_rlhf_jax.types import PreferenceBatch, PromptBatch, SafetyBatch, Sequences, SupervisedBatch

TOTAL_STEPS = 1000  # of a supervised stage, whose data is not read: a number in the learning rate's schedule


class AbstractRun(Run):
    """A run on devices that need not exist."""

    abstract = True

    def __init__(self, config: cfg.RunConfig, mesh: Mesh):
        """Takes the mesh; opens the tokenizer where it is on this machine, else only knows its size.

        Raises:
            ConfigError: If `assume` names no preset, or is missing where the tokenizer is not here.
        """
        self.config = config
        self.mesh = mesh
        self.own = {}
        if config.assume is not None and config.assume not in PRESETS:
            hint = did_you_mean(config.assume, PRESETS)
            raise ConfigError(f"assume: preset {config.assume!r} is unknown; presets: {sorted(PRESETS)}{hint}")
        local = config.tokenizer == "demo" or pathlib.Path(config.tokenizer.removeprefix("path:")).expanduser().is_dir()
        if local or config.assume is None:
            self.tokenizer = load_tokenizer(config.tokenizer)
        else:
            size = PRESETS[config.assume]["vocab_size"]
            self.tokenizer = AbsentTokenizer(None, eos_id=2, pad_id=0, prefix=(), size=size)
        self.ends = self.tokenizer.ends


def abstract_twin(run: Run) -> Run:
    """Returns a run on the same devices whose arrays have no contents."""
    twin = copy.copy(run)
    twin.abstract = True
    return twin


@dataclasses.dataclass(frozen=True)
class AbsentTokenizer(Tokenizer):
    """Stands for a tokenizer that is not on this machine; which ids it gives to EOS and padding changes no shape."""

    size: int = 0

    @property
    def vocab_size(self) -> int:
        """Tokens."""
        return self.size

    def holes(self, rows: int) -> tuple[tuple[int, int], ...]:
        """Returns ranges of rows without a token."""
        return ((self.size, rows),) if rows > self.size else ()


@dataclasses.dataclass(frozen=True)
class Program:
    """A jitted function with the arguments that training calls it with."""

    name: str
    function: Any  # what `jax.jit` returns
    arguments: tuple[Any, ...]  # shapes with shardings


def array(*shape: int, dtype: Any = bool) -> Any:
    """Returns an array without contents."""
    return jax.ShapeDtypeStruct(shape, dtype)


def texts(rows: int, length: int) -> dict[str, Any]:
    """Returns the arrays that every batch of texts has."""
    return {"tokens": array(rows, length, dtype=jnp.int32), "mask": array(rows, length)}


def put(run: Run, batch: Any) -> Any:
    """Gives a batch the sharding that `Run.put` would."""
    return with_shardings(batch, jax.tree.map(lambda _: batch_sharding(run.mesh), batch))


def supervised_batch(stage: Any) -> Any:
    """Returns the batch of a supervised stage at its full length."""
    rows, length = stage.batch_size, stage.max_length
    if stage.kind == "sft":
        return SupervisedBatch(**texts(rows, length), loss_mask=array(rows, length))
    side = Sequences(**texts(rows, length), response_mask=array(rows, length))
    if stage.kind in ("reward", "dpo"):
        margin = array(rows, dtype=jnp.float32) if stage.kind == "dpo" and stage.safety_margin else None
        return PreferenceBatch(chosen=side, rejected=side, margin=margin)
    label = array(rows)
    return SafetyBatch(safer=side, unsafer=side, safer_is_safe=label, unsafer_is_safe=label)


def supervised_programs(run: Run, stage: Any) -> Iterator[Program]:
    """Yields the step of a supervised stage."""
    _, state, frozen, step = build_supervised(run, stage, TOTAL_STEPS)
    yield Program("step", step, (state, frozen, put(run, supervised_batch(stage)), abstract_key()))


def reinforcement_programs(run: Run, stage: cfg.RLStage) -> Iterator[Program]:
    """Yields the program, or with `fuse: false` the two programs, of an iteration."""
    limits = {signal: (0.0,) * len(one.group_limits or [0]) for signal, one in constraints_of(stage).items()}
    groups = tuple(sorted({name for one in constraints_of(stage).values() for name in one.named or ()})) or ("all",)
    hp = hyperparameters(run, stage, stage.max_prompt_length, limits, groups)
    networks, state, frozen, _ = build_networks(run, stage, hp)
    jitted = jit_programs(run, stage, networks, ALGORITHMS[stage.algorithm.name], hp, state)
    rows, length = stage.batch_size * stage.responses_per_prompt, hp.prompt_length + hp.response_length
    ptx = None
    if stage.ptx is not None and stage.algorithm.ptx_coeff > 0:
        ptx = SupervisedBatch(**texts(rows, length), loss_mask=array(rows, length))
    group = array(stage.batch_size, dtype=jnp.int32)
    batch = put(run, PromptBatch(**texts(stage.batch_size, hp.prompt_length), group=group, row=group, ptx=ptx))
    key = abstract_key()
    if is_fused(stage, networks):
        yield Program("iteration", jitted["iteration"], (state, frozen, batch, key))
        return
    generation = Program("generation", jitted["generation"], (state.actor.params, batch, key))
    yield generation
    rollout = put(run, jax.eval_shape(generation.function, *generation.arguments))
    given = {signal: put(run, array(rows, dtype=jnp.float32)) for signal in stage.scorers.keys() - networks.scorers}
    yield Program("learning", jitted["learning"], (state, frozen, rollout, batch.ptx, key, given))


def rejection_programs(run: Run, stage: cfg.RejectionStage) -> Iterator[Program]:
    """Yields the sampling of a batch of prompts, scores included, and the fine-tuning step."""
    policy, variables = open_model(run, stage.init_from, "lm")
    scorers = open_scorers(run, stage.scorers)
    sample, rows = sampler_of(run, stage, policy, scorers.modules), stage.prompt_batch_size
    group = array(rows, dtype=jnp.int32)
    batch = put(run, PromptBatch(**texts(rows, stage.max_prompt_length), group=group, row=group))
    yield Program("sampling", sample, (variables["params"], scorers.variables, batch, abstract_key()))
    state, step = build_fine_tuning(run, stage, policy, variables["params"], TOTAL_STEPS)
    length = stage.max_prompt_length + stage.max_response_length
    selected = SupervisedBatch(**texts(stage.batch_size, length), loss_mask=array(stage.batch_size, length))
    yield Program("step", step, (state, None, put(run, selected), abstract_key()))


def programs(run: Run, stage: Any) -> Iterator[Program]:
    """Yields the programs of a training stage; call it, and use them, under `jax.set_mesh(run.mesh)`."""
    if isinstance(stage, cfg.RejectionStage):
        return rejection_programs(run, stage)
    return (reinforcement_programs if stage.kind == "rl" else supervised_programs)(run, stage)


def abstract_key() -> Any:
    """Returns the shape of a random key."""
    return jax.eval_shape(lambda: jax.random.key(0))


def argument_bytes(run: Run, stage: Any) -> int:
    """Returns the bytes per device of a step's arguments; call it under `jax.set_mesh(run.mesh)`."""
    program = next(programs(run, stage))
    leaves = [leaf for leaf in jax.tree.leaves(program.arguments) if leaf.sharding is not None]
    return sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in leaves)
