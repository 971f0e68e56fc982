"""Small GGUF files in llama.cpp's conventions, against the same models as safetensors."""

import gguf
import numpy as np
import pytest
import torch
import transformers
from flax import nnx
from gguf import GGMLQuantizationType as Kind

from uld_jax import models
from uld_jax.errors import UserError
from uld_jax.models.gguf import LONG_ARRAY, _HeaderReader
from uld_jax.models.hf_io import to_hf_tensors
from uld_jax.sharding import make_mesh
from uld_jax.testing import toy_tokenizer

TOKENIZER = toy_tokenizer(300)
COMMON = {
    "vocab_size": len(TOKENIZER),
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 7,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "rms_norm_eps": 2.0**-20,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "initializer_range": 0.3,
}
CONFIGS = {
    "llama": transformers.LlamaConfig(
        **COMMON,
        tie_word_embeddings=False,
        rope_parameters={"rope_type": "default", "rope_theta": 50_000.0},
    ),
    "gemma3": transformers.Gemma3TextConfig(
        **COMMON, sliding_window=5, query_pre_attn_scalar=8, tie_word_embeddings=True
    ),
}


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("ULD_JAX_CACHE", str(tmp_path / "cache"))


@pytest.fixture(scope="module", params=CONFIGS)
def theirs(request):
    """A tiny random transformers model; adding 1 to its norms loses no bit."""
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(CONFIGS[request.param])
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "norm" in name:
                weight.add_(torch.randint_like(weight, -9, 9) / 64)
    return model


@pytest.fixture(scope="module")
def llama():
    torch.manual_seed(0)
    return transformers.AutoModelForCausalLM.from_config(CONFIGS["llama"])


def stored_tensors(model):
    """A model's tensors as llama.cpp's converter names and changes them."""
    config = model.config
    architecture = "llama" if config.model_type == "llama" else "gemma3"
    kind = {name: kind for kind, name in gguf.MODEL_ARCH_NAMES.items()}[architecture]
    names = gguf.get_tensor_name_map(kind, config.num_hidden_layers)
    out = {}
    for name, value in model.state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        array = value.numpy()
        if architecture == "gemma3" and "norm" in name:
            array = array + 1
        if architecture == "llama" and ("q_proj" in name or "k_proj" in name):
            heads = config.num_attention_heads if "q_proj" in name else config.num_key_value_heads
            # Row i of a head's first half comes before row i of its second half.
            halves = array.reshape(heads, 2, -1, array.shape[1])
            array = np.stack([halves[:, 0], halves[:, 1]], axis=2).reshape(array.shape)
        out[names.get_name(name, (".weight",))] = array
    return architecture, out


def write_gguf(path, model, *, kind=Kind.F32, leave_out=(), replace=None, extra=None, **options):
    """A file that says what the model's config says; `replace` holds tensors stored as they are."""
    config = model.config
    architecture, tensors = stored_tensors(model)
    writer = gguf.GGUFWriter(path, architecture, **options)
    fields = {
        writer.add_context_length: config.max_position_embeddings,
        writer.add_block_count: config.num_hidden_layers,
        writer.add_embedding_length: config.hidden_size,
        writer.add_feed_forward_length: config.intermediate_size,
        writer.add_head_count: config.num_attention_heads,
        writer.add_head_count_kv: config.num_key_value_heads,
        writer.add_key_length: config.head_dim,
        writer.add_layer_norm_rms_eps: config.rms_norm_eps,
        writer.add_bos_token_id: config.bos_token_id,
        writer.add_eos_token_id: config.eos_token_id,
        writer.add_pad_token_id: config.pad_token_id,
        writer.add_tokenizer_model: "gpt2",
        writer.add_tokenizer_pre: "gpt-2",
    }
    rope = config.rope_parameters
    fields[writer.add_rope_freq_base] = rope.get("full_attention", rope)["rope_theta"]
    if architecture == "gemma3":
        fields[writer.add_sliding_window] = config.sliding_window
    for add, value in fields.items():
        if add.__name__ not in leave_out:
            add(value)
    writer.add_token_list(TOKENIZER.convert_ids_to_tokens(range(len(TOKENIZER))))
    writer.add_token_types([3] * 3 + [1] * (len(TOKENIZER) - 3))
    writer.add_token_merges(["Ġ t"])
    for key, value in (extra or {}).items():
        writer.add_string(key, value)
    for name, array in tensors.items():
        if name not in {*leave_out, *(replace or ())}:
            small = kind if array.ndim > 1 else Kind.F32
            writer.add_tensor(name, gguf.quants.quantize(array, small), raw_dtype=small)
    for name, array in (replace or {}).items():
        writer.add_tensor(name, array)
    return finish(writer, path)


def finish(writer, path):
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def weights_of(m):
    return to_hf_tensors(m.config, nnx.state(m.model, nnx.Param))


@pytest.fixture
def from_safetensors(theirs, tmp_path):
    theirs.save_pretrained(tmp_path / "hf")
    TOKENIZER.save_pretrained(tmp_path / "hf")
    return models.load(tmp_path / "hf")


def test_float32_equals_safetensors(theirs, from_safetensors, tmp_path):
    path = write_gguf(tmp_path / "m.gguf", theirs)
    found = models.load(path)
    assert found.config == from_safetensors.config
    expected = weights_of(from_safetensors)
    for name, value in weights_of(found).items():
        np.testing.assert_array_equal(value, expected.pop(name), err_msg=name)
    assert not expected
    sharded = weights_of(models.load(path, mesh=make_mesh(1, 4, 2)))
    for name, value in weights_of(found).items():
        np.testing.assert_array_equal(sharded[name], value, err_msg=name)


def test_float16_is_rounded_once(theirs, from_safetensors, tmp_path):
    found = weights_of(models.load(write_gguf(tmp_path / "m.gguf", theirs, kind=Kind.F16)))
    for name, value in weights_of(from_safetensors).items():
        rounded = value.astype(np.float16).astype(np.float32) if value.ndim > 1 else value
        np.testing.assert_array_equal(found[name], rounded, err_msg=name)


def test_q8_0_is_within_its_step(theirs, from_safetensors, tmp_path):
    found = weights_of(models.load(write_gguf(tmp_path / "m.gguf", theirs, kind=Kind.Q8_0)))
    for name, value in weights_of(from_safetensors).items():
        if value.ndim == 1:
            np.testing.assert_array_equal(found[name], value, err_msg=name)
            continue
        off = np.abs(found[name] - value).reshape(-1, 32)
        step = np.abs(value).reshape(-1, 32).max(axis=1, keepdims=True) / 127
        # Half a step, and the scale's own rounding to 11 bits on up to 127 steps.
        assert (off <= (0.5 + 127 * 2**-11) * step).all(), name
        assert off.any(), name


def refusal(path):
    with pytest.raises(UserError) as caught:
        models.load(path)
    message = str(caught.value)
    assert "\n" not in message
    assert message.startswith(f"{path}: ")
    return message


def test_a_file_cut_short_anywhere(llama, tmp_path):
    path = write_gguf(tmp_path / "m.gguf", llama)
    whole = path.read_bytes()
    metadata = _HeaderReader(path).data_offset
    cuts = [*range(64), *range(64, metadata, 997), metadata, (metadata + len(whole)) // 2]
    for size in [*cuts, len(whole) - 1]:
        path.write_bytes(whole[:size])
        message = refusal(path)
        assert "not a complete GGUF file (" in message
        assert f"its {size} bytes" in message


def test_random_bytes(llama, tmp_path):
    rng = np.random.default_rng(0)
    path = write_gguf(tmp_path / "m.gguf", llama)
    start = path.read_bytes()
    for kept in [0] * 20 + list(range(4, 84)):
        path.write_bytes(start[:kept] + rng.bytes(int(rng.integers(1, 5000))))
        assert "not a complete GGUF file" in refusal(path)


@pytest.mark.parametrize("name", ["blk.3.ffn_up.weight", "output_norm.weight"])
def test_a_tensor_is_missing(llama, tmp_path, name):
    path = write_gguf(tmp_path / "m.gguf", llama, leave_out=[name])
    theirs = {"blk": "model.layers.3.mlp.up_proj.weight", "out": "model.norm.weight"}[name[:3]]
    assert f"{path}: 1 problems with its weights: missing {theirs}; they" in refusal(path)


def test_tensors_that_the_model_has_no_place_for(llama, tmp_path):
    bias = {"blk.0.attn_q.bias": np.zeros(32, np.float32)}
    path = write_gguf(tmp_path / "m.gguf", llama, replace=bias)
    said = f"{path}: 1 problems with its weights: unexpected blk.0.attn_q.bias; they are not"
    assert said in refusal(path)


def test_the_embedding_or_a_field_is_missing(llama, tmp_path):
    for leave_out, name in (
        ("token_embd.weight", "token_embd.weight"),
        ("add_block_count", "llama.block_count"),
        ("add_head_count", "llama.attention.head_count"),
    ):
        path = write_gguf(tmp_path / "m.gguf", llama, leave_out=[leave_out])
        assert refusal(path) == f"{path}: GGUF metadata or tensor '{name}' is missing"


def test_what_is_not_supported(llama, tmp_path):
    path = tmp_path / "m.gguf"
    finish(gguf.GGUFWriter(path, "mamba"), path)
    assert "GGUF architecture 'mamba' is not supported; supported: ['gemma3', " in refusal(path)
    write_gguf(path, llama, extra={"llama.rope.scaling.type": "yarn"})
    with pytest.raises(UserError, match="rope_scaling='yarn'"):
        models.load(path)
    name = "blk.2.attn_v.weight"
    write_gguf(path, llama, replace={name: np.zeros((16, 32), np.int8)})
    assert f"tensor {name} is of type I8, which cannot be dequantised" in refusal(path)


def test_a_file_without_an_architecture(tmp_path):
    path = tmp_path / "m.gguf"
    # Magic, version 3, no tensors, no fields.
    path.write_bytes(b"GGUF" + np.uint32(3).tobytes() + np.zeros(2, np.uint64).tobytes())
    said = "GGUF metadata or tensor 'general.architecture' is missing"
    assert refusal(path) == f"{path}: {said}"


def test_the_fast_reader_reads_the_same(tmp_path):
    path, rng, n = tmp_path / "m.gguf", np.random.default_rng(0), LONG_ARRAY + 1
    writer = gguf.GGUFWriter(path, "llama")
    long = {
        "long.strings": [f"token {i} " + "é" * (i % 7) for i in range(3 * n)],
        "long.ints": rng.integers(-9, 9, n).tolist(),
        "long.floats": rng.normal(size=n).tolist(),
        "long.bools": (rng.random(n) < 0.5).tolist(),
    }
    short = {"short.strings": ["a", "", "ü"], "short.ints": [3], "edge": list(range(LONG_ARRAY))}
    for (name, value), (plain, other) in zip(
        long.items(), [*short.items(), ("", None)], strict=True
    ):
        writer.add_array(name, value)
        if plain:
            writer.add_array(plain, other)
        writer.add_uint32(f"after.{name}", len(name))
    writer.add_string("last", "naïve")
    tensors = {
        "a": rng.normal(size=(3, 64)),
        "b": rng.normal(size=5),
        "c": rng.normal(size=(2, 32)),
    }
    for name, value in tensors.items():
        kind = Kind.F32 if name == "b" else Kind.Q8_0
        data = gguf.quants.quantize(value.astype(np.float32), kind)
        writer.add_tensor(name, data, raw_dtype=kind)
    finish(writer, path)
    fast, plain = _HeaderReader(path), gguf.GGUFReader(path)
    assert list(fast.fields) == list(plain.fields)
    for name, field in plain.fields.items():
        assert fast.fields[name].offset == field.offset
        assert fast.fields[name].contents() == ([] if name in long else field.contents()), name
    assert [name for name, field in fast.fields.items() if not field.data] == list(long)
    assert fast.data_offset == plain.data_offset
    for ours, expected in zip(fast.tensors, plain.tensors, strict=True):
        assert (ours.name, ours.tensor_type) == (expected.name, expected.tensor_type)
        assert ours.shape.tolist() == expected.shape.tolist()
        np.testing.assert_array_equal(ours.data, expected.data)


def test_the_other_byte_order_is_refused(llama, tmp_path):
    path = write_gguf(tmp_path / "m.gguf", llama, endianess=gguf.GGUFEndian.BIG)
    assert "big-endian GGUF files are not supported" in refusal(path)
