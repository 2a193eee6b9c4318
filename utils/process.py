"""This process: its launcher, what it prints, and how it ends.

mpi4py is imported only under a launcher, so a plain `python ppo.py` needs no MPI at all.
"""

import contextlib
import ctypes
import os
import signal
import sys
import threading
import time
import traceback


class RunError(RuntimeError):
    """What the user can mend, or has to know: shown as one line, without a traceback."""


def one_line(error):
    """The text of an error, however many lines it has, for a message."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) < 300 else text[:300] + " ..."


def say(text, file=None):
    """Print a line, as long as somebody can read it: a pipe may be closed, a disk full, a terminal gone."""
    file = file or sys.stdout
    try:
        print(text, file=file, flush=True)
    except OSError as error:
        os.dup2(os.open(os.devnull, os.O_WRONLY), file.fileno())  # also for what others print there until the end
        if file is sys.stdout:
            say(f"the output cannot be written any more ({error.strerror}); the run goes on without it", sys.stderr)


def _launched():
    """How many processes MPI's launcher has started; 1 in a process that a rank has started for itself."""
    env = os.environ
    try:
        "PMI_FD" in env and os.fstat(int(env["PMI_FD"]))
    except OSError:  # MPICH's line to the launcher is the rank's alone
        return 1
    return max(int(env.get(name, 1)) for name in ("PMI_SIZE", "OMPI_COMM_WORLD_SIZE"))


def refuse_other_launchers():
    """Raise RunError in a process of a launcher that is not MPI's: each would do the same run."""
    name, variable = ("torchrun", "WORLD_SIZE") if "TORCHELASTIC_RUN_ID" in os.environ else ("srun", "SLURM_STEP_NUM_TASKS")
    n = int(os.environ.get(variable, 1))
    if comm is None and n > 1:
        own = f"for a run of its own in each task, unset {variable}"
        raise RunError(f"{name} has started {n} processes that know nothing of each other: take mpirun -n {n}; {own}")


def _connect():
    """The communicator of all ranks, or None in a single process."""
    launched = _launched()
    if launched == 1:
        return None
    if sys.platform == "linux":  # die with the launcher, which may end without ending its ranks
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
    try:
        from mpi4py import MPI
    except ImportError as error:
        raise SystemExit(f"error: launched as {launched} MPI processes, but mpi4py cannot be imported: {error}") from error
    if (seen := MPI.COMM_WORLD.Get_size()) != launched:
        raise SystemExit(f"error: mpi4py sees {seen} of {launched} processes: take the mpirun of this Python environment")
    return MPI.COMM_WORLD


def _excepthook(kind, error, trace):
    """Print the error and end all ranks, which would otherwise wait for this one forever."""
    if isinstance(error, RunError):
        if comm and comm.Get_rank() > 0:
            time.sleep(1)  # most such errors hit every rank: leave the printing to rank 0, whose abort ends this wait
        text = "\n".join([f"error: {error}", *getattr(error, "__notes__", [])])
    else:
        text = "".join(traceback.format_exception(kind, error, trace)).rstrip()  # with its notes
    if not comm:
        say(text, sys.stderr)
    abort(text)


def abort(text):
    """If there are several ranks, say why and end them all."""
    if comm:
        say(f"[rank {comm.Get_rank()}] {text}", sys.stderr)
        time.sleep(0.2)  # until the launcher has passed on what was printed: at the abort it drops the rest
        comm.Abort(1)


comm = _connect()
sys.excepthook = _excepthook


class Interrupted(SystemExit):
    """A signal, after the checkpoint; ends the program with status 128 + its number."""


class Signals:
    """Ctrl-C, SIGTERM and SIGHUP, noted in `got` instead of ending the process; the same one again ends it at once."""

    def __init__(self):
        self.got, self.handlers, self.last = [], {}, 0.0

    def _note(self, signum, frame):
        if signum in self.got and time.monotonic() > self.last + 1:  # a terminal that closes may send it twice
            raise SystemExit(128 + signum)
        self.got, self.last = [*self.got, int(signum)], time.monotonic()
        if not (comm and comm.Get_rank()):
            with contextlib.suppress(RuntimeError):  # it came in the middle of another print
                say(f"{signal.Signals(signum).name}: writing a checkpoint as soon as possible (again: stop at once, without one)")

    def __enter__(self):
        if threading.current_thread() is threading.main_thread():
            for signum in (getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)):
                if signum == signal.SIGINT or signal.getsignal(signum) != signal.SIG_IGN:  # as nohup wants it
                    self.handlers[signum] = signal.signal(signum, self._note)

    def __exit__(self, *error):
        for signum, handler in self.handlers.items():
            signal.signal(signum, handler or signal.SIG_DFL)


def available_cores():
    """Cores that this process may use: of a cluster's node those allotted to it, where the system tells."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
