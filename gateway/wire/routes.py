"""The paths that are relayed, and vLLM's paths that are not: the one list that all others are derived from."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Final, Literal

from gateway.wire.sse import Ends

_COUNT_TOKENS: Final = "/v1/messages/count_tokens"

BodyKind = Literal["chat", "batch", "completion", "response", "json", "none", "generate", "ask", "upload"]


@dataclass(frozen=True, slots=True)
class Route:
    """A path that is relayed; it may hold `{response_id}`.

    `name` is the name in GATEWAY_ROUTES, which related routes share. `body` is the kind of the request's body. `chat`
    is JSON in OpenAI's or the simplified form; `generate` and `ask` are forms of older servers. `json` is any object,
    which is relayed unchanged, as are a `batch` of chats, a `completion` and a `response`. An `upload` is relayed while
    it arrives. `streams` says that the answer may be server-sent events, and `ends` how these end.
    """

    name: str
    method: Literal["GET", "POST"]
    path: str
    about: str
    body: BodyKind = "json"
    streams: bool = False
    ends: Ends = "done"
    # Whether the call holds a prompt for a model: not if it only tokenizes or counts tokens, or has no body.
    takes_tokens: bool = field(init=False)
    # Whether the answer is generated token by token.
    generates: bool = field(init=False)

    def __post_init__(self) -> None:
        takes_tokens = self.body != "none" and self.name != "tokenize" and self.path != _COUNT_TOKENS
        # Fields and not properties: each call would pay for a property.
        object.__setattr__(self, "takes_tokens", takes_tokens)
        object.__setattr__(self, "generates", self.body == "batch" or (self.streams and takes_tokens))

    @property
    def asks_the_model(self) -> bool:
        """Whether an upstream's model decides if the route exists: vLLM serves only what its model can answer."""
        return self.name in ("chat", "completions", "embeddings", "rerank", "score", "pooling", "classify")

    @property
    def asked_for_as(self) -> str:
        """The name under which a server's support of this route is known: vLLM has all routes like chat, or none."""
        return "chat" if self.name in ("responses", "messages") else self.name

    @property
    def caches_prefixes(self) -> bool:
        """Whether the body may hold a salt of the prefix cache: it is JSON and holds a prompt for a model."""
        return self.body != "upload" and self.takes_tokens

    @property
    def replays(self) -> bool:
        """Whether the answer reports another call, and may be silent for as long as that call runs without a fault."""
        return "{response_id}" in self.path


# As vLLM makes them: no characters that could change the path, and not the last segment of another path.
RESPONSE_ID: Final = re.compile(r"resp_[A-Za-z0-9_-]{1,128}")

ROUTES: Final = (
    Route("chat", "POST", "/v1/chat/completions", "A chat, in OpenAI's or the simplified form.", "chat", True),
    Route("chat", "POST", "/v1/chat/completions/batch", "Several chats, each with its completion.", "batch"),
    Route("completions", "POST", "/v1/completions", "A text, completed.", "completion", True),
    Route("responses", "POST", "/v1/responses", "OpenAI's Responses.", "response", True, "responses"),
    Route(
        "responses", "GET", "/v1/responses/{response_id}", "A stored response.", "none", streams=True, ends="responses"
    ),
    Route("responses", "POST", "/v1/responses/{response_id}/cancel", "The end of one in the background.", "none"),
    Route("messages", "POST", "/v1/messages", "Anthropic's Messages.", streams=True, ends="messages"),
    Route("messages", "POST", _COUNT_TOKENS, "How long a call of Messages is.", ends="messages"),
    Route("embeddings", "POST", "/v1/embeddings", "A vector for each text."),
    Route("rerank", "POST", "/rerank", "Documents by their worth for a query."),
    Route("rerank", "POST", "/v1/rerank", "Documents by their worth for a query."),
    Route("rerank", "POST", "/v2/rerank", "Documents by their worth for a query."),
    Route("score", "POST", "/score", "How alike pairs of texts are."),
    Route("score", "POST", "/v1/score", "How alike pairs of texts are."),
    Route("pooling", "POST", "/pooling", "What the model's pooler gives."),
    Route("classify", "POST", "/classify", "A class for each text."),
    Route("audio", "POST", "/v1/audio/transcriptions", "Speech as text.", "upload", True),
    Route("audio", "POST", "/v1/audio/translations", "Speech as text in English.", "upload", True),
    Route("tokenize", "POST", "/tokenize", "The tokens of a text or a chat."),
    Route("tokenize", "POST", "/detokenize", "The text of tokens."),
    Route("generate", "POST", "/generate", "A bare prompt, as vLLM's first server took it.", "generate", True),
    Route("ask", "POST", "/api/v1/ask", "A question, as vllm-app took it.", "ask", True),
    Route("models", "GET", "/v1/models", "The models that are served.", "none"),
    Route("version", "GET", "/version", "vLLM's version.", "none"),
)

# The names that GATEWAY_ROUTES may hold.
NAMES = tuple(dict.fromkeys(route.name for route in ROUTES))

_OPERATORS: Final = "changes or stops the server for everyone"
_INSIDE: Final = "tells of the server's inside"
_OTHER_WAY_IN: Final = "another way into calls that have paths of their own"
_EXPERIMENT: Final = "an experiment of vLLM's"
_OURS: Final = "the gateway's own"

# Paths that are not relayed, each with the reason. No path outside ROUTES is relayed; these are all other paths that
# vLLM is known to have.
REFUSED: Final = {
    "/health": _OURS,
    "/metrics": _OURS,
    "/ping": _OURS,
    "/v1/realtime": "a WebSocket, which this gateway does not speak",
    "/generative_scoring": _EXPERIMENT,
    "/v1/decisions": _EXPERIMENT,
    "/v1/systemone": _EXPERIMENT,
    "/invocations": _OTHER_WAY_IN,
    "/inference/v1/generate": _OTHER_WAY_IN,
    "/v2/embed": _OTHER_WAY_IN,
    "/cohere/v2/chat": _OTHER_WAY_IN,
    "/cohere/v2/chat/render": _INSIDE,
    "/v1/chat/completions/render": _INSIDE,
    "/v1/chat/completions/derender": _INSIDE,
    "/v1/completions/render": _INSIDE,
    "/v1/completions/derender": _INSIDE,
    "/v1/messages/render": _INSIDE,
    "/v1/responses/render": _INSIDE,
    "/load": _INSIDE,
    "/kv_event_sources": _INSIDE,
    "/server_info": _INSIDE,
    "/tokenizer_info": _INSIDE,
    "/get_world_size": _INSIDE,
    "/weight_info": _INSIDE,
    "/weight_checker": _INSIDE,
    "/is_paused": _INSIDE,
    "/is_sleeping": _INSIDE,
    "/is_scaling_elastic_ep": _INSIDE,
    "/fault_tolerance/status": _INSIDE,
    "/fault_tolerance/apply": _OPERATORS,
    "/scale_elastic_ep": _OPERATORS,
    "/sleep": _OPERATORS,
    "/wake_up": _OPERATORS,
    "/pause": _OPERATORS,
    "/resume": _OPERATORS,
    "/start_profile": _OPERATORS,
    "/stop_profile": _OPERATORS,
    "/collective_rpc": _OPERATORS,
    "/abort_requests": _OPERATORS,
    "/release_kv_cache_memory": _OPERATORS,
    "/reset_prefix_cache": _OPERATORS,
    "/reset_mm_cache": _OPERATORS,
    "/reset_encoder_cache": _OPERATORS,
    "/init_weight_transfer_engine": _OPERATORS,
    "/shutdown_weight_transfer_engine": _OPERATORS,
    "/start_weight_update": _OPERATORS,
    "/start_draft_weight_update": _OPERATORS,
    "/update_weights": _OPERATORS,
    "/update_weight_version": _OPERATORS,
    "/finish_weight_update": _OPERATORS,
    "/v1/load_lora_adapter": _OPERATORS,
    "/v1/unload_lora_adapter": _OPERATORS,
}
