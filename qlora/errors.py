"""The one exception that the scripts show as a line instead of a traceback."""


class InputError(Exception):
    """Something given cannot be used; the message names the flag, file, row or field, and what to do."""

    is_told_elsewhere: bool | None = None  # by another process of the run; None: not yet known


def first_line(error: Exception) -> str:
    """What another library's exception says, in one line."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return (lines[0] if lines else type(error).__name__)[:300]
