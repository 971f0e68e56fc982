"""Servers of object stores, each in a process of its own, and what leads clients to them."""

import contextlib
import dataclasses
import http.server
import importlib.util
import json
import os
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable
from pathlib import Path

import fsspec
import pytest
from etils.epath import backend

REPOSITORY = Path(__file__).resolve().parents[1]


def _gcs_environment(port):
    """What leads gcsfs, google-cloud-storage and tensorstore to a server without credentials."""
    return {
        "STORAGE_EMULATOR_HOST": f"http://localhost:{port}",
        "TENSORSTORE_GCS_HTTP_URL": f"http://localhost:{port}",
        "GCE_METADATA_ROOT": "localhost:1",
        "NO_GCE_CHECK": "true",
        "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false",
        "FSSPEC_GCS_TOKEN": "anon",
    }


def _s3_environment(port):
    """What leads botocore to a server that takes any credentials."""
    return {
        "AWS_ENDPOINT_URL": f"http://localhost:{port}",
        "AWS_ACCESS_KEY_ID": "anyone",
        "AWS_SECRET_ACCESS_KEY": "anything",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_EC2_METADATA_DISABLED": "true",
        "AWS_CONFIG_FILE": os.devnull,
        "AWS_SHARED_CREDENTIALS_FILE": os.devnull,
    }


class RefusingGcs(http.server.BaseHTTPRequestHandler):
    """What Cloud Storage says to one without the right to anything, or only to read."""

    readable = False

    def do_GET(self):
        if self.readable and "/o" not in self.path:
            return self._answer(200, {"name": "bucket", "kind": "storage#bucket"})
        if self.readable:
            return self._answer(200 if "/o?" in self.path else 404, {"kind": "storage#objects"})
        return self.do_POST()

    def do_POST(self):
        self._answer(403, {"error": {"code": 403, "message": "caller has no right to objects"}})

    def _answer(self, status, value):
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.end_headers()
        self.wfile.write(json.dumps(value).encode())

    def log_message(self, *_):
        pass


class RefusingS3(http.server.BaseHTTPRequestHandler):
    """The same of S3."""

    protocol_version = "HTTP/1.1"  # a client waits to be told to send what it writes
    readable = False

    def do_HEAD(self):
        # Of a bucket, or of an object.
        status = 404 if self.path.count("/") > 1 else 200
        self._answer(status if self.readable else 403, "")

    def do_GET(self):
        if not self.readable:
            return self.do_PUT()
        return self._answer(200, "<ListBucketResult><KeyCount>0</KeyCount></ListBucketResult>")

    def do_PUT(self):
        message = "<Code>AccessDenied</Code><Message>caller has no right to objects</Message>"
        self._answer(403, f"<Error>{message}</Error>")

    def _answer(self, status, text):
        self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self.send_response(status)
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text.encode())

    def log_message(self, *_):
        pass


@dataclasses.dataclass(frozen=True)
class Server:
    """One kind of store: the scheme of its addresses and the server that stands for it."""

    scheme: str
    packages: tuple[str, ...]
    command: tuple[object, ...]  # the port is its last word
    environment: Callable[[int], dict[str, str]]
    options: dict[str, str]  # of fsspec's file system
    refuses: type[http.server.BaseHTTPRequestHandler]

    @property
    def bucket(self):
        return f"{self.scheme}://bucket"

    def absent(self):
        """The packages that are not installed."""
        return [name for name in self.packages if importlib.util.find_spec(name) is None]

    def skip_if_absent(self):
        if self.absent():
            pytest.skip(f"{', '.join(self.absent())}: absent: pip install -e '.[test]'")

    def forget_clients(self):
        """An open file system keeps the address that it was opened with."""
        backend.fsspec_backend._get_filesystem.cache_clear()
        fsspec.get_filesystem_class(self.scheme).clear_instance_cache()

    @contextlib.contextmanager
    def led_to(self, port):
        """This process is a client of a server at a port; yields its environment."""
        environment = self.environment(port)
        with pytest.MonkeyPatch.context() as patch:
            for name, value in environment.items():
                patch.setenv(name, value)
            name = {"gs": "gcs"}.get(self.scheme, self.scheme)
            patch.setitem(fsspec.config.conf, name, dict(self.options))
            self.forget_clients()
            yield environment
        self.forget_clients()

    @contextlib.contextmanager
    def served(self, log):
        """A server with one bucket; yields the environment of its clients."""
        port = free_port()
        with log.open("w") as file:
            server = subprocess.Popen(
                [sys.executable, *self.command, str(port)], stdout=file, stderr=subprocess.STDOUT
            )
        try:
            deadline = time.monotonic() + 60
            while not _answers(port):
                assert server.poll() is None, log.read_text()
                assert time.monotonic() < deadline
                time.sleep(0.1)
            if self.scheme == "s3":
                address = f"http://localhost:{port}/bucket"
                urllib.request.urlopen(urllib.request.Request(address, method="PUT")).close()
            with self.led_to(port) as environment:
                yield environment
        finally:
            server.kill()
            server.wait()

    @contextlib.contextmanager
    def refusing(self, *, readable):
        """This process is a client of a server that lets it do nothing, or only read."""
        kind = type("Kind", (self.refuses,), {"readable": readable})
        server = http.server.ThreadingHTTPServer(("localhost", 0), kind)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        try:
            with self.led_to(server.server_port):
                yield
        finally:
            server.shutdown()
            server.server_close()


def free_port():
    with socket.socket() as found:
        found.bind(("localhost", 0))
        return found.getsockname()[1]


def _answers(port):
    with socket.socket() as tried:
        return tried.connect_ex(("localhost", port)) == 0


SERVERS = {
    server.scheme: server
    for server in (
        Server(
            scheme="gs",
            packages=("gcsfs", "gcp_storage_emulator"),
            command=(
                REPOSITORY / "tests" / "gcs_emulator.py",
                *("start", "--host=localhost", "--in-memory", "--default-bucket=bucket", "-q"),
                "--port",
            ),
            environment=_gcs_environment,
            options={"token": "anon"},
            refuses=RefusingGcs,
        ),
        Server(
            scheme="s3",
            packages=("s3fs", "moto", "flask", "flask_cors"),
            command=("-m", "moto.server", "-H", "localhost", "-p"),
            environment=_s3_environment,
            options={},
            refuses=RefusingS3,
        ),
    )
}
