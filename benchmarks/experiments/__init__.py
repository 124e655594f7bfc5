"""The experiments of the paper and of its rivals, runnable: `python -m benchmarks.experiments --help`.

A cell is one (setting, method with its options, seed): train, measure, write one JSON file. settings.py says what is
customised and how it is measured, methods.py how, suites.py which cells, report.py turns finished cells into a page.
"""
