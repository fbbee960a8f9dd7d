"""Errors as callers meet them."""

from __future__ import annotations

import pickle

import pytest

from mt3_runtime import errors


def kinds(kind=errors.Mt3Error):
    return [kind, *(found for below in kind.__subclasses__() for found in kinds(below))]


@pytest.mark.parametrize("kind", kinds(), ids=lambda kind: kind.__name__)
def test_every_error_goes_from_one_process_to_another(kind):
    """One that does not ends a whole pool of processes."""
    more = (7,) if kind is errors.SampleError else ()
    error = kind("what is wrong: the fix", *more)
    found = pickle.loads(pickle.dumps(error))  # noqa: S301 -- our own
    assert (type(found), str(found), found.args) == (kind, "what is wrong: the fix", error.args)
    assert getattr(found, "usable", None) == getattr(error, "usable", None)
    assert kind in vars(errors).values()
