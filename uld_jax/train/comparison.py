"""What a run compares its student and a teacher by, from the config and both tokenizers."""

from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
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
        return of_ids(loss, ids, ids, (len(student), len(teacher)))
    matched = match_vocabularies(student, teacher)
    if not matched.student.size:
        raise UserError(
            f"loss.distance={loss.distance}: expected tokens that both vocabularies have, found "
            "none; set --config.loss.distance=uld, which needs none"
        )
    return of_ids(loss, matched.student, matched.teacher, (len(student), len(teacher)))


def of_ids(
    loss: LossConfig, student_ids: np.ndarray, teacher_ids: np.ndarray, sizes: tuple[int, int]
) -> Comparison:
    """The same where it is known which ids mean the same text.

    Args:
        loss: The config; its distance is one over matched tokens.
        student_ids: int[M].
        teacher_ids: int[M], the teacher's of the same text.
        sizes: how many tokens student and teacher have. The hybrid weighs its parts by M over the
            latter, as TRL does.

    Returns:
        The comparison.

    Example:
        >>> ids = np.arange(2)
        >>> of_ids(LossConfig(distance="jsd", beta=0.3), ids, ids, (4, 3)).options
        {'beta': 0.3}
    """
    student_vocab, teacher_vocab = sizes
    if loss.distance == "hybrid":
        share = student_ids.size / teacher_vocab
        return Hybrid(student_ids, teacher_ids, matched_weight=share, beta=loss.beta)
    options: dict[str, float] = {}
    if loss.distance == "jsd":
        options = {"beta": loss.beta}
    elif loss.distance.startswith("skewed"):
        options = {"alpha": loss.alpha}
    others = 0 < student_ids.size < min(student_vocab, teacher_vocab)
    return Divergence(loss.distance, student_ids, teacher_ids, options, others)


def ids_of_student(comparison: Divergence, teacher_ids: jax.Array) -> jax.Array:
    """The student's ids of some of the teacher's tokens.

    Args:
        comparison: From `make_comparison`.
        teacher_ids: int[*b].

    Returns:
        int[*b]; −1 for a token that the student has not.

    Example:
        >>> same_text = np.array([5, 7]), np.array([2, 0])
        >>> ids_of_student(Divergence("kl", *same_text), jnp.array([0, 1, 2, 3])).tolist()
        [7, -1, 5, -1]
    """
    ours, theirs = np.asarray(comparison.student_ids), np.asarray(comparison.teacher_ids)
    table = np.full(theirs.max(initial=0) + 1, -1, np.int32)
    table[theirs] = ours
    return jnp.asarray(table).at[teacher_ids].get(mode="fill", fill_value=-1)


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
