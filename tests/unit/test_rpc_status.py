"""A status fits into headers, whatever its error quotes."""

from __future__ import annotations

from google.rpc import error_details_pb2
from hypothesis import given
from hypothesis import strategies as st

from tandem.errors import InvalidRequest, LegFailed
from tandem.rpc.status import MESSAGE_BYTES_MAX, METADATA_BYTES_MAX, to_status

TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=300)
HEADERS_BYTES_MAX = 8 * 1024
"""gRPC's soft limit."""


def info_of(error: Exception) -> tuple[str, dict[str, str]]:
    status, info = to_status(error), error_details_pb2.ErrorInfo()  # type: ignore[arg-type]
    assert status.details[0].Unpack(info)
    return status.message, dict(info.metadata)


@given(TEXT, st.integers(1, 50))
def test_texts_are_whole_or_cut_between_characters(text: str, times: int) -> None:
    long = text * times
    message, metadata = info_of(LegFailed(long, worker=long))
    for cut, bytes_max in ((message, MESSAGE_BYTES_MAX), (metadata["worker"], METADATA_BYTES_MAX)):
        assert len(cut.encode()) <= bytes_max
        if len(long.encode()) <= bytes_max:
            assert cut == long
        else:
            assert cut.endswith("…")
            assert long.startswith(cut[:-1])
            # At most one character less than there is room for.
            assert len(cut.encode()) > bytes_max - 4


def test_the_longest_status_fits_into_headers() -> None:
    long = "é" * 100_000
    status = to_status(InvalidRequest(long, long, leg=long, worker=long, phase=long, attempt=long, room=long))
    # As grpc-message, each byte in percent form, and as grpc-status-details-bin in base64.
    in_headers = 3 * len(status.message.encode()) + 4 * len(status.SerializeToString()) / 3
    assert in_headers < HEADERS_BYTES_MAX
