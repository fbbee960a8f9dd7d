"""Lightning files are read without their classes, and nothing that is put into one ever runs."""

from __future__ import annotations

import hashlib
import io
import pathlib
import pickle
import resource
import struct
import subprocess
import sys
import time
import warnings
import zipfile
from collections import OrderedDict
from dataclasses import replace

import numpy as np
import pytest
import torch

import pickles
from graph_cases import one_thread
from mt3_export import published
from mt3_export.lightning import STAND_INS, Unknown
from mt3_export.pickled import DEPTH_LIMIT, SIZE_LIMIT
from mt3_runtime.errors import Mt3Error
from states import OPTIONS, load, port_state, refusal, same, torch_bytes
from yourmt3_states import AUTHORS_CLASSES, authors_modules, authors_state, hyper_parameters, lightning_file

MODEL = "yptf-multi"
NUMPY = ("core.multiarray._reconstruct", "core.multiarray.scalar", "_core.multiarray._reconstruct")
pytestmark = pytest.mark.usefixtures("trusted_names")


@pytest.fixture(scope="module", autouse=True)
def threads():
    with one_thread():
        yield


@pytest.fixture(scope="module")
def whole():
    return lightning_file(MODEL)


def refused(folder, data, **options):
    return refusal(folder, data, "weights.ckpt", model=MODEL, **options)


def test_the_stand_ins_are_those_names_and_no_others():
    project = {f"{module}.{name}" for module, names in AUTHORS_CLASSES.items() for name in names}
    numpy = {f"numpy.{name}" for name in (*NUMPY, "_core.multiarray.scalar", "ndarray", "dtype")}
    assert STAND_INS.keys() == project | numpy
    active = {"__call__", "__new__", "__reduce__", "__reduce_ex__", "__getattr__", "__eq__", "__hash__", "__del__"}
    assert not any(active & vars(stand_in).keys() for stand_in in (*STAND_INS.values(), Unknown))


def test_the_file_of_these_tests_needs_every_stand_in_of_its_numpy(whole):
    named = set(torch.serialization.get_unsafe_globals_in_checkpoint(io.BytesIO(whole)))
    other = "numpy._core." if np.lib.NumpyVersion(np.__version__) < "2.0.0" else "numpy.core."
    assert named == {name for name in STAND_INS if not name.startswith(other)}
    with pytest.raises(pickle.UnpicklingError):
        torch.load(io.BytesIO(whole), weights_only=True)


def test_files_written_with_the_other_numpy_are_read(tmp_path, whole):
    before = pickles.pickle_of(whole)
    now, other = (b"numpy._core.", b"numpy.core.") if b"numpy._core." in before else (b"numpy.core.", b"numpy._core.")
    assert before.count(now) == 2
    data = pickles.repacked(whole, data_pkl=before.replace(now, other))
    assert same(load(tmp_path, data, model=MODEL).tensors, load(tmp_path, whole, model=MODEL).tensors)


def test_hyper_parameters_are_wanted_as_a_dictionary_and_a_state_dict_as_tensors(tmp_path):
    assert "hyper-parameters that are no dictionary" in refused(tmp_path, lightning_file(MODEL, hyper_parameters=[1]))
    assert "holds no dictionary of tensors" in refused(tmp_path, lightning_file(MODEL, state_dict=[torch.ones(1)]))
    broken = authors_state(MODEL) | {"epoch": 3}
    assert "holds epoch besides tensors" in refused(tmp_path, lightning_file(MODEL, state_dict=broken))
    bare = {"state_dict": authors_state(MODEL), "additive_pe": 0}
    assert load(tmp_path, torch_bytes(bare), model=MODEL, num_heads=3).tensors
    truthless = lightning_file(MODEL, hyper_parameters=torch.ones(2))
    assert "hyper-parameters that are no dictionary" in refused(tmp_path, truthless)
    odd = hyper_parameters(MODEL) | {"model_cfg": 3, "audio_cfg": None, "task_manager": "none"}
    assert load(tmp_path, lightning_file(MODEL, hyper_parameters=odd), model=MODEL, num_heads=3).tensors


def test_a_task_manager_may_be_the_class_itself(tmp_path):
    with authors_modules() as classes:
        said = hyper_parameters(MODEL) | {"task_manager": classes["TaskManager"]}
        data = torch_bytes({"state_dict": authors_state(MODEL), "hyper_parameters": said})
    checkpoint = load(tmp_path, data, model=MODEL)
    assert checkpoint.warnings == ("not a published file: max_length 256 assumed as for yptf-multi",)


@pytest.mark.parametrize(
    ("module", "name"), [("utils.task_manager", "Other"), ("utils.tokenizer", "TaskManager"), ("model.ymt3", "YourMT3")]
)
def test_any_other_class_is_refused_by_its_name(tmp_path, module, name):
    with authors_modules({module: (name,)}) as classes:
        data = torch_bytes({"state_dict": authors_state(MODEL), "x": classes[name]()})
    assert f"holds more than tensors ({module}.{name}) and was not opened" in refused(tmp_path, data)


def recognised(monkeypatch, data):
    row = replace(published.PUBLISHED[MODEL], sha256=hashlib.sha256(data).hexdigest())
    monkeypatch.setattr(published, "PUBLISHED", {MODEL: row})


def test_a_published_file_may_name_classes_that_no_one_foresaw(tmp_path, monkeypatch, whole):
    data = lightning_file(MODEL, callbacks={"ModelCheckpoint": {"best": pathlib.PosixPath("a/b")}, "nan": slice(3)})
    assert any(name in refused(tmp_path, data) for name in ("(pathlib.PosixPath)", "(pathlib._local.PosixPath)"))
    recognised(monkeypatch, data)
    found = load(tmp_path, data, model=MODEL, num_heads=3)  # what it says does not count
    assert (found.model.name, found.warnings) == (MODEL, ())
    assert same(found.tensors, load(tmp_path, whole, model=MODEL).tensors)


def test_nothing_in_a_published_file_runs_either(tmp_path, monkeypatch):
    """Here the hash vouches for malice: what is not refused is inert."""
    marker, outcomes = tmp_path / "marker", set()
    for payload in pickles.payloads(marker).values():
        data = lightning_file(MODEL, callbacks={"x": payload})
        recognised(monkeypatch, data)
        try:
            load(tmp_path, data, model=MODEL, num_heads=3)
            outcomes.add("read")
        except Mt3Error as error:
            outcomes.add(str(error).partition(" is ")[2])
        assert not marker.exists()
    assert "read" in outcomes
    refusals = outcomes - {"read"}
    assert all(text.startswith("the published yptf-multi, yet ") for text in refusals)
    assert all(text.endswith(": report this as a bug of mt3-export") for text in refusals)


def test_what_torch_would_call_by_itself_is_refused_in_a_published_file_too(tmp_path, monkeypatch):
    data = lightning_file(MODEL, extra=bytearray(b"x"))
    recognised(monkeypatch, data)
    message = refused(tmp_path, data)
    assert "yet holds more than tensors (builtins.bytearray) and was not opened: report this" in message


def test_mt3_has_no_stand_ins(tmp_path):
    message = refusal(tmp_path, {**port_state(), "x": np.float64(1)}, **OPTIONS)
    assert "multiarray.scalar) and was not opened" in message


# ---- pickles that would run ----------------------------------------------------------------------------------------


def smuggled(payload, protocol, zipped):
    """A Lightning file with a payload among its optimizer states, its hyper-parameters or its weights."""
    content = {"optimizer_states": [], "hyper_parameters": {"model_cfg": {}}, "state_dict": {}}
    if protocol % 3 == 0:
        content["optimizer_states"].append(payload)
    else:
        content["hyper_parameters" if protocol % 3 == 1 else "state_dict"]["encoder.latent_array.latents"] = payload
    buffer = io.BytesIO()
    torch.save(content, buffer, pickle_protocol=protocol, _use_new_zipfile_serialization=zipped)
    return buffer.getvalue()


@pytest.mark.parametrize("container", ["zip", "legacy"])
def test_no_pickle_in_a_lightning_file_runs(tmp_path, container):
    marker, careless = tmp_path / "marker", tmp_path / "careless"
    payloads = pickles.payloads(marker)
    assert len(payloads) * len(pickles.PROTOCOLS) >= 40
    for name, payload in payloads.items():
        for protocol in pickles.PROTOCOLS:
            data = smuggled(payload, protocol, container == "zip")
            refused(tmp_path, data)
            assert not marker.exists(), (name, protocol)
            # The same file does run when it is read the careless way, or it would show nothing.
            pickles.run(data, container, careless)
            assert marker.exists(), (name, protocol)
            marker.rmdir() if marker.is_dir() else marker.unlink()


def test_the_name_that_was_met_is_told(tmp_path, whole):
    for name in ("posix.system", "builtins.eval", "builtins.getattr", "subprocess.Popen", "numpy.load", "torch.load"):
        message = refused(tmp_path, pickles.repacked(whole, data_pkl=pickles.calling(name)))
        assert f"holds more than tensors ({name}) and was not opened: save only the state dict" in message
    # Python 2's names are translated as a careless reader would.
    assert "(builtins.eval)" in refused(tmp_path, pickles.repacked(whole, data_pkl=pickles.calling("__builtin__.eval")))


def test_objects_in_numpy_arrays_do_not_run(tmp_path):
    marker = tmp_path / "marker"
    payload = pickles.payloads(marker)["posix.system"]
    data = torch_bytes({"extra": np.array([payload, 1], dtype=object), "state_dict": authors_state(MODEL)})
    assert "(posix.system) and was not opened" in refused(tmp_path, data)
    assert not marker.exists()
    pickles.run(data, "zip", tmp_path / "careless")
    assert marker.exists()


def test_a_pickle_within_a_pickle_stays_bytes(tmp_path, whole):
    marker = tmp_path / "marker"
    inner = pickle.dumps(pickles.payloads(marker)["posix.system"])
    data = lightning_file(MODEL, extra=inner, array=np.frombuffer(inner, np.uint8))
    assert same(load(tmp_path, data, model=MODEL).tensors, load(tmp_path, whole, model=MODEL).tensors)
    assert not marker.exists()


# ---- stand-ins put to other uses -----------------------------------------------------------------------------------

EMPTY_STATE = b"}(X\x01\x00\x00\x00aK\x01u"


@pytest.mark.parametrize("name", sorted(STAND_INS))
@pytest.mark.parametrize(
    ("arguments", "build"),
    [
        (b")", b""),
        (b"(K\x01K\x02K\x03t", b""),
        (b"(ccollections\nOrderedDict\nK\x02t", b""),
        (b")", EMPTY_STATE),
        (b")", b"(K\x01K\x02K\x03t"),  # a state that is no dictionary
        (b")", b"(NX\x09\x00\x00\x00__class__cnumpy\nndarray\ns" + b"t"),
        (b")", b"(N}X\x09\x00\x00\x00__class__cnumpy\nndarray\nst"),  # slots: setattr(x, "__class__", another one)
        (b")", b"(N}X\x08\x00\x00\x00__dict__K\x01st"),
        (b")", b"(N}X\x0a\x00\x00\x00__reduce__cutils.task_manager\nTaskManager\nst"),
        (b")", b"(N}K\x01K\x02st"),
    ],
)
def test_a_stand_in_is_refused_or_harmless(tmp_path, whole, name, arguments, build):
    """Called with arguments, given states of every kind: there are no tensors, so at the latest that is refused."""
    data = pickles.repacked(whole, data_pkl=pickles.calling(name, arguments, build=build))
    message = refused(tmp_path, data)
    assert any(words in message for words in ("holds no dictionary of tensors", "damaged"))


def test_a_stand_in_with_a_huge_state_costs_no_more_than_its_file(tmp_path, whole):
    state = b"}(" + b"".join(b"X\x08\x00\x00\x00%08dNN0" % i for i in range(50_000)) + b"u"
    data = pickles.repacked(whole, data_pkl=pickles.calling("utils.task_manager.TaskManager", build=state))
    assert "damaged" in refused(tmp_path, data)  # POP is no opcode of a torch file
    state = b"}(" + b"".join(b"X\x08\x00\x00\x00%08dN" % i for i in range(100_000)) + b"u"
    data = pickles.repacked(whole, data_pkl=pickles.calling("utils.task_manager.TaskManager", build=state))
    assert "holds no dictionary of tensors" in refused(tmp_path, data)


def test_methods_of_a_dictionary_are_not_taken_from_the_file(tmp_path):
    """The pickle of an OrderedDict may set attributes, which would then be called in place of its methods."""
    state = OrderedDict(authors_state(MODEL))
    content = OrderedDict(state_dict=state, hyper_parameters=OrderedDict(hyper_parameters(MODEL)))
    # Under other names at first: the pickler would call them too.
    for mapping in (state, content, content["hyper_parameters"]):
        vars(mapping).update(ITEMS=set, KEYS=set, GET=set)
    data = torch_bytes(content)
    pickled = pickles.pickle_of(data)
    for name in (b"ITEMS", b"KEYS", b"GET"):
        assert name in pickled
        pickled = pickled.replace(name, name.lower())
    wanted = load(tmp_path, authors_state(MODEL), model=MODEL, num_heads=3).tensors
    assert same(load(tmp_path, pickles.repacked(data, data_pkl=pickled), model=MODEL).tensors, wanted)


# ---- built to break the reader -------------------------------------------------------------------------------------


def test_tuples_too_deep_to_hash_are_refused(tmp_path, whole):
    depth = 600_000
    key = b"\x80\x02}" + b")" + b"\x85" * depth + b"K\x01s."
    data = pickles.repacked(whole, data_pkl=key)
    assert f"nests tuples more than {DEPTH_LIMIT} deep" in refused(tmp_path, data)
    assert f"nests tuples more than {DEPTH_LIMIT} deep" in refusal(tmp_path, data, **OPTIONS)
    # torch's own reader ends the process.
    careless = "import sys, torch; torch.load(sys.argv[1], weights_only=True)"
    (tmp_path / "deep").write_bytes(data)
    done = subprocess.run([sys.executable, "-c", careless, tmp_path / "deep"], capture_output=True, check=False)
    assert done.returncode < 0


def test_tuples_are_counted_through_the_memo_and_marks(tmp_path, whole):
    once = b"q\x00h\x00\x85"  # remember, recall, wrap
    for wrap in (once, b"q\x00(h\x00t", b"K\x01\x86", b"K\x01K\x02\x87"):
        for count, words in (
            (DEPTH_LIMIT - 2, "no dictionary of tensors"),
            (DEPTH_LIMIT + 1, "nests tuples more than"),
        ):
            data = pickles.repacked(whole, data_pkl=b"\x80\x02" + b")" + wrap * count + b".")
            assert words in refused(tmp_path, data)


@pytest.mark.parametrize(
    "name", ["builtins.bytearray", "torch.Tensor", "torch.FloatTensor", "numpy.zeros", "numpy.empty"]
)
def test_nothing_reserves_memory_by_a_number(tmp_path, whole, name):
    hundred_gigabytes = b"\x8a\x05" + struct.pack("<Q", 100 << 30)[:5] + b"\x85"
    data = pickles.repacked(whole, data_pkl=pickles.calling(name, hundred_gigabytes))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    refused(tmp_path, data)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200 << 10


def text(content):
    return b"X" + struct.pack("<I", len(content)) + content


ENCODE = b"c_codecs\nencode\n"
BYTES = ENCODE + text(b"ab") + text(b"latin1") + b"\x86R"


def among(whole, pickled):
    """The archive with a pickle of a state dict, nothing in it, and some value."""
    return pickles.repacked(whole, data_pkl=b"\x80\x02}(" + text(b"state_dict") + b"}" + text(b"x") + pickled + b"u.")


@pytest.mark.parametrize(
    "arguments",
    [
        *(text(b"ab") + text(codec) + b"\x86" for codec in (b"hex", b"punycode", b"idna", b"bz2", b"utf-8", b"LATIN1")),
        ENCODE + text(b"ab") + text(b"hex") + b"\x86R" + text(b"hex") + b"\x86",
        BYTES + text(b"latin1") + b"\x86",
        text(b"ab") + text(b"latin1") + text(b"strict") + b"\x87",
        text(b"ab") + b"\x85",
        text(b"latin1") + b"N\x86",
        b"(" + text(b"hex") + text(b"hex") + b"t",
        text(b"hex") + b"q\x01h\x01\x86",
        b")",
        b"N",
    ],
)
@pytest.mark.parametrize(("function", "call"), [(b"", b"R"), (b"", b"\x81"), (b"q\x05h\x05", b"Re")])
def test_text_is_encoded_as_bytes_are_pickled_and_no_other_way(tmp_path, whole, arguments, function, call):
    start = b"](" if function else b""
    message = refused(tmp_path, among(whole, start + ENCODE + function + arguments + call))
    assert "(_codecs.encode of anything but bytes)" in message


def test_bytes_and_sets_are_read_as_pickle_writes_them(tmp_path, whole):
    assert "holds no dictionary of tensors" in refused(tmp_path, among(whole, BYTES))
    twice = [b"ab" * 9, {1, "a"}, torch.Size((3, 4)), OrderedDict(a=1)] * 2
    extra = [*twice, {1, "a"}, b"cd" * 9, torch.Size((3, 4)), np.zeros(3, "<f4"), np.ones(2, "<f4")]
    assert load(tmp_path, lightning_file(MODEL, extra=extra), model=MODEL).tensors


MILLION = 1 << 20


@pytest.mark.parametrize(
    ("pickled", "words"),
    [
        (b"](" + (ENCODE + text(b"a" * MILLION) + b"q\x00" + text(b"latin1") + b"\x86q\x01R")
         + (ENCODE + b"h\x01R") * 300 + b"e", "holds more than 8 MiB"),
        (b"](" + text(b"a" * MILLION) + b"q\x00" + (ENCODE + b"h\x00" + text(b"latin1") + b"\x86R") * 300 + b"e",
         "holds more than 8 MiB"),
        *((b"](](" + b"K\x01" * 99_999 + b"eq\x00" + (f"c{name}\n".encode() + b"h\x00\x85R") * 3000 + b"e",
           "copies one value many times over") for name in ("builtins\nset", "collections\nOrderedDict")),
        (b"]((" + b"K\x01" * 99_999 + b"tq\x00" + b"ctorch\nSize\nh\x00\x85R" * 3000 + b"e", "copies one value"),
        (b"](](" + b"K\x01" * 99_999 + b"e\x85q\x00" + b"cbuiltins\nset\nh\x00R" * 3000 + b"e", "copies one value"),
        (b"](" + text(b"a" * MILLION) + b"q\x00" + b"cbuiltins\nset\nh\x00\x85R" * 3000 + b"e", "copies one value"),
        *((b"](}q\x00" + b"ccollections\nOrderedDict\n)R" + state + b"b" + b"e", "copies one value")
          for state in (b"h\x00", b"h\x00N\x86", b"Nh\x00\x86")),
    ],
)  # fmt: skip
def test_a_small_file_stays_small_in_memory(tmp_path, whole, pickled, words):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert words in refused(tmp_path, among(whole, pickled))
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200 << 10


def test_a_pickle_of_many_megabytes_is_refused_at_once(tmp_path, whole):
    data = pickles.repacked(whole, data_pkl=b"\x80\x02]" + b"N" * (SIZE_LIMIT + 10))
    start = time.process_time()
    assert "holds more than 8 MiB besides its numbers" in refused(tmp_path, data)
    assert time.process_time() - start < 5


def test_an_archive_may_not_read_as_two(tmp_path, whole):
    """Another pickle under the same name, or one spelt otherwise, before or after the real one."""
    evil = pickles.calling("posix.system", b"(X\x04\x00\x00\x00truet")
    root = zipfile.ZipFile(io.BytesIO(whole)).namelist()[0].partition("/")[0]
    for name in (f"{root}/data.pkl", f"{root}/DATA.PKL", "other/data.pkl"):
        for first in (True, False):
            target = io.BytesIO()
            with zipfile.ZipFile(io.BytesIO(whole)) as source, zipfile.ZipFile(target, "w") as archive:
                records = [(record, source.read(record)) for record in source.namelist()]
                records.insert(1 if first else len(records), (name, evil))
                for record, content in records:
                    with warnings.catch_warnings():
                        warnings.simplefilter("ignore")  # zipfile's own doubts about equal names
                        archive.writestr(record, content)
            assert "has two records of one name" in refused(tmp_path, target.getvalue())


def test_records_that_share_their_bytes_are_refused(tmp_path, whole):
    """Every tensor's record points at the same numbers: little to download, much to hold."""
    data = bytearray(whole)
    with zipfile.ZipFile(io.BytesIO(whole)) as archive:
        large = max(archive.infolist(), key=lambda record: record.file_size)
        start = archive.start_dir
    entries = bytes(data[start:])
    position, changed = 0, bytearray(entries)
    while entries[position : position + 4] == b"PK\x01\x02":
        lengths = struct.unpack("<HHH", entries[position + 28 : position + 34])
        changed[position + 16 : position + 28] = struct.pack("<III", large.CRC, large.file_size, large.file_size)
        changed[position + 42 : position + 46] = struct.pack("<I", large.header_offset)
        position += 46 + sum(lengths)
    data[start:] = changed
    assert any(words in refused(tmp_path, bytes(data)) for words in ("claims more numbers", "damaged"))


def test_every_truncated_file_is_refused(tmp_path, whole):
    for end in np.random.default_rng(0).integers(1, len(whole) - 1, 40).tolist():
        refused(tmp_path, whole[:end])


def test_flipped_bits_are_refused_or_harmless(tmp_path, whole):
    dice, wanted, refusals = np.random.default_rng(1), load(tmp_path, whole, model=MODEL).tensors, 0
    for turn in range(60):
        damaged = bytearray(whole)
        damaged[dice.integers(20_000 if turn % 2 else len(whole))] ^= 1 << int(dice.integers(8))
        try:
            found = load(tmp_path, bytes(damaged), model=MODEL).tensors
        except Mt3Error:
            refusals += 1
        else:
            assert same(found, wanted)
    assert refusals > 30


def test_flipped_bits_of_the_pickle_alone_run_nothing(tmp_path, whole):
    """Past the checksums: whoever changes a file on purpose writes new ones."""
    pickled, dice, outcomes = pickles.pickle_of(whole), np.random.default_rng(2), set()
    for _ in range(40):
        damaged = bytearray(pickled)
        damaged[dice.integers(len(pickled))] ^= 1 << int(dice.integers(8))
        try:
            load(tmp_path, pickles.repacked(whole, data_pkl=bytes(damaged)), "flipped.ckpt", model=MODEL)
            outcomes.add("read")
        except Mt3Error:
            outcomes.add("refused")
    assert outcomes == {"read", "refused"}
    assert [path.name for path in tmp_path.iterdir()] == ["flipped.ckpt"]
