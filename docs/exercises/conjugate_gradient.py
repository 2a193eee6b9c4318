"""Exercise 5. Conjugate gradient, by which TRPO solves H x = g without ever building H.

Write conjugate_gradient. Running this file checks it against that of trpo.py.

    python docs/exercises/conjugate_gradient.py
"""

import sys
from pathlib import Path

import check
import torch

sys.path.append(str(Path(__file__).resolve().parents[2]))
import trpo  # noqa: E402


def conjugate_gradient(product, b, iters):
    """Solve H x = b for x (P,), given product(v) = H v with a positive definite H, in at most `iters` iterations from x = 0.

    Residual and first direction are b. It stops early when the square of the residual is below 1e-20."""
    raise NotImplementedError("write conjugate_gradient")


def times(h):
    return lambda v: h @ v


torch.manual_seed(0)
ROOT = torch.randn(5, 5)
H, B = ROOT @ ROOT.T + torch.eye(5), torch.randn(5)
CASES = {
    "one unknown": dict(product=times(torch.tensor([[4.0]])), b=torch.tensor([2.0]), iters=1),
    "two iterations for five unknowns": dict(product=times(H), b=B, iters=2),
    "five iterations for five unknowns": dict(product=times(H), b=B, iters=5),
    "more iterations than needed": dict(product=times(torch.eye(5)), b=B, iters=20),
    "b = 0": dict(product=times(H), b=torch.zeros(5), iters=5),
}

if __name__ == "__main__":
    check.main(conjugate_gradient, trpo.conjugate_gradient, CASES)
