"""What a decoder-only language model is made of, family by family, as plain fields."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class RopeScaling:
    """How a family stretches its rotary angles beyond the length it was first trained for.

    Args:
        kind: "linear", "dynamic", "llama3", "yarn" or "longrope", as in transformers.
        factor: The stretch.
        original_positions: Longest sequence before the stretch.
        low_frequency: "llama3": waves longer than original / this are stretched in full.
        high_frequency: "llama3": waves shorter than original / this are left alone.
        beta_fast: "yarn": turns within the original length above which a wave is left alone.
        beta_slow: "yarn": turns below which a wave is stretched in full.
        truncate: "yarn": whether the two bounds are whole dimensions.
        attention_factor: Factor on cosine and sine ("yarn", "longrope").
        short_factors: "longrope": one divisor a frequency, up to the original length.
        long_factors: "longrope": one divisor a frequency, beyond it.

    Example:
        >>> RopeScaling("linear", factor=2.0).kind
        'linear'
    """

    kind: str
    factor: float = 1.0
    original_positions: int = 0
    low_frequency: float = 1.0
    high_frequency: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True
    attention_factor: float = 1.0
    short_factors: tuple[float, ...] = ()
    long_factors: tuple[float, ...] = ()


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
        mlp_width: Width of the MLP.
        norm: "rms", or "layer" (LayerNorm with a bias).
        norm_eps: Epsilon inside the norm.
        norm_offset: Added to the norm's scale: 0 (Llama) or 1 (Gemma stores scale - 1).
        norm_placement: Where a block norms: "pre" (attention's and the MLP's input), "sandwich"
            (input and output, Gemma 2 and 3), "output" (before the residual is added, OLMo 2) or
            "post" (after it is added, OPT-350m).
        parallel: Attention and MLP both read the block's input and add up (GPT-NeoX).
        shared_norm: With `parallel`, one norm serves both (Falcon 7B).
        embed_norm: A norm right after the embedding (BLOOM).
        final_norm: A norm before the head; OPT-350m has none.
        activation: "silu", "gelu", "gelu_tanh" or "relu".
        gated: The MLP is (act(x · gate) * (x · up)) · down, else act(x · up) · down.
        qkv_bias: Biases on query, key and value.
        out_bias: A bias on attention's output.
        mlp_bias: Biases in the MLP.
        qk_norm: Norm of query and key before the rotation: "none", "head" (each head's) or "all"
            (all heads' together, OLMo 2).
        positions: "rotary", "learned" or "alibi" (or "relative": a stack of an encoder-decoder).
        position_offset: Rows of the learned position table before position 0 (OPT: 2).
        rope_fraction: Part of each head that is rotated.
        rope_theta: Rotary base of layers that attend to everything.
        rope_local_theta: Rotary base of sliding-window layers.
        rope_scaling: Stretch of the rotary angles of layers that attend to everything, or None.
        rope_local_scaling: The same of sliding-window layers.
        unrotated_layers: One flag a layer: True leaves queries and keys unrotated (SmolLM 3).
        window: Tokens a sliding-window layer sees, itself included; 0 for none.
        local_layers: One flag a layer: True attends within the window only.
        embed_width: Width of the embedding and the head where it is not D (OPT-350m); 0 for D.
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
    norm: str = "rms"
    norm_eps: float = 1e-6
    norm_offset: float = 0.0
    norm_placement: str = "pre"
    parallel: bool = False
    shared_norm: bool = False
    embed_norm: bool = False
    final_norm: bool = True
    activation: str = "silu"
    gated: bool = True
    qkv_bias: bool = False
    out_bias: bool = False
    mlp_bias: bool = False
    qk_norm: str = "none"
    positions: str = "rotary"
    position_offset: int = 0
    rope_fraction: float = 1.0
    rope_theta: float = 10_000.0
    rope_local_theta: float = 10_000.0
    rope_scaling: RopeScaling | None = None
    rope_local_scaling: RopeScaling | None = None
    unrotated_layers: tuple[bool, ...] = ()
    window: int = 0
    local_layers: tuple[bool, ...] = ()
    embed_width: int = 0
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
    def rotary_dim(self) -> int:
        """How many leading dimensions of a head are rotated."""
        return int(self.head_dim * self.rope_fraction)

    @property
    def input_norms(self) -> bool:
        """Whether attention and the MLP read a normed input."""
        return self.norm_placement in ("pre", "sandwich")

    @property
    def output_norms(self) -> bool:
        """Whether what they return is normed before it is added."""
        return self.norm_placement in ("sandwich", "output")

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
        remat: What the backward pass recomputes besides norms, activations and scores: "none",
            "dots" (everything but weight products), "full" (each block from its input) or
            "offload" (as "dots", the products kept in the host's memory).
        attention: How whole sequences attend: "xla", "cudnn" (NVIDIA), "splash" (TPU), or "auto".

    Example:
        >>> Policy(dtype="bfloat16", remat="full").remat
        'full'
    """

    dtype: str = "float32"
    remat: str = "none"
    attention: str = "auto"
