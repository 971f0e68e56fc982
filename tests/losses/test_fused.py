import itertools
import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.extend.core import ClosedJaxpr, Jaxpr
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from uld_jax.losses import (
    DIVERGENCES,
    fused_divergence_cross_entropy,
    fused_uld_cross_entropy,
    uld,
)

D, E = 5, 4


def inputs(leading, student_vocab, teacher_vocab, dtype=jnp.float32, seed=0):
    rng = np.random.default_rng(seed)
    arrays = {
        "student_hidden": rng.normal(0, 2, (*leading, D)),
        "student_head": rng.normal(0, 1, (student_vocab, D)),
        "teacher_hidden": rng.normal(0, 2, (*leading, E)),
        "teacher_head": rng.normal(0, 1, (teacher_vocab, E)),
    }
    arrays = {k: jnp.asarray(v, dtype) for k, v in arrays.items()}
    arrays["targets"] = jnp.asarray(rng.integers(0, student_vocab, leading))
    weights = {k: jnp.asarray(rng.uniform(size=leading)) for k in ("ce_weights", "uld_weights")}
    return arrays, weights


def unfused(
    student_hidden,
    student_head,
    teacher_hidden,
    teacher_head,
    targets,
    *,
    ce_weights,
    uld_weights,
    student_softcap=None,
    teacher_softcap=None,
    **temperatures,
):
    """The same from whole logits."""

    def logits(hidden, head, softcap):
        x = jnp.matmul(hidden, head.T, preferred_element_type=jnp.float32)
        return x if softcap is None else softcap * jnp.tanh(x / softcap)

    student = logits(student_hidden, student_head, student_softcap)
    teacher = logits(teacher_hidden, teacher_head, teacher_softcap)
    cross_entropy = optax.softmax_cross_entropy_with_integer_labels(student, targets)
    return jnp.stack(
        [
            (ce_weights * cross_entropy).sum(),
            (uld_weights * uld(student, teacher, **temperatures)).sum(),
        ]
    )


def student_grads(total, arrays):
    student = {k: arrays[k] for k in ("student_hidden", "student_head")}
    return jax.grad(lambda student: total(**{**arrays, **student}))(student)


def grads_of(total, arrays):
    return jax.jit(partial(student_grads, total))(arrays)


def assert_equals_unfused(arrays, options, static=None, rtol=1e-5):
    fused = partial(fused_uld_cross_entropy, **options, **(static or {}))

    @jax.jit
    def compute(arrays):
        return (
            fused(**arrays),
            student_grads(lambda **kw: 3 * fused(**kw).total, arrays),
            unfused(**arrays, **options),
            student_grads(lambda **kw: 3 * unfused(**kw, **options).sum(), arrays),
        )

    loss, actual, (ce, distance), expected = compute(arrays)
    np.testing.assert_allclose(loss.cross_entropy, ce, rtol=rtol)
    np.testing.assert_allclose(loss.distance, distance, rtol=rtol)
    np.testing.assert_allclose(loss.total, ce + distance, rtol=rtol)
    for name, gradient in actual.items():
        assert gradient.dtype == arrays[name].dtype
        wide = np.asarray(expected[name], np.float32)
        np.testing.assert_allclose(
            np.asarray(gradient, np.float32), wide, rtol=rtol, atol=rtol * abs(wide).max()
        )


@pytest.mark.parametrize(
    ("leading", "student_vocab", "teacher_vocab", "chunk_size"),
    [
        ((7,), 11, 6, 3),
        ((7,), 6, 11, 1),
        ((2, 5), 9, 9, 4),
        ((2, 2, 3), 8, 13, 32),
    ],
)
def test_equals_the_unfused_computation(leading, student_vocab, teacher_vocab, chunk_size):
    arrays, weights = inputs(leading, student_vocab, teacher_vocab)
    assert_equals_unfused(arrays, weights, {"chunk_size": chunk_size})


def test_softcaps_and_temperatures_equal_the_unfused_computation():
    arrays, weights = inputs((2, 5), 9, 12, seed=1)
    caps = {"student_softcap": 3.0, "teacher_softcap": 2.0}
    temperatures = {"student_temperature": 2.0, "teacher_temperature": 0.5}
    assert_equals_unfused(arrays, {**weights, **caps, **temperatures}, {"chunk_size": 2})


def test_ties_equal_the_unfused_computation():
    arrays, weights = inputs((6,), 8, 8, seed=2)
    arrays["student_head"] = jnp.tile(arrays["student_head"][:2], (4, 1))
    assert_equals_unfused(arrays, weights, {"chunk_size": 4})


def test_bfloat16_equals_the_unfused_computation():
    arrays, weights = inputs((2, 5), 9, 12, jnp.bfloat16, seed=3)
    assert_equals_unfused(arrays, weights, {"chunk_size": 2}, rtol=2e-2)


def test_compute_dtype_is_that_of_the_products():
    arrays, weights = inputs((6,), 9, 12, seed=4)
    rounded = {
        k: v.astype(jnp.bfloat16) if v.dtype == jnp.float32 else v for k, v in arrays.items()
    }
    actual = fused_uld_cross_entropy(**arrays, **weights, compute_dtype=jnp.bfloat16)
    expected = fused_uld_cross_entropy(**rounded, **weights)
    plain = fused_uld_cross_entropy(**arrays, **weights)
    assert actual.total == expected.total
    assert actual.total != plain.total
    assert actual.total.dtype == jnp.float32


def test_the_head_gradient_accumulates_in_float32():
    count = 512
    arrays, weights = inputs((count,), 3, 3, jnp.bfloat16, seed=5)
    for name in ("student_hidden", "teacher_hidden", "targets"):
        arrays[name] = jnp.tile(arrays[name][:1], (count,) + (1,) * (arrays[name].ndim - 1))
    weights = jax.tree.map(jnp.ones_like, weights)
    one = {k: v if "head" in k else v[:1] for k, v in arrays.items()}

    def head_grad(arrays, weights):
        def total(**arrays):
            return fused_uld_cross_entropy(**arrays, **weights, chunk_size=1).total

        return np.asarray(grads_of(total, arrays)["student_head"], np.float32)

    one_grad = head_grad(one, {k: v[:1] for k, v in weights.items()})
    np.testing.assert_allclose(head_grad(arrays, weights), count * one_grad, rtol=1e-2)


def test_weight_zero_leaves_a_position_out_whatever_its_target():
    arrays, weights = inputs((2, 6), 9, 7, seed=6)
    weights = {k: v.at[:, 4:].set(0).at[1].set(0) for k, v in weights.items()}
    arrays["targets"] = arrays["targets"].at[:, 4:].set(-100).at[1].set(-100)
    fused = partial(fused_uld_cross_entropy, chunk_size=3)
    value = fused(**arrays, **weights)
    kept = {k: v if "head" in k else v[:1, :4] for k, v in arrays.items()}
    expected = fused(**kept, **{k: v[:1, :4] for k, v in weights.items()})
    np.testing.assert_allclose(value.total, expected.total, rtol=1e-6)
    grads = grads_of(lambda **kw: fused(**kw, **weights).total, arrays)
    assert jnp.isfinite(grads["student_head"]).all()
    np.testing.assert_array_equal(grads["student_hidden"][1], 0)
    np.testing.assert_array_equal(grads["student_hidden"][0, 4:], 0)
    assert (grads["student_hidden"][0, :4] != 0).all()


@pytest.mark.parametrize("leading", [(0,), (2, 0), (0, 3)])
@pytest.mark.parametrize("method", ["sort", "level_set"])
def test_no_positions_give_no_loss(leading, method):
    arrays, weights = inputs(leading, 6, 7)

    def total(**arrays):
        return fused_uld_cross_entropy(**arrays, **weights, method=method).total

    assert total(**arrays) == 0
    grads = grads_of(total, arrays)
    np.testing.assert_array_equal(grads["student_head"], np.zeros((6, D)))
    assert grads["student_hidden"].shape == (*leading, D)


def test_only_the_total_has_a_gradient_and_only_in_the_student():
    arrays, weights = inputs((5,), 6, 7, seed=7)
    targets = arrays.pop("targets")

    def part(arrays, weights, name):
        return getattr(fused_uld_cross_entropy(**arrays, targets=targets, **weights), name)

    for name in ("total", "cross_entropy", "distance"):
        gradient = jax.jit(jax.grad(partial(part, name=name), argnums=(0, 1)))
        grads, weight_grads = gradient(arrays, weights)
        nonzero = {k for k, v in {**grads, **weight_grads}.items() if (v != 0).any()}
        assert nonzero == ({"student_hidden", "student_head"} if name == "total" else set())


def test_vmap_and_scan_agree_with_a_loop_and_repeat_bit_for_bit():
    arrays, weights = inputs((3, 5), 6, 7, seed=8)
    heads = {k: arrays.pop(k) for k in ("student_head", "teacher_head")}

    def total(student_head, row):
        student = {"student_head": student_head, "teacher_head": heads["teacher_head"]}
        return fused_uld_cross_entropy(**student, **row, chunk_size=2).total

    grad = jax.jit(jax.value_and_grad(total))
    rows = {**arrays, **weights}
    loop = [grad(heads["student_head"], jax.tree.map(lambda x, i=i: x[i], rows)) for i in range(3)]
    mapped = jax.vmap(grad, in_axes=(None, 0))(heads["student_head"], rows)
    _, scanned = jax.lax.scan(lambda c, row: (c, grad(heads["student_head"], row)), 0, rows)
    for i in range(3):
        for batched in (mapped, scanned):
            for actual, expected in zip(batched, loop[i], strict=True):
                np.testing.assert_allclose(actual[i], expected, rtol=1e-5, atol=1e-6)
    again = grad(heads["student_head"], jax.tree.map(lambda x: x[0], rows))
    for first, second in zip(loop[0], again, strict=True):
        np.testing.assert_array_equal(first, second)


def test_a_batch_sharded_over_devices_stays_sharded():
    arrays, weights = inputs((8, 3), 6, 7, seed=9)
    mesh = jax.make_mesh((8,), ("batch",), axis_types=(AxisType.Auto,))

    def place(x, name):
        spec = PartitionSpec() if "head" in name else PartitionSpec("batch")
        return jax.device_put(x, NamedSharding(mesh, spec))

    def total(**arrays):
        return fused_uld_cross_entropy(**arrays, **weights, chunk_size=2).total

    expected = grads_of(total, arrays)
    weights = {k: place(v, k) for k, v in weights.items()}
    actual = grads_of(total, {k: place(v, k) for k, v in arrays.items()})
    assert actual["student_hidden"].sharding.spec[0] == "batch"
    for name, gradient in actual.items():
        np.testing.assert_allclose(gradient, expected[name], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("check_vma", [True, False])
def test_shard_map_agrees_with_one_device(check_vma):
    arrays, weights = inputs((8, 3), 6, 7, seed=9)
    mesh = jax.make_mesh((8,), ("batch",), axis_types=(AxisType.Auto,))
    specs = {k: PartitionSpec() if "head" in k else PartitionSpec("batch") for k in arrays}

    def total(arrays, weights):
        return fused_uld_cross_entropy(**arrays, **weights, chunk_size=2).total

    @partial(
        jax.shard_map,
        mesh=mesh,
        in_specs=(specs, PartitionSpec("batch")),
        out_specs=PartitionSpec(),
        check_vma=check_vma,
    )
    def mapped_total(arrays, weights):
        return jax.lax.psum(total(arrays, weights), "batch")

    expected = grads_of(lambda **arrays: total(arrays, weights), arrays)
    actual = grads_of(lambda **arrays: mapped_total(arrays, weights), arrays)
    for name, gradient in actual.items():
        np.testing.assert_allclose(gradient, expected[name], rtol=1e-5, atol=1e-6)


def sub_jaxprs(value):
    if isinstance(value, ClosedJaxpr):
        yield value.jaxpr
    elif isinstance(value, Jaxpr):
        yield value
    elif isinstance(value, (tuple, list)):
        for item in value:
            yield from sub_jaxprs(item)


def computed_shapes(jaxpr):
    for equation in jaxpr.eqns:
        yield from (tuple(v.aval.shape) for v in equation.outvars)
        for inner in itertools.chain.from_iterable(map(sub_jaxprs, equation.params.values())):
            yield from computed_shapes(inner)


def total_of_shapes(count, vocab):
    arrays, weights = inputs((count,), vocab, vocab)

    def total(arrays, weights):
        return fused_uld_cross_entropy(**arrays, **weights, chunk_size=8).total

    return total, arrays, weights


def test_no_array_spans_positions_and_vocabulary():
    count, vocab = 24, 40
    total, arrays, weights = total_of_shapes(count, vocab)
    jaxpr = jax.make_jaxpr(jax.grad(total, allow_int=True))(arrays, weights).jaxpr
    largest = max(np.prod(shape) for shape in computed_shapes(jaxpr))
    assert largest == 2 * 8 * vocab  # keys and indices of a chunk, side by side


def fused_divergence(arrays, weights, **options):
    weights = {"ce_weights": weights["ce_weights"], "divergence_weights": weights["uld_weights"]}
    return fused_divergence_cross_entropy(**arrays, **weights, **options).total


def fused_uld_to_signal(arrays, weights, *, teacher_tail_mass, **options):
    signal = {
        "teacher_hidden": None,
        "teacher_head": None,
        "teacher_probs_sorted": arrays["teacher_hidden"],
        "teacher_tail_mass": teacher_tail_mass,
    }
    return fused_uld_cross_entropy(**{**arrays, **weights, **signal}, **options).total


LARGE = [
    partial(lambda a, w, **kw: fused_uld_cross_entropy(**a, **w, **kw).total, method="level_set"),
    partial(fused_uld_to_signal, method="level_set", teacher_tail_mass=None),
    partial(fused_uld_to_signal, method="level_set", teacher_tail_mass=jnp.zeros(64)),
    *(partial(fused_divergence, divergence=name) for name in DIVERGENCES),
]


@pytest.mark.parametrize(
    "total", LARGE, ids=["level_set", "sorted signal", "truncated signal", *DIVERGENCES]
)
def test_no_option_brings_positions_and_vocabulary_together(total):
    """Lowered, not run. On a TPU level_set multiplies one-hot matrices that are never stored."""
    count, vocab = 64, 100_000

    def shape_of(*shape, dtype=jnp.float32):
        return jax.ShapeDtypeStruct(shape, dtype)

    arrays = {
        "student_hidden": shape_of(count, D),
        "student_head": shape_of(vocab, D),
        "teacher_hidden": shape_of(count, E),
        "teacher_head": shape_of(vocab, E),
        "targets": shape_of(count, dtype=jnp.int32),
    }
    weights = dict.fromkeys(("ce_weights", "uld_weights"), shape_of(count))
    gradient = jax.jit(jax.grad(partial(total, chunk_size=8), allow_int=True))
    lowered = gradient.trace(arrays, weights).lower(lowering_platforms=("cpu", "cuda"))
    shapes = re.findall(r"tensor<((?:\d+x)+)", lowered.as_text())
    sizes = {np.prod([int(n) for n in shape.split("x")[:-1]]) for shape in shapes}
    assert 8 * vocab in sizes
    assert max(sizes) <= 2 * 8 * vocab


def test_no_gradient_is_computed_unless_asked_for():
    total, arrays, weights = total_of_shapes(24, 40)
    head = (40, D)
    plain = list(computed_shapes(jax.make_jaxpr(total)(arrays, weights).jaxpr))
    grad = jax.grad(total, allow_int=True)
    differentiated = list(computed_shapes(jax.make_jaxpr(grad)(arrays, weights).jaxpr))
    assert head in differentiated
    assert head not in plain


def test_temporary_memory_does_not_grow_with_the_number_of_positions():
    vocab, sizes = 4096, []
    for count in (64, 128):
        total, arrays, weights = total_of_shapes(count, vocab)
        compiled = jax.jit(jax.grad(total, allow_int=True)).lower(arrays, weights).compile()
        sizes.append(compiled.memory_analysis().temp_size_in_bytes)
    per_position = (sizes[1] - sizes[0]) / 64
    assert per_position < 4 * 4 * (D + E)
    assert sizes[1] < 16 * 8 * 2 * vocab * 4


@pytest.mark.parametrize("method", ["sort", "level_set"])
def test_real_sizes_need_a_tenth_of_the_memory_of_whole_logits(method):
    vocab, teacher_vocab = 49_152, 262_144

    def temporary_bytes(count):
        def floats(*shape):
            return jax.ShapeDtypeStruct(shape, jnp.float32)

        def total(hidden, head, *rest):
            *teacher, targets, ce_weights, uld_weights = rest
            weights = {"ce_weights": ce_weights, "uld_weights": uld_weights}
            loss = fused_uld_cross_entropy(
                hidden, head, *teacher, targets, **weights, method=method
            )
            return loss.total

        heads = floats(vocab, 576), floats(teacher_vocab, 640)
        hidden = floats(count, 576), floats(count, 640)
        targets = jax.ShapeDtypeStruct((count,), jnp.int32)
        shapes = (hidden[0], heads[0], hidden[1], heads[1], targets, floats(count), floats(count))
        program = jax.jit(jax.grad(total, argnums=(0, 1))).lower(*shapes).compile()
        return program.memory_analysis().temp_size_in_bytes

    once, twice = temporary_bytes(2048), temporary_bytes(4096)
    # Without chunks there are at the least the logits of both sides and one gradient: 2.95 GB.
    assert once <= 4 * 2048 * (2 * vocab + teacher_vocab) / 10
    assert abs(twice - once) <= 0.05 * once


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"teacher_hidden": jnp.zeros((4, E))}, r"teacher_hidden: expected shape \(5, 4\)"),
        ({"student_hidden": jnp.zeros((5, D + 1))}, r"student_hidden: .* got \(5, 6\)"),
        ({"ce_weights": jnp.zeros(4)}, r"ce_weights: expected shape \(5,\), got \(4,\)"),
        ({"uld_weights": jnp.zeros((5, 1))}, "uld_weights: expected shape"),
        ({"student_vocab": 7}, "vocab: expected 1 to 6, got 7"),
        ({"teacher_vocab": 0}, "vocab: expected 1 to 7, got 0"),
        ({"chunk_size": 0}, "chunk_size: expected at least 1, got 0"),
        ({"method": "quick"}, r"'quick'.*'auto', 'sort'"),
    ],
)
def test_bad_arguments_are_named(change, message):
    arrays, weights = inputs((5,), 6, 7)
    with pytest.raises(ValueError, match=message):
        fused_uld_cross_entropy(**{**arrays, **weights, **change})
