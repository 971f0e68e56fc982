import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from uld_jax.losses.features import (
    aligned_keys,
    attention_loss,
    attention_map,
    hidden_state_loss,
    layer_map,
)

T = 4
CAUSAL = np.tril(np.ones((T, T), bool))


def random_array(shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(0, 1, shape), jnp.float32)


def attention(heads, seed, mask=None, batch=(2,)):
    scores = random_array((*batch, heads, T, T), seed)
    return jax.nn.softmax(scores if mask is None else jnp.where(mask, scores, -jnp.inf))


def hidden64(student, teacher, projection, kind):
    student, teacher = np.asarray(student, np.float64), np.asarray(teacher, np.float64)
    student = student if projection is None else student @ np.asarray(projection, np.float64)
    if kind == "mse":
        return ((student - teacher) ** 2).mean(-1)
    norms = np.linalg.norm(student, axis=-1) * np.linalg.norm(teacher, axis=-1)
    return 1 - (student * teacher).sum(-1) / norms


@pytest.mark.parametrize("kind", ["mse", "cosine"])
@pytest.mark.parametrize("width", [5, 3])
def test_hidden_state_loss_equals_its_formula_in_float64(kind, width):
    student, teacher = random_array((2, 3, width), 1), random_array((2, 3, 5), 2)
    projection = None if width == 5 else random_array((3, 5), 3)
    loss = hidden_state_loss(student, teacher, projection, kind=kind)
    assert loss.shape == (2, 3)
    assert loss.dtype == jnp.float32
    np.testing.assert_allclose(loss, hidden64(student, teacher, projection, kind), rtol=1e-5)


def test_twice_the_cosine_distance_is_the_squared_distance_of_unit_vectors():
    student, teacher = random_array((4, 5), 4), random_array((4, 5), 5)
    unit = [x / jnp.linalg.norm(x, axis=-1, keepdims=True) for x in (student, teacher)]
    squared = ((unit[0] - unit[1]) ** 2).sum(-1)
    loss = hidden_state_loss(student, teacher, kind="cosine")
    np.testing.assert_allclose(2 * loss, squared, rtol=1e-5)


@pytest.mark.parametrize("kind", ["mse", "cosine"])
def test_gradients_of_the_hidden_states_reach_student_and_projection_only(kind):
    with jax.enable_x64(True):
        arrays = random_array((2, 3), 6), random_array((2, 5), 7), random_array((3, 5), 8)
        student, teacher, projection = (a.astype(jnp.float64) for a in arrays)
        check_grads(
            lambda s, m: hidden_state_loss(s, teacher, m, kind=kind),
            (student, projection),
            order=1,
            modes=["rev"],
            eps=1e-6,
        )
        by_teacher = jax.grad(lambda t: hidden_state_loss(student, t, projection, kind=kind).sum())
        np.testing.assert_array_equal(by_teacher(teacher), 0)


@pytest.mark.parametrize("kind", ["mse", "cosine"])
def test_zero_hidden_states_give_no_nan(kind):
    zero, teacher = jnp.zeros((2, 5)), random_array((2, 5), 9).at[1].set(0)
    loss, gradient = jax.value_and_grad(lambda s: hidden_state_loss(s, teacher, kind=kind).sum())(
        zero
    )
    assert jnp.isfinite(loss)
    assert jnp.isfinite(gradient).all()
    assert hidden_state_loss(zero[:0], teacher[:0], kind=kind).shape == (0,)


def test_half_precision_hidden_states_are_compared_in_float32():
    arrays = random_array((3, 3), 10), random_array((3, 5), 11), random_array((3, 5), 12)
    narrow = [a.astype(jnp.bfloat16) for a in arrays]
    loss = hidden_state_loss(*narrow)
    assert loss.dtype == jnp.float32
    wide = hidden_state_loss(*(a.astype(jnp.float32) for a in narrow))
    np.testing.assert_array_equal(loss, wide)
    gradient = jax.grad(lambda s: hidden_state_loss(s, *narrow[1:]).sum())(narrow[0])
    assert gradient.dtype == jnp.bfloat16


@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        (((2, 3), (2, 5)), r"student_hidden: expected shape \(2, 5\).*projection.*got \(2, 3\)$"),
        (((2, 3), (2, 5), (5, 3)), r"projection: expected shape \(3, 5\), got \(5, 3\)$"),
        (((4, 3), (2, 5), (3, 5)), r"student_hidden: expected shape \(2, 5\), got \(4, 5\)$"),
    ],
)
def test_hidden_shapes_that_do_not_match_are_refused(shapes, message):
    with pytest.raises(ValueError, match=message):
        hidden_state_loss(*map(jnp.zeros, shapes))


def attention64(student, teacher, mixture, mask, kind):
    student, teacher = np.asarray(student, np.float64), np.asarray(teacher, np.float64)
    if mixture is not None:
        weights = np.exp(np.asarray(mixture, np.float64))
        weights /= weights.sum(0)
        student = np.einsum("bhqk,hj->bjqk", student, weights)
    elif student.shape[1] != teacher.shape[1]:
        student, teacher = student.mean(1)[:, None], teacher.mean(1)[:, None]
    expected = np.zeros((len(student), T))
    for row, query in np.ndindex(expected.shape):
        keys = np.flatnonzero(mask[query])
        q, p = student[row, :, query][:, keys], teacher[row, :, query][:, keys]
        terms = ((q - p) ** 2).mean(-1) if kind == "mse" else (p * np.log(p / q)).sum(-1)
        expected[row, query] = terms.mean()
    return expected


@pytest.mark.parametrize("kind", ["mse", "kl"])
@pytest.mark.parametrize("mask", [None, CAUSAL])
@pytest.mark.parametrize(("heads", "mixed"), [(3, False), (2, False), (2, True)])
def test_attention_loss_equals_its_formula_in_float64(kind, mask, heads, mixed):
    student, teacher = attention(heads, 13, mask), attention(3, 14, mask)
    mixture = random_array((heads, 3), 15) if mixed else None
    loss = attention_loss(student, teacher, mixture, mask=mask, kind=kind)
    assert loss.shape == (2, T)
    assert loss.dtype == jnp.float32
    full = np.ones((T, T), bool) if mask is None else np.asarray(mask)
    expected = attention64(student, teacher, mixture, full, kind)
    np.testing.assert_allclose(loss, expected, rtol=1e-5, atol=1e-7)


def test_a_mixture_of_zeros_weighs_every_student_head_alike():
    student, teacher = attention(2, 16), attention(3, 17)
    mean = jnp.repeat(student.mean(1, keepdims=True), 3, axis=1)
    loss = attention_loss(student, teacher, jnp.zeros((2, 3)), kind="kl")
    np.testing.assert_allclose(loss, attention_loss(mean, teacher, kind="kl"), rtol=1e-5)


@pytest.mark.parametrize("kind", ["mse", "kl"])
def test_gradients_of_attention_reach_student_and_mixture_only(kind):
    with jax.enable_x64(True):
        scores, teacher, mixture = (
            array.astype(jnp.float64)
            for array in (random_array((2, T, T), 18), attention(3, 19, batch=()), jnp.eye(2, 3))
        )

        def loss(scores, mixture, teacher=teacher):
            probs = jax.nn.softmax(jnp.where(CAUSAL, scores, -jnp.inf))
            return attention_loss(probs, teacher, mixture, mask=CAUSAL, kind=kind)

        check_grads(loss, (scores, mixture), order=1, modes=["rev"], eps=1e-6)
        by_teacher = jax.grad(lambda t: loss(scores, mixture, t).sum())(teacher)
        np.testing.assert_array_equal(by_teacher, 0)


@pytest.mark.parametrize("kind", ["mse", "kl"])
@pytest.mark.parametrize("mixture", [None, np.zeros((2, 2))])
def test_masked_positions_count_for_nothing_even_where_they_are_nan(kind, mixture):
    padded = CAUSAL & (np.arange(T) < 3)[:, None]  # the last query sees nothing
    student, teacher = attention(2, 20, CAUSAL), attention(2, 21, CAUSAL)

    def loss(student, teacher):
        return attention_loss(student, teacher, mixture, mask=padded, kind=kind)

    broken = [jnp.where(padded, x, jnp.nan) for x in (student, teacher)]
    expected = loss(student, teacher)
    assert (expected[:, 1:3] > 0).all()
    np.testing.assert_array_equal(expected[:, 3], 0)
    np.testing.assert_array_equal(loss(*broken), expected)
    gradient = jax.grad(lambda s: loss(s, broken[1]).sum())(broken[0])
    assert jnp.isfinite(gradient).all()
    np.testing.assert_array_equal(jnp.where(padded, 0, gradient), 0)


def test_underflowed_student_attention_gives_a_large_and_finite_kl():
    teacher = jnp.full((1, 2, 2), 0.5)
    scores = jnp.array([[[0.0, -500.0], [0.0, 0.0]]])

    def loss(scores):
        return attention_loss(jax.nn.softmax(scores), teacher, kind="kl")

    value, gradient = loss(scores), jax.grad(lambda s: loss(s).sum())(scores)
    assert 40 < value[0] < 50
    np.testing.assert_allclose(value[1], 0, atol=1e-6)
    assert jnp.isfinite(gradient).all()


def test_half_precision_attention_is_compared_in_float32():
    student, teacher = (attention(2, seed).astype(jnp.bfloat16) for seed in (22, 23))
    loss = attention_loss(student, teacher, kind="kl")
    assert loss.dtype == jnp.float32
    wide = attention_loss(student.astype(jnp.float32), teacher.astype(jnp.float32), kind="kl")
    np.testing.assert_array_equal(loss, wide)


@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        (((2, 4, 4), (2, 5, 5)), r"student_attention: expected shape \(2, 5, 5\), got \(2, 4, 4\)"),
        (((1, 2, 4, 4), (2, 4, 4)), r"student_attention: expected shape \(2, 4, 4\)"),
        (((2, 4, 4), (3, 4, 4), (3, 2)), r"head_mixture: expected shape \(2, 3\), got \(3, 2\)"),
    ],
)
def test_attention_shapes_that_do_not_match_are_refused(shapes, message):
    with pytest.raises(ValueError, match=message):
        attention_loss(*map(jnp.zeros, shapes))


def test_unknown_kinds_are_refused_with_the_valid_ones():
    with pytest.raises(ValueError, match=r"kind: unknown 'kl'; expected one of 'mse', 'cosine'$"):
        hidden_state_loss(jnp.zeros(3), jnp.zeros(3), kind="kl")
    with pytest.raises(ValueError, match=r"kind: unknown 'cosine'; expected one of 'mse', 'kl'$"):
        attention_loss(jnp.zeros((1, 2, 2)), jnp.zeros((1, 2, 2)), kind="cosine")


ROWS = np.array([[0, 0, 0, 1, 1, 0], [2, 3, 3, 3, 0, 0]])
WEIGHTS = np.array([[1, 2, 0, 1, 1, 0], [1, 1, 1, 1, 0, 0]], np.float32)


def whole_map64(query, key, mask, bias, scale, softcap):
    """Key by key, where the score may be anything where the mask is False."""
    query, key = np.asarray(query, np.float64), np.asarray(key, np.float64)
    heads, groups = query.shape[2], query.shape[2] // key.shape[2]
    found = np.zeros((len(query), heads, T + 2, T + 2))
    for b, h, i in np.ndindex(found.shape[:3]):
        keys = np.flatnonzero(mask[b, i])
        scores = key[b, keys, h // groups] @ query[b, i, h] * scale
        scores = softcap * np.tanh(scores / softcap) if softcap else scores
        scores += 0 if bias is None else np.asarray(bias, np.float64)[b, h, i, keys]
        found[b, h, i, keys] = np.exp(scores) / np.exp(scores).sum()
    return found


@pytest.mark.parametrize(("softcap", "biased"), [(0.0, False), (2.0, True)])
def test_a_map_of_aligned_positions_equals_its_formula_in_float64(softcap, biased):
    query, key = random_array((2, T + 2, 4, 3), 30), random_array((2, T + 2, 2, 3), 31)
    bias = random_array((2, 4, T + 2, T + 2), 32) if biased else None
    mask = np.zeros((2, T + 2, T + 2), bool)
    for b, i, j in np.ndindex(mask.shape):
        aligned = WEIGHTS[b, i] > 0 and WEIGHTS[b, j] > 0
        mask[b, i, j] = aligned and ROWS[b, i] == ROWS[b, j] and j <= i
    np.testing.assert_array_equal(aligned_keys(ROWS, WEIGHTS), mask)
    found = attention_map(query, key, mask, bias, scale=0.7, softcap=softcap)
    assert found.dtype == jnp.float32
    expected = whole_map64(query, key, mask, bias, 0.7, softcap)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-7)


def test_gradients_of_a_map_are_right_and_finite_where_nothing_is_seen():
    with jax.enable_x64(True):
        query = random_array((2, T + 2, 4, 3), 33).astype(jnp.float64)
        key = random_array((2, T + 2, 2, 3), 34).astype(jnp.float64)
        mask = aligned_keys(ROWS, WEIGHTS)
        check_grads(
            lambda q, k: attention_map(q, k, mask, scale=0.7, softcap=3.0),
            (query, key),
            order=1,
            modes=["rev"],
        )
        gradient = jax.grad(lambda q: (attention_map(q, key, mask, scale=1.0) ** 2).sum())(query)
        np.testing.assert_array_equal(gradient[WEIGHTS == 0], 0)


def test_jit_vmap_and_scan_agree_with_a_batch():
    hidden = random_array((2, 3, 3), 24), random_array((2, 3, 5), 25)
    maps = attention(2, 26, CAUSAL), attention(3, 27, CAUSAL)
    projection, mixture = random_array((3, 5), 28), random_array((2, 3), 29)

    def losses(rows):
        student, teacher, student_map, teacher_map = rows
        return (
            hidden_state_loss(student, teacher, projection, kind="cosine"),
            attention_loss(student_map, teacher_map, mixture, mask=CAUSAL, kind="kl"),
        )

    @jax.jit
    def by_rows(rows):
        return jax.vmap(losses)(rows), jax.lax.scan(lambda c, r: (c, losses(r)), 0, rows)[1]

    expected = losses((*hidden, *maps))
    for found in by_rows((*hidden, *maps)):
        for one, other in zip(found, expected, strict=True):
            np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize(
    ("layers", "expected"),
    [
        ((4, 12), (2, 5, 8, 11)),
        ((6, 6), (0, 1, 2, 3, 4, 5)),
        ((5, 12), (2, 4, 7, 9, 11)),
        ((3, 2), (0, 1, 1)),
        ((1, 30), (29,)),
    ],
)
def test_layer_map_is_even_and_ends_at_the_last_layer(layers, expected):
    assert layer_map(*layers) == expected


@pytest.mark.parametrize("layers", [(0, 4), (4, 0)])
def test_layer_map_refuses_models_without_layers(layers):
    with pytest.raises(ValueError, match=f"at least 1, got {layers[0]} and {layers[1]}$"):
        layer_map(*layers)
