"""The network from which the demo of self-training starts."""
from __future__ import annotations

from collections.abc import Callable, Mapping

from torch import Tensor, nn

from lib.datasets.folder import endless
from lib.datasets.rounds import RoundSet
from lib.models.deeplab import set_bn_affine, set_train_mode
from lib.optim import deeplab_sgd, set_poly_lr
from lib.runtime import Run


def train_start(net: nn.Module, images: RoundSet, step: Callable[..., Mapping[str, Tensor]], run: Run, *,
                num_steps: int, rate: float, sgd: str, momentum: float, weight_decay: float, workers: int,
                seed: int) -> nn.Module:
    """``net``, trained on ``images`` (a RoundSet) one by one.

    step: (net, images, labels, on_target) -> losses; it takes their gradients.
    """
    set_bn_affine(net, True)
    set_train_mode(net.to(run.device, memory_format=run.memory_format))
    optimizer = deeplab_sgd(net, sgd, rate, momentum, weight_decay)
    batches = endless(images, 1, workers, seed=seed, rank=run.rank, world=run.world)
    for i in range(num_steps):
        set_poly_lr(optimizer, rate, i, num_steps, 0.9)
        optimizer.zero_grad()
        batch = next(batches)
        losses = step(net, run.place(batch.image), batch.label.to(run.device), batch.on_target.to(run.device))
        run.average_gradients([net])
        optimizer.step()
        if (i + 1) % 50 == 0:
            run.say(f"start: step {i + 1} of {num_steps}, loss {losses['loss_seg'].item():.3f}")
    return net
