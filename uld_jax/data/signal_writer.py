"""Writes a teacher cache shard by shard, so that a kill at any moment loses one shard's work."""

import json
import lzma
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from array_record.python.array_record_module import ArrayRecordWriter

from uld_jax.data.signal import Signal
from uld_jax.data.signal_codec import decode_signal, encode_signal
from uld_jax.data.signal_store import (
    FORMAT,
    MANIFEST,
    differences,
    read_json,
    sha256_of,
    verify_shard,
)
from uld_jax.errors import UserError
from uld_jax.files import write_json

# What a directory is being filled with; gone once the manifest says it.
SETTINGS = "unfinished.json"
# The texts that the signals are of may lie beside them before there is anything else.
ANSWERS = "answers.json"
# Records are compressed already. A group costs about 12 bytes a record alone and 0.5 in 64; one
# thread writes the same bytes each time.
WRITER_OPTIONS = "group_size:64,uncompressed,max_parallelism:1"
PAGE = 4096


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
        shard_size: Examples of a shard. A shard's file is a multiple of 64 KiB and at least 128
            KiB long; what is padding of it takes no room on file systems with sparse files.

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
        directory: str | Path,
        provenance: Mapping[str, Any],
        *,
        total: int,
        epsilon: float,
        cap: int,
        shard_size: int,
    ) -> None:
        if total < 1 or shard_size < 1:
            raise ValueError(f"expected total and shard_size >= 1, got {total} and {shard_size}")
        self._directory = Path(directory)
        self._settings = {
            "format": FORMAT,
            "provenance": dict(provenance),
            "epsilon": epsilon,
            "cap": cap,
            "total": total,
            "shard_size": shard_size,
        }
        self._shards = -(-total // shard_size)
        self._claim()
        self._forget_damaged()

    def missing_shards(self) -> list[int]:
        """The shards that are still to be written, by this process or others.

        Returns:
            Their numbers, ascending.
        """
        if self._finished:
            return []
        return [shard for shard in range(self._shards) if not self._note(shard).is_file()]

    def examples_of(self, shard: int) -> range:
        """Which examples belong in a shard.

        Args:
            shard: Its number.

        Returns:
            Their indices in the data set.

        Raises:
            ValueError: There is no such shard.
        """
        if not 0 <= shard < self._shards:
            raise ValueError(f"shard: expected 0 to {self._shards - 1}, got {shard}")
        size = self._settings["shard_size"]
        return range(shard * size, min((shard + 1) * size, self._settings["total"]))

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
        if self._finished:
            raise UserError(f"{self._directory}: is finished, expected a cache to be filled")
        epsilon = self._settings["epsilon"]
        encoded = [encode_signal(signal, epsilon=epsilon) for _, signal in records]
        path = self._directory / _name(shard)
        listed = lzma.compress(json.dumps(ids, ensure_ascii=False).encode(), preset=9)
        _write_records(path, [listed, *encoded])
        note = {
            "name": path.name,
            "records": len(records),
            "bytes": path.stat().st_size,
            "sha256": sha256_of(path),
        }
        counted = _count([decode_signal(record) for record in encoded], 1.5 * epsilon)
        sizes = {"record_bytes": sum(map(len, encoded)), "dropped": dropped}
        write_json(self._note(shard), note | {"counted": counted | sizes})

    def finish(self) -> dict[str, Any]:
        """Writes the manifest, which makes the cache whole, and removes what was for resuming.

        Returns:
            The manifest.

        Raises:
            ValueError: Shards are missing.
        """
        if self._finished:
            return read_json(self._directory / MANIFEST)
        missing = self.missing_shards()
        if missing:
            raise ValueError(f"{self._directory}: shards {missing} are missing: write them first")
        notes = [read_json(self._note(shard)) for shard in range(self._shards)]
        counted = [note.pop("counted") for note in notes]
        total = {key: sum(c[key] for c in counted) for key in counted[0]}
        positions = max(total["positions"], 1)
        manifest = self._settings | {
            # Of every position that the cap, or a teacher that tells few, did not cut short.
            "error_bound": 1.5 * self._settings["epsilon"],
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
        write_json(self._directory / MANIFEST, manifest)
        self._tidy()
        return manifest

    @property
    def _finished(self) -> bool:
        return (self._directory / MANIFEST).is_file()

    def _note(self, shard: int) -> Path:
        return self._directory / f"{_name(shard)}.json"

    def _claim(self) -> None:
        """Makes the directory this cache's, or checks that it is."""
        try:
            self._directory.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(
                f"{self._directory}: cannot be made ({error.strerror}): choose another directory"
            ) from error
        settings = self._directory / SETTINGS
        saved = next((p for p in (self._directory / MANIFEST, settings) if p.is_file()), None)
        if saved is None:
            names = (path.name for path in self._directory.iterdir())
            others = sorted(name for name in names if name[0] != "." and name != ANSWERS)
            if others:
                raise UserError(
                    f"{self._directory}: expected an empty directory or a teacher cache, found "
                    f"{', '.join(others[:3])}: choose another directory"
                )
            write_json(settings, self._settings)
            return
        found = read_json(saved)
        flat = [
            {name: value for name, value in s.items() if name in self._settings}
            | {f"provenance.{name}": value for name, value in s.get("provenance", {}).items()}
            for s in (found, self._settings)
        ]
        for record in flat:
            record.pop("provenance", None)
        different = differences(*flat)
        if different:
            raise UserError(
                f"{self._directory}: holds a teacher cache of something else: "
                f"{'; '.join(different)}: choose another directory, or remove this one"
            )
        if self._finished:
            self._tidy()

    def _forget_damaged(self) -> None:
        """Has shards that are not what their notes say written anew.

        A shard without a note is too. It is not removed, nor is a scratch file: they may be
        another process's work in progress, and each is overwritten when its shard is written.
        """
        if self._finished:
            return
        for shard in range(self._shards):
            note = self._note(shard)
            if note.is_file():
                try:
                    verify_shard(self._directory / _name(shard), read_json(note))
                except UserError:
                    note.unlink()

    def _tidy(self) -> None:
        for pattern in (SETTINGS, "signals-*.json", ".signals-*", ".*.json.*"):
            for path in self._directory.glob(pattern):
                path.unlink(missing_ok=True)


def _name(shard: int) -> str:
    return f"signals-{shard:05d}.array_record"


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


def _write_records(path: Path, records: Sequence[bytes]) -> None:
    """An ArrayRecord file in one step."""
    scratch = path.with_name(f".{path.name}")
    writer = ArrayRecordWriter(str(scratch), WRITER_OPTIONS)
    for record in records:
        writer.write(record)
    writer.close()
    whole = scratch.read_bytes()
    # ArrayRecord pads with zeros to 64 KiB twice: pages of them are left out, not written.
    with scratch.open("wb") as file:
        for start in range(0, len(whole), PAGE):
            page = whole[start : start + PAGE]
            if any(page):
                file.seek(start)
                file.write(page)
        file.truncate(len(whole))
        file.flush()
        os.fsync(file.fileno())
    scratch.replace(path)
