"""Models whose answers depend on all of the prompt, and models whose answers are known."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from uld_jax import models
from uld_jax.testing import tiny_config


def _lively(config, seed=0):
    config = dataclasses.replace(config, tied=False)
    model = models.model_class(config)(config, rngs=nnx.Rngs(seed))
    for _, param in nnx.to_flat_state(nnx.state(model)):
        if "norm" not in param.get_metadata("axes"):
            param.set_value(param[...] * 12)
    return model


@pytest.fixture(scope="session")
def lively():
    """Makes a random model of a config.

    Its weights are large, and its head is its own: a tied one repeats the last token for ever.
    """
    return _lively


@pytest.fixture(scope="session")
def parrot_of():
    """Makes a model that continues each token of some chains with the next, from a tokenizer.

    Its blocks add nothing, so the output sees the last token's embedding only; the head's row of
    a token is the embedding of the token before it in the chain.
    """

    def make(tokenizer, chains):
        config = tiny_config(vocab_size=len(tokenizer), width=64, head_dim=16, tied=False)
        model = models.Decoder(config, rngs=nnx.Rngs(0))
        model.blocks.attention.out.set_value(jnp.zeros_like(model.blocks.attention.out[...]))
        model.blocks.mlp.down.set_value(jnp.zeros_like(model.blocks.mlp.down[...]))
        embed = np.array(model.embed[...])
        embed /= np.linalg.norm(embed, axis=1, keepdims=True)
        head = np.zeros_like(embed)
        for chain in chains:
            ids = tokenizer.convert_tokens_to_ids(list(chain))
            head[ids[1:]] = embed[ids[:-1]]
        model.embed.set_value(jnp.array(embed))
        model.head.set_value(jnp.array(head))
        return models.LoadedModel(model, tokenizer, config)

    return make
