"""What kind of text answers are."""

import random

import pytest

from qadapter.evaluation.traits import (
    answer_traits,
    commonest_language,
    language,
    repeats_itself,
    trait_changes,
)
from qadapter.generation import Answer

ENGLISH = "The cat sat on the mat, and that is all that it did for the rest of the day."
GERMAN = "Die Katze saß auf der Matte, und das ist alles, was sie für den Rest des Tages tat."


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (ENGLISH, "English"),
        (GERMAN, "German"),
        ("Le chat est assis sur le tapis et il ne bouge pas pour vous.", "French"),
        ("El gato está en la alfombra y no se mueve por las tardes, pero los perros sí.", "Spanish"),
        ("Кошка сидела на коврике.", "Cyrillic script"),
        ("猫はマットの上に座った。", "Japanese script"),
        ("東京都知事選挙の投票日", "Japanese script"),
        ("これはとてもよい", "Japanese script"),
        ("猫坐在垫子上，不想动。", "CJK script"),
        ("我常去的店叫鲜の每日，店里卖新鲜水果和蔬菜，价格便宜。", "CJK script"),
        ("Este libro es muy bueno.", "Spanish"),
        ("Ja, das stimmt.", "German"),
        ("Ja, dat klopt.", "Dutch"),
        ("Oui, c'est là.", "French"),
        ("Ja, gerne.", None),
        ("3 + 4 = 7", None),
        ("", None),
        ("Xylophone quartz", None),
        ("Kot siedział na macie i to jest wszystko, co robił przez cały dzień, ale nie spał.", "Polish"),
        ("Katten satt på mattan och det är allt som den gjorde, för att den inte ville gå ut.", "Swedish"),
        ("Katten sad på måtten, og det er alt, hvad den gjorde, for den ville ikke gå ud.", "Danish or Norwegian"),
        ("Kissa istui matolla ja oli siinä koko päivän, mutta hän ei nukkunut.", "Finnish"),
        ("Kedi paspasın üzerinde oturdu ve bütün gün bir şey yapmadı, çok uyudu.", "Turkish"),
        ("Con mèo ngồi trên tấm thảm và đó là tất cả những gì nó làm trong ngày.", "Vietnamese"),
        ("Kucing itu duduk di tikar dan tidak bergerak, yang lain pergi dengan cepat.", "Indonesian"),
        ("Pisica stă pe covor și nu se mișcă, pentru că este obosită.", "Romanian"),
        ("Kočka seděla na rohoži a to je vše, protože není hladová a také spí.", "Czech"),
        ("A macska a szőnyegen ült, és nem mozdult, csak egy kicsit aludt, hogy pihenjen.", "Hungarian"),
    ],
)
def test_languages_and_scripts(text, expected):
    assert language(text) == expected


def test_repetition():
    assert repeats_itself("I do not know what to say. " * 6)
    assert not repeats_itself(ENGLISH)
    assert not repeats_itself("no no no no")
    assert repeats_itself("我喜欢你。" * 60)
    assert not repeats_itself("\n".join(f"self.assertEqual(parse({name}),{name})" for name in "abcd"))
    assert not repeats_itself("猫坐在垫子上，不想动。它看着窗外的雨，想起昨天的鱼，觉得今天也许会有更好的晚饭。")


def test_shares_of_traits():
    base = [Answer(ENGLISH, True)] * 4
    answers = [Answer(GERMAN, True), Answer("", False), Answer(ENGLISH, True), Answer("42", False)]
    traits = answer_traits(answers, base)
    assert traits["empty"].value == 0.25
    assert traits["cut off"].value == 0.5
    assert traits["in another language"].value == 0.5
    assert traits["in another language"].n == 2  # the others cannot be told
    assert traits["in no language that is known"].value == 0
    unknown = Answer("mbwa alilala juu ya mkeka siku nzima bila kusonga", True)
    assert answer_traits([unknown] * 2, base[:2])["in no language that is known"].value == 1
    assert commonest_language(base) == "English"
    assert commonest_language([Answer("", True)]) is None


def test_changes_of_traits_are_of_the_same_prompts():
    base = [Answer(ENGLISH, True)] * 20
    changes = trait_changes([Answer(GERMAN, False)] * 10 + base[10:], base)
    assert changes["cut off"].value == changes["in another language"].value == 0.5
    assert changes["cut off"].low > 0.2
    assert changes["empty"].value == 0
    assert changes["empty"].low < 0 < changes["empty"].high


def test_a_trait_that_did_not_change_is_hardly_ever_said_to_have():
    """Base and policy end in time as a coin falls, each by itself."""
    draw, named = random.Random(0), 0
    for _ in range(400):
        own, base = ([Answer("42", draw.random() < 0.5) for _ in range(24)] for _ in range(2))
        named += trait_changes(own, base)["cut off"].low > 0
    assert named <= 18  # 10 expected of 400, three standard errors are 9; comparing two intervals names 38
