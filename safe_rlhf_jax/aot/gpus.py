"""NVIDIA GPUs that need not be here: what XLA is told of them, and how programs are compiled for them."""

import dataclasses
import importlib.util
import re
from typing import Any

from safe_rlhf_jax.aot.chips import CHIPS, GB
from safe_rlhf_jax.errors import ConfigError

GPUS_PER_HOST = 8  # behind one NVSwitch, in DGX and HGX systems
NAME = re.compile(r"(?P<gpu>[\w-]+):(?:(?P<hosts>[1-9]\d*)x)?(?P<count>[1-9]\d*)")
EXAMPLES = "h100:8, or hosts x GPUs on each: h100:2x8"


@dataclasses.dataclass(frozen=True)
class Gpu:
    """What XLA's decisions depend on, beside what is in the table of chips."""

    kind: str  # as JAX names such a device
    capability: int  # major compute capability
    cores: int  # streaming multiprocessors
    fpus: int  # float32 units of a core
    clock: float  # GHz
    l2: int  # MiB
    shared: int  # KiB of shared memory of a core; a block can have one less
    accelerated: bool = True  # has instructions of its architecture alone, such as wgmma


# Sources: NVIDIA's architecture whitepapers (A100, H100, Blackwell), and the table of compute capabilities in the CUDA
# programming guide. The clock is the one that their peak float32 rate is stated for.
GPUS = {
    "a100-80": Gpu("NVIDIA A100-SXM4-80GB", 8, 108, 64, 1.41, 40, 164, accelerated=False),
    "b200": Gpu("NVIDIA B200", 10, 148, 128, 1.965, 126, 228),
    "h100": Gpu("NVIDIA H100 80GB HBM3", 9, 132, 128, 1.98, 50, 228),
    "h200": Gpu("NVIDIA H200", 9, 132, 128, 1.98, 50, 228),
}


def target_config(gpu: Gpu) -> str:
    """Returns a GPU as the text of XLA's `GpuTargetConfigProto`; the limits of a block are those of all of them."""
    chip = CHIPS[gpu.kind]
    return f"""
gpu_device_info {{
  cuda_compute_capability {{
    major: {gpu.capability}
    feature_extension: {"ACCELERATED_FEATURES" if gpu.accelerated else "NONE"}
  }}
  core_count: {gpu.cores}
  fpus_per_core: {gpu.fpus}
  clock_rate_ghz: {gpu.clock}
  device_memory_size: {chip.hbm}
  memory_bandwidth: {chip.hbm_rate:.0f}
  l2_cache_size: {gpu.l2 * 2**20}
  shared_memory_per_core: {gpu.shared * 2**10}
  shared_memory_per_block_optin: {(gpu.shared - 1) * 2**10}
  shared_memory_per_block: 49152
  registers_per_core_limit: 65536
  registers_per_block_limit: 65536
  threads_per_core_limit: 2048
  threads_per_block_limit: 1024
  threads_per_warp: 32
  thread_dim_limit_x: 1024
  thread_dim_limit_y: 1024
  thread_dim_limit_z: 64
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
}}
platform_name: "CUDA"
dnn_version_info {{ major: 9 minor: 8 }}
device_description_str: "{gpu.kind}"
"""


def gpu_devices(name: str) -> list[Any]:
    """Returns the devices of a GPU topology: NAME:GPUS, or NAME:HOSTSxGPUS.

    Raises:
        ConfigError: If the name is none, a host has more GPUs than exist, or what compiles for GPUs is not installed.
    """
    import jax
    from jax.experimental import topologies

    match = NAME.fullmatch(name)
    if match is None or match["gpu"] not in GPUS:
        raise ConfigError(f"--topology {name}: GPUs are named {EXAMPLES}; those known are {', '.join(GPUS)}")
    hosts, count = int(match["hosts"] or 1), int(match["count"])
    if count > GPUS_PER_HOST:
        raise ConfigError(
            f"--topology {name}: a host has at most {GPUS_PER_HOST} GPUs; name hosts x GPUs on each, such as "
            f"{match['gpu']}:{-(-count // GPUS_PER_HOST)}x{GPUS_PER_HOST}"
        )
    if compiler_folder() is None or importlib.util.find_spec("jax_cuda12_plugin") is None:
        raise ConfigError(
            f"--topology {name}: needs jax-cuda12-plugin {jax.__version__} and nvidia-cuda-nvcc-cu12, but no GPU, "
            "driver or CUDA toolkit: pip install 'safe_rlhf_jax[gpu-aot]'"
        )
    target = target_config(GPUS[match["gpu"]])
    try:  # partitions x hosts x GPUs on each
        topology = topologies.get_topology_desc(platform="cuda", target_config=target, topology=f"1x{hosts}x{count}")
    except RuntimeError as error:
        raise ConfigError(
            f"--topology {name}: {error}; is jax-cuda12-plugin of JAX's version, {jax.__version__}?"
        ) from error
    return list(topology.devices)


def compiler_folder() -> str | None:
    """Returns the folder of the installed package that has NVIDIA's assembler, None if there is none."""
    if importlib.util.find_spec("nvidia") is None:
        return None
    found = importlib.util.find_spec("nvidia.cuda_nvcc")
    return next(iter(found.submodule_search_locations or ()), None) if found else None


def is_absent_gpu(device: Any) -> bool:
    """Says whether a device is a GPU of a topology, not of this machine."""
    import jax

    return bool(device.platform == "gpu" and jax.default_backend() != "gpu")


def compiler_options(device: Any) -> dict[str, Any]:
    """Returns XLA's options to compile for a device: kernels cannot be timed on a GPU that is not here."""
    if not is_absent_gpu(device):
        return {}
    return {"xla_gpu_autotune_level": 0, "xla_gpu_cuda_data_dir": compiler_folder()}


def assumptions(device: Any, dtype: str, hosts: int) -> list[str]:
    """Returns in words what a report on GPUs that are not here takes for granted."""
    chip = CHIPS[device.device_kind]
    lines = [
        f"capacity: all of the {chip.hbm / GB:.0f} GB of a chip, of which JAX takes three quarters unless "
        "XLA_PYTHON_CLIENT_MEM_FRACTION says otherwise; CUDA's context and NCCL's buffers come on top",
        "kernels: those that XLA takes without timing any (no autotuning)",
    ]
    if dtype == "bfloat16":
        lines.append(
            "attention: the plain one stands in for cuDNN's, which cannot be compiled without a GPU; where a run takes "
            "cuDNN's, it needs less memory and HBM traffic than stated"
        )
    if hosts > 1:
        lines.append(f"network between hosts: {8 * (chip.network_rate or 0) / GB:.0f} Gb/s for each GPU")
    return lines
