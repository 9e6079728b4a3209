"""lib/checkpoint.py: every dialect, safe reading, whole files only, and what a load report says."""
import pickle
import sys
from collections import OrderedDict

import pytest
import torch

from lib import checkpoint, files
from lib.errors import UserError
from lib.models.deeplab import build, logits_of

CLASSES = 5
META = {"pixels": "imagenet", "classes": ["road", "car"], "size": [64, 32], "best": None}


@pytest.fixture(scope="module")
def net():
    torch.manual_seed(0)
    return build("DeeplabMulti", CLASSES, "resnet18")


def fresh(model: str = "DeeplabMulti", classes: int = CLASSES):
    torch.manual_seed(1)
    return build(model, classes, "resnet18")


def same(a, b) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def prefixed(state, prefix: str):
    return OrderedDict((prefix + k, v) for k, v in state.items())


DIALECTS = {
    "plain": lambda s: s,
    "module": lambda s: prefixed(s, "module."),
    "scale": lambda s: prefixed(s, "Scale."),
    "compiled and distributed": lambda s: prefixed(s, "_orig_mod.module."),
    "state_dict": lambda s: {"state_dict": s, "epoch": 3, "arch": "x"},
    "model_state_dict": lambda s: {"epoch": 3, "model_state_dict": prefixed(s, "module."), "optimizer": {"state": {}}},
    "weights": lambda s: {"weights": s},
    "model": lambda s: {"model": s},
    "resume file": lambda s: {"iteration": 3, "net": s, "discriminators": []},
}


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "of PyTorch 0.4"])
@pytest.mark.parametrize("dialect", DIALECTS)
def test_every_dialect_gives_our_names(net, tmp_path, dialect, zipped):
    torch.save(DIALECTS[dialect](net.state_dict()), tmp_path / "f.pth", _use_new_zipfile_serialization=zipped)
    weights, meta = checkpoint.read_weights(tmp_path / "f.pth")
    assert meta == {} and same(weights, net.state_dict())
    other = fresh()
    report = checkpoint.load_into(other, weights)
    assert same(other.state_dict(), net.state_dict())
    assert report.backbone_share == 1 and not report.missing + report.unused + report.mismatched


def test_initial_weights_with_a_head_of_another_class_count(net, tmp_path):
    """The initial weights of the release: Scale.layer5.* of 21 classes; the backbone loads, the heads stay."""
    theirs = build("Deeplab", 21, "resnet18").state_dict()
    del theirs["bn1.num_batches_tracked"]  # PyTorch 0.4 wrote no counters
    torch.save(prefixed(theirs, "Scale."), tmp_path / "init.pth")
    other = fresh("Deeplab")
    before = {k: v.clone() for k, v in other.state_dict().items()}
    report = checkpoint.load_into(other, checkpoint.read_weights(tmp_path / "init.pth")[0])
    after = other.state_dict()
    assert torch.equal(after["layer4.1.conv2.weight"], theirs["layer4.1.conv2.weight"])
    assert all(torch.equal(after[k], before[k]) for k in after if k.startswith("layer5"))
    assert report.mismatched == [k for k in after if k.startswith("layer5")] and report.backbone_share == 1
    text = str(report)
    assert "100.0 % of the backbone" in text and "other shape: layer5.conv2d_list.0" in text and "unused" not in text


def test_heads_are_left_out_on_demand(net):
    other = fresh()
    before = {k: v.clone() for k, v in other.state_dict().items()}
    report = checkpoint.load_into(other, net.state_dict(), heads=False)
    for key, value in other.state_dict().items():
        expected = before if key.startswith(("layer5", "layer6")) else net.state_dict()
        assert torch.equal(value, expected[key]), key
    assert {k.split(".")[0] for k in report.missing} == {"layer5", "layer6"}


def test_a_single_level_file_in_a_two_level_network_says_so(net):
    weights = {k: v for k, v in net.state_dict().items() if not k.startswith("layer6")}
    weights["extra.weight"] = torch.ones(2)
    text = str(checkpoint.load_into(fresh(), weights))
    assert "not in the file: layer6.conv2d_list.0" in text and "unused: extra" in text and "(4 modules)" not in text


@pytest.mark.parametrize("aspp", ["released", "full"])
@pytest.mark.parametrize(("theirs", "ours"), [("DeeplabMulti", "Deeplab"), ("Deeplab", "DeeplabMulti"),
                                              ("DeeplabMulti", "DeeplabPixelAssoc"), ("Deeplab", "DeeplabPixelAssoc")])
def test_one_deeplab_starts_from_the_main_head_of_another(theirs, ours, aspp):
    """Biases are 0 here, since DeeplabPixelAssoc's head has none."""
    first, second = (build(name, 5, "resnet18", aspp).eval() for name in (theirs, ours))
    for key, value in first.state_dict().items():
        if "conv2d_list" in key and key.endswith("bias"):
            value.zero_()
    report = checkpoint.initialise(second, first.state_dict(), heads=True, source="f.pth", aspp=aspp)
    assert "100.0 % of the backbone" in report
    x = torch.randn(1, 3, 40, 56)
    with torch.no_grad():
        torch.testing.assert_close(logits_of(second(x)), logits_of(first(x)))
    fresh_head = build(ours, 5, "resnet18", aspp).eval()
    checkpoint.initialise(fresh_head, first.state_dict(), heads=False, source="f.pth", aspp=aspp)
    with torch.no_grad():
        assert not torch.allclose(logits_of(fresh_head(x)), logits_of(first(x)))


def test_a_head_of_another_class_count_is_not_renamed():
    weights = build("DeeplabMulti", 4, "resnet18").state_dict()
    assert checkpoint.with_main_head(weights, build("Deeplab", 5, "resnet18"), "released") is weights


def torchvision_resnet(net):
    state = OrderedDict((k, v) for k, v in net.state_dict().items() if not k.startswith(("layer5", "layer6")))
    return OrderedDict(state, **{"fc.weight": torch.zeros(1000, 512), "fc.bias": torch.zeros(1000)})


def test_torchvision_resnet(net, tmp_path):
    torch.save(torchvision_resnet(net), tmp_path / "resnet18.pth")
    weights, meta = checkpoint.initial_weights(str(tmp_path / "resnet18.pth"), "resnet18")
    assert meta == {"pixels": "imagenet", "stride_on": "3x3"} and not [k for k in weights if k.startswith("fc")]
    other = fresh()
    report = checkpoint.load_into(other, weights)
    assert report.backbone_share == 1 and not report.unused and not report.mismatched
    assert torch.equal(other.layer2[0].downsample[0].weight, net.layer2[0].downsample[0].weight)


@pytest.fixture(scope="module")
def torchvision_vgg():
    """Names and shapes of torchvision's VGG-16, each tensor marked with its number; its classifier without its bulk."""
    channels, plan = 3, (64, 64, 0, 128, 128, 0, 256, 256, 256, 0, 512, 512, 512, 0, 512, 512, 512, 0)
    state, number = OrderedDict(), 0
    for planes in plan:
        if planes:
            state[f"features.{number}.weight"] = torch.full((planes, channels, 3, 3), number / 100)
            state[f"features.{number}.bias"] = torch.full((planes,), number / 100)
            channels = planes
        number += 2 if planes else 1  # a ReLU follows each convolution
    assert list(state)[-1] == "features.28.bias"
    for number in (0, 3, 6):
        state[f"classifier.{number}.weight"] = torch.zeros(1, 1)
        state[f"classifier.{number}.bias"] = torch.zeros(1)
    return state


def test_torchvision_vgg_numbers_shift_after_pool4(torchvision_vgg, tmp_path):
    torch.save(torchvision_vgg, tmp_path / "vgg16.pth")
    weights, meta = checkpoint.read_weights(tmp_path / "vgg16.pth")
    assert meta == {"pixels": "imagenet"}
    vgg = build("DeeplabVGG", CLASSES)
    report = checkpoint.load_into(vgg, weights)  # fc6 and fc7 have no counterpart there and must not refuse it
    assert report.backbone_share == 1 and not report.unused
    assert {k.rpartition(".")[0] for k in report.missing if k.startswith("features")} == {"features.29", "features.31"}
    marks = {n: round(vgg.features[n].weight.mean().item() * 100) for n in (0, 21, 23, 25, 27)}
    assert marks == {0: 0, 21: 21, 23: 24, 25: 26, 27: 28}


@pytest.mark.parametrize("arch", ["resnet18", "vgg16"])
def test_imagenet_weights_come_through_torchvision(arch, tmp_path, monkeypatch):
    """The real torchvision, which finds the file in its cache."""
    from torchvision.models import get_model, get_model_weights

    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    url = get_model_weights(arch).IMAGENET1K_V1.url
    cached = tmp_path / "hub/checkpoints" / url.rpartition("/")[2]
    cached.parent.mkdir(parents=True)
    with torch.device("meta"):
        state = get_model(arch).state_dict()
    state = {k: torch.full(v.shape, 0.5, dtype=v.dtype) if v.is_floating_point() else torch.zeros_like(v, device="cpu")
             for k, v in state.items() if not k.startswith("classifier.") or k == "classifier.6.weight"}
    torch.save(state, cached)
    weights, meta = checkpoint.initial_weights("imagenet", arch)
    assert meta["pixels"] == "imagenet"
    target = build("DeeplabVGG" if arch == "vgg16" else "Deeplab", CLASSES, arch)
    report = checkpoint.load_into(target, weights)
    assert report.backbone_share == 1
    assert not report.unused


@pytest.mark.parametrize("error", [RuntimeError("operator torchvision::nms does not exist"), ImportError("no module")])
def test_a_torchvision_that_fails_to_import_is_a_message(error, monkeypatch):
    class Finder:
        def find_spec(self, name, *_):
            if name.partition(".")[0] == "torchvision":
                raise error

    for name in [name for name in sys.modules if name.partition(".")[0] == "torchvision"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(sys, "meta_path", [Finder(), *sys.meta_path])
    with pytest.raises(UserError, match=r"torchvision cannot be used .*Install the one that belongs to torch"):
        checkpoint.initial_weights("imagenet", "resnet18")


@pytest.mark.parametrize("changes, words", [
    ({"pixels": "bgr"}, "pixels = 'bgr'"), ({"aspp": 3}, "aspp = 3"), ({"size": [64]}, "size ="),
    ({"classes": ["road"]}, "names 1 classes, but its head has 5"), ({"classes": 5}, "classes = 5"),
    ({"align_corners": "yes"}, "align_corners")], ids=str)
def test_metadata_that_makes_no_sense(net, changes, words, tmp_path):
    checkpoint.save_weights(net, tmp_path / "f.pth", changes)
    with pytest.raises(UserError, match=words):
        checkpoint.open_network(tmp_path / "f.pth")


def test_weights_that_are_not_finite(net, tmp_path):
    state = {key: value.clone() for key, value in net.state_dict().items()}
    state["layer1.0.conv1.weight"][0, 0, 0, 0] = float("nan")
    with pytest.raises(UserError, match=r"holds NaN or infinite values, in layer1\.0\.conv1\.weight"):
        checkpoint.load_into(fresh(), state)


@pytest.mark.parametrize("state, words", [
    ({0: torch.ones(1)}, "under numbers instead of names"),
    ({"classifier.6.weight": torch.ones(1), "features.x.weight": torch.ones(1)}, "not their layers"),
    ({"layer6.conv2d_list.0.weight": torch.tensor(1.0)}, "no segmentation network is recognised")], ids=str)
def test_odd_keys(state, words, tmp_path):
    torch.save(state, tmp_path / "f.pth")
    with pytest.raises(UserError, match=words):
        checkpoint.open_network(tmp_path / "f.pth")


def test_a_written_file_is_a_plain_state_dict_with_a_memory(net, tmp_path):
    path = tmp_path / "snapshots" / "GTA5_5.pth"
    checkpoint.save_weights(net, path, META)
    weights, meta = checkpoint.read_weights(path)
    assert meta == META and same(weights, net.state_dict())
    # what any other script does with it
    bare = torch.load(path, weights_only=True)
    assert isinstance(bare, OrderedDict) and all(isinstance(v, torch.Tensor) for v in bare.values())
    other = fresh()
    other.load_state_dict(bare)
    assert same(other.state_dict(), net.state_dict())
    assert [p.name for p in path.parent.iterdir()] == ["GTA5_5.pth"], "no temporary file"


# --- files that must be refused -------------------------------------------------------------------------------------


class Runs:
    """A pickle of this creates a file when it is read."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


def write_torch(value):
    return lambda path, evil: torch.save({"a": torch.ones(2), "b": evil} if value == "evil" else value, path)


REFUSED = {
    "pickle in a zip": (write_torch("evil"), "could run code"),
    "pickle of PyTorch 0.4": (lambda path, evil: torch.save({"b": evil}, path, _use_new_zipfile_serialization=False),
                              "could run code"),
    "bare pickle": (lambda path, evil: path.write_bytes(pickle.dumps({"b": evil}, protocol=2)), "could run code"),
    "whole module": (write_torch(torch.nn.Linear(1, 1)), "could run code"),
    "empty": (lambda path, evil: path.write_bytes(b""), "is it complete"),
    "text": (lambda path, evil: path.write_text("<html>sign in</html>"), "not a checkpoint"),
    "no tensors": (write_torch({"epoch": 3, "state_dict": {"lr": 0.1}}), "holds no state dict"),
    "a tensor": (write_torch(torch.ones(3)), "holds no state dict"),
    "a list": (write_torch([torch.ones(3)]), "holds no state dict"),
}


@pytest.mark.filterwarnings("ignore:.*pickle protocol.*")
@pytest.mark.parametrize("case", REFUSED)
def test_refused(tmp_path, case):
    path, proof = tmp_path / "f.pth", tmp_path / "it_ran"
    write, reason = REFUSED[case]
    write(path, Runs(proof))
    with pytest.raises(UserError, match=reason) as caught:
        checkpoint.read_weights(path)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)
    assert not proof.exists(), "the pickle ran"
    if "run code" in reason and case != "whole module":
        try:  # the file would run without our care
            torch.load(path, weights_only=False)
        except Exception:  # a bare pickle is not what torch expects, but by then it has run
            pickle.loads(path.read_bytes())
        assert proof.exists()


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "of PyTorch 0.4"])
@pytest.mark.parametrize("share", [0.01, 0.5, 0.99])
def test_truncated(tmp_path, zipped, share):
    path = tmp_path / "f.pth"
    torch.save({"a": torch.ones(3000), "b": torch.ones(5000)}, path, _use_new_zipfile_serialization=zipped)
    path.write_bytes(path.read_bytes()[:int(share * path.stat().st_size)])
    with pytest.raises(UserError, match=r"f\.pth cannot be read .* is it complete"):
        checkpoint.load(path)


def test_missing(tmp_path):
    with pytest.raises(UserError, match=r"nowhere\.pth does not exist"):
        checkpoint.load(tmp_path / "nowhere.pth")
    with pytest.raises(UserError, match="is a folder"):
        checkpoint.load(tmp_path)


def test_another_backbone_is_refused_and_changes_nothing(net):
    other = fresh()
    before = {k: v.clone() for k, v in other.state_dict().items()}
    strange = {k.replace("layer", "stage"): v for k, v in net.state_dict().items()}
    with pytest.raises(UserError, match=r"init\.pth fits only .* of the backbone .* another --model or --arch"):
        checkpoint.load_into(other, strange, source="init.pth")
    assert same(other.state_dict(), before)
    # the floor is 90 %: 102 tensors of the backbone, 10 may miss, 11 may not
    keys = [k for k in net.state_dict() if "conv" in k and k.startswith("layer") and "list" not in k]
    backbone = [k for k in before if not k.startswith(("layer5", "layer6")) and "tracked" not in k]
    allowed = len(backbone) // 10
    less = {k: v for k, v in net.state_dict().items() if k not in keys[:allowed]}
    assert checkpoint.load_into(other, less).backbone_share >= 0.9
    del less[keys[allowed]]
    with pytest.raises(UserError):
        checkpoint.load_into(other, less)


# --- writing --------------------------------------------------------------------------------------------------------


class Full:
    """A file on a disk that is full after ``room`` bytes."""

    def __init__(self, file, room):
        self.file, self.room = file, room

    def write(self, data):
        self.room -= len(data)
        if self.room < 0:
            raise OSError(28, "No space left on device")
        return self.file.write(data)

    def __getattr__(self, name):
        return getattr(self.file, name)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.file.close()


@pytest.mark.parametrize("room", [0, 20_000])
def test_a_full_disk_leaves_the_old_file(tmp_path, monkeypatch, room):
    path = tmp_path / "resume.pth"
    checkpoint.save({"a": torch.ones(100_000)}, path)
    monkeypatch.setattr(checkpoint, "open", lambda *a: Full(open(*a), room), raising=False)  # noqa: SIM115
    with pytest.raises(UserError, match=r"cannot write .*resume\.pth.*No space left on device.* checkpoint is intact"):
        checkpoint.save({"a": torch.zeros(100_000)}, path)
    monkeypatch.undo()
    assert torch.equal(checkpoint.load(path)["a"], torch.ones(100_000))
    assert [p.name for p in tmp_path.iterdir()] == ["resume.pth"]


def test_an_interrupted_write_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "resume.pth"
    checkpoint.save({"a": 1}, path)

    def interrupted(value, file):
        file.write(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(checkpoint.torch, "save", interrupted)
    with pytest.raises(KeyboardInterrupt):
        checkpoint.save({"a": 2}, path)
    monkeypatch.undo()
    assert checkpoint.load(path) == {"a": 1} and [p.name for p in tmp_path.iterdir()] == ["resume.pth"]


def test_what_a_killed_process_left_is_overwritten(tmp_path, monkeypatch):
    path = tmp_path / "resume.pth"
    monkeypatch.setattr(files.os, "replace", lambda *_: sys.exit())  # dies between writing and renaming ...
    monkeypatch.setattr(files, "suppress", lambda *_: sys.exit())    # ... without tidying up
    with pytest.raises(SystemExit):
        checkpoint.save({"a": 1}, path)
    monkeypatch.undo()
    assert len(list(tmp_path.iterdir())) == 1 and not path.exists()
    checkpoint.save({"a": 2}, path)
    assert checkpoint.load(path) == {"a": 2} and [p.name for p in tmp_path.iterdir()] == ["resume.pth"]


def test_processes_of_a_run_make_its_folder_together(tmp_path, monkeypatch):
    """Another process removes the file with which this one tries whether it may write."""
    touch = files.Path.touch

    def touch_and_lose(path):
        touch(path)
        path.unlink()

    monkeypatch.setattr(files.Path, "touch", touch_and_lose)
    files.make_folder(tmp_path / "run", "")
    assert (tmp_path / "run").is_dir() and not list((tmp_path / "run").iterdir())


def test_a_folder_that_cannot_be_made_is_a_message(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="cannot write .* choose another --snapshot-dir"):
        checkpoint.save({}, tmp_path / "file" / "resume.pth")


# --- recognising and resuming ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("model, arch", [("DeeplabMulti", "resnet18"), ("Deeplab", "resnet50"),
                                         ("DeeplabMulti", "resnet101"), ("DeeplabVGG", "vgg16")])
def test_recognise(model, arch):
    with torch.device("meta"):
        state = build(model, 13, arch).state_dict()
    assert checkpoint.recognise(state) == {"model": model, "arch": arch, "num_classes": 13}


def test_a_discriminator_is_not_recognised():
    with pytest.raises(UserError, match=r"no segmentation network is recognised by .* conv1\.weight, .*layer6"):
        checkpoint.recognise({"conv1.weight": torch.ones(1), "conv1.bias": torch.ones(1)})


def test_a_resumed_run_is_the_same_run():
    saved = {"gan": "LS", "input_size": (64, 48), "resume": False}
    checkpoint.check_same_arguments(saved, {**saved, "resume": True}, {"resume"})
    with pytest.raises(UserError, match=r"--gan was LS, is Vanilla; --input-size was \(64, 48\), is None\. Give"):
        checkpoint.check_same_arguments(saved, {"gan": "Vanilla", "input_size": None}, {"resume"})
    with pytest.raises(UserError, match="--gan_mode was LS, is Vanilla"):
        checkpoint.check_same_arguments(saved, {"gan": "Vanilla"}, {"resume"}, {"gan": "--gan_mode"})
