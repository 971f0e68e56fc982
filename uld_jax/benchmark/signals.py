"""Steps from a teacher's stored signals beside steps with it: loss, gradient and time."""

import functools
import time
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from uld_jax.benchmark.report import Sheet
from uld_jax.benchmark.timing import median_ratio, quartiles
from uld_jax.config import RunConfig
from uld_jax.data import Loader
from uld_jax.models import Decoder
from uld_jax.train import Program, TrainState, make_program, to_mesh
from uld_jax.types import Batch

__all__ = ["measure_signals", "signals_sheets"]

ONLINE, CACHED = "online", "cache"


def measure_signals(
    student: Decoder,
    teachers: Sequence[Decoder],
    loaders: tuple[Loader, Loader],
    config: RunConfig,
    *,
    mesh: Mesh,
    batches: int,
) -> dict[str, Any]:
    """Takes a train step on each of the first batches both ways, each from the untrained student.

    Args:
        student: Its arrays are given up.
        teachers: The models whose signals are stored.
        loaders: The batches of tokens, and the same batches of signals.
        config: The run.
        mesh: The device mesh.
        batches: How many, of each loader.

    Returns:
        "batches": of each "uld" and "uld_cache", "error" (of `loss.uld_weight` · ULD), "bound" on
        it, the "cosine" of the gradients, and seconds of a step by way, after an untimed one;
        "seconds" and "tokens" by way; "ratio", the median of online over cache, batch by batch.
    """
    make = functools.partial(make_program, student, config=config, steps=batches, mesh=mesh)
    program, params = make(teachers)
    programs = {ONLINE: program, CACHED: make([None for _ in teachers])[0]}
    state = jax.jit(program.fresh, out_shardings=program.shardings)(params)
    rows = []
    with jax.set_mesh(mesh):
        for number in range(batches):
            found = {
                way: _timed(
                    programs[way], state, to_mesh(loader.collate(number, loader.rows(number)), mesh)
                )
                for way, loader in zip(programs, loaders, strict=True)
            }
            rows.append(_compare(found[ONLINE], found[CACHED], config.loss.uld_weight))
    seconds = {way: [row["seconds"][way] for row in rows] for way in programs}
    return {
        "batches": rows,
        "seconds": {way: quartiles(times)[1] for way, times in seconds.items()},
        "tokens": {way: sum(row["tokens"][way] for row in rows) for way in programs},
        "ratio": median_ratio(seconds[ONLINE], seconds[CACHED]),
    }


class _Step(NamedTuple):
    gradient: Any
    metrics: Mapping[str, Any]
    seconds: float

    @property
    def tokens(self) -> int:
        """That were read, by the student and by its teachers."""
        return int(self.metrics["student_tokens"] + self.metrics["teacher_tokens"])


def _timed(program: Program, state: TrainState, batch: Batch) -> _Step:
    """The second of two equal steps: the first compiles, and fills the processor's caches."""
    for _ in range(2):
        given = jax.block_until_ready(jax.tree.map(jnp.copy, state))
        start = time.perf_counter()
        given = given, program.teacher_params, batch, program.frozen
        after, metrics = jax.block_until_ready(program.step(*given))
        seconds = time.perf_counter() - start
    # After one step the first moment is the gradient, scaled.
    gradient = optax.tree.get(after.opt_state, "mu")
    return _Step(gradient, jax.device_get(metrics), seconds)


def _compare(online: _Step, cached: _Step, weight: float) -> dict[str, Any]:
    distances = {"uld": online.metrics["uld"].item(), "uld_cache": cached.metrics["uld"].item()}
    return distances | {
        "error": weight * abs(distances["uld"] - distances["uld_cache"]),
        "bound": weight * cached.metrics["uld_error"].item(),
        "cosine": float(_cosine(online.gradient, cached.gradient)),
        "seconds": {ONLINE: online.seconds, CACHED: cached.seconds},
        "tokens": {ONLINE: online.tokens, CACHED: cached.tokens},
    }


@jax.jit
def _cosine(left: Any, right: Any) -> jax.Array:
    inner = optax.tree.vdot(left, right)
    return jnp.asarray(inner / (optax.tree.norm(left) * optax.tree.norm(right)))


def signals_sheets(cases: Sequence[Mapping[str, Any]]) -> list[Sheet]:
    """A sheet of the batches and one of the caches, for each case.

    Args:
        cases: As `measure_signals` returns them, with "caches", their manifests' figures.

    Returns:
        The sheets; the last row of the batches has the largest error and bound, the smallest
        cosine, the median seconds, and online over cache as the median of the batches' ratios.
    """
    sheets = []
    for case in cases:
        rows = [
            [
                str(number),
                f"{row['uld']:.5f}",
                f"{row['uld_cache']:.5f}",
                f"{row['error']:.2g}",
                f"{row['bound']:.2g}",
                f"{row['cosine']:.6f}",
                *(f"{row['seconds'][way]:.2f}" for way in (ONLINE, CACHED)),
                f"{row['seconds'][ONLINE] / row['seconds'][CACHED]:.2f}",
            ]
            for number, row in enumerate(case["batches"])
        ]
        batches = case["batches"]
        rows.append(
            [
                "all",
                "",
                "",
                f"{max(row['error'] for row in batches):.2g}",
                f"{max(row['bound'] for row in batches):.2g}",
                f"{min(row['cosine'] for row in batches):.6f}",
                *(f"{case['seconds'][way]:.2f}" for way in (ONLINE, CACHED)),
                f"{case['ratio']:.2f}",
            ]
        )
        headings = ("batch", "ULD", "from cache", "λ·|Δ|", "bound", "cosine of gradients")
        times = ("s / step online", "s / step cache", "×")
        sheets.append(Sheet("steps with the teacher and from its cache", headings + times, rows))
        kept = [
            [
                f"{cache['epsilon']:g}",
                f"{cache['positions']:,}",
                f"{cache['mean_count']:,.1f}",
                f"{cache['record_bytes'] / cache['positions']:.1f}",
                f"{cache['bytes'] / cache['positions']:.1f}",
                f"{cache['mean_error']:.2g}",
            ]
            for cache in case["caches"]
        ]
        sizes = ("bytes / position", "with padding of files", "mean certified error")
        title = "caches"
        sheets.append(Sheet(title, ("epsilon", "positions", "mean count", *sizes), kept))
    return sheets
