"""Every fine-tuning method at a glance.

``AnyMethod`` is the registry: a union discriminated by ``name``. To add a method, write its file and add its
class to the union.
"""

from __future__ import annotations

from typing import Annotated, get_args

from pydantic import Field

from ftune.methods.adalora import AdaLora
from ftune.methods.base import Method
from ftune.methods.bottleneck import Bottleneck
from ftune.methods.dora import Dora
from ftune.methods.fourierft import FourierFt
from ftune.methods.full import Full
from ftune.methods.galore import GaLore
from ftune.methods.ia3 import Ia3
from ftune.methods.longlora import LongLora
from ftune.methods.lora import Lora
from ftune.methods.optimizer import OptimizerSpec
from ftune.methods.prefix import Prefix
from ftune.methods.prompt import Prompt
from ftune.methods.qlora import QLora
from ftune.methods.types import Context, Linear, ModelShape, Problem
from ftune.methods.vera import Vera

__all__ = [
    "METHODS",
    "AnyMethod",
    "Context",
    "Linear",
    "Method",
    "ModelShape",
    "OptimizerSpec",
    "Problem",
]

AnyMethod = Annotated[
    Full | Lora | QLora | Dora | AdaLora | Ia3 | Vera | FourierFt | LongLora | GaLore | Prefix | Prompt | Bottleneck,
    Field(discriminator="name"),
]

METHODS: dict[str, type[Method]] = {cls.model_fields["name"].default: cls for cls in get_args(get_args(AnyMethod)[0])}
"""Method name to class, in the order of the union."""
