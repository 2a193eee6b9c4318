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
    before = (tmp_path / "kept/x_s0.csv").read_text()
    done = run(sys.executable, "-m", "benchmark.score", tmp_path / "data", "--save", tmp_path / "kept", cwd=ROOT)
    assert done.returncode == 1 and f"--save {tmp_path / 'kept'}: y_s0.csv is there already" in done.stderr
    assert (tmp_path / "kept/x_s0.csv").read_text() == before


def test_test_returns_count_where_there_are_some(tmp_path):
    """The best single test, not a window of epochs, and not the return in training."""
    write(tmp_path / "x_s0", [0, 0, 0, 0], seed=0, num_test_episodes=10)
    rows = (tmp_path / "x_s0/progress.txt").read_text().splitlines()
    tests = ["AverageTestEpRet", "3", "50", "7", "9"]
    (tmp_path / "x_s0/progress.txt").write_text("".join(f"{a}\t{b}\n" for a, b in zip(rows, tests, strict=True)))
    table, _ = score(tmp_path, "--save", tmp_path / "kept")
    assert table == [["ppo.py", "X-v0", "1", "50", "50", "9", "10", "0:", "50"]]
    assert score(tmp_path / "kept")[0] == table


def test_a_last_line_that_was_cut_off_does_not_finish_a_run(tmp_path):
    write(tmp_path / "x_s0", [5, 5, 5], seed=0)
    write(tmp_path / "x_s1", [1, 1, 1, 1], seed=1)
    for name, rest in dict(x_s0="4000", x_s1="5000\t7").items():
        with open(tmp_path / name / "progress.txt", "a") as file:
            file.write(rest)
    table, errors = score(tmp_path)
    assert [line[2:] for line in table] == [["1", "1", "1", "1", "10", "1:", "1"]]
    assert "left out, not finished: x_s0" in errors and errors.count("incomplete last line") == 2


def test_two_runs_of_one_name_are_not_kept_in_one_file(tmp_path):
    write(tmp_path / "a/x_s0", [1, 1, 1, 1], seed=0, gamma=0.5)
    write(tmp_path / "b/x_s0", [2, 2, 2, 2], seed=0)
    done = run(sys.executable, "-m", "benchmark.score", tmp_path / "a", tmp_path / "b", "--save", tmp_path / "kept", cwd=ROOT)
    assert done.returncode == 1 and not (tmp_path / "kept").exists()
    assert done.stderr == "error: --save: two of the runs are called x_s0; keep them in different directories\n"


def test_no_runs(tmp_path):
    done = run(sys.executable, "-m", "benchmark.score", tmp_path, cwd=ROOT)
    assert (done.returncode, done.stdout) == (1, "") and done.stderr == f"error: no finished runs below {tmp_path}\n"
