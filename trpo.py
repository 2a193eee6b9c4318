"""Trust Region Policy Optimization (TRPO). Schulman et al. 2015, arXiv:1502.05477.

    minimise L_pi subject to KL(pi_old | pi) <= delta:
    theta <- theta + c^j sqrt(2 delta / x^T H x) x,   x = H^-1 g,   g = gradient of -L_pi,   c = backtrack_coeff,
             j = the first of 0, 1, ... with which KL <= delta and L_pi falls
    H    =  Hessian of that KL + damping_coeff I
    L_pi = -mean ratio adv,   ratio = pi(act|obs) / pi_old(act|obs)
    L_v  =  mean (V(obs) - ret)^2,   ret = adv + V(obs) of the critic before the pass over the batch
    adv  =  generalized advantage estimates (GAE), arXiv:1506.02438; in L_pi normalised to mean 0 and standard deviation 1

Beyond the paper, after arXiv:2006.05990: normalised observations and value targets, small initial means of the actions,
targets of the critic computed anew for each pass over the batch, a learning rate that falls to 0.

    python trpo.py --env-id Walker2d-v4
    mpirun -n 4 python trpo.py --env-id Walker2d-v4
"""

import math
from dataclasses import dataclass
from typing import ClassVar, Literal, NamedTuple

import numpy as np
import torch
from gymnasium.spaces import Box, Discrete
from torch import nn
from torch.distributions import Categorical
from torch.nn.utils import parameters_to_vector

from utils import mpi
from utils.args import AtLeast0, AtLeast1, Fraction, LogStd, NonNegative, Positive, RunArgs, TotalOfEnvs, TotalOfRanks, cli
from utils.envs import check_finite, make_env
from utils.logger import Logger, set_up
from utils.optim import Adam


@dataclass
class Args(RunArgs):
    action_spaces: ClassVar = (Box, Discrete)  # that the policy can handle
    env_id: str = "HalfCheetah-v4"  # a Gymnasium environment with flat observations
    seed: AtLeast0 = 0  # seed of the networks, environments, actions and minibatches
    total_steps: AtLeast1 = 1_000_000  # environment steps in all, rounded up to whole epochs
    steps_per_epoch: TotalOfEnvs = 2000  # environment steps in a batch
    num_envs: TotalOfRanks = 8  # environments, stepped one after the other
    max_ep_len: AtLeast1 | None = None  # steps until an episode is truncated; default: the environment's own limit
    hidden_sizes: tuple[AtLeast1, ...] = (64, 64)  # widths of the hidden layers, of the actor and of the critic
    activation: Literal["tanh", "relu", "elu"] = "tanh"  # activation of the hidden layers
    init_log_std: LogStd | None = None  # initial log standard deviation, where bounds are -1 and 1; None: -log sqrt(act_dim)
    norm_obs: bool = True  # normalise observations by their running mean and standard deviation
    gamma: Fraction = 0.99  # discount
    lam: Fraction = 0.95  # lambda of GAE
    vf_lr: Positive = 3e-4  # learning rate of the critic, falls linearly to 0
    train_v_iters: AtLeast0 = 10  # passes of the critic over a batch; the actor takes one step on all of it
    minibatch_size: TotalOfRanks = 100  # transitions in a gradient step of the critic, at most: the batch is split evenly
    algo: Literal["trpo", "npg"] = "trpo"  # npg, natural policy gradient: the full step, without the line search
    delta: Positive = 0.02  # largest KL(pi_old | pi) of a step; npg, without its line search, only aims at it
    damping_coeff: NonNegative = 0.1  # multiple of the identity in H
    cg_iters: AtLeast1 = 10  # iterations of conjugate gradient
    backtrack_iters: AtLeast1 = 10  # steps that the line search tries
    backtrack_coeff: Fraction = 0.8  # c: length of each, relative to the one before


class Batch(NamedTuple):
    """Tensors of shape (T, N, ...): T steps in each of N environments."""

    obs: torch.Tensor  # normalised
    act: torch.Tensor  # as sampled, not clipped
    logp: torch.Tensor  # log pi_old(act|obs), of the policy that acted
    rew: torch.Tensor
    next_obs: torch.Tensor  # normalised; the real final observation where an episode ends
    terminated: torch.Tensor  # 1 where next_obs is terminal; else 0, also where the episode is only truncated
    done: torch.Tensor  # 1 where the episode ends: terminated or truncated


class Buffer:
    """Steps N environments and stores T steps of each, as arrays of shape (T, N, ...).

    The first episodes of all M environments, those of all ranks, are truncated after 1/M, 2/M, ... M/M of the step limit. If
    all ended together, a batch shorter than an episode would hold the same part of each, and the policy would learn for one
    part at a time."""

    def __init__(self, envs, num_steps, seeds):
        shape, obs_space, act_space = (num_steps, len(envs)), envs[0].observation_space, envs[0].action_space
        self.obs, self.next_obs = (np.zeros((*shape, *obs_space.shape), np.float32) for _ in range(2))
        self.act = np.zeros((*shape, *act_space.shape), np.int64 if isinstance(act_space, Discrete) else np.float32)
        self.rew, self.terminated, self.done = (np.zeros(shape, np.float32) for _ in range(3))
        self.envs, self.steps = envs, 0
        for i, env in enumerate(envs, start=mpi.rank() * len(envs)):
            env.reset(seed=int(seeds.integers(2**31)))
            env.cut = (i + 1) * (env.spec.max_episode_steps or 0) // (mpi.size() * len(envs))

    def collect(self, ac):
        """Act for T steps in each environment. Returns the returns and the lengths of the episodes that ended."""
        ep_rets, ep_lens = [], []
        for t in range(len(self.obs)):
            self.obs[t] = [env.obs for env in self.envs]
            check_finite(self.steps, observation=self.obs[t])
            act = ac.sample(self.obs[t])
            self.act[t] = act.cpu().numpy()
            for i, (env, env_act) in enumerate(zip(self.envs, ac.to_env(act), strict=True)):
                self.next_obs[t, i], self.rew[t, i], terminated, truncated, _ = env.step(env_act)
                self.terminated[t, i], self.done[t, i] = terminated, terminated or truncated
                if terminated or truncated:
                    ep_rets.append(env.ep_ret)
                    ep_lens.append(env.ep_len)
                    env.reset()
            self.steps += len(self.envs) * mpi.size()
            check_finite(self.steps, observation=self.next_obs[t], reward=self.rew[t])
        return ep_rets, ep_lens

    @torch.no_grad()
    def batch(self, ac):
        """What `collect` has stored, as a Batch, which the next `collect` may overwrite."""
        arrays = (self.act, self.rew, self.terminated, self.done)
        act, rew, terminated, done = (torch.as_tensor(array, device=ac.device) for array in arrays)
        obs, next_obs = ac.normalise(self.obs), ac.normalise(self.next_obs)
        return Batch(obs, act, ac.pi(obs).log_prob(act), rew, next_obs, terminated, done)


class RunningStats(nn.Module):
    """Mean and standard deviation of all data so far, over all ranks. As buffers they are saved with the networks."""

    def __init__(self, shape):
        super().__init__()
        self.register_buffer("mean", torch.zeros(shape))
        self.register_buffer("std", torch.ones(shape))
        self.register_buffer("count", torch.zeros(()))

    @torch.no_grad()
    def update(self, x):
        """Take in x of shape (T, N, *shape). Chan, Golub, LeVeque 1979, STAN-CS-79-773."""
        n = x.shape[0] * x.shape[1] * mpi.size()
        mean = mpi.average(x.mean((0, 1)))
        var = mpi.average((x - mean).square().mean((0, 1)))
        total, delta = self.count + n, mean - self.mean
        var = (self.count * self.std.square() + n * var + delta.square() * self.count * n / total) / total
        self.std.copy_(var.sqrt().clamp(min=1e-4))
        self.mean.add_(delta * n / total)
        self.count.copy_(total)

    def normalise(self, x):  # (..., *shape)
        return (x - self.mean) / self.std

    def denormalise(self, x):  # (..., *shape)
        return self.mean + x * self.std


def mlp(sizes, activation, out_gain):
    """Linear layers with orthogonal weights, zero biases, and the activation between them. `out_gain` scales the last one."""
    layers, gains = [], [2**0.5] * (len(sizes) - 2) + [out_gain]
    for n_in, n_out, gain in zip(sizes[:-1], sizes[1:], gains, strict=True):
        linear = nn.Linear(n_in, n_out)
        nn.init.orthogonal_(linear.weight, gain)
        nn.init.zeros_(linear.bias)
        layers += [linear, activation()]
    return nn.Sequential(*layers[:-1])


class Gaussian(NamedTuple):
    """N(mean, std^2) in each of act_dim dimensions. Independent(Normal(mean, std), 1) means the same and is much slower."""

    mean: torch.Tensor  # (..., act_dim)
    std: torch.Tensor  # (act_dim,)

    @property
    def mode(self):
        return self.mean

    def sample(self):
        """-> actions (..., act_dim)"""
        return self.mean + self.std * torch.randn_like(self.mean)

    def log_prob(self, act):
        """act (..., act_dim) -> (...): log N(act) = -sum ((act - mean) / std)^2 / 2 - sum log (std sqrt(2 pi))"""
        z = (act - self.mean) / self.std
        return -0.5 * z.square().sum(-1) - (self.std.log() + math.log(2 * math.pi) / 2).sum()

    def entropy(self):
        """-> (...): sum log (std sqrt(2 pi e))"""
        return (self.std.log() + math.log(2 * math.pi * math.e) / 2).sum().expand(self.mean.shape[:-1])


class Actor(nn.Module):
    """pi(act|obs): a Categorical over Discrete actions; over a Box, a Gaussian whose standard deviations do not depend on obs."""

    def __init__(self, obs_dim, act_space, hidden_sizes, activation, init_log_std):
        super().__init__()
        self.discrete = isinstance(act_space, Discrete)
        act_dim = int(act_space.n) if self.discrete else act_space.shape[0]
        self.net = mlp([obs_dim, *hidden_sizes, act_dim], activation, out_gain=0.01)
        if not self.discrete:
            if init_log_std is None:  # noise of expected squared norm 1, whatever act_dim is
                init_log_std = -math.log(act_dim) / 2
            self.log_std = nn.Parameter(torch.full((act_dim,), float(init_log_std)))

    def forward(self, obs):
        """obs (..., obs_dim) -> a distribution whose log_prob and entropy are (...)"""
        if self.discrete:
            return Categorical(logits=self.net(obs), validate_args=False)
        return Gaussian(self.net(obs), self.log_std.exp())


class Critic(nn.Module):
    """V(obs), in units in which the returns so far have mean 0 and standard deviation 1."""

    def __init__(self, obs_dim, hidden_sizes, activation):
        super().__init__()
        self.net = mlp([obs_dim, *hidden_sizes, 1], activation, out_gain=1.0)

    def forward(self, obs):
        """obs (..., obs_dim) -> values (...)"""
        return self.net(obs).squeeze(-1)


class ActorCritic(nn.Module):
    """Policy and value function, with the statistics that normalise observations and returns, and the actions' bounds."""

    def __init__(self, obs_space, act_space, args):
        super().__init__()
        activation = {"tanh": nn.Tanh, "relu": nn.ReLU, "elu": nn.ELU}[args.activation]
        self.pi = Actor(obs_space.shape[0], act_space, args.hidden_sizes, activation, args.init_log_std)
        self.v = Critic(obs_space.shape[0], args.hidden_sizes, activation)
        self.obs_stats, self.ret_stats = RunningStats(obs_space.shape), RunningStats(())
        self.norm_obs, self.device = args.norm_obs, torch.device(args.device)
        self.act_space = act_space
        if isinstance(act_space, Discrete):
            self.scale, self.bias = 1, act_space.start
        else:  # the policy's -1 and 1 are the bounds; a bound that is missing lies 2 from the other, or at -1 or 1
            low, high = np.clip((act_space.low, act_space.high), -1e30, 1e30).astype(np.float32)
            low = np.where(low > -1e30, low, np.where(high < 1e30, high - 2, -1))
            high = np.where(high < 1e30, high, low + 2)
            self.scale, self.bias = (high - low) / 2, (high + low) / 2
        self.to(self.device)

    def normalise(self, obs):
        """obs: array (..., obs_dim) -> what the networks take: tensor (..., obs_dim), normalised within -10 and 10 if norm_obs"""
        obs = torch.as_tensor(obs, dtype=torch.float32, device=self.device)
        return self.obs_stats.normalise(obs).clamp(-10, 10) if self.norm_obs else obs

    @torch.no_grad()
    def sample(self, obs, deterministic=False):
        """obs: array (N, obs_dim) -> the policy's actions: tensor (N, act_dim) or (N,), unbounded where the space is a Box"""
        pi = self.pi(self.normalise(obs))
        return pi.mode if deterministic else pi.sample()

    def to_env(self, act):
        """The policy's actions: tensor (N, ...) -> what env.step takes: array (N, ...), scaled and clipped to the bounds"""
        act = (self.bias + self.scale * act.cpu().numpy()).astype(self.act_space.dtype)
        return act if isinstance(self.act_space, Discrete) else act.clip(self.act_space.low, self.act_space.high)

    def act(self, obs, deterministic=False):
        """obs: array (N, obs_dim) -> what env.step takes: array (N, act_dim) or (N,)"""
        return self.to_env(self.sample(obs, deterministic))


def gae(rew, val, next_val, terminated, done, gamma, lam):  # all (T, N)
    """adv_t = delta_t + gamma lam adv_{t+1} within an episode. Schulman et al. 2016, arXiv:1506.02438, eq. 16.

    delta_t = rew_t + gamma (1 - terminated_t) V(next_obs_t) - V(obs_t): where an episode is truncated, or cut by the end
    of the batch, the value of the observation that really came next stands for the rest of the return.
    """
    delta = rew + gamma * (1 - terminated) * next_val - val
    adv, carry = delta.flatten().tolist(), (gamma * lam * (1 - done)).flatten().tolist()  # plain numbers are the fastest here
    N = rew.shape[1]
    for i in reversed(range(len(adv) - N)):  # i + N is the next step of the same environment
        adv[i] += carry[i] * adv[i + N]
    return rew.new_tensor(adv).view_as(rew)


@torch.no_grad()
def advantages(ac, batch, args):
    """GAE with the current critic: advantages, normalised over all ranks, and returns, in units of the reward; all (T, N)."""
    val = ac.ret_stats.denormalise(ac.v(batch.obs))
    next_val, ends = val.roll(-1, 0), batch.done.bool()  # V(next_obs_t) is V(obs_{t+1}) unless an episode or the batch ends
    ends[-1] = True
    next_val[ends] = ac.ret_stats.denormalise(ac.v(batch.next_obs[ends]))
    adv = gae(batch.rew, val, next_val, batch.terminated, batch.done, args.gamma, args.lam)
    ret = adv + val
    adv = adv - mpi.average(adv.mean())
    return adv / (mpi.average(adv.square().mean()).sqrt() + 1e-8), ret


def policy_loss(logp, logp_old, adv):  # of one shape
    """-mean ratio adv,  ratio = pi(act|obs) / pi_old(act|obs)"""
    return -(torch.exp(logp - logp_old) * adv).mean()


def value_loss(val, ret):  # of one shape, normalised
    """mean (V(obs) - ret)^2"""
    assert val.shape == ret.shape  # (B,) minus (B, 1) would silently be (B, B)
    return (val - ret).square().mean()


def kl_divergence(p, q):
    """-> (...): KL(p | q) of two Categoricals or of two Gaussians"""
    if isinstance(p, Categorical):
        return torch.distributions.kl_divergence(p, q)
    z, ratio = (p.mean - q.mean) / q.std, p.std / q.std
    return z.square().sum(-1) / 2 + ((ratio.square() - 1) / 2 - ratio.log()).sum()


def flat_grad(output, params, **options):
    """The gradient of a scalar with respect to all of `params`, as one vector (P,)."""
    return torch.cat([grad.flatten() for grad in torch.autograd.grad(output, params, **options)])


@torch.no_grad()
def assign(params, vector):
    """Copy the vector (P,) into the parameters, in place: `vector_to_parameters` would change how they are aligned in memory,
    and with it the last bits of their products, so that a resumed run would differ."""
    for p, x in zip(params, vector.split([p.numel() for p in params]), strict=True):
        p.copy_(x.view_as(p))


def fisher_vector_product(kl, params, damping_coeff):
    """The function v -> H v for vectors (P,); H = Hessian of kl + damping_coeff I, (P, P), is never built."""
    kl_grad = flat_grad(kl, params, create_graph=True)
    return lambda v: mpi.average(flat_grad(kl_grad @ v, params, retain_graph=True)) + damping_coeff * v


def conjugate_gradient(product, b, iters):
    """Solve H x = b for x (P,), given product(v) = H v with a positive definite H. Hestenes & Stiefel 1952."""
    x, residual, direction = torch.zeros_like(b), b.clone(), b.clone()
    square = residual @ residual
    for _ in range(iters):
        if square < 1e-20:
            break
        h_direction = product(direction)
        alpha = square / (direction @ h_direction)
        x += alpha * direction
        residual -= alpha * h_direction
        square, last_square = residual @ residual, square
        direction = residual + square / last_square * direction
    return x


def minibatches(size, *tensors):
    """Shuffle tensors (T, N, ...) alike and split them into tuples of tensors (B, ...), B <= size and as equal as can be."""
    tensors = [x.flatten(0, 1) for x in tensors]
    order = torch.randperm(len(tensors[0])).to(tensors[0].device)
    return zip(*(x[order].tensor_split(math.ceil(len(order) / size)) for x in tensors), strict=True)


@torch.no_grad()
def diagnose(ac, batch, args):
    """What to log after an update: statistics of the whole batch, with the advantages and returns of the new critic."""
    pi, val, (adv, ret) = ac.pi(batch.obs), ac.v(batch.obs), advantages(ac, batch, args)
    logp = pi.log_prob(batch.act)
    return dict(
        VVals=ac.ret_stats.denormalise(val).flatten().tolist(),
        LossPi=policy_loss(logp, batch.logp, adv).item(),
        LossV=value_loss(val, ac.ret_stats.normalise(ret)).item(),
        Entropy=pi.entropy().mean().item(),
    )


def update_policy(ac, batch, adv, args):
    """One step with KL(pi_old | pi) <= delta, with npg about delta. Returns the KL and how often the line search shortened the
    step; backtrack_iters times means that none was taken."""
    params = list(ac.pi.parameters())
    with torch.no_grad():
        pi_old = ac.pi(batch.obs)

    def loss_and_kl():
        pi = ac.pi(batch.obs)
        return policy_loss(pi.log_prob(batch.act), batch.logp, adv), kl_divergence(pi_old, pi).mean()

    loss_pi, kl = loss_and_kl()
    g = -mpi.average(flat_grad(loss_pi, params, retain_graph=True))
    product = fisher_vector_product(kl, params, args.damping_coeff)
    x = conjugate_gradient(product, g, args.cg_iters)
    step = torch.sqrt(2 * args.delta / (x @ product(x) + 1e-8)) * x
    theta, loss_old = parameters_to_vector(params).detach(), mpi.average(loss_pi.item())
    for j in range(args.backtrack_iters):
        assign(params, theta + args.backtrack_coeff**j * step)
        with torch.no_grad():
            loss_pi, kl = (mpi.average(value.item()) for value in loss_and_kl())
        if args.algo == "npg" or (loss_pi < loss_old and kl <= args.delta):
            return kl, j
    assign(params, theta)
    return 0.0, args.backtrack_iters


def update(ac, optimizer, batch, args):
    """One step of the actor on the whole batch, then several passes of the critic in minibatch steps. Returns what to log."""
    adv, ret = advantages(ac, batch, args)
    ac.ret_stats.update(ret)
    kl, backtracks = update_policy(ac, batch, adv, args)
    for i in range(args.train_v_iters):
        if i > 0:
            _, ret = advantages(ac, batch, args)  # anew for each pass, as the critic and its units have changed
        for obs, mb_ret in minibatches(args.minibatch_size // mpi.size(), batch.obs, ac.ret_stats.normalise(ret)):
            loss_v = value_loss(ac.v(obs), mb_ret)
            optimizer.zero_grad()
            loss_v.backward()
            mpi.average_gradients(ac.parameters())
            optimizer.step()
    return dict(**diagnose(ac, batch, args), KL=kl, BacktrackIters=backtracks)


def train(args):
    """Train as `args` (an Args) says and return the ActorCritic. Raises RunError for what cannot work."""
    seeds = set_up(args)
    envs = [make_env(args.env_id, args.max_ep_len) for _ in range(args.num_envs // mpi.size())]
    ac = ActorCritic(envs[0].observation_space, envs[0].action_space, args)
    mpi.broadcast(ac)
    optimizer = Adam(ac.v.parameters(), eps=1e-5)  # eps of OpenAI Baselines
    epochs = math.ceil(args.total_steps / args.steps_per_epoch)
    buffer = Buffer(envs, args.steps_per_epoch // args.num_envs, seeds)

    with Logger(args, __file__) as logger:
        for epoch in logger.epochs(epochs, model=ac, optimizer=optimizer, buffer=buffer):  # all that --resume restores
            optimizer.param_groups[0]["lr"] = args.vf_lr * (1 - epoch / epochs)
            ep_rets, ep_lens = buffer.collect(ac)
            metrics = update(ac, optimizer, buffer.batch(ac), args)
            ac.obs_stats.update(torch.as_tensor(buffer.obs, device=ac.device))  # not earlier: pi_old is the policy that acted
            logger.log(Epoch=epoch, EpRet=ep_rets, EpLen=ep_lens, TotalEnvInteracts=buffer.steps, **metrics)
    return ac


if __name__ == "__main__":
    train(cli(Args))
