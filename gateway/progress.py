"""The progress of long tasks: a live display on a terminal, plain lines elsewhere."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from typing import Protocol

from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

# Widths in columns: the bar; the spinner, the time and all blanks.
_BAR = 20
_BESIDE = 15


class Update(Protocol):
    """Reports the progress of a task, from 0 to 1, and its current step."""

    def __call__(self, share: float, note: str = "") -> None: ...


class Display:
    """The output of `up` for the person who started it."""

    def __init__(self, console: Console | None = None) -> None:
        self._console = console or Console(highlight=False, soft_wrap=True)

    def say(self, text: str = "") -> None:
        """Print a line, at once even into a pipe."""
        self._console.print(text, markup=False)
        self._console.file.flush()

    @contextlib.contextmanager
    def task(self, label: str, *, in_steps: bool = False) -> Iterator[Update]:
        """Show the progress of one task; afterwards the display is removed, even after an error.

        `in_steps`: the task has few notes, and its progress is a guess.
        """
        if not self._console.is_terminal:
            yield self._steps(label) if in_steps else self._lines(label)
            return
        bar = BarColumn(bar_width=_BAR)
        columns = (SpinnerColumn(), TextColumn("{task.description}"), bar, TimeElapsedColumn())
        with Progress(*columns, TextColumn("{task.fields[note]}"), console=self._console, transient=True) as progress:
            task = progress.add_task(label, total=1.0, note="")

            def update(share: float, note: str = "") -> None:
                room = max(0, self._console.width - len(label) - _BAR - _BESIDE)
                progress.update(task, completed=share, note=note[:room].replace("[", "("))

            yield update

    def _lines(self, label: str) -> Update:
        """Print a line for each quarter of the task: enough for a log, and a sign of life."""
        said = -1

        def update(share: float, note: str = "") -> None:
            nonlocal said
            quarter = int(share * 4)
            if quarter > said:
                said = quarter
                self.say(f"{label}: {quarter * 25} %")

        return update

    def _steps(self, label: str) -> Update:
        """Print a line for each step, with the seconds from the task's start to the step's."""
        said, began = "", time.monotonic()

        def update(share: float, note: str = "") -> None:
            nonlocal said
            if note not in ("", said):
                said = note
                self.say(f"{label}: {note} ({time.monotonic() - began:.0f} s)")

        return update
