"""Facts about training with delayed gradients that the oracle must reproduce."""

from __future__ import annotations

import ast
import copy
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from fdg_cuda import reference
from fdg_cuda.reference import ReferenceResult, train

Batches = list[tuple[Tensor, Tensor]]


def test_the_oracle_shares_no_code_with_the_package() -> None:
    tree = ast.parse(Path(reference.__file__).read_text())
    modules = {
        name
        for node in ast.walk(tree)
        if isinstance(node, ast.Import | ast.ImportFrom)
        for name in (
            [alias.name for alias in node.names] if isinstance(node, ast.Import) else [node.module]
        )
    }
    assert not [name for name in modules if name is None or name.startswith("fdg_cuda")]
    assert not any(isinstance(node, ast.ImportFrom) and node.level for node in ast.walk(tree))
    assert "torch" in modules


def make_stages(count: int, *, norm: bool = False) -> list[nn.Module]:
    """Return ``count`` stages of two float64 layers each: (n, 3) to (n, 4)."""
    torch.manual_seed(7)
    stages: list[nn.Module] = []
    for k in range(count):
        layers: list[nn.Module] = [nn.Linear(3 if k == 0 else 4, 5), nn.Tanh()]
        layers += [nn.BatchNorm1d(5)] if norm else []
        stages.append(nn.Sequential(*layers, nn.Linear(5, 4)).double())
    return stages


def make_batches(count: int, size: int = 6, last_size: int | None = None) -> Batches:
    """Return ``count`` batches of inputs (n, 3) and class numbers (n,), n = ``size``."""
    generator = torch.Generator().manual_seed(11)
    sizes = [size] * count
    sizes[-1] = size if last_size is None else last_size
    return [
        (
            torch.randn(n, 3, generator=generator, dtype=torch.float64),
            torch.randint(4, (n,), generator=generator),
        )
        for n in sizes
    ]


def flat(stages: Sequence[nn.Module]) -> Tensor:
    """Return all parameters as one vector."""
    return torch.cat([p.detach().reshape(-1) for stage in stages for p in stage.parameters()])


def buffers(stages: Sequence[nn.Module]) -> list[Tensor]:
    return [b.clone() for stage in stages for b in stage.buffers()]


def trained(
    stages: Sequence[nn.Module], batches: Sequence[tuple[Tensor, Tensor]], **options: Any
) -> tuple[list[nn.Module], ReferenceResult]:
    """Train a copy of the stages; return it with the result."""
    copies = [copy.deepcopy(stage) for stage in stages]
    return copies, train(copies, batches, **options)


def sgd(
    model: nn.Module,
    batches: Sequence[tuple[Tensor, Tensor]],
    *,
    epochs: int = 1,
    lr: float | Callable[[int], float] = 0.1,
    **options: Any,
) -> list[float]:
    """Train ``model`` in place with the plain PyTorch loop; return the losses."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(parameters, lr=0.1, **options)
    losses = []
    for number, (x, y) in enumerate(list(batches) * epochs):
        optimizer.param_groups[0]["lr"] = lr(number) if callable(lr) else lr
        optimizer.zero_grad(set_to_none=True)
        loss = functional.cross_entropy(model(x), y)
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        losses.append(loss.item())
    return losses


def zero_loss(output: Tensor, target: Tensor) -> Tensor:
    return (output * 0).sum()


# Plain training


@pytest.mark.parametrize("method", ["fdg", "ddg", "bp"])
@pytest.mark.parametrize(
    "options",
    [
        {"momentum": 0.0, "weight_decay": 0.0},
        {"momentum": 0.0, "weight_decay": 0.01},
        {"momentum": 0.9, "weight_decay": 5e-4},
        {"momentum": 0.9, "weight_decay": 0.01, "nesterov": True},
        {"momentum": 0.8, "weight_decay": 0.01, "lr": lambda number: 0.2 / (1 + number)},
    ],
)
def test_one_stage_is_sgd_to_the_bit(method: str, options: dict[str, Any]) -> None:
    stages, batches = make_stages(1, norm=True), make_batches(5, last_size=3)
    expected = copy.deepcopy(stages[0])
    losses = sgd(expected, batches, epochs=2, **options)
    copies, result = trained(stages, batches, epochs=2, method=method, **options)
    assert torch.equal(flat(copies), flat([expected]))
    assert result.losses == losses
    assert all(torch.equal(a, b) for a, b in zip(buffers(copies), buffers([expected]), strict=True))


@pytest.mark.parametrize("count", [2, 3, 4])
@pytest.mark.parametrize("backward_weights", ["stash", "current"])
def test_bp_does_not_depend_on_the_split(count: int, backward_weights: str) -> None:
    stages, batches = make_stages(count, norm=True), make_batches(5)
    whole, expected = trained([nn.Sequential(*stages)], batches, epochs=2, method="bp")
    copies, result = trained(
        stages, batches, epochs=2, method="bp", beta=0.3, backward_weights=backward_weights
    )
    torch.testing.assert_close(flat(copies), flat(whole), rtol=1e-12, atol=1e-14)
    assert result.losses == pytest.approx(expected.losses, rel=1e-12)
    assert result.forward_versions == [[b] * count for b in range(10)]


# Delays


def test_versions_fdg_three_stages() -> None:
    _, result = trained(make_stages(3), make_batches(6), method="fdg")
    assert result.forward_versions == [
        [0, 0, 0],
        [0, 0, 1],
        [0, 1, 2],
        [0, 2, 3],
        [1, 3, 4],
        [2, 4, 5],
    ]


def test_versions_ddg_three_stages() -> None:
    _, result = trained(make_stages(3), make_batches(6), method="ddg")
    assert result.forward_versions == [
        [0, 0, 0],
        [0, 0, 1],
        [0, 1, 2],
        [1, 2, 3],
        [2, 3, 4],
        [3, 4, 5],
    ]


@pytest.mark.parametrize("method", ["fdg", "ddg"])
def test_pipeline_drains_between_epochs(method: str) -> None:
    batches = make_batches(5)
    _, result = trained(make_stages(3), batches, method=method, epochs=2)
    _, one = trained(make_stages(3), batches, method=method)
    assert result.forward_versions[:5] == one.forward_versions
    assert result.forward_versions[5:] == [[5 + n for n in row] for row in one.forward_versions]
    assert result.losses[:5] == one.losses


def count_updates_tick_by_tick(method: str, count: int, batches: int) -> list[list[int]]:
    """Return ``[batch][stage]`` by playing the definition of the methods tick by tick."""
    seen = [[-1] * count for _ in range(batches)]
    updates = [0] * count
    for tick in range(batches + 2 * count):
        for k in range(count):
            last = k == count - 1
            forward = tick - k if method == "fdg" else tick
            backward = tick - (2 * count - 2 - k if method == "fdg" else count - 1 - k)
            for action in "BF" if method == "fdg" and not last else "FB":
                if action == "F" and 0 <= forward < batches:
                    seen[forward][k] = updates[k]
                if action == "B" and 0 <= backward < batches:
                    assert updates[k] == backward
                    updates[k] += 1
    assert updates == [batches] * count
    return seen


@pytest.mark.parametrize("method", ["fdg", "ddg"])
@pytest.mark.parametrize("count", [1, 2, 3, 4, 5])
@pytest.mark.parametrize("batches", [1, 2, 5, 12])
def test_versions_follow_the_ticks(method: str, count: int, batches: int) -> None:
    _, result = trained(make_stages(count), make_batches(batches), method=method)
    assert result.forward_versions == count_updates_tick_by_tick(method, count, batches)


def play_tick_by_tick(
    stages: Sequence[nn.Module], batches: Batches, method: str, rule: str, beta: float
) -> tuple[list[nn.Module], list[float]]:
    """Train one epoch by the definition of the methods: the ticks and the messages in them."""
    stages, count = [copy.deepcopy(stage) for stage in stages], len(stages)
    optimizers = [
        torch.optim.SGD(s.parameters(), lr=0.1, momentum=0.9, weight_decay=0.01) for s in stages
    ]
    arrived = {(0, b): x for b, (x, _) in enumerate(batches)}
    errors: dict[tuple[int, int], Tensor] = {}
    graphs: dict[tuple[int, int], tuple[list[Tensor], Tensor, Tensor]] = {}
    losses: list[float] = []

    def forward(k: int, b: int) -> None:
        # The optimizer's in-place steps show through .data, but not through a copy of it.
        leaves = [p.data if rule == "current" else p.data.clone() for p in stages[k].parameters()]
        leaves = [leaf.requires_grad_() for leaf in leaves]
        entry = arrived.pop((k, b)).detach().requires_grad_()
        names = [name for name, _ in stages[k].named_parameters()]
        named = dict(zip(names, leaves, strict=True))
        output = torch.func.functional_call(stages[k], named, (entry,))
        if k == count - 1:
            output = functional.cross_entropy(output, batches[b][1])
            losses.append(output.item())
        graphs[k, b] = leaves, entry, output
        arrived[k + 1, b] = output

    def backward(k: int, b: int) -> None:
        leaves, entry, output = graphs.pop((k, b))
        error = torch.ones_like(output) if k == count - 1 else beta * errors.pop((k, b))
        *grads, errors[k - 1, b] = torch.autograd.grad(output, [*leaves, entry], error)
        for parameter, gradient in zip(stages[k].parameters(), grads, strict=True):
            parameter.grad = gradient
        optimizers[k].step()

    for tick in range(len(batches) + 2 * count):
        for k in range(count):
            last = k == count - 1
            f = tick - k if method == "fdg" else tick
            b = tick - (2 * count - 2 - k if method == "fdg" else count - 1 - k)
            for action in "BF" if method == "fdg" and not last else "FB":
                if action == "F" and 0 <= f < len(batches):
                    forward(k, f)
                if action == "B" and 0 <= b < len(batches):
                    backward(k, b)
    return list(stages), losses


@pytest.mark.parametrize("method", ["fdg", "ddg"])
@pytest.mark.parametrize("rule", ["stash", "current"])
@pytest.mark.parametrize("count", [1, 2, 3, 4])
def test_training_equals_the_ticks(method: str, rule: str, count: int) -> None:
    stages, batches = make_stages(count, norm=True), make_batches(9, last_size=4)
    expected, losses = play_tick_by_tick(stages, batches, method, rule, 0.7)
    copies, result = trained(
        stages, batches, method=method, backward_weights=rule, beta=0.7, weight_decay=0.01
    )
    torch.testing.assert_close(flat(copies), flat(expected), rtol=1e-11, atol=1e-13)
    for a, b in zip(buffers(copies), buffers(expected), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-13)
    assert result.losses == pytest.approx(losses, rel=1e-11)


@pytest.mark.parametrize("backward_weights", ["stash", "current"])
def test_fdg_and_ddg_agree_at_two_stages_only(backward_weights: str) -> None:
    batches = make_batches(8)
    weights = {
        (method, count): flat(
            trained(make_stages(count), batches, method=method, backward_weights=backward_weights)[
                0
            ]
        )
        for method in ("fdg", "ddg")
        for count in (2, 3)
    }
    assert torch.equal(weights["fdg", 2], weights["ddg", 2])
    assert not torch.allclose(weights["fdg", 3], weights["ddg", 3], rtol=1e-6)


def edge(updates: int) -> float:
    """Return the lr * curvature above which descent that is ``updates`` late diverges."""
    return 2 * math.sin(math.pi / (2 * (2 * updates + 1)))


class Scale(nn.Module):
    """Multiplies by its one weight."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones((), dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.weight


@pytest.mark.parametrize(
    ("method", "count", "updates"),
    [
        ("bp", 3, 0),
        ("fdg", 1, 0),
        ("fdg", 2, 1),
        ("fdg", 3, 3),
        ("fdg", 4, 5),
        ("ddg", 2, 1),
        ("ddg", 3, 2),
        ("ddg", 4, 3),
    ],
)
@pytest.mark.parametrize("shrink", [1.0, 0.5])
def test_stability_edge_of_stage_0(method: str, count: int, updates: int, shrink: float) -> None:
    curvature = 3.0
    stages = [Scale(), *(nn.Identity() for _ in range(count - 1))]
    # Only stage 0 has a weight w and its input is 1: the loss is curvature / 2 * w**2.
    one = torch.ones(1, dtype=torch.float64)
    carried = 1.0 if method == "bp" else shrink ** (count - 1)

    def last_losses(relative: float) -> float:
        result = train(
            [copy.deepcopy(stage) for stage in stages],
            [(one, one)] * 300,
            method=method,
            loss_fn=lambda output, target: (curvature / 2 * output**2).sum(),
            lr=relative * edge(updates) / curvature / carried,
            momentum=0.0,
            weight_decay=0.0,
            beta=shrink,
        )
        assert result.losses[0] == curvature / 2
        return max(result.losses[-20:]) / result.losses[0]

    assert last_losses(0.9) < 1e-2
    assert last_losses(1.1) > 1e2


def test_stability_edges_of_neighbouring_delays_are_told_apart() -> None:
    for updates in range(1, 6):
        assert 1.1 * edge(updates) < edge(updates - 1)
        assert 0.9 * edge(updates) > edge(updates + 1)


# Gradients


@pytest.mark.parametrize("method", ["fdg", "ddg"])
@pytest.mark.parametrize("backward_weights", ["stash", "current"])
def test_without_learning_gradients_are_shrunk_ones_of_bp(
    method: str, backward_weights: str
) -> None:
    stages, batches, beta = make_stages(3, norm=True), make_batches(6, last_size=4), 0.3
    options: dict[str, Any] = {"lr": 0.0, "beta": beta, "record_gradients": True}
    plain, expected = trained(stages, batches, method="bp", **options)
    copies, result = trained(
        stages, batches, method=method, backward_weights=backward_weights, **options
    )
    assert torch.equal(flat(copies), flat(stages))
    assert result.losses == expected.losses
    for found, wanted in zip(result.gradients, expected.gradients, strict=True):
        for k in range(3):
            for g, h in zip(found[k], wanted[k], strict=True):
                assert g is not None
                assert h is not None
                assert h.abs().max() > 1e-16
                torch.testing.assert_close(g, beta ** (2 - k) * h, rtol=1e-9, atol=1e-15)
    assert all(torch.equal(a, b) for a, b in zip(buffers(copies), buffers(plain), strict=True))
    counters = [b.item() for b in buffers(copies) if b.dtype == torch.int64]
    assert counters == [6, 6, 6]


def loss_at(stages: Sequence[nn.Module], batch: tuple[Tensor, Tensor]) -> float:
    with torch.no_grad():
        return functional.cross_entropy(nn.Sequential(*stages)(batch[0]), batch[1]).item()


@pytest.mark.parametrize("method", ["fdg", "ddg"])
def test_stash_gradient_is_the_slope_at_the_mixed_weights(method: str) -> None:
    stages, batches, beta, number = make_stages(3), make_batches(7), 0.6, 5
    options: dict[str, Any] = {"method": method, "beta": beta, "lr": 0.3}
    _, result = trained(stages, batches, record_gradients=True, **options)
    versions = result.forward_versions[number]
    assert len(set(versions)) == 3
    # The pipeline drains, so training on the first n batches alone gives each stage's version n.
    mixed = [
        (trained(stages, batches[:n], **options)[0] if n else copy.deepcopy(stages))[k]
        for k, n in enumerate(versions)
    ]
    assert result.losses[number] == pytest.approx(loss_at(mixed, batches[number]), rel=1e-12)
    step = 1e-5
    for k, stage in enumerate(mixed):
        for parameter, gradient in zip(
            stage.parameters(), result.gradients[number][k], strict=True
        ):
            slope = torch.zeros_like(parameter)
            entries = parameter.data.view(-1)
            for i in range(entries.numel()):
                kept = entries[i].item()
                entries[i] = kept + step
                above = loss_at(mixed, batches[number])
                entries[i] = kept - step
                below = loss_at(mixed, batches[number])
                entries[i] = kept
                slope.view(-1)[i] = (above - below) / (2 * step)
            assert gradient is not None
            torch.testing.assert_close(gradient, beta ** (2 - k) * slope, rtol=1e-6, atol=1e-9)


def two_linears(second: float) -> nn.Module:
    """Return x -> second * (1 * x) without biases, in float64."""
    layers = [nn.Linear(1, 1, bias=False, dtype=torch.float64) for _ in range(2)]
    layers[0].weight.data.fill_(1.0)
    layers[1].weight.data.fill_(second)
    return nn.Sequential(*layers)


def test_current_mixes_stale_activations_with_newest_weights() -> None:
    # Stage 0 is x -> w2 (w1 x) with w = (1, 2), stage 1 passes on, the loss is the output, x = 1.
    # Batch 0: gradients (w2, w1 x) = (2, 1), so at lr 0.5 the weights become (0, 1.5).
    # Batch 1 was forwarded with the old weights: w1 x is still 1 under both rules, but w2 is 2
    # with the stashed and 1.5 with the newest weights.
    one = torch.ones(1, 1, dtype=torch.float64)
    found = {}
    for rule in ("stash", "current"):
        result = train(
            [two_linears(2.0), nn.Identity()],
            [(one, one)] * 2,
            loss_fn=lambda output, target: output.sum(),
            lr=0.5,
            momentum=0.0,
            weight_decay=0.0,
            beta=1.0,
            backward_weights=rule,
            record_gradients=True,
        )
        assert result.losses == [2.0, 2.0]
        found[rule] = [[g.item() for g in batch[0] if g is not None] for batch in result.gradients]
    assert found["stash"] == [[2.0, 1.0], [2.0, 1.0]]
    assert found["current"] == [[2.0, 1.0], [1.5, 1.0]]


@pytest.mark.parametrize(("method", "count"), [("fdg", 2), ("fdg", 3), ("ddg", 3)])
def test_current_differs_from_stash(method: str, count: int) -> None:
    stages, batches = make_stages(count), make_batches(6)
    stash, _ = trained(stages, batches, method=method, backward_weights="stash")
    current, _ = trained(stages, batches, method=method, backward_weights="current")
    assert not torch.allclose(flat(stash[:1]), flat(current[:1]), rtol=1e-6)


# The update


def test_beta_is_a_smaller_learning_rate_only_without_weight_decay() -> None:
    stages, batches, beta = make_stages(3), make_batches(8), 0.5
    for stage in stages[1:]:
        stage.requires_grad_(False)

    def distance(weight_decay: float) -> float:
        shrunk, _ = trained(stages, batches, lr=0.4, beta=beta, weight_decay=weight_decay)
        slower, _ = trained(stages, batches, lr=0.4 * beta**2, beta=1, weight_decay=weight_decay)
        return (flat(shrunk) - flat(slower)).abs().max().item()

    assert distance(0.0) < 1e-12
    assert distance(0.1) > 1e-3


@pytest.mark.parametrize("method", ["fdg", "ddg"])
@pytest.mark.parametrize("nesterov", [False, True])
def test_zero_gradients_decay_alike_for_each_beta(method: str, nesterov: bool) -> None:
    stages, batches = make_stages(3), make_batches(4)
    options: dict[str, Any] = {"weight_decay": 0.1, "nesterov": nesterov, "epochs": 2}
    results = [
        flat(trained(stages, batches, method=method, beta=beta, loss_fn=zero_loss, **options)[0])
        for beta in (0.0, 0.3, 1.0)
    ]
    weight, velocity = flat(stages), torch.zeros(())
    for _ in range(8):
        decay = 0.1 * weight
        velocity = 0.9 * velocity + decay
        weight = weight - 0.1 * (decay + 0.9 * velocity if nesterov else velocity)
    for result in results:
        assert torch.equal(result, results[0])
        torch.testing.assert_close(result, weight, rtol=1e-12, atol=0)


def test_learning_rate_belongs_to_the_batch() -> None:
    asked: list[int] = []

    def lr(number: int) -> float:
        asked.append(number)
        return 0.1 if number == 3 else 0.0

    stages, batches = make_stages(3), make_batches(5)
    copies, result = trained(
        stages, batches, lr=lr, momentum=0.0, weight_decay=0.0, record_gradients=True
    )
    assert asked == [0, 1, 2, 3, 4]
    for k in range(3):
        gradients = [g.reshape(-1) for g in result.gradients[3][k] if g is not None]
        moved = flat(stages[k : k + 1]) - 0.1 * torch.cat(gradients)
        torch.testing.assert_close(flat(copies[k : k + 1]), moved, rtol=1e-12, atol=1e-14)


def test_partial_last_batch_is_trained_with_its_own_mean() -> None:
    stages, batches = make_stages(3), make_batches(4, size=6, last_size=2)
    _, result = trained(stages, batches, lr=0.0, beta=0.5, record_gradients=True)
    x, y = batches[-1]
    assert x.shape == (2, 3)
    model = nn.Sequential(*stages)
    loss = functional.cross_entropy(model(x), y, reduction="sum") / 2
    assert result.losses[-1] == pytest.approx(loss.item(), rel=1e-12)
    for k, stage in enumerate(stages):
        wanted = torch.autograd.grad(loss, list(stage.parameters()), retain_graph=True)
        for gradient, g in zip(result.gradients[-1][k], wanted, strict=True):
            assert gradient is not None
            torch.testing.assert_close(gradient, 0.5 ** (2 - k) * g, rtol=1e-9, atol=1e-15)


# Parameters that do not move


@pytest.mark.parametrize("frozen", [0, 1, 2])
def test_frozen_stage_is_never_touched(frozen: int) -> None:
    stages, batches = make_stages(3), make_batches(6)
    stages[frozen].requires_grad_(False)
    copies, result = trained(stages, batches, weight_decay=0.1, record_gradients=True)
    for k, (before, after) in enumerate(zip(stages, copies, strict=True)):
        assert torch.equal(flat([before]), flat([after])) == (k == frozen)
    assert [len(grads) for grads in result.gradients[0]] == [
        0 if k == frozen else 4 for k in range(3)
    ]
    assert all(p.grad is None for stage in copies for p in stage.parameters())


def test_single_frozen_parameter_matches_sgd() -> None:
    stages, batches = make_stages(1), make_batches(4)
    next(stages[0].parameters()).requires_grad_(False)
    expected = copy.deepcopy(stages[0])
    sgd(expected, batches, momentum=0.9, weight_decay=0.01)
    copies, _ = trained(stages, batches, weight_decay=0.01)
    assert torch.equal(flat(copies), flat([expected]))
    assert torch.equal(next(copies[0].parameters()), next(stages[0].parameters()))


class Sometimes(nn.Module):
    """Uses ``small`` for batches of less than four samples only, and ``idle`` never."""

    def __init__(self) -> None:
        super().__init__()
        self.small = nn.Linear(3, 3, dtype=torch.float64)
        self.idle = nn.Linear(3, 3, dtype=torch.float64)
        self.out = nn.Linear(3, 4, dtype=torch.float64)

    def forward(self, x: Tensor) -> Tensor:
        output: Tensor = self.out(self.small(x) if len(x) < 4 else x)
        return output


def test_parameters_without_gradient_are_skipped_as_sgd_does() -> None:
    torch.manual_seed(3)
    stages: list[nn.Module] = [Sometimes()]
    batches = make_batches(3, last_size=2)
    expected = copy.deepcopy(stages[0])
    options: dict[str, Any] = {"momentum": 0.9, "weight_decay": 0.01, "epochs": 3}
    sgd(expected, batches, **options)
    copies, result = trained(stages, batches, record_gradients=True, **options)
    assert torch.equal(flat(copies), flat([expected]))
    present = [[g is not None for g in batch[0]] for batch in result.gradients]
    assert present[0] == [False, False, False, False, True, True]
    assert present[2] == [True, True, False, False, True, True]


def test_stage_whose_output_is_not_used_gets_no_gradient() -> None:
    class Ignore(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(4, dtype=torch.float64))

        def forward(self, x: Tensor) -> Tensor:
            return self.weight.expand(len(x), 4)

    stages: list[nn.Module] = [make_stages(1)[0], Ignore()]
    copies, result = trained(stages, make_batches(3), record_gradients=True)
    assert torch.equal(flat(copies[:1]), flat(stages[:1]))
    assert not torch.equal(flat(copies[1:]), flat(stages[1:]))
    assert result.gradients[1][0] == [None] * 4


# What is left alone, and what is refused


def test_in_place_layers_evaluation_mode_and_inputs_are_respected() -> None:
    stages = make_stages(2, norm=True)
    stages = [nn.Sequential(nn.ReLU(inplace=True), stage).eval() for stage in stages]
    batches = make_batches(3)
    inputs = [x.clone() for x, _ in batches]
    copies, result = trained(stages, batches)
    assert result.gradients == []
    assert all(torch.equal(x, kept) for (x, _), kept in zip(batches, inputs, strict=True))
    assert not any(module.training for stage in copies for module in stage.modules())
    assert all(torch.equal(a, b) for a, b in zip(buffers(copies), buffers(stages), strict=True))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "gpipe"}, "method must be one of"),
        ({"backward_weights": "old"}, "backward_weights must be one of"),
        ({"epochs": 0}, "epochs"),
        ({"lr": -0.1}, "lr"),
        ({"lr": lambda number: math.nan}, "batch 0"),
        ({"momentum": -1.0}, "momentum"),
        ({"weight_decay": -1.0}, "weight_decay"),
        ({"beta": 1.5}, "beta"),
        ({"nesterov": True, "momentum": 0.0}, "nesterov"),
        ({"loss_fn": lambda output, target: output.detach().sum()}, "does not depend"),
    ],
)
def test_bad_options_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        train(make_stages(2), make_batches(2), **options)


def test_bad_stages_and_batches_are_refused() -> None:
    stages, batches = make_stages(2), make_batches(2)
    with pytest.raises(ValueError, match="stages is empty"):
        train([], batches)
    with pytest.raises(ValueError, match="batches must be"):
        train(stages, [])
    with pytest.raises(ValueError, match="nothing to train"):
        train([nn.Identity()], batches)
    with pytest.raises(ValueError, match="share the tensor"):
        train([stages[0], stages[1], stages[1]], batches)
    with pytest.raises(TypeError, match="batch 1"):
        train(stages, [batches[0], batches[1][0]])  # type: ignore[list-item]
    with pytest.raises(TypeError, match="stage 1"):
        train([stages[0], len], batches)  # type: ignore[list-item]
    with pytest.raises(TypeError, match="one element"):
        train(stages, batches, loss_fn=lambda output, target: output)
