"""Any Dask cluster: what is looked at before work, TLS, who writes which file, workers that die, Ctrl-C."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import pickle
import signal
import subprocess
import sys
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import dask
import psutil
import pytest
import torch
from checkpoints import environment, make_tensors, write_file

from quantloom import Pipeline
from quantloom.flow import cluster, cluster_checks, graph, lost_hosts, packed_tasks, recovery, worker_look
from quantloom.flow.execute import run_plan
from quantloom.flow.graph import batches, submission
from quantloom.flow.placement import Placement, assign
from quantloom.formats.errors import PlanError, SinkError, UsageError
from quantloom.stages.work import Environment

distributed = pytest.importorskip("distributed")
QUIET = {"dashboard_address": "127.0.0.1:0", "memory_limit": None}


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_file(tmp_path_factory.mktemp("source") / "tiny.safetensors")


@pytest.fixture(scope="module")
def expected(source: Path, tmp_path_factory: pytest.TempPathFactory) -> bytes:
    path = tmp_path_factory.mktemp("expected") / "o.safetensors"
    Pipeline(scheduler="sync").read(source).quantize("mxfp8").write(path)
    return path.read_bytes()


@pytest.fixture(scope="module")
def client() -> Iterator[Any]:
    with (
        distributed.LocalCluster(n_workers=2, threads_per_worker=1, processes=False, **QUIET) as made,
        distributed.Client(made, set_as_default=False) as client,
    ):
        yield client


def flow(source: Path, output: Path) -> Any:
    return Pipeline().read(source).quantize("mxfp8").write(output, compute=False)


# -- looked at before work ---------------------------------------------------------------------------------------------


def other_look(monkeypatch: pytest.MonkeyPatch, **versions: str | None) -> None:
    """Workers tell other versions than this process."""
    own = cluster_checks.own_versions()
    monkeypatch.setattr(cluster_checks, "own_versions", lambda: {**own, **versions})


@pytest.mark.parametrize(("versions", "words"), [
    ({"quantloom": "9.9"}, r"worker inproc://\S+ on \S+ has quantloom 0\S+, this process 9.9: .*quantloom==9.9"),
])  # fmt: skip
def test_another_quantloom_is_refused(versions: dict[str, str], words: str, client: Any, source: Path, tmp_path: Path,
                                      monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    other_look(monkeypatch, **versions)
    with pytest.raises(PlanError, match=words):
        flow(source, tmp_path / "o.safetensors").compute(client)
    assert list(tmp_path.iterdir()) == []


def test_a_worker_without_quantloom_or_torch_is_refused() -> None:
    own = cluster_checks.own_versions()
    for lacking, words in (("quantloom", "w does not have quantloom, this"), ("torch", "w does not have torch")):
        with pytest.raises(PlanError, match=words):
            cluster_checks._check_versions("w", {**own, lacking: None})


def test_the_question_needs_nothing_of_ours(tmp_path: Path) -> None:
    """A Python that has no quantloom answers: the question is text."""
    text = cluster_checks._expression([(str(tmp_path / "none"), 5, 0.0)], [], False)
    script = tmp_path / "ask.py"
    script.write_text(f"import json\nprint(json.dumps(eval({text!r})))\n")
    done = subprocess.run([sys.executable, "-I", script], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert '"quantloom"' in done.stdout
    assert "cannot see the source" in done.stdout


def test_other_differences_are_warned_of(client: Any, source: Path, expected: bytes, tmp_path: Path,
                                         monkeypatch: pytest.MonkeyPatch, caplog: Any) -> None:  # fmt: skip
    other_look(monkeypatch, numpy="1.0", torch=worker_look._versions()["torch"].partition("+")[0] + "+cu999")
    flow(source, tmp_path / "o.safetensors").compute(client)
    assert (tmp_path / "o.safetensors").read_bytes() == expected
    warned = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert len(warned) == 2
    assert all("has numpy" in text and "instead of 1.0" in text and "torch" not in text for text in warned)


def test_what_a_worker_says_of_files(tmp_path: Path) -> None:
    here = tmp_path / "here"
    here.write_text("token")
    status = here.stat()
    good = (str(here), 5, status.st_mtime)
    asked = [good, (str(here), 6, status.st_mtime), (str(here), 5, 1.0), (str(tmp_path / "none"), 5, 1.0),
             (str(tmp_path), -1, 0.0)]  # fmt: skip
    probes = [(str(here), "token"), (str(here), "other"), (str(tmp_path / "none"), "token")]
    told = worker_look.look(asked, probes, False)
    assert [wrong[1] for wrong in told["sources"]] == [True, False, True]
    assert "5 bytes instead of 6" in told["sources"][0][0]
    assert [text.partition(" ")[0] for text in told["folders"]] == ["has", "cannot"]


@pytest.mark.parametrize("where", ["source", "output"])
def test_a_worker_without_the_shared_disk_is_named(where: str, client: Any, source: Path, tmp_path: Path,
                                                   monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    if where == "source":
        monkeypatch.setattr(cluster_checks, "_stated", lambda path: (path + ".elsewhere", 5, 0.0))
        words = "cannot see the source"
    else:

        @contextlib.contextmanager
        def unseen(_folders: Any) -> Iterator[Any]:
            yield [(str(tmp_path / "unseen" / "probe"), "token")]

        monkeypatch.setattr(cluster_checks, "_probes", unseen)
        words = "cannot write to the folder"
    with pytest.raises(PlanError, match=rf"worker inproc://\S+ on \S+ {words}.*quantloom assemble"):
        flow(source, tmp_path / "o.safetensors").compute(client)
    assert list(tmp_path.iterdir()) == []


def test_probes_leave_nothing(client: Any, source: Path, expected: bytes, tmp_path: Path) -> None:
    flow(source, tmp_path / "o.safetensors").compute(client)
    assert [path.name for path in tmp_path.iterdir()] == ["o.safetensors"]
    assert (tmp_path / "o.safetensors").read_bytes() == expected


# -- addresses and TLS -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, str]]:
    """Dask configurations: of the cluster and its friends, and of a stranger with an authority of their own."""
    trustme = pytest.importorskip("trustme")
    folder, made = tmp_path_factory.mktemp("tls"), {}
    for who in ("friend", "stranger"):
        authority = trustme.CA()
        own = authority.issue_cert("127.0.0.1", "localhost")
        authority.cert_pem.write_to_path(folder / f"{who}-ca.pem")
        own.private_key_and_cert_chain_pem.write_to_path(folder / f"{who}.pem")
        made[who] = {"distributed.comm.tls.ca-file": str(folder / "friend-ca.pem")}
        for role in ("client", "worker", "scheduler"):
            made[who] |= {f"distributed.comm.tls.{role}.{part}": str(folder / f"{who}.pem") for part in ("cert", "key")}
    return made


@pytest.fixture(scope="module")
def encrypted(certificates: dict[str, dict[str, str]]) -> Iterator[str]:
    """The address of a cluster that speaks TLS only."""
    options = {"n_workers": 2, "threads_per_worker": 1, "processes": False, "protocol": "tls://"}
    with dask.config.set({**certificates["friend"], "distributed.comm.require-encryption": True}):
        made = distributed.LocalCluster(**options, security=distributed.Security(), **QUIET)
    with made:
        yield made.scheduler_address


def test_tls_end_to_end(encrypted: str, certificates: Any, source: Path, expected: bytes, tmp_path: Path) -> None:
    assert encrypted.startswith("tls://")
    with dask.config.set(certificates["friend"]):
        report = Pipeline(scheduler=encrypted).read(source).quantize("mxfp8").write(tmp_path / "o.safetensors")
        assert report.distributed
        security = distributed.Security()
        with distributed.Client(encrypted, security=security, set_as_default=False) as client:
            assert all(address.startswith("tls://") for address in client.nthreads())
            flow(source, tmp_path / "p.safetensors").compute(client)
    assert (tmp_path / "o.safetensors").read_bytes() == (tmp_path / "p.safetensors").read_bytes() == expected


@pytest.mark.parametrize(("who", "scheme", "error", "words"), [
    ("stranger", "tls", SinkError, "cannot reach the Dask scheduler.*do both sides trust the certificates"),
    ("friend", "tcp", SinkError, "cannot reach the Dask scheduler.*if it wants TLS: is the address tls://"),
    (None, "tls", UsageError, "no certificates are configured; set distributed.comm.tls.ca-file"),
])  # fmt: skip
def test_who_is_refused(who: str | None, scheme: str, error: type[Exception], words: str, encrypted: str,
                        certificates: Any, source: Path, tmp_path: Path,
                        monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    monkeypatch.setattr(cluster, "CONNECT_SECONDS", 2)
    address = encrypted.replace("tls://", f"{scheme}://")
    none = dict.fromkeys(certificates["friend"], None)
    began = time.monotonic()
    with (
        dask.config.set({**(certificates[who] if who else none), "distributed.comm.require-encryption": None}),
        pytest.raises(error, match=words),
    ):
        Pipeline(scheduler=address).read(source).quantize("mxfp8").write(tmp_path / "o.safetensors")
    assert time.monotonic() - began < 30
    assert list(tmp_path.iterdir()) == []


def test_certificates_that_cannot_be_read(source: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken.pem"
    broken.write_text("nothing")
    names = ("ca-file", "client.cert", "client.key")
    with (
        dask.config.set({f"distributed.comm.tls.{name}": str(broken) for name in names}),
        pytest.raises(UsageError, match="the certificates of Dask's configuration cannot be used"),
    ):
        Pipeline(scheduler="tls://127.0.0.1:1").read(source).quantize("mxfp8").write(tmp_path / "out" / "o.safetensors")


def test_a_scheduler_answers_within_ten_seconds_or_never() -> None:
    assert cluster.CONNECT_SECONDS <= 10


# -- who writes which file ---------------------------------------------------------------------------------------------


def shards(tmp_path: Path, writes: str = "exclusive") -> Any:
    source = write_file(tmp_path / "in" / "s.safetensors", make_tensors() | make_tensors(1, "more."))
    recipe = Pipeline(writes=writes).read(source).quantize("fp8")
    return recipe.write(tmp_path / "out", shard_size=60_000, compute=False)


def test_groups_share_no_file(tmp_path: Path) -> None:
    plan = shards(tmp_path).plan
    groups = Placement(plan.layers, "exclusive").groups()
    files = [{slot.path for layer in group for slot in layer.slots} for group in groups]
    assert len(files) > 3
    assert sum(map(len, files)) == len(set().union(*files)) == len(plan.shards)
    assert sorted(layer.layer.name for group in groups for layer in group) == sorted(
        layer.layer.name for layer in plan.layers
    )
    loads = {host: sum(layer.layer.nbytes for layer in own) for host, own in assign(groups, {"a": 3, "b": 1}).items()}
    assert loads["a"] > 1.5 * loads["b"] > 0



@contextlib.contextmanager
def machines() -> Iterator[tuple[Any, Any]]:
    """Two workers, 1 and 2, that claim to be two machines, and a client."""
    workers = {number: {"cls": distributed.Worker, "options": worker_on(number)} for number in (1, 2)}
    manager = {"cls": distributed.Scheduler, "options": {"host": "127.0.0.1", "port": 0, "dashboard": False}}
    with (
        dask.config.set({"distributed.comm.timeouts.connect": "3s"}),  # for results of a worker that has just gone
        distributed.SpecCluster(workers=workers, scheduler=manager) as two,
        distributed.Client(two, set_as_default=False) as client,
    ):
        yield two, client


def worker_on(number: int) -> dict[str, Any]:
    return {"nthreads": 1, "memory_limit": None, "dashboard": False, "host": f"127.0.0.{number}"}


def test_each_file_is_written_by_one_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two workers that claim to be two machines; what each wrote is noted by the writers themselves."""
    from quantloom.formats.fileio import Writer

    monkeypatch.setattr(graph, "BATCH_BYTES", 1)
    made = shards(tmp_path)
    run_plan(made.plan)
    before = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    wrote: defaultdict[str, set[str]] = defaultdict(set)
    write = Writer.write

    def noted(self: Writer, buffer: Any, offset: int) -> None:
        with contextlib.suppress(ValueError):  # the client itself writes headers and constants
            host = distributed.get_worker().ip
            wrote[Path(self.path).name].add(host)
        write(self, buffer, offset)

    monkeypatch.setattr(Writer, "write", noted)
    with machines() as (_, client):
        again = Pipeline(writes="exclusive").read(made.recipe.source).quantize("fp8")
        again.write(tmp_path / "out", shard_size=60_000, overwrite=True, compute=False).compute(client)
    assert {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()} == before
    assert set().union(*wrote.values()) == {"127.0.0.1", "127.0.0.2"}
    assert len(wrote) > 3
    assert all(len(hosts) == 1 for hosts in wrote.values()), wrote


@dataclasses.dataclass
class AtFirst:
    """Does something when the first task is done, and remembers how many layers each task finished."""

    what: Callable[[], Any]
    finished: list[int] = dataclasses.field(default_factory=list)

    def start(self, plan: Any, budget: Any) -> None: ...

    def advance(self, receipts: Any) -> None:
        if not self.finished:
            self.what()
        self.finished.append(len(receipts))

    def stop(self) -> None: ...


def test_files_of_a_machine_that_is_gone_go_to_another(tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                                       caplog: Any) -> None:  # fmt: skip
    monkeypatch.setattr(graph, "BATCH_BYTES", 1)
    monkeypatch.setattr(lost_hosts, "LOOK_SECONDS", 0.05)
    monkeypatch.setattr(lost_hosts, "GRACE_SECONDS", 0.3)
    monkeypatch.setattr(recovery, "PAUSE", 0.0)
    caplog.set_level("INFO")
    made = shards(tmp_path)
    run_plan(made.plan)
    before = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    again = Pipeline(writes="exclusive").read(made.recipe.source).quantize("fp8")
    with machines() as (two, client):
        watcher = AtFirst(lambda: two.sync(two.workers[2].close))
        plan = again.write(tmp_path / "out", shard_size=60_000, overwrite=True, compute=False)
        plan.compute(client, watcher)
        assert [worker["host"] for worker in client.scheduler_info()["workers"].values()] == ["127.0.0.1"]
    assert {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()} == before
    assert "machine 127.0.0.2 has no worker: waiting 0 s for one" in caplog.text
    assert "machine 127.0.0.2 left the cluster before its tasks were done" in caplog.text
    assert sum(watcher.finished) == len(made.plan.layers)


@pytest.mark.parametrize("writes", ["shared", "exclusive"])
def test_a_cluster_without_workers_is_waited_for(writes: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                                 caplog: Any) -> None:  # fmt: skip
    """Machines that come back later than the grace, all of them having been away, lose nothing."""
    monkeypatch.setattr(graph, "BATCH_BYTES", 1)
    monkeypatch.setattr(lost_hosts, "LOOK_SECONDS", 0.05)
    monkeypatch.setattr(lost_hosts, "GRACE_SECONDS", 0.1)
    made = shards(tmp_path, writes)
    came: list[Any] = []

    def lose_all() -> None:
        for number in (1, 2):
            two.sync(two.workers[number].close)
        threading.Thread(target=come_back, daemon=True).start()

    def come_back() -> None:
        deadline = time.monotonic() + 20
        while "the cluster has no worker: waiting for one" not in caplog.text and time.monotonic() < deadline:
            time.sleep(0.05)
        time.sleep(0.5)
        for number in (1, 2):
            came.append(two.sync(start, number))

    async def start(number: int) -> Any:
        return await distributed.Worker(two.scheduler_address, **worker_on(number))

    with machines() as (two, client):
        made.compute(client, AtFirst(lose_all))
        for worker in came:
            two.sync(worker.close)
    assert len(came) == 2
    assert "the cluster has no worker: waiting for one" in caplog.text
    whole = Pipeline().read(made.recipe.source).quantize("fp8")
    whole.write(tmp_path / "whole", shard_size=60_000)
    found, expected = (
        {path.name: path.read_bytes() for path in (tmp_path / name).iterdir()} for name in ("out", "whole")
    )
    assert found == expected


def test_fewer_files_than_machines_are_warned_of(client: Any, source: Path, tmp_path: Path,
                                                 monkeypatch: pytest.MonkeyPatch, caplog: Any) -> None:  # fmt: skip
    monkeypatch.setattr(type(client), "scheduler_info", lambda *_, **__: {
        "workers": {number: {"host": host, "nthreads": 1} for number, host in enumerate(("a", "b"))}})  # fmt: skip
    place = Placement(flow(source, tmp_path / "o.safetensors").plan.layers, "exclusive")
    assert cluster._hosts(client, {}, place) == {}
    assert "only 1 of 2 machines will work" in caplog.text


# -- order -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["fp8", "mxfp8"])
def test_the_biggest_layers_come_first(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from dask.order import order

    from quantloom.flow import parts

    tensors = {f"b.{number}.weight": torch.zeros(16 * (40 - number), 64) for number in range(30)}
    tensors |= {f"big.{number}.weight": torch.zeros(4000 + number, 64) for number in range(3)}
    source = write_file(tmp_path / "s.safetensors", tensors)
    monkeypatch.setattr(graph, "BATCH_BYTES", 1)
    monkeypatch.setattr(parts, "PART_BYTES", 300_000)
    plan = Pipeline().read(source).quantize(name).write(tmp_path / "o.safetensors", compute=False).plan
    tasks, layers_of = submission(batches(plan.layers), Environment("run"))
    keys = list(layers_of)
    wanted = cluster._priorities(tasks, keys).__getitem__
    assert [wanted(key) for key in keys] == [-number for number in range(len(keys))]
    assert set(map(wanted, tasks)) == {-number for number in range(len(keys))}
    numbers = order(tasks)
    single = [key for key in sorted(keys, key=numbers.__getitem__) if len(key) == 4]
    assert single == [key for key in keys if len(key) == 4], "on threads, where Dask alone decides"


# -- tasks as bytes ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["fp8", "nvfp4"])
def test_tasks_travel_as_bytes_that_only_workers_read(name: str, tmp_path: Path,
                                                      monkeypatch: pytest.MonkeyPatch) -> None:
    """Row ranges of one layer wait for each other's numbers, which are packed too."""
    from dask.local import get_sync

    from quantloom.flow import parts

    source = write_file(tmp_path / "s.safetensors", {"a.weight": torch.randn(600, 64), "b.weight": torch.randn(8, 64)})
    monkeypatch.setattr(parts, "PART_BYTES", 50_000)
    plan = Pipeline().read(source).quantize(name).write(tmp_path / "o.safetensors", compute=False).plan
    idle = [plan.having(steps=plan.steps[:-1]) for plan in plan.layers]  # no file is there to write to
    tasks, layers_of = submission(batches(idle), Environment("run"))
    sent = packed_tasks.pack_tasks(tasks)
    found = dict(zip(layers_of, map(packed_tasks.unpack, get_sync(sent, list(layers_of))), strict=True))
    assert found.keys() == layers_of.keys()
    assert sorted({receipt.name for receipts in found.values() for receipt in receipts}) == ["a", "b"]
    assert {key: task.dependencies for key, task in sent.items()} == {key: t.dependencies for key, t in tasks.items()}
    assert any(task.args for task in sent.values()), "values of other tasks are packed as well"


def test_a_task_is_named_without_a_look_at_what_it_carries(source: Path, tmp_path: Path,
                                                           monkeypatch: pytest.MonkeyPatch) -> None:
    from dask.tokenize import tokenize

    def looked(*_: Any) -> None:
        raise AssertionError("somebody unpacked a plan")

    tasks, _ = submission(batches(flow(source, tmp_path / "o.safetensors").plan.layers), Environment("run"))
    sent = packed_tasks.pack_tasks(tasks)
    monkeypatch.setattr(packed_tasks, "unpack", looked)
    names = {tokenize(pickle.loads(pickle.dumps(task))) for task in sent.values()}
    assert len(names) == len(tasks)
    with pytest.raises(AssertionError, match="unpacked"):
        next(iter(sent.values()))()


def test_plans_are_sent_as_their_values(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Field names, looked up for each of a million records, would take as long as all the rest."""
    plan = flow(source, tmp_path / "o.safetensors").plan
    monkeypatch.setattr(dataclasses, "fields", None)
    assert pickle.loads(pickle.dumps(plan.layers)) == plan.layers


# -- processes ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def slow_source(tmp_path: Path) -> Path:
    tensors = {f"b.{number}.weight": torch.randn(1024, 1024).bfloat16() for number in range(150)}
    return write_file(tmp_path / "in" / "slow.safetensors", tensors)


@contextlib.contextmanager
def started(*words: str) -> Iterator[subprocess.Popen[bytes]]:
    """A command of Dask, until the block ends."""
    process = subprocess.Popen(
        [str(Path(sys.executable).with_name("dask")), *words], env=environment(), start_new_session=True,
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    try:
        yield process
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


@pytest.mark.slow
@pytest.mark.skipif(os.name == "nt", reason="signals of POSIX")
def test_a_cluster_started_by_hand_loses_a_worker(slow_source: Path, tmp_path: Path,
                                                  monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    """The documented commands; one of two workers is killed midway, and its tasks run on the other."""
    made = Pipeline().read(slow_source).quantize("nvfp4")
    made.write(tmp_path / "expected.safetensors")
    file, folder = str(tmp_path / "scheduler.json"), str(tmp_path / "scratch")
    worker = ("worker", "--scheduler-file", file, "--nthreads", "1", "--no-dashboard", "--local-directory", folder,
              "--no-nanny", "--host", "127.0.0.1")  # fmt: skip
    monkeypatch.setattr(graph, "BATCH_BYTES", 1)
    killed: list[int] = []

    class Killer:
        def start(self, plan: Any, budget: Any) -> None: ...

        def advance(self, receipts: Any) -> None:
            if not killed:
                os.kill(second.pid, signal.SIGKILL)
                killed.append(second.pid)

        def stop(self) -> None: ...

    with (
        started("scheduler", "--scheduler-file", file, "--host", "127.0.0.1", "--port", "0", "--no-dashboard"),
        started(*worker), started(*worker) as second,
    ):  # fmt: skip
        deadline = time.monotonic() + 60
        while not Path(file).exists() and time.monotonic() < deadline:
            time.sleep(0.1)
        with distributed.Client(scheduler_file=file, set_as_default=False) as client:
            client.wait_for_workers(2, timeout=60)
            made.write(tmp_path / "o.safetensors", compute=False).compute(client, Killer())
            assert len(client.nthreads()) == 1
    assert killed
    assert (tmp_path / "o.safetensors").read_bytes() == (tmp_path / "expected.safetensors").read_bytes()


COMMAND = "from quantloom.flow.cli import main\nif __name__ == '__main__':\n    main()\n"


@contextlib.contextmanager
def converting(source: Path, folder: Path) -> Iterator[subprocess.Popen[str]]:
    """``quantloom convert`` on a local cluster of two processes, in a process group of its own."""
    (folder / "command.py").write_text(COMMAND)
    words = ["convert", str(source), str(folder / "o.safetensors"), "--format", "nvfp4", "--scheduler", "distributed",
             "--workers", "2"]  # fmt: skip
    process = subprocess.Popen(
        [sys.executable, str(folder / "command.py"), *words], env=environment(), start_new_session=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    try:
        yield process
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()


def offspring(process: int, least: int, seconds: float = 60) -> list[psutil.Process]:
    """Children of a process, once there are so many."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        found = psutil.Process(process).children(recursive=True)
        if len(found) >= least:
            return found
        time.sleep(0.05)
    raise AssertionError("no worker processes came")


@pytest.mark.slow
@pytest.mark.skipif(os.name == "nt", reason="signals of POSIX")
@pytest.mark.parametrize("after", [0.0, 0.7])
def test_ctrl_c_while_a_local_cluster_starts(after: float, slow_source: Path, tmp_path: Path) -> None:
    with converting(slow_source, tmp_path) as process:
        offspring(process.pid, 2)  # Python's resource tracker, and a worker that is just coming up
        time.sleep(after)
        os.killpg(process.pid, signal.SIGINT)  # as a terminal does: to every process
        told, _ = process.communicate(timeout=150)  # seconds on an idle machine
    assert "Traceback" not in told
    assert "stopped: what had been written was removed" in told
    assert not list(tmp_path.glob("o.*"))


@pytest.mark.slow
@pytest.mark.skipif(os.name == "nt", reason="signals of POSIX")
def test_workers_die_with_the_client(slow_source: Path, tmp_path: Path) -> None:
    with converting(slow_source, tmp_path) as process:
        workers = offspring(process.pid, 3)
        process.kill()
        _, alive = psutil.wait_procs(workers, timeout=10)
        assert not [each for each in alive if each.status() != psutil.STATUS_ZOMBIE]
