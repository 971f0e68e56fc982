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
    tx = make_optimizer(config, 10, params, 5)
    zeros = jax.tree.map(jnp.zeros_like, params)
    updates, _ = tx.update(zeros, tx.init(params), params)
    np.testing.assert_allclose(updates["kernel"][...], -0.05, rtol=1e-6)
    np.testing.assert_array_equal(updates["norm"][...], 0.0)


@pytest.mark.parametrize(("clip_norm", "expected"), [(1.0, 0.1), (0.0, 10.0)])
def test_clipping_is_by_the_global_norm_and_can_be_off(params, clip_norm, expected):
    config = OptimizerConfig(clip_norm=clip_norm, b1=0.9)
    tx = make_optimizer(config, 10, params, 5)
    grads = jax.tree.map(lambda x: jnp.full_like(x, 100.0 / 6**0.5), params)
    _, state = tx.update(grads, tx.init(params), params)

    mu = optax.tree.norm(optax.tree.get(state, "mu"))
    np.testing.assert_allclose(mu, expected, rtol=1e-5)
