"""The exercises say what is wrong with typical wrong answers, and nothing against right ones."""

import re
import sys

import pytest
import torch
from conftest import ROOT, rows, run

FOLDER = ROOT / "docs/exercises"
sys.path.append(str(FOLDER))
from check import difference  # noqa: E402

LOGP = "return (-((act - mu) / log_std.exp()) ** 2 / 2 - log_std - 0.5 * torch.tensor(2 * torch.pi).log()).sum(-1)"
ACTOR = """self.discrete = isinstance(act_space, Discrete)
        outputs = int(act_space.n) if self.discrete else act_space.shape[0]
        self.net = ppo.mlp([obs_dim, *hidden_sizes, outputs], activation, out_gain=0.01)
        if not self.discrete:
            self.log_std = nn.Parameter(init_log_std * torch.ones(outputs))
    def forward(self, obs):
        if self.discrete:
            return Categorical(logits=self.net(obs))
        return Independent(Normal(self.net(obs), self.log_std.exp()), 1)"""
UPDATE = """with torch.no_grad():
        act = ac_targ.pi(batch.next_obs)
        noise = (args.target_noise * torch.randn_like(act)).clamp(-args.noise_clip, args.noise_clip)
        act = (act + noise).clamp(-1, 1)
        next_q = torch.min(ac_targ.q[0](batch.next_obs, act), ac_targ.q[1](batch.next_obs, act))
        target = batch.rew + args.gamma * (1 - batch.terminated) * next_q
    loss_q = sum(((q(batch.obs, batch.act) - target) ** 2).mean() for q in ac.q)
    gradient_step(q_optimizer, loss_q)
    if policy_turn:
        gradient_step(pi_optimizer, -ac.q[0](batch.obs, ac.pi(batch.obs)).mean())
        polyak_average(ac, ac_targ, args.polyak)
    return dict(LossQ=loss_q.item())"""
GAE = """adv, last = torch.zeros_like(rew), torch.zeros_like(rew[0])
    for t in reversed(range(len(rew))):
        delta = rew[t] + gamma * (1 - terminated[t]) * next_val[t] - val[t]
        adv[t] = last = delta + gamma * lam * (1 - done[t]) * last
    return adv"""
CG = """x, r, d = torch.zeros_like(b), b.clone(), b.clone()
    for _ in range(iters):
        if r @ r < 1e-20:
            break
        hd = product(d)
        alpha = (r @ r) / (d @ hd)
        x, new = x + alpha * d, r - alpha * hd
        r, d = new, new + (new @ new) / (r @ r) * d
    return x"""
SQUASHED = """u = mu + log_std.exp() * noise
    normal = -noise ** 2 / 2 - log_std - 0.5 * torch.tensor(2 * torch.pi).log()
    return (normal - 2 * (torch.tensor(2.0).log() - u - torch.nn.functional.softplus(-2 * u))).sum(-1)"""
RIGHT = dict(gaussian_logp=LOGP, ppo_policy=ACTOR, td3_update=UPDATE, gae=GAE, conjugate_gradient=CG, squashed_gaussian=SQUASHED)
TO_DO = r'raise NotImplementedError\("[^"]*"\)(\n\n    def forward.*?raise NotImplementedError\("[^"]*"\))?'


def execute(name, capsys, monkeypatch, *argv, old=TO_DO, new=None):
    """Run an exercise as a program, with `new` in the place of what is to be written. Returns what it says."""
    path = FOLDER / f"{name}.py"
    source = path.read_text()
    if new is not None:
        source, count = re.subn(old, lambda _: new, source, flags=re.S)
        assert count == 1
    monkeypatch.setattr(sys, "argv", [str(path), *argv])
    try:
        exec(compile(source, str(path), "exec"), {"__name__": "__main__", "__file__": str(path)})
    except SystemExit as end:
        return capsys.readouterr().out + str(end.code)
    return capsys.readouterr().out


@pytest.mark.parametrize("name", RIGHT)
def test_right_answers_are_right(name, capsys, monkeypatch):
    assert execute(name, capsys, monkeypatch).startswith("to do: write")
    ours = execute(name, capsys, monkeypatch, "--use-soln")
    assert re.fullmatch(r"(right: .*\n)+", ours)
    assert execute(name, capsys, monkeypatch, new=RIGHT[name]) == ours


WRONG = [
    ("gaussian_logp", ".sum(-1)", "", "one action, at its mean.* has the shape (1, 1), not (1,): squeeze"),
    ("gaussian_logp", ".sum(-1)", ".mean(-1)", "three actions of two dimensions.* is "),
    ("gaussian_logp", ".sum(-1)", ".sum(0)", "three actions of two.* has the shape (2,), not (3,): is it summed over"),
    ("gaussian_logp", ".sum(-1)", ".sum()", "one action, at its mean.* has the shape (), not (1,): too much is summed"),
    ("gaussian_logp", "return (-", "return -(-", "at its mean.* has the wrong sign"),
    ("gaussian_logp", " - 0.5 * torch.tensor(2 * torch.pi).log()", "", "at its mean.* is 0, not -0.9189.*act = [[0.5]]"),
    ("gaussian_logp", "return ", "", "the result is None: is there a return"),
    ("gaussian_logp", "return (", "return mu.sub_(1).sum() + (", "its input mu was changed"),
    ("ppo_policy", "* torch.ones(outputs))", "* torch.ones(outputs), requires_grad=False)", "weights that an optimizer moves is "),
    ("ppo_policy", "init_log_std * torch", "0.0 * torch", "log_std at the start is 0, not -0.5"),
    ("ppo_policy", "Independent(Normal(self.net(obs), self.log_std.exp()), 1)", "Normal(self.net(obs), self.log_std.exp())",
     "actions of one dimension.*log_prob has the shape (4, 1), not (4,): squeeze"),
    ("ppo_policy", "Categorical(logits=", "Categorical(probs=", "discrete actions.*log_prob is "),
    ("td3_update", " * (1 - batch.terminated)", "", "all transitions terminate.*the step of the critic is "),
    ("td3_update", "ac_targ.pi(", "ac.pi(", "none terminates, no noise.*the step of the critic is "),
    ("td3_update", "noise = (args.target_noise", "noise = (0", "case: noise.*the step of the critic is "),
    ("td3_update", ".clamp(-args.noise_clip, args.noise_clip)", "", "noise beyond its clip.*the step of the critic is "),
    ("td3_update", "(act + noise).clamp(-1, 1)", "act + noise", "noise beyond the actions.*the step of the critic is "),
    ("td3_update", "ac.q[0](batch.obs, ac", "ac.q[1](batch.obs, ac", "the policy's turn.*the step of the actor is "),
    ("td3_update", "    polyak_average", "polyak_average", "all transitions terminate.*the step of the target actor is "),
    ("td3_update", "(q(batch.obs, batch.act) -", "(q(batch.obs, batch.act)[:, None] -", "terminate.*step of the critic is "),
    ("gae", "(1 - terminated[t])", "(1 - done[t])", "case: the second step is truncated"),
    ("gae", " * (1 - terminated[t])", "", "case: the second step terminates, lambda 0"),
    ("gae", " * (1 - done[t])", "", "case: the second step terminates\\."),
    ("gae", " - val[t]", "", "case: lambda 0, no episode ends"),
    ("gae", "gamma * lam *", "lam *", "case: lambda 1, no episode ends"),
    ("conjugate_gradient", "for _ in range(iters)", "for _ in range(1)", "case: two iterations"),
    ("conjugate_gradient", "        if r @ r < 1e-20:\n            break\n", "", "nan"),
    ("squashed_gaussian", "torch.nn.functional.softplus(-2 * u)", "(1 + (-2 * u).exp()).log()", "case: u = 12.* is inf|nan"),
    ("squashed_gaussian", "normal - 2", "normal + 2", "case: u = 1 = mu"),
    ("squashed_gaussian", " - log_std", "", "case: a standard deviation of e"),
]


@pytest.mark.parametrize("name, old, new, said", WRONG, ids=[f"{name}-{i}" for i, (name, *_) in enumerate(WRONG)])
def test_wrong_answers_are_explained(name, old, new, said, capsys, monkeypatch):
    assert RIGHT[name].count(old) == 1
    try:
        text = execute(name, capsys, monkeypatch, new=RIGHT[name].replace(old, new))
    except (RuntimeError, ValueError) as error:  # of PyTorch, with a traceback into the answer
        text = str(error)
    pattern = re.sub(r"[()\[\]]", lambda bracket: "\\" + bracket[0], said)
    assert re.search(pattern, text, re.S), text


def test_shapes_that_broadcast_are_explained():
    assert difference(torch.zeros(4, 4), torch.zeros(4)).endswith("not (4,): (B,) and (B, 1) were broadcast to (B, B)")
    assert difference(torch.zeros(4, 2), torch.zeros(4)).endswith("something is not summed")
    assert difference(0.0, torch.zeros(())) == "is of type float, not a tensor"
    assert difference(torch.zeros(3) + 1e-7, torch.zeros(3)) is None


def test_the_second_ddpg_is_mended_by_one_change(capsys, monkeypatch):
    assert "Wrong in the case: a batch" in execute("ddpg_two", capsys, monkeypatch)
    assert execute("ddpg_two", capsys, monkeypatch, "--use-soln") == "right: a batch\n"
    mended = dict(old=r"act\], -1\)\)", new="act], -1)).squeeze(-1)")
    assert execute("ddpg_two", capsys, monkeypatch, **mended) == "right: a batch\n"


@pytest.mark.parametrize("name, env_id, steps", [
    ("ppo_policy", "CartPole-v1", 2000), ("td3_update", "InvertedPendulum-v4", 1050), ("ddpg_two", "InvertedPendulum-v4", 1050),
])  # fmt: skip
def test_exercises_train(name, env_id, steps, capsys, monkeypatch, tmp_path):
    """For a short time, with a right answer and with ours: they write the same losses; the second DDPG does not."""
    monkeypatch.chdir(tmp_path)
    argv, losses = ["--train", env_id, "--total-steps", steps], []
    for options, answer in [([], RIGHT.get(name)), (["--use-soln"], None)]:
        assert f"{env_id}: " in execute(name, capsys, monkeypatch, *map(str, argv), *options, new=answer)
    for progress in (tmp_path / "data").rglob("progress.txt"):
        losses += [row["LossQ" if "LossQ" in row else "LossPi"] for row in rows(progress.parent)]
    assert len(losses) == 2 and losses[0] and (losses[0] == losses[1]) == (name in RIGHT)


def test_runs_as_a_program(capsys, monkeypatch, tmp_path):
    """From any directory; and what cannot be trained is refused."""
    done = run(sys.executable, FOLDER / "gae.py", "--use-soln", cwd=tmp_path)
    assert done.stdout.endswith("right: three environments\n"), done.stderr
    assert execute("gae", capsys, monkeypatch, "--train", "CartPole-v1") == "this exercise has nothing to train"
