"""A fast Hugging Face tokenizer built from the metadata of a GGUF file, without torch.

The file lists the tokens, their kinds and either merges (byte-level BPE) or scores (SentencePiece
BPE) under `tokenizer.ggml.*`. The pipeline around them (normaliser, pre-tokeniser, decoder) is only
named, and is put together here. Building takes seconds, so the result is kept in a cache.
"""

import contextlib
import dataclasses
import errno
import hashlib
import json
import os
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import gguf
import tokenizers
import transformers
from gguf import Keys
from tokenizers import decoders, models, normalizers, pre_tokenizers

from uld_jax.errors import UserError
from uld_jax.files import sha256_of

_BUILDER_VERSION = 1  # part of the cache key: raise it when the same file gives another tokenizer
_CHECKSUMS = "checksums.json"
_SPACE = "▁"  # SentencePiece's visible space

_LLAMA3_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_QWEN2_SPLIT = _LLAMA3_SPLIT.replace(r"\p{N}{1,3}", r"\p{N}")


_GPT2_SPLITS = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)


def _regex_splits(pattern: str) -> pre_tokenizers.PreTokenizer:
    split = pre_tokenizers.Split(tokenizers.Regex(pattern), behavior="isolated")
    as_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    return pre_tokenizers.Sequence([split, as_bytes])


@dataclasses.dataclass(frozen=True)
class _BytePreset:
    """How one value of `tokenizer.ggml.pre` cuts text before byte-level merging."""

    splits: pre_tokenizers.PreTokenizer
    normalizer: normalizers.Normalizer | None = None
    ignore_merges: bool = False  # a piece that is itself a token is taken whole
    add_bos_token: bool = False  # where the file does not say


_BYTE_PRESETS: Mapping[str, _BytePreset] = {
    "default": _BytePreset(_GPT2_SPLITS),
    "gpt-2": _BytePreset(_GPT2_SPLITS),
    "gpt2": _BytePreset(_GPT2_SPLITS),
    "llama-bpe": _BytePreset(_regex_splits(_LLAMA3_SPLIT), ignore_merges=True, add_bos_token=True),
    "qwen2": _BytePreset(_regex_splits(_QWEN2_SPLIT), normalizer=normalizers.NFC()),
    "smollm": _BytePreset(
        pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), _GPT2_SPLITS])
    ),
}


@dataclasses.dataclass(frozen=True)
class _Metadata:
    """What the file says about its tokenizer, under the names of `tokenizer.ggml.*`."""

    path: Path
    architecture: str
    model: str
    pre: str | None
    tokens: list[str]
    scores: list[float] | None
    token_type: list[int]
    merges: list[str] | None
    special_tokens: dict[str, str]  # bos_token, eos_token, unk_token, pad_token where stated
    add_bos_token: bool | None
    add_eos_token: bool | None
    add_space_prefix: bool | None
    chat_template: str | None

    def flaw(self, key: str, found: str, expected: str) -> UserError:
        """The error for a key whose value cannot be used."""
        return UserError(
            f"{self.path}: tokenizer.ggml.{key} is {found}, expected {expected}; convert the model "
            f"to GGUF again, or take the tokenizer from the original model"
        )


def tokenizer_from_gguf(
    reader_or_path: gguf.GGUFReader | str | Path, *, cache_dir: Path | None = None
) -> transformers.PreTrainedTokenizerFast:
    """Rebuilds the tokenizer that a GGUF file describes, or loads it from the cache.

    Byte-level BPE (`tokenizer.ggml.model` = "gpt2") is split as `tokenizer.ggml.pre` says.
    SentencePiece BPE ("llama", Gemma too) falls back to bytes; merges that the file leaves out are
    recovered. Control tokens become special tokens, user-defined ones plain added tokens.

    Args:
        reader_or_path: the file, or a reader that has it open. With a path, a tokenizer that is
            cached already is loaded without parsing the file.
        cache_dir: the root of the cache, by default `$ULD_JAX_CACHE` or `~/.cache/uld_jax`; its
            `tokenizers/<hash of the file's name, size, time and first MiB>` is used.

    Returns:
        A fast tokenizer with character offsets, that saves and reloads like any other.

    Raises:
        UserError: if the file cannot be read, states no tokenizer, states one of an unsupported
            kind, or contradicts itself; or if the cache cannot be written.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = Path(folder, "tiny.gguf")
        ...     writer = gguf.GGUFWriter(path, "llama")
        ...     writer.add_tokenizer_model("gpt2")
        ...     writer.add_tokenizer_pre("gpt-2")
        ...     writer.add_token_list(["a", "b", "ab"])
        ...     writer.add_token_merges(["a b"])
        ...     writer.write_header_to_file()
        ...     writer.write_kv_data_to_file()
        ...     writer.write_tensors_to_file()
        ...     writer.close()
        ...     tokenizer_from_gguf(path, cache_dir=Path(folder, "cache"))("abba").input_ids
        [2, 1, 0]
    """
    reader = reader_or_path if isinstance(reader_or_path, gguf.GGUFReader) else None
    path = _path_of(reader_or_path)
    root = cache_dir or os.environ.get("ULD_JAX_CACHE") or Path.home() / ".cache" / "uld_jax"
    entry = Path(root) / "tokenizers" / _cache_key(path)
    if _is_intact(entry):
        return transformers.PreTrainedTokenizerFast.from_pretrained(entry)
    tokenizer = _build(_read_metadata(reader or _open(path), path))
    try:
        return _publish(tokenizer, entry)
    except OSError as error:
        raise UserError(
            f"{entry.parent}: expected a writable directory for the tokenizer cache, found "
            f"{error.strerror!r}; point ULD_JAX_CACHE to a directory that can be written"
        ) from error


def spm_merges(tokens: Sequence[str], mergeable: Iterable[int]) -> list[tuple[str, str]]:
    """Recovers the merge list of a SentencePiece BPE vocabulary.

    SentencePiece keeps no merges: at each step it joins the two neighbours whose union is the
    token of highest score, the leftmost such pair first. So every way to cut a token into two
    tokens is a merge, ranked by the score of what it makes; the cuts of one token are ranked
    longest left part first.

    Args:
        tokens: the vocabulary, one string an id.
        mergeable: ids of the tokens that merging may make or use, best first.

    Returns:
        Pairs (left, right), best first.

    Example:
        >>> spm_merges(["a", "b", "ab", "aba"], [2, 3, 0, 1])
        [('a', 'b'), ('ab', 'a')]

    Reference:
        Kudo and Richardson, SentencePiece, EMNLP 2018 (arXiv 1808.06226), section 3.1.
    """
    ranked = [tokens[i] for i in mergeable]
    known = frozenset(ranked)
    cuts = ((t[:at], t[at:]) for t in ranked for at in range(len(t) - 1, 0, -1))
    return [(left, right) for left, right in cuts if left in known and right in known]


def _path_of(reader_or_path: gguf.GGUFReader | str | Path) -> Path:
    opened = isinstance(reader_or_path, gguf.GGUFReader)
    path = Path(str(reader_or_path.data.filename) if opened else reader_or_path)
    if not path.is_file():
        raise UserError(f"{path}: expected a GGUF file, found no such file; check the path")
    return path


def _open(path: Path) -> gguf.GGUFReader:
    try:
        return gguf.GGUFReader(path)
    except (ValueError, IndexError) as error:
        raise UserError(
            f"{path}: expected a GGUF file, found something else or a part of one ({error}); "
            f"fetch the file again"
        ) from error


def _read_metadata(reader: gguf.GGUFReader, path: Path) -> _Metadata:
    def get(key: str) -> Any:
        field = reader.get_field(key)
        return None if field is None else field.contents()

    keys = Keys.Tokenizer
    tokens = get(keys.LIST) or []
    id_keys = {"bos": keys.BOS_ID, "eos": keys.EOS_ID, "unk": keys.UNK_ID, "pad": keys.PAD_ID}
    ids = {f"{name}_token": get(key) for name, key in id_keys.items()}
    metadata = _Metadata(
        path=path,
        architecture=get(Keys.General.ARCHITECTURE) or "",
        model=get(keys.MODEL) or "",
        pre=get(keys.PRE),
        tokens=tokens,
        scores=get(keys.SCORES),
        token_type=get(keys.TOKEN_TYPE) or [gguf.TokenType.NORMAL] * len(tokens),
        merges=get(keys.MERGES),
        special_tokens={name: tokens[i] for name, i in ids.items() if i in range(len(tokens))},
        add_bos_token=get(keys.ADD_BOS),
        add_eos_token=get(keys.ADD_EOS),
        add_space_prefix=get(keys.ADD_PREFIX),
        chat_template=get(keys.CHAT_TEMPLATE),
    )
    _check(metadata, ids)
    return metadata


def _check(metadata: _Metadata, ids: Mapping[str, int | None]) -> None:
    count = len(metadata.tokens)
    for key in ("model", "tokens"):
        if not getattr(metadata, key):
            raise metadata.flaw(key, "missing", "a GGUF file that carries its tokenizer")
    for key in ("scores", "token_type"):
        values = getattr(metadata, key)
        if values is not None and len(values) != count:
            raise metadata.flaw(key, f"{len(values)} entries long", f"{count}, one a token")
    for name, i in ids.items():
        if i is not None and i >= count:
            raise metadata.flaw(f"{name}_id", str(i), f"an id below {count}, the number of tokens")


def _build(metadata: _Metadata) -> transformers.PreTrainedTokenizerFast:
    builders = {"gpt2": _byte_level, "llama": _sentencepiece}
    if metadata.model not in builders:
        raise metadata.flaw("model", repr(metadata.model), f"one of {', '.join(builders)}")
    backend, default_add_bos = builders[metadata.model](metadata)
    backend.add_special_tokens(_added_tokens(metadata, gguf.TokenType.CONTROL))
    user_defined = _added_tokens(metadata, gguf.TokenType.USER_DEFINED)
    # Gemma's runs of spaces were respelled: merging makes them, and as stored they have no id.
    backend.add_tokens([t for t in user_defined if backend.token_to_id(t.content) is not None])
    adds = {
        "bos_token": default_add_bos if metadata.add_bos_token is None else metadata.add_bos_token,
        "eos_token": bool(metadata.add_eos_token),
    }
    for name, added in adds.items():
        if added and name not in metadata.special_tokens:
            raise metadata.flaw(f"{name}_id", "missing", f"an id, as add_{name} is true")
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend,
        clean_up_tokenization_spaces=False,
        chat_template=metadata.chat_template,
        **{f"add_{name}": added for name, added in adds.items()},
        **metadata.special_tokens,
    )


def _added_tokens(metadata: _Metadata, kind: gguf.TokenType) -> list[tokenizers.AddedToken]:
    kinds = zip(metadata.tokens, metadata.token_type, strict=True)
    return [tokenizers.AddedToken(t, normalized=False) for t, found in kinds if found == kind]


def _byte_level(metadata: _Metadata) -> tuple[tokenizers.Tokenizer, bool]:
    """Byte-level BPE, and whether it begins with BOS where the file does not say."""
    preset = _BYTE_PRESETS.get(metadata.pre or "")
    if preset is None:
        found = "missing" if metadata.pre is None else repr(metadata.pre)
        raise metadata.flaw("pre", found, f"one of {', '.join(sorted(_BYTE_PRESETS))}")
    if metadata.merges is None:
        raise metadata.flaw("merges", "missing", "a list, as tokenizer.ggml.model is 'gpt2'")
    vocabulary = {token: i for i, token in enumerate(metadata.tokens)}
    merges = _stated_merges(metadata, vocabulary)
    backend = tokenizers.Tokenizer(
        models.BPE(vocab=vocabulary, merges=merges, ignore_merges=preset.ignore_merges)
    )
    if preset.normalizer is not None:
        backend.normalizer = preset.normalizer
    backend.pre_tokenizer = preset.splits
    backend.decoder = decoders.ByteLevel()
    return backend, preset.add_bos_token


def _sentencepiece(metadata: _Metadata) -> tuple[tokenizers.Tokenizer, bool]:
    """SentencePiece BPE with byte fallback, and whether it begins with BOS by default."""
    gemma = metadata.architecture.startswith("gemma")
    tokens = metadata.tokens
    if gemma:  # its runs of spaces are stored as they are, but looked up after normalisation
        tokens = [t.replace(" ", _SPACE) if t.isspace() else t for t in tokens]
    vocabulary = {token: i for i, token in enumerate(tokens)}
    if metadata.merges is not None:
        merges = _stated_merges(metadata, vocabulary)
    else:
        merges = spm_merges(tokens, _best_first(metadata, by_id=gemma))
    backend = tokenizers.Tokenizer(
        models.BPE(
            vocab=vocabulary,
            merges=merges,
            unk_token=metadata.special_tokens.get("unk_token"),
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    # GemmaTokenizer's pre-tokeniser splits at spaces: no space is left by then, so none is needed.
    spaces = normalizers.Replace(" ", _SPACE)
    undo = [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    if not gemma if metadata.add_space_prefix is None else metadata.add_space_prefix:
        # Not Metaspace: it gives no prefix to text that begins with a space, unlike SentencePiece,
        # and decoding would then lose that space.
        backend.normalizer = normalizers.Sequence([normalizers.Prepend(_SPACE), spaces])
        undo.append(decoders.Strip(" ", left=1))
    else:
        backend.normalizer = spaces
    backend.decoder = decoders.Sequence(undo)
    return backend, True


def _best_first(metadata: _Metadata, *, by_id: bool) -> list[int]:
    """Ids of the tokens that merging can make or use, in the order in which it prefers them.

    Gemma's user-defined runs of spaces come before any normal token, as they do in SentencePiece,
    yet all have the score -1000; its ids are in the right order, its scores are not.
    """
    kinds = gguf.TokenType
    apart = {kinds.CONTROL, kinds.UNKNOWN, kinds.BYTE}  # never made by merging
    ids = [i for i, kind in enumerate(metadata.token_type) if kind not in apart]
    if by_id:
        return ids
    if metadata.scores is None:
        raise metadata.flaw("scores", "missing", "one score a token, as there are no merges")
    return sorted(ids, key=metadata.scores.__getitem__, reverse=True)


def _stated_merges(metadata: _Metadata, vocabulary: Mapping[str, int]) -> list[tuple[str, str]]:
    parts = (merge.partition(" ") for merge in metadata.merges or [])
    pairs = [(left, right) for left, _, right in parts]
    for left, right in pairs:
        if left not in vocabulary or right not in vocabulary or left + right not in vocabulary:
            found = f"a list with {left!r} + {right!r}"
            raise metadata.flaw("merges", found, "pairs of tokens whose union is a token")
    return pairs


def _cache_key(path: Path) -> str:
    stat = path.stat()
    stamp = f"{_BUILDER_VERSION}\0{path.name}\0{stat.st_size}\0{stat.st_mtime_ns}\0"
    with path.open("rb") as file:
        return hashlib.sha256(stamp.encode() + file.read(1 << 20)).hexdigest()


def _is_intact(entry: Path) -> bool:
    """Whether every file that was written to the cache entry is still there, byte for byte."""
    try:
        stated = json.loads((entry / _CHECKSUMS).read_text("utf-8"))
        return isinstance(stated, dict) and stated == {
            name: sha256_of(entry / name) for name in {"tokenizer.json", *stated}
        }
    except (OSError, ValueError):
        return False


def _publish(
    tokenizer: transformers.PreTrainedTokenizerFast, entry: Path
) -> transformers.PreTrainedTokenizerFast:
    """Reloads the tokenizer from a finished directory, then moves that into place in one step."""
    entry.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=entry.parent, prefix=".building-") as temporary:
        fresh = Path(temporary, "fresh")
        tokenizer.save_pretrained(fresh)
        # Without the line breaks of save_pretrained the file is half as long and loads sooner.
        tokenizer.backend_tokenizer.save(str(fresh / "tokenizer.json"), pretty=False)
        sums = {path.name: sha256_of(path) for path in sorted(fresh.iterdir())}
        (fresh / _CHECKSUMS).write_text(json.dumps(sums), "utf-8")
        reloaded = transformers.PreTrainedTokenizerFast.from_pretrained(fresh)
        if not _moved(fresh, entry) and not _is_intact(entry):
            with contextlib.suppress(FileNotFoundError):
                os.replace(entry, Path(temporary, "stale"))
            _moved(fresh, entry)
    return reloaded


def _moved(source: Path, target: Path) -> bool:
    """Renames a directory unless another one is there: perhaps another process was faster."""
    try:
        os.replace(source, target)
    except OSError as error:
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):
            raise
        return False
    return True
