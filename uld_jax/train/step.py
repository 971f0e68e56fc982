"""The train step: one pure function of the state, the teachers and a batch."""

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from uld_jax.config import LossConfig
from uld_jax.losses import (
    Comparison,
    Divergence,
    FusedLoss,
    HeadTeacher,
    SortedTeacher,
    TokenTeacher,
    fused_teachers_cross_entropy,
    sharded_uld_cross_entropy,
)
from uld_jax.models import Decoder
from uld_jax.sharding import EMBED_AXIS, RULES
from uld_jax.train.comparison import ids_of_student
from uld_jax.train.features import Seen, feature_losses, read_positions
from uld_jax.train.positions import spread_positions
from uld_jax.train.state import TrainState, split_projections
from uld_jax.types import Batch, SortedSignal, TeacherSignal, TeacherTokens, TokenSignal

Metrics = dict[str, jax.Array]


@dataclass(frozen=True)
class StepTeacher:
    """What is fixed of a teacher.

    Attributes:
        graph: Its graph, or None where batches carry its signal.
        share: Of `loss.uld_weight`.
        comparison: What its logits and the student's are compared by; None for ULD.

    Example:
        >>> StepTeacher(None).share
        1.0
    """

    graph: nnx.GraphDef[Decoder] | None
    share: float = 1.0
    comparison: Comparison | None = None


def train_step(
    state: TrainState,
    teacher_params: Sequence[nnx.State | None],
    batch: Batch,
    frozen: tuple[nnx.State, ...] = (),
    *,
    student: nnx.GraphDef[Decoder],
    teachers: Sequence[StepTeacher],
    tx: optax.GradientTransformation,
    loss: LossConfig,
) -> tuple[TrainState, Metrics]:
    """One optimizer step on M micro-batches.

    Args:
        state: The student, its optimizer, its key; donate it.
        teacher_params: Each frozen teacher, or None.
        batch: The data.
        frozen: The student's parameters beside its adapters, where only these are trained.
        student: The student's graph.
        teachers: As many as there are parameters.
        tx: The optimizer.
        loss: Weights, temperatures and method.

    Returns:
        The next state, and scalars: those of `gradients`, grad_norm, update_norm, skipped_steps
        and nonfinite_in_a_row.
    """
    grads, metrics = gradients(
        state.params, teacher_params, batch, frozen, student=student, teachers=teachers, loss=loss
    )
    following, updates = apply_gradients(state, grads, tx)
    return following, metrics | {
        "grad_norm": optax.tree.norm(grads),
        "update_norm": optax.tree.norm(updates),
        "skipped_steps": following.opt_state.total_notfinite,
        "nonfinite_in_a_row": following.opt_state.notfinite_count,
    }


def gradients(
    params: nnx.State,
    teacher_params: Sequence[nnx.State | None],
    batch: Batch,
    frozen: tuple[nnx.State, ...] = (),
    *,
    student: nnx.GraphDef[Decoder],
    teachers: Sequence[StepTeacher],
    loss: LossConfig,
) -> tuple[nnx.State, Metrics]:
    """The gradients of L = ce_weight · CE + Σ_k share_k · uld_weight · ULD_k over a batch.

    Where they have a weight, each teacher's distances of hidden states and of attention maps are
    added like its ULD.

    The normalisers are sums over the whole batch, taken before the first micro-batch, so that the
    gradients of micro-batches, shards and hosts simply add up.

    Args:
        params: The student's.
        teacher_params: See `train_step`, as are the arguments below.
        batch: The data.
        frozen: The student's other parameters.
        student: The student's graph.
        teachers: What is fixed of each teacher.
        loss: Weights, temperatures and method.

    Returns:
        A gradient for each parameter, and scalars: total, cross_entropy, uld (the mean by share
        over teachers, called as `loss.distance` is), hidden and attention likewise where they have
        a weight, ce_positions, uld_positions, student_tokens and teacher_tokens (that are read,
        without padding); of several teachers uld_0, uld_1, …; where there are signals uld_error,
        the most by which uld can differ from that of the whole distributions, and signal_bytes, of
        an aligned position as it lies on the devices, padding included.
    """
    ce_count = batch.ce_weight.sum()
    counts = [jnp.maximum(t.uld_weight.sum(), 1e-9) for t in batch.teachers]
    ce_scale = loss.ce_weight / jnp.maximum(ce_count, 1e-9)
    scales = [t.share * loss.uld_weight / count for t, count in zip(teachers, counts, strict=True)]
    shares = [t.share / count for t, count in zip(teachers, counts, strict=True)]
    micro_loss = functools.partial(
        _micro_loss,
        student=student,
        teachers=teachers,
        scales=(ce_scale, scales, shares),
        config=loss,
    )
    grad = jax.grad(micro_loss, has_aux=True)
    fixed = (frozen, teacher_params)

    def accumulate(total: Any, micro: Batch) -> tuple[Any, None]:
        return jax.tree.map(jnp.add, total, grad(params, *fixed, micro)), None

    micro = jax.tree.map(lambda x: x[0], batch)
    total = grad(params, *fixed, micro)
    if batch.micro_batches > 1:
        rest = jax.tree.map(lambda x: x[1:], batch)
        total, _ = jax.lax.scan(accumulate, total, rest)
    grads, (ce_sum, uld_sums, of_features) = total
    distances = uld_sums / (loss.uld_weight or 1.0)
    metrics = {
        "total": sum(of_features.values(), start=ce_sum + uld_sums.sum()),
        "cross_entropy": ce_sum / (loss.ce_weight or 1.0),
        loss.distance: distances.sum(),
        "ce_positions": ce_count,
        "uld_positions": jnp.stack([(t.uld_weight > 0).sum() for t in batch.teachers]).sum(),
        "student_tokens": _tokens(batch.student_inputs),
        "teacher_tokens": sum(
            (_tokens(t.inputs) for t in batch.teachers if isinstance(t, TeacherTokens)),
            start=jnp.zeros((), jnp.int32),
        ),
    }
    for name, value in of_features.items():
        metrics[name] = value / getattr(loss, f"{name}_weight")
    return grads, metrics | _of_teachers(batch, teachers, counts, distances, loss.distance)


def _tokens(inputs: Mapping[str, jax.Array]) -> jax.Array:
    """How many are not padding, in encoder and decoder."""
    names = ("segment_ids", "encoder_segment_ids")
    return jnp.stack([(inputs[name] > 0).sum() for name in names if name in inputs]).sum()


def _of_teachers(
    batch: Batch,
    teachers: Sequence[StepTeacher],
    counts: Sequence[jax.Array],
    distances: jax.Array,
    name: str,
) -> Metrics:
    """What there is to say of single teachers, and of signals instead of teachers."""
    metrics = {}
    if len(teachers) > 1:
        for number, teacher in enumerate(teachers):
            metrics[f"{name}_{number}"] = distances[number] / teacher.share
    signals = [
        (teacher.share, given, count)
        for teacher, given, count in zip(teachers, batch.teachers, counts, strict=True)
        if isinstance(given, TeacherSignal)
    ]
    if signals:
        errors = [
            share * (given.signal.error * given.uld_weight).sum() / count
            for share, given, count in signals
            if isinstance(given.signal, SortedSignal)
        ]
        size = sum(x.nbytes for _, given, _ in signals for x in jax.tree.leaves(given.signal))
        positions = jnp.stack([(given.uld_weight > 0).sum() for _, given, _ in signals]).sum()
        if errors:
            metrics["uld_error"] = jnp.stack(errors).sum()
        metrics["signal_bytes"] = size / jnp.maximum(positions, 1)
    return metrics


def apply_gradients(
    state: TrainState, grads: nnx.State, tx: optax.GradientTransformation
) -> tuple[TrainState, nnx.State]:
    """The state after the optimizer has taken a step.

    Args:
        state: The student, its optimizer, its key.
        grads: A gradient for each parameter.
        tx: The optimizer.

    Returns:
        The next state, and what was added to the parameters.
    """
    updates: Any
    updates, opt_state = tx.update(grads, state.opt_state, state.params)
    params: Any = optax.apply_updates(state.params, updates)
    return TrainState(state.step + 1, params, opt_state, state.key), updates


def _micro_loss(
    params: nnx.State,
    frozen: tuple[nnx.State, ...],
    teacher_params: Sequence[nnx.State | None],
    b: Batch,
    *,
    student: nnx.GraphDef[Decoder],
    teachers: Sequence[StepTeacher],
    scales: tuple[jax.Array, Sequence[jax.Array], Sequence[jax.Array]],
    config: LossConfig,
) -> tuple[jax.Array, tuple[jax.Array, jax.Array, Metrics]]:
    """One micro-batch's share of the loss, already divided by the whole batch's normalisers."""
    own, projections = split_projections(params)
    s = nnx.merge(student, own, *frozen)
    student_GND, seen = read_positions(s, b.student_inputs, b.student_index, config)
    mesh = jax.sharding.get_abstract_mesh()
    fused = fused_teachers_cross_entropy
    # (The solver of transport cannot be mapped over devices.)
    if not mesh.empty and mesh.size > 1:
        fused = functools.partial(
            sharded_uld_cross_entropy, mesh=mesh, batch_axes=RULES["rows"], embed_axis=EMBED_AXIS
        )
    compared = [
        _compared(teacher, params, given, scale, config)
        for teacher, params, given, scale in zip(
            teachers, teacher_params, b.teachers, scales[1], strict=True
        )
        if config.asks_teachers
    ]
    out: FusedLoss = fused(
        spread_positions(student_GND),
        s.head_VD,
        [teacher for teacher, _ in compared],
        spread_positions(b.targets),
        ce_weights=spread_positions(b.ce_weight * scales[0]),
        student_temperature=config.student_temperature,
        student_softcap=s.config.logit_softcap or None,
        label_smoothing=config.label_smoothing,
        z_loss=config.z_loss,
        method=config.method,
        chunk_size=config.chunk_size,
        compute_dtype=student_GND.dtype,
    )
    distances = out.distances if compared else jnp.zeros(len(teachers))
    weights = [t.uld_weight * scale for t, scale in zip(b.teachers, scales[2], strict=True)]
    of_teachers = [seen for _, seen in compared]
    of_features = feature_losses(seen, of_teachers, projections, weights, config)
    total = sum(of_features.values(), start=out.total)
    return total, (out.cross_entropy, distances, of_features)


def _compared(
    teacher: StepTeacher,
    params: nnx.State | None,
    given: TeacherTokens | TeacherSignal,
    scale: jax.Array,
    config: LossConfig,
) -> tuple[HeadTeacher | SortedTeacher | TokenTeacher, Seen | None]:
    """What the student is compared with: the teacher's hidden states, or the batch's signal."""
    weights = spread_positions(given.uld_weight * scale)
    if isinstance(given, TeacherSignal):
        return _known_by(given.signal, weights, teacher.comparison), None
    if teacher.graph is None or params is None:
        raise ValueError(
            "teachers: expected a model for a teacher that is to read tokens, got None"
        )
    t = nnx.merge(teacher.graph, params)
    hidden_GND, seen = read_positions(t, given.inputs, given.index, config)
    of_head = HeadTeacher(
        spread_positions(hidden_GND),
        t.head_VD,
        weights,
        temperature=config.teacher_temperature,
        softcap=t.config.logit_softcap or None,
        comparison=teacher.comparison,
    )
    return of_head, seen


def _known_by(
    signal: SortedSignal | TokenSignal, weights: jax.Array, comparison: Comparison | None
) -> SortedTeacher | TokenTeacher:
    if isinstance(signal, SortedSignal):
        probs, tail_mass = map(spread_positions, (signal.probs, signal.tail_mass))
        return SortedTeacher(probs, weights, tail_mass)
    if not isinstance(comparison, Divergence):
        raise ValueError(f"teachers: expected a Divergence for known tokens, got {comparison}")
    ids = spread_positions(ids_of_student(comparison, signal.ids))
    return TokenTeacher(ids, spread_positions(signal.log_probs), weights, comparison)
