"""The search over batches and meshes, with a memory model in place of the compiler's minutes."""

import pytest

from uld_jax.config import DataConfig, MeshConfig, RunConfig
from uld_jax.errors import UserError
from uld_jax.plan import Plan, largest_batch, sweep, table, to_json
from uld_jax.testing import tiny_config

GIB = 2**30


class Machine:
    """Has room for so many rows a chip; a row takes a second, shared by the chips."""

    def __init__(self, rows):
        self.rows = rows
        self.compiled = []

    def plan(self, config):
        mesh = config.mesh.axes
        batch = config.data.batch_size
        self.compiled.append(batch)
        on_chip = batch / (mesh["data"] * mesh["fsdp"])
        if mesh["tensor"] == 4:
            raise UserError("embed: axis 'vocab' has size 66")
        fits = on_chip <= self.rows
        seconds = batch / mesh["data"]
        return Plan(
            program="train step",
            topology="v5e:2x2",
            chips=4,
            mesh=mesh,
            batch_size=batch,
            micro_batches=1,
            row_length=128,
            answer_positions=64,
            bytes={
                "student parameters": 1.0,
                "teacher parameters": 2.0,
                "optimizer state": 4.0,
                "temporaries": on_chip,
            },
            total_bytes=on_chip * GIB,
            memory_bytes=16 * GIB,
            fits=fits,
            collectives={},
            endless_loops=0,
            model_flops={"student": 1.0, "teacher": 1.0},
            compiler_flops=1.0,
            moved_bytes=1.0,
            intensity=1.0,
            compile_seconds=1.0,
            estimate={"step": seconds, "tokens_per_second_per_chip": 32 / seconds}
            if fits
            else None,
        )


def config_of(batch_size):
    return RunConfig(data=DataConfig(batch_size=batch_size), mesh=MeshConfig(2, 2, 1))


@pytest.mark.parametrize(("rows", "begin"), [(5, 4), (5, 400), (1, 4), (8, 16), (63, 24)])
def test_the_largest_batch_that_fits_is_found(rows, begin):
    machine = Machine(rows)
    plans = largest_batch(config_of(begin), 4, machine.plan)
    assert max(plan.batch_size for plan in plans if plan.fits) == 4 * rows
    # The next larger one has been tried, and nothing twice.
    assert not next(plan for plan in plans if plan.batch_size == 4 * (rows + 1)).fits
    assert len(machine.compiled) == len(set(machine.compiled)) == len(plans)
    assert all(batch % 4 == 0 for batch in machine.compiled)


def test_no_batch_may_fit():
    plans = largest_batch(config_of(16), 4, Machine(0).plan)
    assert not any(plan.fits for plan in plans)
    assert plans[0].batch_size == 4


def test_meshes_are_ranked_and_reasons_given():
    machine = Machine(4)
    plans, left_out = sweep(config_of(8), [tiny_config(heads=8)], 4, machine.plan)
    # Four rows on a chip fit where the batch has two shards or more: all but none here.
    assert [tuple(plan.mesh.values()) for plan in plans] == [
        (4, 1, 1, 1),
        (2, 2, 1, 1),
        (2, 1, 1, 2),
        (1, 4, 1, 1),
        (1, 2, 1, 2),
    ]
    plans, left_out = sweep(config_of(16), [tiny_config(heads=8)], 4, machine.plan)
    assert [plan.fits for plan in plans] == [True, True, True, False, False]
    assert left_out == ["data 1 x fsdp 1 x sequence 1 x tensor 4: embed: axis 'vocab' has size 66"]
    text = table(plans)
    assert len(text) == len(plans) + 2
    assert len({len(line) for line in text}) == 1
    for plan, line in zip(plans, text[2:], strict=True):
        assert f"fsdp {to_json(plan)['mesh']['fsdp']}" in line
        assert ("| yes" in line) == plan.fits


def test_the_sequence_axis_and_the_slices_are_the_configs():
    mesh = MeshConfig(sequence=2, slices=2)
    config = RunConfig(data=DataConfig(batch_size=8), mesh=mesh)
    plans, left_out = sweep(config, [tiny_config(heads=8)], 8, Machine(4).plan)
    assert sorted(tuple(plan.mesh.values()) for plan in plans) == [
        (2, 1, 2, 2),
        (2, 2, 2, 1),
        (4, 1, 2, 1),
    ]
    assert left_out == []


def test_heads_and_rows_must_divide():
    plans, left_out = sweep(config_of(6), [tiny_config(heads=3)], 4, Machine(9).plan)
    assert plans == []
    assert sum("3 heads are not divisible" in line for line in left_out) == 3
    assert sum("batch_size 6 is not divisible by 4" in line for line in left_out) == 3
