"""Networks of a run: opened from presets, folders, hub ids and earlier stages, in their shards.

`shapes.Shapes` opens the same without contents, for ahead-of-time compilation.
"""

import contextlib
import dataclasses
import logging
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, Literal

import jax
import jax.numpy as jnp
import optax
from flax import linen as nn

from safe_rlhf_jax import config as cfg
from safe_rlhf_jax import storage
from safe_rlhf_jax.errors import ConfigError
from safe_rlhf_jax.models import hf
from safe_rlhf_jax.models.adapters import HEAD, Adapted, trained, whole, without_adapters
from safe_rlhf_jax.models.config import PRESETS, Lora, ModelConfig, ScoreConfig, ScoreType
from safe_rlhf_jax.models.folders import is_adapter
from safe_rlhf_jax.models.parameters import boxed_variables, cast_matrices, place
from safe_rlhf_jax.models.peft import read_adapter
from safe_rlhf_jax.models.peft_heads import read_head
from safe_rlhf_jax.models.quantization_error import error as quantization_error
from safe_rlhf_jax.models.quantized import is_quantized, quantize
from safe_rlhf_jax.models.transformer import CausalLM, ScoreModel
from safe_rlhf_jax.optim import init_state, make_optimizer, schedule
from safe_rlhf_jax.rl.kl import start_reference
from safe_rlhf_jax.sharding import BASE_RULES, init_sharded, layout, named_shardings, replicated, tpu_options
from safe_rlhf_jax.stages.hashing import base_digest
from safe_rlhf_jax.types import TrainState

if TYPE_CHECKING:
    from safe_rlhf_jax.stages.common import Run


LOGGER = logging.getLogger(__name__)

# What a quantised base is measured on.
PROBE_TEXT = (
    "A doctor is someone who is trained to treat people who are ill. In 1928 Alexander Fleming noticed that a mould "
    "had killed the bacteria around it; twelve years later penicillin was tried on the first patient. How would you "
    "explain to a child why some illnesses need an antibiotic and others do not?"
)


class Weights:
    """Opens the networks of a run on its mesh."""

    def __init__(self, run: "Run"):
        self.run = run
        self.placed: dict[Any, Any] | None = None  # parameters that several networks share at their start
        self.folders: dict[str, str] = {}  # by name of a base: the first folder that it was found in

    @contextlib.contextmanager
    def reading_once(self) -> Iterator[None]:
        """Reads every folder once within the block, or the one around it, however many networks start from it."""
        outermost = self.placed is None
        self.placed = {} if self.placed is None else self.placed
        try:
            yield
        finally:
            if outermost:
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

    def as_run(self, config: ModelConfig, lora: Lora | None = None) -> ModelConfig:
        """Returns a model's configuration with the run's execution settings, and without tokens it does not have."""
        unused, execution = self.run.tokenizer.holes, self.run.config.execution
        settings = execution.model_dump(exclude={"base", "whole_base"})  # which are not of the network
        return dataclasses.replace(with_adapters(config, lora), **settings, unused_rows=unused(config.vocab_size))

    def origin(self, reference: str) -> tuple[str, str | None]:
        """Returns the base of a model, and the folder of its adapter; a model without one is its own base."""
        for stage in self.run.config.stages:
            if stage.name == reference and stage.adapters is not None:
                start = stage.models()["init_from"].reference
                return self.origin(start)[0], str(self.run.folder(reference) / "adapter")
        if reference.startswith(("path:", "hf:")):
            folder = self.run.model_folder(reference)
            if is_adapter(storage.expanded(folder)):
                base = read_adapter(storage.expanded(folder)).base
                kind = "path" if storage.is_folder(storage.expanded(base)) else "hf"
                return self.origin(f"{kind}:{base}")[0], folder
        return reference, None

    def base_name(self, reference: str) -> str:
        """Returns the name of a base, by the contents of its weights: one name for one base, however it is spelled."""
        if reference.startswith("preset:"):
            return reference
        folder = self.run.model_folder(reference)
        found = base_digest(folder, self.run.digests)
        self.folders.setdefault(found, folder)
        return found

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
        as_stored = head == "score" and score is None and score_type != "critic"
        return self.load(self.run.model_folder(reference), head, score, score_type, seed, as_stored=as_stored)

    def load(
        self, folder: str, head: Literal["lm", "score"], score: ScoreConfig | None, score_type: ScoreType | None,
        seed: int, *, as_stored: bool, lora: Lora | None = None,
    ) -> tuple[Any, dict[str, Any]]:  # fmt: skip
        """Returns the network in a folder and its variables; with `lora`, in the form of a frozen base."""
        found = hf.inspect(
            folder,
            head,
            score_type=score.score_type if score else score_type,
            score_bias=score.bias if score else None,
            as_stored=as_stored,
            scan_layers=self.run.config.execution.scan_layers,
            trunk=lambda config: with_adapters(config, lora).trunk,
        )
        cast = None if lora is None else self.cast
        module: Any = found.module
        with self.layout_of(lora):
            variables = hf.read(found, seed=seed, mesh=self.run.mesh, placed=self.placed, finish=cast)
        module = module.clone(config=self.as_run(module.config, lora))
        if score is not None:
            module = module.clone(score=dataclasses.replace(score, bias=module.score.bias))
        return module, variables

    def layout_of(self, lora: Lora | None) -> contextlib.AbstractContextManager[None]:
        """The shardings of a model that is read, with `lora` as a frozen base."""
        whole = lora is not None and self.run.config.execution.whole_base
        return layout(BASE_RULES) if whole else contextlib.nullcontext()

    def adapted(
        self, reference: str, head: Literal["lm", "score"], lora: Lora, *, score: ScoreConfig | None = None,
        score_type: ScoreType | None = None, seed: int = 0, trains: bool = True,
    ) -> tuple[Adapted, dict[str, Any]]:  # fmt: skip
        """Returns a network with adapters and its variables, with the base among its parameters.

        The adapter is that of the model, in the form of `lora`, or a fresh one. A network that is not trained has none
        where its model has none.

        Args:
            reference: As in `init_from`.
            head: Which head.
            lora: Form of the adapters.
            score: As in `open`.
            score_type: As in `open`.
            seed: Of random initialisation.
            trains: It is trained.

        Raises:
            ModelError: If the model's adapter does not fit into the form.
        """
        origin, folder = self.origin(reference)
        stored, name = None if folder is None else read_adapter(storage.expanded(folder)), self.base_name(origin)
        scores = stored is not None and stored.scores and head == "score"
        as_stored = head == "score" and score is None and score_type != "critic" and not scores
        module, variables = self.load(self.folders[name], head, score, score_type, seed, as_stored=as_stored, lora=lora)
        if stored is not None and scores:
            asked = score.score_type if score else score_type
            kept, stored_head, stored_stats = read_head(stored, module.config, asked)
            module = module.clone(score=score or kept)
        network = Adapted(module, name)
        boxed = boxed_variables(network)
        shardings = named_shardings(boxed, self.run.mesh)
        own_head = {k: v for k, v in variables["params"].items() if k in HEAD}
        base = {k: v for k, v in variables["params"].items() if k not in HEAD}
        params = {"base": self.quantized(network, base, own_head)}
        fresh = None
        if trains:
            init = initializer(network)
            fresh = init_sharded(lambda key: init(key)["params"]["adapter"], self.run.mesh, jax.random.key(seed))
            params["adapter"] = fresh
        if stored is not None:
            start = None if fresh is None else self.run.get(fresh)
            params["adapter"] = place_all(stored.params(module.config, lora, start), shardings["params"]["adapter"])
        if head == "score":
            split = shardings["params"]["head"]
            params["head"] = place_all(stored_head, split) if scores else jax.device_put(own_head, split)
        out = {"params": params}
        if "stats" in boxed:
            out["stats"] = place_all(stored_stats, shardings["stats"]) if scores else variables["stats"]
        return network, out

    def to_train(
        self, stage: cfg.TrainingStage, reference: str, head: Literal["lm", "score"], *,
        score: ScoreConfig | None = None, score_type: ScoreType | None = None,
    ) -> tuple[Any, dict[str, Any]]:  # fmt: skip
        """Returns a network that a stage trains and its variables: the whole of it, or adapters on its base."""
        options: dict[str, Any] = {"score": score, "score_type": score_type, "seed": self.run.seed(stage)}
        if stage.adapters is None:
            return self.open(reference, head, **options)
        return self.adapted(reference, head, stage.adapters, **options)

    def reference_of(self, stage: cfg.DPOStage | cfg.RLStage, module: Any, params: Any) -> Any:
        """Returns the parameters of the reference of a stage's policy, without the base.

        Args:
            stage: The stage.
            module: Its policy.
            params: The policy's parameters where it starts.

        Raises:
            ConfigError: If the reference stands on another base than the policy.
        """
        reference = stage.reference or stage.init_from
        if reference != stage.init_from:
            other, variables = self.to_train(stage, reference, "lm")
            params = variables["params"]
            if isinstance(module, Adapted) and self.on_another_base(other, module):
                raise ConfigError(
                    f"{stage.name}: reference {reference!r} has another base than init_from {stage.init_from!r}; with "
                    "lora both stand on one. Leave reference out, or train the whole network"
                )
        if "base" not in params:
            return self.only_read(params)
        return self.only_read(trained(params)) if self.origin(reference)[1] is not None else {}

    def on_another_base(self, one: Adapted, other: Adapted) -> bool:
        """Says whether two networks stand on bases of different contents."""
        return one.base != other.base

    def read(
        self, reference: str, head: Literal["lm", "score"], *, score_type: ScoreType | None = None,
        lora: Lora | None = None, seed: int = 0,
    ) -> tuple[Any, dict[str, Any]]:  # fmt: skip
        """Returns a network that is only read, and its variables in the dtype of computation.

        Adapters are left on their base, which networks of one `reading_once` share.
        """
        form = self.form(reference) if lora is None else lora
        if form is None:
            module, variables = self.open(reference, head, score_type=score_type, seed=seed)
            return module, variables | {"params": self.only_read(variables["params"])}
        module, variables = self.adapted(reference, head, form, score_type=score_type, trains=False)
        params = variables["params"]
        return module, variables | {"params": whole(self.only_read(trained(params)), params["base"])}

    def form(self, reference: str) -> Lora | None:
        """Returns the form of a model's adapter; None without one."""
        for stage in self.run.config.stages:
            if stage.name == reference:
                return stage.adapters
        base, folder = self.origin(reference)
        return None if folder is None else read_adapter(storage.expanded(folder)).form(self.config(base))

    def cast(self, path: tuple[str, ...], leaf: jax.Array) -> jax.Array:
        """Returns a parameter of a frozen base as it is kept: matrices in the dtype of computation."""
        return leaf if path[0] in HEAD else self.only_read({path[-1]: leaf})[path[-1]]

    def quantized(self, network: Adapted, base: Any, head: Any) -> Any:
        """Returns a base quantised as the run asks, in place of the one that was read, and says what it loses."""
        kind = self.run.config.execution.base
        if kind is None or any(map(is_quantized, jax.tree.leaves(base, is_leaf=is_quantized))):
            return base
        out = quantize(base, kind)
        tokens = jnp.asarray([self.run.tokenizer.encode(PROBE_TEXT)], jnp.int32)
        plain = without_adapters(network.module)
        found = quantization_error(plain, base | head, out | head, tokens, tokens >= 0)
        LOGGER.info(f"{network.base}: {found}")
        leaves = lambda tree: jax.tree.leaves(tree, is_leaf=is_quantized)  # noqa: E731
        instead = {id(old): new for old, new in zip(leaves(base), leaves(out), strict=True)}
        self.placed = {key: instead.get(id(leaf), leaf) for key, leaf in (self.placed or {}).items()}
        return out

    def new_module(self, reference: str, head: Literal["lm", "score"], score: ScoreConfig) -> Any:
        """Returns the network of a model, without its variables."""
        config = self.as_run(self.config(reference))
        return CausalLM(config) if head == "lm" else ScoreModel(config, score)

    def start(self, module: Any, variables: dict[str, Any], optimizer: optax.GradientTransformation) -> TrainState:
        """Returns the state of a network before its first step; moments are sharded like the parameters."""
        init, _, shardings = self.start_shapes(module, optimizer)
        variables = nn.unbox(variables) | {"params": trained(nn.unbox(variables["params"]))}
        state: TrainState = jax.jit(init, out_shardings=shardings)(variables)
        return state

    def start_shapes(self, module: Any, optimizer: optax.GradientTransformation) -> tuple[Any, Any, Any]:
        """Returns init(variables) -> state, its output shapes, and their shardings."""

        def init(variables: Any) -> TrainState:
            return init_state(variables["params"], optimizer, variables.get("stats", {}))

        shapes = jax.eval_shape(init, boxed_variables(module))
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


def place_all(arrays: Any, shardings: Any) -> Any:
    """Puts a tree of host arrays, whole in every process, on the mesh."""
    return jax.tree.map(lambda x, sharding: place(x.__getitem__, x.shape, sharding), arrays, shardings)


def with_adapters(config: ModelConfig, lora: Lora | None) -> ModelConfig:
    """Returns the configuration of a network with adapters, whose trunk is the layers below them.

    Raises:
        ConfigError: If there are fewer layers than are to have adapters.
    """
    if lora is None:
        return config
    if (lora.layers or 0) > config.num_layers:
        raise ConfigError(f"lora.layers {lora.layers}: the model has {config.num_layers} layers; null adapts all")
    return dataclasses.replace(config, lora=lora, trunk=config.num_layers - (lora.layers or config.num_layers))


def initializer(module: Any) -> Callable[[jax.Array], Any]:
    """Returns init(key) -> variables with axis boxes."""
    tokens = jnp.zeros((1, 2), jnp.int32)
    return lambda key: module.init(key, tokens, tokens == 0)


def jit_step(step: Callable[..., Any], state: Any, mesh: Any) -> Callable[..., Any]:
    """Jits a step with the state donated and its shardings pinned, so that the second call does not recompile."""
    shardings = (jax.tree.map(lambda x: x.sharding, state), replicated(mesh))
    return jax.jit(step, donate_argnums=0, out_shardings=shardings, compiler_options=tpu_options(mesh))


def optimizer_of(config: cfg.OptimizerConfig, total_steps: int) -> optax.GradientTransformation:
    """Returns the optimizer of a config."""
    rate = schedule(config.schedule, lr=config.lr, warmup_ratio=config.warmup_ratio, total_steps=total_steps)
    return make_optimizer(
        rate, weight_decay=config.weight_decay, b1=config.b1, b2=config.b2, eps=config.eps,
        max_grad_norm=config.max_grad_norm, moments=config.moments,
    )  # fmt: skip
