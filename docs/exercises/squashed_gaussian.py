"""Exercise 6. The log-density of a squashed Gaussian, the policy of SAC.

Write squashed_logp. Running this file checks it against sac.py.

    python docs/exercises/squashed_gaussian.py
"""

import sys
from pathlib import Path

import check
import torch

sys.path.append(str(Path(__file__).resolve().parents[2]))
import sac  # noqa: E402


def squashed_logp(mu, log_std, noise):
    """log pi(a) of a = tanh(u), u = mu + std noise, with noise ~ N(0, 1): all (B, act_dim) -> (B,)

    The result has to be finite and exact for every u, also where tanh(u) is 1 in float32."""
    raise NotImplementedError("write squashed_logp, without torch.distributions")


def solution(mu, log_std, noise):
    return sac.squashed_gaussian(mu, log_std, noise)[1]


def case(mu, log_std, noise):
    return dict(mu=torch.tensor(mu), log_std=torch.tensor(log_std), noise=torch.tensor(noise))


CASES = {
    "u = 0, standard deviation 1": case([[0.0]], [[0.0]], [[0.0]]),
    "u = 1 = mu": case([[1.0]], [[0.0]], [[0.0]]),
    "u = 1, by the noise": case([[0.0]], [[0.0]], [[1.0]]),
    "a standard deviation of e": case([[0.5]], [[1.0]], [[-0.5]]),
    "three actions of two dimensions": case(
        [[0.1, 0.2], [1.0, -1.0], [0.0, 2.0]], [[-0.5, 0.5], [0.0, 0.0], [-2.0, 0.3]], [[0.3, -0.3], [1.0, 1.0], [0.0, -2.0]]
    ),
    "u = 12 and u = -100, where tanh is flat": case([[12.0], [-100.0]], [[0.0], [0.0]], [[0.0], [0.0]]),
}

if __name__ == "__main__":
    check.main(squashed_logp, solution, CASES)
