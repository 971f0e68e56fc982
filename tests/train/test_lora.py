"""Training adapters beside a quantised teacher: what changes, what does not, and resuming."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from uld_jax.config import LossConfig, OptimizerConfig
from uld_jax.models import Decoder, add_adapters, quantize, split_trained
from uld_jax.sharding import batch_shards, make_mesh
from uld_jax.testing import tiny_config, tiny_gemma, toy_batch
from uld_jax.train import (
    Checkpoints,
    StepTeacher,
    init_state,
    make_optimizer,
    param_shardings,
    restore_params,
    state_shardings,
    to_mesh,
    train_step,
)

ONE, EIGHT = (1, 1, 1), (2, 2, 2)
STEPS = 6


def mesh_of(shape):
    return make_mesh(*shape, devices=jax.devices()[: int(np.prod(shape))])


def plain_student():
    """With a head that hidden states can move: it is frozen, and starts with tiny numbers."""
    student = Decoder(tiny_config(), rngs=nnx.Rngs(0))
    student.embed.set_value(10 * student.embed[...])
    return student


class Job:
    """An adapted student with a teacher on a mesh, and the compiled step."""

    def __init__(self, shape=ONE, kind="int8"):
        self.mesh = mesh_of(shape)
        student = plain_student()
        teacher = Decoder(tiny_gemma(kv_heads=2), rngs=nnx.Rngs(1))
        for model in (student, teacher):
            state = nnx.state(model)
            nnx.update(model, jax.device_put(state, param_shardings(state, self.mesh)))
        add_adapters(student, rank=4, alpha=8.0)
        if kind:
            quantize(teacher, kind)
        self.graph, params, self.frozen = split_trained(student)
        teacher_graph, self.teacher = nnx.split(teacher)
        optimizer = OptimizerConfig(learning_rate=3e-2, schedule="constant")
        tx = make_optimizer(optimizer, STEPS, params)
        fresh = functools.partial(init_state, tx=tx, seed=0)
        self.shardings = state_shardings(jax.eval_shape(fresh, params), tx, self.mesh)
        self.state = jax.jit(fresh, out_shardings=self.shardings)(params)
        fixed = {"student": self.graph, "teachers": [StepTeacher(teacher_graph)], "tx": tx}
        self.compiled = jax.jit(
            functools.partial(train_step, **fixed, loss=LossConfig(chunk_size=8)),
            out_shardings=(self.shardings, None),
        )
        self.batch = to_mesh(toy_batch(groups=batch_shards(self.mesh)), self.mesh)

    def step(self, state):
        with jax.set_mesh(self.mesh):
            return self.compiled(state, [self.teacher], self.batch, self.frozen)

    def run(self, state, steps):
        totals = []
        for _ in range(steps):
            state, metrics = self.step(state)
            totals.append(float(metrics["total"]))
        return state, totals


@pytest.fixture(scope="module")
def job():
    return Job()


@pytest.fixture(scope="module")
def trained(job):
    return job.run(job.state, STEPS)


def assert_equal(found, expected):
    jax.tree.map(np.testing.assert_array_equal, found, expected)


def test_only_the_adapters_change_and_the_loss_falls(job, trained):
    frozen = jax.tree.map(np.asarray, job.frozen)
    state, totals = trained
    assert totals[-1] < totals[0] - 0.3
    for path, param in nnx.to_flat_state(state.params):
        before = dict(nnx.to_flat_state(job.state.params))[path]
        assert not np.array_equal(param[...], before[...]), path
    before = plain_student()
    assert_equal(frozen, (nnx.state(before),))
    student = nnx.merge(job.graph, state.params, *job.frozen)
    assert_equal(nnx.state(student, nnx.Not(nnx.LoRAParam)), nnx.state(before))


def test_the_optimizer_has_moments_of_the_adapters_alone(job):
    sizes = sorted(leaf.shape for leaf in jax.tree.leaves(job.state.params))
    for moment in ("mu", "nu"):
        tree = optax.tree.get(job.state.opt_state, moment)
        assert sorted(leaf.shape for leaf in jax.tree.leaves(tree)) == sizes
    assert len(sizes) == 2 * 7


def test_a_mesh_takes_the_same_step(job):
    eight = Job(EIGHT)
    (state, metrics), (expected_state, expected) = eight.step(eight.state), job.step(job.state)
    for name in ("total", "cross_entropy", "uld", "grad_norm"):
        np.testing.assert_allclose(metrics[name], expected[name], rtol=1e-5, err_msg=name)
    moments = (optax.tree.get(s.opt_state, "mu") for s in (state, expected_state))
    for got, want in zip(*map(jax.tree.leaves, moments), strict=True):
        np.testing.assert_allclose(got, want, atol=1e-6, rtol=1e-5)
    assert state.params["blocks"]["mlp"]["up_lora_b"][...].sharding.spec[2] == "tensor"


def test_the_loss_against_an_int8_teacher_is_close_to_that_against_the_full_one(job):
    full = Job(kind="")
    (_, metrics), (_, expected) = job.step(job.state), full.step(full.state)
    assert metrics["uld"] != expected["uld"]
    np.testing.assert_allclose(metrics["uld"], expected["uld"], rtol=1e-2)
    np.testing.assert_allclose(metrics["cross_entropy"], expected["cross_entropy"], rtol=1e-6)


def test_resumes_exactly_from_a_checkpoint_of_adapters(job, trained, tmp_path):
    half, _ = job.run(job.state, STEPS // 2)
    with Checkpoints(tmp_path / "checkpoints", keep=1) as checkpoints:
        checkpoints.save(half, {"position": 3})
    other = Job()
    with Checkpoints(tmp_path / "checkpoints", keep=1) as checkpoints:
        restored = checkpoints.restore(other.state, other.shardings)
    assert restored is not None
    state, position = restored
    assert position == {"position": 3}
    assert_equal(state, half)
    state, _ = other.run(state, STEPS - STEPS // 2)
    assert_equal(state, trained[0])
    params = restore_params(tmp_path / "checkpoints", job.state.params, mesh_of(EIGHT))
    assert_equal(params, half.params)
    stored = sum(p.stat().st_size for p in (tmp_path / "checkpoints").rglob("*") if p.is_file())
    assert stored < sum(leaf.nbytes for leaf in jax.tree.leaves(job.frozen)) * 4


def test_a_broken_teacher_changes_no_adapter(job):
    broken = jax.tree.map(lambda x: x, job.teacher)
    broken["norm"].set_value(jnp.full_like(job.teacher["norm"][...], jnp.nan))
    state, metrics = job.compiled(job.state, [broken], job.batch, job.frozen)
    assert int(metrics["skipped_steps"]) == 1
    assert_equal(state.params, job.state.params)
