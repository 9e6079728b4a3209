"""Types of command-line flags, each with one message for what it does not accept, and the groups scripts share."""
from __future__ import annotations

import argparse
import math
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NoReturn

from lib.errors import shorten


def _number(kind: type, fits: Callable[[float], bool], expected: str) -> Callable[[str], float]:
    def parse(text: str) -> float:
        try:
            value = kind(text)
        except ValueError:
            value = math.nan  # fits nothing
        if not fits(value):
            raise argparse.ArgumentTypeError(f"expected {expected}, not {shorten(text, 60)!r}")
        return value
    return parse


def up_to(highest: int, lowest: int = 1) -> Callable[[str], int]:
    """The type of whole numbers from ``lowest`` to ``highest``: what would fill the memory is said before any work."""
    return _number(int, lambda n: lowest <= n <= highest, f"a whole number from {lowest} to {highest}")


count, natural = up_to(10**9), up_to(10**9, 0)
batch, workers = up_to(4096), up_to(256, 0)
side, channels, layers = up_to(16384), up_to(8192), up_to(64)
seed, label = up_to(2**32 - 1, 0), up_to(255, 0)
amount = _number(float, lambda x: 0 <= x < math.inf, "a number of at least 0")
positive = _number(float, lambda x: 0 < x < math.inf, "a number above 0")
scale = _number(float, lambda x: 0.01 <= x <= 16, "a number from 0.01 to 16")
width = _number(float, lambda x: 0 < x <= 4, "a number above 0 and at most 4")
share = _number(float, lambda x: 0 <= x <= 1, "a number from 0 to 1")
below_one = _number(float, lambda x: 0 <= x < 1, "a number from 0 to below 1")


def scales(text: str) -> tuple[float, ...]:
    """Numbers from 0.01 to 16, separated by commas. Raises argparse.ArgumentTypeError."""
    try:
        return tuple(map(scale, text.split(",")))
    except argparse.ArgumentTypeError:
        raise argparse.ArgumentTypeError("expected numbers from 0.01 to 16 such as 0.9,1.0,1.2, not "
                                         f"{shorten(text, 60)!r}") from None


def size(text: str) -> tuple[int, int]:
    """Two whole numbers from 1 to 16384. Raises argparse.ArgumentTypeError."""
    parts = text.split(",")
    if len(parts) != 2 or not all(part.isdecimal() and 1 <= int(part[:6]) <= 16384 for part in parts):
        raise argparse.ArgumentTypeError("expected two whole numbers from 1 to 16384 such as 1024,512, not "
                                         f"{shorten(text, 60)!r}")
    return int(parts[0]), int(parts[1])


# --- groups of flags that scripts share; a script gives its own defaults by parser.set_defaults ---------------------

# Choices that change neither the data nor the mathematics of a run, so that a resumed run may change them.
FREE_ARGUMENTS = frozenset({
    "resume", "overwrite", "num_workers", "save_pred_every", "eval_every", "log_every", "log_dir", "tensorboard",
    "save_num_images", "gpu", "cpu", "check_data", "snapshot_dir", "ops", "compile", "flag_names"})
# --demo: where the rendered pair of data sets lies, one folder for each seed
DEMO_DATA = dict(source="gta5", target="demo", data_dir="data/demo/{seed}/gta5",
                 data_dir_target="data/demo/{seed}/cityscapes", num_workers=0)


class Help(argparse.RawDescriptionHelpFormatter):
    """Shows each flag's default, once."""

    def _get_help_string(self, action: argparse.Action) -> str:
        text = action.help or ""
        if "default:" in text or "%(default)" in text or action.default in (None, False, argparse.SUPPRESS):
            return text
        return f"{text} (default: %(default)s)"


class Parser(argparse.ArgumentParser):
    """Knows what the command line gives, so that a flag without effect can be refused."""

    given: frozenset[str] = frozenset()  # destinations of the flags on the command line that was parsed last

    def parse_args(self, args: Sequence[str] | None = None, namespace: argparse.Namespace | None = None):
        unset = object()
        seen = self.parse_known_args(args, argparse.Namespace(**{action.dest: unset for action in self._actions}))[0]
        self.given = frozenset(name for name, value in vars(seen).items() if value is not unset)
        return super().parse_args(args, namespace)

    def refuse(self, when: str, *names: str) -> None:
        """Leave with a message where one of these destinations is given. when: ends the sentence."""
        for message in self._without_effect(when, names):
            self.error(message)

    def note(self, when: str, *names: str) -> None:
        """Say the same and go on: for flags of a release, which stand in its users' scripts whatever the mode."""
        for message in self._without_effect(when, names):
            print(f"{self.prog}: note: {message}")

    def _without_effect(self, when: str, names: Sequence[str]) -> list[str]:
        flags = {}  # by destination: its first flag
        for action in self._actions:
            if action.dest in names and action.dest in self.given:
                flags.setdefault(action.dest, next(flag for flag in action.option_strings if flag.startswith("--")))
        return [f"{flag} has no effect {when}" for flag in flags.values()]

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message} (--help shows all flags)\n")  # without a page of usage before it

    def format_help(self) -> str:
        for action in self._actions:  # argparse shows no default where there is no text
            if action.help is None and action.default not in (None, False, argparse.SUPPRESS):
                action.help = "(default: %(default)s)"
        return super().format_help()


def parser(description: str, whole: bool = False) -> Parser:
    """A parser whose help shows every default. description: the script's docstring, or its first line alone."""
    return Parser(description=description if whole else description.split("\n")[0], formatter_class=Help)


def parse(p: Parser, argv: Sequence[str] | None, demo: Mapping[str, object]) -> argparse.Namespace:
    """The arguments; with --demo those of ``demo`` are the defaults, in which {seed} is the seed, {method} --method.

    A --source or --target other than the demo's lies where its own description says (but not in re-ID, where one folder
    holds both). The arguments' ``flag_names`` say how each is written on the command line.
    """
    known = p.parse_known_args(argv)[0]
    if known.demo:
        folders = {"source": "data_dir", "target": "data_dir_target"} if "data_dir_target" in demo else {}
        foreign = {folder for domain, folder in folders.items()
                   if getattr(known, domain) not in (p.get_default(domain), demo[domain])}
        demo = {key: value for key, value in demo.items() if key not in foreign}
        p.set_defaults(**{key: value.format(**vars(known), seed=known.random_seed) if isinstance(value, str) else value
                          for key, value in demo.items()})
    args = p.parse_args(argv)
    if {"resume", "overwrite"} <= p.given:
        p.error("--resume goes on with a run, --overwrite replaces it: choose one")
    if args.cpu:
        p.note("with --cpu", "gpu")
    if "not_restore_last" in args and not args.restore_from:
        p.note("without --restore-from", "not_restore_last")
    args.tensorboard = args.tensorboard or args.log_dir is not None
    args.flag_names = {action.dest: next((name for name in action.option_strings if name.startswith("--")), "")
                       for action in p._actions}
    args.overwrite = args.overwrite or (args.demo and args.resume in (None, False))
    if "segmenter" in args:
        if (args.lambda_semantic > 0) != (args.segmenter is not None):
            p.error("--lambda-semantic and --segmenter belong together")
        if args.labelled and not (args.segmenter and args.source):
            p.error("--labelled needs --segmenter, and --source, whose labels it uses")
    if "eval_every" in args:
        args.eval_every = args.eval_every or args.save_pred_every
    return args


def run_folder(method: str, source: str, target: str, **variants: object) -> str:
    """The default --snapshot-dir: snapshots/METHOD_VARIANTS_SOURCE_TARGET, so that no run meets another's folder.

    variants: names of variants, each with whether the run is of it.
    """
    names = [method, *(name for name, used in variants.items() if used), Path(source).stem, Path(target).stem]
    return f"snapshots/{'_'.join(names)}"


def add_network(p: argparse.ArgumentParser, trained: bool = False) -> argparse._ArgumentGroup:
    """trained: --restore-from names a trained network, whose architecture and pixel convention it tells."""
    from lib.datasets.transforms import PIXELS  # here, since compute_iou.py takes its types from this file
    from lib.models.deeplab import ARCHITECTURES  # and starts without torch

    group = p.add_argument_group("network")
    if trained:
        group.add_argument("--restore-from", metavar="FILE", help="a source-trained network, in any dialect")
        group.add_argument("--arch", choices=list(ARCHITECTURES), help="default: recognised by the checkpoint's keys")
        group.add_argument("--pixels", choices=list(PIXELS), help="default: the checkpoint's, else imagenet")
    else:
        group.add_argument("--restore-from", metavar="FILE|imagenet",
                           help="initial weights in any dialect; none: random")
        group.add_argument("--not-restore-last", action="store_true", help="leave the heads of --restore-from out")
        group.add_argument("--arch", choices=list(ARCHITECTURES), default="resnet101", help="backbone of DeepLab")
        group.add_argument("--pixels", choices=list(PIXELS),
                           help="pixel convention (default: the weights', else caffe)")
    group.add_argument("--num-classes", type=count, help="how many of the target's classes (default: all shared)")
    return group


def add_batch_norm(group: argparse._ArgumentGroup, affine: str, is_training: bool, rounds: bool = False) -> None:
    """affine, is_training: defaults; "auto" is a choice where it is the default. rounds: as add_bn_stats."""
    if affine == "auto":
        group.add_argument("--bn-affine", choices=["auto", "train", "frozen"], default=affine,
                           help="BN weights and biases; auto: frozen, but trained from random weights")
    else:
        group.add_argument("--bn-affine", choices=["train", "frozen"], default=affine, help="BN weights and biases")
    group.add_argument("--is-training", action=argparse.BooleanOptionalAction, default=is_training,
                       help="BN statistics update while training")
    add_bn_stats(group, rounds)


def add_bn_stats(group: argparse._ArgumentGroup, rounds: bool = False) -> None:
    """rounds: a run in rounds re-estimates before each, on both domains too if asked."""
    if rounds:
        group.add_argument("--bn-stats", choices=["running", "target", "both"], default="running",
                           help="each round begins by re-estimating BN statistics on the target, or on it and the "
                                "next round's source images")
    else:
        group.add_argument("--bn-stats", choices=["running", "target"], default="running",
                           help="target: re-estimate BN statistics on the target before scoring")


def add_data(p: argparse.ArgumentParser, augmentation: bool = False,
             resized: str = "the description's") -> argparse._ArgumentGroup:
    """augmentation: the flags of lib.datasets.transforms.Augment too. resized: what --input-size is by default."""
    group = p.add_argument_group("data")
    group.add_argument("--source", default="gta5", help="a description in lib/datasets, or a .json file")
    group.add_argument("--target", default="cityscapes", help="likewise")
    group.add_argument("--data-dir", help="source folder (default: the description's)")
    group.add_argument("--data-list", help="file with one source image a line")
    group.add_argument("--source-set", help="set of the source (default: the description's)")
    group.add_argument("--data-dir-target", help="target folder (default: the description's)")
    group.add_argument("--data-list-target", help="file with one target image a line")
    group.add_argument("--set", help="set of the target to train on (default: the description's)")
    group.add_argument("--val-set", help="labelled set of the target to score on (default: the description's, if "
                                         "it exists)")
    group.add_argument("--input-size", type=size,
                       help=f"width,height that source images are resized to (default: {resized})")
    group.add_argument("--input-size-target", type=size, help="width,height that target images are resized to")
    if augmentation:
        group.add_argument("--random-mirror", action="store_true", help="mirror images at random")
        group.add_argument("--random-scale", action="store_true", help="scale source images by 0.5..1.5 at random")
        group.add_argument("--ignore-label", type=label, default=255,
                           help="class index without loss; void labels get it")
    group.add_argument("--num-workers", type=workers, default=min(4, os.cpu_count() or 1),
                       help="loader processes of each data set")
    group.add_argument("--check-data", action="store_true", help="read every file, report, and leave")
    return group


def add_domains(p: argparse.ArgumentParser) -> argparse._ArgumentGroup:
    """Two sets of unpaired pictures, for image translation (lib.datasets.unpaired.find_domains)."""
    group = p.add_argument_group("data: one of --data-root, --data-folder-*, --source with --target")
    group.add_argument("--data-root", "--data_root", "--dataroot", metavar="FOLDER",
                       help="holds trainA, trainB and, for pictures to show, testA, testB")
    for part in ("train", "test"):
        for domain in "ab":
            for what in ("folder", "list"):
                group.add_argument(f"--data-{what}-{part}-{domain}", f"--data_{what}_{part}_{domain}",
                                   metavar="FOLDER" if what == "folder" else "FILE",
                                   help=f"pictures of domain {domain.upper()}" if what == "folder" else
                                   "which of that folder, one a line")
    group.add_argument("--source", help="domain A as a description in lib/datasets, or a .json file")
    group.add_argument("--target", help="domain B, likewise")
    for domain, option in (("source", ""), ("target", "-target")):
        group.add_argument(f"--data-dir{option}", help=f"folder of the {domain} (default: the description's)")
        group.add_argument(f"--data-list{option}", help=f"file with one image of the {domain} a line")
    group.add_argument("--source-set", help="set of the source (default: the description's)")
    group.add_argument("--set", help="set of the target (default: the description's)")
    group.add_argument("--num-workers", "--num_threads", type=workers, default=min(4, os.cpu_count() or 1),
                       help="loader processes of each domain")
    group.add_argument("--check-data", action="store_true", help="read every file, report, and leave")
    return group


def domains(args: argparse.Namespace) -> dict[str, object]:
    """The flags of add_domains as arguments of lib.datasets.unpaired.find_domains."""
    parts = [f"{part}_{domain}" for part in ("train", "test") for domain in "ab"]
    return {"dataroot": args.data_root, "folders": {part: getattr(args, f"data_folder_{part}") for part in parts},
            "lists": {part: getattr(args, f"data_list_{part}") for part in parts},
            "source": (args.source, args.data_dir, args.source_set, args.data_list),
            "target": (args.target, args.data_dir_target, args.set, args.data_list_target)}


def add_semantic(p: argparse.ArgumentParser) -> argparse._ArgumentGroup:
    group = p.add_argument_group("semantic consistency of CyCADA, off by default")
    group.add_argument("--lambda-semantic", "--lambda_semantic", type=amount, default=0.0,
                       help="a frozen segmenter must decide alike before and after the translation")
    group.add_argument("--segmenter", metavar="CHECKPOINT", help="that segmenter, trained on the source")
    group.add_argument("--labelled", action="store_true", help="for A to B the labels of --source instead")
    return group


def add_features(group: argparse._ArgumentGroup) -> None:
    """What the feature of an image is, in re-identification (lib.models.reid.retrieval_features)."""
    group.add_argument("--output_feature", "--output-feature", choices=["pool5", "fc"], default="pool5")
    group.add_argument("--mirrored", action=argparse.BooleanOptionalAction, default=False,
                       help="add the feature of the mirrored image")
    group.add_argument("--lmp", type=up_to(64, 0), default=0, metavar="P",
                       help="maxima of P horizontal parts of pool5 (SPGAN)")
    group.add_argument("--bn-stats", choices=["running", "target"], default="running",
                       help="target: re-estimate BN statistics on the target's training images first")


def add_machine(p: argparse.ArgumentParser, kernels: bool = True) -> argparse._ArgumentGroup:
    """Where a trained network is used. kernels: of csrc/ are used too."""
    group = p.add_argument_group("machine")
    group.add_argument("--amp", choices=["off", "bf16", "fp16"], default="off",
                       help="compute with 16 bits where that costs little accuracy")
    group.add_argument("--cpu", action="store_true")
    group.add_argument("--gpu", type=natural, default=0)
    if kernels:
        group.add_argument("--ops", choices=["auto", "compiled", "reference"], default="auto", help="kernels of csrc/")
    return group


def add_optimisation(p: argparse.ArgumentParser, sgd: bool = False, unit: str = "pairs",
                     rate: str = "heads take 10 times as much") -> argparse._ArgumentGroup:
    """sgd: with the choice of lib.optim.deeplab_sgd's flavour. unit: what a batch counts. rate: help of the rate."""
    group = p.add_argument_group("optimisation")
    group.add_argument("--batch-size", type=batch, default=1, help=f"{unit} a process and backward pass")
    group.add_argument("--learning-rate", type=amount, default=2.5e-4, help=rate)
    group.add_argument("--momentum", type=below_one, default=0.9)
    group.add_argument("--weight-decay", type=amount, default=5e-4)
    group.add_argument("--power", type=amount, default=0.9, help="of the polynomial decay")
    if sgd:
        group.add_argument("--sgd", choices=["released", "once"], default="released",
                           help="released: the backbone's updates are repeated as in the release")
    return group


def add_run(p: argparse.ArgumentParser, aliases: Mapping[str, str] | None = None,
            resume_file: bool = False, evaluations: bool = True,
            folder: str = "named after the method and the data", save: str = "iterations between snapshots",
            evaluate: str = "iterations between evaluations (default: as snapshots)") -> argparse._ArgumentGroup:
    """aliases: second names for flags, from a release. resume_file: --resume may name a file. evaluations: the run is
    scored every --eval-every iterations. What the help says: folder of --snapshot-dir's default, save of
    --save-pred-every, evaluate of --eval-every.
    """
    group = p.add_argument_group("run")
    names = {flag: [flag, *([aliases[flag]] if aliases and flag in aliases else [])]
             for flag in ("--snapshot-dir", "--eval-every")}
    group.add_argument("--demo", action="store_true", help="render a small pair of domains and show the method on it")
    group.add_argument(*names["--snapshot-dir"],
                       help=f"weights, resume file, log, pictures (default: {folder})")
    if resume_file:
        group.add_argument("--resume", nargs="?", const="", metavar="FILE",
                           help="go on from FILE, by default the snapshot folder's resume.pth")
    else:
        group.add_argument("--resume", action="store_true", help="go on from the snapshot folder's resume.pth")
    group.add_argument("--overwrite", action="store_true", help="replace an earlier run in the snapshot folder")
    group.add_argument("--save-pred-every", type=count, default=5000, help=save)
    if evaluations:
        group.add_argument(*names["--eval-every"], type=count, help=evaluate)
    group.add_argument("--save-num-images", type=up_to(1000, 0), default=2, help="pictures at each evaluation")
    group.add_argument("--log-every", type=count, default=10, help="iterations between log lines")
    group.add_argument("--tensorboard", action="store_true", help="write the log for TensorBoard too")
    group.add_argument("--log-dir", help="folder for TensorBoard, which it switches on (default: the snapshot folder)")
    group.add_argument("--random-seed", "--seed", type=seed, default=1234)
    group.add_argument("--deterministic", action="store_true", help="deterministic kernels where there are any")
    group.add_argument("--cpu", action="store_true", help="do not use a GPU")
    group.add_argument("--gpu", type=natural, default=0, help="number of the GPU of a single process")
    group.add_argument("--amp", choices=["off", "bf16", "fp16"], default="off", help="mixed precision")
    group.add_argument("--compile", action="store_true", help="torch.compile the networks")
    group.add_argument("--ops", choices=["auto", "compiled", "reference"], default="auto", help="kernels of csrc/")
    return group
