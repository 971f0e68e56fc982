"""Quantised GGUF tensors against the block formats of llama.cpp, written out a value at a time.

Reference: ggml-common.h (the blocks) and ggml-quants.c (`dequantize_row_*`) of llama.cpp.
"""

import gguf
import numpy as np
import pytest
from flax import nnx
from gguf import GGMLQuantizationType as Kind

from uld_jax import models
from uld_jax.models.hf_io import to_hf_tensors
from uld_jax.testing import toy_tokenizer

TOKENIZER = toy_tokenizer(300)
WIDTH, MLP = 256, 512


def halves(block, *offsets):
    """The float16 numbers at these bytes."""
    return [float(block[at : at + 2].view(np.float16)[0]) for at in offsets]


def nibble(byte, high):
    return int(byte) >> 4 if high else int(byte) & 15


def q4_0(block):
    (scale,) = halves(block, 0)
    return [scale * (nibble(block[2 + i % 16], i >= 16) - 8) for i in range(32)]


def q4_1(block):
    scale, least = halves(block, 0, 2)
    return [scale * nibble(block[4 + i % 16], i >= 16) + least for i in range(32)]


def q8_0(block):
    (scale,) = halves(block, 0)
    return [scale * int(block[2 + i].view(np.int8)) for i in range(32)]


def scale_and_least(packed, part):
    """The two 6-bit numbers of one of 8 parts in 12 bytes (`get_scale_min_k4`)."""
    packed = [int(byte) for byte in packed]
    if part < 4:
        return packed[part] & 63, packed[part + 4] & 63
    top_scale, top_least = packed[part - 4] >> 6, packed[part] >> 6
    return packed[part + 4] & 15 | top_scale << 4, packed[part + 4] >> 4 | top_least << 4


def k4_or_k5(block, five):
    scale, least = halves(block, 0, 2)
    fifth, quants = block[16:48], block[48 if five else 16 :]
    out = []
    for i in range(256):
        part, within = i // 32, i % 32
        value = nibble(quants[part // 2 * 32 + within], part % 2)
        value += 16 * (int(fifth[within]) >> part & 1) if five else 0
        times, minus = scale_and_least(block[4:16], part)
        out.append(scale * times * value - least * minus)
    return out


def q6_k(block):
    low, high, scales = block[:128], block[128:192], block[192:208].view(np.int8)
    (scale,) = halves(block, 208)
    out = []
    for i in range(256):
        half, within = i // 128, i % 128
        quarter, lane = within // 32, within % 32
        value = nibble(low[64 * half + 32 * (quarter % 2) + lane], quarter >= 2)
        value |= (int(high[32 * half + lane]) >> 2 * quarter & 3) << 4
        out.append(scale * int(scales[8 * half + within // 16]) * (value - 32))
    return out


# Of each type: bytes and values of a block, where its float16 numbers are, and what it means.
QUANTISED = {
    Kind.Q4_0: (18, 32, (0,), q4_0),
    Kind.Q4_1: (20, 32, (0, 2), q4_1),
    Kind.Q8_0: (34, 32, (0,), q8_0),
    Kind.Q4_K: (144, 256, (0, 2), lambda block: k4_or_k5(block, five=False)),
    Kind.Q5_K: (176, 256, (0, 2), lambda block: k4_or_k5(block, five=True)),
    Kind.Q6_K: (210, 256, (208,), q6_k),
}


def random_blocks(rng, kind, rows, width):
    """Any bytes are a valid block once its scales are finite; returns them and what they mean."""
    size, values, scales, meaning = QUANTISED[kind]
    blocks = rng.integers(0, 256, (rows * width // values, size), dtype=np.uint8)
    for at in scales:
        numbers = rng.uniform(-0.02, 0.02, (len(blocks), 1)).astype(np.float16)
        blocks[:, at : at + 2] = numbers.view(np.uint8)
    expected = np.array([meaning(block) for block in blocks])
    return blocks.reshape(rows, -1), expected.reshape(rows, width)


def rounded(rng, kind, rows, width):
    """Of the two 16-bit floats: the stored bytes, and the numbers."""
    values = rng.normal(size=(rows, width)).astype(np.float32)
    if kind == Kind.F16:
        half = values.astype(np.float16)
        return half, half.astype(np.float64)
    bits = values.view(np.uint32) >> 16
    stored = bits.astype(np.uint16).view(np.uint8)
    return stored.reshape(rows, -1), (bits << 16).view(np.float32).astype(np.float64)


def write(path, kind):
    """A Llama of one layer whose matrices are of this type; what they hold, by GGUF name."""
    rng, expected = np.random.default_rng(int(kind)), {}
    writer = gguf.GGUFWriter(path, "llama")
    for add, value in (
        (writer.add_context_length, 64),
        (writer.add_block_count, 1),
        (writer.add_embedding_length, WIDTH),
        (writer.add_feed_forward_length, MLP),
        (writer.add_head_count, 4),
        (writer.add_head_count_kv, 2),
        (writer.add_layer_norm_rms_eps, 1e-5),
        (writer.add_bos_token_id, 1),
        (writer.add_eos_token_id, 2),
        (writer.add_pad_token_id, 0),
        (writer.add_tokenizer_model, "gpt2"),
        (writer.add_tokenizer_pre, "gpt-2"),
    ):
        add(value)
    writer.add_token_list(TOKENIZER.convert_ids_to_tokens(range(len(TOKENIZER))))
    writer.add_token_types([3] * 3 + [1] * (len(TOKENIZER) - 3))
    writer.add_token_merges(["Ġ t"])
    for name in ("output_norm", "blk.0.attn_norm", "blk.0.ffn_norm"):
        writer.add_tensor(f"{name}.weight", np.ones(WIDTH, np.float32))
    shapes = {
        "token_embd": (len(TOKENIZER), WIDTH),
        "blk.0.attn_q": (WIDTH, WIDTH),
        "blk.0.attn_k": (WIDTH // 2, WIDTH),
        "blk.0.attn_v": (WIDTH // 2, WIDTH),
        "blk.0.attn_output": (WIDTH, WIDTH),
        "blk.0.ffn_gate": (MLP, WIDTH),
        "blk.0.ffn_up": (MLP, WIDTH),
        "blk.0.ffn_down": (WIDTH, MLP),
    }
    make = random_blocks if kind in QUANTISED else rounded
    for name, (rows, width) in shapes.items():
        stored, expected[name] = make(rng, kind, rows, width)
        writer.add_tensor(f"{name}.weight", stored, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return expected


@pytest.mark.parametrize("kind", [*QUANTISED, Kind.F16, Kind.BF16], ids=lambda kind: kind.name)
def test_a_type_means_what_llama_cpp_says(kind, tmp_path, monkeypatch):
    monkeypatch.setenv("ULD_JAX_CACHE", str(tmp_path / "cache"))
    expected = write(tmp_path / "m.gguf", kind)
    loaded = models.load(tmp_path / "m.gguf")
    found = to_hf_tensors(loaded.config, nnx.state(loaded.model, nnx.Param))
    names = {
        "token_embd": "model.embed_tokens",
        "blk.0.attn_v": "model.layers.0.self_attn.v_proj",
        "blk.0.attn_output": "model.layers.0.self_attn.o_proj",
        "blk.0.ffn_gate": "model.layers.0.mlp.gate_proj",
        "blk.0.ffn_up": "model.layers.0.mlp.up_proj",
        "blk.0.ffn_down": "model.layers.0.mlp.down_proj",
    }
    for theirs, ours in names.items():
        value, right = found[f"{ours}.weight"], expected[theirs]
        assert value.dtype == np.float32
        # Float32 products and sums of a few terms, of what is computed here in float64.
        np.testing.assert_allclose(value, right, rtol=1e-6, atol=1e-6 * abs(right).max())
    # The rows of queries and keys lie in another order, but are the same rows.
    query = found["model.layers.0.self_attn.q_proj.weight"]
    order = np.arange(WIDTH).reshape(4, 32, 2).swapaxes(1, 2).ravel()
    right = expected["blk.0.attn_q"]
    np.testing.assert_allclose(query, right[order], rtol=1e-6, atol=1e-6 * abs(right).max())


@pytest.mark.parametrize("kind", [Kind.Q4_0, Kind.Q4_1, Kind.Q8_0], ids=lambda kind: kind.name)
def test_the_reference_undoes_what_gguf_quantises(kind):
    """The reference above is itself right: within half a step of what was quantised."""
    values = np.random.default_rng(0).normal(size=(8, 64)).astype(np.float32)
    size, length, _, meaning = QUANTISED[kind]
    blocks = gguf.quants.quantize(values, kind).reshape(-1, size)
    found = np.array([meaning(block) for block in blocks])
    rows = values.reshape(-1, length)
    spread = np.ptp(rows, axis=1) if kind == Kind.Q4_1 else 2 * abs(rows).max(axis=1)
    steps = {Kind.Q4_0: 16, Kind.Q4_1: 15, Kind.Q8_0: 254}[kind]
    # Q4_0 has one value less on one side, which clips by up to a whole step.
    part = 1.01 if kind == Kind.Q4_0 else 0.51
    assert (abs(found - rows) <= part * spread[:, None] / steps).all()
