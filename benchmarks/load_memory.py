"""Peak memory of `hf.load` for a random Llama checkpoint in bfloat16, by default with 1.2 billion parameters.

    python benchmarks/load_memory.py --json benchmarks/results/load_memory.json

The checkpoint (the sizes of Llama 3.2 1B, in several files) is written into a temporary folder, a tensor at a time. A
fresh process per number of simulated CPU devices loads it and reports its peak resident set, which includes the pages
of the files that are mapped at that moment, and what the process held before. CPU devices live in the same memory, so
the parameters themselves are part of it.
"""

import argparse
import json
import os
import pathlib
import resource
import subprocess
import sys
import tempfile
import time
from typing import Any

LAYERS, WIDTH, MLP, VOCAB, KV = 16, 2048, 8192, 128256, 512
CONFIG = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": VOCAB, "hidden_size": WIDTH,
    "intermediate_size": MLP, "num_hidden_layers": LAYERS, "num_attention_heads": 32, "num_key_value_heads": 8,
    "head_dim": 64, "max_position_embeddings": 131072, "tie_word_embeddings": True, "dtype": "bfloat16",
}  # fmt: skip
GIB = 2**30
ALLOWED = 1.5e9  # bytes beyond the parameters


def make_checkpoint(folder: pathlib.Path) -> None:
    """Writes the checkpoint in files of at most 700 MB."""
    import jax.numpy as jnp
    import numpy as np

    from safe_rlhf_jax.models.safetensors_io import Spec, write_tensors

    rng = np.random.default_rng(0)

    def spec(*shape: int) -> Spec:
        return Spec(shape, jnp.dtype("bfloat16"), lambda: rng.standard_normal(shape, np.float32).astype("bfloat16"))

    specs = {"model.embed_tokens.weight": spec(VOCAB, WIDTH), "model.norm.weight": spec(WIDTH)}
    for i in range(LAYERS):
        block = {
            "self_attn.q_proj": (WIDTH, WIDTH), "self_attn.k_proj": (KV, WIDTH), "self_attn.v_proj": (KV, WIDTH),
            "self_attn.o_proj": (WIDTH, WIDTH), "mlp.gate_proj": (MLP, WIDTH), "mlp.up_proj": (MLP, WIDTH),
            "mlp.down_proj": (WIDTH, MLP), "input_layernorm": (WIDTH,), "post_attention_layernorm": (WIDTH,),
        }  # fmt: skip
        specs |= {f"model.layers.{i}.{name}.weight": spec(*shape) for name, shape in block.items()}
    write_tensors(folder, specs, max_bytes=700 * 10**6)
    (folder / "config.json").write_text(json.dumps(CONFIG))


def resident(field: str) -> int:
    """Bytes that this process holds, from the kernel's account."""
    lines = pathlib.Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{field}:"))


def measure(folder: str) -> dict[str, Any]:
    """Loads the checkpoint in this process, whose devices the environment has set."""
    import jax

    from safe_rlhf_jax.models import hf
    from safe_rlhf_jax.sharding import make_mesh

    mesh = make_mesh((1, -1, 1)) if len(jax.devices()) > 1 else None
    before = resident("VmRSS")
    start = time.perf_counter()
    _, variables = hf.load(folder, dtype="bfloat16", mesh=mesh)
    jax.block_until_ready(variables)
    seconds = time.perf_counter() - start
    leaves = jax.tree.leaves(variables)
    size = sum(leaf.nbytes for leaf in leaves)
    on_device: dict[int, int] = {}
    for shard in [shard for leaf in leaves for shard in leaf.addressable_shards]:
        on_device[shard.device.id] = on_device.get(shard.device.id, 0) + shard.data.nbytes
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return {
        "devices": len(on_device),
        "parameters": sum(leaf.size for leaf in leaves),
        "parameter_bytes": size,
        "largest_device_bytes": max(on_device.values()),
        "resident_before_bytes": before,
        "resident_after_bytes": resident("VmRSS"),
        "peak_resident_bytes": peak,
        "peak_beyond_parameters_bytes": peak - size,
        "peak_beyond_parameters_and_process_bytes": peak - size - before,
        "seconds": seconds,
    }


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", help="write the result to this file")
    parser.add_argument("--devices", type=int, nargs="+", default=[1, 8], help="simulated devices, one process each")
    parser.add_argument("--folder", help=argparse.SUPPRESS)  # what a process of ours is told to load
    options = parser.parse_args()
    if options.folder:
        print(json.dumps(measure(options.folder)))
        return
    from rl_step import environment

    result: dict[str, Any] = {"config": CONFIG, "environment": environment(), "allowed_bytes": ALLOWED, "runs": []}
    with tempfile.TemporaryDirectory() as folder:
        # In a process of its own, whose memory those that load do not inherit.
        code = "import load_memory, pathlib, sys; load_memory.make_checkpoint(pathlib.Path(sys.argv[1]))"
        here = pathlib.Path(__file__).parent
        subprocess.run([sys.executable, "-c", code, folder], check=True, env=os.environ | paths(here))
        for devices in options.devices:
            flags = {"XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}", "JAX_PLATFORMS": "cpu"}
            command = [sys.executable, __file__, "--folder", folder]
            process = subprocess.run(command, check=True, env=os.environ | flags, stdout=subprocess.PIPE, text=True)
            run = json.loads(process.stdout)
            result["runs"].append(run)
            print(f"{run['devices']} devices: parameters {run['parameter_bytes'] / GIB:.2f} GiB, peak resident set "
                  f"{run['peak_resident_bytes'] / GIB:.2f} GiB, {run['seconds']:.1f} s")  # fmt: skip
    if options.json:
        pathlib.Path(options.json).write_text(json.dumps(result, indent=2) + "\n")
    if any(run["peak_beyond_parameters_bytes"] > ALLOWED for run in result["runs"]):
        sys.exit(f"the peak is more than {ALLOWED / 1e9} GB beyond the parameters")


def paths(folder: pathlib.Path) -> dict[str, str]:
    """Where a process finds this module."""
    return {"PYTHONPATH": os.pathsep.join([str(folder), *filter(None, [os.environ.get("PYTHONPATH")])])}


if __name__ == "__main__":
    main()
