"""REINFORCE, the simplest policy gradient: no critic, one gradient step for each batch of episodes. Williams 1992.

    grad J = E[sum_t grad log pi(act_t|obs_t) weight_t]
    weight_t: the return of the whole episode or, with --reward-to-go, the sum of the rewards from step t on

    python docs/simple_pg.py --reward-to-go
"""

from dataclasses import dataclass

import gymnasium as gym
import torch
import tyro
from torch import nn
from torch.distributions import Categorical


@dataclass
class Args:
    env_id: str = "CartPole-v1"  # an environment with flat observations and discrete actions
    seed: int = 0  # seed of the network, the environment and the actions
    epochs: int = 25  # batches, each followed by one gradient step
    batch_size: int = 5000  # steps in a batch, at least: its last episode goes on to its end
    lr: float = 1e-2  # learning rate
    reward_to_go: bool = False  # weigh an action by the rewards that come after it, not by all of them


def policy(net, obs):
    """pi(.|obs): obs (..., obs_dim) -> a distribution over the actions"""
    return Categorical(logits=net(obs))


@torch.no_grad()
def run_episode(env, net):
    """Act until the episode ends. Returns obs (T, obs_dim), act (T,), rew (T,)."""
    steps = []
    (obs, _), ended = env.reset(), False
    while not ended:
        obs = torch.as_tensor(obs, dtype=torch.float32)
        act = policy(net, obs).sample()
        next_obs, rew, terminated, truncated, _ = env.step(act.item())
        steps.append((obs, act, torch.tensor(float(rew))))
        obs, ended = next_obs, terminated or truncated
    return [torch.stack(column) for column in zip(*steps, strict=True)]


def weights(rew, reward_to_go):
    """rew (T,) -> the weight of each step (T,)"""
    return rew.flip(0).cumsum(0).flip(0) if reward_to_go else rew.sum().expand(len(rew))


def policy_loss(logp, weight):  # both (B,)
    """-mean log pi(act|obs) weight"""
    return -(logp * weight).mean()


def train(args):
    """Train as `args` (an Args) says. Returns the mean return of each epoch's episodes."""
    torch.manual_seed(args.seed)
    env = gym.make(args.env_id)
    env.reset(seed=args.seed)
    obs_dim, num_actions = env.observation_space.shape[0], int(env.action_space.n)
    net = nn.Sequential(nn.Linear(obs_dim, 32), nn.Tanh(), nn.Linear(32, num_actions))
    optimizer = torch.optim.Adam(net.parameters(), args.lr)
    returns = []
    for epoch in range(args.epochs):
        episodes = []
        while sum(len(rew) for _, _, rew in episodes) < args.batch_size:
            episodes.append(run_episode(env, net))
        obs, act, rew = (torch.cat(column) for column in zip(*episodes, strict=True))  # (B, obs_dim), (B,), (B,)
        weight = torch.cat([weights(rew, args.reward_to_go) for _, _, rew in episodes])
        loss = policy_loss(policy(net, obs).log_prob(act), weight)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        returns.append(rew.sum().item() / len(episodes))
        print(f"epoch {epoch:3}   return {returns[-1]:6.1f}   loss {loss.item():7.1f}", flush=True)
    return returns


if __name__ == "__main__":
    train(tyro.cli(Args))
