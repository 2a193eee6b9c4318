"""Proximal Policy Optimization with the clipped objective (PPO). Schulman et al. 2017, arXiv:1707.06347.

    ratio = pi(act|obs) / pi_old(act|obs)
    L_pi  = -mean min(ratio adv, clip(ratio, 1 - eps, 1 + eps) adv)
    L_v   =  mean (V(obs) - ret)^2,   ret = adv + V(obs)
    adv_t =  sum_l (gamma lam)^l delta_{t+l},   delta_t = rew_t + gamma V(next_obs_t) - V(obs_t)

    python ppo.py --env-id Walker2d-v4
    mpirun -n 4 python ppo.py --env-id Walker2d-v4
"""

import functools
import math
from dataclasses import dataclass
from typing import Literal, NamedTuple

import gymnasium as gym
import numpy as np
import torch
import tyro
from gymnasium.spaces import Box, Discrete
from torch import nn
from torch.distributions import Categorical, Independent, Normal

from utils import mpi
from utils.logger import Logger, RunArgs, check, check_finite


@dataclass
class Args(RunArgs):
    env_id: str = "HalfCheetah-v4"  # a Gymnasium environment with flat observations
    seed: int = 0  # of the networks, the environments and the actions
    total_steps: int = 1_000_000  # environment steps in all
    steps_per_epoch: int = 2000  # environment steps between two updates
    num_envs: int = 8  # environments, stepped in turn
    max_ep_len: int | None = None  # steps after which an episode is truncated; the environment's own limit if not given
    hidden_sizes: tuple[int, ...] = (64, 64)  # of the actor and of the critic
    activation: Literal["tanh", "relu", "elu"] = "tanh"  # of the hidden layers
    norm_obs: bool = True  # normalise observations by their running mean and deviation
    gamma: float = 0.99  # discount
    lam: float = 0.95  # lambda of GAE
    clip_ratio: float = 0.2  # eps: how far the ratio may go from 1 and still gain
    pi_lr: float = 3e-4  # learning rate of the actor, falls linearly to 0
    vf_lr: float = 3e-4  # learning rate of the critic, falls linearly to 0
    train_iters: int = 10  # passes over the batch in an update
    minibatch_size: int = 100  # transitions in a gradient step
    target_kl: float = 0.1  # no further pass once the KL divergence from pi_old exceeds 1.5 times this


class Batch(NamedTuple):
    """Tensors of shape (T, N, ...): T steps in each of N environments."""

    obs: torch.Tensor  # normalised
    act: torch.Tensor  # as sampled, not clipped
    logp: torch.Tensor  # log pi_old(act|obs) of the policy that acted
    rew: torch.Tensor
    next_obs: torch.Tensor  # normalised; the real final observation where an episode ends
    terminated: torch.Tensor  # ends the return
    done: torch.Tensor  # terminated or truncated: ends the episode


class Buffer:
    """Collects batches of T steps in each of N environments, as arrays of shape (T, N, ...)."""

    def __init__(self, envs, num_steps, seeds):
        shape, obs_space, act_space = (num_steps, len(envs)), envs[0].observation_space, envs[0].action_space
        self.obs = np.zeros((*shape, *obs_space.shape), np.float32)
        self.act = np.zeros((*shape, *act_space.shape), np.int64 if isinstance(act_space, Discrete) else np.float32)
        self.rew, self.terminated, self.done = (np.zeros(shape, np.float32) for _ in range(3))
        self.next_obs = np.zeros_like(self.obs)
        self.envs = envs
        self.now = np.array([env.reset(seed=int(seeds.integers(2**31)))[0] for env in envs], np.float32)  # (N, obs_dim)
        self.ep_ret, self.ep_len, self.steps = np.zeros(len(envs)), np.zeros(len(envs), int), 0

    def collect(self, ac):
        """Act for T steps in each environment; returns the returns and the lengths of the episodes that ended."""
        ep_rets, ep_lens = [], []
        for t in range(len(self.obs)):
            act = ac.sample(self.now)
            self.obs[t], self.act[t] = self.now, act.cpu()
            for i, (env, env_act) in enumerate(zip(self.envs, ac.to_env(act), strict=True)):
                next_obs, rew, terminated, truncated, _ = env.step(env_act)
                done = terminated or truncated
                self.rew[t, i], self.next_obs[t, i], self.terminated[t, i], self.done[t, i] = rew, next_obs, terminated, done
                self.ep_ret[i] += rew
                self.ep_len[i] += 1
                if done:
                    ep_rets.append(self.ep_ret[i])
                    ep_lens.append(self.ep_len[i])
                    self.ep_ret[i], self.ep_len[i] = 0, 0
                    next_obs, _ = env.reset()
                self.now[i] = next_obs
            self.steps += len(self.envs) * mpi.size()
            check_finite(self.steps, observation=self.next_obs[t], reward=self.rew[t])
        return ep_rets, ep_lens

    @torch.no_grad()
    def batch(self, ac):
        """What `collect` stored, as a Batch on the device of `ac`."""
        arrays = (self.obs, self.act, self.rew, self.next_obs, self.terminated, self.done)
        obs, act, rew, next_obs, terminated, done = (torch.as_tensor(array, device=ac.device) for array in arrays)
        obs, next_obs = ac.normalise(obs), ac.normalise(next_obs)
        return Batch(obs, act, ac.pi(obs).log_prob(act), rew, next_obs, terminated, done)


class RunningStats(nn.Module):
    """Mean and deviation of all data seen so far, over all ranks; buffers, so that they are saved with the networks."""

    def __init__(self, shape):
        super().__init__()
        self.register_buffer("mean", torch.zeros(shape))
        self.register_buffer("var", torch.ones(shape))
        self.register_buffer("count", torch.zeros(()))

    @torch.no_grad()
    def update(self, x):
        """Take in x of shape (T, N, *shape). Chan et al. 1979, the pairwise update."""
        mean = mpi.average(x.mean((0, 1)))
        var = mpi.average((x - mean).square().mean((0, 1)))
        n = x.shape[0] * x.shape[1] * mpi.size()
        total = self.count + n
        delta = mean - self.mean
        self.var.copy_((self.count * self.var + n * var + delta.square() * self.count * n / total) / total)
        self.mean.add_(delta * n / total)
        self.count.copy_(total)

    @property
    def std(self):
        return torch.sqrt(self.var + 1e-8)

    def forward(self, x):
        return ((x - self.mean) / self.std).clamp(-10, 10)


def mlp(sizes, activation, out_gain):
    """Linear layers with orthogonal weights and zero biases."""
    layers = []
    for i, (n_in, n_out) in enumerate(zip(sizes[:-1], sizes[1:], strict=True)):
        is_last = i == len(sizes) - 2
        linear = nn.Linear(n_in, n_out)
        nn.init.orthogonal_(linear.weight, out_gain if is_last else 2**0.5)
        nn.init.zeros_(linear.bias)
        layers += [linear] if is_last else [linear, activation()]
    return nn.Sequential(*layers)


class Actor(nn.Module):
    """pi(act|obs): a Categorical over Discrete actions; over a Box, a Gaussian whose deviation does not depend on obs."""

    def __init__(self, obs_dim, act_space, hidden_sizes, activation):
        super().__init__()
        self.discrete = isinstance(act_space, Discrete)
        act_dim = int(act_space.n) if self.discrete else act_space.shape[0]
        self.net = mlp([obs_dim, *hidden_sizes, act_dim], activation, out_gain=0.01)
        if not self.discrete:
            self.log_std = nn.Parameter(torch.full((act_dim,), -0.5))

    def forward(self, obs):
        """obs (..., obs_dim) -> the distribution of actions"""
        if self.discrete:
            return Categorical(logits=self.net(obs), validate_args=False)
        return Independent(Normal(self.net(obs), self.log_std.exp(), validate_args=False), 1, validate_args=False)


class Critic(nn.Module):
    """V(obs), in units of the return: the network's output is scaled by the mean and deviation of the targets so far."""

    def __init__(self, obs_dim, hidden_sizes, activation):
        super().__init__()
        self.net = mlp([obs_dim, *hidden_sizes, 1], activation, out_gain=1.0)
        self.ret_stats = RunningStats(())

    def forward(self, obs):
        """obs (..., obs_dim) -> values (...)"""
        return self.ret_stats.mean + self.ret_stats.std * self.net(obs).squeeze(-1)


class ActorCritic(nn.Module):
    """The policy and the value function, with the normaliser of their observations and the bounds of the actions."""

    def __init__(self, obs_space, act_space, args):
        super().__init__()
        activation = {"tanh": nn.Tanh, "relu": nn.ReLU, "elu": nn.ELU}[args.activation]
        self.normalise = RunningStats(obs_space.shape) if args.norm_obs else nn.Identity()
        self.pi = Actor(obs_space.shape[0], act_space, args.hidden_sizes, activation)
        self.v = Critic(obs_space.shape[0], args.hidden_sizes, activation)
        if isinstance(act_space, Discrete):
            low, high, scale, bias = act_space.start, act_space.start + act_space.n - 1, 1, act_space.start
        else:  # -1 and 1 of the policy are the bounds of each dimension that has any
            low, high = act_space.low, act_space.high
            bounded = np.isfinite(low) & np.isfinite(high)
            scale, bias = np.where(bounded, (high - low) / 2, 1), np.where(bounded, (high + low) / 2, 0)
        for name, value in dict(low=low, high=high, scale=scale, bias=bias).items():
            self.register_buffer(name, torch.as_tensor(value), persistent=False)
        self.device = torch.device(args.device)
        self.to(self.device)

    @torch.no_grad()
    def sample(self, obs, deterministic=False):
        """obs: array (N, obs_dim) -> actions of the policy as a tensor, (N, act_dim) or (N,); unbounded in a Box"""
        pi = self.pi(self.normalise(torch.as_tensor(obs, dtype=torch.float32, device=self.device)))
        return pi.mode if deterministic else pi.sample()

    def to_env(self, act):
        """actions of the policy (N, ...) -> an array of what env.step takes: scaled, and clipped to the bounds"""
        return torch.clamp(self.bias + self.scale * act, self.low, self.high).cpu().numpy()

    def act(self, obs, deterministic=False):
        """obs: array (N, obs_dim) -> actions for env.step: array (N, act_dim) or (N,)"""
        return self.to_env(self.sample(obs, deterministic))


def gae(rew, val, next_val, terminated, done, gamma, lam):  # all (T, N)
    """adv_t = delta_t + gamma lam adv_{t+1} within an episode. Schulman et al. 2016, arXiv:1506.02438, eq. 16.

    delta_t = rew_t + gamma (1 - terminated_t) V(next_obs_t) - V(obs_t): a truncated episode and the end of the batch
    bootstrap with the value of the observation that really came next.
    """
    delta = rew + gamma * (1 - terminated) * next_val - val
    discount = gamma * lam * (1 - done)
    adv, next_adv = torch.zeros_like(delta), torch.zeros_like(delta[-1])
    for t in reversed(range(len(delta))):
        adv[t] = next_adv = delta[t] + discount[t] * next_adv
    return adv


@torch.no_grad()
def advantages(ac, batch, args):
    """GAE with the current critic, normalised over all ranks, and the value targets; both (T, N)."""
    val, next_val = ac.v(batch.obs), ac.v(batch.next_obs)
    adv = gae(batch.rew, val, next_val, batch.terminated, batch.done, args.gamma, args.lam)
    ret = adv + val
    adv = adv - mpi.average(adv.mean())
    return adv / (mpi.average(adv.square().mean()).sqrt() + 1e-8), ret


def policy_loss(logp, logp_old, adv, clip_ratio):  # all (B,)
    """-mean min(ratio adv, clip(ratio, 1 - eps, 1 + eps) adv),  ratio = pi(act|obs) / pi_old(act|obs)"""
    ratio = torch.exp(logp - logp_old)
    return -torch.min(ratio * adv, ratio.clamp(1 - clip_ratio, 1 + clip_ratio) * adv).mean()


def value_loss(val, ret, ret_std):  # (B,), (B,), ()
    """mean ((V(obs) - ret) / std(ret))^2"""
    return ((val - ret) / ret_std).square().mean()


def minibatches(size, *tensors):
    """Shuffle tensors (T, N, ...) in the same way, and split them into tuples of tensors (size, ...)."""
    tensors = [x.flatten(0, 1) for x in tensors]
    order = torch.randperm(len(tensors[0])).to(tensors[0].device)
    return zip(*(x[order].split(size) for x in tensors), strict=True)


def update(ac, optimizer, batch, args):
    """Take several passes of minibatch steps over the batch; returns the numbers to log."""
    ac.v.ret_stats.update(advantages(ac, batch, args)[1])
    with torch.no_grad():
        vals = ac.v(batch.obs)
    for i in range(args.train_iters):
        adv, ret = advantages(ac, batch, args)  # in every pass, as the critic has changed
        losses = []
        size = args.minibatch_size // mpi.size()
        for obs, act, logp_old, adv, ret in minibatches(size, batch.obs, batch.act, batch.logp, adv, ret):
            loss_pi = policy_loss(ac.pi(obs).log_prob(act), logp_old, adv, args.clip_ratio)
            loss_v = value_loss(ac.v(obs), ret, ac.v.ret_stats.std)
            optimizer.zero_grad()
            (loss_pi + loss_v).backward()
            mpi.average_gradients(ac)
            optimizer.step()
            losses.append((loss_pi.item(), loss_v.item()))
        with torch.no_grad():
            pi = ac.pi(batch.obs)
            log_ratio = pi.log_prob(batch.act) - batch.logp
        kl = mpi.average((log_ratio.exp() - 1 - log_ratio).mean().item())  # KL(pi_old | pi) from samples of pi_old
        if kl > 1.5 * args.target_kl:
            break
    loss_pi, loss_v = np.mean(losses, axis=0)
    clipped = (log_ratio.exp() - 1).abs() > args.clip_ratio
    return dict(
        VVals=vals.flatten().cpu().numpy(),
        LossPi=mpi.average(loss_pi),
        LossV=mpi.average(loss_v),
        KL=kl,
        Entropy=mpi.average(pi.entropy().mean().item()),
        ClipFrac=mpi.average(clipped.float().mean().item()),
        StopIter=i + 1,
    )


def train(args):
    """Train a policy as `args` (an Args) says and return its ActorCritic. Raises RunError for what cannot work."""
    ranks = mpi.size()
    check(args, (Box, Discrete), num_envs=ranks, steps_per_epoch=args.num_envs, minibatch_size=ranks)
    torch.set_num_threads(args.torch_threads)
    seeds = mpi.seed_everything(args.seed)
    make_env = functools.partial(gym.make, args.env_id, max_episode_steps=args.max_ep_len, disable_env_checker=True)
    envs = [make_env() for _ in range(args.num_envs // ranks)]
    ac = ActorCritic(envs[0].observation_space, envs[0].action_space, args)
    mpi.broadcast(ac)
    groups = [{"params": ac.pi.parameters(), "lr": args.pi_lr}, {"params": ac.v.parameters(), "lr": args.vf_lr}]
    optimizer = torch.optim.Adam(groups, eps=1e-5, fused=True)
    epochs = math.ceil(args.total_steps / args.steps_per_epoch)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda epoch: 1 - epoch / epochs)
    buffer = Buffer(envs, args.steps_per_epoch // args.num_envs, seeds)
    logger = Logger(args, __file__)

    for epoch in range(epochs):
        ep_rets, ep_lens = buffer.collect(ac)
        metrics = update(ac, optimizer, buffer.batch(ac), args)
        if args.norm_obs:  # only now, as pi_old has to be the policy that acted
            ac.normalise.update(torch.as_tensor(buffer.obs, device=ac.device))
        scheduler.step()
        logger.log(Epoch=epoch, EpRet=ep_rets, EpLen=ep_lens, TotalEnvInteracts=buffer.steps, **metrics)
        if epoch % args.save_freq == 0 or epoch == epochs - 1:
            logger.save_model(ac)
    logger.close()
    return ac


if __name__ == "__main__":
    train(tyro.cli(Args))
