"""Cross-entropy and distances to teachers from hidden states, a chunk of positions at a time.

What `chunked_head_loss` sums is defined here: CE + λ·ULD, or CE + λ·(a divergence of logits). What
a teacher is given by, its hidden states and head or its sorted probabilities, is in `teachers`.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import ArrayLike, DTypeLike

from uld_jax.losses.chunked import Chunks, chunked_head_loss
from uld_jax.losses.comparisons import Divergence
from uld_jax.losses.cross_entropy import cross_entropy
from uld_jax.losses.divergences import check_divergence
from uld_jax.losses.teachers import (
    Head,
    HeadTeacher,
    SortedTeacher,
    Teacher,
    check_shape,
    product_dtype,
)
from uld_jax.losses.uld import check_method

__all__ = [
    "FusedLoss",
    "fused_divergence_cross_entropy",
    "fused_teachers_cross_entropy",
    "fused_uld_cross_entropy",
]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class FusedLoss:
    """Weighted sums over all positions.

    Attributes:
        total: f32[], cross_entropy + distance; the only differentiable field.
        cross_entropy: f32[], Σ ce_weights · CE, for the log: no gradient.
        distances: f32[k], Σ weights · ULD, or the divergence, to each of k teachers; no gradient.
    """

    total: jax.Array
    cross_entropy: jax.Array
    distances: jax.Array

    @property
    def distance(self) -> jax.Array:
        """f32[], the sum over teachers."""
        return self.distances.sum(-1)


def fused_uld_cross_entropy(
    student_hidden: jax.Array,
    student_head: jax.Array,
    teacher_hidden: jax.Array | None,
    teacher_head: jax.Array | None,
    targets: jax.Array,
    *,
    ce_weights: jax.Array,
    uld_weights: jax.Array,
    teacher_probs_sorted: jax.Array | None = None,
    teacher_tail_mass: jax.Array | None = None,
    student_temperature: ArrayLike = 1.0,
    teacher_temperature: ArrayLike = 1.0,
    student_softcap: float | None = None,
    teacher_softcap: float | None = None,
    label_smoothing: ArrayLike = 0.0,
    z_loss: ArrayLike = 0.0,
    method: str = "auto",
    chunk_size: int = 32,
    compute_dtype: DTypeLike | None = None,
    student_vocab: int | None = None,
    teacher_vocab: int | None = None,
    axis_name: str | None = None,
) -> FusedLoss:
    """Weighted sums of CE and ULD, with neither [*b, N, V] nor [*b, N, U] ever in memory.

    logits = cap(hidden · headᵀ), cap(x) = softcap · tanh(x / softcap);
    total = Σ_n ce_weights_n · CE(student_n, targets_n) + uld_weights_n · d(student_n, teacher_n).

    The weights carry λ and the normalisers. The teacher is either its hidden states and head, or
    its sorted probabilities (`teacher_hidden` and `teacher_head` None). Only `total` is
    differentiable, and only with respect to `student_hidden` and `student_head`; with tied
    embeddings autodiff adds the latter to the embedding's. Extra memory: O(|b| · chunk_size ·
    (V + U)) and, where differentiated, the head's gradient in f32; it does not grow with N. The
    axes *b stay whole inside a chunk, so a batch axis sharded over devices stays sharded.

    Args:
        student_hidden: [*b, N, D], the student's last hidden states.
        student_head: [V, D], the student's output embedding.
        teacher_hidden: [*b, N, E], aligned with the student's, position by position, or None.
        teacher_head: [U, E], or None.
        targets: i32[*b, N], token ids in [0, V); any value where `ce_weights` is 0.
        ce_weights: f32[*b, N]; 0 leaves a position out.
        uld_weights: f32[*b, N]; 0 leaves a position out.
        teacher_probs_sorted: [*b, N, K], the teacher's (largest) probabilities, descending.
        teacher_tail_mass: [*b, N], the sum of its other probabilities: the distance is then the
            value of `truncated_uld`. None where there are no others.
        student_temperature: divisor of the student's logits in the distance (not in the CE).
        teacher_temperature: divisor of the teacher's logits.
        student_softcap: bound of the student's logits; None for no bound.
        teacher_softcap: bound of the teacher's logits; None for no bound.
        label_smoothing: of the CE, see `cross_entropy`.
        z_loss: of the CE, see `cross_entropy`.
        method: how to compute the distance, see `uld`.
        chunk_size: positions of the N axis that are computed at a time.
        compute_dtype: type of the factors of the matrix products, which accumulate in f32 or wider;
            None takes what hidden states and head promote to.
        student_vocab: rows of the whole student head that are tokens; the rest is padding. None
            for all of them.
        teacher_vocab: likewise for the teacher.
        axis_name: the axis of an enclosing `jax.shard_map` (check_vma=True) over which the rows of
            both heads are sharded; see `sharded_uld_cross_entropy`.

    Returns:
        The total and its two parts.

    Raises:
        ValueError: for an unknown method, shapes that do not match, a chunk_size below 1, or a
            teacher that is neither or both.

    Example:
        >>> import jax.numpy as jnp
        >>> from uld_jax.losses import fused_uld_cross_entropy
        >>> hidden, ones = jnp.zeros((3, 2)), jnp.ones(3)
        >>> loss = fused_uld_cross_entropy(
        ...     hidden, jnp.zeros((4, 2)), hidden, jnp.zeros((8, 2)), jnp.array([0, 1, 2]),
        ...     ce_weights=ones / 3, uld_weights=1.5 * ones / 3)
        >>> round(float(loss.cross_entropy), 4), float(loss.distance), round(float(loss.total), 4)
        (1.3863, 1.5, 2.8863)
    """
    if teacher_hidden is not None and teacher_head is not None and teacher_probs_sorted is None:
        if teacher_tail_mass is not None:
            raise ValueError("teacher_tail_mass: expected None without teacher_probs_sorted")
        teacher = HeadTeacher(
            teacher_hidden,
            teacher_head,
            uld_weights,
            teacher_temperature,
            teacher_softcap,
            teacher_vocab,
        )
    elif teacher_probs_sorted is not None and teacher_hidden is None and teacher_head is None:
        teacher = SortedTeacher(teacher_probs_sorted, uld_weights, teacher_tail_mass)
    else:
        raise ValueError(
            "teacher: expected teacher_hidden and teacher_head, or else teacher_probs_sorted"
        )
    return fused_teachers_cross_entropy(
        student_hidden,
        student_head,
        [teacher],
        targets,
        ce_weights=ce_weights,
        student_temperature=student_temperature,
        student_softcap=student_softcap,
        label_smoothing=label_smoothing,
        z_loss=z_loss,
        method=method,
        chunk_size=chunk_size,
        compute_dtype=compute_dtype,
        student_vocab=student_vocab,
        axis_name=axis_name,
    )


def fused_teachers_cross_entropy(
    student_hidden: jax.Array,
    student_head: jax.Array,
    teachers: Sequence[Teacher],
    targets: jax.Array,
    *,
    ce_weights: jax.Array,
    student_temperature: ArrayLike = 1.0,
    student_softcap: float | None = None,
    label_smoothing: ArrayLike = 0.0,
    z_loss: ArrayLike = 0.0,
    method: str = "auto",
    chunk_size: int = 32,
    compute_dtype: DTypeLike | None = None,
    student_vocab: int | None = None,
    axis_name: str | None = None,
) -> FusedLoss:
    """`fused_uld_cross_entropy` to any number of teachers, with one pass of the student's head.

    total = Σ_n ce_weights_n · CE(student_n, targets_n) + Σ_k Σ_n weights_kn · d(student_n, k_n).

    Args:
        student_hidden: [*b, N, D], the student's last hidden states.
        student_head: [V, D], the student's output embedding.
        teachers: each with its own weights, which carry λ, its share and its normaliser.
        targets: i32[*b, N], token ids in [0, V); any value where `ce_weights` is 0.
        ce_weights: f32[*b, N]; 0 leaves a position out.
        student_temperature: see `fused_uld_cross_entropy`, as are the arguments below.
        student_softcap: of the student's logits.
        label_smoothing: of the CE.
        z_loss: of the CE.
        method: of the distances.
        chunk_size: positions at a time.
        compute_dtype: type of the factors of the matrix products.
        student_vocab: rows of the student's head that are tokens.
        axis_name: of an enclosing `jax.shard_map`, that the rows of all heads are sharded over;
            sorted probabilities are whole on every device.

    Returns:
        The total and its parts.

    Raises:
        ValueError: for an unknown method, shapes that do not match, or a chunk_size below 1.

    Example:
        >>> import jax.numpy as jnp
        >>> from uld_jax.losses import HeadTeacher, SortedTeacher, fused_teachers_cross_entropy
        >>> hidden, head, ones = jnp.zeros((3, 2)), jnp.zeros((4, 2)), jnp.ones(3)
        >>> teachers = [
        ...     HeadTeacher(hidden, jnp.zeros((8, 2)), ones / 3),
        ...     SortedTeacher(jnp.ones((3, 1)), ones / 3),
        ... ]
        >>> loss = fused_teachers_cross_entropy(
        ...     hidden, head, teachers, jnp.array([0, 1, 2]), ce_weights=ones / 3)
        >>> loss.distances.tolist()
        [1.0, 1.5]
    """
    check_method(method)
    for teacher in teachers:
        teacher.check(targets.shape)
    objective = _Objective(
        Head(student_softcap, student_vocab, axis_name),
        tuple(teacher.distance(method, axis_name, compute_dtype) for teacher in teachers),
    )
    of_teachers = tuple(teacher.constants for teacher in teachers)
    return _fused(
        objective,
        (student_hidden, student_head),
        (targets, ce_weights, tuple(teacher.positions for teacher in teachers)),
        (label_smoothing, z_loss, student_temperature, of_teachers),
        chunk_size,
        compute_dtype,
    )


def fused_divergence_cross_entropy(
    student_hidden: jax.Array,
    student_head: jax.Array,
    teacher_hidden: jax.Array,
    teacher_head: jax.Array,
    targets: jax.Array,
    *,
    ce_weights: jax.Array,
    divergence_weights: jax.Array,
    divergence: str = "kl",
    divergence_options: Mapping[str, ArrayLike] | None = None,
    student_temperature: ArrayLike = 1.0,
    teacher_temperature: ArrayLike = 1.0,
    student_softcap: float | None = None,
    teacher_softcap: float | None = None,
    label_smoothing: ArrayLike = 0.0,
    z_loss: ArrayLike = 0.0,
    chunk_size: int = 32,
    compute_dtype: DTypeLike | None = None,
    student_vocab: int | None = None,
    teacher_vocab: int | None = None,
) -> FusedLoss:
    """The same for a teacher with the student's tokenizer: CE and a divergence of the logits.

    total = Σ_n ce_weights_n · CE(student_n, targets_n) + weights_n · divergence_n.

    Args:
        student_hidden: [*b, N, D].
        student_head: [V, D].
        teacher_hidden: [*b, N, E].
        teacher_head: [U, E]; equal ids must be equal tokens.
        targets: i32[*b, N], token ids in [0, V).
        ce_weights: f32[*b, N]; 0 leaves a position out.
        divergence_weights: f32[*b, N]; 0 leaves a position out.
        divergence: a key of `DIVERGENCES`.
        divergence_options: its further arguments, e.g. {"beta": 0.3} of the JSD.
        student_temperature: divisor of the student's logits in the divergence.
        teacher_temperature: divisor of the teacher's logits.
        student_softcap: bound of the student's logits; None for no bound.
        teacher_softcap: bound of the teacher's logits; None for no bound.
        label_smoothing: of the CE, see `cross_entropy`.
        z_loss: of the CE, see `cross_entropy`.
        chunk_size: positions of the N axis that are computed at a time.
        compute_dtype: see `fused_uld_cross_entropy`.
        student_vocab: rows of the student head that are tokens; None for all of them.
        teacher_vocab: likewise for the teacher.

    Returns:
        The total and its two parts.

    Raises:
        ValueError: for an unknown divergence or option, shapes that do not match, or a chunk_size
            below 1.

    Example:
        >>> import jax.numpy as jnp
        >>> from uld_jax.losses import fused_divergence_cross_entropy
        >>> hidden, head, ones = jnp.ones((3, 2)), jnp.eye(4, 2), jnp.ones(3)
        >>> loss = fused_divergence_cross_entropy(
        ...     hidden, head, hidden, 0 * head, jnp.array([0, 1, 2]),
        ...     ce_weights=ones / 3, divergence_weights=ones / 3, divergence="kl")
        >>> round(float(loss.distance), 4)
        0.1201
    """
    check_divergence(divergence, divergence_options)
    check_shape("divergence_weights", divergence_weights, targets.shape)
    teacher = HeadTeacher(
        teacher_hidden,
        teacher_head,
        divergence_weights,
        teacher_temperature,
        teacher_softcap,
        teacher_vocab,
        Divergence(divergence, options=dict(divergence_options or {})),
    )
    return fused_teachers_cross_entropy(
        student_hidden,
        student_head,
        [teacher],
        targets,
        ce_weights=ce_weights,
        student_temperature=student_temperature,
        student_softcap=student_softcap,
        label_smoothing=label_smoothing,
        z_loss=z_loss,
        chunk_size=chunk_size,
        compute_dtype=compute_dtype,
        student_vocab=student_vocab,
    )


@dataclass(frozen=True)
class _Objective:
    """[Σ ce_weights · CE, then Σ weights · distance to each teacher] of a chunk."""

    student: Head
    distances: tuple[Callable[[jax.Array, Any, Any, ArrayLike], jax.Array], ...]

    def __call__(self, logits_CV: jax.Array, positions: tuple, constants: tuple) -> jax.Array:
        targets_C, ce_weights_C, teachers_C = positions
        label_smoothing, z_loss, student_temp, of_teachers = constants
        logits_CV = self.student.finish(logits_CV)
        ce_C = cross_entropy(
            logits_CV,
            targets_C,
            label_smoothing=label_smoothing,
            z_loss=z_loss,
            axis_name=self.student.axis_name,
        )
        losses = [(ce_weights_C, ce_C)]
        for distance, (weights_C, given_C), fixed in zip(
            self.distances, teachers_C, of_teachers, strict=True
        ):
            losses.append((weights_C, distance(logits_CV, given_C, fixed, student_temp)))
        # A position left out may hold anything: 0 · inf would bring it back.
        sums = [jnp.where(weight_C != 0, weight_C * loss_C, 0).sum() for weight_C, loss_C in losses]
        return jnp.stack(sums).astype(logits_CV.dtype)


def _fused(
    objective: _Objective,
    student: tuple[jax.Array, jax.Array],
    positions: tuple,
    constants: tuple,
    chunk_size: int,
    compute_dtype: DTypeLike | None,
) -> FusedLoss:
    hidden, head = student
    targets, ce_weights, teachers = positions
    check_shape("student_hidden", hidden, (*targets.shape, head.shape[-1]))
    check_shape("ce_weights", ce_weights, targets.shape)
    if chunk_size < 1:
        raise ValueError(f"chunk_size: expected at least 1, got {chunk_size}")
    size = max(1, min(chunk_size, targets.shape[-1]))
    chunks = Chunks(objective, size, product_dtype(compute_dtype, hidden, head))
    positions = (jnp.where(ce_weights != 0, targets, 0), ce_weights, teachers)
    total, parts = chunked_head_loss(chunks, hidden, head, positions, constants)
    parts = lax.stop_gradient(parts)
    return FusedLoss(total, parts[0], parts[1:])
