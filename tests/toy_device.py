"""A device of its own in Python, on machines without an accelerator: tensors on it hold one of the CPU.

As on Apple's GPUs there is no float64 on it, and tensors of the CPU do not mix with its own. A process has it for
good, so this file is run as a program: it trains, measures and generates there and here, and prints both as JSON.
"""

import json
import sys
import tempfile
import warnings
from itertools import chain
from pathlib import Path

import torch
from torch.utils._pytree import tree_map_only

NAME = "toy"
# Operators that take indices or sources from the CPU.
FROM_ANYWHERE = {"aten::copy_", "aten::_to_copy", "aten::index", "aten::index_put_", "aten::_index_put_impl_"}


class OnDevice(torch.Tensor):
    """A tensor on the device; `held` is the CPU's."""

    @staticmethod
    def __new__(cls, held):
        if held.dtype == torch.float64:
            raise TypeError(f"{NAME} has no float64")
        shape = {"strides": held.stride(), "storage_offset": held.storage_offset(), "dtype": held.dtype}
        tensor = torch.Tensor._make_wrapper_subclass(cls, held.shape, device=torch.device(NAME, 0), **shape)
        tensor.held = held
        return tensor

    @classmethod
    def __torch_dispatch__(cls, operator, types, args=(), kwargs=None):
        return run(operator, args, kwargs or {})

    def tolist(self):
        return self.detach().cpu().tolist()


def run(operator, args, kwargs):
    """The operator on what the tensors hold, its results put where they belong."""
    target = kwargs.get("device")
    if target is not None:
        kwargs = {**kwargs, "device": torch.device("cpu")}
    given = []
    tree_map_only(torch.Tensor, given.append, (args, kwargs))
    ours = [tensor for tensor in given if isinstance(tensor, OnDevice)]
    name = operator._schema.name
    if ours and name not in FROM_ANYWHERE and any(t.dim() and not isinstance(t, OnDevice) for t in given):
        raise RuntimeError(f"{name}: tensors of the CPU and of {NAME}")
    result = operator(
        *tree_map_only(OnDevice, lambda t: t.held, args), **tree_map_only(OnDevice, lambda t: t.held, kwargs)
    )
    if name == "aten::copy_":
        return args[0]
    here = bool(ours) if target is None else torch.device(target).type == NAME
    known = {id(tensor.held): tensor for tensor in ours}  # what works in place gives back what it was given

    def placed(tensor):
        return known[id(tensor)] if id(tensor) in known else OnDevice(tensor) if here else tensor

    return tree_map_only(torch.Tensor, placed, result)


class Module:
    """What torch asks of `torch.toy`."""

    def __getattr__(self, name):
        answers = {
            "is_available": True, "is_initialized": True, "_is_in_bad_fork": False, "manual_seed_all": None,
            "current_device": 0, "device_count": 1, "get_amp_supported_dtype": [torch.bfloat16],
        }  # fmt: skip
        if name not in answers:
            raise AttributeError(name)
        return lambda *_: answers[name]


def register():
    """Make the device known to torch; what keeps it so."""
    from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

    _setup_privateuseone_for_python_backend(rename=NAME, backend_module=Module())
    library = torch.library.Library("_", "IMPL")
    library.fallback(lambda operator, *args, **kwargs: run(operator, args, kwargs), "PrivateUse1")
    # torch makes these from Python's numbers without asking the device.
    tensor = torch.tensor

    def made_there(make):
        def made(data, *, device=None, **options):
            result = make(data, **options)
            return result if device is None else result.to(device)

        return made

    torch.tensor, torch.as_tensor = made_there(torch.tensor), made_there(torch.as_tensor)
    torch.Tensor.new_tensor = lambda self, data, dtype=None, device=None: tensor(data, dtype=dtype or self.dtype).to(
        self.device if device is None else device
    )
    return library


def trained(device, folder, **options):
    """Losses of a tiny training run there, and its policy."""
    from accelerate.state import PartialState
    from datasets import Dataset
    from models import byte_tokenizer, tiny_base

    from qadapter import QAdapterForCausalLM, QAdapterTrainer, QAdapterTrainingArguments

    tokenizer = byte_tokenizer()
    rows = [{"prompt": f"q{i}", "chosen": f" good {i}" * 3, "rejected": f" bad {i}"} for i in range(8)]
    torch.manual_seed(0)
    model = QAdapterForCausalLM.from_base(tiny_base("llama", vocab_size=len(tokenizer)))
    arguments = QAdapterTrainingArguments(
        folder, max_steps=2, per_device_train_batch_size=4, learning_rate=0.03, logging_steps=1, report_to="none",
        disable_tqdm=True, dataloader_pin_memory=False, **options,
    )  # fmt: skip
    PartialState()._shared_state["device"] = arguments.__dict__["_setup_devices"] = torch.device(device)
    trainer = QAdapterTrainer(
        model=model, args=arguments, processing_class=tokenizer,
        train_dataset=Dataset.from_list(rows), eval_dataset=Dataset.from_list(rows[:3]),
    )  # fmt: skip
    trainer.train()
    assert model.device.type == torch.device(device).type
    logged = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return [*logged, trainer.evaluate()["eval_loss"]], model.eval()


def used(model, device):
    """Numbers of everything that a policy is used for."""
    from qadapter.evaluation.columns import Column
    from qadapter.evaluation.drift import measure_texts
    from qadapter.evaluation.texts import Text

    ids = torch.arange(12).view(2, 6).to(device) % 50 + 3
    settings = [{"strength": 0.5}, {"max_kl": 0.01}, {"min_kl": 0.01}, {"interpolation": "weights", "strength": 0.5}]
    with torch.no_grad():
        sums = [float(model(input_ids=ids, **dial).logits.abs().sum().cpu()) for dial in settings]
    columns = [Column("policy"), Column("capped", max_kl=0.01)]
    (drift,) = measure_texts(model, [Text((3, 4, 5), (6, 7, 8), "")], columns, batch_tokens=64)
    kls = [float(drift.columns[column.name].kl.sum()) for column in columns]
    written = [model.generate(ids, max_new_tokens=4, strength=0.5, **way) for way in ({}, {"num_beams": 2})]
    return sums + kls, [answer.tolist() for answer in written]


def main():
    warnings.simplefilter("ignore")
    sys.path[:0] = [str(Path(__file__).parent)]
    library = register()
    from qadapter.devices import widest_float

    found = {}
    for device in ("cpu", f"{NAME}:0"):
        with tempfile.TemporaryDirectory() as folder:
            losses, model = trained(device, folder)
            more = [trained(device, folder, **options)[0] for options in ({"packing": False}, {"fused_head": False},
                    {"gradient_checkpointing": True}, {"cache_base_states": "memory"})]  # fmt: skip
        numbers, answers = used(model, device)
        found[device.partition(":")[0]] = {"numbers": [*losses, *chain(*more), *numbers], "answers": answers}
    found["widest"] = str(widest_float(torch.device(NAME)))
    print(json.dumps(found))
    del library


if __name__ == "__main__":
    main()
