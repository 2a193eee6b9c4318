"""Exercise 2. A policy for PPO, for discrete and for continuous actions.

Write the class Actor. Running this file checks it against that of ppo.py; --train gives it to PPO. Goals: 450 on CartPole-v1
after 30,000 steps and 900 on InvertedPendulum-v4 after 60,000.

    python docs/exercises/ppo_policy.py
    python docs/exercises/ppo_policy.py --train CartPole-v1
"""

import sys
from pathlib import Path
from unittest.mock import patch

import check
import torch
from gymnasium.spaces import Box, Discrete
from torch import nn
from torch.distributions import Categorical, Independent, Normal  # noqa: F401

sys.path.append(str(Path(__file__).resolve().parents[2]))
import ppo  # noqa: E402

GOALS = {"CartPole-v1": (30_000, 450), "InvertedPendulum-v4": (60_000, 900)}


class Actor(nn.Module):
    """pi(act|obs): a Categorical over Discrete actions; over a Box, a Gaussian whose standard deviations do not depend on obs.

    self.net is ppo.mlp([obs_dim, ..., number of outputs], activation, out_gain=0.01). Over a Box self.log_std is a parameter
    (act_dim,) that starts at init_log_std."""

    def __init__(self, obs_dim, act_space, hidden_sizes, activation, init_log_std):
        super().__init__()
        raise NotImplementedError("write Actor.__init__ and Actor.forward")

    def forward(self, obs):
        """obs (..., obs_dim) -> a distribution whose log_prob and entropy are (...)"""
        raise NotImplementedError("write Actor.forward")


def asked_for(actor_class):
    """A function that builds such an actor, gives it weights as if trained by ppo.py, and asks it what PPO asks."""

    def ask(act_space, obs, act):
        torch.manual_seed(0)
        size = (obs.shape[-1], act_space, (8,), nn.Tanh, -0.5)
        actor, trained = actor_class(*size), ppo.Actor(*size)
        for p in trained.parameters():
            nn.init.normal_(p)
        start = actor.state_dict().get("log_std", torch.zeros(0)).clone()
        actor.load_state_dict(trained.state_dict())  # an error here: a parameter is missing, or has another name or shape
        pi, learning = actor(obs), sum(p.numel() for p in actor.parameters() if p.requires_grad)
        asked = {"the number of weights that an optimizer moves": torch.tensor(learning)}
        return asked | {"log_prob": pi.log_prob(act), "entropy": pi.entropy(), "mode": pi.mode, "log_std at the start": start}

    return ask


OBS = torch.tensor([[0.0, 0.0, 0.0], [1.0, -2.0, 3.0], [5.0, 5.0, 5.0], [-9.0, 0.0, 9.0]])
CASES = {
    "discrete actions": dict(act_space=Discrete(2), obs=OBS, act=torch.tensor([0, 1, 1, 0])),
    "actions of one dimension": dict(act_space=Box(-1, 1, (1,)), obs=OBS, act=torch.tensor([[0.0], [1.0], [-1.0], [3.0]])),
    "actions of two dimensions": dict(act_space=Box(-1, 1, (2,)), obs=OBS, act=OBS[:, :2]),
    "a batch of shape (T, N)": dict(act_space=Box(-1, 1, (2,)), obs=OBS.view(2, 2, 3), act=OBS[:, :2].view(2, 2, 2)),
}


def train(options):
    steps, goal = GOALS.get(options.train, (30_000, None))
    name = f"exercise_ppo_policy_{options.train}"
    args = ppo.Args(env_id=options.train, total_steps=options.total_steps or steps, exp_name=name, init_log_std=-0.5)
    with patch.object(ppo, "Actor", ppo.Actor if options.use_soln else Actor):
        check.train(ppo, args, goal)


if __name__ == "__main__":
    check.main(asked_for(Actor), asked_for(ppo.Actor), CASES, train)
