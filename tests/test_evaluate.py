"""Scores, films and refusals of `python -m utils.evaluate`, on runs of a second."""

import hashlib
import json
import math
import pathlib
import shutil
import sys

import imageio.v3 as iio
import numpy as np
import pytest
import torch
from conftest import ALL, OFF_POLICY, ON_POLICY, ROOT, Trap, change_config, register, run, small

from utils import evaluate
from utils.envs import make_env
from utils.evaluate import load_policy, play
from utils.process import RunError


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """The run directory and the trained model of a script, made when first asked for."""
    made = {}

    def get(script, **changes):
        key = (script.__name__, *changes.items())
        if key not in made:
            path = tmp_path_factory.mktemp(script.__name__)
            made[key] = script.train(small(script, path, exp_name="x", **changes)), path / "x/x_s0"
        return made[key]

    return get


@pytest.fixture
def ppo_run(runs, tmp_path):
    """A copy of a PPO run on CartPole, to do harm to; of other versions, whose arguments are left out, and of another machine."""
    path = shutil.copytree(runs(ON_POLICY[-1])[1], tmp_path / "copy")
    change_config(path, fast_matmul=False, brand_new=[1, 2], device="cuda:7", resume="somewhere")
    return path


@pytest.fixture(scope="module")
def gl():
    """Skips where MuJoCo cannot draw: asks Gymnasium itself, in processes of their own."""
    draw = "import gymnasium as g; e = g.make('InvertedPendulum-v4', render_mode='rgb_array'); e.reset(); e.render(); e.close()"
    if not any(run(sys.executable, "-c", draw, check=False, MUJOCO_GL=name).returncode == 0 for name in ("egl", "osmesa")):
        pytest.skip("MuJoCo can draw with neither EGL nor OSMesa here: apt install libegl1 libgl1, or libosmesa6")


def digest(run_dir):
    """What would show any change of a file or of its date."""
    files = (path for path in sorted(run_dir.rglob("*")) if path.is_file())
    return [(str(path), path.stat().st_mtime_ns, hashlib.sha256(path.read_bytes()).hexdigest()) for path in files]


def read(path):
    """The frames (T, height, width, 3) of an mp4 or a gif."""
    return iio.imread(path, plugin="FFMPEG") if path.suffix.lower() == ".mp4" else iio.imread(path, index=None, mode="RGB")


def refused(*words, run_dir, **options):
    """Loading is refused in one line that holds the words."""
    with pytest.raises(RunError) as error:
        load_policy(run_dir, **options)
    message = str(error.value)
    assert "\n" not in message and all(word in message for word in words), message


@ALL
def test_loaded_policy_is_the_trained_one(runs, script):
    """Bit for bit, with its statistics; and running it changes neither them nor a file nor torch's random state."""
    ac, run_dir = runs(script)
    before, random_state = digest(run_dir), torch.get_rng_state()
    env, act = load_policy(run_dir)
    assert act.deterministic == (script in OFF_POLICY)
    results = list(play(env, act, episodes=2))
    assert digest(run_dir) == before and torch.equal(torch.get_rng_state(), random_state)
    assert [length for _, length in results] == [50, 50] or script in ON_POLICY
    state, loaded = ac.state_dict(), act.module.state_dict()
    assert state.keys() == loaded.keys() and all(torch.equal(state[name], loaded[name]) for name in state)
    for obs in np.random.default_rng(0).normal(size=(20, *env.observation_space.shape)):
        for deterministic in (True, False):
            torch.manual_seed(5)
            expected = ac.act(obs[None], deterministic=deterministic)[0]
            torch.manual_seed(5)
            got = act(obs, deterministic=deterministic)
            assert np.array_equal(got, expected) and got.dtype == expected.dtype and env.action_space.contains(got)


def test_seed_makes_the_episodes(runs):
    env, act = load_policy(runs(ON_POLICY[-1])[1])
    results = []
    for seed in (0, 0, 1):
        torch.rand(1)  # what torch has drawn before is of no account
        results.append(list(play(env, act, episodes=4, seed=seed)))
    first, again, other = results
    assert first == again and first != other and len(set(first)) > 1
    assert list(play(env, act, episodes=2, seed=0)) == first[:2]


def test_command_line(ppo_run):
    done = run(sys.executable, "-m", "utils.evaluate", ppo_run, "-n", 3, "--seed", 4, "--json")
    result = json.loads(done.stdout)  # and nothing else
    env, act = load_policy(ppo_run)
    expected = list(play(env, act, episodes=3, seed=4))
    rets = [ret for ret, _ in expected]
    assert result["returns"] == rets and result["lengths"] == [length for _, length in expected]
    assert result["mean"] == pytest.approx(sum(rets) / 3)
    assert result["std"] == pytest.approx((sum((ret - sum(rets) / 3) ** 2 for ret in rets) / 3) ** 0.5)
    assert (result["min"], result["max"], result["deterministic"]) == (min(rets), max(rets), False)
    assert evaluate.evaluate(evaluate.Args(ppo_run, episodes=3, seed=4)) == result


@pytest.mark.parametrize("script, other", [(ON_POLICY[-1], "deterministic"), (OFF_POLICY[1], "no_deterministic")])
def test_which_policy(runs, script, other):
    """By default the one whose score the script logs."""
    run_dir = runs(script, env_id="Pendulum-v1")[1]
    env, act = load_policy(run_dir)
    for options, expected in ({}, script in OFF_POLICY), ({other: True}, script in ON_POLICY):
        result = evaluate.evaluate(evaluate.Args(run_dir, episodes=1, len=20, **options))
        assert result["deterministic"] == expected
        assert list(zip(result["returns"], result["lengths"], strict=True)) == list(play(env, act, 1, expected, 20))
        assert result["returns"] != [ret for ret, _ in play(env, act, 1, not expected, 20)]


def test_snapshots(runs, ppo_run):
    run_dir = runs(ON_POLICY[-1], total_steps=600, save_freq=1, keep_checkpoints=True)[1]
    (_, first), (_, last) = load_policy(run_dir, itr=0), load_policy(run_dir, itr=2)
    _, model = load_policy(run_dir)
    obs = torch.ones(1, 4)
    first, last, model = (policy.module.v(obs).item() for policy in (first, last, model))
    assert first != last == model
    refused("model_7.pt does not exist", "model_0.pt, model_1.pt, model_2.pt", run_dir=run_dir, itr=7)
    refused("model_7.pt does not exist", "--keep-checkpoints", run_dir=ppo_run, itr=7)


def test_copied_script_under_another_name(tmp_path, monkeypatch):
    """In a copy of the repository, with a network of the script's own that ppo.py does not have."""
    home, run_dir = tmp_path, tmp_path / "data/x/x_s0"
    shutil.copy(ROOT / "ppo.py", home)
    begin = "        super().__init__()\n"
    (home / "my_ppo.py").write_text((ROOT / "ppo.py").read_text().replace(begin, f"{begin}        self.mine = nn.Linear(1, 1)\n"))
    mine = evaluate.import_script(home / "my_ppo.py")
    mine.train(small(mine, home / "data", exp_name="x"))
    refused("my_ppo.py", str(ROOT), run_dir=run_dir)
    monkeypatch.setattr(evaluate, "ROOT", home)
    for folder in "another", "benchmark/studies":
        (home / folder).mkdir(parents=True)
        (home / folder / "my_ppo.py").write_text("import nothing")  # not the code of the run
    (home / "my_ppo.py").rename(home / "benchmark/studies/my_ppo.py")
    env, act = load_policy(run_dir)
    assert len(list(play(env, act))) == 1 and hasattr(act.module, "mine")
    (home / "benchmark/studies/my_ppo.py").unlink()
    refused("my_ppo.py", "No module named 'nothing'", run_dir=run_dir)
    change_config(run_dir, script="ppo.py")
    refused("ppo.py", "mine.weight", run_dir=run_dir)


def test_other_code_than_the_run_s_is_said(ppo_run, capfd):
    """In one line that names the run's copy, which is not executed."""
    copy = ppo_run / "ppo.py"
    copy.write_text(f"{copy.read_text()}\nopen({str(ppo_run / 'executed')!r}, 'w')\n")
    env, act = load_policy(ppo_run)
    (line,) = capfd.readouterr().err.splitlines()
    assert str(copy) in line and not (ppo_run / "executed").exists() and len(list(play(env, act))) == 1


def test_malicious_model_is_not_executed(ppo_run, tmp_path):
    trap = tmp_path / "executed"
    torch.save(Trap(trap), ppo_run / "model.pt")
    torch.load(ppo_run / "model.pt", weights_only=False)
    assert trap.exists()  # so the trap works
    trap.unlink()
    refused("model.pt", "not loaded", run_dir=ppo_run)
    assert not trap.exists()


def test_nothing_of_the_run_directory_is_executed(ppo_run, monkeypatch):
    """Neither as the script nor as the module that Gymnasium imports for an environment."""
    trap = ppo_run / "executed"
    (ppo_run / "evil.py").write_text(f"open({str(trap)!r}, 'w')")
    for name in (str(ppo_run / "evil.py"), "../evil.py", "utils/mpi.py", "..\\evil.py", "evil.py", "", ".py", "*.py", "pp[o].py"):
        change_config(ppo_run, script=name)
        refused("its script", run_dir=ppo_run)
    with monkeypatch.context() as patch:  # a run that was put into a folder of the repository
        patch.setattr(evaluate, "ROOT", ppo_run.parent)
        (ppo_run / "folder").mkdir()
        shutil.copy(ppo_run / "evil.py", ppo_run / "folder")
        change_config(ppo_run, script="evil.py")
        refused("its script", run_dir=ppo_run)
    monkeypatch.syspath_prepend(ppo_run.parent)
    for name in ("copy.evil:CartPole-v1", "copy.evil.more:CartPole-v1"):
        change_config(ppo_run, script="ppo.py", env_id=name)
        refused("execute", run_dir=ppo_run)
    (ppo_run / "package").mkdir()
    (ppo_run / "package/__init__.py").write_text((ppo_run / "evil.py").read_text())
    (ppo_run / "package/link").symlink_to("/tmp")  # leads out again
    change_config(ppo_run, env_id="copy.package.link:CartPole-v1")
    refused("execute", run_dir=ppo_run)
    assert not trap.exists()
    change_config(ppo_run, env_id="conftest:Count-v0")  # but others may be imported
    refused("size mismatch", run_dir=ppo_run)


@pytest.mark.parametrize(
    "harm, words",
    [
        (lambda path: shutil.rmtree(path), ["copy", "config.json"]),
        (lambda path: (path / "config.json").write_text("[]"), ["config.json"]),
        (lambda path: change_config(path, script=None), ["config.json"]),
        (lambda path: change_config(path, env_id=None), ["on None", "cannot be loaded"]),
        (lambda path: (path / "model.pt").unlink(), ["model.pt does not exist", "no model yet"]),
        (lambda path: (path / "model.pt").write_bytes((path / "model.pt").read_bytes()[:3000]), ["model.pt", "damaged"]),
    ],
)
def test_foreign_or_damaged_run_is_refused(ppo_run, harm, words):
    harm(ppo_run)
    refused(*words, run_dir=ppo_run)


def test_bad_arguments_are_refused(ppo_run, monkeypatch):
    monkeypatch.setenv("MUJOCO_GL", "glfw")  # which loading would set
    monkeypatch.setattr(evaluate.sys, "platform", "linux")
    for name in ("DISPLAY", "WAYLAND_DISPLAY"):
        monkeypatch.delenv(name, raising=False)
    avi, nowhere, mp4 = map(pathlib.Path, ("film.avi", "nowhere/film.mp4", "film.mp4"))
    refused = {"--episodes 0": dict(episodes=0), "--len 0": dict(len=0), "--seed -1": dict(seed=-1), "film.avi": dict(video=avi)}
    refused |= {str(nowhere): dict(video=nowhere), "choose one": dict(video=mp4, render=True), "no display": dict(render=True)}
    for words, options in refused.items():
        with pytest.raises(RunError, match=words):
            evaluate.evaluate(evaluate.Args(ppo_run, **options))


def test_what_environments_print_is_not_on_stdout_with_json(runs, tmp_path):
    """Neither from Python nor from C."""
    (tmp_path / "loud.py").write_text(
        "import os, gymnasium as gym\nfrom conftest import Count\n\n\nclass Loud(Count):\n    def __init__(self, **options):\n"
        "        os.write(1, b'from C')\n        print('from Python')\n        super().__init__(**options)\n\n\n"
        "gym.register('Loud-v0', Loud)\n"
    )
    run_dir = shutil.copytree(runs(ON_POLICY[-1], env_id="conftest:Count-v0")[1], tmp_path / "copy")
    change_config(run_dir, env_id="loud:Loud-v0")
    path = f"{tmp_path}:{ROOT / 'tests'}"
    done = run(sys.executable, "-m", "utils.evaluate", run_dir, "-n", 1, "--json", PYTHONPATH=path)
    assert json.loads(done.stdout)["returns"] == [6.0] and done.stdout.count("\n") == 1, done
    assert "from C" in done.stderr and "from Python" in done.stderr and "episode 0  return 6.00" in done.stderr


CLOCK = dict(metadata={"render_modes": ["rgb_array"], "render_fps": 100}, render_mode="rgb_array")
# 100 frames a second, 800 x 600 pixels, of a grey that grows with time
register("Clock-v0", 2000, render=lambda self: np.full((600, 800, 3), self.k % 250, np.uint8), **CLOCK)
STILL = np.zeros(2, np.float32)
FILMS = [("film.mp4", 2, 50, (360, 480, 3)), ("film.GIF", 2, 25, (180, 240, 3)), ("film.gif", 20, 25, None)]


@pytest.mark.parametrize("name, seconds, fps, shape", FILMS)
def test_film_keeps_time_and_stays_small(tmp_path, name, seconds, fps, shape):
    """Frame i shows what the clock showed i / fps seconds after the reset; a gif ends after 10 seconds."""
    steps = 100 * seconds
    result = list(play(make_env("Clock-v0"), lambda obs, deterministic: STILL, max_len=steps, video=tmp_path / name))
    assert result == [(steps * (steps + 1) / 2, steps)]
    meta = iio.immeta(tmp_path / name)
    frames = read(tmp_path / name)
    assert len(frames) == min(seconds * fps + 1, 10 * fps if name.lower().endswith("gif") else 10**9)
    assert (meta["fps"] if "fps" in meta else 1000 / meta["duration"]) == pytest.approx(fps)
    assert shape is None or frames.shape[1:] == shape
    assert frames.mean((1, 2, 3)) == pytest.approx(np.arange(len(frames)) * (100 / fps) % 250, abs=6)


def test_film_of_mujoco(runs, gl, tmp_path):
    """Hopper: the picture is no single colour and moves. The command finds MUJOCO_GL itself."""
    run_dir = runs(ON_POLICY[-1], env_id="Hopper-v4")[1]
    before, mp4, gif = digest(run_dir), tmp_path / "film.MP4", tmp_path / "film.gif"
    command = [sys.executable, "-m", "utils.evaluate", run_dir, "-n", 3, "-l", 12, "--video", mp4]
    done = run("env", "-u", "MUJOCO_GL", "-u", "DISPLAY", *command)
    assert done.stderr == "" and "film.MP4: 0." in done.stdout, done.stderr
    env, act = load_policy(run_dir, render_mode="rgb_array")
    assert list(play(env, act, 3, max_len=12, video=gif)) == list(play(*load_policy(run_dir), 3, max_len=12))
    env.close()
    for path, every, side in ((mp4, 3, 480), (gif, 5, 240)):  # of Hopper's 125 frames a second
        frames = read(path).astype(float)
        assert frames.shape == (math.ceil(3 * 13 / every), side, side, 3)
        assert frames.mean() > 20 and all(frame.std() > 20 for frame in frames)
        assert np.abs(np.diff(frames, axis=0)).mean((1, 2, 3)).max() > 0.5
        assert path.stat().st_size < 500_000
    assert digest(run_dir) == before


def test_camera_follows(runs, gl):
    """200 m further on, the hopper is where it was in the picture, in the same columns, and on the same chequered floor."""
    env, _ = load_policy(runs(ON_POLICY[-1], env_id="Hopper-v4")[1], render_mode="rgb_array")
    env.reset(seed=0)
    first, sim = env.render().astype(int), env.unwrapped
    sim.set_state(sim.data.qpos + 200 * np.eye(sim.model.nq)[0], sim.data.qvel)
    frames = first, env.render().astype(int)
    env.close()
    before, after = (np.nonzero(frame[..., 0] > frame[..., 2] + 30)[1] for frame in frames)  # the columns of its colours
    assert len(before) > 1000 and len(after) == pytest.approx(len(before), rel=0.3)
    assert 180 < before.mean() < 300 and after.mean() == pytest.approx(before.mean(), abs=10)
    floor_before, floor_after = (frame[-100:].std() for frame in frames)
    assert floor_before > 50 and floor_after == pytest.approx(floor_before, rel=0.3)


def test_no_opengl_is_said_in_one_line(runs, tmp_path):
    run_dir = runs(ON_POLICY[-1], env_id="Hopper-v4")[1]
    command = [sys.executable, "-m", "utils.evaluate", run_dir, "-l", 3, "--json", "--video", tmp_path / "x.gif"]
    done = run("env", "-u", "DISPLAY", *command, check=False, MUJOCO_GL="glfw")
    lines = done.stderr.splitlines()
    assert (done.returncode, done.stdout, len(lines)) == (1, "", 1) and lines[0].startswith("error: ")
    assert "libosmesa6" in lines[0] and "libegl1" in lines[0], done.stderr


def test_camera_that_breaks_down(tmp_path):
    clock = make_env("Clock-v0")
    clock.unwrapped.render = lambda: 1 / 0
    with pytest.raises(RunError, match="x.gif: cannot be filmed: division by zero$"):
        list(play(clock, lambda obs, deterministic: STILL, video=tmp_path / "x.gif"))
    clock.unwrapped.render_mode = None
    with pytest.raises(RunError, match="render_mode='rgb_array'"):
        list(play(clock, lambda obs, deterministic: STILL, video=tmp_path / "x.gif"))
    assert list(tmp_path.iterdir()) == []
