"""Spans by OpenTelemetry's SDK for requests and upstream calls, begun when sent upstream and ended in batches."""

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

# Seconds at shutdown for exporting the last spans.
_LAST = 3
# The most characters of a model's name, which the client chooses, and of a message of the SDK.
_LONG_NAME = 200
_LONG_TEXT = 500


class Trace:
    """A request's spans. `ahead` is the wall clock minus the records' clock; `call` is the upstream call's span."""

    __slots__ = ("_ahead", "call", "called_at", "calls", "request", "span_id", "trace_id")

    def __init__(self, request: Span, ahead: float) -> None:
        names = request.get_span_context()
        self.trace_id = format_trace_id(names.trace_id)
        self.span_id = format_span_id(names.span_id)
        self.request = request
        self.call: Span | None = None
        self.called_at = 0.0
        self.calls = 0
        # One offset for all spans: setting the wall clock meanwhile changes no duration.
        self._ahead = ahead

    def wall(self, seconds: float) -> int:
        """Convert a record's time to nanoseconds since the epoch."""
        return int((seconds + self._ahead) * 1e9)


class Tracer:
    """Creates and exports the spans; the SDK's environment variables set sampler, exporter, batches and resource.

    A request's spans are created when it is first sent upstream, because the upstream gets their ids, else at its end.
    So the SDK itself samples, and an unsampled request costs little.
    """

    def __init__(self, *, tls: bool) -> None:
        """`tls` says whether clients connect by TLS."""
        ours = own_version()
        resource = Resource.create({semconv.SERVICE_NAME: "vllm-gateway", semconv.SERVICE_VERSION: ours})
        # The environment overrides our attributes; `create` does the opposite.
        resource = resource.merge(OTELResourceDetector().detect())
        self._provider = TracerProvider(resource=resource, shutdown_on_exit=False)
        self._tracer = self._provider.get_tracer("gateway", ours, semconv.SCHEMA)
        self._scheme = "https" if tls else "http"
        self._exporter: SpanExporter = _Exporter()
        self._provider.add_span_processor(BatchSpanProcessor(self._exporter))

    def to_upstream(self, record: Record, lines: bytes) -> bytes:
        """The header lines for the upstream, with the call's span as the parent of the upstream's spans."""
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
        """End the spans of requests that have ended."""
        for record in records:
            trace = record.trace
            if not isinstance(trace, Trace):
                trace = record.trace = self._begin(record)
            if trace.request.is_recording():
                if trace.call is not None:
                    _end_call(record, trace, trace.call)
                _end(record, trace)

    def close(self) -> None:
        """Export the remaining spans; wait a few seconds at most."""
        closing = threading.Thread(target=self._provider.shutdown, name="last spans", daemon=True)
        closing.start()
        # The SDK itself would wait half a minute for a collector that does not answer.
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
        """Begin one span for all attempts, as the conventions for GenAI say."""
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
    """The client's span as context, empty if the headers name none or are invalid."""
    if b"traceparent: " not in lines:
        return Context()
    headers: dict[str, list[str]] = {}
    for name, value in _CONTEXT.findall(lines):
        headers.setdefault(name.decode(), []).append(value.decode("latin-1"))
    # Trace Context, 3.2: a second traceparent is an error, and a new trace is begun.
    return _W3C.extract(headers, Context()) if len(headers.get("traceparent", ())) == 1 else Context()


def _end(record: Record, trace: Trace) -> None:
    span, status, outcome = trace.request, record.status, record.outcome
    attributes: dict[str, AttributeValue] = {semconv.RESPONSE_REQUEST_ID: [record.request_id]}
    if status != CLIENT_LEFT:  # no client has seen this status
        attributes[semconv.HTTP_RESPONSE_STATUS_CODE] = status
    if outcome == "done" and status >= 500:
        outcome = str(status)
    if outcome != "done":
        attributes[semconv.ERROR_TYPE] = outcome
        # A refused or disconnected client is no server error, as the conventions say.
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
        outcome = str(record.status)  # the upstream's own status
    if outcome != "done":
        attributes[semconv.ERROR_TYPE] = outcome
        if outcome != "client_left":
            span.set_status(StatusCode.ERROR)
    span.set_attributes(attributes)
    span.end(trace.wall(record.upstream_ended_at or record.ended_at or record.started_at))


class _Exporter(OTLPSpanExporter):
    """The SDK's exporter; it logs once that spans cannot be sent, and once that they are sent again."""

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
    """Logs each message of the SDK once, because the SDK repeats it with each batch or span.

    Messages about a client's headers are dropped: they do not concern the operator and may hold anything.
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
        """A batch was sent: log it if exports failed before."""
        if "export" in self._said:
            self._said.clear()
            _log.info("tracing: spans are sent again")
