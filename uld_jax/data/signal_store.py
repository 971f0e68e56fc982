"""A teacher cache on disk: shards of signals, their checksums and one manifest.

A finished directory holds `signals-00000.array_record`, … and `manifest.json`, which is written
last: without it the cache is unfinished. The first record of a shard is the JSON list of its
examples' ids under LZMA, so that opening reads no signal; the others are `encode_signal`'s.
"""

import hashlib
import json
import lzma
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from array_record.python.array_record_module import ArrayRecordReader

from uld_jax.data.signal import Signal
from uld_jax.data.signal_codec import decode_signal
from uld_jax.errors import UserError

FORMAT = 1
MANIFEST = "manifest.json"
# Nothing is read ahead and no thread pool is kept: rows are read in random order.
READER_OPTIONS = "readahead_buffer_size:0,max_parallelism:0"
_MEND = "run `uld-jax cache` again"


class SignalStore:
    """A finished teacher cache.

    Opening verifies every byte against the manifest.

    Args:
        directory: Of the cache.
        expect: The provenance that it must have, field by field; None accepts any.

    Attributes:
        manifest: As `SignalWriter.finish` wrote it.

    Raises:
        UserError: The cache is unfinished, damaged or of another provenance.

    Example:
        >>> import tempfile
        >>> import numpy as np
        >>> from uld_jax.data import SignalWriter, truncate_signal
        >>> rows, zero = np.array([[0.75, 0.2, 0.05]]), np.zeros(1)
        >>> signal = truncate_signal(rows, zero, zero, epsilon=0.01, cap=8)
        >>> settings = {"epsilon": 0.01, "cap": 8, "shard_size": 100}
        >>> directory = tempfile.mkdtemp()
        >>> writer = SignalWriter(directory, {"model": "toy"}, total=1, **settings)
        >>> writer.write_shard(0, [("a", signal)])
        >>> _ = writer.finish()
        >>> store = SignalStore(directory, {"model": "toy"})
        >>> len(store), "a" in store, store["a"].counts.tolist()
        (1, True, [3])
    """

    def __init__(self, directory: str | Path, expect: Mapping[str, Any] | None = None) -> None:
        self._directory = Path(directory)
        self.manifest = _read_manifest(self._directory)
        if expect is not None:
            different = differences(self.manifest["provenance"], expect)
            if different:
                raise UserError(
                    f"{self._directory}: this teacher cache was made from something else: "
                    f"{'; '.join(different)}: name another cache, or {_MEND} into another directory"
                )
        self._readers: list[ArrayRecordReader] = []
        self._rows: dict[str, tuple[int, int]] = {}
        for number, shard in enumerate(self.manifest["shards"]):
            path = self._directory / shard["name"]
            verify_shard(path, shard)
            reader = ArrayRecordReader(str(path), READER_OPTIONS)
            self._readers.append(reader)
            for row, example_id in enumerate(_read_ids(reader, path), start=1):
                if example_id in self._rows:
                    raise UserError(f"{path}: id {example_id!r} is there twice: {_MEND}")
                self._rows[example_id] = (number, row)

    def __len__(self) -> int:
        return len(self._rows)

    def __contains__(self, example_id: object) -> bool:
        return example_id in self._rows

    def __getitem__(self, example_id: str) -> Signal:
        shard, row = self._rows[example_id]
        try:
            return decode_signal(self._readers[shard].read([row])[0])
        except ValueError as error:
            raise UserError(
                f"{self._directory / self.manifest['shards'][shard]['name']}: example "
                f"{example_id!r}: {error}: {_MEND}"
            ) from error

    @property
    def max_count(self) -> int:
        """The largest count of probabilities of any position."""
        return self.manifest["max_count"]


def differences(found: Mapping[str, Any], expected: Mapping[str, Any]) -> list[str]:
    """The fields in which two flat records differ, for people.

    Args:
        found: What the cache says.
        expected: What it should say.

    Returns:
        A text a field, with both values.

    Example:
        >>> differences({"model": "a", "cap": 1}, {"model": "b", "cap": 1})
        ["model is 'a', expected 'b'"]
    """
    absent = "absent"
    return [
        f"{name} is {_show(found, name, absent)}, expected {_show(expected, name, absent)}"
        for name in sorted(found.keys() | expected.keys())
        if _show(found, name, absent) != _show(expected, name, absent)
    ]


def _show(record: Mapping[str, Any], name: str, absent: str) -> str:
    # Through JSON, as the manifest keeps it: a tuple and a list are one.
    return repr(json.loads(json.dumps(record[name]))) if name in record else absent


def sha256_of(path: Path) -> str:
    """The checksum of a file.

    Args:
        path: Of the file.

    Returns:
        SHA-256 in hexadecimal digits.
    """
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def verify_shard(path: Path, shard: Mapping[str, Any]) -> None:
    """Compares a shard with what was noted when it was written.

    Args:
        path: Of the shard.
        shard: Its "bytes" and "sha256".

    Raises:
        UserError: It is absent, cut short or changed.
    """
    if not path.is_file():
        raise UserError(f"{path}: no such file, expected a shard of the teacher cache: {_MEND}")
    size = path.stat().st_size
    if size != shard["bytes"]:
        raise UserError(f"{path}: has {size} bytes, expected {shard['bytes']}: {_MEND}")
    digest = sha256_of(path)
    if digest != shard["sha256"]:
        raise UserError(f"{path}: has sha256 {digest}, expected {shard['sha256']}: {_MEND}")


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file of the cache.

    Args:
        path: Of the file.

    Returns:
        The object.

    Raises:
        UserError: It is none.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{path}: not JSON ({error}): remove the directory and {_MEND}") from error
    if not isinstance(value, dict):
        raise UserError(
            f"{path}: expected a JSON object, got {type(value).__name__}: remove the directory "
            f"and {_MEND}"
        )
    return value


def _read_manifest(directory: Path) -> dict[str, Any]:
    path = directory / MANIFEST
    if not directory.is_dir():
        raise UserError(f"{directory}: no such directory, expected a teacher cache: {_MEND}")
    if not path.is_file():
        shards = len(list(directory.glob("signals-*.array_record")))
        raise UserError(
            f"{path}: no such file, expected a finished teacher cache, found {shards} shards of "
            f"an unfinished one: {_MEND}, which continues it"
        )
    manifest = read_json(path)
    if manifest.get("format") != FORMAT:
        raise UserError(
            f"{path}: format is {manifest.get('format')!r}, expected {FORMAT}: {_MEND} into "
            "another directory"
        )
    missing = {"provenance", "shards", "max_count", "error_bound"} - manifest.keys()
    if missing:
        raise UserError(f"{path}: {sorted(missing)} missing: remove the directory and {_MEND}")
    return manifest


def _read_ids(reader: ArrayRecordReader, path: Path) -> list[str]:
    """The ids in a verified shard; only another program's shard can be wrong here."""
    try:
        ids = json.loads(lzma.decompress(reader.read([0])[0]))
    except (IndexError, ValueError, lzma.LZMAError) as error:
        raise UserError(f"{path}: its first record is no list of ids: {_MEND}") from error
    if not isinstance(ids, list) or len(ids) + 1 != reader.num_records():
        raise UserError(
            f"{path}: has {reader.num_records() - 1} signals, expected one for each id: {_MEND}"
        )
    return ids
