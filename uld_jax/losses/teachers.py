"""What a student's logits are compared with in the fused loss: a teacher's head, or its signal."""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import ArrayLike, DTypeLike

from uld_jax.losses.chunked import product
from uld_jax.losses.comparisons import Comparison, Divergence, Uld
from uld_jax.losses.probabilities import on_whole_rows
from uld_jax.losses.truncated import truncated_uld
from uld_jax.losses.uld import uld_to_sorted

__all__ = [
    "Head",
    "HeadTeacher",
    "SortedTeacher",
    "Teacher",
    "TokenTeacher",
    "check_shape",
    "product_dtype",
]

_static = partial(dataclasses.field, metadata={"static": True})


@dataclass(frozen=True)
class Head:
    """How products with an output embedding become logits.

    Attributes:
        softcap: bound of the logits, cap(x) = softcap · tanh(x / softcap); None for no bound.
        vocab: rows of the whole embedding that are tokens, the rest being padding; None for all.
        axis_name: the mapped axis that its rows are sharded over, or None.

    Example:
        >>> Head(None, 1, None).finish(jnp.zeros(2)).tolist()
        [0.0, -inf]
    """

    softcap: float | None
    vocab: int | None
    axis_name: str | None

    def finish(self, logits_CV: jax.Array) -> jax.Array:
        """The logits, from products with the embedding.

        Args:
            logits_CV: [*b, C, V], or the shard of it that this device holds.

        Returns:
            As many; −inf on padding.

        Raises:
            ValueError: `vocab` is no number of rows.
        """
        width = logits_CV.shape[-1]
        shards = 1 if self.axis_name is None else lax.axis_size(self.axis_name)
        if self.vocab is not None and not 1 <= self.vocab <= shards * width:
            raise ValueError(f"vocab: expected 1 to {shards * width}, got {self.vocab}")
        if self.softcap is not None:
            logits_CV = self.softcap * jnp.tanh(logits_CV / self.softcap)
        if self.vocab is None:
            return logits_CV
        first = 0 if self.axis_name is None else lax.axis_index(self.axis_name) * width
        ids = first + lax.broadcasted_iota(jnp.int32, logits_CV.shape, logits_CV.ndim - 1)
        return jnp.where(ids < self.vocab, logits_CV, -jnp.inf)

    def logits(self, hidden: jax.Array, head: jax.Array, dtype: jnp.dtype) -> jax.Array:
        """Hidden · headᵀ, finished.

        Args:
            hidden: [*b, C, E].
            head: [U, E].
            dtype: type of the factors.

        Returns:
            f32[*b, C, U] or wider.
        """
        return self.finish(product(hidden.astype(dtype), head.astype(dtype).T))


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class HeadTeacher:
    """A teacher by its last hidden states and its output embedding.

    Attributes:
        hidden: [*b, N, E], aligned with the student's, position by position.
        head: [U, E].
        weights: f32[*b, N], of the distance; 0 leaves a position out.
        temperature: divisor of the logits.
        softcap: bound of the logits; None for no bound.
        vocab: rows of the head that are tokens; None for all of them.
        comparison: what the logits are compared by; None for ULD.

    Example:
        >>> HeadTeacher(jnp.zeros((3, 2)), jnp.zeros((8, 2)), jnp.ones(3)).temperature
        1.0
    """

    hidden: jax.Array
    head: jax.Array
    weights: jax.Array
    temperature: ArrayLike = 1.0
    softcap: float | None = _static(default=None)
    vocab: int | None = _static(default=None)
    comparison: Comparison | None = None

    @property
    def positions(self) -> tuple[jax.Array, jax.Array]:
        """What the loss sees a chunk of: weights, and what the distance is to."""
        return self.weights, self.hidden

    @property
    def constants(self) -> tuple[jax.Array, ArrayLike, Comparison | None]:
        """What it sees whole."""
        return self.head, self.temperature, self.comparison

    def check(self, shape: tuple[int, ...]) -> None:
        """Refuses arrays that do not fit.

        Args:
            shape: [*b, N] of the targets.

        Raises:
            ValueError: naming the array.
        """
        check_shape("teacher_hidden", self.hidden, (*shape, self.head.shape[-1]))
        check_shape("uld_weights", self.weights, shape)

    def distance(
        self, method: str, axis_name: str | None, compute_dtype: DTypeLike | None
    ) -> Callable[[jax.Array, Any, Any, ArrayLike], jax.Array]:
        """The function of the student's logits that is summed; hashable.

        Args:
            method: see `losses.uld`.
            axis_name: the mapped axis that both vocabularies are sharded over, or None.
            compute_dtype: type of the factors of the product with the head, or None.

        Returns:
            (logits [*b, C, V], a chunk of what `positions` has, constants, student's temperature)
            -> [*b, C].
        """
        dtype = product_dtype(compute_dtype, self.hidden, self.head)
        return _ToHead(Head(self.softcap, self.vocab, axis_name), dtype, method)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class SortedTeacher:
    """A teacher by its largest probabilities, without their tokens.

    Attributes:
        probs: [*b, N, K], descending; a position with fewer is padded with zeros.
        weights: f32[*b, N], of the distance; 0 leaves a position out.
        tail_mass: [*b, N], the sum of the teacher's other probabilities: the distance is then the
            value of `truncated_uld`. None where there are no others.

    Example:
        >>> SortedTeacher(jnp.ones((3, 1)), jnp.ones(3)).constants
        ()
    """

    probs: jax.Array
    weights: jax.Array
    tail_mass: jax.Array | None = None

    @property
    def positions(self) -> tuple[jax.Array, tuple[jax.Array, ...]]:
        """As of `HeadTeacher`."""
        known = (self.probs,) if self.tail_mass is None else (self.probs, self.tail_mass)
        return self.weights, known

    @property
    def constants(self) -> tuple[()]:
        """As of `HeadTeacher`: none."""
        return ()

    def check(self, shape: tuple[int, ...]) -> None:
        """As of `HeadTeacher`.

        Args:
            shape: [*b, N] of the targets.

        Raises:
            ValueError: naming the array.
        """
        check_shape("teacher_probs_sorted", self.probs[..., 0], shape)
        if self.tail_mass is not None:
            check_shape("teacher_tail_mass", self.tail_mass, shape)
        check_shape("uld_weights", self.weights, shape)

    def distance(
        self, method: str, axis_name: str | None, compute_dtype: DTypeLike | None
    ) -> Callable[[jax.Array, Any, Any, ArrayLike], jax.Array]:
        """As of `HeadTeacher`; over shards of the student's vocabulary, each device has whole rows.

        Args:
            method: see `losses.uld`.
            axis_name: the mapped axis that the student's vocabulary is sharded over, or None.
            compute_dtype: not used, there is no product.

        Returns:
            As of `HeadTeacher`.
        """
        del compute_dtype
        return _ToSorted(method, axis_name)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class TokenTeacher:
    """A teacher by its likeliest tokens, for a divergence over matched ones.

    Attributes:
        ids: i32[*b, N, J], the student's ids of these tokens; −1 for one that it has not.
        log_probs: f32[*b, N, J], of the teacher's whole distribution; −inf on padding.
        weights: f32[*b, N], of the divergence; 0 leaves a position out.
        comparison: which divergence; without `others`, of which of the student's tokens.

    Example:
        >>> ids = jnp.zeros((3, 1), int)
        >>> TokenTeacher(ids, -1.0 * ids, jnp.ones(3), Divergence("kl")).ids.shape
        (3, 1)
    """

    ids: jax.Array
    log_probs: jax.Array
    weights: jax.Array
    comparison: Divergence

    @property
    def positions(self) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
        """As of `HeadTeacher`."""
        return self.weights, (self.ids, self.log_probs)

    @property
    def constants(self) -> Divergence:
        """As of `HeadTeacher`."""
        return self.comparison

    def check(self, shape: tuple[int, ...]) -> None:
        """As of `HeadTeacher`.

        Args:
            shape: [*b, N] of the targets.

        Raises:
            ValueError: naming the array.
        """
        check_shape("teacher_ids", self.ids[..., 0], shape)
        check_shape("teacher_log_probs", self.log_probs, self.ids.shape)
        check_shape("uld_weights", self.weights, shape)

    def distance(
        self, method: str, axis_name: str | None, compute_dtype: DTypeLike | None
    ) -> Callable[[jax.Array, Any, Any, ArrayLike], jax.Array]:
        """As of `HeadTeacher`; over shards of the student's vocabulary, each device has whole rows.

        Args:
            method: not used, it is ULD's.
            axis_name: the mapped axis that the student's vocabulary is sharded over, or None.
            compute_dtype: not used, there is no product.

        Returns:
            As of `HeadTeacher`.
        """
        del method, compute_dtype
        return _ToTokens(axis_name)


Teacher = HeadTeacher | SortedTeacher | TokenTeacher


@dataclass(frozen=True)
class _ToHead:
    teacher: Head
    dtype: jnp.dtype
    method: str

    def __call__(
        self, logits_CV: jax.Array, hidden_C: jax.Array, constants: tuple, student_temp: ArrayLike
    ) -> jax.Array:
        head_UE, teacher_temp, comparison = constants
        teacher_CU = self.teacher.logits(hidden_C, head_UE, self.dtype)
        compare = comparison or Uld(self.method)
        axis_name = self.teacher.axis_name
        return compare(logits_CV / student_temp, teacher_CU / teacher_temp, axis_name)


@dataclass(frozen=True)
class _ToSorted:
    method: str
    axis_name: str | None

    def __call__(
        self,
        logits_CV: jax.Array,
        known_C: tuple[jax.Array, ...],
        constants: tuple[()],
        student_temp: ArrayLike,
    ) -> jax.Array:
        del constants
        if self.axis_name is None:
            return self._of_rows(logits_CV / student_temp, *known_C)
        of_rows = on_whole_rows(self._of_rows, self.axis_name)
        return of_rows((logits_CV / student_temp,), known_C)

    def _of_rows(
        self, logits_CV: jax.Array, probs_CK: jax.Array, tail_C: jax.Array | None = None
    ) -> jax.Array:
        if tail_C is None:
            return uld_to_sorted(logits_CV, probs_CK, method=self.method)
        return truncated_uld(logits_CV, probs_CK, tail_C, method=self.method)[0]


@dataclass(frozen=True)
class _ToTokens:
    axis_name: str | None

    def __call__(
        self,
        logits_CV: jax.Array,
        known_C: tuple[jax.Array, jax.Array],
        constants: Divergence,
        student_temp: ArrayLike,
    ) -> jax.Array:
        return constants.to_tokens(logits_CV / student_temp, *known_C, self.axis_name)


def check_shape(name: str, array: jax.Array, expected: tuple[int, ...]) -> None:
    """Refuses an array of another shape.

    Args:
        name: of the argument.
        array: its value.
        expected: the shape that it must have.

    Raises:
        ValueError: naming all three.

    Example:
        >>> check_shape("targets", jnp.zeros(3), (4,))
        Traceback (most recent call last):
        ...
        ValueError: targets: expected shape (4,), got (3,)
    """
    if array.shape != expected:
        raise ValueError(f"{name}: expected shape {expected}, got {array.shape}")


def product_dtype(requested: DTypeLike | None, hidden: jax.Array, head: jax.Array) -> jnp.dtype:
    """The type of the factors of hidden · headᵀ.

    Args:
        requested: the type, or None for what the arrays promote to.
        hidden: one factor.
        head: the other.

    Returns:
        The type.

    Example:
        >>> product_dtype(None, jnp.zeros(1, jnp.bfloat16), jnp.zeros(1))
        dtype('float32')
    """
    return jnp.dtype(jnp.result_type(hidden, head) if requested is None else requested)
