"""Directories of a model that are not what they should be: one line that names the thing."""

import json
import shutil

import pytest
import safetensors.numpy
import tokenizers

from uld_jax import models
from uld_jax.errors import UserError
from uld_jax.testing import tiny_model

INDEX = "model.safetensors.index.json"
FILES = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
QUERY = "model.layers.0.self_attn.q_proj.weight"


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A model whose weights are in two files."""
    directory = tmp_path_factory.mktemp("hf") / "tiny"
    models.save_pretrained(tiny_model(), directory)
    tensors = safetensors.numpy.load_file(directory / "model.safetensors")
    names, weight_map = sorted(tensors), {}
    for part, file in enumerate(FILES):
        mine = names[part::2]
        safetensors.numpy.save_file({n: tensors[n] for n in mine}, directory / file)
        weight_map |= dict.fromkeys(mine, file)
    (directory / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    (directory / "model.safetensors").unlink()
    return directory


@pytest.fixture
def directory(saved, tmp_path):
    """A copy, to be broken."""
    return shutil.copytree(saved, tmp_path / "m")


def edit(path, change):
    value = json.loads(path.read_text())
    change(value)
    path.write_text(json.dumps(value))


def refusal(source):
    with pytest.raises(UserError) as caught:
        models.load(source)
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_it_opens_before_it_is_broken(directory):
    assert models.load(directory).config.layers == 2


def test_an_index_that_names_another_file(directory):
    home = {}

    def swap(index):
        weight_map = index["weight_map"]
        home["file"] = weight_map[QUERY]
        weight_map[QUERY] = home["other"] = next(f for f in FILES if f != home["file"])
        weight_map["made.up"] = home["file"]

    edit(directory / INDEX, swap)
    assert refusal(directory) == (
        f"{directory / INDEX}: 2 tensors are not where it says: made.up is not in {home['file']} "
        f"but in no file; {QUERY} is not in {home['other']} but in {home['file']}; the index and "
        "the files are not of one export: fetch them all again"
    )


def test_a_tensor_in_two_files_is_read_where_the_index_says(directory):
    file = json.loads((directory / INDEX).read_text())["weight_map"][QUERY]
    other = directory / next(name for name in FILES if name != file)
    tensors = safetensors.numpy.load_file(other)
    right = safetensors.numpy.load_file(directory / file)[QUERY]
    safetensors.numpy.save_file(tensors | {QUERY: right + 1}, other)
    found = models.load(directory).model.blocks.attention.query[...][0]
    assert (found == right.T).all()


@pytest.mark.parametrize("file", ["../stolen.safetensors", "/etc/passwd", "sub/x", "..", "", 3])
def test_an_index_that_leads_out_of_the_directory(directory, file):
    (directory / "sub").mkdir()
    for target in (directory.parent / "stolen.safetensors", directory / "sub" / "x"):
        shutil.copy(directory / FILES[0], target)
    edit(directory / INDEX, lambda index: index["weight_map"].update({QUERY: file}))
    said = f"{directory / INDEX}: {QUERY} should be in a .safetensors file of this directory, "
    assert f"{said}not in {file!r}; no others are read" in refusal(directory)


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"weight_map": {}}', '{"weight_map": ["a"]}'])
def test_an_index_that_is_none(directory, text):
    (directory / INDEX).write_text(text)
    message = refusal(directory)
    assert message.startswith(f"{directory / INDEX}: ")
    assert "not JSON" in message or "expected" in message


@pytest.mark.parametrize("place", [0, 7, 8, 9, 40, 41, 200])
def test_a_flipped_header(directory, place):
    """The size of the header, its braces and quotes, a key, and an offset."""
    path = directory / FILES[1]
    whole = bytearray(path.read_bytes())
    whole[place] ^= 0xFF
    path.write_bytes(whole)
    message = refusal(directory)
    assert message.startswith(f"{path}: not a complete safetensors file: ")
    assert message.endswith("may be a download cut short: fetch it again")


@pytest.mark.parametrize("share", [0.0, 0.3, 0.999])
def test_a_shard_cut_short(directory, share):
    path = directory / FILES[0]
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * share)])
    assert refusal(directory).startswith(f"{path}: not a complete safetensors file: ")


def test_a_tensor_of_another_size_than_its_bytes(directory):
    path = directory / FILES[0]
    whole = path.read_bytes()
    assert b'"shape":[32,32]' in whole
    path.write_bytes(whole.replace(b'"shape":[32,32]', b'"shape":[32,64]', 1))
    assert refusal(directory).startswith(f"{path}: not a complete safetensors file: ")


def grow_tokenizer(directory, **options):
    path = directory / "tokenizer.json"
    tokenizer = tokenizers.Tokenizer.from_file(str(path))
    size = tokenizer.get_vocab_size()
    add = tokenizer.add_special_tokens if options.pop("special", False) else tokenizer.add_tokens
    add(["<more>"])
    tokenizer.save(str(path))
    return size


def test_a_tokenizer_with_more_tokens_than_the_embedding_has_rows(directory):
    path = directory / "tokenizer.json"
    edit(path, lambda value: value["model"]["vocab"].update({"zebra": 300, "zebu": 301}))
    message = refusal(directory)
    assert message.startswith(
        f"{directory}: 2 tokens of its tokenizer have ids beyond its vocab_size 300, up to 301 "
        "('zebu'): take the tokenizer that belongs to the weights, or "
    )


def test_an_end_token_beyond_the_embedding(directory):
    grow_tokenizer(directory, special=True)
    config = directory / "tokenizer_config.json"
    edit(config, lambda value: value.update({"pad_token": "<more>"}))
    assert "1 tokens of its tokenizer have ids beyond its vocab_size 300, up to 300" in refusal(
        directory
    )


def test_an_added_token_beyond_the_embedding_that_no_text_gets(directory):
    """As Gemma 3's token for an image."""
    size = grow_tokenizer(directory, special=True)
    loaded = models.load(directory)
    assert len(loaded.tokenizer) == size + 1 > loaded.config.vocab_size


def test_a_tokenizer_that_is_code(directory):
    for path in directory.glob("tokenizer*"):
        path.unlink()
    (directory / "tokenization_mine.py").write_text("raise SystemExit('remote code was run')")
    config = {
        "auto_map": {"AutoTokenizer": ["tokenization_mine.Mine", None]},
        "tokenizer_class": "Mine",
    }
    (directory / "tokenizer_config.json").write_text(json.dumps(config))
    message = refusal(directory)
    assert f"{directory}: no tokenizer that opens (" in message
    assert message.endswith("save the model's tokenizer.json there")


def test_pickled_shards_are_refused_by_name(directory):
    for number, file in enumerate(FILES):
        (directory / file).rename(directory / f"pytorch_model-0000{number + 1}-of-00002.bin")
    (directory / INDEX).rename(directory / "pytorch_model.bin.index.json")
    message = refusal(directory)
    assert "['pytorch_model-00001-of-00002.bin', 'pytorch_model-00002-of-00002.bin']" in message
    assert "convert them: python -c 'import sys; from transformers import" in message
