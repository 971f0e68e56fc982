"""Object stores: what must be set before one is used, and what it answers where it cannot be."""

import dataclasses
import functools
import importlib
import importlib.util
import logging
import os
import sys

from etils import epath

from uld_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class Store:
    """One kind of object store, which `etils.epath` reaches through a package of fsspec's.

    Attributes:
        package: That package.
        extra: Ours that installs it.
        options: Its name in fsspec's configuration.
        errors: (module, name) of what it raises besides OSError.
        mount: A program that shows a bucket as a directory.
        make: The command that makes a bucket.
        access: Where credentials come from.
        in_orbax: Whether orbax writes checkpoints there itself.
    """

    package: str
    extra: str
    options: str
    errors: tuple[tuple[str, str], ...]
    mount: str
    make: str
    access: str
    in_orbax: bool


# By the scheme of their addresses.
STORES = {
    "gs": Store(
        package="gcsfs",
        extra="gcs",
        options="gcs",
        errors=(
            ("gcsfs.retry", "HttpError"),
            ("aiohttp", "ClientError"),
            ("google.auth.exceptions", "GoogleAuthError"),
        ),
        mount="gcsfuse",
        make="gcloud storage buckets create",
        access="gcloud auth application-default login",
        in_orbax=True,
    ),
    "s3": Store(
        package="s3fs",
        extra="s3",
        options="s3",
        errors=(("botocore.exceptions", "BotoCoreError"), ("aiohttp", "ClientError")),
        mount="mount-s3",
        make="aws s3 mb",
        access="AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or aws configure; AWS_ENDPOINT_URL "
        "of a server that is not Amazon's",
        in_orbax=False,
    ),
}
_ADDRESSES = " or ".join(f"{scheme}://BUCKET/PATH" for scheme in STORES)


def store_of(address: str | os.PathLike[str]) -> Store:
    """The store that an address is of.

    Args:
        address: SCHEME://BUCKET/PATH.

    Returns:
        The store.

    Raises:
        UserError: None of `STORES`.

    Example:
        >>> store_of("s3://bucket/run").package
        's3fs'
    """
    text = os.fspath(address)
    store = STORES.get(text.partition("://")[0])
    if store is None:
        raise UserError(
            f"{text}: expected a path of this machine or {_ADDRESSES}; mount other stores "
            "(rclone, blobfuse) and give the path there"
        )
    return store


def prepare(address: str) -> None:
    """Makes `etils.epath` ready for an address; nothing is asked of the bucket yet.

    Args:
        address: SCHEME://BUCKET/PATH.

    Raises:
        UserError: Another kind of address, or the extra is not installed.

    Example:
        >>> prepare("ftp://host/run")
        Traceback (most recent call last):
        ...
        uld_jax.errors.UserError: ftp://host/run: expected a path of this machine or gs://BUCKET...
    """
    store = store_of(address)
    scheme, _, rest = address.partition("://")
    if not rest.strip("/"):
        raise UserError(f"{address}: expected {scheme}://BUCKET/PATH, found no bucket in it")
    if importlib.util.find_spec(store.package) is None:
        raise UserError(
            f"{address}: reading and writing {scheme}:// needs {store.package}: pip install "
            f"'uld-jax[{store.extra}]', or mount the bucket ({store.mount}) and give the path there"
        )
    _configure(store)


@functools.cache
def _configure(store: Store) -> None:
    fsspec = importlib.import_module("fsspec")
    # One backend, whether or not TensorFlow is installed.
    os.environ.setdefault("EPATH_USE_TF", "false")
    # Other processes write too: what was listed a moment ago is no answer.
    fsspec.config.conf.setdefault(store.options, {}).setdefault("use_listings_cache", False)
    # It raises what it logs.
    logging.getLogger(store.package).setLevel(logging.CRITICAL)


def check_address(address: str, flag: str) -> None:
    """Asks for an address's bucket, so that what is wrong with it is said before any work.

    Args:
        address: SCHEME://BUCKET/PATH.
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
    store, root = store_of(address), epath.Path("/".join(address.split("/")[:3]))
    try:
        # Who may list objects may not always ask for the bucket itself; an empty one lists none.
        if not root.exists():
            next(root.iterdir(), None)
    except FileNotFoundError as error:
        raise UserError(
            f"{given}: there is no bucket {root}: make it ({store.make} {root}), or name another"
        ) from error
    except (ValueError, *errors()) as error:
        raise UserError(
            f"{given}: the bucket does not answer ({reason(error)}): check the name, the "
            f"network and the credentials ({store.access})"
        ) from error


def errors() -> tuple[type[Exception], ...]:
    """What reading or writing a place may raise: OSError, and of a bucket some that are none.

    Returns:
        For an except clause.

    Example:
        >>> OSError in errors()
        True
    """
    # By name: the packages are there only with the extras.
    return OSError, *(
        getattr(importlib.import_module(module), kind)
        for store in STORES.values()
        if sys.modules.get(store.package)
        for module, kind in store.errors
    )


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
