"""Speeds and times in words, for people who wait."""


def rate_text(per_s: float) -> str:
    """``3.1/s``, or ``2.8 s each`` where one takes longer than a second."""
    return f"{per_s:.1f}/s" if per_s >= 1 else f"{1 / per_s:.1f} s each"


def duration(seconds: float) -> str:
    """Seconds for people: ``17 s``, ``3 min 20 s``, ``2 h 05 min``."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"
