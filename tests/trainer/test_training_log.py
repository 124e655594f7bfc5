"""What a run says while it trains: a line an entry of the log."""

from types import SimpleNamespace

import pytest

from qadapter.training_log import LogBar, LogLines, log_lines

TRAINING = {
    "loss": 0.65321, "grad_norm": 1.5, "learning_rate": 1e-4, "rewards/accuracies": 0.7143, "rewards/margins": 0.31234,
    "qadapter/kl": 0.01234, "epoch": 0.5,
}  # fmt: skip


def at(step, steps=90):
    return SimpleNamespace(global_step=step, max_steps=steps, is_local_process_zero=True, is_world_process_zero=True)


@pytest.mark.parametrize(
    ("logs", "expected"),
    [
        (TRAINING, ["step 10 of 90: loss 0.6532, accuracy 71%, margin 0.312, KL 0.0123, learning rate 1.0e-04"]),
        ({"loss": float("nan")}, ["step 10 of 90: loss nan"]),
        ({"loss": 0.5, "qadapter/retained_kl": 0.002}, ["step 10 of 90: loss 0.5000, KL on texts 0.0020"]),
        (
            {"eval_loss": 0.6, "eval_rewards/accuracies": 0.5, "eval_runtime": 2.0},
            ["step 10 of 90, held out: loss 0.6000, accuracy 50%"],
        ),
        (
            {"eval_easy_loss": 0.6, "eval_hard_loss": 0.7},
            ["step 10 of 90, held out easy: loss 0.6000", "step 10 of 90, held out hard: loss 0.7000"],
        ),
        (
            {"train_runtime": 61.2, "train_samples_per_second": 0.523, "train_loss": 0.6},
            ["trained to step 10 in 0:01:01, 0.52 pairs a second"],
        ),
        ({"epoch": 1.0}, []),
    ],
)
def test_an_entry_is_told_in_a_line(logs, expected):
    assert log_lines(logs, at(10)) == expected


def test_where_nobody_watches_lines_say_how_long_it_still_takes(capsys):
    """Of a resumed run, by the steps since it was resumed."""
    times = iter((100.0, 110.0, 190.0))
    lines = LogLines(clock=lambda: next(times))
    lines.on_train_begin(None, at(40), None)
    lines.on_log(None, at(45), None, logs=dict(TRAINING))
    lines.on_log(None, at(90), None, logs={"eval_loss": 0.5})
    first, last = capsys.readouterr().out.splitlines()
    assert first.endswith("learning rate 1.0e-04; 0:01:30 left")
    assert last == "step 90 of 90, held out: loss 0.5000"


def test_of_a_run_that_was_stopped_nothing_is_left(capsys):
    lines = LogLines(clock=iter((0.0, 10.0)).__next__)
    lines.on_train_begin(None, at(0), None)
    lines.on_log(None, at(5), None, logs={"train_runtime": 10.0})
    assert capsys.readouterr().out == "trained to step 5 in 0:00:10\n"


def test_the_bar_of_a_resumed_run_counts_its_own_steps(capsys):
    bar = LogBar()
    bar.on_train_begin(None, at(80), None)
    assert (bar.training_bar.n, bar.training_bar.initial, bar.training_bar.total) == (80, 80, 90)
    bar.on_step_end(None, at(81), None)
    assert bar.training_bar.n == 81
    bar.close()
    assert capsys.readouterr().err.endswith("\n")
