"""The ablations: which variants of a method are compared with each other."""

from typing import Any

DEFAULT: dict[str, Any] = {"beta": 10.0, "gamma": 0.95, "discount_floor": 0.25}  # the package's own settings
KL_PENALTY: dict[str, Any] = {"penalty": "kl", "alpha": 3.0, "length_normalised": True}  # the preset "kl"
# Ablations: name -> the variants that are compared, as options of the method that stands before the colon.
ABLATIONS: dict[str, list[tuple[str, dict[str, Any]]]] = {
    "alpha": [("qadapter", {"alpha": alpha}) for alpha in (0.03, 0.1, 0.3, 1.0)],
    "alpha-ratio": [("qadapter", {"alpha_tilde": 0.1, "alpha_0": 0.1 * ratio}) for ratio in (0.5, 0.8, 1.0, 1.25, 2.0)],
    "gamma": [("qadapter", {"gamma": gamma}) for gamma in (1.0, 0.99, 0.95, 0.9)],
    "floor": [("qadapter", {"gamma": 0.95, "discount_floor": floor}) for floor in (0.0, 0.1, 0.25, 0.5)],
    "default": [
        ("qadapter", {"gamma": 0.95, "discount_floor": 0.25} | changed)
        for changed in ({}, {"beta": 1.0}, {"beta": 3.0}, {"beta": 30.0}, {"alpha": 0.03}, {"alpha": 0.3})
    ],
    "value": [
        ("qadapter", options | {"value_at": place})
        for options in ({}, {"gamma": 0.95})
        for place in ("next", "current")
    ],
    "parametrisation": [
        ("qadapter", {}),
        ("qadapter-logits", {"preset": "authors"}),
        ("qadapter-logits", {"preset": "authors", "value_at": "current"}),
        ("authors", {}),
    ],
    "penalty": [
        ("qadapter", {"penalty": kind, "beta": beta})
        for kind in ("reward", "residual", "advantage")
        for beta in (3.0, 10.0, 30.0)
    ],
    "kl": [
        ("qadapter", {**KL_PENALTY, "alpha": alpha, "length_normalised": normalised, "beta": beta})
        for alpha, normalised in ((0.1, False), (1.0, True), (3.0, True))
        for beta in (0.3, 1.0, 3.0)
    ],
    "length": [
        ("qadapter", {"length_normalised": normalised, "beta": beta})
        for normalised, betas in ((False, (3.0, 10.0)), (True, (0.03, 0.3)))
        for beta in betas
    ],
    "lora": [
        ("qadapter", {"training.lora_r": rank, "training.lora_layers": layers})
        for rank, layers in ((2, "all"), (8, "all"), (32, "all"), (8, "upper"), (32, "upper"))
    ],
    "layers": [("qadapter", {"training.lora_layers": layers}) for layers in ("1/4", "upper", "3/4", "all")],
    "noise": [
        (method, options | {"training.label_noise": noise, "label_smoothing": smoothing})
        for method, options in (("qadapter", {}), ("dpo", {"beta": 0.1}))
        for noise in (0.0, 0.1, 0.2, 0.4)
        for smoothing in ((0.0, noise) if 0 < noise < 0.5 else (0.0,))
    ],
}
