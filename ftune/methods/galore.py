"""GaLore: skeleton."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field

from ftune.methods.base import Method

__all__ = ["GaLore"]


class GaLore(Method):
    """Skeleton."""

    paper: ClassVar[str] = "arXiv:2403.03507"
    summary: ClassVar[str] = "-"
    formula: ClassVar[str] = "-"
    typical_share: ClassVar[str] = "-"
    choose: ClassVar[str] = "-"
    avoid: ClassVar[str] = "-"
    cost: ClassVar[str] = "-"
    composes: ClassVar[str] = "-"

    name: Literal["galore"] = Field("galore", description="-")
