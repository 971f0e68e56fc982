"""A pool of rows that are refilled, for every kind of position: alone, together, over a mesh."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from uld_jax import models
from uld_jax.models.continuous import Batcher
from uld_jax.models.decode import _mesh_of, _runs
from uld_jax.models.pool import Plan, Request, advance, fill, refill
from uld_jax.models.stop_strings import StopStrings
from uld_jax.sharding import fold_sequence, make_mesh, named_sharding
from uld_jax.testing import tiny_config, tiny_t5

RNG = np.random.default_rng(0)
PROMPTS = [RNG.integers(3, 64, n).tolist() for n in RNG.permutation(np.arange(40) * 24 // 40 + 1)]
# So many that answers end at very different times.
SETTINGS = {"max_new_tokens": 12, "eos_id": [*range(8)]}
KINDS = {
    "rotary": tiny_config,
    "alibi": lambda: tiny_config(positions="alibi"),
    "learned": lambda: tiny_config(positions="learned"),
    "window": lambda: tiny_config(window=5, local_layers=(True, False)),
    "t5": tiny_t5,
}
MESHES = [(8, 1, 1), (2, 2, 2)]
ON_MESHES = [*(("rotary", shape) for shape in MESHES), ("t5", MESHES[1])]


@pytest.fixture(scope="module", params=KINDS, ids=list(KINDS))
def pooled(request, lively):
    """A model, and what 4 rows make of 40 prompts."""
    model = lively(KINDS[request.param]())
    return model, models.continue_prompts(model, PROMPTS, **SETTINGS, log_probs=True, batch_size=4)


def ids_of(continuations):
    return [each.ids for each in continuations]


def test_rows_that_are_refilled_equal_prompts_alone(pooled):
    model, found = pooled
    lengths = [len(each.ids) for each in found]
    assert len(set(lengths)) > 6
    alone = [models.generate(model, [prompt], **SETTINGS)[0] for prompt in PROMPTS]
    assert ids_of(found) == alone
    # The ring went round several times.
    assert sum(lengths) / 4 > 1.5 * (24 + 12)
    assert {each.stop for each in found} == {"eos", "length"}
    assert all((each.stop == "length") == (len(each.ids) == 12) for each in found)


def test_log_probs_equal_a_full_forward(pooled):
    model, found = pooled
    tokens, segments = np.zeros((2, 40, 36), np.int32)
    for row, (prompt, each) in enumerate(zip(PROMPTS, found, strict=True)):
        before = prompt if isinstance(model, models.Decoder) else [model.config.start_id]
        tokens[row, : len(before) + len(each.ids)] = [*before, *each.ids]
    inputs = {}
    if not isinstance(model, models.Decoder):
        prompts = np.zeros((40, 24), np.int32)
        for row, prompt in enumerate(PROMPTS):
            prompts[row, : len(prompt)] = prompt
            segments[row, : len(prompt)] = 1
        inputs = {"encoder_tokens": prompts, "encoder_segment_ids": segments[:, :24]}
    graph, state = nnx.split(model)
    forward = jax.jit(lambda state, *a, **k: nnx.merge(graph, state)(*a, **k))
    log_probs = np.array(jax.nn.log_softmax(forward(state, tokens, **inputs)))
    for row, (prompt, each) in enumerate(zip(PROMPTS, found, strict=True)):
        first = len(prompt) - 1 if isinstance(model, models.Decoder) else 0
        expected = log_probs[row, first : first + len(each.ids)]
        expected = expected[np.arange(len(each.ids)), each.ids]
        assert each.log_probs.dtype == np.float32
        np.testing.assert_allclose(each.log_probs, expected, atol=1e-4, rtol=1e-4)


def test_log_probs_are_of_the_raw_logits(lively):
    model = lively(tiny_config())
    sampling = models.Sampling(temperature=3.0, top_k=5, repetition_penalty=1.5)
    found = models.continue_prompts(
        model, PROMPTS[:1], **SETTINGS, sampling=sampling, log_probs=True
    )[0]
    logits = model(jnp.array([PROMPTS[0] + found.ids]))[0, len(PROMPTS[0]) - 1 : -1]
    expected = jax.nn.log_softmax(logits)[jnp.arange(len(found.ids)), jnp.array(found.ids)]
    np.testing.assert_allclose(found.log_probs, expected, atol=1e-4, rtol=1e-4)
    without = models.continue_prompts(model, PROMPTS[:1], **SETTINGS, sampling=sampling)[0]
    assert without.log_probs is None
    assert without.ids == found.ids


def placed(model, mesh):
    graph, state = nnx.split(model)
    state = jax.tree.map(
        lambda p: p.replace(jax.device_put(p[...], named_sharding(mesh, p.get_metadata("axes")))),
        state,
        is_leaf=lambda x: isinstance(x, nnx.Variable),
    )
    return nnx.merge(graph, state)


@pytest.mark.parametrize(("kind", "shape"), ON_MESHES)
def test_a_mesh_changes_nothing(kind, shape, lively):
    model = lively(KINDS[kind]())
    # 16 rows: groups of 8 or 4 are refilled.
    settings = SETTINGS | {"log_probs": True, "batch_size": 16}
    expected = models.continue_prompts(model, PROMPTS, **settings)
    mesh = make_mesh(*shape)
    programs = fill._cache_size(), refill._cache_size(), advance._cache_size()
    found = models.continue_prompts(placed(model, mesh), PROMPTS, **settings)
    assert ids_of(found) == ids_of(expected)
    for a, b in zip(found, expected, strict=True):
        np.testing.assert_allclose(a.log_probs, b.log_probs, atol=1e-4, rtol=1e-4)
    # Whichever program its arrays come from, one advances the pool.
    after = fill._cache_size(), refill._cache_size(), advance._cache_size()
    assert [b - a for a, b in zip(programs, after, strict=True)] == [1, 2, 1]


@pytest.mark.parametrize(("kind", "shape"), [*ON_MESHES, ("one key head", MESHES[1])])
def test_the_pool_lies_over_the_mesh(kind, shape, lively):
    mesh = make_mesh(*shape)
    config = tiny_config(kv_heads=1) if kind == "one key head" else KINDS[kind]()
    request = Request(jnp.array([-1]), jax.random.key(0), {"temperature": jnp.float32(1.0)})
    shards = shape[0] * shape[1]
    batcher = Batcher(
        placed(lively(config), mesh),
        request,
        Plan(16, 4, log_probs=True),
        rows=shards - 1,
        shards=shards,
        stops=StopStrings((), None),
    )
    with jax.set_mesh(mesh):
        list(batcher.run([[5, 6]], [0]))
    for path, leaf in jax.tree.leaves_with_path(batcher._pool):
        for shard in leaf.addressable_shards:
            if leaf.ndim == 5:
                heads = max(1, leaf.shape[3] // shape[2])
                assert shard.data.shape[1:4:2] == (1, heads), path
            elif leaf.ndim:
                assert shard.data.shape[0] == 1, path


@pytest.mark.parametrize("shape", MESHES)
def test_few_prompts_sampled_on_a_mesh(shape, lively):
    # Rows that do not fill its batch axes, a key head that does not fill its tensor axis.
    model = lively(tiny_config(kv_heads=1))
    settings = SETTINGS | {"temperature": 1.0, "top_p": 0.9, "repetition_penalty": 1.3}
    expected = models.generate(model, PROMPTS[:3], **settings)
    assert models.generate(placed(model, make_mesh(*shape)), PROMPTS[:3], **settings) == expected


def test_a_sequence_axis_has_rows_of_the_pool(lively):
    mesh = make_mesh(2, 1, 2, sequence=2)
    folded = fold_sequence(mesh)
    assert dict(folded.shape) == {"data": 2, "fsdp": 2, "sequence": 1, "tensor": 2}
    assert (folded.devices.flatten() == mesh.devices.flatten()).all()
    model = lively(tiny_config())
    own = placed(model, mesh)
    assert _mesh_of(own) == folded
    prompts, settings = PROMPTS[:6], SETTINGS | {"batch_size": 3}
    assert models.generate(own, prompts, **settings) == models.generate(model, prompts, **settings)


def test_samples_depend_on_nothing_but_key_prompt_and_step(lively):
    model = lively(tiny_config())
    prompts = [prompt for prompt in PROMPTS if len(prompt) <= 16][:12]
    settings = {"temperature": 1.5, "top_k": 30, "top_p": 0.95, "min_p": 0.01}
    settings |= SETTINGS | {"repetition_penalty": 1.2, "key": jax.random.key(3)}
    one, three, eight = (
        models.generate(model, prompts[:12], **settings, batch_size=rows) for rows in (1, 3, 8)
    )
    assert one == three == eight
    assert len({tuple(row) for row in one}) > 8
    # Others before and behind it make no difference to a prompt.
    assert models.generate(model, prompts[:5], **settings, batch_size=3) == one[:5]


def test_programs_are_few(lively):
    model = lively(tiny_config())

    def compiled(prompts, **settings):
        before = [program._cache_size() for program in (fill, refill, advance)]
        models.generate(model, prompts, **({"max_new_tokens": 3, "eos_id": -1} | settings))
        after = [program._cache_size() for program in (fill, refill, advance)]
        return [b - a for a, b in zip(before, after, strict=True)]

    assert compiled([[5] * 9]) == [1, 0, 1]
    assert compiled([[5] * 16], key=jax.random.key(1)) == [0, 0, 0]
    assert compiled([[5]], eos_id=5) == [0, 0, 0]
    assert compiled([[5] * 17]) == [1, 0, 1]
    assert compiled([[5] * 24]) == [0, 0, 0]
    assert compiled([[5]], temperature=0.5) == [1, 0, 1]
    assert compiled([[5]], temperature=0.7) == [0, 0, 0]
    assert compiled([[5]], temperature=0.7, top_p=0.3, min_p=0.1, top_k=3) == [1, 0, 1]
    assert compiled([[5]], temperature=0.1, top_p=0.9, min_p=0.2, top_k=4) == [0, 0, 0]
    # Greedy, these say nothing.
    assert compiled([[5]], top_p=0.9, min_p=0.2, top_k=4) == [0, 0, 0]
    # Any number of prompts of two bucket lengths: one of the pool's, two that refill it.
    many = PROMPTS * 3
    assert compiled(many, batch_size=4, eos_id=[*range(8)]) == [1, 2, 1]
    # Should all rows end together, the wider ones make a new pool.
    assert compiled(many[::-1], batch_size=4, eos_id=[*range(9, 17)]) in ([0, 0, 0], [1, 0, 0])


def test_one_pool_full_is_decoded_without_the_host(lively):
    model = lively(tiny_config())
    request = Request(jnp.array([*range(8)]), jax.random.key(0), {})
    batcher = Batcher(model, request, Plan(24, 12), rows=8, shards=1, stops=StopStrings((), None))
    found = list(batcher.run(PROMPTS, range(8)))
    assert len(found) == 1
    assert len({len(each.ids) for each in found[0].values()}) > 2


def test_all_rows_that_end_together_start_afresh(lively):
    model = lively(tiny_config())
    before = refill._cache_size()
    done = []
    models.generate(
        model, PROMPTS, max_new_tokens=4, eos_id=-1, batch_size=13, progress=done.append
    )
    assert done == [13, 13, 13, 1]
    assert refill._cache_size() == before


def test_much_longer_prompts_have_a_pool_of_their_own():
    lengths = [500, *[10] * 8, 30, 16, *[400] * 3]
    assert _runs(lengths, 2, 16) == [[*range(1, 9), 10, 9], [11, 12, 13, 0]]
    # Where the short ones do not fill a pool a few times, all share it.
    assert _runs(lengths, 8, 16) == [[*range(1, 9), 10, 9, 11, 12, 13, 0]]
    assert _runs([], 8, 16) == []


def test_pools_of_several_widths_equal_prompts_alone(lively):
    model = lively(tiny_config())
    short = [prompt for prompt in PROMPTS if len(prompt) <= 16]
    prompts = [*short[:10], [7, 8] * 30, [9] * 61]
    assert len(_runs([len(prompt) for prompt in prompts], 2, 12)) == 2
    alone = [models.generate(model, [prompt], **SETTINGS)[0] for prompt in prompts]
    assert models.generate(model, prompts, **SETTINGS, batch_size=2) == alone


def test_the_padding_uses_no_positions(lively):
    # Frequencies of "dynamic" rotary positions change beyond max_positions, where a bucket would
    # reach; prompt and answer do not.
    scaling = models.config.RopeScaling("dynamic", factor=4.0)
    plain, scaled = (
        lively(tiny_config(max_positions=30, rope_scaling=each)) for each in (None, scaling)
    )
    prompt = (PROMPTS[0] * 24)[:18]
    assert models.generate(plain, [prompt], **SETTINGS) == models.generate(
        scaled, [prompt], **SETTINGS
    )


def test_numbers_stand_for_places(lively):
    model = lively(tiny_config())
    prompts = [prompt for prompt in PROMPTS if len(prompt) <= 16][:6]
    settings = SETTINGS | {"sampling": models.Sampling(temperature=1.5), "key": jax.random.key(3)}

    def ids(prompts, numbers, **more):
        numbers = np.array(numbers, np.uint32)
        return ids_of(models.continue_prompts(model, prompts, numbers=numbers, **settings, **more))

    places = [[i] for i in range(6)]
    assert ids(prompts, places) == ids_of(models.continue_prompts(model, prompts, **settings))
    numbers = [[2**32 - 1 - i, 7, i % 2] for i in range(6)]
    found = ids(prompts, numbers)
    assert ids(prompts[::-1], numbers[::-1], batch_size=4)[::-1] == found
    # Each of them counts.
    for column in range(3):
        other = np.array(numbers, np.uint32)
        other[:, column] += 9
        assert all(a != b for a, b in zip(ids(prompts, other), found, strict=True) if len(a) > 2)
