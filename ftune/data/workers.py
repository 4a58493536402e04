"""Encoding in this process, in several where that pays, and a sign of life where it takes long."""

from __future__ import annotations

import contextlib
import os
import pickle
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, TextIO

from ftune.data.encode import Encoder
from ftune.data.encoded import Part
from ftune.data.formats import Plain, Record
from ftune.errors import FtuneError

__all__ = ["encode_all"]

# records encoded in one call: enough to keep the tokenizer busy, few enough that their offsets stay small
CHUNK = 256
# and so much text: what becomes of it takes about 160 times its memory (see ``huge``)
CHUNK_CHARACTERS = 2_000_000
# what is left, in seconds of one process, from which on others are started; each needs about two until it works
WORTH_SECONDS = 8.0
# nothing is said about less work than this, nor more often than this where the stream is no terminal
SILENT_SECONDS = 2.0
PLAIN_SECONDS = 10.0
WORKER = "from ftune.data.workers import work; work()"


def encode_all(encoder: Encoder, records: Sequence[Record]) -> Iterator[Part]:
    """What every chunk of the records becomes, in order, whoever encodes it.

    Begins in this process. Once it is clear from its speed that much is left, and there are processors for it,
    the rest goes to processes of their own. Raises what the encoder raises, for the first record that does.
    """
    chunks = list(_chunks(records))
    progress = _Progress(len(records), sys.stderr)
    began = time.monotonic()
    with contextlib.closing(progress):
        for done, chunk in enumerate(chunks, 1):
            yield encoder.encode(chunk)
            progress.advance(len(chunk))
            left = (time.monotonic() - began) / done * (len(chunks) - done)
            if left > WORTH_SECONDS and _processes() > 1:
                rest = chunks[done:]
                for chunk, part in zip(rest, _elsewhere(encoder, rest), strict=True):
                    yield part
                    progress.advance(len(chunk))
                return


def _chunks(records: Sequence[Record]) -> Iterator[Sequence[Record]]:
    """The records in order, so many at a time that what becomes of them fits into memory."""
    start = characters = 0
    for end, record in enumerate(records):
        size = _characters(record)
        if end > start and (end - start == CHUNK or characters + size > CHUNK_CHARACTERS):
            yield records[start:end]
            start, characters = end, 0
        characters += size
    if start < len(records):
        yield records[start:]


def _characters(record: Record) -> int:
    if isinstance(record, Plain):
        return len(record.prompt) + len(record.completion)
    return sum(len(message["content"]) for message in record.messages if isinstance(message.get("content"), str))


def _processes() -> int:
    """Processes to encode in: this one's share of the processors."""
    with contextlib.suppress(AttributeError, ValueError):  # no sched_getaffinity outside Linux
        return len(os.sched_getaffinity(0)) // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    return os.cpu_count() or 1


# --- other processes ---


def _elsewhere(encoder: Encoder, chunks: Sequence[Sequence[Record]]) -> Iterator[Part]:
    """The parts in order, each from whichever process was free.

    Not by multiprocessing: fork is unsafe beside the threads of torch and of tokenizers, and spawn runs the
    main module again, which a caller may not have written for that. These processes end with their input.
    """
    count = min(_processes(), len(chunks))
    idle: deque[subprocess.Popen[bytes]] = deque()
    running: list[subprocess.Popen[bytes]] = []
    lock = threading.Lock()
    start = pickle.dumps(encoder)

    def encoded(chunk: Sequence[Record]) -> Part:
        with lock:
            worker = idle.pop() if idle else None
        if worker is None:
            worker = _started(start)
            with lock:
                running.append(worker)
        try:
            part: Part = _ask(worker, chunk)
        finally:
            idle.append(worker)
        return part

    pool = ThreadPoolExecutor(count)
    try:
        waiting: deque[Future[Part]] = deque()
        for chunk in chunks:
            waiting.append(pool.submit(encoded, chunk))
            # the parts ahead of a slow one wait in memory: not all of them
            if len(waiting) > 4 * count:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
        with lock:
            for worker in running:
                worker.kill()
        pool.shutdown()
        for worker in running:
            worker.communicate()


def _started(encoder: bytes) -> subprocess.Popen[bytes]:
    # what this process can import, the other must find too
    path = os.pathsep.join(entry or os.curdir for entry in sys.path)
    worker = subprocess.Popen(
        [sys.executable, "-c", WORKER],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": path, "TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": "1"},
    )
    assert worker.stdin is not None
    with contextlib.suppress(BrokenPipeError):  # told by what it answers, or does not
        worker.stdin.write(encoder)
        worker.stdin.flush()
    return worker


def _ask(worker: subprocess.Popen[bytes], chunk: Sequence[Record]) -> Any:
    """The answer of a process to a chunk; what it raised is raised here."""
    assert worker.stdin is not None
    assert worker.stdout is not None
    try:
        pickle.dump(chunk, worker.stdin)
        worker.stdin.flush()
        answer = pickle.load(worker.stdout)
    except (EOFError, OSError, pickle.UnpicklingError) as error:
        raise FtuneError(
            f"a process that tokenizes ended early (exit code {worker.wait()})", help="memory may have run out"
        ) from error
    if isinstance(answer, Exception):
        raise answer
    return answer


def work() -> None:
    """The other process: reads an encoder and chunks from standard input until that ends."""
    # a Ctrl-C goes to all processes of a terminal, and the one that asks answers it
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # whatever prints must not end up among the answers
    import logging

    logging.getLogger("transformers").setLevel(logging.ERROR)
    encoder: Encoder = pickle.load(sys.stdin.buffer)
    while True:
        try:
            chunk = pickle.load(sys.stdin.buffer)
        except EOFError:
            return
        try:
            answer: Any = encoder.encode(chunk)
        except Exception as error:
            answer = error
        pickle.dump(answer, answers)
        answers.flush()


# --- progress ---


class _Progress:
    """How far the tokenizing is: one live line in a terminal, now and then a line elsewhere."""

    def __init__(self, total: int, stream: TextIO) -> None:
        self._total = total
        self._stream = stream
        self._live = stream.isatty()
        self._done = 0
        self._began = self._printed = time.monotonic()
        self._drawn = False

    def advance(self, count: int) -> None:
        """Count rows, and show them if it is time to."""
        self._done += count
        now = time.monotonic()
        if now - self._began < SILENT_SECONDS or os.environ.get("RANK", "0") != "0":
            return
        text = f"tokenizing: {self._done:,} of {self._total:,} rows ({self._done / self._total:.0%})"
        with contextlib.suppress(BrokenPipeError):  # a reader that has gone away stops nothing
            if self._live:
                self._stream.write(f"\r\x1b[2K{text}")
                self._drawn = True
            elif now - self._printed >= PLAIN_SECONDS:
                self._stream.write(f"{text}\n")
                self._printed = now
            self._stream.flush()

    def close(self) -> None:
        """Take the live line away."""
        if self._drawn:
            with contextlib.suppress(BrokenPipeError):
                self._stream.write("\r\x1b[2K")
                self._stream.flush()
