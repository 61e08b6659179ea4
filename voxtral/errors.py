"""Errors a user can mend: one sentence, exit code 2, no traceback."""
import sys
from contextlib import contextmanager


class UserError(ValueError):
    """Something in the configuration, the data or the checkpoint is not as it must be; the message says what to do."""


@contextmanager
def one_sentence():
    """Around a script's main(): prints a UserError or a failed file operation as one line and exits with code 2."""
    try:
        yield
    except UserError as error:
        sys.exit(_complain(error))
    except OSError as error:  # a full disk, a folder that cannot be written, ...
        place = f"{error.filename}: " if error.filename else ""
        sys.exit(_complain(f"{place}{error.strerror or error}"))


def _complain(message) -> int:
    print(f"error: {message}", file=sys.stderr)
    return 2
