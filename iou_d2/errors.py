"""Errors that a user can mend, with a sentence that names the file, the key or the shape.

Commands end with that sentence alone; every other error is a bug of ours and keeps its traceback.
Each is also the built-in error that fits, so that callers in Python catch what they expect.
"""

from __future__ import annotations


class InputError(ValueError):
    """What the user gave cannot be used."""

    def __str__(self) -> str:  # that of KeyError would quote the sentence
        return " ".join(map(str, self.args))


class MissingFileError(InputError, FileNotFoundError):
    """A file or folder that the user named, or that a file of the user names, is not there."""


class UnknownKeyError(InputError, KeyError):
    """A config sets a key that there is not."""


class DivergedError(InputError, FloatingPointError):
    """Training has diverged: a lower learning rate may help."""
