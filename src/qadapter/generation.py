"""Text in, text out: chat template, batching, streaming."""

import threading
import warnings
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import StoppingCriteria, TextIteratorStreamer

from qadapter.data.encoding import PlainEncoder, render, trained_end
from qadapter.data.messages import joined_parts, user
from qadapter.detokenising import Detokeniser, detokenised
from qadapter.errors import ConfigError
from qadapter.modeling import QAdapterForCausalLM
from qadapter.modeling.mixing import Strength

Message = dict[str, str]
GREEDY_TEMPERATURE = 1e-5  # below it the likeliest token: logits divided by less overflow
# What a base's generation_config.json may ask for besides (Qwen 2.5: a repetition penalty), which would change the
# distribution that is drawn from: answers are the policy's, as on a server, and what is measured is what it does.
PLAIN = {
    "repetition_penalty": 1.0,
    "no_repeat_ngram_size": 0,
    "min_p": None,
    "typical_p": 1.0,
    "epsilon_cutoff": 0.0,
    "eta_cutoff": 0.0,
    "guidance_scale": None,
    "num_beams": 1,
    "max_time": None,
    "stop_strings": None,
}


@dataclass(frozen=True)
class Sampling:
    """How to draw tokens from the policy.

    Args:
        max_new_tokens: longest answer.
        temperature: 0 takes the likeliest token each time, as does anything below 1e-5.
        top_p: nucleus of the distribution to sample from.
        seed: of the sampling; None leaves torch's generator as it is.
    """

    max_new_tokens: int = 256
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int | None = None

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise ConfigError(f"max_new_tokens = {self.max_new_tokens}: must be at least 1.")
        if not 0 <= self.temperature < 100:
            raise ConfigError(f"temperature = {self.temperature}: must lie in [0, 100).")
        if not 0 < self.top_p <= 1:
            raise ConfigError(f"top_p = {self.top_p}: must lie in (0, 1].")
        if self.seed is not None and not -(2**63) <= self.seed < 2**64:
            raise ConfigError(f"seed = {self.seed}: must fit into 64 bits.")

    def to_kwargs(self) -> dict[str, Any]:
        """Arguments of `generate`, which leave nothing of the base's own generation config but what ends an answer."""
        drawn = self.temperature >= GREEDY_TEMPERATURE
        return {
            **PLAIN,
            "max_new_tokens": self.max_new_tokens,
            "do_sample": drawn,
            "temperature": self.temperature if drawn else None,
            "top_p": self.top_p if drawn else None,
            "top_k": 0 if drawn else None,
        }


@dataclass(frozen=True)
class Answer:
    """A generated text, whether the model ended it itself, and with which token where that is known.

    Args:
        ids: what the model wrote, its end included. The text may be that of other tokens: it has no blanks around it.
    """

    text: str
    finished: bool
    end: int | None = None
    ids: Sequence[int] | None = field(default=None, compare=False)


def encode(tokenizer: Any, prompts: Sequence[str | Sequence[Message]]) -> dict[str, torch.Tensor]:
    """Left-padded input_ids and attention_mask (B, T); a plain prompt is a user's message if there is a template."""
    rows = [_prompt_ids(tokenizer, prompt) for prompt in prompts]
    width = max(map(len, rows))
    pad = next((i for i in (tokenizer.pad_token_id, tokenizer.eos_token_id) if i is not None), 0)
    input_ids = torch.full((len(rows), width), pad)
    attention_mask = torch.zeros_like(input_ids)
    for row, ids in enumerate(rows):
        input_ids[row, width - len(ids) :] = torch.tensor(ids)
        attention_mask[row, width - len(ids) :] = 1
    return {"input_ids": input_ids, "attention_mask": attention_mask}


def _prompt_ids(tokenizer: Any, prompt: str | Sequence[Message]) -> list[int]:
    if tokenizer.chat_template is None:
        if not isinstance(prompt, str):
            raise ConfigError("the base model has no chat template: give plain text prompts, not messages.")
        ids = PlainEncoder(tokenizer).prompt_ids(prompt)  # as prompts are trained on
    else:
        messages = user(prompt) if isinstance(prompt, str) else prompt
        rows = [{**message, "content": joined_parts(message.get("content"))} for message in messages]
        ids = render(tokenizer, rows, add_generation_prompt=True)
    if not ids:
        raise ConfigError("the prompt is empty: give at least one token.")
    return ids


def end_tokens(model: QAdapterForCausalLM, tokenizer: Any) -> list[int]:
    """Ids that end an answer: the generation config's, the tokenizer's, and the one that answers are trained to end by.

    A base that was never tuned to chat (Qwen 2.5) ends texts by another token than its template ends turns.
    """
    configured = model.generation_config.eos_token_id
    ids = configured if isinstance(configured, list) else [configured]
    return sorted({i for i in [*ids, tokenizer.eos_token_id, trained_end(tokenizer)] if i is not None})


def until_end(ids: torch.Tensor, ends: Sequence[int]) -> torch.Tensor:
    """True up to and including the first end token of each row (B, T)."""
    ended = torch.isin(ids, torch.tensor(list(ends), device=ids.device)).long()
    return (ended.cumsum(-1) - ended) == 0


def generate_texts(
    model: QAdapterForCausalLM,
    tokenizer: Any,
    prompts: Sequence[str | Sequence[Message]],
    sampling: Sampling,
    strength: Strength | None = None,
    batch_size: int = 8,
    progress: Callable[[int], None] | None = None,
) -> list[Answer]:
    """One answer a prompt, in order; `progress` is called with the number of prompts done since the last call.

    Raises:
        ConfigError: a batch size below 1, an empty prompt, or messages where there is no chat template.
    """
    if batch_size < 1:
        raise ConfigError(f"batch_size = {batch_size}: must be at least 1.")
    if sampling.seed is not None:
        torch.manual_seed(sampling.seed)
    ends = end_tokens(model, tokenizer)
    answers: list[Answer] = []
    for start in range(0, len(prompts), batch_size):
        batch = encode(tokenizer, prompts[start : start + batch_size])
        batch = {name: tensor.to(model.device) for name, tensor in batch.items()}
        _warn_beyond_context(model, batch["input_ids"].shape[1])
        arguments: dict[str, Any] = {**batch, **ending_arguments(ends, tokenizer), **sampling.to_kwargs()}
        output = model.generate(**arguments, strength=strength)
        for row in output[:, batch["input_ids"].shape[1] :].tolist():
            cut = next((index for index, token in enumerate(row) if token in ends), None)
            text = detokenised(tokenizer, row[:cut])
            end = None if cut is None else row[cut]
            ids = row if cut is None else row[: cut + 1]
            answers.append(Answer(text.strip(), finished=cut is not None, end=end, ids=ids))
        if progress is not None:
            progress(len(batch["input_ids"]))
    return answers


def _warn_beyond_context(model: QAdapterForCausalLM, length: int) -> None:
    limit = getattr(model.config.get_text_config(decoder=True), "max_position_embeddings", None)
    if limit is not None and length >= limit:
        warnings.warn(
            f"the prompt has {length} tokens, but the base model was made for {limit} with the answer: expect "
            "nonsense, or shorten it.",
            stacklevel=3,
        )


def ending_arguments(ends: list[int], tokenizer: Any) -> dict[str, Any]:
    """What `generate` is told of the ids that end an answer, and of the padding behind it."""
    pad = next((i for i in (tokenizer.pad_token_id, *ends) if i is not None), 0)
    return {"eos_token_id": ends or None, "pad_token_id": pad}


class _AnswerStreamer(TextIteratorStreamer):
    """Pieces of whole characters, without the token that ends the answer, which need not be a special one.

    transformers' own decodes each line by itself, where many decoders take a space off its beginning.
    """

    def __init__(self, tokenizer: Any, ends: Sequence[int]) -> None:
        super().__init__(tokenizer)
        self.ends, self.detokeniser = ends, Detokeniser(tokenizer)
        self.prompt_follows = True

    def put(self, value: torch.Tensor) -> None:
        """Take the prompt (first) or the next token."""
        if self.prompt_follows:
            self.prompt_follows = False
        elif int(value) not in self.ends and (piece := self.detokeniser.push(int(value))):
            self.on_finalized_text(piece)

    def end(self) -> None:
        """Take the end: what still waits is sent, and the reader told."""
        self.on_finalized_text(self.detokeniser.flush(), stream_end=True)


class _Cancelled(StoppingCriteria):
    def __init__(self) -> None:
        self.event = threading.Event()

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        return torch.full((input_ids.shape[0],), self.event.is_set(), device=input_ids.device)


def stream_text(
    model: QAdapterForCausalLM,
    tokenizer: Any,
    prompt: str | Sequence[Message],
    sampling: Sampling,
    strength: Strength | None = None,
    on_end: Callable[[torch.Tensor, int], None] | None = None,
    **settings: Any,
) -> Generator[str, None, None]:
    """Pieces of the answer as they are generated; closing the iterator stops the generation.

    Args:
        on_end: called with all ids (1, T) and the prompt's length when the answer is complete.
        settings: further settings of `QAdapterForCausalLM.generate` (adapter_weights, max_kl).
    """
    if sampling.seed is not None:
        torch.manual_seed(sampling.seed)
    batch = {name: tensor.to(model.device) for name, tensor in encode(tokenizer, [prompt]).items()}
    _warn_beyond_context(model, batch["input_ids"].shape[1])
    ends = end_tokens(model, tokenizer)
    streamer = _AnswerStreamer(tokenizer, ends)
    cancelled, failure = _Cancelled(), []
    arguments: dict[str, Any] = {
        **batch,
        **ending_arguments(ends, tokenizer),
        **sampling.to_kwargs(),
        "streamer": streamer,
        "stopping_criteria": [cancelled],
    }

    def run() -> None:
        try:
            ids = model.generate(**arguments, strength=strength, **settings)
            if on_end is not None:
                on_end(ids, batch["input_ids"].shape[1])
        except BaseException as error:  # handed over to the consumer's thread
            failure.append(error)
            streamer.end()

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    try:
        yield from streamer
    finally:
        cancelled.event.set()
        thread.join()
    if failure:
        raise failure[0]
