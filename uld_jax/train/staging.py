"""Where orbax finds checkpoints: in their own place, or on the local disk beside a store."""

import pathlib
import shutil
import tempfile
from concurrent.futures import ThreadPoolExecutor

from uld_jax.buckets import store_of
from uld_jax.files import AnyPath, cache_folder, copy_file, files_below, remove_tree


def in_orbax(directory: AnyPath) -> bool:
    """Whether orbax reads and writes a place itself.

    Args:
        directory: The place.

    Returns:
        Whether it does; else `Stage` is between.

    Example:
        >>> in_orbax(pathlib.Path("runs"))
        True
    """
    return isinstance(directory, pathlib.Path) or store_of(directory).in_orbax


class Stage:
    """The directory of a run's checkpoints for orbax, which does not know every store.

    Where it does not, a checkpoint is written to the local disk and uploaded whole, its seal last:
    one without is none. What is read is copied to the disk first.

    Args:
        directory: Where the checkpoints are to be.
        keep: How many of the newest stay there; None only reads.
        seal: The file of a checkpoint that says that all others are there.

    Attributes:
        local: What orbax opens: the directory itself, or one on the disk.
        keep: How many of the newest orbax keeps in it.

    Example:
        >>> directory = pathlib.Path(tempfile.mkdtemp())
        >>> Stage(directory, keep=2, seal="SHA256SUMS").local == directory
        True
    """

    def __init__(self, directory: AnyPath, *, keep: int | None, seal: str) -> None:
        self.local, self.keep = directory, keep
        self._target = None if in_orbax(directory) else directory
        self._newest, self._seal = keep, seal
        if self._target is None:
            return
        if keep is None:
            self.local = pathlib.Path(tempfile.mkdtemp())
        else:
            # The same for every start of a run: what a kill leaves is not left for ever.
            self.local, self.keep = cache_folder("staged", str(directory)), 1
            shutil.rmtree(self.local, ignore_errors=True)
            self.local.mkdir(parents=True)

    def steps(self) -> list[int]:
        """The steps of the complete checkpoints that orbax does not see, newest first."""
        if self._target is None or not self._target.is_dir():
            return []
        sealed = [place for place in self._numbered() if (place / self._seal).is_file()]
        return sorted((int(place.name) for place in sealed), reverse=True)

    def fetch(self, step: int) -> AnyPath:
        """Where orbax reads a checkpoint.

        Args:
            step: Its step.

        Returns:
            Its directory in `local`, with all its files.
        """
        path = self.local / str(step)
        if self._target is not None and not path.exists():
            place = self._target / str(step)
            copies = {file: path / str(file.relative_to(place)) for file in files_below(place)}
            with ThreadPoolExecutor(8) as pool:
                # The list, for what a copy may raise.
                list(pool.map(copy_file, copies, copies.values()))
        return path

    def push(self, path: AnyPath, step: int) -> None:
        """Uploads a checkpoint, then removes those that are not to stay.

        Args:
            path: The directory that orbax has written, sealed.
            step: Its step.
        """
        if self._target is None:
            return
        self.remove(step)
        place = self._target / str(step)
        copies = {file: place / str(file.relative_to(path)) for file in files_below(path)}
        seal = path / self._seal
        last = copies.pop(seal)
        with ThreadPoolExecutor(8) as pool:
            list(pool.map(copy_file, copies, copies.values()))
        copy_file(seal, last)
        kept = self.steps()[: self._newest]
        for place in self._numbered():
            if int(place.name) not in kept:  # an older one, or an upload that was cut off
                remove_tree(place)

    def remove(self, step: int) -> None:
        """Removes what a store has of a checkpoint.

        Args:
            step: Its step.
        """
        if self._target is not None and (place := self._target / str(step)).exists():
            remove_tree(place)

    def close(self) -> None:
        """Removes the copies on the disk."""
        if self._target is not None:
            shutil.rmtree(self.local, ignore_errors=True)

    def _numbered(self) -> list[AnyPath]:
        assert self._target is not None
        return [place for place in self._target.iterdir() if place.name.isdigit()]
