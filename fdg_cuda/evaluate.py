"""A finished run's weights on its test data: figures, and what was predicted for each sample."""

from __future__ import annotations

import csv
import os
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.progress import track
from safetensors import SafetensorError
from safetensors.torch import load_file

from fdg_cuda import data
from fdg_cuda.devices import parse_devices
from fdg_cuda.files import replacing
from fdg_cuda.metrics import Evaluation
from fdg_cuda.model_names import find_model
from fdg_cuda.runner import FDGRunner
from fdg_cuda.settings import Settings
from fdg_cuda.train import TEST_BATCH_SIZE


@dataclass(frozen=True)
class Evaluated:
    """``settings`` of the run, and the ``result`` on its test data."""

    settings: Settings
    result: Evaluation


def evaluate_run(
    folder: str | os.PathLike[str],
    *,
    devices: tuple[int | str, ...] | None = None,
    data_root: str | None = None,
    predictions: Path | None = None,
) -> Evaluated:
    """The weights that ``python -m fdg_cuda train`` wrote into ``folder``, on the run's test data.

    Args:
        folder: with ``settings.json`` and ``weights.safetensors``.
        devices: one per stage; None: those of the run.
        data_root: folder of the data; None: that of the run.
        predictions: a CSV file to write: per sample its index, its label, the class of the largest
            output, and that class's softmax.

    Raises:
        ValueError, OSError: the folder holds no run, or files that do not belong together.
        RuntimeError: a device cannot be used.
    """
    folder = Path(folder)
    settings_file, weights_file = folder / "settings.json", folder / "weights.safetensors"
    for file in (settings_file, weights_file):
        if not file.is_file():
            raise FileNotFoundError(
                f"{folder} has no {file.name}; give the folder (--out) of a run of `train`, which "
                f"writes it behind its first epoch"
            )
    settings = Settings.from_file(settings_file)
    used = devices or settings.devices or ("cpu",)
    on_cpu = parse_devices(used)[0].type == "cpu"
    spec = data.load(settings.data, data_root or settings.data_root)
    model = find_model(
        settings.model,
        in_channels=spec.in_channels,
        classes=spec.num_classes,
        image_size=spec.image_size,
    )
    try:
        model.load_state_dict(load_file(weights_file))
    except (SafetensorError, RuntimeError) as error:
        raise ValueError(
            f"{weights_file} does not hold the weights of this run: {error}"
        ) from error
    if settings.channels_last:
        model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    if settings.threads is not None:
        torch.set_num_threads(settings.threads)
    runner = FDGRunner(
        model,
        used,
        split=settings.split if len(used) == len(settings.devices or ()) else None,
        capture=settings.capture,
        precision=settings.precision,
        cpu_threads=settings.threads if on_cpu else None,
    )
    loader = data.BatchLoader(
        spec.test, TEST_BATCH_SIZE, channels_last=bool(settings.channels_last)
    )
    result = runner.evaluate(loader)
    if predictions is not None:
        outputs = runner.predict_batches(loader)
        with replacing(predictions) as temporary, temporary.open("w", newline="") as table:
            rows = csv.writer(table)
            rows.writerow(["index", "label", "prediction", "probability"])
            at = 0
            for output in track(outputs, "predicting", len(loader), transient=True):
                probability, predicted = output.float().softmax(dim=1).max(dim=1)
                for one in zip(predicted.tolist(), probability.tolist(), strict=True):
                    rows.writerow([at, int(spec.test.labels[at]), *one])
                    at += 1
    return Evaluated(settings, result)
