"""The bundle's archive from a server on 127.0.0.1: checked, unpacked whole or not at all, kept."""

from __future__ import annotations

import hashlib
import io
import stat
import threading
import zipfile
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from archerchat import downloads
from archerchat.errors import DataError, UsageError
from archerchat.evals.core.bundle import check_archive, find_bundle, load_bundle


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Give up after two attempts, without waiting."""
    monkeypatch.setattr(downloads, "ATTEMPTS", 2)
    monkeypatch.setattr(downloads, "FIRST_DELAY_SECONDS", 0.001)


class Server:
    """Serve one file; `broken` answers come first."""

    def __init__(self, content: bytes) -> None:
        self.content, self.broken = content, 0
        self.gets = 0
        self.authorizations: list[str | None] = []
        server = self

        class Handler(BaseHTTPRequestHandler):
            def log_message(self, format: str, *args: Any) -> None:
                pass

            def do_HEAD(self) -> None:
                server.authorizations.append(self.headers.get("Authorization"))
                self._head()

            def _head(self) -> None:
                self.send_response(200)
                self.send_header("Content-Length", str(len(server.content)))
                self.send_header("ETag", f'"{hashlib.md5(server.content).hexdigest()}"')
                self.end_headers()

            def do_GET(self) -> None:
                server.authorizations.append(self.headers.get("Authorization"))
                server.gets += 1
                self._head()
                body = server.content
                if server.broken:
                    server.broken -= 1
                    body = body[:-40] + bytes(40)
                self.wfile.write(body)

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}/eval_bundle.zip"
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.01,))
        self._thread.start()

    def close(self) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()


def pack(folder: Path, root: str = "eval_bundle/", extra: dict[str, bytes] | None = None) -> bytes:
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w", zipfile.ZIP_DEFLATED) as archive:
        for path in sorted(folder.rglob("*")):
            if path.is_file():
                archive.write(path, root + path.relative_to(folder).as_posix())
        for name, data in (extra or {}).items():
            archive.writestr(name, data)
    return content.getvalue()


@pytest.fixture
def server(small_bundle: Path) -> Iterator[Server]:
    server = Server(pack(small_bundle))
    yield server
    server.close()


def test_a_folder_is_taken_as_it_is(small_bundle: Path, tmp_path: Path) -> None:
    assert find_bundle(str(small_bundle), tmp_path / "cache") == small_bundle
    with pytest.raises(UsageError, match="--bundle nowhere: there is no such folder"):
        find_bundle("nowhere", tmp_path / "cache")
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize("root", ["", "eval_bundle/"])
def test_an_archive_is_fetched_once(
    server: Server,
    small_bundle: Path,
    tmp_path: Path,
    root: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    server.content = pack(small_bundle, root, {"__MACOSX/._x": b"x"} if root else None)
    found = find_bundle(server.url, tmp_path / "cache")
    assert load_bundle(found).fingerprint() == load_bundle(small_bundle).fingerprint()
    assert find_bundle(server.url, tmp_path / "cache") == found
    assert server.gets == 1
    bundles = tmp_path / "cache" / "eval_bundles"
    assert len(list(bundles.iterdir())) == 1
    assert {path.name for path in found.iterdir()} == {path.name for path in small_bundle.iterdir()}
    assert set(server.authorizations) == {None}  # the hub's token is for the hub


def test_a_damaged_archive_is_fetched_again(
    server: Server, small_bundle: Path, tmp_path: Path
) -> None:
    server.broken = 1
    messages: list[str] = []
    found = find_bundle(server.url, tmp_path / "cache", notify=messages.append)
    assert load_bundle(found).tasks
    assert server.gets == 2
    assert any("trying again" in message for message in messages)


def test_a_server_that_only_has_damaged_ones_leaves_nothing(server: Server, tmp_path: Path) -> None:
    server.broken = 99
    with pytest.raises(DataError, match=r"gave up on .*--bundle DIR names a folder"):
        find_bundle(server.url, tmp_path / "cache")
    assert list((tmp_path / "cache" / "eval_bundles").glob("*")) == []


def test_an_archive_without_a_whole_bundle_leaves_nothing(
    server: Server, small_bundle: Path, tmp_path: Path
) -> None:
    (small_bundle / "eval_data" / "schema.jsonl").unlink()
    server.content = pack(small_bundle)
    with pytest.raises(DataError, match="lacks the files of schema"):
        find_bundle(server.url, tmp_path / "cache")
    server.content = pack(small_bundle / "eval_data")
    with pytest.raises(DataError, match=r"holds 0 files core.yaml"):
        find_bundle(server.url, tmp_path / "cache")
    bundles = tmp_path / "cache" / "eval_bundles"
    assert not bundles.exists() or list(bundles.iterdir()) == []


@pytest.mark.parametrize(
    "name", ["../core.yaml", "/core.yaml", "a/../../x", "C:/x", "a\\..\\..\\x", ".."]
)
def test_names_that_lead_out_lead_nowhere(
    server: Server, small_bundle: Path, tmp_path: Path, name: str
) -> None:
    server.content = pack(small_bundle, extra={name: b"x"})
    cache = tmp_path / "a" / "b" / "cache"
    try:
        found = find_bundle(server.url, cache)
    except DataError:
        assert not list((cache / "eval_bundles").glob("*"))
    else:
        assert load_bundle(found).fingerprint() == load_bundle(small_bundle).fingerprint()
        assert [path.name for path in (cache / "eval_bundles").iterdir()] == [found.parent.name]
    assert [path.name for path in cache.parent.iterdir()] == ["cache"]
    assert not Path("/core.yaml").exists()


def test_links_are_not_followed(server: Server, small_bundle: Path, tmp_path: Path) -> None:
    path = tmp_path / "bundle.zip"
    path.write_bytes(pack(small_bundle))
    member = zipfile.ZipInfo("eval_bundle/link")
    member.create_system = 3
    member.external_attr = (stat.S_IFLNK | 0o777) << 16
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr(member, "/etc/passwd")
    server.content = path.read_bytes()
    found = find_bundle(server.url, tmp_path / "cache")
    assert not (found / "link").is_symlink()
    assert (found / "link").read_text() == "/etc/passwd"


def test_archives_that_would_fill_the_disk_are_refused(
    small_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "bundle.zip"
    path.write_bytes(pack(small_bundle))
    check_archive(path)
    monkeypatch.setattr("archerchat.evals.core.bundle.MAX_BYTES", 100)
    with pytest.raises(DataError, match="would unpack to more than"):
        check_archive(path)


def test_other_files_are_no_archives(tmp_path: Path) -> None:
    path = tmp_path / "bundle.zip"
    path.write_bytes(b"<html>no such page</html>")
    with pytest.raises(DataError, match="is no usable zip archive"):
        check_archive(path)
