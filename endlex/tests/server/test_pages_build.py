"""hatch_build.py: what a build fetches, what it refuses, and how it goes on without a network."""

from __future__ import annotations

import base64
import hashlib
import importlib.util
import io
import tarfile
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

pytest.importorskip("hatchling")
HOOK = Path(__file__).parents[2] / "server/hatch_build.py"


@pytest.fixture
def build() -> ModuleType:
    spec = importlib.util.spec_from_file_location("endlex_hatch_build", HOOK)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.CustomBuildHook.WEB = None  # ../test_packaging.py builds a wheel with its export
    return module


@pytest.fixture
def archive(build: ModuleType, monkeypatch: pytest.MonkeyPatch) -> bytes:
    """A package as npm would pack it, whose hash the hook is told to expect."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as package:
        for name in [*build.UPLOT.members, "package/../../outside", "package/other.js"]:
            content = name.encode()
            member = tarfile.TarInfo(name)
            member.size = len(content)
            package.addfile(member, io.BytesIO(content))
    content = buffer.getvalue()
    digest = base64.b64encode(hashlib.sha512(content).digest()).decode()
    pinned = build.UPLOT._replace(sha512=digest)
    monkeypatch.setattr(build.CustomBuildHook, "PACKAGES", (pinned,))
    return content


class App:
    """Where hatchling prints."""

    def __init__(self) -> None:
        self.warnings: list[str] = []

    def display_warning(self, text: str) -> None:
        self.warnings.append(text)


def hook_for(build: ModuleType, root: Path) -> tuple[Any, App]:
    app = App()
    hook = build.CustomBuildHook(str(root), {}, None, None, str(root), "wheel", app)
    return hook, app


def answer_with(content: bytes) -> Any:
    def run_npm(arguments: list[str], folder: Path) -> None:
        (folder / "package.tgz").write_bytes(content)

    return run_npm


def test_only_the_files_that_the_pages_use_are_unpacked(
    build: ModuleType, archive: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(build, "run_npm", answer_with(archive))
    hook, app = hook_for(build, tmp_path)
    hook.initialize("standard", {})
    assert sorted(path.name for path in hook.folder.iterdir()) == sorted(
        build.UPLOT.members.values()
    )
    assert app.warnings == []
    assert not list(tmp_path.glob("**/outside"))


def test_a_changed_package_is_refused(
    build: ModuleType, archive: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(build, "run_npm", answer_with(archive + b"\0"))
    hook, app = hook_for(build, tmp_path)
    hook.initialize("standard", {})
    assert not hook.folder.exists()
    assert "nothing was unpacked" in app.warnings[0]


def test_without_a_network_the_build_goes_on_unless_told_otherwise(
    build: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_network(arguments: list[str], folder: Path) -> None:
        raise build.AssetError("npm ended with 1: ENOTFOUND")

    monkeypatch.setattr(build, "run_npm", no_network)
    hook, app = hook_for(build, tmp_path)
    hook.initialize("editable", {})
    assert "ENOTFOUND" in app.warnings[0]
    monkeypatch.setenv("ENDLEX_REQUIRE_ASSETS", "1")
    with pytest.raises(RuntimeError, match="ENOTFOUND"):
        hook.initialize("standard", {})


def test_node_is_asked_for_only_where_it_is_needed(
    build: ModuleType, archive: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hook, _ = hook_for(build, tmp_path)
    monkeypatch.setattr(build.shutil, "which", lambda name: "/usr/bin/npm")
    assert hook.dependencies() == []
    monkeypatch.setattr(build.shutil, "which", lambda name: None)
    assert hook.dependencies() == [build.NODE_FROM_PYTHON]
    monkeypatch.setattr(build, "run_npm", answer_with(archive))
    hook.initialize("standard", {})
    assert hook.dependencies() == []  # the files are there
