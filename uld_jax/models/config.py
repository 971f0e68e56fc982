"""What a decoder-only language model is made of, family by family, as plain fields."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class DecoderConfig:
    """One decoder covers every family through these fields.

    Args:
        family: The Hugging Face `model_type` it loads from and exports to.
        vocab_size: Rows of the embedding: the logit width, padding rows included.
        width: Residual width D.
        layers: Number of blocks L.
        heads: Query heads H.
        kv_heads: Key and value heads K (K < H: grouped queries; 1: multi-query).
        head_dim: Width of one head.
        mlp_width: Width of the gated MLP.
        norm_eps: Epsilon inside RMSNorm.
        norm_offset: Added to the norm's scale: 0 (Llama) or 1 (Gemma stores scale - 1).
        activation: "silu" (SwiGLU) or "gelu_tanh" (GeGLU).
        qk_norm: RMSNorm over each head's query and key before the rotation.
        post_norms: A second RMSNorm after attention and after the MLP (Gemma 2 and 3).
        rope_theta: Rotary base of layers that attend to everything.
        rope_local_theta: Rotary base of sliding-window layers.
        window: Tokens a sliding-window layer sees, itself included; 0 for none.
        local_layers: One flag a layer: True attends within the window only.
        embed_scale: Factor on the embeddings.
        query_scale: Factor on query-key products.
        attention_softcap: Soft-cap on attention scores; 0 for none.
        logit_softcap: Soft-cap on the output logits; 0 for none.
        tied: The output head is the embedding.
        max_positions: Longest sequence it was trained for.
        bos_id: Beginning-of-sequence id to export, or None.
        eos_id: End-of-sequence id, or ids, to export, or None.
        pad_id: Padding id to export, or None.

    Example:
        >>> DecoderConfig(family="llama", vocab_size=32, width=8, layers=2, heads=2, kv_heads=1,
        ...               head_dim=4, mlp_width=16).query_width
        8
    """

    family: str
    vocab_size: int
    width: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    mlp_width: int
    norm_eps: float = 1e-6
    norm_offset: float = 0.0
    activation: str = "silu"
    qk_norm: bool = False
    post_norms: bool = False
    rope_theta: float = 10_000.0
    rope_local_theta: float = 10_000.0
    window: int = 0
    local_layers: tuple[bool, ...] = ()
    embed_scale: float = 1.0
    query_scale: float = 1.0
    attention_softcap: float = 0.0
    logit_softcap: float = 0.0
    tied: bool = True
    max_positions: int = 2048
    bos_id: int | None = None
    eos_id: int | tuple[int, ...] | None = None
    pad_id: int | None = None

    @property
    def query_width(self) -> int:
        """Width of all query heads together."""
        return self.heads * self.head_dim

    @property
    def kv_width(self) -> int:
        """Width of all key (or value) heads together."""
        return self.kv_heads * self.head_dim


@dataclasses.dataclass(frozen=True)
class Policy:
    """How a model computes, apart from what it is.

    Args:
        dtype: Activations and matrix products, "float32" or "bfloat16"; norms, softmax, losses
            and logits are float32 whatever it says.
        remat: What the backward pass recomputes: "none", "dots" (everything but weight products)
            or "full" (each block from its input).

    Example:
        >>> Policy(dtype="bfloat16", remat="full").remat
        'full'
    """

    dtype: str = "float32"
    remat: str = "none"
