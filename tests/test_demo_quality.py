"""How well the embedded model transcribes clips that it has never heard; every device is held to the same figures."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent.parent / "scripts"))
from demo_model.agreement import average, compare
from demo_model.clips import HELD_OUT, make_clip
from demo_model.scores import KINDS

from mt3_export.quantize_bundle import quantize_bundle
from mt3_runtime.bundle import demo_bundle_path, open_bundle
from mt3_runtime.graphs import UNCALIBRATED
from mt3_runtime.loading import load

RATE = 16_000
CLIPS = 4
# What engines/demo/README.md gives for 100 longer clips, less what four of them may differ by.
LEAST = {"one": (0.95, None), "two": (0.87, None), "beat": (0.93, 0.93), "band": (0.78, 0.92)}  # onset F1, drums F1


LOST = {"fp32": 0.0, "int8": 0.005, "w8": 0.005, "w4": 0.03}  # of F1, at most


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    return quantize_bundle(open_bundle(demo_bundle_path()), tmp_path_factory.mktemp("demo") / "quantized", UNCALIBRATED)


@pytest.fixture(scope="module", params=LOST)
def transcriber(bundle, request):
    return load(bundle, "cpu", precision=request.param)


@pytest.fixture(scope="module", params=LEAST)
def clips(request):
    return request.param, [make_clip(KINDS[request.param], (8.0, 10.0), (HELD_OUT, 9, i)) for i in range(CLIPS)]


def test_held_out_clips(transcriber, clips):
    kind, listed = clips
    found = average([compare(transcriber.transcribe(clip.audio, RATE).notes, clip.notes) for clip in listed])
    onset, drums = LEAST[kind]
    lost = LOST[transcriber.backend.precision]
    assert found.onset >= onset - lost
    assert drums is None or found.drums >= drums - lost
