"""From a valid request to jobs: the policy it asks for, its prompts' ids, and an answer for every choice."""

import copy
import secrets
from collections.abc import Callable
from typing import Any

from qadapter.detokenising import Detokeniser
from qadapter.errors import ConfigError
from qadapter.generation import end_tokens
from qadapter.modeling import QAdapterForCausalLM
from qadapter.modeling.bases import context_limit
from qadapter.modeling.conditions import OffInside
from qadapter.serving.answer_text import AnswerText, StopStrings
from qadapter.serving.api_errors import bad_request
from qadapter.serving.catalogue import Catalogue, Dial
from qadapter.serving.jobs import Answer, Event, Job
from qadapter.serving.prompts import PromptEncoder
from qadapter.serving.sampling import Sampler, SamplingRules
from qadapter.serving.schema import ChatRequest, CompletionRequest, GenerationRequest
from qadapter.serving.settings import ServerSettings

# Tokens of the prompt that decide how the first token of a continued text reads (a space before it, say).
CONTEXT_TOKENS = 6


class Admission:
    """Turns requests into jobs, or refuses them. Not safe for several threads at once: tokenizers are not.

    Args:
        model: the policy that is served.
        tokenizer: of its base.
        catalogue: what is served under which name.
        settings: limits.
    """

    def __init__(
        self, model: QAdapterForCausalLM, tokenizer: Any, catalogue: Catalogue, settings: ServerSettings
    ) -> None:
        self._catalogue, self._settings = catalogue, settings
        vocabulary = model.config.get_text_config(decoder=True).vocab_size
        self.context = context_length(model, settings.max_context)
        self._encoder = PromptEncoder(tokenizer, vocabulary, self.context)
        self._decoding_tokenizer = copy.deepcopy(tokenizer)  # for the engine's thread
        self._condition = OffInside(self._decoding_tokenizer)
        self._ends = frozenset(end_tokens(model, tokenizer))

    def jobs(self, request: GenerationRequest, deliver: Callable[[Event], None]) -> list[Job]:
        """A job for every prompt of the request, reporting to `deliver`.

        Raises:
            ApiError: an unknown model, too many tokens or choices, or a prompt that cannot be encoded.
        """
        dial = self._catalogue.dial(request.model, request.qadapter)
        if dial.conditional and isinstance(request, CompletionRequest) and request.echo:
            raise bad_request(
                "off_inside is of answers, and echo scores a prompt: leave one out.", "qadapter.off_inside"
            )
        if request.n > self._settings.max_n:
            raise bad_request(f"n = {request.n}: this server gives at most {self._settings.max_n} choices.", "n")
        prompts, param = self._prompts(request)
        lengths = [self._encoder.answer_tokens(ids, request.answer_tokens, param) for ids in prompts]

        def seed() -> int:  # without the request's, equal prompts in a list have different samples, as elsewhere
            return secrets.randbits(63) if request.seed is None else request.seed

        return [
            self._job(request, dial, ids, length, seed(), number * request.n, deliver)
            for number, (ids, length) in enumerate(zip(prompts, lengths, strict=True))
        ]

    def _prompts(self, request: GenerationRequest) -> tuple[list[list[int]], str]:
        if isinstance(request, ChatRequest):
            ids = self._encoder.chat(request.messages, request.chat_template_kwargs, request.reasoning_effort)
            return [ids], "messages"
        assert isinstance(request, CompletionRequest)
        count, most = len(request.prompt), self._settings.max_queue
        if count > most:  # before they are encoded, for which others would have to wait
            raise bad_request(f"prompt holds {count} prompts: this server takes at most {most} at once.", "prompt")
        return [self._encoder.text(prompt) for prompt in request.prompt], "prompt"

    def _job(
        self,
        request: GenerationRequest,
        dial: Dial,
        prompt_ids: list[int],
        max_tokens: int,
        seed: int,
        first_index: int,
        deliver: Callable[[Event], None],
    ) -> Job:
        rules = SamplingRules(
            request.temperature,
            request.top_p,
            request.presence_penalty,
            request.frequency_penalty,
            request.logprob_count,
        )
        echo = isinstance(request, CompletionRequest) and request.echo
        context = () if echo or isinstance(request, ChatRequest) else prompt_ids[-CONTEXT_TOKENS:]
        answers = [
            Answer(
                first_index + choice,
                # By the choice's number within its prompt: a prompt's answers are the same alone and in a list.
                Sampler(rules, f"{seed}:{choice}"),
                AnswerText(Detokeniser(self._decoding_tokenizer, context), StopStrings(request.stop)),
                self._ends,
                max_tokens,
            )
            for choice in range(request.n)
        ]
        model, _ = self._catalogue.named(request.model)
        condition = self._condition.after if dial.conditional else None
        return Job(model, prompt_ids, dial, answers, deliver, condition, echo)


def context_length(model: QAdapterForCausalLM, wanted: int | None) -> int:
    """Tokens of prompt and answer together: what was wanted, within what the base was made for.

    Raises:
        ConfigError: more than that, or the base does not say and nothing was wanted.
    """
    limit = context_limit(model.config)
    if wanted is None:
        if limit is None:
            raise ConfigError("the base model's config names no longest context: give --max-context.")
        return limit
    if limit is not None and wanted > limit:
        raise ConfigError(f"max_context = {wanted}: at most {limit} tokens can be served with this base model.")
    return wanted
