"""Requests are checked where they come in: a strength that the engine would ignore, or cannot use, is refused.

vLLM lets logits processors look at a request's parameters before it is admitted. These do that, and leave logits alone.
"""

from typing import Any

from vllm.sampling_params import SamplingParams
from vllm.v1.sample.logits_processor import LogitsProcessor as V1LogitsProcessor
from vllm.v1.worker.gpu.sample.logits_processor import LogitsProcessor as V2LogitsProcessor

from qadapter.errors import ConfigError
from qadapter.modeling.mixing import checked_number

NAME = "qadapter_strength"
OURS = "qadapter"


def requested_strength(params: SamplingParams) -> float | None:
    """The strength that a request asks for, None if it leaves that to the server.

    Raises:
        ValueError: it is no finite number, larger than any dial, or there is a misspelt parameter of ours.
    """
    extra: dict[str, Any] = params.extra_args or {}
    if unknown := sorted(key for key in extra if key.startswith(OURS) and key != NAME):
        raise ValueError(f"{unknown[0]!r} is unknown: the parameter is vllm_xargs={{{NAME!r}: 0.7}}.")
    value = extra.get(NAME)
    if value is None:
        return None
    try:
        return checked_number(value, NAME)
    except ConfigError as error:
        raise ValueError(str(error)) from None  # what vLLM makes an answer to the client of


class V1Guard(V1LogitsProcessor):
    """On the V1 model runner, which has no per-request inputs."""

    def __init__(self, *_: Any) -> None:
        pass

    @classmethod
    def validate_params(cls, sampling_params: SamplingParams) -> None:
        """Refuse every request with a strength of its own."""
        if requested_strength(sampling_params) is not None:
            raise ValueError(
                f"{NAME} needs vLLM's V2 model runner (start the server with VLLM_USE_V2_MODEL_RUNNER=1); "
                "this server's strength is fixed."
            )

    def is_argmax_invariant(self) -> bool:
        """Yes: nothing is changed."""
        return True

    def update_state(self, batch_update: Any) -> None:
        """Nothing is kept."""

    def apply(self, logits: Any) -> Any:
        """The logits as they are."""
        return logits


class StrengthGuard(V2LogitsProcessor):
    """On the V2 model runner: any strength of a dial."""

    @classmethod
    def validate_params(cls, sampling_params: SamplingParams) -> None:
        """Refuse a strength that is none."""
        requested_strength(sampling_params)

    def add_request(self, req_idx: int, sampling_params: SamplingParams) -> bool:
        """False: this request's logits stay as they are."""
        return False

    def apply(self, logits: Any, *_: Any, **__: Any) -> Any:
        """The logits as they are."""
        return logits


class FixedGuard(StrengthGuard):
    """On the V2 model runner, where one stream was enough for the server's strength."""

    @classmethod
    def validate_params(cls, sampling_params: SamplingParams) -> None:
        """Refuse every request with a strength of its own."""
        if requested_strength(sampling_params) is not None:
            raise ValueError(
                f'{NAME}: this server runs one stream, at one strength. Start it with "dial": true in the model\'s '
                "qadapter entry to choose the strength with each request."
            )
