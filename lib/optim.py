"""The optimisers that made the published numbers of AdaptSegNet and its descendants, and the schedule they share.

The release collected the backbone's parameters by walking nested modules, so a convolution stands in the list once per
enclosing module: conv1 once, block convolutions three times, down-sampling ones four times. PyTorch up to 0.4 applied
every occurrence in turn; newer versions do something else. ReleasedSGD performs those sequential updates.
"""
from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor, nn

from lib.errors import UserError
from lib.models.deeplab import named_groups
from lib.runtime import Run

MAX_SKIPPED = 20  # steps of a GuardedStep in a row


class ReleasedSGD(torch.optim.Optimizer):
    """SGD in which a parameter of a group with ``repeats`` m is updated m times in a row from one gradient:

        g <- g + weight_decay * p;  buf <- momentum * buf + g;  p <- p - lr * buf        (buf starts at 0)

    where g is changed in place, so each repetition adds the weight decay once more. No Nesterov, no dampening.
    The m updates are linear in (p, buf, g), so their product is applied in one pass over the memory.
    """

    def __init__(self, params, lr: float, momentum: float = 0.9, weight_decay: float = 0.0):
        super().__init__(params, dict(lr=lr, momentum=momentum, weight_decay=weight_decay, repeats=1))

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            if not params:
                continue
            for p in params:
                if "momentum_buffer" not in self.state[p]:
                    self.state[p]["momentum_buffer"] = torch.zeros_like(p)
            buffers, grads = [self.state[p]["momentum_buffer"] for p in params], [p.grad for p in params]
            p, buf, g = np.eye(3)  # each as a combination of the old (p, buf, g)
            for _ in range(group["repeats"]):
                g = g + group["weight_decay"] * p
                buf = group["momentum"] * buf + g
                p = p - group["lr"] * buf
            # an absurd rate shall give an infinite loss, which the scripts report, not an overflowing conversion
            largest = torch.finfo(params[0].dtype).max
            p, buf = np.clip(p, -largest, largest), np.clip(buf, -largest, largest)
            old = torch._foreach_mul(buffers, p[1])
            torch._foreach_mul_(buffers, buf[1])
            torch._foreach_add_(buffers, params, alpha=buf[0])
            torch._foreach_add_(buffers, grads, alpha=buf[2])
            torch._foreach_mul_(params, p[0])
            torch._foreach_add_(params, old)
            torch._foreach_add_(params, grads, alpha=p[2])


class ReleasedAdam(torch.optim.Adam):
    """Adam of PyTorch 0.4, which added eps before the bias correction of the second moment.

    sqrt(v) + eps, corrected afterwards, is today's form with eps / sqrt(1 - beta2^t).
    """

    def step(self, closure=None):
        eps = [group["eps"] for group in self.param_groups]
        for group in self.param_groups:
            done = next((int(self.state[p]["step"]) for p in group["params"] if p in self.state), 0)
            group["eps"] /= (1 - group["betas"][1] ** (done + 1)) ** 0.5
        try:
            return super().step(closure)
        finally:
            for group, value in zip(self.param_groups, eps, strict=True):
                group["eps"] = value


def deeplab_sgd(net: nn.Module, flavour: str, lr: float, momentum: float, weight_decay: float,
                head_lr_mult: float = 10.0) -> torch.optim.Optimizer:
    """SGD for a network of lib.models.deeplab, heads at ``head_lr_mult`` times the rate.

    flavour "released": a ResNet's backbone parameter is applied as often as it stands in the released list, which is
    the number of modules around it (the dots of its name), and one of VGG-16 or MobileNetV2 (``features``) once, since
    the release did not walk those; "once": every parameter once.
    """
    groups: dict[tuple[int, float], list[nn.Parameter]] = {}
    for name, parameter, in_head in named_groups(net):
        once = in_head or flavour == "once" or name.startswith("features.")
        repeats = 1 if once else name.count(".")
        groups.setdefault((repeats, head_lr_mult if in_head else 1.0), []).append(parameter)
    groups = [dict(params=params, repeats=repeats, lr_mult=mult) for (repeats, mult), params in groups.items()]
    if flavour == "once":
        return torch.optim.SGD(groups, lr, momentum, weight_decay=weight_decay, fused=True)
    return ReleasedSGD(groups, lr, momentum, weight_decay)


def set_poly_lr(optimizer: torch.optim.Optimizer, base: float, iteration: int, num_steps: int, power: float) -> float:
    """lr = base * (1 - iteration / num_steps)^power (times the group's lr_mult), for ``iteration`` counted from 0."""
    lr = base * (1 - iteration / num_steps) ** power
    for group in optimizer.param_groups:
        group["lr"] = lr * group.get("lr_mult", 1.0)
    return lr


class GuardedStep:
    """Backward pass and optimiser step, which is skipped where the norm of the gradient is not sane.

    A crop of one colour gives gradients of 1e31, and infinite ones, while the loss stays finite: each of eleven
    instance norms in a row may multiply by 1 / sqrt(1e-5). Such a step would spoil Adam's moments for thousands of
    iterations. Raises UserError after MAX_SKIPPED steps in a row.
    """

    def __init__(self, run: Run, modules: Mapping[str, nn.Module],
                 optimizers: Mapping[str, torch.optim.Optimizer], scaler: torch.amp.GradScaler, max_gradient: float):
        self.run, self.modules, self.optimizers, self.scaler = run, modules, optimizers, scaler
        self.max_gradient = max_gradient
        self.in_a_row = dict.fromkeys(modules, 0)   # skipped steps of each part
        self.stepped = dict.fromkeys(modules, True)
        self.where = ""     # of the iteration, for the message

    def __call__(self, part: str, loss: Tensor) -> None:
        self.backward(part, loss)
        self.step(part)

    def backward(self, part: str, loss: Tensor) -> None:
        """Gradients of one of several losses, whose sum the next step follows."""
        if self.stepped[part]:
            self.optimizers[part].zero_grad()
            self.stepped[part] = False
        self.scaler.scale(loss).backward()

    def step(self, part: str) -> None:
        optimizer, parameters = self.optimizers[part], self.modules[part].parameters()
        self.stepped[part] = True
        self.run.average_gradients([self.modules[part]])
        self.scaler.unscale_(optimizer)
        norm = nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None]).item()
        overflow = self.run.amp == "fp16" and not np.isfinite(norm)  # the scaler's business
        if norm <= self.max_gradient or overflow:
            self.scaler.step(optimizer)
            self.in_a_row[part] = 0
            return
        self.in_a_row[part] += 1
        self.run.say(f"{self.where}: the gradient of {part} has the norm {norm:.3g}, its step is skipped")
        if self.in_a_row[part] == MAX_SKIPPED:
            raise UserError(f"{self.where}: {MAX_SKIPPED} steps in a row had gradients above --max-gradient "
                            f"{self.max_gradient:g}: the weights are spoilt, or the pictures are. Go on from an older "
                            "checkpoint with a lower --lr")
