"""Reading weights of every dialect safely, writing files atomically, resuming runs.

A weight file is a plain state dict, as the release wrote it, so that any other script can load it. What the network
needs to be used again (pixel convention, class names, architecture) travels as the attribute ``segadapt`` of that dict.
"""
from __future__ import annotations

import zipfile
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType

import torch
from torch import Tensor, nn

from lib.datasets.description import load_description
from lib.datasets.transforms import PIXELS
from lib.errors import UserError, shorten
from lib.files import atomic_write
from lib.models.deeplab import ASPP_RATES, build
from lib.models.fcn8s import FCN8s, from_vgg16

CONTAINERS = ("state_dict", "model_state_dict", "weights", "model", "net")
PREFIXES = ("module.", "_orig_mod.", "Scale.")
# the order of the head's channels in the files of pixel-level cycle association's release; SYNTHIA's are the first 16
PIXEL_ASSOC_CLASSES = ("sky", "building", "road", "sidewalk", "fence", "vegetation", "pole", "car", "traffic sign",
                       "person", "bicycle", "motorcycle", "traffic light", "rider", "bus", "wall", "terrain", "truck",
                       "train")


def save(value: object, path: Path) -> None:
    """torch.save through ``atomic_write``: never half a file. Raises UserError."""
    advice = "Free some space, or choose another --snapshot-dir" + "; the previous checkpoint is intact" * path.exists()
    with atomic_write(path, advice) as temporary:
        try:
            with open(temporary, "wb") as f:
                torch.save(value, f)
        except RuntimeError as error:  # torch.save turns a full disk into a RuntimeError
            raise OSError(None, str(error.__context__ or error)) from None


def load(path: str | Path) -> object:
    """torch.load with weights_only=True on the CPU. Raises UserError for a missing, broken or unsafe file."""
    path = Path(path)
    if not path.is_file():
        raise UserError(f"checkpoint {path} {'is a folder: name a file in it' if path.is_dir() else 'does not exist'}")
    start = b""
    try:
        with open(path, "rb") as f:
            start = f.read(1)
        if start == b"P" and not zipfile.is_zipfile(path):
            raise ValueError("its end is missing")
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch.load raises many kinds for a broken file
        if start not in (b"P", b"\x80", b""):  # of a zip archive, a pickle, an empty file
            raise UserError(f"{path} is not a checkpoint but text or another kind of file (a web page saved in its "
                            "place?)") from None
        if "weights_only" in str(error).lower() or "unsupported" in str(error).lower():
            raise UserError(f"checkpoint {path} holds Python objects other than tensors and plain containers, which "
                            "could run code when read: refused. Re-save it as a state dict where it was made") from None
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(f"checkpoint {path} cannot be read ({reason}): is it complete?") from None


def save_weights(net: nn.Module, path: Path, meta: Mapping[str, object]) -> None:
    """Write the state dict of ``net`` with ``meta`` attached."""
    state = OrderedDict((k, v.detach().cpu()) for k, v in net.state_dict().items())
    state.segadapt = dict(meta)
    save(state, path)


def read_weights(path: str | Path, fcn: bool = False) -> tuple[dict[str, Tensor], dict]:
    """(state dict under our names, meta) of a weight file in any dialect.

    Understood: plain state dicts; dicts that hold one under a key of CONTAINERS (net: our resume.pth); the
    prefixes module., Scale. and _orig_mod.; torchvision's ResNet, VGG-16 and MobileNetV2, the last two also by their
    features alone (the linear classifier is dropped or, with ``fcn``, made fc6 and fc7 of FCN-8s; meta then says pixels
    "imagenet" and, for a ResNet, stride_on "3x3"); the release of pixel-level cycle association, whose classes are put
    in Cityscapes' order.
    Raises UserError when the file holds no tensors.
    """
    state, container = load(path), None
    for key in CONTAINERS:
        if isinstance(state, Mapping) and isinstance(state.get(key), Mapping):
            state, container = state[key], key
            break
    if not isinstance(state, Mapping) or not any(isinstance(v, Tensor) for v in state.values()):
        raise UserError(f"checkpoint {path} holds no state dict (looked at the top and under {', '.join(CONTAINERS)})")
    if not all(isinstance(key, str) for key in state):
        raise UserError(f"checkpoint {path} holds tensors under numbers instead of names: is it an optimiser's state?")
    meta = dict(getattr(state, "segadapt", {}))
    weights = {}
    for key, value in state.items():
        if isinstance(value, Tensor):
            while (prefix := next((p for p in PREFIXES if key.startswith(p)), None)) is not None:
                key = key[len(prefix):]
            weights[key] = value
    if is_torchvision(weights):
        try:
            return from_torchvision(weights, fcn)
        except (KeyError, ValueError, IndexError, RuntimeError):
            raise UserError(f"checkpoint {path} has the classifier of torchvision's networks, but not their "
                            "layers: give weights of the network that --model or --arch names") from None
    if "classifier.0.convs.0.0.weight" in weights and container in ("weights", "model_state_dict") and not meta:
        return from_pixel_assoc(weights)
    return weights, meta


def initial_weights(restore_from: str | None, arch: str, fcn: bool = False) -> tuple[dict[str, Tensor] | None, dict]:
    """(weights, meta) of a file, of torchvision's ImageNet weights ("imagenet"; fetched once), or (None, {}) for None.

    arch: of lib.models.deeplab.ARCHITECTURES, or "vgg16"; fcn: VGG-16 for FCN-8s, not for DeepLab. Raises UserError
    where the weights cannot be had.
    """
    if restore_from is None:
        return None, {}
    if restore_from != "imagenet":
        return read_weights(restore_from, fcn)
    models = torchvision_models()
    try:
        state = models.get_model_weights(arch).IMAGENET1K_V1.get_state_dict(progress=True, check_hash=True)
    except Exception as error:  # no network, a broken file in the cache
        raise UserError(f"--restore-from imagenet: the weights of {arch} cannot be fetched ({error}). Go online once, "
                        "or give a downloaded file") from None
    return from_torchvision(state, fcn)


def torchvision_models():
    """The module torchvision.models. Raises UserError where torchvision is missing or does not fit torch."""
    try:
        import torchvision.models
    except Exception as error:  # a torchvision built for another torch raises RuntimeError at import
        raise UserError(f"torchvision cannot be used ({str(error).splitlines()[0]}). Install the one that belongs to "
                        f"torch {torch.__version__}: pip install --force-reinstall torch torchvision") from None
    return torchvision.models


def is_torchvision(weights: Mapping[str, Tensor]) -> bool:
    """Whether these are weights of a network of ImageNet: with a linear classifier, or features without our heads."""
    classifier = any(key in weights for key in ("fc.weight", "classifier.6.weight", "classifier.1.weight"))
    features = {"features.18.0.weight", "features.28.weight"} & weights.keys()  # MobileNetV2's and VGG-16's last ones
    return classifier or bool(features) and all(key.startswith("features.") for key in weights)


def from_torchvision(weights: Mapping[str, Tensor], fcn: bool = False) -> tuple[dict[str, Tensor], dict]:
    """torchvision's ResNet, VGG-16 or MobileNetV2 under our names, without its classifier, and its conventions.

    fcn: VGG-16 under the names of FCN8s, whose fc6 and fc7 come from the classifier.
    """
    if "fc.weight" in weights:
        return {k: v for k, v in weights.items() if not k.startswith("fc.")}, {"pixels": "imagenet", "stride_on": "3x3"}
    if "features.18.0.weight" in weights:  # the convolution to 1280 channels is no part of our MobileNetV2
        return {k: v for k, v in weights.items() if not k.startswith(("features.18.", "classifier."))}, \
            {"pixels": "imagenet"}
    if fcn:
        return from_vgg16(weights), {"pixels": "imagenet"}
    renamed = {}
    for key, value in weights.items():
        if not key.startswith("classifier."):
            number = int(key.split(".")[1])
            # DeeplabVGG leaves pool4 out, which torchvision counts: features.24, 26, 28 are ours 23, 25, 27.
            renamed[key.replace(f".{number}.", f".{number - (number > 23)}.")] = value
    return renamed, {"pixels": "imagenet"}


def from_pixel_assoc(weights: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict]:
    """The release's head with its output channels in the order of lib/datasets/cityscapes.json."""
    task = load_description("cityscapes")
    theirs = PIXEL_ASSOC_CLASSES[:len(weights["classifier.0.convs.0.0.weight"])]
    classes = [name for name in task.classes if name in theirs]
    order = [theirs.index(name) for name in classes]
    renamed = {k: v[order] if k.startswith("classifier.") else v for k, v in weights.items()}
    return renamed, {"task": "cityscapes", "classes": classes, "aspp": "full", "pixels": "caffe", "size": [1460, 730],
                     "align_corners": False}


# A tensor of each backbone that the ones after it do not have.
PARTS = {"mobilenet_v2": "features.1.conv.0.0.weight", "resnet101": "layer3.22.conv1.weight",
         "resnet50": "layer1.0.conv3.weight"}
# The branches of each DeepLab's main head, by which it is recognised; DeeplabMulti has Deeplab's name as well.
MAIN_HEADS = {"DeeplabMulti": "layer6.conv2d_list.{}", "Deeplab": "layer5.conv2d_list.{}",
              "DeeplabVGG": "classifier.conv2d_list.{}", "DeeplabPixelAssoc": "classifier.0.convs.{}.0"}


def deeplab_of(weights: Mapping[str, Tensor]) -> tuple[str, Tensor] | None:
    """(the DeepLab's name, the weight [classes, channels, 3, 3] of its main head's first branch), or None."""
    for model, branch in MAIN_HEADS.items():
        weight = weights.get(f"{branch.format(0)}.weight")
        if weight is not None and weight.dim() == 4:
            return model, weight
    return None


def recognise(weights: Mapping[str, Tensor]) -> dict[str, object]:
    """Model name, depth and class count of a DeepLab or FCN-8s state dict, from its keys and shapes.

    Raises UserError when it is none of the networks of lib.models.
    """
    if "upscore8.weight" in weights and "conv1_1.weight" in weights and weights["upscore8.weight"].dim() == 4:
        return {"model": "FCN8s", "arch": "vgg16", "num_classes": weights["upscore8.weight"].shape[0],
                "width": weights["fc7.weight"].shape[0] / 4096 if "fc7.weight" in weights else 1.0}
    found = deeplab_of(weights)
    if found is None:
        some = ", ".join(list(weights)[:4])
        heads = ", ".join(f"{branch.format(0)}.weight" for branch in MAIN_HEADS.values())
        raise UserError(f"no segmentation network is recognised by these keys: {some}, ... "
                        f"(known heads: {heads}, upscore8.weight)")
    model, head = found
    stem = "backbone." if model == "DeeplabPixelAssoc" else ""
    arch = "vgg16" if model == "DeeplabVGG" else next(
        (name for name, part in PARTS.items() if f"{stem}{part}" in weights), "resnet18")
    only = {"aspp": "full"} if model == "DeeplabPixelAssoc" else {}
    return {"model": model, "arch": arch, "num_classes": len(head), **only}


# What a checkpoint without metadata is taken for: the release of AdaptSegNet.
CONVENTIONS = {"aspp": "released", "pixels": "caffe", "stride_on": "1x1", "align_corners": True, "bn_stats": "running",
               "aggregate": 0.0, "task": "cityscapes"}
# What metadata may say.
CHECKS = {
    "aspp": lambda v: v in ("released", "full"), "pixels": lambda v: v in PIXELS,
    "stride_on": lambda v: v in ("1x1", "3x3"), "align_corners": lambda v: isinstance(v, bool),
    "bn_stats": lambda v: v in ("running", "target", "both"), "task": lambda v: isinstance(v, str),
    "aggregate": lambda v: isinstance(v, (int, float)) and 0 <= v <= 1,
    "width": lambda v: isinstance(v, (int, float)) and 0 < v <= 4, "padding": lambda v: v in ("released", "same"),
    "size": lambda v: isinstance(v, (list, tuple)) and len(v) == 2
    and all(type(n) is int and 0 < n <= 16384 for n in v),
    "classes": lambda v: isinstance(v, (list, tuple)) and all(isinstance(name, str) for name in v)
    and len(set(v)) == len(v),
    "model": lambda v: isinstance(v, str), "arch": lambda v: isinstance(v, str)}


def open_network(path: str | Path, defaults: Mapping[str, object] | None = None, classes: Sequence[str] | None = None,
                 **given: object) -> tuple[nn.Module, dict[str, object], LoadReport]:
    """The segmentation network of a checkpoint, what is known of it, and the report of loading.

    What is known comes from ``given`` where it is not None (model, arch, aspp, pixels), else from the file's metadata,
    its keys, ``defaults`` and CONVENTIONS, in this order. classes: those that it must tell apart. Raises UserError
    where the file holds no such network, does not fill it, or has metadata that makes no sense.
    """
    weights, meta = read_weights(path)
    try:
        recognised = recognise(weights)
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    known = {**CONVENTIONS, **(defaults or {}), **recognised, **meta}
    for key, is_valid in CHECKS.items():
        if key in known and not is_valid(known[key]):
            raise UserError(f"checkpoint {path} says {key} = {known[key]!r} of its network, which makes no sense")
    if len(known.get("classes", range(known["num_classes"]))) != known["num_classes"]:
        raise UserError(f"checkpoint {path} names {len(known['classes'])} classes, but its head has "
                        f"{known['num_classes']}")
    known |= {key: value for key, value in given.items() if value is not None}
    if known["model"] == "FCN8s":
        net = FCN8s(known["num_classes"], known.get("width", 1.0), known.get("padding", "released"))
    else:
        net = build(known["model"], known["num_classes"], known["arch"], known["aspp"], known["stride_on"])
    report = load_into(net, weights, source=str(path))
    if report.missing or report.mismatched:
        raise UserError(f"{path} does not fill the network: {report}. Is --model or --arch wrong?")
    if classes is not None:
        named = list(known.get("classes", classes))
        if named != list(classes) or known["num_classes"] != len(classes):
            raise UserError(f"{path} tells {known['num_classes']} classes apart, not the {len(classes)} of this run "
                            f"({', '.join(classes)}): choose --source, --target and --num-classes to fit")
    return net, known, report


@dataclass
class LoadReport:
    """What a weight file gave to a network."""

    loaded: list[str] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)      # in the network, not in the file
    unused: list[str] = field(default_factory=list)       # in the file, not in the network
    mismatched: list[str] = field(default_factory=list)   # another shape
    backbone_share: float = 0.0                           # of the backbone's tensors, counters left out

    def __str__(self) -> str:
        text = f"{len(self.loaded)} tensors loaded ({100 * self.backbone_share:.1f} % of the backbone)"
        for what, keys in (("not in the file", self.missing), ("other shape", self.mismatched),
                           ("unused", self.unused)):
            if keys:
                modules = list(OrderedDict.fromkeys(k.rpartition(".")[0] for k in keys))
                text += f"; {what}: {', '.join(modules[:4])}{f', ... ({len(modules)} modules)' * (len(modules) > 4)}"
        return text


def load_into(net: nn.Module, weights: Mapping[str, Tensor], *, heads: bool = True, floor: float = 0.9,
              source: str = "") -> LoadReport:
    """Copy what fits into ``net``.

    heads=False leaves the heads (``net.head_names``) as they are. Raises UserError when under ``floor`` of the
    backbone's tensors match: silently missing initial weights cost users of the release ten points.
    """
    own, report = net.state_dict(), LoadReport()
    for root in ("backbone", "base", "model"):  # weights of ImageNet, or of another DeepLab
        if any(f"{root}.{key}" in own for key in weights):
            weights = {f"{root}.{key}": value for key, value in weights.items()}
            break
    head_names = getattr(net, "head_names", ())
    fitting = {}
    for key, value in own.items():
        if key.endswith("num_batches_tracked"):  # absent from files of old PyTorch versions
            if key in weights:
                fitting[key] = weights[key]
            continue
        if key.split(".")[0] in head_names and not heads or key not in weights:
            report.missing.append(key)
        elif weights[key].shape != value.shape:
            report.mismatched.append(key)
        else:
            fitting[key] = weights[key]
            report.loaded.append(key)
    report.unused = [k for k in weights if k not in own]
    without = getattr(net, "not_pretrained", ())
    backbone = [k for k in own if k.split(".")[0] not in head_names and k.rpartition(".")[0] not in without
                and not k.endswith("num_batches_tracked")]
    report.backbone_share = sum(k in fitting for k in backbone) / max(len(backbone), 1)
    if report.backbone_share < floor:
        raise UserError(f"{source or 'the checkpoint'} fits only {100 * report.backbone_share:.1f} % of the backbone "
                        f"(at least {100 * floor:.0f} % are needed): {report}. Is it of another --model or --arch?")
    spoilt = next((key for key, value in fitting.items() if not value.isfinite().all()), None)
    if spoilt is not None:
        raise UserError(f"{source or 'the checkpoint'} holds NaN or infinite values, in {spoilt} first: choose an "
                        "older one")
    net.load_state_dict(fitting, strict=False)
    return report


def with_main_head(weights: Mapping[str, Tensor], net: nn.Module, aspp: str) -> Mapping[str, Tensor]:
    """Weights of Deeplab or DeeplabMulti as ``net``, another DeepLab with as many classes, names them.

    So LSD or pixel association starts from the head that AdaptSegNet trained. aspp: of the weights; where only two of
    four branches were used, DeeplabPixelAssoc, which sums all, gets zeros for the others. Its head has no biases.
    """
    theirs, head = deeplab_of(weights) or (None, None)
    ours, own = type(net).__name__, net.state_dict()
    if theirs not in ("Deeplab", "DeeplabMulti") or ours not in MAIN_HEADS or ours == theirs:
        return weights
    old, new = MAIN_HEADS[theirs], MAIN_HEADS[ours]
    if head.shape != own[f"{new.format(0)}.weight"].shape:
        return weights
    sums_all = ours == "DeeplabPixelAssoc"
    root = "backbone." if sums_all else ""
    renamed = {root + key: value for key, value in weights.items() if not key.startswith(("layer5.", "layer6."))}
    for n in range(len(ASPP_RATES)):
        unused = sums_all and aspp == "released" and n >= 2
        for part in ("weight", "bias"):
            key, value = f"{new.format(n)}.{part}", weights.get(f"{old.format(n)}.{part}")
            if key in own and value is not None:
                renamed[key] = torch.zeros_like(value) if unused else value
    return renamed


def initialise(net: nn.Module, weights: Mapping[str, Tensor] | None, *, heads: bool, source: str,
               aspp: str = "released") -> str:
    """load_into, or nothing where there are no weights; the line of the header that says which. Raises UserError.

    aspp: of the weights' network, see with_main_head.
    """
    if weights is None:
        return "none, random weights (the paper starts from ImageNet: --restore-from imagenet or a file)"
    named = with_main_head(weights, net, aspp) if heads else weights
    report = str(load_into(net, named, heads=heads, source=source))
    if named is not weights:
        old, new = (MAIN_HEADS[name].format(0) for name in (deeplab_of(weights)[0], type(net).__name__))
        report += f"; main head: {old}, ... as {new}, ..."
    return report


def check_same_arguments(saved: Mapping[str, object], now: Mapping[str, object], may_differ: set[str],
                         names: Mapping[str, str] = MappingProxyType({})) -> None:
    """A resumed run must be the same run. Raises UserError that lists what differs, by the flags' ``names``."""
    def plain(value: object) -> object:
        return list(value) if isinstance(value, tuple) else value

    differs = [f"{names.get(k) or '--' + k.replace('_', '-')} was {saved.get(k)}, is {v}" for k, v in now.items()
               if k not in may_differ and plain(saved.get(k)) != plain(v)]
    if differs:
        raise UserError("--resume: this is another run than the one saved: " + "; ".join(differs)
                        + ". Give the same flags, or another --snapshot-dir")


def save_resume(path: Path, modules: Sequence[nn.Module], optimizers: Sequence[torch.optim.Optimizer],
                scaler: torch.amp.GradScaler, meta: Mapping[str, object], **rest: object) -> None:
    """Write all that a run needs to go on exactly: networks, optimisers, loss scale, random state, ``rest``.

    The first of ``modules`` carries ``meta``, so that evaluate.py takes this file too. ``rest`` holds plain values and
    tensors, among them ``arguments``, which load_resume compares.
    """
    net, *others = modules
    state = net.state_dict()
    state.segadapt = dict(meta)
    on_gpu = torch.cuda.is_available() and torch.cuda.is_initialized()  # where dropout then draws from
    save({"net": state, "others": [module.state_dict() for module in others],
          "optimizers": [o.state_dict() for o in optimizers], "scaler": scaler.state_dict(),
          "rng": torch.get_rng_state(), "rng_gpu": torch.cuda.get_rng_state() if on_gpu else None, **rest}, path)


def load_resume(path: Path, modules: Sequence[nn.Module], optimizers: Sequence[torch.optim.Optimizer],
                scaler: torch.amp.GradScaler, arguments: Mapping[str, object], may_differ: Iterable[str],
                names: Mapping[str, str] = MappingProxyType({})) -> dict:
    """Put what save_resume wrote back in place; returns all of it.

    Raises UserError where the file cannot be used, or where ``arguments`` are not those of the run that wrote it;
    names: how these are written on the command line.
    """
    state = load(path)
    if not isinstance(state, dict) or not isinstance(state.get("arguments"), dict) or "net" not in state:
        raise UserError(f"{path} is no resume file of this script")
    check_same_arguments(state["arguments"], arguments, set(may_differ), names)
    net, *others = modules
    with whole_run(path):
        net.load_state_dict(state["net"])
        for module, saved in zip(others, state["others"], strict=True):
            module.load_state_dict(saved)
        for optimizer, saved in zip(optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        scaler.load_state_dict(state["scaler"])
        torch.set_rng_state(state["rng"])
        if state.get("rng_gpu") is not None and torch.cuda.is_available():
            torch.cuda.set_rng_state(state["rng_gpu"])
        if not 0 <= state["iteration"] < 2**53:
            raise ValueError(f"iteration {state['iteration']}")
    return state


@contextmanager
def whole_run(path: Path) -> Iterator[None]:
    """What is read from a resume file inside is there, and of the right kind. Raises UserError where it is not."""
    try:
        yield
    except Exception as error:  # what an incomplete or edited file raises depends on what it lacks
        reason = shorten(" ".join(f"{type(error).__name__}: {error}".split()), 300)
        raise UserError(f"{path} does not hold a whole run of this script ({reason}). Use an older checkpoint with "
                        "--restore-from, or start again in another --snapshot-dir") from None
