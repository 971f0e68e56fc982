"""Distillation losses: pure functions over arrays, no framework and no configuration."""

from uld_jax.losses.conventions import DistillationLoss, distillation_loss
from uld_jax.losses.fused import FusedLoss, fused_uld_cross_entropy
from uld_jax.losses.uld import reference_uld, sorted_probabilities, uld
from uld_jax.types import LossOut

__all__ = [
    "DistillationLoss",
    "FusedLoss",
    "LossOut",
    "distillation_loss",
    "fused_uld_cross_entropy",
    "reference_uld",
    "sorted_probabilities",
    "uld",
]
