import itertools
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.optimize import linprog

from uld_jax.losses import transport, uld
from uld_jax.losses.transport import transport_loss

SIZES = [(6, 9), (9, 6), (1, 5)]


def random_logits(shape, seed=0, scale=2.0):
    return np.random.default_rng(seed).normal(0, scale, shape).astype(np.float32)


def random_cost(shape, seed=0):
    return np.random.default_rng(seed).uniform(0, 3, shape).astype(np.float32)


def softmax(logits):
    weights = np.exp(np.asarray(logits, np.float64) - np.max(logits))
    return weights / weights.sum()


def exact(q, p, cost):
    """The transport cost as the linear program that defines it."""
    sums = [np.kron(np.eye(len(q)), np.ones(len(p))), np.kron(np.ones(len(q)), np.eye(len(p)))]
    return linprog(np.ravel(cost), A_eq=np.vstack(sums), b_eq=np.concatenate([q, p])).fun


def assert_certified(loss, expected, max_cost):
    slack = 2e-6 * max_cost
    assert np.all(np.asarray(loss.lower) <= expected + slack)
    assert np.all(np.asarray(loss.upper) >= expected - slack)
    assert np.all((loss.lower <= loss.value) & (loss.value <= loss.upper))


@pytest.mark.parametrize("widths", SIZES)
def test_whole_vocabularies_give_the_exact_cost_as_epsilon_falls(widths):
    student, teacher = (random_logits((3, w), w) for w in widths)
    cost = random_cost(widths)
    expected = [exact(softmax(s), softmax(t), cost) for s, t in zip(student, teacher, strict=True)]
    rough = transport_loss(student, teacher, cost, epsilon=0.2)
    fine = transport_loss(student, teacher, cost, epsilon=0.003, max_iterations=5000)
    for loss in (rough, fine):
        assert_certified(loss, expected, cost.max())
        np.testing.assert_allclose(loss.student_mass, 1, rtol=1e-6)
        np.testing.assert_allclose(loss.teacher_mass, 1, rtol=1e-6)
    assert np.all(fine.upper - fine.lower < 0.02)
    assert widths[0] == 1 or np.all(rough.upper - rough.lower > 2 * (fine.upper - fine.lower))


@pytest.mark.parametrize("top_k", [1, 3, 7])
@pytest.mark.parametrize("scale", [0.1, 3.0])
def test_the_full_cost_lies_in_the_interval_of_the_top_tokens(top_k, scale):
    student, teacher = random_logits((8, 6), 1, scale), random_logits((8, 9), 2, scale)
    cost = random_cost((6, 9), 3)
    loss = transport_loss(student, teacher, cost, top_k=top_k, epsilon=0.02)
    expected = [exact(softmax(s), softmax(t), cost) for s, t in zip(student, teacher, strict=True)]
    assert_certified(loss, expected, cost.max())
    rests = (1 - loss.student_mass) + (1 - loss.teacher_mass)
    promised = cost.max() * rests + (loss.upper - loss.value)
    assert np.all(loss.upper - loss.lower <= promised + 1e-5)
    assert np.all(loss.upper - loss.value < 0.03 * cost.max())
    kept = [np.sort(softmax(t))[-top_k:].sum() for t in teacher]
    np.testing.assert_allclose(loss.teacher_mass, kept, rtol=1e-5)


@pytest.mark.parametrize("corner", [0.0, 1.0])
def test_the_bounds_hold_whatever_the_dropped_tokens_cost(corner):
    student, teacher = random_logits((4, 6), 4), random_logits((4, 6), 5)
    for s, t in zip(student, teacher, strict=True):
        cost = np.full((6, 6), corner, np.float32)
        top = np.ix_(np.argsort(-s)[:3], np.argsort(-t)[:3])
        cost[top] = random_cost((3, 3), 6) / 3
        cost[np.argsort(-s)[5], np.argsort(-t)[5]] = 1  # so that max_cost is 1
        loss = transport_loss(s, t, cost, top_k=3, epsilon=0.02)
        assert_certified(loss, exact(softmax(s), softmax(t), cost), 1)


def test_the_bounds_hold_without_convergence():
    student, teacher, cost = random_logits((8, 6), 7), random_logits((8, 9), 8), random_cost((6, 9))
    expected = [exact(softmax(s), softmax(t), cost) for s, t in zip(student, teacher, strict=True)]
    loss = transport_loss(student, teacher, cost, epsilon=1e-3, max_iterations=1)
    assert_certified(loss, expected, cost.max())
    assert np.any(loss.upper - loss.lower > 0.05)


def test_temperatures_divide_the_logits():
    student, teacher, cost = random_logits(6, 9), random_logits(9, 10), random_cost((6, 9))
    options = {"student_temperature": 2.0, "teacher_temperature": 0.5}
    loss = transport_loss(student, teacher, cost, **options)
    plain = transport_loss(student / 2, teacher * 2, cost)
    np.testing.assert_allclose(loss.value, plain.value, rtol=1e-5)


def test_scaling_the_cost_scales_everything():
    student, teacher, cost = random_logits(6, 9), random_logits(9, 10), random_cost((6, 9))
    small, large = (transport_loss(student, teacher, c * cost, top_k=4) for c in (1, 256))
    for field in ("value", "lower", "upper"):
        np.testing.assert_allclose(getattr(large, field), 256 * getattr(small, field), rtol=1e-5)
    nothing = transport_loss(student, teacher, 0 * cost, top_k=4)
    assert nothing.value == nothing.lower == nothing.upper == 0


@pytest.mark.parametrize("widths", [(5, 5), (4, 7), (7, 4)])
def test_the_uniform_cost_gives_half_the_uld_distance(widths):
    student, teacher = (random_logits((3, w), 20 + w) for w in widths)
    distance = uld(student, teacher)
    ranks = 1 - np.eye(*widths)
    for s, t, d in zip(student, teacher, distance, strict=True):
        ordered = exact(np.sort(softmax(s))[::-1], np.sort(softmax(t))[::-1], ranks)
        np.testing.assert_allclose(ordered, d / 2, atol=1e-6)
    uniform = transport.UniformCost()
    loss = transport_loss(student, teacher, uniform, epsilon=0.01, max_iterations=5000)
    assert_certified(loss, distance / 2, 1)
    assert np.all(loss.upper - loss.lower < 0.03)
    assert_certified(transport_loss(student, teacher, uniform, top_k=2), distance / 2, 1)


def test_no_identification_of_tokens_is_better_than_by_rank():
    student, teacher = random_logits(5, 30), random_logits(5, 31)
    q, p = softmax(student), softmax(teacher)
    each = [exact(q[list(order)], p, 1 - np.eye(5)) for order in itertools.permutations(range(5))]
    np.testing.assert_allclose(min(each), uld(student, teacher) / 2, atol=1e-6)
    assert max(each) > min(each) + 0.1


def test_a_constant_cost_gives_that_constant():
    student, teacher = random_logits((3, 6), 32), random_logits((3, 9), 33)
    loss, gradient = jax.value_and_grad(
        lambda s: transport_loss(s, teacher, jnp.ones((6, 9))).value.sum()
    )(student)
    np.testing.assert_allclose(loss, 3, rtol=1e-6)
    np.testing.assert_allclose(gradient, 0, atol=1e-6)


@pytest.mark.parametrize("top_k", [4, 9])
def test_gradient_equals_finite_differences_of_the_exact_cost(top_k):
    student, teacher, cost = random_logits(6, 40), random_logits(9, 41), random_cost((6, 9), 42)

    def exact_with_rests_at_max_cost(logits):
        q, p = softmax(logits), softmax(teacher)
        small = np.full((min(top_k, 6) + 1, top_k + 1), cost.max())
        rows, columns = np.argsort(-student)[:top_k], np.argsort(-teacher)[:top_k]
        small[:-1, :-1] = cost[np.ix_(rows, columns)]
        q, p = q[rows], p[columns]
        return exact(np.append(q, 1 - q.sum()), np.append(p, 1 - p.sum()), small)

    options = {"top_k": top_k, "epsilon": 0.003, "max_iterations": 5000, "threshold": 1e-5}
    gradient = jax.grad(lambda s: transport_loss(s, teacher, cost, **options).value)(student)
    steps = 1e-4 * np.eye(6)
    up, down = ([exact_with_rests_at_max_cost(student + c * e) for e in steps] for c in (1, -1))
    np.testing.assert_allclose(gradient, np.subtract(up, down) / 2e-4, atol=5e-3)
    assert np.abs(gradient).max() > 0.05


def test_the_potentials_support_the_exact_cost_from_below():
    """The tangent plane in q, up to the certified gap, at an epsilon far from the limit."""
    student, teacher, cost = random_logits(6, 43), random_logits(9, 44), random_cost((6, 9), 45)
    loss, pull_back = jax.vjp(lambda s: transport_loss(s, teacher, cost, epsilon=0.3), student)
    zero = jax.tree.map(jnp.zeros_like, loss)
    one = transport.TransportLoss(jnp.ones(()), *(getattr(zero, f) for f in FIELDS[1:]))
    (gradient,) = pull_back(one)
    q = softmax(student)
    f = np.asarray(gradient) / q  # the potentials, centred
    for seed in range(20):
        other = np.random.default_rng(seed).dirichlet(np.ones(6) / 2)
        tangent = float(loss.value) + f @ (other - q)
        assert tangent <= exact(other, softmax(teacher), cost) + 1e-5


FIELDS = ("value", "lower", "upper", "student_mass", "teacher_mass")


@pytest.mark.parametrize("field", FIELDS)
def test_only_the_value_has_a_gradient_and_only_for_the_student(field):
    student, teacher, cost = random_logits(6, 46), random_logits(9, 47), random_cost((6, 9), 48)

    def scalar(*args):
        return getattr(transport_loss(*args, top_k=4), field)

    by_student, by_teacher, by_cost = jax.grad(scalar, (0, 1, 2))(student, teacher, cost)
    assert bool(np.any(by_student != 0)) == (field == "value")
    assert not np.any(by_teacher)
    assert not np.any(by_cost)


@pytest.mark.parametrize("top_k", [3, 9])
def test_masked_vocabulary_entries_change_nothing(top_k):
    student, teacher, cost = random_logits(6, 50), random_logits(9, 51), random_cost((6, 9), 52)

    def value_and_gradient(s, t, c):
        loss = transport_loss(s, t, c, top_k=top_k)
        return loss.value, loss

    (_, plain), gradient = jax.value_and_grad(value_and_gradient, has_aux=True)(
        student, teacher, cost
    )
    masked = np.append(student, [-np.inf] * 3), np.append(teacher, [-np.inf] * 2)
    padded = np.pad(cost, ((0, 3), (0, 2)))
    (_, loss), masked_gradient = jax.value_and_grad(value_and_gradient, has_aux=True)(
        *masked, padded
    )
    assert np.all(np.isfinite(masked_gradient))
    np.testing.assert_array_equal(masked_gradient[6:], 0)
    expected = exact(softmax(student), softmax(teacher), cost)
    assert_certified(loss, expected, cost.max())
    np.testing.assert_allclose(loss.value, plain.value, atol=1e-3)
    np.testing.assert_allclose(masked_gradient[:6], gradient, atol=2e-2)


def test_one_hot_sides_give_the_cost_of_the_pair():
    cost = random_cost((4, 5), 53)
    student, teacher = np.full(4, -np.inf), np.full(5, -np.inf)
    student[2] = teacher[1] = 0
    loss = transport_loss(student, teacher, cost)
    for bound in (loss.value, loss.lower, loss.upper):
        np.testing.assert_allclose(bound, cost[2, 1], rtol=1e-5)


def test_works_under_vmap_scan_and_with_any_leading_axes():
    student, teacher = random_logits((2, 3, 6), 60), random_logits((2, 3, 9), 61)
    cost = jnp.asarray(random_cost((6, 9), 62))

    def gradient(s, t):
        return jax.grad(lambda s: transport_loss(s, t, cost, top_k=4).value.sum())(s)

    expected = gradient(student, teacher)
    mapped = jax.jit(jax.vmap(jax.vmap(gradient)))(student, teacher)
    _, scanned = jax.lax.scan(lambda c, x: (c, gradient(*x)), None, (student, teacher))
    np.testing.assert_allclose(mapped, expected, atol=1e-5)
    np.testing.assert_allclose(scanned, expected, atol=1e-5)
    empty = transport_loss(student[:0], teacher[:0], cost)
    assert [getattr(empty, field).shape for field in FIELDS] == [(0, 3)] * 5
    assert gradient(student[:0], teacher[:0]).shape == (0, 3, 6)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_computes_narrow_logits_in_float32(dtype):
    student, teacher = (jnp.asarray(random_logits(w, w), dtype) for w in (6, 9))
    cost = random_cost((6, 9))
    loss = transport_loss(student, teacher, cost)
    wide = transport_loss(student.astype(jnp.float32), teacher.astype(jnp.float32), cost)
    assert loss.value.dtype == jnp.float32
    assert loss.value == wide.value


def test_float64_stays_float64():
    with jax.enable_x64(True):
        student, teacher = (random_logits(w, w).astype(np.float64) for w in (6, 9))
        loss = transport_loss(student, teacher, random_cost((6, 9)))
        assert {getattr(loss, field).dtype for field in FIELDS} == {np.dtype(np.float64)}


def test_edit_distances_by_hand():
    cost = transport.levenshtein_cost(["kitten", "cat", "", "été"], ["sitting", "cat", "ete"])
    expected = [[3 / 7, 5 / 6, 4 / 6], [6 / 7, 0, 1], [1, 1, 1], [6 / 7, 1, 2 / 3]]
    assert cost.dtype == np.float32
    np.testing.assert_allclose(cost, expected, rtol=1e-6)


def test_edit_distances_on_demand_equal_the_matrix():
    student_tokens = ["the", " cat", " cats", " sat", "s", ""]
    teacher_tokens = ["th", "e", " cat", " mat", " the", "sat", "at", "c", "s"]
    student, teacher = random_logits((2, 3, 6), 70), random_logits((2, 3, 9), 71)
    matrix = transport.levenshtein_cost(student_tokens, teacher_tokens)
    lazy = transport.LevenshteinCost(student_tokens, teacher_tokens)

    def value(s, cost):
        return transport_loss(s, teacher, cost, top_k=4).value.sum()

    for one, other in zip(
        jax.value_and_grad(value)(student, lazy),
        jax.value_and_grad(value)(student, matrix),
        strict=True,
    ):
        np.testing.assert_allclose(one, other, atol=1e-5)


def test_tokens_past_the_end_of_the_list_cost_the_most():
    cost = transport.LevenshteinCost(["a", "b"], ["b"])
    ids = jnp.arange(3)
    np.testing.assert_array_equal(cost(ids, ids), [[1, 1, 1], [0, 1, 1], [1, 1, 1]])


@pytest.mark.parametrize("dtype", [np.float32, jnp.bfloat16])
def test_embedding_costs_are_l2_distances(dtype):
    student, teacher = (jnp.asarray(random_logits((w, w - 2), w), dtype) for w in (6, 9))
    projection = jnp.asarray(random_logits((4, 7), 80), dtype)
    cost = transport.embedding_cost(student, teacher, projection)
    student_64, teacher_64, projection_64 = (
        np.asarray(x.astype(jnp.float32), np.float64) for x in (student, teacher, projection)
    )
    gaps = (student_64 @ projection_64)[:, None] - teacher_64[None]
    expected = np.linalg.norm(gaps, axis=-1)
    student_ids, teacher_ids = np.array([5, 0, 3]), np.array([8, 1])
    distances = cost(jnp.asarray(student_ids), jnp.asarray(teacher_ids))
    np.testing.assert_allclose(distances, expected[np.ix_(student_ids, teacher_ids)], rtol=1e-5)
    assert expected.max() <= cost.max_cost <= 2 * expected.max()


def test_embeddings_of_the_same_tokens_move_them_for_nothing():
    embedding = random_logits((6, 4), 81)
    cost = transport.embedding_cost(embedding, embedding[::-1])
    student = random_logits((3, 6), 82)
    loss = transport_loss(student, student[:, ::-1], cost, epsilon=0.005)
    np.testing.assert_allclose(loss.upper, 0, atol=0.02)
    moved = transport_loss(student, student, cost, epsilon=0.005)
    assert np.all(moved.lower > 0.2)


GOOD = {"student_logits": np.zeros(6), "teacher_logits": np.zeros(9), "cost": np.zeros((6, 9))}
BAD = [
    ({"top_k": 0}, "top_k: expected more than 0, got 0"),
    ({"max_iterations": 0}, "max_iterations: expected more than 0, got 0"),
    ({"epsilon": 0.0}, "epsilon: expected more than 0, got 0.0"),
    ({"epsilon": -1.0}, "epsilon: expected more than 0, got -1.0"),
    ({"threshold": 0.0}, "threshold: expected more than 0, got 0.0"),
    ({"cost": np.zeros((9, 6))}, r"cost: expected the shape \[V, U\] = \(6, 9\), got \(9, 6\)"),
    ({"teacher_logits": np.zeros((2, 9))}, "student and teacher: expected the same axes"),
    (
        {"cost": transport.embedding_cost(np.zeros((5, 2)), np.zeros((9, 2)))},
        r"cost: expected embeddings of \(6, 9\) tokens, got \(5, 9\)",
    ),
]


@pytest.mark.parametrize(("change", "message"), BAD)
def test_refuses_what_does_not_fit(change, message):
    with pytest.raises(ValueError, match=message):
        transport_loss(**{**GOOD, **change})


@pytest.mark.parametrize(
    ("projection", "message"),
    [(None, r"\[D, E\] = .2, 3., got None"), (np.zeros((3, 2)), r"\[D, E\] = .2, 3., got .3, 2.")],
)
def test_refuses_embeddings_that_do_not_share_a_space(projection, message):
    with pytest.raises(ValueError, match=message):
        transport.embedding_cost(np.zeros((5, 2)), np.zeros((4, 3)), projection)


def test_a_missing_extra_is_named(monkeypatch):
    for name in [m for m in sys.modules if m.split(".")[0] in ("ott", "rapidfuzz")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "ott", None)
    monkeypatch.setitem(sys.modules, "rapidfuzz", None)
    with pytest.raises(
        ImportError, match=r"^transport needs ott-jax: pip install 'uld-jax\[ot\]'$"
    ):
        transport_loss(np.zeros(2), np.zeros(11), np.zeros((2, 11)))
    with pytest.raises(ImportError, match=r"^levenshtein needs rapidfuzz: pip install"):
        transport.levenshtein_cost(["a"], ["b"])
    cost = transport.embedding_cost(np.zeros((1, 2)), np.ones((1, 2)))
    np.testing.assert_allclose(cost(jnp.array([0]), jnp.array([0])), 2**0.5, rtol=1e-6)


def test_rows_over_a_mesh_equal_one_device():
    auto = (jax.sharding.AxisType.Auto,)
    mesh = jax.make_mesh((4,), ("data",), devices=jax.devices()[:4], axis_types=auto)
    rows = jax.sharding.PartitionSpec("data")
    student, teacher = random_logits((8, 6)), random_logits((8, 9), 1)
    cost = random_cost((6, 9))

    def gradient(student, teacher):
        return jax.grad(lambda s: transport_loss(s, teacher, cost, top_k=5).value.sum())(student)

    sharded = jax.shard_map(
        gradient, mesh=mesh, in_specs=(rows, rows), out_specs=rows, check_vma=False
    )
    np.testing.assert_allclose(
        jax.jit(sharded)(student, teacher), gradient(student, teacher), rtol=1e-5, atol=1e-7
    )
