"""What the tests of the trainer share: settings, the names of its metrics, and pairs of text."""

from qadapter import QAdapterConfig

METRICS = {
    "rewards/chosen",
    "rewards/rejected",
    "rewards/accuracies",
    "rewards/margins",
    "logps/chosen",
    "logps/rejected",
    "entropy",
    "qadapter/kl",
    "qadapter/value",
    "qadapter/penalty",
}
CONFIG = QAdapterConfig(alpha_tilde=0.5, alpha_0=0.2, gamma=0.9, beta=0.7)
TEXT_PAIRS = [
    {"prompt": "What is the capital of France?", "chosen": "Paris.", "rejected": "I do not know."},
    {"prompt": "How do I cook rice?", "chosen": "Rinse it, then boil it.", "rejected": "Go away!"},
    {"prompt": "One and one?", "chosen": "Two.", "rejected": "Three, I think."},
]
