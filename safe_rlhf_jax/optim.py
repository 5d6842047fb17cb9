"""Optimizers, learning-rate schedules, and `gradient_step`, the only place that differentiates."""

import dataclasses
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, BFloat16, Float32

from safe_rlhf_jax.models.parameters import is_matrix
from safe_rlhf_jax.types import Metrics, Params, TrainState

ScheduleName = Literal["constant", "linear", "cosine", "hold_linear"]
Loss = Callable[[Params, Any], tuple[jax.Array, Metrics]]

FINAL_SHARE = 0.02  # share of the peak learning rate at the end of `hold_linear`


def schedule(name: ScheduleName, *, lr: float, warmup_ratio: float, total_steps: int) -> optax.Schedule:
    """Returns the learning rate by optimizer step: linear warm-up to `lr`, then the named schedule.

    The first step already moves: step k of the warm-up has the share (k + 1)/warmup, not k/warmup (REFERENCE Q20).

    Args:
        name: `constant`, `linear` (to 0), `cosine` (to 0), or `hold_linear` (`lr` for half of the run, then linear to
            2 %).
        lr: Peak learning rate.
        warmup_ratio: Share of `total_steps`.
        total_steps: Optimizer steps in the run.
    """
    warmup = int(warmup_ratio * total_steps)
    rest = max(total_steps - warmup, 1)
    after: optax.Schedule
    if name == "constant":
        after = optax.constant_schedule(lr)
    elif name == "linear":
        after = optax.linear_schedule(lr, 0.0, rest)
    elif name == "cosine":
        after = optax.cosine_decay_schedule(lr, rest)
    else:
        after = optax.linear_schedule(lr, FINAL_SHARE * lr, rest - rest // 2, transition_begin=rest // 2)
    if not warmup:
        return after
    start = optax.linear_schedule(lr / warmup, lr, max(warmup - 1, 1))
    return optax.join_schedules([start, after], [warmup])


def make_optimizer(
    learning_rate: optax.ScalarOrSchedule,
    *,
    weight_decay: float = 0.0,
    b1: float = 0.9,
    b2: float = 0.95,
    eps: float = 1e-8,
    max_grad_norm: float | None = 1.0,
    moments: Literal["float32", "bfloat16"] = "float32",
) -> optax.GradientTransformation:
    """Returns AdamW with clipping of the global gradient norm; `moments` is the dtype of the two that it keeps."""
    adamw = optax.adamw(learning_rate, b1=b1, b2=b2, eps=eps, weight_decay=weight_decay, mask=is_matrix)
    if moments == "bfloat16":
        adamw = with_rounded_moments(adamw)
    return adamw if max_grad_norm is None else optax.chain(optax.clip_by_global_norm(max_grad_norm), adamw)


class RoundedState(NamedTuple):
    """The state of an optimizer that is kept in bfloat16."""

    step: jax.Array  # i32[]  optimizer steps taken; each draws random bits of its own
    inner: Any


def with_rounded_moments(optimizer: optax.GradientTransformation) -> optax.GradientTransformation:
    """Returns an optimizer that computes in float32, and keeps every float of its state in bfloat16.

    By stochastic rounding: up or down at random, so that the mean is the number itself. A moment to which a step adds
    less than half of a bfloat16's last digit would never move otherwise. Parameters stay in float32.
    """

    def init(params: Params) -> RoundedState:
        return RoundedState(jnp.zeros((), jnp.int32), cast_floats(optimizer.init(params), jnp.bfloat16))

    def update(grads: Any, state: Any, params: Any = None) -> tuple[Any, RoundedState]:
        updates, inner = optimizer.update(grads, cast_floats(state.inner, jnp.float32), params)
        leaves, tree = jax.tree.flatten(inner)
        key = jax.random.fold_in(jax.random.key(0), state.step)
        rounded = [
            stochastically_rounded(x, jax.random.fold_in(key, i)) if is_float(x) else x for i, x in enumerate(leaves)
        ]
        return updates, RoundedState(state.step + 1, jax.tree.unflatten(tree, rounded))

    return optax.GradientTransformation(init, update)


def is_float(x: jax.Array) -> bool:
    """Says whether an array holds floating-point numbers."""
    return jnp.issubdtype(x.dtype, jnp.floating)


def cast_floats(tree: Any, dtype: Any) -> Any:
    """Casts the floating-point arrays of a tree."""
    return jax.tree.map(lambda x: x.astype(dtype) if is_float(x) else x, tree)


def stochastically_rounded(x: Float32[Array, "..."], key: jax.Array) -> BFloat16[Array, "..."]:
    """Returns float32 numbers as bfloat16: one of the two next to each, the nearer one more often, x on average."""
    bits = jax.lax.bitcast_convert_type(x, jnp.uint32)
    noise = jax.random.bits(key, x.shape, jnp.uint16).astype(jnp.uint32)  # below the last bit that is kept
    kept = jnp.where(jnp.isfinite(x), bits + noise, bits) >> 16
    return jax.lax.bitcast_convert_type(kept.astype(jnp.uint16), jnp.bfloat16)


def init_state(params: Params, optimizer: optax.GradientTransformation, stats: Any = None) -> TrainState:
    """Returns the state of a network before its first step."""
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        params=params,
        opt_state=optimizer.init(params),
        stats={} if stats is None else stats,
    )


def split(batch: Any, parts: int) -> Any:
    """Reshapes every leaf [B, …] to [parts, B/parts, …]; part i holds rows i, i + parts and so on.

    Strided, so that a batch sharded over devices stays evenly sharded in every part.
    """
    return jax.tree.map(lambda x: x.reshape(x.shape[0] // parts, parts, *x.shape[1:]).swapaxes(0, 1), batch)


def gradient_step(
    loss: Loss, state: TrainState, batch: Any, optimizer: optax.GradientTransformation, *, microbatches: int = 1
) -> tuple[TrainState, Metrics]:
    """Takes one optimizer step on the mean loss over a batch.

    Args:
        loss: (params, microbatch) -> (loss, metrics); the loss is a mean over the rows of its microbatch, so that the
            mean over equal microbatches is the loss of the batch. A metric that is such a mean is a scalar; for any
            other (a maximum, a variance) the loss returns its inputs, an array by row.
        state: The network.
        batch: A tree of arrays [B, …].
        optimizer: The one that the state was made with.
        microbatches: Slices whose gradients are accumulated; divides B.

    Returns:
        The new state, and the metrics of the batch with `loss` and `grad_norm` (before clipping): scalars are the mean
        over microbatches, arrays hold all rows.
    """
    value_and_grad = jax.value_and_grad(loss, has_aux=True)
    if microbatches == 1:
        (value, metrics), grads = value_and_grad(state.params, batch)
    else:

        def accumulate(total: Any, microbatch: Any) -> tuple[Any, Metrics]:
            (value, metrics), grads = value_and_grad(state.params, microbatch)
            return jax.tree.map(jnp.add, total, (value, grads)), metrics

        parts = split(batch, microbatches)
        first = jax.tree.map(lambda x: x[0], parts)
        (value, _), grads = jax.eval_shape(value_and_grad, state.params, first)
        zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), (value, grads))
        total, metrics = jax.lax.scan(accumulate, zeros, parts)
        value, grads = jax.tree.map(lambda x: x / microbatches, total)
        metrics = {name: x.mean() if x.ndim == 1 else x.reshape(-1, *x.shape[2:]) for name, x in metrics.items()}
    updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    state = dataclasses.replace(state, step=state.step + 1, params=params, opt_state=opt_state)
    return state, metrics | {"loss": value, "grad_norm": optax.tree.norm(grads)}
