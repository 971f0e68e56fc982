"""Fair times on a machine that others use too: interleaved runs, medians, ratios round by round.

A round times every candidate once, in a new random order. What slows the machine down for a while
then slows all candidates of a round, and the ratio of two of them hardly moves. A timed run follows
an untimed one of the same candidate: caches, and PyTorch's threads, which go on spinning for a
while, would else be charged to whoever comes next.
"""

import contextlib
import random
import statistics
import time
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import jax
from jax.experimental.compilation_cache import compilation_cache

__all__ = [
    "OutOfMemory",
    "Program",
    "compile_program",
    "interleave",
    "median_ratio",
    "memory_errors",
    "quartiles",
    "without_compilation_cache",
]

Key = TypeVar("Key", bound=Hashable)


class OutOfMemory(Exception):
    """A candidate needs more memory than there is; the others can still be measured."""


@dataclass(frozen=True)
class Program:
    """Something to run, and what is known of it beforehand.

    Attributes:
        run: Runs it once and returns when the result is there; raises OutOfMemory.
        compile_s: Seconds from the Python function to the executable; None where none is made.
        temp_bytes: Bytes held at the peak besides inputs and results; None where unknown.
    """

    run: Callable[[], object]
    compile_s: float | None
    temp_bytes: int | None


def compile_program(function: Callable[..., Any], *arguments: jax.Array) -> Program:
    """Compile a JAX function for its arguments.

    The bytes are those that XLA plans for the executable; a kernel that allocates for itself, as
    the merge buffer of a stable sort on CPU, is not seen.

    Args:
        function: of arrays, returning arrays.
        *arguments: what it is always called with.

    Returns:
        The program.

    Raises:
        OutOfMemory: it cannot be compiled for the memory of the device.

    Example:
        >>> import jax.numpy as jnp
        >>> program = compile_program(jnp.sort, jnp.arange(3.0))
        >>> program.run()
        >>> program.compile_s > 0
        True
    """
    start = time.perf_counter()
    with memory_errors():
        executable = jax.jit(function).lower(*arguments).compile()
    compile_s = time.perf_counter() - start
    # Where a backend has no analysis it gives None.
    memory = executable.memory_analysis()

    def run() -> None:
        with memory_errors():
            jax.block_until_ready(executable(*arguments))

    return Program(run, compile_s, memory.temp_size_in_bytes if memory else None)


@contextlib.contextmanager
def memory_errors() -> Iterator[None]:
    """Inside, JAX's error for want of memory, and no other, becomes OutOfMemory.

    Yields:
        Nothing.

    Raises:
        OutOfMemory: there is too little.

    Example:
        >>> with memory_errors():
        ...     raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory.")
        Traceback (most recent call last):
        ...
        uld_jax.benchmark.timing.OutOfMemory: RESOURCE_EXHAUSTED: Out of memory.
    """
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        raise OutOfMemory(str(error).splitlines()[0]) from error


@contextlib.contextmanager
def without_compilation_cache() -> Iterator[None]:
    """Inside, a program is compiled even where an earlier process has left it on the disk.

    Yields:
        Nothing.

    Example:
        >>> with without_compilation_cache():
        ...     jax.config.values["jax_enable_compilation_cache"]
        False
    """
    before = jax.config.values["jax_enable_compilation_cache"]
    jax.config.update("jax_enable_compilation_cache", False)
    # JAX decides once a process whether it uses the cache, and keeps to that until a reset.
    compilation_cache.reset_cache()
    try:
        yield
    finally:
        jax.config.update("jax_enable_compilation_cache", before)
        compilation_cache.reset_cache()


def interleave(
    runs: Mapping[Key, Callable[[], object]],
    rounds: int,
    *,
    seed: int = 0,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[Key, list[float]]:
    """Seconds of every candidate in every round, each after a run that is not timed.

    Args:
        runs: by name, what to time; it returns when its work is done.
        rounds: how many times each is timed.
        seed: of the order in which a round runs them.
        clock: tells the time in seconds.

    Returns:
        By name, one time a round; none where the candidate ran out of memory in any round.

    Example:
        >>> ticks = iter(range(100))
        >>> interleave({"a": list, "b": dict}, 2, clock=lambda: next(ticks))
        {'a': [1, 1], 'b': [1, 1]}
    """
    order = list(runs)
    seconds: dict[Key, list[float]] = {name: [] for name in runs}
    shuffle = random.Random(seed).shuffle
    for _ in range(rounds):
        shuffle(order)
        for name in list(order):
            try:
                runs[name]()
                start = clock()
                runs[name]()
            except OutOfMemory:
                order.remove(name)
                seconds[name].clear()
            else:
                seconds[name].append(clock() - start)
    return seconds


def quartiles(values: Sequence[float]) -> tuple[float, float, float]:
    """The lower quartile, the median and the upper quartile.

    Args:
        values: at least one.

    Returns:
        The three, interpolated between neighbours.

    Example:
        >>> quartiles([5.0, 1.0, 2.0, 4.0, 3.0])
        (2.0, 3.0, 4.0)
    """
    if len(values) == 1:
        return values[0], values[0], values[0]
    lower, median, upper = statistics.quantiles(values, n=4, method="inclusive")
    return lower, median, upper


def median_ratio(numerators: Sequence[float], denominators: Sequence[float]) -> float | None:
    """The median over rounds of one candidate's time over another's of the same round.

    Args:
        numerators: one time a round.
        denominators: of the same rounds.

    Returns:
        The ratio; None where either is empty, as after it ran out of memory.

    Example:
        >>> median_ratio([2.0, 9.0, 4.0], [1.0, 3.0, 2.0])
        2.0
    """
    if not numerators or not denominators:
        return None
    return statistics.median(n / d for n, d in zip(numerators, denominators, strict=True))
