"""Audio to MIDI with MT3-family models, without torch.

>>> import mt3_runtime
>>> transcriber = mt3_runtime.load()  # the embedded demo; pass a folder for a real model
>>> transcription = transcriber.transcribe("song.wav")
>>> transcription.save("song.mid")
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from mt3_runtime.version import __version__

if TYPE_CHECKING:
    from mt3_runtime.errors import (
        AudioError,
        BundleError,
        CheckpointError,
        DependencyError,
        DeviceError,
        DeviceLostError,
        Mt3Error,
        OptionError,
        OutOfMemoryError,
        OutputError,
        SampleError,
    )
    from mt3_runtime.loading import load
    from mt3_runtime.notes import Note
    from mt3_runtime.transcriber import Transcriber
    from mt3_runtime.transcription import Provenance, SegmentNotes, Transcription

__all__ = [
    "AudioError",
    "BundleError",
    "CheckpointError",
    "DependencyError",
    "DeviceError",
    "DeviceLostError",
    "Mt3Error",
    "Note",
    "OptionError",
    "OutOfMemoryError",
    "OutputError",
    "Provenance",
    "SampleError",
    "SegmentNotes",
    "Transcriber",
    "Transcription",
    "__version__",
    "load",
]

# Imported on first use: `mt3-run doctor` has to start where a library of ours does not.
_HOMES = {
    "Note": "notes",
    "Provenance": "transcription",
    "SegmentNotes": "transcription",
    "Transcriber": "transcriber",
    "Transcription": "transcription",
    "load": "loading",
}


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'mt3_runtime' has no attribute {name!r}")
    return getattr(import_module(f"mt3_runtime.{_HOMES.get(name, 'errors')}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
