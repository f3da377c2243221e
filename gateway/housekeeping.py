"""Periodic work: timeouts, finished requests, the queue, samples and memory."""

from __future__ import annotations

import asyncio
import itertools
import logging

from gateway.finished_requests import FinishedRequests
from gateway.page.sampler import Sampler
from gateway.relay.data_path import DataPath
from gateway.server.memory import MemoryTrimmer

_log = logging.getLogger(__name__)

_LOOK_AFTER = 0.1


# The timeouts are checked after so many seconds, or after a tenth of the shortest timeout: checking thousands of calls
# delays their events.
_LIMITS_AFTER = 1.0


async def run_periodic_work(data_path: DataPath, finished: FinishedRequests, sampler: Sampler | None) -> None:
    limits = data_path.limits
    shortest = min(limits.first_token_timeout, limits.idle_timeout, limits.total_timeout, limits.body_timeout)
    tenth = min(shortest, limits.heartbeat_interval or shortest) / 10
    seconds = min(_LOOK_AFTER, tenth)
    every = max(1, int(min(_LIMITS_AFTER, tenth, limits.queue_timeout / 10) / seconds))
    trimmer = MemoryTrimmer()
    for look in itertools.count():
        await asyncio.sleep(seconds)
        # An error here is a bug in the gateway and must not end the checks of all timeouts.
        if look % every == 0 or data_path.drain.began:
            try:
                end_overdue(data_path)
            except Exception:
                _log.exception("the look at the time limits failed")
        try:
            finished.flush()
        except Exception:
            _log.exception("requests that have ended could not be counted or logged")
        try:
            data_path.queue.wake_all()  # an upstream may now serve, or be due for a trial
        except Exception:
            _log.exception("requests that wait could not go on")
        if sampler is not None:
            try:
                sampler.sample_if_due()
            except Exception:
                _log.exception("a sample failed")
        try:
            trimmer.observe(len(data_path.in_flight))
        except Exception:
            _log.exception("memory could not be given back")


def end_overdue(data_path: DataPath) -> None:
    """End the calls that have passed a timeout."""
    for call in data_path.overdue():
        try:
            call.check_timeouts()
        except Exception:
            _log.exception("the look at the time limits failed (request id %s)", call.request_id)
