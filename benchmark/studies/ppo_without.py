"""PPO without one of the things that `ppo.py` has beyond its paper: what is each worth?

    python benchmark/studies/ppo_without.py --without fresh-advantages --env-id Hopper-v4
"""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).parents[2]))
import ppo  # noqa: E402
from utils.args import cli  # noqa: E402


@dataclass
class Args(ppo.Args):
    without: Literal[
        "nothing",
        "norm-obs",  # observations as they are
        "norm-values",  # value targets in units of the reward
        "fresh-advantages",  # computed once for all passes over a batch
        "lr-decay",  # constant learning rates
        "small-actions",  # last layer of the policy with gain 1, not 0.01
        "orthogonal",  # initial weights and biases as PyTorch draws them
        "staggering",  # first episodes that all end together
    ] = "nothing"  # what is left out


class Buffer(ppo.Buffer):
    def __init__(self, envs, num_steps, seeds):
        super().__init__(envs, num_steps, seeds)
        for env in envs:
            env.cut = 0


class ActorCritic(ppo.ActorCritic):
    def __init__(self, obs_space, act_space, args):
        super().__init__(obs_space, act_space, args)
        self.norm_obs = args.norm_obs and args.without != "norm-obs"
        if args.without == "norm-values":
            self.ret_stats.update = lambda ret: None


def train(args):
    mlp, advantages, last = ppo.mlp, ppo.advantages, [None, None]

    class Constant(ppo.Adam):
        def step(self):
            for group, lr in zip(self.param_groups, (args.pi_lr, args.std_lr, args.vf_lr), strict=True):
                group["lr"] = lr
            super().step()

    def advantages_of_first_pass(ac, batch, args):
        if batch is not last[0]:
            last[:] = batch, advantages(ac, batch, args)
        return last[1]

    def pytorch_mlp(sizes, activation, out_gain):
        layers = []
        for n_in, n_out in zip(sizes[:-1], sizes[1:], strict=True):
            layers += [nn.Linear(n_in, n_out), activation()]
        with torch.no_grad():
            for p in layers[-2].parameters():
                p.mul_(out_gain)
        return nn.Sequential(*layers[:-1])

    changes = {
        "fresh-advantages": dict(advantages=advantages_of_first_pass),
        "lr-decay": dict(Adam=Constant),
        "small-actions": dict(mlp=lambda sizes, activation, out_gain: mlp(sizes, activation, 1.0)),
        "orthogonal": dict(mlp=pytorch_mlp),
        "staggering": dict(Buffer=Buffer),
    }
    for name, x in changes.get(args.without, {}).items():
        setattr(ppo, name, x)
    ppo.ActorCritic, ppo.__file__ = ActorCritic, __file__  # by the last one runs know their script
    return ppo.train(args)


if __name__ == "__main__":
    train(cli(Args))
