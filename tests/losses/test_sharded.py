"""Vocabularies sharded over 8 devices against one device, and what the compiled program gathers."""

import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from uld_jax.losses import (
    HeadTeacher,
    SortedTeacher,
    cross_entropy,
    fused_teachers_cross_entropy,
    reference_uld,
    sharded_uld,
    sharded_uld_cross_entropy,
    sorted_probabilities,
    uld,
)

METHODS = ["sort", "level_set"]
MESHES = [((1, 8), None), ((2, 4), "data"), ((8, 1), "data")]


def make_mesh(shape):
    return jax.make_mesh(shape, ("data", "tensor"), axis_types=(AxisType.Auto,) * 2)


def random_logits(shape, seed, scale=2.0):
    return jnp.asarray(np.random.default_rng(seed).normal(0, scale, shape), jnp.float32)


def fused_inputs(batch, count, student_vocab, teacher_vocab, seed=0):
    rng = np.random.default_rng(seed)
    arrays = {
        "student_hidden": rng.normal(0, 2, (batch, count, 6)),
        "student_head": rng.normal(0, 1, (student_vocab, 6)),
        "ce_weights": rng.uniform(size=(batch, count)),
    }
    hidden, head, weights = (
        rng.normal(0, 2, (batch, count, 4)),
        rng.normal(0, 1, (teacher_vocab, 4)),
        rng.uniform(size=(batch, count)),
    )
    arrays["teachers"] = [HeadTeacher(hidden, head, weights, temperature=0.8, softcap=4.0)]
    arrays = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), arrays)
    targets = jnp.asarray(rng.integers(0, student_vocab, (batch, count)))
    return {**arrays, "targets": targets}


def with_signals(arrays, known):
    """The same teacher as a signal too: whole, and its first `known` probabilities."""
    (teacher,) = arrays["teachers"]
    logits = 4 * jnp.tanh(teacher.hidden @ teacher.head.T / 4)
    probs = sorted_probabilities(logits, 0.8)
    cut = SortedTeacher(probs[..., :known], 0.5 * teacher.weights, probs[..., known:].sum(-1))
    return {**arrays, "teachers": [teacher, SortedTeacher(probs, teacher.weights), cut]}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(("shape", "batch_axes"), MESHES[:2])
@pytest.mark.parametrize(("student_width", "teacher_width"), [(40, 64), (51, 29)])
def test_value_and_gradient_equal_one_device(
    method, shape, batch_axes, student_width, teacher_width
):
    student, teacher = (
        random_logits((4, 3, student_width), 1),
        random_logits((4, 3, teacher_width), 2),
    )
    student = student.at[0, 0, 3:].set(-jnp.inf)
    weights = random_logits((4, 3), 3)
    options = {"student_temperature": 1.5, "teacher_temperature": 0.7, "method": method}
    mesh = make_mesh(shape)

    @jax.jit
    def compute(student, teacher):
        def total(distance, student):
            values = distance(student, teacher, **options)
            return (weights * values).sum(), values

        over_shards = partial(sharded_uld, mesh=mesh, batch_axes=batch_axes)
        return [
            jax.value_and_grad(partial(total, distance), has_aux=True)(student)
            for distance in (over_shards, uld)
        ]

    ((_, values), gradient), ((_, expected), expected_gradient) = compute(student, teacher)
    assert values.shape == (4, 3)
    np.testing.assert_allclose(values, expected, atol=1e-5)
    np.testing.assert_allclose(gradient, expected_gradient, atol=1e-5)
    exact = reference_uld(student, teacher, student_temperature=1.5, teacher_temperature=0.7)
    np.testing.assert_allclose(values, exact, atol=1e-5 if method == "sort" else 5e-3)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    ("shape", "batch_axes", "embed_axis"),
    [*((*mesh, None) for mesh in MESHES), ((2, 4), "data", "data")],
)
def test_the_fused_loss_equals_one_device(method, shape, batch_axes, embed_axis):
    arrays = with_signals(fused_inputs(8, 5, 51, 29), known=11)
    options = {"method": method, "label_smoothing": 0.1, "z_loss": 1e-2, "student_softcap": 5.0}
    mesh = make_mesh(shape)
    over_shards = partial(
        sharded_uld_cross_entropy, mesh=mesh, batch_axes=batch_axes, embed_axis=embed_axis
    )

    @jax.jit
    def compute(arrays, temperature):
        def total(loss, student):
            traced = {"student_temperature": temperature}
            out = loss(**{**arrays, **student}, **options, **traced, chunk_size=2)
            return 3 * out.total, out

        student = {name: arrays[name] for name in ("student_hidden", "student_head")}
        return [
            jax.value_and_grad(partial(total, loss), has_aux=True)(student)
            for loss in (over_shards, fused_teachers_cross_entropy)
        ]

    ((_, loss), grads), ((_, expected), expected_grads) = compute(arrays, 1.7)
    assert expected.distances.shape == (3,)
    for part in ("total", "cross_entropy", "distances"):
        np.testing.assert_allclose(getattr(loss, part), getattr(expected, part), rtol=1e-5)
    for name, grad in grads.items():
        atol = 1e-5 * abs(expected_grads[name]).max()
        np.testing.assert_allclose(grad, expected_grads[name], rtol=1e-5, atol=atol)


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_cross_entropy_over_shards_equals_one_device(smoothing):
    logits, targets = random_logits((5, 24), 4), jnp.array([0, 5, 23, 8, 16])
    options = {"label_smoothing": smoothing, "z_loss": 0.01}

    def over_shards(logits):
        return jax.shard_map(
            lambda x: cross_entropy(x, targets, **options, axis_name="tensor"),
            mesh=make_mesh((1, 8)),
            in_specs=PartitionSpec(None, "tensor"),
            out_specs=PartitionSpec(),
        )(logits)

    def plain(logits):
        return cross_entropy(logits, targets, **options)

    np.testing.assert_allclose(over_shards(logits), plain(logits), rtol=1e-6)
    actual, expected = (
        jax.jit(jax.grad(lambda x, f=f: (f(x) * jnp.arange(5.0)).sum()))(logits)
        for f in (over_shards, plain)
    )
    np.testing.assert_allclose(actual, expected, atol=1e-6)


def compiled_text(function, *arguments):
    return jax.jit(function).lower(*arguments).compile().as_text()


def gathered_sizes(program):
    """The elements of each all-gather's result in a compiled program."""
    shapes = re.findall(r"= \(?\w+\[([\d,]*)\][^=]*? all-gather(?:-start)?\(", program)
    return [int(np.prod([int(n) for n in shape.split(",") if n])) for shape in shapes]


def place(mesh, arrays):
    rows = NamedSharding(mesh, PartitionSpec("data"))
    return jax.tree.map(lambda x: jax.device_put(x, rows) if x.shape[:1] == (2,) else x, arrays)


@pytest.mark.parametrize("teacher", ["head", "signal"])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("shape", [(1, 8), (2, 4)])
def test_the_compiled_step_gathers_nothing_as_large_as_a_vocabulary(method, shape, teacher):
    student_vocab, teacher_vocab, mesh = 49_152 // 8, 6_277, make_mesh(shape)
    assert teacher_vocab % 8  # eight shards need padding
    arrays = fused_inputs(2, 8, student_vocab, teacher_vocab)
    if teacher == "signal":
        arrays["teachers"] = with_signals(arrays, known=50)["teachers"][2:]
    rest = place(mesh, {name: x for name, x in arrays.items() if name != "student_head"})

    def total(student_head, arrays):
        options = {"batch_axes": "data", "method": method, "chunk_size": 4}
        return sharded_uld_cross_entropy(
            **arrays, student_head=student_head, mesh=mesh, **options
        ).total

    program = compiled_text(jax.value_and_grad(total), arrays["student_head"], rest)
    assert all(size < teacher_vocab for size in gathered_sizes(program)), gathered_sizes(program)
    assert ("all-to-all" in program) == (method == "sort" or teacher == "signal")


def test_a_gathered_vocabulary_would_be_noticed():
    mesh, vocab = make_mesh((1, 8)), 4096
    sharding = NamedSharding(mesh, PartitionSpec(None, "tensor"))
    logits = jax.device_put(random_logits((2, vocab), 5), sharding)
    program = compiled_text(lambda x: jnp.sort(x, axis=-1), logits)
    assert max(gathered_sizes(program)) >= vocab


@pytest.mark.parametrize(
    ("vocab", "shards"), [(49_152, 8), (50_257, 8), (250_112, 8)], ids=["even", "gpt2", "mt5"]
)
def test_real_vocabularies(vocab, shards):
    student, teacher = random_logits((2, vocab), 6), random_logits((2, 32_000), 7)
    mesh = make_mesh((1, shards))
    values = jax.jit(partial(sharded_uld, mesh=mesh, method="level_set"))(student, teacher)
    np.testing.assert_allclose(values, uld(student, teacher, method="level_set"), atol=1e-5)
