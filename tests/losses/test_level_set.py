import gzip
import json
from functools import cache, partial
from itertools import pairwise

import hypothesis.extra.numpy as hnp
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.test_util import check_grads

from uld_jax import models
from uld_jax.losses import level_set_uld, uld
from uld_jax.losses.level_set import (
    _Buckets,
    _histogram,
    _look_up,
    _matmul_histogram,
    _matmul_look_up,
    level_set_distance,
)

SHAPES = [(1, 5), (40, 24), (257, 600)]
few_examples = settings(max_examples=100, deadline=None)


@cache
def compiled(bits):
    """(value, bound) and the value's gradient of every row, a few rows at a time."""

    def one(pair):
        student, teacher = pair
        distance = partial(level_set_uld, bucket_bits=bits)
        gradient, out = jax.grad(
            lambda s: (distance(s, teacher)[0], distance(s, teacher)), 0, True
        )(student)
        return *out, gradient

    return jax.jit(lambda s, t: jax.lax.map(one, (s, t), batch_size=20))


def exact_distance(student, teacher):
    """Of float64 probabilities, by the definition."""

    def descending(logits, width):
        logits = np.asarray(logits, np.float64)
        weights = np.exp(logits - logits.max(-1, keepdims=True))
        probs = np.sort(weights / weights.sum(-1, keepdims=True))[..., ::-1]
        return np.pad(probs, [(0, 0)] * (probs.ndim - 1) + [(0, width - probs.shape[-1])])

    width = max(student.shape[-1], teacher.shape[-1])
    return np.abs(descending(student, width) - descending(teacher, width)).sum(-1)


def rounding(student_vocab, teacher_vocab):
    """The part of the bound that is there whatever the buckets hold."""
    return 4 * np.finfo(np.float32).eps * np.log2(student_vocab + teacher_vocab + 1)


def normal(rng, shape, scale):
    return rng.normal(0, scale, shape)


def one_hot(rng, shape):
    logits = np.full(shape, -np.inf)
    logits[np.arange(shape[0]), rng.integers(shape[1], size=shape[0])] = 0
    return logits


def masked(rng, shape):
    """At least one entry of a row is left."""
    return np.where(rng.random(shape) < 0.5, one_hot(rng, shape), normal(rng, shape, 3))


def confident(rng, shape):
    return normal(rng, shape, 1) + 15 * (one_hot(rng, shape) == 0)


def bf16(rng, shape):
    return np.asarray(jnp.asarray(normal(rng, shape, 2), jnp.bfloat16), np.float32)


GENERATORS = [
    *(partial(normal, scale=scale) for scale in (0.01, 0.3, 1, 3, 10, 50)),
    one_hot,
    masked,
    confident,
    bf16,
    lambda rng, shape: np.zeros(shape),
    lambda rng, shape: rng.integers(-3, 4, shape).astype(float),
    lambda rng, shape: -2 * np.log(np.arange(1, shape[1] + 1)) + normal(rng, shape, 0.1),
]


def cases(shape, rows_of_a_kind, seed=0):
    """Pairs of one kind, pairs of two kinds, and pairs that are nearly or wholly one multiset."""
    rng = np.random.default_rng(seed)
    students, teachers = [], []

    def add(student, teacher):
        students.append(student)
        teachers.append(teacher)

    for i, generate in enumerate(GENERATORS):
        student_shape, teacher_shape = ((rows_of_a_kind, width) for width in shape)
        student = generate(rng, student_shape)
        add(student, generate(rng, teacher_shape))
        add(student, GENERATORS[(i * 5 + 3) % len(GENERATORS)](rng, teacher_shape))
        # The student's logits in another order, cut or masked to the teacher's width.
        order = rng.permutation(shape[0])[: shape[1]]
        copy = np.full(teacher_shape, -np.inf)
        copy[:, : order.size] = student[:, order]
        copy[:, 0] = np.where(np.isneginf(copy).all(-1), 0, copy[:, 0])
        add(student, copy)
        add(student, copy + normal(rng, teacher_shape, 1e-4))
    return tuple(jnp.asarray(np.concatenate(x), jnp.float32) for x in (students, teachers))


# 13 generators, 4 pairs of each: 6 rows of a pair for the first seven, 1 for the last are 2,236.
@pytest.mark.parametrize(
    ("bits", "shape", "rows"),
    [
        (1, SHAPES[1], 6),
        (1, SHAPES[2], 6),
        (4, SHAPES[2], 6),
        (7, SHAPES[0], 6),
        (7, SHAPES[1], 6),
        (7, SHAPES[2], 6),
        (10, SHAPES[1], 6),
        (14, SHAPES[1], 1),
    ],
)
def test_the_bound_holds_in_more_than_2000_cases(bits, shape, rows):
    student, teacher = cases(shape, rows, seed=bits)
    value, bound, gradient = compiled(bits)(student, teacher)
    exact = exact_distance(student, teacher)
    slack = rounding(*shape)
    assert (bound >= slack).all()
    assert (np.abs(value - exact) <= bound).all()
    assert (value <= exact + slack).all()
    assert (value <= 2 + slack).all()
    assert jnp.isfinite(gradient).all()
    np.testing.assert_allclose(gradient.sum(-1), 0, atol=1e-6)


def test_more_buckets_make_the_bound_smaller_on_the_whole():
    # Not in each case: a part of a bucket can get the other sign than the whole had.
    student, teacher = cases(SHAPES[1], rows_of_a_kind=4)
    slack = rounding(*SHAPES[1])
    means = [float((compiled(bits)(student, teacher)[1] - slack).mean()) for bits in (1, 7, 10)]
    for coarse, fine in pairwise(means):
        assert fine < coarse / 4


adversarial = hnp.arrays(
    np.float32,
    6,
    elements=st.one_of(
        st.floats(-100, 100, width=32),
        st.sampled_from([0.0, 1e-7, -1e-7, 0.6931472, 1.3862944, -28.0, -50.0, -np.inf]),
    ),
).filter(lambda x: not np.isneginf(x).all())


@given(adversarial, adversarial, st.sampled_from([1, 7]))
@few_examples
def test_the_bound_holds_where_hypothesis_looks_for_trouble(student, teacher, bits):
    value, bound, gradient = compiled(bits)(student[None], teacher[None])
    exact = exact_distance(student, teacher)
    assert abs(value[0] - exact) <= bound[0]
    assert value[0] <= exact + rounding(6, 6)
    assert jnp.isfinite(gradient).all()


@pytest.mark.parametrize("bits", [1, 7])
def test_is_symmetric_and_does_not_see_the_order_of_a_vocabulary(bits):
    student, teacher = cases(SHAPES[1], rows_of_a_kind=4, seed=20)
    value, bound, gradient = compiled(bits)(student, teacher)
    other_way = level_set_uld(teacher, student, bucket_bits=bits)
    np.testing.assert_allclose(other_way[0], value, atol=2e-6)
    np.testing.assert_allclose(other_way[1], bound, atol=1e-6, rtol=1e-5)
    # Powers of two, whose sums no order changes: a probability stays in its bucket.
    rng = np.random.default_rng(21)
    student = np.log(2.0) * rng.integers(-4, 4, (208, 40))
    teacher = np.log(2.0) * rng.integers(-4, 4, (208, 24))
    value, bound, gradient = compiled(bits)(student, teacher)
    order, teacher_order = rng.permutation(40), rng.permutation(24)
    permuted = compiled(bits)(student[:, order], teacher[:, teacher_order])
    np.testing.assert_allclose(permuted[0], value, atol=2e-6)
    np.testing.assert_allclose(permuted[1], bound, atol=1e-6, rtol=1e-5)
    np.testing.assert_allclose(permuted[2], gradient[:, order], atol=1e-6)


@pytest.mark.parametrize("bits", [1, 7])
def test_equal_multisets_have_distance_zero(bits):
    logits, _ = cases((24, 24), rows_of_a_kind=4, seed=22)
    value, _, gradient = compiled(bits)(logits, logits)
    np.testing.assert_array_equal(value, 0)
    np.testing.assert_array_equal(gradient, 0)
    order = np.random.default_rng(23).permutation(24)
    reordered = compiled(bits)(logits, logits[:, order])[0]
    np.testing.assert_allclose(reordered, 0, atol=2e-6)


def test_one_hot_teacher_is_twice_what_the_largest_probability_lacks():
    student, _ = cases(SHAPES[1], rows_of_a_kind=4, seed=24)
    teacher = jnp.full((student.shape[0], 24), -jnp.inf).at[:, 7].set(0)
    value, bound, _ = compiled(7)(student, teacher)
    expected = 2 * (1 - jax.nn.softmax(student).max(-1))
    assert (np.abs(value - expected) <= bound).all()
    certain = bound <= 1.01 * rounding(*SHAPES[1])
    assert certain.sum() > 100
    np.testing.assert_allclose(value[certain], expected[certain], atol=1e-6)


@pytest.mark.parametrize("bits", [7, 10])
def test_gradient_is_the_exact_one_where_no_bucket_is_in_doubt(bits):
    rng = np.random.default_rng(25)
    scales = np.geomspace(0.3, 20, 200)[:, None]
    student, teacher = (
        jnp.asarray(scales * rng.normal(size=(200, width)), jnp.float32) for width in SHAPES[1]
    )
    value, bound, gradient = compiled(bits)(student, teacher)
    exact_value, exact = jax.vmap(jax.value_and_grad(partial(uld, method="sort")))(student, teacher)
    certain = bound <= 1.001 * rounding(*SHAPES[1])
    assert certain.sum() >= {7: 100, 10: 150}[bits]
    np.testing.assert_allclose(value[certain], exact_value[certain], atol=1e-6)
    np.testing.assert_allclose(gradient[certain], exact[certain], atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize(("student_width", "teacher_width"), [(7, 7), (5, 12), (12, 5)])
def test_gradient_equals_finite_differences(student_width, teacher_width):
    rng = np.random.default_rng(26)
    with jax.enable_x64(True):
        student = jnp.asarray(rng.normal(0, 2, (2, student_width)))
        teacher = jnp.asarray(rng.normal(0, 2, (2, teacher_width)))
        value, bound = level_set_uld(student, teacher)
        assert (value.dtype, bound.dtype) == (jnp.float64, jnp.float64)
        assert (bound < 1e-3).all()
        distance = jax.jit(lambda s: level_set_uld(s, teacher)[0])
        check_grads(distance, (student,), order=1, modes=["rev"], eps=1e-4)


@pytest.mark.parametrize(
    ("student", "teacher"),
    [
        (np.array([[0.0, -np.inf, 2.0]]), np.array([[-np.inf, 1.0, -np.inf]])),
        (np.array([[1e4, 0.0, -1e4]]), np.array([[1e4, 1e4, 0.0]])),
        (np.array([[3e38, -3e38, 0.0]]), np.array([[1e30, 0.0, 0.0]])),
        (np.full((1, 3), 7.0), np.full((1, 3), -7.0)),
        (np.zeros((4, 1)), np.zeros((4, 3))),
        (np.zeros((4, 1)), np.zeros((4, 1))),
        (np.zeros((0, 5)), np.zeros((0, 3))),
        (np.zeros((2, 0, 5)), np.zeros((2, 0, 3))),
    ],
    ids=["masked", "large", "largest", "equal", "V=1", "V=U=1", "no rows", "no positions"],
)
def test_odd_inputs_never_give_nan(student, teacher):
    student, teacher = (jnp.asarray(x, jnp.float32) for x in (student, teacher))
    (value, bound), pull_back = jax.vjp(lambda s: level_set_uld(s, teacher), student)
    (gradient,) = pull_back((jnp.ones_like(value), jnp.ones_like(bound)))
    assert value.shape == bound.shape == student.shape[:-1]
    assert gradient.shape == student.shape
    assert jnp.isfinite(gradient).all()
    if student.size:
        assert (np.abs(value - exact_distance(student, teacher)) <= bound).all()


def test_the_bound_has_no_gradient_and_neither_has_the_teacher():
    student, teacher = cases(SHAPES[1], rows_of_a_kind=1)
    (value, bound), pull_back = jax.vjp(level_set_uld, student, teacher)
    by_student, by_teacher = pull_back((jnp.zeros_like(value), jnp.ones_like(bound)))
    np.testing.assert_array_equal(by_student, 0)
    by_student, by_teacher = pull_back((jnp.ones_like(value), jnp.ones_like(bound)))
    assert (by_student != 0).any()
    np.testing.assert_array_equal(by_teacher, 0)


def test_nan_is_not_hidden():
    logits = jnp.array([0.0, jnp.nan])
    assert jnp.isnan(level_set_uld(logits, jnp.zeros(2))[0])
    assert jnp.isnan(level_set_uld(jnp.zeros(2), logits)[0])


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_half_precision_is_computed_in_float32(dtype):
    rng = np.random.default_rng(27)
    student, teacher = (jnp.asarray(rng.normal(0, 4, (52, n))).astype(dtype) for n in SHAPES[1])
    wide = student.astype(jnp.float32), teacher.astype(jnp.float32)

    @jax.jit
    def value_bound_and_gradient(student, teacher):
        out, pull_back = jax.vjp(lambda s: level_set_uld(s, teacher), student)
        return *out, pull_back((jnp.ones_like(out[0]), out[1]))[0]

    narrow = value_bound_and_gradient(student, teacher)
    expected = value_bound_and_gradient(*wide)
    assert [x.dtype for x in narrow] == [jnp.float32, jnp.float32, dtype]
    for actual, wanted in zip(narrow, expected, strict=True):
        np.testing.assert_array_equal(actual, wanted.astype(actual.dtype))


def test_temperatures_divide_the_logits():
    student, teacher = (x[:26] for x in cases(SHAPES[1], rows_of_a_kind=1))
    scaled = level_set_uld(student, teacher, student_temperature=2.0, teacher_temperature=0.5)
    for actual, expected in zip(scaled, level_set_uld(student / 2, teacher * 2), strict=True):
        np.testing.assert_array_equal(actual, expected)


def test_probabilities_may_be_any_part_of_a_distribution():
    # A truncated teacher: its probabilities sum to less than 1.
    student = jnp.log(jnp.array([0.5, 0.3, 0.2]))
    value, bound = level_set_distance(student, jnp.array([0.1, 0.6]), of_logits=False)
    np.testing.assert_allclose(value, 0.1 + 0.2 + 0.2, atol=float(bound))


@pytest.mark.parametrize(("bits", "vocab"), [(1, 9001), (7, 100), (7, 4096), (7, 9001), (10, 5000)])
def test_the_matrix_units_formulation_is_the_same_to_the_bit(bits, vocab):
    rng = np.random.default_rng(28)
    logits = np.stack([normal(rng, vocab, 2), normal(rng, vocab, 40), np.zeros(vocab)])
    logits[2, vocab // 2] = -np.inf
    probs = jax.nn.softmax(jnp.asarray(logits, jnp.float32))
    buckets = _Buckets(bits)
    signs = jnp.asarray(rng.integers(-1, 2, buckets.count), jnp.float32)
    by_matmul = jax.jit(partial(_matmul_histogram, buckets))
    look_up = jax.jit(partial(_matmul_look_up, buckets))
    means = jnp.array([0.0, -0.3, 0.7])
    by_scatter, by_gather = (
        _histogram(buckets, probs),
        _look_up(buckets, probs, jnp.stack([signs] * 3), means),
    )
    for i in range(3):
        np.testing.assert_array_equal(by_matmul(probs[i]), by_scatter[i])
        np.testing.assert_array_equal(look_up(probs[i], signs) - means[i], by_gather[i])


@pytest.mark.parametrize("bits", [0, 15])
def test_impossible_widths_of_buckets_are_refused(bits):
    with pytest.raises(ValueError, match=rf"bucket_bits: expected 1 to 14, got {bits}"):
        level_set_uld(jnp.zeros(3), jnp.zeros(3), bucket_bits=bits)


@pytest.mark.parametrize("bits", [1, 7])
def test_probabilities_below_the_lowest_edge_cost_next_to_nothing(bits):
    student = jnp.full(3000, -30.0).at[0].set(0)
    teacher = jnp.log(jnp.array([0.75, 0.25]))
    value, bound = level_set_uld(student, teacher, bucket_bits=bits)
    assert abs(value - exact_distance(student, teacher)) <= bound
    assert bound <= rounding(3000, 2) + 1e-8


@pytest.fixture(scope="module")
def real_logits(shared, gemma_gguf, smollm_gguf):
    """Next-token logits of both models at 48 positions of one SQuAD paragraph."""
    with gzip.open(shared / "data" / "squad" / "dev-v1.1.json.gz", "rt", encoding="utf-8") as file:
        text = json.load(file)["data"][0]["paragraphs"][0]["context"]

    def logits(path):
        loaded = models.load(path)
        tokens = jnp.asarray([loaded.tokenizer(text).input_ids[:48]])
        return loaded.model(tokens)[0].astype(jnp.float32)

    return logits(smollm_gguf), logits(gemma_gguf)


@pytest.mark.slow
@pytest.mark.real_models
def test_error_on_real_models_is_far_below_a_ten_thousandth(real_logits):
    student, teacher = real_logits
    assert (student.shape, teacher.shape) == ((48, 49_152), (48, 262_144))
    value, bound = level_set_uld(student, teacher)
    error = np.abs(value - exact_distance(student, teacher))
    assert (error <= bound).all()
    assert error.mean() <= 1e-5
    assert bound.mean() <= 1e-3
    np.testing.assert_array_equal(uld(student, teacher, method="level_set"), value)
