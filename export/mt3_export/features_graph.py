"""Segments of audio -> features on the device: what `mt3_runtime.features` computes in float64, in float32 products.

The Fourier sum of N = P Q samples is two batches of small matrix products (Cooley and Tukey, An algorithm for the
machine calculation of complex Fourier series, 1965), the window and the twiddle factors being part of the matrices.
With n = Q p + q, k = i + P j and W(a) = exp(-2 pi i a / N):

    y[q, i] = sum over p of  x[Q p + q] window[Q p + q] W(Q p i)             a real product for every q
    X[i + P j] = sum over q of  y[q, i] W(q (i + P j))                        a complex product for every i

The samples are real, so that i goes up to P / 2 only: what is left are mirror images.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812 -- the name every torch user knows

from mt3_export.onnx_graph import trace
from mt3_runtime.features import NORM_CEILING, NORM_FLOOR, SILENCE
from mt3_runtime.graphs import features_spec
from mt3_runtime.mel import mel_matrix
from mt3_runtime.yourmt3_features import LEAST_RANGE, OFFSET

if TYPE_CHECKING:
    from typing import TypeAlias

    import onnx_ir as ir
    from numpy.typing import NDArray

    from mt3_runtime.specs import FeatureSpec

    Matrix: TypeAlias = NDArray[np.float64]

FLOAT_BITS = 24  # of a float32's significand
OPSET = 18  # for it every CUDA provider has these operators, for what traces are written in not all have them all
EXPONENTS = 100  # powers of two reach this far both ways: 1e-30 to 1e30
LEAST = 2.0**-EXPONENTS


class Split(NamedTuple):
    """A number as the sum of a float32 and a much smaller one, times a power of two."""

    main: Tensor
    rest: Tensor
    scale: Tensor


class SplitProduct(nn.Module):
    """x @ matrix for every one of a batch, in three products that come hundreds of times closer than one in float32.

    Both sides are cut in two: the first part has so few bits that all sums of products of first parts are exact in
    float32, in any order. What is rounded are products with a second part, 2^-9 as large (the first terms of Ozaki et
    al., Error-free transformations of matrix multiplication, 2012). Every row of x is scaled by a power of two
    first: a quiet row is as exact as a loud one, and nothing overflows.
    """

    main: Tensor
    rest: Tensor
    powers: Tensor

    def __init__(self, matrix: Matrix) -> None:
        """`matrix` [batch, inner, outer], with entries in -1..1."""
        super().__init__()
        self.steps = 2.0 ** ((FLOAT_BITS - math.ceil(math.log2(matrix.shape[1]))) // 2)
        main = np.round(matrix * self.steps) / self.steps
        self.register_buffer("main", torch.from_numpy(main).float())
        self.register_buffer("rest", torch.from_numpy(matrix - main).float())
        exponents = torch.arange(-EXPONENTS, EXPONENTS + 1, dtype=torch.float64)
        self.register_buffer("powers", torch.exp2(exponents).float()[:, None])

    def forward(self, x: Tensor, rest: Tensor | None = None) -> Split:
        """Multiply x + rest [batch, rows, inner]; gives [batch, rows, outer], scale [batch, rows, 1]."""
        whole = x if rest is None else x + rest
        scale, inverse = self._scale(whole)
        main = torch.round(whole * (inverse * self.steps)) * (1 / self.steps)
        small = x * inverse - main
        if rest is not None:
            small = small + rest * inverse
        return Split(main @ self.main, small @ self.main + (whole * inverse) @ self.rest, scale)

    def _scale(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The power of two next above each row's largest value, and its inverse, read from a table: both exact."""
        largest = x.abs().amax(-1).clamp(LEAST, 1 / LEAST)
        exponent = torch.ceil(torch.log2(largest)).to(torch.int32)
        return F.embedding(EXPONENTS + exponent, self.powers), F.embedding(EXPONENTS - exponent, self.powers)


class Spectra(nn.Module):
    """Magnitudes of windowed frames [rows, length] -> [rows, places], in the order of `bin_places`."""

    def __init__(self, length: int) -> None:
        super().__init__()
        self.first, self.second = factors(length)
        self.kept = self.first // 2 + 1
        self.inner, self.outer = (SplitProduct(matrix) for matrix in fourier_matrices(length))

    def forward(self, frames: Tensor) -> Tensor:
        """See the class."""
        apart = frames.reshape(-1, self.first, self.second).permute(2, 0, 1)  # [second, rows, first]
        y = self.inner(apart)
        z = self.outer(self._turn(y.main * y.scale), self._turn(y.rest * y.scale))
        real, imaginary = torch.chunk(z.main + z.rest, 2, -1)
        # Scaled afterwards: the square of what is quieter than 1e-19 would be nothing.
        magnitudes: Tensor = torch.sqrt(real * real + imaginary * imaginary) * z.scale  # [kept, rows, second]
        return magnitudes.permute(1, 0, 2).flatten(1)

    def _turn(self, y: Tensor) -> Tensor:
        """[second, rows, 2 kept] -> [kept, rows, 2 second]: parts, real and imaginary, stay in the middle."""
        return y.reshape(self.second, -1, 2, self.kept).permute(3, 1, 2, 0).flatten(2)


class Features(nn.Module):
    """samples [segments, segment_samples], real frames [segments] -> features [segments, frames, bins].

    See `mt3_runtime.graphs.features_spec`. What the runtime refuses, samples louder than `mel.LOUDEST`, has to be
    refused before.
    """

    blocks: Tensor
    matrix: Tensor
    places: Tensor

    def __init__(self, spec: FeatureSpec) -> None:
        super().__init__()
        self.spec, self.spectra = spec, Spectra(spec.fft_length)
        blocks = np.arange(spec.segment_frames)[:, None] + np.arange(-(-spec.fft_length // spec.hop_length))
        self.register_buffer("blocks", torch.from_numpy(blocks.ravel()))
        places = bin_places(spec.fft_length)
        if spec.frontend == "yourmt3_spectrum":
            self.register_buffer("places", torch.from_numpy(places[1:]))
        else:
            matrix = np.zeros((self.spectra.kept * self.spectra.second, spec.bins), np.float32)
            matrix[places] = mel_matrix(spec)
            self.register_buffer("matrix", torch.from_numpy(matrix))

    def forward(self, samples: Tensor, frames: Tensor) -> Tensor:
        """See the class."""
        count = self.spec.segment_frames
        magnitudes = self.spectra(self._framed(samples))
        features = scaled(self._bins(magnitudes).reshape(-1, count, self.spec.bins), self.spec)
        is_real = torch.arange(count, dtype=torch.int32) < frames[:, None]
        return torch.where(is_real[..., None], features, 0.0)

    def _framed(self, samples: Tensor) -> Tensor:
        """Overlapping frames [rows, fft_length]: blocks of a hop, side by side with those that follow."""
        spec = self.spec
        if spec.centred:
            before = spec.fft_length // 2
            samples = F.pad(samples, (before, spec.fft_length - before), mode="reflect")
        frames, parts = spec.segment_frames, -(-spec.fft_length // spec.hop_length)
        samples = F.pad(samples, (0, (frames + parts - 1) * spec.hop_length - samples.shape[1]))  # or cut
        hops = samples.reshape(-1, frames + parts - 1, spec.hop_length)
        framed = hops.index_select(1, self.blocks)  # [segments, frames * parts, hop_length]
        return framed.reshape(-1, parts * spec.hop_length)[:, : spec.fft_length]

    def _bins(self, magnitudes: Tensor) -> Tensor:
        """Magnitudes of every frame in the order of their places -> the bins of the features [rows, bins]."""
        if self.spec.frontend == "yourmt3_spectrum":
            return magnitudes.index_select(1, self.places)
        return (magnitudes * magnitudes if self.spec.centred else magnitudes) @ self.matrix


def trace_features(spec: FeatureSpec) -> ir.Model:
    """The graph of `mt3_runtime.graphs.features_spec`, in operators as opset 18 has them.

    Raises:
        BundleError: the mel filters do not fit their range, or the trace does not keep the contract.
    """
    model = trace(Features(spec), features_spec(spec))
    model.graph.opset_imports[""] = OPSET
    return model


def scaled(values: Tensor, spec: FeatureSpec) -> Tensor:
    """Magnitudes or powers of whole segments [segments, frames, bins] as the network wants them.

    Step by step what `LogMel` and `yourmt3_features.scale_by_range` do.
    """
    if spec.centred:
        level = (values * (1 / OFFSET) + 1.0).log()
        level = level - level.amin((1, 2), keepdim=True)
        return level / (level.amax((1, 2), keepdim=True) + LEAST_RANGE)
    level = torch.where(values > 0, values, SILENCE).log()
    if spec.mel_norm:
        level = (level.clamp(NORM_FLOOR, NORM_CEILING) - NORM_FLOOR) / (NORM_CEILING - NORM_FLOOR)
    return level


def factors(length: int) -> tuple[int, int]:
    """The two factors of a transform's length, the first for real products, for which it costs least.

    A prime is its own first factor: the plain sum.
    """

    def cost(first: int) -> int:
        kept, second = first // 2 + 1, length // first
        return second * first * 2 * kept + kept * (2 * second) ** 2

    first = min((divisor for divisor in range(1, length + 1) if length % divisor == 0), key=cost)
    return first, length // first


def fourier_matrices(length: int) -> tuple[Matrix, Matrix]:
    """Both matrices of the Fourier sum, see the top: [second, first, 2 kept], [kept, 2 second, 2 second].

    Real parts stand before imaginary ones; `kept` = first // 2 + 1.
    """
    first, second = factors(length)
    p, i, q, j = (np.arange(size) for size in (first, first // 2 + 1, second, second))
    window = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(length) / length)
    windows = window.reshape(first, second).T[..., None]  # [second, first, 1]
    inner: NDArray[np.complex128] = _turns(np.outer(second * p, i), length) * windows
    outer = _turns(q[:, None] * (i[:, None, None] + first * j), length)
    real, imaginary = outer.real, outer.imag
    return (
        np.concatenate([inner.real, inner.imag], -1),
        np.concatenate([np.concatenate([real, imaginary], 2), np.concatenate([-imaginary, real], 2)], 1),
    )


def _turns(steps: NDArray[np.int64], length: int) -> NDArray[np.complex128]:
    """exp(-2 pi i steps / length), the angle reduced to one turn before it is rounded."""
    angles = 2 * np.pi * (steps % length / length)
    return np.cos(angles) - 1j * np.sin(angles)


def bin_places(length: int) -> NDArray[np.int64]:
    """Where each bin 0..length // 2 stands in what `Spectra` gives: itself, or its mirror image, which is as large."""
    first, second = factors(length)
    bins = np.arange(length // 2 + 1)
    shown = np.where(bins % first > first // 2, length - bins, bins)
    places: NDArray[np.int64] = shown % first * second + shown // first
    return places
