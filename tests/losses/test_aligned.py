from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from uld_jax.data import align_spans
from uld_jax.losses import reference_uld, uld
from uld_jax.losses.aligned import hybrid_loss, merge_probabilities, sorted_l1, span_aligned_uld

MERGES = ("chain", "observed", "bayesian")
merge_compiled, span_aligned_compiled = (
    jax.jit(f, static_argnames="merge") for f in (merge_probabilities, span_aligned_uld)
)
hybrid_compiled = jax.jit(hybrid_loss, static_argnames=("merge", "beta"))


def padded_groups(groups, count, width):
    """[count, width] position arrays of the student and of the teacher."""
    arrays = np.full((2, count, width), -1)
    for g, sides in enumerate(groups):
        for array, positions in zip(arrays, sides, strict=True):
            array[g, : len(positions)] = positions
    return arrays


# The fixture of LOSSES.md, section 2.
STUDENT_IDS = np.array([[0, 0, 1, 2, 3, 0], [0, 0, 4, 2, 1, 3]])
TEACHER_IDS = np.array([[0, 0, 0, 5, 6, 0, 1], [0, 0, 2, 3, 4, 0, 0]])
STUDENT_STARTS, TEACHER_STARTS = (2, 1), (3, 2)
STUDENT_OFFSETS = (
    [(0, 3), (3, 5), (5, 5)],
    [(0, 1), (1, 2), (2, 4), (4, 6), (6, 6)],
)
TEACHER_OFFSETS = ([(0, 1), (1, 3), (3, 5), (5, 5)], [(0, 2), (2, 6), (6, 6)])
STUDENT_MATCHED, TEACHER_MATCHED = np.array([0, 2, 4]), np.array([2, 0, 5])  # a, c, e


def fixture(shift):
    """Arguments of the aligned losses; the logits `shift` positions before each answer token."""
    b, t, v = np.meshgrid(*map(np.arange, (2, 6, 5)), indexing="ij")
    student = 2 * np.sin(0.7 * (1 + b) + 1.3 * t + 2.1 * v)
    b, t, v = np.meshgrid(*map(np.arange, (2, 7, 7)), indexing="ij")
    teacher = 2 * np.cos(0.5 * (1 + b) + 0.9 * t + 1.7 * v)
    rows = []
    for spans, starts in zip(
        zip(STUDENT_OFFSETS, TEACHER_OFFSETS, strict=True),
        zip(STUDENT_STARTS, TEACHER_STARTS, strict=True),
        strict=True,
    ):
        groups = padded_groups(align_spans(spans[0][:-1], spans[1][:-1]), 3, 3)
        first = np.array(starts).reshape(2, 1, 1) - shift
        rows.append(np.where(groups >= 0, groups + first, -1))
    student_groups, teacher_groups = np.stack(rows, axis=1)
    ids = [np.roll(ids, -shift, axis=1) for ids in (STUDENT_IDS, TEACHER_IDS)]
    return student, teacher, *ids, student_groups, teacher_groups


def mean_over_groups_then_rows(loss_BG, groups_BGW):
    return (loss_BG.sum(1) / (groups_BGW[:, :, 0] >= 0).sum(1)).mean()


@pytest.mark.parametrize(
    ("merge", "shift", "expected", "expected_hybrid"),
    [
        ("observed", 0, 0.6958331829, 0.2190537779),
        ("bayesian", 1, 0.6054965667, 0.2851836829),
    ],
)
def test_published_merges_reproduce_the_fixture(merge, shift, expected, expected_hybrid):
    with jax.enable_x64(True):
        arguments = fixture(shift)
        loss = span_aligned_compiled(*arguments, merge=merge)
        assert loss.dtype == jnp.float64
        actual = mean_over_groups_then_rows(loss, arguments[-1])
        np.testing.assert_allclose(actual, expected, rtol=0, atol=1e-9)

        hybrid = hybrid_compiled(
            *arguments, STUDENT_MATCHED, TEACHER_MATCHED, merge=merge, beta=0.5
        )
        actual = mean_over_groups_then_rows(hybrid, arguments[-1])
        np.testing.assert_allclose(actual, expected_hybrid, rtol=0, atol=1e-9)


def random_logits(shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(0, 2, shape), jnp.float32)


def random_arguments(dtype=jnp.float32):
    """Two rows; groups of 1 to 3 tokens, the last one padding, and positions in no group."""
    student_groups = np.array(
        [[[0, -1, -1], [1, 2, -1], [-1, -1, -1]], [[1, 2, 3], [4, -1, -1], [-1, -1, -1]]]
    )
    teacher_groups = np.array([[[0, 1], [2, -1], [-1, -1]], [[0, -1], [2, 3], [-1, -1]]])
    return (
        random_logits((2, 5, 4), 1).astype(dtype),
        random_logits((2, 4, 6), 2).astype(dtype),
        np.array([[0, 1, 3, 2, 1], [0, 2, 2, 3, 1]]),
        np.array([[5, 0, 3, 0], [1, 0, 4, 2]]),
        student_groups,
        teacher_groups,
    )


def test_each_merge_is_its_formula():
    logits, _, ids, _, groups, _ = random_arguments()
    for row, group in ((0, [1, 2]), (1, [1, 2, 3]), (1, [4])):
        p = jax.nn.softmax(logits[row])
        g = int(np.flatnonzero(groups[row][:, 0] == group[0])[0])
        observed = [p[j, ids[row, j]] for j in group]
        later, first = np.prod(observed[1:]), ids[row, group[0]]
        chain = np.append(p[group[0]], observed[0] * (1 - later))
        chain[first] *= later
        expected = {
            "chain": chain,
            "observed": p[group[0]] * later,
            "bayesian": p[group[-1]] * np.prod(observed[:-1]),
        }
        for merge in MERGES:
            merged = merge_compiled(logits, ids, groups, merge=merge)
            np.testing.assert_allclose(merged[row, g], expected[merge], rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("seed", range(5))
def test_chain_is_a_probability_distribution(seed):
    _, _, ids, _, groups, _ = random_arguments()
    logits = 10 * random_logits((2, 5, 4), seed)
    merged = merge_compiled(logits.at[:, :, 1].set(-jnp.inf), ids, groups, merge="chain")
    assert merged.min() >= 0
    np.testing.assert_allclose(merged.sum(-1), groups[:, :, 0] >= 0, rtol=1e-6)


@pytest.mark.parametrize("merge", MERGES)
def test_groups_of_one_token_are_plain_uld(merge):
    student, teacher = random_logits((2, 3, 5), 3), random_logits((2, 4, 7), 4)
    ids = np.array([[0, 4, 2, 1], [3, 3, 1, 0]])
    student_groups = np.broadcast_to(np.array([[0], [2]]), (2, 2, 1))
    teacher_groups = np.broadcast_to(np.array([[1], [3]]), (2, 2, 1))

    @jax.jit
    def both(student):
        aligned = span_aligned_uld(
            student,
            teacher,
            ids[:, :3],
            ids,
            student_groups,
            teacher_groups,
            merge=merge,
            student_temperature=2.0,
            teacher_temperature=0.5,
        )
        plain = uld(
            student[:, ::2], teacher[:, 1::2], student_temperature=2.0, teacher_temperature=0.5
        )
        return aligned, plain

    (aligned, plain), pull_back = jax.vjp(both, student)
    np.testing.assert_allclose(aligned, plain, rtol=1e-5)
    weights, nothing = jnp.array([[1.0, -2.0], [0.5, 3.0]]), jnp.zeros((2, 2))
    np.testing.assert_allclose(
        pull_back((weights, nothing))[0], pull_back((nothing, weights))[0], rtol=1e-4, atol=1e-6
    )


def test_the_context_of_the_first_token_is_shared_under_any_split():
    # P(ab) = 0.3 on both sides, as one token or as two; P(other) = 0.5; "a" goes on otherwise: 0.2.
    whole = jnp.log(jnp.array([[0.3, 0.5, 0.2]]))
    split = jnp.log(jnp.array([[0.5, 0.5], [0.4, 0.6]]))
    ids = np.array([0]), np.array([0, 1])
    loss = span_aligned_compiled(whole, split, *ids, np.array([[0]]), np.array([[0, 1]]))
    np.testing.assert_allclose(loss, 0, atol=1e-6)


MATCHED = np.array([0, 2], np.int32), np.array([3, 1], np.int32)


@jax.jit
def every_loss(student, teacher, *others):
    aligned = [span_aligned_uld(student, teacher, *others, merge=merge) for merge in MERGES]
    hybrid = [
        hybrid_loss(student, teacher, *others, *MATCHED, merge=merge, beta=beta)
        for merge in MERGES
        for beta in (0.0, 0.5, 1.0)
    ]
    return jnp.stack([*aligned, *hybrid])


@jax.jit
def every_gradient(student, teacher, *others):
    return jax.grad(lambda *logits: every_loss(*logits, *others).sum(), (0, 1))(student, teacher)


def test_gradients_equal_finite_differences():
    with jax.enable_x64(True):
        student, *others = random_arguments(jnp.float64)
        direction = random_logits(student.shape, 5).astype(jnp.float64)
        step = 1e-6 * direction
        change = every_loss(student + step, *others) - every_loss(student - step, *others)

        @jax.jit
        def jacobian(student):
            return jax.jacrev(lambda s: every_loss(s, *others).sum((1, 2)))(student)

        slopes = (jacobian(student) * direction[None]).sum((1, 2, 3))
        assert (jnp.abs(slopes) > 0.01).all()
        np.testing.assert_allclose(slopes, change.sum((1, 2)) / 2e-6, rtol=1e-6)


def test_vmap_and_scan_equal_leading_axes():
    arguments = random_arguments()
    expected = every_loss(*arguments)

    @jax.jit
    def by_row(*arguments):
        mapped = jax.vmap(every_loss, out_axes=1)(*arguments)
        _, scanned = jax.lax.scan(lambda carry, row: (carry, every_loss(*row)), None, arguments)
        return mapped, jnp.moveaxis(scanned, 0, 1)

    for actual in by_row(*map(jnp.asarray, arguments)):
        np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=1e-7)


def test_padding_is_zero_and_its_nan_leaves_no_trace():
    student, teacher, *others = random_arguments()
    gradient, _ = every_gradient(student, teacher, *others)
    expected = every_loss(student, teacher, *others)
    np.testing.assert_array_equal(expected[:, :, 2], 0)

    student = student.at[0, 3:].set(jnp.nan).at[1, 0].set(jnp.inf)
    teacher = teacher.at[0, 3].set(jnp.nan).at[1, 1].set(jnp.nan)
    np.testing.assert_array_equal(every_loss(student, teacher, *others), expected)
    actual, teacher_gradient = every_gradient(student, teacher, *others)
    np.testing.assert_array_equal(actual, gradient)
    np.testing.assert_array_equal(teacher_gradient, 0)
    assert jnp.abs(gradient).max() > 0.1


def test_a_group_without_tokens_on_one_side_is_zero():
    *others, teacher_groups = random_arguments()
    teacher_groups = teacher_groups.copy()
    teacher_groups[0, 1] = -1
    loss = every_loss(*others, teacher_groups)
    np.testing.assert_array_equal(loss[:, 0, 1], 0)
    gradient, _ = every_gradient(*others, teacher_groups)
    np.testing.assert_array_equal(gradient[0, 1:], 0)
    assert jnp.abs(gradient[0, 0]).max() > 0


def test_masked_vocabulary_gives_finite_values_and_gradients():
    student, teacher, *others = random_arguments()
    # Some of these are observed tokens and some are matched, on one side or on both.
    student = student.at[:, :, 2].set(-jnp.inf)
    teacher = teacher.at[:, :, 1].set(-jnp.inf).at[:, :, 5].set(-jnp.inf)
    assert jnp.isfinite(every_loss(student, teacher, *others)).all()
    gradient, _ = every_gradient(student, teacher, *others)
    assert jnp.isfinite(gradient).all()
    np.testing.assert_array_equal(gradient[:, :, 2], 0)


@pytest.mark.parametrize(
    ("positions", "count", "width"), [(0, 2, 1), (3, 0, 2), (3, 2, 0)], ids=str
)
def test_empty_axes_give_zeros(positions, count, width):
    logits, ids = jnp.zeros((positions, 4)), jnp.zeros(positions, int)
    groups = jnp.full((count, width), -1)
    for merge, entries in zip(MERGES, (5, 4, 4), strict=True):
        merged = merge_probabilities(logits, ids, groups, merge=merge)
        assert merged.shape == (count, entries)
        assert not merged.any()
    loss = span_aligned_uld(logits, logits, ids, ids, groups, groups)
    assert loss.shape == (count,)
    assert not loss.any()


def test_long_groups_do_not_underflow_to_nan():
    logits = jnp.full((40, 3), 0.0).at[:, 0].set(80.0)
    ids, groups = np.full(40, 1), np.arange(40)[None]
    merged, pull_back = jax.vjp(lambda x: merge_compiled(x, ids, groups), logits)
    np.testing.assert_allclose(merged.sum(), 1, rtol=1e-6)
    assert jnp.isfinite(pull_back(jnp.ones((1, 4)))[0]).all()


def test_low_precision_is_computed_in_float32():
    student, teacher, *others = random_arguments(jnp.bfloat16)
    expected = every_loss(student.astype(jnp.float32), teacher.astype(jnp.float32), *others)
    loss = every_loss(student, teacher, *others)
    assert loss.dtype == jnp.float32
    np.testing.assert_allclose(loss, expected, rtol=1e-6)


def hybrid_of_rows(student_probs, teacher_probs, matched, **options):
    """The hybrid loss of plain probability vectors, each a group of its own."""
    count = len(student_probs)
    ids, groups = np.zeros(count, int), np.arange(count)[:, None]
    logits = jnp.log(jnp.asarray(student_probs)), jnp.log(jnp.asarray(teacher_probs))
    matched = [np.array(m, int) for m in zip(*matched, strict=True)] or [np.zeros(0, int)] * 2
    return hybrid_compiled(*logits, ids, ids, groups, groups, *matched, **options)


STUDENT_PROBS = [[0.5, 0.3, 0.2], [0.1, 0.2, 0.7]]
TEACHER_PROBS = [[0.4, 0.1, 0.3, 0.2], [0.25, 0.25, 0.4, 0.1]]


def test_hybrid_weights_are_adaptive_or_fixed():
    matched = [(0, 2), (1, 1)]
    q, p = np.array(STUDENT_PROBS)[:, [0, 1]], np.array(TEACHER_PROBS)[:, [2, 1]]
    mean = (q + p) / 2
    jsd = (q * np.log(q / mean) + p * np.log(p / mean)).sum(1) / 2
    rest = sorted_l1(np.array(STUDENT_PROBS)[:, 2:], np.array(TEACHER_PROBS)[:, [0, 3]])
    rows = partial(hybrid_of_rows, STUDENT_PROBS, TEACHER_PROBS, matched)
    np.testing.assert_allclose(rows(), (jsd + rest) / 2, rtol=1e-5)
    np.testing.assert_allclose(rows(matched_weight=0.2), 0.2 * jsd + 0.8 * rest, rtol=1e-5)
    weights = {"matched_weight": 3.0, "unmatched_weight": 0.5}
    np.testing.assert_allclose(rows(**weights), 3 * jsd + rest / 2, rtol=1e-5)


@pytest.mark.parametrize(("beta", "swap"), [(0.0, False), (1.0, True)])
def test_hybrid_of_one_shared_vocabulary_is_kl(beta, swap):
    teacher = [row[:3] for row in STUDENT_PROBS[::-1]]
    loss = hybrid_of_rows(STUDENT_PROBS, teacher, [(0, 0), (1, 1), (2, 2)], beta=beta)
    q, p = (teacher, STUDENT_PROBS) if swap else (STUDENT_PROBS, teacher)
    expected = (np.array(p) * np.log(np.array(p) / np.array(q))).sum(1)
    np.testing.assert_allclose(loss, expected, rtol=1e-5)


def test_divergence_at_the_ends_is_the_limit_and_never_negative():
    matched = [(0, 2), (1, 1)]
    rows = partial(hybrid_of_rows, STUDENT_PROBS, TEACHER_PROBS, matched, matched_weight=1.0)
    with jax.enable_x64(True):
        for end, near in ((0.0, 1e-5), (1.0, 1 - 1e-5)):
            limit = rows(beta=near) / 1e-5
            np.testing.assert_allclose(rows(beta=end), limit, rtol=1e-3)
            assert (rows(beta=end) > 0).all()


def test_hybrid_without_matches_is_span_aligned_uld():
    loss = hybrid_of_rows(STUDENT_PROBS, TEACHER_PROBS, [])
    expected = reference_uld(jnp.log(jnp.array(STUDENT_PROBS)), jnp.log(jnp.array(TEACHER_PROBS)))
    np.testing.assert_allclose(loss, expected, rtol=1e-5)


def test_bad_arguments_are_named():
    student, teacher, *others = random_arguments()
    matched = np.array([0, 1]), np.array([2, 3])
    with pytest.raises(ValueError, match=r"merge: unknown 'baysian'.*'chain', 'observed'"):
        span_aligned_uld(student, teacher, *others, merge="baysian")
    with pytest.raises(ValueError, match=r"beta: expected a number in \[0, 1\], got 1.5"):
        hybrid_loss(student, teacher, *others, *matched, beta=1.5)
    with pytest.raises(ValueError, match=r"one shape \[M\], got \(1,\) and \(2,\)"):
        hybrid_loss(student, teacher, *others, matched[0][:1], matched[1])
    with pytest.raises(ValueError, match=r"token_ids: expected shape \(2, 5\), got \(2, 4\)"):
        merge_probabilities(student, others[1], others[2])
    with pytest.raises(ValueError, match=r"groups: expected shape \(2, 'G', 'W'\), got \(3, 3\)"):
        merge_probabilities(student, others[0], others[2][0])
    with pytest.raises(ValueError, match=r"axes before the last, got \(2, 3, 3\) and \(2, 2, 2\)"):
        span_aligned_uld(student, teacher, *others[:3], others[3][:, :2])
    with pytest.raises(ValueError, match=r"axes before the vocabulary, got \(2, 4\) and \(4,\)"):
        sorted_l1(jnp.zeros((2, 4)), jnp.zeros(4))
