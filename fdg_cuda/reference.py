"""The oracle: training with delayed gradients, written from the equations.

Single-threaded and slow on purpose; it shares no code with the scheduler it is there to check.

Sources: FDG is Zhuang, Wang, Liu and Lin, "Fully Decoupled Neural Network Learning Using Delayed
Gradients", IEEE TNNLS 2022 (arXiv 1906.09108; eq. 7 is the update with the gradient at the very
weights of the forward); DDG is Huo, Gu, Yang and Huang, "Decoupled Parallel Backpropagation with
Convergence Guarantee", ICML 2018 (arXiv 1804.10574).

There are no ticks in this file. Every stage updates once per batch, in batch order, and the
pipeline drains at the end of each epoch. So a run is known from one number per batch ``b`` and
stage ``k``, both counted from 0, ``b`` within the epoch: the number ``f(k, b)`` of updates that
stage k has made in this epoch when it forwards batch b. With K stages:

- ``"bp"``: f = b.
- ``"ddg"``: f = max(0, b - (K-1-k)). Stage k forwards batch b in tick b and, later within a tick,
  updates for batch tick - (K-1-k).
- ``"fdg"``: f = max(0, b - D + 1) with D = 2(K-1-k) for k < K-1; f = b for the last stage. Stage k
  forwards batch b in tick b + k, just after it updated for batch tick - (2K-2-k) = b - D; the last
  stage forwards before it updates.

Every stage's own update for batch b is its update number b, so ``b - f(k, b)`` others lie between.

With ``accumulate = M`` (Zhuang, Lin and Toh, "Accumulated Decoupled Learning: Mitigating Gradient
Staleness in Inter-Layer Model Parallelization", arXiv 2012.03747) a stage updates once for every M
batches of an epoch, with the mean of their gradients, and at the epoch's end once for what is left.
What f counts above is then the stage's backwards, of which every M-th makes an update: f becomes
f // M, and batch b has a part in update number b // M.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

METHODS = ("fdg", "ddg", "bp")
BACKWARD_WEIGHTS = ("stash", "current", "replay")

Nested = Any  # a tensor, or tuples, lists and dicts of tensors and plain values
LossFunction = Callable[[Tensor, Nested], Tensor]


@dataclass
class ReferenceResult:
    """What :func:`train` saw, one entry per batch, in order over all epochs.

    Attributes:
        losses: the loss of each batch as the last stage computed it, length ``epochs * N``.
        gradients: ``[batch][stage][parameter]``, the gradients of the trainable parameters in the
            order of ``stage.parameters()``, each of its parameter's shape, as they enter the
            update: shrunk, without weight decay; None for a parameter the loss did not reach.
            Empty unless asked for.
        forward_versions: ``[batch][stage]``, the number of updates, counted over the whole run,
            that the stage had made when it forwarded the batch.
    """

    losses: list[float] = field(default_factory=list)
    gradients: list[list[list[Tensor | None]]] = field(default_factory=list)
    forward_versions: list[list[int]] = field(default_factory=list)


@dataclass
class _Stage:
    """One stage: its module, trainable parameters, momentum and the weights still needed."""

    module: nn.Module
    names: list[str]
    parameters: list[nn.Parameter]
    velocity: list[Tensor | None]
    weights: dict[int, list[Tensor]] = field(default_factory=dict)

    def keep(self, version: int, oldest: int) -> None:
        """Keep a copy of the newest weights as ``version``; drop those before ``oldest``."""
        self.weights = {n: kept for n, kept in self.weights.items() if n >= oldest}
        self.weights[version] = [p.detach().clone() for p in self.parameters]


@dataclass
class _Pass:
    """One batch's way through one stage: what the backward needs."""

    leaves: list[Tensor]
    entry: Nested  # a leaf; nested only at stage 0
    output: Tensor
    random_state: Tensor  # of torch's global generator before the forward


def train(
    stages: Sequence[nn.Module],
    batches: Sequence[tuple[Nested, Nested]],
    *,
    epochs: int = 1,
    method: str = "fdg",
    loss_fn: LossFunction | None = None,
    lr: float | Callable[[int], float] = 0.1,
    momentum: float = 0.9,
    weight_decay: float = 5e-4,
    nesterov: bool = False,
    beta: float = 0.5,
    backward_weights: str = "stash",
    accumulate: int = 1,
    clip_norm: float | None = None,
    clip_value: float | None = None,
    optimizer: Callable[[list[nn.Parameter]], torch.optim.Optimizer] | None = None,
    record_gradients: bool = False,
) -> ReferenceResult:
    """Train a chain of stages with delayed gradients, in place, one batch after the other.

    The modules stay in the training or evaluation mode they come in. Their trainable parameters
    hold the trained weights afterwards; buffers move once per batch, in batch order; frozen
    parameters are never touched, and neither are ``.grad`` fields. Random layers (dropout) draw
    batch by batch, stage by stage, from torch's global generator.

    Args:
        stages: K modules, each mapping one tensor to one floating-point tensor; no parameter or
            buffer belongs to two of them.
        batches: N pairs (input, target), in the order of training, the same in each epoch. The
            input is what stage 0 takes; input and target may be of any shape, and nested in tuples,
            lists and dicts.
        epochs: how often to go through ``batches``. Momentum is carried over; delays are not.
        method: ``"fdg"``, ``"ddg"`` or ``"bp"`` (see the module's docstring).
        loss_fn: (output of the last stage, target) to a scalar; default cross-entropy.
        lr: the learning rate, or a function from the batch's number over the whole run (from 0)
            to the learning rate of that batch's update in every stage.
        momentum: as in ``torch.optim.SGD``, and so are ``weight_decay`` and ``nesterov``.
        weight_decay: the L2 penalty, not shrunk.
        nesterov: whether to use Nesterov momentum.
        beta: FDG's shrinking factor, 0 to 1: every stage but the last multiplies the error signal
            it receives by it. Not used in ``"bp"``.
        backward_weights: ``"stash"``: the backward uses the weights of the forward (FDG eq. 7).
            ``"current"``: the activations are stale, the weights are the newest, as when updates
            are in place (what FDG's authors' program did). ``"replay"``: activations and weights are
            the newest: the stage's recorded input goes through it again (Features Replay: Huo, Gu and
            Huang, "Training Neural Networks Using Features Replay", NeurIPS 2018), with the random
            numbers of its forward, and buffers stay as the forward left them.
        accumulate: batches per update; ``lr`` is that of the last of them.
        clip_norm: ``torch.nn.utils.clip_grad_norm_`` of each stage's gradients by itself, shrunk,
            before weight decay. None: not.
        clip_value: likewise ``clip_grad_value_``.
        optimizer: makes the torch optimizer of each stage from its trainable parameters; of the
            hyper-parameters above only ``beta`` is then used, and ``lr`` if it is a function.
        record_gradients: fill ``gradients`` of the result, as they were before they were clipped.

    Raises:
        TypeError: a stage, batch, stage output or loss is not of the stated kind.
        ValueError: an argument is out of range, stages share a tensor, nothing can be trained, or
            the loss does not depend on anything that can be trained.
    """
    _check_choice("method", method, METHODS)
    _check_choice("backward_weights", backward_weights, BACKWARD_WEIGHTS)
    _check_number("momentum", momentum)
    _check_number("weight_decay", weight_decay)
    _check_number("beta", beta, most=1.0)
    if accumulate < 1:
        raise ValueError(f"accumulate must be at least 1, not {accumulate}")
    if epochs < 1:
        raise ValueError(f"epochs must be at least 1, not {epochs}")
    if nesterov and momentum == 0:
        raise ValueError("nesterov needs a momentum above 0")
    chain = _check_stages(stages)
    _check_batches(batches)
    optimizers = [optimizer(s.parameters) if optimizer and s.parameters else None for s in chain]
    loss_of = nn.functional.cross_entropy if loss_fn is None else loss_fn
    factor = 1.0 if method == "bp" else beta
    result = ReferenceResult()

    for epoch in range(epochs):
        start = epoch * len(batches)
        updates_before = epoch * math.ceil(len(batches) / accumulate)
        waiting: list[list[list[Tensor | None]]] = [[] for _ in chain]  # [stage][batch][parameter]
        for stage in chain:
            stage.weights.clear()
            stage.keep(0, oldest=0)
        for b, (inputs, target) in enumerate(batches):
            versions = [
                _forward_version(method, k, b, len(chain)) // accumulate for k in range(len(chain))
            ]
            passes = _forward(chain, versions, inputs)
            loss = loss_of(passes[-1].output, target)
            _check_loss(loss)
            if backward_weights == "current":
                # As under PyTorch 1.0: .data has its own version counter, autograd stays silent.
                for stage, way in zip(chain, passes, strict=True):
                    for leaf, newest in zip(
                        way.leaves, stage.weights[b // accumulate], strict=True
                    ):
                        leaf.data.copy_(newest)
            elif backward_weights == "replay":
                # Where they are those of the forward nothing changes.
                newest_version = b // accumulate
                passes = [
                    way
                    if version == newest_version
                    else _again(stage, k, way, stage.weights[newest_version])
                    for k, (stage, way, version) in enumerate(
                        zip(chain, passes, versions, strict=True)
                    )
                ]
            gradients = _backward(passes, loss, factor)

            rate = float(lr(start + b) if callable(lr) else lr)
            _check_number(f"lr (for batch {start + b})", rate)
            for stage, version, found, made, group in zip(
                chain, versions, gradients, optimizers, waiting, strict=True
            ):
                group.append(found)
                if (b + 1) % accumulate != 0 and b + 1 < len(batches):
                    continue
                grads = _clip(_mean(group), clip_norm, clip_value)
                group.clear()
                if made is None:
                    _update(stage, grads, rate, momentum, weight_decay, nesterov)
                else:
                    _step(stage, grads, made, rate if callable(lr) else None)
                stage.keep(b // accumulate + 1, oldest=version)

            result.losses.append(float(loss.detach()))
            result.forward_versions.append([updates_before + version for version in versions])
            if record_gradients:
                result.gradients.append(gradients)
    return result


def _forward_version(method: str, k: int, b: int, stage_count: int) -> int:
    """Return f(k, b) of the module's docstring."""
    above = stage_count - 1 - k
    if method == "bp" or above == 0:
        return b
    if method == "ddg":
        return max(0, b - above)
    return max(0, b - 2 * above + 1)


def _forward(chain: Sequence[_Stage], versions: Sequence[int], inputs: Nested) -> list[_Pass]:
    """Forward one batch, stage k with the weights after ``versions[k]`` updates.

    The graph is cut between stages: a stage's ``entry`` is a leaf, so that each backward is the
    stage's own and sees of its neighbour nothing but the error signal.
    """
    passes: list[_Pass] = []
    signal = inputs
    for k, (stage, version) in enumerate(zip(chain, versions, strict=True)):
        entry = _each(torch.detach, signal)
        if k > 0:
            entry.requires_grad_()
        passes.append(_through(stage, k, entry, stage.weights[version]))
        signal = passes[-1].output
    return passes


def _through(stage: _Stage, k: int, entry: Nested, weights: Sequence[Tensor]) -> _Pass:
    """Take ``entry`` through stage ``k`` with copies of ``weights``."""
    random_state = torch.get_rng_state()
    leaves = [w.clone().requires_grad_() for w in weights]
    # A copy goes in, or a stage starting with an in-place layer would spoil its neighbour's
    # output and the caller's batch.
    named = dict(zip(stage.names, leaves, strict=True))
    # A module met twice would be exchanged twice and left with the exchanged weights.
    modules = [id(m) for _, m in stage.module.named_modules(remove_duplicate=False)]
    output = torch.func.functional_call(
        stage.module,
        named,
        (_each(torch.clone, entry),),
        tie_weights=len(set(modules)) == len(modules),
    )
    if not isinstance(output, Tensor) or not output.is_floating_point():
        raise TypeError(f"stage {k} must return one tensor of floating-point numbers")
    return _Pass(leaves, entry, output, random_state)


def _again(stage: _Stage, k: int, way: _Pass, weights: Sequence[Tensor]) -> _Pass:
    """Take the input of ``way`` through stage ``k`` again, with ``weights`` and the random numbers
    of back then; leaves the global generator and the stage's buffers as they are."""
    random_state = torch.get_rng_state()
    moved = [(b, b.clone()) for b in stage.module.buffers()]
    torch.set_rng_state(way.random_state)
    again = _through(stage, k, way.entry, weights)
    torch.set_rng_state(random_state)
    for buffer, value in moved:
        buffer.data.copy_(value)
    return again


def _each(function: Callable[[Tensor], Tensor], value: Nested) -> Nested:
    """``value`` with ``function`` of every tensor in it."""
    if isinstance(value, Tensor):
        return function(value)
    if isinstance(value, dict):
        return type(value)((key, _each(function, part)) for key, part in value.items())
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(_each(function, part) for part in value))
    if isinstance(value, (tuple, list)):
        return type(value)(_each(function, part) for part in value)
    return value


def _holds_tensor(value: Nested) -> bool:
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, (tuple, list)):
        return any(_holds_tensor(part) for part in value)
    return isinstance(value, Tensor)


def _backward(passes: Sequence[_Pass], loss: Tensor, factor: float) -> list[list[Tensor | None]]:
    """Return the gradients per stage; each stage but the last shrinks the signal it receives.

    What a stage sends on carries the factor already, so stage k's gradients carry it K-1-k times.
    """
    gradients: list[list[Tensor | None]] = []
    error: Tensor | None = None
    for k in range(len(passes) - 1, -1, -1):
        way = passes[k]
        last = k == len(passes) - 1
        root = loss if last else way.output
        if not last and error is not None:
            error = factor * error
        wanted = way.leaves + ([way.entry] if k > 0 else [])
        found: list[Tensor | None] = [None] * len(wanted)
        if wanted and root.requires_grad and (last or error is not None):
            found = list(torch.autograd.grad(root, wanted, error, allow_unused=True))
        gradients.insert(0, found[: len(way.leaves)])
        error = found[-1] if k > 0 else None
    return gradients


def _mean(group: Sequence[Sequence[Tensor | None]]) -> list[Tensor | None]:
    """Of the gradients of several batches; a batch that did not reach a parameter counts as zero."""
    means: list[Tensor | None] = []
    for of_parameter in zip(*group, strict=True):
        found = [gradient for gradient in of_parameter if gradient is not None]
        means.append(torch.stack(found).sum(0) / len(group) if found else None)
    return means


def _clip(
    gradients: Sequence[Tensor | None], norm: float | None, value: float | None
) -> list[Tensor | None]:
    """The gradients of one stage, clipped by torch itself."""
    if norm is None and value is None:
        return list(gradients)
    holders = [None if g is None else nn.Parameter(torch.zeros_like(g)) for g in gradients]
    for holder, gradient in zip(holders, gradients, strict=True):
        if holder is not None and gradient is not None:
            holder.grad = gradient.clone()
    present = [holder for holder in holders if holder is not None]
    if norm is not None:
        nn.utils.clip_grad_norm_(present, norm)
    if value is not None:
        nn.utils.clip_grad_value_(present, value)
    return [None if holder is None else holder.grad for holder in holders]


def _step(
    stage: _Stage, gradients: Sequence[Tensor | None], made: torch.optim.Optimizer, lr: float | None
) -> None:
    """Update one stage with an optimizer of torch's."""
    for group in made.param_groups:
        group["lr"] = group["lr"] if lr is None else lr
    for parameter, gradient in zip(stage.parameters, gradients, strict=True):
        parameter.grad = None if gradient is None else gradient.clone()
    made.step()
    made.zero_grad(set_to_none=True)


@torch.no_grad()
def _update(
    stage: _Stage,
    gradients: Sequence[Tensor | None],
    lr: float,
    momentum: float,
    weight_decay: float,
    nesterov: bool,
) -> None:
    """Update one stage: torch.optim.SGD's operations in torch.optim.SGD's order.

    g' = g + wd w, v = mu v + g' (at first v = g'), w -= lr v, or with Nesterov w -= lr (g' + mu v).
    Without a gradient nothing happens to a parameter, not even weight decay.
    """
    for i, (weight, gradient) in enumerate(zip(stage.parameters, gradients, strict=True)):
        if gradient is None:
            continue
        step = gradient if weight_decay == 0 else gradient.add(weight, alpha=weight_decay)
        if momentum != 0:
            old = stage.velocity[i]
            new = step if old is None else old.mul(momentum).add(step)
            stage.velocity[i] = new
            step = step.add(new, alpha=momentum) if nesterov else new
        weight.add_(step, alpha=-lr)


def _check_stages(stages: Sequence[nn.Module]) -> list[_Stage]:
    chain: list[_Stage] = []
    owner: dict[int, int] = {}
    for k, module in enumerate(stages):
        if not isinstance(module, nn.Module):
            raise TypeError(f"stage {k} must be an nn.Module, not {type(module).__name__}")
        for name, tensor in [*module.named_parameters(), *module.named_buffers()]:
            if owner.setdefault(id(tensor), k) != k:
                raise ValueError(f"stages {owner[id(tensor)]} and {k} share the tensor {name!r}")
        named = {name: p for name, p in module.named_parameters() if p.requires_grad}
        chain.append(_Stage(module, list(named), list(named.values()), [None] * len(named)))
    if not chain:
        raise ValueError("stages is empty: at least one stage is needed")
    if not any(stage.parameters for stage in chain):
        raise ValueError("no stage has a trainable parameter: there is nothing to train")
    return chain


def _check_batches(batches: Sequence[tuple[Nested, Nested]]) -> None:
    if not isinstance(batches, Sequence) or len(batches) == 0:
        raise ValueError("batches must be a list of at least one pair (input, target)")
    for b, pair in enumerate(batches):
        if len(pair) != 2 or not all(_holds_tensor(part) for part in pair):
            raise TypeError(f"batch {b} must be a pair of tensors (input, target), nested or not")


def _check_choice(name: str, value: str, known: Sequence[str]) -> None:
    if value not in known:
        raise ValueError(f"{name} must be one of {', '.join(known)}, not {value!r}")


def _check_number(name: str, value: float, most: float = math.inf) -> None:
    if not (math.isfinite(value) and 0 <= value <= most):
        upper = "" if most == math.inf else f" and at most {most}"
        raise ValueError(f"{name} must be a finite number, at least 0{upper}, not {value}")


def _check_loss(loss: object) -> None:
    if not isinstance(loss, Tensor) or loss.numel() != 1:
        raise TypeError("loss_fn must return a tensor with one element")
    if not loss.requires_grad:
        raise ValueError("the loss does not depend on the output of the last stage or its weights")
