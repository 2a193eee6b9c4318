"""MPI in a few verbs, each of which does nothing in a single process.

    mpirun -n 4 python ppo.py

`average`, `average_gradients`, `broadcast`, `check_equal` and `gather` are collective: all ranks have to call them.
"""

import random

import numpy as np
import torch

from utils import process

_comm = process.comm


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
    """Replace each parameter's gradient by its mean over the ranks: between `backward()` and `step()`."""
    if _comm is None:
        return
    parameters = [p for p in parameters if p.grad is not None]
    means = average(torch.cat([p.grad.flatten() for p in parameters]))
    for p, mean in zip(parameters, means.split([p.numel() for p in parameters]), strict=True):
        p.grad = mean.view_as(p)


def broadcast(module):
    """Give every rank the parameters and buffers of rank 0: after the construction."""
    if _comm is None:
        return
    for tensor in module.state_dict().values():  # these share memory with the module
        tensor.copy_(torch.as_tensor(_comm.bcast(tensor.cpu().numpy())))


def check_equal(*modules):
    """Raise RunError unless all ranks hold the same parameters and buffers."""
    tensors = [tensor for module in modules for tensor in module.state_dict().values()]
    digests = gather([float(tensor.cpu().double().sum()).hex() for tensor in tensors])
    if any(digest != digests[0] for digest in digests):
        raise process.RunError("the ranks' parameters differ: something that steers the training is not averaged over the ranks")


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
