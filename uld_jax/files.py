"""Files that are whole or absent, never half-written: on this machine's disks or in a bucket.

A place is a `pathlib.Path` or, for an address such as gs://bucket/run, an `etils.epath.Path`, which
orbax takes too. Both are read alike. What differs is how a whole thing appears, and only this
module knows it: a file is written beside its place, synced and renamed; an object appears when its
upload ends, and is neither renamed nor appended to. What a library can write to a disk only
(ArrayRecord, safetensors, TensorBoard's events, jax.profiler, plots) is staged in a local temporary
directory and uploaded whole.
"""

import contextlib
import hashlib
import json
import os
import pathlib
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from typing import Any, TypeAlias

from etils import epath

from uld_jax.buckets import prepare
from uld_jax.errors import UserError

AnyPath: TypeAlias = pathlib.Path | epath.Path

# In a bucket, while a directory is being uploaded.
UNFINISHED = ".unfinished"


def locate(address: str | os.PathLike[str]) -> AnyPath:
    """The place that an address or a path names; nothing is asked of it yet.

    Args:
        address: A path of this machine, gs://BUCKET/PATH or s3://BUCKET/PATH.

    Returns:
        The place.

    Raises:
        UserError: Another kind of address, or the package for it is not installed.

    Example:
        >>> locate("runs/first").name
        'first'
        >>> locate("ftp://host/run")
        Traceback (most recent call last):
        ...
        uld_jax.errors.UserError: ftp://host/run: expected a path of this machine or gs://BUCKET...
    """
    text = os.fspath(address)
    if "://" not in text:
        return pathlib.Path(text)
    prepare(text)
    return epath.Path(text)


def absolute(path: AnyPath) -> AnyPath:
    """The whole path from the root; an address is one already, which epath forgets.

    Args:
        path: A place.

    Returns:
        The same place.

    Example:
        >>> absolute(pathlib.Path("runs")).is_absolute()
        True
    """
    return path.absolute() if isinstance(path, pathlib.Path) else path


def write_text(path: AnyPath, text: str) -> None:
    """Writes a text file in one step: a reader, or a run after a kill, sees all of it or none.

    Args:
        path: Where; its directory exists.
        text: What.

    Example:
        >>> path = pathlib.Path(tempfile.mkdtemp()) / "note.txt"
        >>> write_text(path, "whole")
        >>> path.read_text()
        'whole'
    """
    if not isinstance(path, pathlib.Path):
        path.write_text(text)
        return
    scratch = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with scratch.open("w") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        scratch.replace(path)
    finally:
        scratch.unlink(missing_ok=True)


def write_json(path: AnyPath, value: Any) -> None:
    """Writes a value as JSON in one step.

    Args:
        path: Where; its directory exists.
        value: What json can hold.

    Example:
        >>> path = pathlib.Path(tempfile.mkdtemp()) / "scores.json"
        >>> write_json(path, {"f1": 50.0})
        >>> json.loads(path.read_text())
        {'f1': 50.0}
    """
    write_text(path, json.dumps(value, indent=1, ensure_ascii=False) + "\n")


def sha256_of(path: AnyPath) -> str:
    """The checksum of a file.

    Args:
        path: Of the file.

    Returns:
        SHA-256 in hexadecimal digits.

    Example:
        >>> path = pathlib.Path(tempfile.mkdtemp()) / "empty"
        >>> path.touch()
        >>> sha256_of(path)[:8]
        'e3b0c442'
    """
    with path.open("rb") as file:
        # Both kinds of file are read in binary; pyright knows that of one.
        return hashlib.file_digest(file, "sha256").hexdigest()  # pyright: ignore[reportArgumentType]


def files_below(directory: AnyPath) -> list[AnyPath]:
    """Every file in a directory and those below it.

    Args:
        directory: Where.

    Returns:
        Their places, sorted by the names on the way to them.

    Example:
        >>> folder = pathlib.Path(tempfile.mkdtemp())
        >>> (folder / "a").mkdir()
        >>> for name in ("b", "a/c"):
        ...     write_text(folder / name, "")
        >>> [path.name for path in files_below(folder)]
        ['c', 'b']
    """
    found: list[AnyPath] = []
    for path in sorted(directory.iterdir(), key=lambda path: path.name):
        found += files_below(path) if path.is_dir() else [path]
    return found


def make_directory(path: AnyPath) -> None:
    """Makes a directory and its parents; a bucket has none, only names with slashes.

    Args:
        path: Where.

    Example:
        >>> place = pathlib.Path(tempfile.mkdtemp()) / "a" / "b"
        >>> make_directory(place)
        >>> place.is_dir()
        True
    """
    if isinstance(path, pathlib.Path):
        path.mkdir(parents=True, exist_ok=True)


def remove_tree(path: AnyPath) -> None:
    """Removes a directory with all that is in it.

    Args:
        path: Of the directory.

    Example:
        >>> place = pathlib.Path(tempfile.mkdtemp())
        >>> remove_tree(place)
        >>> place.exists()
        False
    """
    if isinstance(path, pathlib.Path):
        shutil.rmtree(path)
    else:
        path.rmtree()


def copy_file(path: AnyPath, copy: AnyPath) -> None:
    """Copies a file to a bucket, where it appears when all of it is there, or to the disk.

    Args:
        path: The file.
        copy: Its place; directories on the way to it are made.
    """
    make_directory(copy.parent)
    with path.open("rb") as source, copy.open("wb") as target:
        shutil.copyfileobj(source, target)  # pyright: ignore[reportArgumentType]


def cache_folder(kind: str, key: str) -> pathlib.Path:
    """A directory of this machine for copies of what lies elsewhere.

    Args:
        kind: What they are.
        key: Of which.

    Returns:
        One in $ULD_JAX_CACHE/KIND, else ~/.cache/uld_jax/KIND; it may not be there yet.

    Example:
        >>> cache_folder("fetched", "gs://bucket/cache").parent.name
        'fetched'
    """
    root = os.environ.get("ULD_JAX_CACHE") or pathlib.Path.home() / ".cache" / "uld_jax"
    return pathlib.Path(root) / kind / hashlib.sha256(key.encode()).hexdigest()[:16]


@contextlib.contextmanager
def staged(path: AnyPath) -> Iterator[pathlib.Path]:
    """For a library that writes one local file: it appears in its place when all is written.

    Args:
        path: Its place.

    Yields:
        The file to write: beside its place, or in a temporary directory and uploaded from there.

    Example:
        >>> path = pathlib.Path(tempfile.mkdtemp()) / "plot.png"
        >>> with staged(path) as scratch:
        ...     _ = scratch.write_bytes(b"png")
        >>> path.read_bytes()
        b'png'
    """
    if isinstance(path, pathlib.Path):
        scratch = path.with_name(f".{path.name}")
        try:
            yield scratch
            scratch.replace(path)
        finally:
            scratch.unlink(missing_ok=True)
        return
    with tempfile.TemporaryDirectory() as directory:
        scratch = pathlib.Path(directory) / path.name
        yield scratch
        copy_file(scratch, path)


@contextlib.contextmanager
def staged_directory(path: AnyPath) -> Iterator[pathlib.Path]:
    """For a library that writes several local files: their directory appears complete.

    In a bucket one after the other appears; until the last is there `is_complete` is false.

    Args:
        path: The directory's place; its parents are made.

    Yields:
        The directory to write into, as in `staged`.

    Example:
        >>> path = pathlib.Path(tempfile.mkdtemp()) / "student"
        >>> with staged_directory(path) as scratch:
        ...     _ = (scratch / "config.json").write_text("{}")
        >>> [file.name for file in path.iterdir()]
        ['config.json']
    """
    make_directory(path.parent)
    beside = path.parent if isinstance(path, pathlib.Path) else None
    scratch = pathlib.Path(tempfile.mkdtemp(prefix=f".{path.name}-", dir=beside))
    try:
        yield scratch
        if isinstance(path, pathlib.Path):
            scratch.chmod(0o755)
            scratch.replace(path)
        else:
            write_text(path / UNFINISHED, "")
            for file in files_below(scratch):
                copy_file(file, path / str(file.relative_to(scratch)))
            (path / UNFINISHED).unlink()
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def is_complete(directory: AnyPath) -> bool:
    """Whether a directory that `staged_directory` writes is there, with all its files.

    Args:
        directory: Its place.

    Returns:
        Whether it is.

    Example:
        >>> is_complete(pathlib.Path("/nowhere"))
        False
    """
    return directory.is_dir() and not (directory / UNFINISHED).exists()


def is_free(directory: AnyPath) -> bool:
    """Whether a place holds nothing that `staged_directory` would lose.

    Args:
        directory: The place.

    Returns:
        True where nothing is, or an empty directory, or an upload that was cut off.

    Example:
        >>> is_free(pathlib.Path(tempfile.mkdtemp()))
        True
    """
    if not directory.exists():
        return True
    return directory.is_dir() and (
        (directory / UNFINISHED).exists() or not any(directory.iterdir())
    )


def is_intact(path: AnyPath, size: int, sha256: str) -> bool:
    """Whether a file that was written in one step is still what was written.

    A bucket keeps a checksum of each object itself: there the size tells one from another.

    Args:
        path: Of the file.
        size: Bytes that it had.
        sha256: Its checksum.

    Returns:
        Whether it is.

    Example:
        >>> is_intact(pathlib.Path("/nowhere"), 0, "e3b0c442")
        False
    """
    if not path.is_file():
        return False
    if isinstance(path, pathlib.Path):
        return path.stat().st_size == size and sha256_of(path) == sha256
    return path.stat().length == size


def fetched(directory: AnyPath, digests: Mapping[str, str]) -> pathlib.Path:
    """Files of a directory, for a library that reads local ones.

    Args:
        directory: Where they are.
        digests: SHA-256 by name; an empty one is not compared.

    Returns:
        The directory itself, or one in $ULD_JAX_CACHE/fetched (else ~/.cache/uld_jax/fetched) with
        copies of a bucket's, which stay there for the next run.

    Raises:
        UserError: A file is missing, or is not what its checksum says.

    Example:
        >>> fetched(pathlib.Path("here"), {}).name
        'here'
    """
    if isinstance(directory, pathlib.Path):
        return directory
    key = json.dumps([os.fspath(directory), sorted(digests.items())])
    target = cache_folder("fetched", key)
    target.mkdir(parents=True, exist_ok=True)
    for name, digest in digests.items():
        if (target / name).is_file():
            continue
        path = directory / name
        if not path.is_file():
            raise UserError(f"{path}: no such file, expected one of {len(digests)}: make it again")
        scratch = target / f".{name}.{os.getpid()}"
        try:
            copy_file(path, scratch)
            found = sha256_of(scratch)
            if digest and found != digest:
                raise UserError(f"{path}: has sha256 {found}, expected {digest}: make it again")
            scratch.replace(target / name)
        finally:
            scratch.unlink(missing_ok=True)
    return target
