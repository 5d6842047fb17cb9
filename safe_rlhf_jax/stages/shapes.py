"""Networks of a run without contents: shapes and shardings, for ahead-of-time compilation."""

from collections.abc import Callable
from typing import Any, Literal

import jax
import optax
from flax import linen as nn

from safe_rlhf_jax import storage
from safe_rlhf_jax.models.adapters import HEAD, Adapted, without_adapters
from safe_rlhf_jax.models.config import Lora, ModelConfig, ScoreConfig, ScoreType
from safe_rlhf_jax.models.parameters import boxed_variables
from safe_rlhf_jax.models.quantized import quantize
from safe_rlhf_jax.sharding import named_shardings, replicated, with_shardings
from safe_rlhf_jax.stages.networks import Weights
from safe_rlhf_jax.types import TrainState


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
        boxed = boxed_variables(module)
        return module, with_shardings(nn.unbox(boxed), named_shardings(boxed, self.run.mesh))

    def adapted(
        self, reference: str, head: Literal["lm", "score"], lora: Lora, *, score: ScoreConfig | None = None,
        score_type: ScoreType | None = None, seed: int = 0, trains: bool = True,
    ) -> tuple[Adapted, dict[str, Any]]:  # fmt: skip
        """Returns a network with adapters and the shapes of its variables."""
        del seed
        base, adapter = self.origin(reference)
        name = self.base_name(base)
        module = self.new_module(base, head, score or ScoreConfig(score_type or "reward"))
        module = module.clone(config=self.as_run(module.config, lora))
        network = Adapted(module, name)
        plain = without_adapters(module)
        boxed = boxed_variables(plain)
        with self.layout_of(lora):
            variables = with_shardings(nn.unbox(boxed), named_shardings(boxed, self.run.mesh))
        params = {"base": self.only_read({k: v for k, v in variables["params"].items() if k not in HEAD})}
        if (kind := self.run.config.execution.base) is not None:
            params["base"] = quantize(params["base"], kind)
        boxed = boxed_variables(network)
        own = with_shardings(nn.unbox(boxed), named_shardings(boxed, self.run.mesh))
        if adapter is None and not trains:
            del own["params"]["adapter"]
        return network, own | {"params": own["params"] | params}

    def origin(self, reference: str) -> tuple[str, str | None]:
        """Returns base and adapter of a model; with `assume`, a folder that is absent and named `adapter` is one."""
        assumed, folder = self.run.config.assume, storage.expanded(reference.partition(":")[2])
        if assumed and reference.startswith("path:") and folder.name == "adapter" and not storage.is_folder(folder):
            return f"preset:{assumed}", str(folder)
        return super().origin(reference)

    def base_name(self, reference: str) -> str:
        """Returns the name of a base, which need not exist."""
        return reference

    def on_another_base(self, one: Adapted, other: Adapted) -> bool:
        """Never says so: names of bases are as they are spelled here."""
        return False

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
