"""A manifest is read when it is exactly what the writer writes, and refused in every other case."""

from __future__ import annotations

import hashlib
import json
import time
from dataclasses import replace

import numpy as np
import pytest

from bundle_cases import changed, check_message, leaves, refusal, seal
from mt3_runtime.errors import BundleError
from mt3_runtime.graphs import graph_specs
from mt3_runtime.manifest import (
    MANIFEST_LIMIT,
    FileRecord,
    GraphFile,
    Manifest,
    Origin,
    read_manifest,
    write_manifest,
)
from mt3_runtime.specs import FeatureSpec, MemorySpec, ModelSpec, VocabularySpec

MODEL = ModelSpec("mt3", "tiny", 32, 2, 16, 48, 2, 1, 1536, 255, 96, 0, 1)
MT3 = ModelSpec("mt3", "mt3", 512, 6, 64, 1024, 8, 8, 1536, 255, 1024, 0, 1)
FEATURES = FeatureSpec("ddsp", mel_norm=False)
MEMORY = MemorySpec("context", length=4, span=96, fill_token=0, first_tokens=(1134, 1))
TOOLS = {"torch": "2.13.0+cpu", "onnxscript": "0.7.2", "onnx_ir": "1.1.0"}


def make(model: ModelSpec = MODEL, precisions: tuple[str, ...] = ("fp32",), notice: str = "for tests") -> Manifest:
    graphs, files = [], {}
    for precision in precisions:
        weights = f"weights.{precision}.bin"
        for lowering in ("ort", "tensorrt"):
            for name in graph_specs(model, FEATURES):
                entry = GraphFile(name, lowering, precision, f"{name}.{precision}.{lowering}.onnx", weights)
                graphs.append(entry)
                files[entry.file] = FileRecord(10**6, hashlib.sha256(entry.file.encode()).hexdigest())
        files[weights] = FileRecord(10**9, hashlib.sha256(weights.encode()).hexdigest())
    return Manifest(
        format="mt3-runtime-bundle",
        version=3,
        model=model,
        features=FEATURES,
        vocabulary=VocabularySpec(),
        contracts=tuple(graph_specs(model, FEATURES).values()),
        graphs=tuple(graphs),
        files=files,
        origin=Origin("weights.pth", hashlib.sha256(b"").hexdigest(), "fp32", "mt3-runtime 0.1.0", TOOLS, notice),
    )


WEIGHTS = "weights.fp32.bin"
TEXT = write_manifest(make())
DATA = json.loads(TEXT)
CONTRACT_LEAVES = [path for path in leaves(DATA["contracts"], ("contracts",)) if len(path) > 1]
ALIKE = {"contracts": [], "graphs": DATA["graphs"][:1], "files": {WEIGHTS: DATA["files"][WEIGHTS]}}
OTHER_LEAVES = list(leaves({**DATA, **ALIKE}))  # one of each kind
ODD = [None, True, 0, -1, 2.5, 10**400, "", "x", "..", "a\nb", [[]], {"a": 1}]


def test_it_is_read_back_as_it_was():
    assert read_manifest(TEXT) == make()
    assert write_manifest(read_manifest(TEXT)) == TEXT


def test_it_ends_with_the_hash_of_everything_else():
    assert list(DATA)[-1] == "checksum"
    assert seal(DATA) == TEXT
    line = f',\n "checksum": "{DATA["checksum"]}"'
    assert hashlib.sha256(TEXT.replace(line.encode(), b"")).hexdigest() == DATA["checksum"]


def test_a_flip_in_any_byte_is_refused():
    generator = np.random.default_rng(1)
    flips = np.where(generator.random(len(TEXT)) < 0.5, 1 << generator.integers(8, size=len(TEXT)), 0)
    flips = np.where(flips, flips, generator.integers(1, 256, len(TEXT)))  # a bit, or any number of them
    for place, flip in enumerate(flips.tolist()):
        damaged = bytearray(TEXT)
        damaged[place] ^= flip
        refusal(read_manifest, bytes(damaged))


def test_every_bit_of_the_free_texts_counts():
    # schema and contracts say nothing about these; only the checksum does
    for text in ("for tests", "weights.pth", "mt3-runtime 0.1.0", "2.13.0+cpu", '"tiny"'):
        start = TEXT.index(text.encode())
        for bit in range(8 * len(text)):
            damaged = bytearray(TEXT)
            damaged[start + bit // 8] ^= 1 << bit % 8
            refusal(read_manifest, bytes(damaged))


def test_a_byte_more_or_less_anywhere_is_refused():
    for place in range(0, len(TEXT), 7):
        refusal(read_manifest, TEXT[:place] + TEXT[place + 1 :])
        refusal(read_manifest, TEXT[:place] + b" \n0\x00"[place % 4 :][:1] + TEXT[place:])


def test_every_shorter_text_is_refused():
    for length in range(len(TEXT)):
        refusal(read_manifest, TEXT[:length])


@pytest.mark.parametrize(
    "text",
    [
        json.dumps(DATA).encode(),
        json.dumps(DATA, indent=1).encode(),
        json.dumps(DATA, indent=2).encode() + b"\n",
        json.dumps(DATA, indent=1, sort_keys=True).encode() + b"\n",
        json.dumps(DATA, indent=1).replace("tiny", "t\\u0069ny").encode() + b"\n",
        TEXT.replace(b"\n", b"\r\n"),
        TEXT.replace(b"20.0", b"2e1"),
        seal(changed(DATA, ("features", "f_min"), 20)),
        seal({key: DATA[key] for key in reversed(DATA)}),
        TEXT.replace(DATA["checksum"].encode(), DATA["checksum"].upper().encode()),
        TEXT[: TEXT.rindex(b",")] + b"\n}\n",
    ],
    ids=["dense", "no end", "wide", "sorted", "escaped", "crlf", "exponent", "int", "order", "case", "no checksum"],
)
def test_another_spelling_of_the_same_content_is_refused(text):
    refusal(read_manifest, text)


def test_the_limit_is_exact():
    room = MANIFEST_LIMIT - len(TEXT) + len("for tests")
    largest = write_manifest(make(notice="n" * room))
    assert len(largest) == MANIFEST_LIMIT
    assert read_manifest(largest).origin.notice == "n" * room
    assert "larger than 65536 bytes" in refusal(read_manifest, write_manifest(make(notice="n" * (room + 1))))
    assert "larger than 65536 bytes" in refusal(read_manifest, TEXT + b" " * MANIFEST_LIMIT)


@pytest.mark.parametrize("value", [None, "mt3-runtime-bundle2", "", 1, ["mt3-runtime-bundle"], True])
def test_another_format_is_refused(value):
    assert "is not of a mt3-runtime-bundle" in refusal(read_manifest, seal(changed(DATA, ("format",), value)))


@pytest.mark.parametrize("text", [b"[]", b"1", b"null", b'"mt3-runtime-bundle"', b"{}"])
def test_what_is_no_object_is_refused(text):
    assert "is not of a mt3-runtime-bundle" in refusal(read_manifest, text)


@pytest.mark.parametrize("value", [1, 2, 4, 0, -1, True, 3.0, "3", None, [1], 10**30, {"a": [[[]]]}])
def test_another_version_is_refused_whatever_else_it_holds(value):
    future = seal({"format": "mt3-runtime-bundle", "version": value, "something": "new"})
    assert "but this runtime reads 3: export it" in refusal(read_manifest, future)


@pytest.mark.parametrize("path", OTHER_LEAVES, ids=lambda path: ".".join(map(str, path)))
def test_odd_values_are_refused_or_kept_as_they_are(path):
    """Sealed, so that the schema alone stands against whoever wrote them."""
    for value in ODD:
        text = seal(changed(DATA, path, value))
        try:
            manifest = read_manifest(text)
        except BundleError as error:
            check_message(error)
        else:
            assert write_manifest(manifest) == text


@pytest.mark.parametrize("extra", ["extra", "Format", "checksums", "__class__"])
def test_unknown_keys_are_refused_everywhere(extra):
    objects = [(), ("model",), ("features",), ("vocabulary",), ("contracts", 0), ("contracts", 1, "outputs", 0)]
    objects += [("graphs", 3), ("files", WEIGHTS), ("origin",)]
    for path in objects:
        assert f"unknown key {extra!r}" in refusal(read_manifest, seal(changed(DATA, (*path, extra), 1)))


def test_every_key_is_needed():
    named = [path for path in leaves(DATA) if isinstance(path[-1], str)]
    free = [("checksum",), *(("origin", "tools", name) for name in TOOLS)]  # `seal` writes the first again
    assert len(named) > 120
    for path in set(named) - set(free):
        data = changed(DATA, path, None)
        place = data
        for key in path[:-1]:
            place = place[key]
        del place[path[-1]]
        refusal(read_manifest, seal(data))


def test_any_change_of_a_contract_is_refused():
    for path in CONTRACT_LEAVES:
        for value in ("float32", "rows", 7):
            data = changed(DATA, path, value)
            if data != DATA:
                refusal(read_manifest, seal(data))


@pytest.mark.parametrize("index", [0, 1, 2])
def test_contracts_are_complete_and_in_order(index):
    contracts = DATA["contracts"]
    without = contracts[:index] + contracts[index + 1 :]
    for other in (without, [*contracts, contracts[index]], without + [contracts[index]] * 2, contracts[::-1]):
        assert "other inputs or outputs" in refusal(read_manifest, seal({**DATA, "contracts": other}))
    for side in ("inputs", "outputs"):
        tensors = contracts[index][side]
        for other in (tensors[1:], tensors + tensors[:1], []):
            data = changed(DATA, ("contracts", index, side), other)
            assert "other inputs or outputs" in refusal(read_manifest, seal(data))


@pytest.mark.parametrize(
    ("section", "name", "value"),
    [
        ("model", "d_model", 64),
        ("model", "num_heads", 4),
        ("model", "d_kv", 8),
        ("model", "decoder_layers", 3),
        ("model", "vocab_size", 1535),
        ("features", "segment_samples", 128 * 128),
        ("features", "bins", 256),
    ],
)
def test_a_model_of_other_sizes_than_its_graphs_is_refused(section, name, value):
    text = seal(changed(DATA, (section, name), value))
    assert "other inputs or outputs than the model" in refusal(read_manifest, text)


@pytest.mark.parametrize("name", [name for name, value in DATA["model"].items() if type(value) is int])
@pytest.mark.parametrize("value", [2**20 + 1, 10**9, 2**63, 10**400])
def test_made_up_sizes_are_refused_before_they_are_spelled_out(name, value):
    start = time.process_time()
    refusal(read_manifest, seal(changed(DATA, ("model", name), value)))
    assert time.process_time() - start < 1


def consistent(model: ModelSpec, features: FeatureSpec, vocabulary: VocabularySpec) -> Manifest:
    contracts = tuple(graph_specs(model, features).values())
    return replace(make(), model=model, features=features, vocabulary=vocabulary, contracts=contracts)


@pytest.mark.parametrize(
    ("model", "features", "vocabulary"),
    [
        (replace(MODEL, max_length=2**20, d_kv=2**10), FEATURES, VocabularySpec()),
        (replace(MODEL, num_heads=2**20), FEATURES, VocabularySpec()),
        (MODEL, replace(FEATURES, hop_length=1, segment_samples=2**20), VocabularySpec()),
        (MODEL, replace(FEATURES, fft_length=2**20), VocabularySpec()),
        (MODEL, replace(FEATURES, hop_length=2**21, segment_samples=2**21), VocabularySpec()),
        (MODEL, replace(FEATURES, sample_rate=2**21), VocabularySpec()),
        (MODEL, FEATURES, VocabularySpec(max_shift_steps=2**40)),
        (MODEL, FEATURES, VocabularySpec(velocity_bins=2**40)),
        (MODEL, FEATURES, VocabularySpec(special_tokens=2**40)),
    ],
)
def test_sizes_that_agree_but_fit_no_machine_are_refused(model, features, vocabulary):
    refusal(consistent, model, features, vocabulary)


def test_the_largest_models_of_the_family_fit():
    large = replace(MT3, d_model=1024, num_heads=16, d_ff=4096, encoder_layers=24, decoder_layers=24)
    assert read_manifest(write_manifest(consistent(large, FEATURES, VocabularySpec()))).model == large


@pytest.mark.parametrize("injection", ["context", "prefix"])
def test_a_memory_is_read_back_and_brings_graphs(injection):
    model = replace(MODEL, memory=replace(MEMORY, injection=injection))
    text = write_manifest(make(model))
    manifest = read_manifest(text)
    assert manifest == make(model)
    shapes = {spec.name: [tensor.shape for tensor in spec.inputs] for spec in manifest.contracts}
    behind = 4 if injection == "context" else 0
    assert list(shapes) == ["encoder", "memory", "cross_kv", *["prefix"] * (not behind), "decode_step"]
    assert shapes["cross_kv"][1:] == ([("rows", 4, 32)] if behind else [])
    assert ("rows", 2, 256 + behind, 16) in shapes["decode_step"]
    assert (model.extra_context, model.prefix_length, model.positions) == (behind, 4 - behind, 100 - behind)


MEMORY_DATA = json.loads(write_manifest(make(replace(MODEL, memory=MEMORY))))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("injection", "suffix"),
        ("length", 0),
        ("length", 97),
        ("length", 5),  # other graphs
        ("span", 3),
        ("span", 2**20 + 1),
        ("fill_token", -1),
        ("fill_token", 1536),
        ("first_tokens", [1134, 1536]),
        ("first_tokens", [True]),
        ("first_tokens", [1] * 97),
        ("first_tokens", 1),
        ("extra", 1),
    ],
)
def test_a_memory_that_cannot_be_is_refused(name, value):
    refusal(read_manifest, seal(changed(MEMORY_DATA, ("model", "memory", name), value)))


@pytest.mark.parametrize("value", [1, [], "x", {}, {"length": 4}])
def test_a_memory_is_one_or_none(value):
    refusal(read_manifest, seal(changed(DATA, ("model", "memory"), value)))


def test_a_memory_of_several_channels_is_refused():
    with pytest.raises(BundleError, match="several channels"):
        replace(MODEL, memory=MEMORY, channels=13)


def test_a_memory_that_fits_no_machine_is_refused():
    for memory in (replace(MEMORY, span=2**20), replace(MEMORY, length=2**20, span=2**20)):
        model = replace(MODEL, d_model=1024, max_length=1024, memory=memory)
        refusal(consistent, model, FEATURES, VocabularySpec())


@pytest.mark.parametrize(
    "name",
    [
        "..",
        "../weights.fp32.bin",
        "/etc/passwd",
        "sub/weights.bin",
        "sub\\weights.bin",
        "./weights.bin",
        ".weights.bin",
        "weights",
        "weights.",
        "weights..bin",
        "Weights.bin",
        "weights.BIN",
        "weights.bin\n",
        "weights.bin\u0000",
        "weights .bin",
        "we\u0131ghts.bin",  # a dotless i, which some file systems fold
        "\uff57eights.bin",  # a full-width w
        "wei\u212ahts.bin",  # the Kelvin sign
        "manifest.json",
        "",
        "con.",
        "~.bin",
        "$HOME.bin",
        "weights-1.bin",
    ],
)
def test_odd_file_names_are_refused(name):
    record = DATA["files"][WEIGHTS]
    listed = changed(DATA, ("files", name), record)
    used = changed(listed, ("graphs", 0, "weights"), name)
    for data in (
        listed,
        used,
        changed(DATA, ("graphs", 0, "file"), name),
        changed(DATA, ("graphs", 0, "weights"), name),
    ):
        refusal(read_manifest, seal(data))


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("size",), -1),
        (("size",), True),
        (("size",), 1.0),
        (("size",), "1"),
        (("sha256",), ""),
        (("sha256",), "0" * 63),
        (("sha256",), "0" * 65),
        (("sha256",), "G" * 64),
        (("sha256",), "A" * 64),
        (("sha256",), "0" * 64 + "\n"),
        (("sha256",), "\u0660" * 64),  # digits, of another script
    ],
)
def test_file_records_are_checked(path, value):
    refusal(read_manifest, seal(changed(DATA, ("files", WEIGHTS, *path), value)))


def test_a_graph_stands_once_in_each_form():
    twice = {**DATA, "graphs": DATA["graphs"] + DATA["graphs"][:1]}
    assert "stands twice" in refusal(read_manifest, seal(twice))


@pytest.mark.parametrize(("key", "value"), [("graph", "vocoder"), ("lowering", "onnx"), ("precision", "int3")])
def test_unknown_forms_are_refused(key, value):
    refusal(read_manifest, seal(changed(DATA, ("graphs", 2, key), value)))


def test_the_full_model_in_many_precisions_fits_the_limit():
    one, many = (
        len(write_manifest(make(MT3, names))) for names in (("fp32",), ("fp32", "fp16", "bf16", "int8", "fp8"))
    )
    assert many < MANIFEST_LIMIT
    assert one < MANIFEST_LIMIT // 2
    each = (many - one) // 4
    assert one + 8 * each < MANIFEST_LIMIT  # eight more than today
