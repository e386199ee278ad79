"""Endlex: telemetry that lives in a local journal first."""

from endlex.client.tracker import Run, init
from endlex.protocol import EndlexError

__all__ = ["EndlexError", "Run", "init"]
