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

IDS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
SIZE = {"vocab_size": 304, "hidden_size": 32, "initializer_range": 0.3} | IDS
EAGER = {"attn_implementation": "eager"}
CLASSIC = SIZE | EAGER | {"num_hidden_layers": 3, "num_attention_heads": 4}
GATED = CLASSIC | {"intermediate_size": 48, "num_key_value_heads": 2, "head_dim": 8}
NARROW = CLASSIC | {"intermediate_size": 48, "num_key_value_heads": 2}
SLIDING = {
    "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
    "sliding_window": 5,
}
GEMMA = SLIDING | {"query_pre_attn_scalar": 11}
# The tests' sequences, of 12 tokens, go beyond the original 8 positions.
ORIGINAL = {"original_max_position_embeddings": 8}
LONGROPE = ORIGINAL | {
    "factor": 4.0,
    "short_factor": [1.0, 1.1, 1.2, 1.3],
    "long_factor": [1.5, 2.0, 4.0, 8.0],
}
LLAMA3 = ORIGINAL | {"factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}


def rope(kind, theta=100.0, **scaling):
    return {"rope_parameters": {"rope_type": kind, "rope_theta": theta, **scaling}}


def llama(**changes):
    return lambda: transformers.LlamaConfig(**(GATED | changes))


def gemma3(**changes):
    return lambda: transformers.Gemma3TextConfig(**(GATED | GEMMA | changes))


def bloom(heads, **changes):
    size = SIZE | EAGER | {"n_layer": 3, "n_head": heads, "hidden_size": 8 * heads}
    return lambda: transformers.BloomConfig(**(size | changes))


def gpt2(**changes):
    size = {"vocab_size": 304, "n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 24}
    return lambda: transformers.GPT2Config(
        **(IDS | EAGER | size | {"initializer_range": 0.3} | changes)
    )


def opt(**changes):
    small = {"ffn_dim": 48, "word_embed_proj_dim": 32, "max_position_embeddings": 24}
    return lambda: transformers.OPTConfig(**(CLASSIC | small | {"init_std": 0.3} | changes))


VARIANTS = {
    "llama-tied": llama(tie_word_embeddings=True),
    "llama-untied": llama(tie_word_embeddings=False),
    "llama-multi-head": llama(num_key_value_heads=4, head_dim=16),
    "llama-biases": llama(attention_bias=True, mlp_bias=True),
    "llama-rope-100k": llama(**rope("default", 1e5)),
    "llama-rope-linear": llama(**rope("linear", factor=3.0)),
    "llama-rope-dynamic": llama(**rope("dynamic", factor=3.0), max_position_embeddings=8),
    "llama-rope-llama3": llama(**rope("llama3", **LLAMA3)),
    "llama-rope-yarn": llama(**rope("yarn", factor=4.0, **ORIGINAL)),
    "llama-rope-longrope": llama(**rope("longrope", **LONGROPE)),
    "mistral": lambda: transformers.MistralConfig(**GATED, sliding_window=None),
    "mistral-sliding": lambda: transformers.MistralConfig(**GATED, sliding_window=5),
    "qwen2": lambda: transformers.Qwen2Config(**NARROW),
    "qwen2-sliding": lambda: transformers.Qwen2Config(**NARROW, **SLIDING, use_sliding_window=True),
    "qwen3": lambda: transformers.Qwen3Config(**GATED),
    "smollm3": lambda: transformers.SmolLM3Config(**NARROW, no_rope_layers=[1, 0, 1]),
    "gemma": lambda: transformers.GemmaConfig(**GATED),
    "gemma2": lambda: transformers.Gemma2Config(**GATED, **GEMMA, attn_logit_softcapping=2.0),
    "gemma3": gemma3(),
    "gemma3-multi-query": gemma3(num_key_value_heads=1),
    "gemma3-softcap": gemma3(final_logit_softcapping=3.0),
    "gemma3-untied": gemma3(tie_word_embeddings=False),
    "phi3": lambda: transformers.Phi3Config(**NARROW),
    "phi3-longrope": lambda: transformers.Phi3Config(
        **NARROW, **rope("longrope", **LONGROPE), **ORIGINAL, max_position_embeddings=32
    ),
    "phi3-partial-sliding": lambda: transformers.Phi3Config(
        **NARROW, **rope("default", partial_rotary_factor=0.5), sliding_window=5
    ),
    "olmo2": lambda: transformers.Olmo2Config(**NARROW),
    "gpt-neox": lambda: transformers.GPTNeoXConfig(**CLASSIC, intermediate_size=48),
    "gpt-neox-sequential": lambda: transformers.GPTNeoXConfig(
        **CLASSIC,
        **rope("default", partial_rotary_factor=0.5),
        intermediate_size=48,
        use_parallel_residual=False,
    ),
    "opt": opt(),
    "opt-350m": opt(do_layer_norm_before=False, word_embed_proj_dim=16),
    "bloom": bloom(4),
    "bloom-6-heads": bloom(6),
    "falcon-7b": lambda: transformers.FalconConfig(**CLASSIC),
    "falcon-40b": lambda: transformers.FalconConfig(
        **CLASSIC, new_decoder_architecture=True, num_kv_heads=2
    ),
    "falcon-sequential": lambda: transformers.FalconConfig(
        **CLASSIC, multi_query=False, parallel_attn=False, bias=True
    ),
    "gpt2": gpt2(),
    "gpt2-untied": gpt2(tie_word_embeddings=False, n_inner=48),
}
TOKENS = np.random.default_rng(0).integers(3, 64, (2, 12))


@pytest.fixture(scope="module", params=VARIANTS, ids=list(VARIANTS))
def pair(request, tmp_path_factory):
    """A tiny random transformers model, and ours loaded from what it saved."""
    torch.manual_seed(0)
    config = VARIANTS[request.param]()
    theirs = transformers.AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        # Norm scales start at one, biases at zero: make them count.
        for weight in theirs.parameters():
            if weight.ndim == 1:
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
    assert grads.keys() == expected.keys()
    for name, grad in grads.items():
        atol = 2e-5 * max(1.0, abs(expected[name]).max())
        np.testing.assert_allclose(grad, expected[name], rtol=1e-3, atol=atol, err_msg=name)


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
    if ours.config.rope_scaling and ours.config.rope_scaling.kind == "dynamic":
        pytest.skip("dynamic scaling goes by the room of the computation, padding included")
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
