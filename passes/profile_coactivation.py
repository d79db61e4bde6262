"""profile-coactivation: the graph of experts that fire together, and how their errors correlate."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import networkx
from tvm import IRModule

from moqc.calibrate.coactivation import Coactivation, measure_coactivation
from moqc.ir.annotations import COACTIVATION, Key
from moqc.passes.base import Pass, PassContext
from moqc.quant.formats import Format


@dataclass(frozen=True)
class ProfileCoactivation(Pass):
    """Find communities and central experts in the graph of co-activation, and correlations of errors.

    The weight of an edge is the lift: tokens that chose both experts, over those expected if they were chosen
    independently. Writes COACTIVATION: ``{site: {"communities": [[expert]], "centrality_ppm": [int] * E,
    "cross_ppm": int, "pairs": [[expert, expert, tokens, correlation_ppm]]}}``: Louvain communities, largest
    first; eigenvector centrality, by how often experts fire together; the inner products of the errors of
    different experts of a token over their squared norms, in parts per million; the `pairs` pairs that fire
    together most, with the correlation of their errors. Errors are those of rounding to `probe`; with "none"
    only the graph is measured, and what is said of errors is 0.
    """

    name: ClassVar[str] = "profile-coactivation"
    writes: ClassVar[tuple[Key[Any], ...]] = (COACTIVATION,)
    probe: str = "int2-g64"
    tokens: int = 4096
    pairs: int = 16

    def run(self, mod: IRModule, ctx: PassContext) -> IRModule:
        """Needs a checkpoint, calibration text and a workspace."""
        found = measure_coactivation(
            ctx.need("checkpoint", self.name),
            ctx.need("calibration", self.name),
            ctx.need("workspace", self.name),
            probe=None if self.probe == "none" else Format.parse(self.probe),
            tokens=self.tokens,
        )
        return COACTIVATION.put(
            mod, {site: summary(one, self.pairs, ctx.seed) for site, one in found.items()}
        )


def summary(measured: Coactivation, pairs: int, seed: int) -> dict[str, Any]:
    """The annotation of one site."""
    counts, experts = measured.together.double(), measured.together.shape[0]
    tokens = counts.diagonal()
    total = max(float(tokens.sum()), 1.0)
    lift = counts * total / (tokens.unsqueeze(0) * tokens.unsqueeze(1)).clamp(min=1)
    by_lift, by_count = networkx.Graph(), networkx.Graph()
    for graph in (by_lift, by_count):
        graph.add_nodes_from(range(experts))
    edges = [(i, j) for i in range(experts) for j in range(i) if counts[i, j] > 0]
    by_lift.add_weighted_edges_from((i, j, float(lift[i, j])) for i, j in edges)
    by_count.add_weighted_edges_from((i, j, float(counts[i, j])) for i, j in edges)
    communities = networkx.community.louvain_communities(by_lift, weight="weight", seed=seed)
    correlation = measured.correlation
    strongest = sorted(edges, key=lambda edge: -int(counts[edge]))[:pairs]
    return {
        "communities": sorted(
            (sorted(group) for group in communities), key=lambda group: (-len(group), group)
        ),
        "centrality_ppm": _centrality(by_count, experts),
        "cross_ppm": round(measured.cross_share * 1e6),
        "pairs": [[j, i, int(counts[i, j]), round(float(correlation[i, j]) * 1e6)] for i, j in strongest],
    }


def _centrality(graph: networkx.Graph[int], experts: int) -> list[int]:
    """Eigenvector centrality in parts per million; zeros where nobody fires together."""
    if graph.number_of_edges() == 0:
        return [0] * experts
    found = (
        networkx.eigenvector_centrality_numpy(graph, weight="weight") if networkx.is_connected(graph) else {}
    )
    if not found:  # several components: the degree says as much
        found = dict(graph.degree(weight="weight"))
        total = sum(found.values())
        found = {node: value / total for node, value in found.items()}
    return [round(abs(float(found[node])) * 1e6) for node in range(experts)]
