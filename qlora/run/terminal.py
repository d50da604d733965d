"""What wraps every command: one-line errors, Ctrl-C, output streams whose failure cannot end a run."""

import errno
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from qlora import ranks
from qlora.errors import InputError


@contextmanager
def command(program: str) -> Iterator[None]:
    """Run a command: an InputError becomes one line and exit code 1, Ctrl-C exit code 130.

    Under torchrun only the first process prints, and an error that several come across is printed once.
    Output that cannot be written does not stop the command, but is an error at its end.
    """
    streams = sys.stdout, sys.stderr
    output, errors = (SafeStream(stream if ranks.is_first() else None) for stream in streams)
    sys.stdout, sys.stderr = output, errors
    try:
        yield
        output.flush()
        if output.error is not None:
            raise InputError(f"standard output could not always be written: {output.error.strerror}")
    except InputError as error:
        if error.is_told_elsewhere is None:
            error.is_told_elsewhere = not ranks.should_print(str(error))
        sys.exit(1 if error.is_told_elsewhere else f"{program}: error: {error}")
    except KeyboardInterrupt:
        sys.exit(128 + signal.SIGINT)
    finally:
        output.give_up()
        errors.give_up()
        sys.stdout, sys.stderr = streams


class SafeStream:
    """A text stream whose write() and flush() never raise OSError or UnicodeEncodeError.

    Characters that its encoding lacks become "?": an answer may contain any, and must not end a long run. If
    its reader is gone (a closed pipe or terminal), it leads to /dev/null from then on. Any other failure,
    such as a full disk, is kept in `error`, and the next write is tried again.
    """

    def __init__(self, stream):
        # Without a stream, as after `>&-`, there is nowhere to write to.
        self.stream = stream if stream is not None else open(os.devnull, "w")
        self.error: OSError | None = None

    def __getattr__(self, name: str):
        return getattr(self.stream, name)

    def write(self, text: str) -> int:
        encoding = self.stream.encoding or "utf-8"
        self._try(self.stream.write, text.encode(encoding, errors="replace").decode(encoding))
        return len(text)

    def flush(self) -> None:
        self._try(self.stream.flush)

    def give_up(self) -> None:
        """Drop what could not be written, or Python would try again at its exit and change the exit code."""
        self.flush()
        if self.error is not None:
            self._lead_nowhere()

    def _try(self, call, *arguments) -> None:
        try:
            call(*arguments)
        except OSError as error:
            if error.errno in (errno.EPIPE, errno.EIO):
                self._lead_nowhere()
            else:
                self.error = error

    def _lead_nowhere(self) -> None:
        """Point the descriptor itself to /dev/null: what is still buffered will be flushed to it."""
        with suppress(OSError), open(os.devnull, "w") as nowhere:  # a stream in memory has no descriptor
            os.dup2(nowhere.fileno(), self.stream.fileno())
