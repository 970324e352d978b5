"""torch.compile on the networks: whole graphs, and no new one for every update."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from misc.crf.energy import DenseOptions, dense_energy
from net import registry
from net.shared.aream import pseudo_labels
from scripts.measured_networks import build, loss_terms, make_batch, tasks

registry.load_methods()


class Graphs(list[torch.fx.GraphModule]):
    """A backend of torch.compile that keeps the graphs and runs them as they are."""

    def __call__(self, graph: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> Callable:
        self.append(graph)
        return graph.forward


@pytest.mark.slow
@pytest.mark.parametrize("name", ["irn_cam", "mctformer", "deeplabv2"])
def test_progress_costs_one_graph_more(name: str) -> None:
    """The first number is compiled as a constant, the second as a variable."""
    task = next(task for task in tasks("sample") if task.name == name)
    network, batch = build(task, torch.device("cpu")), make_batch(task, 2, torch.device("cpu"))
    graphs = Graphs()
    torch.compiler.reset()
    model = torch.compile(network.eval(), backend=graphs, fullgraph=True)
    plain = loss_terms(network, network, batch, 0.9)
    for progress in (0.1, 0.2, 0.3, 0.4, 0.9):
        terms = loss_terms(network, model, batch, progress)
    torch.compiler.reset()
    assert 1 <= len(graphs) <= 2
    torch.testing.assert_close(terms, plain)


def test_the_lattice_of_the_dense_energy_is_left_out() -> None:
    """Its sizes depend on the picture; what is around it is compiled."""
    torch.manual_seed(0)
    logits = torch.randn(2, 3, 12, 16, requires_grad=True)
    rest = torch.zeros(2, 12, 16, dtype=torch.int64), 255 * torch.rand(2, 3, 12, 16), torch.ones(2, 12, 16).bool()
    graphs = Graphs()
    torch.compiler.reset()
    results = []
    for form in (dense_energy, torch.compile(dense_energy, backend=graphs)):
        energy = form(logits, *rest, DenseOptions())
        results.append((energy.detach(), *torch.autograd.grad(energy, logits)))
    torch.compiler.reset()
    torch.testing.assert_close(results[0], results[1])
    assert len(graphs) == 2  # before and after
    assert not any("sort" in str(node.target) for graph in graphs for node in graph.graph.nodes)


def test_labels_of_aream_are_left_out() -> None:
    """They have as many planes as an image has classes: PyTorch failed on that number, with a page of messages."""
    torch.manual_seed(0)
    images, cams, tags = torch.rand(2, 3, 16, 16), torch.rand(2, 4, 16, 16), torch.tensor([[1, 0, 1, 0], [0, 0, 0, 1]])
    graphs = Graphs()
    def label(maps: torch.Tensor) -> torch.Tensor:
        return pseudo_labels(images, maps.square(), tags, (0.3, 0.7)) + 1

    torch.compiler.reset()
    plain, compiled = label(cams), torch.compile(label, backend=graphs)(cams)
    torch.compiler.reset()
    assert torch.equal(plain, compiled)
    assert len(graphs) == 2  # before and after
