"""What a run compares its student and a teacher by, from the config and both tokenizers."""

from typing import TYPE_CHECKING

import numpy as np

from uld_jax.config import LossConfig
from uld_jax.data import TokenBytes, match_vocabularies
from uld_jax.errors import UserError
from uld_jax.losses import Comparison, Divergence, Hybrid, Transport
from uld_jax.losses.transport import LevenshteinCost

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


def make_comparison(
    loss: LossConfig, student: "PreTrainedTokenizerFast", teacher: "PreTrainedTokenizerFast"
) -> Comparison | None:
    """What `loss.distance` names, for a pair of tokenizers.

    Args:
        loss: The config.
        student: The student's tokenizer.
        teacher: A teacher's.

    Returns:
        The comparison; None for ULD, which needs none. Of equal tokenizers all tokens are matched,
        those that stand for no text too.

    Raises:
        UserError: The vocabularies share no token, or transport's packages are missing.

    Example:
        >>> from uld_jax.testing import toy_tokenizer
        >>> pair = toy_tokenizer(), toy_tokenizer(kind="metaspace")
        >>> make_comparison(LossConfig(distance="kl"), *pair).student_ids.size > 20
        True
    """
    if loss.distance == "uld":
        return None
    if loss.distance == "transport":
        return _transport(loss, student, teacher)
    if student.get_vocab() == teacher.get_vocab():
        ids = np.arange(len(student))
        return of_ids(loss, ids, ids, len(teacher))
    matched = match_vocabularies(student, teacher)
    if not matched.student.size:
        raise UserError(
            f"loss.distance={loss.distance}: expected tokens that both vocabularies have, found "
            "none; set --config.loss.distance=uld, which needs none"
        )
    return of_ids(loss, matched.student, matched.teacher, len(teacher))


def of_ids(
    loss: LossConfig, student_ids: np.ndarray, teacher_ids: np.ndarray, teacher_vocab: int
) -> Comparison:
    """The same where it is known which ids mean the same text.

    Args:
        loss: The config; its distance is one over matched tokens.
        student_ids: int[M].
        teacher_ids: int[M], the teacher's of the same text.
        teacher_vocab: how many tokens the teacher has, to which M is set in proportion to weigh
            the parts of the hybrid, as TRL does.

    Returns:
        The comparison.

    Example:
        >>> of_ids(LossConfig(distance="jsd", beta=0.3), np.arange(2), np.arange(2), 4).options
        {'beta': 0.3}
    """
    if loss.distance == "hybrid":
        share = student_ids.size / teacher_vocab
        return Hybrid(student_ids, teacher_ids, matched_weight=share, beta=loss.beta)
    options: dict[str, float] = {}
    if loss.distance == "jsd":
        options = {"beta": loss.beta}
    elif loss.distance.startswith("skewed"):
        options = {"alpha": loss.alpha}
    return Divergence(loss.distance, student_ids, teacher_ids, options)


def _transport(
    loss: LossConfig, student: "PreTrainedTokenizerFast", teacher: "PreTrainedTokenizerFast"
) -> Transport:
    try:
        cost = LevenshteinCost(_texts(student), _texts(teacher))
    except ImportError as error:
        raise UserError(f"loss.distance=transport: {error}") from None
    return Transport(cost, loss.transport_top_k, loss.transport_epsilon)


def _texts(tokenizer: "PreTrainedTokenizerFast") -> list[str]:
    return [
        (text or b"").decode("utf-8", "replace")
        for text in TokenBytes(tokenizer)(range(len(tokenizer)))
    ]
