"""Arguments a runner refuses: the value is named, and the remedy."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from chains import batches
from refusals import chain, refused, runner_of
from torch import nn

from fdg_cuda import FDGRunner
from fdg_cuda.schedule import METHODS

pytestmark = pytest.mark.usefixtures("one_torch_thread", "seeded", "no_thread_left")


def test_fewer_layers_than_stages() -> None:
    with refused(ValueError, "3 children", "4 stages", "at most 3 devices"):
        runner_of(chain(inner=[]), 4)


@pytest.mark.parametrize(
    ("split", "words"),
    [
        ([3, 2], ["increase", "[3, 2]"]),
        ([2, 2], ["increase", "[2, 2]"]),
        ([2], ["2 of the layers", "[2]"]),
        ([], ["2 of the layers", "[]"]),
        ([1, 2, 3], ["2 of the layers", "[1, 2, 3]"]),
        ([0, 2], ["between 1 and 4", "[0, 2]"]),
        ([2, 5], ["between 1 and 4", "[2, 5]"]),
        ([-1, 2], ["between 1 and 4", "[-1, 2]"]),
    ],
)
def test_split_indices_that_cannot_cut(split: list[int], words: list[str]) -> None:
    model = chain()
    with refused(ValueError, "split", *words, model=model):
        runner_of(model, 3, split=split)


@pytest.mark.parametrize("split", [2, [1.5], ["a"]], ids=repr)
def test_split_of_another_type(split: Any) -> None:
    with refused((TypeError, ValueError), "split"):
        runner_of(chain(), split=split)


@pytest.mark.parametrize("model", [None, 5, nn.ModuleDict(), [nn.Tanh(), torch.tanh], "net"])
def test_model_of_another_type(model: Any) -> None:
    with refused(TypeError, "nn."):
        runner_of(model, 1)


@pytest.mark.parametrize("model", [[], nn.Sequential()], ids=["list", "Sequential"])
def test_model_without_layers(model: Any) -> None:
    with refused(ValueError, "no layers"):
        runner_of(model, 1)


@pytest.mark.parametrize(
    "register",
    [
        lambda m: m.register_forward_hook(lambda _, x, y: 0 * y),
        lambda m: m.register_forward_pre_hook(lambda _, x: None),
        lambda m: m.register_full_backward_hook(lambda *_: None),
        lambda m: m.register_full_backward_pre_hook(lambda *_: None),
    ],
    ids=["forward", "forward pre", "backward", "backward pre"],
)
def test_hooks_on_the_chain_itself(register: Any) -> None:
    """Stages would not call them; nor would evaluation, but for what goes through the whole model."""
    model, words = chain(), ["the model itself has a", "hook", "layer"]
    runner = runner_of(model, split=[2])
    handle = register(model)
    data = batches(3)
    with refused(ValueError, *words, model=model):
        runner.fit(data)
    with refused(ValueError, *words, model=model):
        runner.evaluate(data)
    with refused(ValueError, *words, model=model):
        runner.predict(data[0][0])
    with refused(ValueError, *words, model=model):
        runner.predict_batches(data)
    with refused(ValueError, *words, model=model):
        runner_of(model, split=[2])
    handle.remove()
    runner.fit(data)


@pytest.mark.parametrize("device", ["tpu", "", "meta", "cpux", -1], ids=repr)
def test_unknown_device(device: Any) -> None:
    with refused(ValueError, repr(device), "'cpu'"):
        FDGRunner(chain(), ["cpu", device])


@pytest.mark.skipif(torch.cuda.is_available(), reason="is about machines without CUDA")
@pytest.mark.parametrize("device", [0, 1, "cuda", "cuda:0", torch.device("cuda", 0)], ids=repr)
def test_cuda_device_where_there_is_none(device: Any) -> None:
    with refused(ValueError, "is a CUDA device", "doctor` says why", "['cpu', 'cpu']"):
        FDGRunner(chain(), [device, device])


@pytest.mark.parametrize("threads", [[1, 1], "2", True, 0, -1], ids=repr)
def test_cpu_threads_of_another_kind(threads: Any) -> None:
    with refused((TypeError, ValueError), "cpu_threads", repr(threads)):
        FDGRunner(chain(), ["cpu", "cpu"], cpu_threads=threads)


def test_cuda_ordinal_beyond_the_last() -> None:
    with refused(ValueError, "99"):
        FDGRunner(chain(), [99, 99])


@pytest.mark.parametrize(
    "devices", ["cpu", 0, 2, None, {"cpu"}, ["cpu", None], [True, True]], ids=repr
)
def test_devices_of_another_type(devices: Any) -> None:
    with refused(TypeError, "device"):
        FDGRunner(chain(), devices)


def test_a_loss_that_is_a_class() -> None:
    with refused(TypeError, "loss_fn", "the class MSELoss", "loss_fn=MSELoss()"):
        runner_of(chain(), loss_fn=nn.MSELoss)


@pytest.mark.parametrize("loss_fn", ["mse", 0, torch.zeros(1)], ids=repr)
def test_a_loss_that_cannot_be_called(loss_fn: Any) -> None:
    with refused(TypeError, "loss_fn", "function of output and target", repr(loss_fn)):
        runner_of(chain(), loss_fn=loss_fn)


def test_no_devices() -> None:
    with refused(ValueError, "empty", "['cpu', 'cpu']"):
        FDGRunner(chain(), [])


@pytest.mark.parametrize("beta", [0, 0.0, -0.5, 1.0001, math.nan, math.inf], ids=repr)
def test_beta_out_of_range(beta: float) -> None:
    with refused(ValueError, "beta", "above 0 and at most 1", repr(beta)):
        runner_of(chain(), beta=beta)


@pytest.mark.parametrize("beta", [0.0, -0.5, 1.0001, math.nan], ids=repr)
def test_beta_set_out_of_range_before_fit(beta: float) -> None:
    model = chain()
    runner = runner_of(model, split=[2])
    runner.optimizer.param_groups[0]["beta"] = beta
    with refused(ValueError, "beta", "above 0 and at most 1", repr(beta), model=model):
        runner.fit(batches(3))
    runner.optimizer.param_groups[0]["beta"] = 1.0
    runner.fit(batches(3))


def test_beta_set_out_of_range_while_training() -> None:
    runner = runner_of(chain(), split=[2])

    def spoil(_: object) -> None:
        runner.optimizer.param_groups[0]["beta"] = 2.0

    with refused(ValueError, "beta", "2.0"):
        runner.fit(batches(9), on_batch=spoil)
    runner.optimizer.param_groups[0]["beta"] = 0.5
    runner.fit(batches(3))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        (name, value)
        for name in ("lr", "momentum", "weight_decay")
        for value in (-0.1, math.nan, math.inf)
    ],
)
@pytest.mark.parametrize("later", [False, True], ids=["given", "set-later"])
def test_other_hyper_parameters_out_of_range(name: str, value: float, later: bool) -> None:
    """Set later too: one batch with lr = NaN makes every weight NaN, and no loss shows it."""
    model = chain()
    with refused(ValueError, name, repr(value), model=model):
        runner = runner_of(model, split=[2], **({} if later else {name: value}))
        runner.optimizer.param_groups[0][name] = value
        runner.fit(batches(1, last=None))


@pytest.mark.parametrize("name", ["lr", "beta"])
@pytest.mark.parametrize("value", ["0.5", None], ids=repr)
def test_hyper_parameters_of_another_type(name: str, value: Any) -> None:
    with refused((TypeError, ValueError), name, repr(value)):
        runner_of(chain(), **{name: value})


def test_nesterov_without_momentum() -> None:
    with refused(ValueError, "nesterov", "momentum"):
        runner_of(chain(), nesterov=True, momentum=0.0)


def test_second_parameter_group() -> None:
    runner = runner_of(chain(), split=[2])
    with refused(ValueError, "param_groups="):
        runner.optimizer.add_param_group({"params": [nn.Parameter(torch.zeros(1))], "lr": 0.1})


@pytest.mark.parametrize("option", ["method", "backward_weights"])
def test_unknown_choice(option: str) -> None:
    known = {"method": METHODS, "backward_weights": ("stash", "current", "replay")}[option]
    with refused(ValueError, option, "'gpipe'", *known):
        runner_of(chain(), **{option: "gpipe"})


def test_other_arguments_out_of_range() -> None:
    with refused(ValueError, "cpu_threads", "0"):
        runner_of(chain(), cpu_threads=0)
    runner = runner_of(chain(), split=[2])
    with refused(ValueError, "epochs", "-1"):
        runner.fit(batches(2), epochs=-1)
    with refused(TypeError, "epochs", "1.5"):
        runner.fit(batches(2), epochs=1.5)  # type: ignore[arg-type]
    with refused(ValueError, "lr_step", "'tick'"):
        runner.fit(batches(2), lr_step="tick")
