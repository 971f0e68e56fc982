"""A directory of ArrayRecord shards, their checksums and one manifest.

The manifest is written last: without it the directory is unfinished. Until then each shard has a
note beside it, written after it, so that a kill at any moment loses one shard's work.
"""

import dataclasses
import json
import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from array_record.python.array_record_module import ArrayRecordWriter

from uld_jax.errors import UserError
from uld_jax.files import AnyPath, is_intact, locate, make_directory, sha256_of, staged, write_json

MANIFEST = "manifest.json"
# What a directory is being filled with; gone once the manifest says it.
SETTINGS = "unfinished.json"
PAGE = 4096


@dataclasses.dataclass(frozen=True)
class Kind:
    """What a directory of shards holds.

    Args:
        what: For people.
        command: Which makes one.
        format: Number of the format; a manifest of another is refused.
        stem: How the names of its shards begin.
        suffix: How they end, with {shard} and {shards} to be filled in.
        options: Of ArrayRecordWriter. One thread writes the same bytes each time.
        fields: What its manifest must have.
        beside: Names of files that may lie there before it is begun.

    Example:
        >>> kind = Kind("cache", "uld-jax cache", 1, "signals", "-{shard:05d}.array_record", "")
        >>> kind.name(3, 10), kind.mend
        ('signals-00003.array_record', 'run `uld-jax cache` again')
    """

    what: str
    command: str
    format: int
    stem: str
    suffix: str
    options: str
    fields: tuple[str, ...] = ()
    beside: tuple[str, ...] = ()

    def name(self, shard: int, shards: int) -> str:
        """The name of a shard's file."""
        return self.stem + self.suffix.format(shard=shard, shards=shards)

    @property
    def mend(self) -> str:
        """The end of an error line."""
        return f"run `{self.command}` again"


class ShardWriter:
    """Fills a directory with shards, of examples in a fixed order, `shard_size` a shard.

    Shards are written in any order and by any number of processes, each its own; one of them
    finishes. A writer on a directory that another left unfinished continues it.

    Args:
        directory: Made if need be.
        kind: What it is to hold.
        settings: What its contents follow from, as JSON values, which the manifest begins with:
            "total" examples, "shard_size", a flat "provenance", ….

    Raises:
        UserError: The directory holds something else, each differing field named.

    Example:
        >>> import tempfile
        >>> kind = Kind("toy", "make toy", 1, "toy", "-{shard}-of-{shards}", "group_size:1")
        >>> settings = {"provenance": {"model": "m"}, "total": 5, "shard_size": 2}
        >>> writer = ShardWriter(tempfile.mkdtemp(), kind, settings)
        >>> writer.write(1, [b"2", b"3"], {"records": 2})
        >>> writer.missing_shards(), list(writer.examples_of(2))
        ([0, 2], [4])
    """

    def __init__(
        self, directory: str | os.PathLike[str], kind: Kind, settings: Mapping[str, Any]
    ) -> None:
        total, shard_size = settings["total"], settings["shard_size"]
        if total < 1 or shard_size < 1:
            raise ValueError(f"expected total and shard_size >= 1, got {total} and {shard_size}")
        self.directory = locate(directory)
        self.settings = {"format": kind.format, **settings}
        self._kind = kind
        self._shards = -(-total // shard_size)
        self._claim()
        self._forget_damaged()

    @property
    def finished(self) -> bool:
        """Whether the manifest is there."""
        return (self.directory / MANIFEST).is_file()

    def missing_shards(self) -> list[int]:
        """The shards that are still to be written, by this process or others, ascending."""
        if self.finished:
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
        size = self.settings["shard_size"]
        return range(shard * size, min((shard + 1) * size, self.settings["total"]))

    def write(self, shard: int, records: Sequence[bytes], note: Mapping[str, Any]) -> None:
        """Writes one shard in one step; a reader, or a writer after a kill, sees all or none.

        Args:
            shard: Its number.
            records: What it holds.
            note: What the end is to know of it, as JSON values.

        Raises:
            UserError: The directory is finished already.
        """
        if self.finished:
            what = self._kind.what
            raise UserError(f"{self.directory}: is finished, expected a {what} to be filled")
        name = self._name(shard)
        sizes = write_records(self.directory / name, records, self._kind.options)
        write_json(self._note(shard), {"name": name, **sizes, **note})

    def notes(self) -> list[dict[str, Any]]:
        """What was noted of every shard: its name, bytes, sha256, and what its writer added.

        Raises:
            ValueError: Shards are missing.
        """
        if missing := self.missing_shards():
            raise ValueError(f"{self.directory}: shards {missing} are missing: write them first")
        return [read_json(self._note(shard), self._kind) for shard in range(self._shards)]

    def manifest(self) -> dict[str, Any]:
        """The manifest of a finished directory."""
        return read_json(self.directory / MANIFEST, self._kind)

    def finish(self, summary: Mapping[str, Any]) -> dict[str, Any]:
        """Writes the manifest, which makes the directory whole, and removes the notes.

        Args:
            summary: What follows the settings in it; "shards" among them.

        Returns:
            The manifest.
        """
        manifest = {**self.settings, **summary}
        write_json(self.directory / MANIFEST, manifest)
        self._tidy()
        return manifest

    def _name(self, shard: int) -> str:
        return self._kind.name(shard, self._shards)

    def _note(self, shard: int) -> AnyPath:
        return self.directory / f"{self._name(shard)}.json"

    def _claim(self) -> None:
        """Makes the directory this one's, or checks that it is."""
        try:
            make_directory(self.directory)
        except OSError as error:
            raise UserError(
                f"{self.directory}: cannot be made ({error.strerror}): choose another directory"
            ) from error
        settings = self.directory / SETTINGS
        saved = next((p for p in (self.directory / MANIFEST, settings) if p.is_file()), None)
        if saved is None:
            # A bucket has no empty directory.
            there = self.directory.iterdir() if self.directory.is_dir() else ()
            names = {path.name for path in there} - {*self._kind.beside}
            others = sorted(name for name in names if name[0] != ".")
            if others:
                raise UserError(
                    f"{self.directory}: expected an empty directory or a {self._kind.what}, found "
                    f"{', '.join(others[:3])}: choose another directory"
                )
            write_json(settings, self.settings)
            return
        found = read_json(saved, self._kind)
        flat = [
            {name: value for name, value in s.items() if name in self.settings}
            | {f"provenance.{name}": value for name, value in s.get("provenance", {}).items()}
            for s in (found, self.settings)
        ]
        for record in flat:
            record.pop("provenance", None)
        different = differences(*flat)
        if different:
            raise UserError(
                f"{self.directory}: holds a {self._kind.what} of something else: "
                f"{'; '.join(different)}: choose another directory, or remove this one"
            )
        if self.finished:
            self._tidy()

    def _forget_damaged(self) -> None:
        """Has shards that are not what their notes say written anew.

        A shard without a note is too. It is not removed, nor is a scratch file: they may be
        another process's work in progress, and each is overwritten when its shard is written.
        """
        if self.finished:
            return
        for shard in range(self._shards):
            path, note = self.directory / self._name(shard), self._note(shard)
            if note.is_file():
                noted = read_json(note, self._kind)
                if not is_intact(path, noted["bytes"], noted["sha256"]):
                    note.unlink(missing_ok=True)  # another process may find it at the same time

    def _tidy(self) -> None:
        for pattern in (
            SETTINGS,
            f"{self._kind.stem}-*.json",
            f".{self._kind.stem}-*",
            ".*.json.*",
        ):
            for path in self.directory.glob(pattern):
                path.unlink(missing_ok=True)


def write_records(path: AnyPath, records: Sequence[bytes], options: str) -> dict[str, Any]:
    """Writes an ArrayRecord file in one step.

    A file is a multiple of 64 KiB and at least 128 KiB long; what is padding of it takes no room
    on file systems with sparse files.

    Args:
        path: Where.
        records: What.
        options: Of ArrayRecordWriter.

    Returns:
        Its "bytes" and "sha256".

    Raises:
        UserError: The disk is full, or will not be written to.
    """
    with staged(path) as scratch:
        try:
            writer = ArrayRecordWriter(str(scratch), options)
            for record in records:
                writer.write(record)
            writer.close()
        except RuntimeError as error:  # which says, after the name of the call, what the system did
            reason = str(error).partition("failed: ")[2].partition(";")[0] or str(error)
            raise UserError(
                f"{path}: a shard could not be written ({reason}); make room there, or choose "
                "another directory, and run the command again: it goes on from the last whole shard"
            ) from error
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
        return {"bytes": len(whole), "sha256": sha256_of(scratch)}


def differences(found: Mapping[str, Any], expected: Mapping[str, Any]) -> list[str]:
    """The fields in which two flat records differ, for people.

    Args:
        found: What the directory says.
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


def verify_shard(path: pathlib.Path, shard: Mapping[str, Any], kind: Kind) -> None:
    """Compares a shard with what was noted when it was written.

    Args:
        path: Of the shard.
        shard: Its "bytes" and "sha256".
        kind: What its directory holds.

    Raises:
        UserError: It is absent, cut short or changed.
    """
    anew = f"remove the directory and {kind.mend}"
    if not path.is_file():
        raise UserError(f"{path}: no such file, expected a shard of the {kind.what}: {anew}")
    size = path.stat().st_size
    if size != shard["bytes"]:
        raise UserError(f"{path}: has {size} bytes, expected {shard['bytes']}: {anew}")
    digest = sha256_of(path)
    if digest != shard["sha256"]:
        raise UserError(f"{path}: has sha256 {digest}, expected {shard['sha256']}: {anew}")


def read_json(path: AnyPath, kind: Kind) -> dict[str, Any]:
    """A JSON object from a file of the directory.

    Args:
        path: Of the file.
        kind: What the directory holds.

    Returns:
        The object.

    Raises:
        UserError: It is none.
    """
    try:
        value = json.loads(path.read_text("utf-8"))
    except ValueError as error:
        raise UserError(
            f"{path}: not JSON ({error}): remove the directory and {kind.mend}"
        ) from error
    if not isinstance(value, dict):
        raise UserError(
            f"{path}: expected a JSON object, got {type(value).__name__}: remove the directory "
            f"and {kind.mend}"
        )
    return value


def read_manifest(directory: AnyPath, kind: Kind) -> dict[str, Any]:
    """The manifest of a finished directory.

    Args:
        directory: Where.
        kind: What it should hold.

    Returns:
        The manifest; its shards are yet to be verified.

    Raises:
        UserError: There is none, or it is of another format.
    """
    path = directory / MANIFEST
    if not directory.is_dir():
        raise UserError(f"{directory}: no such directory, expected a {kind.what}: {kind.mend}")
    if not path.is_file():
        shards = len([p for p in directory.glob(f"{kind.stem}-*") if p.suffix != ".json"])
        raise UserError(
            f"{path}: no such file, expected a finished {kind.what}, found {shards} shards of "
            f"an unfinished one: {kind.mend}, which continues it"
        )
    manifest = read_json(path, kind)
    if manifest.get("format") != kind.format:
        raise UserError(
            f"{path}: format is {manifest.get('format')!r}, expected {kind.format}: {kind.mend} "
            "into another directory"
        )
    missing = {"provenance", "shards", *kind.fields} - manifest.keys()
    if missing:
        raise UserError(f"{path}: {sorted(missing)} missing: remove the directory and {kind.mend}")
    return manifest
