"""How fast a step could be at best: by its FLOPs, by the memory it reads, by what it sends."""

from collections.abc import Iterable
from dataclasses import dataclass

from jaxllm.plan.hardware import Chip
from jaxllm.plan.hlo import Collective

ASSUMPTIONS = (
    "matrix products at the peak of the data sheet",
    "weights, optimizer, gradients and cache through memory, activations not at all",
    "rings over all links of a chip at once",
    "the bound overlaps all three; the sum overlaps nothing",
)


@dataclass(frozen=True)
class Roofline:
    """Seconds of one execution on each device."""

    compute: float
    memory: float
    network: float

    @property
    def bound(self) -> float:
        """At least: all three at the same time."""
        return max(self.compute, self.memory, self.network)

    @property
    def sum(self) -> float:
        """One after the other."""
        return self.compute + self.memory + self.network

    @property
    def limit(self) -> str:
        """What the bound is made of."""
        return max(("compute", "memory", "network"), key=lambda name: getattr(self, name))


def roofline(chip: Chip, flops: float, memory_bytes: float, collectives: Iterable[Collective]) -> Roofline:
    """For FLOPs and bytes of each device."""
    sent = sum(map(ring_bytes, collectives))
    return Roofline(flops / chip.flops, memory_bytes / chip.memory_bandwidth, sent / chip.network)


def ring_bytes(collective: Collective) -> float:
    """What each device receives where the arrays go round a ring of the devices."""
    op, n = collective.op, collective.devices
    if op in ("collective-permute", "collective-broadcast"):
        return collective.bytes
    return collective.bytes * (n - 1) / n * (2 if op == "all-reduce" else 1)
