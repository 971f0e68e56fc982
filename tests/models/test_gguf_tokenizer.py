"""The tokenizer rebuilt from small GGUF files made here: splitting, merging, errors, cache."""

import itertools
import json
import os
import random
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import gguf
import pytest
import transformers

from uld_jax.errors import UserError
from uld_jax.models.gguf_tokenizer import spm_merges, tokenizer_from_gguf

NORMAL, UNKNOWN, CONTROL, USER, BYTE = 1, 2, 3, 4, 6


def write_gguf(path, *, architecture="llama", **keys):
    """A GGUF file without tensors, with `tokenizer.ggml.*` as given."""
    writer = gguf.GGUFWriter(path, architecture)
    adders = {
        "model": writer.add_tokenizer_model,
        "pre": writer.add_tokenizer_pre,
        "tokens": writer.add_token_list,
        "scores": writer.add_token_scores,
        "token_type": writer.add_token_types,
        "merges": writer.add_token_merges,
        "bos": writer.add_bos_token_id,
        "eos": writer.add_eos_token_id,
        "unk": writer.add_unk_token_id,
        "pad": writer.add_pad_token_id,
        "add_bos": writer.add_add_bos_token,
        "add_eos": writer.add_add_eos_token,
        "space_prefix": writer.add_add_space_prefix,
        "chat_template": writer.add_chat_template,
    }
    for name, value in keys.items():
        adders[name](value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def byte_alphabet():
    """The 256 characters of byte-level BPE, in the order of their bytes."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = (chr(0x100 + i) for i in range(256))
    return [chr(byte) if byte in printable else next(others) for byte in range(256)]


def byte_level_keys(pre="gpt-2", merged=("ab", "ĠĠ"), **extra):
    special = ["<s>", "</s>", "<tool>", "  two spaces"]
    tokens = [*byte_alphabet(), *merged, *special]
    keys = {
        "model": "gpt2",
        "pre": pre,
        "tokens": tokens,
        "token_type": [NORMAL] * (256 + len(merged)) + [CONTROL, CONTROL, USER, USER],
        "merges": [f"{token[:-1]} {token[-1]}" for token in merged],
        "bos": tokens.index("<s>"),
        "eos": tokens.index("</s>"),
    }
    return keys | extra


def spm_keys(pieces=("▁", "a", "b", "ab", "▁ab"), **extra):
    """Control and byte tokens, then `pieces`, best last."""
    byte_tokens = [f"<0x{byte:02X}>" for byte in range(256)]
    tokens = ["<pad>", "</s>", "<s>", "<unk>", "<turn>", *byte_tokens, *pieces]
    keys = {
        "model": "llama",
        "tokens": tokens,
        "scores": [0.0] * 261 + [float(i) for i in range(len(pieces))],
        "token_type": [CONTROL] * 3 + [UNKNOWN, CONTROL] + [BYTE] * 256 + [NORMAL] * len(pieces),
        "bos": 2,
        "eos": 1,
        "unk": 3,
        "pad": 0,
    }
    return keys | extra


def build(tmp_path, **keys):
    return tokenizer_from_gguf(write_gguf(tmp_path / "m.gguf", **keys), cache_dir=tmp_path / "c")


# --- byte-level BPE ---


def test_byte_level_uses_merges_and_added_tokens(tmp_path):
    tok = build(tmp_path, **byte_level_keys(chat_template="{{ messages[0].content }}"))
    text = "abé<s><tool>  two spaces x"
    pieces = ["ab", "Ã", "©", "<s>", "<tool>", "  two spaces", "Ġ", "x"]
    assert tok.convert_ids_to_tokens(tok(text).input_ids) == pieces
    assert tok.decode(tok(text).input_ids) == text
    assert tok.decode(tok(text).input_ids, skip_special_tokens=True) == text.replace("<s>", "")
    assert (tok.bos_token, tok.eos_token, tok.pad_token) == ("<s>", "</s>", None)
    assert tok.clean_up_tokenization_spaces is False
    assert tok.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False) == "hi"


@pytest.mark.parametrize(
    ("pre", "text", "pieces"),
    [
        ("default", "a  123", ["a", "Ġ", "Ġ", "123"]),
        ("smollm", "a  123", ["a", "ĠĠ", "1", "2", "3"]),
        ("qwen2", "123!a", ["1", "2", "3", "!a"]),
        ("qwen2", "e\u0301", ["Ã", "©"]),  # composed first
        ("gpt-2", "e\u0301", ["e", "Ì", "ģ"]),
        ("llama-bpe", "1234xyz", ["123", "4", "xyz"]),  # xyz has no merge: taken whole
        ("llama-bpe", "!a", ["!a"]),
        ("gpt-2", "!a", ["!", "a"]),
    ],
)
def test_pre_decides_where_text_is_cut(tmp_path, pre, text, pieces):
    merged = ("12", "123", "1234", "!a", "ĠĠ", "xyz")
    merges = ["1 2", "12 3", "123 4", "! a", "Ġ Ġ"]
    tok = build(tmp_path, **byte_level_keys(pre, merged, merges=merges, add_bos=False))
    assert tok.convert_ids_to_tokens(tok(text).input_ids) == pieces


@pytest.mark.parametrize(
    ("pre", "stated", "ids"),
    [
        ("gpt-2", {}, ["a"]),
        ("llama-bpe", {}, ["<s>", "a"]),
        ("llama-bpe", {"add_bos": False}, ["a"]),
        ("gpt-2", {"add_bos": True, "add_eos": True}, ["<s>", "a", "</s>"]),
    ],
)
def test_bos_and_eos_are_added_as_stated(tmp_path, pre, stated, ids):
    tok = build(tmp_path, **byte_level_keys(pre, **stated))
    assert tok.convert_ids_to_tokens(tok("a").input_ids) == ids
    assert tok.convert_ids_to_tokens(tok("a", add_special_tokens=False).input_ids) == ["a"]


def test_byte_level_gives_back_text_and_character_offsets(tmp_path):
    tok = build(tmp_path, **byte_level_keys("smollm"))
    text = "é<s> ab\r\n  👍12"
    out = tok(text, return_offsets_mapping=True)
    assert tok.decode(out.input_ids) == text
    spans = [(0, 1), (0, 1), (1, 4), (4, 5), (5, 7), (7, 8), (8, 9), (9, 10), (10, 11)]
    assert out.offset_mapping == [*spans, *[(11, 12)] * 4, (12, 13), (13, 14)]


# --- SentencePiece BPE ---


def sentencepiece_bpe(text, score):
    """SentencePiece's rule, literally: join the best-scoring pair of neighbours, leftmost first."""
    pieces = list(text)
    while True:
        joined = [score.get(x + y, -1) for x, y in itertools.pairwise(pieces)]
        if max(joined, default=-1) < 0:
            return pieces
        i = joined.index(max(joined))
        pieces[i : i + 2] = [pieces[i] + pieces[i + 1]]


@pytest.mark.parametrize("seed", range(6))
def test_recovered_merges_follow_sentencepiece(tmp_path, seed):
    rng = random.Random(seed)
    longer = {"".join(rng.choices("abc", k=rng.randint(2, 5))) for _ in range(40)}
    pieces = [*"abc", *rng.sample(sorted(longer), len(longer))]
    keys = spm_keys(pieces, add_bos=False, space_prefix=False)
    shuffled = rng.sample(range(len(pieces)), len(pieces))
    keys["scores"][-len(pieces) :] = [float(x) for x in shuffled]
    score = dict(zip(pieces, shuffled, strict=True))
    tok = build(tmp_path, **keys)
    for _ in range(200):
        text = "".join(rng.choices("abc", k=30))
        assert tok.tokenize(text) == sentencepiece_bpe(text, score), text


def test_merges_make_and_use_only_what_is_mergeable():
    tokens = ["<s>", "<", "s>", "a", "aa", "aaa"]
    assert spm_merges(tokens, [5, 4, 3, 2, 1]) == [("aa", "a"), ("a", "aa"), ("a", "a")]
    assert spm_merges(tokens, range(6))[0] == ("<", "s>")


@pytest.mark.parametrize(
    ("text", "pieces"),
    [
        ("ab", ["▁ab"]),
        (" ab", ["▁", "▁ab"]),  # the dummy prefix comes before the space
        ("", []),
        ("bé", ["▁", "b", "<0xC3>", "<0xA9>"]),
        ("<0x0A>", ["▁", "<0x3C>", "<0x30>", "<0x78>", "<0x30>", "<0x41>", "<0x3E>"]),
    ],
)
def test_llama_has_bos_dummy_prefix_and_byte_fallback(tmp_path, text, pieces):
    tok = build(tmp_path, **spm_keys())
    ids = tok(text).input_ids
    assert tok.convert_ids_to_tokens(ids) == ["<s>", *pieces]
    assert tok.decode(ids, skip_special_tokens=True) == text


def test_the_spelling_of_a_byte_token_is_ordinary_text(tmp_path):
    pieces = ("▁", *"<0xA>", "0x", "0x0", "0x0A", "0x0A>")
    tok = build(tmp_path, **spm_keys(pieces, space_prefix=False))
    assert tok.tokenize("<0x0A>\n") == ["<", "0x0A>", "<0x0A>"]


def test_unknown_characters_are_one_unknown_token_without_byte_tokens(tmp_path):
    tokens, scores = ["<unk>", "a", "▁"], [0.0, 0.0, 0.0]
    keys = {"tokens": tokens, "scores": scores, "token_type": [UNKNOWN, NORMAL, NORMAL]}
    tok = build(tmp_path, model="llama", unk=0, add_bos=False, **keys)
    assert tok.tokenize("axyza") == ["▁", "a", "<unk>", "a"]


def test_gemma_has_no_dummy_prefix_and_ranks_by_id(tmp_path):
    # As in the real file: the run of spaces is user-defined, is stored as spaces and scores worst.
    pieces = ("  ", "▁", "a", "b", "▁a")
    keys = spm_keys(pieces, architecture="gemma3")
    keys["token_type"][261], keys["scores"][261] = USER, -1000.0
    tok = build(tmp_path, **keys)
    ids = tok("a  b a<turn>  a").input_ids
    expected = ["<s>", "a", "▁▁", "b", "▁a", "<turn>", "▁▁", "a"]
    assert tok.convert_ids_to_tokens(ids) == expected
    assert tok.decode(ids, skip_special_tokens=True) == "a  b a  a"
    assert ids[2] == 261
    assert len(tok) == len(keys["tokens"])


def test_gemma_takes_a_stated_space_prefix(tmp_path):
    tok = build(tmp_path, architecture="gemma2", **spm_keys(space_prefix=True))
    assert tok.tokenize("ab") == ["▁ab"]


def test_spm_offsets_count_characters(tmp_path):
    tok = build(tmp_path, **spm_keys(space_prefix=False))
    out = tok("ab bé 👍a", return_offsets_mapping=True)
    after_bos = [(0, 2), (2, 3), (3, 4), *[(4, 5)] * 2, (5, 6), *[(6, 7)] * 4, (7, 8)]
    assert out.offset_mapping[1:] == after_bos


def test_merges_in_the_file_win_over_scores(tmp_path):
    tok = build(tmp_path, **spm_keys(merges=["a b"], add_bos=False))
    assert tok.tokenize("ab") == ["▁", "ab"]


# --- what is wrong with a file ---


def without(keys, *names):
    return {name: value for name, value in keys.items() if name not in names}


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        (byte_level_keys(model="t5"), r"ggml\.model is 't5', expected one of gpt2, llama"),
        (without(byte_level_keys(), "model"), r"ggml\.model is missing"),
        (without(byte_level_keys(), "tokens", "token_type"), r"ggml\.tokens is missing"),
        (byte_level_keys("tekken"), r"ggml\.pre is 'tekken', expected one of .*qwen2, smollm"),
        (without(byte_level_keys(), "pre"), r"ggml\.pre is missing, expected one of default"),
        (without(byte_level_keys(), "merges"), r"ggml\.merges is missing"),
        (byte_level_keys(merges=["a z"]), r"merges is a list with 'a' \+ 'z'"),
        (byte_level_keys(merges=["ab"]), r"merges is a list with 'ab' \+ ''"),
        (byte_level_keys(token_type=[1]), r"token_type is 1 entries long, expected 262"),
        (spm_keys(scores=[1.0]), r"scores is 1 entries long, expected 266"),
        (without(spm_keys(), "scores"), r"scores is missing"),
        (without(spm_keys(), "bos"), r"bos_token_id is missing, expected an id, as add_bos_token"),
        (without(byte_level_keys(add_eos=True), "eos"), r"eos_token_id is missing"),
        (byte_level_keys(pad=262), r"pad_token_id is 262, expected an id below 262"),
    ],
)
def test_a_flawed_file_is_one_line_to_the_user(tmp_path, keys, message):
    with pytest.raises(UserError, match=message) as caught:
        build(tmp_path, **keys)
    assert "\n" not in str(caught.value)
    assert str(tmp_path / "m.gguf") in str(caught.value)
    assert not (tmp_path / "c").exists()


@pytest.mark.parametrize("content", [b"", b"GGUF", b"not a GGUF file", b"GGUF\x03\0\0\0\1"])
def test_not_a_gguf_file(tmp_path, content):
    (tmp_path / "x.gguf").write_bytes(content)
    with pytest.raises(UserError, match=r"x\.gguf: expected a GGUF file, found something else"):
        tokenizer_from_gguf(tmp_path / "x.gguf", cache_dir=tmp_path / "c")
    with pytest.raises(UserError, match=r"y\.gguf: .*found no such file"):
        tokenizer_from_gguf(tmp_path / "y.gguf", cache_dir=tmp_path / "c")


def test_a_cache_that_cannot_be_written(tmp_path, monkeypatch):
    (tmp_path / "c").write_text("a file where the directory should be")
    with pytest.raises(UserError, match="point ULD_JAX_CACHE to a directory"):
        build(tmp_path, **byte_level_keys())
    (tmp_path / "c").unlink()
    monkeypatch.setattr(os, "replace", lambda *_: os.stat(tmp_path / "absent"))
    with pytest.raises(UserError, match="found 'No such file"):
        build(tmp_path, **byte_level_keys())


# --- the cache ---


def only_entry(cache):
    (entry,) = (cache / "tokenizers").iterdir()
    return entry


def test_a_second_load_comes_from_the_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("ULD_JAX_CACHE", str(tmp_path / "cache"))
    path = write_gguf(tmp_path / "m.gguf", **byte_level_keys(add_bos=True))
    first = tokenizer_from_gguf(gguf.GGUFReader(path))
    entry = only_entry(tmp_path / "cache")
    written = (entry / "tokenizer.json").stat().st_ino
    second = tokenizer_from_gguf(str(path))
    assert (entry / "tokenizer.json").stat().st_ino == written
    assert second("abab  ab").input_ids == first("abab  ab").input_ids
    assert second.special_tokens_map == first.special_tokens_map
    assert second.add_bos_token == first.add_bos_token


@pytest.mark.parametrize(
    "change", [{"name": "n.gguf"}, {"size": 1 << 21}, {"time": 2}, {"merged": ("ba",)}]
)
def test_another_file_is_another_entry(tmp_path, change):
    def load(name="m.gguf", size=1 << 20, time=1, merged=("ab",)):
        path = write_gguf(tmp_path / name, **byte_level_keys(merged=merged))
        path.write_bytes(path.read_bytes().ljust(size, b"\0"))
        os.utime(path, ns=(time, time))
        return tokenizer_from_gguf(path, cache_dir=tmp_path / "c").tokenize("aba")

    assert load() == load() == ["ab", "a"]
    only_entry(tmp_path / "c")
    assert load(**change) == (["a", "ba"] if "merged" in change else ["ab", "a"])
    assert len(list((tmp_path / "c" / "tokenizers").iterdir())) == 2


def cut_short(path):
    path.write_bytes(path.read_bytes()[:-100])


@pytest.mark.parametrize(
    ("name", "damage"),
    [
        ("tokenizer.json", cut_short),
        ("tokenizer.json", Path.unlink),
        ("tokenizer_config.json", Path.unlink),
        ("tokenizer_config.json", lambda path: path.write_text("{}")),
        ("checksums.json", Path.unlink),
        ("checksums.json", cut_short),
        ("checksums.json", lambda path: path.write_text("{}")),
        ("checksums.json", lambda path: path.write_text("[1]")),
        ("checksums.json", lambda path: path.write_bytes(b"\xff")),
    ],
)
def test_a_damaged_entry_is_rebuilt(tmp_path, name, damage):
    build(tmp_path, **byte_level_keys())
    entry = only_entry(tmp_path / "c")
    intact = {path.name: path.read_bytes() for path in entry.iterdir()}
    damage(entry / name)
    tok = tokenizer_from_gguf(tmp_path / "m.gguf", cache_dir=tmp_path / "c")
    assert tok.tokenize("ab") == ["ab"]
    assert only_entry(tmp_path / "c") == entry
    assert {path.name: path.read_bytes() for path in entry.iterdir()} == intact


def test_simultaneous_builds_agree(tmp_path):
    path = write_gguf(tmp_path / "m.gguf", **byte_level_keys())
    with ThreadPoolExecutor(4) as pool:
        jobs = [pool.submit(tokenizer_from_gguf, path, cache_dir=tmp_path / "c") for _ in range(8)]
    assert [job.result().tokenize("ab") for job in jobs] == [["ab"]] * 8
    only_entry(tmp_path / "c")


# --- saving ---


@pytest.mark.parametrize("config", [None, {"model_type": "llama"}, {"model_type": "gemma3_text"}])
@pytest.mark.parametrize("keys", [byte_level_keys("smollm"), spm_keys()], ids=["bytes", "spm"])
def test_a_saved_tokenizer_reloads_through_auto(tmp_path, keys, config):
    tok = build(tmp_path, **keys)
    tok.save_pretrained(tmp_path / "saved")
    if config is not None:
        (tmp_path / "saved" / "config.json").write_text(json.dumps(config))
    again = transformers.AutoTokenizer.from_pretrained(tmp_path / "saved")
    for text in ["", "ab  ab é", " <s>ab<tool><turn>  two spaces\n"]:
        assert again(text).input_ids == tok(text).input_ids
    assert again.special_tokens_map == tok.special_tokens_map


def test_torch_is_not_needed(tmp_path):
    path = write_gguf(tmp_path / "m.gguf", **byte_level_keys())
    code = (
        "import sys; sys.modules['torch'] = None\n"
        "from uld_jax.models.gguf_tokenizer import tokenizer_from_gguf as load\n"
        "print(load(sys.argv[1], cache_dir=sys.argv[2]).tokenize('ab'))"
    )
    command = [sys.executable, "-c", code, str(path), str(tmp_path / "c")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.stdout.strip() == "['ab']", done.stderr
