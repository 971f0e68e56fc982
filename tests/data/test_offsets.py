"""Byte offsets of tokens, and groups of them, for tokenizers of every kind and for real ones."""

import gzip
import itertools
import json

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from uld_jax.data import TokenBytes, align_spans, byte_offsets, decoded_offsets
from uld_jax.data.offsets import spans_of_tokens

TRAINED = (
    "byte_tokenizer",
    "piece_tokenizer",
    "unigram_tokenizer",
    "unigram_bytes_tokenizer",
    "word_tokenizer",
)
REAL = ("smollm2", "gemma3", "llama2", "qwen3")

TEXTS = [
    " ",
    "  two  spaces  and a trailing one ",
    "naïve café, e\u0301 and q\u0307\u0323 and Å",
    "漢字かな交じり文と한국어 각",
    "  漢字",
    "A\u0300 ¿",
    "👩🏽‍🚀 👨‍👩‍👧‍👦 🏳️‍🌈 🫠",
    "مرحبا بالعالم ١٢٣ שלום",
    "zero\u200bwidth\u200d\u200c\ufeff\u2060 soft\u00adhyphen nbsp\u00a0x\u3000y",
    "line one\r\nline two\r\n\r\nend\r",
    "ﬁ ① ½ ｶﾞ ㍿ ﷺ ß İ ǅ",
    "0 42 1234567890 3.14",
    "pneumono" * 40,
    "<s></s><unk>[UNK]<0x0A><|im_end|><eos>▁ Ġ ##x",
    "\x00\x01\x7f\u2028\u2029\x85\t\v",
    "\U00010900\U000e0001\ue000",
]
PARTS = st.one_of(
    st.text(max_size=12),
    st.sampled_from(TEXTS),
    st.text("aeé\u0301\u0323\u0307\u0308 漢😀\u200d\u200b\r\nﬁ①ｶﾞ▁שم1", max_size=12),
    st.text("abz", min_size=100, max_size=300),
)
UNICODE = st.lists(PARTS, max_size=4).map("".join)
RELAXED = {"deadline": None, "suppress_health_check": list(HealthCheck)}


@pytest.fixture(scope="session")
def trained(request):
    return {name: request.getfixturevalue(name) for name in TRAINED}


class Readers(dict):
    """Tokenizers by name, with a short name of their own for hypothesis."""

    def __repr__(self):
        return str([*self])


@pytest.fixture(scope="session")
def readers(trained, real_tokenizers):
    """Every tokenizer with what its tokens stand for."""
    both = trained | real_tokenizers
    return Readers({name: (t, TokenBytes(t)) for name, t in both.items()})


def faults(text, student, teacher):
    """What is wrong with the groups of two tokenisations of a text, by their offsets."""
    total = len(text.encode())
    sides = (student, teacher)
    groups = align_spans(student, teacher)
    found = []
    for number, offsets in enumerate(sides):
        if any(not 0 <= a <= b <= total for a, b in offsets):
            found.append(("outside of the text", offsets))
        members = [i for group in groups for i in group[number]]
        # One side may have no token for a text of nothing but dropped characters.
        if all(sides) and members != [*range(len(offsets))]:
            found.append(("no partition", members))
    last = 0
    for group in groups:
        spans = [
            (min(offsets[i][0] for i in members), max(offsets[i][1] for i in members))
            for members, offsets in zip(group, sides, strict=True)
        ]
        if spans[0] != spans[1] or spans[0][0] != last:
            found.append(("bytes disagree", group, spans, last))
        last = spans[0][1]
    if all(sides) and last != total:
        found.append(("open at the end", last, total))
    return found


def check_text(readers, text):
    found = {name: byte_offsets(t, text, read=read) for name, (t, read) in readers.items()}
    for student, teacher in itertools.permutations(readers, 2):
        offsets = found[student][1], found[teacher][1]
        assert not faults(text, *offsets), (student, teacher)
        if "\u2581" not in text:
            groups = [group for group, _ in align_spans(*offsets)]
            check_bytes(text, *readers[student], *found[student], groups)


def normalized_bytes(tokenizer):
    """What a tokenizer makes of a piece of text, without a space that it begins every text with."""
    normalizer = tokenizer.backend_tokenizer.normalizer
    if normalizer is None:
        return lambda span: span
    begins = len(normalizer.normalize_str("a")) - 1

    def expected(span):
        # What is left of a character at either end is not normalised; it is three bytes at most.
        for cut in sorted(itertools.product(range(4), repeat=2), key=sum):
            stop = len(span) - cut[1]
            try:
                text = normalizer.normalize_str(span[cut[0] : stop].decode())[begins:]
            except UnicodeDecodeError:
                continue
            return span[: cut[0]] + text.replace("\u2581", " ").encode() + span[stop:]
        raise AssertionError(span)

    return expected


def check_bytes(text, tokenizer, read, ids, offsets, groups):
    """That a group's tokens are what normalisation makes of the very bytes of the group."""
    expected = normalized_bytes(tokenizer)
    pieces = read(ids)
    if None in pieces or bare(b"".join(pieces)) != bare(expected(text.encode())):
        return  # such as a byte that was never seen in training, and has no token
    whole = expected(text.encode())
    exact = b"".join(pieces) in (whole, b" " + whole)
    for group in groups:
        own = b"".join(pieces[i] for i in group)
        wanted = expected(text.encode()[offsets[group[0]][0] : offsets[group[-1]][1]])
        assert bare(own) == bare(wanted)
        # The first token may begin with a space that the text has not.
        assert not exact or own in (wanted, b" " * (group[0] == 0) + wanted)


def bare(text):
    return b"".join(text.split())


@pytest.mark.parametrize("text", TEXTS)
def test_texts_that_break_offsets(readers, text):
    check_text(readers, text)


@settings(max_examples=40, **RELAXED)
@given(text=UNICODE)
def test_groups_of_every_ordered_pair(readers, text):
    check_text(readers, text)


@pytest.mark.slow
@settings(max_examples=600, **RELAXED)
@given(text=UNICODE)
def test_groups_of_every_ordered_pair_at_length(readers, text):
    check_text(readers, text)


@pytest.mark.parametrize("text", [*TEXTS, "The ferry sails from Oslo."])
def test_offsets_by_decoding(readers, text):
    for name, (tokenizer, read) in readers.items():
        ids, offsets = byte_offsets(tokenizer, text, read=read)
        if not tokenizer.decode(ids):
            continue
        decoded = decoded_offsets(tokenizer, ids, text)
        assert not faults(text, offsets, decoded), name
        assert not faults(text, decoded, offsets), name


PLAIN = "The ferry carries 2,700 people, naïve café 漢字 👩🏽‍🚀."


@pytest.mark.parametrize("name", ["byte_tokenizer", *REAL])
def test_offsets_by_decoding_are_exact_but_inside_of_characters(readers, name):
    tokenizer, read = readers[name]
    ids, offsets = byte_offsets(tokenizer, PLAIN, read=read)
    borders = {len(PLAIN[:i].encode()) for i in range(len(PLAIN) + 1)}
    expected = [stop for stop, (_, end) in enumerate(offsets, 1) if end in borders]
    decoded = decoded_offsets(tokenizer, ids, PLAIN)
    closed = [
        stop
        for stop in range(1, len(ids) + 1)
        if stop == len(ids) or decoded[stop][0] >= decoded[stop - 1][1]
    ]
    assert closed == expected
    assert [decoded[stop - 1][1] for stop in closed] == [offsets[stop - 1][1] for stop in closed]


def test_offsets_by_decoding_of_dropped_case_and_accents(word_tokenizer):
    text = "Zoë bakes Crêpes"
    ids = word_tokenizer(text, add_special_tokens=False).input_ids
    offsets = decoded_offsets(word_tokenizer, ids, text)
    words = [token for token in word_tokenizer.convert_ids_to_tokens(ids) if token[:2] != "##"]
    assert len(words) == 3
    starts = [stop for stop, (start, _) in enumerate(offsets) if start in (4, 10)]
    assert [word_tokenizer.convert_ids_to_tokens(ids[i])[0] for i in starts] == ["b", "c"]


class Slow:
    """A tokenizer without offsets, such as the SentencePiece ones of transformers."""

    is_fast = False

    def __init__(self, fast):
        self._fast = fast

    def __call__(self, text, **options):
        return {"input_ids": self._fast(text, **options).input_ids}

    def decode(self, ids, **options):
        return self._fast.decode(ids, **options)


def test_a_tokenizer_without_offsets(byte_tokenizer):
    ids, offsets = byte_offsets(Slow(byte_tokenizer), PLAIN)
    assert ids == byte_tokenizer(PLAIN, add_special_tokens=False).input_ids
    assert offsets == decoded_offsets(byte_tokenizer, ids, PLAIN)
    assert not faults(PLAIN, offsets, byte_offsets(byte_tokenizer, PLAIN)[1])


class Letters(Slow):
    """Each token is one letter, whatever the text was."""

    def __init__(self, letters):
        self._letters = letters

    def decode(self, ids, **options):
        return "".join(self._letters[id] for id in ids)


@pytest.mark.parametrize(
    ("letters", "text", "expected"),
    [
        ("x?!y", "xABy", [(0, 1), (1, 3), (1, 3), (3, 4)]),
        ("xAAy", "xAy", [(0, 1), (1, 2), (1, 2), (2, 3)]),
        ("xy", "xABy", [(0, 1), (1, 4)]),
        ("xy", "xyAB", [(0, 1), (1, 4)]),
    ],
)
def test_tokens_of_a_stretch_that_differs_share_it(letters, text, expected):
    assert decoded_offsets(Letters(letters), range(len(letters)), text) == expected


def test_tokens_that_decode_to_nothing(byte_tokenizer):
    class Mute(Slow):
        def decode(self, ids, **options):
            return ""

    with pytest.raises(ValueError, match="decode to nothing, expected 'Oslo'"):
        byte_offsets(Mute(byte_tokenizer), "Oslo")


@pytest.mark.parametrize(
    ("text", "pieces", "characters", "expected"),
    [
        pytest.param("é", [b"\xc3", b"\xa9"], [(0, 1)] * 2, [(0, 1), (1, 2)], id="split"),
        pytest.param("a b", [b" a", b" b"], [(0, 1), (1, 3)], [(0, 1), (1, 3)], id="added space"),
        pytest.param("ab", [b" ", b"ab"], [(0, 0), (0, 2)], [(0, 0), (0, 2)], id="a lone mark"),
        pytest.param(
            "a  b", [b"a ", b" b"], [(0, 1), (3, 4)], [(0, 2), (2, 4)], id="bytes before offsets"
        ),
        pytest.param("A b", [b"a", b"b"], [(0, 1), (2, 3)], [(0, 1), (1, 3)], id="no white space"),
        pytest.param("A ", [b"a"], [(0, 1)], [(0, 2)], id="none at the end"),
        pytest.param("A  b", [b"a", b"  b"], [(0, 1), (3, 4)], [(0, 1), (1, 4)], id="trimmed"),
        pytest.param("Ü", [None], [(0, 1)], [(0, 2)], id="an unknown token"),
        pytest.param(
            "Aé",
            [b"a", b"\xc3", b"\xa9"],
            [(0, 1), (1, 2), (1, 2)],
            [(0, 1), (1, 2), (2, 3)],
            id="a split character beside a changed one",
        ),
        pytest.param(
            "xéyA",
            [b"x", b"y", "é".encode(), b"a"],
            [(0, 1), (1, 2), (2, 3), (3, 4)],
            [(0, 1), (1, 4), (1, 4), (4, 5)],
            id="offsets that are wrong share what they have",
        ),
        pytest.param(
            "xéA",
            [b"x", b"y", b"z", b"a"],
            [(0, 1), (2, 3), (1, 2), (2, 3)],
            [(0, 1), (1, 4), (1, 4), (1, 4)],
            id="offsets that decrease",
        ),
        pytest.param(
            "AbCdEf",
            [b"abcd", b"ef", b"x"],
            [(0, 4), (4, 6), (2, 6)],
            [(0, 6)] * 3,
            id="a start before that of the token before",
        ),
        pytest.param(
            "Oslo",
            [b"r", b": ", b"Oslo"],
            [(-3, -2), (-2, 0), (0, 4)],
            [(0, 0), (0, 0), (0, 4)],
            id="two tokens before a tail",
        ),
        pytest.param("Oslo", [b"e: ", b"Oslo"], [(-3, 0), (0, 4)], [(0, 0), (0, 4)], id="a tail"),
        pytest.param("Oslo", [b": O", b"slo"], [(-2, 1), (1, 4)], [(0, 1), (1, 4)], id="straddles"),
        pytest.param(
            "A!",
            [b": ", b"a", b"!"],
            [(-2, 0), (0, 1), (1, 2)],
            [(0, 0), (0, 1), (1, 2)],
            id="a changed tail",
        ),
    ],
)
def test_offsets_from_tokens(text, pieces, characters, expected):
    assert spans_of_tokens(text, pieces, characters, str.lower) == expected


@pytest.fixture(scope="module")
def answers(shared):
    """Up to 2,000 answers of each of three data sets."""
    with gzip.open(shared / "data/squad/dev-v1.1.json.gz", "rt", encoding="utf-8") as file:
        articles = json.load(file)["data"]
    questions = [qa for a in articles for p in a["paragraphs"] for qa in p["qas"]]
    qed = []
    for name in ("qed-dev", "nq-train-00-qed"):
        path = shared / f"data/qed/{name}.jsonlines.gz"
        with gzip.open(path, "rt", encoding="utf-8") as file:
            qed += [json.loads(line) for line in file]
    dialogues = [
        json.loads(line)
        for name in ("dev", "test")
        for line in (shared / f"data/dialogsum/dialogsum.{name}.jsonl").read_text().splitlines()
    ]
    sets = (
        [qa["answers"][0]["text"] for qa in questions[:: len(questions) // 2000]],
        [
            " ".join(span["string"] for span in r["original_nq_answers"][0])
            if "original_nq_answers" in r
            else " ".join(r["answer_text"])
            for r in qed
        ],
        [text for r in dialogues for key, text in r.items() if key.startswith("summary")],
    )
    return {"squad": sets[0][:2000], "qed": sets[1][:2000], "dialogsum": sets[2][:2000]}


@pytest.mark.parametrize("count", [100, pytest.param(2000, marks=pytest.mark.slow)])
def test_groups_of_the_answers_of_each_data_set(real_tokenizers, answers, count):
    chosen = [texts[:: 2000 // count] for texts in answers.values()]
    assert [*map(len, chosen)] == [count] * 3
    readers = {name: (t, TokenBytes(t)) for name, t in real_tokenizers.items()}
    tokens = dict.fromkeys(readers, 0)
    for text in itertools.chain.from_iterable(chosen):
        found = {name: byte_offsets(t, text, read=read) for name, (t, read) in readers.items()}
        for name, (ids, _) in found.items():
            tokens[name] += len(ids)
        for student, teacher in itertools.permutations(readers, 2):
            offsets = found[student][1], found[teacher][1]
            assert not faults(text, *offsets), (student, teacher, text)
            groups = [group for group, _ in align_spans(*offsets)]
            check_bytes(text, *readers[student], *found[student], groups)
    assert len(set(tokens.values())) == 4  # no two cut the answers alike
