"""Exercise 7. A second DDPG. What does it do to the learning curve, and why?

Running this file says whether one update is that of ddpg.py; --train trains, and --train with --use-soln trains ddpg.py.

    python docs/exercises/ddpg_two.py
    python docs/exercises/ddpg_two.py --train HalfCheetah-v4
    python docs/exercises/ddpg_two.py --train HalfCheetah-v4 --use-soln
"""

import sys
from pathlib import Path
from unittest.mock import patch

import check
import torch
from torch import nn

sys.path.append(str(Path(__file__).resolve().parents[2]))
import ddpg  # noqa: E402


class Actor(nn.Module):
    def __init__(self, obs_dim, act_dim, hidden_sizes, activation):
        super().__init__()
        self.net = ddpg.mlp([obs_dim, *hidden_sizes, act_dim], activation)

    def forward(self, obs):
        return torch.tanh(self.net(obs))


class Critic(nn.Module):
    def __init__(self, obs_dim, act_dim, hidden_sizes, activation):
        super().__init__()
        self.net = ddpg.mlp([obs_dim + act_dim, *hidden_sizes, 1], activation)

    def forward(self, obs, act):
        return self.net(torch.cat([obs, act], -1))


def q_target(rew, terminated, next_q, gamma):
    return rew + gamma * (1 - terminated) * next_q


def q_loss(q, target):
    return ((q - target) ** 2).mean()


def policy_loss(q):
    return -q.mean()


@torch.no_grad()
def polyak_average(module, target, polyak):
    for p, p_targ in zip(module.parameters(), target.parameters(), strict=True):
        p_targ.mul_(polyak)
        p_targ.add_((1 - polyak) * p)


HERE = dict(
    Actor=Actor, Critic=Critic, q_target=q_target, q_loss=q_loss, policy_loss=policy_loss, polyak_average=polyak_average
)


def solution(batch):
    return {"the update": torch.cat(list(check.one_update(ddpg, batch).values()))}


def answer(batch):
    with patch.multiple(ddpg, **HERE):
        return solution(batch)


torch.manual_seed(0)
CASES = {"a batch": dict(batch=ddpg.Batch(*(torch.rand(shape) for shape in [(5, 3), (5, 2), (5,), (5, 3), (5,)])))}


def train(options):
    steps = options.total_steps or 50_000
    args = ddpg.Args(
        env_id=options.train,
        total_steps=steps,
        steps_per_epoch=min(steps, 10_000),
        hidden_sizes=(300,),
        batch_size=64,
        exp_name=f"exercise_ddpg_{'one' if options.use_soln else 'two'}_{options.train}",
    )
    with patch.multiple(ddpg, **({"Actor": ddpg.Actor} if options.use_soln else HERE)):
        check.train(ddpg, args, None)


if __name__ == "__main__":
    check.main(answer, solution, CASES, train)
