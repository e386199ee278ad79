"""The two distributions of one package: what a machine that trains gets, and what a server does."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SOURCES = ROOT / "src/endlex"
CLIENT_BYTES = 1_200_000
"""At most, for the client's install with its bytecode."""


@pytest.fixture(scope="module")
def wheels(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Wheels of client and server, built offline: no chart library where it is not here yet."""
    builders = pytest.importorskip("hatchling.builders.wheel")
    folder = tmp_path_factory.mktemp("wheels")
    if not (SOURCES / "server/web/static/vendor/uplot/uPlot.iife.min.js").is_file():
        pytest.skip("the chart library is not here, and building the server would fetch it")
    client, server = (
        next(builders.WheelBuilder(str(root)).build(directory=str(folder), versions=["standard"]))
        for root in (ROOT, ROOT / "server")
    )
    return Path(client), Path(server)


def modules(wheel: Path) -> set[str]:
    """The files of a wheel, but for its metadata."""
    names = zipfile.ZipFile(wheel).namelist()
    return {name for name in names if ".dist-info/" not in name}


def test_every_module_is_in_one_of_the_two(wheels: tuple[Path, Path]) -> None:
    client, server = (modules(wheel) for wheel in wheels)
    assert not client & server
    assert {name for name in client | server if name.startswith("endlex/server/")} == server
    sources = {path.relative_to(SOURCES.parent).as_posix() for path in SOURCES.rglob("*.py")}
    assert {name for name in client | server if name.endswith(".py")} == sources
    assert "endlex/py.typed" in client
    assert "endlex/server/web/static/vendor/uplot/uPlot.iife.min.js" in server


def test_a_wheel_has_the_export_built(wheels: tuple[Path, Path], tmp_path: Path) -> None:
    assert "endlex/server/web/templates/export_built.html" in modules(wheels[1])
    for wheel in wheels:
        zipfile.ZipFile(wheel).extractall(tmp_path)
    shutil.rmtree(tmp_path / "endlex/server/web/static")  # what is built needs no source
    code = "from endlex.server.web.export import render; print(render('T$1', {'run': '$2'}))"
    written = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | {"PYTHONPATH": str(tmp_path), "PYTHONIOENCODING": "utf-8"},
        cwd=tmp_path,
        capture_output=True,
        timeout=60,
        check=True,
    )
    from endlex.server.web.export import render

    assert written.stdout.decode() == render("T$1", {"run": "$2"}) + "\n"


def test_the_client_alone_is_small_and_says_where_the_server_is(
    wheels: tuple[Path, Path], tmp_path: Path
) -> None:
    zipfile.ZipFile(wheels[0]).extractall(tmp_path)
    compiled = [sys.executable, "-m", "compileall", "-q", str(tmp_path)]
    subprocess.run(compiled, check=True, timeout=120)
    assert sum(p.stat().st_size for p in tmp_path.rglob("*") if p.is_file()) <= CLIENT_BYTES

    def endlex(*arguments: str) -> subprocess.CompletedProcess[str]:
        # Without site-packages: nothing but the client and Python's own library.
        code = "import sys; sys.path.insert(0, sys.argv.pop(1)); import endlex.cli as c; "
        return subprocess.run(
            [sys.executable, "-I", "-S", "-c", code + "sys.exit(c.main())", tmp_path, *arguments],
            capture_output=True,
            text=True,
            cwd=tmp_path,
            timeout=60,
            check=False,
        )

    assert "endlex[server]" in endlex("doctor").stdout
    refused = endlex("serve")
    assert refused.returncode == 1
    assert "only the client is installed here" in refused.stderr
    assert "pip install 'endlex[server]'" in refused.stderr


def test_the_two_ask_for_each_other_s_version() -> None:
    client, server = (
        tomllib.loads((folder / "pyproject.toml").read_text())["project"]
        for folder in (ROOT, ROOT / "server")
    )
    assert client["version"] == server["version"]
    assert client["optional-dependencies"]["server"] == [f"endlex-server=={client['version']}"]
    assert f"endlex=={client['version']}" in server["dependencies"]
    assert "dependencies" not in client
