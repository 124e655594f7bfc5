"""The adapter folder's README.md: a model card whose certificate is replaced by each audit; the rest is the user's."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from qadapter.data.texts import read_utf8
from qadapter.errors import DataError
from qadapter.evaluation.columns import BASE, dial_title
from qadapter.evaluation.judging import missing_reason
from qadapter.evaluation.tables import headline, markdown_table, written
from qadapter.modeling.lora_files import is_plain_lora
from qadapter.new_folders import write_whole
from qadapter.run_folder import CARD_NAME, CERTIFICATE

BEGIN = f"{CERTIFICATE} (replaced by the next audit) -->"
END = "<!-- qadapter audit: end -->"
FRONT_MATTER = re.compile(r"\A---[ \t]*\n(.*?)^---[ \t]*\n?", re.DOTALL | re.MULTILINE)
HUB_ID = re.compile(r"[\w.-]+/[\w.-]+", re.ASCII)
SHOWN_FINDINGS = 20
TAGS = ["qadapter", "lora", "preference-tuning"]
BOOLEAN = "tag:yaml.org,2002:bool"


class CardLoader(yaml.SafeLoader):
    """Reads metadata as the hub does, with the booleans of YAML 1.2: `language: no` is Norwegian, not false."""


CardLoader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag != BOOLEAN]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
CardLoader.add_implicit_resolver(BOOLEAN, re.compile(r"^(?:true|True|TRUE|false|False|FALSE)$"), list("tTfF"))


def update_card(folder: Path, audit: Mapping[str, Any], beside: bool = True) -> None:
    """Write the audit's certificate into the folder's README.md, which is created if need be.

    Args:
        beside: whether the audit's own files are in the folder, so that the card may name them.

    Raises:
        DataError: the README is not UTF-8, its metadata is no YAML mapping, or it has one mark of the certificate.
    """
    path = folder / CARD_NAME
    plain = is_plain_lora(folder)
    old = read_utf8(path).replace("\r\n", "\n") if path.exists() else new_card(audit, plain)
    library = "peft" if plain else "qadapter"
    write_whole(path, with_certificate(with_metadata(old, audit, path, library), certificate(audit, beside), path))


def base_title(audit: Mapping[str, Any]) -> str:
    """The base's hub id, or the name of its folder: where folders lie is nobody's business."""
    name = audit["base"]["name"]
    return name if HUB_ID.fullmatch(name) else Path(name).name


def judge_title(spec: str) -> str:
    """A judge without its folder or address, which are nobody's business either: its model's name alone."""
    kind, _, rest = spec.partition(":")
    if kind == "endpoint":
        rest = rest.rpartition("#")[2]
    elif kind in ("reward", "pair") and not HUB_ID.fullmatch(rest):
        rest = Path(rest).name
    return f"{kind}:{rest}"


def missing_lines(judgements: Sequence[Mapping[str, Any]]) -> list[str]:
    """A line for each judge and column of which verdicts are missing: how many, and why most often."""
    lines = []
    for judged in judgements:
        reason = missing_reason(judged)
        if reason is not None:
            who = f"{judge_title(judged['judge'])} on {judged['column']}"
            missing = f"{judged['missing']} of {len(judged['verdicts'])} verdicts"
            lines.append(f"{who}: {missing} missing, most often ({reason[1]}) for: {reason[0]}")
    return lines


def check_card(folder: Path) -> None:
    """Raise DataError if the folder has a card that could not be updated: before an hour of measuring."""
    path = folder / CARD_NAME
    if path.exists():
        card = read_utf8(path).replace("\r\n", "\n")
        metadata_of(card, path)
        with_certificate(card, "", path)


def new_card(audit: Mapping[str, Any], plain: bool = False) -> str:
    """The text of a card that nobody has written yet, of an adapter folder or a plain LoRA's."""
    name = base_title(audit)
    if plain:
        lines = [f"A LoRA for {name}."]
        code = ["from peft import AutoPeftModelForCausalLM", "model = AutoPeftModelForCausalLM"]
    else:
        lines = [
            f"A Q-Adapter for {name}: the base stays frozen, and a LoRA beside it is mixed in at every token with a",
            "strength that can be chosen at run time (0 is exactly the base, 1 the trained policy).",
        ]
        code = ["from qadapter import QAdapterForCausalLM", "policy = QAdapterForCausalLM"]
    code[-1] += '.from_pretrained("this-folder")'
    return "\n".join([f"# {audit['adapter']['name']}", "", *lines, "", "```python", *code, "```", ""])


def with_metadata(card: str, audit: Mapping[str, Any], path: Path, library: str = "qadapter") -> str:
    """The card with Hugging Face metadata; what the user has set there stays, the license is left to the user."""
    match, metadata = metadata_of(card, path)
    tags = metadata.get("tags") or []
    tags = [tags] if isinstance(tags, str) else list(tags)
    missing = {"library_name": library, "pipeline_tag": "text-generation"}
    if HUB_ID.fullmatch(audit["base"]["name"]):
        # The hub would take a library that it does not know for one of whole models.
        missing = {"base_model": audit["base"]["name"], "base_model_relation": "adapter", **missing}
    added = {name: value for name, value in missing.items() if name not in metadata}
    new_tags = [*tags, *(tag for tag in TAGS if tag not in tags)]
    if match and not added and new_tags == tags:
        return card
    text = yaml.safe_dump({**metadata, **added, "tags": new_tags}, sort_keys=False, allow_unicode=True)
    body = card[match.end() :] if match else f"\n{card}"
    return f"---\n{text}---\n{body}"


def metadata_of(card: str, path: Path) -> tuple[re.Match[str] | None, dict[str, Any]]:
    """Where the metadata between the --- lines stands, and what it says.

    Raises:
        DataError: it is no YAML mapping.
    """
    match = FRONT_MATTER.match(card)
    try:
        metadata = yaml.load(match[1], CardLoader) if match else {}
    except yaml.YAMLError as error:
        reason = " ".join(str(error).split())
        raise DataError(f"{path}: the metadata between the --- lines is not valid YAML: {reason}") from error
    metadata = {} if metadata is None else metadata
    if not isinstance(metadata, dict):
        raise DataError(f"{path}: the metadata between the --- lines must be `name: value` lines.")
    return match, metadata


def with_certificate(card: str, section: str, path: Path) -> str:
    """The card with `section` between the marks, in place of the old one or at the end.

    Raises:
        DataError: the marks do not come once each, the first before the last.
    """
    starts, ends = card.count(BEGIN), card.count(END)
    # Names of categories and tasks come from data: they must not end the section, nor be links or images in it.
    words = section.replace("<", "&lt;").replace("](", "]\\(")
    marked = f"{BEGIN}\n{words}\n{END}"
    if starts == ends == 0:
        return f"{card.rstrip()}\n\n{marked}\n"
    if starts != 1 or ends != 1 or card.index(BEGIN) > card.index(END):
        raise DataError(f"{path}: the marks of the audit's section are damaged: remove the lines with '<!-- qadapter'.")
    return card[: card.index(BEGIN)] + marked + card[card.index(END) + len(END) :]


def certificate(audit: Mapping[str, Any], beside: bool = True) -> str:
    """What the audit found, as Markdown; it names the audit's files where they are `beside` it."""
    column = audit["column"]
    lines = [
        "## Audit",
        "",
        f"**{verdict_line(audit)}**",
        "",
        f"Measured against {base_title(audit)} at strength {dial_title(audit['settings'])}, with qadapter "
        f"{audit['environment']['versions']['qadapter']} on {audit['environment']['date'][:10]}. Brackets are 95% "
        f"intervals{'; `audit.json` has every figure and setting' if beside else ''}.",
        "",
    ]
    if audit["gate"]:
        rows = [gate_cells(entry) for entry in audit["gate"]]
        lines += [*markdown_table(("limit", "measured", "verdict"), rows), ""]
    lines += [*markdown_table(("", BASE, column), headline(audit["results"], [column])), ""]
    if audit["findings"]:
        lines += ["What got worse:", "", *(f"- {line}" for line in finding_lines(audit["findings"], beside)), ""]
    text = "\n".join(lines).rstrip()
    for spec in {judged["judge"] for judged in audit["results"]["judged"]}:
        text = text.replace(spec, judge_title(spec))
    return text


def verdict_line(audit: Mapping[str, Any]) -> str:
    """The verdict in one line."""
    failed = [entry for entry in audit["gate"] if not entry["passes"]]
    if not audit["gate"]:
        return "No limits were given."
    whole = " by the whole interval" if audit["settings"]["limits"]["confident"] else ""
    if not failed:
        return f"Passes: all {len(audit['gate'])} limits are kept{whole}."
    quantities = "; ".join(entry["quantity"] for entry in failed)
    return f"Fails {len(failed)} of {len(audit['gate'])} limits{whole and ', to be kept' + whole}: {quantities}"


def gate_cells(entry: Mapping[str, Any]) -> tuple[str, str, str]:
    """(limit, measured, verdict) of a gate's entry."""
    why = "there is no interval" if entry["low"] is None else "the interval holds the limit"
    close = f", close: {why}" if entry["close"] else ""
    measured = f"{written(entry, 'number')}, n = {entry['n']}"
    passes = "passes" if entry["passes"] else "FAILS"
    limit = f"{entry['quantity']} {entry['relation']} {entry['limit']:g} {entry['unit']}".rstrip()
    return limit, measured, passes + close


def finding_lines(entries: Sequence[Mapping[str, Any]], beside: bool = True) -> list[str]:
    """The first findings, a line each, and how many more there are: a group of benchmarks alone may have dozens."""
    lines = [finding_line(entry) for entry in entries[:SHOWN_FINDINGS]]
    more = len(entries) - SHOWN_FINDINGS
    where = ", which audit.json and audit.html have" if beside else ""
    return [*lines, f"and {more} more{where}"] if more > 0 else lines


def finding_line(entry: Mapping[str, Any]) -> str:
    """A finding in one line."""
    kind = "change" if entry["kind"] in ("loss", "task") else "rate"
    return f"{entry['what']}: {entry['figure']} {written(entry, kind)}, n = {entry['n']}"
