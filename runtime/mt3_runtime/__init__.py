"""Audio to MIDI with MT3-family models, without torch.

>>> import mt3_runtime
>>> transcriber = mt3_runtime.load()  # the embedded demo; pass a folder for a real model
>>> transcription = transcriber.transcribe("song.wav")
>>> transcription.save("song.mid")
"""

from mt3_runtime.errors import (
    AudioError,
    BundleError,
    CheckpointError,
    DependencyError,
    DeviceError,
    Mt3Error,
    OptionError,
    OutputError,
)
from mt3_runtime.loading import load
from mt3_runtime.notes import Note
from mt3_runtime.transcriber import SegmentNotes, Transcriber
from mt3_runtime.transcription import Provenance, Transcription
from mt3_runtime.version import __version__

__all__ = [
    "AudioError",
    "BundleError",
    "CheckpointError",
    "DependencyError",
    "DeviceError",
    "Mt3Error",
    "Note",
    "OptionError",
    "OutputError",
    "Provenance",
    "SegmentNotes",
    "Transcriber",
    "Transcription",
    "__version__",
    "load",
]
