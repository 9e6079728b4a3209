"""python tests/interrupted.py SCRIPT MOMENT SIGNAL [arguments of the script]

A training script with a network of a few parameters (resuming is about the loop), which gets SIGNAL at a moment:
"step:3" before the 3rd iteration computes, "write best.pth:2" half way through the 2nd write of that file, "rename
best.pth:2" between writing and renaming it, "log:2" half way through the 2nd line of the log, "never:0"; in scripts
with rounds also "score:2", "count:2", "refine:2" and "label:2", before the 2nd image of that pass. SIGKILL goes to the
process alone, other signals to its process group, as a terminal or a scheduler sends them. "nan:3" takes no signal: the
losses of the 3rd iteration are nan.
"""
import functools
import importlib
import io
import os
import signal
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from torch import nn

from lib import checkpoint, files, ops, predict, runtime, session


class TinyNet(nn.Module):
    """A head on two convolutions at an eighth of the size, with what the networks of lib.models.deeplab have."""

    head_names, channels = ("layer5",), (8, 8)

    def __init__(self, classes: int):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 8, 7, 4, 3, bias=False), nn.BatchNorm2d(8)
        self.layer1 = nn.Sequential(nn.Sequential(nn.Conv2d(8, 8, 3, 2, 1, bias=False), nn.BatchNorm2d(8), nn.ReLU()))
        self.layer5 = nn.Conv2d(8, classes, 3, padding=1)

    def forward(self, x, return_features=False):
        features = self.layer1(self.bn1(self.conv1(x)).relu())
        logits = self.layer5(features)
        return (features, logits) if return_features else logits


def shrink(script) -> None:
    """Give the script networks of a few parameters, where no flag does."""
    if script.__name__ not in ("train_adaptsegnet", "train_cbst", "train_pixel_assoc"):
        return
    script.build = checkpoint.build = lambda model, classes, *_, **named: TinyNet(classes)
    checkpoint.recognise = lambda weights: {"model": "Deeplab", "arch": "resnet18",
                                            "num_classes": len(weights["layer5.bias"])}
    if hasattr(script, "FCDiscriminator"):
        script.FCDiscriminator = functools.partial(script.FCDiscriminator, ndf=4)


def interrupt(script, moment: str, number: int) -> None:
    """Let the signal arrive at ``moment``."""
    when, count = moment.split(":")
    calls = 0

    def hook(owner, name: str, label, before=lambda original, *_: None) -> None:
        original = getattr(owner, name)

        @functools.wraps(original)
        def call(*arguments, **named):
            nonlocal calls
            here = label(*arguments) == when
            calls += here
            if here and calls == int(count):
                before(original, *arguments)
                if number == signal.SIGKILL:
                    os.kill(os.getpid(), number)
                os.killpg(os.getpgrp(), number)
            return original(*arguments, **named)

        setattr(owner, name, call)

    def half_a_file(save, value, file) -> None:
        whole = io.BytesIO()
        save(value, whole)
        file.write(whole.getvalue()[:whole.tell() // 2])
        file.flush()

    def half_a_line(write, log, *_) -> None:
        with open(log.path, "a") as file:
            file.write('{"iteration": 5, "lo')

    if when == "nan":
        step = script.step

        def spoilt(*arguments, **named):
            nonlocal calls
            calls += 1
            losses = step(*arguments, **named)
            return {key: loss * float("nan") for key, loss in losses.items()} if calls == int(count) else losses

        script.step = spoilt
        return
    hook(checkpoint.torch, "save", lambda _, file: f"write {str(file.name).rpartition('/.new-')[2]}", half_a_file)
    hook(files.os, "replace", lambda _, path: f"rename {Path(path).name}")
    hook(script, "step", lambda *_: "step")
    hook(session.Log, "_write", lambda *_: "log", half_a_line)
    for owner, name, label in ((predict, "predict", "score"), (ops, "confidence_histogram_", "count"),
                               (ops, "refine_histogram_", "refine"), (ops, "pseudo_label", "label")):
        hook(owner, name, lambda *_, label=label: label)


if __name__ == "__main__":
    name, moment, by = (sys.argv.pop(1) for _ in range(3))
    script = importlib.import_module(name)
    shrink(script)
    interrupt(script, moment, signal.Signals[by])
    runtime.cli(script.main)
