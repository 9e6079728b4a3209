"""Scores of person re-identification: CMC, mAP, re-ranking, and pictures of what was found.

    python evaluate_reid.py --restore-from logs/ecn/checkpoint.pth.tar -t market --rerank --save-ranks 10
    python evaluate_reid.py --restore-from FILE -t market --save-features market.npz    # keep the features, and
    python evaluate_reid.py --features market.npz --rerank                              # score them again

FILE is a checkpoint of train_ecn.py or of the releases of ECN, CamStyle and eSPGAN; what it is shows in its keys.
Images of the same person by the query's own camera do not count, junk is dropped, distractors stay, and queries without
a match are left out (with --protocol matlab they count as 0). Papers mean two things by mAP, half a point to a point
apart: the area under the curve by trapezoids (MATLAB, ECN, CamStyle) and the mean of precisions (torchreid, fast-reid).
Both are printed. No matrix of queries x gallery is stored. See docs/evaluation_reid.md.
"""
from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from pathlib import Path

from torch import Tensor

from lib import checkpoint, flags, ops, runtime, visual
from lib.datasets.persons import DUKE_NOTICE, PersonSet, TestTransform, check, open_persons
from lib.datasets.pictures import spread
from lib.datasets.transforms import PIXELS
from lib.errors import UserError
from lib.files import write_json
from lib.metrics_reid import match_lists, reranked_scores, scores
from lib.models.reid import from_weights
from lib.predict_reid import (
    RANKS,
    extract,
    in_percent,
    names_of,
    rank_row,
    read_features,
    reestimate_bn,
    write_features,
)

AVERAGES = {"trapezoid": "mAP", "precision": "mAP_precision"}  # names in lib.predict_reid.in_percent
PROTOCOLS = {"release": {"ties": "group", "unmatched": "skip"}, "matlab": {"ties": "items", "unmatched": "zero"}}


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    p = flags.parser(__doc__, whole=True)
    given = p.add_mutually_exclusive_group(required=True)
    given.add_argument("--restore-from", "--resume", metavar="FILE", help="checkpoint")
    given.add_argument("--features", metavar="FILE", help="what --save-features wrote, in place of a network")
    net = p.add_argument_group("features of a network")
    net.add_argument("-t", "--target", help="folder below --data-dir, or any folder of that form (default: market)")
    net.add_argument("--data-dir", default="data", help="where the data sets lie")
    net.add_argument("--height", type=flags.side, help="default: the checkpoint's, else 256")
    net.add_argument("--width", type=flags.side, help="default: the checkpoint's, else 128")
    net.add_argument("--pixels", choices=list(PIXELS), help="default: the checkpoint's, else imagenet")
    flags.add_features(net)
    net.add_argument("--save-features", metavar="FILE", help="write the features and names (.npz)")
    net.add_argument("-b", "--batch-size", type=flags.batch, default=64)
    net.add_argument("-j", "--workers", "--num-workers", dest="num_workers", type=flags.workers,
                     default=min(4, os.cpu_count() or 1), help="loader processes")
    score = p.add_argument_group("scores")
    score.add_argument("--ap", choices=list(AVERAGES), default="trapezoid", help="which of the two is called mAP")
    score.add_argument("--protocol", choices=list(PROTOCOLS), default="release",
                       help="matlab: equal distances one by one, queries without a match count as 0")
    score.add_argument("--rerank", action="store_true", help="also after k-reciprocal re-ranking (Zhong et al. 2017)")
    score.add_argument("--k1", type=flags.count, default=20)
    score.add_argument("--k2", type=flags.count, default=6)
    score.add_argument("--lambda", dest="lambda_", type=flags.share, default=0.3)
    score.add_argument("--rerank-power", type=int, choices=[1, 2], default=1,
                       help="2: squares the squared distances again, as torchreid does")
    score.add_argument("--save-ranks", type=flags.natural, default=0, metavar="N",
                       help="pictures of N queries with their ten nearest")
    score.add_argument("--save", metavar="FOLDER", default="result/ranks", help="where these go")
    score.add_argument("--json", metavar="FILE", help="write the scores there")
    flags.add_machine(p)
    args = p.parse_args(argv)
    if args.features and (args.target or args.save_features or args.lmp or args.mirrored):
        p.error("--features: the features are there; -t, --lmp, --mirrored and --save-features need --restore-from")
    if args.lmp and args.output_feature == "fc":
        p.error("--lmp takes the place of pool5: leave --output_feature fc out")
    if args.features:
        p.note("with --features", "data_dir", "height", "width", "pixels", "output_feature", "bn_stats", "batch_size",
               "num_workers", "amp", "gpu")
    if not args.rerank:
        p.note("without --rerank", "k1", "k2", "lambda_", "rerank_power")
    if not args.save_ranks:
        p.note("without --save-ranks", "save")
    if args.cpu:
        p.note("with --cpu", "gpu")
    return args


def compute_features(args: argparse.Namespace, run: runtime.Run) -> tuple[Tensor, PersonSet]:
    """([Q + N, D] float32 on the CPU, queries first; the images they belong to)."""
    weights, meta = checkpoint.read_weights(args.restore_from)
    net = from_weights(weights, args.restore_from).to(run.device)
    parts = ("train", "query", "gallery") if args.bn_stats == "target" else ("query", "gallery")
    data = open_persons(args.data_dir, args.target or "market", parts)
    check(data)
    height, width = meta.get("size", (256, 128))
    transform = TestTransform((args.height or height, args.width or width),
                              args.pixels or meta.get("pixels", "imagenet"))
    runtime.header(run, {"weights": args.restore_from, "target": data.root, "kernels": ops.backend(),
                         "feature": f"{args.output_feature}{f', {args.lmp} parts' if args.lmp else ''}"
                                    f"{', mirrored image added' if args.mirrored else ''}, BN {args.bn_stats}",
                         "images": f"{len(data.query)} queries, {len(data.gallery)} in the gallery, at "
                                   "{} x {} (height x width), {}".format(*transform.size, transform.pixels)})
    if data.name.lower() == "duke":
        run.say(DUKE_NOTICE)
    if args.bn_stats == "target":
        net = reestimate_bn(net, data.train, transform, run, batch=args.batch_size, workers=args.num_workers)
    features = extract(net, [*data.query, *data.gallery], transform, run, output=args.output_feature, lmp=args.lmp,
                       mirrored=args.mirrored, batch=args.batch_size, workers=args.num_workers).cpu()
    if args.save_features and run.is_main:
        write_features(Path(args.save_features), features, data)
    return features, data


def save_ranks(folder: Path, data: PersonSet, found: dict[str, dict[int, list[int]]]) -> None:
    """One picture a query: a row of the ten nearest for each way of ranking."""
    first = next(iter(found.values()))
    for i, nearest in first.items():
        columns = ["query", *map(str, range(1, len(nearest) + 1))]
        panel = visual.panel([rank_row(data, i, of_way[i]) for of_way in found.values()], columns)
        visual.save(panel, folder / f"{data.query[i].path.stem}.png")


def table(rows: dict[str, dict[str, float]], ap: str) -> str:
    names = {"trapezoid": "area by trapezoids", "precision": "mean of precisions"}
    other = next(name for name in AVERAGES if name != ap)
    lines = [f"{'':10}" + "".join(f"{f'R{k}':>7}" for k in RANKS) + f"{'mAP':>7}   mAP is the {names[ap]}; "
             f"the {names[other]}:"]
    lines += [f"{name:10}" + "".join(f"{row[key]:7.2f}" for key in (*(f"R{k}" for k in RANKS), AVERAGES[ap]))
              + f"   {row[AVERAGES[other]]:.2f}" for name, row in rows.items()]
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> None:
    args = parse_args(argv)
    run = runtime.start(cpu=args.cpu, gpu=args.gpu, amp=args.amp, seed=0, deterministic=False)
    ops.use(args.ops)
    for path in (args.json, args.save_features):
        if path and not Path(path).absolute().parent.is_dir():
            raise UserError(f"{path}: its folder does not exist")
    features, data = read_features(args.features) if args.features else compute_features(args, run)
    if not run.is_main:
        return
    queries, protocol = len(data.query), PROTOCOLS[args.protocol]
    matches, own = match_lists(*names_of(data.query), *names_of(data.gallery))
    if not len(matches.item):
        raise UserError(f"{data.name}: no query has a match, an image of the same person by another camera in the "
                        "gallery. Are identities and cameras those of one data set?")
    query, gallery = features[:queries], features[queries:]
    result = scores(matches, ops.rank_counts(query, gallery, matches, own), **protocol)
    rows, found, shown = {"features": in_percent(result)}, {}, spread(queries, args.save_ranks)
    if shown:
        own_shown = match_lists(*names_of([data.query[i] for i in shown]), *names_of(data.gallery))[1]
        nearest = ops.topk_pairs(query[shown], gallery, min(10, len(gallery)), own_shown)[0].tolist()
        found["features"] = dict(zip(shown, nearest, strict=True))
    if args.rerank:
        reranked, found_again = reranked_scores(features, queries, matches, own, show=shown, k1=args.k1, k2=args.k2,
                                                lambda_=args.lambda_, power=args.rerank_power, **protocol)
        rows["re-ranked"] = in_percent(reranked)
        if shown:
            found["re-ranked"] = found_again
    if shown:
        save_ranks(Path(args.save), data, found)
        run.say(f"{len(shown)} queries with their nearest: {args.save}")

    junk = data.junk.get("gallery", 0)
    run.say(f"{data.name}: {queries} queries, {len(data.gallery)} images in the gallery"
            + (f" ({junk} of junk dropped)" if junk else "") + f", {features.shape[1]} numbers each")
    if len(result.unmatched):
        run.say(f"{len(result.unmatched)} queries have no match and "
                + ("count as 0" if args.protocol == "matlab" else "are left out"))
    run.say(table(rows, args.ap))
    if args.json:
        about = {"ap": args.ap, "protocol": args.protocol, "from": args.features or args.restore_from}
        for row in rows.values():
            row["mAP_trapezoid"], row["mAP"] = row["mAP"], row[AVERAGES[args.ap]]
        write_json(args.json, {**about, **rows}, "Choose another --json")


if __name__ == "__main__":
    runtime.cli(main)
