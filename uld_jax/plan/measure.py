"""Compiles a program for chips that are not there, and says what the compiler knows of it."""

import dataclasses
import re
import time
from collections.abc import Mapping
from typing import Any

import jax

from uld_jax.plan.hlo import BETWEEN_SLICES, Program
from uld_jax.plan.jobs import Job
from uld_jax.plan.topology import Chip, Slice

_UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


@dataclasses.dataclass(frozen=True)
class Plan:
    """What is known of a program on a slice before it has run; bytes and FLOPs are a chip's.

    Attributes:
        program: Its name.
        topology: The slice.
        chips: Of it.
        mesh: Devices along each axis.
        batch_size: Rows of all chips.
        micro_batches: Parts that they are read in.
        row_length: Tokens of a row, padded, encoder and decoder together.
        answer_positions: Of a batch, padded.
        bytes: By kind: what it is given, and where it has compiled temporaries, padding (of the
            arguments' tiles), results (that take no argument's place) and program.
        total_bytes: Of all kinds; where it has not compiled, as far as the compiler said.
        memory_bytes: The chip's, as published.
        fits: Whether the compiler found room.
        collectives: Kind to count, bytes, and bytes that a chip sends.
        endless_loops: Loops of unknown length, whose bodies count once.
        model_flops: Of student and teacher, see `uld_jax.train.cost.step_flops`.
        compiler_flops: XLA's count, which takes each loop's body once.
        moved_bytes: Between the chip and its memory.
        intensity: model_flops / moved_bytes.
        compile_seconds: Tracing left out.
        estimate: Seconds at the published rates, each alone (compute, memory, network within a
            slice); step, the largest of them; tokens, padded, a second and chip. None where it has
            not compiled.
    """

    program: str
    topology: str
    chips: int
    mesh: Mapping[str, int]
    batch_size: int
    micro_batches: int
    row_length: int
    answer_positions: int
    bytes: Mapping[str, float]
    total_bytes: float
    memory_bytes: float
    fits: bool
    collectives: Mapping[str, Mapping[str, float]]
    endless_loops: int
    model_flops: Mapping[str, float]
    compiler_flops: float
    moved_bytes: float
    intensity: float
    compile_seconds: float
    estimate: Mapping[str, float] | None


def make_plans(job: Job, where: Slice) -> list[Plan]:
    """Compiles a program, and those that follow from it while there is room for each.

    It takes minutes for large models, and no accelerator.

    Args:
        job: The program.
        where: The slice.

    Returns:
        A plan for each.
    """
    plans, following = [], job
    while following is not None:
        plan, compiled = _compile(following, where)
        plans.append(plan)
        follows = following.then if compiled is not None else None
        following = None if follows is None else follows(compiled)
    return plans


def _compile(job: Job, where: Slice) -> tuple[Plan, Any]:
    with jax.set_mesh(job.mesh):
        lowered = job.lower()
    start = time.perf_counter()
    try:
        compiled, message = lowered.compile(), ""
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        compiled, message = None, str(error)
    seconds = time.perf_counter() - start
    chips = job.mesh.devices.size
    known = {
        "program": job.program,
        "topology": where.name,
        "chips": chips,
        "mesh": dict(job.mesh.shape),
        "batch_size": job.batch_size,
        "micro_batches": job.micro_batches,
        "row_length": job.row_length,
        "answer_positions": job.answer_positions,
        "memory_bytes": where.chip.memory,
        "model_flops": {name: flops / chips for name, flops in job.model_flops.items()},
        "compile_seconds": seconds,
    }
    if compiled is None:
        return Plan(**known, **_refused(job.bytes, message)), None
    return Plan(**known, **_compiled(compiled, job, chips, where.chip)), compiled


def temporaries_asked_for(message: str, arguments: float) -> float:
    """What the compiler wanted besides the arguments when it found no room.

    Args:
        message: Its own.
        arguments: Bytes of all of them.

    Returns:
        Bytes; 0 where it does not say.

    Example:
        >>> temporaries_asked_for("memory required for HLO temporaries (1.5K) exceeds ...", 10)
        1536.0
        >>> temporaries_asked_for("Used 1.5K of 1.0K hbm. Exceeded hbm capacity by 512.", 10)
        1526.0
    """
    found = re.search(r"HLO temporaries \(([\d.]+)([KMGT]?)\)", message)
    if found:
        return float(found[1]) * _UNITS[found[2]]
    found = re.search(r"Used ([\d.]+)([KMGT]?) of [\d.]+[KMGT]? hbm", message)
    return max(float(found[1]) * _UNITS[found[2]] - arguments, 0.0) if found else 0.0


def _refused(kinds: Mapping[str, float], message: str) -> dict[str, Any]:
    """Of a program that has not compiled."""
    arguments = sum(kinds.values())
    temporaries = temporaries_asked_for(message, arguments)
    return {
        "bytes": dict(kinds) | {"temporaries": temporaries},
        "total_bytes": arguments + temporaries,
        "fits": False,
        "collectives": {},
        "endless_loops": 0,
        "compiler_flops": 0.0,
        "moved_bytes": 0.0,
        "intensity": 0.0,
        "estimate": None,
    }


def _compiled(compiled: Any, job: Job, chips: int, chip: Chip) -> dict[str, Any]:
    """Of one that has."""
    memory, program = compiled.memory_analysis(), Program(compiled.as_text())
    padding = memory.argument_size_in_bytes - sum(job.bytes.values())
    kinds = dict(job.bytes) | {
        "padding": max(padding, 0.0),
        "results": memory.output_size_in_bytes - memory.alias_size_in_bytes,
        "temporaries": memory.temp_size_in_bytes,
        "program": memory.generated_code_size_in_bytes,
    }
    collectives = program.collectives()
    moved = program.memory_bytes()
    flops = sum(job.model_flops.values())
    # No figure is published for a chip's part of the network between slices.
    within = [kind.sent for name, kind in collectives.items() if BETWEEN_SLICES not in name]
    times = {
        # What is computed again for a backward pass is work, if not the model's.
        "compute": (flops + job.again) / chips / chip.flops,
        "memory": moved / chip.memory_bandwidth,
        "network": sum(within) / chip.network_bandwidth,
    }
    step = max(times.values())
    total = sum(kinds.values())
    return {
        "bytes": kinds,
        "total_bytes": total,
        "fits": total <= chip.memory,
        "collectives": {name: dataclasses.asdict(kind) for name, kind in collectives.items()},
        "endless_loops": program.endless,
        "compiler_flops": compiled.cost_analysis()["flops"],
        "moved_bytes": moved,
        "intensity": flops / chips / moved,
        "estimate": times | {"step": step, "tokens_per_second_per_chip": job.tokens / step / chips},
    }
