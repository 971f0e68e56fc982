"""What the tokens of a vocabulary stand for, and which tokens two vocabularies share."""

import json
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

_MARK = "▁"
_BYTE_TOKEN = re.compile(r"<0x[0-9A-F]{2}>")
# Han characters, each of which WordPiece makes a word of its own: no space goes before one.
_HAN = re.compile("[\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff]")


def _bytes_of_characters() -> dict[str, int]:
    """Byte-level BPE writes each byte as one printable character: the inverse of that table."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    table = {chr(byte): byte for byte in printable}
    return table | {chr(256 + n): byte for n, byte in enumerate(others)}


_BYTE_OF = _bytes_of_characters()


class TokenBytes:
    r"""The bytes of text that each token of a tokenizer stands for.

    Undone are: Ġ and the other characters of byte-level BPE, ▁ and the byte tokens <0x..> of
    SentencePiece, ## of WordPiece, whose other tokens begin with a space unless they begin with
    punctuation or a Han character. Added tokens are written as they are.

    Args:
        tokenizer: A transformers fast tokenizer.

    Example:
        >>> import tokenizers, transformers
        >>> bpe = tokenizers.Tokenizer(tokenizers.models.BPE({"Ġa": 0, "Ã": 1, "©": 2}, []))
        >>> bpe.decoder = tokenizers.decoders.ByteLevel()
        >>> TokenBytes(transformers.PreTrainedTokenizerFast(tokenizer_object=bpe))([0, 1, 2])
        [b' a', b'\xc3', b'\xa9']
    """

    def __init__(self, tokenizer: "PreTrainedTokenizerFast") -> None:
        self._tokenizer = tokenizer
        self._known: dict[int, bytes | None] = {}
        self._added = tokenizer.added_tokens_decoder
        kinds = _kinds(tokenizer)
        self._byte_level = "ByteLevel" in kinds
        self._byte_tokens = "ByteFallback" in kinds
        special = {id: token.content for id, token in self._added.items() if token.special}
        named = dict(zip(tokenizer.all_special_ids, tokenizer.all_special_tokens, strict=True))
        # Whoever trains a tokenizer may have to declare its byte tokens as special.
        self._special = {id for id, text in (special | named).items() if not self.is_byte(text)}
        self._marks = bool(kinds & {"Metaspace", _MARK})
        self._word_piece = "WordPiece" in kinds
        names: Any = (tokenizer, tokenizer.backend_tokenizer.model)
        self._unknown = {getattr(each, "unk_token", None) for each in names}

    def __call__(self, ids: Sequence[int]) -> list[bytes | None]:
        """The bytes of tokens.

        Args:
            ids: Of the tokens.

        Returns:
            One an id; None for the unknown token and for an id without a token.
        """
        known = self._known
        missing = [id for id in ids if id not in known]
        if missing:
            tokens: Any = self._tokenizer.convert_ids_to_tokens(missing)
            known.update(zip(missing, map(self._bytes, missing, tokens), strict=True))
        return [known[id] for id in ids]

    def is_special(self, id: int) -> bool:
        """Whether a token marks a place, such as the end, and stands for no text.

        Args:
            id: Of the token.

        Returns:
            That.
        """
        return id in self._special

    def is_byte(self, token: str) -> bool:
        """Whether a token is one of SentencePiece's for single bytes.

        Args:
            token: As it stands in the vocabulary.

        Returns:
            That.
        """
        return self._byte_tokens and _BYTE_TOKEN.fullmatch(token) is not None

    def _bytes(self, id: int, token: str | None) -> bytes | None:
        if token is None or token in self._unknown:
            return None
        if self.is_byte(token):
            return bytes([int(token[3:5], 16)])
        if id in self._added and (id in self._special or not self._marks):
            return _utf8(token)
        if self._byte_level:
            codes = [_BYTE_OF.get(character) for character in token]
            return _utf8(token) if None in codes else bytes(codes)  # type: ignore[arg-type]
        if self._word_piece:
            if token.startswith("##") and len(token) > 2:
                return _utf8(token[2:])
            apart = token[:1].isalnum() and not _HAN.match(token)
            return _utf8(" " * apart + token)
        return _utf8(token.replace(_MARK, " ") if self._marks else token)


def _utf8(text: str) -> bytes:
    return text.encode("utf-8", "surrogatepass")


def _kinds(tokenizer: "PreTrainedTokenizerFast") -> set[str]:
    """The steps of its decoder, or else of its pre-tokeniser; "▁" where one replaces that."""
    backend = tokenizer.backend_tokenizer
    step: Any = backend.decoder or backend.pre_tokenizer
    if step is None:
        return set()
    state = json.loads(step.__getstate__())
    parts = [state, *state.get("decoders", ()), *state.get("pretokenizers", ())]
    replaced = {part["pattern"].get("String") for part in parts if part["type"] == "Replace"}
    return {part["type"] for part in parts} | (replaced & {_MARK})


class MatchedVocabulary(NamedTuple):
    """Tokens that two vocabularies share; what `losses.aligned.hybrid_loss` takes.

    Attributes:
        student: int32 [M], ids without repetition, ascending.
        teacher: int32 [M], the teacher's id of the same text, without repetition.
    """

    student: np.ndarray
    teacher: np.ndarray


def match_vocabularies(
    student_tokenizer: "PreTrainedTokenizerFast", teacher_tokenizer: "PreTrainedTokenizerFast"
) -> MatchedVocabulary:
    """Match the tokens that stand for the same bytes of text, see `TokenBytes`.

    Special tokens are never matched by their text; the end-of-text tokens are matched with each
    other. Of several tokens of one vocabulary with the same bytes the first is matched that is
    no byte token (which a tokenizer only uses where it has nothing else), by id. Ids beyond the
    tokenizer, where the logits are padded, are never matched.

    Args:
        student_tokenizer: A transformers fast tokenizer.
        teacher_tokenizer: Another.

    Returns:
        The ids of both sides.

    Example:
        >>> from uld_jax.testing import toy_tokenizer
        >>> pair = toy_tokenizer(), toy_tokenizer(kind="metaspace")
        >>> matched = match_vocabularies(*pair)
        >>> i = matched.student.tolist().index(pair[0].convert_tokens_to_ids("Ġand"))
        >>> pair[1].convert_ids_to_tokens(int(matched.teacher[i]))
        '▁and'
    """
    student, teacher = (_ids_of_text(t) for t in (student_tokenizer, teacher_tokenizer))
    pairs = [(id, teacher[text]) for text, id in student.items() if text in teacher]
    ends: Any = (student_tokenizer.eos_token_id, teacher_tokenizer.eos_token_id)
    if None not in ends:
        pairs.append(ends)
    both = np.asarray(sorted(pairs), np.int32).reshape(-1, 2)
    return MatchedVocabulary(both[:, 0], both[:, 1])


def _ids_of_text(tokenizer: "PreTrainedTokenizerFast") -> dict[bytes, int]:
    read = TokenBytes(tokenizer)
    ids = [id for id in range(len(tokenizer)) if not read.is_special(id)]
    found: dict[bytes, int] = {}
    spare: dict[bytes, int] = {}
    tokens: Any = tokenizer.convert_ids_to_tokens(ids)
    for id, token, text in zip(ids, tokens, read(ids), strict=True):
        if text:
            (spare if read.is_byte(token) else found).setdefault(text, id)
    return spare | found
