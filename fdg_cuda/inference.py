"""Evaluation and prediction: the stages forward in evaluation mode, without gradients.

How batches go through the stages is the machine's: see :mod:`fdg_cuda.cpu_inference` and
:mod:`fdg_cuda.cuda_inference`.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Generator, Iterator
from contextlib import closing, contextmanager
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from fdg_cuda.batches import Batch, Batches, Loader, only_inputs
from fdg_cuda.chain import check_output, check_scalar
from fdg_cuda.errors import said_where
from fdg_cuda.interpreter_end import awaited
from fdg_cuda.interrupts import Interrupts
from fdg_cuda.metrics import Average, Evaluation, correct_on_device
from fdg_cuda.nested import Nested, check_nested, cloned, device_of, moved, sample_count

if TYPE_CHECKING:
    from fdg_cuda.machine import Machine
    from fdg_cuda.model_chain import ModelChain
    from fdg_cuda.pipeline import LossFunction

# (the model's output, the target on its device) -> what is wanted of them.
Finish = Callable[[Nested, Nested], Nested]
END = object()


def evaluate(
    machine: Machine, chain: ModelChain, loader: Loader, loss_fn: LossFunction
) -> Evaluation:
    """Loss and accuracy of the model over ``loader``, averaged over samples.

    Raises:
        TypeError, ValueError: the loader gives no (input, target) pairs.
    """
    average = Average()
    samples: deque[int] = deque()

    def entering() -> Iterator[Batch]:
        for batch in Batches(loader).epoch():
            samples.append(sample_count(batch[0]))
            yield batch

    def finish(output: Nested, target: Nested) -> Tensor:
        device = device_of(output)  # before the loss, which may take the output apart
        with machine.precision.autocast(device.type):
            loss = check_scalar(loss_fn(output, target)).to(device)
        return torch.stack([loss.double().reshape(()), correct_on_device(output, target, device)])

    with awaited(), Interrupts() as interrupts, _evaluation_mode(chain.model):
        results = machine.inference(chain, entering(), finish, to_host=True)
        with closing(results), interrupts.allowed():
            for result in results:
                loss, correct = result.tolist()
                answers = None if math.isnan(correct) else round(correct)
                average.add(loss, samples.popleft(), answers)
    return average.result()


def predict(machine: Machine, chain: ModelChain, x: Nested) -> Nested:
    """The model's output for ``x``, on the device of ``x``'s first tensor.

    Raises:
        TypeError, ValueError: ``x`` is no input of a chain.
    """
    try:
        check_nested(x, "predict takes the input of one batch, which")
    except TypeError as error:
        raise TypeError(f"{error} For a loader: runner.predict_batches(loader).") from None
    with awaited(), _evaluation_mode(chain.model), torch.no_grad():
        output = check_output(machine.forward(chain, cloned(x)), "the model")
        return moved(output, device_of(x))


def predict_batches(
    machine: Machine, chain: ModelChain, loader: Loader
) -> Generator[Nested, None, None]:
    """The model's output for each batch of ``loader``, in order, each on the device of its input.

    Raises:
        TypeError, ValueError: the loader gives no inputs.
    """
    batches = ((x, None) for x in only_inputs(loader))
    with _evaluation_mode(chain.model):
        results = machine.inference(chain, batches, lambda output, _: output, to_host=False)
        with closing(results):
            while True:
                # Not around the yield: between two outputs the caller is at work.
                with awaited(), Interrupts() as interrupts, interrupts.allowed():
                    output = next(results, END)
                if output is END:
                    return
                yield output


def one_by_one(
    forward: Callable[[Nested], Nested],
    batches: Iterator[Batch],
    finish: Finish,
    *,
    to_host: bool,
    first: int = 0,
) -> Generator[Nested, None, None]:
    """Batch after batch through the whole model, on the caller's thread.

    Args:
        forward: of the model; may change its input.
        first: the number of the first batch, for what is said of exceptions.
    """
    for number, (x, y) in enumerate(batches, first):
        with torch.no_grad():
            with said_where(f"the forward of batch {number}"):
                output = check_output(forward(cloned(x)), "the model")
            with said_where(f"the loss of batch {number}"):
                result = finish(output, moved(y, device_of(output)))
            result = moved(result, torch.device("cpu") if to_host else device_of(x))
        yield result


@contextmanager
def _evaluation_mode(model: nn.Module) -> Iterator[None]:
    modes = [(module, module.training) for module in model.modules()]
    try:
        with Interrupts():  # of all modules or of none
            model.eval()
        yield
    finally:
        with Interrupts():
            for module, training in modes:
                module.training = training
