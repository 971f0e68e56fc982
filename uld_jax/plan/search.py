"""The largest batch that fits, and the best mesh: by compiling one after another."""

import dataclasses
from collections.abc import Callable, Iterator, Sequence

from uld_jax.config import MeshConfig, RunConfig
from uld_jax.errors import UserError
from uld_jax.plan.abstract import ModelConfig
from uld_jax.plan.measure import Plan

Planner = Callable[[RunConfig], Plan]


def largest_batch(config: RunConfig, unit: int, plan: Planner) -> list[Plan]:
    """Tries batch sizes: twice as many while they fit, then halves what is between.

    Args:
        config: The run; where to begin is its batch size.
        unit: Batch sizes are multiples of it.
        plan: Compiles a step.

    Returns:
        The plans made, of which the largest that fits has the largest batch; none may.
    """
    tried: dict[int, Plan] = {}

    def fits(units: int) -> bool:
        if units not in tried:
            data = dataclasses.replace(config.data, batch_size=units * unit)
            tried[units] = plan(dataclasses.replace(config, data=data))
        return tried[units].fits

    good, bad = 0, max(config.data.batch_size // unit, 1)
    while fits(bad):
        good, bad = bad, 2 * bad
    while bad - good > 1:
        middle = (good + bad) // 2
        good, bad = (middle, bad) if fits(middle) else (good, middle)
    return [tried[units] for units in sorted(tried)]


def meshes(chips: int, sequence: int = 1, slices: int = 1) -> Iterator[MeshConfig]:
    """Every way to have `chips` = data · fsdp · tensor · sequence.

    Args:
        chips: To be laid out.
        sequence: The size of that axis, which rows of one length need or do not.
        slices: That the data axis spans.

    Yields:
        A mesh.

    Example:
        >>> len(list(meshes(4)))
        6
    """
    for tensor in _divisors(chips // sequence):
        for fsdp in _divisors(chips // sequence // tensor):
            data = chips // sequence // tensor // fsdp
            if data % slices == 0:
                yield MeshConfig(data, fsdp, tensor, sequence, slices)


def sweep(
    config: RunConfig,
    made_of: Sequence[ModelConfig],
    chips: int,
    plan: Planner,
) -> tuple[list[Plan], list[str]]:
    """Plans every mesh of the chips whose axes divide heads, arrays and batch.

    The sequence axis and the slices are the config's.

    Args:
        config: The run.
        made_of: Its models.
        chips: To be laid out.
        plan: Compiles a step.

    Returns:
        The plans, those that fit first and the fastest first by the estimate; and a line for each
        mesh that was left out, with the reason.
    """
    plans, left_out = [], []
    for mesh in meshes(chips, config.mesh.sequence, config.mesh.slices):
        try:
            _check(config, made_of, mesh)
            plans.append(plan(dataclasses.replace(config, mesh=mesh)))
        except UserError as error:
            left_out.append(f"{mesh}: {error}")
    return sorted(plans, key=_rank), left_out


def _check(config: RunConfig, made_of: Sequence[ModelConfig], mesh: MeshConfig) -> None:
    heads = [model.heads for model in made_of if model.heads % mesh.tensor]
    if heads:
        raise UserError(f"{heads[0]} heads are not divisible by {mesh.tensor}")
    parts = config.train.accumulation * mesh.data * mesh.fsdp
    if config.data.batch_size % parts:
        raise UserError(f"data.batch_size {config.data.batch_size} is not divisible by {parts}")


def _rank(plan: Plan) -> tuple[bool, float]:
    return not plan.fits, plan.estimate["step"] if plan.estimate else plan.total_bytes


def _divisors(number: int) -> list[int]:
    return [part for part in range(1, number + 1) if number % part == 0]
