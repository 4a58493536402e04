"""Prefix: skeleton."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field

from ftune.methods.base import Method

__all__ = ["Prefix"]


class Prefix(Method):
    """Skeleton."""

    paper: ClassVar[str] = "arXiv:2101.00190"
    summary: ClassVar[str] = "-"
    formula: ClassVar[str] = "-"
    typical_share: ClassVar[str] = "-"
    choose: ClassVar[str] = "-"
    avoid: ClassVar[str] = "-"
    cost: ClassVar[str] = "-"
    composes: ClassVar[str] = "-"

    name: Literal["prefix"] = Field("prefix", description="-")
