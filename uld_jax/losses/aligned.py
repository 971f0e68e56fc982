"""Losses between tokens that cover the same text: span-aligned ULD, and its hybrid with a JSD.

A group is the tokens of one side that cover the same bytes as a group of the other side
(`data.align_spans`). Groups are index arrays of fixed shape, padded with -1, so that everything
here compiles once and works under jit, grad, vmap and scan.
"""

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import ArrayLike

from uld_jax.losses.sorting import sorted_l1

__all__ = ["MERGES", "hybrid_distance", "hybrid_loss", "merge_probabilities", "span_aligned_uld"]


def merge_probabilities(
    logits: jax.Array,
    token_ids: jax.Array,
    groups: jax.Array,
    *,
    merge: str = "chain",
    temperature: ArrayLike = 1.0,
) -> jax.Array:
    """One vector of next-text probabilities for each group of tokens.

    With p_1 … p_k the distributions that predict a group's tokens x_1 … x_k, and
    c = Π_{j>1} p_j[x_j] the probability that the group goes on as observed once x_1 is there:

    ======== =================================================================================
    merge    vector
    ======== =================================================================================
    chain    p_1, but x_1 has p_1[x_1] · c, the group's own probability, and one more entry at
             the end has p_1[x_1] · (1 − c), all other ways to go on from x_1: V + 1 entries
    observed p_1 · c: V entries, as published in TRL
    bayesian p_k · Π_{j<k} p_j[x_j]: V entries, as published in TRL
    ======== =================================================================================

    "chain" is a probability distribution over what the text may go on with, and only p_1 is
    conditioned on the prefix that student and teacher share. The other two do not sum to 1:
    "observed" multiplies also the tokens that were not taken by the continuation of the one that
    was, and "bayesian" leaves out what does not start with x_1 … x_{k−1}. A group of one token
    has p_1 in all three.

    Args:
        logits: [*b, T, V]; position t predicts `token_ids` at t. Computed in f32, f64 in f64.
        token_ids: i32[*b, T], the observed tokens.
        groups: i32[*b, G, W], the positions of each group in ascending order, then -1.
        merge: a key of `MERGES`.
        temperature: scalar divisor of the logits.

    Returns:
        f32[*b, G, V + 1] for "chain", else f32[*b, G, V] (f64 for f64 logits); 0 in groups that
        are all -1. Positions that are in no group reach neither the value nor the gradient.

    Raises:
        ValueError: for an unknown merge, or shapes that do not match.

    Example:
        >>> import jax.numpy as jnp
        >>> from uld_jax.losses.aligned import merge_probabilities
        >>> logits = jnp.log(jnp.array([[0.75, 0.25], [0.5, 0.5]]))
        >>> merged = merge_probabilities(logits, jnp.array([0, 1]), jnp.array([[0, 1]]))
        >>> [round(float(p), 4) for p in merged[0]]
        [0.375, 0.25, 0.375]
    """
    if merge not in MERGES:
        raise ValueError(
            f"merge: unknown {merge!r}; expected one of {', '.join(map(repr, MERGES))}"
        )
    if token_ids.shape != logits.shape[:-1]:
        raise ValueError(f"token_ids: expected shape {logits.shape[:-1]}, got {token_ids.shape}")
    if groups.shape[:-2] != logits.shape[:-2] or groups.ndim != logits.ndim:
        raise ValueError(
            f"groups: expected shape {(*logits.shape[:-2], 'G', 'W')}, got {groups.shape}"
        )
    logits, token_ids, groups = map(jnp.asarray, (logits, token_ids, groups))
    rule = MERGES[merge]
    if 0 in (logits.shape[-2], groups.shape[-1]):
        dtype = jnp.promote_types(logits.dtype, jnp.float32)
        return jnp.zeros((*groups.shape[:-1], logits.shape[-1] + rule.extra), dtype)

    def one_sequence(logits_TV: jax.Array, ids_T: jax.Array, groups_GW: jax.Array) -> jax.Array:
        return rule.spread(*_factors(logits_TV, ids_T, groups_GW, temperature, rule.anchor_last))

    return jnp.vectorize(one_sequence, signature="(t,v),(t),(g,w)->(g,m)")(
        logits, token_ids, groups
    )


def span_aligned_uld(
    student_logits: jax.Array,
    teacher_logits: jax.Array,
    student_ids: jax.Array,
    teacher_ids: jax.Array,
    student_groups: jax.Array,
    teacher_groups: jax.Array,
    *,
    merge: str = "chain",
    student_temperature: ArrayLike = 1.0,
    teacher_temperature: ArrayLike = 1.0,
) -> jax.Array:
    """The ULD between groups of tokens that cover the same text, not reduced.

    d_g = Σ_v |sort↓(m_g)_v − sort↓(n_g)_v| with m_g and n_g the student's and the teacher's
    vectors of `merge_probabilities`, the shorter zero-padded.

    Where every group is one token on both sides, this is `uld` of those positions. TRL's GOLD
    takes the mean over groups and then over rows. It passes, with "observed", the logits at the
    answer tokens (off by one) and, with "bayesian", those before.

    Args:
        student_logits: [*b, T, V]; position t predicts `student_ids` at t.
        teacher_logits: [*b, S, U], likewise. No gradient flows to them.
        student_ids: i32[*b, T], the observed tokens.
        teacher_ids: i32[*b, S].
        student_groups: i32[*b, G, W], the positions of each group in ascending order, then -1.
        teacher_groups: i32[*b, G, X]; group g covers the same text as the student's group g.
        merge: "chain", "observed" or "bayesian", see `merge_probabilities`.
        student_temperature: scalar divisor of the student's logits.
        teacher_temperature: scalar divisor of the teacher's logits.

    Returns:
        f32[*b, G] (f64 for f64 logits), in [0, 2]; 0 where either side's group is all -1.

    Raises:
        ValueError: for an unknown merge, or shapes that do not match.

    Example:
        >>> import jax.numpy as jnp
        >>> from uld_jax.losses.aligned import span_aligned_uld
        >>> student = jnp.log(jnp.array([[0.75, 0.25], [0.5, 0.5]]))
        >>> teacher = jnp.log(jnp.array([[0.5, 0.5]]))
        >>> d = span_aligned_uld(student, teacher, jnp.array([0, 1]), jnp.array([1]),
        ...                      jnp.array([[0, 1], [-1, -1]]), jnp.array([[0], [-1]]))
        >>> [round(float(x), 4) for x in d]
        [0.5, 0.0]
    """
    student, teacher = _merged_pair(
        _Side(student_logits, student_ids, student_groups, student_temperature),
        _Side(teacher_logits, teacher_ids, teacher_groups, teacher_temperature),
        merge,
    )
    return sorted_l1(student, teacher)


def hybrid_loss(
    student_logits: jax.Array,
    teacher_logits: jax.Array,
    student_ids: jax.Array,
    teacher_ids: jax.Array,
    student_groups: jax.Array,
    teacher_groups: jax.Array,
    student_matched: jax.Array,
    teacher_matched: jax.Array,
    *,
    merge: str = "chain",
    beta: float = 0.5,
    matched_weight: float | jax.Array | None = None,
    unmatched_weight: float | jax.Array | None = None,
    student_temperature: ArrayLike = 1.0,
    teacher_temperature: ArrayLike = 1.0,
) -> jax.Array:
    """A divergence on the tokens that both vocabularies have, sorted L1 on the rest; not reduced.

    w · D_β(m_matched, n_matched) + u · Σ_v |sort↓(m_rest)_v − sort↓(n_rest)_v| for each group,
    with the student's vector m and the teacher's n of `merge_probabilities`, and

    - 0 < β < 1: D_β = Σ β n ln(n / h) + (1 − β) m ln(m / h), h = β n + (1 − β) m;
    - β = 0: D = Σ n ln(n / m) − n + m; β = 1: the same with m and n exchanged.

    The matched parts need not have the same mass. The terms ± m, ± n are there so that D is never
    negative, is 0 at m = n only, and is the limit of D_β / β and of D_β / (1 − β); they cancel
    between distributions, and TRL, which leaves them out, is equalled for 0 < β < 1. The entry
    that "chain" adds is in the rest.

    Args:
        student_logits: [*b, T, V]; position t predicts `student_ids` at t.
        teacher_logits: [*b, S, U], likewise. No gradient flows to them.
        student_ids: i32[*b, T], the observed tokens.
        teacher_ids: i32[*b, S].
        student_groups: i32[*b, G, W], the positions of each group in ascending order, then -1.
        teacher_groups: i32[*b, G, X]; group g covers the same text as the student's group g.
        student_matched: i32[M], student ids without repetition.
        teacher_matched: i32[M], the teacher's id of the same text.
        merge: "chain", "observed" or "bayesian", see `merge_probabilities`.
        beta: 0 is the KL divergence from the teacher, 1 the reverse, between them the generalised
            Jensen-Shannon divergence. A Python number.
        matched_weight: w; None is TRL's adaptive weight M / U.
        unmatched_weight: u; None is 1 − w.
        student_temperature: scalar divisor of the student's logits.
        teacher_temperature: scalar divisor of the teacher's logits.

    Returns:
        f32[*b, G] (f64 for f64 logits); 0 where either side's group is all -1.

    Raises:
        ValueError: for an unknown merge, a beta outside [0, 1], or shapes that do not match.

    Example:
        >>> import jax.numpy as jnp
        >>> from uld_jax.losses.aligned import hybrid_loss
        >>> logits, ids, groups = jnp.zeros((1, 4)), jnp.array([3]), jnp.array([[0]])
        >>> same = jnp.array([0, 1])
        >>> loss = hybrid_loss(logits, logits, ids, ids, groups, groups, same, same)
        >>> float(loss[0])
        0.0

    Reference:
        The GOLD trainer of TRL; Agarwal et al., arXiv 2306.13649, for the divergence.
    """
    student, teacher = _merged_pair(
        _Side(student_logits, student_ids, student_groups, student_temperature),
        _Side(teacher_logits, teacher_ids, teacher_groups, teacher_temperature),
        merge,
    )
    if matched_weight is None:
        # Not of the width that "chain" adds to.
        matched_weight = student_matched.size / max(1, teacher_logits.shape[-1])
    return hybrid_distance(
        student,
        teacher,
        student_matched,
        teacher_matched,
        beta=beta,
        matched_weight=matched_weight,
        unmatched_weight=unmatched_weight,
    )


def hybrid_distance(
    student_probs: jax.Array,
    teacher_probs: jax.Array,
    student_matched: jax.Array,
    teacher_matched: jax.Array,
    *,
    beta: float = 0.5,
    matched_weight: float | jax.Array | None = None,
    unmatched_weight: float | jax.Array | None = None,
) -> jax.Array:
    """`hybrid_loss` of probabilities, for positions that are aligned already.

    Args:
        student_probs: [*b, V], not negative.
        teacher_probs: [*b, U], likewise. No gradient may be asked of them.
        student_matched: i32[M], student ids without repetition.
        teacher_matched: i32[M], the teacher's id of the same text.
        beta: see `hybrid_loss`, as are the arguments below.
        matched_weight: of the divergence; None is M / U.
        unmatched_weight: of the sorted L1.

    Returns:
        [*b].

    Raises:
        ValueError: for a beta outside [0, 1], or ids of different shapes.

    Example:
        >>> import jax.numpy as jnp
        >>> from uld_jax.losses.aligned import hybrid_distance
        >>> student, teacher = jnp.array([0.5, 0.25, 0.25]), jnp.array([0.5, 0.5])
        >>> float(hybrid_distance(student, teacher, jnp.array([0]), jnp.array([1])))
        0.25
    """
    if not 0 <= beta <= 1:
        raise ValueError(f"beta: expected a number in [0, 1], got {beta}")
    if student_matched.shape != teacher_matched.shape or student_matched.ndim != 1:
        raise ValueError(
            f"student_matched and teacher_matched: expected one shape [M], "
            f"got {student_matched.shape} and {teacher_matched.shape}"
        )
    if matched_weight is None:
        matched_weight = student_matched.size / max(1, teacher_probs.shape[-1])
    if unmatched_weight is None:
        unmatched_weight = 1 - matched_weight
    matched = _divergence(
        student_probs[..., student_matched], teacher_probs[..., teacher_matched], beta
    )
    # Zeros sort last and compare with padding, so that no entry need be taken out.
    student_rest = student_probs.at[..., student_matched].set(0)
    teacher_rest = teacher_probs.at[..., teacher_matched].set(0)
    return matched_weight * matched + unmatched_weight * sorted_l1(student_rest, teacher_rest)


class _Side(NamedTuple):
    logits: jax.Array
    ids: jax.Array
    groups: jax.Array
    temperature: ArrayLike


class _Merge(NamedTuple):
    """How the factors of a group become one vector.

    Attributes:
        spread: (log_anchor [G, V], id [G], log_rest [G], valid [G]) -> [G, V + extra].
        anchor_last: whether the anchor, which gives the vector, is the last token of the group.
        extra: entries besides the vocabulary.
    """

    spread: Callable[[jax.Array, jax.Array, jax.Array, jax.Array], jax.Array]
    anchor_last: bool
    extra: int


def _merged_pair(student: _Side, teacher: _Side, merge: str) -> tuple[jax.Array, jax.Array]:
    """Both sides' vectors, 0 where either side has no group."""
    if student.groups.shape[:-1] != teacher.groups.shape[:-1]:
        raise ValueError(
            f"student_groups and teacher_groups: expected the same axes before the last, "
            f"got {student.groups.shape} and {teacher.groups.shape}"
        )
    teacher = teacher._replace(logits=lax.stop_gradient(jnp.asarray(teacher.logits)))
    both = (student.groups >= 0).any(-1) & (teacher.groups >= 0).any(-1)
    merged = [
        merge_probabilities(
            side.logits,
            side.ids,
            jnp.where(both[..., None], side.groups, -1),
            merge=merge,
            temperature=side.temperature,
        )
        for side in (student, teacher)
    ]
    return merged[0], merged[1]


def _factors(
    logits_TV: jax.Array,
    ids_T: jax.Array,
    groups_GW: jax.Array,
    temperature: ArrayLike,
    anchor_last: bool,
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """The arguments of `_Merge.spread`; products are sums of logarithms, which do not underflow."""
    valid_GW = groups_GW >= 0
    used_T = (
        jnp.zeros(ids_T.shape, bool)
        .at[jnp.where(valid_GW, groups_GW, ids_T.size)]
        .set(True, mode="drop")
    )
    # Padding may hold NaN, and 0 · NaN in the backward pass would spread it.
    logits_TV = jnp.where(used_T[:, None], logits_TV, 0)
    dtype = jnp.promote_types(logits_TV.dtype, jnp.float32)
    log_probs_TV = jax.nn.log_softmax(logits_TV.astype(dtype) / jnp.asarray(temperature, dtype))
    ids_T = jnp.where(used_T, ids_T, 0)
    observed_T = jnp.take_along_axis(log_probs_TV, ids_T[:, None], axis=1)[:, 0]

    anchor_G = groups_GW.max(-1) if anchor_last else groups_GW[:, 0]
    others_GW = valid_GW & (groups_GW != anchor_G[:, None])
    log_rest_G = jnp.where(others_GW, observed_T[groups_GW], 0).sum(-1)
    return log_probs_TV[anchor_G], ids_T[anchor_G], log_rest_G, valid_GW.any(-1)


def _product(
    log_anchor_GV: jax.Array, ids_G: jax.Array, log_rest_G: jax.Array, valid_G: jax.Array
) -> jax.Array:
    return jnp.where(valid_G[:, None], jnp.exp(log_anchor_GV + log_rest_G[:, None]), 0)


def _chain(
    log_anchor_GV: jax.Array, ids_G: jax.Array, log_rest_G: jax.Array, valid_G: jax.Array
) -> jax.Array:
    observed_GV = jnp.arange(log_anchor_GV.shape[1])[None, :] == ids_G[:, None]
    log_GV = log_anchor_GV + jnp.where(observed_GV, log_rest_G[:, None], 0)
    first_G = jnp.take_along_axis(log_anchor_GV, ids_G[:, None], axis=1)
    other_G1 = jnp.exp(first_G) * -jnp.expm1(log_rest_G[:, None])
    return jnp.where(valid_G[:, None], jnp.concatenate([jnp.exp(log_GV), other_G1], axis=1), 0)


MERGES: Mapping[str, _Merge] = MappingProxyType(
    {
        "chain": _Merge(_chain, anchor_last=False, extra=1),
        "observed": _Merge(_product, anchor_last=False, extra=0),
        "bayesian": _Merge(_product, anchor_last=True, extra=0),
    }
)


def _divergence(student_M: jax.Array, teacher_M: jax.Array, beta: float) -> jax.Array:
    if beta == 0:
        return _relative_entropy(teacher_M, student_M)
    if beta == 1:
        return _relative_entropy(student_M, teacher_M)
    mean_M = beta * teacher_M + (1 - beta) * student_M
    from_teacher = _relative_entropy(teacher_M, mean_M)
    return beta * from_teacher + (1 - beta) * _relative_entropy(student_M, mean_M)


def _relative_entropy(x_M: jax.Array, y_M: jax.Array) -> jax.Array:
    """Σ x ln(x / y) − x + y, never negative; finite, with its gradient, where x or y is 0."""
    tiny = jnp.finfo(x_M.dtype).tiny
    log_ratio = jnp.log(jnp.maximum(x_M, tiny)) - jnp.log(jnp.maximum(y_M, tiny))
    return (x_M * log_ratio - x_M + y_M).sum(-1)
