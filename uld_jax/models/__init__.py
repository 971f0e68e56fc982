"""Models: one decoder and one encoder-decoder by config, loading, export and generation."""

from uld_jax.models.config import DecoderConfig, Policy
from uld_jax.models.continuous import Continuation
from uld_jax.models.decode import complete, continue_prompts, end_ids, generate, line_stop_ids
from uld_jax.models.decoder import Decoder, parameters
from uld_jax.models.encoder_decoder import EncoderDecoder
from uld_jax.models.encoder_decoder_config import EncoderDecoderConfig
from uld_jax.models.fingerprint import fingerprint
from uld_jax.models.hf_io import (
    LoadedModel,
    LoadedTokenizer,
    abstract_decoder,
    load,
    load_config,
    load_tokenizer,
    model_class,
    revision_of,
    save_pretrained,
    weights_fingerprint,
)
from uld_jax.models.lora import add_adapters, merged, split_trained
from uld_jax.models.quantization import quantize
from uld_jax.models.sampling import Sampling
from uld_jax.models.vocabulary import tokens_beyond

__all__ = [
    "Continuation",
    "Decoder",
    "DecoderConfig",
    "EncoderDecoder",
    "EncoderDecoderConfig",
    "LoadedModel",
    "LoadedTokenizer",
    "Policy",
    "Sampling",
    "abstract_decoder",
    "add_adapters",
    "complete",
    "continue_prompts",
    "end_ids",
    "fingerprint",
    "generate",
    "line_stop_ids",
    "load",
    "load_config",
    "load_tokenizer",
    "merged",
    "model_class",
    "parameters",
    "quantize",
    "revision_of",
    "save_pretrained",
    "split_trained",
    "tokens_beyond",
    "weights_fingerprint",
]
