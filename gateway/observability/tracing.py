"""Spans by OpenTelemetry's SDK: the request's and its upstream call's, begun when it goes up, ended in batches."""

from __future__ import annotations

import logging
import re
import threading
import time
from collections.abc import Sequence

from opentelemetry.context import Context
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import OTELResourceDetector, Resource
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExporter, SpanExportResult
from opentelemetry.trace import Span, SpanKind, StatusCode, format_span_id, format_trace_id, set_span_in_context
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator
from opentelemetry.util.types import AttributeValue

from gateway.observability import semconv
from gateway.observability.own_version import own_version
from gateway.relay.record import CLIENT_LEFT, Record

_log = logging.getLogger(__name__)

# The headers of W3C's Trace Context among the lines of a head, whose names are lower-case.
_CONTEXT = re.compile(rb"^(traceparent|tracestate): ([^\r\n]*)\r\n", re.MULTILINE)
_W3C = TraceContextTextMapPropagator()

# Seconds that the last spans get at the end.
_LAST = 3
# The most characters of a model's name, which is a client's word, and of what the SDK says.
_LONG_NAME = 200
_LONG_TEXT = 500


class Trace:
    """A request's spans. `ahead` is what the wall's clock shows more than the records'; `call` is its upstream's."""

    __slots__ = ("_ahead", "call", "called_at", "calls", "request", "span_id", "trace_id")

    def __init__(self, request: Span, ahead: float) -> None:
        names = request.get_span_context()
        self.trace_id = format_trace_id(names.trace_id)
        self.span_id = format_span_id(names.span_id)
        self.request = request
        self.call: Span | None = None
        self.called_at = 0.0
        self.calls = 0
        # One for all of them: a clock that is set meanwhile changes no duration.
        self._ahead = ahead

    def wall(self, seconds: float) -> int:
        """The record's time as nanoseconds since the epoch."""
        return int((seconds + self._ahead) * 1e9)


class Tracer:
    """Makes and exports the spans, as the variables that the SDK reads say: sampler, exporter, batches, resource.

    A request's spans begin when it first goes upstream, which must be told of them, and otherwise at its end. Sampling
    is thus the SDK's own, and what it does not sample costs little.
    """

    def __init__(self, *, tls: bool) -> None:
        """`tls`: clients speak it."""
        ours = own_version()
        resource = Resource.create({semconv.SERVICE_NAME: "vllm-gateway", semconv.SERVICE_VERSION: ours})
        # The environment's word counts more than ours, which `create` has the other way round.
        resource = resource.merge(OTELResourceDetector().detect())
        self._provider = TracerProvider(resource=resource, shutdown_on_exit=False)
        self._tracer = self._provider.get_tracer("gateway", ours, semconv.SCHEMA)
        self._scheme = "https" if tls else "http"
        self._exporter: SpanExporter = _Exporter()
        self._provider.add_span_processor(BatchSpanProcessor(self._exporter))

    def to_upstream(self, record: Record, lines: bytes) -> bytes:
        """The lines of a head that goes upstream, with the call's span as the parent of what is done there."""
        trace = record.trace
        if not isinstance(trace, Trace):
            trace = record.trace = self._begin(record)
        if trace.call is None:
            trace.call = self._begin_call(record, trace)
        trace.calls += 1
        if b"\ntrace" in lines or lines[:5] == b"trace":
            lines = _CONTEXT.sub(b"", lines)
        names = trace.call.get_span_context()
        more = f"traceparent: 00-{trace.trace_id}-{names.span_id:016x}-{names.trace_flags:02x}\r\n"
        if names.trace_state:
            more += f"tracestate: {names.trace_state.to_header()}\r\n"
        return lines + more.encode("latin-1")

    def finished(self, records: list[Record]) -> None:
        """These have ended."""
        for record in records:
            trace = record.trace
            if not isinstance(trace, Trace):
                trace = record.trace = self._begin(record)
            if trace.request.is_recording():
                if trace.call is not None:
                    _end_call(record, trace, trace.call)
                _end(record, trace)

    def close(self) -> None:
        """Export what is left, as far as that goes soon."""
        closing = threading.Thread(target=self._provider.shutdown, name="last spans", daemon=True)
        closing.start()
        # The SDK itself would wait for half a minute for a collector that does not answer.
        closing.join(_LAST)
        if closing.is_alive():
            self._exporter.shutdown()

    def _begin(self, record: Record) -> Trace:
        route = record.route
        ahead = time.time() - time.monotonic()
        span = self._tracer.start_span(
            f"{route.method} {route.path}",
            context=_parent_in(record.lines),
            kind=SpanKind.SERVER,
            attributes={
                semconv.HTTP_REQUEST_METHOD: route.method,
                semconv.HTTP_ROUTE: route.path,
                semconv.URL_SCHEME: self._scheme,
            },
            start_time=int((record.started_at + ahead) * 1e9),
        )
        return Trace(span, ahead)

    def _begin_call(self, record: Record, trace: Trace) -> Span:
        """One span, however often it is sent: so the conventions have it for GenAI's."""
        if not trace.request.is_recording():
            return trace.request
        upstream, route, model = record.upstream, record.route, record.model
        assert upstream is not None
        assert record.sent_at is not None
        trace.called_at = record.sent_at
        attributes: dict[str, AttributeValue] = {
            semconv.SERVER_ADDRESS: upstream.host,
            semconv.SERVER_PORT: upstream.port,
        }
        if operation := semconv.OPERATIONS.get(record.target):
            name = f"{operation} {model[:_LONG_NAME]}" if model else operation
            attributes[semconv.GEN_AI_OPERATION_NAME] = operation
            attributes[semconv.GEN_AI_PROVIDER_NAME] = semconv.VLLM
        else:
            name = f"{route.method} {route.path}"
            attributes[semconv.HTTP_REQUEST_METHOD] = route.method
            attributes[semconv.URL_TEMPLATE] = route.path
        if model:
            attributes[semconv.GEN_AI_REQUEST_MODEL] = model[:_LONG_NAME]
        return self._tracer.start_span(
            name,
            context=set_span_in_context(trace.request, Context()),
            kind=SpanKind.CLIENT,
            attributes=attributes,
            start_time=trace.wall(trace.called_at),
        )


def _parent_in(lines: bytes) -> Context:
    """The client's span, empty where it names none, or none that can be understood."""
    if b"traceparent: " not in lines:
        return Context()
    headers: dict[str, list[str]] = {}
    for name, value in _CONTEXT.findall(lines):
        headers.setdefault(name.decode(), []).append(value.decode("latin-1"))
    # Trace Context, 3.2: a second one is a fault, for which a new trace is begun.
    return _W3C.extract(headers, Context()) if len(headers.get("traceparent", ())) == 1 else Context()


def _end(record: Record, trace: Trace) -> None:
    span, status, outcome = trace.request, record.status, record.outcome
    attributes: dict[str, AttributeValue] = {semconv.RESPONSE_REQUEST_ID: [record.request_id]}
    if status != CLIENT_LEFT:  # which nobody has seen
        attributes[semconv.HTTP_RESPONSE_STATUS_CODE] = status
    if outcome == "done" and status >= 500:
        outcome = str(status)
    if outcome != "done":
        attributes[semconv.ERROR_TYPE] = outcome
        # A client that is refused or leaves is no error of the server's, as the conventions have it.
        if status >= 500 or (status < 400 and outcome != "client_left"):
            span.set_status(StatusCode.ERROR)
    span.set_attributes(attributes)
    span.end(trace.wall(record.ended_at or record.started_at))


def _end_call(record: Record, trace: Trace, span: Span) -> None:
    upstream, usage, outcome = record.upstream, record.usage, record.outcome
    attributes: dict[str, AttributeValue] = {}
    if trace.calls > 1 and upstream is not None:
        attributes[semconv.HTTP_REQUEST_RESEND_COUNT] = trace.calls - 1
        attributes[semconv.SERVER_ADDRESS] = upstream.host
        attributes[semconv.SERVER_PORT] = upstream.port
    if record.streaming:
        attributes[semconv.GEN_AI_REQUEST_STREAM] = True
        if record.first_byte_at is not None:
            attributes[semconv.GEN_AI_RESPONSE_TIME_TO_FIRST_CHUNK] = record.first_byte_at - trace.called_at
    if usage is not None:
        attributes[semconv.GEN_AI_USAGE_INPUT_TOKENS], attributes[semconv.GEN_AI_USAGE_OUTPUT_TOKENS] = usage
    if outcome == "done" and record.status >= 400:
        outcome = str(record.status)  # what the upstream itself has said
    if outcome != "done":
        attributes[semconv.ERROR_TYPE] = outcome
        if outcome != "client_left":
            span.set_status(StatusCode.ERROR)
    span.set_attributes(attributes)
    span.end(trace.wall(record.upstream_ended_at or record.ended_at or record.started_at))


class _Exporter(OTLPSpanExporter):
    """The SDK's, which tells once that spans cannot be sent, and once that they can again."""

    def __init__(self) -> None:
        super().__init__()
        self._once = _Once()
        logger = logging.getLogger("opentelemetry")
        logger.handlers[:] = [self._once]
        logger.propagate = False

    def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
        result = super().export(spans)
        if result is SpanExportResult.SUCCESS:
            self._once.over()
        return result


class _Once(logging.Handler):
    """Passes on what the SDK says, each thing once: it says it again with each batch or span.

    What it says of a client's headers goes nowhere: they are not the operator's, and may hold anything.
    """

    def __init__(self) -> None:
        super().__init__("WARNING")
        self._said: set[str] = set()

    def emit(self, record: logging.LogRecord) -> None:
        about = "export" if record.name.startswith("opentelemetry.exporter.") else str(record.msg)
        if about not in self._said and not record.name.startswith(("opentelemetry.trace.", "opentelemetry.attributes")):
            self._said.add(about)
            _log.log(record.levelno, "tracing: %s", record.getMessage()[:_LONG_TEXT], exc_info=record.exc_info)

    def over(self) -> None:
        """A batch has been sent."""
        if "export" in self._said:
            self._said.clear()
            _log.info("tracing: spans are sent again")
