"""sweep.json, .html and plots as .svg and .png; the page's plot can be asked for any two figures and each point."""

from collections.abc import Callable, Mapping, Sequence
from html import escape
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape as plain

from qadapter.evaluation.columns import BASE, further_settings
from qadapter.evaluation.page import document, folded, json_block, script_data, table
from qadapter.evaluation.tables import GAIN_AXIS, OF_THE_BASE, Row, print_columns, short, whole_tasks, written
from qadapter.new_folders import write_ordered_json, write_whole
from qadapter.plots import COLOURS, Chart, chart, svg
from qadapter.run_folder import SWEEP_FILES

JSON_NAME, HTML_NAME, *PICTURES = SWEEP_FILES
SVG_NAME, PNG_NAME, BENCHMARKS_SVG_NAME, _ = PICTURES

SETTINGS = ("dial", "budget", "workload", "adapter", "base", "environment")
# (key, title, how it is written)
GAINS = (
    ("margin_gain", GAIN_AXIS, "change"),
    ("accuracy", "accuracy against the base", "rate"),
    ("prefers_chosen", "chosen answer likelier, per token", "rate"),
    ("log_ratio_margin", "log-ratio margin, nats", "change"),
)
COSTS = (
    ("kl_chosen", "KL on chosen answers, nats a token", "number"),
    ("kl_neutral", "KL on neutral text, nats a token", "number"),
    ("loss_change_neutral", "change of the loss on neutral text, nats a token", "change"),
)
# The base's figure of `OF_THE_BASE` that each of these is.
BY_DEFINITION = {
    "margin_gain": "token_margin_gain",
    "accuracy": "accuracy",
    "kl_chosen": "kl",
    "kl_neutral": "kl",
    "loss_change_neutral": "loss_change",
}
TABLE_FIGURES = (*GAINS[:3], *COSTS)
NARROW_FIGURES = (
    ("margin_gain", "margin gain", "change"),
    ("accuracy", "accuracy %", "rate"),
    ("kl_chosen", "KL chosen", "number"),
    ("kl_neutral", "KL neutral", "number"),
    ("loss_change_neutral", "loss change", "change"),
)


def write_sweep(sweep: Mapping[str, Any], folder: Path) -> list[Path]:
    """The files that were written into `folder`; the PNG only where Pillow is installed.

    Pictures of an earlier sweep that this one does not draw are removed.
    """
    for name in PICTURES:
        (folder / name).unlink(missing_ok=True)
    write_ordered_json(folder / JSON_NAME, sweep)
    write_whole(folder / HTML_NAME, page(sweep))
    written = [folder / JSON_NAME, folder / HTML_NAME]
    pictures = {folder / SVG_NAME: trade_off(sweep)}
    if sweep["tasks"]:
        pictures[folder / BENCHMARKS_SVG_NAME] = benchmark_changes(sweep)
    for path, picture in pictures.items():
        write_whole(path, svg(picture))
        written.append(path)
        if find_spec("PIL") is not None:
            from qadapter.plots_png import png

            write_whole(path.with_suffix(".png"), png(picture))
            written.append(path.with_suffix(".png"))
    return written


def print_sweep(sweep: Mapping[str, Any], console: Console) -> None:
    """The points and the recommendation in the terminal."""
    header, rows = narrow_rows(sweep)
    print_columns(console, f"Gain and drift along the dial{fixed(sweep)} (95% intervals)", header, rows)
    console.print(plain(recommendation(sweep)), highlight=False)


def fixed(sweep: Mapping[str, Any]) -> str:
    """The settings that all points share, as words to follow others; "" where they are the usual ones."""
    dial = sweep["dial"]
    return further_settings({**dial, "max_kl": dial["cap"], "min_kl": dial["threshold"]})


def rows_of(sweep: Mapping[str, Any]) -> tuple[Row, list[Row]]:
    """Header and rows of the table of points."""
    header = ("point", *(title for _, title, _ in TABLE_FIGURES), *(task_title(sweep, task) for task in sweep["tasks"]))
    rows = []
    for point in sweep["points"]:
        cells = [_cell(point, key, kind, written) for key, _, kind in TABLE_FIGURES]
        cells += [written(point["tasks"][task], task_kind(sweep, task)) for task in sweep["tasks"]]
        rows.append((point["name"], *cells))
    return header, rows


def narrow_rows(sweep: Mapping[str, Any]) -> tuple[Row, list[Row]]:
    """The same for a terminal."""
    tasks = whole_tasks(sweep["tasks"])
    header = ("strength", *(title for _, title, _ in NARROW_FIGURES), *tasks)
    rows = []
    for point in sweep["points"]:
        cells = [_cell(point, key, kind, short) for key, _, kind in NARROW_FIGURES]
        rows.append((point["name"], *cells, *(short(point["tasks"][task], task_kind(sweep, task)) for task in tasks)))
    return header, rows


def _cell(point: Mapping[str, Any], key: str, kind: str, write: Callable[[Mapping[str, Any], str], str]) -> str:
    """A figure of a point as text; what the base has by definition without an interval."""
    if point["name"] == BASE and key in BY_DEFINITION:
        return OF_THE_BASE[BY_DEFINITION[key]]
    return write(point[key], kind)


def task_kind(sweep: Mapping[str, Any], task: str) -> str:
    """How a benchmark's change is written."""
    return "points" if sweep["tasks"][task]["unit"] == "points" else "change"


def task_title(sweep: Mapping[str, Any], task: str) -> str:
    """What a benchmark's change is called."""
    return f"change of {task}" + (", percentage points" if task_kind(sweep, task) == "points" else "")


def recommendation(sweep: Mapping[str, Any]) -> str:
    """The recommended strength in a sentence."""
    found, budget = sweep["recommended"], sweep["budget"]
    scores = [task for task, told in sweep["tasks"].items() if told["unit"] != "points"]
    told = f" No limit in points holds for {', '.join(scores)}, which is no rate: limit --max-kl." if scores else ""
    if found is None:
        return f"There is no limit to fit: --max-kl or --max-drop picks a strength.{told}"
    limits = [] if budget["max_kl"] is None else [f"KL at most {budget['max_kl']:g}"]
    limits += [f"{task} falls by at most {points:g} points" for task, points in budget["max_drop"].items()]
    within = ", ".join(limits) + (", by the whole interval" if budget["confident"] else "")
    if not found["fits"]:
        return f"None of the measured strengths fits ({within}): measure smaller ones, or raise the budget.{told}"
    what = f"{found['strength']:g}{fixed(sweep)}"
    return f"Recommended strength: {what}, the largest measured one that fits ({within}).{told}"


def trade_off(sweep: Mapping[str, Any]) -> Chart:
    """Gain against drift, a line for each alpha_0; the recommended point is marked."""
    series: dict[str, list[tuple[float, float]]] = {}
    for name, points in lines(sweep).items():
        series[name] = [(point["kl_chosen"]["value"], point["margin_gain"]["value"]) for point in points]
    found = sweep["recommended"]
    marked = {
        f"recommended: {point['strength']:g}": (point["kl_chosen"]["value"], point["margin_gain"]["value"])
        for point in sweep["points"]
        if found is not None and found["fits"] and point["name"] == found["name"]
    }
    return chart(series, "Preference gained against drift", COSTS[0][1], GAINS[0][1], marked)


def benchmark_changes(sweep: Mapping[str, Any]) -> Chart:
    """Change of each benchmark against the preference gained, as trained."""
    scales = _scales(sweep)
    points = sorted((point for point in sweep["points"] if point["alpha_0"] is None), key=lambda p: p["strength"])
    series = {
        task: [(p["margin_gain"]["value"], scales[task] * p["tasks"][task]["value"]) for p in points]
        for task in whole_tasks(sweep["tasks"])
    }
    unit = ", percentage points" if {scales[task] for task in series} == {100.0} else ""
    return chart(series, "What it cost on benchmarks", GAINS[0][1], f"change{unit}")


def lines(sweep: Mapping[str, Any]) -> dict[str, Sequence[Mapping[str, Any]]]:
    """The points of each line by its name, in the order of strength; the base belongs to each."""
    base, *others = sweep["points"]
    settings = list(dict.fromkeys(point["alpha_0"] for point in others))
    return {
        "as trained" if alpha_0 is None else f"alpha_0 = {alpha_0:g}": sorted(
            [base, *(point for point in others if point["alpha_0"] == alpha_0)], key=lambda point: point["strength"]
        )
        for alpha_0 in settings
    }


def page(sweep: Mapping[str, Any]) -> str:
    """The interactive page."""
    tasks = [(f"task:{task}", task_title(sweep, task), task_kind(sweep, task)) for task in sweep["tasks"]]
    scales = _scales(sweep)
    data = {
        "lines": [
            {"name": name, "points": [_flat(point, scales) for point in points]}
            for name, points in lines(sweep).items()
        ],
        "gains": [list(figure) for figure in GAINS],
        "costs": [list(figure) for figure in (*COSTS, *tasks, ("strength", "strength", "number"))],
        "colours": COLOURS,
        "recommended": sweep["recommended"]["name"] if sweep["recommended"] and sweep["recommended"]["fits"] else None,
    }
    header, rows = rows_of(sweep)
    body = f"""<p>{escape(recommendation(sweep))}</p>
<p><label>gain <select id="gain"></select></label> <label>cost <select id="cost"></select></label></p>
<div id="plot">{svg(trade_off(sweep))}</div><pre id="values">Point at a dot to see its values.</pre>
<h2>Points{escape(fixed(sweep))}</h2>{table(header, rows)}
{folded("Settings", json_block({key: sweep[key] for key in SETTINGS}))}
<script type="application/json" id="data">{script_data(data)}</script>
<script>{SCRIPT}</script>"""
    return document(f"Sweep of {Path(sweep['adapter']['path']).name}", body)


def _scales(sweep: Mapping[str, Any]) -> dict[str, float]:
    """What a benchmark's changes are multiplied by."""
    return {task: 100.0 if task_kind(sweep, task) == "points" else 1.0 for task in sweep["tasks"]}


def _values(figure: Mapping[str, Any], scale: float = 1.0) -> list[float | None]:
    return [None if (value := figure[key]) is None else scale * value for key in ("value", "low", "high")]


def _flat(point: Mapping[str, Any], scales: Mapping[str, float]) -> dict[str, Any]:
    """A point's values by figure, each [value, low, high]."""
    figures = {key: point[key] for key, *_ in (*GAINS, *COSTS)}
    values = {key: _values(figure) for key, figure in figures.items()}
    values |= {f"task:{task}": _values(change, scales[task]) for task, change in point["tasks"].items()}
    return {"name": point["name"], "strength": [point["strength"], None, None], **values}


SCRIPT = r"""
const data = JSON.parse(document.getElementById("data").textContent);
const W = 640, L = 72, R = 28, T = 12 + 16 * data.lines.length, H = 330 + T, B = 48;
const gain = document.getElementById("gain"), cost = document.getElementById("cost");
const values = document.getElementById("values"), plot = document.getElementById("plot");
for (const [select, figures] of [[gain, data.gains], [cost, data.costs]])
  for (const [key, title] of figures) select.append(new Option(title, key));
function number(x) { return x === null ? "–" : Math.abs(x) < 1e-12 ? "0" : String(Number(x.toPrecision(4))); }
function element(name, attributes, text) {
  const node = document.createElementNS("http://www.w3.org/2000/svg", name);
  for (const key in attributes) node.setAttribute(key, attributes[key]);
  if (text !== undefined) node.textContent = text;
  return node;
}
function ticks(xs) {
  let low = Math.min(...xs), high = Math.max(...xs);
  if (low === high) { low -= 0.5; high += 0.5; }
  const raw = (high - low) / 5, size = 10 ** Math.floor(Math.log10(raw));
  const step = [1, 2, 2.5, 5, 10].map(m => m * size).find(s => s >= raw);
  const result = [];
  for (let i = Math.floor(low / step + 1e-9); i <= Math.ceil(high / step - 1e-9); i++) result.push(i * step);
  return result;
}
function show(line, point) {
  const rows = [...data.gains, ...data.costs].map(([key, title]) => {
    const [value, low, high] = point[key];
    const bounds = low === null || low === undefined ? "" : ` [${number(low)}, ${number(high)}]`;
    return title + ": " + number(value) + bounds;
  });
  values.textContent = [point.name + " (" + line.name + ")", ...rows].join("\n");
}
function draw() {
  const known = line => line.points.filter(p => p[cost.value][0] !== null && p[gain.value][0] !== null);
  const all = data.lines.flatMap(known);
  const svg = element("svg", {viewBox: `0 0 ${W} ${H}`, role: "img", "font-family": "system-ui", "font-size": 12});
  plot.replaceChildren(svg);
  if (!all.length) return;
  const xs = ticks(all.map(p => p[cost.value][0])), ys = ticks(all.map(p => p[gain.value][0]));
  const X = x => L + (x - xs[0]) / (xs.at(-1) - xs[0]) * (W - L - R);
  const Y = y => H - B - (y - ys[0]) / (ys.at(-1) - ys[0]) * (H - T - B);
  for (const y of ys) {
    svg.append(element("line", {x1: L, x2: W - R, y1: Y(y), y2: Y(y), stroke: "#e5e7eb"}));
    svg.append(element("text", {x: L - 8, y: Y(y) + 4, "text-anchor": "end"}, number(y)));
  }
  for (const x of xs) svg.append(element("text", {x: X(x), y: H - B + 18, "text-anchor": "middle"}, number(x)));
  const title = select => select.selectedOptions[0].textContent;
  svg.append(element("text", {x: (L + W) / 2, y: H - 8, "text-anchor": "middle"}, title(cost)));
  svg.setAttribute("aria-label", title(gain) + " against " + title(cost));
  svg.append(element("text", {transform: `translate(14 ${H / 2}) rotate(-90)`, "text-anchor": "middle"}, title(gain)));
  data.lines.forEach((line, index) => {
    const colour = data.colours[index % data.colours.length], points = known(line);
    const path = points.map(p => X(p[cost.value][0]) + "," + Y(p[gain.value][0])).join(" ");
    svg.append(element("polyline", {points: path, fill: "none", stroke: colour, "stroke-width": 2}));
    for (const point of points) {
      const at = {cx: X(point[cost.value][0]), cy: Y(point[gain.value][0])};
      const look = point.name === data.recommended ? {r: 7, stroke: "#111"} : {r: 4};
      const dot = element("circle", {...at, ...look, fill: colour, tabindex: 0});
      dot.append(element("title", {}, point.name));
      for (const event of ["mouseenter", "focus", "click"]) dot.addEventListener(event, () => show(line, point));
      svg.append(dot);
    }
    svg.append(element("rect", {x: L, y: 4 + 16 * index, width: 10, height: 10, fill: colour}));
    svg.append(element("text", {x: L + 16, y: 13 + 16 * index}, line.name));
  });
}
gain.addEventListener("change", draw);
cost.addEventListener("change", draw);
draw();
"""
