"""Commands end in one line where the user can mend what is wrong, and only there."""

from __future__ import annotations

import errno
import os

import pytest
import torch

from iou_d2.commands.errors import ending_in_a_sentence, sentence_of
from iou_d2.errors import InputError, MissingFileError, UnknownKeyError


def end_with(error: Exception) -> SystemExit:
    with pytest.raises(SystemExit) as caught, ending_in_a_sentence():
        raise error
    return caught.value


@pytest.mark.parametrize("kind", [InputError, MissingFileError, UnknownKeyError])
def test_the_sentence_is_all_that_is_printed(kind):
    # SystemExit with a string prints it to stderr and ends with status 1.
    assert end_with(kind("a.json lists no images.")).code == "a.json lists no images."


def test_they_are_the_built_in_errors_that_callers_expect():
    assert issubclass(InputError, ValueError)
    assert issubclass(MissingFileError, FileNotFoundError)
    assert issubclass(UnknownKeyError, KeyError)


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EFBIG, errno.EROFS])
def test_what_the_machine_refuses_names_the_file(number):
    refused = OSError(number, os.strerror(number), "out/model.pth")
    assert end_with(refused).code == f"{os.strerror(number)}: out/model.pth."


@pytest.mark.parametrize("bug", [ValueError("bug"), KeyError("bug"), FileNotFoundError(2, "x")])
def test_bugs_keep_their_traceback(bug):
    with pytest.raises(type(bug)), ending_in_a_sentence():
        raise bug


class BadImages(torch.utils.data.Dataset):
    def __len__(self):
        return 1

    def __getitem__(self, index):
        raise InputError("a.jpg is cut short.")


@pytest.mark.parametrize("workers", [0, 1])
def test_the_sentence_of_a_worker_comes_without_its_traceback(workers):
    with pytest.raises(InputError) as caught:
        list(torch.utils.data.DataLoader(BadImages(), num_workers=workers))
    assert sentence_of(caught.value) == "a.jpg is cut short."
