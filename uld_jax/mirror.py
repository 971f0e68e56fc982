"""Files that grow, such as logs, on a disk or in a bucket, where nothing can be appended to."""

import os
import pathlib
import shutil
import tempfile
import time

from uld_jax.files import AnyPath, copy_file, files_below

# Seconds between uploads of a file that grows. Cloud Storage takes one a second of an object.
PUSH_EVERY = 10
# Most of the time that they may take, for a file that has grown large.
PUSH_SHARE = 0.05


class Mirror:
    """A local directory for files that grow, such as logs: the directory itself, or a bucket's.

    An object cannot be appended to, so those of a bucket are uploaded whole: when the writer says
    so, and between at most every `PUSH_EVERY` seconds and for `PUSH_SHARE` of the time.

    Args:
        directory: Where the files are to be.

    Attributes:
        local: Where to write them.

    Example:
        >>> folder = pathlib.Path(tempfile.mkdtemp())
        >>> with Mirror(folder) as mirror:
        ...     mirror.local == folder
        True
    """

    def __init__(self, directory: AnyPath) -> None:
        self._target = None if isinstance(directory, pathlib.Path) else directory
        # Removed by close(), whatever happens before.
        self.local = (
            directory if isinstance(directory, pathlib.Path) else pathlib.Path(tempfile.mkdtemp())
        )
        self._pushed: dict[AnyPath, tuple[int, int]] = {}
        self._due = time.monotonic() + PUSH_EVERY

    def __enter__(self) -> "Mirror":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def pull(self, name: str) -> None:
        """Makes a file that an earlier run left be there.

        Args:
            name: Of the file.
        """
        if self._target is not None and (self._target / name).is_file():
            (self.local / name).write_bytes((self._target / name).read_bytes())

    def push(self) -> None:
        """Uploads what has changed."""
        if self._target is None:
            return
        began = time.monotonic()
        for path in files_below(self.local):
            status = os.stat(path)
            version = status.st_mtime_ns, status.st_size
            if self._pushed.get(path) != version:
                copy_file(path, self._target / str(path.relative_to(self.local)))
                self._pushed[path] = version
        ended = time.monotonic()
        self._due = ended + max(PUSH_EVERY, (ended - began) / PUSH_SHARE)

    def forget(self) -> None:
        """Removes the local files of a bucket's, so that none is uploaded any more."""
        if self._target is not None:
            shutil.rmtree(self.local)
            self.local.mkdir()

    def push_when_due(self) -> None:
        """The same, where it is time."""
        if time.monotonic() >= self._due:
            self.push()

    def close(self) -> None:
        """Uploads what is left; no more is written."""
        try:
            self.push()
        finally:
            if self._target is not None:
                shutil.rmtree(self.local, ignore_errors=True)
