"""Our network beside the authors' own, live in the oracle's environment or as recorded in golden data."""

from __future__ import annotations

import logging
import shutil
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch
from torch.nn import functional

from mt3_export.bundle_writer import export_bundle
from mt3_export.checkpoint import Checkpoint, load_checkpoint
from mt3_export.lowering import Eager
from mt3_export.network import sinusoid
from mt3_export.state import expected_shapes
from mt3_runtime.backends.ort import OrtBackend
from mt3_runtime.bundle import open_bundle
from mt3_runtime.decoding import DecodingRules, Row, decode_rows
from oracle.authors import (
    GOLDEN,
    STEPS,
    Answer,
    ask,
    find_python,
    fingerprint,
    log_mel_frames,
    thin,
    tiny_checkpoint,
)
from oracle.ours import equal_tokens, relative_error, run_graphs, run_modules, state_errors, step_errors

if TYPE_CHECKING:
    from pathlib import Path

pytest_plugins = ("fixtures_full",)

LIMIT = 1e-5  # relative error in norm, float32 against float32
LOG = logging.getLogger("parity")
LOG.setLevel(logging.INFO)  # pytest -rP shows the figures


@dataclass(frozen=True, slots=True, eq=False)
class Case:
    """One network on both sides. `saved`: the state dict that the authors' network wrote, None for golden data."""

    name: str
    checkpoint: Checkpoint
    folder: Path
    answer: Answer
    saved: Path | None = None


@pytest.fixture(scope="session")
def tiny_parity_folder(tmp_path_factory):
    return export_bundle(tiny_checkpoint(), tmp_path_factory.mktemp("parity") / "tiny")


@pytest.fixture(scope="session")
def live(tmp_path_factory):
    """Ask the authors' network; what it reads and writes, 400 MB at full size, is deleted at the end."""
    python = find_python()
    if python is None:
        pytest.skip("the oracle is not here: build it with scripts/oracle, or set MT3_ORACLE to its python")
    made = []

    def answer(checkpoint):
        folder = tmp_path_factory.mktemp("oracle")
        made.append(folder)
        return ask(python, checkpoint, folder), folder / "state.pth"

    yield answer
    for folder in made:
        shutil.rmtree(folder)


@pytest.fixture(scope="session")
def golden_case(tiny_parity_folder):
    with np.load(GOLDEN, allow_pickle=False) as file:
        arrays = dict(file)
    checkpoint = tiny_checkpoint()
    asked = fingerprint(checkpoint.tensors, log_mel_frames())
    assert arrays.pop("question") == asked, "weights or features changed: run tests/oracle/make_parity_goldens.py"
    return Case("golden", checkpoint, tiny_parity_folder, Answer(**arrays))


@pytest.fixture(scope="session")
def tiny_case(live, tiny_parity_folder):
    checkpoint = tiny_checkpoint()
    answer, saved = live(checkpoint)
    return Case("tiny", checkpoint, tiny_parity_folder, answer, saved)


@pytest.fixture(scope="session")
def full_case(live, full_checkpoint, request):
    answer, saved = live(full_checkpoint)
    return Case("full", full_checkpoint, request.getfixturevalue("full_folder"), answer, saved)


@pytest.fixture(scope="session", params=["golden", "tiny", "full"])
def case(request):
    return request.getfixturevalue(f"{request.param}_case")


@pytest.fixture(scope="session", params=["tiny", "full"])
def live_case(request):
    return request.getfixturevalue(f"{request.param}_case")


@pytest.mark.filterwarnings("always:near-tie:UserWarning")
@pytest.mark.parametrize("form", ["graphs", "modules"])
def test_states_and_forced_steps_are_the_authors(case, form):
    source = {"graphs": case.folder, "modules": case.checkpoint}[form]
    run = {"graphs": run_graphs, "modules": run_modules}[form]
    states, logits = run(source, log_mel_frames(), case.answer.tokens)
    encoder, steps = state_errors(states, case.answer), step_errors(logits, case.answer)
    equal = equal_tokens(logits, case.answer)
    LOG.info(
        "%s %s: encoder %.1e, worst step %.1e, median step %.1e, %d of %d tokens, smallest gap %.1e",
        case.name, form, encoder.max(), steps.max(), np.median(steps), equal, steps.size, case.answer.gaps.min(),
    )  # fmt: skip
    assert (encoder <= LIMIT).all()
    assert steps.shape == (STEPS, len(states))
    assert (steps <= LIMIT).all()


def test_greedy_decoding_gives_the_tokens_of_the_authors_generate(case):
    # Two slots for three rows: one row waits for a place and then decodes beside another that is further on.
    backend = OrtBackend(open_bundle(case.folder), slots=2, length=STEPS, threads=2)
    states = backend.encode(log_mel_frames())[:, 0]
    statuses = []
    for end, generated in zip(case.answer.ends.tolist(), case.answer.generated.tolist(), strict=True):
        rows = [Row(key, row) for key, row in enumerate(states)]
        decoded = {row.key: row for row in decode_rows(backend, rows, DecodingRules(0, end, STEPS))}
        assert sorted(decoded) == list(range(len(rows)))
        for key, sequence in enumerate(generated):
            # The authors append the end token, then padding until the last row has ended.
            wanted = sequence[: sequence.index(end)] if end in sequence else sequence
            assert decoded[key].tokens.tolist() == wanted
            assert decoded[key].status == ("ended" if end in sequence else "truncated")
            statuses.append(decoded[key].status)
    LOG.info("%s generate: %s", case.name, statuses)
    assert {"ended", "truncated"} == set(statuses)


def test_positions_are_the_authors(case):
    width = case.checkpoint.model.d_model
    assert relative_error(sinusoid(1024, width, 256)[::33].numpy(), case.answer.positions).max() <= 1e-6
    assert relative_error(sinusoid(1024, width, 255)[::33].numpy(), case.answer.positions).max() > 0.1


def test_positions_of_magenta_follow_its_formula():
    # magenta/mt3 `layers.py`, `sinusoidal`: computed in float64, kept in float32
    frequencies = np.exp(-np.log(10000.0) / 255 * np.arange(256))
    angles = np.arange(1024)[:, None] * frequencies
    wanted = np.concatenate((np.sin(angles), np.cos(angles)), axis=1)
    assert np.abs(sinusoid(1024, 512, 255).numpy() - wanted).max() <= 2**-24


def test_a_state_dict_of_the_authors_network_is_read_back(live_case):
    wanted, model = live_case.checkpoint.tensors, live_case.checkpoint.model
    saved = torch.load(live_case.saved, weights_only=True)
    assert len(saved) == len(expected_shapes(model)) + 4  # two second names, two constants
    assert live_case.name != "full" or len(saved) == 193
    options = {name: getattr(model, name) for name in ("num_heads", "max_length", "position_base")}
    loaded = load_checkpoint(live_case.saved, frontend="ddsp", mel_norm=False, **options)
    assert loaded.model == replace(model, name="state")
    assert loaded.tensors.keys() == wanted.keys()
    assert all(torch.equal(loaded.tensors[key], wanted[key]) for key in wanted)
    assert loaded.warnings == ()


def test_golden_data_are_what_the_authors_network_says_today(tiny_case, golden_case):
    found, golden = thin(tiny_case.answer), golden_case.answer
    for name in ("tokens", "ends", "generated", "columns"):
        assert np.array_equal(getattr(found, name), getattr(golden, name)), name
    for name in ("states", "logits", "positions"):
        assert relative_error(getattr(found, name), getattr(golden, name)).max() <= LIMIT, name
    assert GOLDEN.stat().st_size < 300_000


class ExactGelu(Eager):
    def gelu(self, x):
        return functional.gelu(x)


class ScaledAttention(Eager):
    def attention(self, query, key, value, heads):
        return super().attention(query / key.shape[-1] ** 0.5, key, value, heads)


def swap_key_and_value(checkpoint):
    name = "decoder.block.1.layer.1.EncDecAttention.{}.weight"
    tensors = dict(checkpoint.tensors)
    tensors[name.format("k")], tensors[name.format("v")] = tensors[name.format("v")], tensors[name.format("k")]
    return replace(checkpoint, tensors=tensors)


FAULTS = {
    "positions of Magenta": (lambda found: replace(found, model=replace(found.model, position_base=255)), Eager),
    "other heads": (lambda found: replace(found, model=replace(found.model, num_heads=6, d_kv=8)), Eager),
    "key for value in one layer": (swap_key_and_value, Eager),
    "exact GELU": (lambda found: found, ExactGelu),
    "scaled attention": (lambda found: found, ScaledAttention),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_network_with_one_fault_is_noticed(golden_case, fault):
    change, ops = FAULTS[fault]
    answer = golden_case.answer
    _, logits = run_modules(change(golden_case.checkpoint), log_mel_frames(), answer.tokens, ops())
    assert np.median(step_errors(logits, answer)) > 5 * LIMIT


def test_a_late_or_early_token_is_noticed(golden_case):
    answer = golden_case.answer
    _, logits = run_modules(golden_case.checkpoint, log_mel_frames(), np.roll(answer.tokens, 1, axis=0))
    assert (step_errors(logits, answer)[2:] > 5 * LIMIT).all()
    with pytest.raises(AssertionError, match="another token"):
        equal_tokens(logits, answer)


def test_a_near_tie_is_warned_of_and_not_counted_as_equal(golden_case):
    answer, place = golden_case.answer, (5, 2)
    logits = np.zeros((*answer.tokens.shape, 1536), np.float32)
    np.put_along_axis(logits, answer.tokens[..., None], 1, axis=-1)
    assert equal_tokens(logits, answer) == answer.tokens.size
    logits[*place, (answer.tokens[place] + 1) % 1536] = 1.5
    with pytest.raises(AssertionError, match="step 5, segment 2"):
        equal_tokens(logits, answer)
    gaps = answer.gaps.copy()
    gaps[place] = 5e-5
    with pytest.warns(UserWarning, match="near-tie at step 5, segment 2"):
        assert equal_tokens(logits, replace(answer, gaps=gaps)) == answer.tokens.size - 1
