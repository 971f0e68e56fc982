"""Models: one decoder and one encoder-decoder by config, loading, export and generation."""

from uld_jax.models.config import DecoderConfig, Policy
from uld_jax.models.decode import complete, generate
from uld_jax.models.decoder import Decoder, parameters
from uld_jax.models.encoder_decoder import EncoderDecoder
from uld_jax.models.encoder_decoder_config import EncoderDecoderConfig
from uld_jax.models.hf_io import (
    LoadedModel,
    abstract_decoder,
    load,
    model_class,
    save_pretrained,
)
from uld_jax.models.lora import add_adapters, merged, split_trained
from uld_jax.models.quantization import quantize

__all__ = [
    "Decoder",
    "DecoderConfig",
    "EncoderDecoder",
    "EncoderDecoderConfig",
    "LoadedModel",
    "Policy",
    "abstract_decoder",
    "add_adapters",
    "complete",
    "generate",
    "load",
    "merged",
    "model_class",
    "parameters",
    "quantize",
    "save_pretrained",
    "split_trained",
]
