"""Losses over a vocabulary that is sharded over devices, without ever gathering it.

Softmax and cross-entropy need three small sums. ULD by level sets needs one sum of counts by bucket
(`level_set_distance`); exact ULD exchanges shards of the vocabulary for shards of the positions by
an all-to-all (`on_whole_rows`), so that each device sorts whole rows of its share of them. A
vocabulary that the devices do not divide is padded with entries of probability 0.
"""

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import AbstractMesh, Mesh, PartitionSpec
from jax.typing import ArrayLike

from uld_jax.losses.fused import FusedLoss, fused_teachers_cross_entropy
from uld_jax.losses.probabilities import scaled
from uld_jax.losses.teachers import HeadTeacher, Teacher, TokenTeacher
from uld_jax.losses.uld import distance, resolve_method

__all__ = ["sharded_uld", "sharded_uld_cross_entropy", "vocab_parallel_uld"]


def vocab_parallel_uld(
    student_logits: ArrayLike,
    teacher_logits: ArrayLike,
    axis_name: str,
    *,
    student_temperature: ArrayLike = 1.0,
    teacher_temperature: ArrayLike = 1.0,
    method: str = "auto",
) -> jax.Array:
    """`uld` inside `jax.shard_map`, from this device's shards of both vocabularies.

    Args:
        student_logits: [*b, V / n]; padding is −inf.
        teacher_logits: [*b, U / n]; padding is −inf. No gradient flows to them.
        axis_name: the mapped axis, of size n, that both vocabularies are sharded over.
        student_temperature: scalar divisor of the student's logits.
        teacher_temperature: scalar divisor of the teacher's logits.
        method: see `uld`; "sort" exchanges shards of the vocabulary for shards of the positions.

    Returns:
        f32[*b], the same on every shard.

    Raises:
        ValueError: for an unknown method.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from uld_jax.losses import vocab_parallel_uld
        >>> student, teacher = jnp.log(jnp.array([0.2, 0.7, 0.1])), jnp.log(jnp.array([0.5, 0.5]))
        >>> shards = jnp.append(student, -jnp.inf).reshape(2, 2), teacher.reshape(2, 1)
        >>> distance = jax.vmap(lambda s, t: vocab_parallel_uld(s, t, "shard"), axis_name="shard")
        >>> [round(float(d), 4) for d in distance(*shards)]
        [0.6, 0.6]
    """
    student_V = scaled(student_logits, student_temperature)
    teacher_U = scaled(teacher_logits, teacher_temperature)
    shards = lax.axis_size(axis_name)
    method = resolve_method(method, shards * student_V.shape[-1], shards * teacher_U.shape[-1])
    return distance(student_V, teacher_U, method, axis_name)


def sharded_uld(
    student_logits: jax.Array,
    teacher_logits: jax.Array,
    *,
    mesh: Mesh | AbstractMesh,
    vocab_axis: str = "tensor",
    batch_axes: str | Sequence[str] | None = None,
    student_temperature: ArrayLike = 1.0,
    teacher_temperature: ArrayLike = 1.0,
    method: str = "auto",
) -> jax.Array:
    """`uld` of global arrays whose vocabularies lie on a mesh axis.

    Args:
        student_logits: [*b, V].
        teacher_logits: [*b, U]. No gradient flows to them.
        mesh: the device mesh.
        vocab_axis: its axis that the vocabularies are sharded over; it need not divide them.
        batch_axes: its axes that the first axis of *b is sharded over, if any.
        student_temperature: scalar divisor of the student's logits.
        teacher_temperature: scalar divisor of the teacher's logits.
        method: see `vocab_parallel_uld`.

    Returns:
        f32[*b].

    Raises:
        ValueError: for an unknown method.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from uld_jax.losses import sharded_uld
        >>> mesh = jax.make_mesh((1,), ("tensor",), axis_types=(jax.sharding.AxisType.Auto,))
        >>> student, teacher = jnp.log(jnp.array([0.2, 0.7, 0.1])), jnp.log(jnp.array([0.5, 0.5]))
        >>> round(float(sharded_uld(student, teacher, mesh=mesh)), 4)
        0.6
    """
    leading = [batch_axes, *[None] * (student_logits.ndim - 2)] if student_logits.ndim > 1 else []
    spec = PartitionSpec(*leading, vocab_axis)
    local = partial(
        vocab_parallel_uld,
        axis_name=vocab_axis,
        student_temperature=student_temperature,
        teacher_temperature=teacher_temperature,
        method=method,
    )

    shards = mesh.shape[vocab_axis]
    return jax.shard_map(
        local, mesh=mesh, in_specs=(spec, spec), out_specs=PartitionSpec(*leading)
    )(*(_pad(logits, -1, shards, -jnp.inf) for logits in (student_logits, teacher_logits)))


def sharded_uld_cross_entropy(
    student_hidden: jax.Array,
    student_head: jax.Array,
    teachers: Sequence[Teacher],
    targets: jax.Array,
    *,
    ce_weights: jax.Array,
    mesh: Mesh | AbstractMesh,
    vocab_axis: str | None = "tensor",
    batch_axes: str | Sequence[str] | None = None,
    embed_axis: str | None = None,
    **options: Any,
) -> FusedLoss:
    """`fused_teachers_cross_entropy` of global arrays, by device its own rows and vocabulary.

    Every device goes through its own positions in chunks; one sum over `batch_axes` at the end
    (not one a chunk) makes the head's gradient, of which a device gets no more than the columns
    that it has of the head.

    Args:
        student_hidden: [B, *b, N, D], the first axis over `batch_axes`.
        student_head: [V, D], rows over `vocab_axis`, which need not divide them.
        teachers: hidden states, probabilities and weights [B, *b, N, ...] over `batch_axes`; heads
            [U, E] over `vocab_axis`.
        targets: i32[B, *b, N].
        ce_weights: f32[B, *b, N].
        mesh: the device mesh.
        vocab_axis: the mesh axis of the vocabularies; None where each device has them whole.
        batch_axes: the mesh axes of the batch, if any.
        embed_axis: the one of them that the columns of the student's head lie on, if any; it must
            divide D.
        **options: of `fused_teachers_cross_entropy`, such as chunk_size and method.

    Returns:
        The total and its parts, summed over the mesh.

    Raises:
        ValueError: as `fused_teachers_cross_entropy`.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from uld_jax.losses import HeadTeacher, sharded_uld_cross_entropy
        >>> mesh = jax.make_mesh((1,), ("tensor",), axis_types=(jax.sharding.AxisType.Auto,))
        >>> hidden, ones = jnp.zeros((1, 3, 2)), jnp.ones((1, 3))
        >>> loss = sharded_uld_cross_entropy(
        ...     hidden, jnp.zeros((4, 2)), [HeadTeacher(hidden, jnp.zeros((8, 2)), 1.5 * ones / 3)],
        ...     jnp.array([[0, 1, 2]]), ce_weights=ones / 3, mesh=mesh)
        >>> round(float(loss.total), 4)
        2.8863
    """
    shards = 1 if vocab_axis is None else mesh.shape[vocab_axis]
    axis_name = vocab_axis if shards > 1 else None
    if student_head.shape[0] % shards and options.get("student_vocab") is None:
        options["student_vocab"] = student_head.shape[0]
    batch, vocab = PartitionSpec(batch_axes), PartitionSpec(axis_name)
    axes = (batch_axes,) if isinstance(batch_axes, str) else tuple(batch_axes or ())
    others = tuple(axis for axis in axes if axis != embed_axis)

    def by_shard(arrays: dict[str, Any]) -> FusedLoss:
        if embed_axis:
            # Backwards a sum of which each device gets a part, then one of parts over the others.
            head = lax.pcast(arrays["student_head"], others, to="varying")
            head = lax.all_gather(head, embed_axis, axis=1, tiled=True)
            arrays = {**arrays, "student_head": head}
        loss = fused_teachers_cross_entropy(**arrays, **options, axis_name=axis_name)
        return lax.psum(loss, batch_axes) if batch_axes else loss

    divided = [_divide(teacher, shards, batch, vocab) for teacher in teachers]
    arrays = {
        "student_hidden": student_hidden,
        "student_head": _pad(student_head, 0, shards, 0),
        "teachers": [teacher for teacher, _ in divided],
        "targets": targets,
        "ce_weights": ce_weights,
    }
    specs = {
        "student_hidden": batch,
        "student_head": PartitionSpec(axis_name, embed_axis),
        "teachers": [spec for _, spec in divided],
        "targets": batch,
        "ce_weights": batch,
    }
    return jax.shard_map(by_shard, mesh=mesh, in_specs=(specs,), out_specs=PartitionSpec())(arrays)


def _divide(
    teacher: Teacher, shards: int, batch: PartitionSpec, vocab: PartitionSpec
) -> tuple[Teacher, Teacher]:
    """The teacher with a head that so many shards divide, and where each of its arrays lies."""
    if isinstance(teacher, HeadTeacher):
        rows = teacher.head.shape[0]
        teacher = replace(
            teacher,
            head=_pad(teacher.head, 0, shards, 0),
            temperature=jnp.asarray(teacher.temperature),
            vocab=rows if rows % shards and teacher.vocab is None else teacher.vocab,
        )
        spec = jax.tree.map(lambda _: batch, teacher)
        whole = jax.tree.map(lambda _: PartitionSpec(), teacher.comparison)
        return teacher, replace(spec, head=vocab, temperature=PartitionSpec(), comparison=whole)
    spec = jax.tree.map(lambda _: batch, teacher)
    if isinstance(teacher, TokenTeacher):
        whole = jax.tree.map(lambda _: PartitionSpec(), teacher.comparison)
        spec = replace(spec, comparison=whole)
    return teacher, spec


def _pad(x: jax.Array, axis: int, multiple: int, value: float) -> jax.Array:
    widths = [(0, 0)] * x.ndim
    widths[axis] = (0, -x.shape[axis] % multiple)
    return jnp.pad(x, widths, constant_values=value)
