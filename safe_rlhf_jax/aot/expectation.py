"""What a phase may be expected to take: its needs, at the shares of the peak rates that have been measured.

The bound divides each need by a peak rate. Nothing reaches all of them, so the expectation divides it by the share of
the peak that somebody has measured, and takes the largest, as the bound does. `decoding` is the need of weights and
cache read once, which a loop over tokens stays above for reasons that no count of bytes shows: latency of collectives
and kernels that are too small to fill a chip.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

from safe_rlhf_jax.aot.chips import Chip

H100 = "benchmarks/results/device_nvidia_h100_80gb_hbm3.json"
MAXTEXT = "maxtext.readthedocs.io, Optimized models tiering"
SCALING_BOOK = "jax-ml.github.io/scaling-book"
MARIN = "Qwen3-8B on v6e-8, tensor 8, 8 rows of 2048 to 2176 tokens: 5.3 ms a token, read once 1.44 ms"


@dataclasses.dataclass(frozen=True)
class Factor:
    """A measured share of a peak rate."""

    chips: str  # how their names begin
    need: str  # compute, hbm, interconnect, or decoding
    share: float
    what: str
    source: str
    phases: tuple[str, ...] = ()  # empty: all


# The first that applies is taken. The shares of the three phases on NVIDIA's chips are the seconds that the bytes
# counted for h100:1 take at the peak rate, over those that were measured: benchmarks/expectation.py.
FACTORS = (
    Factor("TPU v4", "compute", 0.57, "MFU of training Llama-2-70B on 64 chips", "MaxText, Run_Llama2.md"),
    Factor("TPU v5e", "compute", 0.57, "MFU of training Llama-2-70B on 256 chips", "MaxText, Run_Llama2.md"),
    Factor("TPU v5p", "compute", 0.654, "MFU of training Llama-2-70B on 512 chips", MAXTEXT),
    Factor("TPU v6e", "compute", 0.4546, "MFU of training Llama-3.1-8B on 256 chips", MAXTEXT),
    Factor("TPU", "hbm", 0.86, "bandwidth of a kernel in decoding, Llama-3-8B on TPU7x", "arXiv:2604.15464"),
    Factor("TPU", "interconnect", 0.95, "all-gather of 10 MB and more on v5e:8x16", f"{SCALING_BOOK}/sharding"),
    Factor("TPU", "decoding", 0.27, MARIN, "github.com/marin-community/marin/issues/6229", ("generation",)),
    Factor("NVIDIA", "compute", 0.65, "product of two matrices in bfloat16 on an H100", H100),
    Factor("NVIDIA", "hbm", 0.54, "generation of rl_135m on an H100", H100, ("generation",)),
    Factor("NVIDIA", "hbm", 0.68, "scoring of rl_135m on an H100", H100, ("scoring",)),
    Factor("NVIDIA", "hbm", 0.79, "update of rl_135m on an H100", H100, ("update",)),
    Factor("NVIDIA", "hbm", 0.80, "x + 1 over 4 GiB on an H100", H100),
    Factor("NVIDIA", "interconnect", 0.82, "all-reduce over 8 H100, 370 of 450 GB/s", f"{SCALING_BOOK}/gpus"),
)


def factors(phase: str, chip: Chip) -> dict[str, Factor]:
    """Returns {need: factor} of a phase on a chip."""
    found: dict[str, Factor] = {}
    for factor in FACTORS:
        if chip.name.startswith(factor.chips) and (not factor.phases or phase in factor.phases):
            found.setdefault(factor.need, factor)
    return found


def expected_seconds(phase: str, row: Mapping[str, Any], chip: Chip) -> dict[str, Any]:
    """Returns the expected seconds of a phase, and the factor that they come from; the bound where none is known.

    Args:
        phase: Its name.
        row: Its needs and projected seconds.
        chip: Of each device.
    """
    needs = {**row["projected_seconds"], "decoding": row["least_hbm_bytes"] / chip.hbm_rate}
    measured = factors(phase, chip)
    if not measured:
        return {"expected_seconds": needs["phase"]}
    need = max(measured, key=lambda need: needs[need] / measured[need].share)
    return {"expected_seconds": needs[need] / measured[need].share, "expected_from": dataclasses.asdict(measured[need])}
