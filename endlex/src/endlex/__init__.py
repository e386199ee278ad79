"""Endlex: telemetry that lives in a local journal first."""
