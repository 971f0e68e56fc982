"""Comparisons over matched tokens: against NumPy in float64, fused, and over shards."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType

from uld_jax.losses import (
    DIVERGENCES,
    Divergence,
    HeadTeacher,
    Hybrid,
    TokenTeacher,
    Transport,
    Uld,
    cross_entropy,
    fused_teachers_cross_entropy,
    hybrid_loss,
    sharded_uld_cross_entropy,
    transport,
    uld,
)

V, U, D, E = 21, 13, 6, 4
RNG = np.random.default_rng(0)
STUDENT_IDS, TEACHER_IDS = RNG.permutation(V)[:9], RNG.permutation(U)[:9]
LOGITS = [jnp.asarray(RNG.normal(0, 2, (3, width)), jnp.float32) for width in (V, U)]
COMPARISONS = {
    "kl": Divergence("kl", STUDENT_IDS, TEACHER_IDS),
    "jsd": Divergence("jsd", STUDENT_IDS, TEACHER_IDS, {"beta": 0.3}, others=True),
    "hybrid": Hybrid(STUDENT_IDS, TEACHER_IDS, matched_weight=0.6, beta=0.3),
}
FUSED = ("jsd", "hybrid")


def softmax64(logits):
    exact = np.exp(np.asarray(logits, np.float64))
    return exact / exact.sum(-1, keepdims=True)


def test_kl_is_between_the_conditional_distributions_over_matched_tokens():
    q, p = (
        softmax64(logits)[:, ids]
        for logits, ids in zip(LOGITS, (STUDENT_IDS, TEACHER_IDS), strict=True)
    )
    q, p = (x / x.sum(-1, keepdims=True) for x in (q, p))
    np.testing.assert_allclose(
        COMPARISONS["kl"](*LOGITS), (p * np.log(p / q)).sum(-1), rtol=1e-5, atol=1e-6
    )


def test_all_other_tokens_count_as_one_more():
    sides = zip(map(softmax64, LOGITS), (STUDENT_IDS, TEACHER_IDS), strict=True)
    q, p = (np.append(x[:, ids], 1 - x[:, ids].sum(-1, keepdims=True), -1) for x, ids in sides)
    compare = Divergence("kl", STUDENT_IDS, TEACHER_IDS, others=True)
    expected = (p * np.log(p / q)).sum(-1)
    np.testing.assert_allclose(compare(*LOGITS), expected, rtol=1e-5)
    # The same from the teacher's tokens, were all known; fewer can only tell less apart.
    log_p = jax.nn.log_softmax(LOGITS[1])
    order = jnp.argsort(-log_p)
    ours = jnp.full(U, -1).at[TEACHER_IDS].set(STUDENT_IDS)[order]
    known = ours, jnp.take_along_axis(log_p, order, axis=-1)
    # Padding names a token that is there already.
    known = [
        jnp.pad(x, ((0, 0), (0, 1)), constant_values=value)
        for x, value in zip(known, (2, -jnp.inf), strict=True)
    ]
    np.testing.assert_allclose(compare.to_tokens(LOGITS[0], *known), expected, rtol=1e-4)
    alone = COMPARISONS["kl"]
    np.testing.assert_allclose(alone.to_tokens(LOGITS[0], *known), alone(*LOGITS), rtol=1e-4)
    # The student then has no other token; the rest's probability of 0 has no gradient.
    grad = jax.grad(lambda logits: alone.to_tokens(logits, *known).sum())(LOGITS[0])
    expected_grad = jax.grad(lambda logits: alone(logits, LOGITS[1]).sum())(LOGITS[0])
    np.testing.assert_allclose(grad, expected_grad, rtol=1e-4, atol=1e-5)
    few = compare.to_tokens(LOGITS[0], *(x[:, :3] for x in known))
    assert (few <= expected + 1e-6).all()
    assert (few > 0.1 * expected).all()


@pytest.mark.parametrize("name", DIVERGENCES)
def test_whole_equal_vocabularies_give_the_plain_divergence(name):
    student, teacher = LOGITS[0], LOGITS[0][::-1]
    order = np.arange(V)
    np.testing.assert_allclose(
        Divergence(name, order, order)(student, teacher),
        DIVERGENCES[name](student, teacher),
        rtol=1e-6,
    )


def test_only_the_text_of_tokens_counts_and_not_their_ids():
    moved = RNG.permutation(V)
    student = LOGITS[0][:, np.argsort(moved)]
    for name in ("jsd", "hybrid"):
        ours = COMPARISONS[name]
        theirs = type(ours)(**{**vars(ours), "student_ids": moved[STUDENT_IDS]})
        np.testing.assert_allclose(theirs(student, LOGITS[1]), ours(*LOGITS), rtol=1e-5)


def test_hybrid_is_hybrid_loss_of_groups_of_one_token():
    ids, groups = np.zeros(3, np.int32), np.arange(3)[:, None]
    options = {"merge": "observed", "beta": 0.3, "matched_weight": 0.6}
    expected = hybrid_loss(*LOGITS, ids, ids, groups, groups, STUDENT_IDS, TEACHER_IDS, **options)
    np.testing.assert_allclose(COMPARISONS["hybrid"](*LOGITS), expected, rtol=1e-5)


def test_transport_is_transport_loss():
    pytest.importorskip("ott", reason="transport needs the extra 'ot'")
    words = [[f"{i % 5}" * (1 + i % 3) for i in range(size)] for size in (V, U)]
    cost = transport.LevenshteinCost(*words)
    expected = transport.transport_loss(*LOGITS, cost, top_k=5, epsilon=0.1).value
    np.testing.assert_allclose(Transport(cost, 5, 0.1)(*LOGITS), expected, rtol=1e-6)
    with pytest.raises(ValueError, match="expected whole vocabularies"):
        Transport(cost)(*LOGITS, axis_name="tensor")


@pytest.fixture(scope="module")
def arrays():
    rng = np.random.default_rng(1)

    def normal(*shape):
        return jnp.asarray(rng.normal(0, 1, shape), jnp.float32)

    return {
        "student_hidden": 2 * normal(4, 5, D),
        "student_head": normal(V, D),
        "teacher": (2 * normal(4, 5, E), normal(U, E)),
        "weights": abs(normal(4, 5)),
        "targets": jnp.asarray(rng.integers(0, V, (4, 5))),
    }


@pytest.fixture(scope="module")
def gradients(arrays):
    """Name -> total, distances and gradients from whole logits, on one device."""

    def of(compare):
        @partial(jax.value_and_grad, has_aux=True)
        def total(student):
            logits = student["student_hidden"] @ student["student_head"].T
            hidden, head = arrays["teacher"]
            distances = compare(logits / 1.5, hidden @ head.T / 0.7)
            weighted = (arrays["weights"] * distances).sum()
            return cross_entropy(logits, arrays["targets"]).sum() + weighted, weighted

        return jax.jit(total)(students(arrays))

    return {name: of(COMPARISONS[name]) for name in FUSED}


def students(arrays):
    return {name: arrays[name] for name in ("student_hidden", "student_head")}


@pytest.mark.parametrize("shape", [None, (2, 4)], ids=["one device", "sharded"])
@pytest.mark.parametrize("name", FUSED)
def test_the_fused_loss_equals_whole_logits(name, shape, arrays, gradients):
    fused = fused_teachers_cross_entropy
    if shape is not None:
        mesh = jax.make_mesh(shape, ("data", "tensor"), axis_types=(AxisType.Auto,) * 2)
        fused = partial(sharded_uld_cross_entropy, mesh=mesh, batch_axes="data")

    @partial(jax.value_and_grad, has_aux=True)
    def total(student):
        teacher = HeadTeacher(
            *arrays["teacher"], arrays["weights"], 0.7, comparison=COMPARISONS[name]
        )
        out = fused(
            **student,
            teachers=[teacher],
            targets=arrays["targets"],
            ce_weights=jnp.ones((4, 5)),
            student_temperature=1.5,
            chunk_size=2,
        )
        return out.total, out.distance

    (value, distance), grads = jax.jit(total)(students(arrays))
    (expected, expected_distance), expected_grads = gradients[name]
    np.testing.assert_allclose([value, distance], [expected, expected_distance], rtol=1e-5)
    for key, grad in grads.items():
        atol = 1e-5 * abs(expected_grads[key]).max()
        np.testing.assert_allclose(grad, expected_grads[key], rtol=1e-4, atol=atol)


def test_uld_is_uld():
    np.testing.assert_allclose(Uld("sort")(*LOGITS), uld(*LOGITS, method="sort"), rtol=1e-6)
    with pytest.raises(ValueError, match="method: unknown 'quick'"):
        Uld("quick")


def test_an_unknown_divergence_is_refused():
    with pytest.raises(ValueError, match="divergence: unknown 'js'"):
        Divergence("js")(*LOGITS)
    with pytest.raises(ValueError, match="option of 'kl': unknown 'beta'"):
        Divergence("kl", options={"beta": 0.5})(*LOGITS)
    with pytest.raises(ValueError, match="student_ids: expected those to compare"):
        Divergence("kl")(*LOGITS, axis_name="tensor")


@pytest.mark.parametrize("shape", [None, (2, 4)], ids=["one device", "sharded"])
def test_a_teacher_by_its_tokens_equals_its_divergence(shape, arrays):
    compare = Divergence("jsd")
    rng = np.random.default_rng(2)
    ids = jnp.asarray([[rng.permutation(V)[:6] for _ in range(5)] for _ in range(4)])
    ids = ids.at[..., 5].set(-1)
    log_probs = jnp.log(jnp.asarray(rng.dirichlet(np.ones(7), (4, 5))[..., :6], jnp.float32))
    fused = fused_teachers_cross_entropy
    if shape is not None:
        mesh = jax.make_mesh(shape, ("data", "tensor"), axis_types=(AxisType.Auto,) * 2)
        fused = partial(sharded_uld_cross_entropy, mesh=mesh, batch_axes="data")

    @jax.jit
    def compute(student):
        teacher = TokenTeacher(ids, log_probs, arrays["weights"], compare)
        options = {"targets": arrays["targets"], "ce_weights": jnp.zeros((4, 5)), "chunk_size": 2}
        loss = jax.value_and_grad(lambda s: fused(**s, teachers=[teacher], **options).total)

        def whole(s):
            logits = s["student_hidden"] @ s["student_head"].T
            return (arrays["weights"] * compare.to_tokens(logits, ids, log_probs)).sum()

        return loss(student), jax.value_and_grad(whole)(student)

    (value, grads), (expected, expected_grads) = compute(students(arrays))
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    for name, grad in grads.items():
        np.testing.assert_allclose(grad, expected_grads[name], rtol=1e-4, atol=1e-5)
