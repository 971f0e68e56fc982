"""The shapes of the models that the shipped configs name, as their config.json say them."""

import json

_LLAMA = {"model_type": "llama", "hidden_act": "silu", "rms_norm_eps": 1e-5}
_ROPE = {
    "rope_type": "llama3",
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
_PYTHIA = {
    "model_type": "gpt_neox",
    "vocab_size": 50304,
    "max_position_embeddings": 2048,
    "rotary_pct": 0.25,
    "use_parallel_residual": True,
}


def _llama(width, layers, heads, kv_heads, mlp, vocab, positions, **more):
    return _LLAMA | {
        "hidden_size": width,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "intermediate_size": mlp,
        "vocab_size": vocab,
        "max_position_embeddings": positions,
        **more,
    }


def _pythia(width, layers, heads):
    return _PYTHIA | {
        "hidden_size": width,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "intermediate_size": 4 * width,
    }


# Name to what its config.json has, and how many parameters the model's card counts.
MODELS = {
    "Llama-2-7b-chat-hf": (_llama(4096, 32, 32, 32, 11008, 32000, 4096), 6.74e9),
    "Mistral-7B-Instruct-v0.2": (
        _llama(4096, 32, 32, 8, 14336, 32000, 32768, rope_theta=1e6)
        | {"model_type": "mistral", "sliding_window": None},
        7.24e9,
    ),
    "Llama-3.1-70B-Instruct": (
        _llama(
            8192,
            80,
            64,
            8,
            28672,
            128256,
            131072,
            rope_theta=5e5,
            rope_scaling=_ROPE | {"factor": 8.0},
        ),
        70.6e9,
    ),
    "Llama-3.2-1B": (
        _llama(
            2048,
            16,
            32,
            8,
            8192,
            128256,
            131072,
            head_dim=64,
            rope_theta=5e5,
            rope_scaling=_ROPE | {"factor": 32.0},
            tie_word_embeddings=True,
        ),
        1.24e9,
    ),
    "Qwen2.5-72B-Instruct": (
        _llama(8192, 80, 64, 8, 29568, 152064, 32768, rope_theta=1e6)
        | {"model_type": "qwen2", "rms_norm_eps": 1e-6},
        72.7e9,
    ),
    "gemma-2-2b": (
        {
            "model_type": "gemma2",
            "hidden_size": 2304,
            "num_hidden_layers": 26,
            "num_attention_heads": 8,
            "num_key_value_heads": 4,
            "head_dim": 256,
            "intermediate_size": 9216,
            "vocab_size": 256000,
            "max_position_embeddings": 8192,
            "sliding_window": 4096,
            "query_pre_attn_scalar": 256,
        },
        2.61e9,
    ),
    "opt-350m": (
        {
            "model_type": "opt",
            "hidden_size": 1024,
            "word_embed_proj_dim": 512,
            "num_hidden_layers": 24,
            "num_attention_heads": 16,
            "ffn_dim": 4096,
            "vocab_size": 50272,
            "max_position_embeddings": 2048,
            "do_layer_norm_before": False,
        },
        331e6,
    ),
    "pythia-160m": (_pythia(768, 12, 12), 162e6),
    "pythia-410m": (_pythia(1024, 24, 16), 405e6),
    "pythia-1b": (_pythia(2048, 16, 8), 1.01e9),
    "bloomz-560m": (
        {
            "model_type": "bloom",
            "hidden_size": 1024,
            "n_layer": 24,
            "n_head": 16,
            "vocab_size": 250880,
        },
        559e6,
    ),
    "mt0-base": (
        {
            "model_type": "mt5",
            "d_model": 768,
            "d_kv": 64,
            "d_ff": 2048,
            "num_layers": 12,
            "num_decoder_layers": 12,
            "num_heads": 12,
            "vocab_size": 250112,
            "feed_forward_proj": "gated-gelu",
            "tie_word_embeddings": False,
        },
        582e6,
    ),
}


_LAYERS = ("num_hidden_layers", "n_layer", "num_layers", "num_decoder_layers")


def write(name, root, *, layers=None):
    """Writes a model's config.json, perhaps with fewer layers; returns its directory."""
    config = MODELS[name.removesuffix("-deduped")][0]
    if layers is not None:
        config = config | {key: layers for key in _LAYERS if key in config}
    directory = root / name
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps(config))
    return directory
