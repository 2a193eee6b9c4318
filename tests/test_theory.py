"""The claims of docs/policy_gradient.md, as exact sums over all trajectories of a small MDP, and those of docs/simple_pg.md.

The MDP has 2 states, 2 actions and 3 steps, so 128 trajectories. The policy is the network of vpg.py, in float64."""

import copy
import re
import sys
from types import SimpleNamespace

import gymnasium as gym
import pytest
import torch
from conftest import ROOT
from torch import nn
from torch.distributions import MultivariateNormal, Normal, kl_divergence
from torch.nn.utils import parameters_to_vector

import ppo
import trpo
import vpg

sys.path.append(str(ROOT / "docs"))
import simple_pg  # noqa: E402

S, A, T = 2, 2, 3
torch.manual_seed(0)
START = torch.tensor([0.3, 0.7]).double()
P, R = torch.softmax(torch.randn(S, A, S).double(), -1), torch.randn(S, A, S).double()  # of obs, act, next_obs
EYE = torch.eye(S).double()  # state s is shown as the observation EYE[s]
CHOICES = torch.cartesian_prod(*[torch.arange(2)] * (2 * T + 1)).T
OBS, NEXT, ACT = CHOICES[:T], CHOICES[1 : T + 1], CHOICES[T + 1 :]  # (T, N) each: step t of trajectory n
N = OBS.shape[1]
REW = R[OBS, ACT, NEXT]  # (T, N)
RET, TO_GO = REW.sum(0).expand(T, N), REW.flip(0).cumsum(0).flip(0)
ZERO, LAST = torch.zeros(T, N).double(), torch.zeros(T, N).double()
LAST[-1] = 1


def make_actor(seed):
    torch.manual_seed(seed)
    actor = vpg.Actor(S, gym.spaces.Discrete(A), (4,), nn.Tanh, None).double()
    for p in actor.parameters():
        nn.init.normal_(p)
    return actor


ACTOR, OTHER = make_actor(1), make_actor(2)
PARAMS = list(ACTOR.parameters())


def logp(actor=ACTOR):
    """log pi(act|obs) of each step: (T, N)"""
    return actor(EYE[OBS]).log_prob(ACT)


def probability(actor=ACTOR):
    """P(tau) of each trajectory: (N,)"""
    return START[OBS[0]] * (logp(actor).exp() * P[OBS, ACT, NEXT]).prod(0)


def values(actor=ACTOR, discount=1.0):
    """V_t (T + 1, S) and Q_t (T, S, A) with T - t steps to go, by dynamic programming."""
    pi, v, q = actor(EYE).probs, [torch.zeros(S).double()], []
    for _ in range(T):
        q.insert(0, (P * (R + discount * v[0])).sum(-1))
        v.insert(0, (pi * q[0]).sum(-1))
    return torch.stack(v), torch.stack(q)


def performance(actor=ACTOR, discount=1.0):
    return START @ values(actor, discount)[0][0]


def grad(output, actor=ACTOR):
    return trpo.flat_grad(output, list(actor.parameters()))


def estimate(weight):
    """E[sum_t grad log pi(act_t|obs_t) weight_t]: the gradient of VPG's loss, each trajectory counted by its probability."""
    return -T * grad(vpg.policy_loss(logp(), N * probability().detach() * weight))


EXACT = grad(performance())
V, Q = (x.detach() for x in values())
STEP = torch.arange(T).unsqueeze(-1)  # (T, 1)
VAL, NEXT_VAL, Q_VAL = V[STEP, OBS], V[STEP + 1, NEXT], Q[STEP, OBS, ACT]  # (T, N)
SCORES = torch.stack([grad(ACTOR(EYE[s]).log_prob(torch.tensor(a))) for s in range(S) for a in range(A)]).view(S, A, -1)


def same(a, b):
    return torch.allclose(a, b, rtol=1e-9, atol=1e-12)


def test_probabilities_of_the_trajectories():
    assert probability().sum().item() == pytest.approx(1)
    assert (probability() @ RET[0]).item() == pytest.approx(performance().item())


def test_gradient_of_log_probability_is_the_sum_of_the_policys():
    """The environment's terms drop out, for each trajectory: grad P = P sum_t grad log pi."""
    for n in range(N):
        assert same(grad(probability()[n].log()), SCORES[OBS[:, n], ACT[:, n]].sum(0))
    assert not same(grad(probability()[0]), SCORES[OBS[:, 0], ACT[:, 0]].sum(0))  # without the factor P


def test_expected_score_is_zero():
    """In each state, under the policy's own actions; not under those of another one."""
    assert same((ACTOR(EYE).probs.unsqueeze(-1) * SCORES).sum(1), torch.zeros(S, SCORES.shape[-1]).double())
    assert (OTHER(EYE).probs.unsqueeze(-1) * SCORES).sum(1).abs().max() > 0.01


@pytest.mark.parametrize("t, k", [(t, k) for t in range(T) for k in range(T)])
def test_past_rewards_vanish(t, k):
    """The action of step t with the reward of step k."""
    weight = ZERO.clone()
    weight[t] = REW[k]
    assert same(estimate(weight), torch.zeros_like(EXACT)) == (k < t)


def test_what_may_weigh_the_score():
    """The return, the reward to go, also minus any function of step and observation, Q, the advantage."""
    baseline, of_the_action_too = torch.randn(T, S).double()[STEP, OBS], torch.randn(T, S, A).double()[STEP, OBS, ACT]
    for weight in (RET, TO_GO, TO_GO - baseline, Q_VAL, Q_VAL - VAL):
        assert same(estimate(weight), EXACT)
    # the step's own reward belongs to it; the last: as if 3 steps were to go at each
    for weight in (RET.abs(), TO_GO - REW, TO_GO - of_the_action_too, Q_VAL[[0, 0, 0]]):
        assert not same(estimate(weight), EXACT)


def test_variances_on_the_page():
    """Fewer terms, less variance here. Each number stands on the page as this computes it."""
    forms = {"return": RET, "reward to go": TO_GO, "reward to go minus V": TO_GO - VAL, "Q": Q_VAL, "Q minus V": Q_VAL - VAL}
    found, page = {}, (ROOT / "docs/policy_gradient.md").read_text()
    for name, weight in forms.items():
        sums = (SCORES[OBS, ACT] * weight.unsqueeze(-1)).sum(0)  # (N, P): sum_t grad log pi weight_t of each trajectory
        found[name] = (probability().detach() @ (sums - estimate(weight)).square().sum(-1)).item()  # summed over the parameters
        assert f"| {name} | {found[name]:.3f} |" in page, (name, found[name])
    assert found["return"] > found["reward to go"] > found["reward to go minus V"] > found["Q minus V"]


@pytest.mark.parametrize("lam", [0.0, 0.5, 1.0])
def test_gae_with_the_true_values(lam):
    """For every lambda the policy gradient; with other values only for lambda 1."""
    assert same(estimate(vpg.gae(REW, VAL, NEXT_VAL, LAST, LAST, 1.0, lam)), EXACT)
    wrong = torch.cat([torch.randn(T, S), torch.zeros(1, S)]).double()  # nothing follows the last step
    adv = vpg.gae(REW, wrong[STEP, OBS], wrong[STEP + 1, NEXT], LAST, LAST, 1.0, lam)
    assert same(estimate(adv), EXACT) == (lam == 1)


def test_gae_of_truncated_episodes():
    """Cut after two steps, the value of what came next stands for the third; as a termination it would be lost."""
    two, cut = slice(2), LAST[-2:]
    first_two = torch.cat([Q_VAL[two], ZERO[:1]])
    adv, lost = (vpg.gae(REW[two], VAL[two], NEXT_VAL[two], ends, cut, 1.0, 0.5) for ends in (ZERO[two], cut))
    assert same(estimate(torch.cat([adv, ZERO[:1]])), estimate(first_two))
    assert not same(estimate(torch.cat([lost, ZERO[:1]])), estimate(first_two))


def test_discount():
    """grad of the discounted return has gamma^t before the advantage of step t. The files leave it out, as all do."""
    v, q = (x.detach() for x in values(discount=0.5))
    adv = (q[STEP, OBS, ACT] - v[STEP, OBS]).expand(T, N)
    exact = grad(performance(discount=0.5))
    assert same(estimate(0.5**STEP * adv), exact)
    assert not same(estimate(adv), exact)


def test_the_loss_does_not_measure_performance():
    """On one batch, the first step helps; going on with the same batch, the loss falls and so does the return."""
    actor = copy.deepcopy(ACTOR)
    data = N * probability().detach() * (TO_GO - 3)  # a baseline, so the same gradient
    optimizer = torch.optim.SGD(actor.parameters(), 0.04)
    losses, returns = [], []
    for _ in range(100):
        losses.append(vpg.policy_loss(logp(actor), data))
        returns.append(performance(actor).item())
        optimizer.zero_grad()
        losses[-1].backward()
        optimizer.step()
    assert returns[1] > returns[0]
    assert losses[-1] < losses[0] - 5 and returns[-1] < returns[0] - 0.1


def test_performance_difference():
    """J(pi') - J(pi) = E'[sum_t A(obs_t, act_t)] over the trajectories of pi'; over the states of pi it is only close."""
    difference = performance(OTHER) - performance()
    assert same((probability(OTHER) * (Q_VAL - VAL).sum(0)).sum(), difference)
    ratio = torch.exp(logp(OTHER) - logp())
    assert not same((probability() * (ratio * (Q_VAL - VAL)).sum(0)).sum(), difference)


@pytest.mark.parametrize("loss", [trpo.policy_loss, lambda *x: ppo.policy_loss(*x, clip_ratio=0.2)], ids=["trpo", "ppo"])
def test_gradient_of_the_surrogate_is_the_policy_gradient(loss):
    """At theta_old, TRPO's and PPO's; not at other parameters."""
    data = N * probability().detach() * (Q_VAL - VAL)
    assert same(-T * grad(loss(logp(), logp().detach(), data)), EXACT)
    there = -T * grad(loss(logp(OTHER), logp().detach(), data), OTHER)
    assert not same(there, grad(performance(OTHER), OTHER))


def mean_kl(actor):
    """KL(pi_old | pi), averaged over the states, and the Fisher matrix of `actor`: E[score score^T]."""
    with torch.no_grad():
        pi_old = ACTOR(EYE)
    kl = kl_divergence(pi_old, actor(EYE)).mean()
    score = torch.stack([grad(actor(EYE[s]).log_prob(torch.tensor(a)), actor) for s in range(S) for a in range(A)])
    return kl, score.T @ (actor(EYE).probs.detach().flatten().unsqueeze(-1) / S * score)


def hessian(kl, actor, damping=0.0):
    product = trpo.fisher_vector_product(kl, list(actor.parameters()), damping)
    return torch.stack([product(v) for v in torch.eye(SCORES.shape[-1]).double()])


def test_hessian_of_kl_is_the_fisher_matrix():
    """At theta_old, where KL and its gradient are 0; not at other parameters."""
    kl, fisher = mean_kl(ACTOR)
    assert kl.abs() < 1e-12 and trpo.flat_grad(kl, PARAMS, retain_graph=True).abs().max() < 1e-12
    assert same(hessian(kl, ACTOR), fisher)
    assert same(hessian(kl, ACTOR, damping=0.1), fisher + 0.1 * torch.eye(len(fisher)).double())
    kl, fisher = mean_kl(OTHER)
    assert not same(hessian(kl, OTHER), fisher)


def step_of(delta, damping):
    """H, and the step sqrt(2 delta / x H x) x with H x = EXACT."""
    h = mean_kl(ACTOR)[1] + damping * torch.eye(SCORES.shape[-1]).double()
    x = torch.linalg.solve(h, EXACT)
    return h, torch.sqrt(2 * delta / (x @ h @ x)) * x


def test_step_is_the_best_one_within_delta():
    """Its quadratic KL is delta, and no other step with that KL promises more; the gradient's own direction promises less."""
    h, step = step_of(0.01, damping=1e-3)
    assert (step @ h @ step / 2).item() == pytest.approx(0.01)
    others = torch.cat([torch.randn(1000, len(step)).double(), EXACT.unsqueeze(0), step.unsqueeze(0)])
    others = others * torch.sqrt(2 * 0.01 / (others @ h * others).sum(-1, keepdim=True))
    gains = others @ EXACT
    assert gains.argmax() == 1001
    assert same(gains[1001], torch.sqrt(2 * 0.01 * EXACT @ torch.linalg.solve(h, EXACT)))
    assert gains[1000] < 0.95 * gains[1001]


def test_update_policy_takes_this_step():
    """The natural gradient of trpo.py, on a batch of all pairs of state and action; adv is such that its g is EXACT."""
    actor = copy.deepcopy(ACTOR)
    obs, act = EYE.repeat_interleave(A, 0), torch.arange(A).repeat(S)
    weight = probability().detach() * (Q_VAL - VAL)
    adv = S * A * torch.zeros(S, A).double().index_put((OBS, ACT), weight, accumulate=True).flatten()
    batch = SimpleNamespace(obs=obs, act=act, logp=ACTOR(obs).log_prob(act).detach())
    args = SimpleNamespace(delta=1e-6, damping_coeff=1e-3, cg_iters=50, backtrack_iters=1, backtrack_coeff=0.8, algo="npg")
    kl, _ = trpo.update_policy(SimpleNamespace(pi=actor), batch, adv, args)
    moved = (parameters_to_vector(actor.parameters()) - parameters_to_vector(PARAMS)).detach()
    h, step = step_of(1e-6, damping=1e-3)
    torch.testing.assert_close(moved, step, rtol=1e-3, atol=1e-8)
    undamped = h - 1e-3 * torch.eye(len(h)).double()
    assert kl == pytest.approx((step @ undamped @ step / 2).item(), rel=0.01)  # the KL itself is that of the quadratic
    assert not torch.allclose(moved, EXACT * moved.norm() / EXACT.norm(), rtol=0.1)


def test_each_claim_names_its_test():
    """On the two pages, in links or between backticks."""
    pages = "".join((ROOT / "docs" / name).read_text() for name in ("policy_gradient.md", "simple_pg.md"))
    tests = {name for name in globals() if name.startswith("test_") and name != "test_each_claim_names_its_test"}
    assert set(re.findall(r"test_\w+(?=`)", pages)) == tests


def test_log_probability_of_several_dimensions_is_a_sum():
    """vpg.py's policy over a Box is the Gaussian in 3 dimensions; a mean over them would have another density."""
    actor, obs, act = vpg.Actor(2, gym.spaces.Box(-1, 1, (3,)), (4,), nn.Tanh, -0.5), torch.randn(5, 2), torch.randn(5, 3)
    expected = MultivariateNormal(actor.net(obs), torch.diag(actor.log_std.exp().square())).log_prob(act)
    torch.testing.assert_close(actor(obs).log_prob(act), expected)
    assert not torch.allclose(Normal(actor.net(obs), actor.log_std.exp()).log_prob(act).mean(-1), expected)


def test_simple_pg_learns_and_its_loss_is_vpgs():
    x, y = torch.randn(2, 9)
    assert torch.equal(simple_pg.policy_loss(x, y), vpg.policy_loss(x, y))
    returns = simple_pg.train(simple_pg.Args(epochs=8, batch_size=500, lr=0.03, reward_to_go=True))
    assert returns[0] < 30 and sum(returns[-3:]) / 3 > 55


def test_simple_pg_with_reward_to_go_has_the_smaller_variance():
    """Of the gradient of one episode on CartPole, over the same 100 episodes."""
    assert simple_pg.weights(torch.tensor([1.0, 2.0, 4.0]), True).tolist() == [7, 6, 4]
    assert simple_pg.weights(torch.tensor([1.0, 2.0, 4.0]), False).tolist() == [7, 7, 7]
    torch.manual_seed(0)
    env = gym.make("CartPole-v1")
    env.reset(seed=0)
    net = nn.Sequential(nn.Linear(4, 32), nn.Tanh(), nn.Linear(32, 2))
    grads = {True: [], False: []}
    for _ in range(100):
        obs, act, rew = simple_pg.run_episode(env, net)
        for to_go, found in grads.items():
            loss = len(rew) * simple_pg.policy_loss(simple_pg.policy(net, obs).log_prob(act), simple_pg.weights(rew, to_go))
            found.append(trpo.flat_grad(loss, list(net.parameters())))
    spread = {to_go: torch.stack(found).var(0).sum().item() for to_go, found in grads.items()}
    assert spread[True] < 0.4 * spread[False]  # 0.19 to 0.26 with other seeds
