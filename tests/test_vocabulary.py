"""Token ids against the table of the published vocabulary."""

from __future__ import annotations

import pytest

from mt3_runtime.errors import BundleError, OptionError
from mt3_runtime.specs import VocabularySpec
from mt3_runtime.vocabulary import Event, Vocabulary, until_end

# kind, lowest value, highest value, first id, last id: as published for one velocity bin
PUBLISHED = [
    ("shift", 0, 1000, 3, 1003),
    ("pitch", 0, 127, 1004, 1131),
    ("velocity", 0, 1, 1132, 1133),
    ("tie", 0, 0, 1134, 1134),
    ("program", 0, 127, 1135, 1262),
    ("drum", 0, 127, 1263, 1390),
]


@pytest.fixture
def vocabulary():
    return Vocabulary(VocabularySpec())


@pytest.mark.parametrize(("kind", "low", "high", "first", "last"), PUBLISHED)
def test_every_id_of_a_class(vocabulary, kind, low, high, first, last):
    ids = range(first, last + 1)
    values = range(low, high + 1)
    assert len(ids) == len(values)
    assert [vocabulary.decode(token) for token in ids] == [Event(kind, value) for value in values]
    assert [vocabulary.encode(Event(kind, value)) for value in values] == list(ids)


def test_special_unused_and_foreign_ids_mean_nothing(vocabulary):
    assert len(vocabulary) == 1391
    for token in (0, 1, 2, *range(1391, 1536), 1536, 10**9, -1, -3, -1391):
        assert vocabulary.decode(token) is None


@pytest.mark.parametrize(("kind", "low", "high", "first", "last"), PUBLISHED)
def test_values_outside_a_class_have_no_id(vocabulary, kind, low, high, first, last):
    for value in (low - 1, high + 1):
        with pytest.raises(OptionError, match=f"no {kind} event of value {value}"):
            vocabulary.encode(Event(kind, value))


def test_velocity_bins():
    assert [Vocabulary(VocabularySpec()).midi_velocity(b) for b in (0, 1)] == [0, 127]
    fine = Vocabulary(VocabularySpec(velocity_bins=127))
    assert [fine.midi_velocity(b) for b in range(128)] == list(range(128))
    assert fine.encode(Event("tie", 0)) == 1134 + 126
    coarse = Vocabulary(VocabularySpec(velocity_bins=4))
    assert [coarse.midi_velocity(b) for b in range(5)] == [0, 31, 63, 95, 127]


def test_another_time_step():
    vocabulary = Vocabulary(VocabularySpec(steps_per_second=50, max_shift_steps=10))
    assert vocabulary.steps_per_second == 50
    assert vocabulary.decode(13) == Event("shift", 10)
    assert vocabulary.decode(14) == Event("pitch", 0)


def test_only_the_first_end_token_ends():
    assert until_end([5, 0, 2, 7, 1, 9, 1]) == [5, 0, 2, 7]
    assert until_end([5, 0, 2]) == [5, 0, 2]
    assert until_end([1, 5]) == []
    assert until_end([]) == []


def test_no_room_for_the_end_token():
    with pytest.raises(BundleError, match="special_tokens 1"):
        Vocabulary(VocabularySpec(special_tokens=1))
