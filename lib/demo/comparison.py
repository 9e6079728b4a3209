"""What --demo prints in the end: source-only and adapted networks side by side."""
from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping
from pathlib import Path

from torch import nn

from lib import predict
from lib.metrics import iou_table
from lib.predict import Validation
from lib.runtime import Run
from lib.session import Session


def train_and_compare(train: Callable[[argparse.Namespace], Session], args: argparse.Namespace,
                      source_only: Mapping[str, object], adapted: Mapping[str, object], report: Path) -> int:
    """Train a source-only and an adapted network, each with some arguments changed, and compare them.

    report: the picture to write. Returns the exit code.
    """
    sessions = []
    for name, changes in (("source only", source_only), ("adapted", adapted)):
        print(f"--- {name}")
        folder = f"{args.snapshot_dir}/{name.replace(' ', '_')}"
        session = train(argparse.Namespace(**{**vars(args), **changes, "snapshot_dir": folder}))
        if session.exit_code:
            return session.exit_code
        sessions.append(session)
    first, second = sessions
    compare(first.net, first.validation, second.net, second.validation, report)
    return 0


def compare(source_only: nn.Module, validation_s: Validation, adapted: nn.Module, validation: Validation,
            report: Path) -> None:
    """Print the score tables of a source-only and an adapted network side by side and draw their label maps.

    The validations have scored their networks. An adapted network may use the target's images, so its BN statistics may
    be those of the target; what that alone does for a source-only network with BN stands between the two.
    """
    run = Run(validation.run.device, 0, 1, "off")
    data, size, pixels = validation.data, validation.size, validation.pixels
    align_corners = validation.how["align_corners"]
    nets, tables = {"source only": source_only}, {"source only": validation_s.confusion}
    if any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in source_only.modules()):
        nets["source, target BN"] = predict.reestimate_bn(source_only, data.target.images, size, pixels, run,
                                                          validation.workers)
        tables["source, target BN"] = predict.score(
            nets["source, target BN"], data.validation, size, pixels, run, workers=validation.workers,
            align_corners=align_corners)
    nets["adapted"], tables["adapted"] = validation.as_scored(adapted), validation.confusion
    print("IoU in per cent\n" + iou_table(data.classes, tables))
    predict.pictures(nets, data, size, pixels, 6, report, run, align_corners=align_corners)
    print(f"pictures: {report}")
