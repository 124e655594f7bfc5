"""Runs a function in two processes that train together over gloo, and trains there as the command line would."""

import contextlib
import multiprocessing
import os
from dataclasses import replace

import torch
from models import APART, tiny_base, tiny_policy, tiny_tokenizer, tiny_trainer, token_pairs

from qadapter import QAdapterConfig

# One process imports the libraries, the others are forks of it.
CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["qadapter.trainer"])
SECONDS = 300


def in_two_processes(function, folder, *arguments):
    """Call `function(*arguments)` in both; fails where one of them does, or hangs."""
    processes = [
        CONTEXT.Process(target=join_and_call, args=(rank, str(folder / "meeting"), function, arguments), daemon=True)
        for rank in range(2)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join(SECONDS)
    for process in processes:
        process.kill()
        process.join()
    assert [process.exitcode for process in processes] == [0, 0]


def join_and_call(rank, meeting, function, arguments):
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}  # asked for, but met in the file
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=2)
    function(*arguments)
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


def trained(folder, batch_size, new=False, **options):
    """Train, evaluate and save the tiny policy, of which the adapter may be new; the trainer."""
    policy = tiny_policy(tiny_base(num_hidden_layers=3), QAdapterConfig() if new else APART, trained=not new)
    sizes = {"per_device_train_batch_size": batch_size, "per_device_eval_batch_size": batch_size}
    trainer = tiny_trainer(policy, folder, token_pairs(8), token_pairs(5, seed=9), **{"max_steps": 3} | sizes | options)
    trainer.train()
    trainer.save_model()
    trainer.evaluate()
    return trainer


def train(folder, batch_size, options):
    trained(folder, batch_size, **options)


def trained_retaining(folder, batch_size):
    """As `trained`, with texts of the base."""
    policy = tiny_policy(tiny_base(num_hidden_layers=3), replace(APART, retention=2.0))
    sizes = {"per_device_train_batch_size": batch_size, "max_steps": 3}
    trainer = tiny_trainer(policy, folder, token_pairs(9), processing_class=tiny_tokenizer(), **sizes)
    trainer.train()
    trainer.save_model()


def train_with_kept_states(folder, batch_size, options):
    """As `train`; each process has written every other shard of the base's states."""
    from qadapter import base_states

    base_states.SHARD_PAIRS, whole_file, written = 2, base_states.whole_file, []
    base_states.whole_file = lambda path: (written.append(path.name), whole_file(path))[1]
    train(folder, batch_size, options)
    rank = int(os.environ["RANK"])
    assert written == [f"pairs-{start:08d}.safetensors" for start in (2 * rank, 2 * rank + 4)]


def train_sharded(folder, batch_size, options, settings):
    """As `train`, by FSDP2 with the settings of an accelerate file; accelerate shards on accelerators only."""
    import accelerate.state

    os.environ |= {name.upper(): str(value).lower() for name, value in settings.items() if isinstance(value, bool)}
    os.environ |= {name.upper(): str(value) for name, value in settings.items() if not isinstance(value, bool)}
    os.environ["ACCELERATE_USE_FSDP"] = "true"
    state = accelerate.state.PartialState
    state._prepare_backend = lambda *_, **__: ("gloo", accelerate.utils.DistributedType.MULTI_GPU)
    state.set_device = lambda self: setattr(self, "device", torch.device("cpu"))
    trainer = trained(folder, batch_size, **options)
    assert trainer.is_fsdp_enabled
    assert any(isinstance(weight, torch.distributed.tensor.DTensor) for weight in trainer.model.parameters())


def run_command(said, arguments):
    """Run `qadapter` with the arguments; what each process prints is in a file of its own."""
    from qadapter import cli

    with (
        open(f"{said}.{os.environ['RANK']}", "w") as file,
        contextlib.redirect_stdout(file),
        contextlib.redirect_stderr(file),
    ):
        assert cli.main(arguments) == 0
