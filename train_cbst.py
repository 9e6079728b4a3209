"""CBST: class-balanced self-training, and its confidence-regularised successors.

Zou, Yu, Kumar, Wang: "Unsupervised Domain Adaptation for Semantic Segmentation via Class-Balanced Self-Training",
ECCV 2018, https://arxiv.org/abs/1810.07911. Zou, Yu, Liu, Kumar, Wang: "Confidence Regularized Self-Training", ICCV
2019, https://arxiv.org/abs/1908.09822. Results: docs/cbst.md.

    python train_cbst.py --demo                                                     # a miniature pair, on a laptop
    python train_cbst.py --restore-from snapshots/start/GTA5_150000.pth             # GTA5 to Cityscapes
    python train_cbst.py --restore-from FILE --kc-policy global                     # ST: one threshold for all classes
    python train_cbst.py --restore-from FILE --spatial-prior build                  # CBST-SP
    python train_cbst.py --restore-from FILE --mr-weight-kld 0.01                   # MRKLD as published, see below
    python train_cbst.py --restore-from FILE --lr-weight-ent 0.25                   # LRENT: soft pseudo-labels

Rounds begin from a source-trained network: label the target's images with it, keep the most confident portion of each
class, train on these and some source images, repeat with a larger portion. Each round first scores its network on the
validation set, so the last of --num-rounds only scores what the one before it trained.

It follows the PyTorch release, except that: --kc-value prob thresholds each class by its own probabilities, as meant
(the release left these thresholds at 1); --mr-weight-kld is the weight that acts (the release multiplied it in twice,
so its 0.1 was 0.01); --lr-weight-ent keeps logits at an eighth of the size, not soft labels at full size; a batch
without labels has loss 0 instead of nan. Thresholds are exactly those of the sorted lists but come from histograms.
Labels cannot be given before all images have been counted, and keeping 5 bytes a pixel until then is what filled users'
disks, so each image passes the network three times (counted, counted finely, labelled), or once where the logits at an
eighth of the size fit --cache-mb.
"""
from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lib import checkpoint, flags, ops, predict, runtime
from lib.datasets.description import Domain
from lib.datasets.folder import DomainPair, open_pair
from lib.datasets.prior import open_prior
from lib.datasets.pseudo_labels import IGNORE, PseudoLabels, write_list
from lib.datasets.rounds import Rounds, RoundSet
from lib.datasets.transforms import RandomCrop
from lib.demo.comparison import compare
from lib.demo.start import train_start
from lib.demo.streets import render_demo
from lib.errors import UserError
from lib.models.deeplab import MODELS, build, logits_of, set_bn_affine, set_train_mode, upsample
from lib.optim import deeplab_sgd, set_poly_lr
from lib.session import Passes, Session

PASSES = ("score", "count", "refine", "label")  # of a round, over the validation set and then three times the target
# --demo: settings for the rendered pair, and a ResNet-18 from random weights (make_start); flags given override them.
DEMO = dict(**flags.DEMO_DATA, snapshot_dir="snapshots/demo_cbst/{seed}", input_size=(192, 96),
            input_size_target=(192, 96), crop_size=(192, 96), learning_rate=5e-4, power=0.9, num_rounds=4, epr=2,
            init_src_port=0.2, max_src_port=0.5, src_port_step=0.05, spatial_prior="build", prior_norm="class",
            eval_scale=1.0, test_scales=(1.0,), is_training=True, bn_stats="target")
ONE_ASPP = "--aspp released: DeeplabPixelAssoc sums all four rates"
DEMO_START_STEPS, DEMO_START_RATE = 400, 2.5e-3


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    p = flags.parser(__doc__)
    method = p.add_argument_group("method")
    method.add_argument("--num-rounds", type=flags.up_to(1000), default=4, help="the last one only scores")
    method.add_argument("--epr", type=flags.count, default=2, help="epochs of training a round")
    method.add_argument("--kc-policy", choices=["cb", "global"], default="cb", help="a threshold per class, or one")
    method.add_argument("--kc-value", choices=["conf", "prob"], default="conf",
                        help="what thresholds count: the predicted class's probability, or each class's own")
    method.add_argument("--ds-rate", type=flags.count, default=4, help="every n-th pixel of an image and class counts")
    method.add_argument("--init-tgt-port", type=flags.share, default=0.2,
                        help="portion of target pixels in the first round")
    method.add_argument("--tgt-port-step", type=flags.amount, default=0.05)
    method.add_argument("--max-tgt-port", type=flags.share, default=0.5)
    method.add_argument("--init-src-port", type=flags.share, default=0.03, help="portion of source images, first round")
    method.add_argument("--src-port-step", type=flags.amount, default=0.0025)
    method.add_argument("--max-src-port", type=flags.share, default=0.06)
    method.add_argument("--src-sampling-policy", choices=["r", "c"], default="r",
                        help="r: drawn anew each round; c: the same images and more")
    method.add_argument("--rare-cls-num", type=flags.natural, default=3, help="rarest classes to report")
    method.add_argument("--mine-port", type=flags.share, default=0.001, help="classes predicted on less are mined")
    method.add_argument("--mine-chance", type=flags.share, default=0.8, help="that a crop is centred on a mined class")
    method.add_argument("--spatial-prior", metavar="build|FILE", help="build it from the source labels, or .npz, .mat")
    method.add_argument("--prior-norm", choices=["frequency", "class"], default="frequency",
                        help="class: every class's prior has the same sum over the pixels, so that rare ones keep up")
    method.add_argument("--mr-weight-kld", type=flags.amount, default=0.0,
                        help="MRKLD: weight of KL to uniform (0: off)")
    method.add_argument("--lr-weight-ent", type=flags.amount, default=0.0,
                        help="LRENT: alpha of soft labels (0: hard labels)")
    method.add_argument("--collapse", type=flags.share, default=0.95,
                        help="share of pixels in one class that ends the run")
    net = flags.add_network(p, trained=True)
    net.add_argument("--model", choices=list(MODELS), help="default: recognised by the checkpoint's keys")
    net.add_argument("--aspp", choices=["released", "full"],
                     help="rates summed: 6, 12 or all four (default: the checkpoint's, else full)")
    flags.add_batch_norm(net, affine="frozen", is_training=False, rounds=True)
    data = flags.add_data(p, resized="their files' size")
    data.add_argument("--subset", type=flags.count, metavar="N",
                      help="use N target images, drawn by --seed and listed in subset.txt")
    data.add_argument("--allow-overlap", action="store_true", help="label images that are scored too")
    data.add_argument("--crop-size", type=flags.size, default=(1024, 512), help="width,height in training")
    data.add_argument("--random-scale", action=argparse.BooleanOptionalAction, default=True,
                      help="scale training images by 0.5, 0.6, .. 1.5")
    data.add_argument("--random-mirror", action=argparse.BooleanOptionalAction, default=True)
    data.add_argument("--eval-scale", type=flags.scale, default=0.9, help="of target images while they are labelled")
    data.add_argument("--test-flipping", action="store_true", help="average with the mirrored image while labelling")
    data.add_argument("--test-scales", type=flags.scales, default=(0.9, 1.0, 1.2),
                      help="whose logits are averaged for scores")
    data.add_argument("--score-flipping", action=argparse.BooleanOptionalAction, default=True,
                      help="average with the mirrored image for scores")
    flags.add_optimisation(p, sgd=True, unit="images")
    out = flags.add_run(p, aliases={"--snapshot-dir": "--save"}, evaluations=False,
                        save="images of a pass, or iterations of training, between saves of what --resume needs")
    out.add_argument("--save-color", action="store_true", help="also pseudo_labels_color: every label in colours")
    out.add_argument("--cache-mb", type=flags.natural, default=64,
                     help="memory for logits between the passes over the target")
    p.set_defaults(batch_size=2, learning_rate=5e-5, power=0.0,
                   save_pred_every=500, save_num_images=4, random_seed=3)
    args = flags.parse(p, argv, DEMO)
    if not args.spatial_prior:
        p.refuse("without --spatial-prior", "prior_norm")
    if (args.model, args.aspp) == ("DeeplabPixelAssoc", "released"):
        p.error(ONE_ASPP)
    method = "lrent" if args.lr_weight_ent else "mrkld" if args.mr_weight_kld else \
        "st" if args.kc_policy == "global" else "cbst"
    args.snapshot_dir = args.snapshot_dir or flags.run_folder(
        method, args.source, args.target, sp=args.spatial_prior, balanced=args.prior_norm == "class")
    if not args.restore_from and not args.demo and not args.check_data:
        p.error("--restore-from FILE is needed: rounds begin from a source-trained network, such as "
                "train_adaptsegnet.py --source-only makes")
    return args


# --- selection: p are probabilities [C, ...], thresholds [C] ----------------------------------------------------------


def portion(init: float, step: float, maximum: float, round_: int) -> float:
    """The portion of round 0, 1, ...: one step more each round, added up as in the release, up to ``maximum``."""
    value = min(init, maximum)
    for _ in range(round_):
        value = min(value + step, maximum)
    return value


def source_sample(count: int, share: float, seed: int, round_: int, policy: str) -> list[int]:
    """floor(count * share) source images of a round, at least one; the release's draw."""
    generator = np.random.RandomState(seed + round_ + 1 if policy == "r" else seed)
    return generator.choice(count, max(1, int(np.floor(count * share))), replace=False).tolist() if share else []


def rare_classes(pixels: Tensor, number: int, mine_port: float) -> tuple[list[int], list[int]]:
    """(the ``number`` rarest classes, those under a share of ``mine_port``), rarest first; pixels: int64 [C]."""
    order = pixels.argsort(stable=True)
    mine = order[pixels[order].double() / pixels.sum() < mine_port]
    return order[:number].tolist(), mine.tolist()


def soft_label(p: Tensor, thresholds: Tensor, alpha: float) -> tuple[Tensor, Tensor]:
    """LRENT: (y_c = (p_c / t_c)^(1/alpha) / Z [C, ...], selected [...]); Z the sum over classes, selected where Z > 1.

    Z > 1 is the paper's test: sum_c (-y_c log p_c + alpha y_c log y_c) < -sum_c y_c log t_c.
    """
    ratio = (p / thresholds.reshape(-1, *[1] * (p.dim() - 1))) ** (1 / alpha)
    z = ratio.sum(0)
    return ratio / z.clamp(min=torch.finfo(p.dtype).tiny), z > 1


# --- losses -----------------------------------------------------------------------------------------------------------


def labelled_pixels(label: Tensor) -> Tensor:
    """bool [N, H, W]: where hard labels [N, H, W] are not IGNORE, or soft ones [N, C, H, W] not all zero."""
    return label != IGNORE if label.dim() == 3 else label.sum(1) > 0


def loss_seg(log_p: Tensor, label: Tensor, valid: Tensor) -> Tensor:
    """Cross-entropy of log-probabilities [N, C, H, W] with hard or soft labels, over ``valid`` labelled pixels."""
    if label.dim() == 3:
        total = F.nll_loss(log_p, label, ignore_index=IGNORE, reduction="sum")
    else:
        total = -(log_p * label).sum()
    return total / valid.clamp(min=1e-3)


def loss_kld(log_p: Tensor, label: Tensor, weight: Tensor, regularised: Tensor) -> Tensor:
    """MRKLD: KL to uniform, sum_c -log p_c / C, over labelled pixels of samples with ``weight`` [N] above 0.

    regularised: the number of these pixels, to divide by.
    """
    pixels = labelled_pixels(label) * weight[:, None, None].to(log_p.dtype)
    return -(pixels * log_p.mean(1)).sum() / regularised.clamp(min=1e-3)


def step(net: nn.Module, x: Tensor, label: Tensor, on_target: Tensor, *, mr_weight_kld: float, run: runtime.Run,
         scale: Callable[[Tensor], Tensor] = lambda loss: loss) -> dict[str, Tensor]:
    """Gradients of one batch of both domains. on_target [N]: 1 for target images, 0 for source. Returns the losses."""
    with run.autocast():
        pred = logits_of(net(x))
    log_p = F.log_softmax(upsample(pred, x.shape[2:]), 1)
    counts = torch.stack([labelled_pixels(label).sum(), (labelled_pixels(label) * on_target[:, None, None]).sum()])
    valid, regularised = run.sum(counts.to(log_p.dtype)) / run.world
    losses = {"loss_seg": loss_seg(log_p, label, valid)}
    total = losses["loss_seg"]
    if mr_weight_kld:
        losses["loss_kld"] = loss_kld(log_p, label, on_target, regularised)
        total = total + mr_weight_kld * losses["loss_kld"]
    scale(total).backward()
    return losses


# --- the passes of a round --------------------------------------------------------------------------------------------


def new_counts(classes: int, device: torch.device) -> dict[str, Tensor]:
    """What the passes count."""
    return {"hist": ops.new_histogram(classes, device), "fine": ops.new_histogram(classes, device, fine=True),
            "scored": torch.zeros(classes, classes, dtype=torch.int64, device=device),
            "labelled": torch.zeros(256, dtype=torch.int64, device=device)}


def choose_thresholds(images: predict.Logits, prior: Tensor | None, passes: Passes, target_portion: float,
                      require_diverse: Callable[[Tensor], None], run: runtime.Run, *, kc_policy: str, kc_value: str,
                      ds_rate: int) -> tuple[ops.Thresholds | None, Tensor | None]:
    """Passes "count" and "refine", Zou et al., algorithm 2: the k-th largest confidence of each class.

    Returns (thresholds, predicted pixels [C]), or None in place of what a stop request prevented.
    """
    options = dict(prior=None if prior is None else prior.to(run.device), ds_rate=ds_rate, value=kc_value,
                   return_maps=False)
    threshold = partial(ops.select_threshold, portion=target_portion, pooled=kc_policy == "global")
    for index, (size, logits) in passes.over("count", len(images), images):
        if prior is not None and prior.shape[1:] != size:
            raise UserError(f"{images.views.images[index]} is {size[1]}x{size[0]}, the spatial prior "
                            f"{prior.shape[2]}x{prior.shape[1]}: target images must have its size")
        ops.confidence_histogram_(passes.counts["hist"], logits[0], size, flipped=mirrored(logits), **options)
    if passes.leaving:
        return None, None
    counted = run.sum(passes.counts["hist"])
    predicted, bins = ops.predicted_pixels(counted), threshold(counted).bins
    del counted  # 2 MiB a class
    require_diverse(predicted)
    for _, (size, logits) in passes.over("refine", len(images), images):
        ops.refine_histogram_(passes.counts["fine"], bins, logits[0], size, flipped=mirrored(logits), **options)
    if passes.leaving:
        return None, predicted
    return threshold(run.sum(passes.counts["hist"]), fine=run.sum(passes.counts["fine"])), predicted


def write_labels(images: predict.Logits, prior: Tensor | None, passes: Passes, thresholds: Tensor, files: PseudoLabels,
                 run: runtime.Run, *, lr_weight_ent: float, save_color: bool) -> Tensor:
    """Pass "label": argmax_c p_c / t_c where it is at least 1, into ``files``. Returns the pixels [256] by label."""
    prior_on_device = None if prior is None else prior.to(run.device)
    for index, (size, logits) in passes.over("label", len(images), images):
        if lr_weight_ent:
            files.write_logits(index, logits)
            label = soft_selection(logits.cpu(), size, thresholds.cpu(), lr_weight_ent, prior)
        else:
            label = ops.pseudo_label(logits[0], thresholds, size, flipped=mirrored(logits), prior=prior_on_device)
        label = label.cpu().numpy()
        passes.counts["labelled"] += torch.from_numpy(np.bincount(label.ravel(), minlength=256)).to(run.device)
        files.write(index, label, save_color)
    return run.sum(passes.counts["labelled"])


def soft_selection(logits: Tensor, size: tuple[int, int], thresholds: Tensor, alpha: float,
                   prior: Tensor | None) -> Tensor:
    """LRENT's hard form: argmax_c p_c / t_c, 255 where soft_label does not select; uint8 [H, W]."""
    bands = []
    for rows in np.array_split(np.arange(size[0]), -(-size[0] // 64)):  # all rows at once would be a softmax map
        p = ops.probabilities_at(logits, size, rows, np.arange(size[1]), prior)
        label = (p / thresholds[:, None, None]).argmax(0)
        bands.append(label.where(soft_label(p, thresholds, alpha)[1], IGNORE).to(torch.uint8))
    return torch.cat(bands)


def soft_labels_at(files: PseudoLabels, thresholds: Tensor, alpha: float, prior: Tensor | None, index: int,
                   size: tuple[int, int], rows: np.ndarray, cols: np.ndarray) -> Tensor:
    """LRENT's soft labels [C, rows, cols] of one image, from the logits that were kept of it."""
    return soft_label(ops.probabilities_at(files.read_logits(index), size, rows, cols, prior), thresholds, alpha)[0]


def mirrored(logits: Tensor) -> Tensor | None:
    """The mirror image's logits among [1 or 2, C, h, w]."""
    return logits[1] if len(logits) > 1 else None


# --- the run ----------------------------------------------------------------------------------------------------------


def open_data(args: argparse.Namespace, run: runtime.Run) -> DomainPair:
    """The checked data sets of a run, whose target may be a subset; with --check-data the end."""
    source = Domain.open(args.source, args.data_dir, args.source_set, args.data_list, "source")
    target = Domain.open(args.target, args.data_dir_target, args.set, args.data_list_target)
    data = open_pair(source, target, None, None, val_set=args.val_set, num_classes=args.num_classes, ignore=IGNORE,
                     check_all=args.check_data, allow_overlap=args.allow_overlap)
    if args.subset is not None:
        data.target.draw_subset(args.subset, args.random_seed)
    if args.check_data:
        run.say(f"all files of {args.source} and {args.target} are fine")
        raise SystemExit(0)
    return data


def schedule(args: argparse.Namespace, sources: int, targets: int, world: int) -> tuple[list[list[int]], list[int]]:
    """(the source images, the steps) of each round, for ``sources`` and ``targets`` images in all."""
    shares = [portion(args.init_src_port, args.src_port_step, args.max_src_port, r) for r in range(args.num_rounds)]
    chosen = [source_sample(sources, share, args.random_seed, r, args.src_sampling_policy)
              for r, share in enumerate(shares)]
    return chosen, [max(1, args.epr * (len(images) + targets) // (args.batch_size * world)) for images in chosen]


def open_network(args: argparse.Namespace, classes: Sequence[str]) -> tuple[nn.Module, dict, str]:
    """--restore-from as (network, the conventions it was trained with, what was loaded). Raises UserError."""
    net, known, report = checkpoint.open_network(
        args.restore_from, {"aspp": "full", "pixels": "imagenet"}, classes, model=args.model, arch=args.arch,
        aspp=args.aspp, pixels=args.pixels)
    if known["model"] not in MODELS:
        raise UserError(f"{args.restore_from} is a {known['model']}; self-training is for {', '.join(MODELS)}")
    if (known["model"], args.aspp) == ("DeeplabPixelAssoc", "released"):
        raise UserError(ONE_ASPP)
    return net, known, f"{args.restore_from}: {report}"


def train(args: argparse.Namespace) -> Session:
    """One run; ``exit_code`` of the result is not 0 where it was asked to leave early."""
    run = runtime.start(cpu=args.cpu, gpu=args.gpu, amp=args.amp, seed=args.random_seed,
                        deterministic=args.deterministic)
    ops.use(args.ops)
    folder = Path(args.snapshot_dir)
    data = open_data(args, run)
    if args.is_training and min(args.crop_size) < 17:
        raise UserError(f"--is-training needs crops of at least 17x17 for BN statistics, not {args.crop_size}: choose "
                        "a larger --crop-size")

    # network and optimiser
    net, known, loaded = open_network(args, data.classes)
    pixels = known["pixels"]
    set_bn_affine(net, args.bn_affine == "train")
    net = run.place_net(net, sync_bn=args.is_training, compiled=args.compile)
    optimizer = deeplab_sgd(net, args.sgd, args.learning_rate, args.momentum, args.weight_decay)
    scaler = run.scaler()

    # rounds; how the passes see the images
    rounds, last = Rounds(data, folder, run, args.restore_from, args.collapse), args.num_rounds - 1
    chosen, steps = schedule(args, len(data.source), len(data.target), run.world)
    views = predict.ViewSet(data.target.images, args.input_size_target, pixels, (args.eval_scale,))
    validation_views = None if data.validation is None else predict.ViewSet(
        data.validation.images, args.input_size_target, pixels, args.test_scales)
    file_size = data.target.read(0)[0].size
    prior_of_run = partial(open_prior, args.spatial_prior, data.source, len(data.classes), file_size[::-1],
                           args.prior_norm, folder / "prior.npz", rebuild=not args.resume, run=run)
    # a bad file is refused before anything is written; a prior is built where the run may write
    prior = None if args.spatial_prior == "build" else prior_of_run()

    def meta_of(_: int = 0) -> dict[str, object]:
        return {"script": "train_cbst.py", "round": rounds.number, "task": args.target, "classes": list(data.classes),
                "size": list(args.input_size_target or file_size), "align_corners": True,
                **{key: known[key] for key in ("model", "arch", "aspp", "stride_on", "pixels")}}

    def enter(r: int) -> None:
        """The network is what enters round r; as the result of round r - 1 it is saved, and that round is complete."""
        if args.bn_stats != "running":
            of_source = chosen[r] if args.bn_stats == "both" else []
            images = data.target.images + [data.source.images[i] for i in of_source]
            net.load_state_dict(predict.reestimate_bn(net, images, args.input_size_target, pixels, run,
                                                      args.num_workers).state_dict())
        rounds.enter(r, net, meta_of)
        session.save()

    with Session(run, args, folder, {"": net}, [optimizer], scaler=scaler, meta=meta_of,
                 extra_state={"rounds": rounds}, free={"num_rounds", "save_color", "cache_mb"}) as session:
        if args.spatial_prior == "build":
            prior = prior_of_run()
        session.header(header(args, run, data, known, loaded, len(chosen[0]), sum(steps[:last]), rounds.number))
        if session.resumed:
            session.last_good = Path(rounds.last_good)
            rounds.reopen(last)
        else:
            if args.overwrite:
                rounds.remove()
            enter(0)
        if args.subset is not None and run.is_main:
            write_list(data.target.images, data.target.domain.root, folder / "subset.txt")

        for r in range(rounds.number, args.num_rounds):
            rounds.complete(before=r)
            files = rounds.labels()
            if rounds.stage == "label":
                fast = predict.prepare(net)
                images = predict.Logits(fast, views, run, flip=args.test_flipping, workers=args.num_workers,
                                        room=args.cache_mb << 20)
                passes = Passes(PASSES, files.work / "progress.pth", run, new_counts(len(data.classes), run.device),
                                args.save_pred_every, session.stop)
                report = {"round": r}
                with rounds.errors_with_advice():
                    if data.validation is not None:
                        rounds.confusion = predict.score_in_passes(
                            fast, data.validation, validation_views, passes, run, flip=args.score_flipping,
                            workers=args.num_workers)
                    if data.validation is not None and not passes.leaving:
                        report |= rounds.keep_best(net, meta_of())
                        if 0 < r == last:
                            rounds.require_diverse(rounds.confusion.sum(0))
                    if r < last:
                        target_portion = portion(args.init_tgt_port, args.tgt_port_step, args.max_tgt_port, r)
                        thresholds, predicted = choose_thresholds(
                            images, prior, passes, target_portion, rounds.require_diverse, run,
                            kc_policy=args.kc_policy, kc_value=args.kc_value, ds_rate=args.ds_rate)
                    if r < last and not passes.leaving:
                        labelled = write_labels(images, prior, passes, thresholds.value, files, run,
                                                lr_weight_ent=args.lr_weight_ent, save_color=args.save_color)
                if session.leave_if_asked():
                    break
                if r < last:
                    rare, mine = rare_classes(predicted, args.rare_cls_num, args.mine_port)
                    report |= rounds.report_selection(target_portion, len(chosen[r]), thresholds, predicted, labelled,
                                                      rare, mine)
                rounds.end_labelling(report, chosen[r], args.save_num_images)
                optimizer.state.clear()  # each round trains with a fresh momentum
                session.save()
            if r == last:
                break

            images = training_set(args, data, files, chosen[r], rounds.reports[r], prior, pixels)
            first = sum(steps[:r])
            batches = session.batches(images, 1000 * args.random_seed + r, start=session.iteration - first)
            set_train_mode(net, freeze_bn=not args.is_training)
            for i in session.steps(first + steps[r], first=first, total=sum(steps[:last])):
                lr = set_poly_lr(optimizer, args.learning_rate, i - first, steps[r], args.power)
                optimizer.zero_grad()
                batch = next(batches)
                losses = step(net, run.place(batch.image), batch.label.to(run.device), batch.on_target.to(run.device),
                              mr_weight_kld=args.mr_weight_kld, run=run, scale=scaler.scale)
                run.average_gradients([net])
                scaler.step(optimizer)
                scaler.update()
                session.end_step(losses, batch.name, round=r, lr=lr)
            if session.exit_code:
                break
            enter(r + 1)
        if not session.exit_code:
            rounds.complete(before=args.num_rounds)
            if rounds.confusion is not None:
                rounds.say_scores()
    return session


def training_set(args: argparse.Namespace, data: DomainPair, files: PseudoLabels, source_images: Sequence[int],
                 report: Mapping, prior: Tensor | None, pixels: str) -> RoundSet:
    """Crops of the source images and of all pseudo-labelled images of a round."""
    crop = RandomCrop(args.crop_size, pixels, args.random_scale, args.random_mirror, args.mine_chance)
    thresholds = torch.tensor(list(report["thresholds"].values()))
    soft = partial(soft_labels_at, files, thresholds, args.lr_weight_ent, prior) if args.lr_weight_ent else None
    return RoundSet(data.source, source_images, files.open(), crop, (args.input_size, args.input_size_target),
                    (args.random_seed, report["round"]), [data.classes.index(name) for name in report["mine"]], soft)


def header(args: argparse.Namespace, run: runtime.Run, data: DomainPair, known: Mapping, loaded: str,
           source_images: int, steps: int, first_round: int) -> dict[str, object]:
    kld = [f"MRKLD with weight {args.mr_weight_kld} (what --mr-weight-kld {args.mr_weight_kld ** 0.5:.3g} did in the "
           "release)"] if args.mr_weight_kld else []
    prior = f", spatial prior {args.spatial_prior}" if args.spatial_prior else ""
    return {
        "weights": loaded,
        "network": f"{known['model']} {known['arch']}, {len(data.classes)} classes, ASPP {known['aspp']}",
        "batch norm": f"weights {'train' if args.bn_affine == 'train' else 'frozen'}, statistics "
                      f"{'update' if args.is_training else 'frozen'}"
                      + {"running": "", "target": ", re-estimated on the target for each round",
                         "both": ", re-estimated on both domains for each round"}[args.bn_stats],
        "pixels": known["pixels"],
        "source": f"{len(data.source)} images of {args.source}, {source_images} in round 0",
        "target": f"{len(data.target)} images of {args.target} to label",
        "validation": data.summary("", "")["validation"],
        "thresholds": {"cb": "one per class", "global": "one for all classes"}[args.kc_policy]
                      + f" ({args.kc_value}){prior}",
        "losses": ", ".join(["soft labels (LRENT)" if args.lr_weight_ent else "hard labels", *kld]),
        "batch": f"{args.batch_size * run.world} images a step = {args.batch_size} x {run.world} processes",
        "rounds": f"{first_round} to {args.num_rounds - 1}, {steps} steps, SGD {args.sgd}"}


# --- the demo ---------------------------------------------------------------------------------------------------------


def make_start(args: argparse.Namespace, path: Path) -> None:
    """The demo's start: a network from random weights, trained on all source images."""
    run = runtime.start(cpu=args.cpu, gpu=args.gpu, amp=args.amp, seed=args.random_seed,
                        deterministic=args.deterministic)
    data = open_data(args, run)
    known = {"model": args.model or "Deeplab", "arch": args.arch or "resnet18", "aspp": args.aspp or "full",
             "stride_on": "1x1", "pixels": args.pixels or "caffe"}
    images = RoundSet(data.source, range(len(data.source)), None,
                      RandomCrop(args.crop_size, known["pixels"], random_mirror=True), (args.input_size, None),
                      [args.random_seed])
    net = train_start(
        build(known["model"], len(data.classes), known["arch"], known["aspp"]), images,
        partial(step, mr_weight_kld=0.0, run=run), run, num_steps=DEMO_START_STEPS, rate=DEMO_START_RATE, sgd=args.sgd,
        momentum=args.momentum, weight_decay=args.weight_decay, workers=args.num_workers, seed=args.random_seed)
    if run.is_main:
        checkpoint.save_weights(net, path, {
            "script": "train_cbst.py", **known, "task": args.target, "classes": list(data.classes),
            "size": list(args.input_size_target), "align_corners": True})
    run.barrier()


def demo(args: argparse.Namespace) -> int:
    """Train on the rendered source, then rounds; print the tables, draw result/demo_cbst/report.png."""
    if args.restore_from is None:
        args.restore_from = f"{args.snapshot_dir}/start.pth"
        if args.resume is False or not Path(args.restore_from).exists():
            make_start(args, Path(args.restore_from))
    session = train(args)
    if session.exit_code:
        return session.exit_code
    run = session.run
    data = open_data(args, run)
    start, known, _ = open_network(args, data.classes)
    before, after = (predict.Validation(data, args.input_size_target, known["pixels"], run, session.folder,
                                        bn_stats="running", workers=args.num_workers, max_pictures=0)
                     for _ in range(2))
    before.confusion = predict.score(start.to(run.device), data.validation, before.size, before.pixels, run,
                                     workers=args.num_workers)
    after.confusion = session.extra_state["rounds"].confusion.numpy()
    compare(start, before, session.net, after, Path("result/demo_cbst/report.png"))
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    args = parse_args(argv)
    if args.demo:
        render_demo(Path(f"data/demo/{args.random_seed}"), seed=args.random_seed)
        return demo(args)
    return train(args).exit_code


if __name__ == "__main__":
    runtime.cli(main)
