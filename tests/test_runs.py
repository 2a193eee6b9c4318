"""Whole runs: learning, determinism, what they leave on disk, and what stops them."""

import dataclasses
import json
import re
import shutil
import sys
from types import SimpleNamespace

import gymnasium as gym
import numpy as np
import pytest
import torch
from conftest import ALL, OFF_POLICY, ON_POLICY, ROOT, Count, register, rows, run, run_dir, small

import ddpg
import ppo
import td3
import trpo
from utils import logger, mpi
from utils.args import RunArgs, cli
from utils.check import check
from utils.envs import make_env
from utils.evaluate import Policy, play
from utils.logger import set_up
from utils.process import RunError
from utils.run_dir import provenance

SMALLER = dict(hidden_sizes=(64, 64), batch_size=64, polyak=0.98, num_test_episodes=0)
PENDULUM = SMALLER | dict(total_steps=5000, steps_per_epoch=5000, start_steps=1000, update_after=1000, gamma=0.95)
INVERTED = SMALLER | dict(total_steps=3000, steps_per_epoch=3000, start_steps=500, update_after=200, update_every=10)
INVERTED |= dict(activation="tanh", q_lr=3e-3, gamma=0.98)


@pytest.mark.parametrize(
    "script, env_id, goal, changes",
    [
        *((script, "CartPole-v1", 450, dict(total_steps=40_000)) for script in ON_POLICY),
        (ppo, "InvertedPendulum-v4", 900, dict(total_steps=60_000)),
        (trpo, "CartPole-v1", 400, dict(total_steps=30_000, algo="npg")),
        *((script, "Pendulum-v1", -350, PENDULUM) for script in OFF_POLICY),
        (td3, "InvertedPendulum-v4", 30, INVERTED),
    ],
)
def test_learns(script, tmp_path, env_id, goal, changes):
    """On-policy by the defaults. A random policy gets 20 on CartPole, 6 on InvertedPendulum and -1200 on Pendulum."""
    ac = script.train(script.Args(env_id=env_id, data_dir=str(tmp_path), **changes))
    assert np.mean([ret for ret, _ in play(make_env(env_id), Policy(ac, deterministic=True), 10)]) > goal


@ALL
def test_same_seed_same_rows_and_weights(script, tmp_path):
    options = dict(env_id="Hopper-v4", exp_name="x")
    runs = [script.train(small(script, tmp_path, **options, seed=seed)) for seed in (0, 0, 1)]
    names = ["x_s0", "x_s0_1", "x_s1"]
    assert sorted(p.name for p in (tmp_path / "x").iterdir()) == names
    a, b, c = (rows(tmp_path / "x" / name) for name in names)
    assert a == b and all(x != y for x, y in zip(a, c, strict=True))
    first, second, other = ([p.detach() for name, p in ac.named_parameters() if name != "log_alpha"] for ac in runs)
    assert all(map(torch.equal, first, second)) and not any(map(torch.equal, first, other))


def test_policy_that_acted_is_the_one_in_the_ratio(script, tmp_path, monkeypatch):
    """In every epoch, with normalised observations, Batch.logp is what the sampling distribution said while acting."""
    seen, acted, stored, rates = [], [], [], []
    sample, update = script.ActorCritic.sample, script.update

    def spy_sample(self, obs, deterministic=False):
        act = sample(self, obs, deterministic)
        seen.append(obs.copy())
        pi = self.pi(self.normalise(obs))
        assert torch.equal(sample(self, obs, True), pi.mode)
        acted.append(pi.log_prob(act).detach())
        return act

    def spy_update(ac, optimizer, batch, args):
        stored.append(batch.logp)
        rates.append({p: group["lr"] for group in optimizer.param_groups for p in group["params"]})
        return update(ac, optimizer, batch, args)

    monkeypatch.setattr(script.ActorCritic, "sample", spy_sample)
    monkeypatch.setattr(script, "update", spy_update)
    first = {name: lr for name, lr in dict(vf_lr=2e-3, pi_lr=4e-3, std_lr=1e-3).items() if hasattr(script.Args, name)}
    ac = script.train(small(script, tmp_path, env_id="Hopper-v4", total_steps=800, **first))
    assert torch.allclose(torch.cat(stored), torch.stack(acted), atol=1e-5)
    assert ac.ret_stats.count == ac.obs_stats.count == 800
    assert torch.allclose(ac.obs_stats.mean, torch.as_tensor(np.mean(seen, (0, 1))).float(), atol=1e-5)
    for k, rate in enumerate(rates):  # fall linearly to 0
        expected = {p: first["vf_lr"] * (1 - k / 4) for p in ac.v.parameters()}
        expected |= {p: first["pi_lr"] * (1 - k / 4) for p in ac.pi.parameters() if "pi_lr" in first}
        expected |= {ac.pi.log_std: first["std_lr"] * (1 - k / 4)} if "std_lr" in first else {}
        assert rate == pytest.approx(expected)


def test_run_directory(script, tmp_path):
    no_passes = {} if script is ppo else dict(train_v_iters=0)
    script.train(small(script, tmp_path, env_id="Count-v0", total_steps=999, max_ep_len=2, **no_passes))
    path = run_dir(tmp_path)
    assert {p.name for p in path.iterdir()} == {"checkpoint", "config.json", "model.pt", "progress.txt", f"{script.__name__}.py"}
    config = json.loads((path / "config.json").read_text())
    assert config["gamma"] == 0.99 and config["script"] == f"{script.__name__}.py" and config["ranks"] == 1
    assert [row["TotalEnvInteracts"] for row in rows(path)] == ["200", "400", "600", "800", "1000"]  # in whole epochs
    assert {(row["MaxEpRet"], row["MaxEpLen"]) for row in rows(path)} == {("3.0", "2")}


@ALL
@pytest.mark.parametrize("quantity", ["reward", "observation"])
def test_nan_stops_the_run_and_keeps_the_model(script, tmp_path, quantity):
    """The 150th step of an environment is in the second epoch; on-policy there are two environments."""

    def step(self, action):
        obs, rew, *rest = Count.step(self, np.clip(action, -0.4, 0.4))
        self.total += 1
        bad = (obs, np.nan) if quantity == "reward" else (obs * np.inf, rew)
        return *(bad if self.total == 150 else (obs, rew)), *rest

    register("Broken-v0", step=step, total=0)
    with pytest.raises(RunError, match=rf"{quantity} is not finite at step {300 if script in ON_POLICY else 150}\b"):
        script.train(small(script, tmp_path, env_id="Broken-v0", exp_name="x"))
    saved = torch.load(tmp_path / "x/x_s0/model.pt", weights_only=True)
    assert all(torch.isfinite(tensor).all() for tensor in saved.values())
    assert len(rows(tmp_path / "x/x_s0")) == 1


@ALL
def test_nan_in_a_loss_or_at_a_reset_stops_the_run(script, tmp_path, monkeypatch):
    on_policy = script in ON_POLICY
    changes = dict(env_id="Count-v0", total_steps=2000, vf_lr=1e38) if on_policy else dict(q_lr=1e38, num_test_episodes=0)
    with pytest.raises(RunError, match=r"is (nan|inf|-inf) at step 200\b" if on_policy else r"action is not finite at step 100\b"):
        script.train(small(script, tmp_path, **changes))
    monkeypatch.setattr(Count, "reset", lambda self, **options: (np.array([np.nan]), {}))  # caught before it reaches a network
    with pytest.raises(RunError, match="observation is not finite at step 0"):
        script.train(small(script, tmp_path, env_id="Count-v0"))
    assert not list(tmp_path.glob("**/model.pt"))


def test_networks_that_are_not_finite_are_not_saved(tmp_path):
    """Of those in a run's state, not the one in model.pt alone."""
    args, broken = small(ppo, tmp_path), torch.nn.Linear(1, 1)
    broken.bias.data.fill_(np.nan)
    with pytest.raises(RunError, match="parameter bias is not finite at step 0"), logger.Logger(args, ppo.__file__) as log:
        list(log.epochs(1, model=torch.nn.Linear(1, 1), other=broken))
    assert not list(tmp_path.glob("**/model.pt"))


@ALL
def test_script_and_utils_alone_are_enough(script, tmp_path):
    shutil.copy(ROOT / f"{script.__name__}.py", tmp_path / "mine.py")
    shutil.copytree(ROOT / "utils", tmp_path / "utils")
    for name in "mpi4py", "wandb":  # are optional
        (tmp_path / f"{name}.py").write_text("raise ImportError")
    options = "--env-id CartPole-v1 --total-steps 400 --steps-per-epoch 200 --num-envs 2 --minibatch-size 50"
    if script in OFF_POLICY:
        options = "--env-id Pendulum-v1 --total-steps 400 --steps-per-epoch 200 --update-after 300 --start-steps 100"
    home = dict(FORCE_COLOR="1", HOME=str(tmp_path))  # no colours in a log, and no folder that is called ~
    done = run(sys.executable, "mine.py", *options.split(), "--data-dir", "~/runs", cwd=tmp_path, **home)
    (path,) = (tmp_path / "runs").glob("mine_*/mine_*_s0")
    assert len(rows(path)) == 2 and "\x1b" not in done.stdout
    assert "400 of 400 steps (100%)" in done.stdout and "steps/s" in done.stdout and "left" in done.stdout


@ALL
def test_help_explains_every_argument(script, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    with pytest.raises(SystemExit):
        cli(script.Args, ["--help"])
    names, common = [field.name for field in dataclasses.fields(script.Args)], RunArgs.__dataclass_fields__
    text = capsys.readouterr().out
    places = {name: re.search(rf"^\W*--{name.replace('_', '-')}\b", text, re.M).start() for name in names}
    assert text.count("(default:") == len(names)
    assert max(places[name] for name in names if name not in common) < min(places[name] for name in common)
    assert all(line in text for line in script.__doc__.splitlines() if " = " in line)


BAD_ON_POLICY = [
    (dict(env_id="HalfCheeta-v4"), ["HalfCheeta-v4", "Did you mean", "HalfCheetah"]),
    (dict(env_id="FrozenLake-v1"), ["Discrete(16)", "FlattenObservation"]),
    (dict(gamma=1.5), ["--gamma 1.5", "between 0 and 1"]),
    (dict(gamma=float("nan")), ["--gamma nan"]),
    (dict(total_steps=0), ["--total-steps 0", "at least 1"]),
    (dict(hidden_sizes=(64, 0)), ["--hidden-sizes 64 0"]),
    (dict(steps_per_epoch=201), ["--steps-per-epoch 201", "the number of environments, 2", "200 or 202"]),
    (dict(exp_name="../../x"), ["--exp-name", "../../x"]),
    (dict(exp_name=""), ["--exp-name"]),
    (dict(device="cuda:99"), ["--device cuda:99"]),
    (dict(data_dir=str(ROOT / "README.md")), ["--data-dir", "README.md"]),
]
BAD_OFF_POLICY = [
    (dict(steps_per_epoch=121, num_envs=2), ["--steps-per-epoch 121", "120 or 122"]),
    (dict(q_lr=0.0), ["--q-lr 0.0"]),
    (dict(num_test_episodes=-1), ["--num-test-episodes -1"]),
    (dict(env_id="CartPole-v1"), ["CartPole-v1", "Discrete(2)", "vpg.py", "trpo.py", "ppo.py"]),
]
ODD = [gym.spaces.MultiDiscrete([2, 3]), gym.spaces.Box(0, 9, (2,), np.int64)]
ODD += [gym.spaces.Box(-1, 1, shape) for shape in [(2, 2), ()]]
ODD += [gym.spaces.Box(-high, high, (2,), np.float64) for high in (np.inf, np.finfo(np.float32).max, 1e300)]
for k, space in enumerate(ODD):
    register(f"Odd{k}-v0", action_space=space)
register("Fail-v0", __init__=lambda self, **options: (_ for _ in ()).throw(ImportError("a\n  b")))
BAD_ON_POLICY += [(dict(env_id="Fail-v0"), ["--env-id Fail-v0: a b"])]
BAD_ON_POLICY += [(dict(env_id=f"Odd{k}-v0"), ["all scripts can handle a float Box"]) for k in range(4)]
BAD_OFF_POLICY += [(dict(env_id=f"Odd{k}-v0"), ["needs bounded actions", "vpg.py"]) for k in range(4, 7)]
BAD = [(script, *case) for script in ON_POLICY for case in BAD_ON_POLICY]
BAD += [(script, *case) for script in OFF_POLICY for case in BAD_OFF_POLICY]


@pytest.mark.parametrize("script, changes, words", BAD, ids=lambda x: getattr(x, "__name__", str(x) if isinstance(x, dict) else ""))
def test_bad_input_is_refused_before_anything_is_written(script, tmp_path, changes, words):
    with pytest.raises(RunError) as error:
        script.train(small(script, tmp_path, **changes))
    message = str(error.value)
    assert "\n" not in message and all(word in message for word in words), message
    assert list(tmp_path.iterdir()) == []


def test_what_a_copied_script_may_log(tmp_path):
    """Numbers of any kind, and in some epochs only."""
    values = dict(Tensor=torch.tensor(0.5), Flag=True, Int=3, Float32=np.float32(0.25), Integer=np.int64(2))
    some = [dict(A=1), dict(B=2), {}]
    with logger.Logger(small(ppo, tmp_path), ppo.__file__) as log:
        for epoch in log.epochs(3, model=torch.nn.Linear(1, 1)):
            log.log(Epoch=epoch, TotalEnvInteracts=200 * (epoch + 1), **values, **some[epoch])
    table = rows(run_dir(tmp_path))
    assert [[row[name] for name in values] for row in table] == [["0.5", "1.0", "3", "0.25", "2.0"]] * 3
    assert [(row["A"], row["B"]) for row in table] == [("1", ""), ("", "2"), ("", "")]


def test_check_of_a_copy_with_discrete_actions_and_fewer_arguments():
    common = dict(exp_name=None, device="cpu", env_id="CartPole-v1", action_spaces=(gym.spaces.Discrete,))
    check(SimpleNamespace(**common, total_steps=1000, steps_per_epoch=100, replay_size=1000))


@ALL
@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_actions_belong_to_the_space(script, dtype):
    """float32(0.1) is larger than the 0.1 of a Box of float64."""
    space = gym.spaces.Box(np.array([-0.1, 0.3], dtype), np.array([0.1, 0.7], dtype), dtype=dtype)
    ac = script.ActorCritic(gym.spaces.Box(-1, 1, (1,)), space, script.Args())
    for act in ac.to_env(torch.tensor([[-1.0, -1.0], [0.3, 0.0], [1.0, 1.0]])):
        assert space.contains(act), act
    assert act == pytest.approx(space.high, abs=1e-6 if dtype != np.float16 else 1e-3)


@pytest.mark.parametrize("norm_obs, expected", [(True, [1.0, -10.0]), (False, [5.0, -40.0])])
def test_observations_are_normalised_within_10_if_asked(script, norm_obs, expected):
    ac = script.ActorCritic(gym.spaces.Box(-1, 1, (2,)), gym.spaces.Discrete(2), script.Args(norm_obs=norm_obs))
    ac.obs_stats.mean.fill_(3)
    ac.obs_stats.std.fill_(2)
    assert ac.normalise(np.array([5.0, -40.0])).tolist() == expected


def test_wandb_offline(tmp_path):
    """The run's rows and configuration reach W&B's files without a network or a key, and the run has W&B's id."""
    args = "--env-id CartPole-v1 --total-steps 400 --steps-per-epoch 200 --num-envs 2 --track --data-dir".split()
    wandb = dict(WANDB_MODE="offline", WANDB_API_KEY="secret0" * 6, WANDB_RUN_ID="agent7")
    done = run(sys.executable, ROOT / "ppo.py", *args, tmp_path, cwd=tmp_path, **wandb)
    path = run_dir(tmp_path)
    assert json.loads((path / "config.json").read_text())["wandb_id"] == "agent7"
    assert list((path / "wandb").glob("offline-run-*-agent7/run-*.wandb"))
    assert {file.name for file in path.glob("wandb/offline-run-*/files/*")} >= {"ppo.py", "model.pt"}
    assert not [file for file in path.rglob("*") if file.is_file() and b"secret0" in file.read_bytes()]
    assert "secret0" not in done.stdout + done.stderr


def test_actions_of_an_endless_episode_are_not_kept_for_ever():
    env = make_env("Count-v0", length=10**6)
    env.reset(seed=0)
    env.ep_len = 100_000
    env.step(env.action_space.sample())
    assert env.actions == []


def test_the_replay_size_that_is_suggested_fits():
    args = ddpg.Args(env_id="Pendulum-v1", replay_size=10**14, total_steps=10**13)
    with pytest.raises(RunError, match="try --replay-size") as error:
        check(args)
    args.replay_size = int(str(error.value).split()[-1])
    check(args)


@pytest.mark.skipif(not torch.set_flush_denormal(False), reason="this processor cannot")
def test_tiny_numbers_are_flushed():
    torch.set_flush_denormal(False)
    assert (torch.tensor([1e-20]) * 1e-20).item() > 0
    set_up(ddpg.Args(env_id="Pendulum-v1"))
    assert (torch.tensor([1e-20]) * 1e-20).item() == 0


def test_products_of_wide_layers_are_as_exact_as_of_narrow_ones():
    set_up(ddpg.Args())
    x, w = torch.randn(2, 256, 256)
    for a, b in (x, w), (x.T, w), (x, w.T):
        assert (a @ b - (a.double() @ b.double())).abs().max() < 1e-3  # of bfloat16's 0.1


@pytest.mark.parametrize("exact, width, precision", [(True, 256, "bf16"), (True, 64, "none"), (False, 256, "none")])
def test_onednn_multiplies_wide_layers_where_it_does_not_round(exact, width, precision):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "equal", lambda *tensors: exact)
        set_up(ddpg.Args(hidden_sizes=(width,)))
        assert torch.backends.mkldnn.matmul.fp32_precision == precision
    set_up(ddpg.Args())


def test_a_commit_is_dirty_if_python_files_differ_from_it(tmp_path):
    script, curve = tmp_path / "my.py", tmp_path / "results/curve.csv"
    assert provenance(script)["git_commit"] is None
    curve.parent.mkdir()
    script.write_text("")
    curve.write_text("")
    name = "-c user.name=x -c user.email=x@x".split()
    for command in ["init", "-q"], ["add", "."], [*name, "commit", "-qm", "x"]:
        run("git", *command, cwd=tmp_path)
    curve.write_text("a run has ended")
    commit = provenance(script)["git_commit"]
    assert re.fullmatch("[0-9a-f]{40}", commit)
    (tmp_path / "copy.py").write_text("")  # which the commit lacks
    assert {provenance(path)["git_commit"] for path in (script, curve)} == {commit + "-dirty"}  # from any folder of the repository


@pytest.mark.parametrize("cores, ranks, asked, threads", [(8, 1, 5, 5), (1, 1, 2, 1), (4, 2, 2, 2), (3, 2, 2, 1), (1, 2, 2, 1)])
def test_threads_are_no_more_than_the_cores_of_each_rank(monkeypatch, cores, ranks, asked, threads):
    monkeypatch.setattr(logger, "available_cores", lambda: cores)
    monkeypatch.setattr(mpi, "size", lambda: ranks)
    monkeypatch.setattr(torch, "set_num_threads", lambda n: monkeypatch.setattr(torch, "get_num_threads", lambda: n))
    set_up(ddpg.Args(torch_threads=asked))
    assert torch.get_num_threads() == provenance(ddpg.__file__)["threads"] == threads
