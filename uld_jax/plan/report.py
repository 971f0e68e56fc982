"""Plans as text and as JSON, from the same numbers."""

import dataclasses
from collections.abc import Sequence
from typing import Any

from uld_jax.plan.hlo import BETWEEN_SLICES
from uld_jax.plan.measure import Plan

ROW = (
    "program",
    "topology",
    "mesh",
    "batch",
    "parameters",
    "optimizer",
    "temporaries",
    "total",
    "HBM",
)


def to_json(plan: Plan) -> dict[str, Any]:
    """A plan as `json.dumps` takes it; sizes in bytes, times in seconds.

    Args:
        plan: The plan.

    Returns:
        Its fields.
    """
    return dataclasses.asdict(plan)


def lines(plan: Plan) -> list[str]:
    """A plan at length, for people.

    Args:
        plan: The plan.

    Returns:
        Lines of text.
    """
    found = [
        f"{plan.program} on {plan.topology}, {mesh_name(plan)}: batch {plan.batch_size} in "
        f"{plan.micro_batches} micro-batches, rows of {plan.row_length} tokens, "
        f"{plan.answer_positions} answer positions",
        "bytes on each chip:",
        *(f"  {kind:<20}{size(number):>12}" for kind, number in plan.bytes.items() if number),
        f"  {'total':<20}{size(plan.total_bytes):>12} of {size(plan.memory_bytes)}: "
        + ("fits" if plan.fits else "DOES NOT FIT"),
    ]
    if plan.estimate is None:
        return [
            *found,
            f"the compiler gave up after {plan.compile_seconds:.1f} s: the chip keeps a little of "
            "its memory for itself, and there is no room in the rest",
        ]
    found.append("collectives, on each chip:" + ("" if plan.collectives else " none"))
    for kind, traffic in plan.collectives.items():
        found.append(
            f"  {kind:<28}{traffic['count']:>8,}{size(traffic['bytes']):>12}"
            f"{size(traffic['sent']):>12} sent"
        )
    if any(BETWEEN_SLICES in kind for kind in plan.collectives):
        found.append("  the estimate leaves out what goes between slices: no rate is published")
    if plan.endless_loops:
        found.append(f"  {plan.endless_loops} loops of unknown length, counted as run once")
    student, teacher = plan.model_flops["student"], plan.model_flops["teacher"]
    times = plan.estimate
    return [
        *found,
        f"model FLOPs of a chip: {student + teacher:.3e} (student {student:.3e}, teacher "
        f"{teacher:.3e}); XLA counts {plan.compiler_flops:.3e}, each loop's body once",
        f"memory traffic of a chip: {size(plan.moved_bytes)}; intensity {plan.intensity:.0f} "
        "FLOPs a byte",
        f"ESTIMATE from published peak rates, perfectly overlapped: step {times['step']:.4g} s "
        f"(compute {times['compute']:.4g}, memory {times['memory']:.4g}, network "
        f"{times['network']:.4g}), {times['tokens_per_second_per_chip']:,.0f} tokens/s/chip",
        f"compiled in {plan.compile_seconds:.1f} s",
    ]


def table(plans: Sequence[Plan]) -> list[str]:
    """A row a plan.

    Args:
        plans: The plans.

    Returns:
        Lines of a Markdown table.
    """
    names = (*ROW, "fits", "step (estimate)", "tokens/s/chip (estimate)", "compiled in")
    rows = [names, tuple("---" for _ in names), *(_row(plan) for plan in plans)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |"
        for row in rows
    ]


def _row(plan: Plan) -> tuple[str, ...]:
    parameters = sum(size for kind, size in plan.bytes.items() if kind.endswith(" parameters"))
    times = plan.estimate
    return (
        plan.program,
        plan.topology,
        mesh_name(plan),
        str(plan.batch_size),
        size(parameters),
        size(plan.bytes.get("optimizer state", 0)),
        size(plan.bytes["temporaries"]),
        size(plan.total_bytes),
        size(plan.memory_bytes),
        "yes" if plan.fits else "no",
        f"{times['step']:.4g} s" if times else "",
        f"{times['tokens_per_second_per_chip']:,.0f}" if times else "",
        f"{plan.compile_seconds:.1f} s",
    )


def mesh_name(plan: Plan) -> str:
    """The mesh, in words."""
    return " x ".join(f"{axis} {count}" for axis, count in plan.mesh.items())


def size(number: float) -> str:
    """Bytes for people.

    Example:
        >>> size(1536), size(3 * 2**30)
        ('1.50 KiB', '3.00 GiB')
    """
    for unit in ("B", "KiB", "MiB", "GiB"):
        if number < 1024 or unit == "GiB":
            return f"{number:.2f} {unit}" if unit != "B" else f"{number:.0f} B"
        number /= 1024
    raise AssertionError
