"""The learning benchmark goes on where it was; its report against numbers computed by hand; the study's bug is one."""

import importlib
import json
import re
import shutil
import signal
import subprocess
import sys
from dataclasses import asdict
from functools import partial
from types import SimpleNamespace
from typing import get_args

import gymnasium as gym
import numpy as np
import pandas as pd
import pytest
import torch
from conftest import ROOT, rows, run, small, wait_until

import ddpg
import ppo
from benchmark import mujoco
from benchmark.mujoco import Args as BenchmarkArgs
from benchmark.mujoco import STUDIES, planned
from benchmark.report import Args, interquartile_mean, interval, load_cells, main, ratio, study, summary_table, write
from benchmark.studies import ppo_without
from utils.envs import check_finite
from utils.evaluate import load_policy, play
from utils.process import RunError


@pytest.fixture
def restored_ddpg(monkeypatch):
    """ddpg.py as a module, which benchmark/studies/ddpg_no_squeeze.py changes when it is loaded."""
    for name in ("Critic", "q_loss", "__file__"):
        monkeypatch.setattr(ddpg, name, getattr(ddpg, name))


COMMAND = [sys.executable, "-m", "benchmark.mujoco", "--scripts", "vpg.py", "--env-ids", "InvertedPendulum-v4"]


def benchmark(tmp_path, *options):
    done = run(*COMMAND, "--data-dir", tmp_path / "data", "--results", tmp_path / "kept", *options, cwd=ROOT)
    return int(re.search(r"finished before: (\d+)", done.stdout)[1])


def test_the_benchmark_makes_what_is_missing(tmp_path):
    options = ["--total-steps", 2048, "--seeds", 0, 1]
    assert benchmark(tmp_path, *options) == 0
    files = sorted(path.name for path in (tmp_path / "kept").iterdir())
    assert files == [f"vpg_InvertedPendulum-v4_s{seed}.{kind}" for seed in (0, 1) for kind in ("csv", "json")]
    kept = {name: (tmp_path / "kept" / name).read_text() for name in files}
    assert kept[files[0]].splitlines()[0] == "steps,ret,steps_per_sec,test_ret"
    rows = [line.split(",") for line in kept[files[0]].splitlines()[1:]]
    assert [row[0] for row in rows] == ["512", "1024", "1536", "2048"]
    env, act = load_policy(tmp_path / "data/vpg_InvertedPendulum-v4/vpg_InvertedPendulum-v4_s0")
    returns = [ret for ret, _ in play(env, act, 10, deterministic=True)]
    assert [row[3] for row in rows[1:]] == ["", "", f"{np.mean(returns):.6g}"]  # the trained policy, without noise
    assert 0 < float(rows[0][3]) < 100  # the model that was kept after the first epoch

    for file in (tmp_path / "kept").glob("*_s1.*"):
        file.unlink()
    (tmp_path / "kept" / files[0]).write_text(kept[files[0]].replace("test_ret", "other"))  # without tests it is made anew
    assert benchmark(tmp_path, *options) == 2  # the curves come from the run directories, without training
    assert {name: (tmp_path / "kept" / name).read_text() for name in files} == kept

    (tmp_path / "data").rename(tmp_path / "lost")
    (tmp_path / "kept" / files[0]).unlink()
    assert benchmark(tmp_path, *options) == 1  # seed 1 is known by its curve alone
    assert (tmp_path / "kept" / files[0]).exists()
    assert benchmark(tmp_path, "--total-steps", 1024, "--seeds", 1) == 0  # other arguments are another run

    run_dir = tmp_path / "data/vpg_InvertedPendulum-v4/vpg_InvertedPendulum-v4_s0"
    with open(run_dir / "vpg.py", "a") as copy:
        copy.write("other = 'code'\n")
    assert benchmark(tmp_path, "--total-steps", 2048, "--seeds", 0) == 0 and run_dir.with_name(f"{run_dir.name}_1").is_dir()


def test_an_interrupted_benchmark_resumes_its_run(tmp_path):
    options = ["--seeds", "3", "--total-steps", "1000000", "--data-dir", tmp_path / "data", "--results", tmp_path / "kept"]
    process = subprocess.Popen([*COMMAND, *options], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    run_dir = tmp_path / "data/vpg_InvertedPendulum-v4/vpg_InvertedPendulum-v4_s3"
    wait_until(lambda: list(run_dir.glob("checkpoint/*.ckpt")))
    process.send_signal(signal.SIGINT)
    assert "to go on: python -m benchmark.mujoco --scripts vpg.py" in process.communicate()[0]
    assert process.returncode == 130
    log = run_dir.with_name(f"{run_dir.name}.log").read_text()  # the run has got one signal, and the time for its checkpoint
    assert log.count("SIGINT: writing a checkpoint") == 1 and f"--resume {run_dir}" in log
    assert not (tmp_path / "kept").exists()
    steps = len((run_dir / "progress.txt").read_text().splitlines()) - 1
    assert 0 < steps < 1000
    args = BenchmarkArgs(scripts=("vpg.py",), env_ids=("InvertedPendulum-v4",), seeds=(3,), data_dir=str(tmp_path / "data"))
    assert [run.resumes for run in planned(args)] == [run_dir]


@pytest.mark.parametrize("without", get_args(ppo_without.Args.__annotations__["without"]))
def test_ppo_without(without, tmp_path, monkeypatch):
    """Each change does what it says, and nothing else is another algorithm than ppo.py's."""
    for name in ("ActorCritic", "Adam", "Buffer", "advantages", "mlp", "__file__"):
        monkeypatch.setattr(ppo, name, getattr(ppo, name))  # to be restored
    changes = dict(env_id="Pendulum-v1", total_steps=800, steps_per_epoch=400, exp_name="x", train_iters=3)
    ppo.train(small(ppo, tmp_path / "ppo", **changes))
    calls = []
    monkeypatch.setattr(ppo, "gae", lambda *args, gae=ppo.gae: calls.append(args) or gae(*args))
    ac = ppo_without.train(small(ppo_without, tmp_path, **changes, without=without))
    theirs, ours = rows(tmp_path / "ppo/x/x_s0"), rows(tmp_path / "x/x_s0")
    assert (ours == theirs) == (without == "nothing")
    assert (ours[0] == theirs[0]) == (without in ("nothing", "lr-decay", "norm-obs"))  # whose first epoch is the same
    assert len(calls) == 2 * (1 if without == "fresh-advantages" else 4)  # 3 passes and `diagnose`, in 2 epochs
    assert (ac.norm_obs, ac.ret_stats.count > 0) == (without != "norm-obs", without != "norm-values")
    assert (float(ours[0]["AverageEpLen"]) == 200) == (without == "staggering")  # else one of the two ends after 100 steps
    env = gym.make("Ant-v4")
    assert load_policy(tmp_path / "x/x_s0")[1].module.norm_obs == ac.norm_obs
    new = ppo.ActorCritic(env.observation_space, env.action_space, ppo_without.Args())
    hidden, last = new.pi.net[0].weight, new.pi.net[-1].weight
    assert torch.allclose(hidden.T @ hidden, 2 * torch.eye(27), atol=1e-4) == (without != "orthogonal")
    assert (last.norm(dim=1).max() > 0.5) == (without == "small-actions")


def test_the_suites_are_planned(tmp_path, restored_ddpg):
    runs = planned(BenchmarkArgs(data_dir=str(tmp_path)))
    assert len(runs) == 3 * 5 * 5 + 3 * 5 * 2
    assert [run.seed for run in runs[:30]] == [0] * 30  # every cell's first seed comes first
    assert {run.args.total_steps for run in runs} == {1_000_000}
    for suite in STUDIES:
        assert {run.seed for run in planned(BenchmarkArgs(suite=suite, seeds=(7,), data_dir=str(tmp_path)))} == {7}
    with pytest.raises(RunError, match="--total-steps 5: would take the place of curves of another length"):
        planned(BenchmarkArgs(data_dir=str(tmp_path), total_steps=5))


PUBLISHED = """algo,env,steps,mean,std,source,best_of,note
ppo,Hopper,1000000,20,,A,mean,
ppo,Hopper,1000000,10,,B,mean,
ppo,Hopper,1000000,60,,R,runs,
ppo,Hopper,3000000,99,,C,mean,longer
ppo,Walker2d,1000000,4,,A,mean,read off a curve
sac,Hopper,1000000,8,,A,mean,
sac,Hopper,1000000,16,,R,runs,
sac,Hopper,1000000,3,,CleanRL documentation,mean,
ppo,Walker2d,8000000,9,,CleanRL documentation,mean,
"""


def keep_curve(folder, algo, env_id, seed, rets, tests=None, name=None, step=None, **config):
    """tests: from the epoch, the first being 1, to the return without noise of the model kept there; on-policy only."""
    path, step = folder / f"{name or f'{algo}_{env_id}'}_s{seed}.csv", step or 1_000_000 // len(rets)
    rows = pd.DataFrame({"steps": [step * (k + 1) for k in range(len(rets))], "ret": rets, "steps_per_sec": 1.0})
    if tests:
        rows["test_ret"] = (rows.index + 1).map(tests)
    folder.mkdir(parents=True, exist_ok=True)
    rows.to_csv(path, index=False)
    own = asdict(importlib.import_module(algo).Args(env_id=env_id, seed=seed))
    config = json.loads(json.dumps(own)) | dict(script=f"{algo}.py", git_commit=f"abc{seed}") | config
    path.with_suffix(".json").write_text(json.dumps(config))


@pytest.fixture
def results(tmp_path):
    (tmp_path / "published.csv").write_text(PUBLISHED)
    keep = partial(keep_curve, tmp_path / "results")
    # where both were tested, their means are 5, 4, 25, 5, 21
    keep("ppo", "Hopper-v4", 0, [10] * 10 + [20] * 10, {4: 2, 8: 4, 12: 40, 16: 6, 20: 30})
    keep("ppo", "Hopper-v4", 1, [40] * 10 + [0] * 10, {2: 99, 4: 8, 8: 4, 12: 10, 16: 4, 20: 12})
    keep("ppo", "Hopper-v4", 0, [100] * 20, {20: 100}, name="other", gamma=0.5)  # other arguments than the script's own
    keep("ppo", "Swimmer-v4", 0, [7] * 20, {20: 7}, total_steps=2_000_000)
    keep("vpg", "Hopper-v4", 0, [1] * 20, {20: 3})  # for which nothing is published here
    keep("vpg", "Ant-v4", 0, [3] * 20)  # no test
    keep("ppo", "Ant-v4", 0, [""] * 20)  # no episode ended
    (tmp_path / "results" / "ppo_Ant-v4_s1.csv").write_text("")
    (tmp_path / "results" / "ppo_Ant-v4_s2.csv").write_text("steps,ret,steps_per_sec\n")
    keep("ppo", "Walker2d-v4", 0, [1, 4] * 10, {k: 2 - k % 2 for k in range(1, 21)})
    resumed = [dict(git_commit="1234567890abcdef-dirty")]
    keep("sac", "Hopper-v4", 0, [1, 2, 16, 4, 4, 4, 4, 4, 4, 5], num_test_episodes=10, resumed=resumed)
    return tmp_path


def arguments(folder):
    return Args(folder / "results", folder / "studies", folder / "published.csv")


def test_the_kind_of_run_with_the_most_seeds_is_the_cell(results, capsys):
    for seed in range(3):
        keep_curve(results / "results", "ppo", "Hopper-v4", seed, [1] * 20, {20: 99}, name="again", ranks=2)
        keep_curve(results / "results", "ppo", "Hopper-v4", seed, [1] * 20, {20: 99}, name="mine", script="my_ppo.py")
    cells = {(cell.algo, cell.env_id): cell for cells in load_cells(arguments(results)).values() for cell in cells}
    assert (cells["ppo", "Hopper-v4"].seeds, cells["ppo", "Hopper-v4"].best) == (3, 99)
    errors = capsys.readouterr().err
    assert "left out, other arguments or no tests: ppo.py Hopper-v4, seeds [0, 1]" in errors
    assert "left out, other arguments or no tests: my_ppo.py Hopper-v4, seeds [0, 1, 2]" in errors


def test_a_ratio_is_rounded_down():
    assert [ratio(SimpleNamespace(published=1.0, ratio=x)) for x in (0.996, 1.0, 1.019)] == ["**0.99**", "1.00", "1.01"]


def test_a_policy_that_cannot_be_tested_ends_nothing(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(mujoco, "load_policy", lambda *args: (gym.make("CartPole-v1"), None))
    monkeypatch.setattr(mujoco, "play", lambda *args, **options: check_finite(0, reward=np.nan))
    run = SimpleNamespace(rows=pd.DataFrame(dict(ret=[1.0])))
    mujoco.test(run, tmp_path)
    assert "test_ret" not in run.rows and "not tested, reward is not finite" in capsys.readouterr().err


def test_the_report(results, capsys):
    """With one or two seeds the best is that of the mean of five tests in a row, of fewer tests their mean."""
    main(arguments(results))
    text, (out, errors) = (results / "results/README.md").read_text(), capsys.readouterr()
    for line in (
        "| VPG | missing | 3.0 /  (none published) | missing | missing | missing |",
        "| PPO | missing | 26.0† / 60.0 (**0.43**) | 1.6 / 4.0 (**0.40**) | missing | missing |",  # 12 / 20 is more
        "| SAC | missing | 6.4 / 8.0 (**0.80**) | missing | missing | missing |",
        "| SAC | 0.80 | one seed | 0 of 1 |",
        "| off-policy | 0.80 | one seed | 0 of 1 |",
        # of runs at 40 / 60, 12 / 60 and 0.4 of the published the middle half is all; Hopper's two are resampled
        "| PPO | 0.42 | 0.27 to 0.58 | 0 of 2 |",
        "| PPO | Hopper-v4 | 2 | 25.0 ± 15.0 | 12.0 | 26.0 | 21.0 ± 9.0 | 21.0 ± 9.0 | 10.0 | 60.0 | R | **0.43** |",
        "| PPO | Walker2d-v4 | 1 | 2.0 | 1.6 | 2.0 | 1.5 | 2.0 | 2.5 | 4.0 | A (read off a curve) | **0.40** |",  # final: 2 of 20
        "| SAC | Hopper-v4 | 1 | 16.0 | 6.4 | 16.0 | 5.0 | 5.0 |  | 8.0 | A | **0.80** |",  # (4 + 16 + 4 + 4 + 4) / 5
        "| SAC | Hopper-v4 | 3.0 | 1,000,000 | 300,000 | 5000.0 |",  # one step a second
        "| PPO | Walker2d-v4 | 9.0 | 8,000,000 | not reached |  |",
        "Fewer seeds than planned: VPG Hopper-v4 (1), PPO Hopper-v4 (2), PPO Walker2d-v4 (1), SAC Hopper-v4 (1).",
        "abc0 (VPG, PPO, SAC); abc1 (PPO); 1234567890-dirty (SAC)",
        "benchmark.mujoco --suite value-fits",
        "benchmark.mujoco --suite broadcast",
    ):
        assert line in text, line
    missing = text.split("Missing: ")[1].splitlines()[0]
    assert len(missing.split(", ")) == 26 and "PPO Hopper-v4" not in missing and "VPG HalfCheetah-v4" in missing
    assert (results / "results/curves.png").stat().st_size > 10_000
    assert "**0.40**" in out and "left out, not finished: ppo_Swimmer-v4_s0" in errors
    for cell in "ppo.py Hopper-v4", "vpg.py Ant-v4":
        assert f"left out, other arguments or no tests: {cell}, seeds [0]" in errors
    for seed in range(3):
        assert re.search(rf"left out, .*ppo_Ant-v4_s{seed}", errors)


def test_the_committed_report_is_that_of_the_committed_curves(tmp_path):
    for file in [*(ROOT / Args.results).glob("*.csv"), *(ROOT / Args.results).glob("*.json")]:
        shutil.copy(file, tmp_path)
    families = write(Args(tmp_path, ROOT / Args.studies, ROOT / Args.published))
    assert (tmp_path / "README.md").read_text() == (ROOT / Args.results / "README.md").read_text()
    assert "\n".join(summary_table(families)) in (ROOT / "README.md").read_text()


def test_a_study(results):
    """The final tenth of the curves, by name; without the other half of the comparison there is no study."""
    curves = [10] * 10 + [20] * 10, [40] * 10 + [0] * 10
    for seed, rets in enumerate(curves):
        keep_curve(results / "studies/value-fits", "trpo", "Hopper-v4", seed, rets, train_v_iters=0)
    with pytest.raises(RunError, match="only curves of"):
        study("value-fits", arguments(results))
    for seed, rets in enumerate(curves):
        keep_curve(results / "results", "trpo", "Hopper-v4", seed, rets, step=50_000 + 10_000 * seed)
    with pytest.raises(RunError, match="runs of several lengths"):
        study("value-fits", arguments(results))
    keep_curve(results / "results", "trpo", "Hopper-v4", 1, curves[1])
    lines = study("value-fits", arguments(results))
    assert "| TRPO, train_v_iters 0 | Hopper-v4 | 0, 1 | 1,000,000 | 10.0 ± 10.0 |  |" in lines  # the last 2 of 20 epochs: 20 and 0
    assert "| TRPO, train_v_iters 10 | Hopper-v4 | 0, 1 | 1,000,000 | 10.0 ± 10.0 | 0.0 (-20.0 to 20.0) |" in lines
    assert (results / "results/value-fits.png").stat().st_size > 10_000


def test_the_study_of_alpha_compares_equal_seeds_and_steps(results):
    folder = results / "studies/autotune"
    keep_curve(folder, "sac", "Hopper-v4", 0, range(1, 21), step=20_000, autotune=True, total_steps=400_000)
    for seed in 0, 1:
        keep_curve(results / "results", "sac", "Hopper-v4", seed, [2 * k if k <= 20 else 900 for k in range(1, 51)])
    lines = study("autotune", arguments(results))
    assert "| SAC, --autotune | Hopper-v4 | 0 | 400,000 | 19.5 |  |" in lines  # the last 2 of 20 tests
    assert "| SAC, alpha 0.2 | Hopper-v4 | 0 | 400,000 | 39.0 |  |" in lines


def test_interquartile_mean():
    assert interquartile_mean(np.array([100, 1, 2, 3, 4, 5, 6, -9])) == np.mean([2, 3, 4, 5])
    assert interquartile_mean(np.array([1.0, 2.0, 6.0])) == 3


def test_interval_resamples_within_cells():
    assert list(interval([np.array([1.0]), np.array([7.0])])) == [4, 4]  # one seed each: nothing to resample
    assert list(interval([np.array([0.0, 1.0])])) == [0, 1]  # means 0, 1/2, 1 with probabilities 1/4, 1/2, 1/4


def test_the_bug_broadcasts(restored_ddpg):
    """The loss of the study is that over all pairs, computed here one by one."""
    sys.modules.pop("benchmark.studies.ddpg_no_squeeze", None)
    ddpg_no_squeeze = importlib.import_module("benchmark.studies.ddpg_no_squeeze")
    q, rew, terminated, next_q = torch.randn(4, 1), torch.randn(4), torch.tensor([0.0, 1.0, 0.0, 0.0]), torch.randn(4, 1)
    for name in "Critic", "q_loss", "__file__":  # by the last one runs know their script
        assert getattr(ddpg, name) == getattr(ddpg_no_squeeze, name)
    target = ddpg.q_target(rew, terminated, next_q, 0.9)
    pairs = [(q[i] - rew[j] - 0.9 * (1 - terminated[j]) * next_q[i]) ** 2 for i in range(4) for j in range(4)]
    torch.testing.assert_close(ddpg_no_squeeze.q_loss(q, target), torch.cat(pairs).mean())
    critic = ddpg_no_squeeze.Critic(3, 1, (8,), torch.nn.ReLU)
    assert critic(torch.randn(4, 3), torch.randn(4, 1)).shape == (4, 1)
