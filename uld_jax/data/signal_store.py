"""A teacher cache on disk: shards of signals, their checksums and one manifest.

A finished directory holds `signals-00000.array_record`, … and `manifest.json`, which is written
last: without it the cache is unfinished. The first record of a shard is the JSON list of its
examples' ids under LZMA, so that opening reads no signal; the others are `encode_signal`'s.
"""

import functools
import json
import lzma
import os
import pathlib
from collections.abc import Mapping
from typing import Any

from array_record.python.array_record_module import ArrayRecordReader

from uld_jax.data.shards import Kind, differences, read_manifest, verify_shard
from uld_jax.data.signal import Signal
from uld_jax.data.signal_codec import decode_signal
from uld_jax.errors import UserError
from uld_jax.files import fetched, locate

# The texts that the signals are of, where the teacher wrote them.
ANSWERS = "answers.json"
# Records are compressed already. A group costs about 12 bytes a record alone and 0.5 in 64.
CACHE = Kind(
    what="teacher cache",
    command="uld-jax cache",
    format=1,
    stem="signals",
    suffix="-{shard:05d}.array_record",
    options="group_size:64,uncompressed,max_parallelism:1",
    fields=("max_count", "error_bound"),
    beside=(ANSWERS,),
)
# Nothing is read ahead and no thread pool is kept: rows are read in random order.
READER_OPTIONS = "readahead_buffer_size:0,max_parallelism:0"


class SignalStore:
    """A finished teacher cache.

    Opening verifies every byte against the manifest. Of a cache in a bucket the shards are read
    from local copies, see `files.fetched`.

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

    def __init__(
        self, directory: str | os.PathLike[str], expect: Mapping[str, Any] | None = None
    ) -> None:
        place = locate(directory)
        self.manifest = read_manifest(place, CACHE)
        if expect is not None:
            different = differences(self.manifest["provenance"], expect)
            if different:
                raise UserError(
                    f"{place}: this teacher cache was made from something else: "
                    f"{'; '.join(different)}: name another cache, or {CACHE.mend} into another "
                    "directory"
                )
        digests = {shard["name"]: shard["sha256"] for shard in self.manifest["shards"]}
        self._directory = fetched(place, digests)
        self._readers: list[ArrayRecordReader] = []
        self._rows: dict[str, tuple[int, int]] = {}
        for number, shard in enumerate(self.manifest["shards"]):
            path = self._directory / shard["name"]
            verify_shard(path, shard, CACHE)
            reader = ArrayRecordReader(str(path), READER_OPTIONS)
            self._readers.append(reader)
            for row, example_id in enumerate(_read_ids(reader, path), start=1):
                if example_id in self._rows:
                    raise UserError(f"{path}: id {example_id!r} is there twice: {CACHE.mend}")
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
                f"{example_id!r}: {error}: {CACHE.mend}"
            ) from error

    @property
    def max_count(self) -> int:
        """The largest count of probabilities of any position."""
        return self.manifest["max_count"]

    @functools.cached_property
    def id_count(self) -> int:
        """How many tokens of each position are kept by id; 0 for none."""
        for example_id in self._rows:
            ids = self[example_id].ids
            return 0 if ids is None else ids.shape[1]
        return 0


def _read_ids(reader: ArrayRecordReader, path: pathlib.Path) -> list[str]:
    """The ids in a verified shard; only another program's shard can be wrong here."""
    try:
        ids = json.loads(lzma.decompress(reader.read([0])[0]))
    except (IndexError, ValueError, lzma.LZMAError) as error:
        raise UserError(f"{path}: its first record is no list of ids: {CACHE.mend}") from error
    if not isinstance(ids, list) or len(ids) + 1 != reader.num_records():
        raise UserError(
            f"{path}: has {reader.num_records() - 1} signals, expected one for each id: "
            f"{CACHE.mend}"
        )
    return ids
