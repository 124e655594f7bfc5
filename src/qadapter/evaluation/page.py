"""Pieces of self-contained HTML pages: no outside resources, every text escaped."""

import json
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; color: #111; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; }
table { border-collapse: collapse; width: 100%; } th, td { text-align: left; padding: .4rem .8rem .4rem 0; }
th, td { border-bottom: 1px solid #ddd; vertical-align: top; } pre { white-space: pre-wrap; font: inherit; margin: 0; }
.answers { display: grid; grid-template-columns: 1fr 1fr; gap: 1rem; margin-bottom: 1.5rem; }
.answers > div { border: 1px solid #ddd; border-radius: 6px; padding: .8rem; } h3 { margin-bottom: .4rem; }
.label { font-weight: 600; color: #374151; } svg { max-width: 100%; height: auto; }
.good { color: #15803d; font-weight: 600; } .bad { color: #b91c1c; font-weight: 600; } .close { color: #a16207; }
details { margin: .6rem 0; } summary { cursor: pointer; font-weight: 600; } code, .json { font-size: .85rem; }
.json { white-space: pre-wrap; overflow-wrap: anywhere; } .wide { overflow-x: auto; } td { min-width: 4rem; }
"""


def document(title: str, body: str) -> str:
    """The page."""
    return f"""<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><title>{escape(title)}</title>
<meta name="viewport" content="width=device-width"><style>{STYLE}</style></head><body><main>
<h1>{escape(title)}</h1>
{body}
</main></body></html>
"""


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table of plain texts."""
    head = "".join(f'<th scope="col">{escape(cell)}</th>' if cell else "<td></td>" for cell in header)
    body = "".join("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    return f'<div class="wide"><table><tr>{head}</tr>{body}</table></div>'


def side_by_side(prompt: str, answers: Mapping[str, str], note: str = "") -> str:
    """A prompt with answers next to each other."""
    columns = "".join(
        f'<div><div class="label">{escape(name)}</div><pre>{escape(answer) or "<em>(empty)</em>"}</pre></div>'
        for name, answer in answers.items()
    )
    remark = f"<p>{escape(note)}</p>" if note else ""
    return f'<h3>{escape(prompt)}</h3>{remark}<div class="answers">{columns}</div>'


def folded(title: str, body: str) -> str:
    """A part that opens on a click."""
    return f"<details><summary>{escape(title)}</summary>{body}</details>"


def json_block(value: Any) -> str:
    """JSON for people."""
    return f'<div class="json">{escape(json.dumps(value, indent=1, ensure_ascii=False))}</div>'


def script_data(value: Any) -> str:
    """JSON that can stand in a script element: it holds no "<"."""
    return json.dumps(value, ensure_ascii=True, allow_nan=False).replace("<", "\\u003c")
