import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from jax.test_util import check_grads

from uld_jax.losses import uld
from uld_jax.losses.divergences import (
    DIVERGENCES,
    check_divergence,
    jensen_shannon_divergence,
    kl_divergence,
    reverse_kl_divergence,
    skewed_kl_divergence,
    skewed_reverse_kl_divergence,
)

NAMES = tuple(DIVERGENCES)
SKEWED = ("skewed_kl", "skewed_reverse_kl")


def random_logits(shape, seed=0, scale=2.0):
    return jnp.asarray(np.random.default_rng(seed).normal(0, scale, shape), jnp.float32)


def masked(logits, *columns):
    return logits.at[..., jnp.array(columns)].set(-jnp.inf)


@jax.jit
def values(student, teacher, student_temperature=1.0, teacher_temperature=1.0):
    return {
        name: divergence(
            student,
            teacher,
            student_temperature=student_temperature,
            teacher_temperature=teacher_temperature,
        )
        for name, divergence in DIVERGENCES.items()
    }


@jax.jit
def gradients(student, teacher, student_temperature=1.0, teacher_temperature=1.0):
    """By name the gradients by all four arguments, the rows of a batch added up."""

    def summed(*arguments):
        return jax.tree.map(jnp.sum, values(*arguments))

    arguments = jnp.asarray(student), teacher, student_temperature, teacher_temperature
    by_argument = jax.jacrev(summed, argnums=(0, 1, 2, 3))(*arguments)
    return {name: by_argument[name] for name in NAMES}


def softmax64(logits):
    weights = np.exp(np.asarray(logits, np.float64))
    return weights / weights.sum(-1, keepdims=True)


def kl64(p, q):
    return (p * np.log(p / q)).sum(-1)


def formulas64(student, teacher):
    q, p = softmax64(student), softmax64(teacher)
    m = (p + q) / 2
    return {
        "kl": kl64(p, q),
        "reverse_kl": kl64(q, p),
        "skewed_kl": kl64(p, 0.1 * p + 0.9 * q),
        "skewed_reverse_kl": kl64(q, 0.9 * p + 0.1 * q),
        "jsd": (kl64(p, m) + kl64(q, m)) / 2,
        "tvd": np.abs(p - q).sum(-1) / 2,
    }


@pytest.mark.parametrize("temperatures", [(1.0, 1.0), (2.0, 0.5)])
def test_values_equal_the_formulas_in_float64(temperatures):
    student, teacher = random_logits((2, 3, 7), 1), random_logits((2, 3, 7), 2)
    expected = formulas64(student / temperatures[0], teacher / temperatures[1])
    actual = values(student, teacher, *temperatures)
    for name in NAMES:
        assert actual[name].shape == (2, 3)
        assert actual[name].dtype == jnp.float32
        np.testing.assert_allclose(actual[name], expected[name], rtol=2e-5, err_msg=name)


@pytest.mark.parametrize("share", [0.01, 0.3, 0.9])
def test_alpha_and_beta_are_the_shares_of_the_papers(share):
    student, teacher = random_logits((4, 7), 3), random_logits((4, 7), 4)
    q, p = softmax64(student), softmax64(teacher)
    m = share * p + (1 - share) * q
    np.testing.assert_allclose(
        skewed_kl_divergence(student, teacher, alpha=share), kl64(p, m), rtol=1e-4
    )
    np.testing.assert_allclose(
        skewed_reverse_kl_divergence(student, teacher, alpha=share),
        kl64(q, (1 - share) * p + share * q),
        rtol=1e-4,
    )
    np.testing.assert_allclose(
        jensen_shannon_divergence(student, teacher, beta=share),
        share * kl64(p, m) + (1 - share) * kl64(q, m),
        rtol=1e-4,
    )


def test_kl_and_its_gradient_equal_torch():
    student, teacher = random_logits((3, 6), 5), random_logits((3, 6), 6)
    student_torch = torch.tensor(np.asarray(student), requires_grad=True)
    expected = torch.nn.functional.kl_div(
        torch.log_softmax(student_torch / 2, -1),
        torch.log_softmax(torch.tensor(np.asarray(teacher)) / 2, -1),
        log_target=True,
        reduction="none",
    ).sum(-1)
    expected.sum().backward()
    actual = values(student, teacher, 2.0, 2.0)["kl"]
    np.testing.assert_allclose(actual, expected.detach().numpy(), rtol=1e-5)
    gradient = gradients(student, teacher, 2.0, 2.0)["kl"][0]
    np.testing.assert_allclose(gradient, student_torch.grad.numpy(), atol=1e-7)


def test_gradients_equal_finite_differences():
    with jax.enable_x64(True):
        student, teacher = (random_logits((2, 5), seed).astype(jnp.float64) for seed in (7, 8))
        assert {v.dtype for v in values(student, teacher).values()} == {jnp.dtype("float64")}
        check_grads(
            lambda s, x: jnp.stack(list(values(s, teacher, x).values())),
            (student, jnp.float64(1.5)),
            order=1,
            modes=["rev"],
            eps=1e-6,
        )


def test_no_gradient_reaches_the_teacher():
    student, teacher = random_logits((3, 6), 9), random_logits((3, 6), 10)
    for name, gradient in gradients(student, teacher, 1.0, 1.5).items():
        np.testing.assert_array_equal(gradient[1], jnp.zeros_like(teacher), err_msg=name)
        assert gradient[3] == 0, name
        assert jnp.abs(gradient[0]).sum() > 0, name


def test_limits_and_bounds():
    one, other = random_logits((64, 6), 11, 5.0), random_logits((64, 6), 12, 5.0)
    there, back, same = values(one, other), values(other, one), values(one, one)
    np.testing.assert_allclose(there["jsd"], back["jsd"], rtol=1e-5)
    np.testing.assert_allclose(there["tvd"], back["tvd"], rtol=1e-5)
    np.testing.assert_allclose(there["kl"], back["reverse_kl"], rtol=1e-5)
    np.testing.assert_allclose(there["skewed_kl"], back["skewed_reverse_kl"], rtol=1e-5)
    bounds = {"jsd": math.log(2), "tvd": 1, "skewed_kl": math.log(10)}
    for name, bound in bounds.items():
        assert there[name].min() > 0, name
        assert there[name].max() <= bound + 1e-6, name
    assert (there["tvd"] >= uld(one, other) / 2 - 1e-6).all()
    for name in NAMES:
        np.testing.assert_allclose(same[name], 0, atol=1e-6, err_msg=name)


def test_jsd_tends_to_both_kl_divergences():
    student, teacher, share = random_logits((3, 6), 13), random_logits((3, 6), 14), 1e-6
    with jax.enable_x64(True):
        student, teacher = student.astype(jnp.float64), teacher.astype(jnp.float64)
        towards_kl = jensen_shannon_divergence(student, teacher, beta=share) / share
        towards_reverse = jensen_shannon_divergence(student, teacher, beta=1 - share) / share
        np.testing.assert_allclose(towards_kl, kl_divergence(student, teacher), rtol=1e-4)
        np.testing.assert_allclose(
            towards_reverse, reverse_kl_divergence(student, teacher), rtol=1e-4
        )


@pytest.mark.parametrize("name", ["kl", "reverse_kl"])
def test_the_square_of_the_temperature_keeps_the_weight_of_a_kl(name):
    student, teacher = random_logits((3, 6), 15), random_logits((3, 6), 16)
    warm = 50.0**2 * gradients(student, teacher, 50.0, 50.0)[name][0]
    hot = 100.0**2 * gradients(student, teacher, 100.0, 100.0)[name][0]
    np.testing.assert_allclose(warm, hot, atol=0.05 * float(jnp.abs(hot).max()))


def test_entries_masked_on_both_sides_count_for_nothing():
    student, teacher = random_logits((3, 6), 17), random_logits((3, 6), 18)
    arguments = masked(student, 1, 5), masked(teacher, 1, 5), 1.5, 1.5
    kept = jnp.array([0, 2, 3, 4])
    fewer = student[:, kept], teacher[:, kept], 1.5, 1.5
    expected, expected_gradients = values(*fewer), gradients(*fewer)
    slopes = gradients(*arguments)
    for name, value in values(*arguments).items():
        np.testing.assert_allclose(value, expected[name], rtol=1e-5, err_msg=name)
        by_student, _, by_temperature, _ = slopes[name]
        np.testing.assert_allclose(by_student[:, kept], expected_gradients[name][0], atol=1e-6)
        np.testing.assert_array_equal(by_student[:, jnp.array([1, 5])], 0)
        np.testing.assert_allclose(by_temperature, expected_gradients[name][2], rtol=1e-4)


@pytest.mark.parametrize("scale", [2.0, 200.0, 1e30])  # at 200 some probabilities underflow
def test_no_mask_and_no_scale_gives_nan(scale):
    student, teacher = random_logits((3, 6), 19, scale), random_logits((3, 6), 20, scale)
    sides = [(student, masked(teacher, 2)), (masked(student, 2), teacher)]
    sides += [(masked(student, 0, 1, 2), masked(teacher, 3, 4, 5)), (student, teacher)]
    for arguments in sides:
        found, slopes = values(*arguments), gradients(*arguments)
        for name in NAMES:
            assert not jnp.isnan(found[name]).any(), name
            assert jnp.isfinite(slopes[name][0]).all(), name
            assert jnp.isfinite(slopes[name][2]), name
        for name in (*SKEWED, "jsd", "tvd"):
            assert jnp.isfinite(found[name]).all(), name


def test_kl_is_infinite_exactly_where_its_second_argument_lacks_mass():
    student, teacher = random_logits((3, 6), 21), random_logits((3, 6), 22)
    student_lacks = values(masked(student, 2), teacher)
    assert jnp.isposinf(student_lacks["kl"]).all()
    assert jnp.isfinite(student_lacks["reverse_kl"]).all()
    teacher_lacks = values(student, masked(teacher, 2))
    assert jnp.isposinf(teacher_lacks["reverse_kl"]).all()
    assert jnp.isfinite(teacher_lacks["kl"]).all()
    for name, bounded in (*student_lacks.items(), *teacher_lacks.items()):
        if name in SKEWED:
            assert (bounded <= math.log(10) + 1e-5).all()


def test_a_probability_that_underflows_is_no_mass():
    nearly, nothing = jnp.array([1.0, 0.0, -200.0]), jnp.array([1.0, 0.0, -jnp.inf])
    np.testing.assert_allclose(kl_divergence(nothing, nearly), 0, atol=1e-6)
    np.testing.assert_allclose(reverse_kl_divergence(nearly, nothing), 0, atol=1e-6)


def test_an_infinite_term_is_a_constant_to_the_gradient():
    student, teacher = random_logits((3, 6), 23), random_logits((3, 6), 24)
    q, p = softmax64(masked(student, 2)), softmax64(teacher)
    rest = np.delete(np.arange(6), 2)
    # Of −Σ_rest p log q by the logits: q Σ_rest p − p on the rest.
    expected = np.zeros((3, 6))
    expected[:, rest] = q[:, rest] * p[:, rest].sum(-1, keepdims=True) - p[:, rest]
    by_student = gradients(masked(student, 2), teacher)["kl"][0]
    np.testing.assert_allclose(by_student, expected, atol=1e-6)


def test_nan_is_not_hidden():
    broken, sound = jnp.array([0.0, jnp.nan, 1.0]), jnp.zeros(3)
    for arguments in [(broken, sound), (sound, broken)]:
        for name, value in values(*arguments).items():
            assert jnp.isnan(value), name


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_half_precision_is_computed_in_float32(dtype):
    student, teacher = (random_logits((3, 6), seed, 4.0).astype(dtype) for seed in (25, 26))
    wide = student.astype(jnp.float32), teacher.astype(jnp.float32)
    found, expected = values(student, teacher), values(*wide)
    slopes, expected_slopes = gradients(student, teacher), gradients(*wide)
    for name in NAMES:
        assert found[name].dtype == jnp.float32
        np.testing.assert_allclose(found[name], expected[name], rtol=1e-6, err_msg=name)
        assert slopes[name][0].dtype == dtype
        np.testing.assert_allclose(
            slopes[name][0].astype(jnp.float32), expected_slopes[name][0], rtol=1e-2, atol=1e-4
        )


def test_the_wider_vocabulary_is_cut_to_the_other():
    student, teacher = random_logits((3, 9), 27), random_logits((3, 6), 28)
    expected, expected_back = values(student[:, :6], teacher), values(teacher, student[:, :6])
    slopes = gradients(student, teacher)
    for name, value in values(student, teacher).items():
        np.testing.assert_array_equal(value, expected[name], err_msg=name)
        np.testing.assert_array_equal(slopes[name][0][:, 6:], 0)
    for name, value in values(teacher, student).items():
        np.testing.assert_array_equal(value, expected_back[name], err_msg=name)


def test_vmap_scan_and_an_empty_batch_agree_with_a_batch():
    student, teacher = random_logits((2, 3, 6), 29), random_logits((2, 3, 6), 30)

    @jax.jit
    def by_rows(student, teacher):
        _, scanned = jax.lax.scan(lambda carry, x: (carry, values(*x)), 0, (student, teacher))
        _, slopes = jax.lax.scan(lambda carry, x: (carry, gradients(*x)), 0, (student, teacher))
        mapped = jax.vmap(values)(student, teacher)
        return scanned, mapped, {name: slopes[name][0] for name in NAMES}

    scanned, mapped, slopes = by_rows(student, teacher)
    whole, whole_slopes = values(student, teacher), gradients(student, teacher)
    for name in NAMES:
        np.testing.assert_allclose(scanned[name], whole[name], rtol=1e-6)
        np.testing.assert_allclose(mapped[name], whole[name], rtol=1e-6)
        np.testing.assert_allclose(slopes[name], whole_slopes[name][0], atol=1e-7)
        empty = DIVERGENCES[name](student[:, :0], teacher[:, :0])
        assert empty.shape == (2, 0)


def test_alpha_and_beta_may_be_traced():
    student, teacher = random_logits((3, 6), 31), random_logits((3, 6), 32)
    by_beta = jax.jit(lambda b: jensen_shannon_divergence(student, teacher, beta=b))
    expected = jensen_shannon_divergence(student, teacher, beta=0.3)
    np.testing.assert_allclose(by_beta(0.3), expected, rtol=1e-5)


@pytest.mark.parametrize("share", [0.0, 1.0, -0.1, 2])
@pytest.mark.parametrize(
    ("divergence", "option"),
    [
        (jensen_shannon_divergence, "beta"),
        (skewed_kl_divergence, "alpha"),
        (skewed_reverse_kl_divergence, "alpha"),
    ],
)
def test_shares_outside_the_open_interval_are_refused(divergence, option, share):
    with pytest.raises(ValueError, match=rf"^{option}: expected .* between 0 and 1.*got {share}$"):
        divergence(jnp.zeros(3), jnp.zeros(3), **{option: share})


def test_unknown_name_is_refused_with_the_valid_ones():
    for name in NAMES:
        check_divergence(name)
    with pytest.raises(ValueError, match=r"unknown 'kld'; expected one of 'kl', .*'tvd'$"):
        check_divergence("kld")


@pytest.mark.parametrize("name", NAMES)
def test_leading_axes_must_agree(name):
    with pytest.raises(ValueError, match=r"\(2, 3\) and \(3,\)"):
        DIVERGENCES[name](jnp.zeros((2, 3)), jnp.zeros(3))
