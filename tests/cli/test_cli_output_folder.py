"""The folder that a run writes: other runs are respected, and full disks leave no adapter behind."""

import errno
import math
import os
import shutil
from collections import namedtuple
from pathlib import Path

import pytest
import torch
from commands import adapter_settings, assert_refused, contents, qadapter, succeeded

from qadapter import QAdapterForCausalLM
from qadapter.evaluation.card import BEGIN, END
from qadapter.modeling import checkpoint
from qadapter.modeling.manifest import MANIFEST_NAME
from qadapter.objective import pair_losses
from qadapter.training_log import read_log

# -- the output folder ---------------------------------------------------------------------------------------------


def test_another_runs_folder_is_refused_and_left_as_it_is(train, adapter, folder):
    shutil.copytree(adapter, folder)
    before = contents(folder)
    assert_refused(train(), "run holds another run .*--resume-from-checkpoint last .*--overwrite")
    assert contents(folder) == before


def test_a_folder_of_somebodys_adapters_is_refused_and_left_as_it_is(train, folder):
    (folder / "adapters").mkdir(parents=True)
    (folder / "adapters" / "mine.txt").write_text("precious")
    assert_refused(
        train(), r"run holds another run \(adapters\): choose another one, or pass --overwrite to replace it"
    )
    assert contents(folder)


def test_what_a_run_that_failed_in_its_first_step_leaves_does_not_block_the_next(train, folder):
    folder.mkdir()
    log = folder / "training_log.jsonl"
    log.write_text("")
    succeeded(train("--max-steps", "1"))
    shutil.rmtree(folder)
    folder.mkdir()
    log.write_text('{"step": 1, "loss": 1.0}\n')
    assert_refused(train(), r"run \(training_log.jsonl\): choose another one, or pass --overwrite to replace it")


def test_overwrite_replaces_the_run_and_keeps_other_files(train, adapter, folder):
    shutil.copytree(adapter, folder)
    (folder / "notes.txt").write_text("mine")
    of_the_run = [folder / name for name in ("audit.json", "sweep.json", "sweep.svg", "sweep.png", "sweep.html")]
    for path in of_the_run:
        path.write_text("{}")
    succeeded(train("--overwrite", "--lora-r", "3", "--max-steps", "1"))
    assert adapter_settings(folder)["rank"] == 3
    assert sorted(path.name for path in folder.glob("checkpoint-*")) == ["checkpoint-1"]
    assert (folder / "notes.txt").read_text() == "mine"
    assert not any(path.exists() for path in of_the_run)


def test_overwrite_keeps_somebodys_loras_beside_the_run_s_adapter(train, adapter, folder):
    shutil.copytree(adapter, folder)
    shutil.copytree(folder / "adapters" / "default", folder / "adapters" / "mine")
    before = contents(folder / "adapters" / "mine")
    succeeded(train("--overwrite", "--lora-r", "3", "--max-steps", "1"))
    assert contents(folder / "adapters" / "mine") == before
    assert sorted(path.name for path in (folder / "adapters").iterdir()) == ["default", "mine"]
    assert adapter_settings(folder)["rank"] == 3


@pytest.mark.parametrize("options", [(), ("--overwrite",), ("--resume-from-checkpoint", "last")])
def test_a_folder_whose_adapters_are_a_link_is_refused_before_the_data_is_read(
    train, adapter, folder, tmp_path, options
):
    shutil.copytree(adapter, folder)
    (folder / "adapters").rename(tmp_path / "elsewhere")
    (folder / "adapters").symlink_to(tmp_path / "elsewhere")
    before = contents(tmp_path / "elsewhere")
    assert_refused(train(*options, dataset="nowhere.jsonl"), "run/adapters is a link or a file.*choose another folder")
    assert contents(tmp_path / "elsewhere") == before


def test_somebodys_readme_is_no_run_and_stays(train, folder):
    folder.mkdir()
    (folder / "README.md").write_text("# Mine\n")
    succeeded(train("--max-steps", "1"))
    succeeded(train("--max-steps", "1", "--overwrite"))
    assert (folder / "README.md").read_text() == "# Mine\n"


def test_the_certificate_of_another_run_is_put_aside(train, adapter, folder):
    shutil.copytree(adapter, folder)
    card = f"# Mine\n{BEGIN}\n100% better\n{END}\n"
    (folder / "README.md").write_text(card)
    succeeded(train("--max-steps", "1", "--overwrite"))
    assert not (folder / "README.md").exists()
    assert (folder / "README.old.md").read_text() == card


def test_overwrite_with_a_base_without_a_chat_template_leaves_a_folder_that_loads(train, adapter, plain_base, folder):
    shutil.copytree(adapter, folder)
    succeeded(train("--overwrite", model=plain_base))
    succeeded(qadapter("generate", folder, "--prompt", "Why?", "--max-new-tokens", 1))


def test_a_run_that_began_in_the_folder_meanwhile_is_left_as_it_is(train, adapter, folder, monkeypatch):
    """Both saw an empty folder; the other one was faster to load its model."""
    load = QAdapterForCausalLM.from_base

    def slowly(*arguments, **options):
        if not folder.exists():
            shutil.copytree(adapter, folder)
        return load(*arguments, **options)

    monkeypatch.setattr(QAdapterForCausalLM, "from_base", slowly)
    outcome = train()
    assert_refused(outcome, "run holds another run .*, begun meanwhile: choose another one")
    assert contents(folder) == contents(adapter)
    succeeded(train("--overwrite"))


@pytest.mark.parametrize(
    "mistake",
    [
        ("--dataset", "nowhere.jsonl"),
        ("--model", "nobody/nothing"),
        ("--lora-target-modules", "nope"),
        ("--learning-rate", "nan"),
        ("--optim", "galore_adamw"),
    ],
)
def test_overwrite_keeps_the_old_run_if_the_new_one_cannot_start(train, adapter, folder, mistake):
    shutil.copytree(adapter, folder)
    before = contents(folder)
    assert train("--overwrite", *mistake).code == 1
    assert contents(folder) == before


@pytest.mark.parametrize(
    "refused_late",
    [
        ("--optim", "galore_adamw"),  # as the optimizer is made
        ("--resume-from-checkpoint", "{adapter}/checkpoint-4", "--beta", "3"),  # as it is loaded
        ("--cache-base-states", __file__),  # as the batches are
    ],
)
def test_a_run_refused_by_the_trainer_leaves_no_folder(train, adapter, tmp_path, refused_late):
    there = set(tmp_path.iterdir())
    outcome = train(*(option.format(adapter=adapter) for option in refused_late), folder=tmp_path / "new" / "run")
    assert (outcome.code, outcome.err.count("\n")) == (1, 1), outcome.err
    assert set(tmp_path.iterdir()) == there


def test_a_run_refused_by_the_trainer_keeps_an_empty_folder_that_was_there(train, folder):
    folder.mkdir()
    assert_refused(train("--cache-base-states", __file__), "cache_base_states")
    assert folder.is_dir()


def test_a_checkpoint_that_is_not_there_is_refused_before_the_data_is_read(train, folder):
    assert_refused(
        train("--resume-from-checkpoint", "nowhere", dataset="nowhere.jsonl"),
        "^error: nowhere is not an adapter folder: .*one of its checkpoint",
    )
    assert not folder.exists()


def test_an_adapter_is_no_checkpoint_to_resume(train, adapter, folder):
    assert_refused(
        train("--resume-from-checkpoint", adapter, dataset="nowhere.jsonl"),
        r"is an adapter, no checkpoint \(trainer_state.json is missing\): give a checkpoint-\* folder of its run",
    )
    assert not folder.exists()


def test_a_file_as_output_folder_is_refused(train, folder):
    folder.write_text("mine")
    assert_refused(train(), "run is a file. Choose another one")
    assert folder.read_text() == "mine"


def read_only(monkeypatch, folder):
    """Let `folder` look read-only: the mode of a folder does not hold root, as whom tests may run."""
    access = os.access
    monkeypatch.setattr("os.access", lambda path, mode: Path(path) != folder and access(path, mode))


@pytest.mark.parametrize("above", ["run", "."])
def test_a_folder_that_cannot_be_written_to_is_refused_before_the_data_is_read(
    train, folder, tmp_path, monkeypatch, above
):
    (tmp_path / above).mkdir(exist_ok=True)
    read_only(monkeypatch, tmp_path / above)
    before = sorted(tmp_path.iterdir())
    outcome = train(dataset="nowhere.jsonl")
    assert_refused(outcome, f"output folder {folder}: {tmp_path / above} cannot be written to. Choose another one")
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.parametrize(
    ("command", "options", "match"),
    [
        ("audit", (), "cannot be written to: give --output-dir DIR and --no-card, so that"),
        ("audit", ("--no-card",), "cannot be written to: give --output-dir DIR, so that"),
        ("audit", ("--output-dir", "."), "cannot be written to: give --no-card, so that"),
        ("sweep", (), "cannot be written to. Choose another one"),
    ],
)
def test_an_adapter_that_cannot_be_written_to_is_refused_before_anything_is_measured(
    adapter, monkeypatch, command, options, match
):
    read_only(monkeypatch, adapter)
    outcome = qadapter(command, adapter, *options, "--dataset", "nowhere.jsonl")
    assert_refused(outcome, match, code=2 if command == "audit" else 1)


@pytest.mark.parametrize(
    ("command", "option"), [("eval", "--output"), ("compare", "--output-dir"), ("export", "--output-dir")]
)
def test_results_go_to_no_folder_that_cannot_be_written_to(adapter, tmp_path, monkeypatch, command, option):
    read_only(monkeypatch, tmp_path)
    assert_refused(qadapter(command, adapter, option, tmp_path / "new"), f"{tmp_path} cannot be written to")


def test_a_batch_that_does_not_fit_is_followed_by_smaller_ones_in_the_same_folder(train, folder, monkeypatch):
    calls = []

    def losses(*arguments):
        calls.append(1)
        if len(calls) == 3:
            raise RuntimeError("CUDA out of memory. Tried to allocate 2 GiB")
        return pair_losses(*arguments)

    monkeypatch.setattr("qadapter.trainer.pair_losses", losses)
    succeeded(train("--auto-find-batch-size"))
    assert [entry["step"] for entry in read_log(folder / "training_log.jsonl") if "loss" in entry] == [1, 2, 3, 4]


# -- no space left -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "adapter_model.safetensors"),
                                   ValueError("I/O error: No space left on device (os error 28)")])  # fmt: skip
def test_a_full_disk_while_saving_leaves_no_adapter(train, folder, monkeypatch, error):
    def fail(*_, **__):
        raise error

    monkeypatch.setattr(checkpoint, "save_file", fail)
    assert_refused(train(), "no space left on the device while writing .*free some and run again", folder=folder)
    assert not [path for path in folder.rglob("*") if path.name == MANIFEST_NAME or path.name.startswith(".saving")]


def test_a_full_disk_is_recognised_where_torch_does_not_say_so(train, folder, monkeypatch):
    def fail(*_, **__):
        raise RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 64 vs 0")

    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(torch, "save", fail)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(2**30, 2**30, 0))
    assert_refused(train(), f"no space left on the device while writing {folder}", folder=folder)


def test_an_error_of_torch_on_a_disk_with_space_stays_what_it_is(train, folder, monkeypatch):
    def fail(*_, **__):
        raise RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 64 vs 0")

    monkeypatch.setattr(torch, "save", fail)
    assert_refused(train(), "RuntimeError: .enforce fail", folder=folder)


# -- an evaluation that fails after saving ---------------------------------------------------------------------------


@pytest.fixture
def nan_in_evaluation(monkeypatch):
    """Losses of an evaluation are NaN."""

    def losses(*arguments):
        found, quantities = pair_losses(*arguments)
        if torch.is_grad_enabled():
            return found, quantities
        return found * math.nan, quantities | {"losses": found * math.nan}

    monkeypatch.setattr("qadapter.trainer.pair_losses", losses)


@pytest.mark.usefixtures("nan_in_evaluation")
def test_an_evaluation_that_is_not_finite_after_saving_keeps_the_adapter_and_says_so(train, folder):
    assert_refused(
        train("--eval-fraction", 0.3, "--eval-strategy", "no"),
        f"the adapter is written to {folder}, but its evaluation failed: the eval_loss after step 4 is nan: training "
        "has diverged. Lower learning_rate",
    )
    succeeded(qadapter("info", folder))


def test_an_adapter_that_is_not_finite_is_not_written(train, folder):
    """The one step's loss is finite, what it makes of the adapter is not."""
    outcome = train("--learning-rate", 1e30, "--max-steps", 1)
    assert_refused(outcome, "log-probabilities of adapter 'default' are not finite, so nothing is saved", folder=folder)
