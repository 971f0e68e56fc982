"""What an encoder-decoder language model (T5 and its kin) is made of, as plain fields."""

import dataclasses

from uld_jax.models.config import DecoderConfig


@dataclasses.dataclass(frozen=True)
class EncoderDecoderConfig:
    """T5, mT5, mT0 and Flan-T5: two stacks of pre-norm blocks with relative position biases.

    Args:
        family: The Hugging Face `model_type` it loads from and exports to.
        vocab_size: Rows of the embedding: the logit width, padding rows included.
        width: Residual width D.
        encoder_layers: Blocks of the encoder.
        decoder_layers: Blocks of the decoder.
        heads: Heads H.
        head_dim: Width of one head; H · head_dim need not be D.
        mlp_width: Width of the MLP.
        activation: "silu", "gelu", "gelu_tanh" or "relu".
        gated: The MLP is (act(x · gate) * (x · up)) · down, else act(x · up) · down.
        norm_eps: Epsilon inside the norm.
        buckets: Rows of each stack's table of position biases.
        max_distance: Distance from which on all positions share a bucket.
        tied: The output head is the embedding.
        scaled_head: Hidden states are multiplied by D^-0.5 before the head (T5 1.0).
        start_id: The token that the decoder reads first.
        eos_id: End-of-sequence id, or ids.
        pad_id: Padding id to export, or None.

    Example:
        >>> EncoderDecoderConfig(family="t5", vocab_size=32, width=8, encoder_layers=2,
        ...                      decoder_layers=3, heads=2, head_dim=4, mlp_width=16).decoder.layers
        3
    """

    family: str
    vocab_size: int
    width: int
    encoder_layers: int
    decoder_layers: int
    heads: int
    head_dim: int
    mlp_width: int
    activation: str = "relu"
    gated: bool = False
    norm_eps: float = 1e-6
    buckets: int = 32
    max_distance: int = 128
    tied: bool = True
    scaled_head: bool = True
    start_id: int = 0
    eos_id: int | tuple[int, ...] | None = 1
    pad_id: int | None = 0

    @property
    def encoder(self) -> DecoderConfig:
        """The encoder's blocks, as the decoder's fields describe them."""
        return self._stack(self.encoder_layers)

    @property
    def decoder(self) -> DecoderConfig:
        """The decoder's blocks, apart from their cross-attention."""
        return self._stack(self.decoder_layers)

    @property
    def logit_softcap(self) -> float:
        """No soft-cap on the output logits."""
        return 0.0

    @property
    def max_positions(self) -> int:
        """Relative positions have no end; what fits in an int32."""
        return 2**31 - 1

    def _stack(self, layers: int) -> DecoderConfig:
        return DecoderConfig(
            family=self.family,
            vocab_size=self.vocab_size,
            width=self.width,
            layers=layers,
            heads=self.heads,
            kv_heads=self.heads,
            head_dim=self.head_dim,
            mlp_width=self.mlp_width,
            norm_eps=self.norm_eps,
            activation=self.activation,
            gated=self.gated,
            positions="relative",
            query_scale=1.0,
            tied=self.tied,
        )
