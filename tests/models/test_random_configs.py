"""Random configs of every decoder family: the same tensors as transformers', and no field lost."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st

from uld_jax import models
from uld_jax.models import Policy
from uld_jax.models.families import FAMILIES, config_of_hf, hf_names
from uld_jax.testing import toy_tokenizer

DECODERS = [family for family in FAMILIES if family.model_type not in ("t5", "mt5")]
NAMES = [family.model_type for family in DECODERS]
# Where a family calls something by a name of its own.
RENAMED = {
    "gpt2": {
        "hidden_size": "n_embd",
        "num_hidden_layers": "n_layer",
        "num_attention_heads": "n_head",
        "intermediate_size": "n_inner",
        "max_position_embeddings": "n_positions",
    },
    "bloom": {"num_hidden_layers": "n_layer", "num_attention_heads": "n_head"},
    "opt": {"intermediate_size": "ffn_dim"},
}
ABSENT = {
    "bloom": ("intermediate_size", "max_position_embeddings"),
    "falcon": ("intermediate_size",),
}
# Of these the width of a head is the model's width over the heads.
WITHOUT_HEAD_DIM = {"bloom", "falcon", "gpt2", "gpt_neox", "olmo2", "opt", "phi3", "qwen2"}
UNGROUPED = {"bloom", "falcon", "gpt2", "gpt_neox", "opt"}


@st.composite
def hf_configs(draw, model_type):
    """A transformers config of random sizes and settings."""
    kv_heads = draw(st.integers(1, 3))
    heads = kv_heads * draw(st.integers(1, 3))
    head_dim = 2 * draw(st.integers(1, 5))
    layers = draw(st.integers(1, 4))
    free = model_type not in WITHOUT_HEAD_DIM | {"smollm3"}
    width = heads * (2 * draw(st.integers(1, 5)) if free else head_dim)
    fields = {
        "vocab_size": draw(st.integers(5, 90)),
        "hidden_size": width,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "intermediate_size": draw(st.integers(3, 70)),
        "max_position_embeddings": draw(st.integers(8, 4096)),
        "tie_word_embeddings": draw(st.booleans()),
        "pad_token_id": draw(st.sampled_from([None, 0, 3])),
        "bos_token_id": draw(st.sampled_from([None, 1])),
        "eos_token_id": draw(st.sampled_from([None, 2, 4])),
    }
    if model_type not in UNGROUPED:
        fields["num_key_value_heads"] = kv_heads
    if free:
        fields["head_dim"] = head_dim
    if model_type == "opt":
        fields["word_embed_proj_dim"] = draw(st.sampled_from([width, 6]))
        # transformers sets OPT's embedding aside for its padding token.
        fields["pad_token_id"] = 1
    if model_type == "falcon":
        fields["new_decoder_architecture"] = draw(st.booleans())
        fields["num_kv_heads"] = kv_heads
    if model_type == "phi3":
        fields["pad_token_id"] = 0
    if model_type == "smollm3":
        fields["no_rope_layers"] = draw(
            st.lists(st.integers(0, 1), min_size=layers, max_size=layers)
        )
    if model_type in ("mistral", "gemma2", "gemma3_text"):
        fields["sliding_window"] = draw(st.integers(1, 64))
    renamed = RENAMED.get(model_type, {})
    for absent in ABSENT.get(model_type, ()):
        del fields[absent]
    return transformers.AutoConfig.for_model(
        model_type, **{renamed.get(name, name): value for name, value in fields.items()}
    )


def _tensors(hf_config):
    """Name and shape of what transformers saves, without making any of it."""
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(hf_config)
    tied = model.all_tied_weights_keys
    return {
        name: tuple(tensor.shape) for name, tensor in model.state_dict().items() if name not in tied
    }


@pytest.mark.parametrize("family", DECODERS, ids=NAMES)
@settings(max_examples=12, deadline=None, derandomize=True)
@given(data=st.data())
def test_config_and_tensors_agree_with_transformers(family, data):
    hf_config = data.draw(hf_configs(family.model_type))
    found = _tensors(hf_config)
    ours = config_of_hf(family, hf_config.to_dict() | {"tensors": found}, "config.json")

    again = family.config_to_hf(ours).to_dict()
    assert config_of_hf(family, again | {"tensors": found}, "config.json") == ours

    state = nnx.state(models.abstract_decoder(ours, Policy(), "float32"))
    params = {".".join(map(str, path)): param for path, param in nnx.to_flat_state(state)}
    weights = family.weights(ours)
    assert sorted(weight.path for weight in weights if weight.part is None) == sorted(
        params.keys() - {weight.path for weight in weights if weight.part is not None}
    )
    names = {name for weight in weights for name in hf_names(weight, ours.layers)}
    buffers = tuple(family.ignored)
    assert names == {name for name in found if not name.endswith(buffers or ("\0",))}


@settings(max_examples=5, deadline=None, derandomize=True)
@given(hf_config=hf_configs("llama"), seed=st.integers(0, 99))
def test_logits_of_random_sizes_equal_transformers(tmp_path_factory, hf_config, seed):
    torch.manual_seed(seed)
    hf_config.vocab_size, hf_config.initializer_range = 300, 0.3
    theirs = transformers.LlamaForCausalLM(hf_config).eval()
    directory = tmp_path_factory.mktemp("random")
    theirs.save_pretrained(directory)
    toy_tokenizer().save_pretrained(directory)
    tokens = np.random.default_rng(seed).integers(3, 300, (2, 7))
    with torch.no_grad():
        expected = theirs(torch.tensor(tokens)).logits.numpy()
    found = jax.device_get(models.load(directory).model(jnp.array(tokens)))
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)
