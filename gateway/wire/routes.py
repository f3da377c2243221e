"""The paths that are relayed, and those of vLLM's own that are not: the one list that all others are made from."""

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

    `name` is what GATEWAY_ROUTES calls it and those that belong to it. `body` is the request's: `chat`
    is JSON in OpenAI's or the simplified form, `generate` and `ask` forms of older servers', and `json` any
    object, which goes on as it came, as do a `batch` of chats, a `completion` and a `response`; so does an
    `upload`, while it comes. `streams` says that an answer may be server-sent events, `ends` how those end.
    """

    name: str
    method: Literal["GET", "POST"]
    path: str
    about: str
    body: BodyKind = "json"
    streams: bool = False
    ends: Ends = "done"
    # Whether it brings a prompt for a model: not where it asks for counts alone, or for nothing new.
    takes_tokens: bool = field(init=False)
    # Whether its answer is made token by token.
    generates: bool = field(init=False)

    def __post_init__(self) -> None:
        takes_tokens = self.body != "none" and self.name != "tokenize" and self.path != _COUNT_TOKENS
        # Not properties, as each call would pay for them.
        object.__setattr__(self, "takes_tokens", takes_tokens)
        object.__setattr__(self, "generates", self.body == "batch" or (self.streams and takes_tokens))

    @property
    def asks_the_model(self) -> bool:
        """Whether a model's kind decides if it is there at all: vLLM has what its model can answer."""
        return self.name in ("chat", "completions", "embeddings", "rerank", "score", "pooling", "classify")

    @property
    def asked_for_as(self) -> str:
        """The name of a route that a server has where it has this one: vLLM has all that is like a chat, or none."""
        return "chat" if self.name in ("responses", "messages") else self.name

    @property
    def caches_prefixes(self) -> bool:
        """Whether its body may name a salt of the prefix cache: it is JSON, and brings a prompt for a model."""
        return self.body != "upload" and self.takes_tokens

    @property
    def replays(self) -> bool:
        """Whether its answer tells of another call, and may wait for as long as that runs: its silence is no fault."""
        return "{response_id}" in self.path


# As vLLM makes them: nothing that a path could be changed by, and no other path's last word.
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

# What GATEWAY_ROUTES may name.
NAMES = tuple(dict.fromkeys(route.name for route in ROUTES))

_OPERATORS: Final = "changes or stops the server for everyone"
_INSIDE: Final = "tells of the server's inside"
_OTHER_WAY_IN: Final = "another way into calls that have paths of their own"
_EXPERIMENT: Final = "an experiment of vLLM's"
_OURS: Final = "the gateway's own"

# Not relayed, and why: whatever is not above is not, and these are all that vLLM is known to have.
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
