"""What the demo model is: sizes, features, vocabulary. What depends on the vocabulary's layout stands here too."""

from __future__ import annotations

from dataclasses import replace

from demo_model.drums import KEYS
from demo_model.families import PROGRAMS
from mt3_runtime.specs import FeatureSpec, ModelSpec, VocabularySpec
from mt3_runtime.vocabulary import END_TOKEN, PAD_TOKEN, Event, Vocabulary

VOCABULARY = VocabularySpec()
EVENTS = Vocabulary(VOCABULARY)
FEATURES = FeatureSpec(frontend="torchaudio", mel_norm=True)
SMALL = ModelSpec(
    family="mt3",
    name="demo",
    d_model=256,
    num_heads=4,
    d_kv=48,
    d_ff=384,
    encoder_layers=4,
    decoder_layers=3,
    vocab_size=1536,
    position_base=256,
    max_length=1024,
    start_token=PAD_TOKEN,
    end_token=END_TOKEN,
)
# The sizes of the published MT3; needs a GPU.
FULL = replace(SMALL, name="full", d_model=512, num_heads=6, d_kv=64, d_ff=1024, encoder_layers=8, decoder_layers=8)
SIZES = {"small": SMALL, "full": FULL}

PITCHES = range(21, 109)  # the piano's; the synthetic music stays inside
TIE = EVENTS.encode(Event("tie", 0))
NOTE_OFF, NOTE_ON = (EVENTS.encode(Event("velocity", value)) for value in (0, 1))
SHIFTS = tuple(EVENTS.encode(Event("shift", steps)) for steps in range(206))  # a segment has at most 205 steps
PITCH_IDS = tuple(EVENTS.encode(Event("pitch", pitch)) for pitch in PITCHES)
PROGRAM_IDS = tuple(EVENTS.encode(Event("program", program)) for program in PROGRAMS)
DRUM_IDS = tuple(EVENTS.encode(Event("drum", key)) for key in KEYS)
VELOCITY_IDS = (NOTE_OFF, NOTE_ON)


def frame_of(steps: int) -> int:
    """The frame that stands for a time of `steps` in a segment: the one that begins there, 1.25 frames a step."""
    return min(FEATURES.segment_frames - 1, (5 * steps + 2) // 4)
