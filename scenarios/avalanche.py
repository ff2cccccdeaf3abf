"""Any classification benchmark of Avalanche's."""

from __future__ import annotations

from dataclasses import dataclass

from clbench.avalanche import AvalancheClasses, AvalancheDomains


@dataclass(kw_only=True)
class Benchmark(AvalancheClasses):
    """A benchmark of Avalanche's with new classes in every experience.

    Source: the user's choice; where Avalanche's loader for `benchmark` gets it.
    Licence: that of the dataset; Avalanche's is MIT.
    Sizes: those of the dataset.
    Splits: TUNE gets `tuning_fraction` of each class's training samples, a fifth of which it tests
    on; EVALUATE the other training samples and the whole test stream. The content of a sample
    decides; samples that are alike are always in one split.
    """


@dataclass(kw_only=True)
class DomainBenchmark(AvalancheDomains):
    """A benchmark of Avalanche's whose classes come again, such as PermutedMNIST.

    Source: the user's choice; where Avalanche's loader for `benchmark` gets it.
    Licence: that of the dataset; Avalanche's is MIT.
    Sizes: those of the dataset.
    Splits: as of `Benchmark`.
    """
