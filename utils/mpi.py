"""MPI in a few verbs, each of which does nothing in a single process.

    mpirun -n 4 python ppo.py

mpi4py is imported only under a launcher, so a plain `python ppo.py` needs no MPI at all.
`average`, `average_gradients`, `broadcast`, `check_equal`, `share` and `gather` are collective: all ranks have to call them.
"""

import ctypes
import os
import signal
import sys
import time
import traceback

import numpy as np
import torch


class RunError(RuntimeError):
    """What the user can mend, or has to know: shown as one line, without a traceback."""


def _connect():
    """The communicator of all ranks, or None in a single process."""
    launched = max(int(os.environ.get(name, 1)) for name in ("PMI_SIZE", "OMPI_COMM_WORLD_SIZE"))
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
        text = f"error: {error}"
    else:
        text = "".join(traceback.format_exception(kind, error, trace)).rstrip()
    print(f"[rank {rank()}] {text}" if _comm else text, file=sys.stderr, flush=True)
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


def share(value):
    """The value of rank 0, on every rank."""
    return _comm.bcast(value) if _comm else value


def gather(values):
    """The values of all ranks, one list after the other, as a float64 array (n,) that every rank gets."""
    values = np.asarray(values, dtype=np.float64).ravel()
    return np.concatenate(_comm.allgather(values)) if _comm else values


def seed_everything(seed):
    """Seed this rank's torch and NumPy; returns a NumPy generator that draws the environments' seeds.

    The streams come from `numpy.random.SeedSequence([seed, rank])`: ranks and neighbouring seeds share nothing.
    """
    torch_seed, numpy_seed, env_seed = np.random.SeedSequence([seed, rank()]).generate_state(3)
    torch.manual_seed(int(torch_seed))
    np.random.seed(int(numpy_seed))
    return np.random.default_rng(int(env_seed))
