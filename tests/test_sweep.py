"""The sweep: names, checks before the first run, scheduling, failures, interruption; mostly with a script that trains nothing."""

import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from conftest import ROOT, change_config, rows, wait_until

from benchmark import pool
from benchmark import sweep as module
from benchmark.sweep import Args, main, parse, plan, sweep
from utils.process import RunError

FAKE = '''
import contextlib, itertools, json, os, pathlib, shutil, time
from dataclasses import asdict, dataclass

import tyro
import utils


@dataclass
class Args:
    env_id: str = "Fake-v0"
    seed: int = 0
    total_steps: int = 100
    gamma: float = 0.9
    hidden_sizes: tuple[int, ...] = (64, 64)
    norm_obs: bool = True
    target_kl: float = 0.1
    target_noise: float = 0.1
    torch_threads: int = 1
    exp_name: str | None = None
    data_dir: str = "data"
    resume: str | None = None


def train(args):
    """Writes what the Logger of a real script writes; after half of the steps it fails for gamma 0, and waits while told to."""
    assert os.environ["OMP_NUM_THREADS"] == "1"
    if os.path.exists("exit3"):
        exit(3)
    if args.resume:
        run_dir = pathlib.Path(args.resume)
        args = Args(**json.loads((run_dir / "config.json").read_text())["args"])
    else:
        parent = pathlib.Path(args.data_dir) / args.exp_name
        names = (f"{args.exp_name}_s{args.seed}" + (f"_{k}" if k else "") for k in itertools.count())
        for run_dir in (parent / name for name in names):
            with contextlib.suppress(FileExistsError):  # another process may have been faster
                run_dir.mkdir(parents=True)
                break
        config = asdict(args) | dict(script=os.path.basename(__file__), ranks=1, args=asdict(args))
        (run_dir / "config.json").write_text(json.dumps(config))
        shutil.copy(__file__, run_dir)
        (run_dir / "progress.txt").write_text("Epoch\\tAverageEpRet\\tTotalEnvInteracts\\n")
    os.write(1, b"an environment prints")
    print(f"{run_dir}  ({args.env_id}, seed {args.seed})", flush=True)
    (run_dir / "start").touch()
    with open(run_dir / "progress.txt", "a") as progress:
        progress.write(f"0\\t1.25\\t{args.total_steps // 2}\\n")
        progress.flush()
        if args.gamma == 0:
            raise ValueError("gamma is 0")
        while os.path.exists(f"hold{args.seed}"):
            time.sleep(0.02)
        progress.write(f"1\\t2.5\\t{args.total_steps}\\n")
    (run_dir / "end").touch()


if __name__ == "__main__":
    train(tyro.cli(Args))
'''


@pytest.fixture
def fake(tmp_path, monkeypatch):
    """A script `fake.py` in the current directory, which is empty otherwise."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    monkeypatch.setattr(module, "check", lambda args, ranks: None)  # there is no environment Fake-v0
    module.arguments.cache_clear()
    (tmp_path / "fake.py").write_text(FAKE)
    return tmp_path


def names(command):
    """Of a sweep's runs, as <name>_s<seed>."""
    return [str(run) for run in plan(*parse(shlex.split(command)))]


@pytest.mark.parametrize(
    "command, expected",
    [
        ("fake.py --seed 3 --gamma 0.5 --hidden-sizes 32 32", "fake_Fake-v0_s3"),
        ("fake.py --env-id A-v4 B-v4 --seed 0 1", "fake_A-v4_s0 fake_A-v4_s1 fake_B-v4_s0 fake_B-v4_s1"),
        ("fake.py --gamma 0.9 0.99", "fake_Fake-v0_gam0-9_s0 fake_Fake-v0_gam0-99_s0"),
        ("fake.py --gamma[g] 0.9 1e-3", "fake_Fake-v0_g0-9_s0 fake_Fake-v0_g1e-3_s0"),
        ("fake.py --env_id=ns/A-v0", "fake_ns-A-v0_s0"),
        ("fake.py --norm-obs True False", "fake_Fake-v0_norTrue_s0 fake_Fake-v0_norFalse_s0"),
        ("fake.py --hidden-sizes '64 64' 32", "fake_Fake-v0_hid64-64_s0 fake_Fake-v0_hid32_s0"),
        ("fake.py --hidden-sizes 64,64 '[32,32]'", "fake_Fake-v0_hid64,64_s0 fake_Fake-v0_hid32,32_s0"),
        ("fake.py --hidden_sizes='[64, 64]' --norm_obs=False --seed=2", "fake_Fake-v0_s2"),
        ("fake.py --target-kl 1 2 --target-noise 3 4 --gamma 0 1 --exp-name x", None),
        ("fake.py --exp-name x --env-id A-v0 B-v0 --gamma 0 1", "x_A-v0_gam0_s0 x_A-v0_gam1_s0 x_B-v0_gam0_s0 x_B-v0_gam1_s0"),
    ],
)
def test_names(fake, command, expected):
    if expected is None:  # two flags begin with the same three letters
        expected = " ".join(f"x_targetkl{k}_targetnoise{n}_gam{g}_s0" for k in "12" for n in "34" for g in "01")
    assert names(command) == expected.split()


def test_several_scripts(fake, capfd):
    """Each flag goes to those that have it."""
    (fake / "my_fake.py").write_text(FAKE.replace("    gamma:", "    ent_coef: float = 0.0\n    clip: bool = True\n    gamma:"))
    assert names("fake.py my_fake.py --env-id A-v0") == ["fake_A-v0_s0", "my_fake_A-v0_s0"]
    assert names("fake.py my_fake.py --exp-name x") == names("fake.py --exp-name x my_fake.py") == ["x_fake_s0", "x_my_fake_s0"]
    runs = plan(*parse("fake.py my_fake.py --ent-coef 0.01 0.02 --no-clip --seed 1".split()))
    assert list(map(str, runs)) == ["fake_Fake-v0_s1", "my_fake_Fake-v0_ent0-01_s1", "my_fake_Fake-v0_ent0-02_s1"]
    assert [(run.args.ent_coef, run.args.clip) for run in runs[1:]] == [(0.01, False), (0.02, False)]
    with pytest.raises(SystemExit):
        names("fake.py my_fake.py --ent-coefficient 0.01")
    assert "--ent-coefficient" in capfd.readouterr().err


@pytest.mark.parametrize("script, stem", [("ppo copy.py", "ppo-copy"), ("größe.py", "gr--e"), ("_ä.py", "script"), ("a/b.py", "b")])
def test_a_script_of_any_name_and_in_a_folder(fake, script, stem):
    """Its runs find utils/, and have names that can be given as --exp-name."""
    (fake / script).parent.mkdir(exist_ok=True)
    (fake / script).write_text(FAKE)
    assert main([script, "--skip-done"]) == 0
    assert (fake / f"data/{stem}_Fake-v0/{stem}_Fake-v0_s0/end").exists()
    assert [run.returncode for run in plan(*parse([script, "--skip-done"]))] == [0]


@pytest.mark.parametrize(
    "command, message",
    [
        ("ppo.py --seed 0 1 --clip-ratio 0.1 -1", r"ppo.py: --clip-ratio -1.0: has to be above 0"),
        ("sac.py --env-id Pendulum-v1 --num-envs 3 --steps-per-epoch 9 --mpi 2", r"--num-envs 3: .*ranks, 2; try 2 or 4"),
        ("ppo.py --env-id CartPole-v1 --exp-name a/b", r"--exp-name 'a/b'"),
        ("nowhere.py", r"nowhere.py: no such script"),
        ("ppo.py --resume x", r"--resume: is given twice, or is no argument that a sweep can vary"),
        ("ppo.py --workers 0", r"--workers 0: has to be at least 1"),
        ("ppo.py --wandb-project a/b a-b", r"two runs would be called ppo_HalfCheetah-v4_wana-b_s0"),
        ("", r"name a script"),
    ],
)
def test_refused_before_anything_is_written(tmp_path, monkeypatch, command, message):
    monkeypatch.chdir(ROOT)
    with pytest.raises(RunError, match=message):
        main(shlex.split(command) + ["--data-dir", str(tmp_path), "--total-steps", "1"])  # short, should it start after all
    assert not any(tmp_path.iterdir())


def test_print(fake, capsys):
    command = "fake.py --seed 0 1 --hidden-sizes '8 8' 8 --norm-obs False --print --mpi 4 --data-dir 'my data'"
    assert main(shlex.split(command)) == 0
    lines = [shlex.split(line) for line in capsys.readouterr().out.splitlines()]
    options = "--seed=1 --hidden-sizes 8 8 --no-norm-obs --exp-name fake_Fake-v0_hid8-8 --data-dir".split()
    assert len(lines) == 4 and lines[2][0] == "env" and lines[2][1].startswith(f"PYTHONPATH={ROOT}")
    assert lines[2][2:] == ["mpirun", "-n", "4", sys.executable, "fake.py", *options, "my data", "--torch-threads", "1"]
    main([str(ROOT / "ppo.py"), "--env-id", "CartPole-v1", "--torch-threads", "2", "--print"])
    assert shlex.split(capsys.readouterr().out)[:2] == [sys.executable, str(ROOT / "ppo.py")]
    assert plan(*parse("fake.py --torch-threads 2".split()))[0].args.torch_threads == 2
    assert {path.name for path in fake.iterdir()} <= {"fake.py", "__pycache__"}  # nothing is written


def test_at_most_so_many_workers(monkeypatch):
    """Of five runs that each are over when they are asked, two at a time."""
    running, at_once = [], []
    monkeypatch.setattr(pool.Run, "launch", lambda run: running.append(run) or at_once.append(len(running)))
    monkeypatch.setattr(pool.Run, "poll", lambda run: setattr(run, "returncode", running.remove(run) or 0))
    pool.execute([pool.Run("x", seed, args=SimpleNamespace(total_steps=1)) for seed in range(5)], workers=2)
    assert at_once == [1, 2, 1, 2, 1]


def test_a_failure_is_reported_and_stops_nothing(fake, capfd):
    assert main("fake.py --gamma 0 0.5 --seed 0 1 --workers 1".split()) == 1
    out = capfd.readouterr().out
    assert "fake_Fake-v0_gam0-5_s1: return 2.5, 0:00:0" in out and "finished: 2, failed: 2" in out
    report = re.search(r"^FAILED: (.*)\n  (.*)\n  (.*)$", out, re.M).groups()
    assert f"{sys.executable} fake.py --gamma=0 --seed=0 " in report[0]
    assert report[1] == "ValueError: gamma is 0 (exit status 1)"
    assert "Traceback" in (fake / report[2]).read_text() and report[2] == "data/fake_Fake-v0_gam0/fake_Fake-v0_gam0_s0.log"


def test_a_run_that_never_made_its_directory(fake):
    """It does not stop the other script, either."""
    (fake / "broken.py").write_text(FAKE.replace('if __name__ == "__main__":', 'if __name__ == "__main__":\n    1 / 0'))
    broken, fine = sweep(["broken.py", "fake.py"], {}, workers=1)
    assert (broken.run_dir, broken.returncode, broken.error()) == (None, 1, "ZeroDivisionError: division by zero (exit status 1)")
    assert fine.run_dir.name == "fake_Fake-v0_s0" and fine.returncode == 0


def test_python_function(fake):
    grid = {"env_id": "A-v0", "seed": [0, 1], "hidden_sizes[h]": ((8, 8), (16,)), "gamma": [0]}
    runs = sweep("fake.py", grid, workers=2, data_dir="x")
    expected = [("fake_A-v0_h8-8", 0, 1), ("fake_A-v0_h16", 0, 1), ("fake_A-v0_h8-8", 1, 1), ("fake_A-v0_h16", 1, 1)]
    assert [(run.name, run.seed, run.returncode) for run in runs] == expected
    assert json.loads((runs[1].run_dir / "config.json").read_text())["hidden_sizes"] == [16]
    assert str(runs[1].run_dir) == "x/fake_A-v0_h16/fake_A-v0_h16_s0"
    for key in ("exp_name", "data_dir"):
        with pytest.raises(RunError, match="no argument that a sweep can vary"):
            sweep("fake.py", {key: ["x"]})
    for seeds in range(2), np.arange(2), iter([0, 1]):  # a tuple is one value of an argument that is a tuple itself
        runs = sweep("fake.py", dict(seed=seeds, hidden_sizes=(8, 8)), print=True, data_dir="~/x")
        assert [(run.seed, run.args.hidden_sizes, run.name) for run in runs] == [(k, (8, 8), "fake_Fake-v0") for k in (0, 1)]
    assert runs[0].parent == Path.home() / "x/fake_Fake-v0"


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_interrupted_then_skip_done(fake, signum):
    """Seed 0 is through and seed 1 half through when the signal comes; seed 2 has not begun."""
    (fake / "hold1").touch()
    program = "import runpy, utils.check; utils.check.check = lambda *_: None; "  # there is no environment Fake-v0
    program += "runpy.run_module('benchmark.sweep', run_name='__main__', alter_sys=True)"
    words = [sys.executable, "-c", program, *"fake.py --seed 0 1 2 --workers 1".split()]
    options = dict(stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    options |= dict(env=os.environ | dict(PYTHONPATH=str(ROOT), PYTHONUNBUFFERED="1"))
    options |= dict(preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_DFL))  # should the tests run under nohup
    with subprocess.Popen(words, **options) as process:
        wait_until((fake / "data/fake_Fake-v0/fake_Fake-v0_s1/start").exists)
        for _ in range(1 if signum == signal.SIGINT else 2):  # as a terminal does that is closed
            process.send_signal(signum)
            time.sleep(0.05)
        out = process.communicate(timeout=60)[0]
    assert process.returncode == 128 + signum
    assert "python -m benchmark.sweep fake.py --seed 0 1 2 --workers 1 --skip-done" in out
    parent = fake / "data/fake_Fake-v0"
    assert (parent / "fake_Fake-v0_s0/end").exists() and not (parent / "fake_Fake-v0_s1/end").exists()
    assert "KeyboardInterrupt" in (parent / "fake_Fake-v0_s1.log").read_text()

    (fake / "hold1").unlink()
    runs = sweep("fake.py", dict(seed=[0, 1, 2]), workers=3, skip_done=True)
    assert [run.run_dir.name for run in runs] == ["fake_Fake-v0_s0", "fake_Fake-v0_s1_1", "fake_Fake-v0_s2"]
    assert [run.process is None for run in runs] == [True, False, False] and [run.returncode for run in runs] == [0, 0, 0]
    assert [row["TotalEnvInteracts"] for row in rows(parent / "fake_Fake-v0_s1")] == ["50"]  # left as it was
    assert all(run.returncode == 0 for run in plan(*parse("fake.py --seed 0 1 2 --skip-done".split())))
    other = plan(*parse("fake.py --seed 0 1 2 --gamma 0.8 --skip-done".split()))
    assert all(run.returncode is None for run in other)  # same names, other arguments


def test_skip_done_takes_no_run_of_other_code(fake, capfd):
    (run,) = sweep("fake.py", {})
    (fake / "fake.py").write_text("# a comment\n" + FAKE.replace("    seed: int = 0", "    seed:  int = 0"))
    assert plan(Args(("fake.py",), skip_done=True), {})[0].run_dir == run.run_dir
    (run.run_dir / "checkpoint").mkdir()
    (run.run_dir / "checkpoint" / "1_rank0.ckpt").touch()
    for finished in False, True:  # a kill between the last row and the last save leaves something to do
        change_config(run.run_dir, finished=finished)
        (again,) = plan(Args(("fake.py",), skip_done=True), {})
        assert (again.returncode, again.resumes) == ((0, None) if finished else (None, run.run_dir))
    (fake / "fake.py").write_text(FAKE.replace("1.25", "1.26").replace("    seed: int = 0", "    seed: int = 0\n    new: int = 0"))
    capfd.readouterr()
    (again,) = plan(Args(("fake.py",), skip_done=True), {})
    assert (again.run_dir, again.resumes, again.returncode) == (None, None, None) and again.outdated == run.run_dir
    (line,) = capfd.readouterr().err.splitlines()
    assert line.startswith(f"{run.run_dir}: was made by other code")
    (again,) = sweep("fake.py", {}, skip_done=True)
    assert str(again.run_dir) == f"{run.run_dir}_1"
    capfd.readouterr()
    assert plan(Args(("fake.py",), skip_done=True), {})[0].run_dir == again.run_dir and capfd.readouterr().err == ""


def test_skip_done_resumes_from_a_checkpoint(fake):
    """And what the earlier attempt printed is not this one's."""
    run_dir = sweep("fake.py", dict(gamma=[0]))[0].run_dir
    (run_dir / "checkpoint").mkdir()
    (again,) = plan(*parse("fake.py --gamma 0 --skip-done".split()))
    assert again.resumes is None  # nothing in there yet
    (run_dir / "checkpoint" / "1_rank0.ckpt").touch()
    (fake / "exit3").touch()
    (again,) = sweep("fake.py", dict(gamma=[0]), skip_done=True)
    assert again.command[-4:] == [sys.executable, "fake.py", "--resume", str(run_dir)] and again.fraction_before == 0.5
    assert again.run_dir == run_dir and again.error() == "no output (exit status 3)"
    assert "ValueError: gamma is 0" in again.log.read_text()
    change_config(run_dir, ranks=2)
    (again,) = plan(*parse("fake.py --gamma 0 --skip-done --mpi 2".split()))
    assert again.resumes is None  # the second rank had not written its part


def test_two_sweeps_of_one_name_at_once(fake):
    """Each has a log of its own and knows which directory is its run's."""
    (fake / "hold0").touch()
    runs = [plan(Args(("fake.py",)), {"gamma": [gamma]})[0] for gamma in ("0.5", "0.6", "0.7")]
    for run in runs:
        run.launch()
    wait_until(lambda: [run.poll() for run in runs] and all(run.run_dir for run in runs))
    (fake / "hold0").unlink()
    assert [run.process.wait(60) for run in runs] == [0, 0, 0]
    gammas = [json.loads((run.run_dir / "config.json").read_text())["gamma"] for run in runs]
    assert gammas == [0.5, 0.6, 0.7] and len({run.log for run in runs}) == 3


def test_time_left_and_progress(fake):
    """One run is through after 10 s, two have done half in 5 s; half a run each and three whole ones are left for 2 workers."""
    runs = plan(Args(("fake.py",)), {"seed": list("012345")})
    for run, (seconds, returncode) in zip(runs, [(10, 0), (5, None), (5, None)], strict=False):
        run.run_dir, run.process, run.seconds, run.returncode = fake / str(run), object(), seconds, returncode
        run.run_dir.mkdir()
        row = "50\t3.5\t\n" if returncode is None else "100\t3.5\t9\n"
        (run.run_dir / "progress.txt").write_text(f"TotalEnvInteracts\tAverageEpRet\tAverageTestEpRet\n{row}75\t")  # cut off
    assert pool.summary(runs, 2) == "1 finished, 2 running, 3 waiting, 0 failed, 0:00:20 left"
    assert runs[1].progress() == (0.5, "3.5") and runs[0].progress() == (1, "9.0") and runs[5].progress() == (0, "-")
