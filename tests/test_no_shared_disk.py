"""Workers that share nothing but a bucket: source and output on S3 (moto), a worker killed midway, the same bytes."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import environment, listing, write_folder

from quantloom import Pipeline
from quantloom.flow import graph
from quantloom.flow.assemble import assemble
from quantloom.formats.errors import CheckpointError
from quantloom.formats.output_store import OutputStore
from quantloom.formats.zarr_store import write_chunk


@pytest.fixture
def bucket(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """An S3 server of this process with a bucket ``shared``; the file system that sees it."""
    from moto.server import ThreadedMotoServer

    for name, value in (("AWS_ACCESS_KEY_ID", "test"), ("AWS_SECRET_ACCESS_KEY", "never-to-be-seen"),
                        ("AWS_DEFAULT_REGION", "us-east-1"), ("AWS_EC2_METADATA_DISABLED", "true")):  # fmt: skip
        monkeypatch.setenv(name, value)
    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
    import s3fs

    from quantloom.formats import ranges

    ranges._stores.clear()
    fs = s3fs.S3FileSystem(skip_instance_cache=True, use_listings_cache=False)
    fs.mkdir("shared")
    yield fs
    fs.rm("shared", recursive=True)
    ranges._stores.clear()
    server.stop()


def put(fs: Any, folder: Path, prefix: str) -> None:
    for path in folder.iterdir():
        fs.pipe_file(f"{prefix}/{path.name}", path.read_bytes())


def objects_below(fs: Any, prefix: str) -> dict[str, bytes]:
    return {name.removeprefix(f"{prefix}/"): fs.cat_file(name) for name in fs.find(prefix)}


def big_tensors() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(5)
    return {f"blocks.{number}.weight": torch.randn(256, 256, generator=generator).bfloat16() for number in range(8)}


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


@contextlib.contextmanager
def process(folder: Path, *arguments: str) -> Iterator[subprocess.Popen[bytes]]:
    """A process in a folder of its own, which is all that it may write to."""
    folder.mkdir()
    own = environment(TMPDIR=str(folder), HOME=str(folder), OMP_NUM_THREADS="1")
    with open(folder / "log", "wb") as log:
        started = subprocess.Popen([sys.executable, "-m", *arguments], cwd=folder, env=own, stdout=log, stderr=log)
    try:
        yield started
    finally:
        started.kill()
        started.wait()


@pytest.mark.slow
def test_a_worker_that_is_killed_costs_nothing(
    tmp_path: Path, bucket: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from distributed import Client

    monkeypatch.setattr(graph, "BATCH_BYTES", 1)
    here = write_folder(tmp_path / "here", big_tensors())
    put(bucket, here, "shared/big")
    Pipeline().read(here).quantize("nvfp4").write(tmp_path / "direct", shard_size=300_000)
    address = f"tcp://127.0.0.1:{free_port()}"
    failed: list[BaseException] = []
    with contextlib.ExitStack() as stack:
        where = address.removeprefix("tcp://").partition(":")
        scheduler = ("distributed.cli.dask_scheduler", "--host", where[0], "--port", where[2], "--no-dashboard")
        stack.enter_context(process(tmp_path / "scheduler", *scheduler))
        worker = ("distributed.cli.dask_worker", address, "--nthreads", "1", "--no-nanny", "--no-dashboard")
        victim = stack.enter_context(process(tmp_path / "victim", *worker, "--name", "victim"))
        stack.enter_context(process(tmp_path / "survivor", *worker, "--name", "survivor"))
        client = stack.enter_context(Client(address, timeout=60, set_as_default=False))
        client.wait_for_workers(2, timeout=60)
        flow = Pipeline().read("s3://shared/big").quantize("nvfp4").write(
            "s3://shared/out.zarr", shard_size=300_000, compute=False
        )

        def convert() -> None:
            try:
                flow.compute(client)
            except BaseException as error:
                failed.append(error)

        def written() -> int:
            return sum("/c/" in name and "/out.zarr/files/" not in name for name in bucket.find("shared/out.zarr"))

        constants = sum(len(layer.constants) for layer in flow.plan.layers)
        running = threading.Thread(target=convert)
        running.start()
        until = time.monotonic() + 60
        while written() < constants + 6 and running.is_alive() and time.monotonic() < until:
            time.sleep(0.1)
        assert running.is_alive(), failed
        os.kill(victim.pid, signal.SIGKILL)
        with pytest.raises(CheckpointError, match="is not complete"):
            assemble("s3://shared/out.zarr", str(tmp_path / "too early"))
        running.join(120)
        assert not running.is_alive()
    assert not failed, failed
    assemble("s3://shared/out.zarr", str(tmp_path / "made"))
    assert listing(tmp_path / "made") == listing(tmp_path / "direct")
    for name in ("victim", "survivor"):  # workers kept nothing for themselves
        left = [path for path in (tmp_path / name).rglob("*") if path.is_file() and path.stat().st_size > 20_000]
        assert [path for path in left if path.name != "log"] == []
    for content in objects_below(bucket, "shared/out.zarr").values():
        assert b"never-to-be-seen" not in content


def test_from_a_bucket_to_a_bucket(tmp_path: Path, bucket: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from quantloom.flow import assemble_bucket

    here = write_folder(tmp_path / "here", big_tensors())
    put(bucket, here, "shared/big")
    quantized = Pipeline().read("s3://shared/big").quantize("fp8")
    quantized.write("s3://shared/out.zarr", shard_size=200_000)
    Pipeline().read(here).quantize("fp8").write(tmp_path / "direct", shard_size=200_000)
    wanted = {path.name: path.read_bytes() for path in (tmp_path / "direct").iterdir()}

    # Chunks that break after parts of other shards were sent: no object may appear, nor an upload stay open.
    monkeypatch.setattr(assemble_bucket, "_PART_BYTES", 5 << 20)
    store = OutputStore(quantized_objects())
    tensor = max(store.shard(3).tensors, key=lambda tensor: tensor.ref.nbytes)
    good = bucket.cat_file(f"shared/out.zarr/{tensor.array}/c/0")
    write_chunk(store.objects, tensor.array, 0, bytearray(tensor.chunk + 4))
    with pytest.raises(CheckpointError, match="have the checksum"):
        assemble("s3://shared/out.zarr", "s3://shared/made")
    assert bucket.find("shared/made") == []
    assert bucket.call_s3("list_multipart_uploads", Bucket="shared").get("Uploads", []) == []

    bucket.pipe_file(f"shared/out.zarr/{tensor.array}/c/0", good)
    assemble("s3://shared/out.zarr", "s3://shared/made/")
    assert objects_below(bucket, "shared/made") == wanted
    made = assemble("s3://shared/out.zarr", "s3://shared/single/x.safetensors")
    assert sorted(made.files) == sorted(objects_below(bucket, "shared/single"))


def quantized_objects() -> Any:
    from quantloom.formats.objects import objects_at

    return objects_at("s3://shared/out.zarr")


def test_a_large_file_is_a_multipart_upload(tmp_path: Path, bucket: Any) -> None:
    """A file of several parts, which is aborted when something breaks before its end."""
    from quantloom.flow.assemble_bucket import BucketTarget

    content = bytes(range(256)) * (3 << 14)
    target = BucketTarget("s3://shared/large")
    with contextlib.suppress(InterruptedError), target.open(), target.file("x", 40 << 20) as out:
        for _ in range(3):
            out.write(content)
        assert bucket.call_s3("list_multipart_uploads", Bucket="shared")["Uploads"]
        raise InterruptedError
    assert bucket.find("shared/large") == []
    assert not bucket.call_s3("list_multipart_uploads", Bucket="shared").get("Uploads")
    target = BucketTarget("s3://shared/large")
    with target.open():
        with target.file("x", 40 << 20) as out:
            for _ in range(3):
                out.write(content)
        assert bucket.find("shared/large") == []
        target.commit(["x"], overwrite=False)
    assert bucket.cat_file("shared/large/x") == content * 3
