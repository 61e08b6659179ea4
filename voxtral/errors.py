"""Errors a user can mend: one sentence, exit code 2, no traceback."""

import sys
from contextlib import contextmanager


class UserError(ValueError):
    """Something in the configuration, the data or the checkpoint is not as it must be; the message says what to do."""


class DataError(UserError):
    """The `data:` block cannot be served as it stands; the message says what to change."""

    def __init__(self, message: str):
        # From a loader process torch hands over the traceback as the message: the sentence is its end.
        super().__init__(message.rsplit("DataError: ", 1)[-1].strip())


@contextmanager
def one_sentence():
    """Around a script's main(): prints a UserError or a failed file operation as one line and exits with code 2."""
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="backslashreplace")  # names of files hold what no terminal shows
    try:
        yield
    except UserError as error:
        sys.exit(_complain(error))
    except OSError as error:  # a full disk, a folder that cannot be written, ...
        place = f"{error.filename}: " if error.filename else ""
        sys.exit(_complain(f"{place}{error.strerror or error}"))


def shown(text) -> str:
    r"""Any text on one printable line: control characters, line separators, invisible ones and bytes that are no UTF-8
    come as \n, \u2028, \xff."""
    return "".join(one if one.isprintable() else _escaped(one) for one in str(text))


def reason_of(error: BaseException) -> str:
    """The first line of an error's message, or else what kind of error it is: never empty."""
    return next((shown(line.strip()) for line in str(error).split("\n") if line.strip()), type(error).__name__)


def one_line(error: BaseException) -> str:
    """All of an error's message on one line, or else what kind of error it is."""
    return " ".join(str(error).split()) or type(error).__name__


def _escaped(character: str) -> str:
    if "\udc80" <= character <= "\udcff":  # a byte of a file name that is no UTF-8
        return f"\\x{ord(character) - 0xDC00:02x}"
    return character.encode("unicode_escape").decode()


def _complain(message) -> int:
    print(f"error: {shown(message)}", file=sys.stderr)
    return 2
