"""The house style of the quickstart: what it means, as functions of the answer's text."""

import re

# A sentence ends at ., ! or ? followed by white space or the end; closing quotes and brackets belong to it.
SENTENCE_END = re.compile(r"[.!?]+[\"'”’)\]]*(?=\s|$)")
MARKUP = re.compile(r"^\s*([-*•#>]|\d+[.)])\s|\*\*|```|\n", re.MULTILINE)
HOUSE_STYLE_SENTENCES = 2


def sentence_count(text: str) -> int:
    """The number of sentences, an unfinished last one included."""
    text = text.strip()
    finished = SENTENCE_END.findall(text)
    rest = SENTENCE_END.split(text)[-1].strip() if text else ""
    return len(finished) + bool(rest)


def follows_house_style(answer: str, finished: bool) -> bool:
    """Whether an answer is one or two plain sentences, on one line, without list or markup, that end by themselves.

    Args:
        answer: the text without special tokens.
        finished: whether the model ended the answer itself, rather than being cut off.
    """
    answer = answer.strip()
    plain = bool(answer) and not MARKUP.search(answer)
    return finished and plain and sentence_count(answer) <= HOUSE_STYLE_SENTENCES
