"""What surrounds a run: its common arguments and their checks, the run directory, the display, W&B, the saved model.

with Logger(args, __file__) as logger:
    logger.log(Epoch=0, EpRet=[12.0, 15.5], LossPi=-0.01, TotalEnvInteracts=2000)
    logger.save_model(ac)
"""

import dataclasses
import difflib
import json
import math
import os
import pathlib
import platform
import re
import shlex
import subprocess
import sys
import time
from dataclasses import dataclass

import gymnasium as gym
import numpy as np
import torch
from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from utils import mpi
from utils.mpi import RunError


@dataclass
class RunArgs:
    """The arguments that every run has and no paper mentions."""

    exp_name: str | None = None  # name of the experiment; <algorithm>_<env_id> if not given
    data_dir: str = "data"  # the run goes to <data_dir>/<exp_name>/<exp_name>_s<seed>/
    save_freq: int = 10  # epochs between two saves of model.pt; the last epoch always saves
    device: str = "cpu"  # torch device of the networks: cpu, cuda, cuda:1, mps
    torch_threads: int = 1  # threads of torch in each process; networks of this size are fastest with 1
    track: bool = False  # log to Weights & Biases too
    wandb_project: str = "deep-rl"  # W&B project
    wandb_entity: str | None = None  # W&B user or team
    wandb_group: str | None = None  # W&B group, to hold runs together


# Ranges by name, so that an argument which a copied script adds under a known name is checked too.
_AT_LEAST_1 = (
    "total_steps steps_per_epoch num_envs max_ep_len train_iters minibatch_size cg_iters backtrack_iters "
    "save_freq torch_threads batch_size replay_size update_every policy_delay"
).split()
_AT_LEAST_0 = (
    "seed train_v_iters damping_coeff start_steps update_after num_test_episodes act_noise target_noise noise_clip"
).split()
_ABOVE_0 = "pi_lr vf_lr q_lr alpha target_kl delta clip_ratio".split()
_FROM_0_TO_1 = "gamma lam backtrack_coeff polyak".split()


def _flag(name):
    return "--" + name.replace("_", "-")


def _check_ranges(args):
    def require(name, holds, condition):
        value = getattr(args, name, None)
        values = value if isinstance(value, tuple) else (value,)
        if not all(v is None or holds(v) for v in values):  # written so that NaN does not hold
            shown = " ".join(map(str, values))
            raise RunError(f"{_flag(name)} {shown}: has to be {condition}")

    for name in _AT_LEAST_1 + ["hidden_sizes"]:
        require(name, lambda v: v >= 1, "at least 1")
    for name in _AT_LEAST_0:
        require(name, lambda v: 0 <= v < math.inf, "at least 0")
    for name in _ABOVE_0:
        require(name, lambda v: 0 < v < math.inf, "above 0")
    require("init_log_std", lambda v: -20 <= v <= 2, "between -20 and 2")
    for name in _FROM_0_TO_1:
        require(name, lambda v: 0 <= v <= 1, "between 0 and 1")


def check(args, action_spaces, **divisors):
    """Refuse, before any work starts, what this run could not do.

    Checks the arguments' ranges, the experiment's name, the device, and the environment's existence and spaces.
    `action_spaces` are the classes that the algorithm handles; `steps_per_epoch=8` says that this argument has to be a
    multiple of 8. Raises RunError with one line that says what to do.
    """
    _check_ranges(args)
    for name, divisor in divisors.items():
        value = getattr(args, name)
        if value % divisor:
            nearest = [k * divisor for k in (value // divisor, value // divisor + 1) if k]
            what = f"--num-envs {divisor}" if name == "steps_per_epoch" else f"the number of ranks, {divisor}"
            raise RunError(f"{_flag(name)} {value}: does not divide by {what}; try {' or '.join(map(str, nearest))}")
    if args.exp_name is not None and not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.+=,-]*", args.exp_name):
        raise RunError(
            f"--exp-name {args.exp_name!r}: use letters, digits and _ . + = , - only, beginning with a letter or digit"
        )
    try:
        torch.zeros(1, device=args.device)
    except (RuntimeError, AssertionError) as error:
        raise RunError(f"--device {args.device}: {str(error).splitlines()[0]}") from None
    silence_environments()
    try:
        env = gym.make(args.env_id)
    except (gym.error.Error, ImportError) as error:
        near = difflib.get_close_matches(args.env_id, gym.registry, n=3) if isinstance(error, gym.error.UnregisteredEnv) else []
        hint = f" Nearest names: {', '.join(near)}." if near else ""
        raise RunError(f"--env-id {args.env_id}: {str(error).splitlines()[0]}{hint}") from None
    obs_space, act_space = env.observation_space, env.action_space
    env.close()
    if not isinstance(obs_space, gym.spaces.Box) or len(obs_space.shape) != 1:
        raise RunError(
            f"--env-id {args.env_id}: its observations are {obs_space}, but the networks take a flat Box of shape (n,). "
            "Wrap the environment with gymnasium.wrappers.FlattenObservation and register the wrapped one"
        )
    flat_box = isinstance(act_space, gym.spaces.Box) and len(act_space.shape) == 1 and act_space.dtype.kind == "f"
    kind = "Discrete" if isinstance(act_space, gym.spaces.Discrete) else "Box" if flat_box else None
    if kind is None or not isinstance(act_space, action_spaces):
        scripts = {"Discrete": "vpg.py, trpo.py and ppo.py", "Box": "vpg.py, trpo.py, ppo.py, ddpg.py, td3.py and sac.py"}
        hint = f"{scripts[kind]} can" if kind else "no script here can; wrap it to Discrete or to a float Box of shape (n,)"
        raise RunError(f"--env-id {args.env_id}: this algorithm cannot handle its action space {act_space}; {hint}")


def silence_environments():
    """Drop two warnings that nobody here can mend: that v4 is out of date, and of a deprecated attribute in MuJoCo's models."""
    gym.logger.min_level = gym.logger.ERROR
    try:
        import mujoco

        mujoco.set_mju_user_warning(lambda text: "settotalmass" in text or print(f"MuJoCo: {text}", file=sys.stderr))
    except (ImportError, AttributeError):
        pass  # not installed, or too old to warn


def check_finite(step, **arrays):
    """Stop the run if one of the arrays holds a NaN or an infinity; names the quantity and the step."""
    for name, array in arrays.items():
        if not np.isfinite(array).all():
            raise RunError(f"{name} is not finite at step {step:,}; model.pt is left as it was")


class Logger:
    """Writes a run: `config.json`, `progress.txt`, `model.pt`, the display and W&B. Only rank 0 writes anything.

    `dir` is the run directory (a pathlib.Path; None on the other ranks).
    """

    AVERAGE_ONLY = ("EpLen", "TestEpLen", "LossPi", "LossQ", "LogPi", "Alpha")

    def __init__(self, args, script):
        """Make the run directory of `args` (an instance of RunArgs) for the algorithm file `script`."""
        self.dir = self.progress = self.wandb = self.display = None
        if mpi.rank() == 0:
            self._open(args, script)
        self.start = self.last_time = time.time()
        self.last_steps = 0

    def _open(self, args, script):
        algo = pathlib.Path(script).stem
        self.dir = _make_run_dir(args, args.exp_name or f"{algo}_{re.sub(r'[^A-Za-z0-9_.+=,-]', '-', args.env_id)}")
        config = dataclasses.asdict(args) | _provenance(script)
        (self.dir / "config.json").write_text(json.dumps(config, indent=2) + "\n")
        self.progress = open(self.dir / "progress.txt", "w", newline="\n")
        if args.track:
            self.wandb = _start_wandb(args, config, self.dir)
        self.display = _Display(self.dir, args)

    def log(self, **metrics):
        """Write one row; collective over the ranks.

        An int is the same on all ranks and written as it is; a float is averaged over the ranks. A list gives the columns
        Average, Std, Max and Min over the values of all ranks, blank when there are none, or for AVERAGE_ONLY the mean
        alone. `Time` (seconds since the start) and `StepsPerSec` (of this epoch, by `TotalEnvInteracts`) are added.
        Raises RunError for a number that is not finite.
        """
        row = {}
        for name, value in metrics.items():
            if isinstance(value, list):
                values = mpi.gather(value)
                mean, std, high, low = (f(values) if len(values) else "" for f in (np.mean, np.std, np.max, np.min))
                average_only = name in self.AVERAGE_ONLY
                row |= {name: mean} if average_only else {f"Average{name}": mean, f"Std{name}": std}
                row |= {} if average_only else {f"Max{name}": high, f"Min{name}": low}
            else:
                row[name] = value if isinstance(value, int) else mpi.average(value)
        steps, now = row["TotalEnvInteracts"], time.time()
        for name, value in row.items():
            if value != "" and not math.isfinite(value):
                raise RunError(f"{name} is {value} at step {steps:,}; model.pt is left as it was")
        row["Time"] = now - self.start
        row["StepsPerSec"] = (steps - self.last_steps) / (now - self.last_time)
        self.last_time, self.last_steps = now, steps
        if self.dir:
            header = "\t".join(row) + "\n" if self.progress.tell() == 0 else ""
            try:
                self.progress.write(header + "\t".join(map(str, row.values())) + "\n")
                self.progress.flush()
            except OSError as error:
                raise RunError(f"cannot write {self.progress.name}: {error.strerror}") from error
            if self.wandb:
                self.wandb.log({name: value for name, value in row.items() if value != ""}, step=steps)
            self.display.update(row)

    def save_model(self, module):
        """Write the module's weights to `model.pt`, whole or not at all; collective over the ranks.

        Raises RunError if a weight is not finite, if the ranks' weights differ, or if the file cannot be written.
        """
        mpi.check_equal(module)
        if self.dir:
            state = {name: tensor.cpu() for name, tensor in module.state_dict().items()}
            for name, tensor in state.items():
                if not torch.isfinite(tensor).all():
                    raise RunError(f"parameter {name} is not finite at step {self.last_steps:,}; model.pt is left as it was")
            path, part = self.dir / "model.pt", self.dir / "model.pt.part"
            try:
                torch.save(state, part)
                os.replace(part, path)
            except (OSError, RuntimeError) as error:  # torch raises RuntimeError when the disk is full
                part.unlink(missing_ok=True)
                raise RunError(f"cannot write {path}: {str(error).splitlines()[0]}; the one before is left as it was") from error

    def __enter__(self):
        return self

    def __exit__(self, kind, error, trace):
        """End the display, the files and the W&B run; and all ranks, if this one is leaving early."""
        if self.dir:
            self.display.close()
            self.progress.close()
            if self.wandb:
                self.wandb.finish(exit_code=0 if kind is None else 1)
        if kind is SystemExit:  # which never reaches sys.excepthook
            if mpi.size() > 1:
                print(f"[rank {mpi.rank()}] exits: {error}", file=sys.stderr, flush=True)
            mpi.abort()


def _make_run_dir(args, exp_name):
    """Make and return <data_dir>/<exp_name>/<exp_name>_s<seed>, or the first free one of ..._1, ..._2 and so on."""
    parent = pathlib.Path(args.data_dir) / exp_name
    for k in range(10_000):
        path = parent / (f"{exp_name}_s{args.seed}" + (f"_{k}" if k else ""))
        try:
            path.mkdir(parents=True)
            return path
        except FileExistsError:
            if not parent.is_dir():
                raise RunError(f"--data-dir {args.data_dir}: {parent} is in the way: it is no directory") from None
        except OSError as error:
            raise RunError(f"--data-dir {args.data_dir}: cannot make {path}: {error.strerror}") from None
    raise RunError(f"--data-dir {args.data_dir}: {parent} holds too many runs of seed {args.seed}")


def _provenance(script):
    """What it takes to repeat a run besides its arguments."""
    git = ["git", "-C", str(pathlib.Path(script).resolve().parent), "rev-parse", "HEAD"]
    try:
        commit = subprocess.run(git, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        commit = None
    versions = {"python": platform.python_version(), "torch": torch.__version__, "numpy": np.__version__}
    versions["gymnasium"] = gym.__version__
    if "mujoco" in sys.modules:
        versions["mujoco"] = sys.modules["mujoco"].__version__
    run = {"script": pathlib.Path(script).name, "command": shlex.join(sys.argv), "ranks": mpi.size()}
    return run | {"versions": versions, "git_commit": commit}


def _start_wandb(args, config, run_dir):
    try:
        import wandb
    except ImportError:
        raise RunError("--track: wandb is not installed; pip install wandb") from None
    options = dict(project=args.wandb_project, entity=args.wandb_entity, group=args.wandb_group, config=config)
    options |= dict(name=run_dir.name, dir=str(run_dir))
    try:
        return wandb.init(**options)
    except wandb.errors.Error as error:
        print(f"W&B cannot be reached ({str(error).splitlines()[0]}); tracking offline: `wandb sync` uploads it later")
        return wandb.init(mode="offline", **options)


class _Display:
    """A metrics table above a progress bar, redrawn in place; plain lines where the output is no terminal."""

    SECONDS_BETWEEN_LINES = 5

    def __init__(self, run_dir, args):
        ranks = f"{mpi.size()} ranks" if mpi.size() > 1 else "1 process"
        print(f"{run_dir}  ({args.env_id}, seed {args.seed}, {args.total_steps:,} steps, {args.device}, {ranks})", flush=True)
        self.total, self.last_line = args.total_steps, -math.inf
        self.live = self.row = self.printed = None
        self.ret = "-"  # of the last epoch in which an episode ended
        if Console().is_terminal:
            columns = (BarColumn(None), TextColumn("{task.percentage:3.0f}%"), TextColumn("{task.fields[rate]} steps/s"))
            self.bar = Progress(*columns, TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn())
            self.task = self.bar.add_task("", total=self.total, rate="-")
            self.live = Live(self.bar, refresh_per_second=4)
            self.live.start()

    def update(self, row):
        self.row, steps, rate = row, row["TotalEnvInteracts"], row["StepsPerSec"]
        ret = row.get("AverageTestEpRet", row.get("AverageEpRet", ""))
        self.ret = f"{ret:.1f}" if ret != "" else self.ret
        if self.live:
            table = Table.grid(padding=(0, 2))
            for name, value in row.items():
                table.add_row(name, f"{value:.4g}" if isinstance(value, float) else str(value))
            self.bar.update(self.task, completed=steps, rate=f"{rate:,.0f}")
            self.live.update(Group(table, self.bar))
        elif time.time() - self.last_line > self.SECONDS_BETWEEN_LINES:
            self._print_line()

    def _print_line(self):
        row, self.printed, self.last_line = self.row, self.row, time.time()
        steps, elapsed = row["TotalEnvInteracts"], row["Time"]
        left = max(0, self.total - steps) * elapsed / steps
        print(
            f"epoch {row['Epoch']}  steps {steps:,} ({min(1, steps / self.total):.0%})  return {self.ret}  "
            f"{row['StepsPerSec']:,.0f} steps/s  {elapsed:.0f} s, {left:.0f} s left",
            flush=True,
        )

    def close(self):
        if self.live:
            self.live.stop()
        elif self.row and self.row is not self.printed:
            self._print_line()
