"""Runs in processes of their own, several at a time, with their output in log files and an overview of them all."""

import contextlib
import datetime
import itertools
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from rich.console import Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table

from utils.args import RunArgs
from utils.process import RunError, say

GRACE = 20  # seconds that an interrupted run has for its checkpoint


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
    outdated: Path | None = None  # run directory of the same arguments but other code, if there is one
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
        if self.returncode and self.run_dir and not self.run_dir.exists():  # it failed before its first row
            self.run_dir = None

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


def read_rows(path):
    """The complete lines of a progress.txt: a list of dicts of strings by column, empty if there is no such file."""
    text = path.read_bytes().decode(errors="replace") if path.is_file() else ""
    header, *lines = text.split("\n")[:-1] or [""]
    return [dict(zip(header.split("\t"), line.split("\t"), strict=False)) for line in lines]


def steps_done(rows):
    return int(float(rows[-1]["TotalEnvInteracts"])) if rows else 0


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
    deadline = time.monotonic() + GRACE
    try:
        for process in processes:  # once: a second one would end them without a checkpoint
            process.send_signal(signal.SIGINT)
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
    waiting, running, over = [run for run in runs if run.returncode is None], [], []
    say(f"runs: {len(runs)}, names: {len({run.name for run in runs})}, finished before: {len(runs) - len(waiting)}")
    live = Live(get_renderable=lambda: overview(runs, workers), refresh_per_second=1)
    with live if sys.stdout.isatty() else contextlib.nullcontext():
        try:
            while waiting or running or over:
                while waiting and len(running) < workers:
                    running.append(waiting.pop(0))
                    running[-1].launch()
                for run in over:  # after the next have begun: it may take minutes
                    ended(run)
                time.sleep(0.1)
                for run in running:
                    run.poll()
                over = [run for run in running if run.returncode is not None]
                running = [run for run in running if run.returncode is None]
                for run in over:
                    what = f"FAILED, see {run.log}" if run.returncode else f"return {run.progress()[1]}"
                    elapsed = datetime.timedelta(seconds=round(run.seconds))
                    say(f"{run}: {what}, {elapsed}   ({summary(runs, workers)})")
        finally:
            stop(runs)
    failed = [run for run in runs if run.returncode]
    for run in failed:
        say(f"\nFAILED: {shlex.join(run.command)}\n  {run.error()}\n  {run.log}")
    say(f"finished: {len(runs) - len(failed)}, failed: {len(failed)}")


@contextlib.contextmanager
def interruptible(*command):
    """Lets the signals that would end this process raise KeyboardInterrupt, and prints the words of the command to go on."""

    def interrupt(signum, frame):
        for other in (signal.SIGTERM, signal.SIGHUP):  # they may come together, or twice; only Ctrl-C again ends at once
            signal.signal(other, signal.SIG_IGN)
        raise KeyboardInterrupt(signum)

    for signum in (signal.SIGTERM, signal.SIGHUP, signal.SIGINT):  # the last one even in a background job, which ignores it
        if signum == signal.SIGINT or signal.getsignal(signum) != signal.SIG_IGN:
            signal.signal(signum, interrupt)
    try:
        yield
    except KeyboardInterrupt as interruption:
        say(f"interrupted; to go on: {shlex.join(command)}")
        sys.exit(128 + interruption.args[0])
