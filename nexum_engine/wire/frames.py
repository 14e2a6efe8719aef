"""The parts of a `Calls` stream that the client and the server share."""

from __future__ import annotations

from nexum_engine.wire import nexum_pb2 as pb

CALLS = f"/{pb.DESCRIPTOR.services_by_name['NexumService'].full_name}/Calls"
OPENED = ("nexum-calls", "open")
"""The initial metadata of a stream that the server has opened. A server without `Calls` sends none."""
BATCH_BYTES = 64 * 1024
"""When the frames of a message have this size, no further frame is added."""


def take_batch(unsent: list[pb.CallFrame]) -> list[pb.CallFrame]:
    """Remove from the beginning of `unsent` the frames for the next message, and return them."""
    size = count = 0
    while count < len(unsent) and size < BATCH_BYTES:
        size += len(unsent[count].message)
        count += 1
    frames = unsent[:count]
    del unsent[:count]
    return frames
