"""Which products cost a precision its agreement with fp32: halves of halves, as far as they are to blame."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from typing import TYPE_CHECKING

from mt3_export.lab.forcing import Forcing, states_of
from mt3_export.lab.logits import open_backend
from mt3_export.lab.results import Bisection, Suspect
from mt3_export.lab.variants import changed_products, write_variant
from mt3_runtime.errors import OptionError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence
    from pathlib import Path

    from mt3_export.lab.forcing import Agreement, States
    from mt3_export.lab.material import ForcedRow, Material
    from mt3_export.lab.variants import Variant
    from mt3_runtime.bundle import Bundle

    Product = tuple[str, str]  # graph and layer

SHARE = 0.02  # of the cost of all: halves that cost less are not looked into
LEFT = 0.25  # of the cost of all may be left when a plan is followed
NOTHING = 1e-7  # nats: what rounding alone makes of two float32 graphs that are the same
HARMLESS = 1e-4  # nats: for less, no product is worth to be kept in fp32


@dataclass(frozen=True, slots=True)
class Cost:
    """What some products in a lower precision cost; steps without finite logits weigh more than any KL."""

    non_finite: int
    kl: float
    agreement: float

    @property
    def weight(self) -> tuple[int, float]:
        """For comparisons."""
        return self.non_finite, self.kl


class Trial:
    """Runs a model with some products in a lower precision, and says what that costs. Results are kept."""

    def __init__(self, bundle: Bundle, variant: Variant, material: Material, work: Path, threads: int) -> None:
        self.bundle, self.variant, self.work, self.threads = bundle, variant, work, threads
        self.products = changed_products(bundle, variant)
        if not self.products:
            raise OptionError(f"{variant.name} changes no product of {bundle.path}: nothing is to be bisected")
        if not material.rows:
            raise OptionError("fp32 decoded no row of the audio to its end: give audio with music in it")
        self.length = len(material.rows[0].inputs)
        self.forcing = Forcing(open_backend(bundle, "fp32", self.length, threads), material, keep=True)
        self.runs = 0
        self._costs: dict[frozenset[Product], Cost] = {}
        self._states: dict[tuple[frozenset[Product], int], States] = {}

    def cost(self, lowered: Iterable[Product]) -> Cost:
        """What it costs when these products are in the lower precision, and no other."""
        chosen = frozenset(lowered)
        if chosen not in self._costs:
            self._costs[chosen] = self._measure(chosen)
        return self._costs[chosen]

    def _measure(self, lowered: frozenset[Product]) -> Cost:
        self.runs += 1
        keep = {
            graph: {layer for other, layer in self.products if other == graph and (graph, layer) not in lowered}
            for graph, _ in self.products
        }
        shutil.rmtree(self.work, ignore_errors=True)
        self.work.parent.mkdir(parents=True, exist_ok=True)
        made = write_variant(self.bundle, self.variant, self.work, keep)
        label = "fp32" if self.variant.is_half else self.variant.precision
        backend = open_backend(made, label, self.length, self.threads)
        shutil.rmtree(self.work)
        encoder = frozenset(product for product in lowered if product[0] == "encoder")

        def states(number: int, group: Sequence[ForcedRow]) -> States:
            if (encoder, number) not in self._states:
                self._forget_others(encoder)
                self._states[encoder, number] = states_of(backend, self.forcing.material, group)
            return self._states[encoder, number]

        found: Agreement = self.forcing.run(backend, states)
        return Cost(found.non_finite, found.mean_kl, found.share)

    def _forget_others(self, encoder: frozenset[Product]) -> None:
        """Keep states of this encoder, and of the one that is all fp32, which most trials share."""
        for key in [key for key in self._states if key[0] not in (encoder, frozenset())]:
            del self._states[key]


def bisect(trial: Trial, say: Callable[[str], None]) -> list[tuple[Product, Cost]]:
    """Single out the products that cost most, worst first: before all others those without which nothing is finite.

    Each graph, and every half of it that costs a share of what all products cost, is halved again. Products whose cost
    shows only together with others are left unnamed, which `plan_for` notices.
    """
    say(f"all {len(trial.products)} products in {trial.variant.name}: {_words(trial.cost(trial.products))}")
    broken: list[tuple[Product, Cost]] = []
    if trial.cost(trial.products).non_finite:
        broken = _halve(trial, trial.products, lambda cost: cost.non_finite > 0, say)
    rest = _without(trial, broken)
    base = trial.cost(rest)
    return broken + _halve(trial, rest, lambda cost: cost.kl > max(SHARE * base.kl, NOTHING), say)


def _without(trial: Trial, suspects: Sequence[tuple[Product, Cost]]) -> list[Product]:
    spared = {product for product, _ in suspects}
    return [product for product in trial.products if product not in spared]


def _halve(
    trial: Trial, products: Sequence[Product], is_to_blame: Callable[[Cost], bool], say: Callable[[str], None]
) -> list[tuple[Product, Cost]]:
    """Single products that are to blame, worst first, by halves of graphs of which that is true."""
    graphs = dict.fromkeys(graph for graph, _ in products)
    groups = [[product for product in products if product[0] == graph] for graph in graphs]
    found: list[tuple[Product, Cost]] = []
    while groups:
        group = groups.pop(0)
        cost = trial.cost(group)
        if not is_to_blame(cost):
            continue
        if len(group) == 1:
            found.append((group[0], cost))
            say(f"{' '.join(group[0])}: {_words(cost)}")
        else:
            middle = len(group) // 2
            groups[:0] = [group[:middle], group[middle:]]
    return sorted(found, key=lambda pair: pair[1].weight, reverse=True)


def plan_for(trial: Trial, suspects: Sequence[tuple[Product, Cost]]) -> tuple[list[Product], Cost]:
    """The fewest suspects, worst first, with which in fp32 little is lost; all of them if that is not enough.

    Little: every step is finite, and a quarter of the cost is left, theirs who make it infinite aside, or less than
    does harm.
    """
    broken = [pair for pair in suspects if pair[1].non_finite]
    base = trial.cost(_without(trial, broken))

    def kept(count: int) -> Cost:
        return trial.cost(_without(trial, suspects[:count]))

    def is_enough(cost: Cost) -> bool:
        return not cost.non_finite and cost.kl <= max(LEFT * base.kl, HARMLESS)

    low, high = len(broken), len(suspects)
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if is_enough(kept(middle)) else (middle + 1, high)
    return [product for product, _ in suspects[:low]], kept(low)


def bisect_precision(trial: Trial, say: Callable[[str], None]) -> Bisection:
    """Name the worst products of a precision, and choose those to keep in fp32."""
    suspects = bisect(trial, say)
    kept, left = plan_for(trial, suspects)
    whole = trial.cost(trial.products)
    base = trial.cost(_without(trial, [pair for pair in suspects if pair[1].non_finite]))
    say(f"{len(kept)} of {len(trial.products)} products kept in fp32: {_words(left)}")
    by_graph: dict[str, tuple[str, ...]] = {}
    for graph, layer in trial.products:
        if (graph, layer) in kept:
            by_graph[graph] = (*by_graph.get(graph, ()), layer)
    return Bisection(
        precision=trial.variant.name,
        cost_all=whole.kl,
        agreement_all=whole.agreement,
        suspects=tuple(
            Suspect(graph, layer, cost.kl, cost.kl / base.kl if base.kl else 0.0, cost.non_finite)
            for (graph, layer), cost in suspects
        ),
        kept=by_graph,
        cost_kept=left.kl,
        agreement_kept=left.agreement,
        runs=trial.runs,
        plan="",
    )


def _words(cost: Cost) -> str:
    broken = f", {cost.non_finite} steps without finite logits" if cost.non_finite else ""
    return f"KL {cost.kl:.2e} nats, {cost.agreement:.2%} of tokens agree{broken}"
