"""Our graphs of the five YourMT3 models beside the authors' own networks, live in the oracle's environment."""

from __future__ import annotations

import functools
import logging
import os
import shutil
import subprocess
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING
from unittest import mock

import numpy as np
import pytest
import torch

from feature_cases import RATE, chord, noise
from mt3_export import bundle_writer
from mt3_export.checkpoint import load_checkpoint
from mt3_export.lowering import LOWERINGS, Eager
from mt3_export.network import build_modules
from mt3_runtime.backends.ort import LOWERING, OrtBackend
from mt3_runtime.bundle import open_bundle
from mt3_runtime.decoding import DecodingRules, Row, decode_rows
from mt3_runtime.features import feature_extractor
from oracle.authors import HERE, find_python
from oracle.ours import UNWRITTEN, open_graphs, relative_error, shifted

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from mt3_export.checkpoint import Checkpoint

TINY = ("ymt3plus", "yptf-single", "yptf-multi", "yptf-moe-multi")
SHIFTED = "yptf-moe-multi-ps"  # the network of yptf-moe-multi, in a file with more in it
ENTRIES = 655  # of the state dict of yptf-moe-multi at full size
LIMIT = 2e-5  # relative error in norm, float32 against float32
# With these seeds no two best logits and no two experts are nearly equal, so that rounding cannot choose.
SEEDS = {"ymt3plus": 4, "yptf-single": 4, "yptf-multi": 8, "yptf-moe-multi": 3, SHIFTED: 3}
FULL_SEED = 7
STEPS = {"tiny": 24, "full": 64}
SAMPLES = 32_767
LOG = logging.getLogger("parity")
LOG.setLevel(logging.INFO)  # pytest -rP shows the figures


@dataclass(frozen=True, slots=True, eq=False)
class Case:
    """One network on both sides. `answer`: the arrays of `stages` in tests/oracle/authors_yourmt3.py."""

    name: str
    checkpoint: Checkpoint
    answer: Mapping[str, np.ndarray]


def audio() -> np.ndarray:
    """Music and a swelling sweep, both over loud noise: [2, SAMPLES] float32.

    Without the noise the smallest of all bins, by which every other is scaled, would lie within the rounding of the
    authors' float32 transform, and features could not be compared (see tests/oracle/make_yourmt3_goldens.py).
    """
    seconds = np.arange(SAMPLES) / RATE
    sweep = 0.5 * np.sin(2 * np.pi * (90 + 700 * seconds) * seconds) * seconds / seconds[-1]
    hiss = 0.3 * noise(2 * SAMPLES).reshape(2, -1)
    return (np.stack([0.3 * chord(SAMPLES), sweep]) + hiss).astype(np.float32)


@pytest.fixture(scope="session")
def ask(tmp_path_factory):
    """Ask the authors' networks; what they write, 300 MB at full size, is deleted at the end."""
    python = find_python()
    if python is None:
        pytest.skip("the oracle is not here: build it with scripts/oracle, or set MT3_ORACLE to its python")
    made = []

    def run(size: str, *models: str) -> Path:
        folder = tmp_path_factory.mktemp("oracle")
        made.append(folder)
        np.save(folder / "audio.npy", audio())
        seeds = [str(SEEDS[model] if size == "tiny" else FULL_SEED) for model in models]
        options = {"size": size, "steps": STEPS[size], "audio": folder / "audio.npy", "output": folder}
        command = [python, HERE / "run_yourmt3.py", "--model", *models, "--seed", *seeds]
        command += [str(part) for name, value in options.items() for part in (f"--{name}", value)]
        environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
        environment |= {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error"}
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=900, check=False)
        assert done.returncode == 0, f"the oracle failed, build it again with scripts/oracle:\n{done.stderr[-2000:]}"
        return folder

    yield run
    for folder in made:
        shutil.rmtree(folder)


@pytest.fixture(scope="session")
def tiny_folder(ask):
    return ask("tiny", *TINY, SHIFTED)


@pytest.fixture(scope="session")
def find_case(ask, request):
    """Any network at a tiny size by its name, or "full": yptf-moe-multi at full size."""

    @functools.cache
    def find(name: str) -> Case:
        model = "yptf-moe-multi" if name == "full" else name
        folder = ask("full", model) if name == "full" else request.getfixturevalue("tiny_folder")
        with np.load(folder / f"{model}.npz", allow_pickle=False) as arrays:
            return Case(name, load_checkpoint(folder / f"{model}.ckpt", model=model), dict(arrays))

    return find


@pytest.fixture(scope="session", params=[*TINY, "full"])
def case(request, find_case):
    return find_case(request.param)


@pytest.fixture(scope="session")
def folder(case, tmp_path_factory):
    """The bundle of `case`; of the tiny ones only what is run, as tracing takes most of the time here."""
    traced = {LOWERING: LOWERINGS[LOWERING]} if case.name != "full" else LOWERINGS
    with mock.patch.object(bundle_writer, "LOWERINGS", traced):
        written = bundle_writer.export_bundle(case.checkpoint, tmp_path_factory.mktemp("parity") / case.name)
    yield written
    shutil.rmtree(written)


def run_graphs(case: Case, folder: Path) -> dict[str, np.ndarray]:
    """What our graphs compute of the authors' features, when each step is fed the authors' token before it."""
    call = open_graphs(folder)
    tokens = case.answer["tokens"]  # [segments, channels, steps]
    states = call("encoder", case.answer["features"])[0]
    cross = call("cross_kv", states.reshape(-1, *states.shape[2:]))
    rows, heads, _, width = cross[0].shape
    cache = [np.full((rows, heads, tokens.shape[-1], width), UNWRITTEN, np.float32) for _ in cross]
    logits, log_probs = [], []
    for step, token in enumerate(shifted(tokens.reshape(rows, -1).T)):
        chosen, log_prob, *cache, found = call("decode_step", token, np.full(rows, step, np.int32), *cross, *cache)
        assert (chosen == found.argmax(-1)).all()
        logits.append(found)
        log_probs.append(log_prob)
    key, value = np.stack(cross[: len(cross) // 2]), np.stack(cross[len(cross) // 2 :])
    found = {"states": states, "cross_key": key, "cross_value": value}
    found |= {"logits": np.stack(logits, 1).reshape(*tokens.shape, -1)}
    return found | {"log_prob": np.stack(log_probs, 1).reshape(tokens.shape)}


def errors(found: np.ndarray, wanted: np.ndarray, axes: int) -> np.ndarray:
    """Relative error in norm over the last `axes` axes."""
    assert found.shape == wanted.shape
    shape = (*wanted.shape[:-axes], -1)
    return relative_error(found.reshape(shape), wanted.reshape(shape))


def test_features_are_the_authors(case):
    spec, wanted = case.checkpoint.features, case.answer["features"]
    found = feature_extractor(spec)(audio(), [spec.segment_frames] * len(audio()))
    error = errors(found, wanted, 2)
    LOG.info("%s: features %.1e", case.name, error.max())
    assert (error <= LIMIT).all()


def test_every_stage_of_the_graphs_is_the_authors(case, folder):
    found, answer = run_graphs(case, folder), case.answer
    worst = {name: errors(found[name], answer[name], axes) for name, axes in
             (("states", 2), ("cross_key", 3), ("cross_value", 3), ("logits", 1))}  # fmt: skip
    second, first = np.moveaxis(np.sort(answer["logits"], axis=-1)[..., -2:], -1, 0)
    LOG.info(
        "%s: %s; smallest gap of logits %.1e, of routers %.1e",
        case.name, ", ".join(f"{name} {error.max():.1e}" for name, error in worst.items()),
        (first - second).min(), answer.get("router_gap", np.array([np.inf])).min(),
    )  # fmt: skip
    for error in worst.values():
        assert (error <= LIMIT).all()
    assert np.array_equal(found["logits"].argmax(-1), answer["tokens"])
    # The logits of training carry the factor that makes them probabilities.
    exact = answer["logits"].astype(np.float64)
    exact = exact.max(-1) - np.log(np.exp(exact).sum(-1))
    assert np.abs(found["log_prob"] - exact).max() <= 1e-4


def test_free_decoding_gives_the_tokens_of_the_authors_loop(case, folder):
    answer = case.answer
    segments, channels, steps = answer["tokens"].shape
    # Fewer slots than rows: most rows wait and then decode beside others that are further on.
    slots = max(1, 2 * segments * channels // 3)
    backend = OrtBackend(open_bundle(folder), slots=slots, length=steps, threads=2)
    states = backend.encode(answer["features"])
    statuses = []
    for end, generated in zip(answer["ends"].tolist(), answer["generated"].tolist(), strict=True):
        keys = [(segment, channel) for segment in range(segments) for channel in range(channels)]
        rules = DecodingRules(0, end, steps, first_may_end=False)
        decoded = {row.key: row for row in decode_rows(backend, [Row(key, states[key]) for key in keys], rules)}
        assert sorted(decoded) == keys
        for segment, channel in keys:
            # The authors append the end token, then padding until the last row has ended; a first one does not count.
            wanted, row = generated[segment][channel], decoded[segment, channel]
            ended = end in wanted[1:]
            assert row.tokens.tolist() == (wanted[: wanted.index(end, 1)] if ended else wanted)
            assert row.status == ("ended" if ended else "truncated")
            statuses.append(row.status)
    LOG.info("%s: %d rows ended, %d did not", case.name, statuses.count("ended"), statuses.count("truncated"))
    assert {"ended", "truncated"} == set(statuses)


def test_a_first_token_that_is_the_end_token_is_recorded(case):
    end, tokens = case.answer["ends"][-1], case.answer["generated"][-1]
    assert tokens[0, 0, 0] == end
    assert tokens[0, 0, 1] != -1


def test_what_rounding_could_turn_is_far_from_turning(case):
    assert case.answer.get("router_gap", np.array([1.0])).min() > 1e-5
    second, first = np.moveaxis(np.sort(case.answer["logits"], axis=-1)[..., -2:], -1, 0)
    assert (first - second).min() > 1e-4


def test_the_state_dict_at_full_size_has_the_entries_of_the_published_file(find_case):
    assert find_case("full").answer["entries"] == ENTRIES


def test_a_file_trained_with_pitch_shift_gives_the_same_network(find_case):
    plain, found = find_case("yptf-moe-multi").checkpoint, find_case(SHIFTED).checkpoint
    assert found.model == replace(plain.model, name=SHIFTED)
    assert (found.features, found.design) == (plain.features, plain.design)
    assert found.tensors.keys() == plain.tensors.keys()
    assert all(torch.equal(found.tensors[key], plain.tensors[key]) for key in plain.tensors)
    assert plain.warnings == ()
    (warning,) = found.warnings
    assert "pitch shift" in warning


def with_tensor(name, change):
    def altered(checkpoint):
        return replace(checkpoint, tensors={**checkpoint.tensors, name: change(checkpoint.tensors[name])})

    return altered


def with_design(**changes):
    return lambda checkpoint: replace(checkpoint, design=replace(checkpoint.design, **changes))


def exchange_branches(checkpoint):
    names = [f"encoder.blocks.1.temporal_transformer.1.mlp.experts.2.{part}.weight" for part in ("w1", "gate")]
    first, second = (checkpoint.tensors[name] for name in names)
    return replace(checkpoint, tensors={**checkpoint.tensors, names[0]: second, names[1]: first})


FAULTS = {
    "none": lambda checkpoint: checkpoint,
    "no running mean": with_tensor("pre_encoder.0.blocks.1.bn2.running_mean", torch.zeros_like),
    "latents in another order": with_tensor("encoder.latent_array.latents", lambda latents: latents.flip(0)),
    "another rotation of frames": with_tensor("encoder.rotary_emb_temporal.freqs", lambda freqs: freqs * 1.01),
    "another rotation of latents": with_tensor("encoder.rotary_emb_latent.freqs", lambda freqs: freqs * 1.01),
    "branches of one expert exchanged": exchange_branches,
    "channels in another order": with_tensor("pre_decoder.0.linear.weight", lambda weight: weight.roll(64, 1)),
    "no residual": with_design(residual=False),
    "one expert instead of two": with_design(chosen=1),
    "other heads": with_design(heads=4),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_an_encoder_with_one_fault_is_noticed(find_case, fault):
    answer, checkpoint = find_case("yptf-moe-multi").answer, FAULTS[fault](find_case("yptf-moe-multi").checkpoint)
    parts = checkpoint.model, checkpoint.features, checkpoint.tensors, Eager(), checkpoint.design
    with torch.inference_mode():
        states = build_modules(*parts)["encoder"](torch.from_numpy(answer["features"])).numpy()
    error = errors(states, answer["states"], 2)
    LOG.info("%s: states %.1e", fault, error.min())
    assert (error <= LIMIT).all() if fault == "none" else (error > 20 * LIMIT).all()
