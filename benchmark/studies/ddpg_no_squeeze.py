"""DDPG with a silent bug, exercise 2.2 of OpenAI's Spinning Up: the critic does not squeeze its output.

q and the target's q are then (B, 1) while rew and terminated are (B,). The target broadcasts to (B, B), in which every
transition's reward meets every other's value, and no error says so. `ddpg.py` asserts equal shapes, which is left out here too.

    python benchmark/studies/ddpg_no_squeeze.py --env-id HalfCheetah-v4
"""

import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[2]))
import ddpg  # noqa: E402
from ddpg import ActorCritic, Args, train  # noqa: E402, F401
from utils.args import cli  # noqa: E402


class Critic(ddpg.Critic):
    def forward(self, obs, act):
        """obs (B, obs_dim), act (B, act_dim) -> values (B, 1): the bug"""
        return self.net(torch.cat([obs, act], -1))


def q_loss(q, target):  # (B, 1) and (B, B)
    return (q - target).square().mean()


ddpg.Critic, ddpg.q_loss, ddpg.__file__ = Critic, q_loss, __file__  # by the last one runs know their script

if __name__ == "__main__":
    train(cli(Args))
