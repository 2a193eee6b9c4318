"""The benchmark's score against numbers computed by hand."""

import json
import sys

from conftest import ROOT, run


def write(path, returns, **config):
    path.mkdir(parents=True)
    lines = [f"{1000 * (k + 1)}\t{ret}\t10.0" for k, ret in enumerate(returns)]
    (path / "progress.txt").write_text("\n".join(["TotalEnvInteracts\tAverageEpRet\tStepsPerSec", *lines]) + "\n")
    (path / "config.json").write_text(json.dumps(dict(script="ppo.py", env_id="X-v0", total_steps=4000, gamma=0.9) | config))


def score(*options):
    done = run(sys.executable, "-m", "benchmark.score", *options, "--window", 2, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    return [line.split() for line in done.stdout.splitlines()[1:]], done.stderr


def test_seeds_are_averaged_and_other_experiments_kept_apart(tmp_path):
    write(tmp_path / "data/x_s0", [0, 10, 20, 0], seed=0)  # windows of 2: 5, 15, 10
    write(tmp_path / "data/x_s1", [0, 40, "", 0], seed=1)  # blank where no episode ended: 20, 40, 0
    write(tmp_path / "data/y_s0", [1, 1, 1, 1], seed=0, gamma=0.5)
    write(tmp_path / "data/z_s0", [1, 1], seed=5)  # unfinished
    table, errors = score(tmp_path / "data", "--save", tmp_path / "kept")
    assert table == [
        ["ppo.py", "X-v0", "1", "1", "1", "1", "10", "0:", "1"],
        ["ppo.py", "X-v0", "2", "28", "28", "5", "10", "0:", "15,", "1:", "40"],
    ]
    assert "z_s0" in errors
    assert score(tmp_path / "kept")[0] == table


def test_test_returns_count_where_there_are_some(tmp_path):
    """The best single test, not a window of epochs, and not the return in training."""
    write(tmp_path / "x_s0", [0, 0, 0, 0], seed=0, num_test_episodes=10)
    rows = (tmp_path / "x_s0/progress.txt").read_text().splitlines()
    tests = ["AverageTestEpRet", "3", "50", "7", "9"]
    (tmp_path / "x_s0/progress.txt").write_text("".join(f"{a}\t{b}\n" for a, b in zip(rows, tests, strict=True)))
    table, _ = score(tmp_path, "--save", tmp_path / "kept")
    assert table == [["ppo.py", "X-v0", "1", "50", "50", "9", "10", "0:", "50"]]
    assert score(tmp_path / "kept")[0] == table
