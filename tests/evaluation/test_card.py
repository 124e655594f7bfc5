"""The model card: a certificate that is replaced, and everything else of the user's kept."""

import pytest
import yaml

from qadapter.errors import DataError
from qadapter.evaluation.card import (
    BEGIN,
    END,
    certificate,
    check_card,
    judge_title,
    update_card,
    verdict_line,
    with_certificate,
)
from qadapter.evaluation.tables import HEADLINE


def interval(value):
    return {"value": value, "low": value, "high": value, "n": 9}


def audit(kl=0.02, passes=True, what="neutral text", confident=False):
    """As much of an audit as the card shows."""
    columns = {name: {figure: interval(kl) for _, _, figure, _ in HEADLINE} for name in ("base", "policy")}
    entry = {"quantity": "KL", "relation": "at most", "limit": 0.05, "unit": "nats a token",
             **interval(kl), "passes": passes, "close": False}  # fmt: skip
    return {
        "column": "policy",
        "adapter": {"name": "concise"},
        "base": {"name": "org/tiny"},
        "gate": [entry],
        "findings": [{"kind": "loss", "what": what, "figure": "change of the loss", **interval(0.1)}],
        "settings": {"strength": 1.0, "limits": {"confident": confident}},
        "results": {
            "pairs": {"columns": columns, "calibration": {}, "chosen": {"columns": columns}},
            "neutral": {"columns": columns}, "instructions": {"columns": columns}, "judged": [], "tasks": {},
        },
        "environment": {"date": "2026-01-02T03:04:05+00:00", "versions": {"qadapter": "0.1.0"}},
    }  # fmt: skip


@pytest.mark.parametrize(
    ("passes", "said"),
    [
        (True, "Passes: all 1 limits are kept by the whole interval."),
        (False, "Fails 1 of 1 limits, to be kept by the whole interval: KL"),
    ],
)
def test_a_confident_verdict_is_told_as_one(passes, said):
    assert verdict_line(audit(passes=passes, confident=True)) == said


def metadata(folder):
    return yaml.safe_load((folder / "README.md").read_text().split("---\n")[1])


def test_a_new_card_has_metadata_and_a_certificate(tmp_path):
    update_card(tmp_path, audit())
    text = (tmp_path / "README.md").read_text()
    assert metadata(tmp_path) == {
        "base_model": "org/tiny",
        "base_model_relation": "adapter",
        "library_name": "qadapter",
        "pipeline_tag": "text-generation",
        "tags": ["qadapter", "lora", "preference-tuning"],
    }
    assert "license" not in text  # left to the user
    assert "# concise" in text
    assert "**Passes: all 1 limits are kept.**" in text
    assert "| KL at most 0.05 nats a token | 0.0200 [0.0200, 0.0200], n = 9 | passes |" in text


@pytest.mark.parametrize(
    ("spec", "title"),
    [
        ("rule:regex=a/b#c", "rule:regex=a/b#c"),
        ("reward:org/model", "reward:org/model"),
        ("pair:/home/ann/ranker/", "pair:ranker"),
        ("reward:../models/rm", "reward:rm"),
        ("endpoint:http://10.0.0.3:8000/v1#my-model", "endpoint:my-model"),
    ],
)
def test_a_judges_folder_or_address_is_not_published(spec, title):
    assert judge_title(spec) == title
    judged = audit()
    counts = {"wins": 1, "ties": 0, "losses": 0, "missing": 0, "order_bias": None}
    judged["results"]["judged"] = [{"judge": spec, "column": "policy", "rate": interval(1.0), **counts}]
    judged["findings"][0]["what"] = f"answers, judge {spec}"
    text = certificate(judged)
    assert f"answers, judge {title}:" in text
    assert f"Win rate against the base, {title} |" in text


def test_a_second_audit_replaces_the_first_and_nothing_else(tmp_path):
    update_card(tmp_path, audit())
    path = tmp_path / "README.md"
    path.write_text(path.read_text().replace("# concise", "# Mine\n\nMy own words.") + "\n## Thanks\n\nTo all.\n")
    update_card(tmp_path, audit(0.3, passes=False))
    text = path.read_text()
    assert text.count(BEGIN) == text.count(END) == 1
    assert "My own words." in text
    assert text.endswith("## Thanks\n\nTo all.\n")
    assert "0.0200" not in text
    assert "**Fails 1 of 1 limits: KL**" in text
    update_card(tmp_path, audit(0.3, passes=False))
    assert path.read_text() == text


def test_folders_of_this_machine_are_not_published(tmp_path):
    local = audit()
    local["base"]["name"] = "/home/me/secret/tiny"
    update_card(tmp_path, local)
    assert "base_model" not in metadata(tmp_path)
    assert "secret" not in (tmp_path / "README.md").read_text()
    assert "A Q-Adapter for tiny" in (tmp_path / "README.md").read_text()


def test_the_users_metadata_stays(tmp_path):
    path = tmp_path / "README.md"
    path.write_text("---\nlicense: mit\nbase_model: org/other\ntags:\n- mine\n---\n# Title\n")
    update_card(tmp_path, audit())
    assert metadata(tmp_path)["license"] == "mit"
    assert metadata(tmp_path)["base_model"] == "org/other"
    assert metadata(tmp_path)["tags"] == ["mine", "qadapter", "lora", "preference-tuning"]
    assert "\n# Title\n" in path.read_text()


def test_norwegian_stays_a_language(tmp_path):
    """YAML 1.1 reads no, on, y and others as booleans; the hub and its YAML 1.2 do not."""
    path = tmp_path / "README.md"
    path.write_text("---\nlanguage:\n- en\n- no\ninference: false\nswitch: on\n---\n# Title\n")
    update_card(tmp_path, audit())
    assert metadata(tmp_path)["language"] == ["en", "no"]
    assert metadata(tmp_path)["inference"] is False
    assert metadata(tmp_path)["switch"] == "on"


def test_a_card_without_metadata_gets_some(tmp_path):
    path = tmp_path / "README.md"
    path.write_text("Just words.\n\n---\n\nMore words.\n")
    update_card(tmp_path, audit())
    assert metadata(tmp_path)["library_name"] == "qadapter"
    assert "Just words.\n\n---\n\nMore words." in path.read_text()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("---\na: [1\n---\n", "is not valid YAML"),
        ("---\n- a\n---\n", "must be `name: value` lines"),
        (f"{BEGIN}\n", "marks of the audit's section are damaged"),
        (f"{END}\n{BEGIN}\n", "marks of the audit's section are damaged"),
        (f"{BEGIN}{END}{BEGIN}{END}", "marks of the audit's section are damaged"),
    ],
)
def test_cards_that_cannot_be_updated_are_refused_and_left_alone(tmp_path, text, message):
    path = tmp_path / "README.md"
    path.write_text(text)
    for function in (check_card, lambda folder: update_card(folder, audit())):
        with pytest.raises(DataError, match=message):
            function(tmp_path)
    assert path.read_text() == text


def test_many_findings_are_counted_where_they_are_not_named(tmp_path):
    found = audit()
    found["findings"] *= 23
    update_card(tmp_path, found)
    text = (tmp_path / "README.md").read_text()
    assert text.count("- neutral text: change of the loss") == 20
    assert "- and 3 more, which audit.json and audit.html have" in text


def test_names_from_data_cannot_end_the_section(tmp_path):
    update_card(tmp_path, audit(what=f"category {END} <!-- x"))
    check_card(tmp_path)
    assert (tmp_path / "README.md").read_text().count(END) == 1
    update_card(tmp_path, audit(what="category <img src=//x> ![y](//z) [w](//v)"))
    section = (tmp_path / "README.md").read_text().split(BEGIN)[1]
    assert "<img" not in section
    assert "](" not in section
    assert with_certificate("", "a", tmp_path).count(BEGIN) == 1
