"""Opening: where a store's catalog and blobs are, in a directory or by URLs. Makes both; knows nothing of what they hold.

catalog   root/catalog.sqlite3    or postgresql://USER:PASSWORD@HOST/DATABASE
blobs     root/blobs              or s3://BUCKET/PREFIX, reached as the AWS_* variables say, with copies in root/cache
"""

from __future__ import annotations

import os
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from . import disk
from .blobs import Blobs, FileBlobs
from .catalog import Catalog, Clock
from .database import file_url, postgresql_url
from .errors import Invalid, Unavailable, disk_errors
from .exclusion import Exclusion

if TYPE_CHECKING:
    from obstore.store import S3Store

CACHE_BYTES = 4 << 30  # of local copies of an object store's blobs

_RETRIES = 3
_RETRY_SECONDS = 20


def open_parts(
    root: Path, catalog_url: str | None, blobs_url: str | None, cache_bytes: int, clock: Clock
) -> tuple[Blobs, Catalog]:
    """Raises: Invalid for a URL; Conflict when newer code wrote the catalog; Corrupt; Unavailable."""
    catalog = open_catalog(root, catalog_url, clock)
    try:
        return _blobs(root, blobs_url, cache_bytes, catalog.exclusion), catalog
    except BaseException:
        catalog.close()
        raise


def open_catalog(root: Path, url: str | None, clock: Clock) -> Catalog:
    """In directory `root`, which is made if need be, unless there is a URL. Raises: as `open_parts`."""
    with disk_errors():
        root.mkdir(mode=0o700, parents=True, exist_ok=True)
    if url is not None:
        return Catalog(postgresql_url(url), clock)
    with disk_errors(), disk.locked(root):  # one process at a time creates the tables and switches the database to WAL
        return Catalog(file_url(root / "catalog.sqlite3"), clock)


def _blobs(root: Path, url: str | None, cache_bytes: int, exclusion: Exclusion | None) -> Blobs:
    """Who keeps blobs in files loads no object store's client."""
    if url is None:
        return FileBlobs(root, exclusion)
    from .object_blobs import ObjectBlobs, check_access

    bucket = s3_bucket(url)
    check_access(bucket)
    return ObjectBlobs(bucket, root, cache_bytes, exclusion)


def s3_bucket(url: str) -> S3Store:
    """Credentials, region and endpoint are AWS_* variables'. Raises: Invalid; Unavailable for variables that make no sense."""
    from obstore.exceptions import BaseError
    from obstore.store import S3Store

    parts = urlsplit(url)
    if parts.scheme != "s3" or not parts.hostname or parts.netloc != parts.hostname or parts.query or parts.fragment:
        raise Invalid("blobs_url", "must be s3://BUCKET or s3://BUCKET/PREFIX", f"{parts.scheme or 'something'}://...")
    endpoint = _endpoint()
    try:
        return S3Store(
            parts.hostname,
            prefix=parts.path.strip("/") or None,
            client_options={
                "allow_http": endpoint.startswith("http://"),
                "connect_timeout": timedelta(seconds=5),
                "read_timeout": timedelta(seconds=30),
                "timeout": timedelta(seconds=300),
            },
            retry_config={
                "max_retries": _RETRIES,
                "retry_timeout": timedelta(seconds=_RETRY_SECONDS),
                "backoff": {
                    "init_backoff": timedelta(milliseconds=100),
                    "max_backoff": timedelta(seconds=2),
                    "base": 2,
                },
            },
        )
    except (BaseError, ValueError) as error:
        raise Unavailable(
            f"the store's object storage cannot be reached as the AWS_* variables say: {type(error).__name__}"
        ) from error


def _endpoint() -> str:
    """Where S3 is, if not at AWS. The client panics at what is no URL. Raises: Invalid."""
    for name in ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL", "AWS_ENDPOINT"):
        if url := os.environ.get(name):
            parts = urlsplit(url)
            if parts.scheme not in ("http", "https") or not parts.hostname or parts.username or parts.password:
                raise Invalid(name, "must be http://HOST:PORT or https://HOST:PORT", "something else")
            return url
    return ""
