"""How commands end where the user can mend what is wrong: with one line and exit status 1."""

from __future__ import annotations

import contextlib
import errno
import logging
import sys
from collections.abc import Iterator

from iou_d2.errors import InputError

# What the machine refuses, not what a program did wrong.
_REFUSED = {
    errno.ENOSPC,
    errno.EDQUOT,
    errno.EACCES,
    errno.EPERM,
    errno.EROFS,
    errno.ENAMETOOLONG,
    errno.EFBIG,
}


@contextlib.contextmanager
def ending_in_a_sentence() -> Iterator[None]:
    """Exit with status 1 and the sentence of an InputError, or of what the machine refused.

    All other errors pass, with their traceback.
    """
    try:
        yield
    except InputError as error:
        sys.exit(sentence_of(error))
    except OSError as error:
        if error.errno not in _REFUSED:
            raise
        where = f": {error.filename}" if error.filename else ""
        sys.exit(f"{error.strerror}{where}.")


def leaves_no_traceback(record: logging.LogRecord) -> bool:
    """A log filter: Detectron2 logs each error of a training with its traceback, which the sentence
    of one that a user can mend makes needless."""
    error = record.exc_info[1] if record.exc_info else None
    is_refused = isinstance(error, OSError) and error.errno in _REFUSED
    return not (isinstance(error, InputError) or is_refused)


def sentence_of(error: InputError) -> str:
    """The message without the traceback that a worker of a data loader puts before it."""
    message = str(error)
    _, marker, sentence = message.rpartition(f"{type(error).__module__}.{type(error).__name__}: ")
    return sentence.strip() if marker else message
