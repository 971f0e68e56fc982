"""Every option of the fused losses against the same from whole logits."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import AxisType, PartitionSpec

from uld_jax.losses import (
    DIVERGENCES,
    FusedLoss,
    HeadTeacher,
    SortedTeacher,
    cross_entropy,
    fused_divergence_cross_entropy,
    fused_teachers_cross_entropy,
    fused_uld_cross_entropy,
    sorted_probabilities,
    truncated_uld,
    uld,
)

D, E = 5, 4
STUDENT = ("student_hidden", "student_head")
PARTS = ("total", "cross_entropy", "distance")
TEMPERATURES = {"student_temperature": 2.0, "teacher_temperature": 0.5}
# With 60 and 80 tokens so flat that some share a bucket, which tells the methods apart.
FLAT = {"student_temperature": 6.0, "teacher_temperature": 5.0}


def random_arrays(leading, student_vocab, teacher_vocab, seed=0, weights="uld_weights"):
    rng = np.random.default_rng(seed)
    arrays = {
        "student_hidden": rng.normal(0, 2, (*leading, D)),
        "student_head": rng.normal(0, 1, (student_vocab, D)),
        "teacher_hidden": rng.normal(0, 2, (*leading, E)),
        "teacher_head": rng.normal(0, 1, (teacher_vocab, E)),
        "ce_weights": rng.uniform(size=leading),
        weights: rng.uniform(size=leading),
    }
    arrays = {name: jnp.asarray(x, jnp.float32) for name, x in arrays.items()}
    return arrays | {"targets": jnp.asarray(rng.integers(0, student_vocab, leading))}


def whole_logits(arrays, who, softcap=None):
    logits = arrays[f"{who}_hidden"] @ arrays[f"{who}_head"].T
    return logits if softcap is None else softcap * jnp.tanh(logits / softcap)


def unfused(arrays, distances, weights="uld_weights", softcap=None, **ce_options):
    """`distances`: whole student logits -> the distance of each position."""
    logits = whole_logits(arrays, "student", softcap)
    losses = cross_entropy(logits, arrays["targets"], **ce_options)
    parts = (arrays["ce_weights"] * losses).sum(), (arrays[weights] * distances(logits)).sum()
    return FusedLoss(sum(parts), parts[0], parts[1][None])


def with_gradients(loss, arrays):
    """The loss, and the gradients of 3 · total with respect to the student."""

    def total(student):
        out = loss({**arrays, **student})
        return 3 * out.total, out

    student = {name: arrays[name] for name in STUDENT}
    gradients, out = jax.grad(total, has_aux=True)(student)
    return out, gradients


def assert_same(actual, expected, rtol=1e-5):
    for part in PARTS:
        np.testing.assert_allclose(getattr(actual[0], part), getattr(expected[0], part), rtol=rtol)
    for name in STUDENT:
        wanted = np.asarray(expected[1][name])
        assert np.isfinite(wanted).all()
        np.testing.assert_allclose(
            actual[1][name], wanted, rtol=rtol, atol=rtol * abs(wanted).max(), err_msg=name
        )


def assert_losses_agree(one, other, arrays):
    assert_same(*jax.jit(lambda x: (with_gradients(one, x), with_gradients(other, x)))(arrays))


def fused_uld(arrays, **options):
    return fused_uld_cross_entropy(**{"chunk_size": 2, **arrays, **options})


def fused_divergence(arrays, **options):
    return fused_divergence_cross_entropy(**{"chunk_size": 2, **arrays, **options})


def as_signal(arrays, known=None, temperature=1.0):
    """The same arrays with the teacher reduced to its largest probabilities."""
    probs = sorted_probabilities(whole_logits(arrays, "teacher"), temperature)
    rest = {k: v for k, v in arrays.items() if not k.startswith("teacher")}
    signal = {"teacher_probs_sorted": probs[..., :known]}
    if known is not None:
        signal["teacher_tail_mass"] = probs[..., known:].sum(-1)
    return {**rest, "teacher_hidden": None, "teacher_head": None, **signal}


@pytest.mark.parametrize("method", ["auto", "sort", "level_set"])
def test_every_method_equals_the_unfused_computation(method):
    arrays = random_arrays((2, 5), 60, 80, seed=1)

    def distances(logits):
        return uld(logits, whole_logits(arrays, "teacher"), method=method, **FLAT)

    fused = partial(fused_uld, **FLAT)
    assert_losses_agree(
        partial(fused, method=method), partial(unfused, distances=distances), arrays
    )
    one, two = (fused(arrays, method=name).distance for name in ("sort", "level_set"))
    assert abs(one / two - 1) > 5e-5


@pytest.mark.parametrize("method", ["sort", "level_set"])
def test_a_sorted_signal_equals_its_teacher(method):
    arrays = random_arrays((2, 5), 60, 80, seed=1)

    def from_signal(arrays):
        signal = as_signal(arrays, temperature=5.0)
        return fused_uld(signal, method=method, student_temperature=6.0)

    assert_losses_agree(from_signal, partial(fused_uld, method=method, **FLAT), arrays)


@pytest.mark.parametrize("method", ["sort", "level_set"])
def test_a_truncated_signal_equals_truncated_uld_of_each_position(method):
    arrays = random_arrays((2, 5), 60, 80, seed=3)
    signal = as_signal(arrays, known=40, temperature=5.0)

    def distances(logits):
        return truncated_uld(
            logits,
            signal["teacher_probs_sorted"],
            signal["teacher_tail_mass"],
            student_temperature=6.0,
            method=method,
        )[0]

    options = {"method": method, "student_temperature": 6.0}
    assert_losses_agree(
        partial(fused_uld, **options), partial(unfused, distances=distances), signal
    )
    whole = fused_uld(as_signal(arrays, temperature=5.0), **options)
    assert abs(fused_uld(signal, **options).distance - whole.distance) > 1e-3


@pytest.mark.parametrize(
    "options",
    [{"label_smoothing": 0.2}, {"z_loss": 0.05}, {"label_smoothing": 0.2, "z_loss": 0.05}],
)
def test_label_smoothing_and_z_loss_equal_the_unfused_computation(options):
    arrays = random_arrays((2, 5), 9, 12, seed=4)

    def distances(logits):
        return uld(logits, whole_logits(arrays, "teacher"))

    assert_losses_agree(
        partial(fused_uld, student_softcap=3.0, **options),
        partial(unfused, distances=distances, softcap=3.0, **options),
        arrays,
    )


def pad_heads(arrays, counts):
    """Adds rows that belong to no token and would outweigh every token."""
    garbage = {name: 1e3 * jnp.ones((n, arrays[name].shape[1])) for name, n in counts.items()}
    return arrays | {name: jnp.concatenate([arrays[name], x]) for name, x in garbage.items()}


PADDING = {"student_head": 4, "teacher_head": 3}
EVERYTHING_OF_CE = {"label_smoothing": 0.2, "z_loss": 0.05, "student_softcap": 4.0}


@pytest.mark.parametrize(
    "loss",
    [
        partial(fused_uld, method="sort", **EVERYTHING_OF_CE),
        partial(fused_uld, method="level_set", **EVERYTHING_OF_CE),
        partial(fused_divergence, divergence="jsd", **EVERYTHING_OF_CE),
        partial(fused_divergence, divergence="tvd", **EVERYTHING_OF_CE),
    ],
    ids=["sort", "level_set", "jsd", "tvd"],
)
def test_padded_rows_of_the_heads_change_nothing(loss):
    teacher_vocab, weights = 12, "uld_weights"
    if loss.func is fused_divergence:
        teacher_vocab, weights = 9, "divergence_weights"
    tokens = {"student_vocab": 9, "teacher_vocab": teacher_vocab}
    arrays = random_arrays((2, 5), 9, teacher_vocab, seed=5, weights=weights)

    @jax.jit
    def compute(arrays):
        padded = pad_heads(arrays, PADDING)
        return with_gradients(partial(loss, **tokens), padded), with_gradients(loss, arrays)

    (out, gradients), expected = compute(arrays)
    np.testing.assert_array_equal(gradients["student_head"][9:], 0)
    gradients = {**gradients, "student_head": gradients["student_head"][:9]}
    assert_same((out, gradients), expected)
    unmasked = loss(pad_heads(arrays, PADDING))
    assert abs(unmasked.total - out.total) > 1e-2


DIVERGENCE_OPTIONS = {
    "skewed_kl": {"alpha": 0.3},
    "skewed_reverse_kl": {"alpha": 0.4},
    "jsd": {"beta": 0.2},
}


@pytest.mark.parametrize("name", DIVERGENCES)
@pytest.mark.parametrize("teacher_vocab", [9, 12])
def test_every_divergence_equals_the_unfused_computation(name, teacher_vocab):
    arrays = random_arrays((2, 5), 9, teacher_vocab, 6, "divergence_weights")
    options = DIVERGENCE_OPTIONS.get(name, {})
    caps = {"student_softcap": 3.0, "teacher_softcap": 2.0}

    def distances(logits):
        teacher = whole_logits(arrays, "teacher", caps["teacher_softcap"])
        return DIVERGENCES[name](logits, teacher, **TEMPERATURES, **options)

    assert_losses_agree(
        partial(
            fused_divergence, divergence=name, divergence_options=options, **TEMPERATURES, **caps
        ),
        partial(
            unfused,
            distances=distances,
            weights="divergence_weights",
            softcap=caps["student_softcap"],
        ),
        arrays,
    )


@pytest.mark.parametrize("name", DIVERGENCE_OPTIONS)
def test_the_options_of_a_divergence_are_used(name):
    arrays = random_arrays((5,), 6, 6, 7, "divergence_weights")
    plain = fused_divergence(arrays, divergence=name)
    other = fused_divergence(arrays, divergence=name, divergence_options=DIVERGENCE_OPTIONS[name])
    assert abs(plain.distance - other.distance) > 1e-3


def test_tied_embeddings_get_both_gradients():
    arrays = random_arrays((2, 5), 9, 12, seed=8)
    inputs = jnp.asarray(np.random.default_rng(8).integers(0, 9, (2, 5)))
    embedding = arrays.pop("student_head")
    del arrays["student_hidden"]

    def tied(loss, embedding):
        hidden = jnp.tanh(embedding[inputs])
        return loss({**arrays, "student_hidden": hidden, "student_head": embedding}).total

    def distances(logits):
        return uld(logits, whole_logits(arrays, "teacher"))

    actual, expected = (
        jax.jit(jax.grad(partial(tied, loss)))(embedding)
        for loss in (fused_uld, partial(unfused, distances=distances))
    )
    np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=1e-5 * abs(expected).max())


@pytest.mark.parametrize("form", ["head", "signal", "divergence"])
def test_a_scan_over_micro_batches_adds_up_to_the_batch(form):
    weights = "divergence_weights" if form == "divergence" else "uld_weights"
    arrays = random_arrays((6, 3), 7, 7, 9, weights)
    arrays = as_signal(arrays, known=3) if form == "signal" else arrays
    loss = partial(fused_divergence if form == "divergence" else fused_uld, label_smoothing=0.1)
    heads = {name: x for name, x in arrays.items() if name.endswith("head")}
    rows = {name: x for name, x in arrays.items() if name not in heads and x is not None}
    absent = {name: x for name, x in arrays.items() if x is None}

    @jax.jit
    def accumulated(rows):
        micro_batches = jax.tree.map(lambda x: x.reshape(3, 2, *x.shape[1:]), rows)

        def step(sums, micro_batch):
            out, gradients = with_gradients(loss, {**heads, **absent, **micro_batch})
            hidden = gradients.pop("student_hidden")
            return jax.tree.map(jnp.add, sums, (out, gradients)), hidden

        start = (
            FusedLoss(0.0, 0.0, jnp.zeros(1)),
            {"student_head": jnp.zeros_like(heads["student_head"])},
        )
        (out, gradients), hidden = lax.scan(step, start, micro_batches)
        return out, {**gradients, "student_hidden": hidden.reshape(6, 3, D)}

    whole = jax.jit(lambda rows: with_gradients(loss, {**heads, **absent, **rows}))(rows)
    assert_same(accumulated(rows), whole)


@pytest.mark.parametrize("check_vma", [True, False])
@pytest.mark.parametrize("form", ["signal", "level_set", "divergence"])
def test_shard_map_over_the_batch_agrees_with_one_device(form, check_vma):
    weights = "divergence_weights" if form == "divergence" else "uld_weights"
    arrays = random_arrays((8, 3), 6, 7, 10, weights)
    arrays = as_signal(arrays, known=3) if form == "signal" else arrays
    arrays = {name: x for name, x in arrays.items() if x is not None}
    losses = {
        "signal": lambda x: fused_uld({"teacher_hidden": None, "teacher_head": None, **x}),
        "level_set": partial(fused_uld, method="level_set"),
        "divergence": fused_divergence,
    }
    loss = losses[form]
    mesh = jax.make_mesh((8,), ("batch",), axis_types=(AxisType.Auto,))
    specs = {k: PartitionSpec() if "head" in k else PartitionSpec("batch") for k in arrays}

    @partial(
        jax.shard_map,
        mesh=mesh,
        in_specs=(specs,),
        out_specs=PartitionSpec(),
        check_vma=check_vma,
    )
    def over_devices(arrays):
        return lax.psum(loss(arrays), "batch")

    assert_losses_agree(over_devices, loss, arrays)


@pytest.mark.parametrize("form", ["head", "signal", "divergence"])
def test_numbers_may_be_traced(form):
    weights = "divergence_weights" if form == "divergence" else "uld_weights"
    arrays = random_arrays((5,), 7, 7, 11, weights)
    arrays = as_signal(arrays, known=3) if form == "signal" else arrays
    numbers = {"label_smoothing": 0.2, "z_loss": 0.05, "student_temperature": 2.0}
    if form != "signal":
        numbers["teacher_temperature"] = 0.5

    def loss(numbers, beta):
        if form == "divergence":
            options = {"divergence": "jsd", "divergence_options": {"beta": beta}}
            return with_gradients(partial(fused_divergence, **numbers, **options), arrays)
        return with_gradients(partial(fused_uld, **numbers), arrays)

    assert_same(jax.jit(loss)(numbers, 0.3), loss(numbers, 0.3))
    plain = loss(dict.fromkeys(numbers, 0.0) | dict.fromkeys([*numbers][2:], 1.0), 0.3)
    assert abs(plain[0].total - loss(numbers, 0.3)[0].total) > 1e-2


def test_the_result_is_a_tree_of_its_parts():
    arrays = random_arrays((5,), 6, 7, seed=12)
    out = jax.jit(fused_uld)(arrays)
    assert isinstance(out, FusedLoss)
    assert [x.shape for x in jax.tree.leaves(out)] == [(), (), (1,)]
    np.testing.assert_allclose(out.total, out.cross_entropy + out.distance, rtol=1e-6)
    only_ce = fused_uld({**arrays, "uld_weights": jnp.zeros(5)})
    assert only_ce.distance == 0
    np.testing.assert_allclose(only_ce.total, out.cross_entropy, rtol=1e-6)


def test_several_teachers_add_up():
    arrays = random_arrays((5,), 6, 7, seed=13)
    other = random_arrays((5,), 6, 9, seed=14)
    signal = as_signal(other, known=3)
    student = {name: arrays[name] for name in ("student_hidden", "student_head")}
    shared = {name: arrays[name] for name in ("targets", "ce_weights")}
    names = ("teacher_hidden", "teacher_head", "uld_weights")

    def together(student):
        teachers = [
            HeadTeacher(*(arrays[name] for name in names), temperature=1.3),
            SortedTeacher(
                signal["teacher_probs_sorted"], other["uld_weights"], signal["teacher_tail_mass"]
            ),
        ]
        return fused_teachers_cross_entropy(**student, teachers=teachers, **shared, chunk_size=2)

    def apart(student):
        nothing = jnp.zeros(5)
        first = fused_uld({**arrays, **student}, teacher_temperature=1.3)
        second = fused_uld({**signal, **shared, **student, "ce_weights": nothing})
        distances = jnp.stack([first.distance, second.distance])
        return FusedLoss(first.total + second.total, first.cross_entropy, distances)

    (loss, grads), (expected, expected_grads) = (
        (f(student), jax.grad(lambda s, f=f: f(s).total)(student)) for f in (together, apart)
    )
    jax.tree.map(
        lambda got, want: np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6),
        (loss, grads),
        (expected, expected_grads),
    )


def probs_of(leading, known=3):
    return {"teacher_probs_sorted": jnp.full((*leading, known), 1 / known)}


NO_TEACHER = {"teacher_hidden": None, "teacher_head": None}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (probs_of((5,)), "teacher: expected teacher_hidden and teacher_head, or else"),
        (NO_TEACHER, "teacher: expected teacher_hidden and teacher_head, or else"),
        ({"teacher_head": None}, "teacher: expected teacher_hidden and teacher_head, or else"),
        ({"teacher_hidden": None} | probs_of((5,)), "teacher: expected"),
        (NO_TEACHER | probs_of((4,)), r"teacher_probs_sorted: expected shape \(5,\), got \(4,\)"),
        (
            NO_TEACHER | probs_of((5,)) | {"teacher_tail_mass": jnp.zeros((5, 1))},
            r"teacher_tail_mass: expected shape \(5,\), got \(5, 1\)",
        ),
        ({"teacher_tail_mass": jnp.zeros(5)}, "teacher_tail_mass: expected None without"),
        ({"student_head": jnp.zeros((6, D + 1))}, r"student_hidden: expected shape \(5, 6\)"),
        ({"targets": jnp.zeros(4, int)}, r"teacher_hidden: expected shape \(4, 4\)"),
    ],
)
def test_a_bad_teacher_is_refused(change, message):
    with pytest.raises(ValueError, match=message):
        fused_uld({**random_arrays((5,), 6, 7), **change})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"divergence": "kl_div"}, r"divergence: unknown 'kl_div'; expected one of 'kl'"),
        ({"divergence": "jsd", "divergence_options": {"beta": 2.0}}, r"beta: .* got 2\.0"),
        ({"divergence_options": {"beta": 0.5}}, "beta"),
        ({"divergence_weights": jnp.zeros(4)}, r"divergence_weights: expected shape \(5,\)"),
        ({"teacher_hidden": jnp.zeros((5, E + 1))}, r"teacher_hidden: .* got \(5, 5\)"),
        ({"ce_weights": jnp.zeros((5, 1))}, r"ce_weights: .* got \(5, 1\)"),
        ({"chunk_size": -1}, "chunk_size: expected at least 1, got -1"),
    ],
)
def test_bad_arguments_of_the_divergence_are_named(change, message):
    arrays = random_arrays((5,), 6, 6, weights="divergence_weights")
    with pytest.raises(ValueError, match=message):
        fused_divergence({**arrays, **change})
