"""The package's own texts, CC0: preference pairs in a house style, neutral prose and general prompts."""

from importlib.resources import files

# Optimiser steps of the quickstart on the pairs.
QUICKSTART_STEPS = 60


def neutral_paragraphs() -> list[str]:
    """Plain prose that has nothing to do with the preference: what the policy should still model as the base does."""
    text = files("qadapter.builtin").joinpath("neutral.txt").read_text(encoding="utf-8")
    return [paragraph.strip() for paragraph in text.split("\n\n") if paragraph.strip()]
