"""Every way to compute the distance, over vocabularies and numbers of positions."""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from uld_jax.benchmark import pytorch
from uld_jax.benchmark.timing import (
    OutOfMemory,
    Program,
    compile_program,
    interleave,
    median_ratio,
    memory_errors,
    quartiles,
)
from uld_jax.losses import reference_uld, uld
from uld_jax.losses.uld import METHODS

__all__ = [
    "BASELINES",
    "CASES",
    "LOGITS",
    "PASSES",
    "TORCH",
    "Case",
    "candidates",
    "measure",
    "random_logits",
    "runs_of",
    "softmax_floor",
    "summary",
]

PASSES = ("forward", "forward_backward")
BASELINES = ("pytorch", "jnp.sort")
LOGITS = ("normal", "peaked")
# Where another process takes a core, torch's threads wait for each other, spinning, up to 40 times
# as long as one thread needs for all of the work: in each round the faster of the two counts.
TORCH = ("pytorch", "pytorch_1")
Distance = Callable[[jax.Array, jax.Array], jax.Array]


@dataclass(frozen=True)
class Case:
    """One size: V, U and N."""

    student_vocab: int
    teacher_vocab: int
    positions: int


CASES = tuple(
    Case(v, u, n)
    for v, u in ((32_000, 32_000), (49_152, 262_144), (151_936, 151_936))
    for n in (1, 8, 32)
)


def candidates() -> dict[str, Distance | None]:
    """What can be measured, by name: [N, V], [N, U] -> [N], or None for PyTorch's.

    Returns:
        The methods of `losses.uld`; "jnp.sort", the definition with JAX's own derivatives;
        "softmax", the floor; "pytorch", the paper's code, and "pytorch_1", the same with one
        thread.

    Example:
        >>> [name for name in candidates() if name not in METHODS]
        ['jnp.sort', 'softmax', 'pytorch', 'pytorch_1']
    """
    ours: dict[str, Distance | None] = {m: partial(uld, method=m) for m in METHODS}
    return ours | {"jnp.sort": reference_uld, "softmax": softmax_floor} | dict.fromkeys(TORCH)


def softmax_floor(student_NV: jax.Array, teacher_NU: jax.Array) -> jax.Array:
    """What every method has to do at least: both softmaxes, each read once, and a gradient.

    Σ_v |q_v − 1/V| + Σ_u |p_u − 1/U|, whose gradient is a sign by q_v like that of the distance.

    Args:
        student_NV: f32 logits.
        teacher_NU: f32 logits.

    Returns:
        f32[N].

    Example:
        >>> round(float(softmax_floor(jnp.zeros((1, 4)), jnp.zeros((1, 8)))[0]), 4)
        0.0
    """
    sides = (jax.nn.softmax(x) for x in (student_NV, jax.lax.stop_gradient(teacher_NU)))
    q, p = (jnp.abs(x - 1 / x.shape[-1]).sum(-1) for x in sides)
    return q + p


def random_logits(case: Case, *, kind: str, seed: int) -> tuple[jax.Array, jax.Array]:
    """Logits of both sides, drawn on the device.

    Args:
        case: the sizes.
        kind: "normal", N(0, 2²); or "peaked", −1.5 ln(rank) + N(0, ½²) with the ranks in random
            order, so that p ∝ rank^−1.5 roughly and few tokens hold most of the mass, as a
            language model's next token.
        seed: of the draw.

    Returns:
        (f32[N, V], f32[N, U]).

    Example:
        >>> [x.shape for x in random_logits(Case(3, 5, 2), kind="peaked", seed=0)]
        [(2, 3), (2, 5)]
    """

    def side(key: jax.Array, width: int) -> jax.Array:
        noise = jax.random.normal(key, (case.positions, width))
        if kind == "normal":
            return 2 * noise
        falling = jnp.broadcast_to(-1.5 * jnp.log(jnp.arange(1, width + 1)), noise.shape)
        mixed = jax.random.permutation(jax.random.fold_in(key, 1), falling, -1, independent=True)
        return mixed + noise / 2

    student, teacher = jax.random.split(jax.random.key(seed))
    return side(student, case.student_vocab), side(teacher, case.teacher_vocab)


def measure(
    case: Case, names: Sequence[str], *, kind: str, seed: int, repeats: int
) -> dict[str, Any]:
    """Time and memory of the named candidates at one size, all on the same logits.

    Args:
        case: the size.
        names: of `candidates`.
        kind: of `random_logits`.
        seed: of the logits and of the order of the runs.
        repeats: rounds.

    Returns:
        The size; "candidates", by name: by pass what `summary` gives, and by pass and baseline
        "speedup", the median over rounds of the baseline's time over the candidate's, PyTorch's
        being the faster of its two;
        "device_peak_bytes", the most that the device has held since the process began, or None.
    """
    programs: dict[tuple[str, str], Program | None] = {(n, p): None for n in names for p in PASSES}
    with contextlib.suppress(OutOfMemory), memory_errors():
        logits = jax.block_until_ready(random_logits(case, kind=kind, seed=seed))
        for name in names:
            distance = candidates()[name]
            found = runs_of(distance, *logits) if distance else _torch_programs(name, logits)
            programs |= {(name, which): program for which, program in found}
    possible = {key: program.run for key, program in programs.items() if program is not None}
    seconds = interleave(possible, repeats, seed=seed)

    torch = {p: [s for name in TORCH if (s := seconds.get((name, p)))] for p in PASSES}
    baselines = {
        ("pytorch", p): [min(times) for times in zip(*torch[p], strict=True)] for p in PASSES
    }
    baselines |= {("jnp.sort", p): seconds.get(("jnp.sort", p), []) for p in PASSES}

    def result(name: str) -> dict[str, Any]:
        own = {which: seconds.get((name, which), []) for which in PASSES}
        passes = {
            which: summary(programs[name, which], own[which], case.positions) for which in PASSES
        }
        speedup = {
            which: {b: median_ratio(baselines[b, which], own[which]) for b in BASELINES}
            for which in PASSES
        }
        return passes | {"speedup": speedup}

    held = jax.local_devices()[0].memory_stats()
    return {
        "student_vocab": case.student_vocab,
        "teacher_vocab": case.teacher_vocab,
        "positions": case.positions,
        "candidates": {name: result(name) for name in names},
        "device_peak_bytes": held.get("peak_bytes_in_use") if held else None,
    }


def runs_of(
    distance: Distance, student_NV: jax.Array, teacher_NU: jax.Array
) -> Iterator[tuple[str, Program | None]]:
    """Compile the value alone, and the mean with its gradient by the student's logits.

    Args:
        distance: [N, V], [N, U] -> [N].
        student_NV: f32 logits.
        teacher_NU: f32 logits.

    Yields:
        A pass and its program, or None where that does not fit into memory.
    """

    def mean(student: jax.Array, teacher: jax.Array) -> jax.Array:
        return distance(student, teacher).mean()

    for which, function in zip(PASSES, (mean, jax.value_and_grad(mean)), strict=True):
        try:
            yield which, compile_program(function, student_NV, teacher_NU)
        except OutOfMemory:
            yield which, None


def _torch_programs(
    name: str, logits: tuple[jax.Array, jax.Array]
) -> Iterator[tuple[str, Program]]:
    torch = pytorch.find_torch()
    assert torch is not None
    device = pytorch.device_of(torch, jax.default_backend())
    arrays = [np.asarray(x) for x in logits]
    threads = 1 if name == "pytorch_1" else pytorch.all_threads(torch)

    def guarded(run: Callable[[], object]) -> None:
        torch.set_num_threads(threads)
        try:
            run()
        except RuntimeError as error:
            # The CPU's allocator has no exception of its own.
            if isinstance(error, torch.OutOfMemoryError) or "DefaultCPUAllocator" in str(error):
                raise OutOfMemory(str(error)) from error
            raise

    held = pytorch.temp_bytes(torch, device, *(array.shape for array in arrays))
    for which in PASSES:
        run = getattr(pytorch, which)(torch, device, *arrays)
        yield which, Program(partial(guarded, run), None, held.get(which))


def summary(program: Program | None, seconds: Sequence[float], positions: int) -> dict[str, Any]:
    """One candidate's one pass, as the JSON file has it.

    Args:
        program: what ran; None where it did not fit into memory.
        seconds: one a round; none where it ran out of memory.
        positions: N.

    Returns:
        "status": "ok" or "out of memory"; and if ok "median_ms", "lower_ms" and "upper_ms", median
        and quartiles in milliseconds a position, "seconds", "compile_s" and "temp_bytes".

    Example:
        >>> result = summary(Program(list, None, 64), [0.004, 0.002, 0.008], positions=2)
        >>> result["median_ms"], result["temp_bytes"]
        (2.0, 64)
    """
    if program is None or not seconds:
        return {"status": "out of memory"}
    lower, median, upper = (1e3 * x / positions for x in quartiles(seconds))
    return {
        "status": "ok",
        "median_ms": median,
        "lower_ms": lower,
        "upper_ms": upper,
        "seconds": list(seconds),
        "compile_s": program.compile_s,
        "temp_bytes": program.temp_bytes,
    }
