"""The matrix products of one PPO-Lagrangian iteration on this CPU, alone, each at XLA's own rate.

    python -m benchmarks.floor --config benchmarks/configs/rl_step_tiny.yaml [--json benchmarks/results/NAME.json]

Products are read from the compiled iteration, with their executions. Each is compiled and timed by itself, on operands
that nothing else touches; where torch is installed, the same product by torch too. The iteration is timed in the same
process. What lies between products and iteration is everything else: attention's softmax, norms, rotary positions,
transposes, losses, and the optimizer.
"""

import argparse
import collections
import dataclasses
import importlib.util
import json
import math
import pathlib
import re
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import yaml

from benchmarks.rl_step import build, environment, runner, seconds
from safe_rlhf_jax.aot.flops import iteration_flops
from safe_rlhf_jax.aot.hlo import Instruction, Module
from safe_rlhf_jax.host_memory import keep_freed_memory
from safe_rlhf_jax.rl.algorithms import ALGORITHMS
from safe_rlhf_jax.rl.step import make_step

PHASES = ("generation", "scoring", "update")
DIMENSIONS = re.compile(r"([lr])hs_(batch|contracting)_dims=\{([\d,]*)\}")
REPEATED_SECONDS = 0.05  # for which a product is repeated
LEAST_SHARE = 0.8  # of the FLOPs that are counted from shapes; a program leaves out what nobody reads


@dataclasses.dataclass(frozen=True)
class Product:
    """A product as `jax.lax.dot_general` takes it."""

    left: tuple[int, ...]
    right: tuple[int, ...]
    contracting: tuple[tuple[int, ...], tuple[int, ...]]
    batch: tuple[tuple[int, ...], tuple[int, ...]]

    @property
    def flops(self) -> int:
        """A multiply-add as two."""
        shared = [self.right[axis] for axis in (*self.contracting[1], *self.batch[1])]
        return 2 * math.prod(self.left) * math.prod(self.right) // math.prod(shared)

    @property
    def equation(self) -> str:
        """The product as an einsum."""
        letters = iter("abcdefghijklmnop")
        left, right = [next(letters) for _ in self.left], [next(letters) for _ in self.right]
        for axes in (self.contracting, self.batch):
            for ours, theirs in zip(*axes, strict=True):
                right[theirs] = left[ours]
        batch = [left[axis] for axis in self.batch[0]]
        free = [*(x for x in left if x not in right), *(x for x in right if x not in left)]
        return f"{''.join(left)},{''.join(right)}->{''.join(batch + free)}"


def product_of(dot: Instruction, here: dict[str, Instruction]) -> Product:
    """The product of a `dot`, whose operands are instructions of the same computation."""
    if {array.dtype for name in dot.operands for array in here[name].arrays} != {"f32"}:
        sys.exit(f"{dot.name}: products are timed in float32 only; set dtype: float32 in the config")
    axes = {(side, kind): tuple(map(int, filter(None, numbers.split(","))))
            for side, kind, numbers in DIMENSIONS.findall(dot.attributes)}  # fmt: skip
    left, right = (here[name].arrays[0].shape for name in dot.operands)
    contracting, batch = ((axes.get(("l", kind), ()), axes.get(("r", kind), ())) for kind in ("contracting", "batch"))
    return Product(left, right, contracting, batch)


def products(module: Module) -> Iterator[tuple[str, Product, int]]:
    """Yields phase, product and executions of every product of a program, those inside of fusions as well."""
    for executed in module.walk(PHASES):
        instruction = executed.instruction
        inside = instruction.called[0] if instruction.opcode == "fusion" else executed.computation
        here = module.by_name[inside]
        for dot in here.values() if instruction.opcode == "fusion" else [instruction]:
            if dot.opcode == "dot":
                yield executed.phase, product_of(dot, here), executed.times


def repeated(call: Callable[[], Any]) -> float:
    """Seconds of a call, the median of five rounds of calls that take `REPEATED_SECONDS` together."""
    call()
    start = time.perf_counter()
    call()
    count = max(1, math.ceil(REPEATED_SECONDS / 5 / (time.perf_counter() - start)))
    rounds = []
    for _ in range(5):
        start = time.perf_counter()
        for _ in range(count):
            call()
        rounds.append((time.perf_counter() - start) / count)
    return statistics.median(rounds)


def by_xla(product: Product) -> float:
    """Seconds of a product, compiled by itself in a loop, as a step runs it: without a call from Python for each."""
    left, right = (jnp.ones(shape, jnp.float32) for shape in (product.left, product.right))
    numbers, times = (product.contracting, product.batch), max(1, math.ceil(5e8 / product.flops))

    def body(_: int, carry: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        left, right = carry
        out = jax.lax.dot_general(left, right, numbers, precision=jax.lax.Precision.HIGHEST)
        return left.at[(0,) * left.ndim].set(out.ravel()[0]), right  # so that no product is left out

    compiled = jax.jit(lambda *both: jax.lax.fori_loop(0, times, body, both)).lower(left, right).compile()
    return repeated(lambda: jax.block_until_ready(compiled(left, right))) / times


def by_torch(product: Product) -> float:
    """Seconds of a product by torch."""
    import torch

    left, right = (torch.ones(shape) for shape in (product.left, product.right))
    with torch.no_grad():
        return repeated(lambda: torch.einsum(product.equation, left, right))


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", required=True, help="sizes, such as benchmarks/configs/rl_step_tiny.yaml")
    parser.add_argument("--json", type=pathlib.Path, metavar="FILE", help="write the figures here")
    options = parser.parse_args()
    keep_freed_memory()
    spec = yaml.safe_load(pathlib.Path(options.config).read_text())
    networks, hp, state, frozen, prompts = build(spec, recompute=True)
    step = jax.jit(make_step(networks, ALGORITHMS["ppo_lag"], hp), donate_argnums=0)
    key = jax.random.key(0)
    compiled = step.lower(state, frozen, prompts, key).compile()
    _, run_step = runner(compiled, state, frozen, prompts, key)
    del state  # donated
    iteration = seconds(run_step, 5)
    found = list(products(Module(compiled.as_text())))
    rows, prompt = prompts.tokens.shape
    counted = sum(iteration_flops(networks.policy.config, rows, prompt, hp.response_length, True).values())
    if sum(times * product.flops for _, product, times in found) < LEAST_SHARE * counted:
        sys.exit("some products are calls of a library in the compiled program: unset the XLA_FLAGS that make them so")
    libraries = {"xla": by_xla} | ({"torch": by_torch} if importlib.util.find_spec("torch") else {})
    phases: dict[str, collections.Counter[str]] = {phase: collections.Counter() for phase in (*PHASES, "all")}
    alone: dict[Product, dict[str, float]] = {}
    kinds = dict.fromkeys(product for _, product, _ in found)
    for i, product in enumerate(kinds, 1):
        print(f"\rproduct {i} of {len(kinds)}", end="", file=sys.stderr, flush=True)
        alone[product] = {name: library(product) for name, library in libraries.items()}
    print(file=sys.stderr)
    for phase, product, times in found:
        for name in (phase, "all") if phase else ("all",):
            phases[name]["gflop"] += times * product.flops / 1e9
            phases[name].update({library: times * took for library, took in alone[product].items()})
    result = {"config": spec, "environment": environment(), "iteration_seconds": iteration, "kinds": len(alone),
              "products": phases}  # fmt: skip
    print(f"iteration    {iteration:8.3f} s")
    for phase, figures in phases.items():
        print(f"{phase:12s} {figures['gflop']:8.1f} GFLOP   " + "   ".join(
            f"products by {name} {figures[name]:8.3f} s, {figures['gflop'] / figures[name]:6.1f} GFLOP/s"
            for name in libraries))  # fmt: skip
    print(f"Products alone, as XLA computes them, are {phases['all']['xla'] / iteration:.0%} of the iteration.")
    if options.json:
        options.json.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
