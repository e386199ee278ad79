"""Options of `archerchat serve`."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass, field
from typing import Annotated

from archerchat.config import DeviceConfig, Limit, NonNegativeInt, PositiveInt
from archerchat.errors import UsageError

KEY_VARIABLE = "ARCHERCHAT_API_KEY"
LOOPBACK = ("127.0.0.1", "localhost", "::1")


@dataclass(frozen=True)
class ServeConfig(DeviceConfig):
    """Serve models over HTTP: OpenAI's API, and a page to chat in."""

    host: str = "127.0.0.1"
    """Address to listen on. Set an API key before you open it to others."""
    port: Annotated[int, Limit(0, 65535)] = 8000
    """Port to listen on; 0 takes a free one."""
    model: tuple[str, ...] = ()
    """Models to offer, as TAG:STAGE or TAG:STAGE@STEP. Defaults to all on this machine. The first
    answers requests that name none."""
    max_loaded: PositiveInt = 2
    """Most models in memory; the one used longest ago makes room for another."""
    max_batch: PositiveInt = 16
    """Most answers to generate at a time, per model."""
    max_queue: NonNegativeInt = 128
    """Most answers that wait for a place; requests beyond it get status 429."""
    copies: PositiveInt | None = None
    """Copies of each model, each in a process of its own. Defaults to one per GPU. The limits above
    are those of each copy."""
    api_key: str | None = field(default=None, repr=False)
    """Key that clients must send. Defaults to the environment variable ARCHERCHAT_API_KEY."""
    cors_origin: tuple[str, ...] = ()
    """Origins, such as https://chat.example.org, whose pages may use the API."""

    @property
    def key(self) -> str | None:
        """The key that clients must send, if any; one that no header carries is refused."""
        key = self.api_key or os.environ.get(KEY_VARIABLE) or None
        if key is not None and not re.fullmatch("[!-~]([ -~]*[!-~])?", key):
            raise UsageError(
                f"the key of --api-key or {KEY_VARIABLE} must be ASCII, as headers are, and trimmed"
            )
        return key

    @property
    def is_local(self) -> bool:
        """Whether only this machine can reach the server."""
        return self.host in LOOPBACK
