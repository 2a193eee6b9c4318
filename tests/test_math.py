"""Each formula against an independent computation."""

import copy
import inspect
import math
import operator
from functools import partial
from types import SimpleNamespace

import gymnasium as gym
import numpy as np
import pytest
import torch
from conftest import ALL, OFF_POLICY, ON_POLICY, register, small
from torch.distributions import Independent, Normal, kl_divergence

import ppo
import trpo
import vpg
from utils import mpi
from utils.envs import make_env
from utils.logger import set_up
from utils.optim import Adam

GAMMA, LAM = 0.9, 0.8


def make(script, env_id, num_envs, num_steps, **changes):
    torch.manual_seed(0)
    args = small(script, "unused", gamma=GAMMA, lam=LAM, norm_obs=False, **changes)
    envs = [make_env(env_id) for _ in range(num_envs)]
    ac = script.ActorCritic(envs[0].observation_space, envs[0].action_space, args)
    buffer = script.Buffer(envs, num_steps, np.random.default_rng(0))
    return args, ac, buffer


def returns(script, args, ac, batch):
    """Advantages and value targets of a critic that says V(obs) = 10 obs, with returns of mean 3 and standard deviation 2."""
    ac.ret_stats.mean.fill_(3)
    ac.ret_stats.std.fill_(2)
    fake = SimpleNamespace(ret_stats=ac.ret_stats, v=lambda obs: (10 * obs.squeeze(-1) - 3) / 2)
    return script.advantages(fake, batch, args)


def test_terminated(script):
    """Count ends after 3 steps: rewards 1 2 3 at observations 0 1 2, and nothing follows."""
    args, ac, buffer = make(script, "Count-v0", 1, 3)
    buffer.collect(ac)
    adv, ret = returns(script, args, ac, buffer.batch(ac))
    # delta = (1 + .9*10 - 0, 2 + .9*20 - 10, 3 - 20) = (10, 10, -17);  gamma lam = .72
    expected = np.array([10 + 0.72 * (10 + 0.72 * -17), 10 + 0.72 * -17, -17])
    assert ret.squeeze(-1).tolist() == pytest.approx(expected + [0, 10, 20], abs=1e-4)
    assert adv.squeeze(-1).tolist() == pytest.approx((expected - expected.mean()) / expected.std(), abs=1e-4)
    assert buffer.terminated.ravel().tolist() == [0, 0, 1]


def test_cut_by_the_end_of_the_batch(script):
    """Batches of 2 steps cut the episode of 3: the first bootstraps with observation 2, the second goes on from there."""
    args, ac, buffer = make(script, "Count-v0", 1, 2)
    assert buffer.collect(ac) == ([], [])
    _, ret = returns(script, args, ac, buffer.batch(ac))
    assert ret.squeeze(-1).tolist() == pytest.approx([10 + 0.72 * 10, 10 + 10], abs=1e-4)
    assert buffer.collect(ac) == ([6.0], [3])
    _, ret = returns(script, args, ac, buffer.batch(ac))
    assert ret.squeeze(-1).tolist() == pytest.approx([20 - 17, 0 + 10], abs=1e-4)


def test_first_episodes_end_at_different_times(script, monkeypatch):
    """4 environments with a limit of 8: their first episodes are truncated after 2, 4, 6, 8 steps, all later ones after 8."""
    args, ac, _ = make(script, "Count-v0", 1, 4)
    envs = [make_env("Count-v0", 8, length=100) for _ in range(4)]
    buffer = script.Buffer(envs, 24, np.random.default_rng(0))
    assert sorted(buffer.collect(ac)[1]) == [2, 4, 6] + [8] * 9
    assert [(np.flatnonzero(done) + 1).tolist() for done in buffer.done.T] == [[2, 10, 18], [4, 12, 20], [6, 14, 22], [8, 16, 24]]
    assert buffer.terminated.sum() == 0
    seen = buffer.next_obs[..., 0].T[buffer.done.T == 1]  # not what the reset showed
    assert seen.tolist() == [2, 8, 8, 4, 8, 8, 6, 8, 8, 8, 8, 8]
    _, ret = returns(script, args, ac, buffer.batch(ac))
    later, ends = torch.as_tensor(buffer.next_obs[..., 0]), torch.as_tensor(buffer.done == 1)
    ends[-1] = True
    val, after = 10 * later, torch.where(ends, 10 * later, ret.roll(-1, 0))  # V(next_obs), and what the return goes on with
    assert torch.allclose(ret, later + GAMMA * ((1 - LAM) * val + LAM * after), rtol=1e-4)  # rewards are the next observations
    monkeypatch.setattr(mpi, "size", lambda: 2)
    monkeypatch.setattr(mpi, "rank", lambda: 1)  # with the other half of 8
    script.Buffer(envs, 24, np.random.default_rng(0))
    assert [env.cut for env in envs] == [5, 6, 7, 8]


def test_actions_use_each_dimensions_own_bounds(script):
    """A missing bound lies 2 from the other one, two missing ones at -1 and 1."""
    low, high = np.array([-0.4, 0.0, -np.inf, 5.0, -np.inf]), np.array([0.4, 3.0, np.inf, np.inf, 5.0])
    space = gym.spaces.Box(low.astype(np.float32), high.astype(np.float32))
    ac = script.ActorCritic(gym.spaces.Box(-1, 1, (2,)), space, small(script, "unused"))
    acts = ac.to_env(torch.tensor([[0.5, 0, 7, 0, 0], [-9, -9, -9, -9, -9], [9, 9, 9, 9, 9]]))
    assert acts[0].tolist() == pytest.approx([0.2, 1.5, 7, 6, 4])
    assert acts[1].tolist() == pytest.approx([-0.4, 0, -9, 5, -5])
    assert acts[2].tolist() == pytest.approx([0.4, 3, 9, 15, 5])


def test_discrete_actions_begin_at_start(script):
    register("CountDiscrete-v0", action_space=gym.spaces.Discrete(3, start=5))
    args, ac, buffer = make(script, "CountDiscrete-v0", 2, 20)
    buffer.collect(ac)  # Count asserts 5 <= action <= 7
    assert set(buffer.act.ravel()) == {0, 1, 2}
    logits = ac.pi.net(buffer.batch(ac).obs)
    expected = torch.log(torch.softmax(logits, -1)).gather(-1, torch.as_tensor(buffer.act).unsqueeze(-1)).squeeze(-1)
    assert torch.allclose(buffer.batch(ac).logp, expected, atol=1e-6)


def test_samples_of_the_gaussian(script):
    torch.manual_seed(0)
    p = script.Gaussian(torch.randn(5, 4, 3), torch.tensor([0.1, 1.0, 3.0]))
    samples = torch.stack([p.sample() for _ in range(4000)])
    assert torch.allclose(samples.mean(0), p.mean, atol=0.3) and torch.allclose(samples.std(0), p.std, rtol=0.1)


def test_adam_is_pytorchs():
    """To the bit, also when the learning rate changes, a group has no gradient, and the state has been saved and loaded."""
    torch.manual_seed(0)
    ours, theirs = ([torch.nn.Parameter(torch.ones(shape)) for shape in ((3, 2), (2,), (4,))] for _ in range(2))
    pairs = [(ours, Adam), (theirs, partial(torch.optim.Adam, fused=True))]
    groups = [[{"params": p[:2], "lr": 0.1, "weight_decay": 0.1}, {"params": p[2:], "lr": 0.2}] for p, _ in pairs]
    optimizers = [make(group, eps=1e-5) for group, (_, make) in zip(groups, pairs, strict=True)]
    for step in range(6):
        if step == 3:
            state = copy.deepcopy(optimizers[0].state_dict())
            del state["param_groups"][1]["weight_decay"]  # as in older checkpoints
            optimizers[0] = Adam([{"params": ours[:2]}, {"params": ours[2:]}])
            optimizers[0].load_state_dict(state)
        for optimizer in optimizers:
            optimizer.zero_grad()
            optimizer.param_groups[0]["lr"] *= 0.9
        for p, p_torch in list(zip(ours, theirs, strict=True))[: 2 + step % 2]:
            p.grad = p_torch.grad = torch.randn_like(p)
        for optimizer in optimizers:
            optimizer.step()
        assert all(map(torch.equal, ours, theirs))


@pytest.mark.parametrize("given, log_std", [(None, -math.log(2) / 2), (-1, -1.0)])  # a whole number, as Python allows
def test_first_deviation(script, given, log_std):
    _, ac, _ = make(script, "Count-v0", 1, 5, init_log_std=given)
    assert ac.pi.log_std.tolist() == pytest.approx([log_std] * 2)


def test_running_stats_are_those_of_all_the_data(script):
    stats = script.RunningStats((3,))
    data = torch.randn(7, 20, 5, 3) * torch.tensor([1.0, 10.0, 0.1]) + torch.tensor([0.0, 100.0, -5.0])
    for x in data:
        stats.update(x)
    flat = data.reshape(-1, 3).double().numpy()
    assert stats.mean.numpy() == pytest.approx(flat.mean(0), rel=1e-4, abs=1e-4)
    assert stats.std.numpy() == pytest.approx(flat.std(0), rel=1e-3)
    x = torch.randn(4, 3)
    assert torch.allclose(stats.denormalise(stats.normalise(x)), x, atol=1e-3)


def test_minibatches_hold_every_transition_once(script):
    x = torch.arange(24).view(6, 4)
    parts = list(script.minibatches(7, x, x.unsqueeze(-1) * 2))
    assert [len(a) for a, _ in parts] == [6, 6, 6, 6]
    order = torch.cat([a for a, _ in parts]).tolist()
    assert sorted(order) == list(range(24)) != order
    assert all((b.squeeze(-1) == 2 * a).all() for a, b in parts)


def test_value_loss(script):
    assert script.value_loss(torch.tensor([1.0, 2.0]), torch.tensor([0.0, 4.0])).item() == pytest.approx(2.5)
    with pytest.raises(AssertionError):
        script.value_loss(torch.zeros(2, 1), torch.zeros(2))


def test_targets_are_anew_for_each_pass(script, monkeypatch):
    """Two passes of one minibatch each: the second fits the normalised returns that the critic of after the first one gives, and
    PPO's takes its advantages."""
    passes = dict(train_iters=2, target_kl=1e9) if script is ppo else dict(train_v_iters=2)
    args, ac, buffer = make(script, "Count-v0", 2, 6, minibatch_size=12, **passes)
    buffer.collect(ac)
    batch, seen = buffer.batch(ac), dict(value_loss=[], policy_loss=[])
    _, ret = script.advantages(ac, batch, args)

    def spy(name, loss_of, *parts):
        adv, ret = script.advantages(ac, batch, args)
        pair = (parts[1], ac.ret_stats.normalise(ret)) if name == "value_loss" else (parts[-2], adv)
        seen[name].append([x.flatten().sort().values for x in pair])
        return loss_of(*parts)

    for name in seen:
        monkeypatch.setattr(script, name, partial(spy, name, getattr(script, name)))
    script.update(ac, torch.optim.Adam(ac.parameters(), 0.1), batch, args)
    for name in seen if script is ppo else ["value_loss"]:
        (first, _), (second, expected), _ = seen[name]  # the third call belongs to the diagnosis
        assert torch.allclose(second, expected, atol=1e-5) and not torch.allclose(first, second, atol=1e-3)
    normalised = (ret - ret.mean()) / ret.std(correction=0)
    assert torch.allclose(seen["value_loss"][0][0], normalised.flatten().sort().values, atol=1e-5)


def test_each_step_is_along_the_gradient_of_its_own_minibatch(script, monkeypatch):
    """Nothing is left of an earlier minibatch's gradient, and what a loss does not depend on has none."""
    passes = dict(train_iters=2, target_kl=1e9) if script is ppo else dict(train_v_iters=2)
    args, ac, buffer = make(script, "Count-v0", 2, 6, minibatch_size=6, **passes)
    buffer.collect(ac)
    expected, steps = {}, []

    def spy(name, module):
        loss_of = getattr(script, name)

        def wrapped(*parts):
            loss = loss_of(*parts)
            if loss.requires_grad and (script is not trpo or module is ac.v):
                params = list(module.parameters())
                expected.update(zip(params, torch.autograd.grad(loss, params, retain_graph=True), strict=True))
            return loss

        monkeypatch.setattr(script, name, wrapped)

    class Optimizer(torch.optim.SGD):
        def step(self):
            for p in self.param_groups[0]["params"]:
                assert p.grad is None if p not in expected else torch.allclose(p.grad, expected[p], atol=1e-7)
            steps.append(len(expected))
            expected.clear()
            super().step()

    spy("policy_loss", ac.pi)
    spy("value_loss", ac.v)
    optimizer = Optimizer(ac.v.parameters() if script is trpo else ac.parameters(), 0.01)
    for _ in range(2):
        script.update(ac, optimizer, buffer.batch(ac), args)
    assert len(steps) == 2 * (4 + (script is vpg)) and all(steps)


def test_diagnosis(script):
    """Of a policy that has moved since it acted, by torch.distributions."""
    args, ac, buffer = make(script, "Count-v0", 4, 50)
    buffer.collect(ac)
    batch = buffer.batch(ac)
    with torch.no_grad():
        ac.pi.log_std += 0.2
        ac.ret_stats.mean.fill_(3)
        ac.ret_stats.std.fill_(2)
        got, (adv, ret) = script.diagnose(ac, batch, args), script.advantages(ac, batch, args)
        val = 3 + 2 * ac.v(batch.obs)
        logp = torch.distributions.Normal(ac.pi.net(batch.obs), ac.pi.log_std.exp()).log_prob(batch.act).sum(-1)
        ratio = (logp - batch.logp).exp()
        entropy = (ac.pi.log_std + math.log(2 * math.pi * math.e) / 2).sum()
    gain = dict(vpg=logp * adv, trpo=ratio * adv, ppo=torch.min(ratio * adv, ratio.clip(0.8, 1.2) * adv))[script.__name__]
    assert got["VVals"] == pytest.approx(val.flatten().tolist(), rel=1e-4)
    assert got["LossV"] == pytest.approx(((val - ret) ** 2).mean().item() / 4, rel=1e-4)
    assert got["LossPi"] == pytest.approx(-gain.mean().item(), rel=1e-3, abs=1e-5)
    assert got["Entropy"] == pytest.approx(entropy.item(), rel=1e-4)
    if script is not trpo:  # whose update_policy gives the exact one
        assert got["KL"] == pytest.approx((ratio - 1 - ratio.log()).mean().item(), rel=1e-3)
    if script is ppo:
        assert got["ClipFrac"] == pytest.approx(((ratio < 0.8) | (ratio > 1.2)).float().mean().item())


@ALL
def test_all_environments_of_all_ranks_start_differently(script, monkeypatch):
    now = []
    for rank in range(2):
        monkeypatch.setattr(mpi, "rank", lambda rank=rank: rank)
        seeds, envs = mpi.seed_everything(0), [make_env("Pendulum-v1") for _ in range(2)]
        (script.Buffer if script in ON_POLICY else script.ReplayBuffer)(envs, 4, seeds)
        now += [env.obs.tolist() for env in envs]
    assert len(set(map(tuple, now))) == 4


def test_first_weights_are_orthogonal(script):
    *hidden, last = [layer for layer in script.mlp([4, 8, 8, 2], torch.nn.Tanh, 0.01) if isinstance(layer, torch.nn.Linear)]
    for layer, gain in [(hidden[0], 2**0.5), (hidden[1], 2**0.5), (last, 0.01)]:
        weight = layer.weight if layer.weight.shape[0] <= layer.weight.shape[1] else layer.weight.T
        assert torch.allclose(weight @ weight.T, gain**2 * torch.eye(len(weight)), atol=1e-5 * gain**2)
        assert not layer.bias.any()


def test_ppo_gradient_vanishes_beyond_the_clip():
    logp = torch.tensor([1.0, -1.0, 1.0, -1.0], requires_grad=True)
    ppo.policy_loss(logp, torch.zeros(4), torch.tensor([1.0, -1.0, -1.0, 1.0]), clip_ratio=0.2).backward()
    assert logp.grad.tolist() == pytest.approx([0, 0, math.e / 4, -math.exp(-1) / 4], abs=1e-6)


@pytest.mark.parametrize("kl, passes", [(0.14, 4), (0.16, 1)])
def test_ppo_stops_after_the_pass_that_went_too_far(kl, passes, monkeypatch):
    """At one and a half times its target."""
    args, ac, buffer = make(ppo, "CartPole-v1", 2, 100, target_kl=0.1, train_iters=4)
    buffer.collect(ac)
    before = ac.pi.net[0].weight.clone()
    monkeypatch.setattr(ppo, "approx_kl", lambda *args: torch.tensor(kl))
    assert ppo.update(ac, torch.optim.Adam(ac.parameters(), 1e-3), buffer.batch(ac), args)["StopIter"] == passes
    assert not torch.equal(before, ac.pi.net[0].weight)


def trpo_parts(**changes):
    args, ac, buffer = make(trpo, "Count-v0", 4, 50, hidden_sizes=(5,), **changes)
    with torch.no_grad():
        for p in ac.pi.parameters():
            p.add_(0.3 * torch.randn_like(p))  # away from the small first weights
    buffer.collect(ac)
    batch = buffer.batch(ac)
    pi_old = trpo.Gaussian(*(x.detach() for x in ac.pi(batch.obs)))
    return args, ac, batch, list(ac.pi.parameters()), torch.randn_like(batch.rew), pi_old


def test_trpo_conjugate_gradient_solves_the_system():
    torch.manual_seed(0)
    root = torch.randn(20, 20, dtype=torch.float64)
    matrix, b = root @ root.T + torch.eye(20), torch.randn(20, dtype=torch.float64)
    x = trpo.conjugate_gradient(lambda v: matrix @ v, 1e-4 * b, 60)  # gradients may be small
    assert torch.allclose(x, torch.linalg.solve(matrix, 1e-4 * b), rtol=1e-3, atol=1e-9)


@pytest.mark.parametrize("delta, stretch, backtracks", [(0.05, 1, 0), (3.0, 1, None), (0.02, 10, None)])
def test_trpo_line_search_keeps_the_promise(delta, stretch, backtracks, monkeypatch):
    """With a small delta the first step holds; with a large one the quadratic model is wrong and steps are shortened, as are steps
    that are 10 times too long; npg takes them."""
    args, ac, batch, _, adv, pi_old = trpo_parts(delta=delta, damping_coeff=1e-3, backtrack_iters=50)
    monkeypatch.setattr(torch, "sqrt", lambda x, sqrt=torch.sqrt: stretch * sqrt(x))
    before = trpo.policy_loss(batch.logp, batch.logp, adv)
    kl, j = trpo.update_policy(ac, batch, adv, args)
    assert j == backtracks if backtracks is not None else 0 < j < 50
    with torch.no_grad():
        pi = ac.pi(batch.obs)
    exact = kl_divergence(*(Independent(Normal(x.mean, x.std), 1) for x in (pi_old, pi))).mean()
    assert kl == pytest.approx(exact.item(), rel=1e-4)
    assert kl <= delta and trpo.policy_loss(pi.log_prob(batch.act), batch.logp, adv) < before
    if stretch > 1:
        args.algo = "npg"
        kl, j = trpo.update_policy(ac, batch, adv, args)
        assert j == 0 and kl > delta


def test_trpo_line_search_restores_the_parameters_when_nothing_helps():
    args, ac, batch, params, *_ = trpo_parts()
    before = [p.clone() for p in params]
    assert trpo.update_policy(ac, batch, torch.zeros_like(batch.rew), args) == (0, args.backtrack_iters)
    assert all(torch.equal(a, b) for a, b in zip(before, params, strict=True))


COPIES = [
    (ON_POLICY, "Batch Buffer RunningStats mlp Gaussian Actor Critic ActorCritic gae advantages value_loss minibatches"),
    (ON_POLICY[::2], "approx_kl"),
    (OFF_POLICY, "Batch ReplayBuffer mlp Critic ActorCritic.to_env ActorCritic.act polyak_average gradient_step test"),
    (OFF_POLICY[:2], "Actor ActorCritic.sample"),
    (OFF_POLICY[1:], "q_loss"),
]


@pytest.mark.parametrize("scripts, name", [(scripts, name) for scripts, names in COPIES for name in names.split()])
def test_copies_are_one_text(scripts, name):
    assert len({inspect.getsource(operator.attrgetter(name)(script)) for script in scripts}) == 1


@ALL
def test_every_argument_is_read(script):
    source = "".join(map(inspect.getsource, (script, set_up)))
    for name in script.Args.__annotations__.keys() - {"action_spaces"}:
        assert f"args.{name}" in source, name
