"""The whole distillation loss from logits and labels, under the name of a published convention.

Codes that call themselves ULD differ in the positions they compare and in the mean they take. Each
difference is a named entry of `CONVENTIONS`; everything else is shared.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType

import jax
import jax.numpy as jnp
import optax

from uld_jax.losses.uld import uld
from uld_jax.types import LossOut

__all__ = ["CONVENTIONS", "Convention", "DistillationLoss", "distillation_loss"]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class DistillationLoss:
    """The parts of a distillation loss, each a scalar.

    Attributes:
        total: ce_weight · cross_entropy + uld_weight · uld.
        cross_entropy: the student's token mean, without its weight.
        uld: the distance reduced as the convention says, without its weight.
    """

    total: jax.Array
    cross_entropy: jax.Array
    uld: jax.Array


@dataclass(frozen=True)
class Convention:
    """What one published code compares and how it averages.

    Attributes:
        select: (labels [B, T], ignore_index) -> bool[B, T], the positions whose logits count.
        reduce: (distance [B, A], valid bool[B, A]) -> the reduced distance.
    """

    select: Callable[[jax.Array, int], jax.Array]
    reduce: Callable[[jax.Array, jax.Array], LossOut]


def distillation_loss(
    student_logits: jax.Array,
    teacher_logits: jax.Array,
    student_labels: jax.Array,
    teacher_labels: jax.Array,
    *,
    convention: str = "official",
    uld_weight: float | jax.Array = 1.5,
    ce_weight: float | jax.Array = 1.0,
    student_temperature: float | jax.Array = 1.0,
    teacher_temperature: float | jax.Array = 1.0,
    skip_student_eos: bool = False,
    skip_teacher_eos: bool = False,
    ignore_index: int = -100,
    method: str = "auto",
) -> DistillationLoss:
    """Cross-entropy plus ULD, the i-th answer position of one side against the i-th of the other.

    total = ce_weight · CE + uld_weight · ULD. Answer positions are found by mask, so an answer may
    come in several turns. A row without a compared position counts neither in the sum nor in the
    weight, and what lies at positions that do not count, NaN included, reaches neither the loss
    nor the gradient.

    ========== ==========================================================================
    convention ULD
    ========== ==========================================================================
    official   mean over the compared positions of a row, then over the rows: the code released
               with the paper. Its own training run used skip_student_eos=True.
    token_mean sum over all compared positions / their number: accumulation and data
               parallelism agree with one large batch.
    ========== ==========================================================================

    Args:
        student_logits: [B, T, V], any float type. The gradient flows here only.
        teacher_logits: [B, S, U], any float type.
        student_labels: i32[B, T], the answer's token ids, `ignore_index` elsewhere; not shifted.
        teacher_labels: i32[B, S], likewise.
        convention: a key of `CONVENTIONS`.
        uld_weight: weight of the distance.
        ce_weight: weight of the cross-entropy.
        student_temperature: divisor of the student's logits in the distance (not in the CE).
        teacher_temperature: divisor of the teacher's logits.
        skip_student_eos: leave the last answer position of each student row out of the distance.
        skip_teacher_eos: likewise for the teacher.
        ignore_index: the label of a token that is not part of the answer.
        method: how to compute the distance, see `uld`.

    Returns:
        The total and its unweighted parts.

    Raises:
        ValueError: for an unknown convention or method.

    Example:
        >>> import jax.numpy as jnp
        >>> from uld_jax.losses import distillation_loss
        >>> labels = jnp.array([[-100, 2, 1]])
        >>> loss = distillation_loss(jnp.zeros((1, 3, 4)), jnp.zeros((1, 3, 8)), labels, labels)
        >>> round(float(loss.cross_entropy), 4), float(loss.uld), round(float(loss.total), 4)
        (1.3863, 1.0, 2.8863)

    Reference:
        Boizard et al., arXiv 2402.12030, section 3, and the code released with it.
    """
    rule = _convention(convention)
    student_BT = rule.select(student_labels, ignore_index)
    teacher_BS = rule.select(teacher_labels, ignore_index)
    student_BT = _without_last(student_BT) if skip_student_eos else student_BT
    teacher_BS = _without_last(teacher_BS) if skip_teacher_eos else teacher_BS

    width = min(student_BT.shape[1], teacher_BS.shape[1])
    compared_B = jnp.minimum(student_BT.sum(1), teacher_BS.sum(1))
    valid_BA = jnp.arange(width)[None, :] < compared_B[:, None]
    distance_BA = uld(
        _zero_unless(valid_BA, _selected_first(student_logits, student_BT, width)),
        _zero_unless(valid_BA, _selected_first(teacher_logits, teacher_BS, width)),
        student_temperature=student_temperature,
        teacher_temperature=teacher_temperature,
        method=method,
    )
    distance = rule.reduce(distance_BA, valid_BA).mean
    cross_entropy = _cross_entropy(student_logits, student_labels, ignore_index).mean
    total = ce_weight * cross_entropy + uld_weight * distance
    return DistillationLoss(total=total, cross_entropy=cross_entropy, uld=distance)


def _convention(name: str) -> Convention:
    if name not in CONVENTIONS:
        expected = ", ".join(map(repr, CONVENTIONS))
        raise ValueError(f"convention: unknown {name!r}; expected one of {expected}")
    return CONVENTIONS[name]


def _predicts_answer(labels_BT: jax.Array, ignore_index: int) -> jax.Array:
    """Positions whose logits predict an answer token.

    The released code has no position before an answer that opens the row; it then takes as many
    positions as the answer has tokens, from 0 on, and so one past the last prediction.
    """
    answer_BT = labels_BT != ignore_index
    before_answer_BT = jnp.pad(answer_BT[:, 1:], ((0, 0), (0, 1)))
    opens_row_BT = jnp.cumprod(answer_BT, axis=1, dtype=jnp.int32).astype(bool)
    return before_answer_BT | opens_row_BT


def _without_last(mask_BT: jax.Array) -> jax.Array:
    return mask_BT & (jnp.cumsum(mask_BT, axis=1) < mask_BT.sum(1, keepdims=True))


def _selected_first(logits_BTV: jax.Array, mask_BT: jax.Array, width: int) -> jax.Array:
    """The first `width` selected positions of each row in order, then some others."""
    order_BA = jnp.argsort(~mask_BT, axis=1, stable=True)[:, :width]
    return jnp.take_along_axis(logits_BTV, order_BA[:, :, None], axis=1)


def _zero_unless(mask: jax.Array, logits_V: jax.Array) -> jax.Array:
    """Keep the padding's NaN and inf out of the loss: 0 · NaN would bring them back."""
    return jnp.where(mask[..., None], logits_V, 0)


def _cross_entropy(logits_BTV: jax.Array, labels_BT: jax.Array, ignore_index: int) -> LossOut:
    labels = labels_BT[:, 1:]
    valid = labels != ignore_index
    logits = _zero_unless(valid, logits_BTV[:, :-1])
    logits = logits.astype(jnp.promote_types(logits.dtype, jnp.float32))
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, jnp.where(valid, labels, 0))
    return _token_mean(losses, valid)


def _token_mean(losses: jax.Array, valid: jax.Array) -> LossOut:
    weights = valid.astype(losses.dtype)
    return LossOut(sum=(losses * weights).sum(), weight=weights.sum())


def _mean_of_row_means(losses_BA: jax.Array, valid_BA: jax.Array) -> LossOut:
    row_means_B = jax.vmap(lambda losses, valid: _token_mean(losses, valid).mean)(
        losses_BA, valid_BA
    )
    return _token_mean(row_means_B, valid_BA.any(1))


CONVENTIONS: Mapping[str, Convention] = MappingProxyType(
    {
        "official": Convention(select=_predicts_answer, reduce=_mean_of_row_means),
        "token_mean": Convention(select=_predicts_answer, reduce=_token_mean),
    }
)
