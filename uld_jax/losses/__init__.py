"""Distillation losses: pure functions over arrays, no framework and no configuration."""

from uld_jax.losses.aligned import hybrid_loss, merge_probabilities, span_aligned_uld
from uld_jax.losses.comparisons import Comparison, Divergence, Hybrid, Transport, Uld
from uld_jax.losses.conventions import DistillationLoss, distillation_loss
from uld_jax.losses.cross_entropy import cross_entropy
from uld_jax.losses.divergences import (
    DIVERGENCES,
    jensen_shannon_divergence,
    kl_divergence,
    reverse_kl_divergence,
    skewed_kl_divergence,
    skewed_reverse_kl_divergence,
    total_variation_distance,
)
from uld_jax.losses.features import (
    aligned_keys,
    attention_loss,
    attention_map,
    hidden_state_loss,
    layer_map,
)
from uld_jax.losses.fused import (
    FusedLoss,
    fused_divergence_cross_entropy,
    fused_teachers_cross_entropy,
    fused_uld_cross_entropy,
)
from uld_jax.losses.level_set import level_set_uld
from uld_jax.losses.sharded import (
    sharded_uld,
    sharded_uld_cross_entropy,
    vocab_parallel_uld,
)
from uld_jax.losses.sorting import sorted_l1, sorted_probabilities
from uld_jax.losses.teachers import HeadTeacher, SortedTeacher, TokenTeacher
from uld_jax.losses.truncated import truncated_uld
from uld_jax.losses.uld import reference_uld, uld, uld_to_sorted
from uld_jax.types import LossOut

__all__ = [
    "DIVERGENCES",
    "Comparison",
    "DistillationLoss",
    "Divergence",
    "FusedLoss",
    "HeadTeacher",
    "Hybrid",
    "LossOut",
    "SortedTeacher",
    "TokenTeacher",
    "Transport",
    "Uld",
    "aligned_keys",
    "attention_loss",
    "attention_map",
    "cross_entropy",
    "distillation_loss",
    "fused_divergence_cross_entropy",
    "fused_teachers_cross_entropy",
    "fused_uld_cross_entropy",
    "hidden_state_loss",
    "hybrid_loss",
    "jensen_shannon_divergence",
    "kl_divergence",
    "layer_map",
    "level_set_uld",
    "merge_probabilities",
    "reference_uld",
    "reverse_kl_divergence",
    "sharded_uld",
    "sharded_uld_cross_entropy",
    "skewed_kl_divergence",
    "skewed_reverse_kl_divergence",
    "sorted_l1",
    "sorted_probabilities",
    "span_aligned_uld",
    "total_variation_distance",
    "truncated_uld",
    "uld",
    "uld_to_sorted",
    "vocab_parallel_uld",
]
