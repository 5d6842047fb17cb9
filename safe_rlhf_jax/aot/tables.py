"""Reports of ahead-of-time compiles as tables."""

from collections.abc import Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

GIB, MIB, GIGA = 2**30, 2**20, 1e9
CONSOLE = Console(highlight=False, width=132)


def show_stage(report: dict[str, Any], topology: str) -> None:
    """Prints memory, phases and collectives of a stage's programs."""
    mesh = " ".join(f"{name}={size}" for name, size in report["mesh"].items())
    print(f"\n{report['stage']} ({report['kind']}) on {topology}, mesh {mesh}")
    for program in report["programs"]:
        CONSOLE.print(memory_table(program))
        if "phases" in program:
            CONSOLE.print(phase_table(program))
            print(*remarks(program), sep="\n")
            CONSOLE.print(collective_table(program))
    if "projected" in report:
        print(projected_line(report["projected"]))


def memory_table(program: dict[str, Any]) -> Table:
    """HBM per device by kind."""
    memory = program["memory"]
    unit, name = (GIB, "GiB") if memory["total"] >= GIB else (MIB, "MiB")
    table = Table(
        title=f"{program['program']}: HBM per device, {name} (compiled in {program['compile_seconds']:.0f} s)"
    )
    kinds = ("argument", "output", "alias", "temporary", "code", "total", "capacity")
    for kind in (*kinds, ""):
        table.add_column(kind, justify="right")
    cells = [f"{memory[kind] / unit:.2f}" if memory.get(kind) is not None else "–" for kind in kinds]
    table.add_row(*cells, "fits" if memory["fits"] else "does not fit")
    return table


def phase_table(program: dict[str, Any]) -> Table:
    """Needs of each phase on a device, and the least time of each resource."""
    table = Table(title=f"{program['program']}: per device and step; the bound is from peak rates")
    names = ("phase", "TFLOP", "HBM GB", "at least", "on core", "sent GB", "compute s", "HBM s", "wires s", "bound by")
    for name in (*names, "expected s"):
        table.add_column(name, justify="left" if name in ("phase", "bound by") else "right")
    for phase, row in program["phases"].items():
        cells = [f"{row['flops'] / 1e12:.3f}"]
        cells += [f"{row[name] / GIGA:.2f}" for name in ("hbm_bytes", "least_hbm_bytes", "core_bytes", "sent_bytes")]
        seconds = row.get("projected_seconds")
        times = [f"{seconds[n]:.3f}" if seconds else "–" for n in ("compute", "hbm", "interconnect")]
        expected = f"{row['expected_seconds']:.3f}" if seconds else "–"
        table.add_row(phase, *cells, *times, row.get("bound", "–"), expected)
    return table


def remarks(program: dict[str, Any]) -> list[str]:
    """What stands below the phases: an implausible count, the traffic of a decoded token, the expectation's factors."""
    lines = [f"implausible: {line}. The bound takes the larger." for line in program["implausible"]]
    for phase, row in program["phases"].items():
        if token := row.get("decoding"):
            moved, least = token["token_bytes"] / GIGA, token["least_token_bytes"] / GIGA
            once = f"{token['ratio']:.2f} times its weights and cache read once ({least:.3f} GB)"
            lines.append(f"a decoded token moves {moved:.3f} GB of HBM, {once}")
        if factor := row.get("expected_from"):
            share = f"{factor['share']:.0%} of the peak of {factor['need']}"
            lines.append(f"expected {phase}: {share}, measured: {factor['what']} ({factor['source']})")
    return lines


def collective_table(program: dict[str, Any]) -> Table:
    """Collectives by phase, kind and mesh axes."""
    table = Table(title=f"{program['program']}: collectives per device and step")
    for name in ("phase", "kind", "mesh axes", "runs", "sent MB"):
        table.add_column(name, justify="right" if name in ("runs", "sent MB") else "left")
    for row in program["collectives"]:
        table.add_row(row["phase"], row["kind"], row["axes"], str(row["runs"]), f"{row['bytes'] / 1e6:.3f}")
    return table


def projected_line(projected: dict[str, Any]) -> str:
    """The projection of a whole step in words."""
    return (
        f"projected, not measured (peak rates, perfect overlap): {projected['step_seconds']:.2f} s per step, "
        f"{projected['tokens_per_second']:.0f} tokens/s, MFU {projected['mfu']:.1%}; "
        f"expected: {projected['expected_seconds']:.2f} s"
    )


def show_search(name: str, found: Sequence[dict[str, Any]]) -> None:
    """Prints the variants that fit, best first."""
    table = Table(title=f"{name}: what fits, fastest projected step first")
    for column in ("overrides", "HBM GiB", "projected s", "tokens/s", "MFU"):
        table.add_column(column, justify="left" if column == "overrides" else "right")
    for variant in found:
        speed = ["–"] * 3
        if projected := variant.get("projected"):
            speed = [f"{projected['step_seconds']:.2f}", f"{projected['tokens_per_second']:.0f}"]
            speed.append(f"{projected['mfu']:.1%}")
        table.add_row(" ".join(variant["overrides"]), f"{variant['total'] / GIB:.2f}", *speed)
    CONSOLE.print(table)


def show_advice(name: str, advice: dict[str, Any] | None) -> None:
    """Prints the cheapest change that makes a stage fit."""
    if advice is None:
        print(f"{name}: nothing that was tried fits; take more devices or a smaller model")
        return
    print(f"{name}: fits with {' '.join(advice['overrides'])} ({advice['total'] / GIB:.2f} GiB)")
