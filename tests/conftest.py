"""Small environments with known numbers, and helpers to run the scripts as a user does."""

import difflib
import json
import os
import pathlib
import shutil
import subprocess
import sys
import tempfile
import time

import gymnasium as gym
import numpy as np
import pytest

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
sys.path.insert(0, str(ROOT / "tests"))

import ddpg  # noqa: E402
import ppo  # noqa: E402
import sac  # noqa: E402
import td3  # noqa: E402
import trpo  # noqa: E402
import vpg  # noqa: E402

ON_POLICY = [vpg, trpo, ppo]
OFF_POLICY = [ddpg, td3, sac]
ALL = pytest.mark.parametrize("script", ON_POLICY + OFF_POLICY)
BOTH = pytest.mark.parametrize("script", [ppo, td3])  # a file of each family


def pytest_addoption(parser):
    parser.addoption("--script", help="run the tests of an algorithm file on this copy of it, with what was changed there")


def pytest_cmdline_main(config):
    """In a copy of the repository the script takes the place of the file that it resembles most."""
    if config.option.script is None:
        return None
    text = pathlib.Path(config.option.script).read_text()
    originals, lines = [pathlib.Path(module.__file__) for module in ON_POLICY + OFF_POLICY], text.splitlines()
    original = max(originals, key=lambda path: difflib.SequenceMatcher(None, path.read_text().splitlines(), lines).ratio())
    with tempfile.TemporaryDirectory() as folder:
        copy = pathlib.Path(folder, "copy")
        runs = ("data", "wandb", "checkpoint", "*.pt")
        shutil.copytree(ROOT, copy, ignore=shutil.ignore_patterns(".*", "venv", "__pycache__", *runs))
        (copy / original.name).write_text(text)
        tests = [f"tests/test_{name}.py" for name in ("math", "off_policy", "runs", "resume", "mpi", "trouble")]
        print(f"{config.option.script} in the place of {original.name}", flush=True)
        command = [sys.executable, "-m", "pytest", "-q", "-k", original.stem, *tests, "-n", config.getoption("numprocesses") or 0]
        return subprocess.run(list(map(str, command)), cwd=copy).returncode


class Count(gym.Env):
    """Step k of an episode shows [k] and pays k; the episode terminates after `length` steps. Actions change nothing."""

    observation_space = gym.spaces.Box(-np.inf, np.inf, (1,), np.float64)
    action_space = gym.spaces.Box(-0.4, 0.4, (2,), np.float32)

    def __init__(self, length=3):
        self.length = length

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.k = 0
        return np.array([0.0]), {}

    def step(self, action):
        assert self.action_space.contains(action), action
        self.k += 1
        return np.array([float(self.k)]), float(self.k), self.k == self.length, False, {}


gym.register("Count-v0", lambda **options: Count(**options))


def register(name, length=3, **members):
    """An environment that is Count with other members."""
    gym.registry.pop(name, None)
    gym.register(name, lambda **options: type("Mine", (Count,), members)(**dict(length=length) | options))


class Trap:
    """A pickle that makes a file when it is loaded."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


@pytest.fixture(params=ON_POLICY)
def script(request):
    return request.param


def small(script, tmp_path, **changes):
    """Arguments of a run of a second; off-policy the updates begin after 100 steps."""
    options = dict(env_id="CartPole-v1", total_steps=400, steps_per_epoch=200, num_envs=2, minibatch_size=50)
    if hasattr(script, "ReplayBuffer"):
        options = dict(env_id="Pendulum-v1", total_steps=240, steps_per_epoch=120, max_ep_len=50, num_test_episodes=1)
        options |= dict(hidden_sizes=(8, 8), batch_size=16, start_steps=50, update_after=100)
    return script.Args(**(options | dict(data_dir=str(tmp_path)) | changes))


def run(*command, cwd=ROOT, timeout=120, check=True, **env):
    """Run a command as a user would, which succeeds if `check`; `env` adds environment variables. Returns the CompletedProcess."""
    path = os.pathsep.join([str(pathlib.Path(sys.executable).parent), os.environ["PATH"]])
    environment = os.environ | dict(PATH=path, OMP_NUM_THREADS="1", COLUMNS="200") | env
    done = subprocess.run(list(map(str, command)), cwd=cwd, env=environment, capture_output=True, text=True, timeout=timeout)
    assert done.returncode == 0 or not check, done.stdout + done.stderr
    return done


def wait_until(holds, seconds=120):
    deadline = time.monotonic() + seconds
    while not holds() and time.monotonic() < deadline:
        time.sleep(0.05)


def rows(run_dir, without=("Time", "StepsPerSec")):
    """progress.txt as a list of dicts of strings."""
    header, *lines = (pathlib.Path(run_dir) / "progress.txt").read_text().splitlines()
    names = header.split("\t")
    return [{n: v for n, v in zip(names, line.split("\t"), strict=True) if n not in without} for line in lines]


def run_dir(folder):
    """The one run directory of seed 0 in a data directory."""
    (path,) = pathlib.Path(folder).glob("*/*_s0")
    return path


def change_config(run_dir, **changes):
    """Of a run, without the arguments that are None then."""
    config = json.loads((run_dir / "config.json").read_text()) | changes
    config = {name: value for name, value in config.items() if value is not None}
    (run_dir / "config.json").write_text(json.dumps(config))


def write_run(path, returns, **config):
    """A run directory of 4,000 steps as planned, with a row every 1,000; `returns` are its cells of AverageEpRet."""
    path.mkdir(parents=True)
    lines = [f"{k}\t{ret}\t{1000 * (k + 1)}\t10.0" for k, ret in enumerate(returns)]
    (path / "progress.txt").write_text("\n".join(["Epoch\tAverageEpRet\tTotalEnvInteracts\tStepsPerSec", *lines]) + "\n")
    config = dict(env_id="X-v0", seed=0, script="ppo.py", gamma=0.9, total_steps=4000) | config
    (path / "config.json").write_text(json.dumps(config))
    return path
