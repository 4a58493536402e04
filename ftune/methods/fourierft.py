"""FourierFt: skeleton."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field

from ftune.methods.base import Method

__all__ = ["FourierFt"]


class FourierFt(Method):
    """Skeleton."""

    paper: ClassVar[str] = "arXiv:2405.03003"
    summary: ClassVar[str] = "-"
    formula: ClassVar[str] = "-"
    typical_share: ClassVar[str] = "-"
    choose: ClassVar[str] = "-"
    avoid: ClassVar[str] = "-"
    cost: ClassVar[str] = "-"
    composes: ClassVar[str] = "-"

    name: Literal["fourierft"] = Field("fourierft", description="-")
