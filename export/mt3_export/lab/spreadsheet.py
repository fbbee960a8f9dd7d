"""Results as CSV: a row for each combination, and one for each clip and combination. Empty: not measured."""

from __future__ import annotations

import csv
import io
from dataclasses import fields
from typing import TYPE_CHECKING, Any

from mt3_export.lab.results import Clip, Combination, F1s
from mt3_runtime.files import atomic_write

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from mt3_export.lab.results import Estimate, Forced, FreeRun, GraphError, Results, Scored

SCORES = tuple(field.name for field in fields(F1s))
SPEED = (
    "load_s", "encode_ms", "step_ms", "batch_step_ms", "batch_rows", "latency_ms", "times_realtime", "peak_mb",
)  # fmt: skip


def write_csv(results: Results, path: Path) -> None:
    """A row for each combination; F1s, losses, shares and leakages in 0..1, KL in nats.

    Raises:
        OutputError: the file cannot be written.
    """
    nothing = Combination("", "", emulated=False, outcome="done")
    rows = [_combination_row(combination) for combination in results.combinations]
    _write(path, rows, list(_combination_row(nothing)))


def write_clips_csv(results: Results, path: Path) -> None:
    """A row for each clip and combination.

    Raises:
        OutputError: the file cannot be written.
    """
    rows = [{**_who(c), **_clip_columns(clip)} for c in results.combinations for clip in c.clips]
    nothing = Combination("", "", emulated=False, outcome="done")
    no_clip = Clip("", 0.0, 0, F1s(None, None, None, None, None), None)
    _write(path, rows, [*_who(nothing), *_clip_columns(no_clip)])


def _write(path: Path, rows: Sequence[dict[str, Any]], columns: list[str]) -> None:
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    atomic_write(path, text.getvalue().encode("utf-8", "replace"))


def _combination_row(combination: Combination) -> dict[str, Any]:
    speed = combination.speed
    return {
        **_who(combination),
        "outcome": combination.outcome,
        "problem": combination.problem,
        "size_bytes": combination.size_bytes,
        **{name: getattr(speed, name) if speed else None for name in SPEED},
        **_forced_columns(combination.forced),
        **_free_columns(combination.free),
        "fallback_rows": combination.fallback_rows,
        **_graph_columns(combination.graphs),
        **_scored_columns("fp32", combination.against_fp32),
        **_scored_columns("reference", combination.against_reference),
    }


def _who(combination: Combination) -> dict[str, Any]:
    return {
        "combination": combination.name,
        "precision": combination.precision,
        "device": combination.device,
        "emulated": int(combination.emulated),
    }


def _forced_columns(forced: Forced | None) -> dict[str, Any]:
    agreement = forced.agreement if forced else None
    return {
        "forced_rows": forced.segments if forced else None,
        "forced_tokens": forced.tokens if forced else None,
        "forced_tokens_equal": forced.equal if forced else None,
        **_estimate("token_agreement", agreement),
        "kl_mean_nats": forced.kl_mean if forced else None,
        "kl_p99_nats": forced.kl_p99 if forced else None,
        "kl_max_nats": forced.kl_max if forced else None,
        "non_finite_steps": forced.non_finite if forced else None,
    }


def _free_columns(free: FreeRun | None) -> dict[str, Any]:
    diverged = [step for step in free.first if step >= 0] if free else []
    return {
        "free_rows": len(free.first) if free else None,
        "free_rows_diverged": len(diverged) if free else None,
        "first_divergence_earliest_step": min(diverged, default=None),
    }


def _graph_columns(graphs: Sequence[GraphError]) -> dict[str, Any]:
    """The worst of all graphs: each has its own numbers in the JSON."""
    return {
        "worst_graph_relative_error": max((graph.relative for graph in graphs), default=None),
        "worst_graph_cosine": min((graph.cosine for graph in graphs), default=None),
        "largest_activation_share_of_limit": max((g.largest / g.limit for g in graphs if g.limit), default=None),
        "graphs_non_finite_numbers": sum(graph.non_finite for graph in graphs) if graphs else None,
    }


def _scored_columns(side: str, scored: Scored | None) -> dict[str, Any]:
    columns: dict[str, Any] = {}
    for name in SCORES:
        columns |= _estimate(f"{_score(name)}_vs_{side}", scored.scores.get(name) if scored else None)
        columns |= _estimate(f"{_score(name)}_loss_vs_{side}", scored.loss.get(name) if scored else None)
    return columns


def _score(name: str) -> str:
    return name if name == "leakage" else f"{name}_f1"


def _estimate(name: str, estimate: Estimate | None) -> dict[str, Any]:
    return {
        name: estimate.mean if estimate else None,
        f"{name}_low": estimate.low if estimate else None,
        f"{name}_high": estimate.high if estimate else None,
    }


def _clip_columns(clip: Clip) -> dict[str, Any]:
    sides = {"fp32": clip.against_fp32, "reference": clip.against_reference}
    return {
        "clip": clip.name,
        "seconds": clip.seconds,
        "notes": clip.notes,
        **{f"{_score(name)}_vs_{side}": getattr(f1s, name, None) for side, f1s in sides.items() for name in SCORES},
    }
