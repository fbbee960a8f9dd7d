"""What the lab recommends: every branch of the rule, on made-up results."""

from __future__ import annotations

from dataclasses import replace

import pytest

from lab_cases import combination, estimate, example, fp32, scored, speed
from mt3_export.lab.advice import is_admissible, loss_phrase, recommend
from mt3_export.lab.results import Combination, Estimate, Scored


def run(*combinations, reference=True, allowed=0.002, clips=40):
    found = example(reference=reference)
    return replace(found, combinations=combinations, bisections=(), allowed_loss=allowed, clips=clips)


def other(name, times, loss, half=0.0005, **losses):
    """A combination that loses this of all scores, or of some scores something else."""
    made = combination(name, 0.02, times, 100, 0.0)
    flat = {score: estimate(loss, half) for score in made.against_reference.loss}
    return replace(made, against_reference=Scored(scored(loss).scores, flat | losses))


def test_the_fastest_admissible_one_is_recommended():
    advice = recommend(run(fp32(times=20.0), other("a", 30.0, 0.001), other("b", 40.0, 0.001), other("c", 60.0, 0.004)))
    assert advice.choice == "b-cpu"
    assert advice.sentence.startswith(
        "Use b-cpu: it is 2 times as fast as fp32, and against the reference MIDI loses 0.10"
    )
    assert advice.sentence.endswith("[0.05, 0.15]; allowed are 0.2 points.")
    assert any("c-cpu would be 3 times as fast and loses 0.40 points" in reason for reason in advice.reasons)
    assert not any("a-cpu" in reason for reason in advice.reasons), "it is slower than what is recommended"


def test_the_upper_end_of_the_interval_decides():
    at_the_limit = other("a", 30.0, 0.0015, onset=Estimate(0.0015, 0.001, 0.002))
    assert recommend(run(fp32(), at_the_limit)).choice == "a-cpu"
    beyond = other("a", 30.0, 0.0015, onset=Estimate(0.0015, 0.001, 0.0020001))
    assert recommend(run(fp32(), beyond)).choice == "fp32-cpu"


@pytest.mark.parametrize(("score", "counts"), [
    ("onset", True), ("onset_offset_program", True), ("drums", True), ("onset_offset", False), ("leakage", False),
])  # fmt: skip
def test_the_losses_that_are_judged(score, counts):
    results = run(fp32(), other("a", 30.0, 0.0, **{score: estimate(0.01)}))
    assert recommend(results).choice == ("fp32-cpu" if counts else "a-cpu")


def test_a_score_that_no_clip_has_does_not_count():
    without = other("a", 30.0, 0.0005)
    losses = {name: loss for name, loss in without.against_reference.loss.items() if name != "drums"}
    kept = replace(without, against_reference=Scored(without.against_reference.scores, losses))
    assert recommend(run(fp32(), kept)).choice == "a-cpu"
    losses.pop("onset")
    unknown = replace(kept, against_reference=Scored({}, losses))
    assert recommend(run(fp32(), unknown)).choice == "fp32-cpu", "without onset F1 nothing is known"


def test_ties_go_to_the_more_accurate():
    slower, faster = other("a", 38.2, 0.0005), other("b", 40.0, 0.001)
    assert recommend(run(fp32(), slower, faster)).choice == "a-cpu"
    assert recommend(run(fp32(), replace(slower, speed=speed(37.9)), faster)).choice == "b-cpu", "not within 5 %"


def test_a_gain_is_no_reason_to_leave_fp32():
    lucky = other("a", 20.5, -0.01)
    assert recommend(run(fp32(times=20.0), lucky)).choice == "fp32-cpu"
    advice = recommend(run(fp32(times=10.0), lucky))
    assert advice.choice == "a-cpu"
    assert "gains 1.00 points of onset F1" in advice.sentence


def test_nothing_but_fp32_says_what_more_would_allow():
    tempting = other("int8", 36.0, 0.004, 0.003)
    advice = recommend(run(fp32(times=20.0), tempting, other("slow", 15.0, 0.03)))
    assert advice.choice == "fp32-cpu"
    assert advice.sentence == (
        "Stay with fp32: int8-cpu would be 1.8 times as fast and loses 0.40 points of onset F1 [0.10, 0.70]; "
        "allowed are 0.2 points."
    )


def test_the_worst_of_the_losses_is_told():
    advice = recommend(run(fp32(times=20.0), other("int8", 30.0, 0.0, drums=estimate(0.02, 0.005))))
    assert "loses 2.00 points of drum F1 [1.50, 2.50]" in advice.sentence


def test_admissible_but_not_faster():
    advice = recommend(run(fp32(times=20.0), other("a", 20.9, 0.001), other("fast", 50.0, 0.05)))
    assert advice.choice == "fp32-cpu"
    assert advice.sentence == "Stay with fp32: nothing whose loss is allowed is more than 5 % faster."
    assert "fast-cpu would be 2.5 times as fast" in advice.reasons[0]


def test_too_few_clips_are_said_to_be_too_few():
    # 12 clips, mean 0.1 points and an interval of 0.4: a tenth of that, 0.1 - needs about 12 * 4 ** 2 clips
    wide = other("a", 30.0, 0.001, 0.004)
    advice = recommend(run(fp32(), wide, clips=12))
    assert advice.choice == "fp32-cpu"
    assert "12 clips cannot tell whether that is within what is allowed, more would (about 190)" in advice.reasons[0]
    few = recommend(run(fp32(), wide, clips=2))
    assert "more would." in few.reasons[0]
    certain = recommend(run(fp32(), other("a", 30.0, 0.006, 0.004), clips=12))
    assert certain.reasons == (), "all of the interval is beyond what is allowed"


def test_emulated_and_failed_ones_are_never_recommended():
    emulated = replace(other("fp16", 90.0, 0.0), emulated=True)
    failed = replace(other("w8", 90.0, 0.0), outcome="failed", problem="broke: mend it")
    advice = recommend(run(fp32(), emulated, failed))
    assert advice.choice == "fp32-cpu"
    assert advice.sentence.startswith("Stay with fp32: nothing else was measured")


def test_without_reference_midi_losses_are_against_fp32():
    same = combination("w8", 0.0015, 30.0, 100, 0.0, reference=False)
    unlike = combination("int8", 0.02, 40.0, 60, 0.0, reference=False)
    advice = recommend(run(fp32(reference=False), same, unlike, reference=False))
    assert advice.choice == "w8-cpu"
    assert "against fp32's own notes" in advice.sentence
    assert any("--reference-midi would tell" in reason for reason in advice.reasons)
    assert not is_admissible(run(reference=False), unlike)
    assert is_admissible(run(), replace(unlike, against_reference=scored(0.0)))


def test_without_fp32_there_is_no_recommendation():
    broken = Combination("fp32", "cpu", emulated=False, outcome="failed", problem="out of memory: use fewer slots")
    advice = recommend(run(broken, other("a", 30.0, 0.0)))
    assert advice.choice is None
    assert advice.reasons == ("fp32-cpu: out of memory: use fewer slots",)
    assert recommend(run()).choice is None


def test_without_times_nothing_is_faster():
    untimed = replace(other("a", 30.0, 0.0), speed=None)
    advice = recommend(run(replace(fp32(), speed=None), untimed))
    assert advice.choice == "fp32-cpu"
    assert advice.sentence == "Stay with fp32: nothing was timed."


def test_each_purpose_has_its_own_choice():
    quick = replace(other("quick", 25.0, 0.0005), speed=speed(25.0, latency=10.0))
    small = replace(other("small", 22.0, 0.001), size_bytes=40_000_000)
    tiny = replace(other("tiny", 22.0, 0.02), size_bytes=20_000_000)
    half = replace(other("fp16", 1.0, 0.0), emulated=True, speed=None, fallback_rows=2)
    graphs = tuple(replace(graph, limit=65504.0, largest=32752.0, non_finite=5) for graph in half.graphs[:1])
    advice = recommend(
        run(fp32(times=20.0), quick, small, tiny, other("fast", 50.0, 0.0), replace(half, graphs=graphs))
    )
    found = {purpose.title: purpose for purpose in advice.purposes}
    assert found["Most audio an hour"].combination == "fast-cpu"
    assert found["Live, one segment at a time"].combination == "quick-cpu"
    assert found["Smallest"].combination == "small-cpu"
    assert "tiny-cpu would be 20 MB, but loses 2.00 points" in found["Smallest"].text
    device = found["For a GPU (emulated)"]
    assert device.combination == "fp16-cpu"
    for told in ("loses nothing", "50", "5 numbers overflowed", "--bisect", "2 rows had to be decoded again"):
        assert told in device.text.replace("shows no loss", "loses nothing")


def test_losses_in_words():
    assert loss_phrase(Estimate(0.0, 0.0, 0.0)) == "loses nothing of onset F1"
    assert loss_phrase(estimate(0.004, 0.001), "drums") == "loses 0.40 points of drum F1 [0.30, 0.50]"
    assert loss_phrase(Estimate(0.001, 0.0, 0.003)) == "loses 0.10 points of onset F1 [0.00, 0.30]"
    assert loss_phrase(Estimate(0.0, -1.0, 1.0)).startswith("loses what so few clips cannot tell (0.00 points")
    assert loss_phrase(estimate(0.001, 0.002)).startswith("shows no loss that can be told from chance (0.10 points")
