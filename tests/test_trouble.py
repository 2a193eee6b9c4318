"""What people bring along: signals, pipes, odd environments, launchers, spellings, clocks."""

import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from conftest import ALL, BOTH, ON_POLICY, ROOT, Count, register, rows, run, small, wait_until

import ppo
from utils import process
from utils.args import cli
from utils.check import check
from utils.envs import make_env
from utils.process import RunError

SMALL = "--env-id CartPole-v1 --total-steps 800 --steps-per-epoch 200 --num-envs 2 --minibatch-size 50 --exp-name x".split()


LONG = "--total-steps 1000000 --exp-name x --save-freq 100 --env-id"
TD3 = f"td3.py {LONG} Pendulum-v1 --steps-per-epoch 500 --update-after 300 --hidden-sizes 8 8 --num-test-episodes 1"


@pytest.mark.parametrize("words, signum", [(f"ppo.py {LONG} CartPole-v1", signal.SIGTERM), (TD3, signal.SIGHUP)])
def test_a_signal_leaves_a_checkpoint(words, signum, tmp_path):
    """SIGTERM under nohup, where SIGHUP is not heard; and SIGHUP, should the tests themselves run under nohup, too."""
    nohup = signum == signal.SIGTERM
    options = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT, env=os.environ | dict(OMP_NUM_THREADS="1"))
    options |= dict(preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_IGN if nohup else signal.SIG_DFL))
    process = subprocess.Popen([sys.executable, *words.split(), "--data-dir", tmp_path], **options)
    progress = tmp_path / "x/x_s0/progress.txt"  # with two rows the run is beyond its first checkpoint
    wait_until(lambda: process.poll() is not None or progress.exists() and progress.read_text().count("\n") > 2)
    if nohup:
        process.send_signal(signal.SIGHUP)
        time.sleep(1)
    for _ in range(2):  # as a terminal does that is closed
        process.send_signal(signum)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 128 + signum and "Traceback" not in err, err
    assert f"{signum.name}: writing a checkpoint" in out and f"--resume {tmp_path}/x/x_s0" in out.splitlines()[-1]
    assert ("SIGHUP" in out) == (signum == signal.SIGHUP)
    assert [path.name for path in (tmp_path / "x/x_s0/checkpoint").iterdir()] == ["2_rank0.ckpt"]  # the first is of epoch 0


def test_a_signal_in_the_middle_of_a_print_is_heard(monkeypatch):
    def say(text):
        raise RuntimeError("reentrant call inside <_io.BufferedWriter name='<stdout>'>")

    monkeypatch.setattr(process, "say", say)
    signals = process.Signals()
    signals._note(signal.SIGTERM, None)
    assert signals.got == [signal.SIGTERM]


def test_the_second_signal_ends_at_once(tmp_path):
    """The first would wait for the end of an epoch of a million steps."""
    options = "--total-steps 10000000 --steps-per-epoch 1000000 --exp-name x --env-id CartPole-v1 --data-dir".split() + [tmp_path]
    env = os.environ | dict(OMP_NUM_THREADS="1")
    command = [sys.executable, "-u", ROOT / "ppo.py", *map(str, options)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=env) as process:
        process.stdout.readline()
        process.send_signal(signal.SIGTERM)
        time.sleep(1.5)  # within a second it would be the same one
        process.send_signal(signal.SIGTERM)
        assert process.wait(10) == 143
    assert not (tmp_path / "x").exists()  # nothing had been reached


@pytest.mark.parametrize("reader", ["| head -1", "> /dev/full", "| (sleep 1)"])
def test_a_reader_that_goes_away_stops_nothing(reader, tmp_path):
    """The epochs are slow enough for the reader to be gone before the last lines are printed."""
    program = "import time, ppo, utils.display as d; d.SECONDS_BETWEEN_LINES = 0.01; u = ppo.update; "
    program += "ppo.update = lambda *x: (time.sleep(0.3), u(*x))[1]; ppo.train(ppo.cli(ppo.Args))"
    command = f"set -o pipefail; {sys.executable} -c '{program}' {' '.join(SMALL)} --data-dir {tmp_path} {reader}"
    done = run("bash", "-c", command, cwd=ROOT)
    assert "Traceback" not in done.stderr, done.stderr
    assert done.stderr.count("the output cannot be written any more") == 1 and done.stderr.count("\n") == 1
    assert len(rows(tmp_path / "x/x_s0")) == 4 and list((tmp_path / "x/x_s0/checkpoint").iterdir())


@pytest.mark.parametrize("rew", [np.float16(1), np.float32(0.1), np.array([0.1])], ids=["float16", "float32", "array"])
def test_rewards_of_other_kinds(rew):
    """Summed in their own kind, 3,000 ones were 2,048, and thousands of tenths not what they are."""

    def step(self, action):
        obs, _, terminated, truncated, info = Count.step(self, action)
        return obs.tolist(), rew, np.array([terminated]), truncated, info

    register("Kinds-v0", 10**6, step=step, reset=lambda self, **options: ([0.0], Count.reset(self, **options)[1]))
    env, ended = make_env("Kinds-v0", 3000), False
    env.reset()
    while not ended:
        obs, number, terminated, ended, _ = env.step(np.zeros(2, np.float32))
    assert env.ep_ret == sum([float(rew.item())] * 3000)
    assert (type(obs), type(number), terminated) == (np.ndarray, float, False)


@ALL
def test_spellings_of_a_wandb_agent(script):
    """And steps as physicists write them."""
    words = ["--norm_obs=False"] * (script in ON_POLICY) + ["--track=True", "--hidden_sizes=[32, 32]", "--total-steps", "1e6"]
    args = cli(script.Args, words)
    assert (args.track, args.hidden_sizes, args.total_steps) == (True, (32, 32), 10**6)
    assert not getattr(args, "norm_obs", False)
    assert cli(script.Args, ["--track=false", "--hidden_sizes=(8,)"]).hidden_sizes == (8,)
    assert cli(script.Args, ["--total-steps", "3000.0"]).total_steps == 3000
    for steps in "1.5", "1e400", "1E-1":
        with pytest.raises(SystemExit):
            cli(script.Args, ["--total-steps", steps])


@pytest.mark.parametrize("name, variable", [("torchrun", "WORLD_SIZE"), ("srun", "SLURM_STEP_NUM_TASKS")])
def test_other_launchers_start_nothing(name, variable, tmp_path, monkeypatch):
    monkeypatch.setenv(variable, "2")
    if name == "torchrun":
        monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    with pytest.raises(RunError, match=f"{name} has started 2 processes that know nothing of each other: take mpirun -n 2"):
        ppo.train(small(ppo, tmp_path))
    assert not any(tmp_path.iterdir())


def test_a_run_that_a_rank_starts_is_alone(tmp_path):
    """It inherits the environment of the rank, but not its line to the launcher."""
    program = "import subprocess, sys; from mpi4py import MPI; MPI.COMM_WORLD.rank and subprocess.run(sys.argv[1:], check=True)"
    run("mpirun", "-n", 2, sys.executable, "-c", program, sys.executable, ROOT / "ppo.py", *SMALL, "--data-dir", tmp_path)
    assert json.loads((tmp_path / "x/x_s0/config.json").read_text())["ranks"] == 1


def test_the_id_that_was_made_is_recorded(tmp_path, capsys):
    args = ppo.Args(env_id="conftest:Count")
    check(args)
    assert args.env_id == "conftest:Count-v0"
    ppo.train(small(ppo, tmp_path, env_id="CartPole", exp_name=None))
    assert json.loads((tmp_path / "ppo_CartPole-v1/ppo_CartPole-v1_s0/config.json").read_text())["env_id"] == "CartPole-v1"
    assert "(CartPole-v1, seed 0" in capsys.readouterr().out


def test_time_goes_on_across_a_resume(tmp_path, monkeypatch):
    now = iter(range(10**6, 0, -3600))  # a clock that is set back
    monkeypatch.setattr(time, "time", lambda: float(next(now)))
    ppo.train(small(ppo, tmp_path, exp_name="x"))
    ppo.train(ppo.Args(resume=str(tmp_path / "x/x_s0"), total_steps=800))
    times = [float(row["Time"]) for row in rows(tmp_path / "x/x_s0", without=())]
    assert len(times) == 4 and sorted(times) == times and 0 < times[0] and times[-1] < 100
    assert all(float(row["StepsPerSec"]) > 0 for row in rows(tmp_path / "x/x_s0", without=()))


@BOTH
def test_a_run_that_fails_before_its_first_row_leaves_nothing(script, tmp_path):
    def fail(self, *args, **options):
        raise OSError("no licence")

    for members in dict(reset=fail), dict(step=fail):
        register("Fails-v0", **members)
        with pytest.raises(OSError, match="no licence"):
            script.train(small(script, tmp_path, exp_name="x", env_id="Fails-v0"))
        assert list(tmp_path.iterdir()) == []


@BOTH
def test_progress_moves_within_an_epoch(script, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("utils.display.SECONDS_BETWEEN_LINES", 0.0)
    script.train(small(script, tmp_path, exp_name="x"))
    lines = [line for line in capsys.readouterr().out.splitlines() if "steps (" in line and " of " in line]
    assert len(lines) == (2 if script in ON_POLICY else 2 * (3 + 1)) and "0%" not in lines[0].split("(")[1][:2]
