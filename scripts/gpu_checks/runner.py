"""Runs checks one by one, each in a process of its own, so that none can take the others down."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import asdict
from time import perf_counter
from typing import TYPE_CHECKING, Any

from gpu_checks import parity, peers, speed
from gpu_checks.plan import Plan, Target
from mt3_runtime.errors import DependencyError, Mt3Error

if TYPE_CHECKING:
    from collections.abc import Callable

CHECKS: dict[str, Callable[[Target, Plan], dict[str, Any]]] = {
    "placement": parity.placement,
    "parity": parity.parity,
    "poisoned": parity.poisoned,
    "speed": speed.step_times,
    "memory": speed.memory,
    "latency": speed.clip_latency,
    "throughput": speed.throughput,
}
PEERS = "torch"
MARK = "gpu_check result: "
LIMIT = 1200  # seconds of one check


def run_check(name: str, target: str, plan: Plan) -> dict[str, Any]:
    """One check in this process: its figures and "status": passed, failed, skipped or error."""
    started = perf_counter()
    try:
        if name == PEERS:
            result = peers.peers(plan, on_gpu=target != "cpu")
        else:
            result = CHECKS[name](Target.parse(target), plan)
        status = "passed" if result["passed"] else "failed"
    except DependencyError as error:
        status, result = "skipped", {"error": str(error)}
    except ModuleNotFoundError as error:
        status, result = "skipped", {"error": f"{error}: install it"}
    except Mt3Error as error:
        status, result = "error", {"error": str(error)}
    except Exception as error:  # noqa: BLE001 -- the next check must run, and this one must tell what happened
        status, result = "error", {"error": f"{type(error).__name__}: {' '.join(str(error).split())[:400]}"}
    return {"target": target, "check": name, "status": status, **result, "seconds_taken": perf_counter() - started}


def run_apart(script: str, name: str, target: str, plan: Plan) -> dict[str, Any]:
    """The same in another process, which may crash or hang."""
    command = [sys.executable, script, "--child", json.dumps({"check": name, "target": target, "plan": asdict(plan)})]
    head = {"target": target, "check": name, "status": "error"}
    try:
        run = subprocess.run(command, capture_output=True, text=True, check=False, timeout=LIMIT)
    except subprocess.TimeoutExpired:
        return {**head, "error": f"took more than {LIMIT} s"}
    for line in reversed(run.stdout.splitlines()):
        if line.startswith(MARK):
            result: dict[str, Any] = json.loads(line.removeprefix(MARK))
            return result
    return {**head, "error": f"exit code {run.returncode}: {' '.join(run.stderr.split())[-400:]}"}


def child(text: str) -> None:
    """What `run_apart` starts."""
    asked = json.loads(text)
    lists: dict[str, Any] = {
        name: tuple(value) if isinstance(value, list) else value for name, value in asked["plan"].items()
    }
    print(MARK + json.dumps(run_check(asked["check"], asked["target"], Plan(**lists))), flush=True)
