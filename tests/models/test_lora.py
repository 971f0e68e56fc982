"""Adapters: without effect at first, merged exactly, on every family and mesh."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from flax import nnx

from uld_jax import models
from uld_jax.errors import UserError
from uld_jax.models import add_adapters, merged, model_class, quantize, split_trained
from uld_jax.models.projection import LORA_A, LORA_B, layer_matrices
from uld_jax.sharding import make_mesh
from uld_jax.testing import tiny_config, tiny_gemma, tiny_model, tiny_t5
from uld_jax.train import param_shardings

CONFIGS = {
    "llama": tiny_config(),
    "gemma": tiny_gemma(kv_heads=2),
    "biases": tiny_config(qkv_bias=True, out_bias=True, mlp_bias=True, gated=False),
    "t5": tiny_t5(),
}
TOKENS = np.arange(24, dtype=np.int32).reshape(2, 12)


def make(name, **options):
    config = CONFIGS[name]
    model = model_class(config)(config, rngs=nnx.Rngs(0))
    if options:
        add_adapters(model, **options)
    return model


def shake(model):
    """Adapters as training leaves them: B is no longer zero."""
    for number, (_, module, name) in enumerate(layer_matrices(model)):
        if hasattr(module, name + LORA_B):
            param = getattr(module, name + LORA_B)
            param.set_value(0.3 * jax.random.normal(jax.random.key(number), param.shape))
    return model


@nnx.jit
def logits(model):
    more = {"encoder_tokens": TOKENS[:, ::-1]} if isinstance(model, models.EncoderDecoder) else {}
    return model(TOKENS, **more)


@pytest.mark.parametrize("name", CONFIGS)
def test_starts_as_it_was_and_merges_to_the_same_logits(name):
    plain = logits(make(name))
    model = make(name, rank=4, alpha=8.0)
    # XLA may fuse the products in another way beside an adapter, zero or not.
    np.testing.assert_allclose(logits(model), plain, atol=1e-6)
    found = logits(shake(model))
    assert float(jnp.abs(found - plain).max()) > 0.5 * float(plain.std())
    one = merged(model)
    np.testing.assert_allclose(logits(one), found, atol=1e-5, rtol=1e-5)
    assert jax.tree.structure(nnx.state(one)) == jax.tree.structure(nnx.state(make(name)))
    # Merging has left the model as it was.
    np.testing.assert_array_equal(logits(model), found)


def test_the_merged_matrix_is_w_plus_alpha_over_rank_a_b():
    model = shake(make("llama", rank=4, alpha=6.0, targets=["mlp.down"]))
    p = jax.tree.map(np.float64, nnx.to_pure_dict(nnx.state(model.blocks.mlp)))
    expected = p["down"] + 6.0 / 4 * p["down_lora_a"] @ p["down_lora_b"]
    mlp = merged(model).blocks.mlp
    np.testing.assert_allclose(mlp.down[...], expected, atol=1e-6)
    np.testing.assert_array_equal(mlp.up[...], model.blocks.mlp.up[...])


@pytest.mark.parametrize(
    ("name", "targets", "adapted"),
    [
        ("llama", ["attention.query", "mlp.up"], {"attention.query", "mlp.up"}),
        ("biases", [], {f"attention.{n}" for n in ("query", "key", "value", "out")} | {"mlp.up"}),
        ("t5", ["cross.query", "attention.out"], {"cross.query", "attention.out"}),
    ],
)
def test_the_targets_alone_are_trained(name, targets, adapted):
    model = make(name, rank=4, alpha=8.0, targets=targets)
    graph, trained, frozen = split_trained(model)
    found = {".".join(map(str, path[-2:])) for path, _ in nnx.to_flat_state(trained)}
    adapted |= {"mlp.down"} if not targets else set()
    assert found == {path + part for path in adapted for part in (LORA_A, LORA_B)}
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(trained))
    plain = nnx.state(make(name))
    jax.tree.map(np.testing.assert_array_equal, *frozen, plain)
    merge = nnx.merge(graph, trained, *frozen)
    np.testing.assert_allclose(logits(merge), logits(make(name)), atol=1e-6)


def test_a_is_uniform_within_the_root_of_the_inputs_and_differs_by_seed():
    one, other = (make("llama", rank=8, alpha=8.0, seed=seed) for seed in (1, 2))
    a = one.blocks.mlp.down_lora_a[...]
    bound = 48**-0.5
    assert 0.95 * bound < float(jnp.abs(a).max()) <= bound
    np.testing.assert_allclose(a.std(), bound / 3**0.5, rtol=0.1)
    assert not np.array_equal(a, other.blocks.mlp.down_lora_a[...])
    assert not np.array_equal(a[0], a[1])


@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_adapters_on_quantised_matrices(kind):
    model = make("llama")
    quantize(model, kind)
    add_adapters(model, rank=4, alpha=8.0)
    plain = make("llama")
    quantize(plain, kind)
    np.testing.assert_allclose(logits(model), logits(plain), atol=1e-6)
    found = logits(shake(model))
    np.testing.assert_allclose(logits(merged(model)), found, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", ["gemma", "t5"])
def test_a_mesh_changes_nothing(name):
    mesh = make_mesh(2, 2, 2)
    model = make(name)
    nnx.update(model, jax.device_put(nnx.state(model), param_shardings(nnx.state(model), mesh)))
    add_adapters(model, rank=4, alpha=8.0)
    state = nnx.state(model, nnx.LoRAParam)
    wanted = dict(nnx.to_flat_state(param_shardings(state, mesh)))
    for path, param in nnx.to_flat_state(state):
        assert param[...].sharding.is_equivalent_to(wanted[path].get_value(), 3), path
    with jax.set_mesh(mesh):
        found = logits(shake(model))
    alone = shake(make(name, rank=4, alpha=8.0))
    np.testing.assert_allclose(found, logits(alone), atol=1e-5, rtol=1e-5)


def test_generates_what_the_merged_model_does():
    model = shake(make("gemma", rank=4, alpha=8.0))
    prompts, settings = [[5, 6, 7], [8, 9, 10, 11, 12]], {"max_new_tokens": 8, "eos_id": -1}
    answers = models.generate(model, prompts, **settings)
    assert answers == models.generate(merged(model), prompts, **settings)
    assert answers != models.generate(make("gemma"), prompts, **settings)


def test_the_export_is_merged_and_opens_in_transformers(tmp_path):
    m = tiny_model()
    add_adapters(m.model, rank=4, alpha=8.0)
    shake(m.model)
    models.save_pretrained(m, tmp_path / "out")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    with torch.no_grad():
        expected = theirs(torch.tensor(TOKENS)).logits.numpy()
    np.testing.assert_allclose(logits(m.model), expected, atol=1e-5, rtol=1e-4)


def test_a_target_that_the_model_lacks_is_one_line():
    with pytest.raises(UserError) as caught:
        make("biases", rank=4, alpha=8.0, targets=["mlp.up", "mlp.gate", "cross.query"])
    assert str(caught.value) == (
        "lora_targets: the model has no mlp.gate, cross.query; it has attention.key, "
        "attention.out, attention.query, attention.value, mlp.down, mlp.up"
    )


def test_a_rank_below_one_is_one_line():
    with pytest.raises(UserError, match=r"^lora_rank must be at least 1 to add adapters: got 0$"):
        make("llama", rank=0, alpha=8.0)
