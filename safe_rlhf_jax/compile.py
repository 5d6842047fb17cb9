"""Command line: `python -m safe_rlhf_jax.compile --config FILE --topology v5e:8x8` reports the needs of a run.

Nothing is trained and no accelerator is used: the programs of training are compiled for devices that need not exist.
Exit status 0: everything fits. 1: something does not fit, or the config is wrong.
"""

import argparse
import json
import math
import os
import re
import sys
from collections.abc import Sequence
from typing import Any

from safe_rlhf_jax.aot.gpus import EXAMPLES, GPUS, assumptions, gpu_devices, is_absent_gpu
from safe_rlhf_jax.cli import CONFIG_HELP, exit_status, prog

# Keeps libtpu from looking for a missing machine, and from locking it.
COMPILE_ONLY = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_ACCELERATOR_TYPE": "v5litepod-1",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Returns the parsed command line; needs no JAX, so that `--help` starts no accelerator."""
    parser = argparse.ArgumentParser(
        prog=prog("compile"),
        description="Compiles the training stages of a config for TPUs or GPUs that need not be here, and reports "
        "memory, FLOPs, traffic, collectives and a projection of speed. Exits with 1 where a program does not fit, and "
        "says what would make it fit.",
        epilog="Example: python -m safe_rlhf_jax.compile --config configs/beaver_7b/ppo_lag.yaml --topology v5e:8x8",
    )
    parser.add_argument("--config", required=True, metavar="FILE", help=CONFIG_HELP)
    parser.add_argument(
        "--topology",
        required=True,
        metavar="NAME",
        help="TPUs as libtpu names them: generation and chips per axis, such as v5e:8x8, v5p:2x2x4, v6e:8x8 (needs the "
        f"extra tpu); GPUs ({', '.join(GPUS)}) by their number, or by hosts x GPUs on each, such as h100:8, h100:2x8 "
        "(needs the extra gpu-aot); or local, the devices of this machine",
    )
    parser.add_argument(
        "--slices",
        type=int,
        default=1,
        metavar="N",
        help="number of slices of TPUs, connected by the data-center network",
    )
    parser.add_argument("--stage", metavar="NAME", help="compile this stage only")
    parser.add_argument("--json", metavar="FILE", help="write the report to this file too")
    parser.add_argument(
        "--search",
        action="store_true",
        help="try meshes, rematerialisation and microbatches; list those that fit. A variant takes as long as a "
        "compile does; one compilation per core at a time",
    )
    parser.add_argument(
        "--meshes",
        type=int,
        default=4,
        metavar="N",
        help="number of meshes to search, the most promising first (default 4)",
    )
    parser.add_argument(
        "overrides", nargs="*", metavar="dotted.key=value", help="overrides; stages by index or name; values are YAML"
    )
    return parser.parse_intermixed_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    """Compiles a config; returns the exit status."""
    options = parse_arguments(arguments)
    return exit_status(lambda: compile_config(options))


def compile_config(options: argparse.Namespace) -> int:
    """Compiles the training stages of a config and reports on each; returns the exit status."""
    from safe_rlhf_jax import storage
    from safe_rlhf_jax.config import ConfigError, TrainingStage, load_config

    if options.topology != "local":
        os.environ["JAX_PLATFORMS"] = "cpu"  # leaves the machine's own accelerator free
    config = load_config(options.config, options.overrides)
    devices = topology_devices(options.topology, options.slices)
    from safe_rlhf_jax.aot import search, tables
    from safe_rlhf_jax.aot.compile import compile_stage

    stages = training = [stage for stage in config.stages if isinstance(stage, TrainingStage)]
    if options.stage is not None:
        names = [stage.name for stage in training]
        stages = [stage for stage in training if stage.name == options.stage]
        if not stages:
            raise ConfigError(f"--stage {options.stage}: no training stage of this config; there are {names}")
    report: dict[str, Any] = {"config": options.config, "overrides": options.overrides}
    report |= {"topology": options.topology, "slices": options.slices, "environment": environment(devices)}
    if is_absent_gpu(devices[0]):
        hosts = len({device.process_index for device in devices})
        report["assumptions"] = assumptions(devices[0], config.execution.dtype, hosts)
        print("\n".join(report["assumptions"]))
    report["stages"] = []
    for stage in stages:
        if options.search:
            found = search.feasible(config, stage, devices, options.meshes)
            tables.show_search(stage.name, found)
            report["stages"].append({"stage": stage.name, "fits": bool(found), "feasible": found})
            continue
        result = compile_stage(config, stage, devices)
        tables.show_stage(result, options.topology)
        report["stages"].append(result)
        if not result["fits"]:
            result["advice"] = search.advise(config, stage, devices)
            tables.show_advice(stage.name, result["advice"])
    if options.json:
        storage.write(options.json, json.dumps(report, indent=1) + "\n")
    return 0 if all(stage["fits"] for stage in report["stages"]) else 1


def topology_devices(name: str, slices: int) -> list[Any]:
    """Returns the devices of a topology, or those of this machine.

    Raises:
        ConfigError: If the name is not known, or what compiles for such devices is not installed.
    """
    import jax

    from safe_rlhf_jax.config import ConfigError

    if name == "local":
        return list(jax.devices())
    if re.match(r"v\d|tpu", name):
        return tpu_devices(name, slices)
    if slices > 1:
        raise ConfigError(
            f"--slices {slices}: slices are of TPUs; --topology {name} names its hosts itself: {EXAMPLES}"
        )
    return gpu_devices(name)


def tpu_devices(name: str, slices: int) -> list[Any]:
    """Returns the devices of a TPU topology.

    Raises:
        ConfigError: If libtpu does not know the name, a chip has two devices, or libtpu is not installed.
    """
    from jax.experimental import topologies

    from safe_rlhf_jax.config import ConfigError

    os.environ |= COMPILE_ONLY
    options: dict[str, Any] = {"num_slices": slices} if slices > 1 else {}
    if math.prod(map(int, re.findall(r"\d+", name.partition(":")[2]))) == 1:  # libtpu expects hosts of four chips
        options["chips_per_host_bounds"] = (1, 1, 1)
    try:
        devices = list(topologies.get_topology_desc(platform="tpu", topology_name=name, **options).devices)
    except RuntimeError as error:
        if "not installed" in str(error):
            raise ConfigError(f"--topology {name}: needs libtpu: pip install 'safe_rlhf_jax[tpu]'") from error
        raise ConfigError(f"--topology {name}: {error}; names are such as v5e:8x8, v5p:2x2x4, v6e:8x8") from error
    if any(getattr(device, "core_on_chip", 0) for device in devices):
        raise ConfigError(f"--topology {name}: chips of two devices are not supported; take v5e, v5p, v6e or later")
    return devices


def environment(devices: Sequence[Any]) -> dict[str, Any]:
    """Describes the compilation: versions, number of cores, and target."""
    import importlib.metadata

    import jax

    from safe_rlhf_jax.aot.chips import chip_of

    versions: dict[str, Any] = {"jax": jax.__version__, "cores": os.cpu_count()}
    if devices[0].platform == "tpu":
        versions["libtpu"] = importlib.metadata.version("libtpu")
    if is_absent_gpu(devices[0]):
        packages = ("jax-cuda12-plugin", "nvidia-cuda-nvcc-cu12")
        versions |= {package: importlib.metadata.version(package) for package in packages}
    chip = chip_of(devices[0])
    return versions | {"chip": chip.name if chip else devices[0].device_kind, "devices": len(devices)}


if __name__ == "__main__":
    sys.exit(main())
