"""The client against golden bytes, and against a small HTTP server that plays them."""

import http.server
import io
import json
import threading
import zlib
from pathlib import Path

import numpy as np
import pytest

import freetumor
from freetumor import freetumor_pb2 as pb
from freetumor.frames import ALIGNMENT, PREAMBLE, Cut, Head, read_head, read_tensors, skip_payload

GOLDEN = Path(__file__).resolve().parents[2] / "tests" / "golden" / "wire"


@pytest.fixture
def golden():
    return (GOLDEN / "stream.bin").read_bytes()


def frames(data):
    source = io.BytesIO(data)
    while True:
        start = source.tell()
        head = read_head(source)
        if head is None:
            return
        skip_payload(source, head)
        yield head, data[start : source.tell()]


def encode(kind, message):
    header = message.SerializeToString()
    return PREAMBLE.pack(b"FTUM", 1, kind, 0, len(header), 0, zlib.crc32(header)) + header


@pytest.fixture
def serve():
    """Returns a function that serves one answer to every request and returns its URL."""
    servers = []

    def start(body, status=200, headers=(), chunked=True):
        class Handler(http.server.BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            requests = []

            def do_POST(self):
                length = int(self.headers["Content-Length"])
                self.requests.append((dict(self.headers), json.loads(self.rfile.read(length))))
                self.send_response(status)
                for name, value in headers:
                    self.send_header(name, value)
                if chunked:
                    self.send_header("Transfer-Encoding", "chunked")
                    self.end_headers()
                    for start in range(0, len(body), 1000):
                        part = body[start : start + 1000]
                        self.wfile.write(b"%x\r\n%s\r\n" % (len(part), part))
                    self.wfile.write(b"0\r\n\r\n")
                else:
                    self.send_header("Content-Length", str(len(body) + 1))
                    self.end_headers()
                    self.wfile.write(body)
                    self.close_connection = True

            def log_message(self, *_):
                pass

        server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        server.seen = Handler.requests
        threading.Thread(target=server.serve_forever, daemon=True).start()
        servers.append(server)
        return f"http://127.0.0.1:{server.server_port}", server

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


def test_golden_frames_have_their_kinds_and_arrays(golden):
    kinds = [head.kind for head, _ in frames(golden)]
    assert kinds == [1, 3, 2, 99, 2, 4]
    source = io.BytesIO(list(frames(golden))[2][1])
    head = read_head(source)
    arrays = read_tensors(source, head, pb.BatchHeader.FromString(head.header))
    assert list(arrays) == ["image", "label", "source", "soft_mask", "lesion_instance"]
    image, source, mask = arrays["image"], arrays["source"], arrays["soft_mask"]
    assert image.dtype == np.int16 and image.shape == (1, 1, 16, 16, 16)
    inside = mask >= 128
    assert inside.sum() == 4 * 5 * 6
    assert (image[inside] == source[inside] + 60).all() and (image[~inside] == source[~inside]).all()
    assert ((arrays["label"] == 2) == inside).all()
    for array in arrays.values():
        assert array.flags.writeable and array.ctypes.data % ALIGNMENT == 0
        array[:] = 0


def test_a_stream_yields_batches_with_provenance(golden, serve):
    url, server = serve(golden)
    with freetumor.stream(url, {"seed": 1}, batch_size=1, image="i16", api_key="k") as stream:
        assert stream.header.labels["liver_tumour"] == 2
        assert stream.header.recipe["patch"] == [16, 16, 16]
        assert stream.header.window_hu == (-175.0, 250.0)
        assert stream.cursor.next_index == 0
        batches = []
        for batch in stream:
            # Not consumed before the next one is asked for.
            assert stream.cursor.next_index == len(batches)
            batches.append(batch)
    assert [batch.cursor.next_index for batch in batches] == [1, 2]
    assert stream.end_reason == "count" and stream.cursor.next_index == 2
    meta = batches[1].meta[0]
    assert (meta.index, meta.case, meta.pool, meta.outcome) == (1, "case_001", "unlabelled_host", "accepted")
    assert meta.region_start == (-3, 5, 7)
    assert meta.affine[0, 3] == -120.0 and meta.affine[2, 0] == 2.0
    lesion = meta.lesions[0]
    assert (lesion.size, lesion.contrast, lesion.diameter_mm) == ("small", "bright", 12.25)
    assert lesion.gate.recall == 0.75 and lesion.discriminator is None
    headers, request = server.seen[0]
    assert headers["Authorization"] == "Bearer k"
    assert request["recipe"] == {"seed": 1}
    assert request["delivery"]["image"] == "i16" and "cursor" not in request["delivery"]


def test_a_key_is_trimmed_and_no_error_repeats_one(golden, serve):
    url, server = serve(golden)
    with freetumor.stream(url, {"seed": 1}, batch_size=1, image="i16", api_key=" k\n") as stream:
        next(stream)
    assert server.seen[0][0]["Authorization"] == "Bearer k"
    for key in ("s3c ret", "s3c\nret", "s3crët", " \n"):
        with pytest.raises(ValueError, match="api_key") as refused:
            freetumor.stream(url, api_key=key)
        assert "s3c" not in str(refused.value)


def test_a_missing_end_is_never_a_short_epoch(golden, serve):
    whole = [data for _, data in frames(golden)]
    for body, chunked in [(b"".join(whole[:-1]), True), (golden[:-10], True), (golden[:-10], False)]:
        url, _ = serve(body, chunked=chunked)
        stream = freetumor.stream(url, patience=0)
        with pytest.raises(freetumor.StreamCut) as caught:
            list(stream)
        assert isinstance(caught.value, ConnectionError)
        assert caught.value.cursor.next_index == 2
        assert freetumor.Cursor.from_dict(caught.value.cursor.to_dict()) == caught.value.cursor


@pytest.mark.parametrize("reason", ["shutdown", "rebalance"])
def test_an_early_end_is_never_a_short_epoch(golden, serve, reason):
    whole = [data for _, data in frames(golden)]
    cursor = pb.Cursor(recipe="r", snapshot="s", bundle="b", revision=1, next_index=1)
    end = pb.End(reason=pb.EndReason.Value(f"END_REASON_{reason.upper()}"), cursor=cursor)
    url, _ = serve(b"".join(whole[:3]) + encode(4, end))
    stream = freetumor.stream(url, patience=0)
    next(stream)
    with pytest.raises(freetumor.StreamCut, match=reason) as caught:
        next(stream)
    assert caught.value.cursor.next_index == 1 and stream.end_reason == reason
    with pytest.raises(StopIteration):
        next(stream)


def test_damage_names_the_tensor(golden, serve):
    damaged = bytearray(golden)
    end = sum(len(data) for _, data in list(frames(golden))[:3])  # the first batch ends here
    damaged[end - 1] ^= 1
    url, _ = serve(bytes(damaged))
    with pytest.raises(freetumor.FrameError, match="lesion_instance"):
        list(freetumor.stream(url))


def test_a_refusal_tells_status_and_field(serve):
    body = {"type": "urn:freetumor:problem:field", "title": "t", "status": 422, "detail": "d", "field": "recipe.sed"}
    url, _ = serve(json.dumps(body).encode(), 422)
    with pytest.raises(freetumor.ProblemError) as caught:
        freetumor.stream(url)
    assert (caught.value.status, caught.value.field, caught.value.detail) == (422, "recipe.sed", "d")
    url, _ = serve(b"busy", 429, [("Retry-After", "2")])
    with pytest.raises(freetumor.ProblemError) as caught:
        freetumor.stream(url)
    assert (caught.value.status, caught.value.retry_after, caught.value.detail) == (429, 2.0, "busy")


def test_a_problem_inside_the_stream_carries_the_cursor(golden, serve):
    whole = [data for _, data in frames(golden)]
    error = pb.Error(type="urn:freetumor:problem:failed", title="t", status=500, detail="patch 1: case_003.ftv",
                     request_id="job-7")
    url, _ = serve(b"".join(whole[:3]) + encode(5, error))
    with pytest.raises(freetumor.PatchError, match="case_003.ftv") as caught:
        list(freetumor.stream(url))
    assert caught.value.cursor.next_index == 1
    assert caught.value.request_id == caught.value.body["request_id"] == "job-7"


def test_nobody_listens():
    with pytest.raises(freetumor.StreamCut, match="cannot open"):
        freetumor.stream("http://127.0.0.1:1", timeout=2)
    with pytest.raises(ValueError, match="ftp"):
        freetumor.stream("ftp://127.0.0.1")


def test_lengths_are_checked_before_memory_is_taken():
    with pytest.raises(freetumor.FrameError, match="over the limits"):
        read_head(io.BytesIO(PREAMBLE.pack(b"FTUM", 1, 2, 0, 0, 1 << 60, 0)))
    with pytest.raises(freetumor.FrameError, match="version"):
        read_head(io.BytesIO(PREAMBLE.pack(b"FTUM", 2, 2, 0, 0, 0, 0)))
    with pytest.raises(Cut):
        read_head(io.BytesIO(b"FTUM"))
    # A small payload whose tensors, each within its limit, would decompress to more than a frame.
    bombs = [pb.Tensor(name=str(n), element=pb.ELEMENT_TYPE_U8, shape=[200 << 20], raw_length=200 << 20, codec=pb.CODEC_ZSTD)
             for n in range(2)]
    for tensors in (bombs, [pb.Tensor(name="t")] * 33):
        with pytest.raises(freetumor.FrameError, match="over the limits"):
            read_tensors(io.BytesIO(b""), Head(2, b"", 0), pb.BatchHeader(tensors=tensors))


def test_zstd_tensors_are_read():
    import zstandard

    raw = np.arange(1000, dtype="<i2").tobytes()
    stored = zstandard.ZstdCompressor(level=1).compress(raw)
    tensor = pb.Tensor(
        name="image", element=pb.ELEMENT_TYPE_I16, shape=[1, 1, 10, 10, 10], stored_length=len(stored),
        raw_length=len(raw), codec=pb.CODEC_ZSTD, crc32=zlib.crc32(stored),
    )
    head = Head(2, b"", len(stored))
    array = read_tensors(io.BytesIO(stored), head, pb.BatchHeader(tensors=[tensor]))["image"]
    assert array.flags.writeable and (array.ravel() == np.arange(1000)).all()
    tensor.raw_length, tensor.shape[:] = 1000, [1, 1, 5, 10, 10]
    with pytest.raises(freetumor.FrameError, match="decompress"):
        read_tensors(io.BytesIO(stored), head, pb.BatchHeader(tensors=[tensor]))


def test_checksums_cover_payloads_that_arrive_in_pieces():
    class Trickle(io.BytesIO):
        def readinto(self, buffer):
            return super().readinto(buffer[: 7 + self.tell() % 100_003])

    rng = np.random.default_rng(0)
    image, label = rng.bytes(600_000), rng.bytes(300_001)
    payload = image + label + b"\0" * 63
    tensors = [
        pb.Tensor(
            name=name, element=pb.ELEMENT_TYPE_U8, shape=[len(data)], offset=payload.index(data), stored_length=len(data),
            raw_length=len(data), codec=pb.CODEC_RAW, crc32=zlib.crc32(data),
        )
        for name, data in (("label", label), ("image", image))
    ]
    head = Head(2, b"", len(payload))
    arrays = read_tensors(Trickle(payload), head, pb.BatchHeader(tensors=tensors))
    assert arrays["image"].tobytes() == image and arrays["label"].tobytes() == label
    for at, name in [(0, "image"), (262_144, "image"), (599_999, "image"), (600_000, "label"), (900_000, "label")]:
        damaged = bytearray(payload)
        damaged[at] ^= 1
        with pytest.raises(freetumor.FrameError, match=f"{name}.*checksum"):
            read_tensors(Trickle(damaged), head, pb.BatchHeader(tensors=tensors))
    tensors[0].offset += 64
    with pytest.raises(freetumor.FrameError, match="label.*outside"):
        read_tensors(Trickle(payload), head, pb.BatchHeader(tensors=tensors))


def test_numpy_reads_the_archive_without_pickle():
    with np.load(GOLDEN / "batch.npz", allow_pickle=False) as archive:
        assert archive["image"].shape == (1, 1, 16, 16, 16) and archive["image"].dtype == np.int16
        assert json.loads(archive["meta"].item()) == {"case": "Müller", "n": 1}
        inside = archive["soft_mask"] >= 128
        assert ((archive["label"] == 2) == inside).all()
