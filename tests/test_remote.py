"""Checkpoints behind URLs: the same bytes as from local files, by ranges, through faults, and no secret anywhere."""

from __future__ import annotations

import json
import logging
import pickle
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import fsspec
import pytest
import torch
from checkpoints import Ran, child, listing, make_tensors, write_file, write_folder
from fsspec.implementations.memory import MemoryFileSystem
from servers import Answer, Trick, Web, object_store, serving

from quantloom import Pipeline, Recipe
from quantloom.flow import compat
from quantloom.flow.commit import check_unchanged
from quantloom.formats import ranges, remote, retries, urls
from quantloom.formats.errors import CheckpointError, UsageError
from quantloom.formats.fileio import Reader
from quantloom.formats.places import RemotePath
from quantloom.formats.source import open_source
from quantloom.stages.work import Environment

Cli = Callable[..., Ran]
SECRET = "X-Amz-Signature=5ecre7%2Fabc&X-Amz-Credential=AKIDEXAMPLE"


@pytest.fixture(autouse=True)
def _fresh(monkeypatch: pytest.MonkeyPatch) -> None:
    """Stores of an earlier test may be those of a server that is gone; and nobody waits for a second try."""
    monkeypatch.setattr(ranges, "_stores", {})
    monkeypatch.setattr(retries, "_FIRST_WAIT", 0.001)


@pytest.fixture
def files(tmp_path: Path) -> Path:
    """``tiny.safetensors`` and the folder ``model``."""
    write_file(tmp_path / "files" / "tiny.safetensors")
    write_folder(tmp_path / "files" / "model")
    return tmp_path / "files"


@pytest.fixture
def web(files: Path) -> Iterator[Web]:
    with serving(files) as web:
        yield web


@pytest.fixture
def memory(files: Path) -> Iterator[str]:
    """The same files in ``memory://``."""
    fs = fsspec.filesystem("memory")
    fs.put(str(files), "/stuff", recursive=True)
    yield "memory://stuff"
    fs.rm("/stuff", recursive=True)


def convert(source: str | Path, output: Path, **quantize: Any) -> dict[str, str]:
    """Files of an output and their digests."""
    Pipeline().read(source).quantize(**(quantize or {"format": "mxfp8"})).write(output)
    return listing(output.parent)


def size_of(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))


def every(number: int, answer: Answer) -> Trick:
    """Every so manieth request is answered so."""
    return lambda count, usual: answer if count % number == 0 else usual


def expect_same(files: Path, tmp_path: Path, source: str, local: str, output: str) -> None:
    there = convert(source, tmp_path / "there" / output)
    assert there == convert(files / local, tmp_path / "here" / output)


class TestTheSameBytes:
    @pytest.mark.parametrize(
        ("source", "local", "output"),
        [
            ("tiny.safetensors", "tiny.safetensors", "out.safetensors"),
            ("model/model.safetensors.index.json", "model", "out"),
            (f"tiny.safetensors?{SECRET}", "tiny.safetensors", "out.safetensors"),
        ],
    )
    def test_http_by_ranges(self, web: Web, tmp_path: Path, source: str, local: str, output: str) -> None:
        there = convert(f"{web.url}/{source}", tmp_path / "there" / output)
        sent, folder = web.sent, web.folder / local
        here = convert(folder, tmp_path / "here" / output)
        if local == "model":
            assert here.pop("out/README.md")  # nothing lists what lies there
        assert there == here
        assert sent <= 1.05 * size_of(folder if folder.is_dir() else folder.parent) + 2000  # and configuration

    @pytest.mark.parametrize("source", ["", "/", "/model-*.safetensors", "/model.safetensors.index.json"])
    def test_memory(self, memory: str, files: Path, tmp_path: Path, source: str) -> None:
        local = {"": "model", "/": "model"}.get(source, f"model{source}")
        there = convert(f"{memory}/model{source}", tmp_path / "there" / "out")
        Pipeline().read(str(files / local)).quantize("mxfp8").write(tmp_path / "here" / "out")
        assert there == listing(tmp_path / "here")

    def test_s3(self, files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cli: Cli) -> None:
        with object_store(monkeypatch) as (_, client):
            for path in (files / "model").iterdir():
                client.put_object(Bucket="models", Key=f"deep/tiny/{path.name}", Body=path.read_bytes())
            expect_same(files, tmp_path, "s3://models/deep/tiny", "model", "out")
            done = cli("verify", tmp_path / "there" / "out", "--against", "s3://models/deep/tiny")
            assert done.status == 0, done.err
            found = cli("inspect", "s3://models/deep/tiny/model-00001-of-00003.safetensors", "--json")
            assert json.loads(found.out)["files"] == ["s3://models/deep/tiny/model-00001-of-00003.safetensors"]
            reader = Reader("s3://models/deep/tiny/config.json")
            with pytest.raises(CheckpointError, match="truncated: wanted 10 bytes at offset 1000, got 0"):
                reader.read_into(memoryview(bytearray(10)), 1000)
            with pytest.raises(CheckpointError, match="s3://models/deep/none: does not exist"):
                open_source("s3://models/deep/none")
            client.put_object(Bucket="models", Key="one.safetensors", Body=b"1")
            source = open_source("s3://models/deep/tiny")
            check_unchanged(source)
            shard = "model-00002-of-00003.safetensors"
            content = (files / "model" / shard).read_bytes()
            client.put_object(Bucket="models", Key=f"deep/tiny/{shard}", Body=content[:-1] + b"x")
            with pytest.raises(CheckpointError, match=r"00002-of-00003.safetensors changed .* version \d+ -> \d+\);"):
                check_unchanged(source)

    def test_s3_answers_that_fail_are_asked_for_again(
        self, files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """SlowDown and resets of the client library's own kind."""
        from botocore.exceptions import ClientError, EndpointConnectionError

        with object_store(monkeypatch) as (_, client):
            client.put_object(Bucket="models", Key="a.safetensors", Body=(files / "tiny.safetensors").read_bytes())
            store = ranges.store_of("s3://models/a.safetensors")
            usual, calls = store.fs._call_s3, list[str]()

            async def failing(name: str, *more: Any, **arguments: Any) -> Any:
                calls.append(name)
                if len(calls) % 3 == 1:
                    words = {"Error": {"Code": "SlowDown"}, "ResponseMetadata": {"HTTPStatusCode": 503}}
                    raise ClientError(words, "GetObject")  # type: ignore[arg-type]
                if len(calls) % 3 == 2:
                    raise EndpointConnectionError(endpoint_url="http://nowhere")
                return await usual(name, *more, **arguments)

            monkeypatch.setattr(store.fs, "_call_s3", failing)
            expect_same(files, tmp_path, "s3://models/a.safetensors", "tiny.safetensors", "out.safetensors")
            assert len(calls) > 30

    @pytest.mark.parametrize("scheme", ["hf", "gs"])
    def test_other_protocols_go_through_their_file_system(
        self, scheme: str, memory: str, files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Their servers cannot be reached by a test: a stand-in with the names and facts of the real ones."""

        class StandIn(MemoryFileSystem):
            protocol = scheme

            @classmethod
            def _strip_protocol(cls, path: str) -> str:
                return str(MemoryFileSystem._strip_protocol(path.replace(f"{scheme}://", "memory://")))

            def info(self, path: str, **options: Any) -> dict[str, Any]:
                found = {**super().info(path, **options)}
                found.pop("created", None)
                return {**found, "blob_id": "1"} if scheme == "hf" else {**found, "etag": "1", "updated": "today"}

        monkeypatch.setitem(sys.modules["fsspec.registry"]._registry, scheme, StandIn)
        expect_same(files, tmp_path, f"{scheme}://stuff/model", "model", "out")

    @pytest.mark.parametrize("options", [{"format": "fp8", "scaling": "row"}, {"format": "nvfp4"}], ids=str)
    def test_read_ahead_in_many_blocks(
        self, web: Web, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: dict[str, Any]
    ) -> None:
        monkeypatch.setattr(remote, "BLOCK_BYTES", 20_000)
        there = convert(f"{web.url}/tiny.safetensors", tmp_path / "there" / "out.safetensors", **options)
        assert there == convert(web.folder / "tiny.safetensors", tmp_path / "here" / "out.safetensors", **options)

    def test_commands(self, web: Web, tmp_path: Path, cli: Cli) -> None:
        """Each that reads a checkpoint, and the command that the report names."""
        url, out = f"{web.url}/tiny.safetensors", tmp_path / "out.safetensors"
        done = cli("convert", url, out, "--format", "fp8", "--json")
        assert done.status == 0, done.err
        words = json.loads(done.out)["verify"].split()
        assert words[-1] == url
        assert cli(*words[1:]).status == 0
        assert cli("plan", url, "--format", "fp8").status == 0
        (web.folder / "made.safetensors").write_bytes(out.read_bytes())
        made = f"{web.url}/made.safetensors"
        assert cli("dequantize", made, tmp_path / "d.safetensors").status == 0
        assert cli("edit", made, tmp_path / "e.safetensors", "--rebuild-header").status == 0
        assert cli("migrate", made, tmp_path / "m.safetensors").status in (0, 1)  # nothing may be left to migrate
        refused = cli("edit", made, "--in-place", "--rebuild-header")
        assert refused.status == 2
        assert "--in-place changes local files only" in refused.err

    @pytest.mark.slow
    def test_workers_in_other_processes(self, web: Web, tmp_path: Path) -> None:
        """The query of a signed URL goes along with the tasks."""
        pytest.importorskip("distributed")
        web.trick = lambda _, answer: answer if "token=" in web.requests[-1] else Answer(403, {}, b"")
        script = tmp_path / "run.py"
        script.write_text(
            "import sys\nfrom quantloom import Pipeline\n"
            "if __name__ == '__main__':\n"
            f"    Pipeline(scheduler='distributed', workers=1).read({web.url + '/tiny.safetensors?token=abc'!r})"
            f".quantize('mxfp8').write({str(tmp_path / 'there' / 'out.safetensors')!r})\n"
        )
        done = child(str(script))
        assert done.status == 0, done.err
        here = convert(web.folder / "tiny.safetensors", tmp_path / "here" / "out.safetensors")
        assert listing(tmp_path / "there") == here


class TestFaults:
    @pytest.mark.parametrize(
        "answer",
        [
            Answer(503, {"Retry-After": "0"}, b"SlowDown"), Answer(429, {}, b""), Answer(500, {}, b""),
        ],
        ids=lambda answer: str(answer.status),
    )  # fmt: skip
    def test_every_seventh_request_fails(self, web: Web, tmp_path: Path, answer: Answer) -> None:
        web.trick = every(7, answer)
        expect_same(web.folder, tmp_path, f"{web.url}/tiny.safetensors", "tiny.safetensors", "out.safetensors")
        assert len(web.requests) >= 14

    def test_every_fifth_connection_ends_early(self, web: Web, tmp_path: Path) -> None:
        def cut(count: int, answer: Answer) -> Answer:
            return Answer(answer.status, answer.headers, answer.body, hang_up=True) if count % 5 == 0 else answer

        web.trick = cut
        expect_same(web.folder, tmp_path, f"{web.url}/tiny.safetensors", "tiny.safetensors", "out.safetensors")

    def test_it_gives_up_and_leaves_nothing(self, web: Web, tmp_path: Path) -> None:
        web.trick = lambda count, answer: Answer(503, {}, b"") if count > 10 else answer
        with pytest.raises(CheckpointError, match=r"the server answers 503 \(tried 6 times\)"):
            convert(f"{web.url}/tiny.safetensors", tmp_path / "out" / "out.safetensors")
        assert not (tmp_path / "out").exists()

    @pytest.mark.parametrize(("status", "words"), [(403, "access is refused"), (401, "wants credentials")])
    def test_refusals_are_not_asked_for_again(self, web: Web, status: int, words: str) -> None:
        web.trick = lambda _count, _answer: Answer(status, {}, b"")
        with pytest.raises(CheckpointError, match=words):
            open_source(f"{web.url}/tiny.safetensors")
        assert len(web.requests) == 1

    def test_a_file_that_is_not_there(self, web: Web) -> None:
        with pytest.raises(CheckpointError, match="does not exist; a URL of HTTP is that of a file"):
            open_source(f"{web.url}/model")
        assert len(web.requests) == 1

    def test_a_source_that_changes_meanwhile(self, web: Web, tmp_path: Path) -> None:
        path = web.folder / "tiny.safetensors"

        def change(count: int, answer: Answer) -> Answer:
            if count == 12:
                write_file(path, make_tensors(seed=1))
            return answer

        web.trick = change
        with pytest.raises(CheckpointError, match=r"tiny.safetensors changed while it was converted .* version"):
            convert(f"{web.url}/tiny.safetensors", tmp_path / "out" / "out.safetensors")
        assert not (tmp_path / "out").exists()


HOSTILE: dict[str, tuple[Trick, str]] = {
    "whole": (lambda _, a: Answer(200, {}, a.body), "ignores byte ranges and would send the whole file"),
    "no range said": (lambda _, a: Answer(206, {}, a.body), "does not say which range it sends"),
    "no length": (lambda _, a: Answer(206, {"Content-Range": "bytes 0-0/*"}, a.body), "and of how many bytes"),
    "other range": (lambda _, a: Answer(206, {"Content-Range": "bytes 5-9/100"}, a.body), "were asked for"),
    "more": (lambda _, a: Answer(206, a.headers | {"Content-Length": ""}, a.body + bytes(1 << 24)), "sent more than"),
    "compressed": (lambda _, a: Answer(206, a.headers | {"Content-Encoding": "gzip"}, a.body), "compresses ranges"),
    "less than said": (lambda _, a: Answer(206, a.headers | {"Content-Length": "9"}, b"", hang_up=True), "not complet"),
    "more than said": (lambda _, a: Answer(206, a.headers | {"Content-Length": "0"}, a.body), "after 0 of|status line"),
    "to a file": (lambda _, a: Answer(302, {"Location": "file:///etc/passwd"}, b""), "Redirect"),
    "in circles": (lambda _, a: Answer(302, {"Location": "/tiny.safetensors"}, b""), "TooManyRedirects"),
}


class TestHostileServers:
    @pytest.mark.parametrize("case", HOSTILE)
    def test_refused_at_once(self, web: Web, case: str) -> None:
        web.trick, words = HOSTILE[case]
        with pytest.raises(CheckpointError, match=words):
            open_source(f"{web.url}/tiny.safetensors")
        assert web.sent < 1 << 23  # of sixteen: as much as sockets hold

    @pytest.mark.parametrize("size", [200, 1 << 40])
    def test_a_length_that_is_a_lie(self, web: Web, size: int) -> None:
        def lie(_: int, answer: Answer) -> Answer:
            said = answer.headers["Content-Range"].rpartition("/")[0]
            return Answer(206, answer.headers | {"Content-Range": f"{said}/{size}"}, answer.body)

        web.trick = lie
        with pytest.raises(CheckpointError, match=r"past the end of the file|trailing bytes|were asked for"):
            open_source(f"{web.url}/tiny.safetensors")

    def test_a_header_of_gigabytes(self, web: Web) -> None:
        with (web.folder / "huge.safetensors").open("wb") as file:
            file.write((8 << 30).to_bytes(8, "little") + b"{")
            file.truncate(9 << 30)
        with pytest.raises(CheckpointError, match="header length 8589934592 exceeds"):
            open_source(f"{web.url}/huge.safetensors")
        assert web.sent < 100

    def test_a_store_that_sends_more_than_asked(self, memory: str, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(MemoryFileSystem, "cat_file", lambda *_, **__: bytes(1 << 20))
        with pytest.raises(CheckpointError, match="the store sent 1048576 bytes where 9 were asked for"):
            open_source(f"{memory}/tiny.safetensors")


class TestSecrets:
    def test_none_is_shown_anywhere(self, web: Web, tmp_path: Path, cli: Cli, caplog: pytest.LogCaptureFixture) -> None:
        url, out = f"{web.url}/tiny.safetensors?{SECRET}", tmp_path / "out.safetensors"
        caplog.set_level(logging.INFO)
        web.trick = every(5, Answer(503, {}, b""))
        ran = [cli(*words) for words in (
            ("convert", url, out, "--format", "fp8", "-vv"), ("convert", url, out, "--format", "fp8"),
            ("convert", url, out, "--format", "fp8", "--overwrite", "--json"),
            ("plan", url, "--format", "fp8", "--json"),
            ("inspect", url), ("inspect", url, "--json"), ("verify", out, "--against", url),
            ("verify", out, "--against", url, "--json"), ("convert", url, url, "--format", "fp8"),
            ("edit", url, "--in-place"), ("inspect", f"{web.url}/none?{SECRET}"),
        )]  # fmt: skip
        assert [done.status for done in ran] == [0, 1, 0, 0, 0, 0, 0, 0, 2, 2, 1]
        assert all(SECRET in request for request in web.requests if not request.endswith("config.json"))
        flow = Pipeline().read(url).quantize("fp8").write(tmp_path / "new.safetensors", compute=False)
        shown = [
            *(done.out + done.err for done in ran), caplog.text, out.read_bytes().decode("latin1"),
            flow.recipe.to_json(), repr(flow), repr(flow.plan), flow.plan.explain(), repr(flow.plan.source),
        ]  # fmt: skip
        for secret in ("5ecre7", "AKIDEXAMPLE", "X-Amz"):
            assert not [text for text in shown if secret in text]
        assert "?hidden=" in flow.plan.explain()

    @pytest.mark.slow
    @pytest.mark.parametrize("status", [200, 403])
    def test_nor_in_tracebacks(self, web: Web, tmp_path: Path, status: int) -> None:
        web.trick = lambda _, answer: Answer(status, {}, answer.body)
        code = f"from quantloom import Pipeline; Pipeline().read({web.url + '/t.safetensors?' + SECRET!r})"
        code += ".quantize('fp8').write('o.safetensors')"
        (tmp_path / "run.py").write_text("exec(open('code.txt').read())\n")
        (tmp_path / "code.txt").write_text(code)
        done = child("run.py", cwd=tmp_path)
        assert done.status == 1
        assert "CheckpointError" in done.err
        assert "5ecre7" not in done.err + done.out

    @pytest.mark.parametrize(
        "url",
        [
            "https://me:5ecre7@host/a.safetensors", "https://5ecre7@host/a.safetensors",
            "s3://key:5ecre7@bucket/a.safetensors", "s3://bucket/a?X-Amz-Signature=5ecre7",
        ],
    )  # fmt: skip
    def test_passwords_and_idle_queries_are_refused(self, url: str, cli: Cli) -> None:
        for words in (("inspect", url), ("plan", url, "--format", "fp8"), ("verify", url, "--against", url)):
            done = cli(*words)
            assert done.status == 2
            assert "credentials come from the environment" in done.err
            assert "5ecre7" not in done.err + done.out

    @pytest.mark.parametrize(
        "words",
        [
            ("convert", "{file}", "o.safetensors", "--format", "nvfp4", "--statistics", "{url}"),
            ("extract-lora", "{file}", "{url}", "o.safetensors"), ("calibrate", "{url}", "-o", "s.zarr"),
            ("verify", "{file}", "--against", "{file}", "--statistics", "{url}"),
        ],
        ids=lambda words: words[0],
    )  # fmt: skip
    def test_other_paths_show_no_query_either(self, checkpoint: Path, cli: Cli, words: tuple[str, ...]) -> None:
        url = f"https://127.0.0.1:9/a?{SECRET}"
        done = cli(*(word.format(file=checkpoint, url=url) for word in words))
        assert done.status in (1, 2)
        assert "5ecre7" not in done.err + done.out

    def test_nor_does_the_compatible_command(self, capfd: pytest.CaptureFixture[str]) -> None:
        with pytest.raises(SystemExit):
            compat.main(["-i", f"https://127.0.0.1:9/a?{SECRET}", "--simple"])
        printed = capfd.readouterr()
        assert "https://127.0.0.1:9/a?..." in printed.err
        assert "5ecre7" not in printed.err + printed.out

    def test_a_query_is_not_found_again_from_what_was_shown(self) -> None:
        shown = urls.hide("https://host/a.safetensors?token=abc")
        assert shown.startswith("https://host/a.safetensors?hidden=")
        assert urls.whole(shown) == "https://host/a.safetensors?token=abc"
        assert urls.hide(str(shown)) == shown
        with pytest.raises(UsageError, match="give the whole URL"):
            urls.hide("https://host/a.safetensors?hidden=00000000")
        with pytest.raises(UsageError, match="can only be the checkpoint that a command reads"):
            open_source("https://host/other.safetensors?token=abc")

    def test_a_query_travels_by_pickle(self) -> None:
        shown = urls.hide("https://host/b.safetensors?token=abc")
        data = pickle.dumps({"path": RemotePath(shown)})
        del urls._queries[shown]
        path = pickle.loads(data)["path"]
        assert urls.whole(str(path)) == "https://host/b.safetensors?token=abc"
        assert path.name == "b.safetensors"
        assert urls.whole((path.parent / "c").url) == "https://host/c?token=abc"


class TestUrls:
    def test_statistics_are_local(self, checkpoint: Path, cli: Cli) -> None:
        done = cli("convert", checkpoint, "o.safetensors", "--format", "fp8", "--statistics", "s3://bucket/stats.zarr")
        assert done.status == 2
        assert "statistics are read from this machine only" in done.err

    def test_public_buckets_are_read_by_choice_of_the_environment(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """And nothing repeats requests beside this package."""
        monkeypatch.setitem(fsspec.config.conf, "s3", {"anon": "true"})
        fs = ranges.store_of("s3://bucket/a").fs
        assert fs.anon
        assert fs.retries == 1
        assert fs.config_kwargs["retries"]["max_attempts"] == 0

    def test_outputs_are_local(self, checkpoint: Path, cli: Cli) -> None:
        done = cli("convert", checkpoint, "s3://bucket/out.safetensors", "--format", "fp8")
        assert done.status == 2
        assert "s3://bucket/out.zarr" in done.err
        assert "quantloom assemble" in done.err

    @pytest.mark.parametrize(
        ("url", "words"),
        [
            ("nosuch://bucket/a", "unknown protocol"),
            ("file:///tmp/a.safetensors", "give its path"),
            ("simplecache::s3://bucket/a", "chained URLs are fetched as a whole"),
        ],
    )
    def test_what_means_nothing(self, url: str, words: str) -> None:
        with pytest.raises(UsageError, match=words):
            open_source(url)

    def test_a_slash_that_path_swallowed(self) -> None:
        with pytest.raises(CheckpointError, match="two slashes only as text"):
            open_source(Path("s3://bucket/a.safetensors"))

    def test_packages_that_are_missing(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(sys.modules, "s3fs", None)
        monkeypatch.delitem(sys.modules["fsspec.registry"]._registry, "s3", raising=False)
        with pytest.raises(UsageError, match=r"s3:// URLs need s3fs: pip install 'quantloom\[remote\]' s3fs"):
            open_source("s3://bucket/a.safetensors")
        monkeypatch.setitem(sys.modules, "fsspec", None)
        with pytest.raises(UsageError, match=r"need fsspec: pip install 'quantloom\[remote\]'"):
            open_source("gs://bucket/a.safetensors")

    def test_recipes_keep_urls_whole(self) -> None:
        recipe = Pipeline().read("s3://bucket/model").quantize("fp8").write("o.safetensors", compute=False).recipe
        assert Recipe.from_json(recipe.to_json()).source == ("s3://bucket/model",)

    def test_patterns_keep_their_question_marks(self) -> None:
        assert urls.hide("s3://bucket/model-?????-of-*.safetensors") == "s3://bucket/model-?????-of-*.safetensors"


class TestReadingAhead:
    def test_what_is_announced_is_fetched_once(self, web: Web, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(remote, "BLOCK_BYTES", 10_000)
        content = (web.folder / "tiny.safetensors").read_bytes()
        with Reader(f"{web.url}/tiny.safetensors") as reader:
            reader.announce(1000, 95_001)
            for start in range(1000, 95_001, 3000):
                part = bytearray(min(3000, 95_001 - start))
                reader.read_into(memoryview(part), start)
                assert part == content[start : start + len(part)]
        assert web.sent == 94_001
        assert len(web.requests) == 10

    def test_it_is_part_of_the_memory_promise(self, web: Web, tmp_path: Path) -> None:
        def need(source: str | Path) -> tuple[int, int]:
            flow = Pipeline().read(source).quantize("mxfp8").write(tmp_path / "o.safetensors", compute=False)
            layer = flow.plan.quantized[0]
            return layer.steps[0].memory(layer, Environment()), layer.layer.weight.nbytes

        (there, size), (here, _) = need(f"{web.url}/tiny.safetensors"), need(web.folder / "tiny.safetensors")
        assert there - here == remote.ahead_bytes(size) == size
        assert remote.ahead_bytes(1 << 40) == remote.BLOCKS_AHEAD * remote.BLOCK_BYTES

    def test_no_block_is_left_behind(self, web: Web, monkeypatch: pytest.MonkeyPatch) -> None:
        """However it is read, at most ``BLOCKS_AHEAD`` blocks are held."""
        monkeypatch.setattr(remote, "BLOCK_BYTES", 1000)
        with Reader(f"{web.url}/tiny.safetensors") as reader:
            assert isinstance(reader, remote.RemoteReader)
            reader.announce(0, 100_000)
            order = torch.randperm(50, generator=torch.Generator().manual_seed(0)).tolist()
            for number in order:
                reader.read_into(memoryview(bytearray(2000)), number * 2000)
                assert len(reader._remote.announced[0]._blocks) <= remote.BLOCKS_AHEAD


def test_the_command_line_starts_without_it() -> None:
    code = "import sys, quantloom.flow.cli, quantloom.formats.source; print('fsspec' in sys.modules)"
    assert child("-c", code).out.strip() == "False"
