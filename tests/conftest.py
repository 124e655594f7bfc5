import sys
from pathlib import Path

from hypothesis import HealthCheck, settings

# The oracles are plain modules beside the tests; the experiments are run from the repository's root.
sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1])]

# The same commit draws the same examples, however slow the machine; `--hypothesis-profile=explore` draws new ones.
settings.register_profile("explore", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.register_profile("reproducible", settings.get_profile("explore"), derandomize=True)
settings.load_profile("reproducible")

# What other libraries warn about whatever we do; each names the line that warns.
FOREIGN_WARNINGS = (
    # peft.PeftModel.__init__ asks transformers for a property that was renamed.
    "ignore:`is_gradient_checkpointing` is deprecated:FutureWarning",
)


def pytest_collection_modifyitems(items):
    """Files with slow tests come first, so that no process is left alone with one at the end."""
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)


def pytest_configure(config):
    for line in FOREIGN_WARNINGS:
        config.addinivalue_line("filterwarnings", line)
