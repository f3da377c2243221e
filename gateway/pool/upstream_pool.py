"""Upstreams, and the pool of upstreams that selects one for each call."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from hashlib import blake2b
from typing import Final, Literal, get_args
from urllib.parse import urlsplit

from gateway.admission.owners import Owner
from gateway.pool.prefixes import HOT, NEW, Places, PrefixCounts

_log = logging.getLogger(__name__)

State = Literal["serving", "loading", "down", "draining"]

# An upstream is failing after so many broken calls in a row; it then gets one trial call every so many seconds.
BROKEN_IN_A_ROW: Final = 3
TRIAL_AFTER = 15.0
# Calls that may be retried in a burst, and the part of all calls that may be retried in the long run: if everything
# fails, doubling the calls would make it worse.
_RETRIES: Final = 100.0
_RETRIED_PART: Final = 0.25
# Costs, in calls in flight (docs/routing.md): of one place down in a key's order; of the same for a key that was never
# seen, as little of its prompt is cached at any place; and of a streamed call that awaits its first byte, as it is in
# its prefill.
_PLACE_DOWN: Final = 64.0
_NEW_PLACE_DOWN: Final = 8.0
_AWAITED: Final = 7
# How an upstream was selected: the key's first place; a later place, as the first was busy; by load, as all of the
# prompt is popular or has no key; or in place of an upstream that did not take the call.
How = Literal["first", "spilled", "hot", "least", "retried"]


@dataclass(eq=False, slots=True)
class Upstream:
    """One vLLM server: its address, its state and its calls.

    `model_list` is its model list as it was read, `listed` the ids in it, and `models` the ids that it may be asked
    for; all are empty until then. `contexts` is the most tokens of a prompt and its answer for each model, if the list
    has it. `supports_audio` says whether it takes speech, if that was probed. `routes` are the names of its routes
    (None: not known), and `why` is the reason why it does not serve. `fingerprint` is the `system_fingerprint` of its
    answers, with its quotes, once one was seen. `prefix_hits` is the part of its prompts' tokens that was found in its
    prefix cache recently, if it reports that. `awaited` counts the streamed calls in flight that have no byte of an
    answer yet. `failovers` counts the calls that it did not take and that went to another upstream instead. `probed_at`
    is when its last probe ended, and `on_failure` is called for each broken call. `broken_by` is the owner of its
    broken calls, if all were answered with an error and belonged to that owner. `gone` says that discovery no longer
    finds it.

    `source` is the entry that led to it. `only` are the models that it may be asked for, None for all. `authorization`
    is its own Authorization value, and `trust` says which certificates its connections accept; None for the common
    ones.

    `url` identifies it, here and in every other gateway. If its name resolves to several addresses, `at` is its own
    address, which also stands in the URL. `host` and `authority` keep the name, for TLS and for the Host header.
    """

    url: str
    host: str
    port: int
    tls: bool
    prefix: str
    authority: str
    at: str
    state: State = "loading"
    why: str = "not probed yet"
    model_list: bytes = field(default=b"", repr=False)
    listed: tuple[str, ...] = ()
    models: tuple[str, ...] = ()
    contexts: dict[str, int] = field(default_factory=dict)
    supports_audio: bool = False
    routes: frozenset[str] | None = None
    fingerprint: bytes | None = None
    prefix_hits: float | None = None
    in_flight: int = 0
    awaited: int = 0
    weight: float = 1.0
    chosen_at: int = field(default=0, repr=False)
    broken_in_a_row: int = field(default=0, repr=False)
    broken_at: float = field(default=0.0, repr=False)
    broken_by: Owner | None = field(default=None, repr=False)
    probed_at: float | None = field(default=None, repr=False)
    on_failure: Callable[[Upstream], None] | None = field(default=None, repr=False)
    failovers: int = field(default=0, repr=False)
    gone: bool = field(default=False, repr=False)
    source: str = ""
    only: frozenset[str] | None = None
    authorization: str | None = field(default=None, repr=False)
    trust: object | None = field(default=None, repr=False)

    @classmethod
    def from_url(cls, url: str, at: str | None = None) -> Upstream:
        """An upstream at `http[s]://host[:port][/prefix]`; `at` is its address if the host has several."""
        parts = urlsplit(url)
        tls = parts.scheme == "https"
        host = parts.hostname or ""
        if at is not None:
            port = "" if parts.port is None else f":{parts.port}"
            url = f"{parts.scheme}://{f'[{at}]' if ':' in at else at}{port}{parts.path}"
        return cls(url, host, parts.port or (443 if tls else 80), tls, parts.path, parts.netloc, at or host)

    @property
    def origin(self) -> str:
        """Its URL with its name."""
        return f"http{'s' if self.tls else ''}://{self.authority}{self.prefix}"

    @property
    def short_name(self) -> str:
        """Its name for clients: the same in every gateway, and without its address."""
        return blake2b(self.url.encode(), digest_size=4).hexdigest()

    def record_success(self) -> None:
        """A real call, not a probe, succeeded."""
        if self.broken_in_a_row >= BROKEN_IN_A_ROW:
            _log.info("upstream %s answers again", self.url)
        self.broken_in_a_row = 0

    def record_failure(self, now: float, answered: Owner | None = None) -> None:
        """A real call failed by the upstream's fault; `answered` is its owner if it was answered with an error."""
        if not self.broken_in_a_row:
            self.broken_by = answered
        elif answered is not self.broken_by:
            self.broken_by = None
        self.broken_in_a_row += 1
        self.broken_at = now
        if self.on_failure is not None:
            self.on_failure(self)
        if self.broken_in_a_row == BROKEN_IN_A_ROW:
            _log.warning(
                "upstream %s broke its last %d calls: while others serve it gets one each %g s",
                self.url,
                BROKEN_IN_A_ROW,
                TRIAL_AFTER,
            )

    def failing(self, now: float) -> bool:
        """Whether its last calls all broke and it is not yet time for another trial."""
        return self.broken_in_a_row >= BROKEN_IN_A_ROW and now - self.broken_at < TRIAL_AFTER

    def status(self, now: float) -> tuple[State, str]:
        """Its state and the reason: an upstream that fails its calls is down, whatever its probes say.

        Failed calls of a single owner do not suffice: they may ask for something that no server can answer.
        """
        if self.gone:
            return "draining", "it takes no new calls, and those that run there end"
        if self.state == "serving" and self.failing(now):
            if self.broken_by is not None:
                return "serving", f"one caller's last calls broke, {self.broken_in_a_row} in a row"
            return "down", f"its last calls broke, {self.broken_in_a_row} in a row"
        return self.state, self.why

    @property
    def ever_served(self) -> bool:
        """Whether it has answered since the gateway started."""
        return bool(self.models)


class _Group:
    """The upstreams that serve a model, and their order for each key."""

    __slots__ = ("places", "upstreams")

    def __init__(self, upstreams: tuple[Upstream, ...]) -> None:
        self.upstreams = upstreams
        self.places = Places([(upstream.url, upstream.weight) for upstream in upstreams])


class UpstreamPool:
    """All upstreams. Health ranks them and never excludes one: with no healthy one left, the least bad is tried."""

    def __init__(
        self,
        upstreams: tuple[Upstream, ...],
        *,
        max_in_flight: float = math.inf,
        max_in_flight_per_upstream: float = math.inf,
        by_prefix: bool = False,
    ) -> None:
        """Room for `max_in_flight` calls in flight, and for `max_in_flight_per_upstream` at each upstream.

        With `by_prefix`, prompts that begin alike go to the same one of several upstreams.
        """
        self._by_prefix = by_prefix
        self.prefixes: PrefixCounts | None = None
        self.routed: dict[How, int] = dict.fromkeys(get_args(How), 0)
        # By model; models that the same upstreams serve share a group.
        self._groups: dict[str, _Group] = {}
        self._by_upstreams: dict[tuple[Upstream, ...], _Group] = {}
        self._is_grouped = False
        self._max_in_flight = max_in_flight
        self._max_in_flight_per_upstream = min(max_in_flight, max_in_flight_per_upstream)
        self._turn = 0
        self._retries = _RETRIES
        self._upstreams: tuple[Upstream, ...] = ()
        # Upstreams that are gone but had calls in flight.
        self.leaving: list[Upstream] = []
        # URLs that lead to no upstream, or only to some of their upstreams, and the reasons.
        self.astray: dict[str, str] = {}
        self.replace(upstreams)

    def replace(self, upstreams: tuple[Upstream, ...]) -> None:
        """Replace all upstreams; calls that run on others continue to their end."""
        left = dict.fromkeys([*self._upstreams, *self.leaving])
        self.leaving = [one for one in left if one.in_flight and one not in upstreams]
        self._upstreams = upstreams
        # A lower bound of the room for more calls. The calls in flight are counted again only when it is used up, as
        # each selection adds one call at most.
        self._room = 0.0
        self._is_grouped = False
        self._by_upstreams.clear()
        if self._by_prefix and self.prefixes is None and len(upstreams) > 1:
            self.prefixes = PrefixCounts()

    def __len__(self) -> int:
        return len(self._upstreams)

    def __iter__(self) -> Iterator[Upstream]:
        return iter(self._upstreams)

    @property
    def has_own_keys(self) -> bool:
        """Whether some upstream has an Authorization value of its own."""
        return any(one.authorization is not None for one in self._upstreams)

    @property
    def models(self) -> tuple[str, ...]:
        """Every model that some upstream serves, each once, in the upstreams' order."""
        if len(self._upstreams) == 1:
            return self._upstreams[0].models
        return tuple(dict.fromkeys(model for upstream in self._upstreams for model in upstream.models))

    @property
    def chat_model(self) -> str | None:
        """The first model of the first upstream that can chat, as far as is known; None if nothing is served."""
        served = [one for one in self._upstreams if one.models]
        able = [one for one in served if one.routes is None or "chat" in one.routes]
        return next((one.models[0] for one in (*able, *served)), None)

    def models_of(self, route: str) -> list[str]:
        """The models whose upstreams are known to have the route of this name."""
        able = [one for one in self._upstreams if one.routes is not None and route in one.routes]
        return list(dict.fromkeys(model for one in able for model in one.models))

    def context(self, model: str) -> int | float:
        """The most tokens of a prompt and its answer that every upstream of this model takes, as far as is known."""
        return min((one.contexts[model] for one in self._upstreams if model in one.contexts), default=math.inf)

    def key_of(self, model: str | None, salt: str | None, body: bytes) -> int | None:
        """The key of a prompt, as received, by which `select` finds its upstream; None to select by load."""
        counts = self.prefixes
        if counts is None or model is None:
            return None
        if not self._is_grouped:
            self._regroup()
        if (group := self._groups.get(model)) is None or len(group.upstreams) == 1:
            return None
        return counts.key_of(model, salt, body, len(group.upstreams))

    def select(self, model: str | None, now: float, *, audio: bool = False, key: int | None = None) -> Upstream | None:
        """Select one of the best upstreams that serve `model`; None if these have no room.

        With a `key` this is the key's first place, unless another place is less busy by more than the cost of a place
        down. Without a key it is the upstream with the least load, and ties are broken round robin. `audio` selects an
        upstream that takes speech, whatever its model. A model that no upstream serves goes to any of them, which
        answers 404. A worse upstream does not replace a full one: it would only break the call.
        """
        upstreams = self._upstreams
        if len(upstreams) == 1:
            return upstreams[0] if upstreams[0].in_flight < self._max_in_flight_per_upstream else None
        if self._room <= 0:
            self._room = self._max_in_flight - sum([upstream.in_flight for upstream in upstreams])
            if self._room <= 0:
                return None
        best: Upstream | None = None
        how: How = "least"
        if key == HOT:
            how = "hot"
        elif key is not None and (group := self._group(model)) is not None:
            best, how = self._placed(group, key, now)
        if best is None:
            best = self._best(self._serving(model, audio=audio), now)
            if best is None:
                return None
        self._take(best, now)
        if self._retries < _RETRIES:
            self._retries = min(_RETRIES, self._retries + _RETRIED_PART)
        self.routed[how] += 1
        return best

    def select_other(
        self,
        model: str | None,
        now: float,
        *,
        instead_of: Upstream,
        ready: bool,
        audio: bool = False,
        key: int | None = None,
    ) -> Upstream | None:
        """The best upstream for a call that `instead_of` did not take; None if there is none or no retry is left.

        `ready` admits only upstreams that serve and do not fail. With a key it is the next place.
        """
        if self._retries < 1:
            return None
        best = None
        if key is not None and key != HOT and (group := self._group(model)) is not None:
            best, _ = self._placed(group, key, now, instead_of)
        if best is None:
            others = [one for one in self._serving(model, audio=audio) if one is not instead_of]
            if ready:
                others = [one for one in others if _rank(one, now) == 0]
            best = self._best(others, now) if others else None
        if best is not None:
            self._take(best, now)
            self._retries -= 1
            instead_of.failovers += 1
            self.routed["retried"] += 1
        return best

    def group(self, model: str | None, *, audio: bool = False) -> tuple[Upstream, ...]:
        """The upstreams that can take a call; calls with the same group wait in the same part of the queue."""
        return tuple(self._serving(model, audio=audio))

    def _serving(self, model: str | None, *, audio: bool) -> Sequence[Upstream]:
        if audio:
            return [one for one in self._upstreams if one.supports_audio] or self._upstreams
        group = self._group(model)
        return self._upstreams if group is None else group.upstreams

    def _group(self, model: str | None) -> _Group | None:
        """The upstreams that serve this model; None if there are none."""
        if not self._is_grouped:
            self._regroup()
        return self._groups.get(model) if model is not None else None

    def _regroup(self) -> None:
        self._is_grouped = True
        self._groups.clear()
        by_model: dict[str, list[Upstream]] = {}
        for upstream in self._upstreams:
            for model in upstream.models:
                by_model.setdefault(model, []).append(upstream)
        for model, able in by_model.items():
            together = tuple(able)
            if (group := self._by_upstreams.get(together)) is None:
                group = self._by_upstreams[together] = _Group(together)
            self._groups[model] = group

    def set_models(self, upstream: Upstream, listed: tuple[str, ...]) -> None:
        """Set the models that this upstream serves now."""
        upstream.listed = listed
        only = upstream.only
        models = listed if only is None else tuple([model for model in listed if model in only])
        if upstream.models != models:
            upstream.models = models
            self._is_grouped = False

    def _placed(
        self, group: _Group, key: int, now: float, instead_of: Upstream | None = None
    ) -> tuple[Upstream | None, How]:
        """The place of a key with the least load plus cost of its position; None if no place serves and has room."""
        most, upstreams, order = self._max_in_flight_per_upstream, group.upstreams, group.places.of(key)
        down = _NEW_PLACE_DOWN if key >= NEW else _PLACE_DOWN
        best: Upstream | None = None
        least, price = math.inf, 0.0
        for number in order:
            upstream = upstreams[number]
            if (
                upstream.state != "serving"
                or upstream.in_flight >= most
                or (upstream.broken_in_a_row >= BROKEN_IN_A_ROW and upstream.failing(now))
                or upstream is instead_of
            ):
                continue
            load = (upstream.in_flight + _AWAITED * upstream.awaited) / upstream.weight + price
            if load < least:
                best, least = upstream, load
            price += down
            if price >= least:
                break
        if best is None:
            return None, "least"
        return best, "first" if best is upstreams[order[0]] else "spilled"

    def _best(self, able: Sequence[Upstream], now: float) -> Upstream | None:
        if not able:
            return None  # no upstream is known yet
        best, best_rank, least = able[0], 3, 0.0
        for one in able:
            rank = 0 if one.state == "serving" and one.broken_in_a_row < BROKEN_IN_A_ROW else _rank(one, now)
            if rank > best_rank:
                continue
            load = (one.in_flight + _AWAITED * one.awaited) / one.weight
            if rank < best_rank or load < least or (load == least and one.chosen_at < best.chosen_at):
                best, best_rank, least = one, rank, load
        return best if best.in_flight < self._max_in_flight_per_upstream else None

    def _take(self, chosen: Upstream, now: float) -> None:
        self._room -= 1
        self._turn += 1
        chosen.chosen_at = self._turn
        if chosen.broken_in_a_row >= BROKEN_IN_A_ROW:
            chosen.broken_at = now  # this is the trial call: no other until it succeeds or TRIAL_AFTER has passed again


def _rank(upstream: Upstream, now: float) -> int:
    """0 for an upstream that serves, 1 if it seems to serve but fails its calls, 2 for all others."""
    if upstream.state != "serving":
        return 2
    return 1 if upstream.failing(now) else 0
