"""The command `mt3-run`. Data goes to standard output or files, words for people to standard error."""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from mt3_runtime.console import give, report_errors
from mt3_runtime.devices import KINDS, parse_device
from mt3_runtime.errors import Mt3Error, OptionError
from mt3_runtime.graphs import PRECISIONS
from mt3_runtime.parser import FAILED, Parser
from mt3_runtime.silence import silence_rule
from mt3_runtime.version import __version__

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    Commands = argparse._SubParsersAction[argparse.ArgumentParser]  # noqa: SLF001 -- argparse names it no other way

DIFFERENT = 1  # exit code
MOST = 2**31 - 1  # of anything


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code.

    Returns:
        0, 1 for files that differ, 2 for an error that was explained, 130 when interrupted, 141 when nobody reads on.
    """
    return report_errors("mt3-run", lambda: _run(argv))


def _run(argv: Sequence[str] | None) -> int:
    arguments = build_parser().parse_args(argv)
    command: Callable[[argparse.Namespace], int] = arguments.command
    return command(arguments)


def build_parser() -> argparse.ArgumentParser:
    """All commands and options."""
    parser: argparse.ArgumentParser = Parser(
        prog="mt3-run", description="Transcribe audio to MIDI with MT3-family models."
    )
    parser.add_argument("--version", action="version", version=f"mt3-runtime {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    _add_transcribe(commands)
    _add_stream(commands)
    _add_bench(commands)
    _add_doctor(commands)
    _add_demo(commands)
    _add_engines(commands)
    _add_diff(commands)
    return parser


def positive(text: str) -> int:
    """A whole number of at least 1, for argparse."""
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{number} is less than 1")
    if number > MOST:
        raise argparse.ArgumentTypeError(f"{number} is more than {MOST}")
    return number


def _count(text: str) -> int:
    """A whole number of at least 0, for argparse."""
    number = int(text)
    if number < 0:
        raise argparse.ArgumentTypeError(f"{number} is less than 0")
    return number


def _days(text: str) -> float:
    """An age, for argparse."""
    number = float(text)
    if not 0 <= number < math.inf:
        raise argparse.ArgumentTypeError(f"{text} is no number of days: give 0 or more")
    return number


def _velocities(text: str) -> int | None:
    """A tolerance or off, for argparse."""
    return None if text == "off" else _count(text)


def _device(text: str) -> str:
    """The name of a device, for argparse."""
    try:
        return str(parse_device(text))
    except Mt3Error as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def _silence(text: str) -> str:
    """A rule of silence, for argparse."""
    try:
        silence_rule(text)
    except Mt3Error as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    return text


def _add_model_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--bundle", type=Path, metavar="DIR", help="folder made by mt3-export (default: embedded demo)")
    parser.add_argument(
        "--device",
        type=_device,
        default="auto",
        metavar="DEVICE",
        help=f"where to run: {', '.join(KINDS)}, of several GPUs as in cuda:1 (default: auto)",
    )
    parser.add_argument(
        "--precision",
        choices=("auto", *PRECISIONS),
        default="auto",
        help="of the numbers (default: auto, fp32 on a CPU, half precision on a GPU if the bundle has it)",
    )
    parser.add_argument("--threads", type=positive, metavar="N", help="CPU threads (default: the usable cores)")


def _add_note_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--strict-upstream",
        choices=("on", "off"),
        default="off",
        help="YourMT3: make the notes that the authors' code makes, also where it loses some (default: off)",
    )
    parser.add_argument(
        "--programs",
        choices=("merged", "fine"),
        default="merged",
        help="YourMT3: instruments of the MIDI file, merged to classes as the authors' are, or fine (default: merged)",
    )
    parser.add_argument(
        "--skip-silence",
        type=_silence,
        default="auto",
        metavar="RULE",
        help="do not decode segments of zeros alone (digital), or with a peak of at most so many dBFS (such as -80); "
        "off decodes all (default: digital, or off with --strict-upstream on)",
    )


def _add_slots(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--slots", type=positive, metavar="N", help="rows side by side (default: by model and device)")


def _add_transcribe(commands: Commands) -> None:
    parser = commands.add_parser("transcribe", help="audio files to MIDI")
    parser.add_argument("inputs", nargs="+", type=Path, metavar="IN", help="sound files: WAV, FLAC, AIFF, MP3, OGG")
    parser.add_argument("-o", "--output", type=Path, metavar="OUT.mid", help="MIDI file, for one input")
    parser.add_argument("--json", type=Path, metavar="OUT.json", help="notes and provenance, for one input")
    parser.add_argument("--picture", type=Path, metavar="OUT.png", help="piano roll, for one input")
    parser.add_argument("--output-dir", type=Path, metavar="DIR", help="folder for a new file IN.mid (default: .)")
    parser.add_argument(
        "--formats", default="mid", metavar="LIST", help="with --output-dir: some of mid,json,png (default: mid)"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace files whose names were made from IN's")
    _add_note_options(parser)
    _add_slots(parser)
    parser.add_argument(
        "--quiet", action="store_true", help="print errors only, and which model it was if no --bundle is given"
    )
    _add_model_options(parser)
    parser.set_defaults(command=_transcribe)


def _add_stream(commands: Commands) -> None:
    parser = commands.add_parser("stream", help="raw samples from standard input to notes, while they come")
    parser.add_argument("--rate", type=positive, required=True, metavar="HZ", help="of the samples")
    parser.add_argument("--channels", type=positive, default=1, metavar="N", help="interleaved (default: 1)")
    parser.add_argument(
        "--format", choices=("s16le", "s32le", "f32le"), default="s16le", help="of a sample (default: s16le)"
    )
    parser.add_argument("-o", "--output", type=Path, metavar="OUT.mid", help="MIDI file, written at the end")
    _add_note_options(parser)
    _add_model_options(parser)
    parser.set_defaults(command=_stream)


def _add_bench(commands: Commands) -> None:
    parser = commands.add_parser("bench", help="time a bundle on random input with a forced number of steps")
    parser.add_argument("--segments", type=positive, default=8, metavar="N")
    parser.add_argument("--steps", type=positive, default=64, metavar="N", help="decode steps of every segment")
    parser.add_argument("--repeat", type=positive, default=5, metavar="N", help="passes; medians are reported")
    _add_slots(parser)
    parser.add_argument(
        "--lengths",
        metavar="LIST",
        help="steps of each row, for example 32,32,32,2,2,2 (or a file with such a list), repeated as often as needed: "
        "times rows that end early, in place of --steps",
    )
    parser.add_argument(
        "--songs", type=positive, metavar="N", help="N songs of so many segments side by side, and one alone"
    )
    parser.add_argument(
        "--streams",
        type=positive,
        metavar="N",
        help="N live streams of so many segments: how long after its last sample a segment's notes are there",
    )
    parser.add_argument(
        "--compare", type=Path, metavar="FILE", help="an earlier output of bench --json, to be shown beside this one"
    )
    parser.add_argument("--json", action="store_true", help="one JSON object on standard output")
    _add_model_options(parser)
    parser.set_defaults(command=_bench)


def _add_doctor(commands: Commands) -> None:
    parser = commands.add_parser("doctor", help="check this machine, this installation and a bundle")
    parser.add_argument("--bundle", type=Path, metavar="DIR", help="bundle to check (default: embedded demo)")
    parser.add_argument("--json", action="store_true", help="one JSON object on standard output")
    parser.set_defaults(command=_doctor)


def _add_demo(commands: Commands) -> None:
    parser = commands.add_parser("demo", help="transcribe the embedded clip with the embedded demo model")
    parser.add_argument("--output-dir", type=Path, default=Path("demo-output"), metavar="DIR")
    parser.set_defaults(command=_demo)


def _add_engines(commands: Commands) -> None:
    parser = commands.add_parser("engines", help="list TensorRT engines on this machine, or remove some")
    actions = parser.add_subparsers(required=True, metavar="ACTION", dest="action")
    listing = actions.add_parser("list", help="engines in the cache")
    listing.add_argument("--json", action="store_true", help="one JSON array on standard output")
    prune = actions.add_parser("prune", help="remove what is damaged or was left by killed builds, and engines named")
    prune.add_argument("--older-than", type=_days, metavar="DAYS", help="engines built longer ago")
    prune.add_argument("--all", action="store_true", help="every engine")
    parser.set_defaults(command=_engines)


def _add_diff(commands: Commands) -> None:
    parser = commands.add_parser("diff", help="what differs between two MIDI files; exit code 1 if anything does")
    parser.add_argument("a", type=Path, metavar="A.mid", help="the reference")
    parser.add_argument("b", type=Path, metavar="B.mid")
    parser.add_argument(
        "--onset-tolerance", type=float, default=50, metavar="MS", help="between onsets of one note (default: 50)"
    )
    parser.add_argument(
        "--offset-tolerance", type=float, default=50, metavar="MS", help="between offsets, at least (default: 50)"
    )
    parser.add_argument(
        "--offset-ratio", type=float, default=0.2, metavar="R", help="or so much of A's duration (default: 0.2)"
    )
    parser.add_argument("--offsets", choices=("on", "off"), default="on", help="compare offsets (default: on)")
    parser.add_argument("--programs", choices=("on", "off"), default="on", help="compare programs (default: on)")
    parser.add_argument(
        "--velocities", type=_velocities, metavar="N", help="compare velocities, which may be N apart (default: off)"
    )
    parser.add_argument("--f1", type=float, metavar="F1", help="exit code 0 if the onset F1 is at least that, else 1")
    parser.add_argument("--picture", type=Path, metavar="FILE.png", help="piano roll of both over each other")
    parser.add_argument("--limit", type=_count, default=30, metavar="N", help="differences to list (default: 30)")
    parser.add_argument("--json", action="store_true", help="all of it as one JSON object on standard output")
    parser.set_defaults(command=_diff)


# Each command imports what it needs, so that `mt3-run --help` answers at once and `doctor` runs where others cannot.


def _transcribe(arguments: argparse.Namespace) -> int:
    from mt3_runtime.transcribe_command import plan_jobs, transcribe_jobs  # noqa: PLC0415

    jobs = plan_jobs(arguments)
    failures = transcribe_jobs(jobs, arguments)
    return FAILED if failures else 0


def _stream(arguments: argparse.Namespace) -> int:
    from mt3_runtime.stream_command import stream_notes  # noqa: PLC0415

    if sys.stdin is None:  # closed, as by `<&-`
        raise OptionError("there is no standard input: pipe samples to it")
    stream_notes(arguments, sys.stdin.buffer, sys.stdout)
    return 0


def _bench(arguments: argparse.Namespace) -> int:
    from mt3_runtime.bench import BenchOptions, bench, to_text  # noqa: PLC0415
    from mt3_runtime.bench_lengths import parse_lengths  # noqa: PLC0415

    names = {field.name for field in dataclasses.fields(BenchOptions)} - {"lengths"}
    lengths = None if arguments.lengths is None else parse_lengths(arguments.lengths)
    result = bench(BenchOptions(**{name: getattr(arguments, name) for name in names}, lengths=lengths))
    give(json.dumps(result, allow_nan=False) if arguments.json else to_text(result))
    return 0


def _doctor(arguments: argparse.Namespace) -> int:
    from mt3_runtime.bundle import demo_bundle_path  # noqa: PLC0415
    from mt3_runtime.doctor import diagnose  # noqa: PLC0415

    diagnosis = diagnose(arguments.bundle or demo_bundle_path(), start=_start)
    give(diagnosis.to_json() if arguments.json else diagnosis.to_text())
    return diagnosis.exit_code


def _start(bundle: Path) -> None:
    """Run one segment and one step, as a transcription would."""
    from mt3_runtime.loading import load, warm_up  # noqa: PLC0415

    warm_up(load(bundle, slots=1))


def _demo(arguments: argparse.Namespace) -> int:
    from mt3_runtime.demo import run_demo  # noqa: PLC0415

    give(run_demo(arguments.output_dir))
    return 0


def _engines(arguments: argparse.Namespace) -> int:
    from mt3_runtime.engines_command import engines  # noqa: PLC0415

    give(engines(arguments))
    return 0


def _diff(arguments: argparse.Namespace) -> int:
    from mt3_runtime.diff_command import diff_files  # noqa: PLC0415

    text, agree = diff_files(arguments)
    give(text)
    return 0 if agree else DIFFERENT
