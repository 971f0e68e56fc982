import jax
import jax.numpy as jnp
import numpy as np
import pytest

from uld_jax import losses

distillation_loss = jax.jit(
    losses.distillation_loss,
    static_argnames=("convention", "skip_student_eos", "skip_teacher_eos", "ignore_index"),
)
reference_uld = jax.jit(losses.reference_uld)

STUDENT_LABELS = np.array([[-100, -100, 1, 2, 3, -100], [-100, 0, 4, 2, 1, 3]])
TEACHER_LABELS = np.array([[-100, -100, -100, 5, 6, 0, 1], [-100, -100, 2, 3, 4, -100, -100]])


def grid(rows, positions, vocabulary):
    return np.meshgrid(*(np.arange(n) for n in (rows, positions, vocabulary)), indexing="ij")


def fixture_logits():
    """The fixture of LOSSES.md, section 2."""
    b, t, v = grid(2, 6, 5)
    student = 2 * np.sin(0.7 * (1 + b) + 1.3 * t + 2.1 * v)
    b, t, v = grid(2, 7, 7)
    return student, 2 * np.cos(0.5 * (1 + b) + 0.9 * t + 1.7 * v)


STUDENT_MASK = np.array([[1, 1, 1, 1, 1, 0], [1, 1, 1, 1, 1, 1]])


@pytest.mark.parametrize(
    ("convention", "skip_student", "skip_teacher", "temperature", "expected"),
    [
        ("official", True, False, 1.0, 0.5103639681),
        ("official", False, False, 1.0, 0.4802155040),
        ("official", True, True, 1.0, 0.4458664682),
        ("official", True, False, 2.0, 0.3980347592),
        ("trl_bayesian", True, False, 1.0, 0.5103639681),
        ("trl_bayesian", False, False, 1.0, 0.4802155040),
        ("trl_bayesian", True, True, 1.0, 0.4458664682),
        ("trl_observed", True, True, 1.0, 0.5469831845),
        ("trl_observed", True, False, 1.0, 0.5036341305),
        ("trl_observed", False, False, 1.0, 0.5072195212),
        ("dskd", False, False, 1.0, 2.8812930240 / 8),
        ("tokenkit", False, False, 1.0, 0.4207350508),
    ],
)
def test_conventions_reproduce_the_fixture(
    convention, skip_student, skip_teacher, temperature, expected
):
    with jax.enable_x64(True):
        loss = distillation_loss(
            *fixture_logits(),
            STUDENT_LABELS,
            TEACHER_LABELS,
            convention=convention,
            skip_student_eos=skip_student,
            skip_teacher_eos=skip_teacher,
            student_mask=STUDENT_MASK if convention == "tokenkit" else None,
            student_temperature=temperature,
            teacher_temperature=temperature,
        )
        np.testing.assert_allclose(loss.uld, expected, rtol=0, atol=1e-9)
        np.testing.assert_allclose(loss.cross_entropy, 2.0308412173, rtol=0, atol=1e-9)
        np.testing.assert_allclose(loss.total, 2.0308412173 + 1.5 * expected, rtol=0, atol=1e-9)
        if (convention, skip_student, skip_teacher, temperature) == ("official", True, False, 1.0):
            np.testing.assert_allclose(loss.total, 2.7963871, rtol=0, atol=1e-7)


def published_case(path, number):
    with np.load(path / "golden" / "official_uld_public.npz") as archive:
        prefix = f"case{number}/"
        return {k.removeprefix(prefix): archive[k] for k in archive.files if k.startswith(prefix)}


@pytest.mark.parametrize("number", range(5))
def test_official_equals_the_code_released_with_the_paper(shared, number):
    case = published_case(shared, number)

    def loss_of(logits, ce_weight):
        return distillation_loss(
            logits,
            case["teacher_logits"],
            case["student_labels"].astype(np.int32),
            case["teacher_labels"].astype(np.int32),
            ce_weight=ce_weight,
            uld_weight=float(case["distillation_weight"]),
            student_temperature=float(case["student_temperature"]),
            teacher_temperature=float(case["teacher_temperature"]),
            skip_student_eos=bool(case["skip_student_eos"]),
            skip_teacher_eos=bool(case["skip_teacher_eos"]),
        )

    ce_weight = float(case["crossentropy_weight"])
    logits = jnp.asarray(case["student_logits"])
    loss = loss_of(logits, ce_weight)
    # The file's two parts carry their weights already.
    np.testing.assert_allclose(ce_weight * loss.cross_entropy, case["cross_entropy"], rtol=1e-5)
    np.testing.assert_allclose(
        case["distillation_weight"] * loss.uld, case["distillation"], rtol=1e-5
    )
    np.testing.assert_allclose(loss.total, case["total"], rtol=1e-5)

    gradient = jax.jit(jax.grad(lambda logits, ce_weight: loss_of(logits, ce_weight).total))
    for weight, name in ((ce_weight, "grad_total"), (0.0, "grad_distillation")):
        expected = case[name]
        actual = gradient(logits, weight)
        np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=1e-5 * abs(expected).max())


def official_by_slices(
    student, teacher, student_labels, teacher_labels, skip_student, skip_teacher
):
    """The released code's slices, one row at a time."""
    means = []
    for rows in zip(student, teacher, student_labels, teacher_labels, strict=True):
        spans = []
        for logits, labels, skip in zip(
            rows[:2], rows[2:], (skip_student, skip_teacher), strict=True
        ):
            answer = np.flatnonzero(labels != -100)
            start = max(answer[0] - 1, 0)
            spans.append(logits[start : start + len(answer) - skip])
        length = min(map(len, spans))
        if length:
            means.append(reference_uld(spans[0][:length], spans[1][:length]).mean())
    return np.mean(means)


def labels_of_spans(width, spans):
    labels = np.full((len(spans), width), -100)
    for row, (start, stop) in enumerate(spans):
        labels[row, start:stop] = 1
    return labels


def random_logits(*shape, seed=0):
    return np.random.default_rng(seed).normal(0, 2, shape).astype(np.float32)


@pytest.mark.parametrize("skip_student", [False, True])
@pytest.mark.parametrize("skip_teacher", [False, True])
def test_rows_that_open_with_the_answer_follow_the_released_slices(skip_student, skip_teacher):
    student, teacher = random_logits(4, 6, 5, seed=1), random_logits(4, 5, 8, seed=2)
    student_labels = labels_of_spans(6, [(0, 3), (0, 6), (2, 6), (0, 1)])
    teacher_labels = labels_of_spans(5, [(1, 5), (0, 5), (0, 2), (3, 5)])
    arrays = student, teacher, student_labels, teacher_labels
    loss = distillation_loss(*arrays, skip_student_eos=skip_student, skip_teacher_eos=skip_teacher)
    expected = official_by_slices(*arrays, skip_student, skip_teacher)
    np.testing.assert_allclose(loss.uld, expected, rtol=1e-6)


@pytest.mark.parametrize(
    ("convention", "weights"),
    [
        ("official", (1 / 6,) * 3 + (1 / 2,)),
        ("trl_bayesian", (1 / 6,) * 3 + (1 / 2,)),
        ("token_mean", (1 / 4,) * 4),
        ("dskd", (1 / 4,) * 4),
    ],
)
def test_answers_of_several_turns_are_selected_by_mask(convention, weights):
    student, teacher = random_logits(2, 8, 5, seed=3), random_logits(2, 7, 6, seed=4)
    student_labels = np.full((2, 8), -100)
    student_labels[0, [2, 3, 6]] = student_labels[1, [4]] = 1
    teacher_labels = np.full((2, 7), -100)
    teacher_labels[0, [1, 4, 5, 6]] = teacher_labels[1, [3, 5]] = 1
    pairs = reference_uld(
        np.stack([student[0, 1], student[0, 2], student[0, 5], student[1, 3]]),
        np.stack([teacher[0, 0], teacher[0, 3], teacher[0, 4], teacher[1, 2]]),
    )
    loss = distillation_loss(
        student, teacher, student_labels, teacher_labels, convention=convention
    )
    np.testing.assert_allclose(loss.uld, np.dot(pairs, weights), rtol=1e-6)


def test_trl_observed_takes_the_logits_at_the_answer_of_every_turn():
    student, teacher = random_logits(1, 6, 5, seed=3), random_logits(1, 5, 6, seed=4)
    student_labels = np.array([[-100, 1, -100, 1, 1, -100]])
    teacher_labels = np.array([[1, -100, -100, 1, 1]])
    pairs = reference_uld(student[0, [1, 3, 4]], teacher[0, [0, 3, 4]])
    loss = distillation_loss(
        student, teacher, student_labels, teacher_labels, convention="trl_observed"
    )
    np.testing.assert_allclose(loss.uld, pairs.mean(), rtol=1e-6)


def test_dskd_divides_both_parts_by_the_students_answer_tokens():
    student, teacher = random_logits(2, 5, 6, seed=5), random_logits(2, 4, 4, seed=6)
    student_labels = labels_of_spans(5, [(0, 4), (2, 5)])
    teacher_labels = labels_of_spans(4, [(1, 3), (0, 0)])
    teacher[1] = np.nan
    loss = distillation_loss(student, teacher, student_labels, teacher_labels, convention="dskd")
    pairs = reference_uld(student[0, :2], teacher[0, :2])
    # The token that opens the first row is predicted by nothing.
    np.testing.assert_allclose(loss.uld, pairs.sum() / 6, rtol=1e-6)
    log_probs = jax.nn.log_softmax(student)[:, :, 1]
    cross_entropy = -(log_probs[0, :3].sum() + log_probs[1, 1:4].sum()) / 6
    np.testing.assert_allclose(loss.cross_entropy, cross_entropy, rtol=1e-6)


@pytest.mark.parametrize("widths", [(5, 3), (3, 5)])
def test_tokenkit_compares_what_the_mask_and_both_widths_hold(widths):
    student, teacher = (
        random_logits(2, widths[0], 6, seed=7),
        random_logits(2, widths[1], 4, seed=8),
    )
    mask = np.array([[0, 1, 1, 1, 0], [1, 1, 0, 0, 0]])[:, : widths[0]]
    expected = reference_uld(student[:, :3], teacher[:, :3])
    student = np.where(mask[:, :, None] == 1, student, np.nan)
    labels = [np.full((2, width), -100) for width in widths]
    loss, gradient = jax.value_and_grad(
        lambda student: (
            distillation_loss(
                student, teacher, *labels, convention="tokenkit", student_mask=mask
            ).uld
        )
    )(student)
    np.testing.assert_allclose(loss, (expected * mask[:, :3]).sum() / 4, rtol=1e-6)
    np.testing.assert_array_equal(gradient[mask == 0], 0)
    everything = distillation_loss(
        teacher, teacher[:, ::-1], labels[1], labels[1], convention="tokenkit"
    )
    np.testing.assert_allclose(
        everything.uld, reference_uld(teacher, teacher[:, ::-1]).mean(), rtol=1e-6
    )


@pytest.mark.parametrize("convention", ["official", "token_mean", "trl_observed"])
def test_rows_without_compared_positions_and_padding_leave_no_trace(convention):
    student, teacher = random_logits(3, 5, 6, seed=5), random_logits(3, 5, 4, seed=6)
    student_labels = labels_of_spans(5, [(2, 4), (3, 4), (0, 0)])
    teacher_labels = labels_of_spans(5, [(1, 4), (2, 4), (2, 4)])
    student[1, 0] = student[2] = np.nan
    teacher[1:] = np.nan
    student[0, 3:] = np.inf

    def total(logits, rows):
        return distillation_loss(
            logits,
            teacher[:rows],
            student_labels[:rows],
            teacher_labels[:rows],
            convention=convention,
            ce_weight=0.0,
            skip_student_eos=True,
        ).total

    value, grad = jax.value_and_grad(total)(student, 3)
    alone, alone_grad = jax.value_and_grad(total)(student[:1], 1)
    np.testing.assert_allclose(value, alone, rtol=1e-6)
    np.testing.assert_allclose(grad[:1], alone_grad, rtol=1e-6)
    np.testing.assert_array_equal(grad[1:], jnp.zeros_like(grad[1:]))


def test_a_batch_without_any_answer_is_zero():
    logits, labels = jnp.ones((2, 3, 4)), jnp.full((2, 3), -100)
    value, grad = jax.value_and_grad(lambda x: distillation_loss(x, logits, labels, labels).total)(
        logits
    )
    assert value == 0
    np.testing.assert_array_equal(grad, jnp.zeros_like(grad))


def test_ignore_index_and_weights_are_the_callers():
    student, teacher = fixture_logits()
    expected = distillation_loss(student, teacher, STUDENT_LABELS, TEACHER_LABELS)
    loss = distillation_loss(
        student,
        teacher,
        np.where(STUDENT_LABELS == -100, -1, STUDENT_LABELS),
        np.where(TEACHER_LABELS == -100, -1, TEACHER_LABELS),
        ignore_index=-1,
        uld_weight=0.25,
        ce_weight=3.0,
    )
    np.testing.assert_allclose(loss.cross_entropy, expected.cross_entropy, rtol=1e-6)
    np.testing.assert_allclose(loss.uld, expected.uld, rtol=1e-6)
    np.testing.assert_allclose(loss.total, 3 * loss.cross_entropy + loss.uld / 4, rtol=1e-6)


def test_unknown_names_list_the_valid_ones():
    logits, labels = jnp.zeros((1, 2, 3)), jnp.zeros((1, 2), int)
    with pytest.raises(ValueError, match=r"'oficial'.*'official', 'token_mean', 'trl"):
        distillation_loss(logits, logits, labels, labels, convention="oficial")
    with pytest.raises(ValueError, match=r"'quick'.*'auto', 'sort'"):
        losses.distillation_loss(logits, logits, labels, labels, method="quick")


@pytest.mark.parametrize(
    ("convention", "argument", "message"),
    [
        (
            "official",
            {"student_mask": np.ones((1, 2), bool)},
            "expected convention 'tokenkit', got",
        ),
        (
            "tokenkit",
            {"skip_student_eos": True},
            "expected convention 'official' or 'token_mean' or",
        ),
        ("tokenkit", {"skip_teacher_eos": True}, "or 'dskd', got 'tokenkit', which ignores it"),
    ],
)
def test_arguments_that_a_convention_ignores_are_refused(convention, argument, message):
    logits, labels = jnp.zeros((1, 2, 3)), jnp.zeros((1, 2), int)
    with pytest.raises(ValueError, match=f"^{next(iter(argument))}: .*{message}"):
        losses.distillation_loss(logits, logits, labels, labels, convention=convention, **argument)
