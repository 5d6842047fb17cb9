"""Networks of a run: opened from presets, folders, hub ids and earlier stages, in their shards.

`Weights` opens real ones; `Shapes` the same without contents, for ahead-of-time compilation.
"""

import contextlib
import dataclasses
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, Literal

import jax
import jax.numpy as jnp
import optax
from flax import linen as nn

from safe_rlhf_jax import config as cfg
from safe_rlhf_jax import storage
from safe_rlhf_jax.models import hf
from safe_rlhf_jax.models.config import PRESETS, ModelConfig, ScoreConfig, ScoreType
from safe_rlhf_jax.models.parameters import cast_matrices
from safe_rlhf_jax.models.transformer import CausalLM, ScoreModel
from safe_rlhf_jax.optim import init_state, make_optimizer, schedule
from safe_rlhf_jax.rl.kl import start_reference
from safe_rlhf_jax.sharding import init_sharded, named_shardings, replicated, with_shardings
from safe_rlhf_jax.types import TrainState

if TYPE_CHECKING:
    from safe_rlhf_jax.stages.common import Run


class Weights:
    """Opens the networks of a run on its mesh."""

    def __init__(self, run: "Run"):
        self.run = run
        self.placed: dict[Any, Any] | None = None  # parameters that several networks share at their start

    @contextlib.contextmanager
    def reading_once(self) -> Iterator[None]:
        """Reads every folder once within the block, however many networks start from it."""
        self.placed = {}
        try:
            yield
        finally:
            self.placed = None

    def config(self, reference: str) -> ModelConfig:
        """Returns the configuration of a model, including one that an earlier stage has yet to train."""
        prefix, _, rest = reference.partition(":")
        if rest and prefix == "preset":
            return self.new_config(rest)
        for stage in self.run.config.stages:
            if stage.name == reference and stage.makes is not None:
                return self.config(stage.models()["init_from"].reference)
        return self.stored_config(self.run.model_folder(reference))

    def new_config(self, preset: str) -> ModelConfig:
        """Returns the configuration of a preset for the run's tokenizer."""
        sizes: dict[str, Any] = {"vocab_size": self.run.tokenizer.vocab_size} | PRESETS[preset]
        return self.as_run(ModelConfig(**sizes))

    def stored_config(self, folder: str) -> ModelConfig:
        """Returns the configuration of the model in a folder."""
        return hf.stored_config(hf.resolve(folder))

    def as_run(self, config: ModelConfig) -> ModelConfig:
        """Returns a model's configuration with the run's execution settings, and without tokens it does not have."""
        execution, unused = self.run.config.execution, self.run.tokenizer.holes(config.vocab_size)
        return dataclasses.replace(config, **execution.model_dump(), unused_rows=unused)

    def open(
        self, reference: str, head: Literal["lm", "score"], *, score: ScoreConfig | None = None,
        score_type: ScoreType | None = None, seed: int = 0,
    ) -> tuple[Any, dict[str, Any]]:  # fmt: skip
        """Returns a network and its variables.

        Args:
            reference: As in `init_from`.
            head: Which head.
            score: Normalisation of the scores of a model to be trained; by default as stored.
            score_type: Opens the scores as another kind (a reward model as a critic).
            seed: Of random initialisation.

        Raises:
            ValueError: If scores are to be used as stored, but the folder has no head or another kind of scores.
        """
        if reference.startswith("preset:"):
            module = self.new_module(reference, head, score or ScoreConfig(score_type or "reward"))
            return module, init_sharded(initializer(module), self.run.mesh, jax.random.key(seed))
        module, variables = hf.load(
            self.run.model_folder(reference),
            head,
            score_type=score.score_type if score else score_type,
            score_bias=score.bias if score else None,
            as_stored=head == "score" and score is None and score_type != "critic",
            scan_layers=self.run.config.execution.scan_layers,
            seed=seed,
            mesh=self.run.mesh,
            placed=self.placed,
        )
        module = module.clone(config=self.as_run(module.config))
        if score is not None:
            module = module.clone(score=dataclasses.replace(score, bias=module.score.bias))
        return module, variables

    def new_module(self, reference: str, head: Literal["lm", "score"], score: ScoreConfig) -> Any:
        """Returns the network of a model, without its variables."""
        config = self.as_run(self.config(reference))
        return CausalLM(config) if head == "lm" else ScoreModel(config, score)

    def start(self, module: Any, variables: dict[str, Any], optimizer: optax.GradientTransformation) -> TrainState:
        """Returns the state of a network before its first step; moments are sharded like the parameters."""
        init, _, shardings = self.start_shapes(module, optimizer)
        state: TrainState = jax.jit(init, out_shardings=shardings)(nn.unbox(variables))
        return state

    def start_shapes(self, module: Any, optimizer: optax.GradientTransformation) -> tuple[Any, Any, Any]:
        """Returns init(variables) -> state, its output shapes, and their shardings."""

        def init(variables: Any) -> TrainState:
            return init_state(variables["params"], optimizer, variables.get("stats", {}))

        shapes = jax.eval_shape(lambda: init(initializer(module)(jax.random.key(0))))
        return init, shapes, named_shardings(shapes, self.run.mesh)

    def everywhere(self, make: Callable[[], Any]) -> Any:
        """Returns `make()`, replicated on every device."""
        return jax.device_put(make(), replicated(self.run.mesh))

    def only_read(self, params: Any) -> Any:
        """Casts frozen parameters to the compute dtype (`cast_matrices`)."""
        return cast_matrices(params, self.run.config.execution.dtype)

    def reference(self, params: Any) -> Any:
        """Returns the parameters of a moving reference: a copy of the actor's."""
        return start_reference(params).params

    def multiplier(self, name: str) -> float | None:
        """Returns λ* of a dual stage.

        Raises:
            ConfigError: If the stage is not finished.
        """
        result = self.run.result(name)
        if result is None:
            raise cfg.ConfigError(f"algorithm.lagrange.init: stage {name!r} is not finished; run it first")
        return float(result["multiplier"])


class Shapes(Weights):
    """Opens networks with shapes and shardings in place of arrays: as `Weights`, for devices that need not exist."""

    def stored_config(self, folder: str) -> ModelConfig:
        """Returns the configuration of the model in a folder, or the run's assumed one if there is none."""
        assumed = self.run.config.assume
        if assumed and not storage.is_folder(storage.expanded(folder)):
            return self.new_config(assumed)
        return super().stored_config(folder)

    def open(
        self, reference: str, head: Literal["lm", "score"], *, score: ScoreConfig | None = None,
        score_type: ScoreType | None = None, seed: int = 0,
    ) -> tuple[Any, dict[str, Any]]:  # fmt: skip
        """Returns a network and the shapes of its variables."""
        del seed
        module = self.new_module(reference, head, score or ScoreConfig(score_type or "reward"))
        boxed = jax.eval_shape(lambda: initializer(module)(jax.random.key(0)))
        return module, with_shardings(nn.unbox(boxed), named_shardings(boxed, self.run.mesh))

    def start(self, module: Any, variables: dict[str, Any], optimizer: optax.GradientTransformation) -> TrainState:
        """Returns the shapes of a state."""
        del variables
        _, shapes, shardings = self.start_shapes(module, optimizer)
        state: TrainState = with_shardings(nn.unbox(shapes), shardings)
        return state

    def everywhere(self, make: Callable[[], Any]) -> Any:
        """Returns the shape of `make()`."""
        shapes, sharding = jax.eval_shape(make), replicated(self.run.mesh)
        return with_shardings(shapes, jax.tree.map(lambda _: sharding, shapes))

    def only_read(self, params: Any) -> Any:
        """Casts the shapes of frozen parameters to the compute dtype."""
        shapes = jax.eval_shape(super().only_read, params)
        return with_shardings(shapes, jax.tree.map(lambda x: x.sharding, params))

    def reference(self, params: Any) -> Any:
        """Returns the shapes unchanged."""
        return params

    def multiplier(self, name: str) -> None:
        """Returns None: the stage need not be finished."""
        del name


def initializer(module: Any) -> Callable[[jax.Array], Any]:
    """Returns init(key) -> variables with axis boxes."""
    tokens = jnp.zeros((1, 2), jnp.int32)
    return lambda key: module.init(key, tokens, tokens == 0)


def jit_step(step: Callable[..., Any], state: Any, mesh: Any) -> Callable[..., Any]:
    """Jits a step with the state donated and its shardings pinned, so that the second call does not recompile."""
    shardings = jax.tree.map(lambda x: x.sharding, state)
    return jax.jit(step, donate_argnums=0, out_shardings=(shardings, replicated(mesh)))


def optimizer_of(config: cfg.OptimizerConfig, total_steps: int) -> optax.GradientTransformation:
    """Returns the optimizer of a config."""
    rate = schedule(config.schedule, lr=config.lr, warmup_ratio=config.warmup_ratio, total_steps=total_steps)
    return make_optimizer(
        rate, weight_decay=config.weight_decay, b1=config.b1, b2=config.b2, eps=config.eps,
        max_grad_norm=config.max_grad_norm,
    )  # fmt: skip
