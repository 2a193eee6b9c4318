"""Where rows go besides progress.txt: to the terminal or the log, and to Weights & Biases."""

import contextlib
import sys
import time

from rich.console import Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table

from utils.process import one_line, say

SECONDS_BETWEEN_LINES = 5


class Display:
    """A progress bar above the last row, redrawn in place; where the output is no terminal, lines some seconds apart."""

    def __init__(self, total, steps):
        self.total, self.steps, self.ret, self.row, self.text = total, steps, "-", {}, ""
        self.last_time, self.last_steps, self.rate = time.monotonic(), steps, 0
        terminal = sys.stdout and sys.stdout.isatty()
        self.live = Live(get_renderable=self.picture, refresh_per_second=2) if terminal else contextlib.nullcontext()
        self.live.__enter__()

    def update(self, steps, row=None):
        """Note the steps done, and the row of the epoch if one has ended."""
        self.row, self.steps = row or self.row, steps
        ret = next((self.row[n] for n in ("AverageTestEpRet", "AverageEpRet") if self.row.get(n, "") != ""), None)
        self.ret = self.ret if ret is None else f"{ret:.1f}"
        seconds = time.monotonic() - self.last_time
        if seconds > SECONDS_BETWEEN_LINES or (row and steps == self.total):
            if steps > self.last_steps:
                self.rate = (steps - self.last_steps) / seconds
            left = f"  {self.rate:,.0f} steps/s  {(self.total - steps) / self.rate:,.0f} s left" if self.rate else ""
            self.text = f"{steps:,} of {self.total:,} steps ({steps / self.total:.0%})  return {self.ret}{left}"
            self.last_time, self.last_steps = time.monotonic(), steps
            if not isinstance(self.live, Live):
                say(self.text)

    def picture(self):
        table = Table.grid(padding=(0, 2))
        for name, value in self.row.items():
            table.add_row(name, f"{value:.4g}" if isinstance(value, float) else str(value))
        return Group(ProgressBar(self.total, self.steps), self.text, table)

    def close(self):
        with contextlib.suppress(OSError):  # the terminal is gone
            self.live.__exit__(None, None, None)


class Tracker:
    """The run in W&B, offline where that cannot be reached. Whatever fails there does not stop the training."""

    def __init__(self, args, config, run_dir):
        import wandb

        options = dict(project=args.wandb_project, entity=args.wandb_entity, group=args.wandb_group, config=config)
        options |= dict(name=run_dir.name, dir=str(run_dir), id=config.get("wandb_id"), resume="allow")
        try:
            self.run = wandb.init(**options)
        except wandb.errors.Error as error:
            say(f"W&B cannot be reached ({one_line(error)}); tracking offline: `wandb sync` uploads it later")
            self.run = wandb.init(mode="offline", **options)

    def __call__(self, method, *args, **options):
        try:
            getattr(self.run, method)(*args, **options)
        except Exception as error:
            say(f"W&B: {one_line(error)}; the run goes on without", sys.stderr)
