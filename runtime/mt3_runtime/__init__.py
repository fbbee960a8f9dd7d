"""Audio to MIDI with MT3-family models, without torch."""

from mt3_runtime.version import __version__

__all__ = ["__version__"]
