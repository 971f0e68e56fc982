"""The loss of a run: what is compared with the teacher, and how much each part counts."""

import dataclasses

from uld_jax.config import rules

# Divergences over the tokens that both vocabularies have, by the names of `losses.DIVERGENCES`.
DIVERGENCES = ("kl", "reverse_kl", "skewed_kl", "skewed_reverse_kl", "jsd", "tvd")
DISTANCES = ("uld", *DIVERGENCES, "hybrid", "transport")


@dataclasses.dataclass(frozen=True)
class LossConfig:
    """The distillation loss, total = ce_weight * CE + uld_weight * ULD, or * another distance.

    Attributes:
        uld_weight: the paper's lambda, of whichever distance; 0 = text distillation alone.
        ce_weight: of the cross-entropy.
        distance: from the teacher: uld | over the tokens that both vocabularies have, kl,
            reverse_kl, skewed_kl, skewed_reverse_kl, jsd or tvd (all others are one more token) |
            hybrid (jsd on these, sorted L1 on the rest) | transport (an exchange costs the edit
            distance of the tokens' texts).
        beta: the teacher's share of the mixture in jsd and hybrid.
        alpha: share of the other side that the skewed divergences mix in.
        transport_top_k: likeliest tokens of each side that transport tells apart.
        transport_epsilon: strength of its regularisation, as a share of the largest cost.
        student_temperature: divides the student's logits in the distance.
        teacher_temperature: divides the teacher's logits in the distance.
        convention: which positions and which mean: token_mean | official (the released code).
        skip_student_eos: leave the student's last answer position out of ULD.
        skip_teacher_eos: leave the teacher's last answer position out of ULD.
        alignment: which answer positions ULD compares: positional (the i-th with the i-th, as in
            the paper) | span (those where both are to go on from the same text).
        method: of ULD: auto (the faster one for the size) | sort (exact) | level_set (counts).
        label_smoothing: of the cross-entropy.
        z_loss: weight of the squared log-normaliser that is added to the cross-entropy.
        chunk_size: answer positions whose logits exist at a time.
        hidden_weight: of the distance between hidden states at the aligned positions, which is
            added to the total; the student's go through a learned projection. Needs teachers whose
            mode is online, as attention_weight does.
        hidden_kind: mse (squared error, TinyBERT) | cosine (1 - cosine similarity, DistilBERT).
        attention_weight: of the distance between attention maps over the aligned positions, which
            is added to the total.
        attention_kind: mse (squared error, TinyBERT) | kl (from teacher to student, MiniLM).
        feature_layers: which layers both compare: last (the student's last with the teacher's) |
            all (each of the student's with one of the teacher's, evenly spread).
    """

    uld_weight: float = rules.at_least(0, 1.5)
    ce_weight: float = rules.at_least(0, 1.0)
    distance: str = rules.choice(*DISTANCES)
    beta: float = rules.fraction(0.5)
    alpha: float = rules.fraction(0.1)
    transport_top_k: int = rules.at_least(1, 64)
    transport_epsilon: float = rules.positive(0.05)
    student_temperature: float = rules.positive(1.0)
    teacher_temperature: float = rules.positive(1.0)
    convention: str = rules.choice("token_mean", "official")
    skip_student_eos: bool = True
    skip_teacher_eos: bool = False
    alignment: str = rules.choice("positional", "span")
    method: str = rules.choice("auto", "sort", "level_set")
    label_smoothing: float = rules.share(0.0)
    z_loss: float = rules.at_least(0, 0.0)
    chunk_size: int = rules.at_least(1, 32)
    hidden_weight: float = rules.at_least(0, 0.0)
    hidden_kind: str = rules.choice("mse", "cosine")
    attention_weight: float = rules.at_least(0, 0.0)
    attention_kind: str = rules.choice("mse", "kl")
    feature_layers: str = rules.choice("last", "all")

    @property
    def asks_teachers(self) -> bool:
        """Whether any part of it is about a teacher; else it is text distillation alone."""
        return max(self.uld_weight, self.hidden_weight, self.attention_weight) > 0
