"""The optimizer: the schedule against torch, weight decay, clipping."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
from flax import nnx

from uld_jax.config import OptimizerConfig
from uld_jax.train import make_optimizer, make_schedule


@pytest.mark.parametrize("steps", [3, 9, 20, 24, 100])
def test_one_cycle_equals_torch(steps):
    config = OptimizerConfig(learning_rate=2e-6)
    ours = make_schedule(config, steps)
    optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))])
    theirs = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, 2e-6, total_steps=steps, pct_start=0.1, div_factor=2, final_div_factor=5
    )
    for step in range(steps):
        np.testing.assert_allclose(ours(step), optimizer.param_groups[0]["lr"], rtol=2e-5)
        optimizer.step()
        if step + 1 < steps:
            theirs.step()


@pytest.mark.parametrize("schedule", ["one_cycle", "cosine", "constant"])
def test_a_run_of_one_step_has_a_finite_rate(schedule):
    rate = make_schedule(OptimizerConfig(learning_rate=1.0, schedule=schedule), 1)(0)
    assert 0 < float(rate) <= 1.0


@pytest.fixture
def params():
    return nnx.State(
        {
            "kernel": nnx.Param(jnp.ones((2, 2)), axes=("embed", "mlp")),
            "norm": nnx.Param(jnp.ones(2), axes=("norm",)),
        }
    )


def test_weight_decay_leaves_norm_scales_alone(params):
    config = OptimizerConfig(learning_rate=0.5, schedule="constant", weight_decay=0.1)
    tx = make_optimizer(config, 10, params)
    zeros = jax.tree.map(jnp.zeros_like, params)
    updates, _ = tx.update(zeros, tx.init(params), params)
    np.testing.assert_allclose(updates["kernel"][...], -0.05, rtol=1e-6)
    np.testing.assert_array_equal(updates["norm"][...], 0.0)


@pytest.mark.parametrize(("clip_norm", "expected"), [(1.0, 0.1), (0.0, 10.0)])
def test_clipping_is_by_the_global_norm_and_can_be_off(params, clip_norm, expected):
    config = OptimizerConfig(clip_norm=clip_norm, b1=0.9)
    tx = make_optimizer(config, 10, params)
    grads = jax.tree.map(lambda x: jnp.full_like(x, 100.0 / 6**0.5), params)
    _, state = tx.update(grads, tx.init(params), params)

    mu = optax.tree.norm(optax.tree.get(state, "mu"))
    np.testing.assert_allclose(mu, expected, rtol=1e-5)


def optax_chain(config, params):
    """The same optimizer out of the library's parts."""
    decayed = nnx.State({name: name != "norm" for name in params})
    return optax.apply_if_finite(
        optax.chain(
            optax.clip_by_global_norm(config.clip_norm),
            optax.adamw(
                make_schedule(config, 10),
                b1=config.b1,
                b2=config.b2,
                eps=config.eps,
                weight_decay=config.weight_decay,
                mask=decayed,
            ),
        ),
        1_000,
    )


def test_ten_steps_equal_those_of_optax(params):
    config = OptimizerConfig(learning_rate=0.1, weight_decay=0.3, clip_norm=1.0)
    ours, theirs = make_optimizer(config, 10, params), optax_chain(config, params)
    random = np.random.default_rng(0)
    states, values = [ours.init(params), theirs.init(params)], [params, params]
    for number in range(10):
        # Some are clipped and some are not; the fourth is no step.
        scale = np.inf if number == 3 else 10.0 ** (number % 3 - 1)
        grads = jax.tree.map(
            lambda x, s=scale: jnp.float32(s * random.standard_normal(x.shape)), params
        )
        for which, tx in enumerate((ours, theirs)):
            updates, states[which] = tx.update(grads, states[which], values[which])
            values[which] = optax.apply_updates(values[which], updates)
        for name in params:
            np.testing.assert_allclose(values[0][name][...], values[1][name][...], rtol=2e-6)
    for name in ("mu", "nu"):
        moments = [optax.tree.get(state, name) for state in states]
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-6), *moments)
    for name in ("notfinite_count", "total_notfinite"):
        assert int(getattr(states[0], name)) == int(getattr(states[1], name)), name
    assert int(states[0].total_notfinite) == 1


def test_moments_keep_the_dtype_of_their_parameters(params):
    params = jax.tree.map(lambda x: x.astype(jnp.bfloat16), params)
    tx = make_optimizer(OptimizerConfig(), 10, params)
    grads = jax.tree.map(jnp.ones_like, params)
    updates, state = tx.update(grads, tx.init(params), params)
    moments = optax.tree.get(state, "mu"), optax.tree.get(state, "nu")
    assert {x.dtype for x in jax.tree.leaves(moments)} == {jnp.bfloat16.dtype}
    after = optax.apply_updates(params, updates)
    assert {x.dtype for x in jax.tree.leaves(after)} == {jnp.bfloat16.dtype}
