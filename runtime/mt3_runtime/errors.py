"""The family of errors; each is also the standard type a caller would expect.

Mt3Error
├── AudioError        (ValueError)    audio that cannot be read, or is out of bounds
│   └── SampleError                   a sample that is no sound, in a block of others
├── BundleError       (ValueError)    a bundle that is broken, tampered with or of another version
├── DeviceError       (RuntimeError)  a device or provider that cannot be used
│   ├── OutOfMemoryError              its memory does not suffice
│   └── DeviceLostError               it has failed, and every later call to it would fail too
├── DependencyError   (ImportError)   an optional package that is not installed
├── OutputError       (OSError)       a result that cannot be written
├── OptionError       (ValueError)    options that contradict each other
└── CheckpointError   (ValueError)    weights that are not what they should be (raised by mt3_export)

Every message is one line and ends with what to do.
"""


class Mt3Error(Exception):
    """Base of every error raised on purpose."""


class AudioError(Mt3Error, ValueError):
    """Audio that cannot be read, or is outside the documented bounds."""


class SampleError(AudioError):
    """A sample that is no sound: NaN, infinite or beyond all loudness. `usable`: samples of its block before it."""

    def __init__(self, message: str, usable: int) -> None:
        super().__init__(message, usable)  # all of it, so that it can go from one process to another
        self.usable = usable

    def __str__(self) -> str:
        return str(self.args[0])


class BundleError(Mt3Error, ValueError):
    """A bundle that is broken, tampered with, or of another version."""


class DeviceError(Mt3Error, RuntimeError):
    """A device or execution provider that cannot be used here."""


class OutOfMemoryError(DeviceError):
    """A device whose memory does not suffice for what was asked; fewer slots may fit."""


class DeviceLostError(DeviceError):
    """A device that failed in the middle: nothing of this process can use it any more."""


class DependencyError(Mt3Error, ImportError):
    """An optional package that is not installed."""


class OutputError(Mt3Error, OSError):
    """A result that cannot be written where it was asked for."""


class OptionError(Mt3Error, ValueError):
    """Options that contradict each other or are out of range."""


class CheckpointError(Mt3Error, ValueError):
    """A checkpoint that is not the model it was given as, or is unsafe to read."""
