"""One training run's bookkeeping: where it resumes, what it logs, when it validates and saves, how it stops.

A Session runs no forward or backward pass and no optimiser step: a training script does these in plain sight,

    with Session(run, args, folder, modules, optimizers, ...) as session:    # resumes, catches signals
        session.header({"weights": ..., "source": ...})
        batches = session.batches(dataset, seed)
        for i in session.steps(args.num_steps):
            losses = step(...)                                                # forward, backward
            optimizer.step()
            session.end_step(losses, names)                                   # finite checks, log, validation

and what happens between two iterations (a snapshot, leaving on Ctrl-C) happens when the loop asks for the next one.
"""
from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from lib import checkpoint, ops, runtime
from lib.datasets.folder import DomainPair, endless
from lib.errors import UserError
from lib.files import atomic_write, make_folder, remove
from lib.flags import FREE_ARGUMENTS
from lib.runtime import Run


class Stateful(Protocol):
    """Anything that must be as it was when a run resumes: a scaler, an image pool, a memory."""

    def state_dict(self) -> dict: ...

    def load_state_dict(self, state: dict) -> object: ...


class PairBatch(NamedTuple):
    """A batch of each domain, on the run's device."""

    x_s: Tensor          # float32 [N, 3, H, W]
    y_s: Tensor          # int64 [N, H, W]
    x_t: Tensor | None   # float32 [N, 3, H, W]; None: source only
    names: list[str]     # of the images of both


class LastLosses(dict):
    """The latest value of every loss, also of those that an iteration leaves out; resumed with the run."""

    def state_dict(self) -> dict:
        return dict(self)

    def load_state_dict(self, state: dict) -> None:
        self.update(state)


class Session:
    """One run in ``folder``.

    args: the script's flags, among them those of lib.flags.add_run; all but FREE_ARGUMENTS and ``free`` must be the
    same when the run is resumed. modules: the networks by the suffix of their snapshots' names ({"": net, "_D1": ..});
    the first is the one that is validated. prefix: snapshots are named PREFIX + iteration + suffix + .pth; None writes
    no snapshots. snapshot: iteration -> None, called on the first process, writes them in another form instead. meta:
    iteration -> what a weight file says of its network. validation: called as validation(net, iteration, meta, log),
    see lib.predict.Validation. extra_state: further objects to save by name.
    Raises UserError where the folder holds another run, or where a resume file is not of this run.
    """

    def __init__(self, run: Run, args: argparse.Namespace, folder: Path, modules: Mapping[str, nn.Module],
                 optimizers: Sequence[torch.optim.Optimizer], *, scaler: torch.amp.GradScaler | None = None,
                 meta: Callable[[int], Mapping[str, object]], prefix: str | None = None,
                 snapshot: Callable[[int], object] | None = None, validation=None,
                 extra_state: Mapping[str, Stateful] | None = None, free: Iterable[str] = ()):
        self.run, self.args, self.folder, self.modules = run, args, Path(folder), dict(modules)
        self.optimizers, self.scaler = list(optimizers), scaler or run.scaler()
        self.meta, self.prefix, self.snapshot, self.validation = meta, prefix, snapshot, validation
        self.extra_state, self.free = dict(extra_state or {}), {*FREE_ARGUMENTS, *free}
        self.resume_file = self.folder / "resume.pth"
        self.iteration = 0          # iterations done
        self.exit_code = 0          # not 0 where a signal ended the run early
        self.resumed = False
        self.last_good: Path | None = None   # a checkpoint to go back to
        self._resume()

    @property
    def net(self) -> nn.Module:
        return next(iter(self.modules.values()))

    # --- beginning ----------------------------------------------------------------------------------------------------

    def _arguments(self) -> dict[str, object]:
        """What must be the same in a resumed run."""
        kept = {key: value for key, value in vars(self.args).items() if key not in self.free}
        return {**kept, "nproc_per_node": self.run.world}

    def _resume(self) -> None:
        make_folder(self.folder, "Choose another --snapshot-dir")
        asked = self.args.resume           # True, a file's name, or False/None; "" is --resume without a name
        asked = asked is not None and asked is not False
        path = Path(self.args.resume) if isinstance(self.args.resume, str) and self.args.resume else self.resume_file
        if asked and path.exists():
            state = checkpoint.load_resume(path, list(self.modules.values()), self.optimizers, self.scaler,
                                           self._arguments(), self.free, self.args.flag_names)
            self.iteration, self.last_good, self.resumed = state["iteration"], path, True
            with checkpoint.whole_run(path):
                if self.validation is not None and state.get("validation"):
                    self.validation.load_state_dict(state["validation"])
                for name, part in self.extra_state.items():
                    part.load_state_dict(state["extra"][name])
        elif asked and path != self.resume_file:
            raise UserError(f"--resume {path}: no such file")
        elif asked:
            self.run.say(f"note: there is no {path} yet: starting at the beginning")
        elif self.resume_file.exists() and not self.args.overwrite:
            raise UserError(f"{self.folder} holds an earlier run: go on with it (--resume), choose another "
                            "--snapshot-dir, or replace it (--overwrite)")
        elif self.run.is_main:
            for name in ("resume.pth", "best.pth", "log.jsonl"):
                remove(self.folder / name, "Choose another --snapshot-dir")
        self.run.barrier()

    def header(self, rows: Mapping[str, object]) -> None:
        """Print what this run is: device, precision and kernels, then ``rows``, then the folder."""
        if self.resumed:
            rows = {**rows, "weights": f"resumed at iteration {self.iteration}"}
        runtime.header(self.run, {"kernels": ops.backend(), **rows, "output": self.folder})

    def __enter__(self) -> Session:
        self.stop = runtime.StopRequest()
        self.stop.__enter__()
        tensorboard = Path(self.args.log_dir or self.folder) if self.args.tensorboard else None
        self.log = Log(self.run, self.folder / "log.jsonl", self.iteration, tensorboard)
        return self

    def batches(self, dataset, seed: int, passes: int = 1, start: int | None = None,
                batch_size: int | None = None) -> Iterator:
        """Endless shuffled batches of this process, from where the run stands; ``passes`` batches an iteration.

        start: the iteration of this data set to begin at (default: the run's). batch_size: default: --batch-size.
        """
        start = (self.iteration if start is None else start) * passes
        return endless(dataset, batch_size or self.args.batch_size, self.args.num_workers, seed=seed, start=start,
                       rank=self.run.rank, world=self.run.world, pin=self.run.device.type == "cuda")

    def pairs(self, data: DomainPair, seed: int, passes: int = 1, source_only: bool = False) -> Iterator[PairBatch]:
        """``batches`` of both domains side by side."""
        batches_t = None if source_only else self.batches(data.target, seed + 1, passes)
        for batch in self.batches(data.source, seed, passes):
            names, x_t = list(batch.name), None
            if batches_t is not None:
                batch_t = next(batches_t)
                names, x_t = names + list(batch_t.name), self.run.place(batch_t.image)
            yield PairBatch(self.run.place(batch.image), batch.label.to(self.run.device), x_t, names)

    # --- the loop -----------------------------------------------------------------------------------------------------

    def steps(self, stop_at: int, first: int = 0, total: int | None = None) -> Iterator[int]:
        """The iterations that remain until ``stop_at``; fewer where a signal asks the run to leave.

        Where the loop is one part of a longer run, it began at iteration ``first``, from which the intervals of
        logging, validation and saving are counted, and the run ends at ``total``.
        """
        self.first, self.stop_at = first, stop_at
        self.log.expect(self.iteration, total or stop_at)
        for i in range(self.iteration, stop_at):
            yield i
            self.iteration = i + 1
            if self.iteration < self.log.total:
                self.leave_if_asked()
            is_snapshot = self.is_due(self.args.save_pred_every, self.iteration)
            if is_snapshot and self.run.is_main:
                self.save_snapshot()
            if is_snapshot or self.exit_code:
                self.save()
            if self.exit_code:
                return
        if self.validation is not None and self.validation.iteration != self.iteration:  # resumed at its end
            self._validate(self.iteration)

    def end_step(self, losses: Mapping[str, Tensor] | Sequence[Mapping[str, Tensor]], names: Iterable[str],
                 **values: float) -> None:
        """Check, log and validate the iteration that has just been computed.

        losses: scalars by name, or one such mapping for each of several passes, which are averaged. names: the files
        that were in the batch. values: further numbers to log, such as the learning rate. Raises UserError where a
        loss or a weight is not finite.
        """
        done = self.iteration + 1
        passes = [losses] if isinstance(losses, Mapping) else list(losses)
        means = {key: sum(p[key].detach() for p in passes) / len(passes) for key in passes[0]}
        means = self.run.mean_values(means)
        require_finite(means, done, names, self.last_good)
        require_finite_weights(self.modules.values(), done, names, self.last_good)
        self.log.advance()
        if self.is_due(self.args.log_every):
            counters = {key: value for key, value in values.items() if isinstance(value, int)}
            self.log.losses(done, {**counters, **means, **{k: v for k, v in values.items() if k not in counters}})
        if self.validation is not None and self.is_due(self.args.eval_every):
            self._validate(done)

    def is_due(self, every: int, done: int | None = None) -> bool:
        """Whether the iteration at work (or number ``done``) ends an interval of ``every``, or is the last."""
        done = self.iteration + 1 if done is None else done
        return (done - self.first) % every == 0 or done == self.stop_at

    def leave_if_asked(self) -> bool:
        """Set ``exit_code``, and return True, where a signal has come to any process."""
        if self.run.any(self.stop.signal is not None):
            self.exit_code = 128 + (self.stop.signal or 0)
        return self.exit_code != 0

    def _validate(self, iteration: int) -> None:
        self.validation(self.net, iteration, self.meta(iteration), self.log)

    # --- what is kept -------------------------------------------------------------------------------------------------

    def save_snapshot(self) -> None:
        """The weights of each network, under the names of the release."""
        if self.snapshot is not None:
            self.snapshot(self.iteration)
        elif self.prefix is not None:
            for suffix, module in self.modules.items():
                checkpoint.save_weights(module, self.folder / f"{self.prefix}{self.iteration}{suffix}.pth",
                                        self.meta(self.iteration))

    def save(self) -> None:
        """resume.pth: everything that the run needs to go on exactly."""
        if self.run.is_main:
            checkpoint.save_resume(
                self.resume_file, list(self.modules.values()), self.optimizers, self.scaler, self.meta(self.iteration),
                iteration=self.iteration, arguments=self._arguments(),
                validation=self.validation and self.validation.state_dict(),
                extra={name: part.state_dict() for name, part in self.extra_state.items()})
        self.last_good = self.resume_file
        self.run.barrier()

    def __exit__(self, kind, *_) -> None:
        self.stop.__exit__()
        if kind is None and self.exit_code:
            self.run.say(f"stopped at iteration {self.iteration}; --resume goes on from {self.resume_file}")
        elif kind is None and self.validation is not None:
            self.validation.report()
        self.log.close()
        if kind is None:
            self.run.barrier()


class Passes:
    """Several passes over images, by name and in order, that count something and can be resumed at any image.

    counts: integer tensors by name, filled by the caller, each process with its share of the images; they and the
    position are saved to ``path`` every ``every`` images and after each pass. Saving adds the counts of all processes
    up on the first one. Only what is not 0 is written.
    """

    def __init__(self, names: Sequence[str], path: Path, run: Run, counts: Mapping[str, Tensor], every: int,
                 stop: runtime.StopRequest):
        self.names, self.path, self.run, self.counts = list(names), path, run, counts
        self.every, self.stop = every, stop
        self.passed, self.position = 0, 0    # passes completed; images of the present one, over all processes
        self.leaving = False                 # a signal asks the run to leave
        if path.exists():
            state = checkpoint.load(path)
            self.passed, self.position = state["stage"], state["position"]
            if run.is_main:
                for name, (places, values) in state["counts"].items():
                    counts[name].view(-1)[places.to(run.device)] = values.to(run.device)

    def over(self, name: str, length: int, load: Callable[[list[int]], Iterable]) -> Iterator[tuple[int, object]]:
        """(index, item) of this process's share of ``length`` images; nothing where that pass was completed before.

        load: indices -> their items in order.
        """
        number = self.names.index(name)
        if number < self.passed or self.leaving:
            return
        world, rank = self.run.world, self.run.rank
        turns = range(self.position, -(-length // world))
        items = iter(load([i for i in (n * world + rank for n in turns) if i < length]) if turns else ())
        for n in tqdm(turns, name, unit="image", leave=False, disable=None if self.run.is_main else True):
            if n * world + rank < length:
                yield n * world + rank, next(items)
            self.position = n + 1
            self.leaving = self.run.any(self.stop.signal is not None)
            if self.leaving or self.position % self.every == 0:
                self._save()
            if self.leaving:
                return
        self.passed, self.position = number + 1, 0
        self._save()

    def _save(self) -> None:
        if self.run.world > 1:
            for count in self.counts.values():
                count.copy_(self.run.sum(count))
                if not self.run.is_main:
                    count.zero_()
        if self.run.is_main:
            places = {name: count.view(-1).nonzero()[:, 0] for name, count in self.counts.items()}
            checkpoint.save({"stage": self.passed, "position": self.position, "counts": {
                name: (at.cpu(), self.counts[name].view(-1)[at].cpu()) for name, at in places.items()}}, self.path)
        self.run.barrier()


class Log:
    """log.jsonl (one JSON object a logging step), optionally TensorBoard, and the progress bar.

    A resumed run drops the lines after ``iteration``, so the file reads as if it had never been interrupted.
    Off the terminal the bar becomes one printed line per logging step.
    """

    def __init__(self, run: Run, path: Path, iteration: int, tensorboard: Path | None = None):
        self.run, self.path, self.bar, self.writer = run, path, None, None
        self.first, self.total = iteration, iteration
        if not run.is_main:
            return
        kept = _lines_until(path, iteration) if iteration and path.exists() else []
        with atomic_write(path) as new:  # a process killed here loses no line
            new.write_text("".join(kept))
        if tensorboard is not None:
            make_folder(tensorboard, "Choose another --log-dir")
            try:
                from torch.utils.tensorboard import SummaryWriter
            except ImportError as error:
                raise UserError(f"--tensorboard needs the package tensorboard (pip install tensorboard): {error}") \
                    from None
            self.writer = SummaryWriter(tensorboard, purge_step=iteration + 1)

    def expect(self, iteration: int, total: int) -> None:
        """Start counting at ``iteration``, towards ``total``."""
        self.first, self.total, self.started = iteration, total, time.monotonic()
        if self.run.is_main and sys.stderr.isatty() and self.bar is None:
            self.bar = tqdm(total=total, initial=self.first, unit="it", dynamic_ncols=True, smoothing=0.1)

    def advance(self) -> None:
        if self.bar is not None:
            self.bar.update()

    def losses(self, iteration: int, values: Mapping[str, float]) -> None:
        """Record the scalars of one logging step. The console shows totals alone where there are totals."""
        if not self.run.is_main:
            return
        self._write(iteration, values)
        if any(k.endswith("_total") for k in values):
            values = {k: v for k, v in values.items() if k.endswith("_total") or not k.startswith("loss_")}
        text = " ".join(f"{k} = {v:.3g}" if k.startswith("lr") else f"{k} = {v}" if isinstance(v, int)
                        else f"{k} = {v:.3f}" for k, v in values.items())
        memory = f"{runtime.peak_memory(self.run.device):.1f} GiB"
        if self.bar is not None:
            self.bar.set_postfix_str(f"{text} {memory}")
        else:
            speed = (iteration - self.first) / (time.monotonic() - self.started)
            left = (self.total - iteration) / speed if speed > 0 else float("nan")
            print(f"iter = {iteration:8d}/{self.total:8d}, {text}, {speed:.2f} it/s, {left / 60:.1f} min left, "
                  f"{memory}", flush=True)

    def scores(self, iteration: int, values: Mapping[str, object]) -> None:
        """Record an evaluation, or any other event."""
        if self.run.is_main:
            self._write(iteration, values)

    def _write(self, iteration: int, values: Mapping[str, object]) -> None:
        try:
            with open(self.path, "a") as f:
                f.write(json.dumps({"iteration": iteration, **values}) + "\n")
        except OSError as error:
            raise UserError(f"cannot write {self.path}: {error.strerror}. Free some space; --resume goes on from the "
                            "last saved point") from None
        if self.writer is not None:
            for key, value in values.items():
                if isinstance(value, (int, float)):
                    self.writer.add_scalar(key, value, iteration)

    def close(self) -> None:
        if self.bar is not None:
            self.bar.close()
        if self.writer is not None:
            self.writer.close()


def _lines_until(path: Path, iteration: int) -> list[str]:
    """The log's lines up to ``iteration``. Raises UserError for a file that is not a log."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: the log cannot be read ({error}). Move it away, and --resume again") from None
    kept = []
    for number, line in enumerate(lines, 1):
        if not line.endswith("\n"):  # a killed process can leave a torn last line
            continue
        try:
            if json.loads(line)["iteration"] <= iteration:
                kept.append(line)
        except (ValueError, KeyError, TypeError):
            raise UserError(f"{path}, line {number}: not a line of a run's log. Remove it, and --resume again") \
                from None
    return kept


def require_finite(losses: Mapping[str, float], iteration: int, files: Iterable[str], last_good: Path | None) -> None:
    """Stop the run at a loss that is nan or infinite. Raises UserError with the iteration, files and checkpoint."""
    bad = {k: v for k, v in losses.items() if not np.isfinite(v)}
    if bad:
        raise UserError(
            f"iteration {iteration}: " + ", ".join(f"{k} is {v}" for k, v in bad.items())
            + f" for the images {', '.join(files)}. Last good checkpoint: {last_good or 'none yet'}. "
            "A lower --learning-rate, or --amp off, are the first things to try.")


def require_finite_weights(modules: Iterable[nn.Module], iteration: int, files: Iterable[str],
                           last_good: Path | None) -> None:
    """The same for the weights after a step: a finite loss may have a gradient that is not. Raises UserError."""
    norm = nn.utils.get_total_norm(p.detach() for module in modules for p in module.parameters())
    require_finite({"the norm of the weights": float(norm)}, iteration, files, last_good)
