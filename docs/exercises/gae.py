"""Exercise 4. Generalized advantage estimates, with termination and truncation told apart.

Write gae. Running this file checks it against that of vpg.py.

    python docs/exercises/gae.py
"""

import sys
from pathlib import Path

import check
import torch

sys.path.append(str(Path(__file__).resolve().parents[2]))
import vpg  # noqa: E402


def gae(rew, val, next_val, terminated, done, gamma, lam):
    """adv_t = delta_t + gamma lam adv_{t+1} within an episode. All tensors are (T, N): T steps in each of N environments.

    delta_t = rew_t + gamma V(next_obs_t) - V(obs_t), where nothing follows a terminal next_obs_t.
    val, next_val: V(obs_t) and V(next_obs_t), of the observation that really came next, also where an episode ends
    terminated: 1 where next_obs_t is terminal
    done: 1 where the episode ends, by termination or by truncation; the next row is then of another episode
    """
    raise NotImplementedError("write gae")


def column(*values):
    return torch.tensor(values).unsqueeze(-1)  # (T, 1)


NO = column(0.0, 0.0, 0.0, 0.0)
ONE = dict(rew=column(1.0, 2.0, 3.0, 4.0), val=column(0.0, 5.0, 2.0, 1.0), next_val=column(5.0, 7.0, 1.0, 4.0), gamma=0.5)
STEP_2 = column(0.0, 1.0, 0.0, 0.0)
torch.manual_seed(0)
DONE = (torch.rand(6, 3) < 0.4).float()
CASES = {
    "lambda 0, no episode ends": dict(**ONE, terminated=NO, done=NO, lam=0.0),
    "lambda 1, no episode ends": dict(**ONE, terminated=NO, done=NO, lam=1.0),
    "the second step terminates, lambda 0": dict(**ONE, terminated=STEP_2, done=STEP_2, lam=0.0),
    "the second step terminates": dict(**ONE, terminated=STEP_2, done=STEP_2, lam=0.5),
    "the second step is truncated": dict(**ONE, terminated=NO, done=STEP_2, lam=0.5),
    "three environments": dict(
        rew=torch.randn(6, 3),
        val=torch.randn(6, 3),
        next_val=torch.randn(6, 3),
        terminated=DONE * (torch.rand(6, 3) < 0.5),
        done=DONE,
        gamma=0.9,
        lam=0.8,
    ),
}

if __name__ == "__main__":
    check.main(gae, vpg.gae, CASES)
