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
    config: OptimizerConfig, steps: int, params: nnx.State
) -> optax.GradientTransformation:
    """AdamW after clipping by the global norm; decoupled weight decay on all but norm scales.

    A step whose gradients have no finite norm changes neither parameters nor moments; the count
    of such steps in a row is in the state (`notfinite_count`).

    Args:
        config: Its numbers.
        steps: Optimizer steps of the whole run.
        params: The student's parameters (their axes say which are norm scales).

    Returns:
        The transformation.

    Example:
        >>> params = nnx.State({"norm": nnx.Param(jax.numpy.ones(2), axes=("norm",))})
        >>> tx = make_optimizer(OptimizerConfig(), 10, params)
        >>> int(tx.init(params).notfinite_count)
        0

    Source: Loshchilov and Hutter, arXiv 1711.05101, algorithm 2.
    """
    decays = jax.tree.map(
        lambda p: p.replace(0.0 if _is_norm(p) else config.weight_decay),
        params,
        is_leaf=lambda leaf: isinstance(leaf, nnx.Variable),
    )
    rate = make_schedule(config, steps)

    def init(params: Any) -> optax.ApplyIfFiniteState:
        none = jnp.zeros((), jnp.int32)
        moments = optax.tree.zeros_like(params), optax.tree.zeros_like(params)
        return optax.ApplyIfFiniteState(
            none, jnp.array(True), none, optax.ScaleByAdamState(none, *moments)
        )

    # optax's own chain reads the gradients three times more, and its branch for finite ones keeps
    # XLA from fusing: a train step of a small model takes 4-5% longer on CPUs.
    def update(
        updates: Any, state: Any, params: Any = None
    ) -> tuple[Any, optax.ApplyIfFiniteState]:
        norm = optax.tree.norm(updates)
        finite = jnp.isfinite(norm)
        scale = jnp.minimum(1, config.clip_norm / norm) if config.clip_norm else jnp.ones_like(norm)
        adam = state.inner_state
        clipped = jax.tree.map(lambda g: g * scale, updates)

        def moment(moments: Any, decay: float, order: int) -> Any:
            following = optax.tree.update_moment(clipped, moments, decay, order)
            # In the dtype that they are kept in.
            return jax.tree.map(
                lambda new, old: jnp.where(finite, new.astype(old.dtype), old), following, moments
            )

        mu, nu = moment(adam.mu, config.b1, 1), moment(adam.nu, config.b2, 2)
        # Without it XLA computes them once more below, from copies of the moments before.
        mu, nu = jax.lax.optimization_barrier((mu, nu))
        learning_rate = jnp.where(finite, rate(adam.count), 0)
        number = adam.count + 1
        mu_scale, nu_scale = 1 / (1 - config.b1**number), 1 / (1 - config.b2**number)

        def step(mu: jax.Array, nu: jax.Array, param: jax.Array, decay: float) -> jax.Array:
            direction = mu * mu_scale / (jnp.sqrt(nu * nu_scale) + config.eps)
            return -learning_rate * (direction + decay * param)

        return jax.tree.map(step, mu, nu, params, decays), optax.ApplyIfFiniteState(
            notfinite_count=jnp.where(finite, 0, state.notfinite_count + 1),
            last_finite=finite,
            total_notfinite=state.total_notfinite + ~finite,
            inner_state=optax.ScaleByAdamState(adam.count + finite, mu, nu),
        )

    return optax.GradientTransformation(init, update)


def _is_norm(param: nnx.Variable) -> bool:
    return bool({"norm", "head_dim"} & set(param.get_metadata("axes")))
