"""Models go to a hub on 127.0.0.1 and come back from it; what is there is not sent again."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import huggingface_hub.constants as hub_constants
import pytest
import torch
from tests.archerchat.conftest import TinyHome

from archerchat.checkpoint import find_checkpoint, load_checkpoint

REPO = "someone/tiny"
COMMIT = "0" * 40
TOKEN = "hf_of_the_test"


class Hub(BaseHTTPRequestHandler):
    """A hub with one repository, for those who bring the token."""

    files: dict[str, bytes]
    stored: dict[str, bytes]
    created: list[dict[str, Any]]
    puts: list[str]
    fail_puts: int
    private: bool

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def answer(self, value: Any = None, status: int = 200, **headers: str) -> None:
        body = value if isinstance(value, bytes) else json.dumps(value).encode()
        self.send_response(status)
        for name, text in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(name.replace("_", "-"), text)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server.server_address[1]}"

    def body(self) -> bytes:
        return self.rfile.read(int(self.headers.get("Content-Length") or 0))

    def refused(self) -> bool:
        if known := self.headers.get("Authorization") == f"Bearer {TOKEN}":
            return not known
        self.answer({"error": "no"}, 401)
        return True

    def do_POST(self) -> None:
        body = self.body()
        if self.refused():
            return
        if self.path == "/api/repos/create":
            self.created.append(json.loads(body))
            self.answer({"url": f"{self.address}/{REPO}"})
        elif self.path == "/api/validate-yaml":  # of the model card
            self.answer({"errors": [], "warnings": []})
        elif self.path.endswith("/preupload/main"):
            names = [file["path"] for file in json.loads(body)["files"]]
            modes = {True: "lfs", False: "regular"}
            kinds = [{"path": n, "uploadMode": modes[n.endswith("rs")]} for n in names]
            self.answer({"files": [each | {"shouldIgnore": False} for each in kinds]})
        elif self.path.endswith("/objects/batch"):
            objects = json.loads(body)["objects"]
            for each in objects:
                if each["oid"] not in self.stored:
                    upload = {"href": f"{self.address}/storage/{each['oid']}"}
                    each["actions"] = {"upload": upload}
            self.answer({"transfer": "basic", "objects": objects})
        elif "/commit/" in self.path:
            for line in map(json.loads, body.splitlines()):
                value = line["value"]
                if line["key"] == "lfsFile":
                    self.files[value["path"]] = self.stored[value["oid"]]
                elif line["key"] == "file":
                    self.files[value["path"]] = base64.b64decode(value["content"])
            self.answer({"commitUrl": f"{self.address}/{REPO}/commit/1", "commitOid": COMMIT})
        else:
            self.answer({"error": self.path}, 404)

    def do_PUT(self) -> None:
        content, oid = self.body(), self.path.rpartition("/")[2]
        self.puts.append(oid)
        if type(self).fail_puts:
            type(self).fail_puts -= 1
            self.answer({"error": "no space"}, 403)
            return
        assert hashlib.sha256(content).hexdigest() == oid
        self.stored[oid] = content
        self.answer({})

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        if self.refused():
            return
        if re.search(r"/api/models/[^/]+/[^/]+(/revision/.*)?$", self.path.partition("?")[0]):
            siblings = [{"rfilename": name} for name in self.files]
            about = {"id": REPO, "sha": COMMIT, "private": self.private, "tags": []}
            self.answer(about | {"siblings": siblings})
        elif "/tree/" in self.path:
            self.answer(
                [
                    {"type": "file", "path": n, "size": len(c), "oid": hashlib.sha1(c).hexdigest()}
                    for n, c in self.files.items()
                ]
            )
        elif (name := self.path.rpartition("/")[2]) in self.files and "/resolve/" in self.path:
            etag = f'"{hashlib.sha256(self.files[name]).hexdigest()}"'
            self.answer(self.files[name], ETag=etag, X_Repo_Commit=COMMIT)
        else:
            self.answer({"error": self.path}, 404)


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[type[Hub]]:
    empty = {"files": {}, "stored": {}, "created": [], "puts": [], "fail_puts": 0, "private": True}
    handler = type("ThisHub", (Hub,), empty)
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    address = f"http://127.0.0.1:{server.server_port}"
    values = {
        "ENDPOINT": address,
        "HUGGINGFACE_CO_URL_TEMPLATE": address + "/{repo_id}/resolve/{revision}/{filename}",
        "HF_HUB_CACHE": str(tmp_path / "hub"),
        "HF_TOKEN_PATH": str(tmp_path / "token"),
        "HF_HUB_DISABLE_XET": True,
        "HF_HUB_OFFLINE": False,
    }
    for name, value in values.items():
        monkeypatch.setattr(hub_constants, name, value)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    yield handler
    server.shutdown()
    thread.join()
    server.server_close()


def test_a_model_goes_to_the_hub_and_comes_back(
    trained_home: TinyHome, hub: type[Hub], capsys: pytest.CaptureFixture[str]
) -> None:
    assert trained_home.run("push", "tiny", REPO) == 0
    asked = hub.created[0]  # by the library's version
    assert asked.get("visibility") == "private" or asked.get("private") is True
    assert {"config.json", "README.md", "modeling_archerchat.py"} <= hub.files.keys()
    assert f'from_pretrained("{REPO}"'.encode() in hub.files["README.md"]
    assert trained_home.run("push", "tiny", REPO) == 0  # again: the weights are there
    assert len(hub.puts) == 1
    assert trained_home.run("pull", REPO, "--tag", "back") == 0
    states = [
        load_checkpoint(find_checkpoint(trained_home.checkpoint_dir("base", tag)), ("model",)).state
        for tag in ("tiny", "back")
    ]
    for name, tensor in states[0]["model"].items():
        assert torch.equal(states[1]["model"][name], tensor)


def test_refusals_are_explained(
    trained_home: TinyHome,
    hub: type[Hub],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    hub.fail_puts = 1
    assert trained_home.run("push", "tiny", REPO) == 1
    assert "run the same command again" in capsys.readouterr().err
    assert not hub.files
    assert trained_home.run("push", "tiny", "not a name") == 2
    monkeypatch.setenv("HF_TOKEN", "hf_other")
    for words in (["push", "tiny", REPO], ["pull", REPO]):
        assert trained_home.run(*words) == 2
        assert "hf auth login" in capsys.readouterr().err


def test_nothing_goes_to_a_public_repository_unasked(
    trained_home: TinyHome, hub: type[Hub], capsys: pytest.CaptureFixture[str]
) -> None:
    hub.private = False
    assert trained_home.run("push", "tiny", REPO) == 2
    assert "everyone can see it" in capsys.readouterr().err
    assert not hub.files
    assert trained_home.run("push", "tiny", REPO, "--public") == 0
    assert hub.files
