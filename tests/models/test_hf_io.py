"""Directories in and out: what is accepted, what is refused and how, and on which devices."""

import json
import resource
import shlex
import shutil
import subprocess
import sys

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
import torch
import transformers
from flax import nnx

from uld_jax import models
from uld_jax.errors import UserError
from uld_jax.models.hf_io import SafetensorsSource, to_hf_tensors
from uld_jax.sharding import RULES, make_mesh
from uld_jax.testing import tiny_config, tiny_gemma, tiny_model

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
QUERY = "model.layers.0.self_attn.q_proj.weight"


@pytest.fixture(scope="module")
def original():
    return tiny_model()


@pytest.fixture(scope="module")
def saved(original, tmp_path_factory):
    directory = tmp_path_factory.mktemp("hf") / "tiny"
    models.save_pretrained(original, directory)
    return directory


@pytest.fixture
def directory(saved, tmp_path):
    """A copy of a good directory, to be broken."""
    return shutil.copytree(saved, tmp_path / "m")


def tensors_in(directory):
    return safetensors.numpy.load_file(directory / WEIGHTS)


def rewrite(directory, tensors):
    safetensors.numpy.save_file(tensors, directory / WEIGHTS, {"format": "pt"})


def edit_config(directory, **changes):
    path = directory / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def split_in_two(directory):
    """The same weights as two files and an index."""
    tensors = tensors_in(directory)
    names = sorted(tensors)
    weight_map = {}
    for part in (0, 1):
        file = f"model-0000{part + 1}-of-00002.safetensors"
        safetensors.numpy.save_file({n: tensors[n] for n in names[part::2]}, directory / file)
        weight_map |= dict.fromkeys(names[part::2], file)
    (directory / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    (directory / WEIGHTS).unlink()


def refusal(source, **settings):
    with pytest.raises(UserError) as caught:
        models.load(source, **settings)
    message = str(caught.value)
    assert "\n" not in message
    return message


def assert_equal(a, b):
    tensors = [to_hf_tensors(m.config, nnx.state(m.model, nnx.Param)) for m in (a, b)]
    assert tensors[0].keys() == tensors[1].keys()
    for name, value in tensors[0].items():
        assert value.dtype == tensors[1][name].dtype
        np.testing.assert_array_equal(value, tensors[1][name], err_msg=name)


def test_every_flaw_of_the_weights_is_in_one_message(directory):
    tensors = tensors_in(directory)
    del tensors[QUERY]
    del tensors["model.norm.weight"]
    tensors["model.layers.0.self_attn.q_proj.bias"] = np.zeros(32, np.float32)
    up = "model.layers.1.mlp.up_proj.weight"
    tensors[up] = tensors[up].T.copy()
    rewrite(directory, tensors)
    message = refusal(directory)
    assert message == (
        f"{directory}: 4 problems with its weights: missing {QUERY}; missing model.norm.weight; "
        "unexpected model.layers.0.self_attn.q_proj.bias; "
        f"{up} has shape (32, 48), expected (48, 32); "
        "they are not those of its config (vocab_size 300, …): fetch both again"
    )


@pytest.mark.parametrize("kept", [0, 4, 200, -1])
def test_weights_cut_short(directory, kept):
    path = directory / WEIGHTS
    path.write_bytes(path.read_bytes()[:kept])
    message = refusal(directory)
    assert message.startswith(f"{path}: not a complete safetensors file: ")
    assert f"its {path.stat().st_size} bytes may be a download cut short: fetch it" in message


def test_no_config(directory):
    (directory / "config.json").unlink()
    assert f"{directory / 'config.json'}: no such file" in refusal(directory)


@pytest.mark.parametrize(
    ("text", "said"), [("{", "not JSON"), ("[]", "expected a JSON object, found list")]
)
def test_a_config_that_is_no_json_object(directory, text, said):
    (directory / "config.json").write_text(text)
    assert f"config.json: {said}" in refusal(directory)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"model_type": "bert"}, "model_type 'bert' is not supported; supported: ['bloom', 'falco"),
        ({"model_type": None}, "model_type 'None' is not supported"),
        (
            {"model_type": "mamba9", "auto_map": {"AutoModel": "modeling.Mamba9"}},
            "(whose own code, for trust_remote_code, is never run): model_type 'mamba9' is not",
        ),
        ({"quantization_config": {"bits": 4}}, "quantization_config {'bits': 4} is not supported"),
        ({"hidden_act": "relu"}, "hidden_act='relu'"),
        (
            {
                "rope_parameters": {
                    "rope_type": "linear",
                    "rope_theta": 1e4,
                    "factor": 2.0,
                    "hop": 3,
                }
            },
            "rope_parameters: unsupported: {'hop': 3}",
        ),
        ({"hidden_size": "wide"}, "'hidden_size' expected int, got str"),
        ({"num_attention_heads": 5}, "hidden size (32) is not a multiple of"),
    ],
)
def test_a_config_that_is_not_supported(directory, changes, said):
    edit_config(directory, **changes)
    message = refusal(directory)
    assert "config.json" in message
    assert said in message


def test_a_vocabulary_of_the_wrong_size(directory):
    edit_config(directory, vocab_size=65)
    said = "model.embed_tokens.weight has shape (300, 32), expected (65, 32)"
    message = refusal(directory)
    assert said in message
    assert "not those of its config (vocab_size 65, …): fetch both again" in message


def test_our_own_code_reads_a_supported_model_that_brings_code_along(directory, original):
    edit_config(directory, auto_map={"AutoModelForCausalLM": "modeling_llama.LlamaForCausalLM"})
    (directory / "modeling_llama.py").write_text("raise SystemExit('remote code was run')")
    assert_equal(models.load(directory), original)


def test_pickled_weights_are_refused_with_a_command_that_converts_them(directory, original):
    weights = {name: torch.tensor(value) for name, value in tensors_in(directory).items()}
    torch.save(weights, directory / "pytorch_model.bin")
    (directory / WEIGHTS).unlink()
    message = refusal(directory)
    assert f"{directory / WEIGHTS}: no such weights file, only ['pytorch_model.bin']" in message
    command = shlex.split(message.split("convert them: ")[1])
    subprocess.run([sys.executable, *command[1:]], check=True, capture_output=True)
    assert_equal(models.load(command[-1]), original)


def test_quantised_weights_are_refused(directory):
    tensors = tensors_in(directory)
    tensors[QUERY] = tensors[QUERY].astype(np.int8)
    rewrite(directory, tensors)
    message = refusal(directory)
    assert (
        f"1 tensors are of none of the types ['BF16', 'F16', 'F32', 'F64'] (the first: {QUERY}, I8)"
        in message
    )


def test_a_source_that_is_nothing(tmp_path):
    for source in ("no-slash", "a/b/c", "./here/not", "/no/such", tmp_path / "gone"):
        said = f"{source}: no such directory, and not a hub id like 'owner/name'"
        assert refusal(source) == said
    assert "launch/fetch_models.sh" in refusal("gone.gguf")


def test_a_hub_id_without_the_hub():
    message = refusal("nobody-here/no-such-model")
    assert message.startswith("nobody-here/no-such-model: no such directory here, and the hub did")


@pytest.mark.parametrize("text", [None, "{", "{}"])
def test_no_tokenizer_that_opens(directory, text):
    for path in directory.glob("tokenizer*"):
        path.unlink()
    if text is not None:
        (directory / "tokenizer.json").write_text(text)
    assert f"{directory}: no tokenizer that opens (" in refusal(directory)


def test_sharded_weights(directory, original):
    split_in_two(directory)
    assert_equal(models.load(directory), original)


def test_a_weights_file_that_the_index_names_is_missing(directory):
    split_in_two(directory)
    gone = directory / "model-00002-of-00002.safetensors"
    gone.unlink()
    assert refusal(directory) == f"{gone}: no such weights file; fetch the model again"


def test_a_tensor_that_the_index_names_is_missing(directory):
    split_in_two(directory)
    file = json.loads((directory / INDEX).read_text())["weight_map"][QUERY]
    tensors = safetensors.numpy.load_file(directory / file)
    del tensors[QUERY]
    safetensors.numpy.save_file(tensors, directory / file)
    assert refusal(directory) == (
        f"{directory / INDEX}: 1 tensors are not where it says: {QUERY} is not in {file} but in "
        "no file; the index and the files are not of one export: fetch them all again"
    )


@pytest.mark.parametrize("stored", [ml_dtypes.bfloat16, np.float16, np.float64])
@pytest.mark.parametrize("wanted", ["float32", "bfloat16"])
def test_stored_types(directory, original, stored, wanted):
    tensors = {name: value.astype(stored) for name, value in tensors_in(directory).items()}
    rewrite(directory, tensors)
    loaded = models.load(directory, param_dtype=wanted)
    found = to_hf_tensors(loaded.config, nnx.state(loaded.model, nnx.Param))
    for name, value in tensors.items():
        assert found[name].dtype == wanted
        np.testing.assert_array_equal(found[name], value.astype(wanted), err_msg=name)
    logits = loaded.model(jnp.array([[5, 6, 7]]))
    assert logits.dtype == jnp.float32
    np.testing.assert_allclose(logits, original.model(jnp.array([[5, 6, 7]])), atol=0.02)


def test_tensors_are_read_on_the_host(saved):
    found = SafetensorsSource(saved).read(QUERY, [((0, 32), (0, 32)), ((3, 5), (8, 32))])
    assert [type(part) for part in found] == [np.ndarray, np.ndarray]
    np.testing.assert_array_equal(found[0], tensors_in(saved)[QUERY])
    np.testing.assert_array_equal(found[1], found[0][3:5, 8:])


def test_a_tied_head_that_is_stored_twice(directory, original):
    tensors = tensors_in(directory)
    rewrite(directory, tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"]})
    assert_equal(models.load(directory), original)


def test_several_end_tokens_survive_the_round_trip(directory, tmp_path):
    edit_config(directory, eos_token_id=[2, 7])
    loaded = models.load(directory)
    assert loaded.config.eos_id == (2, 7)
    # jit hashes the config.
    assert models.complete(loaded, [[5, 6]], max_new_tokens=2)
    models.save_pretrained(loaded, tmp_path / "again")
    assert transformers.AutoConfig.from_pretrained(tmp_path / "again").eos_token_id == [2, 7]
    assert models.load(tmp_path / "again").config == loaded.config


@pytest.mark.parametrize("config", [tiny_config(tied=False), tiny_gemma(kv_heads=2)])
@pytest.mark.parametrize("shape", [(8, 1, 1), (2, 4, 1), (2, 2, 2)])
def test_every_parameter_lies_where_the_rules_say(config, shape, tmp_path):
    original = tiny_model(config)
    models.save_pretrained(original, tmp_path / "m")
    mesh = make_mesh(*shape)
    loaded = models.load(tmp_path / "m", mesh=mesh)
    assert_equal(loaded, original)
    for path, param in nnx.to_flat_state(nnx.state(loaded.model, nnx.Param)):
        x = param[...]
        assert x.sharding.mesh == mesh, path
        cuts = [mesh.shape.get(RULES[axis], 1) for axis in param.get_metadata("axes")]
        block = tuple(size // cut for size, cut in zip(x.shape, cuts, strict=True))
        assert {shard.data.shape for shard in x.addressable_shards} == {block}, path
        assert len(x.addressable_shards) == 8


def test_without_a_mesh_everything_lies_on_the_first_device(saved):
    for leaf in jax.tree.leaves(nnx.state(models.load(saved).model)):
        assert leaf.devices() == {jax.devices()[0]}


def test_a_mesh_that_does_not_divide(saved, original):
    mesh = make_mesh(1, 1, 7, devices=jax.devices()[:7])
    size = original.config.vocab_size
    assert size % 7
    message = refusal(saved, mesh=mesh)
    assert f"embed: axis 'vocab' has size {size}, which the mesh axis tensor of size 7" in message


def test_an_unknown_type_of_computation(saved):
    types = "must be 'float32' or 'bfloat16': got"
    assert refusal(saved, dtype="float61") == f"dtype {types} 'float61'"
    assert refusal(saved, param_dtype=jnp.int8) == f"param_dtype {types} 'int8'"
    kinds = "['none', 'dots', 'full', 'offload']"
    assert refusal(saved, remat="some") == f"remat must be one of {kinds}: got 'some'"
    assert models.load(saved, dtype=jnp.bfloat16).model.policy.dtype == "bfloat16"


def test_export_refuses_what_is_there(original, tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("keep")
    (tmp_path / "file").write_text("keep")
    for name in ("full", "file"):
        with pytest.raises(UserError, match=f"{name}: exists and is not an empty directory"):
            models.save_pretrained(original, tmp_path / name)
    assert sorted(p.name for p in tmp_path.rglob("*")) == ["file", "full", "mine.txt"]


def test_export_into_an_empty_directory_and_new_parents(original, tmp_path):
    (tmp_path / "empty").mkdir()
    models.save_pretrained(original, tmp_path / "empty")
    models.save_pretrained(original, tmp_path / "a" / "b" / "c")
    assert_equal(models.load(tmp_path / "empty"), models.load(tmp_path / "a" / "b" / "c"))


def test_export_on_a_full_disk_leaves_nothing(original, tmp_path):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    # Enough for the config and the tokenizer, not for the weights.
    resource.setrlimit(resource.RLIMIT_FSIZE, (64_000, hard))
    try:
        with pytest.raises(UserError, match=r"out: the model could not be written: .*too large"):
            models.save_pretrained(original, tmp_path / "out")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert list(tmp_path.iterdir()) == []


def test_export_that_fails_midway_leaves_nothing(original, tmp_path):
    class Broken(transformers.PreTrainedTokenizerFast):
        def save_pretrained(self, directory, **_):
            (directory / "tokenizer.json").write_text("{")
            raise RuntimeError("tokenizer is broken")

    tokenizer = Broken(tokenizer_object=original.tokenizer.backend_tokenizer)
    broken = models.LoadedModel(original.model, tokenizer, original.config)
    with pytest.raises(RuntimeError, match="tokenizer is broken"):
        models.save_pretrained(broken, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_export_in_bfloat16(saved, tmp_path):
    half = models.load(saved, param_dtype="bfloat16")
    models.save_pretrained(half, tmp_path / "half")
    stored = tensors_in(tmp_path / "half")
    assert {value.dtype for value in stored.values()} == {np.dtype(ml_dtypes.bfloat16)}
    config = transformers.AutoConfig.from_pretrained(tmp_path / "half")
    assert str(config.dtype) == "torch.bfloat16"
    opened = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "half")
    for name, tensor in opened.state_dict().items():
        if name in stored:
            np.testing.assert_array_equal(tensor.float(), stored[name].astype(np.float32))
    assert_equal(models.load(tmp_path / "half", param_dtype="bfloat16"), half)
