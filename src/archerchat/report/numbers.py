"""How figures are written in reports."""

from __future__ import annotations

from datetime import UTC, datetime

from archerchat.report.scales import compact

ABSENT = "–"


def shown(value: float | None, digits: int = 4) -> str:
    """Write a figure with so many decimals, or a dash."""
    return ABSENT if value is None else f"{round(value, digits) + 0.0:.{digits}f}"  # no -0


def percent(value: float | None, digits: int = 1) -> str:
    return ABSENT if value is None else f"{100 * value:.{digits}f} %"


def count(value: float | None) -> str:
    """Write a large number in a few characters."""
    return ABSENT if value is None else compact(value)


def dollars(value: float | None) -> str:
    """Write money; small amounts to the cent's tenth."""
    if value is None:
        return ABSENT
    return f"${value:,.2f}" if value >= 0.1 or value == 0 else f"${value:.3f}"


def duration(seconds: float) -> str:
    """Write a time the way people say it."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    if seconds < 3600:
        return f"{seconds / 60:.1f} min"
    hours = int(seconds // 3600)
    return f"{hours} h {round(seconds % 3600 / 60):02d} min"


def moment(seconds: float) -> str:
    """Write a Unix time as a date and time in UTC."""
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%d %H:%M UTC")
