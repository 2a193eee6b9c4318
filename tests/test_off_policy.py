"""DDPG, TD3 and SAC: each formula against an independent computation, the replay buffer, the noise, and whole runs."""

import copy
import math
from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import OFF_POLICY, register, rows, small
from gymnasium.spaces import Box
from torch import nn

import ddpg
import sac
import td3
from utils import mpi
from utils.envs import make_env

LOW, HIGH = np.array([-1.0, 0.0], np.float32), np.array([3.0, 0.5], np.float32)
HALF_WIDTH, MIDDLE = (HIGH - LOW) / 2, (HIGH + LOW) / 2


# Count with another box in each dimension of the action, and no end: the actions of its one episode are env.actions
register("Asymmetric-v0", 10**6, action_space=Box(LOW, HIGH))


@pytest.fixture(params=OFF_POLICY)
def script(request):
    return request.param


def forward(net, x):
    """Linear layers with tanh between them."""
    *hidden, last = [[*layer.parameters()] for layer in net if isinstance(layer, nn.Linear)]
    for weight, bias in hidden:
        x = torch.tanh(x @ weight.T + bias)
    return x @ last[0].T + last[1]


def values(q, obs, act):
    """What the critics say: (1 or 2, B)."""
    critics = q if isinstance(q, nn.ModuleList) else [q]
    return torch.stack([forward(critic.net, torch.cat([obs, act], -1))[:, 0] for critic in critics])


def squash(mu, log_std, noise):
    """Action and log-probability of a squashed Gaussian, by the change of variables."""
    u = mu + log_std.exp() * noise
    log_normal = -((u - mu) ** 2) / (2 * log_std.exp() ** 2) - log_std - math.log(math.sqrt(2 * math.pi))
    return u.tanh(), (log_normal - (1 - u.tanh() ** 2).log()).sum(-1)


class Learner:
    """Networks in float64, targets that differ from them, plain gradient descent, a batch, and `update` of all signatures."""

    def __init__(self, script, pi_lr=1.0, q_lr=1.0, alpha_lr=1.0, **changes):
        torch.manual_seed(0)
        options = dict(hidden_sizes=(5,), activation="tanh", gamma=0.9, polyak=0.75) | changes
        self.script, self.args = script, small(script, "unused", **options)
        self.ac = script.ActorCritic(Box(-np.inf, np.inf, (3,)), Box(LOW, HIGH), self.args).double()
        self.targ = copy.deepcopy(self.ac).requires_grad_(False)
        for p in self.targ.parameters():
            p.add_(0.3 * torch.randn_like(p))
        groups = [{"params": self.ac.pi.parameters(), "lr": pi_lr}]
        if changes.get("autotune"):
            groups.append({"params": [self.ac.log_alpha], "lr": alpha_lr})
        self.optimizers = [torch.optim.SGD(groups), torch.optim.SGD(self.ac.q.parameters(), q_lr)]
        obs, act, next_obs = (torch.randn(16, n, dtype=torch.float64) for n in (3, 2, 3))
        terminated = (torch.arange(16) % 3 == 0).double()
        self.batch = script.Batch(3 * obs, act.tanh(), torch.randn(16).double(), 3 * next_obs, terminated)
        torch.manual_seed(7)  # what `update` will draw: first for the target, then for the policy
        self.noise = [torch.randn(16, 2, dtype=torch.float64) for _ in range(2)]

    def update(self, update_policy=True):
        torch.manual_seed(7)
        turn = [update_policy] if self.script is td3 else []
        return self.script.update(self.ac, self.targ, *self.optimizers, self.batch, self.args, *turn)

    def target(self):
        """By the equations at the heads of the files."""
        batch, noise = self.batch, self.noise[0]
        if self.script is sac:
            next_act, logp = squash(*forward(self.ac.pi.net, batch.next_obs).chunk(2, -1), noise)
            val = values(self.targ.q, batch.next_obs, next_act).amin(0) - self.ac.log_alpha.exp() * logp
        else:
            next_act = forward(self.targ.pi.net, batch.next_obs).tanh()
            if self.script is td3:
                clip = self.args.noise_clip
                next_act = (next_act + (self.args.target_noise * noise).clamp(-clip, clip)).clamp(-1, 1)
            val = values(self.targ.q, batch.next_obs, next_act).amin(0)
        return torch.where(batch.terminated == 1, batch.rew, batch.rew + 0.9 * val).detach()

    def policy_loss(self):
        obs = self.batch.obs
        if self.script is sac:
            act, logp = squash(*forward(self.ac.pi.net, obs).chunk(2, -1), self.noise[1])
            return (self.ac.log_alpha.exp().item() * logp - values(self.ac.q, obs, act).amin(0)).mean()
        return -values(self.ac.q, obs, forward(self.ac.pi.net, obs).tanh())[0].mean()


def weights(module):
    return {name: p.detach().clone() for name, p in module.named_parameters()}


# Targets and losses


def assert_step(learner, module, loss):
    """One update changes the module's parameters by minus the gradient of loss(). Returns its metrics."""
    before, grads = weights(module), torch.autograd.grad(loss(), list(module.parameters()))
    metrics = learner.update()
    for (name, p), grad in zip(module.named_parameters(), grads, strict=True):
        assert torch.allclose(before[name] - p, grad, atol=1e-7) and grad.abs().max() > 1e-3
    return metrics


def test_step_of_the_critics_is_the_gradient_with_a_fixed_target(script):
    """SAC with an alpha that is no longer the one of the command line; TD3 with noise that both clips have to cut on both sides."""
    learner = Learner(script, pi_lr=0.0, alpha_lr=0.0, **(dict(target_noise=2.0, noise_clip=1.5) if script is td3 else {}))
    if script is sac:
        learner.ac.log_alpha.data.fill_(math.log(0.7))
    q, batch, target = learner.ac.q, learner.batch, learner.target()
    before = values(q, batch.obs, batch.act).detach()
    metrics = assert_step(learner, q, lambda: ((values(q, batch.obs, batch.act) - target) ** 2).mean(1).sum())
    assert [metrics[name] for name in metrics if name.endswith("Vals")] == [pytest.approx(val) for val in before.tolist()]
    assert metrics["LossQ"] == pytest.approx(((before - target) ** 2).mean(1).sum().item(), rel=1e-6)


def test_step_of_the_policy_is_the_gradient_through_the_critic(script):
    learner = Learner(script, q_lr=0.0, alpha_lr=0.0, **(dict(autotune=True) if script is sac else {}))
    before = dict(LossPi=learner.policy_loss().item())
    if script is sac:
        _, logp = squash(*forward(learner.ac.pi.net, learner.batch.obs).chunk(2, -1), learner.noise[1])
        before |= dict(LogPi=logp.mean().item(), Alpha=0.2)
    metrics = assert_step(learner, learner.ac.pi, learner.policy_loss)
    assert {name: metrics[name] for name in before} == pytest.approx(before)


def test_q_loss_refuses_shapes_that_would_broadcast(script):
    n = 2 if script is ddpg else 3
    script.q_loss(*[torch.zeros(5)] * n)
    for i in range(n):
        with pytest.raises(AssertionError):
            script.q_loss(*(torch.zeros(5, 1) if j == i else torch.zeros(5) for j in range(n)))


# SAC's distribution and temperature


def test_sac_extreme_actions_have_finite_log_probabilities_and_gradients():
    """Far out log(1 - tanh(u)^2) = log 4 - 2|u|; computed from tanh(u) it would be log 0."""
    grid = torch.cartesian_prod(torch.tensor([-30.0, 30.0]), torch.linspace(-20, 2, 12), torch.linspace(-1.9, 1.9, 5))
    mu, log_std, noise = (column.unsqueeze(-1).contiguous().requires_grad_() for column in grid.T)
    act, logp = sac.squashed_gaussian(mu, log_std, noise)
    logp.sum().backward()
    u = (mu + log_std.exp() * noise).detach().double()
    expected = -(noise**2) / 2 - log_std - 0.5 * math.log(2 * math.pi) - (math.log(4) - 2 * u.abs())
    assert u.abs().min() > 15 and act.abs().max() <= 1
    assert torch.allclose(logp.double(), expected.squeeze(-1), rtol=1e-5)
    assert torch.allclose(mu.grad.double(), 2 * u.sign(), rtol=1e-5) and torch.isfinite(log_std.grad).all()


def test_sac_deviation_is_kept_between_its_bounds():
    actor = sac.Actor(3, 2, (8,), nn.ReLU)
    with torch.no_grad():
        actor.net[-1].bias.copy_(torch.tensor([50.0, -50.0, 50.0, -50.0]))
        mu, log_std = actor(torch.zeros(4, 3))
    assert mu.tolist() == [pytest.approx([50, -50], abs=1)] * 4 and log_std.tolist() == [[2, -20]] * 4


@pytest.mark.parametrize("log_std, rises", [(-6.0, True), (-0.1, False)])
def test_sac_autotuned_alpha_follows_the_policys_entropy(log_std, rises):
    """A narrow policy has less entropy than -2, one that is nearly uniform in the box has log 4. The step's size is by hand."""
    learner = Learner(sac, autotune=True, alpha=0.3, pi_lr=0.0, alpha_lr=0.01)
    with torch.no_grad():
        learner.ac.pi.net[-1].weight.zero_()
        learner.ac.pi.net[-1].bias.copy_(torch.tensor([0, 0, log_std, log_std]))
    learner.update()
    _, logp = squash(*torch.tensor([0.0, log_std]).double(), learner.noise[1])
    assert learner.ac.log_alpha.item() == pytest.approx(math.log(0.3) + 0.01 * (logp.mean().item() - 2))
    assert (learner.ac.log_alpha.exp().item() > 0.3) == rises


# The replay buffer


def fill(script, envs, size, num_steps):
    """Steps `envs` by a policy whose actions are (10 observation + environment, time); returns buffer and (ep_rets, ep_lens)."""
    times = iter(range(10_000))
    ac = SimpleNamespace(
        sample=lambda obs: torch.tensor([[10 * x + i, t] for t in [next(times)] for i, (x,) in enumerate(obs.tolist())]).float(),
        to_env=lambda act: np.zeros((len(envs), 2), np.float32),
    )
    buffer = script.ReplayBuffer(envs, size, np.random.default_rng(0))
    first, second = (buffer.collect(ac, n * len(envs), 0) for n in (num_steps // 2, num_steps))  # episodes go on across calls
    return buffer, tuple(a + b for a, b in zip(first, second, strict=True))


def stored(buffer, draws=3000):
    """Counter of the transitions (obs, act, rew, next_obs, terminated) that sampling ever shows."""
    torch.manual_seed(0)
    batch = buffer.sample(draws, torch.device("cpu"))
    assert [tuple(x.shape) for x in batch] == [(draws, 1), (draws, 2), (draws,), (draws, 1), (draws,)]
    table = np.column_stack([x.numpy().reshape(draws, -1) for x in batch])
    return Counter(map(tuple, table.tolist()))


def transitions(env, length, num_steps, terminates=True):
    """What Count shows in episodes of `length` steps."""
    steps = [(t, t % length) for t in range(num_steps)]
    return [(k, 10 * k + env, t, k + 1, k + 1, int(terminates and k + 1 == length)) for t, k in steps]


@pytest.mark.parametrize("max_ep_len, num_steps", [*((None, n) for n in (1, 7, 20, 21, 33)), (2, 7), (3, 6)])
def test_the_last_transitions_are_drawn_equally_often(script, max_ep_len, num_steps):
    """Of 20 places; empty ones are never drawn, and no transition leads from an episode's end into the next one. Count terminates
    after 3 steps, at a limit of 3 too; one of 2 truncates, and the last observation is the 2 that was seen."""
    buffer, log = fill(script, [make_env("Count-v0", max_ep_len)], 20, num_steps)
    counts, n, length = stored(buffer, 20_000), min(num_steps, 20), max_ep_len or 3
    assert set(counts) == set(transitions(0, length, num_steps, terminates=length == 3)[-20:])
    assert ((np.array([*counts.values()]) - 20_000 / n) ** 2 / (20_000 / n)).sum() < 44  # 99.9% of chi squared for n = 20
    assert log == ([sum(range(length + 1))] * (num_steps // length), [length] * (num_steps // length))


def test_environments_out_of_phase(script):
    """Episodes of 3 and of 2 steps side by side; the ring of 9 is no multiple of their number."""
    buffer, (ep_rets, ep_lens) = fill(script, [make_env("Count-v0", length=3), make_env("Count-v0", length=2)], 9, 7)
    both = [x for pair in zip(transitions(0, 3, 7), transitions(1, 2, 7), strict=True) for x in pair]
    assert set(stored(buffer)) == set(both[-9:])
    assert (ep_rets, ep_lens) == ([3, 6, 3, 6, 3], [2, 3, 2, 3, 2]) and buffer.steps == 14


# Actions


def acting(script, **changes):
    """An ActorCritic whose policy says (.5, -.25) within -1 and 1, before any noise, for every observation."""
    torch.manual_seed(0)
    ac = script.ActorCritic(Box(-np.inf, np.inf, (1,)), Box(LOW, HIGH), small(script, "unused", **changes))
    with torch.no_grad():
        ac.pi.net[-1].weight.zero_()
        ac.pi.net[-1].bias[:2] = torch.atanh(torch.tensor([0.5, -0.25]))
    return ac


def assert_independent(x):
    """The columns of x (n, 2), and each with itself a row later, are uncorrelated."""
    table = np.column_stack([x[1:], x[:-1]])
    assert np.abs(np.corrcoef(table.T) - np.eye(4)).max() < 4 / math.sqrt(len(x))


def test_first_actions_are_uniform_in_the_whole_box(script):
    env, ac = make_env("Asymmetric-v0"), acting(script)
    ac.sample = None  # the policy is not asked
    script.ReplayBuffer([env], 10, np.random.default_rng(0)).collect(ac, 4000, 4000)
    act = np.array(env.actions)
    for i in range(2):
        counts, _ = np.histogram(act[:, i], 20, (LOW[i], HIGH[i]))
        assert counts.sum() == 4000 and ((counts - 200) ** 2 / 200).sum() < 44  # 99.9% of chi squared
    assert_independent(act)


def test_policy_takes_over_after_the_first_actions(script, monkeypatch):
    """8 steps of two ranks with 2 environments each, in two calls: 2 actions of each are random, and the others the policy's."""
    monkeypatch.setattr(mpi, "size", lambda: 2)
    envs, ac = [make_env("Asymmetric-v0") for _ in range(2)], acting(script)
    ac.sample = lambda obs: torch.tensor([[0.5, -0.25]] * len(obs))
    buffer = script.ReplayBuffer(envs, 100, np.random.default_rng(0))
    for until in (4, 24):
        buffer.collect(ac, until, start_steps=8)
    for env in envs:
        from_policy = [act == pytest.approx([2.0, 0.1875]) for act in env.actions]
        assert from_policy == [False] * 2 + [True] * 4


@pytest.mark.parametrize("start_steps", [0, 20])
def test_buffer_holds_the_action_within_minus_one_and_one(script, start_steps):
    """Random or the policy's own, with its noise: what the environment got, in units of its box."""
    env, ac = make_env("Asymmetric-v0"), acting(script)
    buffer = script.ReplayBuffer([env], 20, np.random.default_rng(0))
    buffer.collect(ac, 20, start_steps)
    act = np.unique(buffer.sample(2000, torch.device("cpu")).act.numpy(), axis=0)
    expected = (np.array(env.actions) - MIDDLE) / HALF_WIDTH
    assert act == pytest.approx(expected[np.argsort(expected[:, 0])], abs=1e-6)


@pytest.mark.parametrize("script", [ddpg, td3])
def test_noise_of_behaviour_is_in_half_widths(script):
    act = acting(script, act_noise=0.1).act(np.zeros((20_000, 1)))
    assert act.shape == (20_000, 2) and act.dtype == np.float32
    assert act.mean(0) == pytest.approx([2.0, 0.1875], abs=0.01)
    assert act.std(0) == pytest.approx(0.1 * HALF_WIDTH, rel=0.03)
    assert_independent(act)


def test_sac_squashed_gaussian_of_behaviour():
    ac = acting(sac)
    with torch.no_grad():
        ac.pi.net[-1].bias[2:] = torch.tensor([0.5, 0.1]).log()
    u = np.arctanh(ac.sample(np.zeros((20_000, 1))).numpy())
    assert u.mean(0) == pytest.approx(np.arctanh([0.5, -0.25]), abs=0.02) and u.std(0) == pytest.approx([0.5, 0.1], rel=0.03)
    assert_independent(u)


def test_actions_stay_inside_the_box_under_any_noise(script):
    ac, obs = acting(script, **({} if script is sac else dict(act_noise=5.0))), np.zeros((1000, 1))
    if script is sac:
        ac.pi.net[-1].bias.data[2:] = 2.0
    act = ac.act(obs)
    assert all(ac.act_space.contains(row) for row in act)
    assert (act.min(0) < LOW + 0.01).all() and (act.max(0) > HIGH - 0.01).all()
    assert ac.sample(obs).abs().max() <= 1


def test_deterministic_actions_have_no_noise(script):
    learner = Learner(script)
    learner.ac.float()
    obs = np.random.default_rng(0).normal(size=(20, 3))
    act = forward(learner.ac.pi.net, torch.as_tensor(obs).float())[:, :2].tanh().detach().numpy()
    assert learner.ac.act(obs, deterministic=True) == pytest.approx(MIDDLE + HALF_WIDTH * act, abs=1e-5)


# Targets that follow, and the delayed policy


def test_targets_move_towards_the_updated_networks(script):
    learner = Learner(script, pi_lr=0.1, q_lr=0.1)
    before = weights(learner.targ)
    learner.update()
    online = weights(learner.ac)
    for name, p in learner.targ.named_parameters():
        assert torch.allclose(p, 0.75 * before[name] + 0.25 * online[name])


def test_networks_of_a_run(script, tmp_path, monkeypatch):
    """Targets start equal. TD3's actor and targets change in every third update, the critics and what the other scripts have in
    all, each by its learning rate. The targets are tested, saved and returned, and the latest policy acts."""
    update, test, collect = script.update, script.test, script.ReplayBuffer.collect
    calls, rates, targets, actors = [], set(), [], []

    def spy(ac, targ, *rest):
        targets.append(targ)
        names = {p: name for name, p in ac.named_parameters()}
        groups = [group for optimizer in rest[:2] for group in optimizer.param_groups]
        rates.update((names[p], group["lr"], group["weight_decay"]) for group in groups for p in group["params"])
        nets = [(net, weights(net)) for net in (ac, targ)]
        metrics = update(ac, targ, *rest)
        moved = [{name for name, p in net.named_parameters() if not torch.equal(p, old[name])} for net, old in nets]
        calls.append([*(old for _, old in nets), *(changes - {"log_alpha"} for changes in moved)])
        return metrics

    monkeypatch.setattr(script, "update", spy)
    monkeypatch.setattr(script, "test", lambda *args: targets.append(args[0]) or test(*args))
    monkeypatch.setattr(script.ReplayBuffer, "collect", lambda *args: actors.append(args[1]) or collect(*args))
    options = {ddpg: dict(q_weight_decay=0.1), td3: dict(policy_delay=3), sac: dict(autotune=True)}[script]
    trained = script.train(small(script, tmp_path, exp_name="x", total_steps=200, pi_lr=2e-3, q_lr=3e-3, **options))
    assert all(targ is trained for targ in targets) and not any(ac is trained for ac in actors)
    saved = torch.load(tmp_path / "x/x_s0/model.pt", weights_only=True)
    assert all(torch.equal(saved[name], p) for name, p in trained.named_parameters())
    ac, targ, _, _ = calls[0]
    assert len(targets) > len(calls) > 90 and len(actors) > 0
    assert all(torch.equal(p, ac[name]) for name, p in targ.items())
    assert rates == {(name, *((3e-3, 0.1 * (script is ddpg)) if name.startswith("q") else (2e-3, 0))) for name in ac}
    first = next(k for k, call in enumerate(calls) if call[3])  # which update it is does not matter
    assert first < (3 if script is td3 else 1)
    for k, (ac, _, changes, targ_changes) in enumerate(calls):
        turn = script is not td3 or k % 3 == first
        assert changes == {name for name in ac if name.startswith("q.") or turn and name.startswith("pi.")}
        assert targ_changes == (changes if turn else set())


# Whole runs


@pytest.mark.parametrize("update_every, num_envs", [(7, 1), (7, 4), (1, 4)])
def test_as_many_updates_as_steps(script, tmp_path, monkeypatch, update_every, num_envs):
    """After `update_after` steps every block of steps is followed by as many updates."""
    store, update, steps, updates = script.ReplayBuffer.store, script.update, [], Counter()

    def spy_update(*args):
        updates[len(steps)] += 1
        return update(*args)

    monkeypatch.setattr(script.ReplayBuffer, "store", lambda *args: steps.append(1) or store(*args))
    monkeypatch.setattr(script, "update", spy_update)
    options = dict(update_every=update_every, num_envs=num_envs, total_steps=208, steps_per_epoch=104)
    script.train(small(script, tmp_path, env_id="Count-v0", exp_name="x", **options))
    assert len(steps) == 208 and rows(tmp_path / "x/x_s0")[-1]["TotalEnvInteracts"] == "208"
    assert all(0 < n <= math.ceil(update_every / num_envs) * num_envs for n in updates.values())
    first = min(updates)
    assert first - updates[first] < 100 <= first and max(updates) == 208
    ends = sorted(updates)
    assert all(updates[end] == end - last for last, end in zip(ends[:-1], ends[1:], strict=True))


def test_test_episodes_are_deterministic_counted_right_and_shared_by_the_ranks(script, monkeypatch):
    class Policy:
        def act(self, obs, deterministic=False):
            assert deterministic and obs.shape == (1, 1)
            return np.zeros((1, 2), np.float32)

    assert script.test(Policy(), make_env("Count-v0"), 2) == ([6.0, 6.0], [3, 3])
    assert script.test(Policy(), make_env("Count-v0", 2), 1) == ([3.0], [2])
    assert script.test(Policy(), make_env("Count-v0"), 0) == ([], [])
    monkeypatch.setattr(mpi, "size", lambda: 2)
    for rank, share in enumerate([2, 1]):
        monkeypatch.setattr(mpi, "rank", lambda rank=rank: rank)
        assert len(script.test(Policy(), make_env("Count-v0"), 3)[0]) == share


def test_test_episodes_leave_the_training_alone(script, tmp_path):
    tables, networks = [], []
    for n in (0, 3):
        networks.append(script.train(small(script, tmp_path, exp_name=f"x{n}", num_test_episodes=n)))
        tables.append(rows(tmp_path / f"x{n}/x{n}_s0"))
    columns = {name for name in tables[0][0] if "Test" in name}
    assert {row[name] for row in tables[0] for name in columns} == {""}
    assert all(float(row["MinTestEpRet"]) <= float(row["AverageTestEpRet"]) < 0 for row in tables[1])
    assert {row["AverageTestEpLen"] for row in tables[1]} == {"50.0"}
    without = [[{name: row[name] for name in row if name not in columns} for row in table] for table in tables]
    assert without[0] == without[1] and len(without[0]) == 2
    assert all(torch.equal(a, b) for a, b in zip(*(ac.parameters() for ac in networks), strict=True))


def test_rows_before_the_first_update_are_blank(script, tmp_path, monkeypatch):
    init = script.ReplayBuffer.__init__  # a copied script may count steps in NumPy's integers
    monkeypatch.setattr(script.ReplayBuffer, "__init__", lambda self, *x: init(self, *x) or setattr(self, "steps", np.int64(0)))
    options = dict(total_steps=200, steps_per_epoch=100, update_after=150)
    script.train(small(script, tmp_path, exp_name="x", **options))
    first, second = rows(tmp_path / "x/x_s0")
    assert [first["TotalEnvInteracts"], second["TotalEnvInteracts"]] == ["100", "200"]
    columns = [name for name in first if name.startswith("Loss") or "Vals" in name]
    assert {"LossPi", "LossQ"} < set(columns) and {first[name] for name in columns} == {""}
    assert all(math.isfinite(float(second[name])) for name in columns)
