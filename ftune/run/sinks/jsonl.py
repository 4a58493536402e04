"""``metrics.jsonl``: one event a line."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any

from ftune.regular import open_regular
from ftune.run.events import Event
from ftune.run.files import write_text
from ftune.scrub import scrub_data

__all__ = ["JsonlSink", "read_events", "truncate_after"]

MAX_LINE_BYTES = 1_000_000
"""No event is as long; a longer line is read as several, which are none."""


class JsonlSink:
    """Append each event as one JSON object, written at once so that a killed run keeps its lines."""

    def __init__(self, path: Path) -> None:
        descriptor = open_regular(path, flags=os.O_WRONLY | os.O_APPEND | os.O_CREAT)
        self._file = os.fdopen(descriptor, "ab", buffering=0)
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
    """The events in a file, without lines that are none (a torn one, say); none when there is no file.

    Raises:
        OSError: It is no regular file, or cannot be read.
    """
    try:
        descriptor = open_regular(path)
    except FileNotFoundError:
        return []
    events = []
    with os.fdopen(descriptor, "rb") as file:
        while line := file.readline(MAX_LINE_BYTES):
            try:
                event = json.loads(line)
            except (ValueError, RecursionError):
                continue
            # a torn line may be a whole number
            if isinstance(event, dict) and isinstance(event.get("event"), str) and isinstance(event.get("step"), int):
                events.append(event)
    return events


def truncate_after(path: Path, step: int) -> None:
    """Drop the events after ``step``, and a torn last line: a resumed run makes those steps again."""
    if os.path.lexists(path):
        kept = [event for event in read_events(path) if event["step"] <= step and event["event"] != "end"]
        write_text(path, "".join(json.dumps(event, ensure_ascii=False) + "\n" for event in kept))
