"""What surrounds a run: its common arguments and their checks, the run directory, the display, W&B, checkpoints.

with Logger(args, __file__) as logger:
    for epoch in logger.epochs(100, ac=ac, optimizer=optimizer, buffer=buffer):
        logger.log(Epoch=epoch, EpRet=[12.0, 15.5], LossPi=-0.01, TotalEnvInteracts=2000)
"""

import contextlib
import dataclasses
import difflib
import importlib.util
import json
import math
import os
import pathlib
import platform
import re
import secrets
import shlex
import shutil
import signal
import subprocess
import sys
import threading
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
    save_freq: int = 10  # epochs between two saves of model.pt and of the checkpoint; the last epoch always saves
    keep_checkpoints: bool = False  # keep each saved model, as model_<epoch>.pt
    resume: str | None = None  # run directory of an interrupted run to go on with; only --total-steps may change
    device: str = "cpu"  # torch device of the networks: cpu, cuda, cuda:1, mps
    torch_threads: int = 1  # threads of torch in each process; for networks of this size a second gains little
    fast_matmul: bool = False  # multiply float32 matrices with oneDNN: faster on some processors with AVX-512, slower on others
    track: bool = False  # log to Weights & Biases too
    wandb_project: str = "deep-rl"  # W&B project
    wandb_entity: str | None = None  # W&B user or team
    wandb_group: str | None = None  # W&B group, to hold runs together
    wandb_video: bool = False  # with --track: film an episode at the end

    def __post_init__(self):
        """With `resume`, take over the arguments of that run. Raises RunError if others are given that differ."""
        if self.resume is not None:
            _take_over(self)


# Ranges by name, so that an argument which a copied script adds under a known name is checked too.
_AT_LEAST_1 = (
    "total_steps steps_per_epoch num_envs max_ep_len train_iters minibatch_size cg_iters backtrack_iters "
    "save_freq torch_threads batch_size replay_size update_every policy_delay"
).split()
_AT_LEAST_0 = (
    "seed train_v_iters damping_coeff start_steps update_after num_test_episodes act_noise target_noise noise_clip"
).split()
_ABOVE_0 = "pi_lr vf_lr q_lr alpha delta clip_ratio".split()
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
        require(name, lambda v: 0 <= v < math.inf, "at least 0 and finite")
    for name in _ABOVE_0:
        require(name, lambda v: 0 < v < math.inf, "above 0 and finite")
    require("target_kl", lambda v: v > 0, "above 0")  # inf: no limit
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
    for name, value in dataclasses.asdict(args).items():
        try:
            json.dumps(value)
        except TypeError:
            kind = type(value).__name__
            raise RunError(f"{_flag(name)}: config.json cannot hold a {kind}; make it a str, int, float, bool or tuple") from None
    if args.track and getattr(importlib.util.find_spec("wandb"), "origin", None) is None:  # a mere folder wandb/ has none
        raise RunError("--track: wandb is not installed; pip install wandb")
    if args.wandb_video and not args.track:
        raise RunError("--wandb-video: add --track, which it belongs to")
    for name, divisor in divisors.items():
        value = getattr(args, name)
        if value % divisor:
            nearest = [k * divisor for k in (value // divisor, value // divisor + 1) if k]
            what = f"the number of environments, {divisor}," if name == "steps_per_epoch" else f"the number of ranks, {divisor}"
            raise RunError(f"{_flag(name)} {value}: is not a multiple of {what}; try {' or '.join(map(str, nearest))}")
    if args.exp_name is not None and not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.+=,-]*", args.exp_name):
        raise RunError(
            f"--exp-name {args.exp_name!r}: use letters, digits and _ . + = , - only, beginning with a letter or digit"
        )
    try:
        torch.zeros(1, device=args.device)
    except (RuntimeError, AssertionError) as error:
        raise RunError(f"--device {args.device}: {one_line(error)}") from None
    silence_environments()
    try:
        env = gym.make(args.env_id)
    except (gym.error.Error, ImportError, ValueError) as error:
        near = difflib.get_close_matches(args.env_id, gym.registry, n=3) if isinstance(error, gym.error.UnregisteredEnv) else []
        hint = f" Nearest names: {', '.join(near)}." if near else ""
        raise RunError(f"--env-id {args.env_id}: {one_line(error)}{hint}") from None
    obs_space, act_space, limit = env.observation_space, env.action_space, env.spec.max_episode_steps
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
    if hasattr(args, "replay_size"):
        _check_off_policy(args, obs_space, act_space, limit)


def _whole_epochs(args):
    """The steps that a run really takes."""
    return math.ceil(args.total_steps / args.steps_per_epoch) * args.steps_per_epoch


def _check_off_policy(args, obs_space, act_space, limit):
    total_steps = _whole_epochs(args)
    batch_size, update_after, start_steps, num_test_episodes = (  # which a copied script may do without
        getattr(args, name, None) or 0 for name in ("batch_size", "update_after", "start_steps", "num_test_episodes")
    )
    with np.errstate(over="ignore"):
        is_box = isinstance(act_space, gym.spaces.Box)
        bounded = not is_box or np.isfinite(act_space.high.astype(np.float32) - act_space.low.astype(np.float32)).all()
    if not bounded:
        raise RunError(
            f"--env-id {args.env_id}: this algorithm needs bounded actions, not {act_space}; "
            "vpg.py, trpo.py and ppo.py can do without"
        )
    if batch_size > update_after:
        raise RunError(
            f"--batch-size {batch_size}: the first update, after --update-after {update_after} steps, would find "
            f"fewer transitions; try --update-after {batch_size}"
        )
    if start_steps >= total_steps and mpi.rank() == 0:
        print(f"warning: --start-steps {start_steps}: all {total_steps} steps will be random", file=sys.stderr)
    if update_after > total_steps and mpi.rank() == 0:
        print(f"warning: --update-after {update_after}: no update in {total_steps} steps", file=sys.stderr)
    if num_test_episodes and args.max_ep_len is None and limit is None and mpi.rank() == 0:
        print(f"warning: {args.env_id} has no limit of steps: a test may never end; see --max-ep-len", file=sys.stderr)
    transition = 4 * (2 * obs_space.shape[0] + math.prod(act_space.shape) + 2)  # bytes
    needed, free = transition * min(args.replay_size, total_steps), _free_memory()
    if needed > free:
        raise RunError(
            f"--replay-size {args.replay_size}: needs {needed / 2**30:.1f} GiB of memory, of which {free / 2**30:.1f} GiB are "
            f"free; try --replay-size {int(float(f'{0.8 * free / transition:.1e}'))}"
        )


def _free_memory():
    """Bytes of memory that a process could still get; infinity where the system does not tell."""
    try:
        lines = pathlib.Path("/proc/meminfo").read_text().splitlines()
        return 1024 * int(next(line for line in lines if line.startswith("MemAvailable:")).split()[1])
    except (OSError, StopIteration):
        return math.inf


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
            raise RunError(f"{name} is not finite at step {step:,}")


def configure_torch(args):
    """Give torch its threads, its way with tiny numbers and, with `fast_matmul`, its way to multiply matrices.

    Raises RunError where that way would round to bfloat16, as it does on processors with AMX.
    """
    # Adam's averages of dead units' gradients decay to numbers below 1e-38, with which some processors are much slower
    torch.set_flush_denormal(True)
    torch.set_num_threads(args.torch_threads)
    torch.set_float32_matmul_precision("medium" if args.fast_matmul else "highest")
    if args.fast_matmul:
        x, y = torch.linspace(-1, 1, 2**16).reshape(2, 256, 128)
        product = (x.to(args.device) @ y.T.to(args.device)).cpu()
        error = (product - x.double() @ y.T.double()).abs().max() / (x.abs() @ y.T.abs()).max()
        if error > 1e-5:  # 1e-6 is float32's, 2e-3 bfloat16's
            raise RunError(f"--fast-matmul: this processor would round to a relative error of {error:.0e}; leave it out")


class Repeatable(gym.Wrapper):
    """Remembers how its episode began and the actions since, so that any environment which draws its random numbers from
    `np_random` can be brought back to where it was. An environment that remembers more than that cannot."""

    def reset(self, *, seed=None, options=None):
        self.start = json.dumps([seed, None if seed is not None else self.unwrapped.np_random.bit_generator.state])
        self.actions = []
        obs, info = self.env.reset(seed=seed, options=options)
        self.obs = np.asarray(obs)
        return self.obs, info

    def step(self, action):
        self.actions.append(np.copy(action))
        obs, *rest = self.env.step(action)
        self.obs = np.asarray(obs)
        return self.obs, *rest

    def state_dict(self):
        if not hasattr(self, "start"):  # before the first reset
            return {}
        return dict(start=self.start, actions=torch.as_tensor(np.array(self.actions)), obs=torch.as_tensor(np.array(self.obs)))

    def load_state_dict(self, state):
        if not state:
            return
        seed, random_state = json.loads(state["start"])
        if random_state is not None:
            self.unwrapped.np_random.bit_generator.state = random_state
        obs, _ = self.env.reset(seed=seed)
        self.start, self.actions = state["start"], list(state["actions"].numpy())
        for action in self.actions:
            obs, *_ = self.env.step(action)
        self.obs = np.asarray(obs)
        if not np.array_equal(self.obs, state["obs"].numpy()):
            raise RunError(
                f"--resume: {self.spec.id} cannot be brought back to its state, which depends on more than `np_random`; "
                "start a new run"
            )


def make_env(env_id, max_ep_len=None):
    """The environment, Repeatable; `max_ep_len` takes the place of its own limit of steps in an episode."""
    return Repeatable(gym.make(env_id, max_episode_steps=max_ep_len, disable_env_checker=True))


class Logger:
    """Writes a run: `config.json`, `progress.txt`, `model.pt`, checkpoints, the display and W&B.

    Only rank 0 writes, but for the checkpoints, of which each rank has its own. `dir` is the run directory, a pathlib.Path.
    Ctrl-C stops the run with a checkpoint at the next call of `store` or at the end of the epoch; a second one stops it at once.
    """

    AVERAGE_ONLY = ("EpLen", "TestEpLen", "LossPi", "LossQ", "LogPi", "Alpha")

    def __init__(self, args, script):
        """Make the run directory of `args` (an instance of RunArgs) for the algorithm file `script`, or open that to resume."""
        self.args, self.script, self.stored, self.state = args, pathlib.Path(script), {}, {}
        self.progress = self.wandb = self.display = None
        self.interrupted, self.columns = False, []
        if args.resume is not None:
            self.dir = pathlib.Path(args.resume)
            self.config = read_config(self.dir)
            if self.config.get("ranks") != mpi.size():
                raise RunError(f"--resume {self.dir}: the run has {self.config.get('ranks')} ranks, not {mpi.size()}")
            self.config = dataclasses.asdict(args) | self.config | dict(total_steps=args.total_steps)
            now = mpi.share(_provenance(script) if mpi.rank() == 0 else None)
            self.config["resumed"] = [*self.config.get("resumed", []), {k: now[k] for k in ("versions", "git_commit")}]
        else:
            name = args.exp_name or f"{self.script.stem}_{re.sub(r'[^A-Za-z0-9_.+=,-]', '-', args.env_id)}"
            self.dir = mpi.share(_make_run_dir(args, name) if mpi.rank() == 0 else None)
            self.config = dataclasses.asdict(args) | mpi.share(_provenance(script) if mpi.rank() == 0 else None)
            self.config |= dict(wandb_id=secrets.token_hex(4)) if args.track else {}
        self.start = self.last_time = time.time()
        self.saves = self.last_steps = 0
        if mpi.rank() == 0 and args.resume is None:
            self._open()

    def _open(self):
        with _writing(self.dir / "config.json"):
            with open(self.dir / "config.json.part", "w") as file:
                file.write(json.dumps(self.config, indent=2) + "\n")
                file.flush()
                os.fsync(file.fileno())
            os.replace(self.dir / "config.json.part", self.dir / "config.json")
            self.progress = self.progress or self._open_progress()
        if self.args.track:
            self.wandb = _start_wandb(self.args, self.config, self.dir)
            self._track(lambda wandb: wandb.save(str(self.script.resolve()), str(self.script.resolve().parent), "now"))
        self.display = _Display(self.dir, self.args)

    def _open_progress(self):
        """Open progress.txt, which only one process at a time may do: a run cannot be resumed while it is still going on."""
        file = open(self.dir / "progress.txt", "a", newline="\n")
        try:
            import fcntl

            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise RunError(f"--resume {self.dir}: this run is still going on, in another process") from None
        except (ImportError, OSError):
            pass  # Windows, and file systems that cannot lock
        return file

    def epochs(self, count, **state):
        """Yield the numbers of the epochs to do: 0 to count - 1, or from where the run to resume was left.

        `state` is all that changes in the course of the run: modules, optimizers, schedulers, environments (what has a
        `state_dict`) and objects whose attributes are arrays, tensors, numbers, strings or such things again. It is restored
        before the first epoch, and saved every `save_freq` epochs and after the last one; `ac` is the module that model.pt
        holds. Raises RunError for what cannot be saved.
        """
        self.state, self.epoch = state, 0
        _pack(state)  # refuses what cannot be saved before any work is done
        for name, x in state.items():
            if _is_plain(x) or isinstance(x, tuple):
                raise RunError(f"{name}: --resume could not change a {type(x).__name__}; make it a tensor or an object's attribute")
        if self.args.resume is not None:
            self._restore(count)
            if mpi.rank() == 0:
                self._open()
                if self.epoch == count:
                    print(f"nothing to do: the run has its {self.last_steps:,} steps; --total-steps makes it longer", flush=True)
        while self.epoch < count:
            yield self.epoch
            self.epoch += 1
            interrupted = self._is_interrupted()
            regular = (self.epoch - 1) % self.args.save_freq == 0 or self.epoch == count
            if regular or interrupted:
                self.save_model(state["ac"])
                if regular and self.args.keep_checkpoints and mpi.rank() == 0:
                    with _writing(self.dir / f"model_{self.epoch - 1}.pt") as path:
                        shutil.copyfile(self.dir / "model.pt", f"{path}.part")
                        os.replace(f"{path}.part", path)
                self.save_checkpoint()
            if interrupted and self.epoch < count:
                raise Interrupted

    def store(self, **metrics):
        """Keep lists of numbers for the next row; they add up until it is written."""
        for name, values in metrics.items():
            self.stored.setdefault(name, []).extend(values)
        if self.state and self._is_interrupted():
            self.save_model(self.state["ac"])
            self.save_checkpoint()
            raise Interrupted

    def log(self, **metrics):
        """Write one row; collective over the ranks.

        An int is the same on all ranks and written as it is; another number, a tensor's too, is averaged over the ranks. A
        list gives the columns Average, Std, Max and Min over the values of all ranks, blank when there are none, or for
        AVERAGE_ONLY the mean alone. What was stored comes after `Epoch`; `Time` (seconds since the start) and `StepsPerSec`
        (of this epoch, by `TotalEnvInteracts`) are added. Raises RunError for a number that is not finite, and for a row that
        has not the columns of the first one.
        """
        metrics = {"Epoch": metrics["Epoch"]} | self.stored | metrics
        self.stored, row = {}, {}
        for name, value in metrics.items():
            if isinstance(value, list):
                values = mpi.gather(value)
                mean, std, high, low = (f(values) if len(values) else "" for f in (np.mean, np.std, np.max, np.min))
                if name in self.AVERAGE_ONLY:
                    row[name] = mean
                else:
                    row |= {f"Average{name}": mean, f"Std{name}": std, f"Max{name}": high, f"Min{name}": low}
            else:
                row[name] = value if type(value) is int else float(mpi.average(value))
        steps, now = row["TotalEnvInteracts"], time.time()
        for name, value in row.items():
            if value != "" and not math.isfinite(value):
                raise RunError(f"{name} is {value} at step {steps:,}; model.pt is left as it was")
        row["Time"] = now - self.start
        row["StepsPerSec"] = (steps - self.last_steps) / (now - self.last_time)
        self.last_time, self.last_steps = now, steps
        if self.progress:
            differ = {*row} ^ {*(self.columns or row)}
            if differ:
                raise RunError(
                    f"the columns of epoch {row['Epoch']} are not those of progress.txt ({', '.join(sorted(differ))}): log the same "
                    "metrics in every epoch, an empty list where there is none; what a script logs newly needs a new run"
                )
            header = "" if self.columns else "\t".join(row) + "\n"
            self.columns = self.columns or [*row]
            with _writing(self.progress.name):
                self.progress.write(header + "\t".join(str(row[name]) for name in self.columns) + "\n")
                self.progress.flush()
            self._track(lambda wandb: wandb.log({name: value for name, value in row.items() if value != ""}, step=steps))
            self.display.update(row)

    def save_model(self, module):
        """Write the module's weights to `model.pt`, whole or not at all; collective over the ranks.

        Raises RunError if a weight is not finite, if the ranks' weights differ, or if the file cannot be written.
        """
        mpi.check_equal(module)
        if mpi.rank() == 0:
            state = {name: tensor.cpu() for name, tensor in module.state_dict().items()}
            for name, tensor in state.items():
                if not torch.isfinite(tensor).all():
                    raise RunError(f"parameter {name} is not finite at step {self.last_steps:,}; model.pt is left as it was")
            _save(state, self.dir / "model.pt")

    def save_checkpoint(self):
        """Write all that resuming needs to `checkpoint/`; the one before is deleted when every rank has written its own."""
        self.saves += 1
        run = dict(epoch=self.epoch, saves=self.saves, last_steps=self.last_steps, elapsed=time.time() - self.start)
        run |= dict(since_row=time.time() - self.last_time, rows_end=self.progress.tell() if self.progress else 0)
        run |= dict(stored={name: torch.tensor(values, dtype=torch.float64) for name, values in self.stored.items()})
        folder = self.dir / "checkpoint"
        with _writing(folder):
            folder.mkdir(exist_ok=True)
            if self.progress:
                os.fsync(self.progress.fileno())
        _save(dict(run=run, random=_random_state(), state=_pack(self.state)), folder / f"{self.saves}_rank{mpi.rank()}.pt")
        mpi.average(0.0)  # waits for all ranks
        self._delete_other_checkpoints()

    def _delete_other_checkpoints(self):
        for path in (self.dir / "checkpoint").glob(f"*_rank{mpi.rank()}.pt*"):
            if path.name != f"{self.saves}_rank{mpi.rank()}.pt":
                path.unlink()

    def _restore(self, count):
        """Bring `state`, the random states and the log back to the newest checkpoint that all ranks have written."""
        saves = [path.name.removesuffix("_rank0.pt") for path in (self.dir / "checkpoint").glob("*_rank0.pt")]
        saves = sorted((int(n) for n in saves if n.isdigit()), reverse=True)
        files = [[self.dir / "checkpoint" / f"{n}_rank{rank}.pt" for rank in range(mpi.size())] for n in saves]
        complete = [paths for paths in files if all(path.exists() for path in paths)]
        if not complete:
            raise RunError(f"--resume {self.dir}: {self.dir / 'checkpoint'} holds no checkpoint; start a new run")
        path = complete[0][mpi.rank()]
        try:
            saved = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
            run = saved["run"]
            if run["epoch"] + bool(run["stored"]) > count:
                raise RunError(f"--total-steps {self.args.total_steps}: the run has done {run['last_steps']:,} already")
            _unpack(self.state, saved["state"])
        except RunError:
            raise
        except Exception as error:  # whatever a broken or foreign file brings about
            raise RunError(f"--resume {self.dir}: cannot use {path}: {one_line(error)}; start a new run") from error
        self.epoch, self.saves, self.last_steps = run["epoch"], run["saves"], run["last_steps"]
        self.stored = {name: values.tolist() for name, values in run["stored"].items()}
        if mpi.rank() == 0:
            rows = self.dir / "progress.txt"
            if not rows.is_file() or rows.stat().st_size < run["rows_end"]:
                raise RunError(f"--resume {self.dir}: progress.txt lacks rows that were there at the checkpoint")
            with _writing(rows):
                self.progress = self._open_progress()
                if rows.stat().st_size > run["rows_end"]:
                    self.progress.truncate(run["rows_end"])  # rows after the checkpoint will come again
                    self.progress.seek(0, os.SEEK_END)
            self.columns = rows.read_text().partition("\n")[0].split("\t") if run["rows_end"] else []
        mpi.check_equal(self.state["ac"])
        self._delete_other_checkpoints()  # a half one, of which this run would come to write the other half
        _set_random_state(saved["random"])
        self.start, self.last_time = time.time() - run["elapsed"], time.time() - run["since_row"]

    def _track(self, action):
        """Do something with the W&B run, if there is one. Whatever fails there does not stop this run."""
        if self.wandb:
            try:
                action(self.wandb)
            except Exception as error:
                print(f"W&B: {one_line(error)}; the run goes on without", file=sys.stderr, flush=True)

    def _film(self, wandb):
        import wandb as package

        command = [sys.executable, "-m", "utils.evaluate", str(self.dir.resolve()), "-n", "1"]  # MuJoCo can draw in a new process
        path, root = self.dir.resolve() / "video.mp4", pathlib.Path(__file__).resolve().parent.parent
        env = {name: value for name, value in os.environ.items() if not name.startswith(("PMI", "OMPI_"))}  # it is no rank
        done = subprocess.run([*command, "--video", str(path)], cwd=root, env=env, capture_output=True, text=True)
        if done.returncode:
            raise RunError(done.stderr.strip().splitlines()[-1] if done.stderr.strip() else "no film")
        wandb.log({"video": package.Video(str(path), format="mp4")})

    def _is_interrupted(self):
        return mpi.average(float(self.interrupted)) > 0

    def _interrupt(self, signum, frame):
        if self.interrupted:
            raise KeyboardInterrupt
        self.interrupted = True
        if mpi.rank() == 0:
            print("Ctrl-C: writing a checkpoint as soon as possible (again: stop at once, without one)", flush=True)

    def __enter__(self):
        self.in_main_thread = threading.current_thread() is threading.main_thread()
        if self.in_main_thread:
            self.handler_before = signal.signal(signal.SIGINT, self._interrupt)
        return self

    def __exit__(self, kind, error, trace):
        """End the display, the files and the W&B run; and all ranks, if this one is leaving early."""
        if self.in_main_thread:
            signal.signal(signal.SIGINT, self.handler_before)
        if self.display:
            self.display.close()
        if self.progress:
            with contextlib.suppress(OSError):  # a full disk, which the row that failed has reported
                self.progress.close()
            self._track(lambda wandb: wandb.save(str(self.dir / "model.pt"), str(self.dir), "now"))
            if self.args.wandb_video and kind is None:
                self._track(self._film)
            self._track(lambda wandb: wandb.finish(exit_code=0 if kind is None else 1))
        if kind in (Interrupted, KeyboardInterrupt) and mpi.rank() == 0 and [*(self.dir / "checkpoint").glob("*_rank0.pt")]:
            print(f"to go on: {_launcher()}python {os.path.relpath(self.script)} --resume {shlex.quote(str(self.dir))}", flush=True)
        if kind is SystemExit:  # which never reaches sys.excepthook
            if mpi.size() > 1:
                print(f"[rank {mpi.rank()}] exits: {error}", file=sys.stderr, flush=True)
            mpi.abort()


class Interrupted(SystemExit):
    """Ctrl-C, after the checkpoint; ends the program with status 130."""

    def __init__(self):
        super().__init__(130)


def read_config(run_dir):
    """config.json of a run directory, as a dict. Raises RunError if there is none that can be read."""
    path = pathlib.Path(run_dir) / "config.json"
    try:
        config = json.loads(path.read_text())
    except FileNotFoundError:
        raise RunError(f"{run_dir}: no run directory, since it has no config.json") from None
    except (OSError, ValueError) as error:
        raise RunError(f"{path}: cannot be read: {error}") from None
    if not isinstance(config, dict) or not isinstance(config.get("script"), str):
        raise RunError(f"{path}: not the configuration of a run")
    return config


def _take_over(args):
    """Give `args` the values of the run `args.resume`. Raises RunError for one that was given and differs.

    On the command line what is there was given; from Python, what is not the default.
    """
    config, module = read_config(args.resume), sys.modules[type(args).__module__]
    script = pathlib.Path(module.__file__).name
    if config["script"] != script:
        raise RunError(f"--resume {args.resume}: made by {config['script']}, not by {script}")
    flags = sys.argv[1:] if module.__name__ == "__main__" else []
    flags = {re.sub("^--(no-)?|=.*", "", flag).replace("-", "_") for flag in flags if flag.startswith("--")}
    for field in dataclasses.fields(args):
        if field.name != "resume":
            value = getattr(args, field.name)
            default = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
            old = config.get(field.name, default)  # a script may have got new arguments since
            old = tuple(old) if isinstance(old, list) and not isinstance(value, list) else old
            given = value != default or field.name in flags
            if given and value != old and field.name != "total_steps":
                raise RunError(f"{_flag(field.name)} {value}: the run to resume has {old}; leave it out, or start a new run")
            if not given:
                setattr(args, field.name, old)


def one_line(error):
    """The text of an error, however many lines it has, for a message."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) < 300 else text[:300] + " ..."


def _launcher():
    return f"mpirun -n {mpi.size()} " if mpi.size() > 1 else ""


@contextlib.contextmanager
def _writing(path):
    """Turns what the disk says no to into a RunError that names `path`."""
    try:
        yield path
    except OSError as error:
        raise RunError(f"cannot write {path}: {error.strerror}") from error


def _save(state, path):
    """torch.save, whole or not at all: written under another name, flushed to the disk, and renamed."""
    part = path.with_name(path.name + ".part")
    try:
        with open(part, "wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    except (OSError, RuntimeError) as error:  # torch raises RuntimeError when the disk is full
        with contextlib.suppress(OSError):
            part.unlink(missing_ok=True)
        raise RunError(f"cannot write {path}: {one_line(error)}; the one before is left as it was") from error


_NEVER_CHANGES = (torch.device, torch.dtype, np.dtype, type, pathlib.PurePath, gym.Space)


def _pack(x, name="state"):
    """What `x` holds, in the types that torch.load takes with weights_only=True. Raises RunError, with its name, for what
    has neither a `state_dict` nor attributes."""
    if hasattr(x, "state_dict"):
        return x.state_dict()
    if isinstance(x, torch.Tensor):
        return x.detach()
    if isinstance(x, np.generic):
        return x.item()
    if isinstance(x, np.ndarray) and x.dtype.kind in "biufc":
        return torch.from_numpy(x)
    if _is_plain(x):
        return x
    if isinstance(x, list | tuple):
        return [_pack(item, f"{name}[{i}]") for i, item in enumerate(x)]
    if not isinstance(x, dict) and not hasattr(x, "__dict__"):
        raise RunError(f"{name}: --resume could not restore a {type(x).__name__}; make it an array, a tensor or a list of numbers")
    items = x if isinstance(x, dict) else vars(x)
    return {key: _pack(item, f"{name}.{key}") for key, item in items.items() if not isinstance(item, _NEVER_CHANGES)}


def _unpack(x, saved):
    """Give `x` back what `_pack` took from it, in place where it can. Returns what takes its place."""
    if hasattr(x, "load_state_dict"):
        x.load_state_dict(saved)
    elif _is_plain(saved):
        return saved
    elif isinstance(x, torch.Tensor):
        x.detach().copy_(saved)
    elif isinstance(x, np.ndarray):
        part = tuple(slice(min(n, m)) for n, m in zip(x.shape, saved.shape, strict=True))  # the buffer's size may have changed
        x[part] = saved.numpy()[part]
    elif isinstance(x, list | tuple):
        if not all(map(_is_plain, saved)):
            saved = [_unpack(item, saved_item) for item, saved_item in zip(x, saved, strict=True)]
        if isinstance(x, tuple):
            return getattr(x, "_make", tuple)(saved)
        x[:] = saved
    else:
        items = x if isinstance(x, dict) else vars(x)
        for name, saved_item in saved.items():
            items[name] = _unpack(items.get(name), saved_item)
    return x


def _is_plain(x):
    return x is None or isinstance(x, bool | int | float | str)


def _random_state():
    numpy = np.random.get_state()  # name, keys, position, has_gauss, gauss
    random = dict(torch=torch.get_rng_state(), numpy_keys=torch.from_numpy(numpy[1].astype(np.int64)), numpy=[*numpy[2:]])
    return random | (dict(cuda=torch.cuda.get_rng_state_all()) if torch.cuda.is_available() else {})


def _set_random_state(random):
    torch.set_rng_state(random["torch"])
    np.random.set_state(("MT19937", random["numpy_keys"].numpy().astype(np.uint32), *random["numpy"]))
    if torch.cuda.is_available() and "cuda" in random:
        torch.cuda.set_rng_state_all(random["cuda"])


def _make_run_dir(args, exp_name):
    """Make and return <data_dir>/<exp_name>/<exp_name>_s<seed>, or the first free one of ..._1, ..._2 and so on."""
    parent = pathlib.Path(args.data_dir) / exp_name
    for k in range(10_000):
        path = parent / (f"{exp_name}_s{args.seed}" + (f"_{k}" if k else ""))
        try:
            path.mkdir(parents=True)
            return path
        except FileExistsError:
            continue
        except OSError as error:
            raise RunError(f"--data-dir {args.data_dir}: cannot make {path}: {error.strerror}") from None
    raise RunError(f"--data-dir {args.data_dir}: {parent} holds too many runs of seed {args.seed}")


def _provenance(script):
    """What it takes to repeat a run besides its arguments."""

    def git(*command):
        command = ["git", "-C", str(pathlib.Path(script).resolve().parent), *command]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    try:
        commit = git("rev-parse", "HEAD") + ("-dirty" if git("status", "--porcelain", "--", ":/*.py") else "")
    except (OSError, subprocess.CalledProcessError):
        commit = None
    versions = {"python": platform.python_version(), "torch": torch.__version__, "numpy": np.__version__}
    versions["gymnasium"] = gym.__version__
    if "mujoco" in sys.modules:
        versions["mujoco"] = sys.modules["mujoco"].__version__
    run = {"script": pathlib.Path(script).name, "command": shlex.join(sys.argv), "ranks": mpi.size()}
    return run | {"versions": versions, "git_commit": commit}


def _start_wandb(args, config, run_dir):
    import wandb

    options = dict(project=args.wandb_project, entity=args.wandb_entity, group=args.wandb_group, config=config)
    options |= dict(name=run_dir.name, dir=str(run_dir), id=config.get("wandb_id"), resume="allow")
    try:
        return wandb.init(**options)
    except wandb.errors.Error as error:
        print(f"W&B cannot be reached ({one_line(error)}); tracking offline: `wandb sync` uploads it later")
        return wandb.init(mode="offline", **options)


class _Display:
    """A progress bar above a metrics table, redrawn in place; plain lines where the output is no terminal."""

    SECONDS_BETWEEN_LINES = 5

    def __init__(self, run_dir, args):
        ranks = f"{mpi.size()} ranks" if mpi.size() > 1 else "1 process"
        self.total, self.last_line = _whole_epochs(args), -math.inf
        steps = f"{self.total:,} steps in epochs of {args.steps_per_epoch:,}"
        print(f"{run_dir}  ({args.env_id}, seed {args.seed}, {steps}, {args.device}, {ranks})", flush=True)
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
        ret = next((row[n] for n in ("AverageTestEpRet", "AverageEpRet") if row.get(n, "") != ""), "")
        self.ret = f"{ret:.1f}" if ret != "" else self.ret
        if self.live:
            table = Table.grid(padding=(0, 2))
            for name, value in row.items():
                table.add_row(name, f"{value:.4g}" if isinstance(value, float) else str(value))
            self.bar.update(self.task, completed=steps, rate=f"{rate:,.0f}")
            self.live.update(Group(self.bar, table))
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
