"""Human-readable durations and sizes."""


def duration(seconds: float) -> str:
    """A duration in seconds as text: 75 -> "1:15", 3700 -> "1:01:40"."""
    minutes, second = divmod(int(seconds + 0.5), 60)
    hours, minute = divmod(minutes, 60)
    if hours:
        return f"{hours}:{minute:02d}:{second:02d}"
    return f"{minute}:{second:02d}"


def size(count: float) -> str:
    """A number of bytes as text: 512_000 -> "512 kB", 3_210_000_000 -> "3.2 GB"."""
    units = ["B", "kB", "MB", "GB", "TB", "PB"]
    while count >= 1000 and len(units) > 1:
        count /= 1000
        del units[0]
    if count >= 10 or units[0] == "B":
        return f"{count:.0f} {units[0]}"
    return f"{count:.1f} {units[0]}"
