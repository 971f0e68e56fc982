"""How much arithmetic a model needs, from its config alone."""

from uld_jax.models.config import DecoderConfig
from uld_jax.models.encoder_decoder_config import EncoderDecoderConfig


def forward_flops(
    config: DecoderConfig | EncoderDecoderConfig,
    *,
    rows: int,
    length: int,
    encoder_length: int = 0,
    positions: int = 0,
    context: int = 0,
) -> int:
    """Floating-point operations of a forward pass over padded rows.

    2·N·tokens + 4·layers·heads·head_dim·(pairs of a query and a key), where N are the weights that
    hidden states are multiplied with. Norms, activations and softmax are left out, and attention
    masks save nothing. A backward pass costs twice as much, once where only adapters are trained.

    Args:
        config: Of the model.
        rows: Sequences.
        length: Tokens of each (of an encoder-decoder: of its decoder).
        encoder_length: Tokens of each in the encoder.
        positions: Hidden states in all that are multiplied with the head.
        context: Tokens of each row that were read before, whose keys are in a cache.

    Returns:
        Additions and multiplications, each counted as one.

    Source:
        "PaLM: Scaling Language Modeling with Pathways", appendix B.

    Example:
        >>> config = DecoderConfig(family="llama", vocab_size=32, width=8, layers=2, heads=2,
        ...                        kv_heads=1, head_dim=4, mlp_width=16)
        >>> forward_flops(config, rows=1, length=10)
        29440
    """
    head = 2 * config.vocab_size * positions
    if isinstance(config, DecoderConfig):
        projections = 2 if config.embed_width else 0  # into the residual width, and out of it
        around = 2 * projections * config.embed_width * config.width * rows * length
        head *= config.embed_width or config.width
        return head + around + _stack(config, rows, length, context)
    across = (
        # Queries and outputs of decoder tokens, keys and values of the encoder's.
        2 * 2 * config.width * config.heads * config.head_dim * (length + encoder_length)
        + 4 * config.heads * config.head_dim * length * encoder_length
    )
    return (
        head * config.width
        + _stack(config.encoder, rows, encoder_length)
        + _stack(config.decoder, rows, length, context)
        + config.decoder_layers * rows * across
    )


def _stack(config: DecoderConfig, rows: int, length: int, context: int = 0) -> int:
    attention = 2 * config.width * (config.query_width + config.kv_width)
    mlp = (3 if config.gated else 2) * config.width * config.mlp_width
    per_row = 2 * (attention + mlp) * length + 4 * config.query_width * length * (context + length)
    return config.layers * rows * per_row
