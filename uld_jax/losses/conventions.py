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
        reduce: (distance [B, A], valid bool[B, A], student's answer bool[B, T]) -> the reduced
            distance.
        takes_mask: whether a mask, and not the labels, says which positions count; there is then
            no last answer position to skip either.
    """

    select: Callable[[jax.Array, int], jax.Array]
    reduce: Callable[[jax.Array, jax.Array, jax.Array], LossOut]
    takes_mask: bool = False


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
    student_mask: jax.Array | None = None,
    ignore_index: int = -100,
    method: str = "auto",
) -> DistillationLoss:
    """Cross-entropy plus ULD, the i-th answer position of one side against the i-th of the other.

    total = ce_weight · CE + uld_weight · ULD. Answer positions are found by mask, so an answer may
    come in several turns. A row without a compared position counts neither in the sum nor in the
    weight, and what lies at positions that do not count, NaN included, reaches neither the loss
    nor the gradient.

    ============ ===================================================================== ========
    convention   ULD                                                                   EOS skip
    ============ ===================================================================== ========
    official     mean over the compared positions of a row, then over the rows: the    student
                 code released with the paper.
    token_mean   sum over all compared positions / their number: accumulation and      ours
                 data parallelism agree with one large batch.
    trl_bayesian the same as official. TRL's default is ce_weight=0, uld_weight=1.     both
    trl_observed official, but with the logits at the answer tokens, which predict     both
                 the tokens after them: off by one, for comparison only.
    dskd         sum over all compared positions / the student's answer tokens;        none
                 its rate r is ce_weight=1 - r, uld_weight=r.
    tokenkit     token_mean of every position t, prompt included, against the          none
                 teacher's position t; `student_mask` leaves padding out.
    ============ ===================================================================== ========

    The last column is what the published code skips by default; here the caller says it. Distances
    are in [0, 2). Faults of those codes that are no part of a convention are left out: NaN where
    the EOS skip empties an answer, rows without a compared position in the mean, several turns
    read as one span, a softmax in bf16.

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
        student_mask: bool[B, T], the positions that `tokenkit` compares; all where None.
        ignore_index: the label of a token that is not part of the answer.
        method: how to compute the distance, see `uld`.

    Returns:
        The total and its unweighted parts.

    Raises:
        ValueError: for an unknown convention or method, or an argument that the convention ignores.

    Example:
        >>> import jax.numpy as jnp
        >>> from uld_jax.losses import distillation_loss
        >>> labels = jnp.array([[-100, 2, 1]])
        >>> loss = distillation_loss(jnp.zeros((1, 3, 4)), jnp.zeros((1, 3, 8)), labels, labels)
        >>> round(float(loss.cross_entropy), 4), float(loss.uld), round(float(loss.total), 4)
        (1.3863, 1.0, 2.8863)

    Reference:
        Boizard et al., arXiv 2402.12030, section 3, and the code released with it; the GOLD trainer
        of TRL; Zhang et al., "Dual-Space Knowledge Distillation", arXiv 2406.17328; the tokenkit
        library of Minixhofer et al., arXiv 2503.20083.
    """
    rule = _convention(convention)
    skips = {"skip_student_eos": skip_student_eos, "skip_teacher_eos": skip_teacher_eos}
    _refuse_ignored(convention, rule, {**skips, "student_mask": student_mask is not None})
    student_BT = rule.select(student_labels, ignore_index)
    teacher_BS = rule.select(teacher_labels, ignore_index)
    student_BT = _without_last(student_BT) if skip_student_eos else student_BT
    teacher_BS = _without_last(teacher_BS) if skip_teacher_eos else teacher_BS

    width = min(student_BT.shape[1], teacher_BS.shape[1])
    compared_B = jnp.minimum(student_BT.sum(1), teacher_BS.sum(1))
    valid_BA = jnp.arange(width)[None, :] < compared_B[:, None]
    if student_mask is not None:
        valid_BA &= student_mask[:, :width].astype(bool)
    distance_BA = uld(
        _zero_unless(valid_BA, _selected_first(student_logits, student_BT, width)),
        _zero_unless(valid_BA, _selected_first(teacher_logits, teacher_BS, width)),
        student_temperature=student_temperature,
        teacher_temperature=teacher_temperature,
        method=method,
    )
    distance = rule.reduce(distance_BA, valid_BA, student_labels != ignore_index).mean
    cross_entropy = _cross_entropy(student_logits, student_labels, ignore_index).mean
    total = ce_weight * cross_entropy + uld_weight * distance
    return DistillationLoss(total=total, cross_entropy=cross_entropy, uld=distance)


def _convention(name: str) -> Convention:
    if name not in CONVENTIONS:
        expected = ", ".join(map(repr, CONVENTIONS))
        raise ValueError(f"convention: unknown {name!r}; expected one of {expected}")
    return CONVENTIONS[name]


def _refuse_ignored(name: str, rule: Convention, given: Mapping[str, bool]) -> None:
    for argument, is_given in given.items():
        if is_given and rule.takes_mask != (argument == "student_mask"):
            readers = [key for key, r in CONVENTIONS.items() if r.takes_mask != rule.takes_mask]
            raise ValueError(
                f"{argument}: expected convention {' or '.join(map(repr, readers))}, got {name!r}, "
                "which ignores it"
            )


def _predicts_answer(labels_BT: jax.Array, ignore_index: int) -> jax.Array:
    """Positions whose logits predict an answer token.

    The released code has no position before an answer that opens the row; it then takes as many
    positions as the answer has tokens, from 0 on, and so one past the last prediction.
    """
    answer_BT = labels_BT != ignore_index
    before_answer_BT = jnp.pad(answer_BT[:, 1:], ((0, 0), (0, 1)))
    opens_row_BT = jnp.cumprod(answer_BT, axis=1, dtype=jnp.int32).astype(bool)
    return before_answer_BT | opens_row_BT


def _is_answer(labels_BT: jax.Array, ignore_index: int) -> jax.Array:
    """Positions that hold an answer token; their logits predict the token after it."""
    return labels_BT != ignore_index


def _everything(labels_BT: jax.Array, ignore_index: int) -> jax.Array:
    return jnp.ones(labels_BT.shape, bool)


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


def _mean_of_positions(losses_BA: jax.Array, valid_BA: jax.Array, answer_BT: jax.Array) -> LossOut:
    return _token_mean(losses_BA, valid_BA)


def _mean_of_row_means(losses_BA: jax.Array, valid_BA: jax.Array, answer_BT: jax.Array) -> LossOut:
    row_means_B = jax.vmap(lambda losses, valid: _token_mean(losses, valid).mean)(
        losses_BA, valid_BA
    )
    return _token_mean(row_means_B, valid_BA.any(1))


def _per_answer_token(losses_BA: jax.Array, valid_BA: jax.Array, answer_BT: jax.Array) -> LossOut:
    # A token that opens a row is predicted by nothing: the cross-entropy does not count it either.
    weight = answer_BT[:, 1:].sum().astype(losses_BA.dtype)
    return LossOut(sum=_token_mean(losses_BA, valid_BA).sum, weight=weight)


CONVENTIONS: Mapping[str, Convention] = MappingProxyType(
    {
        "official": Convention(_predicts_answer, _mean_of_row_means),
        "token_mean": Convention(_predicts_answer, _mean_of_positions),
        "trl_bayesian": Convention(_predicts_answer, _mean_of_row_means),
        "trl_observed": Convention(_is_answer, _mean_of_row_means),
        "dskd": Convention(_predicts_answer, _per_answer_token),
        "tokenkit": Convention(_everything, _mean_of_positions, takes_mask=True),
    }
)
