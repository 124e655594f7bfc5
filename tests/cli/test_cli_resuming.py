"""Runs that are stopped and go on: resuming, and Ctrl-C."""

import shutil
import signal

import pytest
import torch
from commands import assert_refused, contents, qadapter, succeeded
from safetensors.torch import load_file
from transformers import TrainerCallback

from qadapter.modeling.manifest import MANIFEST_NAME
from qadapter.training import train as train_run
from qadapter.training_log import read_log


def test_resuming_the_last_checkpoint_goes_on_where_it_ended(train, adapter, folder, caplog):
    shutil.copytree(adapter, folder)
    succeeded(train("--resume-from-checkpoint", "last", "--max-steps", 6))
    assert [entry["step"] for entry in read_log(folder / "training_log.jsonl") if "loss" in entry] == [1, 2, 3, 4, 5, 6]
    assert "optimizer" not in caplog.text
    assert "was trained with" not in caplog.text


def test_a_finished_run_is_not_trained_on(train, folder, caplog):
    """Its last step is the first of an epoch, which the Trainer would begin again; a queue restarts what it stopped."""
    batches = ("--per-device-train-batch-size", 3)
    succeeded(train(*batches))

    def trained():
        return {path: data for path, data in contents(folder).items() if path.name != "training_arguments.json"}

    before = trained()
    again = ("--resume-from-checkpoint", "last", *batches)
    succeeded(train(*again))
    assert "checkpoint-4 is of the run's last step: nothing is left to train" in caplog.text
    assert trained() == before
    # As if it had been stopped between its last checkpoint and the adapter.
    (folder / MANIFEST_NAME).unlink()
    shutil.rmtree(folder / "adapters")
    succeeded(train(*again))
    assert trained() == before
    for ends in (("--max-steps", 3), ("--max-steps", -1, "--num-train-epochs", 1)):
        outcome = train(*again, *ends)
        assert_refused(outcome, "checkpoint-4 is of step 4, but this run ends at step 3: give a larger max_steps")
        assert trained() == before


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--per-device-train-batch-size", 4), "per_device_train_batch_size = 8 (now 4)"),
        (
            ("--gradient-accumulation-steps", 2, "--seed", 7),
            "gradient_accumulation_steps = 1 (now 2), seed = 42 (now 7)",
        ),
    ],
)
def test_resuming_with_batches_of_other_pairs_says_so(train, adapter, folder, caplog, options, said):
    shutil.copytree(adapter, folder)
    succeeded(train("--resume-from-checkpoint", "last", "--max-steps", 5, *options))
    assert f"checkpoint-4 was trained with {said}: " in caplog.text


def test_resuming_on_other_pairs_says_so(train, adapter, folder, pairs, tmp_path, caplog):
    """The Trainer skips as many steps of whatever dataset it is given."""
    shutil.copytree(adapter, folder)
    again = ("--resume-from-checkpoint", "last", "--max-steps", 5)
    succeeded(train(*again))
    assert "other pairs" not in caplog.text
    shutil.rmtree(folder)
    shutil.copytree(adapter, folder)
    lines = pairs.read_text().splitlines()
    other = tmp_path / "other.jsonl"
    other.write_text("\n".join([*lines[1:], lines[0]]) + "\n")
    succeeded(train(*again, dataset=other))
    assert "checkpoint-4 was trained on other pairs, or on these in another order" in caplog.text


def test_a_checkpoint_that_does_not_say_its_arguments_is_resumed(train, adapter, folder):
    shutil.copytree(adapter, folder)
    (folder / "checkpoint-4" / "training_arguments.json").unlink()
    succeeded(train("--resume-from-checkpoint", "last", "--max-steps", 5))


def test_resuming_skips_a_checkpoint_that_was_cut_short(train, adapter, folder):
    shutil.copytree(adapter, folder)
    shutil.copytree(folder / "checkpoint-4", folder / "checkpoint-40")
    (folder / "checkpoint-40" / "trainer_state.json").unlink()
    succeeded(train("--resume-from-checkpoint", "last", "--max-steps", 5))
    assert read_log(folder / "training_log.jsonl")[-1]["step"] == 5


def test_resuming_without_the_optimizers_state_says_so(train, adapter, folder, caplog):
    shutil.copytree(adapter, folder)
    (folder / "checkpoint-4" / "optimizer.pt").unlink()
    succeeded(train("--resume-from-checkpoint", "last", "--max-steps", 5))
    assert "checkpoint-4 has no optimizer state (save_only_model): the optimizer begins anew." in caplog.text


@pytest.mark.parametrize(
    ("options", "match"),
    [
        (("--beta", 3), "checkpoint-4: this checkpoint was trained with other settings"),
        (("--lora-r", 3), "checkpoint-4: adapter 'default' does not fit the base model or its own config"),
    ],
)
def test_resuming_with_other_settings_is_refused(train, adapter, folder, options, match):
    shutil.copytree(adapter, folder)
    before = contents(folder)
    assert_refused(train("--resume-from-checkpoint", "last", *options), match)
    assert contents(folder) == before


def test_resuming_on_another_base_is_refused(train, adapter, other_base, folder):
    shutil.copytree(adapter, folder)
    before = contents(folder)
    outcome = train("--resume-from-checkpoint", "last", model=other_base)
    assert_refused(outcome, "belongs to another base model .*tiny-llama'.*Resume with the same --model")
    assert contents(folder) == before


# -- Ctrl-C (as a process of its own: test_cli_processes.py) --------------------------------------------------------


class CtrlC(TrainerCallback):
    """Presses Ctrl-C so many times at the first event of that name after a step."""

    def __init__(self, after, times=1, event="on_step_begin"):
        self.after, self.times = after, times
        setattr(self, event, self.press)

    def press(self, args, state, control, **kwargs):
        while state.global_step == self.after and self.times:
            self.times -= 1
            signal.raise_signal(signal.SIGINT)


@pytest.fixture
def train_and_press(train, monkeypatch):
    """Run `qadapter train` with quick settings, Ctrl-C pressed on the way; the signal's handler is as before.

    A shell's background jobs ignore Ctrl-C, and tests may be run in one.
    """
    outside = signal.signal(signal.SIGINT, signal.default_int_handler)

    def run(press, *options):
        before = signal.getsignal(signal.SIGINT)
        with monkeypatch.context() as patch:
            patch.setattr("qadapter.cli.train.train", lambda described: train_run(described, [press]))
            outcome = train(*options)
        assert signal.getsignal(signal.SIGINT) is before
        return outcome

    yield run
    signal.signal(signal.SIGINT, outside)


def checkpoints(folder):
    return sorted(path.name for path in folder.glob("checkpoint-*"))


def test_ctrl_c_ends_the_step_saves_a_checkpoint_and_exits_with_130(train_and_press, folder):
    outcome = train_and_press(CtrlC(after=1), "--save-strategy", "no")
    assert_refused(outcome, "interrupted after step 2 of 4; a checkpoint is saved: go on with the same command and "
                   "--resume-from-checkpoint last", code=130, folder=folder)  # fmt: skip
    assert checkpoints(folder) == ["checkpoint-2"]


def test_an_interrupted_and_resumed_run_ends_as_the_uninterrupted_one(train_and_press, train, adapter, folder):
    train_and_press(CtrlC(after=1))
    succeeded(train("--resume-from-checkpoint", "last"))
    weights = "adapters/default/adapter_model.safetensors"
    torch.testing.assert_close(load_file(folder / weights), load_file(adapter / weights), rtol=0, atol=0)
    assert [entry["step"] for entry in read_log(folder / "training_log.jsonl") if "loss" in entry] == [1, 2, 3, 4]


def test_an_interrupted_runs_folder_names_its_checkpoints_and_they_answer(train_and_press, folder):
    train_and_press(CtrlC(after=1))
    assert_refused(qadapter("generate", folder, "--prompt", "Why?"), "take one of its checkpoint-. folders")
    succeeded(qadapter("generate", folder / "checkpoint-2", "--prompt", "Why?", "--max-new-tokens", 3))


def test_ctrl_c_during_an_evaluation_saves_a_checkpoint_too(train_and_press, folder):
    press = CtrlC(after=2, event="on_prediction_step")
    outcome = train_and_press(press, "--eval-fraction", 0.3, "--eval-strategy", "steps", "--eval-steps", 1)
    assert_refused(outcome, "interrupted after step 2 of 4", code=130, folder=folder)
    assert checkpoints(folder) == ["checkpoint-2"]


def test_ctrl_c_during_the_evaluation_after_saving_keeps_the_adapter_and_says_so(train_and_press, folder):
    press = CtrlC(after=4, event="on_prediction_step")
    outcome = train_and_press(press, "--eval-fraction", 0.3, "--eval-strategy", "no")
    assert_refused(outcome, f"interrupted; the adapter is written to {folder}, but not evaluated", code=130)
    succeeded(qadapter("info", folder))


def test_a_second_ctrl_c_stops_at_once(train_and_press, folder):
    outcome = train_and_press(CtrlC(after=1, times=2), "--save-strategy", "no")
    assert_refused(outcome, r"error: interrupted\.\n", code=130, folder=folder)
    assert checkpoints(folder) == []


def test_ctrl_c_in_the_last_step_comes_too_late_to_lose_anything(train_and_press, folder):
    succeeded(train_and_press(CtrlC(after=3), "--save-strategy", "no"))
    assert (folder / MANIFEST_NAME).exists()


def test_an_error_in_training_gives_ctrl_c_back(train_and_press, folder, monkeypatch):
    def fail(*_, **__):
        raise RuntimeError("boom")

    monkeypatch.setattr("qadapter.trainer.pair_losses", fail)
    assert_refused(train_and_press(CtrlC(after=9)), "RuntimeError: boom", folder=folder)
