"""A server's settings, as `endlex serve` takes them, and the layout of its data directory.

endlex.sqlite3         runs, journals, series, checkpoints' manifests, tokens
parts/ab/<sha256>      parts of checkpoints' files, each once
partial/<sha256>       parts that are still arriving
"""

from __future__ import annotations

import os
import re
import shutil
from dataclasses import dataclass
from pathlib import Path

from endlex.protocol import EndlexError

GIB = 2**30
ROOT_PATH = re.compile(r"(/[A-Za-z0-9._~-]+)+")
DEFAULT_PORT = 8817


@dataclass(frozen=True)
class Settings:
    """What the operator decides; the defaults suit one person on one machine."""

    host: str = "127.0.0.1"
    """The address to listen on; any but loopback needs `public`."""
    port: int = DEFAULT_PORT
    """The port to listen on; 0 takes a free one."""
    public: bool = False
    """Serve other machines, or a proxy that does: every request needs a token."""
    trusted_proxy: str | None = None
    """The address of the proxy in front, whose X-Forwarded headers are believed."""
    root_path: str = ""
    """The path under which a proxy shows the server, such as /endlex, cut off by it or not."""
    tls_cert: Path | None = None
    """A certificate's file (PEM), with which the server speaks HTTPS itself."""
    tls_key: Path | None = None
    """The file of its private key."""
    alerts: tuple[str, ...] = ()
    """Addresses that get each alert, as `watch.notify` knows them."""
    stall_minutes: float = 10.0
    """How long a running run may be silent before that is an alert."""
    min_free_bytes: int | None = None
    """Disk space that uploads leave free; None is 1 GiB or 2 % of the disk, whichever is less."""

    def __post_init__(self) -> None:
        root, rule = self.root_path, "must begin with a slash and end without one: /endlex"
        if root and not ROOT_PATH.fullmatch(root):
            raise EndlexError(f"root path {root!r} {rule}")
        if (self.tls_cert is None) != (self.tls_key is None):
            raise EndlexError("a certificate and its key come together: --tls-cert and --tls-key")
        for path in filter(None, (self.tls_cert, self.tls_key)):
            if not path.is_file():
                raise EndlexError(f"there is no file {path}: give a certificate and its key as PEM")

    def reserve(self, directory: Path) -> int:
        """Return how many bytes uploads leave free on the disk of `directory`."""
        if self.min_free_bytes is not None:
            return self.min_free_bytes
        return min(GIB, shutil.disk_usage(directory).total // 50)


class DataDir:
    """Name the files and folders of a server's data directory."""

    def __init__(self, root: Path) -> None:
        self.root, self.database = root, root / "endlex.sqlite3"
        self.parts, self.partial = root / "parts", root / "partial"

    @classmethod
    def from_environment(cls) -> DataDir:
        """Take `ENDLEX_HOME`, or `~/.local/share/endlex` where it is unset or empty."""
        given = os.environ.get("ENDLEX_HOME")
        return cls(Path(given).expanduser() if given else Path.home() / ".local/share/endlex")

    def create(self) -> None:
        """Make the directories, readable by their owner alone, or raise an `EndlexError`."""
        try:
            for directory in (self.root, self.parts, self.partial):
                directory.mkdir(parents=True, exist_ok=True, mode=0o700)
        except OSError as error:
            raise EndlexError(
                f"cannot keep data in {self.root}: {error.strerror} ({error.filename}); name a "
                "directory that you may write, with --data or ENDLEX_HOME"
            ) from error
