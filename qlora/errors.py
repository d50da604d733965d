"""The one exception that the scripts show as a line instead of a traceback."""


class InputError(Exception):
    """Something given cannot be used; the message names the flag, file, row or field, and what to do."""
