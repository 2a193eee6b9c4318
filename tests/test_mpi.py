"""Two ranks are the same algorithm, hold the same parameters, and never hang."""

import pathlib
import sys
import time

import pytest
from conftest import ALL, OFF_POLICY, ON_POLICY, ROOT, rows, run, wait_until

from utils.check import check

SMALL = "--total-steps 800 --steps-per-epoch 200 --num-envs 2 --minibatch-size 50".split()


def mpirun(*command, ranks=2, **options):
    return run("mpirun", "-n", ranks, sys.executable, *command, **options)


@pytest.mark.parametrize("scripts", [ON_POLICY], ids=["vpg-trpo-ppo"])
def test_ranks_hold_the_same_parameters_and_write_once(scripts, tmp_path):
    """Every rank writes a digest of its state; the actions of the ranks differ, their networks do not."""
    program = f"""
import hashlib, importlib, pathlib
from utils import mpi
def check(script):
    rets, collect = [], script.Buffer.collect
    def spy(self, ac):
        result = collect(self, ac)
        rets.append(float(self.act.sum()))
        return result
    script.Buffer.collect = spy
    ac = script.train(script.Args(env_id="Hopper-v4", total_steps=800, steps_per_epoch=200, num_envs=2, minibatch_size=50,
                                  data_dir={str(tmp_path)!r}))
    state = b"".join(tensor.numpy().tobytes() for tensor in ac.state_dict().values())
    path = pathlib.Path({str(tmp_path)!r}, f"{{script.__name__}}{{mpi.rank()}}.txt")
    path.write_text(f"{{hashlib.sha256(state).hexdigest()}} {{rets[0]}}")
for name in {[script.__name__ for script in scripts]}:
    check(importlib.import_module(name))
"""
    done = mpirun("-c", program)
    assert done.returncode == 0, done.stderr
    for script in scripts:
        texts = [(tmp_path / f"{script.__name__}{rank}.txt").read_text() for rank in range(2)]
        (digest, acts), (other_digest, other_acts) = map(str.split, texts)
        assert digest == other_digest and acts != other_acts
        name = f"{script.__name__}_Hopper-v4"
        assert [p.name for p in (tmp_path / name).iterdir()] == [f"{name}_s0"]
        assert [row["TotalEnvInteracts"] for row in rows(tmp_path / name / f"{name}_s0")] == ["200", "400", "600", "800"]


def test_an_average_has_no_gradient():
    """In one process neither: what a loss learns from must not depend on the number of ranks."""
    program = "import torch; from utils import mpi; x = mpi.average(2 * torch.ones(2, requires_grad=True)); mpi.rank() or print(x)"
    for done in run(sys.executable, "-c", program, cwd=ROOT), mpirun("-c", program, cwd=ROOT):
        assert done.stdout == "tensor([2., 2.])\n"


@pytest.mark.parametrize("scripts", [ON_POLICY], ids=["vpg-trpo-ppo"])
def test_averaged_gradient_is_the_whole_batchs_gradient(scripts, tmp_path):
    """Each rank takes its half of a batch; statistics and gradients equal those of the whole."""
    program = f"""
import importlib
import torch, trpo
from gymnasium.spaces import Box
from utils import mpi
def check(script):
    comm, average_gradients = mpi._comm, mpi.average_gradients
    torch.manual_seed(0)
    args = script.Args()
    ac = script.ActorCritic(Box(-1, 1, (3,)), Box(-1, 1, (2,)), args)
    obs, act, rew = torch.randn(10, 4, 3), torch.randn(10, 4, 2), torch.randn(10, 4)
    zero = torch.zeros(10, 4)
    def batch(n):
        logp = ac.pi(obs[:, n]).log_prob(act[:, n]).detach()
        return script.Batch(obs[:, n], act[:, n], logp, rew[:, n], obs[:, n] + 1, zero[:, n], zero[:, n])
    params = list(ac.pi.parameters())
    v = torch.randn(sum(p.numel() for p in params))
    def fisher_vector_product(b):
        with torch.no_grad():
            pi_old = ac.pi(b.obs)
        return trpo.fisher_vector_product(trpo.kl_divergence(pi_old, ac.pi(b.obs)).mean(), params, 0.1)(v)
    def gradient(b, adv, ret):
        logp = ac.pi(b.obs).log_prob(b.act)
        extra = dict(clip_ratio=0.2) if script.__name__ == "ppo" else {{}}
        loss = script.policy_loss(*([logp, adv] if script.__name__ == "vpg" else [logp, b.logp, adv]), **extra)
        ac.zero_grad()
        (loss + script.value_loss(ac.v(b.obs), ret)).backward()
    half = batch(slice(2 * mpi.rank(), 2 * mpi.rank() + 2))
    adv, ret = script.advantages(ac, half, args)
    gradient(half, adv, ret)
    mpi.average_gradients(ac.parameters())
    mine = [p.grad.clone() for p in ac.parameters()]
    stats = script.RunningStats((3,))
    stats.update(half.obs)
    product = fisher_vector_product(half)
    mpi._comm = None  # now alone, with the whole batch
    whole = batch(slice(None))
    adv, ret = script.advantages(ac, whole, args)
    gradient(whole, adv, ret)
    assert all(torch.allclose(a, p.grad, atol=1e-5) for a, p in zip(mine, ac.parameters(), strict=True))
    assert max(g.abs().max() for g in mine) > 1e-3
    assert torch.allclose(product, fisher_vector_product(whole), atol=1e-5)
    assert torch.allclose(stats.mean, obs.mean((0, 1)), atol=1e-6) and stats.count == 40
    assert torch.allclose(stats.std, obs.std((0, 1), correction=0), atol=1e-5)
    print("EQUAL")
    mpi._comm, mpi.average_gradients = comm, average_gradients
for name in {[script.__name__ for script in scripts]}:
    check(importlib.import_module(name))
"""
    done = mpirun("-c", program)
    assert done.stdout.count("EQUAL") == 2 * len(scripts), done.stderr


def test_trpo_line_search_is_one_for_all_ranks(tmp_path):
    """The step is too long for rank 1 alone, whose KL counts double in the line search: both ranks shorten it, equally often."""
    program = f"""
import pathlib, torch, trpo
from gymnasium.spaces import Box
from torch.nn.utils import parameters_to_vector
from utils import mpi
torch.manual_seed(0)
args = trpo.Args()
ac = trpo.ActorCritic(Box(-1, 1, (3,)), Box(-1, 1, (2,)), args)
torch.manual_seed(mpi.rank())
obs, adv, zero = torch.randn(10, 2, 3), torch.randn(10, 2), torch.zeros(10, 2)
act = ac.pi(obs).sample()
batch = trpo.Batch(obs, act, ac.pi(obs).log_prob(act).detach(), zero, obs, zero, zero)
kl_divergence = trpo.kl_divergence
def longer(p, q):
    return kl_divergence(p, q) * (1 if mpi.rank() == 0 or torch.is_grad_enabled() else 2)
trpo.kl_divergence = longer
kl, j = trpo.update_policy(ac, batch, adv, args)
assert j > 0 and 0 < kl <= args.delta, (kl, j)
pathlib.Path({str(tmp_path)!r}, f"{{mpi.rank()}}.txt").write_text(str((kl, j, parameters_to_vector(ac.pi.parameters()).tolist())))
"""
    done = mpirun("-c", program)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "0.txt").read_text() == (tmp_path / "1.txt").read_text()


@pytest.mark.parametrize(
    "raised, words",
    [('ValueError("broken")', ["Traceback", "ValueError: broken"]), ('SystemExit("gone")', ["[rank 1] exits: gone"])],
    ids=["ppo-exception", "ppo-exit"],
)
def test_an_end_on_one_rank_ends_the_job(raised, words, tmp_path):
    program = f"""
import pathlib, ppo, time
from utils import mpi
update = ppo.update
def broken(*args):
    if mpi.rank() == 1:
        pathlib.Path({str(tmp_path / "raised")!r}).write_text(str(time.time()))
        raise {raised}
    return update(*args)
ppo.update = broken
ppo.train(ppo.Args(env_id="CartPole-v1", total_steps=10**6, num_envs=2, data_dir={str(tmp_path)!r}))
"""
    done = mpirun("-c", program, timeout=60)
    raised = float((tmp_path / "raised").read_text())
    assert time.time() - raised < 30 and done.returncode != 0
    assert all(word in done.stderr for word in words)


@ALL
@pytest.mark.parametrize("ranks", [2, 4])
def test_defaults_divide_by_the_usual_numbers_of_ranks(script, ranks):
    check(script.Args(), ranks)


@pytest.mark.parametrize(
    "script, options, tries",
    [
        ("ppo", "--num-envs 3 --steps-per-epoch 300", "2 or 4"),
        ("sac", "--num-envs 3 --steps-per-epoch 9", "2 or 4"),
        ("sac", "--batch-size 33", "32 or 34"),
    ],
)
def test_what_does_not_divide_by_the_ranks_is_refused(script, options, tries, tmp_path):
    done = mpirun(ROOT / f"{script}.py", *options.split(), cwd=tmp_path)
    assert done.returncode != 0 and done.stderr.count("error:") == 1
    assert f"{' '.join(options.split()[:2])}: is not a multiple of the number of ranks, 2; try {tries}" in done.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells a process of its parent's end")
def test_ranks_end_with_their_launcher(tmp_path):
    """Even if it is killed: nothing goes on training that nobody waits for."""
    program = f"""
import os, pathlib, signal, vpg
from utils import mpi
pathlib.Path({str(tmp_path)!r}, f"{{mpi.rank()}}.pid").write_text(str(os.getpid()))
update = vpg.update
def killing(*args):
    if mpi.rank() == 0:
        os.kill(os.getppid(), signal.SIGKILL)
    return update(*args)
vpg.update = killing
vpg.train(vpg.Args(env_id="CartPole-v1", total_steps=10**6, num_envs=2, data_dir={str(tmp_path)!r}))
"""
    assert mpirun("-c", program, timeout=60).returncode != 0

    def ended(rank):
        path = pathlib.Path("/proc", (tmp_path / f"{rank}.pid").read_text(), "status")
        try:
            return "State:\tZ" in path.read_text()  # ended, but nobody has asked for its exit status
        except OSError:
            return True

    wait_until(lambda: all(map(ended, range(2))), 10)
    assert all(map(ended, range(2)))


def test_ranks_are_equal_where_all_hold_the_same_nan(tmp_path):
    program = f"""
import pathlib, torch
from utils import mpi
layer = torch.nn.Linear(2, 2)
layer.weight.data.fill_(float("nan"))
mpi.broadcast(layer)
mpi.check_equal(layer)
layer.bias.data.fill_(mpi.rank())
try:
    mpi.check_equal(layer)
except RuntimeError:
    pathlib.Path({str(tmp_path)!r}, f"{{mpi.rank()}}.differs").touch()
"""
    done = mpirun("-c", program)
    assert done.returncode == 0, done.stderr
    assert all((tmp_path / f"{rank}.differs").exists() for rank in range(2))


def test_ranks_share_the_work(tmp_path):
    """As many gradient steps, of half the size on each rank, and one decision on the KL, though each rank sees another KL."""
    program = """
import pathlib, sys, torch, ppo
from utils import mpi
sizes, own_kls = [], []
policy_loss, approx_kl = ppo.policy_loss, ppo.approx_kl
ppo.policy_loss = lambda logp, *rest: sizes.append(len(logp)) or policy_loss(logp, *rest)
def spy(*args):
    own_kls.append(approx_kl(*args).item())
    return approx_kl(*args)
ppo.approx_kl = spy
gathered = mpi.gather([1.0, 2.0] if mpi.rank() == 0 else [3.0] * (mpi.size() - 1))
ppo.train(ppo.Args(env_id="CartPole-v1", total_steps=800, steps_per_epoch=200, num_envs=2, minibatch_size=50, target_kl=0.004,
                   data_dir=sys.argv[1], exp_name=f"n{mpi.size()}"))
steps = sum(size in (25, 50) for size in sizes)
pathlib.Path(sys.argv[1], f"{mpi.size()}_{mpi.rank()}.txt").write_text(f"{steps} {own_kls} {gathered}")
"""
    done = mpirun("-c", program, tmp_path)
    assert done.returncode == 0, done.stderr
    (steps, first), (other_steps, second) = ((tmp_path / f"2_{rank}.txt").read_text().split(" ", 1) for rank in range(2))
    passes = [int(row["StopIter"]) for row in rows(tmp_path / "n2/n2_s0")]
    assert steps == other_steps and int(steps) == 4 * sum(passes) and first != second
    assert min(passes) < 10  # the early stop was met
    assert "[[1.0, 2.0], [3.0]]" in first


@pytest.mark.parametrize("blocked", ["mpi4py", "wandb"])
def test_runs_without_the_optional_packages(tmp_path, blocked):
    program = f"import sys; sys.modules[{blocked!r}] = None; import ppo; ppo.train(ppo.cli(ppo.Args))"
    done = run(sys.executable, "-c", program, *SMALL, "--env-id", "CartPole-v1", "--data-dir", tmp_path)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("script", OFF_POLICY, ids=lambda script: script.__name__)
def test_off_policy_ranks_share_the_work(script, tmp_path):
    """One environment each with actions of its own, halves of the batch and of the replay buffer, as many updates as steps
    of all, one set of parameters; and each gradient is that of the whole batch."""
    program = f"""
import hashlib, pathlib, sys, torch, {script.__name__} as script
from utils import mpi
sizes, buffers, step = [], [], script.gradient_step
def spy(optimizer, loss):
    params = [p for group in optimizer.param_groups for p in group["params"]]
    grads = torch.autograd.grad(loss, params, retain_graph=True)
    step(optimizer, loss)
    assert all(torch.allclose(p.grad, mpi.average(grad), rtol=1e-5, atol=1e-7) for p, grad in zip(params, grads, strict=True))
script.gradient_step = spy
sample, init = script.ReplayBuffer.sample, script.ReplayBuffer.__init__
def spy_sample(self, batch_size, device):
    sizes.append(batch_size)
    return sample(self, batch_size, device)
def spy_init(self, *args):
    buffers.append(self)
    init(self, *args)
script.ReplayBuffer.sample, script.ReplayBuffer.__init__ = spy_sample, spy_init
ac = script.train(script.Args(env_id="Pendulum-v1", total_steps=400, steps_per_epoch=200, start_steps=100, update_after=50,
                              update_every=7, batch_size=20, replay_size=300, hidden_sizes=(8, 8), num_test_episodes=3,
                              max_ep_len=30, data_dir=sys.argv[1]))
state = b"".join(tensor.numpy().tobytes() for tensor in ac.state_dict().values())
(buffer,) = buffers
report = [hashlib.sha256(state).hexdigest(), len(sizes), set(sizes), len(buffer.obs), buffer.stored, buffer.steps]
pathlib.Path(sys.argv[1], f"{{mpi.rank()}}.txt").write_text(f"{{report}}|{{buffer.act.sum()}}")
"""
    done = mpirun("-c", program, tmp_path)
    assert done.returncode == 0, done.stderr
    (report, acts), (other_report, other_acts) = ((tmp_path / f"{rank}.txt").read_text().split("|") for rank in range(2))
    assert report == other_report and acts != other_acts
    updates = 400 - 48  # blocks of 8 steps, the smallest multiple of 2 that is not below 7: the 7th is the first to reach 50
    assert report.split(", ", 1)[1] == f"{updates}, {{10}}, 150, 200, 400]"
    table = rows(tmp_path / f"{script.__name__}_Pendulum-v1/{script.__name__}_Pendulum-v1_s0")
    assert [row["TotalEnvInteracts"] for row in table] == ["200", "400"] and table[0]["AverageTestEpLen"] == "30.0"
