import subprocess
import sys
from functools import partial

import hypothesis.extra.numpy as hnp
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.test_util import check_grads

from uld_jax.losses import reference_uld, sorted_probabilities, uld
from uld_jax.losses.sorting import _match_by_packed_sort, _match_by_sorts
from uld_jax.losses.uld import uld_to_sorted

WIDTHS = [(7, 7), (5, 12), (12, 5), (1, 3)]
logits_6 = hnp.arrays(np.float32, 6, elements=st.floats(-8, 8, width=32))
few_examples = settings(max_examples=40, deadline=None)

match_by_packed_sort, match_by_sorts = jax.jit(_match_by_packed_sort), jax.jit(_match_by_sorts)
uld_gradient = jax.jit(jax.grad(uld))


def random_logits(shape, seed=0, scale=2.0):
    return jnp.asarray(np.random.default_rng(seed).normal(0, scale, shape), jnp.float32)


@pytest.mark.parametrize(("student_width", "teacher_width"), WIDTHS)
@pytest.mark.parametrize("temperatures", [(1.0, 1.0), (2.0, 0.5)])
# Near 1 a float32 is known to 6e-8: so is a difference of two probabilities, however small it is.
@pytest.mark.parametrize(("dtype", "exact"), [("float32", 2.4e-7), ("float64", 1e-15)])
def test_value_and_gradient_equal_the_reference(
    student_width, teacher_width, temperatures, dtype, exact
):
    options = {"student_temperature": temperatures[0], "teacher_temperature": temperatures[1]}
    with jax.enable_x64(True):
        student = random_logits((2, 3, student_width), 1)
        teacher = random_logits((2, 3, teacher_width), 2)
        cotangent = random_logits((2, 3), 3)

        @partial(jax.jit, static_argnums=(0, 1))
        def value_and_gradient(distance, dtype, student):
            def scaled(student):
                return distance(student, teacher.astype(dtype), **options)

            value, pull_back = jax.vjp(scaled, student.astype(dtype))
            return scaled(student.astype(dtype)), value, *pull_back(cotangent.astype(dtype))

        plain, value, gradient = value_and_gradient(uld, dtype, student)
        expected, _, expected_gradient = value_and_gradient(reference_uld, "float64", student)
    assert plain.shape == (2, 3)
    assert plain.dtype == value.dtype == gradient.dtype == dtype
    np.testing.assert_allclose(plain, expected, rtol=4 * exact, atol=exact)
    np.testing.assert_allclose(value, expected, rtol=4 * exact, atol=exact)
    np.testing.assert_allclose(gradient, expected_gradient, rtol=20 * exact, atol=exact)


@pytest.mark.parametrize(("student_width", "teacher_width"), WIDTHS[:3])
def test_gradient_equals_finite_differences(student_width, teacher_width):
    with jax.enable_x64(True):
        student = random_logits((2, student_width), 4).astype(jnp.float64)
        teacher = random_logits((2, teacher_width), 5).astype(jnp.float64)
        assert uld(student, teacher).dtype == jnp.float64
        check_grads(lambda s: uld(s, teacher), (student,), order=1, modes=["rev"], eps=1e-6)


def distance_of_probabilities(q, p):
    return np.abs(np.sort(q)[::-1] - np.sort(p)[::-1]).sum()


TIED = [
    ([0.3, 0.3, 0.2, 0.2], [0.5, 0.25, 0.24, 0.01]),  # both runs of ties straddle a crossing
    ([0.25, 0.25, 0.25, 0.25], [0.9, 0.05, 0.04, 0.01]),  # an untrained student
    ([0.2, 0.4, 0.2, 0.2], [0.6, 0.3, 0.07, 0.03]),
    ([0.4, 0.4, 0.1, 0.1], [0.3, 0.3, 0.3, 0.1 + 1e-3]),
]


@pytest.mark.parametrize("match", [match_by_packed_sort, match_by_sorts])
@pytest.mark.parametrize(("q", "p"), TIED)
def test_tied_probabilities_get_the_central_difference(match, q, p):
    q, p = np.array(q, np.float32), np.array(p, np.float32)
    gaps, signs = match(q, p)
    step = 1e-4 * np.eye(4)
    central = [
        (distance_of_probabilities(q + d, p) - distance_of_probabilities(q - d, p)) / 2e-4
        for d in step
    ]
    np.testing.assert_allclose(signs, central, atol=1e-3)
    np.testing.assert_allclose(gaps, np.sort(q)[::-1] - p, atol=1e-7)


@given(hnp.arrays(np.float32, 9, elements=st.sampled_from([0, 1, 2, 3, 4])), logits_6)
@few_examples
def test_both_ways_to_find_the_signs_agree_bit_for_bit(weights, teacher):
    q = weights / max(weights.sum(), 1)
    p = np.zeros(9, np.float32)
    p[:6] = sorted_probabilities(teacher)
    for by_search, by_sorts in zip(match_by_packed_sort(q, p), match_by_sorts(q, p), strict=True):
        np.testing.assert_array_equal(by_search, by_sorts)


@pytest.mark.parametrize("method", ["sort", "level_set"])
@pytest.mark.parametrize("platform", ["tpu", "cuda"])
def test_lowers_for_accelerators_and_neither_gathers_nor_scatters_on_tpu(method, platform):
    argument = jax.ShapeDtypeStruct((2, 64), jnp.float32)
    gradient = jax.jit(jax.grad(lambda s, t: uld(s, t, method=method).sum()))
    program = jax.export.export(gradient, platforms=[platform])(argument, argument).mlir_module()
    indexed = "stablehlo.gather" in program or "stablehlo.scatter" in program
    assert indexed == (platform == "cuda")
    assert ("stablehlo.sort" in program) == (method == "sort")


@given(logits_6, logits_6, st.permutations(range(6)), st.permutations(range(6)))
@few_examples
def test_any_permutation_of_either_vocabulary_changes_nothing(student, teacher, first, second):
    plain = uld(student, teacher)
    np.testing.assert_allclose(uld(student[first], teacher[second]), plain, atol=1e-6)


@given(st.permutations(range(6)), st.permutations(range(6)))
@few_examples
def test_the_gradient_follows_a_permutation(first, second):
    # Fixed logits, so that no pair of probabilities is equal up to rounding: there it may jump.
    student, teacher = np.asarray(random_logits((2, 6), seed=20))
    gradient = np.asarray(uld_gradient(student, teacher))
    permuted = uld_gradient(student[first], teacher[second])
    np.testing.assert_allclose(permuted, gradient[first], atol=1e-6)


@given(logits_6, logits_6)
@few_examples
def test_is_a_bounded_symmetric_distance(one, other):
    distance = float(uld(one, other))
    assert 0 <= distance < 2
    np.testing.assert_allclose(uld(other, one), distance, atol=1e-6)
    assert uld(one, one) == 0
    assert uld(one, one[::-1]) < 1e-6


def test_one_hot_teacher_rewards_confidence_and_is_not_cross_entropy():
    student = jnp.array([[3.0, 0.0, 1.0], [0.0, 3.0, 1.0]])
    teacher = jnp.array([[0.0, -jnp.inf, -jnp.inf]] * 2)
    distance = uld(student, teacher)
    np.testing.assert_allclose(distance, 2 * (1 - jax.nn.softmax(student).max(-1)), rtol=1e-6)
    cross_entropy = -jax.nn.log_softmax(student)[:, 0]
    assert distance[0] == distance[1]
    assert cross_entropy[1] > cross_entropy[0] + 1


def test_no_gradient_reaches_the_teacher():
    student, teacher = random_logits((3, 6), 6), random_logits((3, 8), 7)
    by_logits, by_temperature = jax.grad(
        lambda t, x: uld(student, t, teacher_temperature=x).sum(), argnums=(0, 1)
    )(teacher, 1.5)
    np.testing.assert_array_equal(by_logits, jnp.zeros_like(teacher))
    assert by_temperature == 0
    sorted_sum = jax.grad(lambda t: sorted_probabilities(t)[..., 0].sum())(teacher)
    np.testing.assert_array_equal(sorted_sum, jnp.zeros_like(teacher))


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_half_precision_is_computed_in_float32(dtype):
    student, teacher = (random_logits((4, 40), seed, 4.0).astype(dtype) for seed in (8, 9))
    wide = student.astype(jnp.float32), teacher.astype(jnp.float32)
    distance = uld(student, teacher)
    assert distance.dtype == jnp.float32
    np.testing.assert_array_equal(distance, uld(*wide))
    gradient = jax.grad(lambda s, t: uld(s, t).sum())
    assert gradient(student, teacher).dtype == dtype
    np.testing.assert_array_equal(gradient(student, teacher), gradient(*wide).astype(dtype))


def test_masked_entries_of_a_padded_vocabulary_count_for_nothing():
    student, teacher = random_logits((2, 6), 10), random_logits((2, 9), 11)

    def pad(logits, count):
        return jnp.pad(logits, ((0, 0), (0, count)), constant_values=-jnp.inf)

    def value_and_grad(s, t):
        return jax.value_and_grad(lambda s: uld(s, t).sum())(s)

    value, grad = value_and_grad(student, teacher)
    padded_value, padded_grad = value_and_grad(pad(student, 5), pad(teacher, 2))
    np.testing.assert_allclose(padded_value, value, rtol=1e-6)
    np.testing.assert_allclose(padded_grad, pad(grad, 5).at[:, 6:].set(0), atol=1e-7)


def test_large_logits_do_not_overflow():
    student, teacher = random_logits((3, 8), 12, 1e30), random_logits((3, 8), 13, 1e4)
    value, grad = jax.value_and_grad(lambda s: uld(s, teacher).sum())(student)
    assert jnp.isfinite(value)
    assert jnp.isfinite(grad).all()


def test_nan_is_not_hidden():
    assert jnp.isnan(uld(jnp.array([0.0, jnp.nan]), jnp.zeros(2)))
    assert jnp.isnan(uld(jnp.zeros(2), jnp.array([0.0, jnp.nan])))


def test_temperature_divides_the_logits():
    student, teacher = random_logits((2, 6), 14), random_logits((2, 9), 15)
    actual = jax.jit(uld)(student, teacher, student_temperature=2.0, teacher_temperature=0.5)
    np.testing.assert_allclose(actual, uld(student / 2, teacher * 2), rtol=1e-6)


def test_vmap_and_scan_agree_with_a_batch():
    student, teacher = random_logits((3, 5, 6), 16), random_logits((3, 5, 9), 17)
    grad = jax.grad(lambda s, t: uld(s, t).sum())
    expected = grad(student, teacher)
    np.testing.assert_array_equal(jax.vmap(grad)(student, teacher), expected)
    _, scanned = jax.lax.scan(lambda carry, x: (carry, grad(*x)), 0, (student, teacher))
    np.testing.assert_array_equal(scanned, expected)


def test_sorted_probabilities_are_all_that_is_needed_of_a_teacher():
    student, teacher = random_logits((2, 6), 18), random_logits((2, 9), 19)
    probs = sorted_probabilities(teacher, 2.0)
    expected = -np.sort(-np.asarray(jax.nn.softmax(teacher / 2)), -1)
    np.testing.assert_array_equal(probs, expected)
    distance = uld_to_sorted(student, probs, student_temperature=3.0)
    whole = uld(student, teacher, student_temperature=3.0, teacher_temperature=2.0)
    np.testing.assert_allclose(distance, whole, rtol=1e-6)


def test_unknown_method_names_the_valid_ones():
    with pytest.raises(ValueError, match=r"'argsort'.*'auto', 'sort'"):
        uld(jnp.zeros(3), jnp.zeros(3), method="argsort")


@pytest.mark.parametrize("distance", [uld, reference_uld])
def test_leading_axes_must_agree(distance):
    with pytest.raises(ValueError, match=r"\(2, 3\) and \(3,\)"):
        distance(jnp.zeros((2, 3)), jnp.zeros(3))


def test_importing_the_losses_brings_in_no_framework():
    code = (
        "import sys, uld_jax.losses; "
        "print({'flax', 'transformers', 'uld_jax.config', 'torch'} & set(sys.modules))"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "set()"
