"""MPI in a few verbs, each of which does nothing in a single process.

    mpirun -n 4 python ppo.py

mpi4py is imported only under a launcher, so a plain `python ppo.py` needs no MPI at all.
`average`, `average_gradients`, `broadcast`, `check_equal` and `gather` are collective: all ranks have to call them.
"""

import ctypes
import os
import random
import signal
import sys
import time
import traceback

import numpy as np
import torch


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
        encoding = getattr(file, "encoding", None) or "utf-8"
        print(text.encode(encoding, "backslashreplace").decode(encoding), file=file, flush=True)
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
    if size() == 1 and n > 1:
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
    if MPI.COMM_WORLD.Get_size() != launched:
        raise SystemExit(
            f"error: the launcher started {launched} processes, but mpi4py sees {MPI.COMM_WORLD.Get_size()}: mpirun and "
            "mpi4py belong to different MPI libraries (`which mpirun` should name one inside this Python environment)"
        )
    return MPI.COMM_WORLD


def _excepthook(kind, error, trace):
    """Print the error and end all ranks, which would otherwise wait for this one forever."""
    if isinstance(error, RunError):
        if rank() > 0:
            time.sleep(1)  # most such errors hit every rank: leave the printing to rank 0, whose abort ends this wait
        text = "\n".join([f"error: {error}", *getattr(error, "__notes__", [])])
    else:
        text = "".join(traceback.format_exception(kind, error, trace)).rstrip()  # with its notes
    say(f"[rank {rank()}] {text}" if _comm else text, sys.stderr)
    abort()


def abort():
    """End all ranks now, if there are several."""
    if _comm:
        time.sleep(0.2)  # until the launcher has passed on what was printed: at the abort it drops the rest
        _comm.Abort(1)


_comm = _connect()
sys.excepthook = _excepthook


def rank():
    """The number of this process, from 0."""
    return _comm.Get_rank() if _comm else 0


def size():
    """How many processes there are."""
    return _comm.Get_size() if _comm else 1


def average(x):
    """The mean over the ranks of a number (as a float) or of a tensor (as a tensor of the same shape, without gradient)."""
    if _comm is None:
        return x.detach() if torch.is_tensor(x) else x
    array = x.detach().cpu().contiguous().numpy() if torch.is_tensor(x) else np.float64(x)
    total = np.empty_like(array)
    _comm.Allreduce(array, total)
    return torch.as_tensor(total / size(), dtype=x.dtype, device=x.device) if torch.is_tensor(x) else float(total / size())


def average_gradients(parameters):
    """Replace each parameter's gradient by its mean over the ranks; stands between `backward()` and `step()`."""
    if _comm is None:
        return
    grads = [p.grad for p in parameters if p.grad is not None]
    means = average(torch.cat([grad.flatten() for grad in grads]))
    for grad, mean in zip(grads, means.split([grad.numel() for grad in grads]), strict=True):
        grad.copy_(mean.view_as(grad))


def broadcast(module):
    """Give every rank the parameters and buffers of rank 0; stands after the construction."""
    if _comm is None:
        return
    for tensor in module.state_dict().values():  # these share memory with the module
        tensor.copy_(torch.as_tensor(_comm.bcast(tensor.cpu().numpy())))


def check_equal(module):
    """Raise RunError unless all ranks hold the same parameters and buffers."""
    if _comm is None:
        return
    digests = _comm.allgather([float(tensor.double().sum()).hex() for tensor in module.state_dict().values()])
    if any(digest != digests[0] for digest in digests):
        raise RunError("the ranks' parameters differ: something that steers the training is not averaged over the ranks")


def gather(x):
    """What the ranks pass, in a list that every rank gets."""
    return _comm.allgather(x) if _comm else [x]


def seed_everything(seed):
    """Seed this rank's torch, NumPy and Python; returns a NumPy generator that draws the environments' seeds.

    The streams come from `numpy.random.SeedSequence([seed, rank])`: ranks and neighbouring seeds share nothing.
    """
    torch_seed, numpy_seed, env_seed = np.random.SeedSequence([seed, rank()]).generate_state(3)
    torch.manual_seed(int(torch_seed))
    np.random.seed(int(numpy_seed))
    random.seed(int(numpy_seed))
    return np.random.default_rng(int(env_seed))
