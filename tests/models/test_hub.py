"""Models by their hub id, from a hub on this machine that serves what the real one does."""

import http.server
import json
import os
import shutil
import subprocess
import sys
import threading

import pytest

from uld_jax import models
from uld_jax.testing import tiny_model

COMMIT = "0123456789abcdef0123456789abcdef01234567"
LOAD = """
import sys
from uld_jax import models
from uld_jax.errors import UserError
try:
    print(models.load(sys.argv[1]).config.layers)
except UserError as error:
    print(error)
"""


class Hub(http.server.BaseHTTPRequestHandler):
    """Repositories of `root`, owner/name each a folder; `asked` keeps every file sent."""

    def log_message(self, *_):
        pass

    def do_HEAD(self):
        self.do_GET()

    def do_GET(self):
        parts = self.path.split("?")[0].strip("/").split("/")
        if parts[0] == "api":
            name = "/".join(parts[2:4])
            files = sorted((self.server.root / name).iterdir())
            siblings = [{"rfilename": path.name} for path in files]
            body = {"id": name, "sha": COMMIT, "siblings": siblings}
            if parts[4:5] == ["tree"]:
                body = [
                    {"type": "file", "path": p.name, "size": p.stat().st_size, "oid": COMMIT}
                    for p in files
                ]
            return self.answer(json.dumps(body).encode())
        self.server.asked.add(parts[-1])
        path = self.server.root / "/".join(parts[:2]) / parts[-1]
        return self.answer(path.read_bytes(), ETag=f'"{parts[-1]}"')

    def answer(self, body, **headers):
        self.send_response(200)
        for name, value in {**headers, "X-Repo-Commit": COMMIT}.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)


@pytest.fixture
def hub(tmp_path):
    """A hub with one good repository, here/good; repositories are added as folders of `root`."""
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.root, server.asked = tmp_path / "hub", set()
    models.save_pretrained(tiny_model(), server.root / "here" / "good")
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


def load(hub, source, tmp_path):
    env = os.environ | {
        "HF_ENDPOINT": f"http://127.0.0.1:{hub.server_address[1]}",
        "HF_HOME": str(tmp_path / "home"),
        "HF_HUB_OFFLINE": "0",
        "HF_HUB_DISABLE_XET": "1",
    }
    run = [sys.executable, "-c", LOAD, source]
    done = subprocess.run(run, capture_output=True, text=True, check=False, env=env, timeout=120)
    assert done.returncode == 0, done.stderr[-1500:]
    return done.stdout.strip()


def test_a_repository_of_safetensors(hub, tmp_path):
    assert load(hub, "here/good", tmp_path) == "2"


def test_a_repository_with_pickled_weights_only(hub, tmp_path):
    repository = shutil.copytree(hub.root / "here" / "good", hub.root / "here" / "old")
    (repository / "model.safetensors").rename(repository / "pytorch_model.bin")
    message = load(hub, "here/old", tmp_path)
    assert message.startswith(
        "here/old/model.safetensors: no such weights file, only ['pytorch_model.bin'], and pickle"
    )
    assert message.endswith(" here/old old-safetensors")
    assert "\n" not in message
    assert "config.json" in hub.asked
    assert "pytorch_model.bin" not in hub.asked
