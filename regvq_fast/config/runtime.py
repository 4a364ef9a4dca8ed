"""Runtime settings, each defined once; a command's settings inherit those that it needs.

With several base classes, the fields of the last one come first in the help.
"""

from dataclasses import dataclass
from typing import Annotated

from tyro.conf import arg

from regvq_fast.settings import Section, check_at_least


@dataclass(frozen=True, kw_only=True)
class DeviceConfig(Section):
    """Device and precision."""

    device: str = "auto"
    """auto (a GPU if any), cpu, cuda or cuda:N."""
    amp: bool = False
    """Mixed precision: bf16, fp16 on older GPUs."""


@dataclass(frozen=True, kw_only=True)
class CompileConfig(Section):
    """Compilation."""

    compile: bool = False
    """Compile the networks with torch.compile."""


@dataclass(frozen=True, kw_only=True)
class SeedConfig(Section):
    """Randomness."""

    seed: int = 0
    """Seed of everything random."""

    def check(self) -> None:
        super().check()
        if not -(2**63) <= self.seed < 2**63:
            raise ValueError(f"--seed must be an integer of 64 bits, got {self.seed}")


@dataclass(frozen=True, kw_only=True)
class LoadingConfig(Section):
    """Data loading."""

    workers: Annotated[int | None, arg(metavar="INT")] = None
    """Loader processes per rank. Default: half its cores, up to 8; 0 with two cores or a token cache."""

    def check(self) -> None:
        super().check()
        check_at_least(0, {"--workers": self.workers or 0})
