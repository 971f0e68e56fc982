"""Quantised models: how far their logits are, how much memory they take, on any mesh."""

import gzip
import json
import weakref

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from flax import nnx

from uld_jax import models
from uld_jax.errors import UserError
from uld_jax.models import Policy, merged, model_class, quantize
from uld_jax.models.projection import SCALE, layer_matrices, matrix
from uld_jax.sharding import make_mesh
from uld_jax.testing import tiny_config, tiny_gemma, tiny_model, tiny_t5
from uld_jax.train import param_shardings

CONFIGS = {
    "llama": tiny_config(vocab_size=256, width=64, mlp_width=96, tied=False),
    "gemma": tiny_gemma(kv_heads=2),
    "biases": tiny_config(qkv_bias=True, out_bias=True, mlp_bias=True, gated=False),
    "t5": tiny_t5(),
}
# Root of the mean square and largest difference of logits, in standard deviations of the logits.
TOLERANCE = {"int8": (0.05, 0.2), "int4": (0.5, 2.5)}
TOKENS = np.arange(24, dtype=np.int32).reshape(2, 12)


def make(name, **options):
    """A model whose matrices are all of about unit gain, so that every one matters."""
    config = CONFIGS[name]
    model = model_class(config)(config, rngs=nnx.Rngs(0), **options)
    for _, module, matrix_name in layer_matrices(model):
        param = getattr(module, matrix_name)
        param.set_value(param[...] * (param.shape[1] ** -0.5 / 0.02))
    return model


def inputs(model):
    more = {"encoder_tokens": TOKENS[:, ::-1]} if isinstance(model, models.EncoderDecoder) else {}
    return {"tokens_BT": TOKENS, **more}


@nnx.jit
def logits(model):
    return model(**inputs(model))


def numbers(tree):
    return sum(leaf.nbytes for leaf in jax.tree.leaves(tree))


@pytest.mark.parametrize("kind", TOLERANCE)
@pytest.mark.parametrize("name", CONFIGS)
def test_logits_are_close_and_are_those_of_the_rounded_weights(name, kind):
    model = make(name)
    expected = logits(model)
    quantize(model, kind)
    found = logits(model)
    difference = (found - expected) / expected.std()
    largest, error = float(jnp.abs(difference).max()), float(jnp.sqrt((difference**2).mean()))
    print(f"{name} {kind}: root mean square {error:.3f}, largest {largest:.3f}")
    assert 0 < error <= TOLERANCE[kind][0]
    assert largest <= TOLERANCE[kind][1]
    plain = merged(model)
    assert jax.tree.leaves(nnx.state(plain, nnx.Param))[0].dtype == jnp.float32
    np.testing.assert_allclose(found, logits(plain), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", TOLERANCE)
def test_every_matrix_is_rounded_to_the_nearest_step(kind):
    model, exact = make("llama"), make("llama")
    quantize(model, kind)
    modules = {path: (module, name) for path, module, name in layer_matrices(model)}
    assert len(modules) == 7
    for path, original, name in layer_matrices(exact):
        module, _ = modules[path]
        values, scale = getattr(module, name)[...], getattr(module, name + SCALE)[...]
        assert values.dtype == kind
        assert int(jnp.abs(values.astype(jnp.int32)).max()) == {"int8": 128, "int4": 8}[kind]
        inputs = values.shape[1]
        assert scale.shape == (2, inputs // 32, values.shape[2])
        half_step = np.repeat(scale, inputs // scale.shape[1], axis=1) / 2
        difference = np.abs(matrix(module, name) - matrix(original, name))
        np.testing.assert_array_less(difference, half_step * 1.001)
    assert {model.embed.dtype, model.head.dtype} == {np.dtype("int8")}
    assert model.embed_scale.shape == (256, 2)
    assert model.norm.dtype == np.float32


@pytest.mark.parametrize("kind", TOLERANCE)
def test_held_bytes(kind):
    model = make("llama")
    before = numbers(models.parameters(model))
    quantize(model, kind)
    after = models.parameters(model)
    # The CPU backend gives a 4-bit integer a byte; GPUs and TPUs pack two into one.
    bits = {"int4": 4, "int8": 8, "float32": 32}
    stored = sum(leaf.size * bits[leaf.dtype.name] for leaf in jax.tree.leaves(after)) // 8
    if kind == "int8":
        assert numbers(after) == stored
    assert stored <= {"int8": 0.3, "int4": 0.25}[kind] * before


def test_each_matrix_is_given_up_as_soon_as_it_is_rounded(monkeypatch):
    model = make("llama")
    originals = [weakref.ref(getattr(m, name)[...]) for _, m, name in layer_matrices(model)]
    alive = []
    plain = models.quantization.quantize_matrix

    def counted(module, name, kind):
        plain(module, name, kind)
        alive.append(sum(ref() is not None for ref in originals))

    monkeypatch.setattr(models.quantization, "quantize_matrix", counted)
    quantize(model, "int8")
    assert alive == [6, 5, 4, 3, 2, 1, 0, 0, 0]


@pytest.mark.parametrize("kind", TOLERANCE)
def test_a_mesh_changes_nothing(kind):
    mesh = make_mesh(2, 2, 2)
    model = make("gemma")
    alone = make("gemma")
    quantize(alone, kind)
    state = nnx.state(model)
    nnx.update(model, jax.device_put(state, param_shardings(state, mesh)))
    before = {path: getattr(m, name)[...].sharding for path, m, name in layer_matrices(model)}
    quantize(model, kind)
    for path, module, name in layer_matrices(model):
        assert getattr(module, name)[...].sharding.is_equivalent_to(before[path], 3), path
    state = nnx.state(model)
    # As a checkpoint or a train step would place it: by the logical axes.
    nnx.update(model, jax.device_put(state, param_shardings(state, mesh)))
    with jax.set_mesh(mesh):
        found = logits(model)
    np.testing.assert_allclose(found, logits(alone), atol=1e-5, rtol=1e-5)


def test_generates_what_the_rounded_weights_do():
    model = make("gemma")
    quantize(model, "int8")
    settings = {"max_new_tokens": 8, "eos_id": -1}
    prompts = [[5, 6, 7], [8, 9, 10, 11, 12]]
    answers = models.generate(model, prompts, **settings)
    assert answers == models.generate(merged(model), prompts, **settings)
    assert len({tuple(answer) for answer in answers}) == 2


def test_bfloat16_adds_no_more_error_than_to_plain_weights():
    bfloat16 = Policy(dtype="bfloat16")
    plain = jnp.abs(logits(make("llama", policy=bfloat16)) - logits(make("llama"))).max()
    rounded = [make("llama"), make("llama", policy=bfloat16)]
    for model in rounded:
        quantize(model, "int8")
    assert rounded[1].blocks.mlp.up_scale.dtype == jnp.float32
    exact, found = map(logits, rounded)
    assert float(jnp.abs(found - exact).max()) <= 1.5 * float(plain)


def test_the_export_of_a_quantised_model_opens_in_transformers(tmp_path):
    m = tiny_model(tiny_config(family="llama"))
    quantize(m.model, "int8")
    models.save_pretrained(m, tmp_path / "out")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    with torch.no_grad():
        expected = theirs(torch.tensor(TOKENS)).logits.numpy()
    np.testing.assert_allclose(m.model(TOKENS), expected, atol=1e-5, rtol=1e-4)


def test_an_unknown_kind_is_one_line():
    with pytest.raises(UserError, match=r"^quantize must be one of \['int8', 'int4'\]: got 'int2'"):
        quantize(make("llama"), "int2")


@pytest.mark.real_models
@pytest.mark.parametrize(
    ("kind", "most_kl", "least_agreement"), [("int8", 4e-3, 0.95), ("int4", 0.8, 0.5)]
)
def test_the_real_smollm2(kind, most_kl, least_agreement, smollm_gguf, shared):
    with gzip.open(shared / "data" / "squad" / "dev-v1.1.json.gz", "rt", encoding="utf-8") as file:
        articles = json.load(file)["data"]
    m = models.load(smollm_gguf)
    text = " ".join(article["paragraphs"][0]["context"] for article in articles[:8])
    tokens = np.array(m.tokenizer(text).input_ids[: 4 * 96]).reshape(4, 96)

    @jax.jit
    def compare(exact, found):
        p, q = jax.nn.log_softmax(exact), jax.nn.log_softmax(found)
        kl = (jnp.exp(p) * (p - q)).sum(-1).mean()
        same = (exact.argmax(-1) == found.argmax(-1)).mean()
        return jnp.abs(exact - found).max(), kl, same

    run = nnx.jit(lambda model, tokens: model(tokens))
    exact, before = run(m.model, tokens), numbers(models.parameters(m.model))
    quantize(m.model, kind)
    largest, kl, same = map(float, compare(exact, run(m.model, tokens)))
    share = numbers(models.parameters(m.model)) / before
    print(
        f"{kind}: max |Δlogit| {largest:.3f} (std {float(exact.std()):.2f}), KL {kl:.1e}, "
        f"top-1 {same:.4f}, held {share:.3f}"
    )
    assert kl <= most_kl
    assert same >= least_agreement
    assert share <= 0.3
