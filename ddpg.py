"""Deep Deterministic Policy Gradient (DDPG). Lillicrap et al. 2015, arXiv:1509.02971.

    target = rew + gamma (1 - terminated) q_targ(next_obs, pi_targ(next_obs))
    L_q    =  mean (q(obs, act) - target)^2
    L_pi   = -mean q(obs, pi(obs)),   after which the targets follow by Polyak averaging

Actions are scaled so that each dimension's bounds are -1 and 1: policy, critic and noise are in these units.
The noise of the acting policy is Gaussian, as in arXiv:1802.09477, not an Ornstein-Uhlenbeck process.

    python ddpg.py --env-id Walker2d-v4
    mpirun -n 2 python ddpg.py --env-id Walker2d-v4
"""

import copy
import math
from dataclasses import dataclass
from typing import ClassVar, Literal, NamedTuple

import numpy as np
import torch
from gymnasium.spaces import Box
from torch import nn

from utils import mpi
from utils.args import AtLeast0, AtLeast1, EnvsOfRanks, Fraction, NonNegative, Positive, RunArgs, TotalOfEnvs, TotalOfRanks, cli
from utils.envs import check_finite, make_env
from utils.logger import Logger, set_up
from utils.optim import Adam


@dataclass
class Args(RunArgs):
    action_spaces: ClassVar = (Box,)  # that the policy can handle
    env_id: str = "HalfCheetah-v4"  # a Gymnasium environment with flat observations and bounded continuous actions
    seed: AtLeast0 = 0  # seed of the networks, environments, actions and minibatches
    total_steps: AtLeast1 = 1_000_000  # environment steps in all, rounded up to whole epochs
    steps_per_epoch: TotalOfEnvs = 10_000  # environment steps between two rows of the log, and between two tests
    num_envs: EnvsOfRanks = 1  # environments, stepped one after the other; at least one per MPI process
    max_ep_len: AtLeast1 | None = None  # steps until an episode is truncated; default: the environment's own limit
    num_test_episodes: AtLeast0 = 10  # episodes of the targets' policy, without noise, at the end of each epoch
    hidden_sizes: tuple[AtLeast1, ...] = (256, 256)  # widths of the hidden layers, of the actor and of the critic
    activation: Literal["tanh", "relu", "elu"] = "relu"  # activation of the hidden layers
    gamma: Fraction = 0.99  # discount
    polyak: Fraction = 0.995  # how much of the target networks stays at each of their updates
    pi_lr: Positive = 1e-3  # learning rate of the actor
    q_lr: Positive = 1e-3  # learning rate of the critic
    q_weight_decay: NonNegative = 0.0  # L2 penalty on the critic's weights and biases; the paper's is 0.01
    batch_size: TotalOfRanks = 128  # transitions in a gradient step
    replay_size: TotalOfRanks = 1_000_000  # transitions that the replay buffer holds
    start_steps: AtLeast0 = 10_000  # steps of uniformly random actions at the start
    update_after: AtLeast0 = 1000  # steps before the first update
    update_every: AtLeast1 = 50  # steps between two blocks of updates; a block has as many updates as there were steps
    act_noise: NonNegative = 0.1  # standard deviation of the acting policy's noise, in half-widths of the action's bounds


class Batch(NamedTuple):
    """Tensors of shape (B, ...): B transitions."""

    obs: torch.Tensor
    act: torch.Tensor  # within -1 and 1
    rew: torch.Tensor
    next_obs: torch.Tensor  # the real final observation where an episode ends
    terminated: torch.Tensor  # 1 where next_obs is terminal; else 0, also where the episode is only truncated


class ReplayBuffer:
    """Steps N environments and keeps the last `size` transitions of them, as arrays of shape (size, ...)."""

    def __init__(self, envs, size, seeds):
        obs_shape, act_shape = envs[0].observation_space.shape, envs[0].action_space.shape
        self.obs, self.next_obs = (np.zeros((size, *obs_shape), np.float32) for _ in range(2))
        self.act = np.zeros((size, *act_shape), np.float32)
        self.rew, self.terminated = (np.zeros(size, np.float32) for _ in range(2))
        self.envs, self.steps, self.count = envs, 0, 0
        for env in envs:
            env.reset(seed=int(seeds.integers(2**31)))

    def collect(self, ac, until, start_steps):
        """Act in each environment until all ranks together have taken `until` steps; the first `start_steps` of them uniformly
        at random. Returns the returns and the lengths of the episodes that ended."""
        ep_rets, ep_lens = [], []
        while self.steps < until:
            obs = np.array([env.obs for env in self.envs], np.float32)  # (N, obs_dim)
            uniform = 2 * torch.rand(len(self.envs), *self.act.shape[1:]) - 1
            act = uniform if self.steps < start_steps else ac.sample(obs).cpu()
            check_finite(self.steps, observation=obs, action=act.numpy())
            for i, (env, env_act) in enumerate(zip(self.envs, ac.to_env(act), strict=True)):
                next_obs, rew, terminated, truncated, _ = env.step(env_act)
                self.store(obs[i], act[i], rew, next_obs, terminated)
                if terminated or truncated:
                    ep_rets.append(env.ep_ret)
                    ep_lens.append(env.ep_len)
                    env.reset()
            self.steps += len(self.envs) * mpi.size()
        return ep_rets, ep_lens

    def store(self, obs, act, rew, next_obs, terminated):
        """Put a transition into the place of the oldest."""
        at = self.count % len(self.obs)
        self.obs[at], self.act[at], self.rew[at] = obs, act, rew
        self.next_obs[at], self.terminated[at] = next_obs, terminated
        check_finite(self.steps + 1, observation=self.next_obs[at], reward=self.rew[at])
        self.count += 1

    def sample(self, batch_size, device):
        """A Batch of transitions, drawn uniformly with replacement."""
        at = torch.randint(min(self.count, len(self.obs)), (batch_size,)).numpy()
        arrays = (self.obs, self.act, self.rew, self.next_obs, self.terminated)
        return Batch(*(torch.from_numpy(array.take(at, 0)).to(device) for array in arrays))


def mlp(sizes, activation):
    """Linear layers with the activation between them."""
    layers = []
    for n_in, n_out in zip(sizes[:-1], sizes[1:], strict=True):
        layers += [nn.Linear(n_in, n_out), activation()]
    return nn.Sequential(*layers[:-1])


class Actor(nn.Module):
    """pi(obs): a deterministic policy."""

    def __init__(self, obs_dim, act_dim, hidden_sizes, activation):
        super().__init__()
        self.net = mlp([obs_dim, *hidden_sizes, act_dim], activation)

    def forward(self, obs):
        """obs (B, obs_dim) -> actions (B, act_dim) within -1 and 1"""
        return torch.tanh(self.net(obs))


class Critic(nn.Module):
    """q(obs, act)"""

    def __init__(self, obs_dim, act_dim, hidden_sizes, activation):
        super().__init__()
        self.net = mlp([obs_dim + act_dim, *hidden_sizes, 1], activation)

    def forward(self, obs, act):
        """obs (B, obs_dim), act (B, act_dim) -> values (B,)"""
        return self.net(torch.cat([obs, act], -1)).squeeze(-1)


class ActorCritic(nn.Module):
    """Policy and critic, with the actions' bounds."""

    def __init__(self, obs_space, act_space, args):
        super().__init__()
        activation = {"tanh": nn.Tanh, "relu": nn.ReLU, "elu": nn.ELU}[args.activation]
        sizes = (obs_space.shape[0], act_space.shape[0], args.hidden_sizes, activation)
        self.pi, self.q = Actor(*sizes), Critic(*sizes)
        self.act_noise, self.device = args.act_noise, torch.device(args.device)
        self.act_space = act_space
        low, high = act_space.low.astype(np.float32), act_space.high.astype(np.float32)
        self.scale, self.bias = (high - low) / 2, (high + low) / 2
        self.to(self.device)

    @torch.no_grad()
    def sample(self, obs, deterministic=False):
        """obs: array (N, obs_dim) -> the policy's actions: tensor (N, act_dim) within -1 and 1, with noise for exploration"""
        act = self.pi(torch.as_tensor(obs, dtype=torch.float32, device=self.device))
        return act if deterministic else (act + self.act_noise * torch.randn_like(act)).clamp(-1, 1)

    def to_env(self, act):
        """Actions within -1 and 1: tensor (N, act_dim) -> what env.step takes: array (N, act_dim) within the bounds"""
        act = (self.bias + self.scale * act.cpu().numpy()).astype(self.act_space.dtype)
        return act.clip(self.act_space.low, self.act_space.high)

    def act(self, obs, deterministic=False):
        """obs: array (N, obs_dim) -> what env.step takes: array (N, act_dim)"""
        return self.to_env(self.sample(obs, deterministic))


def q_target(rew, terminated, next_q, gamma):  # all (B,)
    """rew + gamma (1 - terminated) q_targ"""
    return rew + gamma * (1 - terminated) * next_q


def q_loss(q, target):  # both (B,)
    """mean (q - target)^2"""
    assert q.shape == target.shape  # (B,) minus (B, 1) would silently be (B, B)
    return (q - target).square().mean()


def policy_loss(q):  # (B,)
    """-mean q(obs, pi(obs))"""
    return -q.mean()


@torch.no_grad()
def polyak_average(module, target, polyak):
    """target <- polyak target + (1 - polyak) module"""
    for p, p_targ in zip(module.parameters(), target.parameters(), strict=True):
        p_targ.lerp_(p, 1 - polyak)


def gradient_step(optimizer, loss):
    """A step on the optimizer's own parameters; anything else the loss depends on gets no gradient."""
    params = [p for group in optimizer.param_groups for p in group["params"]]
    for p, grad in zip(params, torch.autograd.grad(loss, params), strict=True):
        p.grad = grad
    mpi.average_gradients(params)
    optimizer.step()


def update(ac, ac_targ, pi_optimizer, q_optimizer, batch, args):
    """One step of the critic, the actor and the targets. Returns what to log."""
    with torch.no_grad():
        next_q = ac_targ.q(batch.next_obs, ac_targ.pi(batch.next_obs))
        target = q_target(batch.rew, batch.terminated, next_q, args.gamma)
    q = ac.q(batch.obs, batch.act)
    loss_q = q_loss(q, target)
    gradient_step(q_optimizer, loss_q)

    loss_pi = policy_loss(ac.q(batch.obs, ac.pi(batch.obs)))
    gradient_step(pi_optimizer, loss_pi)
    polyak_average(ac, ac_targ, args.polyak)
    return dict(QVals=q.tolist(), LossQ=loss_q.item(), LossPi=loss_pi.item())


def test(ac, env, num_episodes):
    """Run this rank's share of the deterministic episodes. Returns their returns and lengths."""
    ep_rets, ep_lens = [], []
    for _ in range(mpi.rank(), num_episodes, mpi.size()):
        (obs, _), ended = env.reset(), False
        while not ended:
            obs, _, terminated, truncated, _ = env.step(ac.act(obs[None], deterministic=True)[0])
            ended = terminated or truncated
        ep_rets.append(env.ep_ret)
        ep_lens.append(env.ep_len)
    return ep_rets, ep_lens


def train(args):
    """Train as `args` (an Args) says and return the targets' ActorCritic, a moving average, which is the one that is tested
    and saved. Raises RunError for what cannot work."""
    seeds = set_up(args)
    envs = [make_env(args.env_id, args.max_ep_len) for _ in range(max(1, args.num_envs // mpi.size()))]  # one at least
    ac = ActorCritic(envs[0].observation_space, envs[0].action_space, args)
    mpi.broadcast(ac)
    ac_targ = copy.deepcopy(ac).requires_grad_(False)
    pi_optimizer = Adam(ac.pi.parameters(), lr=args.pi_lr)
    q_optimizer = Adam(ac.q.parameters(), lr=args.q_lr, weight_decay=args.q_weight_decay)
    epochs = math.ceil(args.total_steps / args.steps_per_epoch)
    buffer = ReplayBuffer(envs, min(args.replay_size, epochs * args.steps_per_epoch) // mpi.size(), seeds)
    test_env = make_env(args.env_id, args.max_ep_len)
    test_env.reset(seed=int(seeds.integers(2**31)))

    state = dict(ac=ac, pi_optimizer=pi_optimizer, q_optimizer=q_optimizer, buffer=buffer, test_env=test_env)
    with Logger(args, __file__) as logger:
        for epoch in logger.epochs(epochs, model=ac_targ, **state):  # all that --resume restores
            epoch_end = (epoch + 1) * args.steps_per_epoch
            while buffer.steps < epoch_end:
                start, metrics = buffer.steps, {}
                ep_rets, ep_lens = buffer.collect(ac, min(start + args.update_every, epoch_end), args.start_steps)
                if buffer.steps >= args.update_after:
                    for _ in range(start, buffer.steps):  # as many updates as steps
                        batch = buffer.sample(args.batch_size // mpi.size(), ac.device)
                        metrics |= update(ac, ac_targ, pi_optimizer, q_optimizer, batch, args)
                # metrics of the block's last update; none before the first
                logger.store(EpRet=ep_rets, EpLen=ep_lens, TotalEnvInteracts=buffer.steps, **metrics)
            test_rets, test_lens = test(ac_targ, test_env, args.num_test_episodes)
            logger.log(Epoch=epoch, TestEpRet=test_rets, TestEpLen=test_lens)
    return ac_targ


if __name__ == "__main__":
    train(cli(Args))
