"""The package's own texts, CC0: preference pairs in a house style, neutral prose and general prompts."""

import json
from importlib.resources import files

# Optimiser steps of the quickstart on the pairs.
QUICKSTART_STEPS = 60


def neutral_paragraphs() -> list[str]:
    """Plain prose that has nothing to do with the preference: what the policy should still model as the base does."""
    text = files("qadapter.builtin").joinpath("neutral.txt").read_text(encoding="utf-8")
    return [paragraph.strip() for paragraph in text.split("\n\n") if paragraph.strip()]


def neutral_prompts() -> list[str]:
    """General instructions, unlike the short questions of the pairs."""
    text = files("qadapter.builtin").joinpath("neutral_prompts.jsonl").read_text(encoding="utf-8")
    return [json.loads(line)["prompt"] for line in text.splitlines()]
