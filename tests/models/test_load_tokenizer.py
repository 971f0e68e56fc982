import dataclasses
import shutil

import pytest

from uld_jax import models
from uld_jax.errors import UserError
from uld_jax.testing import tiny_model, tiny_t5


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    for name, config in (("decoder", None), ("t5", tiny_t5(start_id=3))):
        models.save_pretrained(tiny_model(config), root / name)
    return root


@pytest.mark.parametrize("name", ["decoder", "t5"])
def test_weights_are_not_needed(saved, tmp_path, name):
    bare = tmp_path / name
    shutil.copytree(saved / name, bare, ignore=shutil.ignore_patterns("*.safetensors"))
    found, whole = models.load_tokenizer(bare), models.load(saved / name)
    # Whether a T5 is tied only its tensors say.
    assert dataclasses.replace(found.config, tied=whole.config.tied) == whole.config
    text = "the lighthouse keeper"
    assert found.tokenizer(text).input_ids == whole.tokenizer(text).input_ids
    with pytest.raises(UserError, match="no such weights file"):
        models.load(bare)


def test_a_gguf_file(smollm_gguf):
    found = models.load_tokenizer(smollm_gguf)
    assert found.config.vocab_size == 49152
    assert found.tokenizer.decode(found.tokenizer("the river").input_ids) == "the river"


def test_what_is_not_there(tmp_path):
    with pytest.raises(UserError, match="no such file"):
        models.load_tokenizer(tmp_path / "x.gguf")
    with pytest.raises(UserError, match=r"config.json: no such file|no tokenizer that opens"):
        models.load_tokenizer(tmp_path)


def test_a_tokenizer_beyond_the_vocabulary(saved, tmp_path):
    odd = tmp_path / "odd"
    shutil.copytree(saved / "decoder", odd)
    config = (odd / "config.json").read_text()
    size = models.load_tokenizer(odd).config.vocab_size
    (odd / "config.json").write_text(config.replace(f'"vocab_size": {size}', '"vocab_size": 40'))
    with pytest.raises(UserError, match="ids beyond its vocab_size 40"):
        models.load_tokenizer(odd)


def test_a_fingerprint_is_of_the_weights(saved, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(saved / "decoder", copy)
    before = models.weights_fingerprint(saved / "decoder")
    (copy / "README.md").write_text("other words")
    assert models.weights_fingerprint(copy) == before
    path = copy / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[-3] ^= 1
    path.write_bytes(content)
    assert models.weights_fingerprint(copy) != before
    assert models.weights_fingerprint(saved / "t5") != before
