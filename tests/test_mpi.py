"""Two ranks are the same algorithm, hold the same parameters, and never hang."""

import os
import sys

import pytest
from conftest import ALL, ROOT, rows, run, wait_until

from utils.check import check


def mpirun(*command, ranks=2, **options):
    return run("mpirun", "-n", ranks, sys.executable, *command, **options)


def test_ranks_of_vpg_trpo_ppo_hold_the_same_parameters_and_write_once(tmp_path):
    """The actions of the ranks differ, their networks do not; PPO's decision on the KL is one, though each rank sees another."""
    program = """
import sys, torch, vpg, trpo, ppo
from utils import mpi
ppo.approx_kl = lambda *args: torch.tensor(float(mpi.rank()))  # on average 0.5, above 1.5 times the target; on rank 0 below it
for script in vpg, trpo, ppo:
    acts, sizes, batch, value_loss = [], set(), script.Buffer.batch, script.value_loss
    script.value_loss = lambda val, ret: sizes.add(tuple(val.shape)) or value_loss(val, ret)
    script.Buffer.batch = lambda self, ac: acts.append(self.act.sum()) or batch(self, ac)
    ac = script.train(script.Args(env_id="Hopper-v4", total_steps=800, steps_per_epoch=200, num_envs=2, minibatch_size=50,
                                  exp_name=script.__name__, data_dir=sys.argv[1]))
    (state, first), (other, second) = mpi.gather(([x.tolist() for x in ac.state_dict().values()], acts[0]))
    assert state == other and first != second and sizes == {(25,), (100, 1)}  # half minibatches; the diagnosis
"""
    mpirun("-c", program, tmp_path)
    assert {(row["StopIter"], row["KL"]) for row in rows(tmp_path / "ppo/ppo_s0")} == {("1", "0.5")}
    for name in ("vpg", "trpo", "ppo"):
        assert [p.name for p in (tmp_path / name).iterdir()] == [f"{name}_s0"]
        assert [row["TotalEnvInteracts"] for row in rows(tmp_path / name / f"{name}_s0")] == ["200", "400", "600", "800"]


def test_averaged_gradients_of_vpg_trpo_ppo_are_the_whole_batchs():
    """Each rank takes its half of a batch; statistics, gradients and Fisher-vector products equal those of the whole."""
    program = """
import torch, vpg, trpo, ppo
from gymnasium.spaces import Box
from utils import mpi
comm = mpi._comm
for script in vpg, trpo, ppo:
    torch.manual_seed(0)
    ac = script.ActorCritic(Box(-1, 1, (3,)), Box(-1, 1, (2,)), script.Args())
    obs, act, rew, zero = torch.randn(10, 4, 3), torch.randn(10, 4, 2), torch.randn(10, 4), torch.zeros(10, 4)
    logp, params = ac.pi(obs).log_prob(act).detach(), list(ac.pi.parameters())
    v = torch.randn(sum(p.numel() for p in params))
    def results(n):
        batch = script.Batch(*(x[:, n] for x in (obs, act, logp, rew, obs + 1, zero, zero)))
        adv, ret = script.advantages(ac, batch, script.Args())
        pi, pi_old, stats = ac.pi(batch.obs), script.Gaussian(*(x.detach() for x in ac.pi(batch.obs))), script.RunningStats((3,))
        logps = [pi.log_prob(batch.act), batch.logp][: 1 if script is vpg else 2]
        loss = script.policy_loss(*logps, adv, **(dict(clip_ratio=0.2) if script is ppo else {}))
        ac.zero_grad()
        (loss + script.value_loss(ac.v(batch.obs), ret)).backward(retain_graph=True)
        mpi.average_gradients(ac.parameters())
        stats.update(batch.obs)
        product = trpo.fisher_vector_product(trpo.kl_divergence(pi_old, pi).mean(), params, 0.1)(v)
        assert not mpi.average(v.clone().requires_grad_()).requires_grad
        return [p.grad.clone() for p in ac.parameters()], [product, stats.mean, stats.std, stats.count]
    grads, others = results(slice(2 * mpi.rank(), 2 * mpi.rank() + 2))
    mpi._comm = None  # now alone, with the whole batch
    whole_grads, whole_others = results(slice(None))
    mpi._comm = comm
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(grads + others, whole_grads + whole_others, strict=True))
    assert max(grad.abs().max() for grad in grads) > 1e-3
"""
    mpirun("-c", program)


def test_trpo_line_search_is_one_for_all_ranks():
    """The step is too long for rank 1 alone, whose KL counts double in the line search: both ranks shorten it, equally often."""
    program = """
import torch, trpo
from gymnasium.spaces import Box
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
first, second = mpi.gather((kl, j, [p.tolist() for p in ac.pi.parameters()]))
assert first == second
"""
    mpirun("-c", program)


@pytest.mark.parametrize("raised, words", [('ValueError("broken")', "ValueError: broken"), ('SystemExit("gone")', "exits: gone")])
def test_an_end_on_one_rank_of_ppo_ends_the_job(raised, words, tmp_path):
    program = f"""
import ppo
from utils import mpi
update = ppo.update
def broken(*args):
    if mpi.rank() == 1:
        raise {raised}
    return update(*args)
ppo.update = broken
ppo.train(ppo.Args(env_id="CartPole-v1", total_steps=10**6, num_envs=2, data_dir={str(tmp_path)!r}))
"""
    done = mpirun("-c", program, check=False)  # raises TimeoutExpired if a rank waits for the other
    assert done.returncode != 0 and words in done.stderr


@ALL
@pytest.mark.parametrize("ranks", [2, 4])
def test_defaults_divide_by_the_usual_numbers_of_ranks(script, ranks):
    check(script.Args(), ranks)


def test_what_does_not_divide_by_the_ranks_of_ppo_is_refused_once(tmp_path):
    done = mpirun(ROOT / "ppo.py", *"--num-envs 3 --steps-per-epoch 300".split(), cwd=tmp_path, check=False)
    assert done.returncode != 0 and done.stderr.count("error:") == 1
    assert "--num-envs 3: is not a multiple of the number of ranks, 2; try 2 or 4" in done.stderr
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
    assert mpirun("-c", program, timeout=60, check=False).returncode != 0
    programs = [f"/proc/{(tmp_path / f'{rank}.pid').read_text()}/exe" for rank in range(2)]  # a zombie has none any more
    wait_until(lambda: not any(map(os.path.exists, programs)), 10)
    assert not any(map(os.path.exists, programs))


def test_ranks_are_equal_where_all_hold_the_same_nan():
    program = """
import pytest, torch
from utils import mpi
layer, other = torch.nn.Linear(2, 2), torch.nn.Linear(2, 2)
layer.weight.data.fill_(float("nan"))
mpi.broadcast(layer)
mpi.broadcast(other)
mpi.check_equal(other, layer)
layer.bias.data.fill_(mpi.rank())
with pytest.raises(RuntimeError, match="parameters differ"):
    mpi.check_equal(other, layer)
assert mpi.gather([1.0, 2.0][mpi.rank():]) == [[1.0, 2.0], [2.0]]
"""
    mpirun("-c", program)


def test_ranks_of_ddpg_td3_sac_share_the_work(tmp_path):
    """One environment each with actions of its own, halves of the batch and of the replay buffer, as many updates as steps
    of all, one set of parameters; and each gradient is that of the whole batch."""
    program = """
import sys, torch, ddpg, td3, sac
from utils import mpi
for script in ddpg, td3, sac:
    draws, sample, step = [], script.ReplayBuffer.sample, script.gradient_step
    script.ReplayBuffer.sample = lambda self, *args: draws.append((self, args[0])) or sample(self, *args)
    def spy(optimizer, loss):
        params = [p for group in optimizer.param_groups for p in group["params"]]
        grads = torch.autograd.grad(loss, params, retain_graph=True)
        step(optimizer, loss)
        assert all(torch.allclose(p.grad, mpi.average(grad), rtol=1e-5, atol=1e-7) for p, grad in zip(params, grads, strict=True))
    script.gradient_step = spy
    ac = script.train(script.Args(env_id="Pendulum-v1", total_steps=400, steps_per_epoch=200, start_steps=100, update_after=50,
                                  update_every=7, batch_size=20, replay_size=300, hidden_sizes=(8, 8), num_test_episodes=3,
                                  max_ep_len=30, exp_name=script.__name__, data_dir=sys.argv[1]))
    buffer, numbers = draws[0][0], (len(draws), {size for _, size in draws})
    numbers += len(buffer.obs), buffer.count, buffer.steps
    assert numbers == (400 - 48, {10}, 150, 200, 400)  # blocks of 8, the multiple of 2 above 7: the 7th is the first to reach 50
    (state, acts), (other, other_acts) = mpi.gather(([x.tolist() for x in ac.state_dict().values()], buffer.act.sum()))
    assert state == other and acts != other_acts
"""
    mpirun("-c", program, tmp_path)
    for name in ("ddpg", "td3", "sac"):
        table = rows(tmp_path / name / f"{name}_s0")
        assert [row["TotalEnvInteracts"] for row in table] == ["200", "400"] and table[0]["AverageTestEpLen"] == "30.0"
