"""Checksums of an output: is every byte what was written? Reads everything once, in parallel, in bounded memory."""

from __future__ import annotations

import re
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ..formats.errors import CheckpointError, UsageError, listed, shown
from ..formats.fileio import Reader
from ..formats.index import index_of, read_index
from ..formats.journal import UnfinishedEdit
from ..formats.manifest import Manifest, header_checksum, parse
from ..formats.places import Place
from ..formats.safetensors import Header, read_header
from ..formats.shards import SUFFIX
from ..formats.source import open_source
from .piece_sums import Stored, sum_pieces
from .sizes import count, show_seconds, show_size

HEADER, TENSOR, INDEX, FILES = "header", "tensor", "index", "files"
_SHOWN = 5
_SLOW_BYTES = 10**8
"""Of less, no rate is said: opening the files takes longer than reading them."""
_NUMBERED = re.compile(r"-(\d{5})-of-(\d{5})\.safetensors$")


@dataclass(frozen=True)
class Finding:
    """Something that is not what was written."""

    kind: str
    """What differs: ``header``, ``tensor``, ``index``, or ``files``: that these are those of one output."""
    path: str
    text: str
    """What is wrong, in words."""
    tensor: str = ""
    start: int | None = None
    """Range of bytes of the file, of a tensor or a piece of one."""
    stop: int | None = None
    expected: str = ""
    """Checksum that the manifest tells."""
    found: str = ""

    def __str__(self) -> str:
        return self.text if self.text.startswith(self.path) else f"{self.path}: {self.text}"


@dataclass(frozen=True)
class ChecksumCheck:
    """What a look at all bytes found."""

    output: str
    files: int
    tensors: int
    nbytes: int
    """Bytes that were read and summed."""
    seconds: float
    source: str
    """Digest of the source that the manifests tell of; empty when they do not agree."""
    findings: tuple[Finding, ...]

    @property
    def ok(self) -> bool:
        return not self.findings

    def to_dict(self) -> dict[str, Any]:
        """JSON values."""
        rate = self.nbytes / 1e9 / self.seconds if self.seconds else 0.0
        return {
            **asdict(self), "findings": [asdict(finding) for finding in self.findings], "ok": self.ok,
            "gb_per_second": rate, "problems": [str(finding) for finding in self.findings],
        }  # fmt: skip

    def __str__(self) -> str:
        rate = f", {self.nbytes / 1e9 / self.seconds:.2f} GB/s" if self.nbytes > _SLOW_BYTES else ""
        verdict = "every byte is as it was written" if self.ok else f"BROKEN ({count(len(self.findings), 'problem')})"
        checked = f"{count(self.tensors, 'tensor')} in {count(self.files, 'file')}, {show_size(self.nbytes)}"
        return f"{self.output}: {verdict}; checksums of {checked}, {show_seconds(self.seconds)}{rate}"


def verify_checksums(output: str, watch: Callable[[int, int], None] | None = None) -> ChecksumCheck:
    """Reads every byte of a file, folder, index or glob and compares it with the checksums that the files carry.

    ``watch`` is told how many bytes of all are done. Raises UsageError when no file carries any, CheckpointError when
    there is nothing to read.
    """
    found = look(output, watch)
    if found is None:
        raise UsageError(
            f"{output}: carries no checksums: another program wrote it, or wrote it anew; compare its weights with "
            f"those that it was made from: quantloom verify {output} --against SOURCE"
        )
    return found


def look(output: str, watch: Callable[[int, int], None] | None = None) -> ChecksumCheck | None:
    """As ``verify_checksums``; None where no file carries checksums."""
    began = time.perf_counter()
    paths, index, problem = _locate(output)
    findings: list[Finding] = []
    headers: list[Header] = []
    manifests: dict[str, Manifest] = {}
    for path in paths:
        try:
            header = read_header(path)
            headers.append(header)
            manifest = parse(header.metadata, header.path)
        except CheckpointError as error:
            findings.append(Finding(HEADER, str(path), str(error)))
            continue
        if manifest is not None:
            manifests[header.path] = manifest
    if not manifests and not findings and not problem:
        return None
    stored: list[Stored] = []
    for header in headers:
        if header.path in manifests:
            findings += _header_findings(header, manifests[header.path])
            stored += _stored(header, manifests[header.path], findings)
        elif manifests and not any(finding.path == header.path for finding in findings):
            findings.append(Finding(HEADER, header.path, "carries no checksums, other files of this output do"))
    if len(paths) > 1 or index is not None:
        findings += [*_set_findings(manifests), *_number_findings(paths, index)]
    if index is not None:
        findings += _index_findings(index, headers, complete=len(headers) == len(paths))
    findings += [_difference(piece, digits, error) for piece, digits, error in sum_pieces(stored, watch)]
    if problem and not findings:
        findings.append(Finding(FILES, output, problem))
    sources = {manifest.source for manifest in manifests.values()}
    tensors = len({(item.path, item.piece.name) for item in stored})
    nbytes = sum(item.piece.nbytes for item in stored)
    source = sources.pop() if len(sources) == 1 else ""
    seconds = time.perf_counter() - began
    return ChecksumCheck(output, len(paths), tensors, nbytes, seconds, source, tuple(findings))


def _locate(output: str) -> tuple[list[Place], Place | None, str]:
    """The files, their index, and what stands against opening them as one checkpoint."""
    path, problem = Path(output), ""
    try:
        paths: list[Place] = list(open_source(output).files)
    except UnfinishedEdit:
        raise
    except CheckpointError as error:
        folder = path if path.is_dir() else path.parent
        known = [path] if path.is_file() and path.name.endswith(SUFFIX) else sorted(folder.glob("*" + SUFFIX))
        index = _index(path)
        stem = "" if index is None else f"{index.name.removesuffix('.safetensors.index.json')}-"
        paths, problem = [file for file in known if file.is_file() and file.name.startswith(stem)], str(error)
        if not paths or not path.exists():
            raise
    return [file.absolute() for file in paths], _index(path), problem


def _index(path: Path) -> Place | None:
    if path.is_dir():
        return index_of(path)
    return path if path.name.endswith(".index.json") else None


def _header_findings(header: Header, manifest: Manifest) -> Iterator[Finding]:
    """The header beside its own checksum, and its tensors beside those that were written."""
    with Reader(header.path) as reader:
        head = bytearray(min([reader.size, *(ref.start for ref in header.refs)]))
        reader.read_into(memoryview(head), 0)
    found = header_checksum(bytes(head))
    if found != manifest.header:
        names = {ref.name for ref in header.refs}
        odd = [(lost, "lacks") for lost in sorted(manifest.tensors.keys() - names)]
        odd += [(new, "has gained") for new in sorted(names - manifest.tensors.keys())]
        words = [f"it {verb} {shown(name)}" for name, verb in odd]
        text = "the header was rewritten by another program, or is damaged: its checksum "
        text += f"is {found or 'out of place'}, {manifest.header} was written"
        named = f"; {listed(words, _SHOWN)}" if words else ""
        yield Finding(HEADER, header.path, text + named, "", 0, len(head), manifest.header, found)


def _stored(header: Header, manifest: Manifest, findings: list[Finding]) -> Iterator[Stored]:
    """Every piece of every tensor that is listed; a finding for one whose pieces do not fit it."""
    for ref in header.refs:
        if ref.name not in manifest.tensors:
            continue
        pieces = manifest.pieces(ref)
        if pieces is None:
            text = f"tensor {shown(ref.name)}: its pieces in the manifest do not make up {ref.nbytes} bytes"
            findings.append(Finding(TENSOR, header.path, text, ref.name, ref.start, ref.start + ref.nbytes))
            continue
        yield from (Stored(header.path, ref.start + piece.start, piece) for piece in pieces)


def _difference(item: Stored, digits: str, error: str) -> Finding:
    piece, stop = item.piece, item.start + item.piece.nbytes
    text = f"tensor {shown(piece.name)}: bytes {item.start} to {stop} of the file are not what was written: "
    text += error or f"their checksum is {digits}, {piece.checksum} was written"
    return Finding(TENSOR, item.path, text, piece.name, item.start, stop, piece.checksum, digits)


def _set_findings(manifests: Mapping[str, Manifest]) -> Iterator[Finding]:
    """Files that another plan wrote, or that were made from another source, than most."""
    origins = {path: (manifest.plan, manifest.source) for path, manifest in manifests.items()}
    most = max(Counter(origins.values()).items(), key=lambda item: item[1])[0] if origins else None
    for path, origin in origins.items():
        if most is not None and origin != most:
            pairs = zip(("plan", "source"), origin, most, strict=True)
            words = [f"{what} {own[:16]}, not {other[:16]}" for what, own, other in pairs if own != other]
            yield Finding(FILES, path, f"was written by another run than the other files: {' and '.join(words)}")


def _number_findings(paths: Sequence[Place], index: Place | None) -> Iterator[Finding]:
    """Numbered files, or their index, that are not there."""
    numbered = {path: match for path in paths if (match := _NUMBERED.search(path.name))}
    for path, match in numbered.items():
        names = {path.parent / f"{path.name[:match.start()]}-{n:05d}-of-{match[2]}{SUFFIX}" for n in
                 range(1, min(int(match[2]), 2 * len(paths) + _SHOWN) + 1)}  # fmt: skip
        if missing := sorted(other.name for other in names - set(paths)):
            yield Finding(FILES, str(path.parent), f"files are missing: {listed(missing, _SHOWN)}")
            return
    if numbered and index is None and not list(paths[0].parent.glob("*.index.json")):
        yield Finding(FILES, str(paths[0].parent), "the index of the numbered files is missing: clients need it")


def _index_findings(index: Place, headers: Sequence[Header], complete: bool) -> Iterator[Finding]:
    """The index beside the files: where every tensor lies, how many bytes they have, and nothing else."""
    try:
        table = read_index(index)
    except CheckpointError as error:
        yield Finding(INDEX, str(index), str(error))
        return
    lies = {ref.name: Path(header.path).name for header in headers for ref in header.refs}
    said, total = table["weight_map"], sum(ref.nbytes for header in headers for ref in header.refs)
    wrong = [f"{shown(name)} lies in {file}, not {shown(said[name])}" for name, file in lies.items()
             if said.get(name, file) != file]  # fmt: skip
    wrong += [f"{shown(name)} of {file} is missing" for name, file in lies.items() if name not in said]
    if complete:
        wrong += [f"no file has {shown(name)}" for name in said if name not in lies]
        own = {"metadata": {"total_size": total}, "weight_map": said}
        if table != own and not wrong:
            wrong = [f"it was rewritten or damaged: beside weight_map it holds "
                     f"{shown({key: value for key, value in table.items() if key != 'weight_map'})}, "
                     f"{shown({'metadata': own['metadata']})} was written"]  # fmt: skip
    if wrong:
        yield Finding(INDEX, str(index), f"does not fit the files: {listed(wrong, _SHOWN)}")
