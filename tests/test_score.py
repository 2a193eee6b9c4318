"""The benchmark's score against numbers computed by hand."""

from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
from conftest import write_run

from benchmark.score import Args, Experiment, compare, main
from utils.process import RunError


@pytest.fixture
def score(capsys):
    """A function that prints the scores of runs; returns the cells of the lines below the header, and stderr."""

    def score(*paths, **options):
        main(Args(paths, window=2, **options))
        out, errors = capsys.readouterr()
        return [line.split() for line in out.splitlines()[1:] if line], errors

    return score


def test_seeds_are_averaged_and_other_experiments_kept_apart(score, tmp_path):
    write_run(tmp_path / "data/x_s0", [0, 10, 20, 0], seed=0)  # windows of 2: 5, 15, 10
    write_run(tmp_path / "data/x_s1", [0, 40, "", 0], seed=1)  # blank where no episode ended: 20, 40, 0
    write_run(tmp_path / "data/y_s0", [1, 1, 1, 1], seed=0, gamma=0.5)
    write_run(tmp_path / "data/z_s0", [1, 1], seed=5)  # unfinished
    table, errors = score(tmp_path / "data", save=tmp_path / "kept")
    assert table == [
        ["x", "X-v0", "2", "27.5", "27.5", "5", "10", "0:", "15,", "1:", "40"],
        ["y", "X-v0", "1", "1", "1", "1", "10", "0:", "1"],
    ]
    assert "z_s0" in errors
    assert score(tmp_path / "kept")[0] == table
    before = (tmp_path / "kept/x_s0.csv").read_text()
    with pytest.raises(RunError, match=f"--save {tmp_path / 'kept'}: x_s0.csv is there already"):
        score(tmp_path / "data", save=tmp_path / "kept")
    assert (tmp_path / "kept/x_s0.csv").read_text() == before


def test_test_returns_count_where_there_are_some(score, tmp_path):
    """The best single test, not a window of epochs, and not the return in training."""
    write_run(tmp_path / "x_s0", [0, 0, 0, 0], seed=0, num_test_episodes=10)
    rows = (tmp_path / "x_s0/progress.txt").read_text().splitlines()
    tests = ["AverageTestEpRet", "3", "50", "7", "9"]
    (tmp_path / "x_s0/progress.txt").write_text("".join(f"{a}\t{b}\n" for a, b in zip(rows, tests, strict=True)))
    table, _ = score(tmp_path, save=tmp_path / "kept")
    assert table == [["x", "X-v0", "1", "50", "50", "9", "10", "0:", "50"]]
    assert score(tmp_path / "kept")[0] == table


def test_a_seed_without_tests_costs_only_itself():
    rows = [pd.DataFrame(dict(steps=[1, 2], ret=1.0, **tests)) for tests in (dict(test_ret=[3.0, 4.0]), {})]
    runs = {seed: SimpleNamespace(rows=table, config={}) for seed, table in enumerate(rows)}
    assert Experiment("X-v0", "x", runs).tests().to_dict() == {0: {1: 3.0, 2: 4.0}}


def test_what_is_refused(score, tmp_path):
    write_run(tmp_path / "a/x_s0", [1, 1, 1, 1], seed=0, gamma=0.5)
    write_run(tmp_path / "b/x_s0", [2, 2, 2, 2], seed=0)
    with pytest.raises(RunError, match="--save .*: x_s0.csv is there already, or two runs are called so"):
        score(tmp_path / "a", tmp_path / "b", save=tmp_path / "kept")
    assert not (tmp_path / "kept").exists()
    with pytest.raises(RunError, match="--compare 'x' 'sac': no environment has both; there are 'x'"):
        score(tmp_path / "a", compare=("x", "sac"))


def test_a_comparison_by_hand():
    """Resampled means of a are 0, 1, 2 with probabilities 1/4, 1/2, 1/4; of the four pairs b is above in two, equal in one."""
    difference, low, high, probability = compare(np.array([0.0, 2.0]), np.array([1.0, 2.0]))
    assert (difference, low, high, probability) == (0.5, -1, 2, 2.5 / 4)
    assert compare(np.array([5.0]), np.array([3.0])) == (-2, -2, -2, 0)
    rng = np.random.default_rng(1)
    a, b = rng.normal(size=50), rng.normal(size=200) + 1
    error = 1.96 * (a.var() / 50 + b.var() / 200) ** 0.5  # by the central limit theorem
    difference, low, high, _ = compare(a, b)
    assert (low, high) == pytest.approx((difference - error, difference + error), abs=0.1 * error)


def test_experiments_are_compared_by_their_final_returns(score, tmp_path):
    for seed in range(5):
        write_run(tmp_path / f"ppo_X-v0_s{seed}", [0.9, 0.9, 0.1, 0.1], seed=seed)
        write_run(tmp_path / f"my_ppo_X-v0_s{seed}", [0, 0, 0.32, 0.53], seed=seed)
        write_run(tmp_path / f"ppo_Y-v0_s{seed}", [1, 1, 1, 1], seed=seed, env_id="Y-v0")
    write_run(tmp_path / "my_ppo_Y-v0_s0", [0, 0, 0, 0], seed=0, env_id="Y-v0")
    lines = [" ".join(line) for line in score(tmp_path, compare=("ppo", "my_ppo"))[0]]
    assert lines[4:6] == [
        "X-v0, final return of my_ppo (5 seeds) minus that of ppo (5 seeds):",
        "0.325 (95% interval 0.325 to 0.325), probability of improvement 1.00",
    ]
    assert lines[6].startswith("Y-v0, final return of my_ppo (1 seeds)") and lines[8].startswith("fewer than 5 seeds")
