"""Run a script once for each combination of settings, several runs at a time, in processes of one thread each.

    python -m benchmark.sweep ppo.py --env-id Hopper-v4 Walker2d-v4 --seed 0 1 2 --clip-ratio 0.1 0.2 --workers 2

Flags that are not listed below go to the scripts that have them, and each may have several values. True and False are values
of a switch (--norm-obs True False); one without a value is handed on (--track). A flag that takes several words, as
--hidden-sizes 64 64 does, has one value, unless words are quoted together: --hidden-sizes "64 64" "256 256 256" "32" has three.

Runs are called <script>_<env_id>, with what differs between them but the seed: three letters of the flag and the value, as in
ppo_Hopper-v4_cli0-1. --clip-ratio[eps] 0.1 0.2 makes it ppo_Hopper-v4_eps0-1; quote the brackets where the shell needs it.
All combinations are checked before the first run starts. The output of a run goes to a .log file next to its directory.
With --track the runs share a W&B group, the sweep's --exp-name or else the scripts' names.

From Python: sweep("ppo.py", {"env_id": ["Hopper-v4"], "seed": [0, 1], "hidden_sizes": [(64, 64), (256, 256)]}, workers=2)
"""

import contextlib
import datetime
import functools
import itertools
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from collections import Counter
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path

import numpy as np
import tyro
from rich.console import Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from tyro.conf import Positional

from utils import mpi
from utils.args import RunArgs, cli
from utils.check import check
from utils.evaluate import ROOT, import_script
from utils.mpi import RunError, say
from utils.run_dir import read_config, read_rows, same_code

GRACE = 20  # seconds that an interrupted run has for its checkpoint
MAY_DIFFER = ("exp_name", "data_dir", "resume")  # between two attempts at the same run


@dataclass
class Args:
    scripts: Positional[tuple[str, ...]]  # algorithm files
    workers: int | None = None  # runs at a time; default: as many as there are cores for
    skip_done: bool = False  # leave out finished runs and resume those with a checkpoint, if they are of the same code
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
    args: RunArgs | None = None  # the script's Args
    resumes: Path | None = None  # run directory to go on with
    outdated: Path | None = None  # run directory of the same arguments, if there are only such of other code
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
    def state(self):
        if self.returncode is not None:
            return "failed" if self.returncode else "finished"
        return "running" if self.process else "waiting"

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
            said = re.search(rf"{re.escape(str(self.parent / str(self)))}(_\d+)?(?=  \()", self.output())
            self.run_dir = Path(said[0]) if said else None

    def progress(self):
        """The fraction of the steps that are done, and the last return as text, "-" before the first episode's end."""
        rows = read_rows(self.run_dir / "progress.txt") if self.run_dir else []
        rets = [ret for row in rows if (ret := row.get("AverageTestEpRet") or row.get("AverageEpRet"))]
        return min(1, steps_done(rows) / self.args.total_steps), f"{float(rets[-1]):.1f}" if rets else "-"

    def output(self):
        """What the process has printed."""
        return self.log.read_bytes()[self.log_start :].decode(errors="replace")

    def error(self):
        """The line of the output that says why the run failed."""
        text = self.output().strip()
        errors = re.findall(r"^(?:\[rank \d+\] )?[\w.]*(?:[Ee]rror|Exception|Interrupt)\b.*", text, re.M)
        return (errors or text.splitlines() or ["no output"])[-1] + f" (exit status {self.returncode})"


def steps_done(rows):
    return int(rows[-1]["TotalEnvInteracts"]) if rows else 0


@functools.cache
def arguments(script):
    """The Args of a script, and its arguments' types as text by flag; of a switch, by no-<flag> too."""
    if not script.endswith(".py") or not Path(script).is_file():
        raise RunError(f"{script}: no such script")
    sys.path.insert(0, str(Path(script).resolve().parent))  # as Python does when it runs a script
    module = import_script(script)
    if not hasattr(module, "Args"):
        raise RunError(f"{script}: has no Args, as the algorithm files have")
    types = {f.name.replace("_", "-"): str(f.type) for f in fields(module.Args)}
    return module.Args, types | {f"no-{flag}": kind for flag, kind in types.items()}


def is_tuple(key, scripts):
    """Whether the argument takes several words, in one of the scripts at least."""
    return any("tuple" in arguments(script)[1].get(flag_of(key), "") for script in scripts)


def flag_of(key):
    """Keys of a grid may end in a shorthand: "clip_ratio[eps]" is --clip-ratio."""
    return key.partition("[")[0].replace("_", "-")


def parse(argv):
    """Split a command line into this module's Args and the grid: a dict from flag to its values, as text."""
    args, rest = tyro.cli(Args, args=argv, prog="python -m benchmark.sweep", description=__doc__, return_unknown_args=True)
    scripts, grid = list(args.scripts), {}
    values = scripts  # what takes the words that are no flags
    for word in rest:
        if word.startswith("--"):
            key, equals, value = word[2:].partition("=")
            grid[key] = values = grid.get(key, []) + [value] * bool(equals)
        else:
            values.append(word)
    args.scripts = tuple(scripts)
    for key, values in grid.items():
        if is_tuple(key, args.scripts):
            values = values if " " in "".join(values) else [" ".join(values)]
            grid[key] = [f"[{value}]" for value in values]
    return args, {key: values or [""] for key, values in grid.items()}


def words(flag, value):
    """What stands on a script's command line for a value of the grid."""
    if value in ("", "True", "False"):
        return [f"--no-{flag}" if value == "False" else f"--{flag}"]
    return [f"--{flag}", *re.findall(r"[^\s,\[\]]+", value)] if value[0] == "[" else [f"--{flag}={value}"]


def shorthands(keys):
    """What stands for each key in names: its shorthand, or the first letters of its flag, all where two begin alike."""
    flags = {key: flag_of(key).replace("-", "") for key in keys}
    alike = Counter(flag[:3] for flag in flags.values())
    flags = {key: flag[:3] if alike[flag[:3]] == 1 else flag for key, flag in flags.items()}
    return {key: key.partition("[")[2].rstrip("]") or flag for key, flag in flags.items()}


def safe(text):
    """The text with dashes for what a name cannot hold."""
    return re.sub(r"[^A-Za-z0-9_.+=,-]", "-", text)


def plan(args, grid):
    """The Runs of a grid, checked, without starting or writing anything.

    grid: a dict from flag, with a shorthand or without, to its values, as text; "" for none, "[64 64]" for a tuple.
    Raises RunError for what a run would refuse; SystemExit for what its command line would, after the script's message.
    """
    if mpi.size() > 1:
        raise RunError(f"write --mpi {mpi.size()} instead of mpirun -n {mpi.size()}: the sweep is one process")
    if not args.scripts:
        raise RunError("name a script: python -m benchmark.sweep ppo.py --seed 0 1 2")
    for name, value in dict(workers=args.workers, mpi=args.mpi).items():
        if value is not None and value < 1:
            raise RunError(f"--{name} {value}: has to be at least 1")
    flags = [flag_of(key) for key in grid]
    for flag in flags:
        if flag in ("exp-name", "data-dir", "resume") or flags.count(flag) > 1:
            raise RunError(f"--{flag}: is given twice, or is no argument that a sweep can vary; see sweep's own options")
    short = shorthands(key for key in grid if len(grid[key]) > 1 and flag_of(key) not in ("seed", "env-id"))
    stems = {script: safe(Path(script).stem).lstrip("_.+=,-") or "script" for script in args.scripts}
    several_envs = any(len(grid[key]) > 1 for key in grid if flag_of(key) == "env-id")
    rest = ["--data-dir", os.path.expanduser(args.data_dir)] + ["--torch-threads", "1"] * ("torch-threads" not in flags)
    rest += ["--wandb-group", args.exp_name or "_".join(stems.values())] * ("track" in flags and "wandb-group" not in flags)
    known = {flag for script in args.scripts for flag in arguments(script)[1]}
    runs, seen = [], {}
    for script in args.scripts:
        Args, types = arguments(script)
        keys = [key for key in grid if flag_of(key) in types or flag_of(key) not in known]  # what is unknown it refuses itself
        for values in itertools.product(*map(grid.get, keys)):
            argv = [word for key, value in zip(keys, values, strict=True) for word in words(flag_of(key), value)]
            run_args = cli(Args, argv + rest)
            run_args.exp_name = args.exp_name
            try:
                check(run_args, args.mpi)  # completes env_id
            except RunError as error:
                raise RunError(f"{script}: {error}") from None
            parts = [args.exp_name] if args.exp_name else [stems[script], safe(run_args.env_id)]
            parts += [stems[script]] * bool(args.exp_name and len(args.scripts) > 1)
            parts += [safe(run_args.env_id)] * bool(args.exp_name and several_envs)
            parts += [short[k] + safe(v.strip("[]")).replace(".", "-") for k, v in zip(keys, values, strict=True) if k in short]
            run = Run("_".join(parts), run_args.seed, args=run_args)
            for key in (str(run), f"{script} {run_args}"):
                if key in seen:
                    raise RunError(
                        f"`{seen[key]}` and `{script} {shlex.join(argv)}` are the same run, or would both be called {run}: "
                        "leave one out, or give it a sweep of its own with another --exp-name"
                    )
                seen[key] = f"{script} {shlex.join(argv)}"
            run_args.exp_name = run.name
            launcher = ["mpirun", "-n", str(args.mpi)] * (args.mpi > 1) + [sys.executable, script]
            if Path(script).resolve().parent != ROOT:  # where it does not find utils/ by itself
                path = ":".join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
                launcher = ["env", f"PYTHONPATH={path}", *launcher]
            run.command = [*launcher, *argv, "--exp-name", run.name, *rest]
            if args.skip_done:
                use_earlier_attempts(run, script, launcher, args.mpi)
            runs.append(run)
    return runs


def use_earlier_attempts(run, script, launcher, ranks):
    """Mark the run as finished if one with the same arguments and code is, or let it resume the one that got furthest."""
    wanted = json.loads(json.dumps(asdict(run.args))) | {"script": Path(script).name, "ranks": ranks}
    wanted = {name: value for name, value in wanted.items() if name not in MAY_DIFFER}
    steps, outdated = {}, None
    for path in sorted(run.parent.glob(f"{run}*/config.json")):
        with contextlib.suppress(RunError):  # not of a run
            if wanted.items() <= read_config(path.parent).items():
                if same_code(path.parent, script):
                    steps[path.parent] = steps_done(read_rows(path.parent / "progress.txt"))
                else:
                    outdated = path.parent
    resumable = [path for path in steps if any((path / "checkpoint").glob("*.ckpt"))]
    # a run that was killed after its last row and before its last save has a checkpoint to go on with
    finished = [path for path in steps if steps[path] >= run.args.total_steps and (path not in resumable or is_saved(path))]
    if finished:
        run.run_dir, run.returncode = max(finished, key=steps.get), 0
    elif resumable:
        run.resumes = max(resumable, key=steps.get)
        run.fraction_before = steps[run.resumes] / run.args.total_steps
        run.command = [*launcher, "--resume", str(run.resumes)]
    elif outdated:
        run.outdated = outdated
        say(f"{outdated}: was made by other code than {script} has now; {run} starts anew", sys.stderr)


def is_saved(run_dir):
    """Whether model.pt was written after the last row."""
    model, rows = run_dir / "model.pt", run_dir / "progress.txt"
    return model.exists() and model.stat().st_mtime >= rows.stat().st_mtime


def summary(runs, workers):
    """How many runs are in which state, and the time left if what is to do is as fast as what was done."""
    count = Counter(run.state for run in runs)
    text = ", ".join(f"{count[state]} {state}" for state in ("finished", "running", "waiting", "failed"))
    begun = [run for run in runs if run.process and not run.returncode]  # here, and not failed
    fractions = [1 if run.state == "finished" else run.progress()[0] for run in begun]
    done = sum(fractions) - sum(run.fraction_before for run in begun)
    to_do = count["waiting"] + len(begun) - sum(fractions)
    if done > 0 and to_do > 0:
        left = sum(run.seconds for run in begun) / done * to_do / min(workers, count["waiting"] + count["running"])
        text += f", {datetime.timedelta(seconds=round(left))} left"
    return text


def overview(runs, workers):
    """The summary above a line for each run in progress."""
    table = Table.grid(padding=(0, 2))
    for run in (run for run in runs if run.state == "running"):
        fraction, ret = run.progress()
        elapsed = str(datetime.timedelta(seconds=round(run.seconds)))
        table.add_row(str(run), ProgressBar(1, fraction, width=20), f"{fraction:.0%}", f"return {ret}", elapsed)
    return Group(summary(runs, workers), table)


def stop(runs):
    """End the runs in progress: SIGINT, GRACE seconds for a checkpoint, which another Ctrl-C cuts short, and the kill."""
    processes = [run.process for run in runs if run.process and run.process.poll() is None]
    for process in processes:  # once: the second signal of a kind would end them without a checkpoint
        process.send_signal(signal.SIGINT)
    deadline = time.monotonic() + GRACE
    try:
        if processes:
            say(f"stopping what runs; this may take {GRACE} s (Ctrl-C again: at once)")
        for process in processes:
            process.wait(max(0, deadline - time.monotonic()))
    except (subprocess.TimeoutExpired, KeyboardInterrupt):
        for process in processes:
            process.kill()
    for process in processes:
        process.wait()


def execute(runs, workers, ended=lambda run: None):
    """Start the runs that wait, at most `workers` at a time, report each that ends and call `ended` with it; stops all when
    interrupted."""
    waiting, running = [run for run in runs if run.returncode is None], []
    say(f"runs: {len(runs)}, names: {len({run.name for run in runs})}, finished before: {len(runs) - len(waiting)}")
    live = Live(get_renderable=lambda: overview(runs, workers), refresh_per_second=1)
    with live if sys.stdout.isatty() else contextlib.nullcontext():
        try:
            while waiting or running:
                while waiting and len(running) < workers:
                    running.append(waiting.pop(0))
                    running[-1].launch()
                time.sleep(0.1)
                for run in running:
                    run.poll()
                    if run.returncode is not None:
                        what = f"FAILED, see {run.log}" if run.returncode else f"return {run.progress()[1]}"
                        elapsed = datetime.timedelta(seconds=round(run.seconds))
                        say(f"{run}: {what}, {elapsed}   ({summary(runs, workers)})")
                        ended(run)
                running = [run for run in running if run.returncode is None]
        finally:
            stop(runs)
    failed = [run for run in runs if run.returncode]
    for run in failed:
        say(f"\nFAILED: {shlex.join(run.command)}\n  {run.error()}\n  {run.log}")
    say(f"finished: {len(runs) - len(failed)}, failed: {len(failed)}")


def sweep(script, grid, **options):
    """Run `script` (a path, or several) once for each combination of the values of `grid`.

    grid: a dict from an argument's name to its values, a list or any iterable but a string; for an argument that is a tuple
    itself, a tuple is one value. options: the other fields of Args, such as workers=2. Returns the Runs, each with name, seed,
    run_dir (None if there is none) and returncode. Raises RunError before any starts if one would refuse its arguments.
    """
    args = Args(tuple(map(str, [script] if isinstance(script, str | Path) else script)), **options)
    texts = {}
    for key, values in grid.items():
        if isinstance(values, tuple) and is_tuple(key, args.scripts) or isinstance(values, str) or not np.iterable(values):
            values = [values]
        texts[key] = [f"[{' '.join(map(str, value))}]" if isinstance(value, list | tuple) else str(value) for value in values]
    runs = plan(args, texts)
    if args.print:
        print("\n".join(shlex.join(run.command) for run in runs if run.returncode is None))
    else:
        execute(runs, args.workers or max(1, available_cores() // args.mpi))
    return runs


def main(argv):
    """Returns the exit status: 1 if a run failed."""
    args, grid = parse(argv)
    options = vars(args)
    return int(any(run.returncode for run in sweep(options.pop("scripts"), grid, **options)))


def available_cores():
    """Cores that this process may use: of a cluster's node those allotted to it, where the system tells."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@contextlib.contextmanager
def interruptible(*command):
    """Lets the signals that would end this process raise KeyboardInterrupt, and prints the words of the command to go on."""

    def interrupt(signum, frame):
        raise KeyboardInterrupt(signum)

    for signum in (signal.SIGTERM, signal.SIGHUP, signal.SIGINT):  # the last one even in a background job, which ignores it
        if signum == signal.SIGINT or signal.getsignal(signum) != signal.SIG_IGN:
            signal.signal(signum, interrupt)
    try:
        yield
    except KeyboardInterrupt as interruption:
        say(f"interrupted; to go on: {shlex.join(command)}")
        sys.exit(128 + interruption.args[0])


if __name__ == "__main__":
    again = sys.argv[1:] if "--skip-done" in sys.argv else [*sys.argv[1:], "--skip-done"]
    with interruptible("python", "-m", "benchmark.sweep", *again):
        sys.exit(main(sys.argv[1:]))
