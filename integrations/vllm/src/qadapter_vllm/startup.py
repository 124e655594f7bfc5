"""Checks before the engine starts, in the process that answers requests: what cannot be served exactly is refused."""

import json
import os
import warnings
from typing import TYPE_CHECKING, Any

from vllm.model_executor.models.config import VerifyAndUpdateConfig

from qadapter.errors import AdapterFormatError, ConfigError
from qadapter.modeling.bases import BaseSource, load_tokenizer
from qadapter.modeling.fingerprints import tokenizer_fingerprint
from qadapter_vllm import FAMILIES, PREFIX
from qadapter_vllm.settings import Policy, read_policy

if TYPE_CHECKING:
    from vllm.config import VllmConfig

# Draft methods that read the target's tokens only; the others read its hidden states, which are a mix here.
DRAFT_METHODS = ("ngram", "ngram_gpu", "draft_model")


class StartupChecks(VerifyAndUpdateConfig):
    """vLLM calls this once its configuration is complete, before any weight is read."""

    @staticmethod
    def verify_and_update_config(vllm_config: "VllmConfig") -> None:
        """Refuse what cannot be served, and set what the streams need.

        Raises:
            ConfigError, AdapterFormatError: see the message.
        """
        model = vllm_config.model_config
        policy = read_policy(model.hf_config, model.model, model.revision)
        _refuse_unsupported(vllm_config)
        _check_architecture(model, policy)
        if not model.skip_tokenizer_init:
            _check_tokenizer(model, policy)
        # The compile cache's key covers the model's config, not the adapter's files.
        model.hf_config.qadapter_graph = json.dumps(policy.graph())
        # The fused all-reduce and norm expects one row a token, the streams have several.
        vllm_config.compilation_config.pass_config.fuse_allreduce_rms = False
        _guard_requests(vllm_config, policy)


def refuse_unread_entry(vllm_config: "VllmConfig") -> None:
    """Refuse a `qadapter` entry that nobody would read: the model would answer as the bare base.

    Raises:
        ConfigError: there is one.
    """
    model = vllm_config.model_config
    if getattr(model.hf_config, "qadapter", None) is None or model.architecture.startswith(PREFIX):
        return
    named = model.architectures[0]
    way_out = f"served are {', '.join(FAMILIES)}. Use `qadapter serve`."
    if named in FAMILIES:  # `model.architecture` may be the transformers backend's
        way_out = f'override "architectures" as well, with ["{PREFIX}{named}"], and leave --model-impl out.'
    raise ConfigError(f"the model's config has a `qadapter` entry, which a {model.architecture} ignores: {way_out}")


def _refuse_unsupported(vllm_config: "VllmConfig") -> None:
    parallel, speculative = vllm_config.parallel_config, vllm_config.speculative_config
    cache = vllm_config.cache_config
    rules: list[tuple[bool, str]] = [
        (parallel.pipeline_parallel_size == 1, "pipeline parallelism is not supported: use --tensor-parallel-size."),
        (
            vllm_config.lora_config is None,
            "--enable-lora is not supported: a plain LoRA on top would not be the policy. Compose adapters with "
            "qadapter.adapters.",
        ),
        (
            vllm_config.load_config.load_format != "dummy",
            "--load-format dummy has no base weights that could be checked.",
        ),
        (
            vllm_config.kv_transfer_config is None
            and (cache.kv_offloading_size is None or cache.kv_offloading_backend == "native"),
            "key-value caches outside the engine (--kv-transfer-config, --kv-offloading-backend) are not supported: "
            "they are told apart by the base's name, and policies over one base would read each other's.",
        ),
        (
            speculative is None or speculative.method in DRAFT_METHODS,
            f"drafts by {speculative and speculative.method!r} are not supported: they read the base's hidden states, "
            "or need the V1 runner. Use n-gram drafts or a draft model.",
        ),
        (
            speculative is None or vllm_config.use_v2_model_runner,
            "drafts need the V2 model runner (VLLM_USE_V2_MODEL_RUNNER=1): the V1 runner could not refuse requests "
            "whose strength it ignores.",
        ),
    ]
    for holds, message in rules:
        if not holds:
            raise ConfigError(message)


def _check_architecture(model: Any, policy: Policy) -> None:
    for entry in policy.stored.values():
        trained, served = entry.manifest.base["architecture"], model.architecture.removeprefix(PREFIX)
        if trained != served:
            raise AdapterFormatError(
                f"{entry.root}: the adapter was trained on {entry.manifest.base['name']!r}, a {trained}; this base is "
                f"a {served}. Serve the base that it was trained on."
            )
    if getattr(model.hf_config, "final_logit_softcapping", None):
        raise ConfigError(
            "the base caps its logits softly (final_logit_softcapping), so that streams cannot be mixed before the "
            "head. Serve it with `qadapter serve`."
        )


def _check_tokenizer(model: Any, policy: Policy) -> None:
    revision = None if os.path.isdir(model.tokenizer) else model.tokenizer_revision
    actual = tokenizer_fingerprint(load_tokenizer(BaseSource(model.tokenizer, model.tokenizer, revision)))
    for entry in policy.stored.values():
        for part, expected in (entry.manifest.tokenizer or {}).items():
            if actual[part] != expected:
                refuse(
                    f"{entry.root}: the {part.replace('_', ' ')} of {model.tokenizer!r} differs from the one the "
                    "adapter was trained with. Pass the original with --tokenizer (the adapter folder, if it has one).",
                    policy.settings.verify,
                )


def refuse(message: str, verify: bool) -> None:
    """Raise AdapterFormatError, or warn where the config says `"verify": false`."""
    if verify:
        raise AdapterFormatError(f'{message} ("verify": false in the qadapter entry serves it anyway.)')
    warnings.warn(message, stacklevel=2)


def _guard_requests(vllm_config: "VllmConfig", policy: Policy) -> None:
    guard = "V1Guard"
    if vllm_config.use_v2_model_runner:
        guard = "StrengthGuard" if policy.has_dial else "FixedGuard"
    model = vllm_config.model_config
    model.logits_processors = [*(model.logits_processors or ()), f"qadapter_vllm.admission:{guard}"]
