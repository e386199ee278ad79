"""The pages' shells and static files, without a browser."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from fastapi.testclient import TestClient

from endlex.server.app import build_app
from endlex.server.web import pages


@pytest.fixture
def client(tmp_path: Path) -> TestClient:
    """An application that was not started: the pages ask nothing of it."""
    return TestClient(build_app(tmp_path), base_url="http://127.0.0.1")


@pytest.mark.parametrize("path", ["/", "/runs/abcdefgh12", "/compare?runs=a,b", "/login"])
def test_a_page_names_only_files_that_are_served(client: TestClient, path: str) -> None:
    page = client.get(path)
    assert page.status_code == 200
    assert page.headers["content-type"].startswith("text/html")
    named = re.findall(r'(?:src|href)="(/[^"]*)"', page.text)
    assert len(named) >= 6
    for name in named:
        if not name.startswith("/static/vendor/"):  # there where the package was built
            assert client.get(name).status_code == 200, name


def test_nothing_in_a_page_needs_a_wider_policy(client: TestClient) -> None:
    page = client.get("/")
    policy = page.headers["content-security-policy"]
    assert "default-src 'self'" in policy
    assert "unsafe" not in policy
    assert not re.search(r"<style|\sstyle=|\son\w+=|<script>", page.text)
    assert not re.search(r"https?://", page.text)


def test_no_script_makes_markup_of_text() -> None:
    modules = [path.read_text() for path in (pages.STATIC / "js").glob("*.js")]
    assert len(modules) > 15
    for source in modules:
        assert not re.search(r"innerHTML|outerHTML|insertAdjacent|document\.write|\beval\(", source)
        assert "http://" not in source.replace("http://www.w3.org/2000/svg", "")
        assert "https://" not in source


def test_what_the_run_is_called_does_not_reach_the_shell(client: TestClient) -> None:
    page = client.get("/runs/<script>alert(1)")
    assert "alert" not in page.text


@pytest.mark.parametrize(
    "path",
    [
        "/static/../pages.py",
        "/static/..%2fpages.py",
        "/static/%2e%2e/pages.py",
        "/static/js/..%2f..%2f..%2fpages.py",
        "/static//etc/passwd",
        "/static/%2fetc%2fpasswd",
        "/static/.gitignore",
        "/static/js",
        "/static/nothing.js",
    ],
)
def test_only_what_lies_in_the_static_folder_is_served(client: TestClient, path: str) -> None:
    assert client.get(path).status_code == 404


def test_scripts_have_their_type_and_are_not_sent_twice(client: TestClient) -> None:
    first = client.get("/static/js/dom.js")
    assert first.headers["content-type"].startswith("text/javascript")
    assert first.headers["x-content-type-options"] == "nosniff"
    again = client.get("/static/js/dom.js", headers={"If-None-Match": first.headers["etag"]})
    assert again.status_code == 304
    assert again.content == b""


def test_a_missing_chart_library_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pages, "STATIC", tmp_path)
    assert pages.missing_assets() == list(pages.CHART_ASSETS)
    for name in pages.CHART_ASSETS:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    assert pages.missing_assets() == []
