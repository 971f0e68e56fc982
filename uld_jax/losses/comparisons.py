"""What a student's logits and a teacher's are compared by, at the positions of the fused loss.

ULD needs no more than the logits. A divergence, the hybrid and transport are about tokens, so they
hold what is known of both vocabularies: which ids mean the same text, or what an exchange costs.
"""

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Protocol

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import ArrayLike

from uld_jax.losses import transport
from uld_jax.losses.aligned import hybrid_distance
from uld_jax.losses.divergences import DIVERGENCES, check_divergence
from uld_jax.losses.probabilities import on_whole_rows, softmax
from uld_jax.losses.uld import check_method, distance, resolve_method

__all__ = ["Comparison", "Divergence", "Hybrid", "Transport", "Uld"]

# Of a teacher's probabilities, for its other tokens: log-probabilities are kept in float16.
_LEAST_REST = 1e-6

_static = partial(dataclasses.field, metadata={"static": True})


class Comparison(Protocol):
    """A function of logits; a tree of arrays, its other fields being static."""

    def __call__(
        self, student_CV: jax.Array, teacher_CU: jax.Array, axis_name: str | None = None
    ) -> jax.Array:
        """The distances, not reduced.

        Args:
            student_CV: [*b, C, V], already divided by the temperature; a shard of V if sharded.
            teacher_CU: [*b, C, U], likewise. No gradient flows to them.
            axis_name: the mapped axis that both vocabularies are sharded over, or None.

        Returns:
            [*b, C]; the same on every shard.
        """
        ...


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Uld:
    """The Universal Logit Distillation loss, see `losses.uld`.

    Attributes:
        method: how it is computed.

    Example:
        >>> import jax.numpy as jnp
        >>> float(Uld("sort")(jnp.zeros(4), jnp.array([0.0, -jnp.inf])))
        1.5
    """

    method: str = _static(default="auto")

    def __post_init__(self) -> None:
        check_method(self.method)

    def __call__(
        self, student_CV: jax.Array, teacher_CU: jax.Array, axis_name: str | None = None
    ) -> jax.Array:
        """See `Comparison`."""
        shards = 1 if axis_name is None else lax.axis_size(axis_name)
        widths = (shards * x.shape[-1] for x in (student_CV, teacher_CU))
        return distance(student_CV, teacher_CU, resolve_method(self.method, *widths), axis_name)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Divergence:
    """A divergence between distributions over the tokens that both vocabularies have.

    D(p ‖ q) with p and q the probabilities of M tokens of equal text, and of any other token as one
    more. With `others` false they are given that the next token is one of the M, as must be where
    one side has no other: its probability is 0, and D would be infinite. Where M is all tokens it
    is the usual distillation loss.

    Attributes:
        name: a key of `DIVERGENCES`.
        student_ids: i32[M]; None compares id by id, see `losses.divergences`.
        teacher_ids: i32[M], the teacher's id of the same text.
        options: its further arguments, e.g. {"beta": 0.3} of the JSD.
        others: whether all tokens of unequal text count as one more.

    Raises:
        ValueError: for an unknown divergence or option; or, with shards, no ids, as the padding
            that makes shards equal would count.

    Example:
        >>> import jax.numpy as jnp
        >>> same_text = jnp.array([0, 2]), jnp.array([1, 0])
        >>> compare = Divergence("kl", *same_text)
        >>> float(compare(jnp.array([1.0, 9.0, 2.0]), jnp.array([2.0, 1.0])))
        0.0
    """

    name: str = _static()
    student_ids: ArrayLike | None = None
    teacher_ids: ArrayLike | None = None
    options: Mapping[str, ArrayLike] = dataclasses.field(default_factory=dict)
    others: bool = _static(default=False)

    def __call__(
        self, student_CV: jax.Array, teacher_CU: jax.Array, axis_name: str | None = None
    ) -> jax.Array:
        """See `Comparison`."""
        check_divergence(self.name, self.options)
        if axis_name is not None and self.student_ids is None:
            raise ValueError("student_ids: expected those to compare where shards are, got None")
        return _by_rows(self._of_rows, student_CV, teacher_CU, axis_name)

    def _of_rows(self, student_CV: jax.Array, teacher_CU: jax.Array) -> jax.Array:
        if self.student_ids is not None and self.teacher_ids is not None:
            student_CV = self._matched(student_CV, jnp.asarray(self.student_ids))
            teacher_CU = self._matched(teacher_CU, jnp.asarray(self.teacher_ids))
        return DIVERGENCES[self.name](student_CV, teacher_CU, **self.options)

    def _matched(self, logits_CV: jax.Array, ids_M: jax.Array) -> jax.Array:
        matched_CM = logits_CV[..., ids_M]
        if not self.others:
            return matched_CM
        rest_CV = logits_CV.at[..., ids_M].set(-jnp.inf)
        rest_C1 = jax.nn.logsumexp(rest_CV, axis=-1, keepdims=True)
        return jnp.concatenate([matched_CM, rest_C1], axis=-1)

    def to_tokens(
        self,
        student_CV: jax.Array,
        ids_CJ: jax.Array,
        log_probs_CJ: jax.Array,
        axis_name: str | None = None,
    ) -> jax.Array:
        """The divergence from a teacher that is known by J tokens, the rest being one more.

        So it is at most the divergence from the whole teacher, up to the rounding of what is known
        (without `others` roughly so: among the rest some may be of unequal text).

        Args:
            student_CV: [*b, C, V], already divided by the temperature; a shard of V if sharded.
            ids_CJ: i32[*b, C, J], the student's ids of these tokens; −1 for one that it has not.
            log_probs_CJ: [*b, C, J], the teacher's, −inf on padding. No gradient flows to them.
            axis_name: as in `Comparison`.

        Returns:
            [*b, C].

        Raises:
            ValueError: for an unknown divergence or option.

        Example:
            >>> import jax.numpy as jnp
            >>> known = jnp.array([2, -1]), jnp.log(jnp.array([0.75, 0.1]))
            >>> compare = Divergence("tvd", others=True)
            >>> round(float(compare.to_tokens(jnp.zeros(4), *known)), 4)
            0.5
        """
        check_divergence(self.name, self.options)
        if axis_name is None:
            return self._to_tokens_of_rows(student_CV, ids_CJ, log_probs_CJ)
        lifted = on_whole_rows(self._to_tokens_of_rows, axis_name)
        return lifted((student_CV,), (ids_CJ, log_probs_CJ))

    def _to_tokens_of_rows(
        self, student_CV: jax.Array, ids_CJ: jax.Array, log_probs_CJ: jax.Array
    ) -> jax.Array:
        # Past the end, where nothing is read or written (−1 would be the last token).
        absent_CJ = (ids_CJ < 0) | jnp.isneginf(log_probs_CJ)
        ids_CJ = jnp.where(absent_CJ, student_CV.shape[-1], ids_CJ)
        log_p_CJ = jnp.where(ids_CJ < student_CV.shape[-1], log_probs_CJ, -jnp.inf)
        told_apart_CJ = log_p_CJ if self.others else log_probs_CJ
        if not self.others and self.student_ids is not None:
            ids_M = jnp.asarray(self.student_ids)
            matched_V = jnp.zeros(student_CV.shape[-1:], bool).at[ids_M].set(True)
            student_CV = jnp.where(matched_V, student_CV, -jnp.inf)

        def of_row(student_V: jax.Array, ids_J: jax.Array) -> jax.Array:
            known_J = student_V.at[ids_J].get(mode="fill", fill_value=-jnp.inf)
            rest_V = student_V.at[ids_J].set(-jnp.inf, mode="drop")
            return jnp.concatenate([known_J, jax.nn.logsumexp(rest_V, keepdims=True)])

        student_CJ = jnp.vectorize(of_row, signature="(v),(j)->(k)")(student_CV, ids_CJ)
        # What is kept of the probabilities is rounded, and can add up to all.
        rest_C1 = 1 - jnp.exp(told_apart_CJ).sum(-1, keepdims=True)
        rest_C1 = jnp.log(jnp.maximum(rest_C1, _LEAST_REST))
        # Where the student has no more, the teacher has no more that counts.
        rest_C1 = jnp.where(jnp.isneginf(student_CJ[..., -1:]), -jnp.inf, rest_C1)
        teacher_CJ = jnp.concatenate([log_p_CJ, rest_C1], axis=-1)
        return DIVERGENCES[self.name](student_CJ, teacher_CJ, **self.options)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Hybrid:
    """A divergence on the tokens that both have and sorted L1 on the rest, see `hybrid_loss`.

    Attributes:
        student_ids: i32[M], student ids without repetition.
        teacher_ids: i32[M], the teacher's id of the same text.
        matched_weight: of the divergence; that of the sorted L1 is 1 less this.
        beta: see `hybrid_loss`.

    Example:
        >>> import jax.numpy as jnp
        >>> same_text = jnp.array([0, 1])
        >>> logits = jnp.array([2.0, 1.0, 0.0])
        >>> float(Hybrid(same_text, same_text, 0.5)(logits, logits))
        0.0
    """

    student_ids: ArrayLike
    teacher_ids: ArrayLike
    matched_weight: float = _static()
    beta: float = _static(default=0.5)

    def __call__(
        self, student_CV: jax.Array, teacher_CU: jax.Array, axis_name: str | None = None
    ) -> jax.Array:
        """See `Comparison`."""
        return _by_rows(self._of_rows, student_CV, teacher_CU, axis_name)

    def _of_rows(self, student_CV: jax.Array, teacher_CU: jax.Array) -> jax.Array:
        return hybrid_distance(
            softmax(student_CV),
            lax.stop_gradient(softmax(teacher_CU)),
            jnp.asarray(self.student_ids),
            jnp.asarray(self.teacher_ids),
            beta=self.beta,
            matched_weight=self.matched_weight,
        )


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Transport:
    """Optimal transport with a cost for each pair of tokens, see `losses.transport`.

    On one device, as the solver of ott-jax does not pass shard_map's check of varying axes.

    Attributes:
        cost: of an exchange.
        top_k: likeliest tokens of each side that are told apart.
        epsilon: strength of the regularisation.

    Example:
        >>> import jax.numpy as jnp
        >>> compare = Transport(transport.UniformCost(), epsilon=0.01)
        >>> student, teacher = jnp.log(jnp.array([[0.2, 0.8], [0.5, 0.5]]))
        >>> round(float(compare(student, teacher)), 2)
        0.3
    """

    cost: transport.TokenCost
    top_k: int = _static(default=64)
    epsilon: float = _static(default=0.05)

    def __call__(
        self, student_CV: jax.Array, teacher_CU: jax.Array, axis_name: str | None = None
    ) -> jax.Array:
        """See `Comparison`."""
        if axis_name is not None:
            raise ValueError("Transport: expected whole vocabularies, got shards of them")
        options = {"top_k": self.top_k, "epsilon": self.epsilon}
        return transport.transport_loss(student_CV, teacher_CU, self.cost, **options).value


def _by_rows(
    function: Callable[[jax.Array, jax.Array], jax.Array],
    student_CV: jax.Array,
    teacher_CU: jax.Array,
    axis_name: str | None,
) -> jax.Array:
    if axis_name is None:
        return function(student_CV, teacher_CU)
    return on_whole_rows(function, axis_name)((student_CV, teacher_CU))
