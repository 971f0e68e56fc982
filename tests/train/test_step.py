"""The train step: the same on every mesh, with and without accumulation, and safe from NaN."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from uld_jax.config import LossConfig, OptimizerConfig
from uld_jax.losses import Divergence, sorted_probabilities, uld
from uld_jax.models import Decoder
from uld_jax.sharding import RULES, batch_shards, make_mesh, parameter_rules
from uld_jax.testing import tiny_config, tiny_gemma, toy_batch
from uld_jax.train import (
    StepTeacher,
    gradients,
    init_state,
    make_optimizer,
    state_shardings,
    to_mesh,
    train_step,
)
from uld_jax.train.state import param_shardings
from uld_jax.types import SortedSignal, TeacherSignal

LOSS = LossConfig(chunk_size=8)
LONG_SEQUENCES = [(1, 1, 1, 4), (2, 2, 1, 2)]
WINDOWED = tiny_gemma(vocab_size=64, kv_heads=2)


def make(mesh, *, micro_batches=1, loss=LOSS, learning_rate=1e-2, rules=RULES, student=None):
    """Student state, teacher parameters and the compiled step on a mesh."""
    student = Decoder(student or tiny_config(), rngs=nnx.Rngs(0))
    teacher = Decoder(tiny_gemma(kv_heads=2), rngs=nnx.Rngs(1))
    graph, params = nnx.split(student)
    teacher_graph, teacher_params = nnx.split(teacher)
    tx = make_optimizer(
        OptimizerConfig(learning_rate=learning_rate, schedule="constant"), 10, params
    )
    state = init_state(params, tx, seed=0)
    shardings = state_shardings(state, tx, mesh, rules)
    state = jax.device_put(state, shardings)
    teacher_params = jax.device_put(teacher_params, param_shardings(teacher_params, mesh))
    step = jax.jit(
        functools.partial(
            train_step, student=graph, teachers=[StepTeacher(teacher_graph)], tx=tx, loss=loss
        ),
        out_shardings=(shardings, None),
    )
    batch = to_mesh(toy_batch(groups=batch_shards(mesh), micro_batches=micro_batches), mesh)
    return state, [teacher_params], batch, step, (graph, teacher_graph)


@pytest.fixture(scope="module")
def alone():
    """One step on one device: what every other arrangement must reproduce."""
    mesh = make_mesh(1, 1, 1, devices=jax.devices()[:1])
    state, teacher, batch, step, graphs = make(mesh)
    return state, teacher, batch, graphs, step(state, teacher, batch)


def assert_same_step(result, expected):
    (state, metrics), (expected_state, expected_metrics) = result, expected
    for name in ("total", "cross_entropy", "uld", "grad_norm"):
        np.testing.assert_allclose(metrics[name], expected_metrics[name], rtol=1e-5, err_msg=name)
    # The first moment after one step is 0.1 times the clipped gradient.
    moments = (optax.tree.get(s.opt_state, "mu") for s in (state, expected_state))
    for got, want in zip(*map(jax.tree.leaves, moments), strict=True):
        np.testing.assert_allclose(got, want, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("shape", [(8, 1, 1), (2, 4, 1), (2, 2, 2)], ids=str)
def test_every_mesh_takes_the_same_step(shape, alone):
    mesh = make_mesh(*shape)
    state, teacher, batch, step, _ = make(mesh)
    assert len(batch.student_tokens.sharding.device_set) == 8
    with jax.set_mesh(mesh):
        assert_same_step(step(state, teacher, batch), alone[-1])


def on_sequence(shape):
    data, fsdp, tensor, sequence = shape
    devices = jax.devices()[: np.prod(shape)]
    return make_mesh(data, fsdp, tensor, sequence=sequence, devices=devices)


SEQUENCES = [(2, 1, 2, 2), *(pytest.param(s, marks=pytest.mark.slow) for s in LONG_SEQUENCES)]


@pytest.mark.parametrize("shape", SEQUENCES, ids=str)
def test_rows_in_parts_take_the_same_step(shape, alone):
    """Of lengths 16 and 20, and of a teacher with windows of 4 tokens, across the parts' ends."""
    mesh = on_sequence(shape)
    state, teacher, batch, step, _ = make(mesh)
    with jax.set_mesh(mesh):
        assert_same_step(step(state, teacher, batch), alone[-1])


@pytest.fixture(scope="module")
def windowed():
    """The same with a student whose first layer has a window."""
    mesh = make_mesh(1, 1, 1, devices=jax.devices()[:1])
    state, teacher, batch, step, _ = make(mesh, student=WINDOWED)
    return step(state, teacher, batch)


@pytest.mark.slow
@pytest.mark.parametrize("shape", [(2, 1, 2, 2), *LONG_SEQUENCES], ids=str)
def test_windows_over_rows_in_parts_take_the_same_step(shape, windowed):
    mesh = on_sequence(shape)
    state, teacher, batch, step, _ = make(mesh, student=WINDOWED, micro_batches=2)
    with jax.set_mesh(mesh):
        assert_same_step(step(state, teacher, batch), windowed)


def test_parts_of_a_row_need_less_memory():
    """Of the student's part of a step, for rows of 1,024 tokens, nothing rematerialised."""
    graph, params = nnx.split(nnx.eval_shape(lambda: Decoder(tiny_config(), rngs=nnx.Rngs(0))))
    tokens = jax.ShapeDtypeStruct((2, 1024), jnp.int32)

    def loss(params, tokens, segments):
        return (nnx.merge(graph, params).hidden(tokens, segment_ids=segments) ** 2).sum()

    found = []
    for sequence in (1, 2):
        with jax.set_mesh(on_sequence((1, 1, 1, sequence))):
            # A function of its own: a traced one is kept for other meshes.
            grad = jax.jit(lambda *arguments: jax.grad(loss)(*arguments))
            memory = grad.lower(params, tokens, tokens).compile().memory_analysis()
        found.append(memory.temp_size_in_bytes)
    assert found[1] <= 0.6 * found[0], found


def test_whole_parameters_with_moments_in_parts_take_the_same_step(alone):
    """ZeRO-1, against ZeRO-3 everywhere else."""
    mesh = make_mesh(1, 4, 1, devices=jax.devices()[:4])
    state, teacher, batch, step, _ = make(mesh, rules=parameter_rules(sharded=False))
    with jax.set_mesh(mesh):
        result = step(state, teacher, batch)
    assert_same_step(result, alone[-1])
    shapes = {"params": result[0].params, "mu": optax.tree.get(result[0].opt_state, "mu")}
    on_device = {
        name: sum(leaf.addressable_shards[0].data.size for leaf in jax.tree.leaves(tree))
        for name, tree in shapes.items()
    }
    whole = sum(leaf.size for leaf in jax.tree.leaves(state.params))
    assert on_device["params"] == whole
    # Norms are not cut.
    assert whole / 4 < on_device["mu"] < whole / 3.8


@pytest.mark.parametrize("micro_batches", [2, 4])
def test_accumulation_equals_one_large_batch(micro_batches, alone):
    mesh = make_mesh(1, 1, 1, devices=jax.devices()[:1])
    state, teacher, batch, step, _ = make(mesh, micro_batches=micro_batches)
    assert_same_step(step(state, teacher, batch), alone[-1])


def answer_logits(state, teacher_params, batch, graph, teacher_graph):
    """Of student and teacher at the answer positions, from whole logits."""
    b = jax.tree.map(lambda x: x[0], batch)
    student_BTV = nnx.merge(graph, state.params)(
        b.student_tokens, segment_ids=b.student_segment_ids
    )
    teacher_BSU = nnx.merge(teacher_graph, teacher_params)(
        b.teachers[0].tokens, segment_ids=b.teachers[0].segment_ids
    )
    student_NV = student_BTV.reshape(-1, 64)[b.student_index[0]]
    return student_NV, teacher_BSU.reshape(-1, 96)[b.teachers[0].index[0]], b


def test_loss_equals_the_plain_computation_over_full_logits(alone):
    state, (teacher_params,), batch, graphs, (_, metrics) = alone
    student_NV, teacher_NU, b = answer_logits(state, teacher_params, batch, *graphs)
    ce_N = optax.softmax_cross_entropy_with_integer_labels(student_NV, b.targets[0])
    ce = (ce_N * b.ce_weight[0]).sum() / b.ce_weight.sum()
    weight_N = b.teachers[0].uld_weight[0]
    distance = (uld(student_NV, teacher_NU) * weight_N).sum() / weight_N.sum()
    np.testing.assert_allclose(metrics["cross_entropy"], ce, rtol=1e-5)
    np.testing.assert_allclose(metrics["uld"], distance, rtol=1e-5)
    np.testing.assert_allclose(metrics["total"], ce + 1.5 * distance, rtol=1e-5)


def test_another_distance_is_computed_at_the_same_positions(alone):
    state, (params,), batch, (graph, teacher_graph), (_, expected) = alone
    student_NV, teacher_NU, b = answer_logits(state, params, batch, graph, teacher_graph)
    compare = Divergence("kl", np.arange(40), np.arange(40)[::-1])
    weight_N = b.teachers[0].uld_weight[0]
    distance = (compare(student_NV, teacher_NU) * weight_N).sum() / weight_N.sum()
    teachers = [StepTeacher(teacher_graph, comparison=compare)]
    loss = dataclasses.replace(LOSS, distance="kl")
    step = functools.partial(gradients, student=graph, teachers=teachers, loss=loss)
    mesh = make_mesh(2, 2, 2)
    here = jax.tree.map(np.asarray, (state.params, [params]))
    with jax.set_mesh(mesh):
        over = to_mesh(toy_batch(groups=batch_shards(mesh)), mesh)
        _, metrics = jax.jit(step)(*here, over)
    np.testing.assert_allclose(metrics["kl"], distance, rtol=1e-5)
    np.testing.assert_allclose(metrics["cross_entropy"], expected["cross_entropy"], rtol=1e-5)
    assert "uld" not in metrics


def signal_of(batch, graph, params, known=None):
    """The batch with the teacher's sorted probabilities in place of its tokens."""
    (given,) = batch.teachers
    flat = {name: x.reshape(-1, x.shape[-1]) for name, x in given.inputs.items()}
    teacher_BSU = nnx.merge(graph, params)(flat.pop("tokens_BT"), **flat)
    rows = teacher_BSU.reshape(*given.index.shape[:2], -1, teacher_BSU.shape[-1])
    logits = jnp.take_along_axis(rows, given.index[..., None], axis=2)
    probs = sorted_probabilities(logits)
    tail = probs[..., known:].sum(-1) if known else jnp.zeros(probs.shape[:-1])
    signal = SortedSignal(probs[..., :known], tail, 1.5 * tail)
    return dataclasses.replace(batch, teachers=(TeacherSignal(given.uld_weight, signal),))


@pytest.fixture(scope="module")
def from_signals(alone):
    """The step of one device on what a cache would hold."""
    graph = alone[3][0]
    tx = make_optimizer(
        OptimizerConfig(learning_rate=1e-2, schedule="constant"), 10, alone[0].params
    )
    fixed = {"student": graph, "teachers": [StepTeacher(None)], "tx": tx, "loss": LOSS}
    return jax.jit(functools.partial(train_step, **fixed))


@pytest.mark.parametrize("shape", [(1, 1, 1), (2, 2, 2)], ids=str)
def test_whole_signals_take_the_same_step_as_their_teacher(shape, alone, from_signals):
    mesh = make_mesh(*shape, devices=jax.devices()[: np.prod(shape)])
    state, (params,), batch, _, (_, teacher_graph) = make(mesh)
    batch = signal_of(batch, teacher_graph, params)
    with jax.set_mesh(mesh):
        result = from_signals(state, [None], batch)
    assert_same_step(result, alone[-1])
    assert result[1]["uld_error"] == 0


def test_a_cut_signal_is_within_its_certified_error(alone, from_signals):
    state, (params,), batch, (_, teacher_graph), (_, expected) = alone
    cut = signal_of(batch, teacher_graph, params, known=20)
    _, metrics = from_signals(state, [None], cut)
    difference = abs(metrics["uld"] - expected["uld"])
    assert 1e-5 < difference <= metrics["uld_error"]


def test_several_teachers_are_weighed_by_their_shares(alone, from_signals):
    state, (params,), batch, (graph, teacher_graph), (_, expected) = alone
    cut = signal_of(batch, teacher_graph, params, known=20)
    _, of_cut = from_signals(state, [None], cut)
    tx = make_optimizer(OptimizerConfig(), 10, state.params)
    teachers = [StepTeacher(teacher_graph, 0.75), StepTeacher(None, 0.25)]
    fixed = {"student": graph, "teachers": teachers, "tx": tx, "loss": LOSS}
    both = dataclasses.replace(batch, teachers=(*batch.teachers, *cut.teachers))
    _, metrics = jax.jit(functools.partial(train_step, **fixed))(state, [params, None], both)
    np.testing.assert_allclose(metrics["uld_0"], expected["uld"], rtol=1e-5)
    np.testing.assert_allclose(metrics["uld_1"], of_cut["uld"], rtol=1e-5)
    uld = 0.75 * expected["uld"] + 0.25 * of_cut["uld"]
    np.testing.assert_allclose(metrics["uld"], uld, rtol=1e-5)
    np.testing.assert_allclose(metrics["uld_error"], 0.25 * of_cut["uld_error"], rtol=1e-5)
    total = expected["cross_entropy"] + 1.5 * uld
    np.testing.assert_allclose(metrics["total"], total, rtol=1e-5)


def test_text_distillation_does_not_ask_the_teacher(alone):
    mesh = make_mesh(1, 1, 1, devices=jax.devices()[:1])
    loss = dataclasses.replace(LOSS, uld_weight=0.0)
    state, [teacher], batch, step, _ = make(mesh, loss=loss)
    _, metrics = step(state, [jax.tree.map(lambda x: x * jnp.nan, teacher)], batch)
    np.testing.assert_allclose(metrics["total"], alone[-1][1]["cross_entropy"], rtol=1e-5)
    assert metrics["uld"] == metrics["skipped_steps"] == 0


def test_the_loss_falls(alone):
    mesh = make_mesh(1, 1, 1, devices=jax.devices()[:1])
    state, teacher, batch, step, _ = make(mesh)
    totals = []
    for _ in range(8):
        state, metrics = step(state, teacher, batch)
        totals.append(float(metrics["total"]))
    assert totals[-1] < totals[0] - 0.5
    assert int(state.step) == 8


def test_a_non_finite_step_changes_nothing_and_is_counted(alone):
    mesh = make_mesh(1, 1, 1, devices=jax.devices()[:1])
    state, teacher, batch, step, _ = make(mesh)
    (broken,) = jax.tree.map(lambda x: x, teacher)
    broken["embed"].set_value(jnp.full_like(broken["embed"][...], jnp.nan))
    after, metrics = step(state, [broken], batch)
    assert int(metrics["skipped_steps"]) == int(metrics["nonfinite_in_a_row"]) == 1
    for got, want in zip(*map(jax.tree.leaves, (after.params, state.params)), strict=True):
        np.testing.assert_array_equal(got, want)
    _, metrics = step(after, teacher, batch)
    assert int(metrics["skipped_steps"]) == 1
    assert int(metrics["nonfinite_in_a_row"]) == 0


def test_no_array_of_batch_by_length_by_vocabulary_is_compiled():
    mesh = make_mesh(1, 1, 1, devices=jax.devices()[:1])
    state, teacher, batch, step, _ = make(mesh)
    text = step.lower(state, teacher, batch).as_text()
    assert "8x16x32" in text  # the student's hidden states: the search below would find them
    for forbidden in ("8x16x64xf32", "8x20x96xf32", "128x64xf32", "160x96xf32"):
        assert forbidden not in text
