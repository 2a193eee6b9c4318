"""Curves against numbers computed by hand, and what a user may get wrong."""

from pathlib import Path

import matplotlib
import numpy as np
import pandas as pd
import pytest
from conftest import write_run

from utils.plot import LOOKS, Args, average, curve, group_runs, load_runs, main, one_per_seed, plot
from utils.process import RunError
from utils.runs import Run


def memory(returns, steps=None, name="ppo", run_dir="x_s0", **config):
    """A Run in memory."""
    steps = steps or [1000 * (k + 1) for k in range(len(returns))]
    rows = pd.DataFrame(dict(AverageEpRet=returns, Performance=returns, TotalEnvInteracts=steps), dtype=float)
    config = dict(env_id="X-v0", seed=0) | config
    return Run(Path(run_dir), config, config["env_id"], name, rows)


def data(ax):
    """The lines of a panel: [(x, y)]."""
    return [(line.get_xdata().tolist(), line.get_ydata().tolist()) for line in ax.lines]


def legend(fig):
    return [text.get_text() for text in fig.legends[0].get_texts()]


def points(run, xaxis="TotalEnvInteracts", value="Performance", smooth=1):
    """x and y of a run's curve."""
    y = curve(run, xaxis, value, smooth)
    return y.index.tolist(), y.tolist()


@pytest.mark.parametrize("window", [1, 2, 3, 4, 7])
def test_smoothing_is_the_reference_convolution(window):
    y = np.random.default_rng(0).normal(size=9)
    convolve = lambda a: np.convolve(a, np.ones(window), "same")  # noqa: E731
    np.testing.assert_allclose(points(memory(y), smooth=window)[1], convolve(y) / convolve(np.ones(9)), atol=1e-12)


def test_smoothing_skips_blanks_and_stays_within_the_rows():
    nan = np.nan
    assert points(memory([1, nan, 3, nan, nan]), smooth=3) == ([1000, 2000, 3000, 4000], [1, 2, 3, 3])
    assert points(memory([1.0, 2, 6]), smooth=11)[1] == [3, 3, 3]
    assert points(memory([1e20, 0, 0, 5, 7, 0]), smooth=2)[1][3:] == [2.5, 6, 3.5]  # no running sum's debris


def averaged(curves, **options):
    """Lists x, line, low, high of the average of curves {x: y}."""
    return [array.tolist() for array in average([pd.Series(xy, dtype=float) for xy in curves], **options)]


def test_average_interpolates_and_is_cut_at_the_shortest():
    assert averaged([{1: 1, 2: 2}, {1: 3, 2: 10}]) == [[1, 2], [2, 6], [1, 2], [3, 10]]
    assert averaged([{1: y} for y in (0, 2, 10)], est="median")[1] == [2]
    # the second: 5 at 5, 15 at 10, 25 at 15, 40 at 20
    x, line, low, high = averaged([{0: 0, 10: 10, 20: 20}, {5: 5, 15: 25, 40: 100}])
    assert (x, line) == ([5, 10, 15, 20], [5, 12.5, 20, 30])
    assert (low, high) == ([5, 10, 15, 20], [5, 15, 25, 40])


def test_bootstrapped_interval():
    y = np.random.default_rng(1).normal(size=40) * 3 + 7
    _, line, low, high = averaged([{1: number} for number in y], band="ci")
    error = 1.96 * y.std() / 40**0.5  # of the mean, by the central limit theorem
    assert line == pytest.approx([y.mean()])
    assert (low[0], high[0]) == pytest.approx((y.mean() - error, y.mean() + error), abs=0.15 * error)
    assert averaged([{1: number} for number in y], band="ci")[2] == low  # the same figure every time


@pytest.mark.parametrize("tests, expected", [(["", "", ""], [1, 3]), (["", "7", ""], [7]), (None, [1, 3])])
def test_performance_is_the_test_return_where_there_is_one(tests, expected, tmp_path):
    file = write_run(tmp_path / "x_s0", [1, "", 3]) / "progress.txt"
    if tests:
        mine = ["steps\tret", *["8\t8"] * 3]  # columns of a script's own, whose names kept curves have for others
        lines = zip(file.read_text().splitlines(), ["AverageTestEpRet", *tests], mine, strict=True)
        file.write_text("".join("\t".join(cells) + "\n" for cells in lines))
    (loaded,) = load_runs([tmp_path])
    assert points(loaded)[1] == expected
    assert points(loaded, value="AverageEpRet") == ([1000, 3000], [1, 3])


def test_groups():
    aside = dict(seed=1, exp_name="e", data_dir="d", device="cuda", wandb_group="g", command="c", versions={}, git_commit="f")
    aside |= dict(finished=True, resumed=[dict(versions={}, git_commit="g")])
    runs = [memory([1], gamma=0.9), memory([2], gamma=0.9, **aside), memory([3], gamma=0.9, env_id="Y-v0")]
    runs += [memory([4], gamma=0.9, name="trpo")]
    assert group_runs(runs) == {("X-v0", "ppo"): runs[:2], ("Y-v0", "ppo"): runs[2:3], ("X-v0", "trpo"): runs[3:]}
    runs.append(memory([5], gamma=0.5))  # one name for two experiments: the labels say what differs
    labels = [("X-v0", "ppo, gamma=0.9"), ("Y-v0", "ppo, gamma=0.9"), ("X-v0", "trpo"), ("X-v0", "ppo, gamma=0.5")]
    assert list(group_runs(runs)) == labels
    same = [memory([1], total_steps=1000), memory([2], total_steps=1e3, seed=1), memory([3], total_steps=1000, new=None)]
    assert group_runs(same) == {("X-v0", "ppo"): same}
    elsewhere = [memory([1], gamma=0.9), memory([2], gamma=0.5, env_id="Y-v0")]  # no two settings in one environment
    assert list(group_runs(elsewhere)) == [("X-v0", "ppo"), ("Y-v0", "ppo")]


def test_of_a_repeated_seed_the_longer_run_counts(capsys):
    runs = [memory([1], run_dir="x_s0"), memory([1, 2], run_dir="x_s0_1"), memory([1], seed=1, run_dir="x_s1")]
    assert {run.dir.name for run in one_per_seed(runs)} == {"x_s0_1", "x_s1"}
    assert capsys.readouterr().err == "left out, x_s0_1 has the same seed and no fewer rows: x_s0\n"
    runs.append(memory([3], run_dir="x_s1_1", seed=1))  # of as many rows, and perhaps of newer code
    assert {run.dir.name for run in one_per_seed(runs)} == {"x_s0_1", "x_s1_1"}


def test_names_prefixes_select_exclude_legend(tmp_path):
    for algo in ("ppo", "trpo"):
        for env in ("Hopper-v4", "Walker2d-v4"):
            for seed in (0, 1):
                write_run(tmp_path / f"{algo}_{env}" / f"{algo}_{env}_s{seed}", [1, 2], env_id=env, seed=seed)
    (tmp_path / "ppo_notes.txt").write_text("no directory")
    names = lambda *args, **options: [f"{r.name} {r.dir.name}" for r in load_runs(*args, **options)]  # noqa: E731
    hopper = ["ppo ppo_Hopper-v4_s0", "ppo ppo_Hopper-v4_s1"]
    walker = ["ppo ppo_Walker2d-v4_s0", "ppo ppo_Walker2d-v4_s1"]
    assert names([tmp_path / "ppo"]) == hopper + walker
    assert names([str(tmp_path / "ppo_H"), tmp_path / "ppo"]) == hopper + walker  # none twice
    assert names([tmp_path / "ppo_Hopper-v4/ppo_Hopper-v4_s1"]) == hopper[1:]
    assert len(names([tmp_path])) == 8
    assert names([tmp_path], select=["ppo_", "Hopper"]) == hopper
    assert names([tmp_path], exclude=["trpo", "Hopper"]) == walker
    assert names([tmp_path / "ppo"], legend=["A", "B"])[1:3] == ["A ppo_Hopper-v4_s1", "B ppo_Walker2d-v4_s0"]
    assert names([tmp_path / "ppo"], select=["Walker"], legend=["B"])[0] == "B ppo_Walker2d-v4_s0"
    for seed in (0, 1):  # as benchmark.score keeps them
        (tmp_path / f"kept_s{seed}.csv").write_text("steps,ret\n1,2\n")
        (tmp_path / f"kept_s{seed}.json").write_text("{}")
    assert names([tmp_path / "kept"], legend=["A"]) == ["A kept_s0", "A kept_s1"]
    with pytest.raises(RunError, match="--legend: 1 names for 2 directories: .*ppo_Hopper-v4, .*ppo_Walker2d-v4"):
        load_runs([tmp_path / "ppo"], legend=["A"])
    for env_id in "X-v0", "X-v0b", "my:X-v0":  # a setting of a sweep has one name in all environments
        write_run(tmp_path / f"big/{env_id}_s0_1", [1], exp_name=f"ppo_{env_id.replace(':', '-')}_cli0-1", env_id=env_id)
    assert {run.name for run in load_runs([tmp_path / "big"])} == {"ppo_cli0-1"}


def test_many_curves_are_not_all_named():
    fig = plot([memory([k, 1], run_dir=f"x_s0_{k}", gamma=k) for k in range(200)])
    assert len(fig.axes[0].lines) == 200 and legend(fig) == []
    assert "200 curves, too many to name" in fig.legends[0].get_title().get_text()
    seeds = plot([memory([k, 1], run_dir=f"x_s{k}", seed=k) for k in range(60)], count=True)
    assert len(seeds.axes[0].lines) == 60 and legend(seeds) == ["ppo"]
    assert max(fig.get_figheight(), seeds.get_figheight()) < 3.5


HEADER = "Epoch\tAverageEpRet\tTotalEnvInteracts\n"
BROKEN = [
    ("progress.txt", HEADER, "it has no rows"),
    ("progress.txt", HEADER + "0\tabc\t1000\n1\t2\t2000\n", "'abc'"),
    ("progress.txt", HEADER + "0\t1\n1\t2\t2000\n", "rows have different lengths"),
    ("config.json", None, "No such file"),
    ("config.json", "[1]", "no JSON object"),
]


@pytest.mark.parametrize("name, content, message", BROKEN)
def test_a_broken_run_is_left_out_with_a_line(name, content, message, tmp_path, capsys):
    good, bad = write_run(tmp_path / "good_s0", [1, 2]), write_run(tmp_path / "bad_s0", [1, 2])
    (bad / name).write_text(content) if content else (bad / name).unlink()
    with pytest.raises(RunError, match="no runs"):
        load_runs([bad])
    capsys.readouterr()
    assert [r.dir for r in load_runs([tmp_path])] == [good]
    (error,) = capsys.readouterr().err.splitlines()
    assert error.startswith("left out, ") and message in error and error.endswith(f"{bad}/progress.txt")


@pytest.mark.parametrize("tail", ["2\t30", "2\t30\t30\t9", "\0\0\0"])
def test_a_half_written_last_line_is_left_out(tail, tmp_path, capsys):
    file = write_run(tmp_path / "x_s0", [1, 2]) / "progress.txt"
    file.write_text(file.read_text() + tail)
    (loaded,) = load_runs([tmp_path])
    assert loaded.rows["AverageEpRet"].tolist() == [1, 2]
    assert capsys.readouterr().err == f"left out, the incomplete last line of {file}\n"


def test_figure_of_seeds_environments_and_values(capsys):
    runs = [memory([0, 2, 4], seed=0), memory([2, 6, 8, 9], seed=1, run_dir="x_s1"), memory([1, 1], env_id="Y-v0", seed=0)]
    runs.append(memory([5, 7], env_id="Y-v0", name="trpo"))
    for r in runs:
        r.rows["KL"] = np.nan if r.name == "trpo" else 0.5
    fig = plot(runs, value=("Performance", "KL"), smooth=2)
    assert [ax.get_title() for ax in fig.axes] == ["X-v0", "Y-v0"] * 2
    assert [ax.get_ylabel() for ax in fig.axes] == ["Average return", "", "KL", ""]
    assert [ax.get_xlabel() for ax in fig.axes] == ["", "", "Environment steps", "Environment steps"]
    assert data(fig.axes[0]) == [([1000, 2000, 3000], [1, 2.5, 5])]  # means of 0 1 3 and 2 4 7
    assert data(fig.axes[1]) == [([1000, 2000], [1, 1]), ([1000, 2000], [5, 6])]
    assert [len(ax.lines) for ax in fig.axes] == [1, 2, 1, 1]
    assert [len(ax.collections) for ax in fig.axes] == [1, 0, 1, 0]  # a band where there are seeds
    band = fig.axes[0].collections[0].get_paths()[0].vertices
    assert (band[:, 1].min(), band[:, 1].max()) == (0, 7)
    assert fig.axes[1].lines[0].get_color() == fig.axes[0].lines[0].get_color() != fig.axes[1].lines[1].get_color()
    assert legend(fig) == ["ppo", "trpo"]
    caption = fig.legends[0].get_title().get_text().replace("\n", " ")
    assert caption == "Mean over 1 to 2 seeds, band: standard deviation; smoothed over 2 epochs"
    error = capsys.readouterr().err
    assert "curve cut at 3,000 of 4,000, where this run ends: x_s0\n" in error
    assert "left out, it has no numbers in KL: x_s0\n" in error


def test_count_draws_each_run():
    runs = [memory([0, 2], seed=0), memory([2, 6, 8], seed=1, run_dir="x_s1"), memory([1], seed=0, run_dir="x_s0_1")]
    fig = plot(runs, count=True)
    assert data(fig.axes[0]) == [([1000, 2000], [0, 2]), ([1000, 2000, 3000], [2, 6, 8]), ([1000], [1])]
    assert legend(fig) == ["ppo s0", "ppo s1", "ppo s0_1"]
    assert len({line.get_color() for line in fig.axes[0].lines}) == 3 and not fig.axes[0].collections
    both = plot([*runs, *(memory([1, 2], name="trpo", run_dir=f"x_s{k}") for k in range(len(LOOKS) - 3))], count=True)
    assert len({(line.get_color(), str(line._dash_pattern)) for line in both.axes[0].lines}) == len(LOOKS) == len(legend(both))


def test_nothing_overlaps_and_curves_are_free_of_the_legend():
    runs = [memory([1, 2], name=f"algorithm {k} {'x' * 4 * k}", env_id=f"Env{j}-v0") for k in range(9) for j in range(5)]
    fig = plot(runs, value=("AverageEpRet",), smooth=3)
    fig.draw_without_rendering()
    boxes = [ax.get_tightbbox() for ax in fig.axes if ax.axison] + [fig.legends[0].get_window_extent()]
    assert len(boxes) == 6
    assert not any(a.overlaps(b) for k, a in enumerate(boxes) for b in boxes[:k])
    assert all(box.x0 >= 0 and box.y0 >= 0 and box.x1 <= fig.bbox.width and box.y1 <= fig.bbox.height for box in boxes)


def test_runs_that_do_not_fit_are_left_out(capsys):
    plot([memory([1, 2, 3], steps=[1, 3, 2]), memory([1], name="good")])
    assert capsys.readouterr().err == "left out, its TotalEnvInteracts does not increase from row to row: x_s0\n"
    apart = [memory([1, 2], steps=[1, 2]), memory([1, 2], steps=[3, 4], seed=1, run_dir="x_s1"), memory([1], name="good")]
    assert legend(plot(apart)) == ["good"]
    assert capsys.readouterr().err == "left out with its other seeds, some begin after its end: x_s0\n"


@pytest.fixture(scope="module")
def two_seeds(tmp_path_factory):
    root = tmp_path_factory.mktemp("data")
    for seed in (0, 1):
        write_run(root / f"ppo_X-v0/ppo_X-v0_s{seed}", list(np.arange(20) ** (1 + seed / 2)), seed=seed)
    return root


@pytest.mark.parametrize("suffix, magic", [("png", b"\x89PNG"), ("svg", b"<?xml"), ("PDF", b"%PDF")])
def test_files(suffix, magic, two_seeds, tmp_path):
    out, before = tmp_path / f"curves.{suffix}", dict(matplotlib.rcParams)
    main(Args((two_seeds,), out=out, legend=("λ_1 $",)))
    assert out.read_bytes().startswith(magic) and out.stat().st_size > 5000
    assert dict(matplotlib.rcParams) == before


@pytest.mark.parametrize("backend", ["agg", "module://no_such_backend"])  # no windows; cannot be loaded
def test_without_a_display(backend, two_seeds, monkeypatch):
    monkeypatch.setitem(matplotlib.rcParams, "backend", backend)
    with pytest.raises(RunError, match="there is no display to open a window on; .* --out"):
        main(Args((two_seeds,)))


def test_errors(two_seeds, tmp_path):
    refused = {"--xaxis Foo: no run has this column": dict(xaxis="Foo"), "--smooth 0: has to be at": dict(smooth=0)}
    refused |= {"--value Foo: .* there are AverageEpRet, E": dict(value=("Foo",)), "--value: name a": dict(value=())}
    refused |= {"--out .*a.xyz: cannot be written: Format 'xyz' is not": dict(out=tmp_path / "a.xyz")}
    refused |= {"--out .*a.png: cannot be written: .*No such file": dict(out=tmp_path / "no/such/a.png")}
    refused |= {"no runs .* below .*data.*, with these --select and --exclude": dict(select=("Y-v0",))}
    refused |= {"no/such: there is no such directory, and none that begins so": dict(logdirs=(Path("no/such"),))}
    for message, options in refused.items():
        with pytest.raises(RunError, match=message):
            main(Args(**dict(logdirs=(two_seeds,), out=tmp_path / "a.png") | options))
    with pytest.raises(RunError, match="nothing to draw"):
        plot([memory([np.nan])])
