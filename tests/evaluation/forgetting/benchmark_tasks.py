"""Benchmarks that tiny models can answer, in files: sums and letters by likelihood, and a task that writes."""

import gzip
import json

LENGTH = 4096  # positions of the tiny models: a token is a character here


def write_rows(path, rows):
    text = "".join(json.dumps(row) + "\n" for row in rows)
    with (gzip.open if path.suffix == ".gz" else open)(path, "wt", encoding="utf-8") as file:
        file.write(text)


# Questions that a small model can learn by heart, in the form of the benchmarks' files.
SUMS = [(f"{a}+{b}=", a + b) for a in range(6) for b in range(6) if a + b < 10]
LETTERS = [(f"{chr(code)}>", chr(code + 1)) for code in range(ord("a"), ord("z"))]


def sum_rows():
    return [{"query": q, "choices": [str((s + d) % 10) for d in range(4)], "gold": 0} for q, s in SUMS]


def letter_rows():
    return [{"id": i, "query": q, "choices": [a]} for i, (q, a) in enumerate(LETTERS)]


def letter_task(folder):
    """A task that scores by likelihood: is the next letter the likeliest?"""
    return jsonl_task(folder, "letters", letter_rows(), """
output_type: loglikelihood
doc_to_text: query
doc_to_target: "{{choices[0]}}"
metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]
""")  # fmt: skip


def sum_task(folder):
    return jsonl_task(folder, "sums", sum_rows(), """
output_type: multiple_choice
doc_to_text: query
doc_to_choice: choices
doc_to_target: gold
target_delimiter: ""
metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]
""")  # fmt: skip


def writing_task(folder, **generation):
    options = json.dumps({"until": ["~"], "max_gen_toks": 12, "do_sample": False} | generation)
    return jsonl_task(folder, "writing", letter_rows()[:7], f"""
output_type: generate_until
doc_to_text: query
doc_to_target: "{{{{choices[0]}}}}"
generation_kwargs: {options}
metric_list: [{{metric: exact_match, aggregation: mean, higher_is_better: true}}]
""")  # fmt: skip


def jsonl_task(folder, name, rows, config):
    write_rows(folder / f"{name}.jsonl", rows)
    data = {"dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(folder / f"{name}.jsonl")}}}
    (folder / f"{name}.yaml").write_text(f"task: {name}\ntest_split: test\n{config}\n" + json_as_yaml(data))
    return str(folder / f"{name}.yaml")


def json_as_yaml(values):
    return "".join(f"{name}: {json.dumps(value)}\n" for name, value in values.items())


def arc_folder(folder, ending=".jsonl"):
    write_rows(
        folder / f"arc_easy_test{ending}", [{"query": "Question: 1+1?\nAnswer:", "choices": ["2", "3"], "gold": 0}] * 3
    )
    return folder
