"""Writes a teacher cache shard by shard, so that a kill at any moment loses one shard's work."""

import json
import lzma
import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from uld_jax.data.shards import ShardWriter
from uld_jax.data.signal import Signal
from uld_jax.data.signal_codec import decode_signal, encode_signal
from uld_jax.data.signal_store import CACHE


class SignalWriter:
    """Fills a directory with signals, of examples in a fixed order, `shard_size` a shard.

    Shards are written in any order and by any number of processes, each its own; one of them
    finishes. A writer on a directory that another left unfinished continues it.

    Args:
        directory: Made if need be.
        provenance: What the signals follow from, as JSON values: model, tokenizer and prompt
            hashes, temperature, data fingerprint, ….
        total: Examples of the data set.
        epsilon: See `truncate_signal` and `encode_signal`.
        cap: See `truncate_signal`.
        shard_size: Examples of a shard; see `shards.write_records` about the size of its file.

    Raises:
        UserError: The directory holds something else, each differing field named.

    Example:
        >>> import tempfile
        >>> settings = {"total": 5, "epsilon": 0.01, "cap": 64, "shard_size": 2}
        >>> writer = SignalWriter(tempfile.mkdtemp(), {"model": "toy"}, **settings)
        >>> writer.missing_shards()
        [0, 1, 2]
        >>> writer.write_shard(1, [], dropped=2)
        >>> writer.missing_shards()
        [0, 2]
    """

    def __init__(
        self,
        directory: str | os.PathLike[str],
        provenance: Mapping[str, Any],
        *,
        total: int,
        epsilon: float,
        cap: int,
        shard_size: int,
    ) -> None:
        self._epsilon = epsilon
        self._shards = ShardWriter(
            directory,
            CACHE,
            {
                "provenance": dict(provenance),
                "epsilon": epsilon,
                "cap": cap,
                "total": total,
                "shard_size": shard_size,
            },
        )

    def missing_shards(self) -> list[int]:
        """The shards that are still to be written, by this process or others.

        Returns:
            Their numbers, ascending.
        """
        return self._shards.missing_shards()

    def examples_of(self, shard: int) -> range:
        """Which examples belong in a shard.

        Args:
            shard: Its number.

        Returns:
            Their indices in the data set.

        Raises:
            ValueError: There is no such shard.
        """
        return self._shards.examples_of(shard)

    def write_shard(
        self, shard: int, records: Sequence[tuple[str, Signal]], *, dropped: int = 0
    ) -> None:
        """Writes one shard in one step; a reader, or a writer after a kill, sees all or none.

        Args:
            shard: Its number.
            records: Example id and signal, in the order of the examples.
            dropped: Examples of the shard that have no signal.

        Raises:
            ValueError: Records and dropped are not the shard's examples, an id is there twice, or
                a signal is malformed.
            UserError: The cache is finished already.
        """
        expected = len(self.examples_of(shard))
        if len(records) + dropped != expected:
            raise ValueError(
                f"shard {shard}: expected {expected} examples, got {len(records)} records and "
                f"{dropped} dropped"
            )
        ids = [example_id for example_id, _ in records]
        if len(set(ids)) < len(ids):
            raise ValueError(f"shard {shard}: an id is there twice")
        encoded = [encode_signal(signal, epsilon=self._epsilon) for _, signal in records]
        listed = lzma.compress(json.dumps(ids, ensure_ascii=False).encode(), preset=9)
        counted = _count([decode_signal(record) for record in encoded], 1.5 * self._epsilon)
        sizes = {"record_bytes": sum(map(len, encoded)), "dropped": dropped}
        note = {"records": len(records), "counted": counted | sizes}
        self._shards.write(shard, [listed, *encoded], note)

    def finish(self) -> dict[str, Any]:
        """Writes the manifest, which makes the cache whole, and removes what was for resuming.

        Returns:
            The manifest.

        Raises:
            ValueError: Shards are missing.
        """
        if self._shards.finished:
            return self._shards.manifest()
        notes = self._shards.notes()
        counted = [note.pop("counted") for note in notes]
        total = {key: sum(c[key] for c in counted) for key in counted[0]}
        positions = max(total["positions"], 1)
        return self._shards.finish(
            {
                # Of every position that the cap, or a teacher that tells few, did not cut short.
                "error_bound": 1.5 * self._epsilon,
                "max_error": max(c["max_error"] for c in counted),
                "mean_error": total["error"] / positions,
                "examples": sum(note["records"] for note in notes),
                "dropped": total["dropped"],
                "positions": total["positions"],
                "over_bound": total["over_bound"],
                "mean_count": total["count"] / positions,
                "max_count": max(c["max_count"] for c in counted),
                "record_bytes": total["record_bytes"],
                "bytes": sum(note["bytes"] for note in notes),
                "shards": notes,
            }
        )


def _count(signals: Sequence[Signal], bound: float) -> dict[str, Any]:
    """What the manifest sums up, of the signals as they will be read."""
    none = np.zeros(0, np.float32)
    counts = np.concatenate([none.astype(np.int64), *(s.counts for s in signals)])
    errors = np.concatenate([none, *(s.error for s in signals)]).astype(np.float64)
    return {
        "positions": len(counts),
        "count": int(counts.sum()),
        "max_count": int(counts.max(initial=0)),
        "over_bound": int((errors > bound).sum()),
        "error": float(errors.sum()),
        "max_error": float(errors.max(initial=0)),
    }
