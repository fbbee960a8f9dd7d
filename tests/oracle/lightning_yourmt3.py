"""Writes a YourMT3 network as the Lightning checkpoint that its authors' training would have written.

Runs in the oracle's environment alone. The published files hold, besides the weights: the constructor's arguments with
a live `TaskManager` under the authors' module names, two optimizer moments for every weight, the state of callbacks
and loops, and in those trained with pitch shift the kernels of its resampling.
"""

from __future__ import annotations

import contextlib
import sys
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from mt3_infer.models.yourmt3.config.vocabulary import drum_vocab_presets, program_vocab_presets
from mt3_infer.models.yourmt3.model.pitchshift_layer import PitchShiftLayer

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from mt3_infer.models.yourmt3.model.ymt3 import YourMT3

PREFIX = "mt3_infer.models.yourmt3."
STEPS = 1000
MOMENTS = 4_000_000  # numbers: a full-size file keeps the moments of its first weights only
# The published kernels take 200 MB, resampled from 4000 Hz; from 160 Hz they are called the same and take 1 MB.
RESAMPLED_FROM = 160


def save_checkpoint(network: YourMT3, path: Path, *, pitch_shift: bool) -> None:
    """Write `network` to `path`."""
    state = dict(network.state_dict())
    if pitch_shift:
        layer = PitchShiftLayer([-2, 2], RESAMPLED_FROM, expected_input_shape=(1, 1, 32767))
        state |= {f"pitchshift.{name}": tensor for name, tensor in layer.state_dict().items()}
    content = {
        "epoch": 4,
        "global_step": STEPS,
        "pytorch-lightning_version": "2.2.1",
        "state_dict": state,
        "loops": _loops(),
        "callbacks": _callbacks(),
        "optimizer_states": [_optimizer(network)],
        "lr_schedulers": [{"last_epoch": STEPS, "_step_count": STEPS + 1, "_last_lr": [1e-5]}],
        "hparams_name": "kwargs",
        "hyper_parameters": _arguments(network),
    }
    with upstream_names():
        torch.save(content, path)


@contextlib.contextmanager
def upstream_names() -> Iterator[None]:
    """Pickle the vendored classes by the names that they have upstream, and numpy's functions by those of numpy 1."""
    modules = {name: module for name, module in sys.modules.items() if name.startswith(PREFIX + "utils")}
    owners = {
        name: {item for item in vars(module).values() if isinstance(item, type)} for name, module in modules.items()
    }
    renamed: list[tuple[Any, str]] = []
    for name, classes in owners.items():
        renamed += [(item, name) for item in classes if item.__module__ == name]
    renamed += [(item, item.__module__) for item in (np.array(0).__reduce__()[0], np.float64(0).__reduce__()[0])]
    aliases = {name.removeprefix(PREFIX): module for name, module in modules.items()}
    hidden = {alias: sys.modules[alias] for alias in aliases if alias in sys.modules}
    try:
        sys.modules.update(aliases)
        for item, name in renamed:
            item.__module__ = name.removeprefix(PREFIX).replace("numpy._core", "numpy.core")
        yield
    finally:
        for item, name in renamed:
            item.__module__ = name
        for alias in aliases:
            del sys.modules[alias]
        sys.modules.update(hidden)


def _arguments(network: YourMT3) -> dict[str, Any]:
    """What `save_hyperparameters` keeps: every argument of the constructor, `model_cfg` after it was resolved."""
    return {
        "audio_cfg": network.audio_cfg,
        "model_cfg": network.model_cfg,
        "shared_cfg": network.shared_cfg,
        "pretrained": False,
        "optimizer_name": "adamwscale",
        "scheduler_name": "cosine",
        "base_lr": 1e-4,
        "max_steps": STEPS,
        "weight_decay": 0.0,
        "init_factor": 1.0,
        "task_manager": network.task_manager,
        "eval_subtask_key": "default",
        "eval_vocab": [program_vocab_presets["gm_ext_plus"]],
        "eval_drum_vocab": [drum_vocab_presets["gm"]],
        "write_output_dir": "../logs/model_output",
        "write_output_vocab": program_vocab_presets["gm_ext_plus"],
        "onset_tolerance": 0.05,
        "add_pitch_class_metric": None,
        "add_melody_metric_to_singing": True,
        "test_optimal_octave_shift": False,
        "test_pitch_shift_layer": None,
    }


def _optimizer(network: YourMT3) -> dict[str, Any]:
    """AdamW with its moments; of a large network only those of the first weights."""
    parameters = [parameter.detach() for parameter in network.parameters() if parameter.requires_grad]
    state, left = {}, MOMENTS
    for index, parameter in enumerate(parameters):
        left -= 2 * parameter.numel()
        if left < 0:
            break
        moments = {"exp_avg": torch.zeros_like(parameter), "exp_avg_sq": torch.full_like(parameter, 1e-8)}
        state[index] = {"step": STEPS, **moments}
    group = {"lr": 1e-5, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.0, "correct_bias": True}
    return {"state": state, "param_groups": [{**group, "params": list(range(len(parameters)))}]}


def _callbacks() -> dict[str, Any]:
    best = "../logs/2024/model/checkpoints/model.ckpt"
    key = "ModelCheckpoint{'monitor': 'validation/macro_onset_f', 'mode': 'max', 'every_n_train_steps': 0}"
    score = torch.tensor(0.75)
    return {
        key: {
            "monitor": "validation/macro_onset_f",
            "best_model_score": score,
            "best_model_path": best,
            "current_score": score,
            "dirpath": "../logs/2024/model/checkpoints",
            "best_k_models": {best: score},
            "kth_best_model_path": best,
            "kth_value": score,
            "last_model_path": "",
        },
        "LearningRateMonitor": {},
    }


def _loops() -> dict[str, Any]:
    progress = {"total": {"ready": STEPS, "completed": STEPS}, "current": {"ready": 0, "completed": 0}}
    return {"fit_loop": {"state_dict": {}, "epoch_progress": progress}, "validate_loop": {"state_dict": {}}}
