"""Rows on a GPU that is not there: what is asked of it, when, and that every planted fault in that shows."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest

from decoding_cases import follow
from device_cases import (
    CONTEXT,
    FRAMES,
    LENGTH,
    PREFIX,
    audio_features,
    expected,
    row_states,
    small_manifest,
)
from device_schedules import LENGTHS, device, play
from mt3_runtime.backends.device_rows import DeviceOptions, DeviceRows, bucket_of
from mt3_runtime.backends.fake_gpu import FakeGpu, FakeGraphs
from mt3_runtime.backends.gpu import DeviceTensor, to_device_type
from mt3_runtime.errors import DeviceError, DeviceLostError, OptionError, OutOfMemoryError
from mt3_runtime.graphs import features_spec, graph_specs


@pytest.fixture(scope="module")
def manifest(tiny_bundle):
    return small_manifest(tiny_bundle.manifest)


# ---- schedules ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16"])
@pytest.mark.parametrize("eager", [False, True], ids=["late", "at once"])
def test_random_schedules_give_every_row_its_own_tokens(manifest, precision, eager):
    moves, captured = 0, 0
    for seed, chunk in enumerate([1, 2, 4, 7]):
        backend = device(manifest, precision, chunk, eager=eager)
        moves += play(backend, seed).moves
        captured += backend.captured
    assert moves > 10
    assert captured > 10


@pytest.mark.parametrize("captures", [True, False])
@pytest.mark.parametrize("memory", [CONTEXT, PREFIX], ids=lambda memory: memory.injection)
def test_rows_that_are_told_of_others(tiny_bundle, memory, captures):
    manifest = small_manifest(tiny_bundle.manifest, memory)
    for seed, eager in enumerate([False, True]):
        lengths = (8, 16, LENGTH + manifest.model.prefix_length)
        backend = device(manifest, "fp16", 4, eager=eager, captures=captures, lengths=lengths)
        play(backend, seed, segments=10, channels=1, memory=memory)
        assert bool(backend.captured) == captures


def test_every_bucket_of_rows_and_lengths_is_used(manifest):
    used = set()
    for seed in range(8):
        backend = device(manifest)
        play(backend, seed, segments=10, failing=0)
        used |= {(rows, length) for rows, length, _ in backend._bound}
    assert used == {(rows, length) for rows in (1, 2, 4, 8) for length in LENGTHS}


@pytest.mark.parametrize("slots", [1, 2, 5])
def test_few_slots(manifest, slots):
    play(device(manifest, slots=slots), slots)


def test_segments_are_encoded_in_parts_where_the_graphs_take_no_more(manifest):
    backend = device(manifest, segments=4)
    play(backend, 3)


def test_audio_is_encoded_on_the_device_as_its_features_are(manifest):
    """Samples and not features are sent; in parts, and with uploads that are used again before all are done."""
    assert not device(manifest).takes_audio
    contracts = (features_spec(manifest.features), *manifest.contracts)
    plain, backend = (
        device(manifest),
        device(SimpleNamespace(model=manifest.model, features=manifest.features, contracts=contracts), segments=2),
    )
    assert backend.takes_audio
    rng = np.random.default_rng(0)
    samples = rng.integers(0, 1000, (5, manifest.features.segment_samples)).astype(np.float32)
    frames = np.array([FRAMES, 3, 9, 1, FRAMES], np.int32)
    features = np.stack([audio_features(*one) for one in zip(samples, frames, strict=True)])
    found, wanted = [], []
    for into, own, states in (
        (found, backend, backend.encode_audio(samples, frames)),
        (wanted, plain, plain.encode(features)),
    ):
        for segment in states:
            own.admit(0, segment)
            into.append(follow(own, 9, 3)[0].tolist())
    assert found == wanted
    assert wanted == [[expected(row_states(one, c), 9) for c in range(3)] for one in features]


@pytest.mark.parametrize("error", [DeviceError, OutOfMemoryError])
def test_a_device_that_refuses_to_capture_goes_on_without(manifest, error):
    backend, refusals = device(manifest), []

    def refuse(enqueue):
        refusals.append(enqueue)
        raise error("no captures today: use another driver")

    backend.gpu.capture = refuse
    play(backend, 0)
    assert len(refusals) == 1
    assert (backend.captured, backend.capture_problem) == (0, "no captures today: use another driver")


def test_a_device_that_is_lost_in_a_capture_is_not_used_further(manifest):
    backend = device(manifest)

    def fail(enqueue):
        raise DeviceLostError("gone")

    backend.gpu.capture = fail
    with pytest.raises(DeviceLostError):
        play(backend, 0)


# ---- planted faults -----------------------------------------------------------------------------------------------


def without_wait(backend):
    backend._gpu.wait = lambda event: None


def without_wait_for_uploads(backend):
    backend._segments.uploads._gpu = type("", (), {"__getattr__": lambda _, name: getattr(backend._gpu, name)})()
    backend._segments.uploads._gpu.wait = lambda event: None


def one_buffer_of_results(backend):
    backend._results = backend._results[:1] * 2


def one_buffer_of_positions(backend):
    backend._places = backend._places[:1] * 2


def wait_for_the_other_launch(backend):
    wait, other = backend._gpu.wait, dict(zip(backend._events, backend._events[::-1], strict=True))
    backend._gpu.wait = lambda event: wait(other.get(event, event))


def without_clear(backend):
    backend._gpu.clear = lambda plane: None


def pending_token_stays_behind(backend):
    copy = backend._gpu.copy
    backend._gpu.copy = lambda target, *source: None if target.width == target.pitch == 4 else copy(target, *source)


def caches_stay_behind(backend):
    backend._fit = lambda positions, rows: setattr(
        backend, "_current", next(own for length, own in backend._own.items() if length >= positions)
    )


def half_of_a_move(backend):
    copy, layers = backend._gpu.copy, backend._cross.shape[0]

    def first_layers(target, *source):
        if target.height == layers:
            target = type(target)(target.address, target.pitch, target.width, layers // 2)
        copy(target, *source)

    backend._gpu.copy = first_layers


def addresses_of_another_length(backend):
    class Careless(dict):
        def __contains__(self, key):
            return super().__contains__((key[0], key[2]))

        def __getitem__(self, key):
            return super().__getitem__((key[0], key[2]))

        def __setitem__(self, key, value):
            super().__setitem__((key[0], key[2]), value)

    backend._bound = Careless()


def positions_that_run_on(backend):
    fit, backend.length = backend._fit, LENGTH + 8
    backend._fit = lambda positions, rows: fit(min(positions, LENGTH), rows)


def blocks_back_too_early(backend):
    """States are freed as CUDA frees them, while the rows that read them wait."""
    pool = backend._segments._pool
    take = pool.take

    def careless(size):
        block = take(size)
        pool._returned.append((block.size, block.address))
        return block

    pool.take = careless


FAULTS = [
    without_wait,
    without_wait_for_uploads,
    one_buffer_of_results,
    one_buffer_of_positions,
    wait_for_the_other_launch,
    without_clear,
    pending_token_stays_behind,
    caches_stay_behind,
    half_of_a_move,
    addresses_of_another_length,
    positions_that_run_on,
    blocks_back_too_early,
]


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.__name__)
def test_planted_faults_show(manifest, fault):
    caught = []
    for eager in (False, True):
        backend = device(manifest, "fp16", 4, eager=eager, segments=1)
        fault(backend)
        try:
            play(backend, 5, failing=0.4)
        except AssertionError:
            caught.append(eager)
        finally:
            backend.gpu.close()  # what is still asked for would fail too
    assert caught


# ---- what a fake GPU refuses --------------------------------------------------------------------------------------


def test_a_fake_gpu_refuses_what_cuda_would_not_forgive():
    gpu = FakeGpu()
    address = gpu.allocate(64)
    with pytest.raises(AssertionError, match="not pinned"):
        gpu.upload(address, np.zeros(4, np.uint8))
    with pytest.raises(AssertionError, match="cannot be captured"):
        gpu.capture(gpu.synchronize)
    with pytest.raises(AssertionError, match="65 bytes at 0 of 64"):
        gpu.view(address, 65)
    gpu.free(address)
    with pytest.raises(AssertionError, match="no address"):
        gpu.view(address, 1)


# ---- limits -------------------------------------------------------------------------------------------------------


def test_buckets_are_powers_of_two():
    assert [bucket_of(rows) for rows in (1, 2, 3, 4, 5, 8, 9, 127, 128)] == [1, 2, 4, 4, 8, 8, 16, 128, 128]


@pytest.mark.parametrize(("slots", "length"), [(0, None), (-1, None), (2, 0), (2, LENGTH + 1)])
def test_sizes_that_hold_no_row_are_refused(manifest, slots, length):
    gpu = FakeGpu()
    with pytest.raises(OptionError, match="give 1 or more slots, and 1 to 40 tokens"):
        DeviceRows(manifest, gpu, FakeGraphs(gpu, {}), DeviceOptions(slots, length), device="", provider="")


def test_engines_that_are_too_small_are_named(manifest):
    with pytest.raises(OptionError, match="6 slots take 8 rows, but the engines were built for 4: use fewer"):
        device(manifest, rows=4)
    with pytest.raises(OptionError, match="take 40 positions, but the engines have at most 16: build them"):
        device(manifest, lengths=(8, 16))


def test_a_device_without_room_says_so_before_anything_runs(manifest):
    gpu = FakeGpu(size=1 << 20)
    with pytest.raises(OutOfMemoryError, match="use fewer slots"):
        DeviceRows(manifest, gpu, FakeGraphs(gpu, {}), DeviceOptions(128), device="", provider="")
    assert not gpu.asked or gpu.done <= gpu.asked


def test_a_third_launch_and_a_collect_of_nothing_are_refused(manifest):
    backend = device(manifest)
    with pytest.raises(AssertionError, match="no launch to collect"):
        backend.collect()
    backend.admit(0, backend.encode(np.zeros((1, FRAMES, 1024), np.float32))[0])
    backend.seed(0, np.zeros(3, np.int32))
    for start in (0, 4):
        backend.launch(np.full(3, start, np.int32), 4)
    with pytest.raises(AssertionError, match="2 launches under way"):
        backend.launch(np.full(3, 8, np.int32), 4)


def test_states_that_nobody_holds_are_used_again(manifest):
    backend = device(manifest)
    features = np.zeros((2, FRAMES, 1024), np.float32)
    backend.encode(features)
    before = backend._gpu.allocated
    for _ in range(20):
        backend.encode(features)
    assert backend._gpu.allocated == before
    kept = [backend.encode(features) for _ in range(3)]
    assert backend._gpu.allocated > before
    assert len({state.address for states in kept for segment in states for state in segment}) == 3 * 2 * 3


def test_everything_is_given_back(manifest):
    backend = device(manifest)
    play(backend, 1)
    backend.close()
    assert backend._gpu.allocated == 0


@pytest.mark.parametrize("lost", [False, True])
def test_what_is_under_way_is_over_before_its_graphs_are_given_up(manifest, lost):
    backend, order = device(manifest), []
    backend.admit(0, backend.encode(np.zeros((1, FRAMES, 1024), np.float32))[0])
    backend.seed(0, np.zeros(3, np.int32))
    backend.launch(np.zeros(3, np.int32), 4)
    assert backend.gpu.done < backend.gpu.asked
    graphs_close = backend.graphs.close
    backend.graphs.close = lambda: (order.append(("graphs", backend.gpu.done == backend.gpu.asked)), graphs_close())
    backend.gpu.close = lambda: order.append("gpu")
    if lost:
        backend.gpu.synchronize = lambda: (_ for _ in ()).throw(DeviceLostError("gone"))
    backend.close()
    assert order == [("graphs", not lost), "gpu"]


def test_results_of_a_step_outlive_the_backend(manifest):
    backend = device(manifest)
    backend.admit(0, backend.encode(np.zeros((1, FRAMES, 1024), np.float32))[0])
    found = backend.step(np.zeros(3, np.int32), np.zeros(3, np.int32))
    kept = [values.tolist() for values in found]
    backend.close()
    assert [values.tolist() for values in found] == kept


# ---- addresses ----------------------------------------------------------------------------------------------------


def test_an_odd_address_is_refused():
    gpu = FakeGpu()
    graphs, start = FakeGraphs(gpu, {"memory": print}), gpu.allocate(512)
    assert start % 256 == 0
    with pytest.raises(AssertionError, match="tokens of memory stands at an odd address"):
        graphs.bind("memory", [DeviceTensor("tokens", "int32", (2,), start + 64)])


@pytest.mark.parametrize("slots", [1, 3, 24, 64, 100])
def test_every_step_stands_where_a_graph_can_be_bound_to_it(manifest, slots):
    """With a memory or without, as the demo model is: 4 heads of 48, in caches of 256, 512 and 1024 positions."""
    model = replace(manifest.model, num_heads=4, d_kv=48, max_length=1024, decoder_layers=1)
    contracts = tuple(graph_specs(model, manifest.features).values())
    made = SimpleNamespace(model=model, features=manifest.features, contracts=contracts)
    gpu = FakeGpu()
    functions = {spec.name: (lambda arrays: None) for spec in contracts}
    backend = DeviceRows(made, gpu, FakeGraphs(gpu, functions), DeviceOptions(slots), device="", provider="")
    assert list(backend._own) == [256, 512, 1024]
    states = backend.encode(np.zeros((1, FRAMES, 1024), np.float32))[0]
    for first in range(min(slots, 5)):
        backend.admit(first, [states[first % 3]])
    for position in (0, 300, 1020):
        backend.launch(np.full(slots, position, np.int32), 16)
        backend.discard()
    assert len(backend._bound) == 3 * 16


def test_numbers_as_a_device_stores_them():
    torch = pytest.importorskip("torch")
    rng = np.random.default_rng(0)
    special = [0.0, -0.0, np.inf, -np.inf, 1e30, 65520.0, 1e-40]
    values = np.concatenate([rng.normal(size=1000) * 10.0 ** rng.integers(-9, 9, 1000), special]).astype(np.float32)
    tensor = torch.from_numpy(values)
    assert to_device_type(values, "bfloat16").tolist() == tensor.bfloat16().view(torch.uint16).tolist()
    np.testing.assert_array_equal(to_device_type(values, "float16"), tensor.half().numpy())
    assert to_device_type(values, "float32") is values
    bits = np.array([0x7F800001, 0xFFFFFFFF, 0x7FC00000], np.uint32)  # NaN with few bits, with all, and the usual one
    for half in ("bfloat16", "float16"):
        found = to_device_type(bits.view(np.float32), half)
        back = (found.astype(np.uint32) << 16).view(np.float32) if half == "bfloat16" else found
        assert np.isnan(back).all()
