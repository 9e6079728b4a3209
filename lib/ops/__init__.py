"""Custom operators: cycle association and class-balanced pseudo-labels, compiled where csrc/ builds, PyTorch elsewhere.

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
    pseudo_label,
    refine_histogram_,
    select_threshold,
    upsample_argmax,
)

__all__ = ["CycleAssociation", "Thresholds", "backend", "confidence_histogram_", "cycle_association_loss",
           "mutual_argmax", "new_histogram", "predicted_pixels", "pseudo_label", "refine_histogram_",
           "select_threshold", "spatial_aggregate", "upsample_argmax", "use"]
