"""Networks with adapters: a frozen base that several networks share, and the little that each of them trains."""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax.traverse_util import flatten_dict, unflatten_dict
from jaxtyping import Array, Bool, Float, Int

from safe_rlhf_jax.models.config import Lora, ModelConfig
from safe_rlhf_jax.models.positions import token_positions
from safe_rlhf_jax.models.quantized import dequantize, is_quantized
from safe_rlhf_jax.models.transformer import CausalLM, Decoder, ScoreModel
from safe_rlhf_jax.types import Params

STACKS = ("layers", "trunk")  # of scanned layers
HEAD = ("score_kernel", "score_bias")  # parameters of a score model that are trained beside its adapter


@dataclasses.dataclass(frozen=True)
class Adapted:
    """A language or score model with adapters, called as the module itself.

    Its parameters are {"adapter": …, "head": …}, what is trained; a language model has no head, and a network without
    an adapter is the base itself. Where "base" is among them it is used, else the base that `on` has bound: the
    argument of a training step, shared by all networks of that name.

    Attributes:
        module: A `CausalLM` or a `ScoreModel`, whose `config.lora` says what has adapters.
        base: Name of the base.
        bound: Parameters of the base.
        dropout: Key of the dropout before A.
    """

    module: Any
    base: str
    bound: Params | None = None
    dropout: jax.Array | None = None
    decoder: ClassVar[type[nn.Module]] = Decoder

    @property
    def config(self) -> ModelConfig:
        """Configuration of the module."""
        return self.module.config  # type: ignore[no-any-return]

    @property
    def score(self) -> Any:
        """Configuration of the scores of a score model."""
        return self.module.score

    def clone(self, **changes: Any) -> "Adapted":
        """Returns the network with another configuration."""
        return dataclasses.replace(self, module=self.module.clone(**changes))

    def on(self, bases: Mapping[str, Params], dropout: jax.Array | None = None) -> "Adapted":
        """Returns the network on its base; with a key for dropout, in training."""
        return dataclasses.replace(self, bound=bases[self.base], dropout=dropout)

    @property
    def decoder_params(self) -> Params:
        """Parameters of the decoder of the bound base."""
        assert self.bound is not None, "`on` has not been called"
        return self.bound["decoder"]

    def variables(self, variables: Mapping[str, Any]) -> tuple[Any, dict[str, Any]]:
        """Returns the module that these variables are for, and its own: base and head as `params`, and `adapter`."""
        params = variables["params"]
        base = params.get("base", self.bound)
        inner = {**variables, "params": base | params.get("head", {})}
        if "adapter" not in params:
            return without_adapters(self.module), inner
        return self.module, inner | {"adapter": params["adapter"]}

    def apply(self, variables: Mapping[str, Any], *args: Any, **options: Any) -> Any:
        """Applies the module; arguments are those of `flax.linen.Module.apply`."""
        module, inner = self.variables(variables)
        keys: dict[str, Any] = {} if self.dropout is None else {"rngs": {"dropout": self.dropout}}
        return module.apply(inner, *args, **keys, **options)

    def init(self, *args: Any) -> dict[str, Any]:
        """Returns fresh variables, {"params": {"adapter", "head"}} and "stats" if there are any, without a base."""
        fresh = self.module.init(*args)
        head = {name: fresh["params"][name] for name in HEAD if name in fresh["params"]}
        params = {"adapter": fresh["adapter"]} | ({"head": head} if head else {})
        return {"params": params} | ({"stats": fresh["stats"]} if "stats" in fresh else {})


LanguageModel = CausalLM | Adapted
Scorer = ScoreModel | Adapted


def without_adapters(module: Any) -> Any:
    """Returns the module of the base alone."""
    return module.clone(config=dataclasses.replace(module.config, lora=None))


def on(module: Any, bases: Mapping[str, Params], dropout: jax.Array | None = None) -> Any:
    """Returns a network on its base, any other unchanged."""
    return module.on(bases, dropout) if isinstance(module, Adapted) else module


def trained(params: Params) -> Params:
    """Returns what is trained of a network's parameters: all but the base."""
    is_adapted = isinstance(params, Mapping) and "base" in params
    return {name: part for name, part in params.items() if name != "base"} if is_adapted else params


def bases_of(*networks: tuple[Any, Params]) -> dict[str, Params]:
    """Returns {name: base} of networks, each with its parameters; heads of language models belong to the base."""
    bases: dict[str, Params] = {}
    for module, params in networks:
        if isinstance(module, Adapted):
            bases[module.base] = bases.get(module.base, {}) | params["base"]
    return bases


def whole(params: Params, base: Params | None) -> Params:
    """Returns parameters with their base, if they have one."""
    return params if base is None else {**params, "base": base}


def hidden_of_roles(
    module: Adapted,
    roles: Sequence[Params],
    tokens: Int[Array, "B L"],
    mask: Bool[Array, "B L"],
    first: int,
    below: Float[Array, "B L D"] | None = None,
) -> list[Float[Array, "B l D"]]:
    """Returns the hidden states of several networks on one base that read the same tokens, float[B, L − first, D] each.

    It is one pass: the base is read, and gathered, once for all of them, and the trunk is computed once.

    Args:
        module: Any of the networks, on its base.
        roles: Parameters of each network.
        tokens: i32[B, L].
        mask: bool[B, L].
        first: First column that is returned.
        below: Output of the trunk.
    """

    def hidden(config: ModelConfig, **adapter: Any) -> jax.Array:
        variables = {"params": module.decoder_params} | adapter
        positions = token_positions(mask)
        out: Any = module.decoder(config).apply(variables, tokens, positions, mask, first=first, below=below)
        return out[0]  # type: ignore[no-any-return]

    adapters = [params["adapter"]["decoder"] for params in roles if "adapter" in params]
    if not adapters:  # all are the base
        return [hidden(without_adapters(module.module).config)] * len(roles)
    nothing = jax.tree.map(jnp.zeros_like, adapters[0])
    given = [params["adapter"]["decoder"] if "adapter" in params else nothing for params in roles]
    dtypes = jax.tree.map(lambda *leaves: jnp.result_type(*leaves), *given)
    stacked = jax.tree.map(lambda dtype, *leaves: jnp.stack([leaf.astype(dtype) for leaf in leaves]), dtypes, *given)
    config = dataclasses.replace(module.config, vmapped=True)
    return list(jax.vmap(lambda adapter: hidden(config, adapter=adapter))(stacked))


def hidden_by_role(
    roles: Mapping[str, tuple[Any, Mapping[str, Any]]],
    tokens: Int[Array, "B L"],
    mask: Bool[Array, "B L"],
    first: int,
    below: Mapping[str, jax.Array] | None = None,
) -> dict[str, Float[Array, "B l D"]]:
    """Returns the hidden states of the networks with adapters: one pass for those of one form on one base.

    Args:
        roles: {role: network and its variables}; networks without adapters are left out.
        tokens: i32[B, L].
        mask: bool[B, L].
        first: First column that is returned.
        below: Output of the trunk of each base, by its name.
    """
    kinds: dict[Any, dict[str, tuple[Adapted, Params]]] = {}
    for role, (module, variables) in roles.items():
        if isinstance(module, Adapted):
            kinds.setdefault((module.base, module.config.lora), {})[role] = module, variables["params"]
    out: dict[str, jax.Array] = {}
    for (base, _), here in kinds.items():
        module, params = next(iter(here.values()))
        module = module.on({base: params["base"]}) if "base" in params else module
        states = hidden_of_roles(module, [p for _, p in here.values()], tokens, mask, first, (below or {}).get(base))
        out |= dict(zip(here, states, strict=True))
    return out


def output_of_trunk(module: Adapted, tokens: Int[Array, "B L"], mask: Bool[Array, "B L"]) -> Float[Array, "B L D"]:
    """Returns what enters the first layer with an adapter: the same for all networks on the base, float[B, L, D]."""
    decoder: Any = module.decoder(without_adapters(module.module).config)
    out: Any = decoder.apply({"params": module.decoder_params}, tokens, mask, method="read_trunk")
    return out  # type: ignore[no-any-return]


def unstacked(module: Any, params: Params) -> tuple[Any, Params]:
    """Returns a network with unrolled layers, each with parameters of its own, and these parameters."""

    def apart(part: Any) -> Any:
        if not isinstance(part, Mapping):
            return part
        out = {name: apart(inner) for name, inner in part.items() if name not in STACKS}
        for name in STACKS:
            layers = len(jax.tree.leaves(part[name])[0]) if name in part else 0
            out |= {f"{name}_{i}": jax.tree.map(lambda x, i=i: x[i], part[name]) for i in range(layers)}
        return out

    module = module.clone(config=dataclasses.replace(module.config, scan_layers=False))
    if isinstance(module, Adapted):
        module = dataclasses.replace(module, bound=apart(module.bound))
    return module, apart(params)


def merged(module: Any, params: Params, *, lazily: bool = False) -> tuple[Any, Params]:
    """Returns a network without adapters and its parameters: W + s·A·B, in the dtype that it computes in.

    Layer by layer, so that no second copy in float32 is ever in memory; `lazily` makes a stack of layers one whose
    layers are computed when they are taken.
    """
    if not isinstance(module, Adapted):
        return module, params
    inner_module, variables = module.variables({"params": params})
    lora = inner_module.config.lora
    base = flatten_dict(variables["params"], is_leaf=lambda _, x: not isinstance(x, Mapping))
    if lora is not None:
        adapter = flatten_dict(variables["adapter"])
        for path in [path[:-1] for path in adapter if path[-1] == "lora_a"]:
            kernel = (*path, "kernel")
            parts = base[kernel], adapter[(*path, "lora_a")], adapter[(*path, "lora_b")]
            product = functools.partial(add_product, lora=lora, dtype=module.config.dtype)
            base[kernel] = by_layer(product, parts, module.config, lazily)
    if lazily:  # to be written: integers and scales are for computing only
        exact = functools.partial(dequantize, dtype=module.config.dtype)
        for path, leaf in base.items():
            base[path] = by_layer(exact, leaf, module.config, lazily) if is_quantized(leaf) else leaf
    return without_adapters(inner_module), unflatten_dict(base)


def by_layer(function: Callable[[Any], jax.Array], parts: Any, config: ModelConfig, lazily: bool) -> Any:
    """Applies a function to each layer of a stack, now or when it is taken; at once where layers are not stacked."""
    if not config.scan_layers:
        return function(parts)
    return Layers(parts, function) if lazily else jax.lax.map(function, parts)


def add_product(parts: tuple[Any, jax.Array, jax.Array], *, lora: Lora, dtype: str) -> jax.Array:
    """Returns W + s·A·B of one layer."""
    kernel, a, b = parts
    low_rank = jnp.tensordot(a.astype(jnp.float32), b.astype(jnp.float32), 1, precision=jax.lax.Precision.HIGHEST)
    return (dequantize(kernel).astype(jnp.float32) + lora.scale * low_rank).astype(dtype)


@dataclasses.dataclass(frozen=True)
class Layers:
    """A stack of layers that are computed when they are taken: of a parameter that is written layer by layer."""

    parts: Any
    product: Callable[[Any], jax.Array]

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the stack."""
        return (len(jax.tree.leaves(self.parts)[0]), *jax.eval_shape(lambda: self[0]).shape)

    @property
    def dtype(self) -> Any:
        """Of its layers."""
        return jax.eval_shape(lambda: self[0]).dtype

    def __getitem__(self, layer: Any) -> jax.Array:
        return self.product(jax.tree.map(lambda x: x[layer], self.parts))
