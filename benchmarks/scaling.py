"""What large configs need on TPUs and GPUs: compiles them (`--compile`), and writes docs/scaling.md from the figures.

python benchmarks/scaling.py --compile      compiles what has no figures yet in benchmarks/results (needs
                                            the extra tpu, for GPUs gpu-aot; most of an hour for everything, on two
                                            cores)
python benchmarks/scaling.py                writes docs/scaling.md from the figures that are there
"""

import argparse
import json
import pathlib
import subprocess
import sys
from collections.abc import Iterable

from safe_rlhf_jax.aot.expectation import FACTORS

ROOT = pathlib.Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"
PAGE = ROOT / "docs" / "scaling.md"
PPO_LAG, FOUR_TIMES = "configs/beaver_7b/ppo_lag.yaml", "stages.ppo_lag.batch_size=512"
RUNS: tuple[tuple[str, ...], ...] = (  # config, topology, settings
    (PPO_LAG, "v5e:8x8"),
    (PPO_LAG, "v5e:8x8", FOUR_TIMES, "stages.ppo_lag.microbatches=2"),
    (PPO_LAG, "v5e:8x8", "execution.decode_weights=int8", "execution.decode_cache=int8"),
    (PPO_LAG, "v6e:8x8"),
    (PPO_LAG, "v6e:8x8", FOUR_TIMES),
    *((f"configs/beaver_7b/{stage}.yaml", "v5e:8x8") for stage in ("sft", "reward", "cost", "dpo")),
    ("configs/llama_3_8b/ppo_lag.yaml", "v6e:8x8"),
    (PPO_LAG, "v5p:2x2x4"),
    *((f"configs/beaver_7b/{stage}.yaml", "v5p:2x2x4") for stage in ("sft", "reward", "cost", "dpo")),
    ("configs/llama_3_70b/ppo_lag.yaml", "v5p:4x4x8"),
)
LORA_8B, LORA_70B = "configs/llama_3_8b/ppo_lag_lora.yaml", "configs/llama_3_70b/ppo_lag_lora.yaml"
MERGED = "execution.merge_to_decode=true"
LORA_7B, UPPER_HALF = "configs/beaver_7b/ppo_lag_lora.yaml", "stages.ppo_lag.lora.layers=16"
EIGHT = ("mesh.data=1", "mesh.fsdp=8", "mesh.decode=1", "mesh.tensor=1", "stages.ppo_lag.microbatches=4")
ADAPTERS: tuple[tuple[str, ...], ...] = (  # config, topology, settings
    *((LORA_7B, topology, *settings) for topology in ("v5e:8x8", "v6e:8x8") for settings in ((), (UPPER_HALF,))),
    (LORA_8B, "h100:1"),
    (LORA_8B, "h100:1", MERGED),
    (LORA_8B, "h100:1", MERGED, "stages.ppo_lag.lora.layers=8"),
    (LORA_8B, "h100:1", "execution.base=int8"),
    (LORA_8B, "v6e:1x1"),
    (LORA_8B, "v6e:1x1", "execution.base=int8"),
    (LORA_8B, "v5e:2x4", "mesh.tensor=8"),
    (LORA_70B, "h100:8", MERGED),
    (LORA_70B, "v5p:2x2x1", "mesh.tensor=4"),
    ("configs/llama_3_8b/ppo_lag.yaml", "h100:8", *EIGHT, "stages.ppo_lag.batch_size=32"),
)
GIB = 2**30

INTRODUCTION = """\
# What large runs need

Written by `python benchmarks/scaling.py` from `benchmarks/results/scaling_*.json`; every row is made by

    python -m safe_rlhf_jax.compile --config FILE --topology NAME

**Nothing on this page has run on a TPU.** Memory, collectives and compile times are those of the program that XLA
compiled for the topology: the compiler's own account. Seconds, tokens/s and MFU are *projected*: for each phase the
largest of FLOPs, HBM bytes and sent bytes over the chip's peak rates, as if everything overlapped perfectly. They say
what a phase is bound by, and nothing reaches them; *expected* seconds are those at
[the shares of the peak rates that have been measured](#where-the-expectation-comes-from). FLOPs are counted from
shapes, every response at its full length; HBM bytes and collectives are read from the optimised program, loops as often
as they run. MFU counts the model's FLOPs only, not what rematerialisation repeats. Compile times are wall-clock, on two
cores that had other work as well. Capacity is what the compiler leaves of the chip's memory to a program.
"""

ADAPTERS_INTRODUCTION = """\
## One base, six roles: adapters

    python -m safe_rlhf_jax.compile --config configs/llama_3_8b/ppo_lag_lora.yaml --topology h100:1

PPO-Lagrangian with 32 prompts of 512 tokens and 512 tokens of response (Beaver-7B: 128 and 256); actor, reference,
reward model, cost model and both critics are adapters of rank 16 on one frozen base (the last row: six whole
networks). GiB per device; seconds are projected. The first row of 8B has run on an H100 with random weights
([rl_step.py](../benchmarks/rl_step.py),
[rl_step_8b_lora_h100.json](../benchmarks/results/rl_step_8b_lora_h100.json)): 33.7 s an iteration, *measured*, when
decoding still copied each layer's weights and cache out of their stacks (83 GB of HBM a token by our count, 13.0 s of
generation as a bound). On a GPU decoding reads a merged copy best, for its memory
([decision 31](decisions/0031-whole-bases.md)).

"""

GAINED = """\
What adapters gain over full fine-tuning at the same batch and lengths, PTX included, on the same chips (Beaver-7B):
no optimizer states, no gradients of matrices, one base in place of six networks, which stays where it is
(`execution.whole_base`). What remains are the passes of six roles over the texts. With adapters in the upper half
only, the lower half is computed once for all roles and never differentiated.

"""

GPUS = """\
## GPUs

    pip install 'safe_rlhf_jax[gpu-aot]'
    python -m safe_rlhf_jax.compile --config FILE --topology h100:8

Neither a GPU nor its driver nor a CUDA toolkit is needed: JAX's CUDA plugin compiles for a GPU that is described to it,
and NVIDIA's assembler is a package. Without a GPU the plugin complains at every start of JAX unless `JAX_PLATFORMS=cpu`
is set; an environment of its own is best. `a100-80`, `b200`, `h100` and `h200` are the SXM boards, by their number, at
most the eight of one host, or by hosts and GPUs on each: `h100:2x8`. What XLA is told of them stands in
`safe_rlhf_jax/aot/gpus.py`, their peak rates and capacity in `safe_rlhf_jax/aot/chips.py`, both with sources.

- Capacity is all of the stated memory. JAX takes three quarters of it unless `XLA_PYTHON_CLIENT_MEM_FRACTION` says
  otherwise; CUDA's context and NCCL's buffers come on top. XLA states no code for GPUs.
- Where a program needs more than about three quarters of the memory, XLA itself computes some values again to save it:
  the same program moves fewer bytes on a GPU of the same rates with more memory.
- On a GPU XLA times several kernels for a matrix product and takes the fastest; here it takes one without timing it.
- Attention is plain, with its weights in memory. In bfloat16 a run takes cuDNN's where it can (heads of at most 128, no
  softcap, no linear biases), which cannot be compiled without a GPU: memory and HBM bytes are then less than stated.
- Collectives run over NVLink within a host. Between hosts every GPU has its own InfiniBand port (400 Gb/s, on A100
  200 Gb/s): a group with k GPUs on each host has k of them, up to the rate of NVLink. Only `data` crosses hosts.
"""

DECODING = """\
## Decoding: HBM bytes of a token

What a device moves for each decoded token, beside what it cannot go below: the weights and the keys and values of the
tokens before it, each read once (the mean over a response). `execution.decode_weights` and `execution.decode_cache`
keep both in 8 bits while responses are generated ([algorithms.md](algorithms.md)).

Rows of whole networks with 512 prompts and on v5p are above 1.15. Their generation, compiled by itself, is not: 1.14 on
v5p:2x2x4, 1.04 with 512 prompts on v5e:8x8 (tests/aot/test_floors.py). In the program of the whole step XLA puts
activations and the matrix that it is about to read (`o_proj`) into HBM, which it keeps in the memory of the core there.
On GPUs it is the copy that counts ([decision 31](decisions/0031-whole-bases.md)): `execution.merge_to_decode=true`.

"""

EXPECTATION = """\
## Where the expectation comes from

The expected seconds of a phase are the largest of its needs over the share of the peak rate that somebody has measured.
`decoding` is the need of weights and cache read once: with few rows a loop over tokens stays far above it for reasons
that no count of bytes shows, such as the latency of an all-reduce for each layer. Of the 1.44 ms in the table 1.25 are
the weights. A second measurement agrees: PaLM
540B in int8 on 64 TPU v4, whose weights are read in 7.0 ms, took 29 ms a token (arXiv:2211.05102), a share of 0.24.
Shares of other TPUs than the one named are guesses, and so are those of other GPUs than the H100; no measurement of
a TPU's decoding with one chip or many rows was found, where the share is likely better. The three phases of an H100 are
our own run of 135 million parameters ([expectation.py](../benchmarks/expectation.py)): the seconds that the bytes
counted for h100:1 take at the peak rate, over those measured. `compile` prints the factor that decides each phase.
"""

NOTES = """\
## Reading it

- Parameters split over `fsdp` are gathered for every token while responses are generated, which then takes longer than
  all the rest. `execution.gather_to_decode` gathers them once, for the memory of a copy in `execution.dtype` that is
  split over `decode` and `tensor`; the configs here do. What is left is read from HBM for every token: `decode` shares
  that, without the sums over devices that `tensor` has in training
  ([decision 30](decisions/0030-little-tensor-parallelism.md)).
- Attention in training, scoring and prefill is a Pallas kernel, the steps of decoding are plain.
- Gradients are reduced and scattered over `fsdp` and `decode`. Some stay all-reduces, because libtpu 0.0.42 makes an
  all-reduce and a slice even of an explicit `psum_scatter`: where these cover both axes of a square torus, which
  `tensor: 2` avoids, and where a device's columns are no multiple of 128. So do the weights of norms.
- `at least` is what a phase cannot go below, from shapes alone: its weights read once for each pass (of those split
  over `fsdp` a device's own part, for the rest arrives over wires), what is trained read and written once for each
  optimizer step, and of decoding the figures above; 128 MiB of it can stay in the memory of a TPU's core. A program as
  a whole cannot go below its arguments and results. `compile` says so where its own count is below, and its bound takes
  the larger.
- Where the rows of a microbatch on a device are few, the compiler leaves them in the memory of the core from layer to
  layer (`on core`), and takes the weights of other devices there from the wires: HBM then holds a device's own part of
  the weights and little else.
- `sent` assumes rings: of n devices each sends (n − 1)/n of what is gathered or scattered, twice that of what is
  all-reduced. The rate is that of the torus axes that a group spans; an axis whose ends are not joined counts once.
- v5p:2x2x4 is what Google Cloud calls v5p-32 (it counts cores): 16 chips.
"""


def file_of(config: str, topology: str, *settings: str) -> pathlib.Path:
    path, others = pathlib.Path(config), [s for s in settings if s not in EIGHT]
    name = "_".join(["scaling", path.parent.name, path.stem, topology, *(s.rpartition(".")[2] for s in others)])
    return RESULTS / f"{name.translate(str.maketrans(':=', '__'))}.json"


def figures(runs: Iterable[tuple[str, ...]]) -> list[dict]:
    return [json.loads(file.read_text()) for run in runs if (file := file_of(*run)).exists()]


def settings_of(report: dict) -> list[str]:
    return [f"`{setting}`" for setting in report["overrides"] if not setting.startswith("mesh.")]


def name_of(report: dict) -> str:
    return " ".join([f"`{report['config']}`", *settings_of(report)])


def table(header: list[str], rows: list[list[str]]) -> str:
    lines = ["| " + " | ".join(cells) + " |" for cells in [header, *rows]]
    return "\n".join([lines[0], "|" + "---|" * len(header), *lines[1:]]) + "\n"


def mesh_name(mesh: dict[str, int]) -> str:
    return " · ".join(f"{axis} {size}" for axis, size in mesh.items() if size > 1)


def compiled_with(environment: dict) -> str:
    packages = ("jax", "libtpu", "jax-cuda12-plugin", "nvidia-cuda-nvcc-cu12")
    return ", ".join(f"{package} {environment[package]}" for package in packages if package in environment)


def memory_rows(report: dict) -> list[list[str]]:
    rows = []
    for stage in report["stages"]:
        for program in stage["programs"]:
            memory = program["memory"]
            kinds = ("argument", "temporary", "code", "total", "capacity")
            cells = [f"{memory[kind] / GIB:.2f}" for kind in kinds]
            chips = f"{report['environment']['devices']} × {report['environment']['chip']}"
            rows.append([name_of(report), report["topology"], chips, mesh_name(stage["mesh"]), *cells,
                         f"{program['compile_seconds']:.0f}"])  # fmt: skip
    return rows


BEFORE = """\
## Before and after decision 30

Little tensor parallelism, one microbatch, no rings of permutes, `decode`, and a cache that is written in place
([decision 30](decisions/0030-little-tensor-parallelism.md)). Before is what this page said, at the commit of
`benchmarks/results/scaling_before.json`.

"""


def before_rows() -> list[list[str]]:
    """Rows of what was compiled at a time before and is compiled again."""
    rows = []
    before = json.loads((RESULTS / "scaling_before.json").read_text())
    for report in figures(RUNS):
        old = before.get(f"{report['config']} {report['topology']}")
        if old is None or report["overrides"] or report["commit"] == old["commit"]:
            continue
        (stage,) = report["stages"]
        programs, new = stage["programs"], stage["projected"]
        sent = sum(c["bytes"] for program in programs for c in program["collectives"])
        ratios = [phase["decoding"]["ratio"] for p in programs for phase in p["phases"].values() if "decoding" in phase]
        rows.append([
            f"`{report['config']}`", report["topology"], f"{mesh_name(old['mesh'])} → {mesh_name(stage['mesh'])}",
            f"{old['sent_bytes'] / 1e9:.0f} → {sent / 1e9:.0f}",
            f"{old['step_seconds']:.2f} → {new['step_seconds']:.2f}", f"{old['mfu']:.0%} → {new['mfu']:.0%}",
            f"{number(old, 'decoding_ratio')} → {ratios[0]:.2f}" if ratios else "–",
        ])  # fmt: skip
    return rows


def number(row: dict, name: str, unit: float = 1, digits: int = 2) -> str:
    return f"{row[name] / unit:.{digits}f}" if name in row else "–"


def speed_rows(report: dict) -> list[list[str]]:
    return [
        [name_of(report), report["topology"], f"{p['step_seconds']:.2f}", number(p, "expected_seconds"),
         f"{p['tokens_per_second']:.0f}", f"{p['mfu']:.1%}"]
        for stage in report["stages"]
        for p in [stage["projected"]]
    ]  # fmt: skip


def phase_rows(report: dict) -> list[list[str]]:
    rows = []
    for stage in report["stages"]:
        for program in stage["programs"]:
            for name, phase in program["phases"].items():
                sent = sorted((c for c in program["collectives"] if c["phase"] == name), key=lambda c: -c["bytes"])[:3]
                parts = ", ".join(f"{c['kind']} ({c['axes']}) {c['bytes'] / 1e9:.1f}" for c in sent)
                seconds = phase["projected_seconds"]
                times = [f"{seconds[key]:.2f}" for key in ("compute", "hbm", "interconnect")]
                traffic = [f"{phase['flops'] / 1e12:.1f}", f"{phase['hbm_bytes'] / 1e9:.0f}"]
                traffic += [number(phase, key, 1e9, 0) for key in ("least_hbm_bytes", "core_bytes")]
                cells = [*traffic, parts, *times, phase["bound"], number(phase, "expected_seconds")]
                rows.append([name_of(report), report["topology"], name, *cells])
    return rows


def decoding_rows(report: dict) -> list[list[str]]:
    rows = []
    for stage in report["stages"]:
        phases = [phase for program in stage["programs"] for phase in program.get("phases", {}).values()]
        for token in (phase["decoding"] for phase in phases if "decoding" in phase):
            cells = [
                f"`{report['config']}`",
                ", ".join(settings_of(report)) or "–",
                report["topology"],
                mesh_name(stage["mesh"]) or "1 device",
            ]
            cells += [number(token, name, 1e9, 3) for name in ("token_bytes", "least_token_bytes")]
            rows.append([*cells, number(token, "ratio")])
    return rows


def expectation() -> str:
    """The section on the factors: all of them, in the order in which they apply."""
    rows = [
        [
            factor.chips,
            factor.need,
            ", ".join(factor.phases) or "all",
            f"{factor.share:.2g}",
            factor.what,
            factor.source,
        ]
        for factor in FACTORS
    ]
    report, measured = (
        json.loads((RESULTS / f"{name}.json").read_text()) for name in ("expectation_8b_h100", "rl_step_8b_lora_h100")
    )
    projected, seconds = report["stages"][0]["projected"], measured["seconds"]["iteration"]
    check = (
        "Both programs that were measured on an H100 decoded with scanned layers, as was done then. That of 8B below "
        f"has no part in the shares: expected are {projected['expected_seconds']:.1f} s, bound and measurement are "
        f"{projected['step_seconds']:.1f} s and {seconds:.1f} s (expectation_8b_h100.json).\n\n"
    )
    return EXPECTATION + check + table(["chips", "need", "phases", "share of the peak", "measured", "source"], rows)


def adapters(reports: list[dict]) -> str:
    """The section on adapters: memory, compile time, projected seconds by phase and what binds each."""
    rows = []
    for report in reports:
        for stage in report["stages"]:
            (program,) = stage["programs"]
            memory = program["memory"]
            cells = [f"`{report['config'].removeprefix('configs/')}`", ", ".join(settings_of(report)) or "–",
                     report["topology"], mesh_name(stage["mesh"]) or "1 device"]  # fmt: skip
            cells += [f"{memory[kind] / GIB:.1f}" for kind in ("argument", "temporary", "total", "capacity")]
            cells += [f"{program['compile_seconds']:.0f}"]
            for phase in ("generation", "scoring", "update"):
                found = program.get("phases", {}).get(phase)
                cells.append(
                    f"{found['projected_seconds']['phase']:.1f} ({found['bound']})" if found else "does not fit"
                )
            projected = stage.get("projected", {})
            rows.append(cells + [number(projected, name, digits=1) for name in ("step_seconds", "expected_seconds")])
    gained = [
        [report["topology"], ", ".join(settings_of(report)) or "all layers", *rates(report)]
        for report in reports
        if report["config"] == LORA_7B and "projected" in report["stages"][0]
    ]
    header = ["config", "settings", "topology", "mesh", "arguments", "temporary", "total", "capacity", "compile s",
              "generation s (bound by)", "scoring s", "update s", "step s", "expected s"]  # fmt: skip
    gain = ["topology", "adapters", "tokens/s", "of full fine-tuning", "ratio", "the same, expected"]
    return f"{ADAPTERS_INTRODUCTION}{table(header, rows)}\n{GAINED}{table(gain, gained)}"


def rates(report: dict) -> list[str]:
    """Tokens/s of adapters, of full fine-tuning on the same chips, and their ratio, as bounds and as expected."""
    (full,) = figures([(PPO_LAG, report["topology"])])
    ours, theirs = (one["stages"][0]["projected"] for one in (report, full))
    ratios = [theirs[name] / ours[name] for name in ("step_seconds", "expected_seconds")]
    return [*(f"{one['tokens_per_second']:.0f}" for one in (ours, theirs)), *(f"{ratio:.2f}" for ratio in ratios)]


def page() -> str:
    reports = figures(RUNS)
    versions = sorted({compiled_with(report["environment"]) for report in reports})
    memory = ["config", "topology", "chips", "mesh", "arguments", "temporary", "code", "total", "capacity", "compile s"]
    speed = ["config", "topology", "s per step", "expected s", "tokens/s", "MFU"]
    token = ["config", "settings", "topology", "mesh", "GB", "read once, GB", "ratio"]
    phase = ["config", "topology", "phase", "TFLOP", "HBM GB", "at least", "on core", "largest collectives, GB sent",
             "compute s", "HBM s", "wires s", "bound by", "expected s"]  # fmt: skip
    parts = [
        INTRODUCTION,
        f"Compiled with {'; '.join(versions)}.\n",
        "## Memory, GiB of HBM per device\n\n" + table(memory, [row for r in reports for row in memory_rows(r)]),
        "## Projected speed of a step\n\n" + table(speed, [row for r in reports for row in speed_rows(r)]),
        "## Phases, per device and step; seconds are projected\n\n"
        + table(phase, [row for r in reports for row in phase_rows(r)]),
        BEFORE + table(["config", "topology", "mesh", "GB sent", "s per step", "MFU", "decoded token"], before_rows()),
        DECODING + table(token, [row for r in (*reports, *figures(ADAPTERS)) for row in decoding_rows(r)]),
        expectation(),
        adapters(figures(ADAPTERS)),
        GPUS,
        NOTES,
    ]
    return "\n".join(parts)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--compile", action="store_true", help="first compile what has no figures yet")
    if parser.parse_args().compile:
        for config, topology, *settings in (*RUNS, *ADAPTERS):
            file = file_of(config, topology, *settings)
            if not file.exists():
                command = [sys.executable, "-m", "safe_rlhf_jax.compile", "--config", config, "--topology", topology]
                subprocess.run([*command, "--json", str(file), *settings], check=True, cwd=ROOT)
                commit = subprocess.run(
                    ["git", "rev-parse", "HEAD"], check=True, cwd=ROOT, capture_output=True, text=True
                )
                report = {"commit": commit.stdout.strip()} | json.loads(file.read_text())
                file.write_text(json.dumps(report, indent=1) + "\n")
    PAGE.write_text(page())


if __name__ == "__main__":
    main()
