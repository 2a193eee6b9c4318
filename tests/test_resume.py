"""A run that was stopped, by Ctrl-C, by a kill at any instant or by a full disk, goes on as if nothing had happened."""

import collections
import io
import itertools
import json
import os
import pathlib
import pickle
import random
import resource
import shutil
import signal
import sys
import threading
import tracemalloc
from dataclasses import dataclass, field, make_dataclass
from types import SimpleNamespace
from typing import NamedTuple

import gymnasium as gym
import numpy as np
import pytest
import torch
from conftest import ALL, BOTH, ROOT, Count, Trap, change_config, register, rows, run, run_dir, small
from torch import nn

import ppo
import sac
import td3
import vpg
from utils.args import RunArgs
from utils.envs import say_once
from utils.logger import Logger
from utils.process import Interrupted, RunError
from utils.run_dir import read_config, same_code
from utils.state import State


def tiny(script, folder, **changes):
    """Arguments of a run of 5 epochs, in a second or less; episodes are longer than epochs."""
    options = dict(env_id="Pendulum-v1", total_steps=600, steps_per_epoch=120)
    options |= dict(max_ep_len=None) if hasattr(script, "ReplayBuffer") else dict(minibatch_size=30)
    return small(script, folder, **options | changes)


def same(a, b):
    """Whether two run directories hold the same rows and the same parameters."""
    models = [torch.load(path / "model.pt", weights_only=True) for path in (a, b)]
    equal = models[0].keys() == models[1].keys() and all(torch.equal(models[0][k], models[1][k]) for k in models[0])
    return equal and rows(a) == rows(b)


@pytest.fixture
def interrupted(tmp_path, monkeypatch):
    """interrupted(script, n): the directory of a tiny run that gets a Ctrl-C in its n-th epoch, off-policy in its n-th block."""

    def train(script, n, **options):
        name, calls = "store" if hasattr(script, "ReplayBuffer") else "log", []
        method = getattr(Logger, name)

        def wrapped(self, **metrics):
            calls.append(1)
            if len(calls) == n:
                os.kill(os.getpid(), signal.SIGINT)
            return method(self, **metrics)

        monkeypatch.setattr(Logger, name, wrapped)
        with pytest.raises(SystemExit, match="^130$"):
            script.train(tiny(script, tmp_path / "cut", **options))
        return run_dir(tmp_path / "cut")

    return train


@ALL
@pytest.mark.parametrize("options", [{}, dict(env_id="Hopper-v4", save_freq=3)], ids=["Pendulum", "Hopper"])
def test_rows_and_weights_are_those_of_a_run_without_interruption(script, tmp_path, interrupted, options, capsys):
    script.train(tiny(script, tmp_path / "whole", **options))
    cut = interrupted(script, 4, **options)  # off-policy in the middle of an epoch
    assert f"python {script.__name__}.py --resume {cut}" in capsys.readouterr().out
    assert 0 < len(rows(cut)) < 5
    ac = script.train(script.Args(resume=str(cut)))
    assert same(cut, run_dir(tmp_path / "whole"))
    assert all(torch.equal(a, b) for a, b in zip(ac.parameters(), torch.load(cut / "model.pt").values(), strict=False))
    assert not list(cut.glob("**/*.part")) and len(list((cut / "checkpoint").iterdir())) == 1


KILLS = """
import multiprocessing, os, pathlib, random, shutil, sys, time
sys.path[:0] = ["tests", "."]
from test_resume import tiny
import torch._dynamo  # which the optimizers import: here once, and not in every child
import {name} as script
context = multiprocessing.get_context("fork")
folder = pathlib.Path(sys.argv[1])

def start(args):
    process = context.Process(target=lambda: (os.dup2(os.open(os.devnull, os.O_WRONLY), 1), script.train(args)))
    process.start()
    return process

def go_on():
    for path in folder.glob("cut/*/*_s0/checkpoint/*.ckpt"):
        return start(script.Args(resume=str(path.parent.parent))), True
    shutil.rmtree(folder / "cut", ignore_errors=True)
    return start(tiny(script, folder / "cut", **options)), False

options = dict(save_freq=1, total_steps=2400)
begin = time.time()
whole = start(tiny(script, folder / "whole", **options))
whole.join()
length, kills, resumed = time.time() - begin, 0, 0
random.seed(0)
while kills < 20:
    process, resumes = go_on()
    process.join(random.uniform(0, length / 5))
    if process.exitcode is None:
        kills, resumed = kills + 1, resumed + resumes
    else:  # it was at the end before all kills were spent: begin anew
        assert process.exitcode == 0
        shutil.rmtree(folder / "cut")
    process.kill()
    process.join()
process, _ = go_on()
process.join()
assert resumed > 5
"""


@BOTH
def test_twenty_kills_leave_the_same_run(script, tmp_path):
    run(sys.executable, "-c", KILLS.format(name=script.__name__), tmp_path, timeout=300)
    assert same(run_dir(tmp_path / "whole"), run_dir(tmp_path / "cut"))


@pytest.mark.parametrize("script", [ppo, sac])
def test_two_ranks(script, tmp_path):
    program = f"""
import os, signal, sys
sys.path[:0] = ["tests", "."]
from test_resume import tiny
import {script.__name__} as script
from utils.logger import Logger
log = Logger.log
def wrapped(self, **metrics):
    log(self, **metrics)
    if sys.argv[1].endswith("cut") and metrics["Epoch"] == 1 and os.environ["PMI_RANK"] == "1":
        os.kill(os.getpid(), signal.SIGINT)  # one rank hears of it first
Logger.log = wrapped
script.train(tiny(script, sys.argv[1], num_envs=2))
"""
    mpirun = ["mpirun", "-n", 2, sys.executable]
    run(*mpirun, "-c", program, tmp_path / "whole")
    cut = run(*mpirun, "-c", program, tmp_path / "cut", check=False)
    assert cut.returncode == 130, cut.stdout + cut.stderr
    path = run_dir(tmp_path / "cut")
    assert len(rows(path)) == 2 and f"mpirun -n 2 python {script.__name__}.py --resume {path}" in cut.stdout
    run(*mpirun, f"{script.__name__}.py", "--resume", path)
    assert same(path, run_dir(tmp_path / "whole"))
    with pytest.raises(RunError, match="2 ranks, not 1"):
        script.train(script.Args(resume=str(path)))


def test_a_shorter_run(tmp_path, interrupted, capsys):
    """Fewer steps than planned, of which some are done, are a run of that many; fewer than are done, an error."""
    td3.train(tiny(td3, tmp_path / "whole", total_steps=360))
    cut = interrupted(td3, 4)
    before = (cut / "progress.txt").read_bytes() + b"half a row"
    (cut / "progress.txt").write_bytes(before)
    with pytest.raises(RunError, match="--total-steps 100: the run has done 120 already"):
        td3.train(td3.Args(resume=str(cut), total_steps=100))
    assert (cut / "progress.txt").read_bytes() == before  # refused before anything is written
    td3.train(td3.Args(resume=str(cut), total_steps=360))
    assert same(cut, run_dir(tmp_path / "whole"))
    before = rows(cut)
    td3.train(td3.Args(resume=str(cut)))
    assert "nothing to do" in capsys.readouterr().out and rows(cut) == before


def drift(self, action):
    """Rewards depend on all steps so far, which no seed brings back."""
    obs, rew, *rest = Count.step(self, np.clip(action, -0.4, 0.4))
    self.total += 1
    return obs, rew + self.total, *rest


def drawn(generator):
    """A `reset` whose observations come from generator(seed)."""

    def reset(self, *, seed=None, options=None):
        self._np_random, self.k = self._np_random if seed is None else generator(seed), 0
        return np.array([self._np_random.random()]), {}

    return reset


register("Drifting-v0", length=100, step=drift, total=0)
register("Legacy-v0", length=100, reset=drawn(np.random.RandomState))  # NumPy's old kind, as dm_control's
register("Twister-v0", length=100, reset=drawn(lambda seed: np.random.Generator(np.random.MT19937(seed))))  # on other bits
register("Other-v0", length=100, reset=drawn(lambda seed: SimpleNamespace(random=lambda: 0.25)))  # that nobody here knows


@pytest.mark.parametrize("env_id, lost", [("Drifting-v0", 1), ("Other-v0", 1), ("Legacy-v0", 0), ("Twister-v0", 0)])
def test_environments_that_cannot_be_brought_back_cost_an_episode(env_id, lost, tmp_path, interrupted, capsys):
    """Whatever its generator, it trains; and rewards, too, tell whether the episode is the one that was left."""
    say_once.cache_clear()
    options = dict(env_id=env_id, max_ep_len=7, total_steps=360, save_freq=1)
    ppo.train(tiny(ppo, tmp_path / "whole", **options))
    cut = interrupted(ppo, 2, **options)
    ppo.train(ppo.Args(resume=str(cut)))
    message = f"{env_id} cannot be brought back to the middle of its episode: a new one begins"
    assert capsys.readouterr().err.count(message) == lost and len(rows(cut)) == 3
    assert same(cut, run_dir(tmp_path / "whole")) != lost


def test_a_checkpoint_that_one_rank_lacks_is_not_used(tmp_path):
    """As if the job had been killed when rank 0 had written its part, and rank 1 had not; nor is half a file."""
    options = "--env-id Pendulum-v1 --total-steps 240 --steps-per-epoch 120 --num-envs 2 --minibatch-size 30".split()
    mpirun = ["mpirun", "-n", 2, sys.executable, ROOT / "ppo.py"]
    run(*mpirun, *options, "--data-dir", tmp_path)
    path = run_dir(tmp_path)
    good = sorted((path / "checkpoint").iterdir())
    assert [file.name.partition("_")[2] for file in good] == ["rank0.ckpt", "rank1.ckpt"]
    shutil.copyfile(good[0], path / "checkpoint/900_rank0.ckpt")
    (path / "checkpoint/901_rank0.ckpt.part").write_bytes(b"half")
    assert "nothing to do" in run(*mpirun, "--resume", path).stdout
    run(*mpirun, "--resume", path, "--total-steps", 360)  # whose save deletes all others
    assert [file.name for file in sorted((path / "checkpoint").iterdir())] == ["901_rank0.ckpt", "901_rank1.ckpt"]


def test_a_longer_run(tmp_path, monkeypatch, capsys):
    """600 steps and then on to 960 are 960 steps; the replay buffer grows, and a progress.txt that was lost is there again."""
    td3.train(tiny(td3, tmp_path / "whole", total_steps=960))
    td3.train(tiny(td3, tmp_path / "cut"))
    cut = run_dir(tmp_path / "cut")
    (cut / "progress.txt").unlink()
    config = read_config(cut)
    td3.train(td3.Args(resume=str(cut)))
    assert read_config(cut) == config and config["finished"]  # there was nothing to do
    change_config(cut, finished=False)  # as a kill before the last line of config.json leaves it
    td3.train(td3.Args(resume=str(cut)))
    assert read_config(cut)["finished"] and len(rows(cut)) == 5
    with monkeypatch.context() as patch, pytest.raises(ZeroDivisionError) as error:  # before its first save
        patch.setattr(td3.ReplayBuffer, "collect", lambda *args: 1 / 0)
        td3.train(td3.Args(resume=str(cut), total_steps=960))
    sys.excepthook(error.type, error.value, error.tb)
    said = capsys.readouterr().err
    assert "Traceback" in said and said.endswith(f"ZeroDivisionError: division by zero\nto go on: python td3.py --resume {cut}\n")
    assert not read_config(cut)["finished"]
    td3.train(td3.Args(resume=str(cut)))
    assert same(cut, run_dir(tmp_path / "whole"))
    config = read_config(cut)
    assert config["total_steps"] == 960 and config["resumed"] == [{name: config[name] for name in ("versions", "git_commit")}] * 3


@pytest.fixture
def finished(tmp_path):
    ppo.train(tiny(ppo, "", data_dir=tmp_path, seed=np.int64(0), hidden_sizes=[8, 8], keep_checkpoints=True))  # as Python allows
    return run_dir(tmp_path)


def test_arguments_that_contradict_the_run(finished, tmp_path):
    for changes, words in [(dict(seed=1), "--seed 1"), (dict(hidden_sizes=(8,)), "--hidden-sizes"), (dict(lam=1.0), "--lam")]:
        with pytest.raises(RunError, match=f"{words}.*the run to resume has"):
            ppo.Args(resume=str(finished), **changes)
    with pytest.raises(RunError, match="made by ppo.py, not by vpg.py"):
        vpg.train(vpg.Args(resume=str(finished)))
    for flag, words in [("--minibatch-size=200", "200: the run to resume has 30"), ("--no_keep_checkpoints", "False: the run to")]:
        default = run(sys.executable, "ppo.py", "--resume", finished, flag, check=False)  # the default, but not this run's
        assert default.returncode == 1 and words in default.stderr and "Traceback" not in default.stderr
    change_config(finished, lam=None)  # an argument that the script has got since has its default, and is written down from now on
    with pytest.raises(RunError, match="--lam 0.5: the run to resume has 0.95"):
        ppo.Args(resume=str(finished), lam=0.5)
    ppo.train(ppo.Args(resume=str(finished), total_steps=601))
    assert json.loads((finished / "config.json").read_text())["lam"] == 0.95


@pytest.mark.parametrize("what", ["missing", "truncated", "sizes"])
def test_broken_run_directories_are_refused_in_one_line(finished, what):
    (checkpoint,) = (finished / "checkpoint").iterdir()
    if what == "missing":
        checkpoint.unlink()
    elif what == "truncated":
        os.truncate(checkpoint, checkpoint.stat().st_size // 2)
    else:
        change_config(finished, hidden_sizes=[5])
    with pytest.raises(RunError, match=str(finished)) as refused:
        ppo.train(ppo.Args(resume=str(finished)))
    assert "\n" not in str(refused.value) and (what != "sizes" or "size mismatch for pi" in str(refused.value))


def test_a_run_that_is_still_going_on_is_not_resumed(tmp_path, monkeypatch):
    update, refused = ppo.update, []

    def resume_meanwhile(*args):
        if (run_dir(tmp_path) / "checkpoint").exists():
            with pytest.raises(RunError, match="this run is still going on, in another process"):
                ppo.train(ppo.Args(resume=str(run_dir(tmp_path))))
            refused.append(1)
        return update(*args)

    monkeypatch.setattr(ppo, "update", resume_meanwhile)
    ppo.train(tiny(ppo, tmp_path, save_freq=1))
    assert len(refused) == 4 and [row["Epoch"] for row in rows(run_dir(tmp_path))] == list("01234")
    again = run("bash", "-c", f"{sys.executable} ppo.py --resume {run_dir(tmp_path)} <&-")  # now it is not; without a stdin
    assert "nothing to do" in again.stdout


@pytest.mark.parametrize("script, name", [(ppo, "progress.txt"), (ppo, "model.pt"), (td3, "2_rank0.ckpt")])
def test_a_full_disk(script, name, tmp_path, monkeypatch, capsys):
    """Stood for by a limit on the size of files, which this one meets half-way: the one before is left, and the run goes on."""
    options = dict(env_id="CartPole-v1") if script is ppo else {}
    script.train(tiny(script, tmp_path / "whole", **options))
    (file,) = run_dir(tmp_path / "whole").rglob(name)
    log, (soft, hard) = Logger.log, resource.getrlimit(resource.RLIMIT_FSIZE)

    def fill(self, **metrics):
        if metrics["Epoch"] == 3:
            resource.setrlimit(resource.RLIMIT_FSIZE, (file.stat().st_size // 2, hard))
        log(self, **metrics)

    with monkeypatch.context() as patch, pytest.raises(RunError) as full:
        patch.setattr(Logger, "log", fill)
        try:
            script.train(tiny(script, tmp_path / "cut", save_freq=1, **options))
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    cut = run_dir(tmp_path / "cut")
    capsys.readouterr()
    sys.excepthook(full.type, full.value, full.tb)
    error, hint = capsys.readouterr().err.splitlines()
    assert error.startswith(f"error: cannot write {cut}") and file.suffix in error and f"--resume {cut}" in hint
    assert not list(cut.rglob("*.part")) and torch.load(cut / "model.pt", weights_only=True)
    script.train(script.Args(resume=str(cut)))
    assert same(cut, run_dir(tmp_path / "whole"))


def test_a_kept_model_is_there_before_its_checkpoint(tmp_path, monkeypatch):
    monkeypatch.setattr(State, "write", lambda *args: 1 / 0)
    with pytest.raises(RunError, match="ckpt: division by zero"):
        ppo.train(tiny(ppo, tmp_path, keep_checkpoints=True))
    assert (run_dir(tmp_path) / "model_0.pt").exists()


def test_a_signal_stops_no_update_half_way(tmp_path):
    """In which a copied script may store metrics of its own."""
    with pytest.raises(Interrupted), Logger(tiny(ppo, tmp_path), ppo.__file__) as logger:
        for _ in logger.epochs(1, model=nn.Linear(1, 1)):
            logger.signals.got = [2]
            logger.store(GradNorm=1.0)
            stored = dict(logger.stored)
            logger.store(TotalEnvInteracts=1)
    assert stored == dict(GradNorm=dict(mean=[1.0]))


def test_a_run_that_a_break_has_ended_goes_on(tmp_path):
    args, model = tiny(ppo, tmp_path), torch.nn.Linear(1, 1)
    with Logger(args, ppo.__file__) as logger:
        for epoch in logger.epochs(4, model=model):
            logger.log(Epoch=epoch, TotalEnvInteracts=120 * (epoch + 1))
            if epoch == 1:
                logger.save()
                break
    with Logger(ppo.Args(resume=str(logger.dir)), ppo.__file__) as again:
        assert list(again.epochs(4, model=model)) == [2, 3]
    assert [row["Epoch"] for row in rows(logger.dir)] == ["0", "1"]


def test_arguments_of_other_kinds_come_back(tmp_path):
    kinds = [("numbers", list[int], field(default_factory=list)), ("path", pathlib.Path | None, None)]
    (tmp_path / "config.json").write_text(json.dumps(dict(script="mine.py", numbers=[3, 4], path="b")))
    args = make_dataclass("Mine", kinds, bases=(RunArgs,))(resume=str(tmp_path), numbers=[3, 4])
    assert (args.numbers, args.path) == ([3, 4], pathlib.Path("b"))


class Pair(NamedTuple):
    first: object
    second: object


@dataclass
class Node:
    value: object


class Thing:
    """What a copied script may keep in its buffer or beside it."""

    def __init__(self, seed=0):
        self.array, self.tensor, self.layer = np.zeros((3, 2)), torch.zeros(2), nn.Linear(2, 1)
        self.rng, self.random, self.view = np.random.default_rng(0), random.Random(0), self.array.reshape(-1)
        self.none, self.node = None, Node(0)
        self.optimizer = torch.optim.Adam(self.layer.parameters())
        self.device, self.kind, self.space, self.function = torch.device("cpu"), np.float32, gym.spaces.Discrete(2), min
        self.spread, self.shared = np.broadcast_to(0.0, 3), [1]
        self.things, self.me = {}, self


def structure(rng, depth=0):
    """A random value: plain, an array or tensor of any kind and shape, or a container of such values."""
    shape = tuple(rng.integers(0, 4, rng.integers(0, 3)))
    kinds = ["?", "i1", "u2", "i8", "f2", "f4", "f8", "c16", "U3", "S2", "M8[s]", [("x", "f4"), ("y", "i8", (2,))]]
    dtypes = [torch.bool, torch.uint8, torch.int64, torch.bfloat16, torch.float32, torch.complex64]
    leaves = [lambda: None, lambda: True, lambda: 2**100, lambda: -0.5, lambda: 1 + 2j, lambda: "é", lambda: b"x", set]
    leaves += [lambda: np.ones(shape, kinds[rng.integers(len(kinds))]), lambda: np.float16(0.5), lambda: np.int8(3)]
    leaves += [lambda: torch.ones(shape, dtype=dtypes[rng.integers(len(dtypes))]), lambda: torch.zeros(2, 3).shape]
    if depth == 3 or rng.random() < 0.3:
        return leaves[rng.integers(len(leaves))]()
    items = [structure(rng, depth + 1) for _ in range(rng.integers(0, 4))]
    containers = [list, tuple, lambda x: dict(enumerate(x)), lambda x: {("k", i): v for i, v in enumerate(x)}, Node]
    containers += [collections.deque, lambda x: collections.deque(x, 9), lambda x: collections.OrderedDict(enumerate(x))]
    containers += [lambda x: Pair(x, None), lambda x: collections.defaultdict(list, enumerate(x))]
    return containers[rng.integers(len(containers))](items)


def there_and_back(state, fresh):
    """Write a State and read the file into another."""
    file = io.BytesIO()
    state.write(file, dict(epoch=3))
    file.seek(0)
    assert fresh.read(file) == dict(epoch=3)


def test_every_kind_of_state_comes_back():
    """Also what has come, changed its kind or grown since the start; what was there at the start in place."""
    module, rng = sys.modules[__name__], np.random.default_rng(0)
    thing, coefficient, rets, queue = Thing(), torch.tensor(1.0), [], collections.deque(maxlen=5)
    thing.args, shared, groups = ppo.Args(seed=1), thing.shared, thing.optimizer.param_groups[0]
    state = State(dict(thing=thing, coefficient=coefficient, rets=rets, queue=queue), module, thing.args)
    assert thing.shared is shared and thing.optimizer.param_groups[0] is groups  # which the script may hold, too
    thing.view += 1
    thing.tensor, thing.none = torch.ones(3), Pair(np.ones(2), "now")
    thing.layer(torch.ones(2)).backward()
    thing.optimizer.step()
    thing.rng.random(), thing.random.random()
    thing.things = {k: structure(rng) for k in range(300)}
    thing.node.value, thing.spread = thing.shared, np.broadcast_to(2.0, 3)
    coefficient *= 1.5
    rets.append((1, np.zeros(2)))
    queue.extend(range(9))

    again, new_coefficient, new_rets, new_queue = Thing(), torch.tensor(1.0), [], collections.deque(maxlen=5)
    again.args = ppo.Args(seed=2)
    fresh = State(dict(thing=again, coefficient=new_coefficient, rets=new_rets, queue=new_queue), module, again.args)
    array, layer = again.array, again.layer
    there_and_back(state, fresh)
    assert repr(thing.things) == repr(again.things)  # which shows types, dtypes, shapes and a deque's maxlen
    assert again.array is array and again.layer is layer and again.me is again and np.shares_memory(again.view, array)
    assert again.args.seed == 2  # those of the run that goes on
    assert (array == 1).all() and repr(again.none) == repr(thing.none) and again.tensor.tolist() == [1, 1, 1]
    assert again.node.value is again.shared and again.spread.tolist() == [2, 2, 2]
    assert torch.equal(layer.weight, thing.layer.weight) and (again.device, again.kind) == (thing.device, np.float32)
    assert repr(again.optimizer.state_dict()["state"]) == repr(thing.optimizer.state_dict()["state"])
    assert again.rng.random() == thing.rng.random() and again.random.random() == thing.random.random()
    assert (new_coefficient, repr(new_rets), repr(new_queue)) == (1.5, repr(rets), repr(queue))


def test_what_a_script_has_added_to_its_state_since_is_said():
    layers, again = [nn.Linear(1, 1) for _ in range(2)], [nn.Linear(1, 1) for _ in range(2)]
    state = State(dict(ac=layers[0], critic=layers[1]), sys.modules[__name__])
    for things in dict(critic=again[1], ac=again[0]), dict(ac=again[0], critic=again[1], rets=[]):
        with pytest.raises(ValueError, match="the script keeps other things in its state now"):
            there_and_back(state, State(things, sys.modules[__name__]))


def test_a_checkpoint_calls_nothing(tmp_path):
    """Neither what Python has, nor a function of the script, which `take` would give and the last R of the pickle call."""
    for data in pickle.dumps(Trap(tmp_path / "trap")), b"cutils.state\ntake\n(S'kind'\nS'drawn'\ntR)R.":
        with pytest.raises((pickle.UnpicklingError, KeyError)):
            State(dict(thing=Thing()), sys.modules[__name__]).read(io.BytesIO(data))
    assert list(tmp_path.iterdir()) == []


REFUSED = {"a lock": dict(lock=threading.Lock()), "a count": dict(steps=itertools.count()), "a ndarray": [np.array([None])]}
REFUSED |= {"a float cannot change": 1.0, "a NoneType cannot change": None}


@pytest.mark.parametrize("message", REFUSED)
def test_state_that_could_not_come_back_is_refused_before_the_first_step(message):
    with pytest.raises(RunError, match=f"thing: --resume could not restore it: {message}"):
        State(dict(thing=REFUSED[message]), sys.modules[__name__])


def test_a_start_copies_no_buffer():
    """A replay buffer takes memory as it fills, and a start no time for it."""
    buffer = Thing()
    buffer.array = np.zeros((2**20, 64))  # 512 MiB
    tracemalloc.start()
    State(dict(buffer=buffer), sys.modules[__name__])
    assert tracemalloc.get_traced_memory()[1] < 2**22
    tracemalloc.stop()


def test_resumed_with_other_code(finished, tmp_path, monkeypatch, capsys):
    """Comments do not count; other code is said in one line and noted, for good. The run's own copy stays as it was."""
    text, mine = (ROOT / "ppo.py").read_text(), tmp_path / "ppo.py"
    monkeypatch.setattr(ppo, "__file__", str(mine))  # by which runs know their script
    for k, (code, differs) in enumerate([("# a remark\n" + text, False), (text + "other = 'code'\n", True), (text, True)]):
        mine.write_text(code)
        ppo.train(ppo.Args(resume=str(finished), total_steps=720 + 120 * k))
        said = f"is not the code of all of this run; its first is {finished}/ppo.py" in capsys.readouterr().err
        noted = read_config(finished)["resumed"][k].get("other_code", False)
        assert (said, noted, not same_code(finished, mine)) == (differs, differs, differs)
    assert (finished / "ppo.py").read_text() == text
