"""`bundle`, `verify` and `inspect` of models with a memory."""

from __future__ import annotations

import json
from dataclasses import replace
from types import SimpleNamespace

import pytest

from mr_mt3_states import FEATURES, FIRST, MODELS, SMALL, lightning_file, memory
from mt3_export import checkpoint, cli
from mt3_export.inspection import Inspection
from mt3_runtime.graphs import graph_specs
from mt3_runtime.manifest import FORMAT, VERSION, Manifest, Origin
from mt3_runtime.specs import VocabularySpec


def bundle_of(model):
    """What the commands look at of a bundle: its manifest, and no graph."""
    contracts = tuple(graph_specs(model, FEATURES).values())
    origin = Origin("weights.ckpt", "0" * 64, "fp32", "mt3-runtime 0", {}, "")
    manifest = Manifest(FORMAT, VERSION, model, FEATURES, VocabularySpec(), contracts, (), {}, origin)
    return SimpleNamespace(path="folder", manifest=manifest)


def test_the_options_reach_the_reader(monkeypatch):
    seen = []
    empty = SimpleNamespace(warnings=())
    monkeypatch.setattr(checkpoint, "load_checkpoint", lambda *_, **given: seen.append(given) or empty)
    for command in (["bundle", "--output", "x"], ["verify", "x"]):
        for model in MODELS:
            options = ["--model", model, "--checkpoint", "a.ckpt", "--memory-length", "0"]
            cli.load_checkpoint_of(cli.build_parser().parse_args([*command, *options]))
            assert (seen[-1]["model"], seen[-1]["memory_length"]) == (model, 0)


@pytest.mark.parametrize(
    ("has", "given", "fix"),
    [
        ("mr-mt3", "mt3", "give --model mr-mt3"),
        ("mr-mt3", "mr-mt3-v2", "give --model mr-mt3"),
        ("mr-mt3-v1", "mr-mt3", "give --model mr-mt3-v1"),
        ("mr-mt3-v2", "ymt3plus", "give --model mr-mt3-v2"),
        (None, "ymt3plus", "give --model mt3"),
    ],
)
def test_verify_names_the_model_of_a_bundle_before_weights_are_read(monkeypatch, capsys, has, given, fix):
    bundle = bundle_of(replace(SMALL, memory=memory(has) if has else None))
    monkeypatch.setattr("mt3_runtime.bundle.open_bundle", lambda _: bundle)
    assert cli.main(["verify", "folder", "--checkpoint", "none.ckpt", "--model", given]) == 2
    message = capsys.readouterr().err
    assert f"not of {given}: {fix}\n" in message


@pytest.mark.parametrize(
    ("has", "given", "fix"),
    [
        (8, 12, "8 vectors, weights.ckpt was taken to have 12: give --memory-length 8\n"),
        (8, 0, "8 vectors, weights.ckpt was taken to have 0: give --memory-length 8\n"),
        (0, 8, "taken to have 8: give --memory-length 0, or --model mt3 where it was made from that\n"),
    ],
)
def test_verify_names_the_length_of_a_bundle(tmp_path, monkeypatch, capsys, has, given, fix):
    bundle = bundle_of(replace(SMALL, memory=memory(length=has) if has else None))
    monkeypatch.setattr("mt3_runtime.bundle.open_bundle", lambda _: bundle)
    path = tmp_path / "weights.ckpt"
    path.write_bytes(lightning_file())
    options = ["--model", "mr-mt3", "--num-heads", "2", "--max-length", "64", "--memory-length", str(given)]
    assert cli.main(["verify", "folder", "--checkpoint", str(path), *options]) == 2
    assert fix in capsys.readouterr().err


def test_inspect_shows_the_memory():
    for model, text, told in (
        ("mr-mt3", "context: 8 vectors behind the encoder states", "1134, 1"),
        ("mr-mt3-v1", "prefix: 8 vectors before the first token", "1"),
    ):  # fmt: skip
        inspection = Inspection(bundle_of(replace(SMALL, memory=memory(model))).manifest, "0" * 64, {})
        line = f"memory    {text}, made from 64 tokens of the segment before (first segment: {told})"
        assert line in inspection.to_text().splitlines()
        injection, first = FIRST[model]
        assert json.loads(json.dumps(inspection.to_dict()))["manifest"]["model"]["memory"] == {
            "injection": injection, "length": 8, "span": 64, "fill_token": 0, "first_tokens": list(first),
        }  # fmt: skip
    plain = Inspection(bundle_of(SMALL).manifest, "0" * 64, {})
    assert "memory" not in plain.to_text()
