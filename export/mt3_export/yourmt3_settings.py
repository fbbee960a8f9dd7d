"""How a YourMT3 network is run, where its tensors do not tell: as asked, as the file says, or as published."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING

from mt3_export.hyper_parameters import contradictions, decoder_path, encoder_path, flatten
from mt3_export.settings import overrides, parse_whole, show
from mt3_export.state import printable
from mt3_export.yourmt3_layout import published_layout
from mt3_export.yourmt3_models import MODELS, SEGMENT_SAMPLES
from mt3_runtime.errors import CheckpointError, OptionError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from mt3_export.hyper_parameters import Plain, Said
    from mt3_export.settings import Setting
    from mt3_export.stored import StoredState
    from mt3_export.yourmt3_layout import Layout

OPTIONS = ("num_heads", "max_length")  # all that the command line may say of these models
HEADS = 8  # of every PerceiverTF: the authors' options do not reach it
_FFT_LENGTH = 2048
_F_MIN, _F_MAX = 50.0, 8000.0  # Hz, of mel bins
_MAX_TOKENS = "task_manager.max_total_token_length"
_LARGEST = 1_000_000


@dataclass(frozen=True, slots=True)
class YourMT3Settings:
    """Lengths in samples, frequencies in Hz; `heads`, `residual` and `chosen` as in `PerceiverDesign`."""

    num_heads: int
    max_length: int
    hop_length: int
    segment_samples: int
    fft_length: int
    f_min: float
    f_max: float
    heads: int
    residual: bool
    chosen: int
    warnings: tuple[str, ...] = ()


def refuse_other_options(given: Mapping[str, Setting], model: str) -> None:
    """Raise OptionError for an option that only MT3 has."""
    if others := [name for name in given if name not in OPTIONS]:
        option = "--" + others[0].replace("_", "-")
        raise OptionError(f"{option} is fixed for {model}: leave it out")


def published_settings(model: str, given: Mapping[str, Setting]) -> YourMT3Settings:
    """Settings of a published model, but for those given."""
    return _settings(model, published_layout(MODELS[model]), given, {}, ())


def resolve_yourmt3(
    model: str, layout: Layout, given: Mapping[str, Setting], stored: StoredState, *, published: bool
) -> YourMT3Settings:
    """All settings: those given, else those of the file, else those of the published model.

    Args:
        model: a key of `MODELS`.
        layout: from the tensors.
        given: of `OPTIONS`.
        stored: whose metadata or hyper-parameters may say more.
        published: whether the file was recognised by its hash.

    Raises:
        CheckpointError: the file contradicts itself or the model, or a setting is nowhere to be found.
    """
    said = _read_said(stored, layout)
    found = contradictions(said, layout, _heads(said, layout))
    if found and not published:
        raise CheckpointError(f"{found[0]}: use another checkpoint")
    # Its authors run a published file by the arguments in the table, whatever it says.
    warnings = [f"the file {line}, which counts" for line in found] if published else _differences(model, layout, said)
    said = {} if published else said
    warnings += [] if published else _assumed(model, layout, given, said)
    if "max_length" in given and (published or _MAX_TOKENS in said):
        known = {"max_length": _whole(said, _MAX_TOKENS, MODELS[model].max_length)}
        warnings += overrides({"max_length": given["max_length"]}, known)
    return _settings(model, layout, given, said, tuple(warnings))


def _settings(
    model: str, layout: Layout, given: Mapping[str, Setting], said: Said, warnings: tuple[str, ...]
) -> YourMT3Settings:
    published, encoder = MODELS[model], encoder_path(layout)
    experts = layout.perceiver.experts if layout.perceiver else 0
    settings = YourMT3Settings(
        num_heads=_num_heads(model, layout, given, said),
        max_length=int(given.get("max_length", _whole(said, _MAX_TOKENS, published.max_length))),
        hop_length=_whole(said, "audio_cfg.hop_length", published.hop_length),
        segment_samples=_whole(said, "audio_cfg.input_frames", SEGMENT_SAMPLES),
        fft_length=_whole(said, "audio_cfg.n_fft", _FFT_LENGTH),
        f_min=_hertz(said, "audio_cfg.f_min", _F_MIN),
        f_max=_hertz(said, "audio_cfg.f_max", _F_MAX),
        heads=_heads(said, layout),
        residual=_truth(said, f"{encoder}.sca_use_query_residual", published.residual),
        chosen=_whole(said, f"{encoder}.moe_topk", published.chosen) if experts else 0,
        warnings=warnings,
    )
    _check(settings, layout)
    return settings


def _check(settings: YourMT3Settings, layout: Layout) -> None:
    if settings.max_length > layout.positions:
        raise CheckpointError(
            f"has positions for {layout.positions} tokens, fewer than max_length {settings.max_length}: ask for less"
        )
    frames = settings.segment_samples // settings.hop_length + 1
    positions = layout.perceiver.positions if layout.perceiver else layout.positions
    if 0 < positions < frames:
        raise CheckpointError(f"has positions for {positions} frames, a segment has {frames}: use another checkpoint")
    sizes = layout.perceiver
    if sizes is None:
        return
    width, rest = divmod(sizes.inner, settings.heads)
    if rest or 2 * sizes.frequencies > width:
        raise CheckpointError(
            f"has attention of width {sizes.inner}, which {settings.heads} heads do not divide or rotate: use another "
            "checkpoint"
        )
    if settings.chosen > sizes.experts:
        raise CheckpointError(f"chooses {settings.chosen} of {sizes.experts} experts: use another checkpoint")


def _read_said(stored: StoredState, layout: Layout) -> Said:
    metadata = stored.metadata or {}
    architecture = metadata.get("architecture", "yourmt3")
    if architecture != "yourmt3":
        raise CheckpointError(f"is of architecture {architecture[:100]!r}: use one of architecture 'yourmt3'")
    hyper_parameters = stored.hyper_parameters or _parse(metadata.get("hyper_parameters", "{}"))
    said = flatten(hyper_parameters, layout)
    for name, path in (("num_heads", f"{decoder_path(layout)}.num_heads"), ("max_length", _MAX_TOKENS)):
        if name in metadata:
            value = parse_whole(name, metadata[name])
            if said.setdefault(path, value) != value:
                other = printable(repr(said[path]))
                raise CheckpointError(
                    f"has {name} {value} in its metadata, {path} {other} in its hyper-parameters: correct one of them"
                )
    return said


def _parse(text: str) -> dict[str, object]:
    try:
        parsed = json.loads(text)
    except (ValueError, RecursionError):
        parsed = None
    if not isinstance(parsed, dict):
        raise CheckpointError("has hyper_parameters in its metadata that are no JSON object: write them as one")
    return parsed


def _num_heads(model: str, layout: Layout, given: Mapping[str, Setting], said: Said) -> int:
    names = [f"{decoder_path(layout)}.num_heads"]
    names += [f"{encoder_path(layout)}.num_heads"] if layout.perceiver is None else []
    counts = {_whole(said, name, 0) for name in names if name in said}
    if len(counts) > 1:
        raise CheckpointError(f"says {' and '.join(map(str, sorted(counts)))} heads of T5: use another checkpoint")
    usual = layout.sizes.inner == published_layout(MODELS[model]).sizes.inner
    known = counts.pop() if counts else MODELS[model].num_heads if usual else None
    asked = given.get("num_heads", known)
    if asked is None:
        raise CheckpointError("does not say num_heads: give --num-heads")
    if known not in (None, asked):
        raise CheckpointError(f"has {known} heads, not {asked}: leave --num-heads out")
    if layout.sizes.inner % int(asked):
        raise CheckpointError(
            f"has attention of width {layout.sizes.inner}, which {asked} heads do not divide: correct num_heads"
        )
    return int(asked)


def _heads(said: Said, layout: Layout) -> int:
    names = [f"{encoder_path(layout)}.num_{kind}_attention_heads" for kind in ("self", "cross")]
    counts = {_whole(said, name, HEADS) for name in names}
    if len(counts) > 1:
        raise CheckpointError(f"says {' and '.join(map(str, sorted(counts)))} heads of PerceiverTF: use another one")
    return counts.pop()


def _sources(model: str, layout: Layout) -> dict[str, tuple[str, Plain]]:
    """Where a file says what only it can say, and what the published model has."""
    published, encoder = MODELS[model], encoder_path(layout)
    sources: dict[str, tuple[str, Plain]] = {
        "max_length": (_MAX_TOKENS, published.max_length),
        "hop_length": ("audio_cfg.hop_length", published.hop_length),
    }
    if layout.perceiver:
        sources["query residual"] = (f"{encoder}.sca_use_query_residual", published.residual)
        if layout.perceiver.experts:
            sources["experts chosen"] = (f"{encoder}.moe_topk", published.chosen)
    return sources


def _constants(model: str, layout: Layout) -> dict[str, tuple[str, Plain]]:
    """Where a file may differ in what all published models share."""
    encoder, heads = encoder_path(layout), MODELS[model].num_heads
    constants: dict[str, tuple[str, Plain]] = {
        "segment_samples": ("audio_cfg.input_frames", SEGMENT_SAMPLES),
        "fft_length": ("audio_cfg.n_fft", _FFT_LENGTH),
    }
    if layout.sizes.inner == published_layout(MODELS[model]).sizes.inner:
        constants["num_heads"] = (f"{decoder_path(layout)}.num_heads", heads)
        if not layout.perceiver:
            constants["num_heads of the encoder"] = (f"{encoder}.num_heads", heads)
    if layout.perceiver:
        return constants | {"num_heads of PerceiverTF": (f"{encoder}.num_self_attention_heads", HEADS)}
    return constants | {"f_min": ("audio_cfg.f_min", _F_MIN), "f_max": ("audio_cfg.f_max", _F_MAX)}


def _differences(model: str, layout: Layout, said: Said) -> list[str]:
    return [
        f"{name} is {show(said[path])} as the file says, where {model} has {show(value)}"
        for name, (path, value) in (_sources(model, layout) | _constants(model, layout)).items()
        if path in said and said[path] != value
    ]


def _assumed(model: str, layout: Layout, given: Mapping[str, Setting], said: Said) -> list[str]:
    sources = _sources(model, layout).items()
    assumed = [f"{name} {show(value)}" for name, (path, value) in sources if path not in said and name not in given]
    return [f"not a published file: {', '.join(assumed)} assumed as for {model}"] if assumed else []


def _whole(said: Said, name: str, default: int) -> int:
    value = said.get(name, default)
    if type(value) is not int or not 0 < value < _LARGEST:
        raise _unusable(name, value, "a positive whole number")
    return value


def _truth(said: Said, name: str, default: bool) -> bool:
    value = said.get(name, default)
    if value not in (True, False):
        raise _unusable(name, value, "true or false")
    return bool(value)


def _hertz(said: Said, name: str, default: float) -> float:
    value = said.get(name, default)
    # Written so that NaN fails too.
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < _LARGEST:
        raise _unusable(name, value, "a frequency in Hz")
    return float(value)


def _unusable(name: str, value: Plain, wanted: str) -> CheckpointError:
    return CheckpointError(
        f"says {name} {printable(repr(value))} in its hyper-parameters, not {wanted}: use another checkpoint"
    )
