"""The command `batch`: sends a file of requests through a running gateway and writes a file of results."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass, field

from rich.console import Console

from gateway.batch import input_file, output_file
from gateway.batch.input_file import BadInput
from gateway.batch.output_file import OutputFile, Unwritable
from gateway.batch.request import Request
from gateway.batch.sending import Clients, Figures, Refused, Sender, Unreachable
from gateway.config.settings import CLIENT_KEY
from gateway.progress import Display

# Exit statuses; 2 is click's, for wrong usage.
FAILED = 1
UNREACHABLE = 3
STOPPED = 128 + signal.SIGINT
UNREAD = 128 + signal.SIGPIPE

_AGAIN = "Run the same again to go on."
_LOOK = 0.5
# Seconds between two progress lines in a log, and seconds over which the rate is measured.
_BETWEEN_LINES = 30
_RATE_OF = 60


@dataclass(frozen=True)
class BatchOptions:
    """The input file, the output file and the gateway; at most `most` requests run at a time."""

    source: str
    output: str
    url: str
    key: str | None = field(repr=False)
    model: str | None
    most: int


def batch(options: BatchOptions, warn: Callable[[str], None]) -> int:
    """Check the whole input, then send the requests without an answer.

    Returns the exit status. Raises BadInput or BadOutput.
    """
    with (
        input_file.opened(options.source) as source,
        output_file.opened(options.output, source.status) as output,
    ):
        known = source.check(options.model)
        output.go_on(known)
        figures = Figures(len(known), len(output.answered))
        changed: list[BadInput] = []

        def requests() -> Iterator[Request]:
            try:
                for digest, request in source.unchanged(options.model, known):
                    if digest not in output.answered:
                        yield request
            except BadInput as error:  # raised at the end, so that running requests may finish
                changed.append(error)

        began = time.monotonic()
        status = asyncio.run(_Run(options, output, figures, warn).run(requests()))
        # The reader of standard error may have closed it, which is no failure.
        with contextlib.suppress(BrokenPipeError):
            if status != UNREAD:
                warn(_summary(figures, time.monotonic() - began))
        if changed:
            raise changed[0]
        return status


class _Run:
    """One run of the batch, with its signals and its progress display."""

    def __init__(
        self,
        options: BatchOptions,
        output: OutputFile,
        figures: Figures,
        warn: Callable[[str], None],
    ) -> None:
        self._options = options
        self._output = output
        self._figures = figures
        self._warn = warn
        self._signals = 0

    async def run(self, requests: Iterator[Request]) -> int:
        """Send the requests; returns the exit status."""
        options, figures = self._options, self._figures
        clients = Clients(options.key, tls=options.url.startswith("https:"))
        sender = Sender(clients, options.url, self._output.write, figures)
        try:
            async with clients, _shown(figures) as display:
                self._hear(sender, display)
                await sender.send(requests, options.most)
        except asyncio.CancelledError:
            pass
        except Refused as error:
            self._warn(f"{error} `batch` takes a key from {CLIENT_KEY}. {_AGAIN}")
            return FAILED
        except Unreachable as error:
            self._warn(
                f"{options.url} cannot be reached ({error}): `vllm-gateway up` or `serve` starts a gateway, --url "
                f"names another. {_AGAIN}"
            )
            return UNREACHABLE
        except Unwritable as error:
            if isinstance(error.__cause__, BrokenPipeError):
                return UNREAD
            reason = error.__cause__.strerror if isinstance(error.__cause__, OSError) else error.__cause__
            self._warn(f"{self._output.name} takes no more results ({reason}): make room. {_AGAIN}")
            return FAILED
        if self._signals:
            return STOPPED
        return FAILED if figures.failed else 0

    def _hear(self, sender: Sender, display: Display) -> None:
        """First signal: let running requests finish. Second signal: cancel them."""
        loop = asyncio.get_running_loop()
        sending = asyncio.current_task()

        def signalled() -> None:
            self._signals += 1
            if self._signals == 1:
                display.say("vllm-gateway: Stopping: what runs may end. Again (Ctrl-C) ends that, too.")
                sender.stop()
            elif sending:
                sending.cancel()

        for number in (signal.SIGINT, signal.SIGTERM):
            # A shell makes its background processes ignore Ctrl-C; keep that.
            if signal.getsignal(number) is not signal.SIG_IGN:
                loop.add_signal_handler(number, signalled)


@contextlib.asynccontextmanager
async def _shown(figures: Figures) -> AsyncIterator[Display]:
    """Show the progress while this context is open: live on a terminal, else as lines."""
    console = Console(stderr=True, highlight=False, soft_wrap=True)
    display = Display(console)
    rate = _Rate(figures)

    async def live() -> None:
        with display.task("batch") as update:
            while True:
                update(figures.done / figures.total, _how_far(figures, rate.now()))
                await asyncio.sleep(_LOOK)

    async def in_lines() -> None:
        while True:
            await asyncio.sleep(_BETWEEN_LINES)
            display.say(f"vllm-gateway: {_how_far(figures, rate.now())}")

    telling = asyncio.create_task(live() if console.is_terminal else in_lines())
    try:
        yield display
    finally:
        telling.cancel()
        await asyncio.gather(telling, return_exceptions=True)


class _Rate:
    """The recent rate of results, per second."""

    def __init__(self, figures: Figures) -> None:
        self._figures = figures
        self._seen = deque([(time.monotonic(), figures.done)])

    def now(self) -> float:
        """The rate over the samples of about the last minute, with a new one."""
        self._seen.append((time.monotonic(), self._figures.done))
        while len(self._seen) > 2 and self._seen[-1][0] - self._seen[1][0] > _RATE_OF:
            self._seen.popleft()
        (began, before), (now, done) = self._seen[0], self._seen[-1]
        return (done - before) / max(now - began, 1e-3)


def _how_far(figures: Figures, rate: float) -> str:
    told = [f"{figures.done:,} of {figures.total:,}", f"{rate:.1f} a second"]
    if rate:
        told.append(f"{_time((figures.total - figures.done) / rate)} left")
    if figures.failed:
        told.append(f"{figures.failed.total():,} failed")
    if figures.waiting:
        told.append(f"{figures.waiting} wait to be asked again ({figures.why})")
    return ", ".join(told)


def _summary(figures: Figures, seconds: float) -> str:
    told = [f"{figures.before + figures.answered:,} of {figures.total:,} requests are answered"]
    if figures.before:
        told[0] += f", {figures.before:,} of them before"
    if figures.failed:
        reasons = ", ".join(f"{why}: {count:,}" for why, count in figures.failed.most_common())
        told.append(f"{figures.failed.total():,} failed ({reasons})")
    if left := figures.total - figures.done:
        told.append(f"{left:,} are left")
    if not (now := figures.done - figures.before):
        return f"{'; '.join(told)}."
    return f"{'; '.join(told)}. It took {_time(seconds)}, {now / max(seconds, 1e-3):.1f} a second."


def _time(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 1:
        return f"{rest} s"
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s"
