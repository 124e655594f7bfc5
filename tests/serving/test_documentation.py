"""What docs/serving.md shows is what the server does."""

import re
from pathlib import Path

from qadapter.serving.metrics import Metrics
from qadapter.serving.schema import UNSUPPORTED

TEXT = (Path(__file__).parents[2] / "docs" / "serving.md").read_text()


def test_the_example_runs(server, capsys):
    example, *_on_vllm = re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)
    exec(example.replace("http://127.0.0.1:8000", server.url), {})
    assert capsys.readouterr().out.strip()


def test_every_metric_is_named():
    names = set(re.findall(r"^# TYPE (\S+) (?:counter|histogram)", Metrics().text().decode(), re.MULTILINE))
    assert {name for name in names if f"`{name}" not in TEXT} == set()


def test_fields_called_unsupported_are():
    named = re.search(r"are not supported \((.*?)\)", TEXT).group(1)
    assert set(re.findall(r"`(\w+)`", named)) <= set(UNSUPPORTED)
