"""Cloud Storage: what must be set before it is used, and what it answers where it cannot be."""

import functools
import importlib
import importlib.util
import logging
import os
import sys

from etils import epath

from uld_jax.errors import UserError


def prepare(address: str) -> None:
    """Makes `etils.epath` ready for an address; nothing is asked of the bucket yet.

    Args:
        address: gs://BUCKET/PATH.

    Raises:
        UserError: Another kind of address, or the extra is not installed.

    Example:
        >>> prepare("ftp://host/run")
        Traceback (most recent call last):
        ...
        uld_jax.errors.UserError: ftp://host/run: expected a path of this machine or gs://BUCKET...
    """
    if not address.startswith("gs://"):
        raise UserError(
            f"{address}: expected a path of this machine or gs://BUCKET/PATH; mount other stores "
            "(s3fs, blobfuse) and give the path there"
        )
    if not address.removeprefix("gs://").strip("/"):
        raise UserError(f"{address}: expected gs://BUCKET/PATH, found no bucket in it")
    if importlib.util.find_spec("gcsfs") is None:
        raise UserError(
            f"{address}: reading and writing gs:// needs gcsfs: pip install 'uld-jax[gcs]', or "
            "mount the bucket (gcsfuse) and give the path there"
        )
    _configure()


@functools.cache
def _configure() -> None:
    fsspec = importlib.import_module("fsspec")
    # One backend, whether or not TensorFlow is installed.
    os.environ.setdefault("EPATH_USE_TF", "false")
    # Other processes write too: what was listed a moment ago is no answer.
    fsspec.config.conf.setdefault("gcs", {}).setdefault("use_listings_cache", False)
    # It raises what it logs.
    logging.getLogger("gcsfs").setLevel(logging.CRITICAL)


def check_address(address: str, flag: str) -> None:
    """Asks for an address's bucket, so that what is wrong with it is said before any work.

    Args:
        address: gs://BUCKET/PATH.
        flag: The name of the flag that gave it.

    Raises:
        UserError: As `prepare`; or there is no such bucket, or none that can be asked.

    Example:
        >>> check_address("gs://", "workdir")
        Traceback (most recent call last):
        ...
        uld_jax.errors.UserError: --workdir=gs://: expected gs://BUCKET/PATH, found no bucket in it
    """
    given = f"--{flag}={address}"
    try:
        prepare(address)
    except UserError as error:
        raise UserError(f"--{flag}={error}") from None
    root = epath.Path("/".join(address.split("/")[:3]))
    try:
        # Who may list objects may not always ask for the bucket itself; an empty one lists none.
        if not root.exists():
            next(root.iterdir(), None)
    except FileNotFoundError as error:
        raise UserError(
            f"{given}: there is no bucket {root}: make it (gcloud storage buckets create "
            f"{root}), or name another"
        ) from error
    except (ValueError, *errors()) as error:
        raise UserError(
            f"{given}: the bucket does not answer ({reason(error)}): check the name, the "
            "network and the credentials (gcloud auth application-default login)"
        ) from error


def errors() -> tuple[type[Exception], ...]:
    """What reading or writing a place may raise: OSError, and of a bucket some that are none.

    Returns:
        For an except clause.

    Example:
        >>> OSError in errors()
        True
    """
    found: list[type[Exception]] = [OSError]
    if "gcsfs" in sys.modules:
        # By name: the packages are there only with the extra.
        for module, kind in (
            ("gcsfs.retry", "HttpError"),
            ("aiohttp", "ClientError"),
            ("google.auth.exceptions", "GoogleAuthError"),
        ):
            found.append(getattr(importlib.import_module(module), kind))
    return tuple(found)


def reason(error: BaseException) -> str:
    r"""The first words of an error, on one line.

    Args:
        error: One of `errors`.

    Returns:
        The system's own words where it has some.

    Example:
        >>> reason(OSError("Forbidden: bucket/run\nno access")), reason(OSError(28, "No space"))
        ('Forbidden: bucket/run no access', 'No space')
    """
    text = getattr(error, "strerror", None) or str(error) or type(error).__name__
    return " ".join(text.split())[:300]
