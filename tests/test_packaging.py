"""Installing: the README's one command, and what `uv sync` needs to know of this workspace."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
import sys
import sysconfig
import tomllib
import venv
import zipfile
from importlib.metadata import distributions
from pathlib import Path

import pytest

from archerchat import __version__
from archerchat.cli import parse

ROOT = Path(__file__).resolve().parents[1]
COMMAND = "pip install ./endlex ."


def test_the_readme_has_both_ways() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert f"```bash\n{COMMAND}\n```" in readme
    assert "`uv sync`" in readme


def test_uv_finds_every_distribution_of_its_own_in_the_workspace() -> None:
    uv = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["uv"]
    members = [ROOT, *(ROOT / member for member in uv["workspace"]["members"])]
    projects = [tomllib.loads((m / "pyproject.toml").read_text())["project"] for m in members]
    needed = set()
    for project in projects:
        extras = project.get("optional-dependencies", {}).values()
        for requirement in [*project.get("dependencies", []), *(r for e in extras for r in e)]:
            needed |= set(re.findall(r"^(?:endlex|archerchat)[\w-]*", requirement))
    assert needed == uv["sources"].keys()
    assert needed < {project["name"] for project in projects}
    assert all(source == {"workspace": True} for source in uv["sources"].values())


def test_the_build_brings_the_libraries_that_the_page_imports() -> None:
    """Endlex's tests show how the hook fetches; here are the names."""
    pytest.importorskip("hatchling")
    spec = importlib.util.spec_from_file_location("hatch_build", ROOT / "hatch_build.py")
    assert spec is not None
    assert spec.loader is not None
    build = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(build)
    hook = build.CustomBuildHook(str(ROOT), {}, None, None, str(ROOT), "wheel", None)
    brought = {name for package in hook.PACKAGES for name in package.members.values()}
    page = (ROOT / "src/archerchat/serving/page/markdown.js").read_text(encoding="utf-8")
    imported = set(re.findall(r'load\("(\w+)"\)|vendor/(\w+)\.js', page))
    assert {f"{a or b}.js" for a, b in imported} | {
        f"{a or b}.LICENSE" for a, b in imported
    } == brought
    assert hook.folder == ROOT / "src/archerchat/serving/page/vendor"
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["hatch"]["build"]
    assert settings["artifacts"] == [f"{hook.FOLDER}/"]


def test_the_image_is_built_from_files_that_exist_and_serves() -> None:
    """No image can be built where the tests run; this reads the Dockerfile."""
    lines = (ROOT / "Dockerfile").read_text().replace("\\\n", " ").splitlines()
    steps = [line.split(maxsplit=1) for line in lines if line and not line.startswith("#")]
    copied = [name for step, rest in steps if step == "COPY" for name in rest.split()[:-1]]
    assert all((ROOT / name).exists() for name in copied)
    allowed = (ROOT / ".dockerignore").read_text().splitlines()
    assert {f"!{name}" for name in copied} == {line for line in allowed if line.startswith("!")}
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())
    project, build = settings["project"], settings["tool"]["hatch"]["build"]
    assert {project["readme"], *project["license-files"], "hatch_build.py"} <= set(copied)
    assert set(build["targets"]["wheel"]["packages"]) == {"src/archerchat"}
    torch = next(each for each in project["dependencies"] if each.startswith("torch"))
    assert f'"{torch}"' in " ".join(rest for step, rest in steps if step == "RUN")
    (entry,) = (json.loads(rest) for step, rest in steps if step == "ENTRYPOINT")
    command = parse(entry[1:])
    assert (command.function.__name__, command.config.host) == ("serve", "0.0.0.0")


def run(*words: str | Path, cwd: Path, **environment: str) -> str:
    """Run a command away from this checkout's sources, and return what it prints."""
    outer = {name: text for name, text in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        list(map(str, words)),
        cwd=cwd,
        env=outer | environment,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


PIP = (sys.executable, "-m", "pip")
OFFLINE = {"PIP_NO_INDEX": "1", "PIP_NO_BUILD_ISOLATION": "0"}  # 0 means: no isolation


@pytest.fixture
def own(tmp_path: Path) -> Path:
    """An environment without an index, beside the packages that the tests run with."""
    pytest.importorskip("hatchling")
    if not list(distributions(name="pip")):  # importing it would switch setuptools' distutils off
        pytest.skip("pip is not installed")
    venv.create(tmp_path / "own", symlinks=True)
    (packages,) = (tmp_path / "own" / "lib").glob("python*/site-packages")
    (packages / "outer.pth").write_text(f"{sysconfig.get_paths()['purelib']}\n")
    return tmp_path / "own"


@pytest.mark.slow
def test_the_readme_s_command_installs_and_keeps_torch(own: Path) -> None:
    python, outer = own / "bin" / "python", sysconfig.get_paths()["purelib"]
    (packages,) = (own / "lib").glob("python*/site-packages")
    run(*PIP, "--python", python, *COMMAND.split()[1:], cwd=ROOT, **OFFLINE)
    assert run(own / "bin" / "archerchat", "--version", cwd=own).startswith("archerchat ")
    code = "import archerchat, endlex, torch as t; print(archerchat, endlex, t, sep='\\n')"
    *ours, torch = re.findall(r"from '(.*)'", run(python, "-c", code, cwd=own))
    assert [Path(path).parent.parent for path in ours] == [packages] * 2
    assert Path(torch).is_relative_to(outer)
    source = ROOT / "src" / "archerchat"
    for path in source.rglob("*"):  # templates and word lists too
        if path.is_file() and path.suffix != ".pyc":
            assert (packages / "archerchat" / path.relative_to(source)).is_file(), path


@pytest.mark.slow
def test_a_release_is_three_wheels_of_one_version(own: Path) -> None:
    """A wheel built from its sdist equals the one built here; together they install and run."""
    release, rebuilt = own / "release", own / "rebuilt"
    for folder in ("", "endlex", "endlex/server"):
        words = (sys.executable, "-m", "hatchling", "build", "-t", "sdist", "-t", "wheel")
        run(*words, "-d", release, cwd=ROOT / folder)
    names = [f"{name}-{__version__}" for name in ("archerchat", "endlex", "endlex_server")]
    wheels = [release / f"{name}-py3-none-any.whl" for name in names]
    sdists = [release / f"{name}.tar.gz" for name in names]
    assert sorted(release.iterdir()) == sorted([*wheels, *sdists])
    run(*PIP, "wheel", "--no-deps", "-w", rebuilt, *sdists, cwd=own, **OFFLINE)
    for wheel in wheels:
        first, second = zipfile.ZipFile(wheel), zipfile.ZipFile(rebuilt / wheel.name)
        content = {name: first.read(name) for name in first.namelist()}
        assert content == {name: second.read(name) for name in second.namelist()}
        (license,) = (text for name, text in content.items() if name.endswith("licenses/LICENSE"))
        assert license == (ROOT / "LICENSE").read_bytes()
    run(*PIP, "--python", own / "bin" / "python", "install", *wheels, cwd=own, **OFFLINE)
    for command in ("archerchat", "endlex"):
        said = run(own / "bin" / command, "--version", cwd=own)
        assert said == f"{command} {__version__}\n"
    home = {"ARCHERCHAT_HOME": str(own / "home")}
    said = json.loads(run(own / "bin" / "archerchat", "doctor", "--json", cwd=own, **home))
    assert said["machine"]["archerchat"] == said["packages"]["endlex"] == __version__


def test_the_changelog_has_this_version() -> None:
    log = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    assert re.search(rf"^## {re.escape(__version__)}, \d{{4}}-\d\d-\d\d$", log, re.MULTILINE)
