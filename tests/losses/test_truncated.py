from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from uld_jax.losses import sorted_probabilities, truncated_uld, uld

METHODS = ["sort", "level_set"]
ROWS = 80
# Student tokens V, teacher tokens U, known probabilities K: K < V < U, K < U < V, K > V, K = U,
# K > U (padded with zeros), and the largest one alone.
SHAPES = [(12, 20, 5), (20, 12, 5), (6, 30, 9), (15, 9, 9), (10, 8, 11), (40, 40, 1)]
# Of float32 against float64: a softmax whose logits reach 60 and sums of at most 60 terms.
ROUNDING = 1e-6


def normal(rng, shape, scale):
    return rng.normal(0, scale, shape)


def tied(rng, shape):
    return rng.integers(0, 3, shape)


def masked(rng, shape):
    """At least the first entry of a row is left."""
    hidden = rng.random(shape) < 0.5
    hidden[:, 0] = False
    return np.where(hidden, -np.inf, normal(rng, shape, 3))


KINDS = [partial(normal, scale=scale) for scale in (0.1, 2, 15)] + [tied, masked]


def logits_of_every_kind(width, seed):
    """f32[400, width]; a seed shuffles the rows, so that every kind of one side meets others."""
    rng = np.random.default_rng(seed)
    rows = np.concatenate([kind(rng, (ROWS, width)) for kind in KINDS])
    return rng.permutation(rows).astype(np.float32)


def descending_probs64(logits):
    weights = np.exp(np.asarray(logits, np.float64) - logits.max(-1, keepdims=True))
    return -np.sort(-weights / weights.sum(-1, keepdims=True), -1)


def pad(probs, width):
    return np.pad(probs, ((0, 0), (0, max(width - probs.shape[-1], 0))))


def gap(q, p):
    width = max(q.shape[-1], p.shape[-1])
    return np.abs(pad(q, width) - pad(p, width)).sum(-1)


@cache
def compiled(method):
    return jax.jit(jax.vmap(partial(truncated_uld, method=method)))


@cache
def case(shape):
    """Logits of the student, and float64 q↓, p↓ and the signal (p↓ to K, its tail mass)."""
    student_vocab, teacher_vocab, known = shape
    student = logits_of_every_kind(student_vocab, student_vocab)
    teacher = logits_of_every_kind(teacher_vocab, teacher_vocab + 1)
    q, p = descending_probs64(student), descending_probs64(teacher)
    return student, q, p, pad(p[:, :known], known), p[:, known:].sum(-1)


def computed(shape, method):
    student, _, _, top, tail = case(shape)
    arrays = compiled(method)(student, top.astype(np.float32), tail.astype(np.float32))
    return [np.asarray(x, np.float64) for x in arrays]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("shape", SHAPES)
def test_the_exact_distance_lies_between_the_bounds(shape, method):
    value, lower, upper = computed(shape, method)
    _, q, p, _, _ = case(shape)
    exact = gap(q, p)
    assert len(exact) == 400
    assert (lower >= 0).all()
    assert (upper <= 2).all()
    assert (lower <= exact + ROUNDING).all()
    assert (exact <= upper + ROUNDING).all()
    assert (lower <= value + ROUNDING).all()
    assert (value <= upper + ROUNDING).all()


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("shape", SHAPES)
def test_the_value_is_the_middle_of_the_interval(shape, method):
    value, _, _ = computed(shape, method)
    _, q, _, top, tail = case(shape)
    known = shape[2]
    student_tail = q[:, known:].sum(-1)
    expected = gap(q[:, :known], top) + np.maximum(tail, student_tail)
    if known < min(shape[:2]):
        assert 40 < (tail > student_tail).sum() < 360
    np.testing.assert_allclose(value, expected, atol=ROUNDING if method == "sort" else 1e-2)


@pytest.mark.parametrize("shape", SHAPES)
def test_the_interval_is_as_wide_as_what_was_dropped(shape):
    _, lower, upper = computed(shape, "sort")
    _, q, _, top, tail = case(shape)
    known = shape[2]
    student_tail = q[:, known:].sum(-1)
    largest = gap(q[:, :known], top) + tail + student_tail
    least = largest - 2 * np.minimum(tail, student_tail)
    np.testing.assert_allclose(lower, least, atol=ROUNDING)
    np.testing.assert_allclose(upper, np.minimum(largest, 2), atol=ROUNDING)


@pytest.mark.parametrize("shape", [(15, 9, 9), (10, 8, 11), (6, 30, 30)])
def test_with_nothing_dropped_the_three_are_the_exact_distance(shape):
    value, lower, upper = computed(shape, "sort")
    _, q, p, _, _ = case(shape)
    np.testing.assert_array_equal(value, lower)
    np.testing.assert_array_equal(value, upper)
    np.testing.assert_allclose(value, gap(q, p), atol=ROUNDING)


@pytest.mark.parametrize(("method", "slack"), [("sort", 1e-6), ("level_set", 1e-2)])
def test_the_interval_shrinks_as_more_is_known(method, slack):
    widths = []
    for known in (1, 2, 4, 8, 12, 20):
        _, lower, upper = computed((12, 20, known), method)
        widths.append(upper - lower)
    assert (np.diff(widths, axis=0) <= slack).all()
    assert (widths[0] - widths[2] > 0.1).sum() > 40


def random_signal(seed, rows, student_vocab, teacher_vocab, known, dtype=np.float32):
    rng = np.random.default_rng(seed)
    student, teacher = rng.normal(0, 1, (rows, student_vocab)), rng.normal(0, 1, (rows, 9))
    p = descending_probs64(teacher[:, :teacher_vocab])
    signal = student, p[:, :known], p[:, known:].sum(-1)
    return tuple(jnp.asarray(x, dtype) for x in signal)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(("scale", "student_is_flatter"), [(0.3, True), (4.0, False)])
def test_gradient_equals_finite_differences(method, scale, student_is_flatter):
    with jax.enable_x64(True):
        student, top, tail = random_signal(1, 2, 7, 9, 3, np.float64)
        student *= scale
        student_tail = descending_probs64(np.asarray(student))[:, 3:].sum(-1)
        assert ((student_tail > tail) == student_is_flatter).all()

        def value(student):
            return truncated_uld(student, top, tail, method=method)[0]

        assert value(student).dtype == jnp.float64
        check_grads(value, (student,), order=1, modes=["rev"], eps=1e-6)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(("top", "tail"), [([0.3, 0.1], 0.6), ([0.6, 0.1], 0.3)])
def test_tokens_tied_across_the_kth_rank_are_dropped_in_part(method, top, tail):
    """Moved together they stay tied, and there the value is smooth: r_q below and above r_p."""
    with jax.enable_x64(True):
        student, moved = jnp.log(jnp.array([0.4, 0.2, 0.2, 0.2])), jnp.array([0.0, 1.0, 1.0, 1.0])
        signal = jnp.array(top), jnp.array(tail)

        def value(step):
            return truncated_uld(student + step * moved, *signal, method=method)[0]

        difference = (value(1e-4) - value(-1e-4)) / 2e-4
        np.testing.assert_allclose(jax.grad(value)(0.0), difference, atol=1e-5)
        assert abs(difference) > 0.05


@pytest.mark.parametrize("method", METHODS)
def test_only_the_value_has_a_gradient_and_only_in_the_student(method):
    arguments = random_signal(2, 4, 7, 9, 3)

    def sums(*arguments):
        return [x.sum() for x in truncated_uld(*arguments, method=method)]

    by_result = jax.jit(jax.jacrev(sums, argnums=(0, 1, 2)))(*arguments)
    nonzero = [[bool((grad != 0).any()) for grad in grads] for grads in by_result]
    assert nonzero == [[True, False, False], [False] * 3, [False] * 3]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    ("student", "top", "tail"),
    [
        (np.zeros(5), [0.5, 0.1], 0.4),
        ([1, 1, 0, 0, 0], [0.2, 0.2, 0.2], 0.4),
        ([3.0], [0.5, 0.1], 0.4),
        ([3.0], [1.0], 0.0),
        ([2, -np.inf, -np.inf, -np.inf], [0.5, 0.1], 0.4),
        ([2, 1, -np.inf, 0], [0.5, 0.1, 0.0], 0.0),
        ([1e30, 0, -1e30], [0.5], 0.5),
    ],
    ids=["flat", "ties", "one token", "one each", "one left", "masked", "huge"],
)
def test_nothing_is_nan(method, student, top, tail):
    def value(student):
        value, lower, upper = truncated_uld(student, jnp.array(top), jnp.array(tail), method=method)
        return value, (value, lower, upper)

    gradient, values = jax.grad(value, has_aux=True)(jnp.array(student, jnp.float32))
    assert np.isfinite([*values]).all()
    assert jnp.isfinite(gradient).all()
    masked = np.isneginf(student)
    np.testing.assert_array_equal(gradient[masked], 0)


@pytest.mark.parametrize("method", METHODS)
def test_jit_vmap_and_scan_agree_with_a_batch(method):
    student, top, tail = (x.reshape(2, 3, *x.shape[1:]) for x in random_signal(3, 6, 7, 9, 3))

    def total(student, top, tail):
        values = truncated_uld(student, top, tail, student_temperature=1.5, method=method)
        return values[0].sum(), values

    grad = jax.grad(total, has_aux=True)

    @jax.jit
    def scanned(*arrays):
        return jax.lax.scan(lambda carry, x: (carry, jax.vmap(grad)(*x)), 0, arrays)[1]

    actual = scanned(student, top, tail)
    for x, expected in zip(
        jax.tree.leaves(actual), jax.tree.leaves(jax.jit(grad)(student, top, tail)), strict=True
    ):
        np.testing.assert_allclose(x, expected, atol=1e-6)


def test_temperature_divides_the_students_logits():
    student, top, tail = random_signal(4, 3, 7, 9, 3)
    actual = jax.jit(truncated_uld)(student, top, tail, student_temperature=2.0)
    np.testing.assert_allclose(actual, truncated_uld(student / 2, top, tail), rtol=1e-6)


@pytest.mark.parametrize("method", METHODS)
def test_a_signal_of_all_probabilities_gives_the_distance_to_the_logits(method):
    rng = np.random.default_rng(5)
    student, teacher = (jnp.asarray(rng.normal(0, 2, (4, n)), jnp.float32) for n in (7, 9))
    signal = sorted_probabilities(teacher), jnp.zeros(4)

    def by_signal(student):
        return truncated_uld(student, *signal, method=method)[0].sum()

    actual = jax.value_and_grad(by_signal)(student)
    expected = jax.value_and_grad(lambda s: uld(s, teacher, method=method).sum())(student)
    for x, y in zip(actual, expected, strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-6, atol=1e-7)


def test_half_precision_is_computed_in_float32():
    signal = random_signal(6, 3, 7, 9, 3)
    halves = [x.astype(jnp.bfloat16) for x in signal]
    actual = truncated_uld(*halves)
    expected = truncated_uld(*(x.astype(jnp.float32) for x in halves))
    for x, y in zip(actual, expected, strict=True):
        assert x.dtype == jnp.float32
        np.testing.assert_array_equal(x, y)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"student_logits": jnp.zeros((3, 5))}, r"\(3, 5\) and \(2, 3\)"),
        ({"teacher_probs_sorted": jnp.zeros(3)}, r"\(2, 5\) and \(3,\)"),
        ({"teacher_tail_mass": jnp.zeros((2, 1))}, r"teacher_tail_mass: .* \(2,\), got \(2, 1\)"),
        ({"teacher_tail_mass": jnp.zeros(())}, r"teacher_tail_mass: .* \(2,\), got \(\)"),
        ({"teacher_probs_sorted": jnp.zeros((2, 0))}, "teacher_probs_sorted: expected at least 1"),
        ({"method": "quick"}, r"'quick'.*'auto', 'sort'"),
    ],
)
def test_bad_arguments_are_named(change, message):
    arguments = {
        "student_logits": jnp.zeros((2, 5)),
        "teacher_probs_sorted": jnp.zeros((2, 3)),
        "teacher_tail_mass": jnp.zeros(2),
    }
    with pytest.raises(ValueError, match=message):
        truncated_uld(**{**arguments, **change})


@pytest.mark.parametrize("method", METHODS)
def test_rows_padded_with_zeros_are_those_of_their_own_length(method):
    """A batch of a cache: each position has kept as many as it needs."""
    student = logits_of_every_kind(30, 3)[:12]
    p = descending_probs64(logits_of_every_kind(40, 4)[:12])
    counts = np.array([1, 2, 3, 5, 8, 13, 20, 29, 30, 31, 39, 40])
    top = np.where(np.arange(40) < counts[:, None], p, 0).astype(np.float32)
    tail = (p.sum(-1) - top.sum(-1)).clip(0).astype(np.float32)

    def run(student, top, tail):
        results = truncated_uld(student, top, tail, method=method)
        return results[0].sum(), results

    grad, padded = jax.grad(run, has_aux=True)(student, top, tail)
    for row, count in enumerate(counts):
        if (p[row, :count] == 0).any():
            continue
        alone_grad, alone = jax.grad(run, has_aux=True)(student[row], top[row, :count], tail[row])
        for got, expected in zip(padded, alone, strict=True):
            np.testing.assert_allclose(got[row], expected, atol=2e-6)
        np.testing.assert_allclose(grad[row], alone_grad, atol=2e-6)


@pytest.mark.parametrize("method", METHODS)
def test_a_row_of_padding_is_finite(method):
    def run(student):
        results = truncated_uld(student, jnp.zeros((2, 3)), jnp.zeros(2), method=method)
        return results[0].sum(), results

    grad, results = jax.grad(run, has_aux=True)(jnp.array([[1.0, 0, 0, 3], [2, 2, 2, 2]]))
    assert all(np.isfinite(x).all() for x in (grad, *results))
    np.testing.assert_allclose(results[0], 1, atol=1e-2)  # all that the student has
