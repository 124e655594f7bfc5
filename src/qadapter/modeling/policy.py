"""The customised policy as a transformers causal language model: a frozen base, LoRA adapters, and a dial.

A call of `forward`, with the module that each step is in:

    settings of the call, else the model's own       strength, weights, cap, threshold      policy_part, mixing
      → which streams run, and their coefficients    {"concise": 0.8, None: 0.2}            stacked
      → one pass of the decoder, a copy a stream     {stream: hidden states (B, T, H)}      stacked, streams, trunk
      → one product with the head                    z = Σ_k c_k z_k, (B, T, V)             heads
      → threshold and cap on the way from z_b to z   z_b + s (z − z_b)                      mixing

Training asks for the statistics of the loss instead (`passes`), generation calls `forward` for each token (`decoding`).
"""

import logging
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from os import PathLike
from typing import Any, NoReturn, Self

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor
from transformers import PreTrainedModel
from transformers.loss.loss_utils import ForCausalLMLoss
from transformers.modeling_outputs import CausalLMOutputWithPast

from qadapter.config import QAdapterConfig
from qadapter.errors import ConfigError
from qadapter.fused import TokenStatistics
from qadapter.modeling.adapter_settings import (
    check_adapter_names,
    default_peft_config,
    warn_of_missing_targets,
    with_named_targets,
)
from qadapter.modeling.bases import load_base, resolve_base, source_of
from qadapter.modeling.cache_name import CACHE, given_cache
from qadapter.modeling.decoding import PolicyGenerationMixin
from qadapter.modeling.fingerprints import tokenizer_fingerprint
from qadapter.modeling.heads import Head
from qadapter.modeling.merging import folded
from qadapter.modeling.mixing import (
    AdapterWeights,
    Strength,
    kept_columns,
    last_strength,
)
from qadapter.modeling.passes import TrainingPasses
from qadapter.modeling.quantised import check_trainable_files, keep_layout
from qadapter.modeling.stacked import refuse_images, shape_of
from qadapter.modeling.streams import (
    StreamPlan,
    adapter_parameters,
    disable_dropout,
    follow_plan,
    keep_base_in_eval,
    with_stream_layers,
)
from qadapter.modeling.trunk import can_fork, share_trunk, with_first_layer

DEFAULT_ADAPTER = "default"
logger = logging.getLogger(__name__)


class QAdapterForCausalLM(PreTrainedModel, TrainingPasses, PolicyGenerationMixin):
    """A causal language model whose logits are those of the customised policy (arXiv 2407.03856).

    Wraps, and never changes, a base model: its weights stay bit-identical, `strength=0` is exactly the base.
    Use `from_base` to start training and `from_pretrained` to load an adapter folder; then `generate`, `forward`,
    `score` (how good an adapter finds given answers) and `merged` (strength 1 without the LoRA's products).

    The attributes `strength`, `adapter_weights`, `max_kl`, `min_kl`, `decay` and `interpolation` are the dial of calls
    that set none, and `with policy.dial(strength=0.5): ...` sets them for a while.

    Raises:
        ConfigError: `base` is no plain causal language model, carries an adapter, or cannot be adapted as asked.
    """

    base_model_prefix = "base"
    main_input_name = "input_ids"
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True

    def __init__(
        self,
        base: PreTrainedModel,
        configs: Mapping[str, QAdapterConfig],
        peft_configs: Mapping[str, LoraConfig],
    ) -> None:
        if not isinstance(base, PreTrainedModel) or isinstance(base, QAdapterForCausalLM):
            raise ConfigError(f"base is a {type(base).__name__}: give the plain causal language model.")
        if base.config.is_encoder_decoder:
            raise ConfigError(
                f"base, a {type(base).__name__}, has an encoder: give a decoder-only causal language model."
            )
        if any(isinstance(module, BaseTunerLayer) for module in base.modules()):
            raise ConfigError(f"base, a {type(base).__name__}, carries an adapter already: load it afresh.")
        check_adapter_names(list(peft_configs))
        super().__init__(base.config)
        base.requires_grad_(False)
        disable_dropout(base)
        keep_layout(base)
        self.head = Head.of(base)
        self.head.check(base)
        self.configs = dict(configs)
        self.generation_config = base.generation_config
        self._no_split_modules = base._no_split_modules
        self._is_stateful = base._is_stateful  # such a cache cannot go back: assisted decoding is refused
        names = list(peft_configs)
        self.plan = StreamPlan(names[0])
        # In a tuple: as a submodule, PEFT's wrapper would register every parameter of the base a second time.
        self._peft = (self._inject(base, peft_configs),)
        self.base = self.peft_model.get_base_model()
        self.head = Head.of(self.base)
        # Decoder layers below the first adapted one, which all streams share; 0 switches the sharing off.
        self.shared_layers = share_trunk(self.base, self.plan)
        self.rows_can_fork = can_fork(self.base, self.plan, self.shared_layers)
        if not self.rows_can_fork:
            logger.info("%s repeats its rows before the first layer: passes share no trunk.", type(base).__name__)
        keep_base_in_eval(self.base)
        # The settings of calls that give none.
        self.strength: Any = 1.0
        self.max_kl: Any = None
        self.min_kl: Any = None
        self.decay: float = 1.0  # of `generate` alone: forward does not know where an answer begins
        self.interpolation = "logits"
        self.adapter_weights: dict[str, float] = dict.fromkeys(names, 1.0)
        # Provenance, filled in by whoever knows it and written into the adapter folder.
        self.base_source = source_of(base)
        self.tokenizer_fingerprint: dict[str, str] | None = None

    def train(self, mode: bool = True) -> Self:
        """As any module's, but for the base's own modules, which stay in eval mode: the streams differ by adapters."""
        super().train(mode)
        keep_base_in_eval(self.base)
        return self

    def _inject(self, base: PreTrainedModel, peft_configs: Mapping[str, LoraConfig]) -> PeftModel:
        (first, first_config), *others = (
            (name, with_stream_layers(peft_config)) for name, peft_config in peft_configs.items()
        )
        try:
            with warnings.catch_warnings():  # PEFT asks by a name that transformers gives up
                warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
                peft_model = get_peft_model(base, first_config, adapter_name=first)
                for name, peft_config in others:
                    peft_model.add_adapter(name, peft_config)
        except ValueError as error:  # PEFT's type for targets that are not there or cannot be adapted
            raise ConfigError(f"the adapter does not fit {type(base).__name__}: {error}") from error
        follow_plan(peft_model, self.plan)
        return peft_model

    @classmethod
    def from_base(
        cls,
        base: str | PathLike[str] | PreTrainedModel,
        config: QAdapterConfig | None = None,
        peft_config: LoraConfig | None = None,
        first_adapted_layer: int = 0,
        **model_kwargs: Any,
    ) -> "QAdapterForCausalLM":
        """A policy with a new adapter on `base`, ready to train; equal to the base before training (residual form).

        Args:
            base: model id, folder, or a loaded causal LM.
            config: the method's settings, `QAdapterConfig()` by default.
            peft_config: the adapter; LoRA of rank 8 on "all-linear" by default: the decoder's linear layers, not the
                head, routers, experts, Mamba's own weights or what reads images.
            first_adapted_layer: adapt this decoder layer and those above it only; both streams share the layers below.
            model_kwargs: passed to AutoModelForCausalLM.from_pretrained (dtype, revision, device_map, ...).

        Raises:
            ConfigError: the base cannot be loaded, carries an adapter, or is quantised and cannot be trained on.
        """
        peft_config = peft_config or default_peft_config()
        source = None
        if isinstance(base, str | PathLike):
            source = resolve_base(base, model_kwargs.pop("revision", None))
            check_trainable_files(source, model_kwargs.get("quantization_config"), model_kwargs.get("token"))
            base = load_base(source, **model_kwargs)
        elif model_kwargs:
            raise ConfigError(f"{sorted(model_kwargs)} apply to a model that is loaded by id, not to a given one.")
        warn_of_missing_targets(peft_config, base)
        if first_adapted_layer:
            peft_config = with_first_layer(peft_config, base, first_adapted_layer)
        peft_config = with_named_targets(peft_config, base)
        model = cls(base, {DEFAULT_ADAPTER: config or QAdapterConfig()}, {DEFAULT_ADAPTER: peft_config})
        model.base_source = source or model.base_source
        return model

    # -- the policy --------------------------------------------------------------------------------------------

    @contextmanager
    def merged(self) -> Iterator["QAdapterForCausalLM"]:
        """Within the context, the trained policy runs without the LoRA's own products, folded into the weights.

        Only strength 1 of the only adapter can run then; the base's very weights are back afterwards. Memory grows by
        the adapted weights meanwhile. `qadapter export --format merged` writes a checkpoint of it.

        Raises:
            ConfigError: several adapters, settings that need the base's stream at strength 1, or a quantised base.
        """
        name, *others = self.adapters
        if others or not self.configs[name].single_stream:
            raise ConfigError(
                "only one adapter of the residual form with alpha_0 = alpha_tilde can be folded into the base: "
                f"this policy has {self.configs}."
            )
        with folded(self.base, name):
            yield self

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | dict | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        strength: Strength | None = None,
        adapter_weights: AdapterWeights | None = None,
        max_kl: float | Tensor | None = None,
        min_kl: float | Tensor | None = None,
        interpolation: str | None = None,
        strength_record: list[Tensor] | None = None,
        completion_mask: Tensor | None = None,
        gather_indices: Tensor | None = None,
        cache: Any = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast | TokenStatistics:
        """The policy's logits (B, T, V), like any causal LM's; or, given `completion_mask`, training statistics.

        Args:
            strength: the dial λ: a float, a tensor (B,) or (B, T), or a callable of the `StepState`. 0 is exactly the
                base, 1 the trained policy; None takes the model's own `strength`. Neither stream's cache depends on
                it, but the *set* of streams does (the floats 0, and for some settings 1, need one stream only): keep
                it fixed while a cache is in use, or give tensors.
            adapter_weights: the weight of each adapter in z_b + λ Σ_k w_k (z̃_k − z_b), floats or tensors (B,) by
                name (those not named get 0), or one tensor (B, K); None takes the model's own `adapter_weights`.
            max_kl: cap on KL(policy ‖ base) at each token, in nats, a float or a tensor (B,): the strength is lowered
                where it would be exceeded.
            min_kl: threshold κ in nats, a float or a tensor (B,): the strength at each token is multiplied by
                max(0, 1 − κ / KL), where KL is that of the policy at strength 1 from the base. So tokens of which the
                adapters have little to say stay the base's own (docs/dial.md). None takes the model's own, 0 is none.
            interpolation: what strength and weights are of: "logits", as above, or "weights", W + λ Σ_k w_k B_k A_k,
                the LoRAs scaled and added up: one stream for any strengths a row, whose cache does depend on them
                (docs/dial.md). None takes the model's own `interpolation`.
            strength_record: a list to which the strength used at the last position (B,) is appended.
            completion_mask: (B, T), True on response tokens. With it the result is `token_statistics` (the trainer
                goes through the module's forward so that distributed wrappers see one call a step).
            gather_indices: with it, and what else `PackedCollator` makes, the result is `packed_statistics`.
            cache: another name of `past_key_values`, that of transformers from 5.24 on.
            kwargs: of the decoder; `num_items_in_batch`, by which the loss of all `labels` is divided instead of by
                their number; for training statistics `base_states` and `trunk_states` (`qadapter.base_states`).

        Raises:
            ConfigError: a setting of the dial that is not finite (strengths and weights in tensors are not read, which
                would hold up every token) or has another number of rows; a cache that holds other streams; `decay`,
                which is `generate`'s; `output_hidden_states` or `output_attentions`; with `interpolation="weights"` a
                strength that changes along the text, DoRA, or another form than the residual with α₀ = α̃.
        """
        refuse_images(kwargs)
        if gather_indices is not None:
            packed: dict[str, Any] = {"position_ids": position_ids, "gather_indices": gather_indices, **kwargs}
            return self.packed_statistics(input_ids, completion_mask=completion_mask, **packed)  # type: ignore[arg-type]
        if completion_mask is not None:
            return self.token_statistics(input_ids, attention_mask, completion_mask, **kwargs)  # type: ignore[arg-type]
        for option in ("output_hidden_states", "output_attentions"):
            if kwargs.pop(option, None):
                raise ConfigError(
                    f"{option}: the policy has no states of its own, but those of several streams. Ask model.base, "
                    "within `model.plan.running(None)` for the base's, or with an adapter's name for that adapter's."
                )
        if kwargs.pop("decay", None) is not None:
            raise ConfigError(
                "decay is of generate: forward does not know where an answer begins. Give strength (B, T)."
            )
        return_dict, items = kwargs.pop("return_dict", None), kwargs.pop("num_items_in_batch", None)
        batch = dict(input_ids=input_ids, inputs_embeds=inputs_embeds, attention_mask=attention_mask,
                     position_ids=position_ids, **kwargs)  # fmt: skip
        cache = given_cache(cache, past_key_values)
        used, cap, threshold = self._dial_of_pass(
            strength, adapter_weights, max_kl, min_kl, interpolation, input_ids, cache, *shape_of(batch)
        )
        # With a threshold the dial is turned after the heads, on the way to the policy at strength 1.
        coefficients = self.stream_coefficients(used if threshold is None else 1.0, adapter_weights, interpolation)
        plain = cap is None and threshold is None
        streams = list(coefficients) if plain else list(dict.fromkeys([*coefficients, None]))
        hidden, cache = self.stacked_pass(streams, batch, cache, use_cache)
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        hidden = {stream: states[:, kept] for stream, states in hidden.items()}
        coefficients = {stream: kept_columns(c, kept) for stream, c in coefficients.items()}
        used = kept_columns(used, kept)
        logits, share = self.dialled_logits(hidden, coefficients, used, cap, threshold)
        if strength_record is not None:
            strength_record.append(last_strength(used, share, logits))
        loss = None
        if labels is not None:
            loss = ForCausalLMLoss(logits, labels, logits.shape[-1], num_items_in_batch=items)
        output = CausalLMOutputWithPast(loss=loss, logits=logits, **{CACHE: cache})
        return output.to_tuple() if return_dict is False else output  # type: ignore[return-value]

    def remember_tokenizer(self, tokenizer: Any) -> None:
        """Record the fingerprint of the tokenizer and chat template that the adapter is trained with."""
        self.tokenizer_fingerprint = tokenizer_fingerprint(tokenizer)

    # -- what transformers asks a model for --------------------------------------------------------------------

    @classmethod
    def _can_set_experts_implementation(cls) -> bool:
        """Yes: a mixture-of-experts base, whose config is ours, has chosen how its experts run."""
        return True

    def load_adapter(self, *_: Any, **__: Any) -> NoReturn:
        """Refused: transformers' own puts a LoRA's weights over those of an adapter, or beside the streams."""
        raise ConfigError(
            "load_adapter and add_adapter: a policy's adapters come with it. Compose folders with from_pretrained("
            "base, adapters={name: folder, ...}), a plain LoRA after `qadapter wrap`; from_base makes a new one."
        )

    add_adapter = load_adapter

    def disable_adapters(self, *_: Any, **__: Any) -> NoReturn:
        """Refused: transformers' own know of no streams, and would find no adapter."""
        raise ConfigError(
            "adapters are chosen by the dial: strength=0.0 is the base alone, adapter_weights={name: weight} says how "
            "much each counts (0 leaves it out), model.adapters has their names."
        )

    enable_adapters = set_adapter = delete_adapter = active_adapters = disable_adapters

    def resize_token_embeddings(self, *_: Any, **__: Any) -> NoReturn:
        """Refused: the base is frozen, and the adapters are checked against it."""
        raise ConfigError("resize_token_embeddings: the base stays as it is. Resize and save it before from_base.")

    def get_input_embeddings(self) -> torch.nn.Module:
        """The base's token embeddings."""
        return self.base.get_input_embeddings()

    def get_output_embeddings(self) -> torch.nn.Module:
        """The base's language-model head."""
        return self.base.get_output_embeddings()

    def get_decoder(self) -> torch.nn.Module:
        """The base's decoder stack."""
        return self.base.get_decoder()

    def adapter_parameters(self, adapter: str = DEFAULT_ADAPTER) -> dict[str, torch.nn.Parameter]:
        """The parameters of one adapter by name: all that training changes."""
        return adapter_parameters(self.base, adapter)

    def print_trainable_parameters(self) -> None:
        """Print how many weights training changes, of how many, as PEFT's models do."""
        self.peft_model.print_trainable_parameters()

    # -- on disk -----------------------------------------------------------------------------------------------

    def save_pretrained(self, save_directory: str | PathLike[str], **kwargs: Any) -> None:  # type: ignore[override]
        """Write the adapter folder (never the base), as docs/adapter-format.md describes it.

        Args:
            save_directory: made where it is missing; an adapter in it is replaced, other files stay.
            kwargs: `tokenizer`, to write it too and record its fingerprint; `state_dict`, the adapter's weights instead
                of the model's own; `is_main_process`, False to write nothing; `push_to_hub` and `repo_id`, to upload
                the folder as well, with what `push_to_hub` takes. Others, which transformers passes on, are ignored.

        Raises:
            ConfigError: the folder is a file, or the adapter is folded into the base (`merged`).
            TrainingError: log-probabilities of the policy that are not finite.
        """
        from qadapter.modeling.checkpoint import UPLOAD_OPTIONS, save

        if kwargs.get("is_main_process") is False:  # of several processes that all call this
            return
        save(self, save_directory, **{name: kwargs.get(name) for name in ("state_dict", "tokenizer", "probe")})
        if kwargs.get("push_to_hub"):
            options = {name: kwargs[name] for name in UPLOAD_OPTIONS if name in kwargs}
            self.push_to_hub(kwargs.get("repo_id") or str(save_directory), **options)

    @classmethod
    def from_pretrained(cls, folder: Any, **kwargs: Any) -> "QAdapterForCausalLM":  # type: ignore[override]
        """The policy in an adapter folder, or composed of several, in eval mode.

        Args:
            folder: adapter folder or hub id; with `adapters`, the base model: id, folder or loaded model.
            kwargs: `adapters` ({name: folder or hub id}) and `adapter_weights` ({name: weight}), for a composition;
                `base_model`, `tokenizer`, `verify`, `revision` and `token`, as of `qadapter.modeling.loading.load`;
                others go to AutoModelForCausalLM.from_pretrained for the base (dtype, device_map, ...).

        Raises:
            AdapterFormatError: a folder is no adapter, is damaged, or belongs to another base or chat template.
            ConfigError: settings that exclude each other, or wrong weights.
        """
        from qadapter.modeling.loading import load

        return load(folder, **kwargs)

    def push_to_hub(self, repo_id: str, **kwargs: Any) -> Any:  # type: ignore[override]
        """Upload the adapter folder to a hub repository, made where it is missing; the commit's information.

        Args:
            kwargs: `tokenizer`, needed where the adapter was trained with another chat template than the base's own;
                `private`, `token`, `commit_message`, `commit_description`, `revision` (a branch, made where it is
                missing) and `create_pr`, as of transformers.
        """
        from qadapter.modeling.checkpoint import push

        return push(self, repo_id, **kwargs)
