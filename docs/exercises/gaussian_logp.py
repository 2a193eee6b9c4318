"""Exercise 1. The log-likelihood of actions under a Gaussian whose dimensions are independent.

Write gaussian_logp. Running this file checks it against the policy of ppo.py.

    python docs/exercises/gaussian_logp.py
"""

import sys
from pathlib import Path

import check
import gymnasium as gym
import torch
from torch import nn

sys.path.append(str(Path(__file__).resolve().parents[2]))
import ppo  # noqa: E402


def gaussian_logp(act, mu, log_std):
    """log N(act; mu, diag(std^2)): act (B, act_dim), mu (B, act_dim), log_std (act_dim,) -> (B,)"""
    raise NotImplementedError("write gaussian_logp, without torch.distributions")


def solution(act, mu, log_std):
    """The same by the actor of ppo.py, whose network is replaced by one that hands on the means."""
    actor = ppo.Actor(1, gym.spaces.Box(-1, 1, log_std.shape), (), nn.Tanh, 0.0)
    actor.net, actor.log_std = nn.Identity(), nn.Parameter(log_std)
    return actor(mu).log_prob(act)


CASES = {
    "one action, at its mean, with standard deviation 1": dict(
        act=torch.tensor([[0.5]]), mu=torch.tensor([[0.5]]), log_std=torch.tensor([0.0])
    ),
    "one action, away from its mean": dict(act=torch.tensor([[2.0]]), mu=torch.tensor([[0.5]]), log_std=torch.tensor([0.0])),
    "a standard deviation of e": dict(act=torch.tensor([[2.0]]), mu=torch.tensor([[0.5]]), log_std=torch.tensor([1.0])),
    "three actions of two dimensions": dict(
        act=torch.tensor([[0.1, 0.2], [1.0, -1.0], [0.0, 3.0]]),
        mu=torch.tensor([[0.0, 0.2], [0.5, 0.5], [-2.0, 1.0]]),
        log_std=torch.tensor([-0.5, 0.5]),
    ),
}

if __name__ == "__main__":
    check.main(gaussian_logp, solution, CASES)
