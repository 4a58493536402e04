"""How results show themselves: as the command line's text, in a terminal and in a notebook."""

from __future__ import annotations

import html

__all__ = ["Shown"]


class Shown:
    """A result whose ``repr`` is the text that the command prints of it."""

    def __str__(self) -> str:
        raise NotImplementedError

    def __repr__(self) -> str:
        return f"<{type(self).__name__}>\n{self}"

    def _repr_html_(self) -> str:
        """The same in a notebook, in a font of one width."""
        return f"<pre>{html.escape(str(self))}</pre>"
