"""Capacity and peak rates of chips, from their vendors' data sheets."""

import dataclasses
from collections.abc import Sequence
from typing import Any

GB = 10**9
GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Chip:
    """Peak rates of one device; no program reaches all of them."""

    name: str
    flops: float  # FLOP/s, bfloat16
    hbm: int  # bytes available to a program
    hbm_rate: float  # bytes/s
    link_rate: float  # bytes/s of one link of the interconnect in one direction; of a GPU, of NVLink as a whole
    wraps_from: int  # minimum devices along a torus axis with wraparound links; 0: never
    network_rate: float | None = None  # bytes/s to other hosts in one direction; None: they are on the interconnect

    @property
    def fast(self) -> int:
        """Returns the most bytes that a program keeps in the memory of a core, out of HBM; of GPUs XLA keeps none."""
        return 128 * 2**20 if self.name.startswith("TPU") else 0


# Source: cloud.google.com/tpu/docs (v4, v5e, v5p, v6e, tpu7x) as of 2025; link rates are the stated bandwidth per chip
# over its links (4 in a 2D torus, 6 in a 3D torus) and both directions. HBM of v5e, v5p and v6e is what libtpu 0.0.42
# leaves of 16, 96 and 32 GiB, as it says when memory is exhausted. GPUs: NVIDIA's data sheets of the A100 80GB SXM,
# H100 SXM, H200 SXM and DGX B200 (an eighth of it), dense bfloat16 (half of what they state with sparsity), memory as
# stated there, half of NVLink's stated 600, 900 and 1800 GB/s over both directions. Network: what the data sheets of
# DGX A100, H100, H200 and B200 state for each GPU, 200 Gb/s InfiniBand on A100 and 400 Gb/s on the others. JAX takes
# three quarters of a GPU's memory unless XLA_PYTHON_CLIENT_MEM_FRACTION says otherwise.
CHIPS = {
    "TPU v4": Chip("TPU v4", 275e12, 32 * GIB, 1.23e12, 45e9, 4),
    "TPU v5 lite": Chip("TPU v5e", 197e12, 63 * GIB // 4, 0.82e12, 45e9, 16),
    "TPU v5": Chip("TPU v5p", 459e12, 9574 * GIB // 100, 2.77e12, 90e9, 4),
    "TPU v5p": Chip("TPU v5p", 459e12, 9574 * GIB // 100, 2.77e12, 90e9, 4),
    "TPU v6 lite": Chip("TPU v6e", 918e12, 125 * GIB // 4, 1.64e12, 90e9, 16),
    "TPU v6e": Chip("TPU v6e", 918e12, 125 * GIB // 4, 1.64e12, 90e9, 16),
    "NVIDIA A100-SXM4-80GB": Chip("NVIDIA A100", 312e12, 80 * GB, 2.039e12, 300e9, 0, 25e9),
    "NVIDIA H100 80GB HBM3": Chip("NVIDIA H100", 989e12, 80 * GB, 3.35e12, 450e9, 0, 50e9),
    "NVIDIA H200": Chip("NVIDIA H200", 989e12, 141 * GB, 4.8e12, 450e9, 0, 50e9),
    "NVIDIA B200": Chip("NVIDIA B200", 2250e12, 180 * GB, 8e12, 900e9, 0, 50e9),
}


def chip_of(device: Any) -> Chip | None:
    """Returns the chip of a device, None if it is not in the table (a CPU)."""
    return CHIPS.get(device.device_kind)


def ring_rate(chip: Chip, devices: Sequence[Any], group: Sequence[int]) -> float:
    """Bytes/s that each device of a group can send in a ring.

    GPUs: over NVLink within a host. Where a group spans hosts, all that a ring carries leaves each of them once, over
    the network of all its GPUs in the group; every GPU has its own, so groups side by side do not share it.

    TPUs: along the axes of the torus that the group spans; an axis with wraparound links carries two directions at
    once, one without them carries one.

    Args:
        chip: The chip.
        devices: All devices, in the order of the mesh.
        group: Indices of the group's devices in that order.
    """
    if chip.network_rate is not None:
        hosts = len({devices[i].process_index for i in group})
        return chip.link_rate if hosts == 1 else min(chip.link_rate, chip.network_rate * len(group) / hosts)
    if not hasattr(devices[0], "coords"):
        return chip.link_rate
    extent = [len({d.coords[axis] for d in devices}) for axis in range(3)]
    spanned = [axis for axis in range(3) if len({devices[i].coords[axis] for i in group}) > 1]
    rate = 0.0
    for axis in spanned:
        wraps = chip.wraps_from and extent[axis] % chip.wraps_from == 0
        rate += chip.link_rate * (2 if wraps else 1)
    return rate or chip.link_rate
