"""Run a script once for each combination of settings, several runs at a time, in processes of one thread each.

    python -m benchmark.sweep ppo.py --env-id Hopper-v4 Walker2d-v4 --seed 0 1 2 --clip-ratio 0.1 0.2 --workers 2

Flags that are not listed below go to the script, and each may have several values. True and False are values of a switch
(--norm-obs True False); one without a value is handed on (--track). A flag that takes several words, as --hidden-sizes 64 64
does, has one value, unless words are quoted together: --hidden-sizes "64 64" "256 256 256" "32" has three.

Runs are called <script>_<env_id>, with what differs between them but the seed: three letters of the flag and the value, as in
ppo_Hopper-v4_cli0-1. --clip-ratio[eps] 0.1 0.2 makes it ppo_Hopper-v4_eps0-1; quote the brackets where the shell needs it.
All combinations are checked before the first run starts. The output of a run goes to a .log file next to its directory.
With --track the runs share a W&B group, the sweep's --exp-name or else the scripts' names.

From Python: sweep("ppo.py", {"env_id": ["Hopper-v4"], "seed": [0, 1], "hidden_sizes": [(64, 64), (256, 256)]}, workers=2)
"""

import contextlib
import csv
import dataclasses
import datetime
import functools
import importlib.util
import itertools
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
import typing
from dataclasses import dataclass, field
from pathlib import Path
from unittest.mock import patch

import tyro
from rich.console import Console, Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from tyro.conf import Positional

import utils.mpi
from utils.logger import read_config
from utils.mpi import RunError

GRACE = 20  # seconds that an interrupted run has for its checkpoint
MAY_DIFFER = ("exp_name", "data_dir", "resume")  # between two attempts at the same run


@dataclass
class Args:
    scripts: Positional[tuple[str, ...]]  # algorithm files
    workers: int | None = None  # runs at a time; default: as many as there are cores for
    skip_done: bool = False  # leave out finished runs and resume those with a checkpoint
    print: bool = False  # print the commands, one per line, and run nothing
    mpi: int = 1  # processes of each run, which mpirun starts
    exp_name: str | None = None  # what the names begin with instead of <script>_<env_id>
    data_dir: str = "data"  # runs go to <data_dir>/<name>/<name>_s<seed>/


@dataclass
class Run:
    """One combination of settings. `sweep` returns these; the first four fields are the result."""

    name: str  # of the experiment, which the seeds share
    seed: int
    run_dir: Path | None = None  # None until the run has made it, and said so in its log
    returncode: int | None = None  # exit status; 0 too if the run was finished before; None until it has ended
    command: list[str] = field(default_factory=list)
    args: typing.Any = None  # the script's Args
    resumes: Path | None = None  # run directory to go on with
    fraction_before: float = 0.0  # of the steps, which is done already in `resumes`
    process: subprocess.Popen | None = None
    log: Path | None = None
    log_start: int = 0  # bytes of earlier attempts
    start: float = 0.0
    seconds: float = 0.0

    def __str__(self):
        return f"{self.name}_s{self.seed}"

    @property
    def parent(self):
        return Path(self.args.data_dir) / self.name

    @property
    def running(self):
        return self.process is not None and self.returncode is None

    def launch(self):
        """Start the process."""
        self.run_dir, self.start = self.resumes, time.monotonic()
        options = dict(stdin=subprocess.DEVNULL, stderr=subprocess.STDOUT, env=os.environ | {"OMP_NUM_THREADS": "1"})
        try:
            self.parent.mkdir(parents=True, exist_ok=True)
            with self._open_log() as log:  # in its own group it gets Ctrl-C from `stop` alone
                self.log, self.log_start = Path(log.name), log.tell()
                self.process = subprocess.Popen(self.command, stdout=log, process_group=0, **options)
        except OSError as error:
            raise RunError(f"{self} cannot be started: {error}") from None

    def _open_log(self):
        """That of the run to resume, else a new one with the number that Logger will choose, unless another sweep's has it."""
        if self.resumes:
            return open(self.parent / f"{self.resumes.name}.log", "a")
        for k in itertools.count():
            path = self.parent / (f"{self}_{k}" if k else f"{self}")
            if not path.exists():
                with contextlib.suppress(FileExistsError):
                    return open(f"{path}.log", "x")

    def poll(self):
        """Note the time, the run directory if it is known by now, and how the process ended if it has."""
        self.seconds, self.returncode = time.monotonic() - self.start, self.process.poll()
        if self.run_dir is None:  # not to be guessed: another process may take the name that is free now
            line = re.search(rf"^({re.escape(str(self.parent / str(self)))}(_\d+)?)  \(", self.output(), re.M)
            self.run_dir = Path(line[1]) if line else None

    def progress(self):
        """The fraction of the steps that are done, and the last return as text."""
        steps, ret = read_progress(self.run_dir) if self.run_dir else (0, "-")
        return min(1, steps / self.args.total_steps), ret

    def output(self):
        """What the process has printed."""
        return self.log.read_bytes()[self.log_start :].decode(errors="replace")

    def error(self):
        """The line of the output that says why the run failed."""
        text = self.output().strip()
        errors = re.findall(r"^(?:\[rank \d+\] )?[\w.]*(?:[Ee]rror|Exception|Interrupt)\b.*", text, re.M)
        return (errors or text.splitlines() or ["no output"])[-1] + f" (exit status {self.returncode})"


def read_progress(run_dir):
    """Steps and last return by progress.txt: an int, and text that is "-" before the first episode's end."""
    try:
        text = (run_dir / "progress.txt").read_text()
    except OSError:
        return 0, "-"
    rows = list(csv.DictReader(text.rpartition("\n")[0].splitlines(), delimiter="\t"))  # without an unfinished line
    rets = [ret for row in rows if (ret := row.get("AverageTestEpRet") or row.get("AverageEpRet"))]
    return int(rows[-1]["TotalEnvInteracts"]) if rows else 0, f"{float(rets[-1]):.1f}" if rets else "-"


@functools.cache
def load(script):
    """The script as a module."""
    if not Path(script).is_file():
        raise RunError(f"{script}: no such script")
    sys.path.insert(0, str(Path(script).resolve().parent))  # as Python does when it runs a script
    spec = importlib.util.spec_from_file_location(script, script)
    module = sys.modules[script] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    if not hasattr(module, "Args") or not hasattr(module, "train"):
        raise RunError(f"{script}: has no Args and no train(args), as the algorithm files have")
    return module


def field_type(script, flag):
    """The type of the script's argument, plain `tuple` if it takes several words; None if there is no such argument."""
    hint = typing.get_type_hints(load(script).Args).get(flag.replace("-", "_"))
    return tuple if tuple in [typing.get_origin(t) for t in (hint, *typing.get_args(hint))] else hint


def words(script, flag, value):
    """What stands on the script's command line for a value of the grid."""
    kind = field_type(script, flag)
    if kind is bool and value in ("True", "False"):
        return [f"--{flag}" if value == "True" else f"--no-{flag}"]
    return [f"--{flag}", *(value.split() if kind is tuple else [value] if value else [])]


def parse(argv):
    """Split a command line into this module's Args and the grid: a dict from flag to its values, as text."""
    own_flags = {f.name.replace("_", "-") for f in dataclasses.fields(Args)} | {"help"}
    groups = [[]]  # the words before the first flag, then each flag with its words
    for word in argv:
        if word.startswith("--"):
            flag, *value = word[2:].split("=", 1)
            groups.append([flag.replace("_", "-"), *value])
        else:
            groups[-1].append(word)
    own, grid = groups[0], {}
    for flag, *values in groups[1:]:
        if flag in own_flags:
            own += [f"--{flag}", *values]
        else:
            grid[flag] = grid.get(flag, []) + values
    args = tyro.cli(Args, args=own, prog="python -m benchmark.sweep", description=__doc__)
    for flag, values in grid.items():
        several_words = any(field_type(script, flag.partition("[")[0]) is tuple for script in args.scripts)
        if not values or several_words and " " not in "".join(values):
            grid[flag] = [" ".join(values)]
    return args, grid


def shorthands(given):
    """What stands for each flag in names. given: a dict from flag to the user's own shorthand, or to an empty string."""
    letters = {flag: flag.replace("-", "") for flag in given}
    threes = [name[:3] for name in letters.values()]
    return {flag: given[flag] or (s[:3] if threes.count(s[:3]) == 1 else s) for flag, s in letters.items()}


def plan(args, grid):
    """The Runs of a grid, checked, without starting or writing anything.

    Raises RunError for what a run would refuse; SystemExit for what its command line would, after the script's message.
    """
    if utils.mpi.size() > 1:
        raise RunError(f"write --mpi {utils.mpi.size()} instead of mpirun -n {utils.mpi.size()}: the sweep is one process")
    if not args.scripts:
        raise RunError("name a script: python -m benchmark.sweep ppo.py --seed 0 1 2")
    for name, value in dict(workers=args.workers, mpi=args.mpi).items():
        if value is not None and value < 1:
            raise RunError(f"--{name} {value}: has to be at least 1")
    keys = {key: key.rstrip("]").partition("[") for key in grid}  # flag, "[", the user's shorthand
    flags = [flag for flag, _, _ in keys.values()]
    for flag in flags:
        if flag in ("exp-name", "data-dir", "resume"):
            raise RunError(f"{flag.replace('-', '_')}: is no argument that a sweep can vary; see sweep's own options")
        if flags.count(flag) > 1:
            raise RunError(f"--{flag}: is given twice, once with a shorthand in brackets")
    varied = {flag: short for key, (flag, _, short) in keys.items() if len(grid[key]) > 1 and flag not in ("seed", "env-id")}
    short, grid = shorthands(varied), {keys[key][0]: values for key, values in grid.items()}
    runs, seen = [], {}
    for script, *values in itertools.product(args.scripts, *grid.values()):
        setting = dict(zip(grid, values, strict=True))
        argv = [word for flag, value in setting.items() for word in words(script, flag, value)]
        rest = ["--data-dir", args.data_dir] + ["--torch-threads", "1"] * ("torch-threads" not in grid)
        group = args.exp_name or "_".join(Path(script).stem for script in args.scripts)
        rest += ["--wandb-group", group] * ("track" in grid and "wandb-group" not in grid)
        run_args = tyro.cli(load(script).Args, args=argv + rest, prog=script)
        env = re.sub(r"[^A-Za-z0-9_.+=,-]", "-", run_args.env_id)
        parts = [] if args.exp_name is None else [args.exp_name]
        if args.exp_name is None or len(args.scripts) > 1:
            parts.append(Path(script).stem)
        if args.exp_name is None or len(grid.get("env-id", [])) > 1:
            parts.append(env)
        parts += [short[flag] + re.sub(r"[^A-Za-z0-9_+=,-]", "-", setting[flag]) for flag in short]
        name = "_".join(parts)
        run = Run(name, run_args.seed, args=dataclasses.replace(run_args, exp_name=name))
        for key in (str(run), f"{script} {run_args}"):
            if key in seen:
                raise RunError(
                    f"`{seen[key]}` and `{script} {shlex.join(argv)}` are the same run, or would both be called {run}: "
                    "leave one out, or give it a sweep of its own with another --exp-name"
                )
            seen[key] = f"{script} {shlex.join(argv)}"
        check(script, run.args, args.mpi)
        launcher = ["mpirun", "-n", str(args.mpi)] * (args.mpi > 1) + [sys.executable, script]
        run.command = launcher + argv + ["--exp-name", name] + rest
        if args.skip_done:
            use_earlier_attempts(run, script, launcher, args.mpi)
        runs.append(run)
    return runs


class _Checked(Exception):
    pass


def check(script, args, ranks):
    """Raise the RunError of the script's own check, with which its `train` begins; nothing after the check is run."""
    train = load(script).train
    if "check" not in train.__code__.co_names:
        return
    own_check = train.__globals__["check"]

    def check_and_leave(*args, **options):
        own_check(*args, **options)
        raise _Checked

    with patch.dict(train.__globals__, check=check_and_leave), patch.object(utils.mpi, "size", lambda: ranks):
        try:
            train(args)
        except _Checked:
            pass
        except RunError as error:
            raise RunError(f"{script}: {error}") from None


def use_earlier_attempts(run, script, launcher, ranks):
    """Mark the run as finished if one with the same arguments is; otherwise resume the one that got furthest, if any can be."""
    wanted = json.loads(json.dumps(dataclasses.asdict(run.args))) | {"script": Path(script).name, "ranks": ranks}
    steps = {}
    for path in sorted(run.parent.glob(f"{run}*/config.json")):
        try:
            config = read_config(path.parent)
        except RunError:  # not of a run
            continue
        if all(config.get(name, ...) == value for name, value in wanted.items() if name not in MAY_DIFFER):
            steps[path.parent] = read_progress(path.parent)[0]
    resumable = [path for path in steps if any((path / "checkpoint").glob("*.pt"))]
    # a run that was killed after its last row and before its last save has a checkpoint to go on with
    finished = [path for path in steps if steps[path] >= run.args.total_steps and (path not in resumable or is_saved(path))]
    if finished:
        run.run_dir, run.returncode = max(finished, key=steps.get), 0
    elif resumable:
        run.resumes = max(resumable, key=steps.get)
        run.fraction_before = steps[run.resumes] / run.args.total_steps
        run.command = [*launcher, "--resume", str(run.resumes)]


def is_saved(run_dir):
    """Whether model.pt was written after the last row."""
    model, rows = run_dir / "model.pt", run_dir / "progress.txt"
    return model.exists() and model.stat().st_mtime >= rows.stat().st_mtime


def summary(runs, workers):
    """How many runs are in which state, and the time left if what is to do is as fast as what was done."""
    running = [run for run in runs if run.running]
    waiting = sum(run.process is None and run.returncode is None for run in runs)
    ended = [run for run in runs if run.process and run.returncode == 0]
    failed = sum(bool(run.returncode) for run in runs)
    fractions = sum(run.progress()[0] for run in running)
    done = fractions + len(ended) - sum(run.fraction_before for run in running + ended)  # in this sweep; 1 is a whole run
    to_do = waiting + len(running) - fractions
    text = f"{len(runs) - len(running) - waiting - failed} finished, {len(running)} running, {waiting} waiting, {failed} failed"
    if done > 0 and to_do > 0:
        left = sum(run.seconds for run in running + ended) / done * to_do / min(workers, waiting + len(running))
        text += f", {datetime.timedelta(seconds=round(left))} left"
    return text


def overview(runs, workers):
    """The summary above a line for each run in progress."""
    table = Table.grid(padding=(0, 2))
    for run in filter(lambda run: run.running, runs):
        fraction, ret = run.progress()
        elapsed = str(datetime.timedelta(seconds=round(run.seconds)))
        table.add_row(str(run), ProgressBar(1, fraction, width=20), f"{fraction:.0%}", f"return {ret}", elapsed)
    return Group(summary(runs, workers), table)


def stop(runs):
    """End the runs that are in progress: SIGINT, GRACE seconds for a checkpoint, which another Ctrl-C cuts short, SIGTERM."""
    running = [run for run in runs if run.process and run.process.poll() is None]
    for run in running:
        run.process.send_signal(signal.SIGINT)
    deadline = time.monotonic() + GRACE
    try:
        if running:
            print(f"stopping what runs; this may take {GRACE} s (Ctrl-C again: at once)", flush=True)
        for run in running:
            run.process.wait(max(0, deadline - time.monotonic()))
    except (subprocess.TimeoutExpired, KeyboardInterrupt):
        for run in running:
            run.process.terminate()
    for run in running:
        run.process.wait()


def execute(runs, workers, ended=lambda run: None):
    """Start the runs that wait, at most `workers` at a time, report each that ends and call `ended` with it; stops all when
    interrupted."""
    waiting, running = [run for run in runs if run.returncode is None], []
    print(f"runs: {len(runs)}, names: {len({run.name for run in runs})}, finished before: {len(runs) - len(waiting)}", flush=True)
    live = Live(get_renderable=lambda: overview(runs, workers), refresh_per_second=1)
    if Console().is_terminal:
        live.start()
    try:
        while waiting or running:
            while waiting and len(running) < workers:
                running.append(waiting.pop(0))
                running[-1].launch()
            time.sleep(0.1)
            for run in running:
                run.poll()
                if not run.running:
                    what = f"return {run.progress()[1]}" if run.returncode == 0 else f"FAILED, see {run.log}"
                    elapsed = datetime.timedelta(seconds=round(run.seconds))
                    print(f"{run}: {what}, {elapsed}   ({summary(runs, workers)})", flush=True)
                    ended(run)
            running = [run for run in running if run.running]
    finally:
        live.stop()
        stop(runs)
    failed = [run for run in runs if run.returncode]
    for run in failed:
        print(f"\nFAILED: {shlex.join(run.command)}\n  {run.error()}\n  {run.log}")
    print(f"finished: {len(runs) - len(failed)}, failed: {len(failed)}", flush=True)


def sweep(script, grid, **options):
    """Run `script` (a path, or several) once for each combination of the values of `grid`.

    grid: a dict from an argument's name to the list of its values. options: the other fields of Args, such as workers=2.
    Returns the list of Runs, each with name, seed, run_dir (None if there is none) and returncode. Raises RunError before
    anything is started if a run would refuse its arguments.
    """
    args = Args((script,) if isinstance(script, str | Path) else tuple(script), **options)
    args.scripts = tuple(map(str, args.scripts))

    def text(value):
        return " ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)

    lists = {key: v if isinstance(v, list | range) else [v] for key, v in grid.items()}
    runs = plan(args, {key.replace("_", "-"): list(map(text, values)) for key, values in lists.items()})
    if args.print:
        print("\n".join(shlex.join(run.command) for run in runs if run.returncode is None))
    else:
        execute(runs, args.workers or max(1, available_cores() // args.mpi))
    return runs


def main(argv):
    """Returns the exit status: 1 if a run failed, 130 if interrupted."""
    try:
        args, grid = parse(argv)
        options = vars(args)
        return int(any(run.returncode for run in sweep(options.pop("scripts"), grid, **options)))
    except KeyboardInterrupt:
        again = argv if "--skip-done" in argv else [*argv, "--skip-done"]
        print(f"interrupted; to go on: {shlex.join(['python', '-m', 'benchmark.sweep', *again])}", flush=True)
        return 130


def available_cores():
    """Cores that this process may use: of a cluster's node those allotted to it, where the system tells."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def handle_signals():
    """Let whatever ends this process stop its runs first, with a checkpoint: the signals raise KeyboardInterrupt."""
    for signum in (signal.SIGTERM, signal.SIGHUP, signal.SIGINT):  # the last one even in a background job, which ignores it
        if signum == signal.SIGINT or signal.getsignal(signum) != signal.SIG_IGN:
            signal.signal(signum, signal.default_int_handler)


if __name__ == "__main__":
    handle_signals()
    sys.exit(main(sys.argv[1:]))
