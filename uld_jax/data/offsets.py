"""Which bytes of a text each of its tokens stands for.

A tokenizer's own offsets are not enough: they count characters, repeat a character for each of
the tokens that it is split over, may leave out white space, and may be wrong where normalisation
reorders characters. Every function here returns what `align_spans` takes: [start, end) bytes of
the text's UTF-8 encoding; starts and ends never decrease, the first token that is wide starts at
0, the last ends with the text, and each byte between is in some token. Spans overlap where tokens
share characters and nothing says at which byte one ends.
"""

import difflib
import unicodedata
from collections.abc import Callable, Iterator, Sequence
from itertools import accumulate
from typing import TYPE_CHECKING, Any

from uld_jax.data.align import Span
from uld_jax.data.vocabulary import TokenBytes

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Normalize = Callable[[str], str]

_MARK = "▁".encode()  # SentencePiece's visible space


def byte_offsets(
    tokenizer: "PreTrainedTokenizerBase", text: str, *, read: TokenBytes | None = None
) -> tuple[list[int], list[Span]]:
    """Tokenise a text, without special tokens, and find each token's bytes.

    Args:
        tokenizer: A transformers tokenizer. One that is not fast has no offsets: see
            `decoded_offsets`.
        text: Any text.
        read: `TokenBytes` of the tokenizer, to be kept over many calls.

    Returns:
        The ids and their offsets.

    Raises:
        ValueError: A tokenizer whose tokens decode to nothing.

    Example:
        >>> from uld_jax.testing import toy_tokenizer
        >>> ids, offsets = byte_offsets(toy_tokenizer(), "the ü")
        >>> offsets[-2:]
        [(4, 5), (5, 6)]
    """
    if not tokenizer.is_fast:
        ids: Any = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        return ids, decoded_offsets(tokenizer, ids, text)
    fast: Any = tokenizer
    encoding = fast(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    ids, characters = encoding["input_ids"], encoding["offset_mapping"]
    read = read or TokenBytes(fast)
    return ids, spans_of_tokens(text, read(ids), characters, normalizer_of(fast))


def normalizer_of(tokenizer: Any) -> Normalize:
    """How a fast tokenizer rewrites a text before it cuts it up.

    Args:
        tokenizer: A transformers fast tokenizer.

    Returns:
        A function of a text.

    Example:
        >>> from uld_jax.testing import toy_tokenizer
        >>> normalizer_of(toy_tokenizer(kind="metaspace"))("a b")
        'a▁b'
    """
    normalizer = tokenizer.backend_tokenizer.normalizer
    return str if normalizer is None else normalizer.normalize_str


def spans_of_tokens(
    text: str,
    pieces: Sequence[bytes | None],
    characters: Sequence[Span],
    normalize: Normalize = str,
) -> list[Span]:
    r"""Find each token's bytes from what the tokens stand for and from their character offsets.

    Where the tokens' bytes are those of the text, as in byte-level BPE and in SentencePiece with
    byte tokens, their lengths are exact. Otherwise normalisation has changed the text, and the
    tokenizer's offsets are taken, in which

    - tokens that share characters are told apart if their bytes are those of these characters;
    - each token, or tokens that share characters, must be what these characters become by
      normalisation; neighbours that are not share one span;
    - bytes that no token has (white space, dropped characters) go to the token after them, or to
      the last.

    Args:
        text: The text, or the end of a longer one.
        pieces: Bytes of each token, see `TokenBytes`; of a longer text those that reach into
            this end of it.
        characters: [start, end) of each token, counted from the start of `text`; may be negative.
        normalize: See `normalizer_of`.

    Returns:
        The offsets; what lies before `text` counts as its start.

    Example:
        >>> spans_of_tokens("é", [b"\xc3", b"\xa9"], [(0, 1), (0, 1)])
        [(0, 1), (1, 2)]
        >>> spans_of_tokens("Ab ﬁ!", [b"ab", b" f", b"i", b"!"], [(0, 2), (3, 4), (3, 4), (4, 5)],
        ...                 lambda text: text.lower().replace("ﬁ", "fi"))
        [(0, 2), (2, 6), (2, 6), (6, 7)]
    """
    whole = _utf8(text)
    lengths = _lengths(pieces, whole)
    if lengths is not None:
        before = len(whole) - sum(lengths)
        ends = [max(0, before + end) for end in accumulate(lengths)]
        return [*zip([0, *ends], ends, strict=False)]
    at = [0, *accumulate(len(_utf8(c)) for c in text)]
    spans = [(at[max(0, start)], at[max(0, end)]) for start, end in characters]
    _mend(spans, len(whole))
    return _told_apart(spans, whole, pieces, normalize)


def _lengths(pieces: Sequence[bytes | None], whole: bytes) -> list[int] | None:
    """How many bytes each token has, if together they end with `whole`."""
    if None in pieces:
        return None
    known: Any = pieces
    return [*map(len, known)] if b"".join(known).endswith(whole) else None


def _mend(spans: list[Span], total: int) -> None:
    """Makes starts and ends increase, and gives the bytes between tokens to the later one."""
    least = total
    for i in range(len(spans) - 1, -1, -1):
        least = min(least, spans[i][0])
        spans[i] = (least, spans[i][1])
    last = 0
    for i, (start, end) in enumerate(spans):
        end = max(end, start, last)
        spans[i] = (min(start, last), end)
        last = end
    wide = [i for i, (start, end) in enumerate(spans) if end > start]
    if wide:
        spans[wide[-1]] = (spans[wide[-1]][0], total)
        spans[wide[-1] + 1 :] = [(total, total)] * (len(spans) - wide[-1] - 1)
    elif spans:
        spans[:] = [(0, 0)] * (len(spans) - 1) + [(0, total)]


def _told_apart(
    spans: list[Span], whole: bytes, pieces: Sequence[bytes | None], normalize: Normalize
) -> list[Span]:
    """Exact spans where tokens that share characters allow it, one for those that do not fit."""
    doubtful: list[range] = []
    for run in _overlapping(spans):
        start, end = spans[run[0]][0], spans[run[-1]][1]
        lengths = _lengths(pieces[run.start : run.stop], whole[start:end])
        if lengths is not None and sum(lengths) == end - start:
            ends = [start + n for n in accumulate(lengths)]
            spans[run.start : run.stop] = zip([start, *ends], ends, strict=False)
        elif _explained(pieces[run.start : run.stop], whole[start:end], normalize):
            if len(run) > 1:
                spans[run.start : run.stop] = [(start, end)] * len(run)
        elif doubtful and doubtful[-1].stop == run.start:
            doubtful[-1] = range(doubtful[-1].start, run.stop)
        else:
            doubtful.append(run)
    for run in doubtful:
        shared = (spans[run[0]][0], spans[run[-1]][1])
        spans[run.start : run.stop] = [shared] * len(run)
    return spans


def _overlapping(spans: Sequence[Span]) -> Iterator[range]:
    """Consecutive tokens that share bytes, as long as can be; most are alone."""
    first = 0
    for i in range(1, len(spans) + 1):
        if i == len(spans) or spans[i][0] >= spans[i - 1][1]:
            yield range(first, i)
            first = i


def _explained(pieces: Sequence[bytes | None], own: bytes, normalize: Normalize) -> bool:
    """Whether the tokens are what normalisation makes of their bytes, white space apart."""
    if None in pieces:
        return len(pieces) == 1  # an unknown token stands for whatever is there
    known: Any = pieces
    return _bare(_utf8(normalize(own.decode("utf-8", "surrogatepass")))) == _bare(b"".join(known))


def _bare(text: bytes) -> bytes:
    return b"".join(text.replace(_MARK, b" ").split())


def _utf8(text: str) -> bytes:
    return text.encode("utf-8", "surrogatepass")


def decoded_offsets(
    tokenizer: "PreTrainedTokenizerBase", ids: Sequence[int], text: str
) -> list[Span]:
    """Find each token's bytes by decoding them one after the other.

    A token adds to the text what the decoded text is longer with it than without it; one that
    ends inside a character shares that character with those after it. Where the decoded text is
    not the text (normalisation, lower case, unknown tokens), the two are compared, and tokens of a
    stretch that differs share it.

    Args:
        tokenizer: Any transformers tokenizer; only its `decode` is used.
        ids: The text's tokens.
        text: The text.

    Returns:
        The offsets.

    Raises:
        ValueError: The tokens decode to nothing, though there is text.

    Example:
        >>> from uld_jax.testing import toy_tokenizer
        >>> tokenizer = toy_tokenizer()
        >>> decoded_offsets(tokenizer, tokenizer("the ü").input_ids, "the ü")[-2:]
        [(4, 6), (4, 6)]
    """
    pieces = _decoded_pieces(tokenizer, ids)
    decoded = "".join(pieces)
    if text and ids and not decoded:
        raise ValueError(f"tokens {list(ids)[:8]} decode to nothing, expected {text[:40]!r}")
    low, high = _positions(decoded, text)
    at = [0, *accumulate(len(_utf8(c)) for c in text)]
    spans: list[Span] = []
    done = 0
    held = 0
    for piece in pieces:
        held += 1
        if piece:
            start, done = done, done + len(piece)
            spans += [(at[low[start]], at[high[done]])] * held
            held = 0
    spans += [(at[-1], at[-1])] * held
    _mend(spans, at[-1])
    return spans


def _decoded_pieces(tokenizer: "PreTrainedTokenizerBase", ids: Sequence[int]) -> list[str]:
    """What each token adds to the decoded text; nothing if the next completes its character."""
    start = read = 0
    pieces: list[str] = []
    for stop in range(1, len(ids) + 1):
        # From one piece back: a decoder may drop or add a space at the start of what it is given.
        before = _decode(tokenizer, ids[start:read])
        after = _decode(tokenizer, ids[start:stop])
        whole = not after.endswith("\ufffd") or stop == len(ids)
        pieces.append(after[len(before) :] if whole else "")
        if pieces[-1]:
            start, read = read, stop
    return pieces


def _decode(tokenizer: "PreTrainedTokenizerBase", ids: Sequence[int]) -> str:
    text: Any = tokenizer.decode(list(ids), clean_up_tokenization_spaces=False)
    return text


def _positions(decoded: str, text: str) -> tuple[list[int], list[int]]:
    """Of each position in `decoded` the least and the greatest that it may have in `text`."""
    borders = [*range(len(text) + 1)]
    if decoded == text:
        return borders, borders
    # Accents and case are what tokenizers drop.
    keys = [[unicodedata.normalize("NFKD", c).casefold()[:1] for c in x] for x in (decoded, text)]
    codes = difflib.SequenceMatcher(None, *keys, autojunk=False).get_opcodes()
    low: list[int] = []
    high: list[int] = []
    border = 0
    for tag, first, last, start, stop in codes:
        if tag == "equal":
            own = [*range(start, stop)]
            low += own
            high += own
        elif stop > start:
            # Where it begins there is no doubt, only inside of it.
            low += [start] * (last - first)
            high += [start] + [stop] * (last - first - 1) if last > first else []
        else:
            # More characters than in the text: they belong to the one before them.
            low += [max(0, start - 1)] * (last - first)
            high += [start] * (last - first)
        if last > first and stop > start:
            # Characters that are only in the text go to the token after them.
            low[first] = high[first] = border
        border = border if last == first else stop
    return [*low, len(text)], [*high, len(text)]
