"""The learning benchmark goes on where it was; its report against numbers computed by hand; the study's bug is one."""

import json
import re
import sys

import numpy as np
import pytest
import torch
from conftest import ROOT, run

from benchmark.report import Args, interquartile_mean, interval, load_cells, main, score_table, summary_table


def benchmark(tmp_path, *options):
    command = [sys.executable, "-m", "benchmark.mujoco", "--scripts", "vpg.py", "--env-ids", "InvertedPendulum-v4"]
    done = run(*command, "--data-dir", tmp_path / "data", "--results", tmp_path / "kept", *options, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    return int(re.search(r"finished before: (\d+)", done.stdout)[1])


def test_the_benchmark_makes_what_is_missing(tmp_path):
    options = ["--total-steps", 4000, "--seeds", 0, 1]
    assert benchmark(tmp_path, *options) == 0
    files = sorted(path.name for path in (tmp_path / "kept").iterdir())
    assert files == [f"vpg_InvertedPendulum-v4_s{seed}.{kind}" for seed in (0, 1) for kind in ("csv", "json")]
    kept = {name: (tmp_path / "kept" / name).read_text() for name in files}
    assert kept[files[0]].splitlines()[0] == "steps,ret,steps_per_sec"
    assert [line.split(",")[0] for line in kept[files[0]].splitlines()[1:]] == ["1000", "2000", "3000", "4000"]

    for file in (tmp_path / "kept").glob("*_s1.*"):
        file.unlink()
    assert benchmark(tmp_path, *options) == 2  # the curve of seed 1 comes from its run directory, without training
    assert {name: (tmp_path / "kept" / name).read_text() for name in files} == kept
    assert sorted(path.name for path in (tmp_path / "data").glob("*/*_s?*") if path.is_dir()) == [
        f"vpg_InvertedPendulum-v4_s{seed}" for seed in (0, 1)
    ]

    (tmp_path / "data").rename(tmp_path / "lost")
    (tmp_path / "kept" / files[0]).unlink()
    assert benchmark(tmp_path, *options) == 1  # seed 1 is known by its curve alone
    rets = {name: [line.split(",")[:2] for line in text.splitlines()] for name, text in kept.items()}
    again = (tmp_path / "kept" / files[0]).read_text()
    assert [line.split(",")[:2] for line in again.splitlines()] == rets[files[0]]
    assert benchmark(tmp_path, "--total-steps", 2000, "--seeds", 1) == 0  # other arguments are another run


PUBLISHED = """algo,env,steps,mean,std,source,note
ppo,Hopper,1000000,20,,A,
ppo,Hopper,1000000,10,,B,
ppo,Hopper,3000000,99,,C,longer
ppo,Walker2d,1000000,4,,A,
sac,Hopper,1000000,8,,A,
"""


@pytest.fixture
def results(tmp_path):
    (tmp_path / "published.csv").write_text(PUBLISHED)
    (tmp_path / "results").mkdir()

    def keep(script, env_id, seed, rets, **config):
        name = f"{script}_{env_id}_s{seed}" + "_other" * bool(config.get("gamma"))
        step = 1_000_000 // len(rets)
        rows = [f"{step * (k + 1)},{ret},1.0" for k, ret in enumerate(rets)]
        (tmp_path / "results" / f"{name}.csv").write_text("\n".join(["steps,ret,steps_per_sec", *rows]) + "\n")
        config = dict(script=f"{script}.py", env_id=env_id, seed=seed, total_steps=1_000_000, git_commit="abc") | config
        (tmp_path / "results" / f"{name}.json").write_text(json.dumps(config))

    # points are means over 10 epochs: the first is the mean of epochs 1 to 10
    keep("ppo", "Hopper-v4", 0, [10] * 10 + [20] * 10)  # points rise from 10 to 20
    keep("ppo", "Hopper-v4", 1, [40] * 10 + [0] * 10)  # points fall from 40 to 0
    keep("ppo", "Hopper-v4", 0, [100] * 20, gamma=0.5)  # other arguments, fewer seeds
    keep("ppo", "Walker2d-v4", 0, [1, 3] * 10)
    keep("sac", "Hopper-v4", 0, [1, 2, 16, 4, 4, 4, 4, 4, 4, 5], num_test_episodes=10)
    return tmp_path


def arguments(folder):
    return Args(folder / "results", folder / "studies", folder / "published.csv")


def test_cells(results, capsys):
    families = load_cells(arguments(results))
    assert [len(cells) for cells in families.values()] == [15, 15]
    cells = {(cell.algo, cell.env_id): cell for cells in families.values() for cell in cells}
    hopper, walker, sac = (cells[key] for key in [("ppo", "Hopper-v4"), ("ppo", "Walker2d-v4"), ("sac", "Hopper-v4")])
    # seed 0: 10 + k, seed 1: 40 - 4 k after k more epochs: the mean falls from (10 + 40) / 2
    assert (hopper.seeds, hopper.best, hopper.std, hopper.published, hopper.source) == (2, 25, 15, 20, "A")
    assert hopper.final == np.mean([10 + 9, 10 + 10, 40 - 36, 40 - 40])  # the last 2 of 20 epochs
    assert hopper.ratio == 1.25
    assert (walker.best, walker.ratio) == (2, 0.5)
    assert (sac.best, sac.final, sac.ratio) == (16, 5, 2)  # single tests count, not windows
    assert sum(cell.experiment is None for cell in cells.values()) == 27
    assert "left out, other arguments: ppo.py Hopper-v4, seeds [0]" in capsys.readouterr().err


def test_tables(results):
    families = load_cells(arguments(results))
    ppo, sac = (next(line for line in summary_table(families) if f"| {name} " in line) for name in ("PPO", "SAC"))
    assert ppo == "| PPO | missing | 25.0 / 20.0 (1.25) | 2.0 / 4.0 (**0.50**) | missing | missing |"
    assert sac == "| SAC | missing | 16.0 / 8.0 (2.00) | missing | missing | missing |"
    scores = {line.split(" | ")[0].strip("| "): line.strip("| ").split(" | ")[1:] for line in score_table(families)}
    assert scores["SAC"] == scores["off-policy"] == ["2.00", "2.00 to 2.00", "1 of 1"]
    # PPO's runs: 0.5, 2.0 and 0.5 of the published, the middle half of three being all of them; Hopper's two are resampled
    assert scores["PPO"] == ["1.00", "0.50 to 1.50", "1 of 2"]


def test_the_report_says_what_is_missing(results, capsys):
    main(arguments(results))
    text = (results / "results/README.md").read_text()
    assert "PPO Hopper-v4" not in text.split("Missing: ")[1].splitlines()[0]
    assert "VPG HalfCheetah-v4" in text.split("Missing: ")[1].splitlines()[0]
    assert "benchmark.mujoco --suite value-fits" in text
    assert "benchmark.mujoco --suite broadcast" in text
    assert "| PPO | Walker2d-v4 | 1 | 2.0 ± 0.0 | 2.0 ± 0.0 | 4.0 | A | **0.50** |" in text
    assert (results / "results/curves.png").stat().st_size > 10_000
    assert "**0.50**" in capsys.readouterr().out


def test_the_committed_tables_are_those_of_the_committed_curves():
    families = load_cells(Args(*(ROOT / path for path in (Args.results, Args.studies, Args.published))))
    for file in ("README.md", "benchmark/results/README.md"):
        assert "\n".join(summary_table(families)) in (ROOT / file).read_text()


def test_a_report_of_nothing_is_one_line(tmp_path):
    (tmp_path / "results").mkdir()
    done = run(sys.executable, "-m", "benchmark.report", "--results", tmp_path / "results", cwd=ROOT)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith("error: no finished runs in")


def test_interquartile_mean():
    assert interquartile_mean(np.array([100, 1, 2, 3, 4, 5, 6, -9])) == np.mean([2, 3, 4, 5])
    assert interquartile_mean(np.array([1.0, 2.0, 6.0])) == 3


def test_interval_resamples_within_cells():
    assert list(interval([np.array([1.0]), np.array([7.0])])) == [4, 4]  # one seed each: nothing to resample
    assert list(interval([np.array([0.0, 1.0])])) == [0, 1]  # means 0, 1/2, 1 with probabilities 1/4, 1/2, 1/4


def test_the_bug_broadcasts(monkeypatch):
    """The loss of the study is that over all pairs, computed here one by one; and without squeeze ddpg.py would say so."""
    import ddpg

    for name in ("Critic", "q_loss", "__file__"):
        monkeypatch.setattr(ddpg, name, getattr(ddpg, name))
    asserting = ddpg.q_loss
    from benchmark import ddpg_no_squeeze

    q, rew, terminated, next_q = torch.randn(4, 1), torch.randn(4), torch.tensor([0.0, 1.0, 0.0, 0.0]), torch.randn(4, 1)
    target = ddpg.q_target(rew, terminated, next_q, 0.9)
    pairs = [(q[i] - rew[j] - 0.9 * (1 - terminated[j]) * next_q[i]) ** 2 for i in range(4) for j in range(4)]
    torch.testing.assert_close(ddpg_no_squeeze.q_loss(q, target), torch.cat(pairs).mean())
    critic = ddpg_no_squeeze.Critic(3, 1, (8,), torch.nn.ReLU)
    assert critic(torch.randn(4, 3), torch.randn(4, 1)).shape == (4, 1)
    with pytest.raises(AssertionError):
        asserting(q, target)
