"""Every family against transformers: tiny random models, logits, gradients, cache, round trip."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
import transformers
from flax import nnx

from uld_jax import models
from uld_jax.models.cache import empty_cache
from uld_jax.models.hf_io import to_hf_tensors
from uld_jax.sharding import make_mesh
from uld_jax.testing import toy_tokenizer

COMMON = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "initializer_range": 0.3,
    "attn_implementation": "eager",
}
GEMMA = {
    "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
    "sliding_window": 5,
    "query_pre_attn_scalar": 11,
}
VARIANTS = {
    "llama-tied": lambda: transformers.LlamaConfig(**COMMON, tie_word_embeddings=True),
    "llama-untied": lambda: transformers.LlamaConfig(**COMMON, tie_word_embeddings=False),
    "llama-multi-head": lambda: transformers.LlamaConfig(
        **(COMMON | {"num_key_value_heads": 4, "head_dim": 16})
    ),
    "llama-rope-100k": lambda: transformers.LlamaConfig(
        **COMMON, rope_parameters={"rope_type": "default", "rope_theta": 100_000.0}
    ),
    "gemma3": lambda: transformers.Gemma3TextConfig(**COMMON, **GEMMA),
    "gemma3-multi-query": lambda: transformers.Gemma3TextConfig(
        **(COMMON | {"num_key_value_heads": 1}), **GEMMA
    ),
    "gemma3-softcap": lambda: transformers.Gemma3TextConfig(
        **COMMON, **GEMMA, final_logit_softcapping=3.0
    ),
    "gemma3-untied": lambda: transformers.Gemma3TextConfig(
        **COMMON, **GEMMA, tie_word_embeddings=False
    ),
}
TOKENS = np.random.default_rng(0).integers(3, 64, (2, 12))
WEIGHTS = {
    "blocks.attention.query": "model.layers.1.self_attn.q_proj.weight",
    "blocks.mlp.down": "model.layers.1.mlp.down_proj.weight",
    "blocks.attention_norm": "model.layers.1.input_layernorm.weight",
    "embed": "model.embed_tokens.weight",
}


@pytest.fixture(scope="module", params=VARIANTS, ids=list(VARIANTS))
def pair(request, tmp_path_factory):
    """A tiny random transformers model, and ours loaded from what it saved."""
    torch.manual_seed(0)
    config = VARIANTS[request.param]()
    theirs = transformers.AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        # Norm scales start at one: make them count.
        for name, weight in theirs.named_parameters():
            if "norm" in name:
                weight.add_(0.2 * torch.randn_like(weight))
    directory = tmp_path_factory.mktemp(request.param)
    theirs.save_pretrained(directory)
    toy_tokenizer().save_pretrained(directory)
    return theirs, models.load(directory), directory


def test_logits_equal_transformers(pair):
    theirs, ours, _ = pair
    with torch.no_grad():
        expected = theirs(torch.tensor(TOKENS)).logits.numpy()
    np.testing.assert_allclose(ours.model(jnp.array(TOKENS)), expected, rtol=1e-4, atol=1e-4)


def test_gradients_equal_transformers(pair):
    theirs, ours, _ = pair
    theirs.zero_grad()
    theirs(torch.tensor(TOKENS), labels=torch.tensor(TOKENS)).loss.backward()
    expected = {name: weight.grad.numpy() for name, weight in theirs.named_parameters()}

    graph, state = nnx.split(ours.model)

    def loss(state):
        logits = nnx.merge(graph, state)(jnp.array(TOKENS))[:, :-1]
        labels = jnp.array(TOKENS[:, 1:])
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

    grads = to_hf_tensors(ours.config, jax.grad(loss)(state))
    for name in WEIGHTS.values():
        np.testing.assert_allclose(grads[name], expected[name], rtol=1e-3, atol=2e-5, err_msg=name)


def test_cached_decoding_equals_the_full_forward(pair):
    _, ours, _ = pair
    graph, state = nnx.split(ours.model)

    @jax.jit
    def step(state, token_B1, positions_B1, cache):
        model = nnx.merge(graph, state)
        hidden, cache = model.read(token_B1, positions_B1, cache)
        return model.logits(hidden), cache

    cache = empty_cache(ours.config, 2, 12, "float32")
    full = ours.model(jnp.array(TOKENS))
    for t in range(12):
        positions = jnp.full((2, 1), t)
        logits, cache = step(state, jnp.array(TOKENS[:, t : t + 1]), positions, cache)
        np.testing.assert_allclose(logits[:, 0], full[:, t], rtol=1e-4, atol=1e-4)


def test_padding_on_either_side_changes_nothing(pair):
    _, ours, _ = pair
    full = ours.model(jnp.array(TOKENS))
    pad = np.zeros((2, 3), int)
    for tokens, real in (
        (np.concatenate([TOKENS, pad], 1), slice(0, 12)),
        (np.concatenate([pad, TOKENS], 1), slice(3, 15)),
    ):
        segments = np.zeros(tokens.shape, int)
        segments[:, real] = 1
        positions = np.zeros(tokens.shape, int)
        positions[:, real] = np.arange(12)
        logits = ours.model(jnp.array(tokens), jnp.array(positions), jnp.array(segments))
        np.testing.assert_allclose(logits[:, real], full, rtol=1e-4, atol=1e-4)


def test_packed_segments_do_not_see_each_other(pair):
    _, ours, _ = pair
    packed = jnp.array(np.concatenate([TOKENS[:1, :7], TOKENS[1:, :5]], 1))
    positions = jnp.array([[*range(7), *range(5)]])
    segments = jnp.array([[1] * 7 + [2] * 5])
    logits = ours.model(packed, positions, segments)
    full = ours.model(jnp.array(TOKENS))
    np.testing.assert_allclose(logits[0, :7], full[0, :7], rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(logits[0, 7:], full[1, :5], rtol=1e-4, atol=1e-4)


def test_export_is_the_identity_and_opens_in_transformers(pair, tmp_path):
    theirs, ours, _ = pair
    models.save_pretrained(ours, tmp_path / "out")
    again = models.load(tmp_path / "out")
    assert again.config == ours.config
    for a, b in zip(
        jax.tree.leaves(nnx.state(again.model)), jax.tree.leaves(nnx.state(ours.model)), strict=True
    ):
        np.testing.assert_array_equal(a, b)
    opened = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "out", attn_implementation="eager"
    )
    assert type(opened) is type(theirs)
    with torch.no_grad():
        tokens = torch.tensor(TOKENS)
        torch.testing.assert_close(opened(tokens).logits, theirs(tokens).logits)


def test_sharded_load_computes_the_same(pair):
    _, ours, directory = pair
    if ours.config.kv_width % 2:
        pytest.skip("the kv axis does not divide")
    mesh = make_mesh(2, 2, 2)
    sharded = models.load(directory, mesh=mesh)
    assert len(sharded.model.blocks.mlp.up[...].sharding.device_set) == 8
    graph, state = nnx.split(sharded.model)
    with jax.set_mesh(mesh):
        logits = jax.jit(lambda s, t: nnx.merge(graph, s)(t))(state, np.tile(TOKENS, (2, 1)))
    np.testing.assert_allclose(logits[:2], ours.model(jnp.array(TOKENS)), rtol=1e-4, atol=1e-4)
