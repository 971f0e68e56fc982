from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
from jax.test_util import check_grads

from uld_jax.losses import cross_entropy
from uld_jax.losses.cross_entropy import fused_cross_entropy

OPTIONS = [{}, {"label_smoothing": 0.2}, {"z_loss": 0.01}, {"label_smoothing": 0.2, "z_loss": 0.01}]


def random_logits(shape, seed=0, scale=2.0):
    return jnp.asarray(np.random.default_rng(seed).normal(0, scale, shape), jnp.float32)


def random_targets(shape, vocab, seed=0):
    return jnp.asarray(np.random.default_rng(seed).integers(0, vocab, shape))


def value_and_gradient(loss, logits):
    """Of rows with different cotangents, so that each row's gradient is its own."""
    cotangent = random_logits(logits.shape[:-1], 100).astype(logits.dtype)
    value, pull_back = jax.vjp(loss, logits)
    return value, *pull_back(cotangent.astype(value.dtype))


def assert_all_close(actual, expected, rtol=1e-5, atol=1e-6):
    for x, y in zip(actual, expected, strict=True):
        np.testing.assert_allclose(x, y, rtol=rtol, atol=atol)


def test_without_options_it_equals_optax():
    logits, targets = random_logits((2, 3, 7)), random_targets((2, 3), 7)
    actual = value_and_gradient(lambda x: cross_entropy(x, targets), logits)
    optax_loss = optax.softmax_cross_entropy_with_integer_labels
    assert_all_close(actual, value_and_gradient(lambda x: optax_loss(x, targets), logits))
    assert actual[0].shape == (2, 3)
    np.testing.assert_array_equal(cross_entropy(logits, targets), actual[0])


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 0.9])
def test_label_smoothing_equals_torch(smoothing):
    logits, targets = random_logits((5, 7), 1), random_targets(5, 7, 1)
    leaf = torch.tensor(np.asarray(logits), requires_grad=True)
    expected = torch.nn.functional.cross_entropy(
        leaf,
        torch.tensor(np.asarray(targets, np.int64)),
        reduction="none",
        label_smoothing=smoothing,
    )
    expected.backward(torch.tensor(np.asarray(random_logits(5, 100))))
    actual = value_and_gradient(
        lambda x: cross_entropy(x, targets, label_smoothing=smoothing), logits
    )
    assert_all_close(actual, (expected.detach().numpy(), leaf.grad.numpy()))


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_z_loss_adds_the_squared_normalizer(smoothing):
    logits, targets = random_logits((5, 7), 2), random_targets(5, 7, 2)
    plain = partial(cross_entropy, targets=targets, label_smoothing=smoothing)

    def expected(x):
        return plain(x) + 0.3 * jax.nn.logsumexp(x, axis=-1) ** 2

    assert_all_close(
        value_and_gradient(partial(plain, z_loss=0.3), logits), value_and_gradient(expected, logits)
    )


@pytest.mark.parametrize("options", OPTIONS)
def test_masked_entries_count_for_nothing(options):
    """Smoothing included: ε is shared by the entries that are there."""
    logits, targets = random_logits((4, 6), 3), jnp.array([0, 5, 2, 3])
    columns = jnp.array([1, 2, 4, 5, 7, 8])
    padded = jnp.full((4, 9), -jnp.inf).at[:, columns].set(logits)
    value, gradient = value_and_gradient(
        lambda x: cross_entropy(x, columns[targets], **options), padded
    )
    expected, expected_gradient = value_and_gradient(
        lambda x: cross_entropy(x, targets, **options), logits
    )
    np.testing.assert_allclose(value, expected, rtol=1e-6)
    np.testing.assert_allclose(gradient[:, columns], expected_gradient, atol=1e-6)
    np.testing.assert_array_equal(gradient[:, jnp.array([0, 3, 6])], 0)


@pytest.mark.parametrize("options", OPTIONS)
def test_a_masked_target_is_infinitely_unlikely_and_has_a_finite_gradient(options):
    logits = jnp.array([1.0, -jnp.inf, 0.0])
    value, gradient = jax.value_and_grad(cross_entropy)(logits, jnp.array(1), **options)
    assert value == jnp.inf
    assert jnp.isfinite(gradient).all()


def test_one_token_left_is_certain():
    logits = jnp.array([-jnp.inf, 3.0, -jnp.inf])
    value, gradient = jax.value_and_grad(cross_entropy)(
        logits, jnp.array(1), label_smoothing=0.1, z_loss=0.1
    )
    np.testing.assert_allclose(value, 0.9, rtol=1e-6)  # 0.1 · 3²
    np.testing.assert_allclose(gradient, [0, 0.6, 0], rtol=1e-6)


@pytest.mark.parametrize("options", OPTIONS)
def test_large_logits_do_not_overflow(options):
    logits, targets = random_logits((4, 7), 4, 1e4), random_targets(4, 7, 4)
    value, gradient = value_and_gradient(lambda x: cross_entropy(x, targets, **options), logits)
    wide = np.asarray(logits, np.float64)
    normalizer = wide.max(-1)  # the others are e⁻¹⁰⁰ of it
    assert (np.diff(np.sort(wide))[:, -1] > 100).all()
    smoothing, z_loss = options.get("label_smoothing", 0), options.get("z_loss", 0)
    at_target = np.take_along_axis(wide, np.asarray(targets)[:, None], -1)[:, 0]
    expected = normalizer - (1 - smoothing) * at_target - smoothing * wide.mean(-1)
    np.testing.assert_allclose(value, expected + z_loss * normalizer**2, rtol=1e-5, atol=1e-2)
    assert jnp.isfinite(gradient).all()


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_half_precision_is_computed_in_float32(dtype):
    logits, targets = random_logits((4, 40), 5, 4.0).astype(dtype), random_targets(4, 40, 5)

    def loss(x):
        return cross_entropy(x, targets, label_smoothing=0.1, z_loss=0.01)

    value, gradient = value_and_gradient(loss, logits)
    wide_value, wide_gradient = value_and_gradient(loss, logits.astype(jnp.float32))
    assert value.dtype == jnp.float32
    assert gradient.dtype == dtype
    np.testing.assert_array_equal(value, wide_value)
    cotangent = random_logits((4,), 100)
    rounded = (wide_gradient / cotangent[:, None]).astype(jnp.float32)
    rounded *= cotangent.astype(dtype).astype(jnp.float32)[:, None]
    np.testing.assert_allclose(
        gradient.astype(jnp.float32), rounded, rtol=float(jnp.finfo(dtype).eps)
    )


@pytest.mark.parametrize("options", OPTIONS)
def test_gradient_equals_finite_differences(options):
    with jax.enable_x64(True):
        logits, targets = random_logits((3, 5), 6).astype(jnp.float64), random_targets(3, 5, 6)
        assert cross_entropy(logits, targets).dtype == jnp.float64

        def loss(x):
            return cross_entropy(x, targets, **options)

        check_grads(loss, (logits,), order=1, modes=["rev"], eps=1e-6)


def test_options_may_be_traced_and_jit_vmap_and_scan_agree_with_a_batch():
    logits, targets = random_logits((2, 3, 5), 7), random_targets((2, 3), 5, 7)

    def loss(logits, targets, smoothing, z_loss):
        return cross_entropy(logits, targets, label_smoothing=smoothing, z_loss=z_loss)

    @jax.jit
    def scanned(smoothing, z_loss):
        grad = jax.vmap(jax.value_and_grad(loss), in_axes=(0, 0, None, None))

        def step(carry, row):
            return carry, grad(*row, smoothing, z_loss)

        return jax.lax.scan(step, 0, (logits, targets))[1]

    values, gradients = scanned(0.1, 0.02)
    np.testing.assert_allclose(values, loss(logits, targets, 0.1, 0.02), rtol=1e-6)
    expected = jax.grad(lambda x: loss(x, targets, 0.1, 0.02).sum())(logits)
    np.testing.assert_allclose(gradients, expected, atol=1e-6)


def test_a_logit_whose_square_overflows_is_certain():
    value, gradient = jax.value_and_grad(cross_entropy)(jnp.array([1e30, 0.0, 1.0]), jnp.array(0))
    assert value == 0
    np.testing.assert_array_equal(gradient, 0)


def test_no_rows_give_no_losses():
    value, gradient = value_and_gradient(
        lambda x: cross_entropy(x, jnp.zeros((0,), int), label_smoothing=0.1), jnp.zeros((0, 5))
    )
    assert value.shape == (0,)
    assert gradient.shape == (0, 5)


def test_nan_is_not_hidden():
    assert jnp.isnan(cross_entropy(jnp.array([0.0, jnp.nan, 1.0]), jnp.array(0)))


@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize("chunk_size", [1, 4, 7, 50])
@pytest.mark.parametrize("options", OPTIONS)
def test_fused_equals_unfused(options, chunk_size, softcap):
    hidden, head = random_logits((2, 7, 5)), random_logits((11, 5), 1)
    targets = random_targets((2, 7), 11)
    weights = jnp.abs(random_logits((2, 7), 2)).at[1, 3].set(0)

    def fused(hidden, head):
        more = {"softcap": softcap, "chunk_size": chunk_size, **options}
        return fused_cross_entropy(hidden, head, targets, weights=weights, **more)

    def unfused(hidden, head):
        logits = hidden @ head.T
        logits = logits if softcap is None else softcap * jnp.tanh(logits / softcap)
        return (weights * cross_entropy(logits, targets, **options)).sum()

    (value, grads), (expected, wanted) = (
        jax.value_and_grad(f, argnums=(0, 1))(hidden, head) for f in (fused, unfused)
    )
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    for grad, reference in zip(grads, wanted, strict=True):
        np.testing.assert_allclose(grad, reference, rtol=1e-4, atol=1e-5)


def test_fused_leaves_a_position_without_weight_out():
    hidden = random_logits((3, 5)).at[1].set(jnp.inf)
    loss = fused_cross_entropy(
        hidden, jnp.eye(4, 5), jnp.array([0, 99, 2]), weights=jnp.array([1.0, 0.0, 1.0])
    )
    assert bool(jnp.isfinite(loss))


def test_fused_refuses_empty_chunks():
    arrays = jnp.ones((3, 5)), jnp.eye(4, 5), jnp.zeros(3, int)
    with pytest.raises(ValueError, match="chunk_size: expected at least 1, got 0"):
        fused_cross_entropy(*arrays, weights=jnp.ones(3), chunk_size=0)
