import numpy as np
import pytest
import tokenizers
from tokenizers import decoders, models
from transformers import PreTrainedTokenizerFast

from uld_jax.data import TokenBytes, match_vocabularies


def of_tokens(tokens, *, decoder=None, special=()):
    """A tokenizer with a vocabulary of these tokens, in this order."""
    vocabulary = {token: number for number, token in enumerate(tokens)}
    tokenizer = tokenizers.Tokenizer(models.BPE(vocabulary, []))
    tokenizer.decoder = decoder
    tokenizer.add_special_tokens(list(special))
    return tokenizer


def fast(tokens, *, decoder=None, special=(), **names):
    tokenizer = of_tokens(tokens, decoder=decoder, special=special)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names)


PIECES = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])


@pytest.mark.parametrize(
    ("decoder", "tokens", "expected"),
    [
        (decoders.ByteLevel(), ["Ġa", "Ã", "ĊĊ", "Āà", "漢"],
         [b" a", b"\xc3", b"\n\n", b"\x00\xe0", "漢".encode()]),
        (PIECES, ["▁a", "▁▁", "é", "<0xE6>", "<0xe6>", "<0x0A"],
         [b" a", b"  ", "é".encode(), b"\xe6", b"<0xe6>", b"<0x0A"]),
        (decoders.Metaspace(), ["▁a", "<0xE6>"], [b" a", b"<0xE6>"]),
        (decoders.WordPiece(), ["the", "##s", "##", ",", "漢", "7"],
         [b" the", b"s", b"##", b",", "漢".encode(), b" 7"]),
        (None, ["▁a", "Ġa"], ["▁a".encode(), "Ġa".encode()]),
    ],
    ids=["byte level", "pieces with byte tokens", "pieces", "word pieces", "none"],
)  # fmt: skip
def test_bytes_of_tokens(decoder, tokens, expected):
    assert TokenBytes(fast(tokens, decoder=decoder))([*range(len(tokens))]) == expected


def test_bytes_of_added_and_unknown_tokens():
    tokenizer = fast(["Ġa", "<unk>"], decoder=decoders.ByteLevel(), special=["<é>"],
                     unk_token="<unk>", eos_token="<é>")  # fmt: skip
    tokenizer.add_tokens(["Ġé "])
    read = TokenBytes(tokenizer)
    assert read([2, 0, 1, 3, 2, 99]) == [
        "<é>".encode(), b" a", None, "Ġé ".encode(), "<é>".encode(), None,
    ]  # fmt: skip
    assert [read.is_special(i) for i in range(4)] == [False, True, True, False]


def test_the_fixture_of_the_hybrid_loss():
    student, teacher = fast([*"abcde"]), fast([*"cxayzew"])
    matched = match_vocabularies(student, teacher)
    np.testing.assert_array_equal(matched.student, [0, 2, 4])
    np.testing.assert_array_equal(matched.teacher, [2, 0, 5])
    assert matched.student.dtype == matched.teacher.dtype == np.int32


def test_nothing_in_common():
    assert [len(ids) for ids in match_vocabularies(fast(["a"]), fast(["b"]))] == [0, 0]


def test_marks_and_bytes_are_undone():
    student = fast(["Ġthe", "the", "Ċ", "æ", "é"], decoder=decoders.ByteLevel())
    teacher = fast(["▁the", "<0x0A>", "<0xE6>", "é", "the"], decoder=PIECES)
    # The student's last token is the lone byte E9, the teacher's é two bytes.
    assert [x.tolist() for x in match_vocabularies(student, teacher)] == [
        [0, 1, 2, 3],
        [0, 4, 1, 2],
    ]


def test_special_tokens_are_matched_as_ends_only():
    student = fast(["a"], special=["<s>", "<end>", "<pad>"], bos_token="<s>", eos_token="<end>",
                   pad_token="<pad>")  # fmt: skip
    teacher = fast(["<end>", "a"], special=["<s>", "</s>", "<pad>"], bos_token="<s>",
                   eos_token="</s>", pad_token="<pad>")  # fmt: skip
    # The teacher has a plain token whose text is the student's end.
    assert [x.tolist() for x in match_vocabularies(student, teacher)] == [[0, 2], [1, 3]]
    teacher.eos_token = None
    assert [x.tolist() for x in match_vocabularies(student, teacher)] == [[0], [1]]


def test_of_equal_tokens_the_first_that_is_no_byte_token():
    # "A" is also a byte token, and also an added token.
    pieces = fast(["<0x41>", "A", "B"], decoder=PIECES)
    assert [x.tolist() for x in match_vocabularies(pieces, fast([*"AB"]))] == [[1, 2], [0, 1]]
    words = fast(["a", "##,", ","], decoder=decoders.WordPiece())
    assert [x.tolist() for x in match_vocabularies(words, fast([","]))] == [[1], [0]]


# Counted with this test: 63 to 98 % of the smaller vocabulary.
MATCHED = {
    ("smollm2", "gemma3"): 46_146,
    ("smollm2", "llama2"): 21_755,
    ("smollm2", "qwen3"): 39_235,
    ("gemma3", "llama2"): 31_202,
    ("gemma3", "qwen3"): 95_969,
    ("llama2", "qwen3"): 29_235,
}


@pytest.fixture(scope="module")
def real_matches(real_tokenizers):
    return {pair: match_vocabularies(*(real_tokenizers[name] for name in pair)) for pair in MATCHED}


def test_real_pairs(real_tokenizers, real_matches):
    assert {pair: len(matched.student) for pair, matched in real_matches.items()} == MATCHED
    reads = {name: TokenBytes(tokenizer) for name, tokenizer in real_tokenizers.items()}
    for pair, matched in real_matches.items():
        assert (np.diff(matched.student) > 0).all()
        assert len(np.unique(matched.teacher)) == len(matched.teacher)
        texts = [reads[name](ids.tolist()) for name, ids in zip(pair, matched, strict=True)]
        unequal = [i for i, (x, y) in enumerate(zip(*texts, strict=True)) if x != y]
        ends = [real_tokenizers[name].eos_token_id for name in pair]
        assert [*zip(*(ids.tolist() for ids in matched), strict=True)].count(tuple(ends)) == 1
        assert all([ids[i] for ids in matched] == ends for i in unequal)


def test_of_either_side(real_tokenizers, real_matches):
    pair = ("smollm2", "llama2")
    swapped = match_vocabularies(*(real_tokenizers[name] for name in pair[::-1]))
    assert sorted(zip(*swapped[::-1], strict=True)) == [*zip(*real_matches[pair], strict=True)]


def test_a_text_that_is_one_token_on_both_sides_is_matched(real_tokenizers, real_matches):
    words = ["the", " the", "Oslo", " people", "\n", ",", " 2", "é"]
    for pair, matched in real_matches.items():
        teacher_id = dict(zip(*(ids.tolist() for ids in matched), strict=True))
        found = 0
        for word in words:
            # In the middle of a text, where SentencePiece adds no space.
            both = []
            for name in pair:
                tokenizer = real_tokenizers[name]
                first, *rest = tokenizer(f"x{word}", add_special_tokens=False).input_ids
                both.append(rest if tokenizer.decode([first]) == "x" else [])
            if [*map(len, both)] == [1, 1]:
                assert teacher_id[both[0][0]] == both[1][0], (pair, word)
                found += 1
        assert found >= 3, pair
