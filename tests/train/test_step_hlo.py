"""What the compiled step of a tensor-parallel mesh holds of a vocabulary: its shards alone."""

import functools
import math
import re

import jax
import pytest

from uld_jax.config import (
    DataConfig,
    LossConfig,
    ModelConfig,
    RunConfig,
    TeacherConfig,
    TrainConfig,
)
from uld_jax.plan.abstract import abstract_step
from uld_jax.sharding import make_mesh
from uld_jax.testing import tiny_config, tiny_gemma

# Vocabularies whose sizes, and whose halves' and quarters', no other axis has.
V, U = 148, 212
ROWS, LENGTH, CHUNK, WIDTH = 8, 64, 8, 32
ARRAY = re.compile(r"\b[a-z]+\d+\[([\d,]+)\]")


PROGRAMS = {
    "untied": ((2, 2, 2), {"tied": False}),
    "accumulated": ((1, 2, 4), {"accumulation": 2}),
    "sort": ((1, 4, 2), {"method": "sort"}),
}


@functools.cache
def step_text(name):
    """The optimised program of the real train step on 8 devices."""
    shape, options = PROGRAMS[name]
    return compiled(shape, **options)


def compiled(shape, *, tied=True, method="level_set", accumulation=1):
    sizes = {"width": WIDTH, "heads": 4, "kv_heads": 4, "head_dim": 8}
    config = RunConfig(
        student=ModelConfig(max_length=LENGTH),
        teacher=TeacherConfig(max_length=LENGTH, max_new_tokens=15),
        data=DataConfig(batch_size=ROWS * accumulation),
        loss=LossConfig(chunk_size=CHUNK, method=method),
        train=TrainConfig(accumulation=accumulation),
    )
    made_of = {
        "student": tiny_config(vocab_size=V, tied=tied, **sizes),
        "teacher": tiny_gemma(vocab_size=U, **sizes),
    }
    mesh = make_mesh(*shape)
    step = abstract_step(config, made_of, mesh)
    with jax.set_mesh(mesh):
        return step.program.step.lower(*step.arguments).compile().as_text()


def arrays(text):
    """The shapes of all arrays of a program."""
    return {tuple(map(int, sizes.split(","))) for sizes in ARRAY.findall(text)}


def results(text, opcode):
    """The shapes of all arrays that instructions of a kind return."""
    found = re.findall(rf" = (.*?) {opcode}(?:-start)?\(", text)
    return {shape for result in found for shape in arrays(result)}


@pytest.mark.parametrize("name", PROGRAMS)
def test_no_array_has_a_whole_vocabulary(name):
    (_, _, tensor), _ = PROGRAMS[name]
    found = arrays(step_text(name))
    for vocabulary in (V, U):
        # The search finds what is there: parameters, and the logits of a chunk.
        shard = vocabulary // tensor
        assert [sizes for sizes in found if shard in sizes]
        assert [sizes for sizes in found if math.prod(sizes) == CHUNK * shard]
        # To sort, devices exchange shards of a chunk's rows for whole rows, of which each has some.
        most = CHUNK // tensor * vocabulary if name == "sort" else 0
        whole = [math.prod(sizes) for sizes in found if vocabulary in sizes]
        assert max(whole, default=0) == most
        # Nor has a device its rows' logits, in whatever shape, or a part of them.
        assert [sizes for sizes in found if math.prod(sizes) % (LENGTH * shard) == 0] == []


@pytest.mark.parametrize("name", PROGRAMS)
def test_gradients_of_head_and_embedding_are_summed_in_shards(name):
    (_, fsdp, tensor), _ = PROGRAMS[name]
    text = step_text(name)
    shard = (V // tensor, WIDTH // fsdp)
    assert shard in results(text, "reduce-scatter")
    summed = {sizes for sizes in results(text, "all-reduce") if {V, V // tensor} & {*sizes}}
    assert summed <= {shard}
