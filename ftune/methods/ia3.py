"""Ia3: skeleton."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field

from ftune.methods.base import Method

__all__ = ["Ia3"]


class Ia3(Method):
    """Skeleton."""

    paper: ClassVar[str] = "arXiv:2205.05638"
    summary: ClassVar[str] = "-"
    formula: ClassVar[str] = "-"
    typical_share: ClassVar[str] = "-"
    choose: ClassVar[str] = "-"
    avoid: ClassVar[str] = "-"
    cost: ClassVar[str] = "-"
    composes: ClassVar[str] = "-"

    name: Literal["ia3"] = Field("ia3", description="-")
