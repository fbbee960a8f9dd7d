"""Names for the kinds of array that cross module boundaries."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

FloatArray: TypeAlias = NDArray[np.float32]
IntArray: TypeAlias = NDArray[np.int32]
RowStates: TypeAlias = Sequence[Any] | FloatArray  # what a backend's `encode` gave for some rows, one by one
