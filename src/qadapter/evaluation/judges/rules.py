"""Exact rule judges: an answer that satisfies the rule beats one that does not. They need no model and no network."""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import regex

from qadapter.data.files import refuse_constant
from qadapter.errors import ConfigError, DataError
from qadapter.evaluation.house_style import follows_house_style, sentence_count
from qadapter.evaluation.judges.verdicts import Comparison, Verdict
from qadapter.evaluation.progress import Advance
from qadapter.generation import Answer

Rule = Callable[[Answer], bool]
LONGEST_PATTERN = 500
LONGEST_SEARCHED = 100_000
# Patterns may be exponential. The module `regex` (of transformers' requirements) can stop, where `re` cannot.
SEARCH_SECONDS = 1.0


class Undecided(Exception):
    """A rule that cannot be applied to an answer; the message is the verdict's reason."""


@dataclass(frozen=True)
class RuleJudge:
    """A rule as a judge. Each answer is looked at by itself, so that no order can matter."""

    name: str
    satisfied: Rule

    def judge(self, comparisons: Sequence[Comparison], progress: Advance) -> list[Verdict]:
        """As of `Judge`."""
        verdicts = []
        for _, a, b in comparisons:
            verdicts.append(self._verdict(a, b))
            progress(1)
        return verdicts

    def _verdict(self, a: Answer, b: Answer) -> Verdict:
        try:
            satisfied_a, satisfied_b = self.satisfied(a), self.satisfied(b)
        except Undecided as error:
            return Verdict(None, f"{self.name}: {error}")
        if satisfied_a == satisfied_b:
            return Verdict("tie", f"{'both' if satisfied_a else 'neither'} satisfy {self.name}")
        return Verdict("a" if satisfied_a else "b", f"it alone satisfies {self.name}")


def make_rule_judge(rule: str) -> RuleJudge:
    """The judge of a rule such as "max-words=40". An empty answer satisfies no rule but a regex.

    Raises:
        ConfigError: an unknown rule, or an argument that is missing, superfluous or wrong.
    """
    name, given, argument = rule.partition("=")
    if name not in RULES:
        raise ConfigError(f"rule {name!r} is unknown; the rules are {', '.join(RULES)}.")
    make, takes_argument = RULES[name]
    if takes_argument and not argument:
        raise ConfigError(f"rule {name!r} needs an argument: rule:{name}=...")
    if given and not takes_argument:
        raise ConfigError(f"rule {name!r} takes no argument; {argument!r} was given.")
    return RuleJudge(rule, make(argument))


def _not_empty(satisfied: Callable[[str], bool]) -> Rule:
    return lambda answer: bool(answer.text.strip()) and satisfied(answer.text)


def _whole(satisfied: Callable[[str], bool]) -> Rule:
    """Of answers that the model ended itself: one that was cut off has not kept a limit of length."""
    kept = _not_empty(satisfied)
    return lambda answer: answer.finished and kept(answer)


def _house_style(argument: str) -> Rule:
    return lambda answer: follows_house_style(answer.text, answer.finished)


def _json(argument: str) -> Rule:
    return _not_empty(_is_json)


def _is_json(text: str) -> bool:
    try:
        json.loads(text, parse_constant=refuse_constant)
    except (DataError, ValueError, RecursionError):
        return False
    return True


def _max_sentences(argument: str) -> Rule:
    limit = _positive("max-sentences", argument)
    return _whole(lambda text: sentence_count(text) <= limit)


def _max_words(argument: str) -> Rule:
    limit = _positive("max-words", argument)
    return _whole(lambda text: len(text.split()) <= limit)


def _positive(name: str, argument: str) -> int:
    if not (argument.isascii() and argument.isdigit() and int(argument[:9]) > 0):
        raise ConfigError(f"rule {name}={argument}: must be a whole number of at least 1.")
    return int(argument[:9])


def _banned(argument: str) -> Rule:
    words = [word.strip() for word in argument.split(",")]
    if not all(words):
        raise ConfigError(f"rule banned={argument}: give words separated by commas, none of them empty.")
    pattern = regex.compile("|".join(rf"(?<!\w){regex.escape(word)}(?!\w)" for word in words), regex.IGNORECASE)
    return _not_empty(lambda text: pattern.search(text) is None)


def _regex(argument: str) -> Rule:
    if len(argument) > LONGEST_PATTERN:
        raise ConfigError(
            f"rule regex: a pattern of {len(argument)} characters; at most {LONGEST_PATTERN} are allowed."
        )
    try:
        pattern = regex.compile(argument)
    except regex.error as error:
        raise ConfigError(f"rule regex={argument}: not a regular expression: {error}.") from error

    def found(answer: Answer) -> bool:
        if len(answer.text) > LONGEST_SEARCHED:
            raise Undecided(f"the answer has {len(answer.text)} characters; at most {LONGEST_SEARCHED} are searched")
        try:
            return pattern.search(answer.text, timeout=SEARCH_SECONDS) is not None
        except TimeoutError:
            raise Undecided(f"the search took more than {SEARCH_SECONDS:g} s") from None

    return found


# By name: how to make the rule from its argument, and whether it takes one.
RULES: dict[str, tuple[Callable[[str], Rule], bool]] = {
    "house-style": (_house_style, False),
    "json": (_json, False),
    "max-sentences": (_max_sentences, True),
    "max-words": (_max_words, True),
    "regex": (_regex, True),
    "banned": (_banned, True),
}
