"""The names of spans and their attributes, from OpenTelemetry's semantic conventions, all in this one place.

They are of version 1.44: those for HTTP are stable, those for GenAI are in development.
"""

from __future__ import annotations

# The version of the conventions.
SCHEMA = "https://opentelemetry.io/schemas/1.44.0"

ERROR_TYPE = "error.type"
HTTP_REQUEST_METHOD = "http.request.method"
HTTP_REQUEST_RESEND_COUNT = "http.request.resend_count"
HTTP_RESPONSE_STATUS_CODE = "http.response.status_code"
HTTP_ROUTE = "http.route"
RESPONSE_REQUEST_ID = "http.response.header.x-request-id"
SERVER_ADDRESS = "server.address"
SERVER_PORT = "server.port"
SERVICE_NAME = "service.name"
SERVICE_VERSION = "service.version"
URL_SCHEME = "url.scheme"
URL_TEMPLATE = "url.template"

GEN_AI_OPERATION_NAME = "gen_ai.operation.name"
GEN_AI_PROVIDER_NAME = "gen_ai.provider.name"
GEN_AI_REQUEST_MODEL = "gen_ai.request.model"
GEN_AI_REQUEST_STREAM = "gen_ai.request.stream"
GEN_AI_RESPONSE_TIME_TO_FIRST_CHUNK = "gen_ai.response.time_to_first_chunk"
GEN_AI_USAGE_INPUT_TOKENS = "gen_ai.usage.input_tokens"
GEN_AI_USAGE_OUTPUT_TOKENS = "gen_ai.usage.output_tokens"

# vLLM is not among the well-known providers; the conventions allow other names.
VLLM = "vllm"

# The operation names of vLLM's paths. Other paths have no name in the conventions: their spans are HTTP spans.
OPERATIONS = {
    "/v1/chat/completions": "chat",
    "/v1/chat/completions/batch": "chat",
    "/v1/responses": "chat",
    "/v1/messages": "chat",
    "/v1/completions": "text_completion",
    "/v1/embeddings": "embeddings",
}
