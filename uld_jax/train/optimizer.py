"""The optimizer: AdamW, the paper's one-cycle schedule, clipping, and the non-finite guard."""

from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from uld_jax.config import OptimizerConfig


def make_schedule(config: OptimizerConfig, steps: int) -> optax.Schedule:
    """The learning rate by step.

    Args:
        config: The schedule's name and its numbers.
        steps: Optimizer steps of the whole run.

    Returns:
        Step to learning rate.

    Example:
        >>> rate = make_schedule(OptimizerConfig(learning_rate=1.0), steps=100)
        >>> [round(float(rate(step)), 3) for step in (0, 9, 99)]
        [0.5, 1.0, 0.1]
    """
    peak = config.learning_rate
    if config.schedule == "constant":
        return optax.constant_schedule(peak)
    if config.schedule == "cosine":
        return optax.cosine_decay_schedule(peak, steps)
    return _one_cycle(config, steps)


def _one_cycle(config: OptimizerConfig, steps: int) -> optax.Schedule:
    """The OneCycleLR, of torch, whose rise may end between two steps, unlike optax's."""
    peak = config.learning_rate
    start, end = peak / config.div_factor, peak / (config.div_factor * config.final_div_factor)
    top, last = config.pct_start * steps - 1, steps - 1

    def rate(step: Any) -> jax.Array:
        rising = start + (peak - start) * _half_cosine(step, 0, top)
        return jnp.where(step <= top, rising, peak + (end - peak) * _half_cosine(step, top, last))

    return rate


def _half_cosine(step: Any, begin: float, finish: float) -> jax.Array:
    """From 0 at begin to 1 at finish along half a cosine."""
    fraction = jnp.clip((step - begin) / max(finish - begin, 1e-6), 0, 1)
    return (1 - jnp.cos(jnp.pi * fraction)) / 2


def make_optimizer(
    config: OptimizerConfig, steps: int, params: nnx.State, max_nonfinite_steps: int
) -> optax.GradientTransformation:
    """AdamW with decoupled weight decay on all but norm scales.

    A step whose gradients are not finite changes neither parameters nor moments; the count of
    such steps in a row is in the state (`notfinite_count`).

    Args:
        config: Its numbers.
        steps: Optimizer steps of the whole run.
        params: The student's parameters (their axes say which are norm scales).
        max_nonfinite_steps: Skipped steps in a row that the run allows.

    Returns:
        The transformation.

    Example:
        >>> params = nnx.State({"norm": nnx.Param(jax.numpy.ones(2), axes=("norm",))})
        >>> tx = make_optimizer(OptimizerConfig(), 10, params, 5)
        >>> int(tx.init(params).notfinite_count)
        0
    """
    decayed = jax.tree.map(
        lambda p: not {"norm", "head_dim"} & set(p.get_metadata("axes")),
        params,
        is_leaf=lambda leaf: isinstance(leaf, nnx.Variable),
    )
    adamw = optax.adamw(
        make_schedule(config, steps),
        b1=config.b1,
        b2=config.b2,
        eps=config.eps,
        weight_decay=config.weight_decay,
        mask=decayed,
    )
    clip = [optax.clip_by_global_norm(config.clip_norm)] if config.clip_norm else []
    # One more than allowed: the loop stops the run before optax would let such a step through.
    return optax.apply_if_finite(optax.chain(*clip, adamw), max_nonfinite_steps + 1)
