"""Lengths of time, as people write and read them."""

from __future__ import annotations

from lightning.pytorch.callbacks import Timer
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from machinery.errors import UserError


def parse_duration(max_time: str) -> float:
    """Seconds of a duration in Lightning's format, DD:HH:MM:SS. Raises UserError."""
    try:
        return Timer(max_time).time_remaining() or 0.0
    except (ValueError, MisconfigurationException):
        remedy = "give days, hours, minutes and seconds as DD:HH:MM:SS"
        raise UserError(f"--max_time {max_time}: {remedy}") from None


def format_time(seconds: float) -> str:
    """A duration for people: 45 s, 12 min, 3 h 05 min."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    hours, minutes = divmod(round(seconds / 60), 60)
    return f"{hours} h {minutes:02} min" if hours else f"{minutes} min"
