"""Custom operators: cycle association, class-balanced pseudo-labels, retrieval; compiled where csrc/ builds.

Every function runs the compiled kernel where there is one for the tensor's device and its PyTorch reference (also the
tests' oracle) elsewhere, with the same results. csrc/ is compiled on first use, cached by content, optional:

    python -m lib.ops --build [--cuda]     builds ahead (and checks that the CUDA sources compile everywhere)
    use("auto" | "compiled" | "reference") what a script's --ops does; SEGADAPT_OPS in the environment sets the default
    SEGADAPT_ARCH=x86-64-v3                replaces the default -march=native (-mcpu=native on arm64)
    TORCH_EXTENSIONS_DIR                   where the compiled library is kept (default ~/.cache/segadapt)
"""
from lib.ops.association import CycleAssociation, cycle_association_loss, mutual_argmax, spatial_aggregate
from lib.ops.build import backend, use
from lib.ops.pseudo_label import (
    Thresholds,
    confidence_histogram_,
    new_histogram,
    predicted_pixels,
    probabilities_at,
    pseudo_label,
    refine_from_maps_,
    refine_histogram_,
    select_threshold,
    upsample_argmax,
)
from lib.ops.retrieval import Lists, Ranks, distances, pair_distances, rank_counts, row_rank_counts, topk_pairs

__all__ = ["CycleAssociation", "Lists", "Ranks", "Thresholds", "backend", "confidence_histogram_",
           "cycle_association_loss", "distances", "mutual_argmax", "new_histogram", "pair_distances",
           "predicted_pixels", "probabilities_at", "pseudo_label", "rank_counts", "refine_from_maps_",
           "refine_histogram_", "row_rank_counts", "select_threshold", "spatial_aggregate", "topk_pairs",
           "upsample_argmax", "use"]
