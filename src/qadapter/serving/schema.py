"""What requests may say. Types are strict: "0.7" is no number and true is no strength."""

from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from qadapter.serving.api_errors import bad_request

MAX_REQUEST_DIAL = 100.0  # in half precision the mixed logits lose all precision beyond it
MAX_STOPS = 4
MAX_TEMPLATE_VARIABLES = 16
# Of an object, and prompts of a list, in the largest request that makes sense: to check a body full of others takes
# seconds, in which nobody else is answered.
MAX_FIELDS = 128
MAX_PROMPTS = 4096
# OpenAI's fields that do not change the answer here.
IGNORED = frozenset({
    "user", "store", "metadata", "service_tier", "parallel_tool_calls", "prediction", "prompt_cache_key",
    "prompt_cache_retention", "prompt_cache_options", "safety_identifier",
})  # fmt: skip
# OpenAI's fields that would change the answer, with the values that ask for nothing.
UNSUPPORTED: dict[str, tuple[Any, ...]] = {
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "response_format": ({"type": "text"},),
    "logit_bias": ({},),
    "modalities": (["text"],),
    "audio": (),
    "web_search_options": (),
    "moderation": (),
    "reasoning_effort": (),
    "verbosity": ("medium",),
    "suffix": ("",),
    "echo": (False,),
    "best_of": (),
}
# Of an answer's message, as other servers write it.
EMPTY_FIELDS: tuple[tuple[str, Any], ...] = (
    ("tool_calls", []), ("annotations", []), ("refusal", ""), ("reasoning_content", ""), ("reasoning", ""),
)  # fmt: skip

# Fields of a message that hold something else than text.
NOT_TEXT = ("tool_calls", "function_call", "refusal", "audio")

Name = Annotated[str, Field(max_length=200)]
TemplateVariable = bool | int | Annotated[float, Field(allow_inf_nan=False)] | Annotated[str, Field(max_length=1000)]
Finite = Annotated[float, Field(allow_inf_nan=False)]
Weight = Annotated[float, Field(allow_inf_nan=False, ge=-MAX_REQUEST_DIAL, le=MAX_REQUEST_DIAL)]


def _as_list(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


def _as_prompts(value: Any) -> Any:
    """A text, a list of texts, ids or a list of ids, as a list of prompts."""
    if isinstance(value, str) or (isinstance(value, list) and value and all(type(item) is int for item in value)):
        return [value]
    return value


def _as_parts(value: Any) -> Any:
    return [{"type": "text", "text": value}] if isinstance(value, str) else value


class Strict(BaseModel):
    """No conversions, no unknown fields. Lists stop at their first mistake: to collect a million takes seconds."""

    model_config = ConfigDict(strict=True, extra="forbid")


class QAdapterOptions(Strict):
    """The dial: `extra_body={"qadapter": {...}}` in OpenAI's client.

    Args:
        strength: λ; 0 is the base, 1 the trained policy.
        weights: of served adapters by name, instead of the model's own adapter at weight 1.
        max_kl: cap on KL(policy ‖ base) at each token, in nats.
        min_kl: threshold in nats: the strength at each token is multiplied by max(0, 1 − min_kl / KL at strength 1).
        decay: factor ρ of the strength from one token of the answer to the next: λ ρᵗ at the t-th.
        off_inside: the strength is 0 inside code fences, JSON, reasoning and tool calls (`qadapter.OffInside`).
    """

    strength: Weight | None = None
    weights: dict[Name, Weight] | None = None
    max_kl: Annotated[float, Field(allow_inf_nan=False, ge=0)] | None = None
    min_kl: Annotated[float, Field(allow_inf_nan=False, ge=0)] | None = None
    decay: Annotated[float, Field(allow_inf_nan=False, gt=0, le=1)] | None = None
    off_inside: bool | None = None


class StreamOptions(Strict):
    """What a stream carries besides the answer."""

    include_usage: bool = False
    include_obfuscation: bool = False


class GenerationRequest(Strict):
    """What both endpoints share."""

    model: Name
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    temperature: Annotated[Finite, Field(ge=0, le=2)] = 1.0
    top_p: Annotated[Finite, Field(ge=0, le=1)] = 1.0
    n: Annotated[int, Field(ge=1)] = 1
    stop: Annotated[
        list[Annotated[str, Field(min_length=1, max_length=1000)]],
        Field(max_length=MAX_STOPS, fail_fast=True),
        BeforeValidator(_as_list),
    ] = []
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    presence_penalty: Annotated[Finite, Field(ge=-2, le=2)] = 0.0
    frequency_penalty: Annotated[Finite, Field(ge=-2, le=2)] = 0.0
    stream: bool = False
    stream_options: StreamOptions = StreamOptions()
    qadapter: QAdapterOptions = QAdapterOptions()

    @property
    def answer_tokens(self) -> int | None:
        """The longest answer asked for."""
        return self.max_tokens

    @property
    def logprob_count(self) -> int | None:
        """How many alternatives to report with each token; None for no log-probabilities."""
        raise NotImplementedError


class TextPart(Strict):
    """A piece of a message."""

    type: Literal["text"]
    text: str
    prompt_cache_breakpoint: Any = None  # changes no answer


class Message(Strict):
    """A turn of a conversation."""

    role: Literal["system", "developer", "user", "assistant"]
    content: Annotated[list[TextPart], Field(min_length=1, fail_fast=True), BeforeValidator(_as_parts)]
    name: str | None = None

    @property
    def text(self) -> str:
        """The parts together."""
        return "".join(part.text for part in self.content)


class ChatRequest(GenerationRequest):
    """POST /v1/chat/completions."""

    path: ClassVar[str] = "/v1/chat/completions"
    messages: Annotated[list[Message], Field(min_length=1, fail_fast=True)]
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    logprobs: bool = False
    top_logprobs: Annotated[int, Field(ge=0, le=20)] = 0
    reasoning_effort: Annotated[str, Field(max_length=20)] | None = None
    # Not OpenAI's: what a chat template reads besides the messages, as on vLLM ({"enable_thinking": false}, say).
    chat_template_kwargs: Annotated[dict[Name, TemplateVariable], Field(max_length=MAX_TEMPLATE_VARIABLES)] = {}

    @property
    def answer_tokens(self) -> int | None:
        """The longest answer asked for, under its new or its old name."""
        return self.max_completion_tokens or self.max_tokens

    @property
    def logprob_count(self) -> int | None:
        """How many alternatives to report with each token; None for no log-probabilities."""
        return self.top_logprobs if self.logprobs else None


class CompletionRequest(GenerationRequest):
    """POST /v1/completions."""

    path: ClassVar[str] = "/v1/completions"
    prompt: Annotated[
        list[str | Annotated[list[int], Field(fail_fast=True)]],
        Field(min_length=1, fail_fast=True),
        BeforeValidator(_as_prompts),
    ]
    max_tokens: Annotated[int, Field(ge=0)] | None = 16
    logprobs: Annotated[int, Field(ge=0, le=5)] | None = None
    echo: bool = False

    @property
    def logprob_count(self) -> int | None:
        """How many alternatives to report with each token; None for no log-probabilities."""
        return self.logprobs


def parse(kind: type[GenerationRequest], body: dict[str, Any]) -> Any:
    """The request in `body`; null means the default, as with OpenAI.

    Raises:
        ApiError: 400, naming the field.
    """
    _require_small(body)
    fields = {name: _without_nulls(value) for name, value in body.items() if value is not None and name not in IGNORED}
    if type(fields.get("best_of")) is int and fields["best_of"] == fields.get("n", 1):
        del fields["best_of"]  # the best of as many as are asked for: all of them
    for name in [name for name in UNSUPPORTED if name in fields and name not in kind.model_fields]:
        value = fields.pop(name)
        if not any(type(value) is type(neutral) and value == neutral for neutral in UNSUPPORTED[name]):
            raise bad_request(f"{name} is not supported by this server: leave it out.", name, "unsupported_parameter")
    if isinstance(fields.get("messages"), list):
        fields["messages"] = [_without_nulls(message) for message in fields["messages"]]
        for place, message in enumerate(fields["messages"]):
            _require_text(f"messages.{place}", message)
    try:
        request = kind.model_validate(fields)
    except ValidationError as error:
        raise _refusal(error) from None
    _check_together(request, body)
    return request


def _require_small(body: dict[str, Any]) -> None:
    options, messages, prompt = body.get("qadapter"), body.get("messages"), body.get("prompt")
    objects = [("the body", body), ("qadapter", options)]
    objects += [(name, body.get(name)) for name in ("chat_template_kwargs", "stream_options")]
    if isinstance(options, dict):
        objects.append(("qadapter.weights", options.get("weights")))
    if isinstance(messages, list):
        for place, message in enumerate(messages):
            objects.append((f"messages.{place}", message))
            if isinstance(message, dict) and isinstance(message.get("content"), list):
                objects += [(f"messages.{place}.content", part) for part in message["content"]]
    for name, value in objects:
        if isinstance(value, dict) and len(value) > MAX_FIELDS:
            raise bad_request(f"{name} has {len(value)} fields: at most {MAX_FIELDS} are read.", name, "invalid_value")
    if isinstance(prompt, list) and len(prompt) > MAX_PROMPTS and type(prompt[0]) is not int:
        message = f"prompt holds {len(prompt)} prompts: at most {MAX_PROMPTS} are read."
        raise bad_request(message, "prompt", "invalid_value")


def _require_text(place: str, message: Any) -> None:
    """Raise ApiError for a message that holds more than text, with what to do about it."""
    if not isinstance(message, dict):
        return
    for name in NOT_TEXT:
        if name in message:
            text = f"{place}.{name} is not supported by this server, which reads text only: leave the message out."
            raise bad_request(text, f"{place}.{name}", "unsupported_parameter")
    if message.get("role") in ("tool", "function"):
        text = f"{place}.role: tools are not supported by this server: leave the message out."
        raise bad_request(text, f"{place}.role", "unsupported_parameter")
    content = message.get("content")
    for number, part in enumerate(content if isinstance(content, list) else ()):
        kind = part.get("type", "text") if isinstance(part, dict) else "text"
        if kind != "text":
            name = f"{place}.content.{number}.type"
            text = f"{name}: parts of type {str(kind)[:50]!r} are not supported by this server: send text parts only."
            raise bad_request(text, name, "unsupported_parameter")


def _without_nulls(value: Any) -> Any:
    """An object without the empty fields that clients send along, as when they return an answer; all else as it is."""
    if not isinstance(value, dict):
        return value
    return {name: own for name, own in value.items() if own is not None and (name, own) not in EMPTY_FIELDS}


def _refusal(error: ValidationError) -> Exception:
    first = error.errors(include_url=False, include_input=False, include_context=False)[0]
    param = ".".join(str(part) for part in first["loc"])[:200]
    if first["type"] == "extra_forbidden":
        return bad_request(f"{param} is not a parameter of this endpoint.", param, "unknown_parameter")
    if first["loc"][0] == "prompt" and first["type"] != "missing":  # pydantic names the parts of the union
        return bad_request("prompt: give a text, a list of ids (integers), or a list of either.", "prompt")
    code = "missing_required_parameter" if first["type"] == "missing" else "invalid_value"
    return bad_request(f"{param}: {first['msg']}.", param, code)


def _check_together(request: GenerationRequest, body: dict[str, Any]) -> None:
    if isinstance(request, ChatRequest):
        if request.top_logprobs and not request.logprobs:
            raise bad_request("top_logprobs needs logprobs: true.", "top_logprobs")
        if request.max_completion_tokens and request.max_tokens not in (None, request.max_completion_tokens):
            raise bad_request("max_tokens and max_completion_tokens differ: give one of them.", "max_tokens")
    if isinstance(request, CompletionRequest) and request.max_tokens == 0 and not request.echo:
        raise bad_request("max_tokens: 0 asks for nothing, unless with echo: true.", "max_tokens")
    if not request.stream and body.get("stream_options") is not None:
        raise bad_request("stream_options needs stream: true.", "stream_options")
