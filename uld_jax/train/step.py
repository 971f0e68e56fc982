"""The train step: one pure function of the state, the teacher and a batch."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from uld_jax.config import LossConfig
from uld_jax.losses import fused_uld_cross_entropy, sharded_uld_cross_entropy
from uld_jax.models import Decoder
from uld_jax.sharding import BATCH_AXES, constrain
from uld_jax.train.state import TrainState
from uld_jax.types import Batch

Metrics = dict[str, jax.Array]


def train_step(
    state: TrainState,
    teacher_params: nnx.State,
    batch: Batch,
    frozen: tuple[nnx.State, ...] = (),
    *,
    student: nnx.GraphDef[Decoder],
    teacher: nnx.GraphDef[Decoder],
    tx: optax.GradientTransformation,
    loss: LossConfig,
) -> tuple[TrainState, Metrics]:
    """One optimizer step on M micro-batches: L = ce_weight · CE + uld_weight · ULD.

    The normalisers are sums over the whole batch, taken before the first micro-batch, so that the
    gradients of micro-batches, shards and hosts simply add up.

    Args:
        state: The student, its optimizer, its key; donate it.
        teacher_params: The frozen teacher.
        batch: The data.
        frozen: The student's parameters beside its adapters, where only these are trained.
        student: The student's graph.
        teacher: The teacher's graph.
        tx: The optimizer.
        loss: Weights, temperatures and method.

    Returns:
        The next state, and scalars: total, cross_entropy, uld, grad_norm, ce_positions,
        uld_positions, skipped_steps, nonfinite_in_a_row.
    """
    ce_count, uld_count = batch.ce_weight.sum(), batch.uld_weight.sum()
    ce_scale = loss.ce_weight / jnp.maximum(ce_count, 1e-9)
    uld_scale = loss.uld_weight / jnp.maximum(uld_count, 1e-9)
    micro_loss = functools.partial(
        _micro_loss, student=student, teacher=teacher, scales=(ce_scale, uld_scale), config=loss
    )
    grad = jax.grad(micro_loss, has_aux=True)
    fixed = (frozen, teacher_params)

    def accumulate(total: Any, micro: Batch) -> tuple[Any, None]:
        return jax.tree.map(jnp.add, total, grad(state.params, *fixed, micro)), None

    micro = jax.tree.map(lambda x: x[0], batch)
    total = grad(state.params, *fixed, micro)
    if batch.micro_batches > 1:
        rest = jax.tree.map(lambda x: x[1:], batch)
        total, _ = jax.lax.scan(accumulate, total, rest)
    grads, (ce_sum, uld_sum) = total
    following = apply_gradients(state, grads, tx)
    metrics = {
        "total": ce_sum + uld_sum,
        "cross_entropy": ce_sum / (loss.ce_weight or 1.0),
        "uld": uld_sum / (loss.uld_weight or 1.0),
        "grad_norm": optax.tree.norm(grads),
        "ce_positions": ce_count,
        "uld_positions": (batch.uld_weight > 0).sum(),
        "skipped_steps": following.opt_state.total_notfinite,
        "nonfinite_in_a_row": following.opt_state.notfinite_count,
    }
    return following, metrics


def apply_gradients(
    state: TrainState, grads: nnx.State, tx: optax.GradientTransformation
) -> TrainState:
    """The state after the optimizer has taken a step.

    Args:
        state: The student, its optimizer, its key.
        grads: A gradient for each parameter.
        tx: The optimizer.

    Returns:
        The next state.
    """
    updates: Any
    updates, opt_state = tx.update(grads, state.opt_state, state.params)
    params: Any = optax.apply_updates(state.params, updates)
    return TrainState(state.step + 1, params, opt_state, state.key)


def _micro_loss(
    params: nnx.State,
    frozen: tuple[nnx.State, ...],
    teacher_params: nnx.State,
    b: Batch,
    *,
    student: nnx.GraphDef[Decoder],
    teacher: nnx.GraphDef[Decoder],
    scales: tuple[jax.Array, jax.Array],
    config: LossConfig,
) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    """One micro-batch's share of the loss, already divided by the whole batch's normalisers."""
    s, t = nnx.merge(student, params, *frozen), nnx.merge(teacher, teacher_params)
    student_BTD = s.hidden(**b.student_inputs)
    teacher_BSE = t.hidden(**b.teacher_inputs)
    mesh = jax.sharding.get_abstract_mesh()
    fused = fused_uld_cross_entropy
    if not mesh.empty:
        fused = functools.partial(sharded_uld_cross_entropy, mesh=mesh, batch_axes=BATCH_AXES)
    out = fused(
        take_positions(student_BTD, b.student_index),
        s.head_VD,
        take_positions(teacher_BSE, b.teacher_index),
        t.head_VD,
        b.targets,
        ce_weights=b.ce_weight * scales[0],
        uld_weights=b.uld_weight * scales[1],
        student_temperature=config.student_temperature,
        teacher_temperature=config.teacher_temperature,
        student_softcap=s.config.logit_softcap or None,
        teacher_softcap=t.config.logit_softcap or None,
        label_smoothing=config.label_smoothing,
        z_loss=config.z_loss,
        method=config.method,
        chunk_size=config.chunk_size,
        compute_dtype=student_BTD.dtype,
    )
    return out.total, (out.cross_entropy, out.distance)


def take_positions(hidden_BTD: jax.Array, index_GN: jax.Array) -> jax.Array:
    """Gathers the answer positions of each group's rows: only they meet the vocabulary.

    Args:
        hidden_BTD: Hidden states; rows B in G groups of R.
        index_GN: Index into each group's R · T positions.

    Returns:
        [G, N, D].

    Example:
        >>> hidden_BTD = jnp.arange(8.0).reshape(2, 4, 1)
        >>> take_positions(hidden_BTD, jnp.array([[1, 4]]))[..., 0].tolist()
        [[1.0, 4.0]]
    """
    grouped = hidden_BTD.reshape(index_GN.shape[0], -1, hidden_BTD.shape[-1])
    taken = jnp.take_along_axis(grouped, index_GN[..., None], axis=1)
    return constrain(taken, "batch", None, None)
