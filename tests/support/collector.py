"""An OTLP receiver on a real socket, and the spans that it was sent."""

from __future__ import annotations

import threading
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Self

from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.proto.common.v1.common_pb2 import AnyValue
from opentelemetry.proto.trace.v1.trace_pb2 import Span, Status


@dataclass
class Sent:
    """A span as it was sent; ids are in hex, `parent` empty where it has none, times in seconds."""

    name: str
    kind: str
    trace_id: str
    span_id: str
    parent: str
    state: str
    began: float
    ended: float
    failed: bool
    attributes: dict[str, Any]
    resource: dict[str, Any]


class Collector:
    """The receiver, from when it is entered. `status` is what it answers; `raw` is all that it was sent."""

    def __init__(self) -> None:
        self.port = 0
        self.status = 200
        self.spans: list[Sent] = []
        self.raw = b""
        self.changed = threading.Condition()

    @property
    def url(self) -> str:
        """What OTEL_EXPORTER_OTLP_ENDPOINT is to be."""
        return f"http://127.0.0.1:{self.port}"

    def __enter__(self) -> Self:
        collector = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                assert self.path == "/v1/traces"
                assert self.headers["content-type"] == "application/x-protobuf"
                status = collector.status  # before the test sees the batch, and says what the next one gets
                collector._receive(self.rfile.read(int(self.headers["content-length"])))
                self.send_response(status)
                self.send_header("content-length", "0")
                self.end_headers()

            def log_message(self, *_: Any, **__: Any) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.port = self._server.server_address[1]
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.01,))
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()

    def wait(self, count: int) -> list[Sent]:
        """So many spans, in the order of their beginning; waits for them, and there are no more."""
        with self.changed:
            assert self.changed.wait_for(lambda: len(self.spans) >= count, 10), f"only {self.spans}"
            assert len(self.spans) == count
            return sorted(self.spans, key=lambda span: span.began)

    def _receive(self, data: bytes) -> None:
        message = ExportTraceServiceRequest.FromString(data)
        with self.changed:
            self.raw += data
            for resource in message.resource_spans:
                told = _values(resource.resource.attributes)
                self.spans += [_sent(span, told) for scope in resource.scope_spans for span in scope.spans]
            self.changed.notify_all()


def _sent(span: Span, resource: dict[str, Any]) -> Sent:
    return Sent(
        span.name,
        Span.SpanKind.Name(span.kind).removeprefix("SPAN_KIND_"),
        span.trace_id.hex(),
        span.span_id.hex(),
        span.parent_span_id.hex(),
        span.trace_state,
        span.start_time_unix_nano / 1e9,
        span.end_time_unix_nano / 1e9,
        span.status.code == Status.STATUS_CODE_ERROR,
        _values(span.attributes),
        resource,
    )


def _values(attributes: Any) -> dict[str, Any]:
    return {attribute.key: _value(attribute.value) for attribute in attributes}


def _value(value: AnyValue) -> Any:
    kind = value.WhichOneof("value")
    assert kind is not None
    return [_value(one) for one in value.array_value.values] if kind == "array_value" else getattr(value, kind)
