"""Checkpoints of PyTorch Lightning: a state dict among the state of a training, read without its classes.

The hyper-parameters of YourMT3 hold a task manager, an object of the authors' own classes. Each class that such a file
names has a stand-in here, which keeps attributes and does nothing; so have the functions of numpy, because numpy takes
the sizes and flags in a pickle at their word. MR-MT3 keeps no hyper-parameters, only the state of a training.
"""

from __future__ import annotations

from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from torch import Tensor

from mt3_export.state import some
from mt3_runtime.errors import CheckpointError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping


class TaskManager:
    """Stands for `utils.task_manager.TaskManager`."""


class Tokenizer:
    """Stands for `utils.tokenizer.NoteEventTokenizer`."""


class Codec:
    """Stands for `utils.event_codec.FastCodec`."""


class Event:
    """Stands for `utils.note_event_dataclasses.Event`."""


class EventRange:
    """Stands for `utils.note_event_dataclasses.EventRange`."""


class NumpyValue:
    """Stands for a number, array or type of numpy, and for what makes one; its value is not read."""

    def __init__(self, *_: object) -> None:
        """Take what the original takes, and forget it."""

    def __setstate__(self, _: object) -> None:
        """Forget that too: it is a tuple, not a dictionary of attributes."""


class NumpyArray(NumpyValue):
    """Stands for `numpy.ndarray`."""


class NumpyType(NumpyValue):
    """Stands for `numpy.dtype`."""


class NumpyScalar(NumpyValue):
    """Stands for numpy's `scalar`."""


class Unknown(NumpyValue):
    """Stands for whatever else a published file names, which its hash vouches for."""


class Callback(NumpyValue):
    """Stands for a callback's class: before 1.5, Lightning kept the state of callbacks under their classes."""


class Factory(NumpyValue):
    """Stands for a type that a `defaultdict` was made with."""


def default_dict(*_: object) -> dict[object, object]:
    """Stands for `collections.defaultdict`: an ordinary one, which asks nobody for what it has not."""
    return {}


_NUMPY: Mapping[str, type] = MappingProxyType(
    {
        "numpy.ndarray": NumpyArray,
        "numpy.dtype": NumpyType,
        # numpy 2 moved its inside from `core` to `_core`.
        **{f"numpy.{core}.multiarray._reconstruct": NumpyValue for core in ("core", "_core")},
        **{f"numpy.{core}.multiarray.scalar": NumpyScalar for core in ("core", "_core")},
    }
)
STAND_INS: Mapping[str, type] = MappingProxyType(
    {
        "utils.task_manager.TaskManager": TaskManager,
        "utils.tokenizer.NoteEventTokenizer": Tokenizer,
        "utils.event_codec.FastCodec": Codec,
        "utils.note_event_dataclasses.Event": Event,
        "utils.note_event_dataclasses.EventRange": EventRange,
        **_NUMPY,
    }
)
MR_MT3_STAND_INS: Mapping[str, Callable[..., object]] = MappingProxyType(
    {
        "pytorch_lightning.callbacks.model_checkpoint.ModelCheckpoint": Callback,
        "pytorch_lightning.callbacks.early_stopping.EarlyStopping": Callback,
        "collections.defaultdict": default_dict,
        **{f"builtins.{name}": Factory for name in ("dict", "float", "int", "list")},
        **_NUMPY,
    }
)
# What Lightning's pickles call for besides: bytes are written as encoded text.
PLAIN_NAMES = frozenset({"_codecs.encode", "builtins.set"})


def split_lightning(loaded: dict[Any, Any]) -> tuple[object, dict[Any, Any]]:
    """State dict and hyper-parameters of a Lightning file; any other dictionary is a state dict without any.

    Raises:
        CheckpointError: the hyper-parameters are no dictionary.
    """
    if "state_dict" not in dict.keys(loaded):
        return loaded, {}
    hyper_parameters = dict.get(loaded, "hyper_parameters")
    if hyper_parameters is None:
        hyper_parameters = {}
    if not isinstance(hyper_parameters, dict):
        raise CheckpointError("has hyper-parameters that are no dictionary: save only the state dict")
    return dict.get(loaded, "state_dict"), hyper_parameters


def tensors_only(loaded: object) -> dict[str, Tensor]:
    """The dictionary of tensors that a file should hold.

    Raises:
        CheckpointError: it is none, or holds something else.
    """
    if not isinstance(loaded, dict) or not loaded:
        raise CheckpointError("holds no dictionary of tensors: save the state dict with torch.save")
    # As dict's own method: an OrderedDict of a file may bring another one as an attribute.
    items = list(dict.items(loaded))
    others = [str(key) for key, value in items if not (isinstance(key, str) and isinstance(value, Tensor))]
    if others:
        raise CheckpointError(f"holds {some(others)} besides tensors: save only the state dict")
    return dict(items)
