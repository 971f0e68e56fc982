"""The split of a step's time, and of its arithmetic."""

import itertools

import jax
import pytest

from uld_jax.sharding import make_mesh
from uld_jax.testing import tiny_config, tiny_gemma, toy_batch
from uld_jax.train import to_mesh
from uld_jax.train.clock import Clock
from uld_jax.train.cost import memory_peak, step_flops, utilisation


def test_parts_and_the_rest_are_the_whole():
    moments = itertools.accumulate([0, 1, 2, 4, 8, 16])
    clock = Clock(lambda: float(next(moments)))
    with clock.spent_on("input"):  # from 1 to 3
        pass
    with clock.spent_on("host"):  # from 7 to 15
        pass
    found = clock.lap(steps=2)  # at 31
    expected = {"seconds": 31, "input_seconds": 2, "host_seconds": 8, "device_seconds": 21}
    assert found == {name: seconds / 2 for name, seconds in expected.items()}


def test_a_lap_begins_where_the_last_one_ended():
    moments = itertools.accumulate([0, 1, 1, 1, 1, 1, 1])
    clock = Clock(lambda: float(next(moments)))
    with clock.spent_on("input"):
        pass
    clock.lap(steps=1)
    expected = {"seconds": 1, "input_seconds": 0, "device_seconds": 1}
    assert clock.lap(steps=1) == expected


def test_what_fails_counts_too():
    moments = itertools.accumulate([0, 1, 1, 1])
    clock = Clock(lambda: float(next(moments)))
    with pytest.raises(ValueError, match="bad batch"), clock.spent_on("input"):
        raise ValueError("bad batch")
    assert clock.lap(steps=1)["input_seconds"] == 1


def test_whose_arithmetic_a_step_is():
    mesh = make_mesh(1, 1, 1, devices=jax.devices()[:1])
    batch = to_mesh(toy_batch(rows=8, micro_batches=2), mesh)
    whole = step_flops(batch, tiny_config(), [tiny_gemma()])
    assert step_flops(batch, tiny_config(), [None]).teacher_share == 0
    assert 0 < whole.teacher_share < 1
    fewer = step_flops(batch, tiny_config(), [tiny_gemma()], adapters=True)
    assert fewer.student == whole.student * 2 / 3
    assert fewer.teacher == whole.teacher
    one = step_flops(to_mesh(toy_batch(rows=8), mesh), tiny_config(), [tiny_gemma()])
    assert one == whole


def test_a_device_whose_peak_is_not_known_has_no_utilisation():
    assert utilisation(1e12, 1.0, jax.devices()) is None
    assert memory_peak(jax.local_devices()) is None


class H100:
    device_kind = "NVIDIA H100 80GB HBM3"


def test_the_part_of_the_peak_that_is_used():
    found = utilisation(989e12, 2.0, [H100(), H100()])  # pyright: ignore[reportArgumentType]
    assert found == pytest.approx(0.25)
