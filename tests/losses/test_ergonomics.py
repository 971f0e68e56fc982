"""Every loss of logits under every transformation of JAX, and inside other people's training."""

from functools import partial

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax import lax
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from uld_jax.losses import level_set_uld, reference_uld, sorted_probabilities, uld, uld_to_sorted

FUNCTIONS = {
    "sort": partial(uld, method="sort"),
    "level_set": partial(uld, method="level_set"),
    "level_set_uld": lambda s, t: sum(level_set_uld(s, t, bucket_bits=2)),
    "to_sorted": lambda s, t: uld_to_sorted(s, sorted_probabilities(t), method="sort"),
}
METHODS = ["sort", "level_set"]


def batch_mesh():
    return jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))


def with_gradient(function):
    """(student, teacher) -> the values of all positions, and the gradient of their sum."""

    def value_and_gradient(student, teacher):
        def total(student):
            value = function(student, teacher)
            return value.sum(), value

        gradient, value = jax.grad(total, has_aux=True)(student)
        return value, gradient

    return value_and_gradient


def over_batch(function, check_vma):
    return jax.shard_map(
        function, mesh=batch_mesh(), in_specs=P("data"), out_specs=P("data"), check_vma=check_vma
    )


def shard_map_of_gradient(function, check_vma):
    return over_batch(with_gradient(function), check_vma)


def gradient_of_shard_map(function, check_vma):
    return with_gradient(over_batch(function, check_vma))


def scanned(function):
    def step(carry, pair):
        return carry, with_gradient(function)(*pair)

    return lambda s, t: lax.scan(step, None, (s, t))[1]


def with_donation(function):
    donating = jax.jit(with_gradient(function), donate_argnums=0)
    return lambda s, t: donating(jnp.array(s, copy=True), t)


def sharded_jit(function):
    sharding = NamedSharding(batch_mesh(), P("data"))
    return jax.jit(with_gradient(function), in_shardings=sharding, out_shardings=sharding)


# Each takes a loss of logits to something that returns its values and gradients.
TRANSFORMATIONS = {
    "jit": lambda f: jax.jit(with_gradient(f)),
    "vmap of vmap of grad": lambda f: jax.vmap(jax.vmap(with_gradient(f))),
    "grad of vmap of vmap": lambda f: with_gradient(jax.vmap(jax.vmap(f))),
    "scan": scanned,
    "map": lambda f: lambda s, t: lax.map(lambda pair: with_gradient(f)(*pair), (s, t)),
    "checkpoint": lambda f: with_gradient(jax.checkpoint(f)),
    "shard_map of grad": partial(shard_map_of_gradient, check_vma=True),
    "shard_map of grad, unchecked": partial(shard_map_of_gradient, check_vma=False),
    "grad of shard_map": partial(gradient_of_shard_map, check_vma=True),
    "grad of shard_map, unchecked": partial(gradient_of_shard_map, check_vma=False),
    "jit with shardings": sharded_jit,
    "jit with donation": with_donation,
}


def random_logits(shape, seed, scale=2.0):
    return jnp.asarray(np.random.default_rng(seed).normal(0, scale, shape), jnp.float32)


STUDENT, TEACHER = (
    random_logits((8, 2, 6), 0),
    random_logits((8, 2, 9), 1).at[0, 0, 4:].set(-jnp.inf),
)


@pytest.fixture(scope="module", params=FUNCTIONS)
def plain(request):
    """A loss, its values and its gradients without any transformation but grad."""
    function = FUNCTIONS[request.param]
    return function, with_gradient(function)(STUDENT, TEACHER)


@pytest.mark.parametrize("transformation", TRANSFORMATIONS)
def test_a_transformation_changes_nothing(plain, transformation):
    function, (value, gradient) = plain
    actual = jax.jit(TRANSFORMATIONS[transformation](function))(STUDENT, TEACHER)
    assert jnp.isfinite(value).all()
    assert (gradient != 0).any()
    np.testing.assert_allclose(actual[0], value, rtol=1e-6, atol=1e-7)
    np.testing.assert_allclose(actual[1], gradient, rtol=1e-5, atol=1e-7)


def test_the_functions_agree_with_the_reference_under_the_same_transformations():
    value, gradient = with_gradient(reference_uld)(STUDENT, TEACHER)
    for name in ("vmap of vmap of grad", "scan", "shard_map of grad", "jit with shardings"):
        actual = jax.jit(TRANSFORMATIONS[name](reference_uld))(STUDENT, TEACHER)
        np.testing.assert_allclose(actual[0], value, rtol=1e-6)
        np.testing.assert_allclose(actual[1], gradient, rtol=1e-5, atol=1e-7)
    for method in METHODS:
        np.testing.assert_allclose(FUNCTIONS[method](STUDENT, TEACHER), value, atol=1e-4)


@pytest.mark.parametrize("method", METHODS)
def test_descends_in_the_carry_of_a_scan(method):
    slope = jax.grad(lambda s, t: FUNCTIONS[method](s, t).sum())

    def step(student, teacher):
        student = student - 0.1 * slope(student, teacher)
        return student, student

    last, path = jax.jit(lambda s, t: lax.scan(step, s, t))(STUDENT[0], TEACHER)
    student = STUDENT[0]
    for i in range(8):
        student, _ = step(student, TEACHER[i])
        np.testing.assert_allclose(path[i], student, atol=1e-6)
    np.testing.assert_array_equal(last, path[-1])


@pytest.mark.parametrize("method", METHODS)
def test_a_transformed_half_precision_batch_equals_the_plain_one(method):
    student, teacher = STUDENT.astype(jnp.float16), TEACHER.astype(jnp.float16)
    function = with_gradient(FUNCTIONS[method])
    value, gradient = function(student, teacher)
    assert (value.dtype, gradient.dtype) == (jnp.float32, jnp.float16)
    actual = jax.jit(jax.vmap(function))(student, teacher)
    np.testing.assert_allclose(actual[0], value, rtol=1e-6)
    np.testing.assert_allclose(actual[1], gradient, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("method", METHODS)
def test_sums_over_micro_batches_and_over_devices_equal_the_big_batch(method):
    hidden, head = random_logits((8, 2, 4), 2), random_logits((4, 6), 3)

    def loss(head, hidden, teacher):
        return uld(hidden @ head, teacher, method=method).sum()

    value_and_grad = jax.value_and_grad(loss)
    value, gradient = jax.jit(value_and_grad)(head, hidden, TEACHER)

    def accumulate(total, micro):
        return jax.tree.map(jnp.add, total, value_and_grad(head, *micro)), None

    micro = hidden.reshape(4, 2, 2, 4), TEACHER.reshape(4, 2, 2, 9)
    start = jnp.float32(0), jnp.zeros_like(head)
    accumulated, _ = jax.jit(lambda x: lax.scan(accumulate, start, x))(micro)

    mesh = batch_mesh()
    whole, cut = NamedSharding(mesh, P()), NamedSharding(mesh, P("data"))
    sharded = jax.jit(value_and_grad, in_shardings=(whole, cut, cut))(head, hidden, TEACHER)

    @partial(jax.shard_map, mesh=mesh, in_specs=(P(), P("data"), P("data")), out_specs=P())
    def summed(head, hidden, teacher):
        return lax.psum(loss(head, hidden, teacher), "data")

    mapped = jax.jit(jax.value_and_grad(summed))(head, hidden, TEACHER)
    for actual in (accumulated, sharded, mapped):
        np.testing.assert_allclose(actual[0], value, rtol=1e-6)
        np.testing.assert_allclose(actual[1], gradient, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("method", METHODS)
def test_temperatures_are_traced_and_have_finite_gradients(method):
    # The second row is a padded vocabulary.
    student = STUDENT[0].at[1, 4:].set(-jnp.inf)

    @jax.jit
    def loss(student_temperature, teacher_temperature):
        temperatures = {
            "student_temperature": student_temperature,
            "teacher_temperature": teacher_temperature,
        }
        return uld(student, TEACHER[0], method=method, **temperatures).sum()

    by_student, by_teacher = jax.jit(jax.grad(loss, (0, 1)))(1.5, 0.7)
    central = (loss(1.5 + 1e-2, 0.7) - loss(1.5 - 1e-2, 0.7)) / 2e-2
    np.testing.assert_allclose(by_student, central, rtol=1e-2)
    assert by_teacher == 0
    temperatures = jnp.array([0.5, 1.0, 2.0])
    swept = jax.jit(jax.vmap(loss, (0, None)))(temperatures, 1.0)
    np.testing.assert_allclose(swept, [loss(t, 1.0) for t in temperatures], rtol=1e-6)


class Student(eqx.Module):
    head: jax.Array

    def __call__(self, hidden):
        return hidden @ self.head


def step_in_equinox(head, hidden, optimizer, method):
    @eqx.filter_jit
    def step(model, state):
        def loss(model):
            return uld(jax.vmap(model)(hidden), TEACHER, method=method).mean()

        value, grads = eqx.filter_value_and_grad(loss)(model)
        updates, state = optimizer.update(grads, state)
        return value, eqx.apply_updates(model, updates)

    model = Student(head)
    value, model = step(model, optimizer.init(eqx.filter(model, eqx.is_array)))
    return value, model.head


def step_in_nnx(head, hidden, optimizer, method):
    model = nnx.Linear(4, 6, use_bias=False, rngs=nnx.Rngs(0))
    model.kernel[...] = head
    optimizer = nnx.Optimizer(model, optimizer, wrt=nnx.Param)

    @nnx.jit
    def step(model, optimizer):
        def loss(model):
            return uld(model(hidden), TEACHER, method=method).mean()

        value, grads = nnx.value_and_grad(loss)(model)
        optimizer.update(model, grads)
        return value

    return step(model, optimizer), model.kernel[...]


def step_in_bare_jax(head, hidden, optimizer, method):
    @jax.jit
    def step(head, state):
        def loss(head):
            return uld(hidden @ head, TEACHER, method=method).mean()

        value, grads = jax.value_and_grad(loss)(head)
        updates, state = optimizer.update(grads, state)
        return value, optax.apply_updates(head, updates)

    return step(head, optimizer.init(head))


@pytest.mark.parametrize("method", METHODS)
def test_a_step_is_the_same_in_equinox_flax_and_bare_jax(method):
    hidden, head = random_logits((8, 2, 4), 4), random_logits((4, 6), 5)
    settings = hidden, optax.sgd(0.1), method
    value, moved = step_in_bare_jax(head, *settings)
    assert jnp.abs(moved - head).max() > 1e-4
    for step in (step_in_equinox, step_in_nnx):
        other_value, other = step(head, *settings)
        np.testing.assert_allclose(other_value, value, rtol=1e-6)
        np.testing.assert_allclose(other, moved, atol=1e-6)
    assert uld(hidden @ moved, TEACHER, method=method).mean() < value
