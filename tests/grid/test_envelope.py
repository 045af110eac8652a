"""The envelope: what was sealed opens, and no other message passes for the one that is due."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rwkvmpi.grid.envelope import ENVELOPE_BYTES, Envelope, fault, is_intact, open_envelope, seal

JOB, CHANNEL, SEQUENCE, POSITION, MOST = 2**61 + 5, 17, 3, 40, 128


def sealed(rest, summed, **changes):
    words = {"job": JOB, "channel": CHANNEL, "sequence": SEQUENCE, "position": POSITION, "body_bytes": len(rest)}
    words |= {"sent_ns": -5, "checksum": 0, "magic": 0} | changes
    envelope = np.full(ENVELOPE_BYTES, 0xFF, dtype=np.uint8)
    seal(envelope, Envelope(**words), rest if summed else None)
    return envelope


def wrong(envelope, rest, summed):
    words = open_envelope(envelope)
    found = fault(words, JOB, CHANNEL, SEQUENCE, POSITION, MOST, summed)
    return found or (None if not summed or is_intact(envelope, words, rest) else "damaged")


@given(st.binary(max_size=MOST), st.booleans())
def test_what_was_sealed_opens(content, summed):
    rest = np.frombuffer(content, dtype=np.uint8)
    envelope = sealed(rest, summed)
    assert wrong(envelope, rest, summed) is None
    assert open_envelope(envelope)[1:7] == (JOB, CHANNEL, SEQUENCE, POSITION, len(rest), -5)


@given(st.binary(min_size=1, max_size=MOST), st.data())
def test_with_a_checksum_no_flipped_bit_passes(content, data):
    rest = np.frombuffer(content, dtype=np.uint8).copy()
    envelope = sealed(rest, True)
    bit = data.draw(st.integers(0, 8 * (ENVELOPE_BYTES + len(rest)) - 1))
    message = np.concatenate([envelope, rest])
    message[bit // 8] ^= 1 << bit % 8
    assert wrong(message[:ENVELOPE_BYTES], message[ENVELOPE_BYTES:], True) is not None


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"job": JOB + 1}, "another job"),
        ({"channel": CHANNEL + 1}, "belongs to channel 18"),
        ({"sequence": SEQUENCE - 1}, "came twice or late"),
        ({"sequence": SEQUENCE + 2}, "number 3 was lost"),
        ({"position": POSITION + 1}, "the one for chunk 40 was due"),
        ({"body_bytes": MOST + 1}, "at most 128"),
        ({"body_bytes": -1}, "at most 128"),
    ],
)
@pytest.mark.parametrize("summed", [False, True])
def test_every_other_message_is_told_apart(changes, words, summed):
    rest = np.arange(64, dtype=np.uint8)
    assert words in wrong(sealed(rest, summed, **changes), rest, summed)


def test_a_message_without_a_checksum_does_not_pass_where_one_is_due():
    rest = np.arange(64, dtype=np.uint8)
    assert "no checksum" in wrong(sealed(rest, False), rest, True)
    assert "none of this program" in wrong(np.zeros(ENVELOPE_BYTES, dtype=np.uint8), rest, False)
