"""Models: one config-driven decoder, loading, export and generation."""

from uld_jax.models.config import DecoderConfig, Policy
from uld_jax.models.decode import complete, generate
from uld_jax.models.decoder import Decoder, parameters
from uld_jax.models.hf_io import LoadedModel, abstract_decoder, load, save_pretrained

__all__ = [
    "Decoder",
    "DecoderConfig",
    "LoadedModel",
    "Policy",
    "abstract_decoder",
    "complete",
    "generate",
    "load",
    "parameters",
    "save_pretrained",
]
