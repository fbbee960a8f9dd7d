"""Ctrl-C while something runs that takes it for another fault."""

from __future__ import annotations

import os
import signal
import sys
import threading

import pytest

from mt3_runtime.backends.sessions import import_onnxruntime
from mt3_runtime.interrupts import interrupts_held


@pytest.fixture
def handler():
    """Sets the handler of SIGINT, for the time of a test."""
    before = signal.getsignal(signal.SIGINT)
    yield lambda own: signal.signal(signal.SIGINT, own)
    signal.signal(signal.SIGINT, before)


def interrupt():
    os.kill(os.getpid(), signal.SIGINT)


def test_it_is_raised_afterwards(handler):
    handler(signal.default_int_handler)
    done = []

    def hold():
        with interrupts_held():
            interrupt()
            done.append(1)

    with pytest.raises(KeyboardInterrupt):
        hold()
    assert done == [1]
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_it_comes_before_what_it_is_mistaken_for(handler, tmp_path, monkeypatch):
    """As ONNX Runtime does while it starts."""
    handler(signal.default_int_handler)
    monkeypatch.delitem(sys.modules, "onnxruntime", raising=False)
    (tmp_path / "onnxruntime.py").write_text(
        "import os, signal\nos.kill(os.getpid(), signal.SIGINT)\nraise ImportError('initialization failed')\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(KeyboardInterrupt):
        import_onnxruntime()


def test_the_handler_of_somebody_else_stays(handler):
    heard = []
    own = lambda *_: heard.append(1)  # noqa: E731 -- to be compared
    handler(own)
    with interrupts_held():
        interrupt()
        assert heard == [1]
    assert signal.getsignal(signal.SIGINT) is own


def test_other_threads_have_no_signals():
    failures = []

    def run():
        try:
            with interrupts_held():
                pass
        except BaseException as error:  # noqa: BLE001 -- whatever it is
            failures.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert not failures
