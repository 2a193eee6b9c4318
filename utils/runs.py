"""Runs read back from the disk: found, named and grouped into experiments, for utils.plot and the benchmark."""

import json
import re
import sys
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np
import pandas as pd

from utils.args import RunArgs
from utils.process import RunError, one_line

ASIDE = {field.name for field in fields(RunArgs)}  # with the next lines, what may differ between the runs of an experiment
ASIDE |= {"seed", "command", "threads", "versions", "git_commit", "resumed", "wandb_id", "finished"}
ASIDE |= {"fast_matmul", "wandb_video", "logger", "logger_kwargs"}  # of older runs, and of Spinning Up's
KEPT = dict(steps="TotalEnvInteracts", ret="AverageEpRet", steps_per_sec="StepsPerSec")  # columns of benchmark/results/*.csv


@dataclass
class Run:
    """A run: its directory, config.json, environment, the name of its curve, and progress.txt as floats (NaN where blank) with
    a column Performance: AverageTestEpRet if it has such numbers, else AverageEpRet."""

    dir: Path
    config: dict
    env_id: str
    name: str
    rows: pd.DataFrame


def read_run(file):
    """The run whose rows are in `file`, a progress.txt or a kept .csv; without a last line that was cut off, which it says on
    stderr. Raises OSError or ValueError where it cannot be read."""
    kept = file.suffix == ".csv"
    run_dir, sep = (file.with_suffix(""), ",") if kept else (file.parent, "\t")
    text = (file.with_suffix(".json") if kept else file.with_name("config.json")).read_text()
    config = json.loads(re.sub(" at 0x[0-9a-f]+", "", text))  # Spinning Up's holds addresses, other ones for each seed
    if not isinstance(config, dict):
        raise ValueError("its configuration is no JSON object")
    *lines, rest = file.read_text(errors="replace").split("\n")
    if rest and lines:
        print(f"left out, the incomplete last line of {file}", file=sys.stderr)
    if len(lines) < 2 or len({line.count(sep) for line in lines}) > 1:
        raise ValueError("its rows have different lengths" if lines[1:] else "it has no rows")
    rows = pd.read_csv(file, sep=sep, nrows=len(lines) - 1, dtype=float).replace([np.inf, -np.inf], np.nan)
    if kept:
        rows = rows.rename(columns=KEPT | (dict(ret="AverageTestEpRet") if config.get("num_test_episodes") else {}))
    for ret in ("AverageEpRet", "AverageTestEpRet"):
        if ret in rows and rows[ret].notna().any():
            rows["Performance"] = rows[ret]
    env_id = str(config.get("env_id", ""))
    in_name = re.escape(re.sub("[^A-Za-z0-9_.+=,-]", "-", env_id))
    name = str(config.get("exp_name") or re.sub(r"_s\d+(_\d+)?$", "", run_dir.name))
    return Run(run_dir, config, env_id, re.sub(f"_{in_name}(?=_|$)", "", name), rows)  # a panel's title has the environment


def _files(logdir):
    """The files that hold the rows of runs below a directory."""
    files = sorted(path for path in logdir.rglob("*") if re.fullmatch(r"progress\.txt|.*_s\d.*\.csv", path.name))
    return files or [logdir] * (logdir.suffix == ".csv")


def load_runs(paths, select=(), exclude=(), legend=()):
    """Read all runs, and curves kept by benchmark.score, below `paths`: a list of Run.

    A path that does not exist stands for all that begin with it. `select` and `exclude` are substrings of which a run's path
    has to contain all, or none. `legend` names the curves: one name for each directory, after the completion, that holds runs,
    or for the kept curves that differ in their seed.
    Runs that cannot be read are left out, with a line on stderr. Raises RunError if there are none.
    """
    logdirs, seen = {}, set()
    for path in map(Path, paths):
        begin_so = [path] if path.exists() else sorted(p for p in path.parent.glob("*") if p.name.startswith(path.name))
        if not begin_so:
            raise RunError(f"{path}: there is no such directory, and none that begins so")
        for logdir, file in ((logdir, file) for logdir in begin_so for file in _files(logdir)):
            name = str(file.with_suffix("") if file.suffix == ".csv" else file.parent)
            wanted = all(s in name for s in select) and not any(s in name for s in exclude)
            if wanted and file.resolve() not in seen:
                seen.add(file.resolve())
                try:
                    run = read_run(file)
                    logdirs.setdefault(re.sub(r"_s\d+(_\d+)?\.csv$", "", str(logdir)), []).append(run)
                except (OSError, ValueError) as error:
                    print(f"left out, {one_line(error)}: {file}", file=sys.stderr)
    if not logdirs:
        rules = ", with these --select and --exclude" if select or exclude else ""
        raise RunError(f"no runs (directories with progress.txt and config.json) below {', '.join(map(str, paths))}{rules}")
    if legend and len(legend) != len(logdirs):
        raise RunError(f"--legend: {len(legend)} names for {len(logdirs)} directories: {', '.join(logdirs)}")
    for name, runs in zip(legend, logdirs.values(), strict=False):
        for run in runs:
            run.name = name
    return [run for runs in logdirs.values() for run in runs]


def group_runs(runs):
    """Experiments: {(environment, label): runs that differ only in their seed}, in the order of `runs`.

    The label is the name, and the settings in which runs of that name differ within an environment.
    """
    first, differ, experiments = {}, {}, {}
    settings = [{k: v for k, v in run.config.items() if k not in ASIDE} for run in runs]
    for run, own in zip(runs, settings, strict=True):
        other = first.setdefault((run.name, run.env_id), own)
        differ.setdefault(run.name, set()).update(k for k in own | other if own.get(k) != other.get(k))
    for run, own in zip(runs, settings, strict=True):
        label = ", ".join([run.name, *(f"{k}={own[k]}" for k in own if k in differ[run.name])])
        experiments.setdefault((run.env_id, label), []).append(run)
    return experiments


def one_per_seed(runs):
    """Of the runs of each seed the longest, of several the last, which may be of newer code; stderr names those left out."""
    seeds = {}
    for run in sorted(runs, key=lambda run: len(run.rows)):
        shorter = seeds.get(seed := str(run.config.get("seed", run.dir)))
        if shorter:
            print(f"left out, {run.dir} has the same seed and no fewer rows: {shorter.dir}", file=sys.stderr)
        seeds[seed] = run
    return list(seeds.values())
