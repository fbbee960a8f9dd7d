"""How a device is chosen: strictly, or the best that can be used, which is then said."""

from __future__ import annotations

import weakref
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest

from decoding_cases import check, decode
from gpu_facts import GOOD, OLD_DRIVER
from mt3_runtime import choosing
from mt3_runtime.backends.scripted_device import Collected, Launched, ScriptedDevice
from mt3_runtime.choosing import Wish, choose, choose_precision, try_out, with_halving
from mt3_runtime.devices import Device, encode_group, parse_device
from mt3_runtime.errors import BundleError, DependencyError, DeviceError, OptionError, OutOfMemoryError
from mt3_runtime.rows import DecodingRules


class Backend:
    """What is chosen; nothing of it runs."""

    def __init__(self, device, slots, precision):
        self.device, self.slots, self.precision = str(device), slots, precision


@pytest.fixture
def world(monkeypatch, tiny_bundle):
    """A machine with two GPUs; tests take away from it and let backends fail."""
    state = SimpleNamespace(facts=GOOD, reachable=True, failures={}, room=10_000, made=[])

    def make(wish, precision, slots):
        state.made.append((str(wish.device), slots))
        if wish.device.kind in state.failures:
            raise state.failures[wish.device.kind]
        if slots > state.room:
            raise OutOfMemoryError("no room: use fewer --slots")
        return Backend(wish.device, slots, precision)

    def gather():
        assert state.reachable or state.strict, "facts were gathered for nothing"
        return state.facts

    state.strict = False
    state.bundle = halved(tiny_bundle, "cuda", "tensorrt")
    monkeypatch.setattr(choosing, "make_backend", make)
    monkeypatch.setattr(choosing, "gather", gather)
    monkeypatch.setattr(choosing, "reachable", lambda: state.reachable)
    state.choose = lambda device, precision="auto", slots=None: choose(
        Wish(state.bundle, parse_device(device), precision, slots, None)
    )
    return state


def halved(bundle, *lowerings, precisions=("fp16",)):
    """The bundle as if it had graphs of other precisions and lowerings, too."""
    manifest = bundle.manifest
    entry = manifest.graphs[0]
    more = [
        replace(entry, graph=spec.name, lowering=lowering, precision=precision)
        for spec in manifest.contracts
        for lowering in lowerings
        for precision in precisions
    ]
    return replace(bundle, manifest=replace(manifest, graphs=(*manifest.graphs, *more)))


def test_auto_takes_the_best_and_says_why(world):
    choice = world.choose("auto")
    assert (choice.backend.device, choice.backend.precision) == ("tensorrt:0", "fp16")
    assert choice.reason == "the best that can be used"


def test_auto_goes_on_to_the_next_and_says_what_was_wrong(world):
    world.failures["tensorrt"] = DeviceError("there are no engines: mt3-export engines")
    choice = world.choose("auto")
    assert choice.backend.device == "cuda:0"
    assert "no engines: mt3-export engines" in choice.reason
    assert "tensorrt-rtx is not installed" in choice.reason


def test_auto_ends_on_the_cpu_when_nothing_else_can_be_used(world):
    world.facts = replace(GOOD, driver=OLD_DRIVER)
    choice = world.choose("auto")
    assert (choice.backend.device, choice.backend.precision) == ("cpu", "fp32")
    assert choice.reason.count("535.104.05 supports CUDA 12.2 at most") == 2


def test_auto_without_a_gpu_looks_nothing_up(world):
    world.reachable = False
    choice = world.choose("auto")
    assert (choice.backend.device, choice.reason) == ("cpu", "no NVIDIA GPU can be reached")
    with pytest.raises(DeviceError, match=r"fp16 needs a GPU.*\(no NVIDIA GPU can be reached\): leave"):
        world.choose("auto", "fp16")


@pytest.mark.parametrize("error", [
    DeviceError("parts of decode_step would run on the CPU: report it"), DependencyError("tensorrt is too old: update"),
    BundleError("a file was changed: copy it again"),
])  # fmt: skip
@pytest.mark.parametrize("name", ["cuda", "tensorrt:1"])
def test_a_device_that_was_asked_for_is_that_one_or_none(world, name, error):
    """Also where its backend found, after it had been made, that the CPU would do a part of it."""
    assert world.choose(name).backend.device == str(parse_device(name))
    assert world.choose(name).reason == ""
    world.failures[parse_device(name).kind] = error
    with pytest.raises(type(error), match=str(error)):
        world.choose(name)
    assert {device for device, _ in world.made} == {str(parse_device(name))}


def test_damage_is_not_passed_over_by_auto(world):
    world.failures["tensorrt"] = BundleError("a file was changed: copy it again")
    with pytest.raises(BundleError):
        world.choose("auto")


@pytest.mark.parametrize(("room", "slots"), [(32, 32), (31, 16), (16, 16), (5, 4), (1, 1)])
def test_without_memory_the_slots_are_halved_and_that_is_said(world, room, slots):
    world.room = room
    choice = world.choose("cuda", slots=32)
    assert choice.backend.slots == slots
    told = f"the GPU's memory is enough for {slots} rows side by side, not for 32: it is slower"
    assert choice.notices == ((told,) if slots < 32 else ())


def test_without_memory_for_one_slot_it_is_an_error(world):
    world.room = 0
    with pytest.raises(OutOfMemoryError, match="no room: use fewer --slots"):
        world.choose("cuda", slots=24)
    assert [slots for _, slots in world.made] == [24, 12, 6, 3, 1]


def test_what_was_allocated_is_let_go_before_the_next_try():
    alive, sizes = weakref.WeakSet(), []

    class Allocation:
        """Memory that holds on to itself, as objects of libraries do."""

        def __init__(self, slots):
            assert not alive
            alive.add(self)
            self.itself = self
            sizes.append(slots)
            if slots > 2:
                raise OutOfMemoryError("no room: use fewer")

    backend, notices = with_halving(Allocation, 8)
    assert isinstance(backend, Allocation)
    assert (sizes, len(notices)) == ([8, 4, 2], 1)


def test_a_gpu_is_tried_out_with_all_of_its_rows_before_it_is_used(tiny_bundle):
    """At the first positions, and at the last ones, which no row of a script comes to so soon."""
    asked = []

    class Device(ScriptedDevice):
        def launch(self, positions, steps):
            asked.append(positions.tolist())
            super().launch(np.where(positions == 95, np.int32(4), positions), steps)

    backend = Device(dict.fromkeys(range(8), [5] * 20), slots=3, length=96, chunk=4)
    backend.device = "cuda:0"
    assert try_out(backend, tiny_bundle.manifest) is backend
    assert backend._encoded == encode_group(tiny_bundle.manifest, "cuda:0") == 8
    assert asked == [[0] * 3, [95] * 3]
    assert [type(launch) for launch in backend.launches] == [Launched, Collected] * 2
    check(decode(backend, [5], DecodingRules(0, None, 9))[5], [5] * 9, "truncated")


@pytest.mark.parametrize(("precisions", "asked", "expected"), [
    (("fp16",), "auto", "fp16"), (("bf16", "fp16", "fp32"), "auto", "fp16"), (("bf16", "fp32"), "auto", "bf16"),
    (("fp32",), "auto", "fp32"), (("fp16", "fp32"), "fp32", "fp32"), (("bf16", "fp16"), "bf16", "bf16"),
])  # fmt: skip
def test_precisions_that_a_bundle_has(tiny_bundle, precisions, asked, expected):
    bundle = halved(tiny_bundle, "cuda", precisions=precisions)
    precision, notices = choose_precision(Wish(bundle, Device("cuda"), asked, None, None))
    assert precision == expected
    slow = precisions == ("fp32",)
    assert len(notices) == slow
    assert not slow or "mt3-export bundle --precision fp32,fp16 is faster" in notices[0]


def test_precisions_that_it_lacks(tiny_bundle):
    for device, asked, fix in (
        ("cuda", "bf16", "fp32,bf16"),
        ("cuda", "auto", "fp32,fp16"),
        ("tensorrt", "fp16", "fp32,fp16"),
    ):
        with pytest.raises(
            DeviceError, match=f"graphs for {device}: export it with mt3-export bundle --precision {fix}$"
        ):
            choose_precision(Wish(tiny_bundle, Device(device), asked, None, None))
    with pytest.raises(
        OptionError, match="fp16 is for GPUs, the CPU has fp32, int8, w8, w4, qdq: leave --precision out"
    ):
        choose_precision(Wish(tiny_bundle, Device("cpu"), "fp16", None, None))


def test_half_precision_has_a_fallback_and_full_precision_needs_none(world):
    half = world.choose("cuda")
    backend = half.fallback()
    assert (backend.device, backend.precision, backend.slots) == ("cpu", "fp32", 1)
    assert half.fallback() is backend
    world.bundle = halved(world.bundle, "cuda", precisions=("fp32",))
    assert world.choose("cuda", "fp32").fallback is None
    assert world.choose("cpu").fallback is None


def test_quantised_runs_on_the_cpu_whatever_gpu_there_is(world):
    world.bundle = halved(world.bundle, "ort", precisions=("int8",))
    choice = world.choose("auto", "int8")
    assert (choice.backend.device, choice.backend.precision) == ("cpu", "int8")
    assert choice.reason == "int8 is for the CPU"
    assert choice.fallback is None


@pytest.mark.parametrize("asked", ["int8", "w8", "w4", "qdq"])
def test_quantised_is_for_the_cpu(tiny_bundle, asked):
    bundle = halved(tiny_bundle, "cuda", "ort", precisions=("fp16", asked))
    with pytest.raises(OptionError, match=f"{asked} is for the CPU: give --device cpu"):
        choose_precision(Wish(bundle, Device("cuda"), asked, None, None))
    assert choose_precision(Wish(bundle, Device("cpu"), asked, None, None)) == (asked, ())
    assert choose_precision(Wish(bundle, Device("cpu"), "auto", None, None)) == ("fp32", ())
    with pytest.raises(DeviceError, match=f"has no {asked} graphs: mt3-export quantize adds them"):
        choose_precision(Wish(tiny_bundle, Device("cpu"), asked, None, None))
