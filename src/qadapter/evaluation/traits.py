"""What kind of text answers are, by exact rules: language, script, repetition, emptiness, whether they were cut off.

Damage that changes how a model answers, rather than what it knows, has a name here: an adapter that makes it answer
in another language, or repeat itself, moves one of these shares.
"""

import re
import unicodedata
from collections import Counter
from collections.abc import Sequence

from qadapter.evaluation.intervals import Interval
from qadapter.evaluation.resampling import paired_difference, rate_interval
from qadapter.generation import Answer

# Frequent function words that no other language of the list has among its own.
FUNCTION_WORDS = {
    "English": "the of and to that with for this are from you it be can",
    "German": "der die das und ist nicht ein eine mit für auf den zu sich",
    "French": "le les des est une dans pour pas sur avec vous nous du et",
    "Spanish": "el los las una es por con para del como más pero y su",
    "Italian": "il di che è per non gli una della sono nel con più anche",
    "Portuguese": "o os uma não com para do da em mais são você pelo ao",
    "Dutch": "de het een van niet voor met zijn op dat aan ook maar te",
    # Of these only words that texts in the languages above do not have: they are here to be told from them.
    "Polish": "się jest że przez oraz tylko który jednak można",
    "Czech": "není jsou jsem také nebo který když jeho může však",
    "Romanian": "și pentru că sunt într această fără către după",
    "Hungarian": "és hogy nem egy ez vagy lehet csak már után",
    "Swedish": "att är inte också jag från där eller",
    "Danish or Norwegian": "og ikke jeg være også hvad efter etter eller",
    "Finnish": "että mutta myös ovat hän kuin siinä koska",
    "Turkish": "bir için değil çok daha olarak gibi olan",
    "Vietnamese": "và của không có được cho trong những này",
    "Indonesian": "yang ini dengan untuk tidak dari adalah pada juga akan",
}
LANGUAGE_OF_WORD = {
    word: language
    for language, words in FUNCTION_WORDS.items()
    for word in words.split()
    if sum(word in other.split() for other in FUNCTION_WORDS.values()) == 1
}
KANA = ("Hiragana", "Katakana", "Katakana-hiragana")
KANA_SHARE = 0.05  # of a text's letters; Chinese texts have a stray one in a name
WORD = re.compile(r"[^\W\d_]+")
REPEATED_WORDS = 4
# Scripts that put no blanks between words: runs there are of characters.
UNSPACED = (*KANA, "CJK", "Thai", "Lao", "Khmer", "Myanmar")
REPEATED_CHARACTERS = 8
CLEAR_WORDS = 8  # so many of them tell the language of nearly every text
REPETITION_SHARE = 0.3


def language(text: str) -> str | None:
    """The language (for Latin letters, of those in `FUNCTION_WORDS`) or script of a text; None if it cannot be told."""
    scripts = Counter(_script(character) for character in text if character.isalpha())
    if not scripts:
        return None
    kana = sum(scripts[name] for name in KANA)
    if kana > KANA_SHARE * (kana + scripts["CJK"]):  # Japanese, whichever of its scripts a text has most of
        scripts["Japanese"] = sum(scripts.pop(name, 0) for name in (*KANA, "CJK"))
    script, _ = scripts.most_common(1)[0]
    if script != "Latin":
        return f"{script} script"
    words = Counter(LANGUAGE_OF_WORD[word] for word in map(str.lower, WORD.findall(text)) if word in LANGUAGE_OF_WORD)
    ranked = words.most_common(2)
    if not ranked or (len(ranked) > 1 and ranked[0][1] == ranked[1][1]):
        return None
    return ranked[0][0]


def _script(letter: str) -> str:
    """The script as the letter's Unicode name starts: Latin, Cyrillic, Greek, CJK, ..."""
    return unicodedata.name(letter, "unknown").split()[0].capitalize().replace("Cjk", "CJK")


def repeats_itself(text: str) -> bool:
    """Whether at least 30% of the runs of four words occurred before; of eight characters in scripts without blanks."""
    units: Sequence[str] = text.lower().split()
    length = REPEATED_WORDS
    letters = [character for character in text if character.isalpha()]
    if 2 * sum(_script(letter) in UNSPACED for letter in letters) > len(letters):
        units, length = "".join(units), REPEATED_CHARACTERS
    runs = [tuple(units[index : index + length]) for index in range(len(units) - length + 1)]
    return len(runs) > length and 1 - len(set(runs)) / len(runs) >= REPETITION_SHARE


def answer_traits(answers: Sequence[Answer], base: Sequence[Answer]) -> dict[str, Interval]:
    """{trait: share of the answers that have it}.

    "in another language" is in comparison with the base's answer to the same prompt, where both can be told; "in no
    language that is known" has answers long enough to be told.
    """
    return {name: rate_interval(values) for name, values in _traits(answers, base).items()}


def trait_changes(answers: Sequence[Answer], base: Sequence[Answer]) -> dict[str, Interval]:
    """{trait: by how much its share is larger than among the base's answers to the same prompts}."""
    own, before = _traits(answers, base), _traits(base, base)
    before["in another language"] = [0.0] * len(own["in another language"])
    return {name: paired_difference(values, before[name]) for name, values in own.items()}


def _traits(answers: Sequence[Answer], base: Sequence[Answer]) -> dict[str, list[float]]:
    """{trait: 1 or 0 of each answer}."""
    languages = [(language(answer.text), language(other.text)) for answer, other in zip(answers, base, strict=True)]
    known = [(own, other) for own, other in languages if own is not None and other is not None]
    traits = {
        "empty": [not answer.text.strip() for answer in answers],
        "cut off": [not answer.finished for answer in answers],
        "repeats itself": [repeats_itself(answer.text) for answer in answers],
        "in another language": [own != other for own, other in known],
        "in no language that is known": [
            own is None and len(WORD.findall(answer.text)) >= CLEAR_WORDS
            for answer, (own, _) in zip(answers, languages, strict=True)
        ],
    }
    return {name: [float(has) for has in values] for name, values in traits.items()}


def commonest_language(answers: Sequence[Answer]) -> str | None:
    """The language or script that most answers are in; None if none can be told."""
    known = Counter(found for found in (language(answer.text) for answer in answers) if found is not None)
    return known.most_common(1)[0][0] if known else None


def mean_words(answers: Sequence[Answer]) -> float:
    """Words an answer."""
    return sum(len(answer.text.split()) for answer in answers) / max(1, len(answers))
