"""``metrics.jsonl``: one event a line."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from ftune.run.events import Event
from ftune.run.files import write_text
from ftune.scrub import scrub_data

__all__ = ["JsonlSink", "read_events", "truncate_after"]


class JsonlSink:
    """Append each event as one JSON object, written at once so that a killed run keeps its lines."""

    def __init__(self, path: Path) -> None:
        self._file = path.open("ab", buffering=0)
        self._torn = False

    def receive(self, event: Event) -> None:
        """Write one line.

        Raises:
            OSError: It could not be written, or not to its end; the next one begins a line of its own.
        """
        # JSON knows no NaN or infinity.
        data = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in event.as_dict().items()}
        line = (json.dumps(scrub_data(data), ensure_ascii=False) + "\n").encode()
        if self._torn:
            line = b"\n" + line
        self._torn, begun = True, 0
        while begun < len(line):  # a disk that fills up takes a part without an error
            begun += self._file.write(line[begun:])
        self._torn = False

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def read_events(path: Path) -> list[dict[str, Any]]:
    """The events in a file, without a torn last line; none when there is no file."""
    events = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else []:
        try:
            event = json.loads(line)
        except ValueError:
            continue
        if isinstance(event, dict):  # a torn line may be a whole number
            events.append(event)
    return events


def truncate_after(path: Path, step: int) -> None:
    """Drop the events after ``step``, and a torn last line: a resumed run makes those steps again."""
    if path.is_file():
        kept = [event for event in read_events(path) if event.get("step", 0) <= step and event.get("event") != "end"]
        write_text(path, "".join(json.dumps(event, ensure_ascii=False) + "\n" for event in kept))
