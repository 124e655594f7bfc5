"""Is it the base, and do base and adapter still compute what they did when the adapter was saved?"""

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from torch import Tensor

from qadapter.errors import AdapterFormatError
from qadapter.functional import mix_coefficients
from qadapter.modeling.fingerprints import WeightSample, combined_fingerprint, weight_sample
from qadapter.modeling.manifest import Manifest
from qadapter.modeling.probe import probe_tolerance
from qadapter.modeling.quantised import described
from qadapter_vllm.settings import Policy
from qadapter_vllm.startup import refuse

if TYPE_CHECKING:
    from qadapter_vllm.model import QAdapterModel


# Largest difference of a log-probability between the base trained on and its quantised copy. SmolLM2-135M rounded to
# int8 was off by 1.1 (base) and 2.2 (a random adapter on every layer); another model by 7 or more: its log-probability
# of a likely token is about that of any token, -11.
QUANTISED_TOLERANCE = 4.0


class FingerprintReader:
    """The base's fingerprint, taken while its weights are read."""

    def __init__(self, tied: bool) -> None:
        self.tied = tied
        self.samples: dict[str, WeightSample] = {}

    def read(self, weights: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
        """The weights as they are."""
        for name, weight in weights:
            # Files may hold what is no parameter of the model: a tied head, or rotary frequencies.
            if not (self.tied and name.startswith("lm_head.")) and not name.endswith(".inv_freq"):
                self.samples[name] = weight_sample(weight)
            yield name, weight

    def fingerprint(self) -> str:
        """The fingerprint of all weights read."""
        return combined_fingerprint(self.samples)


def check_fingerprint(fingerprint: str, policy: Policy, vllm_model: str, quantisation: str | None) -> None:
    """Refuse a base that an adapter was not trained on.

    A quantised copy has other weights: where the settings accept one, it is left to the probe.
    """
    if quantisation and policy.settings.quantised:
        return
    for entry in policy.stored.values():
        base = entry.manifest.base
        if fingerprint != base["fingerprint"]:
            way_out = "Serve the original."
            if base.get("quantization"):  # whose fingerprint is of other weights
                way_out = (
                    f"It was {described(base['quantization'])} then: `qadapter export --format vllm --unquantised` "
                    "writes a folder for the base as its files are."
                )
            elif quantisation:
                way_out = (
                    f"It is quantised ({quantisation}): if it is a copy of the base trained on, accept it with "
                    '"quantised": true in the qadapter entry; the stored probe is checked then.'
                )
            refuse(
                f"{entry.root}: the base model differs: trained on {base['name']!r} (revision "
                f"{base['revision'] or 'main'}), but {vllm_model!r} has other weights. {way_out}",
                policy.settings.verify,
            )


def check_probe(model: "QAdapterModel") -> None:
    """Refuse a model that does not give the log-probabilities stored with its adapters.

    With one stream, only what that stream computes can be checked; the base is known by its fingerprint.
    """
    policy = model.policy
    manifests: dict[Path, tuple[Manifest, dict[str, str]]] = {}
    for name, entry in policy.stored.items():
        manifests.setdefault(entry.root, (entry.manifest, {}))[1][entry.stored_name] = name
    for root, (manifest, names) in manifests.items():
        ids = manifest.probe["input_ids"]
        if max(ids) >= model.config.vocab_size:  # looking one up on a GPU ends the process
            raise AdapterFormatError(f"{root}: the probe names tokens that the base does not know.")
        for stored_name, expected in manifest.probe["logps"].items():
            coefficients = _coefficients(policy, names.get(stored_name), manifest, stored_name)
            if coefficients is None:
                continue
            logits = model.probe_logits(ids, coefficients)
            if logits is None:  # another rank has them
                continue
            actual = logits.log_softmax(-1)
            try:
                error = max(abs(actual[int(index)].item() - value) for index, value in expected.items())
            except IndexError:
                raise AdapterFormatError(f"{root}: the probe names tokens that the base does not know.") from None
            stored = manifest.probe["dtype"]
            allowed = QUANTISED_TOLERANCE if model.quantisation else probe_tolerance(stored, model.dtype)
            if not error <= allowed:
                part = f"adapter {stored_name!r}" if stored_name else "base model"
                refuse(
                    f"{root}: the {part} gives other log-probabilities than when it was saved (off by {error:.3g}, "
                    f"allowed {allowed:g}): a file, the quantisation or the software differs. Serve the original.",
                    policy.settings.verify,
                )


def _coefficients(policy: Policy, name: str | None, manifest: Manifest, stored_name: str) -> list[float] | None:
    """Weights of the running streams that give the trained policy of an adapter ("": the base), None if none do."""
    wanted: dict[str | None, float] = {None: 1.0}
    if stored_name:
        config = manifest.configs[stored_name]
        mix = mix_coefficients(config["parametrisation"], config["alpha_tilde"], config["alpha_0"])
        wanted = {stream: c for stream, c in ((name, mix.adapter), (None, mix.base)) if c}
    if (stored_name and name is None) or not set(wanted) <= set(policy.streams):
        return None
    return [wanted.get(stream, 0.0) for stream in policy.streams]
