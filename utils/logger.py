"""A run from its first epoch to its last: rows, models, checkpoints, and what stops it.

seeds = set_up(args)
with Logger(args, __file__) as logger:
    for epoch in logger.epochs(100, model=ac, optimizer=optimizer, buffer=buffer):
        logger.log(Epoch=epoch, EpRet=[12.0, 15.5], LossPi=-0.01, TotalEnvInteracts=2000)
"""

import os
import shlex
import sys
import time
from pathlib import Path

import numpy as np
import torch

from utils import mpi
from utils.check import check
from utils.display import Display
from utils.optim import fast_products
from utils.process import Interrupted, RunError, Signals, abort, available_cores, refuse_other_launchers, say
from utils.run_dir import RunDir
from utils.state import State


def set_up(args):
    """Refuse what cannot work, give torch its threads, and seed. Returns a generator that draws the environments' seeds."""
    refuse_other_launchers()
    check(args)
    torch.set_num_threads(min(args.torch_threads, max(1, available_cores() // mpi.size())))
    # Adam's averages of dead units' gradients decay to numbers below 1e-38, with which some processors are much slower
    torch.set_flush_denormal(True)
    if args.device == "cpu":
        fast_products(np.max(getattr(args, "hidden_sizes", 0), initial=0))
    return mpi.seed_everything(args.seed)


class Logger:
    """Writes a run. Only rank 0 writes, but for the checkpoints, of which each rank has its own. `dir` is the run directory.

    Ctrl-C, SIGTERM and SIGHUP stop the run with a checkpoint when `store` gets TotalEnvInteracts or at the end of the epoch; the
    same signal again stops it at once.
    """

    def __init__(self, args, script):
        """Make the run directory of `args` (an instance of RunArgs) for the algorithm file `script`, or open that to resume."""
        self.args, self.run = args, RunDir(args, script)
        root, path = Path(__file__).resolve().parent.parent, Path(script).resolve()
        in_folder = path.parent != root and path.is_relative_to(root)  # where only -m finds utils
        name = ["-m", ".".join(path.relative_to(root).with_suffix("").parts)] if in_folder else [os.path.relpath(script)]
        self.command = ["mpirun", "-n", str(mpi.size())] * (mpi.size() > 1) + ["python", *name]
        self.dir, self.stored, self.display = self.run.path, {}, None
        self.signals, self.epoch, self.logged, self.last_steps = Signals(), 0, 0, 0
        self.start = self.last_time = time.monotonic()

    def epochs(self, count, model, **state):
        """Yield the numbers of the epochs to do: 0 to count - 1, or from where the run to resume was left.

        `model`, the module whose weights model.pt holds, and `state` are all that changes in the course of the run, as
        utils.state.State describes it. They are restored before the first epoch, and saved every `save_freq` epochs and after
        the last one.
        """
        self.model, state = model, dict(model=model, **state)
        self.state = State(state, sys.modules[type(self.args).__module__], self.args)
        self.modules = [x for x in state.values() if isinstance(x, torch.nn.Module)]
        if self.args.resume is not None:
            info = self.run.restore(self.state)
            if info["epoch"] + bool(info["stored"]) > count:
                raise RunError(f"--total-steps {self.args.total_steps}: the run has done {info['last_steps']:,} already")
            mpi.check_equal(*self.modules)
            self.epoch, self.last_steps, self.stored = info["epoch"], info["last_steps"], info["stored"]
            self.start, self.last_time = (time.monotonic() - info[name] for name in ("elapsed", "since_row"))
        done = self.epoch == count
        if done and mpi.rank() == 0:
            say(f"{self.dir}: nothing to do, the run has its {self.last_steps:,} steps; --total-steps makes it longer")
        if done and self.run.config.get("finished"):
            return
        self.run.open()
        if mpi.rank() == 0:
            args, ranks = self.args, f"{mpi.size()} ranks" if mpi.size() > 1 else "1 process"
            steps = f"{count * args.steps_per_epoch:,} steps in epochs of {args.steps_per_epoch:,}"
            say(f"{self.dir}  ({args.env_id}, seed {args.seed}, {steps}, {args.device}, {ranks})")
            self.display = Display(count * args.steps_per_epoch, self.stored.get("TotalEnvInteracts", self.last_steps))
        while self.epoch < count:
            yield self.epoch
            self.epoch += 1
            regular = (self.epoch - 1) % self.args.save_freq == 0 or self.epoch == count
            if regular:
                self.save(keep=self.args.keep_checkpoints)
            if self.epoch < count:
                self.stop_if_told(save=not regular)
        self.run.finish()

    def store(self, **metrics):
        """Keep metrics for the next row: lists are joined, of an int the last counts, of other numbers the mean. With
        TotalEnvInteracts it is collective over the ranks: a signal may stop the run there."""
        for name, value in metrics.items():
            if isinstance(value, list):
                self.stored.setdefault(name, []).extend(value)
            elif type(value) is int or isinstance(value, np.integer):
                self.stored[name] = int(value)
            else:
                self.stored.setdefault(name, dict(mean=[]))["mean"].append(float(value))
        if "TotalEnvInteracts" in metrics:
            if self.display:
                self.display.update(metrics["TotalEnvInteracts"])
            self.stop_if_told()

    def log(self, **metrics):
        """Write one row; collective over the ranks.

        An int is the same on all ranks and written as it is; another number, a tensor's too, is averaged over the ranks. A list
        gives the columns Average, Std, Max and Min over the values of all ranks, blank when there are none. A metric that some
        epochs lack is blank there. `Time` (seconds since the start) and `StepsPerSec` (of this epoch, by `TotalEnvInteracts`)
        are added. Raises RunError for a number that is not finite.
        """
        metrics = {"Epoch": metrics["Epoch"]} | self.stored | metrics
        ranks = mpi.gather({name: x if isinstance(x, list | dict | int) else float(x) for name, x in metrics.items()})
        self.stored, row = {}, {}
        for name in dict.fromkeys(name for rank in ranks for name in rank):
            values = [rank[name] for rank in ranks if name in rank]
            if isinstance(values[0], list):
                numbers = np.concatenate(values)
                mean, std, high, low = (f(numbers) if len(numbers) else "" for f in (np.mean, np.std, np.max, np.min))
                row |= {f"Average{name}": mean, f"Std{name}": std, f"Max{name}": high, f"Min{name}": low}
            elif isinstance(values[0], dict):
                row[name] = np.mean(np.concatenate([value["mean"] for value in values]))
            else:
                row[name] = values[0] if type(values[0]) is int else sum(values) / len(values)
        steps, now = row["TotalEnvInteracts"], time.monotonic()
        for name, value in row.items():
            if value != "" and not np.isfinite(value):
                raise RunError(f"{name} is {value} at step {steps:,}; model.pt is left as it was")
        row |= dict(Time=now - self.start, StepsPerSec=(steps - self.last_steps) / max(now - self.last_time, 1e-9))
        self.last_time, self.last_steps, self.logged = now, steps, self.epoch + 1
        if mpi.rank() == 0:
            self.run.write_row(row)
            self.display.update(steps, row)

    def save(self, keep=False):
        """Write model.pt, if `keep` a copy model_<epoch>.pt too, and the checkpoint; collective over the ranks. Raises RunError if
        a weight is not finite, if the ranks' weights differ, or if a file cannot be written: the one before is left as it was."""
        mpi.check_equal(*self.modules)
        for name, tensor in (item for module in self.modules for item in module.state_dict().items()):
            if not torch.isfinite(tensor).all():
                raise RunError(f"parameter {name} is not finite at step {self.last_steps:,}; model.pt is left as it was")
        now = time.monotonic()
        epoch = max(self.epoch, self.logged)  # within an epoch whose row is written, as before a break, it is done
        info = dict(epoch=epoch, last_steps=self.last_steps, stored=self.stored, total_steps=self.args.total_steps)
        self.run.save(self.model, keep, self.state, info | dict(elapsed=now - self.start, since_row=now - self.last_time))

    def stop_if_told(self, save=True):
        """Stop the run, on all ranks, if one has got a signal."""
        signum = max(mpi.gather(max(self.signals.got, default=0)))
        if signum:
            if save:
                self.save()
            raise Interrupted(128 + signum)

    def __enter__(self):
        self.signals.__enter__()
        return self

    def __exit__(self, kind, error, trace):
        """End the display, the files and the W&B run; and all ranks, if this one is leaving early."""
        self.signals.__exit__()
        if self.display:
            self.display.close()
        self.run.close(failed=kind is not None)
        if kind and self.run.saves and mpi.rank() == 0:
            hint = f"to go on: {shlex.join([*self.command, '--resume', str(self.dir)])}"
            error.add_note(hint) if issubclass(kind, Exception) else say(hint)  # after the traceback
        if kind is SystemExit:  # the script's own, or the second signal's, which no other rank has heard; never in sys.excepthook
            abort(f"exits: {error}")
