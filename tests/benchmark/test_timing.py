"""Interleaving, ratios and memory: the measurement itself is measured here with a fake clock."""

import jax
import jax.numpy as jnp
import pytest
from jax.experimental.compilation_cache import compilation_cache

from uld_jax.benchmark.timing import (
    OutOfMemory,
    compile_program,
    interleave,
    median_ratio,
    memory_errors,
    quartiles,
    without_compilation_cache,
)


class Machine:
    """A clock that only runs move on, and what has run on it in which order."""

    def __init__(self):
        self.now, self.log = 0.0, []

    def run(self, name, *durations):
        left = list(durations)

        def run():
            self.log.append(name)
            self.now += left.pop(0) if len(left) > 1 else left[0]

        return run

    def measure(self, runs, rounds, seed=0):
        return interleave(runs, rounds, seed=seed, clock=lambda: self.now)


def test_a_round_times_every_candidate_once_each_after_an_untimed_run():
    machine = Machine()
    runs = {
        "a": machine.run("a", 100.0, 1.0, 100.0, 2.0, 100.0, 3.0),
        "b": machine.run("b", 50.0, 7.0, 50.0, 7.0, 50.0, 7.0),
    }
    assert machine.measure(runs, 3) == {"a": [1.0, 2.0, 3.0], "b": [7.0, 7.0, 7.0]}
    assert len(machine.log) == 12
    assert machine.log[::2] == machine.log[1::2]
    assert all(set(machine.log[i : i + 4]) == {"a", "b"} for i in range(0, 12, 4))


def test_the_order_changes_from_round_to_round_and_follows_the_seed():
    orders = []
    for seed in (0, 0, 1):
        machine = Machine()
        machine.measure({name: machine.run(name, 1.0) for name in "abcd"}, 60, seed=seed)
        orders.append(["".join(machine.log[i : i + 8 : 2]) for i in range(0, 480, 8)])
    assert orders[0] == orders[1] != orders[2]
    assert len(set(orders[0])) > 10
    # Nobody owns a place in the round.
    assert all({order[place] for order in orders[0]} == set("abcd") for place in range(4))


@pytest.mark.parametrize("good_runs", [0, 2])
def test_a_candidate_without_memory_is_dropped_and_the_others_go_on(good_runs):
    machine = Machine()
    attempts = []

    def greedy():
        attempts.append(1)
        if len(attempts) > good_runs:
            raise OutOfMemory("too large")

    times = machine.measure({"a": machine.run("a", 2.0), "greedy": greedy}, 4)
    assert times == {"a": [2.0] * 4, "greedy": []}
    assert len(attempts) == good_runs + 1


def test_other_errors_are_not_swallowed():
    def broken():
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        interleave({"broken": broken}, 1)


def test_only_want_of_memory_is_translated():
    with pytest.raises(OutOfMemory, match="Out of memory allocating"), memory_errors():
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 9 bytes")
    with pytest.raises(jax.errors.JaxRuntimeError, match="INTERNAL"), memory_errors():
        raise jax.errors.JaxRuntimeError("INTERNAL: something else")


def test_ratio_is_taken_round_by_round():
    # The ratio of the medians would be 2; one slow round slows both.
    assert median_ratio([4.0, 40.0, 4.0], [1.0, 10.0, 2.0]) == 4.0
    assert median_ratio([], [1.0]) is None
    assert median_ratio([1.0], []) is None


def test_quartiles_of_few():
    assert quartiles([3.0]) == (3.0, 3.0, 3.0)
    assert quartiles([1.0, 2.0]) == (1.25, 1.5, 1.75)


def test_temporary_bytes_are_those_of_the_executable():
    def sums(x):
        return jnp.sort(x).cumsum()

    small, large = (compile_program(sums, jnp.ones(n)) for n in (1_000, 4_000))
    assert small.temp_bytes >= 4_000
    assert 16_000 <= large.temp_bytes < 64_000


@pytest.fixture
def cache(tmp_path):
    """An empty cache of compiled programs that keeps even what was compiled in no time."""
    settings = {
        "jax_compilation_cache_dir": str(tmp_path / "cache"),
        "jax_persistent_cache_min_compile_time_secs": 0.0,
    }
    before = {name: jax.config.values[name] for name in settings}
    for values in (settings, before):
        for name, value in values.items():
            jax.config.update(name, value)
        compilation_cache.reset_cache()
        if values is settings:
            yield tmp_path / "cache"


def test_the_cache_on_disk_is_out_of_use_inside_and_in_use_again_after(cache):
    with without_compilation_cache():
        compile_program(jnp.sin, jnp.ones(3))
    assert not list(cache.glob("*"))
    compile_program(jnp.cos, jnp.ones(3))
    assert list(cache.glob("*"))
