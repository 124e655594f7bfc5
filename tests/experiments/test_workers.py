"""Several processes on one suite: every cell once, the same numbers as one process, nothing after the deadline."""

import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks.experiments.__main__ import main
from benchmarks.experiments.cells import Cell
from benchmarks.experiments.suites import make_suite
from benchmarks.experiments.workers import Board, ended_with_this_process, next_cell, wait

NAMES = ("qadapter", "dpo", "sft")
SETTING = make_suite("smoke").settings[0]


class Knowing:
    """A runner that knows some settings and prepares in no time."""

    def __init__(self, *settings):
        self.settings, self.prepared = list(settings), []

    def knows(self, setting):
        return setting in self.settings

    def shared(self, cell):
        self.prepared.append((cell.setting.name, cell.seed))
        self.settings.append(cell.setting)

    def say(self, line):
        pass


def named(setting, method="dpo", seed=0):
    return Cell.of(replace(SETTING, name=setting), method, {}, seed)


def arguments(folder, *more):
    return ["run", "--suite", "smoke", "--methods", *NAMES, "--results", str(folder / "results"), "--work",
            str(folder / "work"), "--data", "no-such-folder", *more]  # fmt: skip


def run(folder, *more):
    """By a process of its own, as people run it: what spawned processes import depends on that."""
    command = [sys.executable, "-W", "ignore", "-m", "benchmarks.experiments", *arguments(folder, *more)]
    done = subprocess.run(command, cwd=Path(__file__).parents[2], capture_output=True, text=True, check=False)
    print(done.stdout, done.stderr)
    return done.returncode


def numbers(folder):
    found = {path.name: json.loads(path.read_text()) for path in (folder / "results" / "smoke").glob("*.json")}
    return {name: (result["points"], result["data"]) for name, result in found.items()}


@pytest.mark.slow
def test_workers_run_every_cell_once_with_the_numbers_of_a_single_process(tmp_path, capsys):
    assert main(arguments(tmp_path / "one")) == 0
    assert run(tmp_path / "two", "--workers", "2") == 0
    assert len(numbers(tmp_path / "one")) == 3
    assert numbers(tmp_path / "two") == numbers(tmp_path / "one")
    assert "3 cells done, 0 failed, 0 left" in capsys.readouterr().out
    assert main(arguments(tmp_path / "two", "--workers", "2")) == 0
    assert "3 finished before, 0 to run" in capsys.readouterr().out
    assert not list((tmp_path / "two" / "work").glob("board-*"))


@pytest.mark.slow
def test_a_failed_cell_is_told_of_and_the_deadline_stops_what_is_under_way(tmp_path, capsys):
    # The tiny base cannot be written where a file stands in the way.
    (tmp_path / "work").mkdir()
    (tmp_path / "work" / "bases").write_text("")
    assert run(tmp_path, "--workers", "2") == 1
    assert "0 cells done, 3 failed, 0 left" in capsys.readouterr().out
    start = time.monotonic()
    assert run(tmp_path, "--workers", "2", "--minutes", "0.02") == 0
    assert time.monotonic() - start < 60
    assert "2 were stopped at the deadline" in capsys.readouterr().out


def test_one_process_prepares_a_setting_and_others_go_on_to_another(tmp_path):
    cells = [named("a"), named("a", seed=1), named("b")]
    board = Board(tmp_path, 2, None)
    board.take("prepared-" + Cell(cells[0].setting, "setting", (), 0).key)  # by another process, at it
    runner = Knowing()
    assert next_cell(board, cells, runner) == cells[2]
    assert runner.prepared == [("b", 0)]
    board.mark("prepared-" + Cell(cells[0].setting, "setting", (), 0).key)
    assert [next_cell(board, cells, runner) for _ in range(3)] == [cells[0], cells[1], None]
    assert runner.prepared == [("b", 0)]


def test_what_a_dead_process_was_preparing_is_prepared_by_another(tmp_path):
    cell, board = named("a"), Board(tmp_path, 1, None)
    child = subprocess.Popen(["true"])
    child.wait()
    (tmp_path / ("taken-prepared-" + Cell(cell.setting, "setting", (), 0).key)).write_text(str(child.pid))
    assert next_cell(board, [cell], Knowing()) == cell


def test_what_a_killed_worker_was_preparing_is_free_while_others_go_on(tmp_path):
    board, context = Board(tmp_path, 2, None), multiprocessing.get_context("spawn")
    first, second = (context.Process(target=time.sleep, args=(600,), daemon=True) for _ in range(2))
    with ended_with_this_process([first, second]):
        first.start()
        second.start()
        (tmp_path / "taken-prepared-a").write_text(str(second.pid))
        board.release_dead("prepared-a")
        assert board.taken("prepared-a")
        os.kill(second.pid, signal.SIGKILL)
        os.waitid(os.P_PID, second.pid, os.WEXITED | os.WNOWAIT)  # until it is dead; it stays a zombie
        wait([first, second], time.monotonic() + 0.1)
        board.release_dead("prepared-a")
        assert first.is_alive()
        assert not board.taken("prepared-a")


def test_cells_of_a_setting_in_memory_come_first_but_only_among_the_next_ones(tmp_path):
    cells = [named("a", seed=seed) for seed in range(3)] + [named("b", seed=seed) for seed in range(2)]
    for name in ("a", "b"):
        Board(tmp_path, 1, None).mark("prepared-" + Cell(named(name).setting, "setting", (), 0).key)
    runner = Knowing(cells[-1].setting)
    assert next_cell(Board(tmp_path, 1, None), cells, runner) == cells[0]  # looks three cells ahead
    assert next_cell(Board(tmp_path, 1, None), cells, runner) == cells[3]


def test_no_cell_starts_that_would_end_after_the_deadline(tmp_path):
    board = Board(tmp_path, 1, time.monotonic() + 60)
    assert board.in_time(["dpo", "ppo"]) == {"dpo", "ppo"}
    for number, seconds in enumerate((30, 31, 200)):
        board.mark(f"done-{number}-{'ppo' if seconds == 200 else 'dpo'}", str(seconds))
    assert board.in_time(["dpo", "ppo", "sft-kl"]) == {"dpo", "sft-kl"}  # sft-kl: the median of all, 31
    cells = [named("a", "ppo"), named("a", "dpo")]
    board.mark("prepared-" + Cell(cells[0].setting, "setting", (), 0).key)
    assert next_cell(board, cells, Knowing()) == cells[1]
    assert next_cell(board, cells, Knowing()) is None


@pytest.mark.slow
def test_workers_end_with_the_process_that_started_them(tmp_path):
    command = [sys.executable, "-W", "ignore", "-m", "benchmarks.experiments", *arguments(tmp_path, "--workers", "2")]
    process = subprocess.Popen(command, cwd=Path(__file__).parents[2], stdout=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + 120
        workers: set[int] = set()
        while not workers and time.monotonic() < deadline:
            time.sleep(0.05)
            texts = (path.read_text() for path in tmp_path.glob("work/board-*/taken-*"))
            workers = {int(text) for text in texts if text}  # a file is made before it is written to
        assert workers
        process.terminate()
        assert process.wait(60) == 128 + signal.SIGTERM
    finally:
        process.kill()
    for worker in workers:
        with pytest.raises(ProcessLookupError):
            os.kill(worker, 0)
    assert not list((tmp_path / "work").glob("board-*"))
