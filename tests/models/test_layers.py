"""The decoder's parts against plain float64 numpy."""

from collections import Counter
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx
from torch.nn import functional as F
from transformers.models.bloom.modeling_bloom import build_alibi_tensor

from uld_jax.models import Decoder, layers
from uld_jax.testing import tiny_config

RNG = np.random.default_rng(0)


def normal(*shape):
    return RNG.normal(size=shape)


def attention_reference(q, k, v, mask, scale, softcap):
    """One query at a time, one head at a time."""
    out = np.full(q.shape, np.nan)
    group = q.shape[2] // k.shape[2]
    for b, t, h in np.ndindex(q.shape[:3]):
        seen = np.flatnonzero(mask[b, t])
        if len(seen) == 0:
            continue
        scores = k[b, seen, h // group] @ q[b, t, h] * scale
        if softcap:
            scores = softcap * np.tanh(scores / softcap)
        weights = np.exp(scores - scores.max())
        out[b, t, h] = weights @ v[b, seen, h // group] / weights.sum()
    return out


@pytest.mark.parametrize("offset", [0.0, 1.0])
def test_rms_norm(offset):
    x, scale = 3 * normal(2, 5, 8), normal(8)
    expected = x / np.sqrt((x**2).mean(-1, keepdims=True) + 0.1) * (offset + scale)
    found = layers.rms_norm(jnp.array(x), jnp.array(scale), eps=0.1, offset=offset)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)


def test_rms_norm_computes_in_float32():
    # In bfloat16 itself the mean of 256 squares would be off by more than one rounding.
    x, scale = jnp.array(normal(4, 256), jnp.bfloat16), jnp.array(normal(256), jnp.bfloat16)
    found = layers.rms_norm(x, scale, eps=1e-6, offset=1.0)
    x64, scale64 = np.array(x, np.float64), np.array(scale, np.float64)
    expected = x64 / np.sqrt((x64**2).mean(-1, keepdims=True) + 1e-6) * (1 + scale64)
    assert found.dtype == jnp.bfloat16
    np.testing.assert_allclose(np.array(found, np.float64), expected, rtol=2**-8)


def test_attention_mask():
    causal = layers.attention_mask(jnp.array([[0, 1, 2]]), jnp.array([[0, 1, 2]]))
    assert causal[0].tolist() == np.tri(3, dtype=bool).tolist()
    # Slots of a cache may be empty, or lie in any order.
    cached = layers.attention_mask(jnp.array([[2]]), jnp.array([[1, -1, 0, 2, 3]]))
    assert cached.tolist() == [[[True, False, True, True, False]]]
    segments = jnp.array([[1, 1, 2]])
    packed = layers.attention_mask(
        jnp.array([[0, 1, 0]]), jnp.array([[0, 1, 0]]), segments, segments
    )
    assert packed[0].tolist() == [[True, False, False], [True, True, False], [False, False, True]]
    padding = layers.attention_mask(jnp.array([[-1]]), jnp.array([[-1, 0]]))
    assert not padding.any()


@pytest.mark.parametrize("softcap", [0.0, 1.5])
@pytest.mark.parametrize("kv_heads", [4, 2, 1])
def test_attention(softcap, kv_heads):
    q, k, v = normal(2, 5, 4, 8), 2 * normal(2, 7, kv_heads, 8), normal(2, 7, kv_heads, 8)
    mask = RNG.random((2, 5, 7)) < 0.5
    mask[:, :, 0] = True
    expected = attention_reference(q, k, v, mask, 0.7, softcap)
    arrays = jnp.array(q), jnp.array(k), jnp.array(v), jnp.array(mask)
    found = layers.attention(*arrays, scale=0.7, softcap=softcap)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


def test_softcap_changes_the_result():
    q, k, v = (jnp.array(4 * normal(1, 3, 2, 8)) for _ in range(3))
    mask = jnp.ones((1, 3, 3), bool)
    free, capped = (layers.attention(q, k, v, mask, scale=1.0, softcap=c) for c in (0.0, 1.5))
    assert np.abs(free - capped).max() > 0.1
    loose = layers.attention(q, k, v, mask, scale=1.0, softcap=1e5)
    np.testing.assert_allclose(loose, free, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("softcap", [0.0, 1.5])
def test_a_row_that_sees_nothing_is_finite_and_disturbs_no_other(softcap):
    q, k, v = (jnp.array(normal(1, 3, 2, 8)) for _ in range(3))
    mask = np.tri(3, dtype=bool)[None].copy()
    mask[0, 1] = False

    def total(q, k, v):
        out = layers.attention(q, k, v, jnp.array(mask), scale=0.5, softcap=softcap)
        return out.sum(), out

    grads, out = jax.grad(total, argnums=(0, 1, 2), has_aux=True)(q, k, v)
    assert all(np.isfinite(grad).all() for grad in grads)
    assert np.isfinite(out).all()
    expected = attention_reference(*map(np.array, (q, k, v)), mask, 0.5, softcap)
    np.testing.assert_allclose(out[:, [0, 2]], expected[:, [0, 2]], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("softcap", [0.0, 1.5])
def test_attention_in_bfloat16(softcap):
    q, k, v = (jnp.array(normal(1, 6, 2, 8), jnp.bfloat16) for _ in range(3))
    mask = np.tri(6, dtype=bool)[None]
    found = layers.attention(q, k, v, jnp.array(mask), scale=0.5, softcap=softcap)
    assert found.dtype == jnp.bfloat16
    wide = (np.array(x, np.float64) for x in (q, k, v))
    expected = attention_reference(*wide, mask, 0.5, softcap)
    np.testing.assert_allclose(np.array(found, np.float64), expected, atol=0.02)


def test_layer_norm():
    x, scale, shift = 3 * normal(2, 5, 8) + 7, normal(8), normal(8)
    expected = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 0.1)
    found = layers.layer_norm(jnp.array(x), jnp.array(scale), jnp.array(shift), eps=0.1)
    np.testing.assert_allclose(found, expected * scale + shift, rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize("heads", [1, 4, 6, 12, 16])
def test_alibi_slopes_equal_transformers(heads):
    alibi = build_alibi_tensor(torch.ones(1, 3), heads, torch.float32)
    np.testing.assert_allclose(layers.alibi_slopes(heads), alibi[:, 0, 1], rtol=1e-6)


@pytest.mark.parametrize("name", layers.ACTIVATIONS)
def test_activations_equal_torch(name):
    x = 3 * normal(100)
    theirs = {
        "silu": F.silu,
        "gelu": F.gelu,
        "gelu_tanh": partial(F.gelu, approximate="tanh"),
        "relu": F.relu,
    }[name]
    found = layers.ACTIVATIONS[name](jnp.array(x, jnp.float32))
    np.testing.assert_allclose(found, theirs(torch.tensor(x)), rtol=1e-5, atol=1e-6)


def test_softcap():
    x = normal(50) * 10
    np.testing.assert_allclose(layers.softcap(jnp.array(x), 3.0), 3 * np.tanh(x / 3), rtol=1e-5)
    assert layers.softcap(x, 0.0) is x


@pytest.mark.parametrize("rows", [1, 3, layers.FEW_ROWS, layers.FEW_ROWS + 1])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_table_product(rows, dtype):
    x, table = normal(rows, 1, 6), normal(10, 6)
    x, table = (np.asarray(jnp.asarray(a, dtype), np.float64) for a in (x, table))
    product = jax.jit(layers.table_product)(jnp.asarray(x, dtype), jnp.asarray(table, dtype))
    assert product.dtype == jnp.float32
    assert product.shape == (rows, 1, 10)
    np.testing.assert_allclose(product, x @ table.T, rtol=1e-5, atol=1e-5)


def test_table_product_of_few_rows_has_the_table_on_the_left():
    hlo = jax.jit(layers.table_product).lower(jnp.ones((2, 6)), jnp.ones((10, 6))).compile()
    assert "f32[10,2]" in hlo.as_text()


def test_the_backward_pass_keeps_each_array_once():
    c = tiny_config()
    graph, params = nnx.split(Decoder(c, rngs=nnx.Rngs(0)))
    tokens = jnp.zeros((3, 7), jnp.int32)
    _, backward = jax.vjp(lambda params: nnx.merge(graph, params).hidden(tokens), params)
    numbers = c.layers * tokens.size
    kept = Counter(x.size / numbers for x in jax.tree.leaves(backward))
    # Both norms' inputs and outputs, the queries, and what attention's last product has read.
    assert kept[c.width] == 6
    # Both factors of the MLP, not their product.
    assert kept[c.mlp_width] == 2
