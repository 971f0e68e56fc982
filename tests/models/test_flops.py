"""The estimate of a forward pass's arithmetic against the products in its own program."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from uld_jax.models import Decoder, EncoderDecoder
from uld_jax.models.flops import forward_flops
from uld_jax.testing import tiny_config, tiny_gemma, tiny_t5


def products(jaxpr, times=1):
    """Multiplications and additions of every dot_general, those in scans as often as they run."""
    found = 0
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            ((contracted, _), _) = equation.params["dimension_numbers"]
            inner = math.prod(equation.invars[0].aval.shape[axis] for axis in contracted)
            found += 2 * inner * math.prod(equation.outvars[0].aval.shape) * times
        repeated = times * equation.params.get("length", 1)
        for value in jax.tree.leaves(equation.params, is_leaf=lambda x: hasattr(x, "jaxpr")):
            inner = getattr(value, "jaxpr", value)
            found += products(inner, repeated) if hasattr(inner, "eqns") else 0
    return found


def counted(model, rows, length, encoder_length, positions):
    def forward(tokens, encoder_tokens):
        given = {"encoder_tokens": encoder_tokens} if encoder_length else {}
        hidden = model.hidden(tokens, **given).reshape(rows * length, -1)
        return hidden[:positions] @ model.head_VD.T

    tokens = jnp.ones((rows, length), int), jnp.ones((rows, encoder_length), int)
    return products(jax.make_jaxpr(forward)(*tokens).jaxpr)


@pytest.mark.parametrize(
    "config",
    [
        tiny_config(),
        tiny_config(gated=False, tied=False),
        tiny_config(embed_width=16),
        tiny_gemma(kv_heads=2),
    ],
    ids=["llama", "ungated", "embed_width", "gemma"],
)
def test_a_decoder(config):
    model = Decoder(config, rngs=nnx.Rngs(0))
    found = forward_flops(config, rows=3, length=12, positions=7)
    assert found == counted(model, 3, 12, 0, 7)


def test_an_encoder_decoder():
    config = tiny_t5()
    assert config.encoder_layers != config.decoder_layers
    model = EncoderDecoder(config, rngs=nnx.Rngs(0))
    found = forward_flops(config, rows=3, length=5, encoder_length=12, positions=7)
    assert found == counted(model, 3, 5, 12, 7)


def test_windows_save_nothing():
    wide = tiny_gemma(kv_heads=2)
    narrow = dataclasses.replace(wide, window=2)
    assert forward_flops(wide, rows=1, length=9) == forward_flops(narrow, rows=1, length=9)
