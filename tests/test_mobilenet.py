"""MobileNetV2 as a backbone: ImageNet's features at output stride 8, in all four trainers and evaluate.py."""
import copy
import importlib
import json
import shutil

import numpy as np
import pytest
import torch
from scripts import HEIGHT, WIDTH, in_two_processes, logged, same, training

from lib import checkpoint
from lib.errors import UserError
from lib.models.deeplab import MOBILENET_V2, build, logits_of
from lib.optim import deeplab_sgd
from lib.predict import fold_bn

ARCH = "mobilenet_v2"
models = pytest.importorskip("torchvision.models")


def imagenet(seed: int = 0) -> torch.nn.Module:
    """torchvision's network with random weights and BN statistics that are not 0 and 1."""
    torch.manual_seed(seed)
    net = models.mobilenet_v2(num_classes=3)
    for module in net.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.5, 1.5)
    return net.double().eval()


@pytest.mark.parametrize("size", [(32, 48), (33, 17)])
@pytest.mark.parametrize("model", ["DeeplabMulti", "DeeplabPixelAssoc"])
def test_the_features_are_those_of_imagenets_network(model, size):
    """Every 2nd pixel of the stage of 96 channels, every 4th of the last: exactly torchvision's at stride 16 and 32."""
    theirs, x = imagenet(), torch.randn(1, 3, *size, dtype=torch.float64)
    weights, meta = checkpoint.from_torchvision(theirs.state_dict())
    net = build(model, 5, ARCH).double().eval()
    report = checkpoint.load_into(net, weights)
    assert meta == {"pixels": "imagenet"} and report.backbone_share == 1 and not report.unused
    stages = getattr(net, "backbone", net).stages(x)
    ends = np.cumsum([depth for _, _, depth, _ in MOBILENET_V2])[[2, 4, 6]] + 1
    with torch.no_grad():
        for stage, end, every in zip(stages, ends, (1, 2, 4), strict=True):
            expected = theirs.features[:end](x)
            assert stage.shape[2:] == tuple(-(-n // 8) for n in size), "output stride 8"
            torch.testing.assert_close(stage[:, :, ::every, ::every], expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("model", ["DeeplabMulti", "Deeplab", "DeeplabPixelAssoc"])
def test_a_checkpoint_says_what_it_is(model, tmp_path):
    net = build(model, 5, ARCH, "full")
    torch.save(net.state_dict(), tmp_path / "w.pth")
    again, known, _ = checkpoint.open_network(tmp_path / "w.pth", {"aspp": "full"})
    assert (known["model"], known["arch"], known["num_classes"]) == (model, ARCH, 5)
    assert same(again.state_dict(), net.state_dict())
    x = torch.randn(1, 3, 32, 40)
    torch.testing.assert_close(logits_of(fold_bn(net)(x)), logits_of(net.eval()(x)), rtol=1e-4, atol=1e-5)
    assert not any(isinstance(m, torch.nn.BatchNorm2d) for m in fold_bn(net).modules()), "all are folded"


def test_weights_of_imagenet(tmp_path, monkeypatch):
    """--restore-from imagenet, a file of torchvision's, and one of its features alone."""
    theirs = imagenet().float().state_dict()
    torch.save(theirs, tmp_path / "all.pth")
    torch.save({k: v for k, v in theirs.items() if k.startswith("features.")}, tmp_path / "features.pth")

    class Weights:
        @staticmethod
        def get_state_dict(**_):
            return copy.copy(theirs)

    monkeypatch.setattr(checkpoint.torchvision_models(), "get_model_weights",
                        lambda arch: {ARCH: type("Enum", (), {"IMAGENET1K_V1": Weights})}[arch])
    for name in ("imagenet", tmp_path / "all.pth", tmp_path / "features.pth"):
        weights, meta = checkpoint.initial_weights(str(name), ARCH)
        report = checkpoint.load_into(build("Deeplab", 5, ARCH), weights)
        assert meta == {"pixels": "imagenet"} and report.backbone_share == 1 and not report.unused
    with pytest.raises(UserError, match="fits only"):
        checkpoint.load_into(build("Deeplab", 5, "resnet18"), weights)


def test_features_of_vgg16_alone(tmp_path):
    """They fill DeeplabVGG and FCN-8s, but for fc6 and fc7."""
    theirs = models.vgg16().features.state_dict()
    torch.save({f"features.{key}": value for key, value in theirs.items()}, tmp_path / "features.pth")
    weights, meta = checkpoint.read_weights(tmp_path / "features.pth")
    report = checkpoint.load_into(build("DeeplabVGG", 2), weights)
    assert meta == {"pixels": "imagenet"} and report.backbone_share == 1
    assert torch.equal(weights["features.27.weight"], theirs["28.weight"])
    weights, _ = checkpoint.read_weights(tmp_path / "features.pth", fcn=True)
    assert torch.equal(weights["conv5_3.weight"], theirs["28.weight"]) and len(weights) == 26


def test_released_repeats_are_for_resnets():
    """The release walked a ResNet's modules; a dot in one of MobileNetV2's names means nothing."""
    groups = deeplab_sgd(build("DeeplabMulti", 3, ARCH), "released", 1.0, 0.9, 0.0).param_groups
    assert sorted((group["repeats"], group["lr_mult"]) for group in groups) == [(1, 1.0), (1, 10.0)]


def arguments(script: str, pair, folder, weights) -> list[str]:
    """Of two steps on the rendered pair."""
    size = f"{WIDTH},{HEIGHT}"
    common = ["--arch", ARCH, "--restore-from", str(weights)]
    if script == "train_cbst":
        return [*training(pair, folder)[:6], *common, "--input-size", size, "--input-size-target", size,
                "--crop-size", size, "--num-rounds", "2", "--epr", "1", "--batch-size", "2", "--num-workers", "0",
                "--collapse", "1", "--test-scales", "1", "--no-score-flipping", "--save-num-images", "0",
                "--log-every", "1", "--is-training", "--cpu", "--snapshot-dir", str(folder)]
    more = {"train_adaptsegnet": ["--multi-level"], "train_pixel_assoc": ["--iter-size", "1"],
            "train_gan_da": ["--base", "deeplab", "--width", "0.05"]}[script]
    return [*training(pair, folder), *common, *more]


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    """{script: weights}: ImageNet's features, and a network to train on with pseudo-labels."""
    folder = tmp_path_factory.mktemp("mobilenet")
    theirs = imagenet().float()
    torch.save(theirs.features.state_dict(prefix="features."), folder / "features.pth")
    torch.manual_seed(0)
    net = build("Deeplab", 14, ARCH, "full")
    checkpoint.load_into(net, checkpoint.read_weights(folder / "features.pth")[0])
    checkpoint.save_weights(net, folder / "net.pth", {"model": "Deeplab", "arch": ARCH, "aspp": "full",
                                                      "pixels": "imagenet"})
    return lambda script: folder / ("net.pth" if script == "train_cbst" else "features.pth")


@pytest.mark.parametrize("script", ["train_adaptsegnet", "train_cbst", "train_pixel_assoc", "train_gan_da"])
def test_every_trainer(script, pair, folder, start, in_this_process, monkeypatch):
    """Trains under bf16, resumes to the same weights, and evaluate.py takes what it writes."""
    module = importlib.import_module(script)
    ended = [*arguments(script, pair, folder / "whole", start(script)), "--amp", "bf16", "--save-pred-every", "1"]
    assert module.main(ended) == 0

    halves = [*arguments(script, pair, folder / "halves", start(script)), "--amp", "bf16", "--save-pred-every", "1"]
    computed, calls = module.step, 0

    def step(*values, **named):
        nonlocal calls
        calls += 1
        if calls == 2:
            raise KeyboardInterrupt
        return computed(*values, **named)

    monkeypatch.setattr(module, "step", step)
    with pytest.raises(KeyboardInterrupt):
        module.main(halves)
    monkeypatch.setattr(module, "step", computed)
    assert module.main([*halves, "--resume"]) == 0
    whole, resumed = (checkpoint.load(folder / name / "resume.pth") for name in ("whole", "halves"))
    assert same(whole["net"], resumed["net"]) and whole["iteration"] == resumed["iteration"] >= 2
    assert logged(folder / "whole") == logged(folder / "halves")

    evaluate = importlib.import_module("evaluate")
    data = ["--data", "demo", "--data-dir", str(pair / "cityscapes"), "--cpu", "--save", "none", "--num-workers", "0"]
    evaluate.main(["--restore-from", str(folder / "whole/resume.pth"), *data, "--json", str(folder / "s.json")])
    assert 0 <= json.loads((folder / "s.json").read_text())["miou"] <= 1
    shutil.rmtree(folder)


def test_two_processes(pair, folder, start):
    """One command line, as for the other backbones."""
    in_two_processes("train_adaptsegnet.py", *arguments("train_adaptsegnet", pair, folder, start("train_adaptsegnet")))
    assert len(logged(folder)) >= 2
