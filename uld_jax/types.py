"""Axis legend and the small array containers that every layer shares.

Array names end in their axes: ``logits_BTV`` is [batch, student positions, student vocabulary].

====== =============================== ====== ===============================
letter axis                            letter axis
====== =============================== ====== ===============================
B      batch                           H      query heads
T      student positions               K      key and value heads
S      teacher positions               C      chunk of positions
V      student vocabulary              A      answer positions
U      teacher vocabulary              N      flattened answer positions
D      student width                   L      layers
E      teacher width
====== =============================== ====== ===============================

In signatures ``*b`` stands for any leading axes, none included.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp

__all__ = ["Batch", "LossOut", "SortedSignal", "TeacherSignal", "TeacherTokens", "TokenSignal"]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class LossOut:
    """A loss as a weighted sum and its weight, so that the one division comes last.

    Micro-batches, hosts and gradient accumulation add `sum` and `weight` field by field and then
    agree with one large batch.

    Attributes:
        sum: f32[], the weighted sum of the loss.
        weight: f32[], the sum of the weights.

    Example:
        >>> import jax
        >>> from uld_jax.types import LossOut
        >>> parts = LossOut(sum=3.0, weight=2.0), LossOut(sum=1.0, weight=2.0)
        >>> float(jax.tree.map(lambda a, b: a + b, *parts).mean)
        1.0
        >>> float(LossOut(sum=0.0, weight=0.0).mean)
        0.0
    """

    sum: jax.Array
    weight: jax.Array

    @property
    def mean(self) -> jax.Array:
        """The sum over the weight; 0, with a gradient of 0, where the weight is 0."""
        empty = jnp.equal(self.weight, 0)
        return jnp.where(empty, 0.0, self.sum / jnp.where(empty, 1.0, self.weight))


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class SortedSignal:
    """A teacher's largest probabilities at each position, without their tokens.

    Attributes:
        probs: f32[*b, K], descending; a position with fewer is padded with zeros.
        tail_mass: f32[*b], the mass of the other tokens.
        error: f32[*b], the distance that is computed from it differs from the exact one by at
            most this, whatever the student.

    Example:
        >>> SortedSignal(jnp.ones((3, 1)), jnp.zeros(3), jnp.zeros(3)).probs.shape
        (3, 1)
    """

    probs: jax.Array
    tail_mass: jax.Array
    error: jax.Array


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class TokenSignal:
    """A teacher's likeliest tokens at each position.

    Attributes:
        ids: i32[*b, J], of the teacher's vocabulary.
        log_probs: f32[*b, J], of the whole distribution; −inf on padding.

    Example:
        >>> TokenSignal(jnp.zeros((3, 2), int), jnp.zeros((3, 2))).ids.shape
        (3, 2)
    """

    ids: jax.Array
    log_probs: jax.Array


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class TeacherTokens:
    """One teacher's part of a batch, where it is to read it.

    Attributes:
        uld_weight: f32[M, G, N], 0 where none of its positions is aligned.
        tokens: i32[M, B, S], right-padded.
        segment_ids: i32[M, B, S], 1 on tokens and 0 on padding.
        index: i32[M, G, N], index into the group's R · S positions of the aligned hidden state;
            any where `uld_weight` is 0.
        encoder_tokens: i32[M, B, P], the prompts of an encoder-decoder, whose `tokens` are the
            answers; None for a decoder.
        encoder_segment_ids: i32[M, B, P].

    Example:
        >>> tokens = jnp.ones((1, 2, 4), int)
        >>> sorted(TeacherTokens(tokens, tokens, tokens, tokens).inputs)
        ['segment_ids', 'tokens_BT']
    """

    uld_weight: jax.Array
    tokens: jax.Array
    segment_ids: jax.Array
    index: jax.Array
    encoder_tokens: jax.Array | None = None
    encoder_segment_ids: jax.Array | None = None

    @property
    def inputs(self) -> dict[str, jax.Array]:
        """The arguments of the teacher's `hidden`."""
        return _given(
            tokens_BT=self.tokens,
            segment_ids=self.segment_ids,
            encoder_tokens=self.encoder_tokens,
            encoder_segment_ids=self.encoder_segment_ids,
        )


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class TeacherSignal:
    """One teacher's part of a batch, where it has read it before or elsewhere.

    Attributes:
        uld_weight: f32[M, G, N], 0 where none of its positions is aligned.
        signal: [M, G, N], what it gave at the aligned positions.

    Example:
        >>> ones = jnp.ones((1, 1, 3))
        >>> TeacherSignal(ones, SortedSignal(ones[..., None], 0 * ones, 0 * ones)).uld_weight.shape
        (1, 1, 3)
    """

    uld_weight: jax.Array
    signal: SortedSignal | TokenSignal


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Batch:
    """One optimizer step's data: M micro-batches of the same rows for student and teachers.

    The answer positions are listed apart, in G groups of N (one group a batch shard of the mesh,
    holding the R = B / G rows of that shard, so that no gather crosses shards).

    Attributes:
        student_tokens: i32[M, B, T], right-padded.
        student_segment_ids: i32[M, B, T], 1 on tokens and 0 on padding.
        student_index: i32[M, G, N], index into the group's R · T positions of the hidden state
            that predicts the target.
        targets: i32[M, G, N], student token ids.
        ce_weight: f32[M, G, N], 0 on padding.
        teachers: One part a teacher.
        student_encoder_tokens: i32[M, B, P], the prompts of an encoder-decoder, whose
            `student_tokens` are the answers; None for a decoder.
        student_encoder_segment_ids: i32[M, B, P].

    Example:
        >>> tokens, index = jnp.ones((1, 2, 4), int), jnp.zeros((1, 1, 3), int)
        >>> Batch(tokens, tokens, index, index, index, ()).micro_batches
        1
    """

    student_tokens: jax.Array
    student_segment_ids: jax.Array
    student_index: jax.Array
    targets: jax.Array
    ce_weight: jax.Array
    teachers: tuple[TeacherTokens | TeacherSignal, ...]
    student_encoder_tokens: jax.Array | None = None
    student_encoder_segment_ids: jax.Array | None = None

    @property
    def student_inputs(self) -> dict[str, jax.Array]:
        """The arguments of the student's `hidden`."""
        return _given(
            tokens_BT=self.student_tokens,
            segment_ids=self.student_segment_ids,
            encoder_tokens=self.student_encoder_tokens,
            encoder_segment_ids=self.student_encoder_segment_ids,
        )

    @property
    def micro_batches(self) -> int:
        """M."""
        return self.student_tokens.shape[0]


def _given(**arrays: jax.Array | None) -> dict[str, jax.Array]:
    return {name: array for name, array in arrays.items() if array is not None}
