"""Encoder-decoders against transformers: logits, gradients, cache, padding, export, shards."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
import transformers
from flax import nnx
from safetensors.numpy import load_file, save_file
from transformers.models.t5.modeling_t5 import T5Attention

from uld_jax import models
from uld_jax.errors import UserError
from uld_jax.models.families.t5 import config_from_hf
from uld_jax.models.hf_io import to_hf_tensors
from uld_jax.models.relative import position_bias
from uld_jax.sharding import make_mesh
from uld_jax.testing import tiny_model, tiny_t5, toy_tokenizer

COMMON = {
    "vocab_size": 304,
    "d_model": 32,
    "d_kv": 6,
    "d_ff": 48,
    "num_layers": 2,
    "num_decoder_layers": 3,
    "num_heads": 4,
    "relative_attention_num_buckets": 8,
    "relative_attention_max_distance": 10,
    "pad_token_id": 0,
    "eos_token_id": 2,
    "decoder_start_token_id": 0,
    "attn_implementation": "eager",
}
VARIANTS = {
    "t5-relu-tied": lambda: transformers.T5Config(**COMMON),
    "flan-t5-gated-untied": lambda: transformers.T5Config(
        **COMMON, feed_forward_proj="gated-gelu", tie_word_embeddings=False
    ),
    "t5-gated-silu-scaled-untied": lambda: transformers.T5Config(
        **COMMON, feed_forward_proj="gated-silu"
    ),
    "mt5-untied": lambda: transformers.MT5Config(**COMMON),
    "mt5-tied": lambda: transformers.MT5Config(**(COMMON | {"decoder_start_token_id": 5})),
}
RNG = np.random.default_rng(0)
PROMPTS = RNG.integers(3, 64, (2, 14))
TOKENS = RNG.integers(3, 64, (2, 12))
WEIGHTS = (
    "shared.weight",
    "encoder.block.1.layer.0.SelfAttention.q.weight",
    "encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight",
    "encoder.block.1.layer.1.DenseReluDense.wo.weight",
    "decoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight",
    "decoder.block.1.layer.1.EncDecAttention.k.weight",
    "decoder.block.2.layer.1.layer_norm.weight",
    "decoder.final_layer_norm.weight",
)


@pytest.fixture(scope="module", params=VARIANTS, ids=list(VARIANTS))
def pair(request, tmp_path_factory):
    """A tiny random transformers model, and ours loaded from what it saved."""
    torch.manual_seed(0)
    theirs = transformers.AutoModelForSeq2SeqLM.from_config(VARIANTS[request.param]()).eval()
    if "untied" in request.param:
        # transformers 5 ties every new T5; published checkpoints have a head of their own.
        theirs.lm_head.weight = torch.nn.Parameter(torch.randn(304, 32))
        theirs.all_tied_weights_keys.pop("lm_head.weight")
    with torch.no_grad():
        # Norm scales start at one, and position biases are small: make them count.
        for name, weight in theirs.named_parameters():
            if "norm" in name or "relative_attention_bias" in name:
                weight.add_((0.2 if "norm" in name else 2.0) * torch.randn_like(weight))
    directory = tmp_path_factory.mktemp(request.param)
    theirs.save_pretrained(directory)
    toy_tokenizer().save_pretrained(directory)
    return theirs, models.load(directory), directory


def their_logits(theirs, **inputs):
    with torch.no_grad():
        return theirs(**{name: torch.tensor(array) for name, array in inputs.items()}).logits


def our_logits(model, **inputs):
    return model(jnp.array(TOKENS), encoder_tokens=jnp.array(PROMPTS), **inputs)


def test_logits_equal_transformers(pair):
    theirs, ours, _ = pair
    expected = their_logits(theirs, input_ids=PROMPTS, decoder_input_ids=TOKENS)
    np.testing.assert_allclose(our_logits(ours.model), expected, rtol=1e-4, atol=1e-4)
    assert ours.config.tied == (theirs.lm_head.weight is theirs.shared.weight)


def test_gradients_equal_transformers(pair):
    theirs, ours, _ = pair
    labels = np.roll(TOKENS, -1, axis=1)
    theirs.zero_grad()
    theirs(
        input_ids=torch.tensor(PROMPTS),
        decoder_input_ids=torch.tensor(TOKENS),
        labels=torch.tensor(labels),
    ).loss.backward()
    expected = {name: weight.grad.numpy() for name, weight in theirs.named_parameters()}
    graph, state = nnx.split(ours.model)

    def loss(state):
        logits = our_logits(nnx.merge(graph, state))
        return optax.softmax_cross_entropy_with_integer_labels(logits, jnp.array(labels)).mean()

    grads = to_hf_tensors(ours.config, jax.jit(jax.grad(loss))(state))
    assert grads.keys() == expected.keys()
    for name in (*WEIGHTS, "lm_head.weight"):
        if name in expected:
            ours_, theirs_ = grads[name], expected[name]
            np.testing.assert_allclose(ours_, theirs_, rtol=1e-3, atol=2e-5, err_msg=name)


def test_cached_decoding_equals_the_full_forward(pair):
    _, ours, _ = pair
    graph, state = nnx.split(ours.model)
    lengths = jnp.array([14, 9])
    segments = (jnp.arange(14)[None] < lengths[:, None]).astype(jnp.int32)

    @jax.jit
    def start(state, prompts_BP, lengths_B):
        model = nnx.merge(graph, state)
        hidden_BD, cache, positions_B = model.start(prompts_BP, lengths_B, 11)
        return model.logits(hidden_BD), cache, positions_B

    @jax.jit
    def step(state, token_B1, positions_B1, cache):
        model = nnx.merge(graph, state)
        hidden, cache = model.read(token_B1, positions_B1, cache)
        return model.logits(hidden)[:, 0], cache

    tokens = jnp.array(TOKENS).at[:, 0].set(ours.config.start_id)
    prompts = jnp.array(PROMPTS)
    full = ours.model(tokens, encoder_tokens=prompts, encoder_segment_ids=segments)
    # What stands behind a prompt must not matter.
    logits, cache, positions_B = start(state, jnp.where(segments, prompts, 7), lengths)
    np.testing.assert_allclose(logits, full[:, 0], rtol=1e-4, atol=1e-4)
    assert positions_B.tolist() == [1, 1]
    assert cache.positions_BS.shape == (2, 12)
    for t in range(1, 12):
        at = (positions_B + t - 1)[:, None]
        logits, cache = step(state, tokens[:, t : t + 1], at, cache)
        np.testing.assert_allclose(logits, full[:, t], rtol=1e-4, atol=1e-4)
    assert cache.length == 0


def test_padding_on_either_side_changes_nothing(pair):
    _, ours, _ = pair
    full = our_logits(ours.model)

    def padded(tokens, side):
        pad = np.full((2, 3), 9)
        ones, zeros = np.ones_like(tokens), np.zeros_like(pad)
        both = ([tokens, pad], [ones, zeros]) if side == "right" else ([pad, tokens], [zeros, ones])
        return [jnp.array(np.concatenate(parts, 1)) for parts in both]

    for encoder_side, decoder_side in (("right", "left"), ("left", "right")):
        prompts, prompt_segments = padded(PROMPTS, encoder_side)
        tokens, segments = padded(TOKENS, decoder_side)
        logits = ours.model(
            tokens,
            segment_ids=segments,
            encoder_tokens=prompts,
            encoder_segment_ids=prompt_segments,
        )
        real = slice(0, 12) if decoder_side == "right" else slice(3, 15)
        np.testing.assert_allclose(logits[:, real], full, rtol=1e-4, atol=1e-4)


def test_packed_segments_do_not_see_each_other(pair):
    _, ours, _ = pair
    full = our_logits(ours.model)
    packed = [jnp.array(x.reshape(1, -1)) for x in (TOKENS, PROMPTS)]
    segments = [jnp.repeat(jnp.array([[1, 2]]), n, axis=1) for n in (12, 14)]
    logits = ours.model(
        packed[0],
        segment_ids=segments[0],
        encoder_tokens=packed[1],
        encoder_segment_ids=segments[1],
    )
    np.testing.assert_allclose(logits.reshape(full.shape), full, rtol=1e-4, atol=1e-4)


def test_export_is_the_identity_and_opens_in_transformers(pair, tmp_path):
    theirs, ours, _ = pair
    models.save_pretrained(ours, tmp_path / "out")
    again = models.load(tmp_path / "out")
    assert again.config == ours.config
    for a, b in zip(
        jax.tree.leaves(nnx.state(again.model)), jax.tree.leaves(nnx.state(ours.model)), strict=True
    ):
        np.testing.assert_array_equal(a, b)
    opened = transformers.AutoModelForSeq2SeqLM.from_pretrained(
        tmp_path / "out", attn_implementation="eager"
    )
    assert type(opened) is type(theirs)
    inputs = {"input_ids": PROMPTS, "decoder_input_ids": TOKENS}
    torch.testing.assert_close(their_logits(opened, **inputs), their_logits(theirs, **inputs))


def test_sharded_load_computes_the_same(pair):
    _, ours, directory = pair
    mesh = make_mesh(2, 2, 2)
    sharded = models.load(directory, mesh=mesh)
    assert len(sharded.model.decoder.blocks.cross.query[...].sharding.device_set) == 8
    graph, state = nnx.split(sharded.model)

    def forward(state, tokens, prompts):
        return nnx.merge(graph, state)(tokens, encoder_tokens=prompts)

    with jax.set_mesh(mesh):
        logits = jax.jit(forward)(state, np.tile(TOKENS, (2, 1)), np.tile(PROMPTS, (2, 1)))
    np.testing.assert_allclose(logits[:2], our_logits(ours.model), rtol=1e-4, atol=1e-4)


def test_generation_equals_transformers(pair):
    theirs, ours, _ = pair
    lengths = [14, 5]
    with torch.no_grad():
        expected = theirs.generate(
            torch.tensor(PROMPTS),
            attention_mask=torch.arange(14)[None] < torch.tensor(lengths)[:, None],
            max_new_tokens=8,
            do_sample=False,
            eos_token_id=2,
            use_cache=False,  # theirs has no room for more decoder layers than encoder layers
        )
    prompts = [row[:n].tolist() for row, n in zip(PROMPTS, lengths, strict=True)]
    answers = models.generate(ours.model, prompts, max_new_tokens=8, eos_id=2)
    for answer, row in zip(answers, expected[:, 1:].tolist(), strict=True):
        assert answer == (row[: row.index(2)] if 2 in row else row)


@pytest.mark.parametrize("remat", ["dots", "full", "offload"])
def test_remat_changes_no_gradient(remat):
    config = tiny_t5()
    plain = models.EncoderDecoder(config, rngs=nnx.Rngs(0))
    other = models.EncoderDecoder(config, models.Policy(remat=remat), rngs=nnx.Rngs(0))
    grads = []
    for model in (plain, other):
        graph, state = nnx.split(model)
        loss = lambda s, graph=graph: (our_logits(nnx.merge(graph, s)) ** 2).mean()  # noqa: E731
        grads.append(jax.jit(jax.grad(loss))(state))
    for a, b in zip(*map(jax.tree.leaves, grads), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-8)


def test_bfloat16_is_near_float32():
    exact = models.EncoderDecoder(tiny_t5(), rngs=nnx.Rngs(0))
    half = models.EncoderDecoder(tiny_t5(), models.Policy(dtype="bfloat16"), rngs=nnx.Rngs(0))
    logits = our_logits(half)
    assert logits.dtype == jnp.float32
    assert half.start(jnp.array(PROMPTS), jnp.array([14, 9]), 2)[1].k_LBPHh.dtype == jnp.bfloat16
    error = jnp.abs(logits - our_logits(exact)).max() / jnp.abs(our_logits(exact)).max()
    assert 0 < error < 0.03


@pytest.mark.parametrize(("buckets", "farthest"), [(32, 128), (8, 10), (64, 1000)])
@pytest.mark.parametrize("bidirectional", [True, False])
def test_every_distance_is_in_the_published_bucket(buckets, farthest, bidirectional):
    at = np.arange(2 * farthest + 3)
    table_bH = jnp.arange(buckets, dtype=jnp.float32)[:, None]
    middle = jnp.array([[farthest + 1]])
    ours = position_bias(
        table_bH, middle, jnp.array(at)[None], bidirectional=bidirectional, max_distance=farthest
    )
    theirs = T5Attention._relative_position_bucket(
        torch.tensor(at - (farthest + 1)),
        bidirectional=bidirectional,
        num_buckets=buckets,
        max_distance=farthest,
    )
    np.testing.assert_array_equal(ours[0, 0, 0], theirs)


def test_redundant_tensors_of_old_checkpoints_are_skipped(tmp_path):
    ours = tiny_model(tiny_t5(tied=True))
    models.save_pretrained(ours, tmp_path / "out")
    path = tmp_path / "out" / "model.safetensors"
    tensors = load_file(path)
    for stack in ("encoder", "decoder"):
        tensors[f"{stack}.embed_tokens.weight"] = tensors["shared.weight"]
    bias = "relative_attention_bias.weight"
    tensors[f"decoder.block.0.layer.1.EncDecAttention.{bias}"] = tensors[
        f"decoder.block.0.layer.0.SelfAttention.{bias}"
    ]
    save_file(tensors, path, {"format": "pt"})
    again = models.load(tmp_path / "out")
    np.testing.assert_array_equal(our_logits(again.model), our_logits(ours.model))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"feed_forward_proj": "gated-tanh"}, "'t5': unsupported: feed_forward_proj='gated-tanh'"),
        ({"is_encoder_decoder": False}, "'t5': unsupported: is_encoder_decoder='False'"),
        (
            {"decoder_start_token_id": None, "pad_token_id": None},
            "'t5': unsupported: decoder_start_token_id='None'",
        ),
    ],
)
def test_what_a_config_asks_for_in_vain_is_named(changes, message):
    with pytest.raises(UserError, match=message):
        config_from_hf(transformers.T5Config(**(COMMON | changes)).to_dict())


def test_missing_and_misshapen_weights_are_named(tmp_path):
    ours = tiny_model(tiny_t5())
    models.save_pretrained(ours, tmp_path / "out")
    grown = dataclasses.replace(ours.config, decoder_layers=4, mlp_width=50)
    models.families.by_model_type("mt5", "test").config_to_hf(grown).save_pretrained(
        tmp_path / "out"
    )
    with pytest.raises(UserError) as error:
        models.load(tmp_path / "out")
    for part in (
        "missing decoder.block.3.layer.1.EncDecAttention.q.weight",
        "encoder.block.1.layer.1.DenseReluDense.wo.weight has shape (32, 48), expected (32, 50)",
    ):
        assert part in str(error.value)
