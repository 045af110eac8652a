"""The child process of a Feeder: requests as JSON lines on stdin, events on stdout. Imports no torch and no MPI.

The first line is the configuration, every further one a document. Ends when stdin ends or its parent dies.
"""

from __future__ import annotations

import ctypes
import json
import os
import queue
import signal
import sys
import threading
import traceback
from collections.abc import Iterator
from typing import Any, BinaryIO

from rwkvmpi.corpus.events import Begin, Block, End, Event, Failed
from rwkvmpi.corpus.frames import write_event
from rwkvmpi.corpus.index import DocumentRef
from rwkvmpi.corpus.readers import TextReader
from rwkvmpi.corpus.text_digest import HashedText, pass_beginning, pass_bytes
from rwkvmpi.corpus.tokenizers import Tokenizer, load_tokenizer
from rwkvmpi.errors import DocumentError

# These stop the job at its next commit, and the parent handles them; they may well be sent to every process of the job.
HANDLED_BY_PARENT = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)
_PR_SET_PDEATHSIG = 1


def main() -> None:
    for number in HANDLED_BY_PARENT:
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, HANDLED_BY_PARENT)  # blocked by the parent until now
    # Events have the real stdout to themselves: whatever a library prints goes to stderr.
    pipe = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    config = json.loads(sys.stdin.buffer.readline())
    _die_with(config["parent"])
    requests: queue.SimpleQueue[dict[str, Any]] = queue.SimpleQueue()
    threading.Thread(target=_take_requests, args=(sys.stdin.buffer, requests), daemon=True).start()
    tokenizer = load_tokenizer(config["tokenizer"], config["vocab_size"])
    try:
        with TextReader(config["text_key"]) as reader:
            while True:
                _serve(requests.get(), reader, tokenizer, config["digests"], pipe)
    except BrokenPipeError:
        os._exit(0)  # the parent is gone, and nobody would read a message


def _die_with(parent: int) -> None:
    """Let the kernel end this process when its parent ends, however it ends."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it ended before that call
        os._exit(0)


def _take_requests(stdin: BinaryIO, requests: queue.SimpleQueue[dict[str, Any]]) -> None:
    """Always ready to read, so that the parent never waits for a request to be taken."""
    for line in stdin:
        requests.put(json.loads(line))
    os._exit(0)


def _serve(request: dict[str, Any], reader: TextReader, tokenizer: Tokenizer, digests: bool, pipe: BinaryIO) -> None:
    ref = DocumentRef(**request["ref"])
    try:
        for event in _events(ref, reader, tokenizer, digests, request):
            write_event(pipe, event)
        return
    except (BrokenPipeError, KeyboardInterrupt, SystemExit):
        raise
    except DocumentError as error:
        reason = str(error)
    except BaseException as error:  # also a panic in a compiled tokenizer: it must not end the others' reading
        reason = f"reading failed: {type(error).__name__}: {' '.join(str(error).split())[:500]}"
    write_event(pipe, Failed(ref.index, reason))


def _events(
    ref: DocumentRef, reader: TextReader, tokenizer: Tokenizer, digests: bool, request: dict[str, Any]
) -> Iterator[Event]:
    nbytes, ntokens = request["byte_start"], request["tokens_before"]
    handed_on = bool(ref.handed_sha256)
    # Where bytes before the resume point must be looked at, the text is read from its start.
    hashed = digests or handed_on
    with reader.open(ref, 0 if hashed else nbytes) as stream:
        text = HashedText(stream)
        if handed_on:
            pass_beginning(text, ref)
        if hashed:
            pass_bytes(text if digests else stream, nbytes, ref)
        yield Begin(ref.index, request["position"] or int(handed_on), handed_on)
        for block in tokenizer.blocks(text if digests else stream, nbytes):
            yield Block(ref.index, block.byte_start, ntokens, block.tokens)
            ntokens += len(block.tokens)
            nbytes = block.byte_start + block.nbytes
        yield End(ref.index, nbytes, ntokens, text.sha256.digest() if digests else b"")


if __name__ == "__main__":
    try:
        main()
    except BaseException:
        traceback.print_exc()
        sys.stderr.flush()
        os._exit(1)  # an orderly exit would wait for the thread that reads stdin
