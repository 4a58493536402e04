"""A command that trains goes on when nobody reads what it prints."""

from __future__ import annotations

import subprocess
import sys

TALK = """
import os, sys
from ftune.streams import outlive_reader
with outlive_reader():
    sys.stdin.readline()  # until the reader has gone
    for n in range(5):
        print("x" * 10000, flush=True)
        print("y" * 10000, file=sys.stderr)
    os.write(1, b"a library's own line")
    with open(sys.argv[1], "w") as file:
        file.write("trained")
"""


def test_a_reader_that_leaves_ends_nothing(tmp_path) -> None:
    done = tmp_path / "done"
    process = subprocess.Popen(
        [sys.executable, "-c", TALK, str(done)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdin is not None
    for stream in (process.stdout, process.stderr):
        assert stream is not None
        stream.close()
    process.stdin.write("gone\n")
    process.stdin.close()
    assert process.wait(30) == 0
    assert done.read_text() == "trained"
