"""Pages that cannot go stale: their code stands in the files, links resolve, commands parse, and the numbers are ours."""

import ast
import importlib
import re
import shlex
import shutil
import sys

import pytest
import tyro
from conftest import OFF_POLICY, ON_POLICY, ROOT, rows, run, run_dir, small
from tyro.conf import FlagCreatePairsOff

import ppo
import sac
from benchmark import sweep
from benchmark.report import Args as ReportArgs
from benchmark.report import load_cells, number
from utils.args import cli
from utils.process import RunError

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
SCRIPTS = {f"{script.__name__}.py": script for script in ON_POLICY + OFF_POLICY}


def blocks(page):
    """The fenced blocks of a page: the line before each that is not blank, its language, its text."""
    before, language, lines = "", None, []
    for line in page.read_text().splitlines():
        if line.startswith("```"):
            if language is not None:
                yield before, language, "\n".join(lines)
            language, lines = (line[3:].strip(), []) if language is None else (None, [])
        elif language is not None:
            lines.append(line)
        elif line.strip():
            before = line


def prose(page):
    """The text of a page without its fenced blocks."""
    return re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.M | re.S)


@pytest.fixture(params=PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def page(request):
    return request.param


def test_a_page_is_short(page):
    assert len(page.read_text().splitlines()) <= 150
    assert page.name != "README.md" or len(page.read_text().split()) <= 1000


def test_quoted_code_stands_in_its_file(page):
    """Word for word, in whole lines. On an algorithm's page each block names its file, elsewhere those do that quote one."""
    for before, language, text in blocks(page):
        if language == "python":
            name = re.fullmatch(r"(?:.* )?`([\w/]+\.py)`:", before)
            assert name or f"{page.stem}.py" not in SCRIPTS, f"names no file: {text}"
            if name:
                assert f"\n{text}\n" in (ROOT / name[1]).read_text(), f"not in {name[1]}:\n{text}"
            else:
                for node in ast.walk(ast.parse(text)):
                    if isinstance(node, ast.ImportFrom) and (ROOT / f"{node.module.replace('.', '/')}.py").exists():
                        assert all(hasattr(importlib.import_module(node.module), alias.name) for alias in node.names)


@pytest.mark.parametrize("name", SCRIPTS)
def test_pseudocode_names_our_functions(name):
    page, source = ROOT / "docs" / f"{name[:-3]}.md", (ROOT / name).read_text()
    text = page.read_text().split("## Pseudocode")[1].split("```")[1]
    called = set(re.findall(r"(\w+)\(", text))
    assert len(called) >= 6
    assert [function for function in called if f"{function}(" not in source] == []


def test_links_resolve(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(page)):
        if not target.startswith(("http://", "https://")):
            file, _, anchor = target.partition("#")
            path = (page.parent / file).resolve() if file else page
            assert path.exists(), target
            headings = re.findall(r"^#+ (.*)$", prose(path), re.M) if anchor else []
            names = [re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings]  # as GitHub does
            assert not anchor or anchor in names, target


def commands(page):
    """The command lines of a page that start Python, as lists of words: of its blocks, and of its prose between backticks."""
    shell = [text.replace("\\\n", "") for _, language, text in blocks(page) if language in ("", "sh")]
    texts = [line for text in shell for line in text.splitlines()]
    texts += re.findall(r"`([^`\n]+)`", prose(page))
    for text in texts:
        for part in re.split(r"&&|\$ ", text):
            words = shlex.split(part, comments=True) if part.count("'") % 2 == 0 else []
            words = words[words.index("python") :] if words[:1] == ["mpirun"] and "python" in words else words
            if words[:1] == ["python"] and len(words) > 1:
                yield words[1:]


def test_commands_parse(page, tmp_path, monkeypatch):
    """The flags exist, and a sweep would start. my_ppo.py is a copy of ppo.py. What a parser says, pytest shows as stderr."""
    for name in SCRIPTS:
        shutil.copy(ROOT / name, tmp_path / name)
        shutil.copy(ROOT / name, tmp_path / f"my_{name}")
    monkeypatch.chdir(tmp_path)
    for first, *words in commands(page):
        try:
            if first == "-m" and words[0] == "benchmark.sweep":
                assert sweep.main([*words[1:], "--print"]) == 0
            elif first == "-m" and words[0] == "pytest":
                assert all((ROOT / word).exists() for word in words[1:] if word.startswith("tests"))
            elif first == "-m" and words[0].startswith(("utils.", "benchmark.")):
                config = (FlagCreatePairsOff,) if words[0] == "utils.evaluate" else ()  # as that module does
                tyro.cli(importlib.import_module(words[0]).Args, args=words[1:], config=config)
            elif first.removeprefix("my_") in SCRIPTS:
                cli(SCRIPTS[first.removeprefix("my_")].Args, words)
            else:
                assert not first.endswith(".py") or (ROOT / first).exists(), first
        except RunError:
            assert first != "-m"  # the script's flags exist, but the run that it is to resume does not
        except SystemExit as end:
            assert not end.code, f"{first} {' '.join(words)}"


def test_the_environment_of_running_can_be_trained(tmp_path):
    code = next(text for before, _, text in blocks(ROOT / "docs/running.md") if "my_env.py" in before)
    (tmp_path / "my_env.py").write_text(code + "\n")
    words = next(words for words in commands(ROOT / "docs/running.md") if "my_env:Line-v0" in words)
    assert words[-2:] == ["--total-steps", "20000"]  # after which it walks to the middle; here two epochs have to do
    run(sys.executable, ROOT / words[0], *words[1:-1], 4000, "--data-dir", tmp_path, PYTHONPATH=str(tmp_path))
    assert len(rows(tmp_path / "ppo_my_env-Line-v0/ppo_my_env-Line-v0_s0")) == 2


def test_the_values_of_a_trained_run_can_be_had(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code = next(text for _, _, text in blocks(ROOT / "docs/metrics.md") if "ret_stats.denormalise" in text)
    for script in (ppo, sac):
        script.train(small(script, "data", env_id="Hopper-v4"))
    found = {}
    exec(code, found)
    assert found["v"].shape == () and found["q1"].shape == found["q2"].shape == (1,)


def test_every_column_is_explained(tmp_path):
    """By docs/metrics.md, in headings above the files in italics. Average, Std, Max and Min are one."""
    text, written = (ROOT / "docs/metrics.md").read_text(), {}
    for script in ON_POLICY + OFF_POLICY:
        script.train(small(script, tmp_path / script.__name__))
        for column in rows(run_dir(tmp_path / script.__name__), without=())[0]:
            written.setdefault(re.sub("^(Average|Std|Max|Min)", "", column), set()).add(script.__name__)
    documented = re.findall(r"^### `(\w+)`\n\*([a-z0-9, ]+)\.\*", text, re.M)
    assert {name: set(files.split(", ")) for name, files in documented} == written


def test_expected_returns_are_the_benchmarks():
    """On the algorithms' pages the mean return of the last tenth of the first 100,000, 300,000 and 1,000,000 steps, as the report's
    final 10%; minutes of one core at the median speed of all rows, which pauses of the machine do not change."""
    args = ReportArgs(*(ROOT / path for path in (ReportArgs.results, ReportArgs.studies, ReportArgs.published)))
    readme = (ROOT / "README.md").read_text()
    for cell in (cell for family in load_cells(args).values() for cell in family if cell.experiment):
        rets = cell.experiment.curves(window=1)  # a column for each seed
        tenths = [rets[(rets.index > 0.9 * steps) & (rets.index <= steps)] for steps in (100_000, 300_000, rets.index[-1])]
        points = " | ".join(f"{tenth.mean().mean():,.0f}" for tenth in tenths)
        speeds = sorted(speed for run in cell.experiment.runs.values() for speed in run.rows["steps_per_sec"])
        minutes = f"{1_000_000 / speeds[len(speeds) // 2] / 60:.0f}"
        line = f"| {cell.env_id} | {points} | {minutes} |"
        assert line in (ROOT / f"docs/{cell.algo}.md").read_text().splitlines(), f"docs/{cell.algo}.md lacks {line}"
        line = f"| {number(cell.best)} | {number(cell.final)} | {minutes} |\n"
        found = re.search(rf"\[`{cell.algo}.py`\].*{re.escape(line)}", readme)
        assert found or cell.env_id != "HalfCheetah-v4", f"README.md lacks {cell.algo}'s {line}"
