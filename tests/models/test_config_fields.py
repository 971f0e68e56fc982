"""Every field of a config counts: published ones open, and what we do not do is named."""

import json

import pytest
import transformers

from uld_jax.errors import UserError
from uld_jax.models.families import FAMILIES, by_model_type, config_of_gguf, config_of_hf

# What Hugging Face configs on the hub say, less the ids and sizes that all of them have.
GPT2 = {
    "model_type": "gpt2",
    "activation_function": "gelu_new",
    "attn_pdrop": 0.1,
    "initializer_range": 0.02,
    "n_ctx": 1024,
    "n_positions": 1024,
    "resid_pdrop": 0.1,
    "summary_activation": None,
    "summary_first_dropout": 0.1,
    "summary_proj_to_labels": True,
    "summary_type": "cls_index",
    "summary_use_proj": True,
    "task_specific_params": {"text-generation": {"do_sample": True, "max_length": 50}},
}
SMOLLM2 = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "attention_bias": False,
    "initializer_range": 0.041666666666666664,
    "is_llama_config": True,
    "pretraining_tp": 1,
    "rope_interleaved": False,
    "rope_scaling": None,
    "rope_theta": 100000,
    "torch_dtype": "bfloat16",
    "transformers.js_config": {"kv_cache_dtype": {"q4f16": "float16", "fp16": "float16"}},
    "use_cache": True,
}
LLAMA3 = {
    "model_type": "llama",
    "eos_token_id": [128001, 128008, 128009],
    "rope_scaling": {
        "factor": 32.0,
        "high_freq_factor": 4.0,
        "low_freq_factor": 1.0,
        "original_max_position_embeddings": 8192,
        "rope_type": "llama3",
    },
    "rope_theta": 500000.0,
    "temperature": 0.6,
    "unsloth_fixed": True,
}
QWEN = {
    "model_type": "qwen2",
    "max_window_layers": 21,
    "sliding_window": 32768,
    "use_mrope": False,
    "use_sliding_window": False,
}
GEMMA2 = {
    "model_type": "gemma2",
    "attn_logit_softcapping": 50.0,
    "cache_implementation": "hybrid",
    "hidden_act": "gelu_pytorch_tanh",
    "hidden_activation": "gelu_pytorch_tanh",
    "sliding_window_size": 0,
}
GEMMA3 = {
    "model_type": "gemma3_text",
    "attn_logit_softcapping": None,
    "cache_implementation": "hybrid",
    "rope_local_base_freq": 10000,
    "rope_scaling": None,
    "sliding_window": 512,
    "sliding_window_pattern": 6,
    "use_bidirectional_attention": False,
}
PHI4 = {
    "model_type": "phi3",
    "attention_bias": False,
    "auto_map": {"AutoConfig": "configuration_phi3.Phi3Config"},
    "full_attn_mod": 1,
    "interpolate_factor": 1,
    "lm_head_bias": False,
    "mlp_bias": False,
    "original_max_position_embeddings": 4096,
    "partial_rotary_factor": 0.75,
    "rope_scaling": None,
    "sliding_window": 262144,
}
BLOOM = {
    "model_type": "bloom",
    "apply_residual_connection_post_layernorm": False,
    "attention_softmax_in_fp32": True,
    "bias_dropout_fusion": True,
    "masked_softmax_fusion": True,
    "n_embed": 1024,
    "n_inner": None,
    "offset_alibi": 100,
    "pretraining_tp": 1,
    "seq_length": 2048,
    "skip_bias_add": True,
    "skip_bias_add_qkv": False,
    "unk_token_id": 0,
}
T5 = {
    "model_type": "t5",
    "decoder_start_token_id": 0,
    "feed_forward_proj": "gated-gelu",
    "is_encoder_decoder": True,
    "n_positions": 512,
    "output_past": True,
    "task_specific_params": {"summarization": {"max_length": 200, "prefix": "summarize: "}},
    "tie_word_embeddings": False,
}
PUBLISHED = {
    "gpt2": GPT2,
    "smollm2": SMOLLM2,
    "llama3.2": LLAMA3,
    "qwen2.5": QWEN,
    "smollm3": {"model_type": "smollm3", "no_rope_layer_interval": 4, "pretraining_tp": 2},
    "gemma": {"model_type": "gemma", "hidden_act": "gelu", "hidden_activation": None},
    "gemma2": GEMMA2,
    "gemma3": GEMMA3,
    "phi4-mini": PHI4,
    "pythia": {"model_type": "gpt_neox", "rotary_emb_base": 10000, "rotary_pct": 0.25},
    "opt": {"model_type": "opt", "activation_dropout": 0.0, "layerdrop": 0.0, "prefix": "</s>"},
    "bloom": BLOOM,
    "falcon": {"model_type": "falcon", "alibi": False, "multi_query": True, "num_kv_heads": 71},
    "flan-t5": T5,
    "mt0": {
        "model_type": "mt5",
        "feed_forward_proj": "gated-gelu",
        "tokenizer_class": "T5Tokenizer",
    },
}
# Whatever a class has that changes the model and that its family does not do.
UNSUPPORTED = {
    "bloom": {"apply_residual_connection_post_layernorm": True},
    "falcon": {"alibi": True},
    "gemma": {"use_bidirectional_attention": True},
    "gemma2": {"use_bidirectional_attention": True, "hidden_act": "relu"},
    "gemma3_text": {"attn_logit_softcapping": 20.0, "attention_bias": True},
    "gpt2": {"scale_attn_by_inverse_layer_idx": True, "add_cross_attention": True},
    "llama": {"per_layer_config": {"0": {"hidden_act": "relu"}}, "hidden_act": "relu"},
    "opt": {"layer_norm_elementwise_affine": False},
    "t5": {"feed_forward_proj": "gated-tanh"},
}


def read(directory, raw):
    """Our config of a config.json, by the way that a directory takes."""
    path = directory / "config.json"
    path.write_text(json.dumps(raw))
    hf = transformers.AutoConfig.from_pretrained(directory, trust_remote_code=False).to_dict()
    return config_of_hf(by_model_type(raw["model_type"], str(path)), hf, str(path))


def refusal(directory, raw):
    with pytest.raises(UserError) as caught:
        read(directory, raw)
    message = str(caught.value)
    assert message.startswith(f"{directory / 'config.json'}: model_type '{raw['model_type']}': ")
    assert message.endswith("use a model without that, or take out what does not change its logits")
    assert "\n" not in message
    return message


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_configs_open(tmp_path, name):
    assert read(tmp_path, PUBLISHED[name]).family == PUBLISHED[name]["model_type"]


def test_a_rotated_part_counts_where_it_is_said(tmp_path):
    assert read(tmp_path, PHI4).rope_fraction == 0.75
    part = {"partial_rotary_factor": 0.5}
    assert "partial_rotary_factor=0.5" in refusal(tmp_path, {"model_type": "opt"} | part)
    rope = {"rope_theta": 1e4, "partial_rotary_factor": 0.25, "rope_type": "default"}
    raw = {"model_type": "phi3", "rope_parameters": rope} | part
    assert "partial_rotary_factor=0.5" in refusal(tmp_path, raw)


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.model_type)
def test_every_family_names_every_field_that_it_does_not_know(tmp_path, family):
    raw = {"model_type": family.model_type, "made_up": 3, "expert_count": [8]}
    assert "unsupported: expert_count=[8], made_up=3;" in refusal(tmp_path, raw)
    # What asks for nothing, and what only training or generation look at.
    harmless = {"made_up": None, "num_experts": 0, "dropout": 0.3, "temperature": 2.0}
    usual = read(tmp_path, {"model_type": family.model_type})
    assert read(tmp_path, {"model_type": family.model_type} | harmless) == usual


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.model_type)
def test_no_field_of_the_transformers_class_is_overlooked(tmp_path, family):
    """A field is read, or is known to be harmless, or is refused once it is not the default."""
    defaults = transformers.AutoConfig.for_model(family.model_type).to_dict()
    asked = UNSUPPORTED.get(family.model_type, {})
    for name, value in asked.items():
        assert f"{name}=" in refusal(tmp_path, {"model_type": family.model_type, name: value})
    flags = [name for name, value in defaults.items() if isinstance(value, bool)]
    assert flags
    usual = config_of_hf(family, defaults, "config.json")
    idle = set()
    for name in flags:
        try:
            if config_of_hf(family, defaults | {name: not defaults[name]}, "here") == usual:
                idle.add(name)
        except UserError as error:
            assert f"{name}=" in str(error)  # noqa: PT017 (most flags are no error)
    # Flags that change neither our config nor are refused: transformers works the last four into
    # other fields, or has done so already.
    assert idle <= {
        *("is_decoder", "output_attentions", "output_hidden_states", "return_dict", "use_cache"),
        *("reorder_and_upcast_attn", "slow_but_exact", "summary_proj_to_labels"),
        *("summary_use_proj", "use_sliding_window"),
        *(("tie_word_embeddings",) if "t5" in family.model_type else ()),
        *(("multi_query", "parallel_attn") if family.model_type == "falcon" else ()),
    }


def test_a_value_and_a_field_are_named_in_one_message(tmp_path):
    raw = {"model_type": "gpt2", "activation_function": "tanh", "made_up": 3}
    message = refusal(tmp_path, raw | {"add_cross_attention": True})
    for part in ("activation_function='tanh'", "add_cross_attention=True, made_up=3"):
        assert part in message


def test_gguf_metadata_is_read_in_full():
    meta = {
        "general.architecture": "llama",
        "general.anything": 3,
        "llama.attention.head_count": 4,
        "llama.attention.layer_norm_rms_epsilon": 1e-5,
        "llama.block_count": 2,
        "llama.context_length": 64,
        "llama.embedding_length": 32,
        "llama.feed_forward_length": 48,
        "llama.rope.dimension_count": 8,
        "llama.vocab_size": 70,
        "tensors": {"token_embd.weight": (70, 32)},
    }
    family = by_model_type("llama", "m.gguf")
    config = config_of_gguf(family, meta, "m.gguf")
    assert (config.vocab_size, config.head_dim) == (70, 8)
    for changes, named in (
        ({"llama.expert_count": 8, "llama.pooling": 1}, "llama.expert_count=8, llama.pooling=1"),
        ({"llama.rope.dimension_count": 4}, "rope.dimension_count=4"),
        ({"llama.attention.value_length": 16}, "attention.value_length=16"),
        ({"llama.rope.scaling.type": "yarn"}, "rope_scaling='yarn'"),
    ):
        with pytest.raises(UserError) as caught:
            config_of_gguf(family, meta | changes, "m.gguf")
        assert str(caught.value).startswith("m.gguf: ")
        assert f"unsupported: {named}; use a model" in str(caught.value)
