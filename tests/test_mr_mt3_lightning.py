"""Lightning files of MR-MT3 are read without their classes, and nothing that is put into one ever runs."""

from __future__ import annotations

import io
from collections import defaultdict

import pytest
import torch

import pickles
from graph_cases import one_thread
from mr_mt3_states import authors_state, lightning_file, prefixed, read, refused, wanted
from mt3_export.lightning import MR_MT3_STAND_INS
from states import same

pytestmark = pytest.mark.usefixtures("trusted_names")


@pytest.fixture(scope="module", autouse=True)
def threads():
    with one_thread():
        yield


def test_the_file_of_these_tests_needs_its_stand_ins():
    assert MR_MT3_STAND_INS.keys() == {
        "pytorch_lightning.callbacks.model_checkpoint.ModelCheckpoint",
        "pytorch_lightning.callbacks.early_stopping.EarlyStopping",
        "collections.defaultdict", "builtins.dict", "builtins.float", "builtins.int", "builtins.list",
        "numpy.ndarray", "numpy.dtype",
        *(f"numpy.{core}.multiarray.{name}" for core in ("core", "_core") for name in ("scalar", "_reconstruct")),
    }  # fmt: skip
    named = set(torch.serialization.get_unsafe_globals_in_checkpoint(io.BytesIO(lightning_file())))
    assert named < MR_MT3_STAND_INS.keys()
    assert {name.partition(".")[0] for name in named} == {"pytorch_lightning", "collections", "builtins", "numpy"}


@pytest.mark.parametrize("place", ["callbacks", "optimizer_states", "state_dict"])
def test_no_pickle_in_a_file_runs(tmp_path, place):
    marker, careless = tmp_path / "marker", tmp_path / "careless"
    for name, payload in pickles.payloads(marker).items():
        for zipped in (True, False):
            content = prefixed(authors_state()) | {"model.x": payload} if place == "state_dict" else [payload]
            # Without classes that the careless way could not find.
            data = lightning_file(zipped=zipped, **{"callbacks": {}, place: content})
            refused(tmp_path, data)
            assert not marker.exists(), (name, zipped)
            # The same file does run when it is read the careless way, or it would show nothing.
            pickles.run(data, "zip", careless)
            assert marker.exists(), (name, zipped)
            marker.rmdir() if marker.is_dir() else marker.unlink()


@pytest.mark.parametrize(
    "name", ["posix.system", "builtins.eval", "builtins.getattr", "utils.tokenizer.NoteEventTokenizer"]
)
def test_the_name_that_was_met_is_told(tmp_path, name):
    data = pickles.repacked(lightning_file(), data_pkl=pickles.calling(name) + b"segmem_encoder.")
    assert f"holds more than tensors ({name}) and was not opened: save only" in refused(tmp_path, data)


@pytest.mark.parametrize("name", sorted(MR_MT3_STAND_INS))
@pytest.mark.parametrize("arguments", [b")", b"(K\x01K\x02t", b"(cbuiltins\nlist\n]t"])
@pytest.mark.parametrize("build", [b"", b"}(X\x01\x00\x00\x00aK\x01u", b"(N}X\x09\x00\x00\x00__class__K\x01st"])
def test_a_stand_in_is_refused_or_harmless(tmp_path, name, arguments, build):
    data = pickles.repacked(lightning_file(), data_pkl=pickles.calling(name, arguments, build=build))
    message = refused(tmp_path, data)
    assert any(words in message for words in ("holds no dictionary of tensors", "damaged"))


def test_a_state_dict_in_a_defaultdict_is_a_state_dict(tmp_path):
    state = defaultdict(list, prefixed(authors_state()))
    assert same(read(tmp_path, lightning_file(state_dict=state)).tensors, wanted())
