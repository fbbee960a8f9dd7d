"""What each frame, and each token, should know: the targets of the auxiliary losses, dropped after training."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from demo_model.drums import KEYS
from demo_model.families import PROGRAMS
from demo_model.settings import (
    DRUM_IDS,
    FEATURES,
    NOTE_OFF,
    NOTE_ON,
    PITCH_IDS,
    PITCHES,
    PROGRAM_IDS,
    SHIFTS,
    VELOCITY_IDS,
    frame_of,
)
from mt3_runtime.vocabulary import END_TOKEN

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from demo_model.targets import Group, SegmentEvents, Voice

FRAMES = FEATURES.segment_frames
# Tokens that a frame says by itself, with the network's own output rows: what begins here.
SPOKEN_IDS = (*PITCH_IDS, *PROGRAM_IDS, *DRUM_IDS, *VELOCITY_IDS)
_COLUMN = {token: column for column, token in enumerate(SPOKEN_IDS)}
# Pitches that end in a frame, then pitches that sound in it: these have rows of their own.
HIDDEN = 2 * len(PITCHES)
_BLUR = 1  # frames before and after an event that still count as it
AHEAD = 2  # frames: an event this near is the present one, "next" is the one after


@dataclass(frozen=True, slots=True, eq=False)
class FrameLabels:
    """Frame-wise targets of one segment.

    `spoken` and `hidden` are 0 or 1; `following` is the shift token of the next event of each frame, the end token
    where there is none; `voices` has rows (frame, pitch column, program column): a note that begins, ends or sounds.
    """

    spoken: NDArray[np.uint8]  # [frames, len(SPOKEN_IDS)]
    hidden: NDArray[np.uint8]  # [frames, HIDDEN]
    following: NDArray[np.int16]  # [frames]
    voices: NDArray[np.int16]  # [cases, 3]


def label_frames(segment: SegmentEvents) -> FrameLabels:
    """The frame-wise targets of a segment."""
    spoken = np.zeros((FRAMES, len(SPOKEN_IDS)), np.uint8)
    hidden = np.zeros((FRAMES, HIDDEN), np.uint8)
    voices: list[tuple[int, Voice]] = [(0, voice) for voice in segment.ties]
    sounding = dict.fromkeys(segment.ties, 0)
    for group in segment.groups:
        frame = frame_of(group.steps)
        here = slice(max(0, frame - _BLUR), frame + _BLUR + 1)
        for token in _spoken(group):
            spoken[here, _COLUMN[token]] = 1
        for voice in group.offsets:
            hidden[here, _pitch(voice)] = 1
            begun = sounding.pop(voice, frame)
            hidden[begun:frame, len(PITCHES) + _pitch(voice)] = 1
            voices.append(((begun + frame) // 2, voice))
        voices += [(frame, voice) for voice in (*group.offsets, *group.onsets)]
        sounding |= dict.fromkeys(group.onsets, frame)
    for voice, begun in sounding.items():
        hidden[begun:, len(PITCHES) + _pitch(voice)] = 1
        voices.append(((begun + FRAMES) // 2, voice))
    cases = [(frame, _pitch(voice), PROGRAMS.index(voice[0])) for frame, voice in voices]
    return FrameLabels(spoken, hidden, _following(segment.groups), np.array(cases, np.int16).reshape(-1, 3))


def _spoken(group: Group) -> list[int]:
    tokens = [PITCH_IDS[_pitch(voice)] for voice in group.onsets]
    tokens += [PROGRAM_IDS[PROGRAMS.index(voice[0])] for voice in (*group.offsets, *group.onsets)]
    tokens += [DRUM_IDS[KEYS.index(key)] for key in group.drums]
    tokens += [NOTE_OFF] * bool(group.offsets) + [NOTE_ON] * bool(group.onsets or group.drums)
    return tokens


def _pitch(voice: Voice) -> int:
    return PITCHES.index(voice[1])


def _following(groups: Sequence[Group]) -> NDArray[np.int16]:
    following = np.full(FRAMES, END_TOKEN, np.int16)
    begin = 0
    for group in groups:
        end = max(0, frame_of(group.steps) - AHEAD)
        following[begin:end] = SHIFTS[group.steps]
        begin = end
    return following


def reading_frames(tokens: Sequence[int]) -> NDArray[np.int16]:
    """The frame that each token is said at, before the token itself is known: that of the last shift, or 0.

    tokens: [length], without the start token -> [length]
    """
    frames, frame = np.zeros(len(tokens), np.int16), 0
    first, last = SHIFTS[0], SHIFTS[-1]
    for index, token in enumerate(tokens):
        frames[index] = frame
        if first <= token <= last:
            frame = frame_of(token - first)
    return frames
