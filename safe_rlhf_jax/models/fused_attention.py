"""Fused attention: kernels that never write the weights to memory, for passes in which every column is a query.

They equal `attention.attend` on real tokens; `attend` runs wherever `kernel_for` finds no kernel.
"""

from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from safe_rlhf_jax.models.positions import Mask
from safe_rlhf_jax.sharding import partition_spec, parts, platform

Kernel = Literal["splash", "cudnn"]

LANES = 128  # of a TPU's vector unit: tokens are padded to a multiple
BLOCKS = (512, 256, 128)  # block sizes of splash in tokens: the largest that divides
ACTIVATION_BYTES = 2
CUDNN_HEAD_DIM = 128
CUDNN_CAPABILITY = 8.0  # Ampere


def kernel_for(
    queries: Float[Array, "B H q C"], keys: Float[Array, "B K k C"], *, cap: float | None, biased: bool
) -> Kernel | None:
    """Returns the platform's kernel for such arrays, or None.

    The platform is that of the mesh, whose devices need not exist: programs are compiled ahead of time too. No kernel
    takes linear biases or a decode step; a sharded one needs whole rows and heads on each device. Float32 is left to
    `attend`: on a TPU splash multiplies it in a single pass of bfloat16.
    """
    batch, heads, length, size = queries.shape
    mesh = jax.sharding.get_abstract_mesh().shape
    split = {"batch": batch, "heads": heads, "kv_heads": keys.shape[1]}
    if biased or keys.shape[2] != length or any(size % parts(name, mesh) for name, size in split.items()):
        return None
    if queries.dtype.itemsize != ACTIVATION_BYTES:
        return None
    match platform():
        case "tpu" if length >= LANES and size % LANES == 0:
            return "splash"
        case "gpu" if cap is None and length % 2 == 0 and size % 8 == 0 and size <= CUDNN_HEAD_DIM:
            new = float(getattr(jax.devices()[0], "compute_capability", 0)) >= CUDNN_CAPABILITY
            return "cudnn" if new else None
    return None


def attend_fused(
    kernel: Kernel,
    queries: Float[Array, "B H L C"],
    keys: Float[Array, "B K L C"],
    values: Float[Array, "B K L C"],
    real: Mask,
    *,
    scale: float,
    window: int | None,
    cap: float | None,
    vmapped: bool = False,
) -> Float[Array, "B H L C"]:
    """Causal attention by a kernel; real tokens attend to real tokens, and the output at padding is never read.

    On a mesh each device runs the kernel on its rows and heads: the compiler cannot split a kernel.

    Args:
        kernel: Name of the kernel.
        queries: float[B, H, L, C].
        keys: float[B, K, L, C].
        values: float[B, K, L, C].
        real: bool[B, L], tokens that are not padding; or i32[B, L], the number of each token's text, 0 in padding.
        scale: Factor of q·k.
        window: Keys per query, its own included; None: all before it.
        cap: Limit of the softcap of q·k.
        vmapped: It runs under `jax.vmap`.

    Returns:
        float[B, H, L, C].
    """

    def run(queries: Any, keys: Any, values: Any, real: Any) -> Any:
        if kernel == "splash":
            return splash(queries, keys, values, real, scale=scale, window=window, cap=cap)
        return cudnn(queries, keys, values, real, scale=scale, window=window, by_head=vmapped)

    if jax.sharding.get_abstract_mesh().empty:
        return run(queries, keys, values, real)
    asking, answering = (partition_spec(("batch", heads, "length", "head_dim")) for heads in ("heads", "kv_heads"))
    specs = (asking, answering, answering, partition_spec(("batch", "length")))
    sharded: Callable[..., Any] = jax.shard_map(run, in_specs=specs, out_specs=asking, check_vma=False)
    return sharded(queries, keys, values, real)


def splash(
    queries: Float[Array, "B H L C"],
    keys: Float[Array, "B K L C"],
    values: Float[Array, "B K L C"],
    real: Mask,
    *,
    scale: float,
    window: int | None,
    cap: float | None,
    interpret: bool = False,
) -> Float[Array, "B H L C"]:
    """Pallas splash attention on one TPU: padding is a separate segment, so that it attends at least to itself."""
    # Imported here because it takes half a second, which other platforms can save.
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel, splash_attention_mask

    heads, length = queries.shape[1:3]
    padding = -length % LANES
    padded = length + padding
    block = next(size for size in BLOCKS if padded % size == 0)
    sizes = splash_attention_kernel.BlockSizes(
        block_q=block, block_kv=block, block_q_dkv=block, block_kv_dkv=block, block_q_dq=block, block_kv_dq=block
    )
    shape = padded, padded
    mask: Any = splash_attention_mask.CausalMask(shape)
    if window is not None:
        mask = splash_attention_mask.LocalMask(shape, (window - 1, 0), offset=0)
    kernel = splash_attention_kernel.make_splash_mha_single_device(
        splash_attention_mask.MultiHeadMask([mask] * heads),
        block_sizes=sizes,
        attn_logits_soft_cap=cap,
        interpret=interpret,
    )
    queries, keys, values = (
        jnp.pad(x, ((0, 0), (0, 0), (0, padding), (0, 0))) for x in (queries * scale, keys, values)
    )
    segment = jnp.pad(real.astype(jnp.int32), ((0, 0), (0, padding)))
    segments = splash_attention_kernel.SegmentIds(q=segment, kv=segment)
    out: jax.Array = jax.vmap(kernel)(queries, keys, values, segments)
    return out[:, :, :length]


def cudnn(
    queries: Float[Array, "B H L C"],
    keys: Float[Array, "B K L C"],
    values: Float[Array, "B K L C"],
    real: Mask,
    *,
    scale: float,
    window: int | None,
    by_head: bool = False,
    implementation: Literal["cudnn", "xla"] = "cudnn",
) -> Float[Array, "B H L C"]:
    """Flash attention of cuDNN on one GPU: padding may stand on either side, so there is a mask, one for all heads.

    With `by_head` each head has its own: under `jax.vmap` JAX's rule for the kernel asks for that.
    """
    length = queries.shape[2]
    column = jnp.arange(length, dtype=jnp.int32)
    distance = column[:, None] - column[None]
    near = distance >= 0 if window is None else (distance >= 0) & (distance < window)
    visible = near[None] & (real[:, :, None] == real[:, None, :])
    visible = jnp.broadcast_to(visible[:, None], (len(visible), queries.shape[1] if by_head else 1, length, length))
    queries, keys, values = (x.swapaxes(1, 2) for x in (queries, keys, values))
    out = jax.nn.dot_product_attention(queries, keys, values, mask=visible, scale=scale, implementation=implementation)
    return out.swapaxes(1, 2)
