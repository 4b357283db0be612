"""Raw files here, packed and far away: what a read costs, and what of a store's latency is left.

    python benchmarks/storage.py

Pictures are random bytes in one tar, as JPEGs are to a compressor. Three comparisons, the two sides of each in turn:
packs read by `read_ahead` from this machine against bare `pread`; the same packs from a web server that waits before
each answer, read one after another against ahead of a worker that takes `work` per picture; and the walk of a tar
that is plain, packed with gzip, and packed with Zstandard.
"""

from __future__ import annotations

import argparse
import gzip
import http.server
import io
import json
import os
import random
import re
import statistics
import tarfile
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import zstandard

from preprocess.inputs import read_ahead, read_range
from preprocess.samples import Media, Place, RawSample
from preprocess.sources.base import SourceContext
from preprocess.sources.webdataset import WebDataset, WebDatasetConfig
from shared.tokens import TokenNames

Packs = Sequence[Sequence[Place]]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--pictures", type=int, default=2000)
    parser.add_argument("--picture_bytes", type=int, default=50_000)
    parser.add_argument("--per_pack", type=int, default=20)
    parser.add_argument("--latency_ms", type=float, default=50.0)
    parser.add_argument("--work_ms", type=float, default=2.0, help="per picture: decode, resize, patchify")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", action="store_true", help="print one JSON object last")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        path = write_tar(Path(name) / "a.tar", options.pictures, options.picture_bytes)
        packs = places_of(path, options.per_pack)
        figures = {
            "here": measure_here(packs, options.rounds),
            "far": measure_far(path, packs[:25], options.latency_ms / 1000, options.work_ms / 1000),
            "walk": measure_walk(path, options.rounds),
        }
    here, far, walk = figures["here"], figures["far"], figures["walk"]
    print(f"{options.pictures} pictures of {options.picture_bytes} bytes, {options.per_pack} per pack")
    print(
        f"this machine: pread {here['pread_us']:.1f} us per picture, read_ahead {here['read_ahead_us']:.1f} us"
    )
    print(
        f"{options.latency_ms:.0f} ms away, {options.work_ms:.0f} ms of work per picture: one after another "
        f"{far['one_by_one_s']:.2f} s, ahead {far['ahead_s']:.2f} s, the work alone {far['work_s']:.2f} s"
    )
    print(", ".join(f"walk of a {kind} tar {rate:.0f} MB/s" for kind, rate in walk.items()))
    if options.json:
        print(json.dumps(figures))


def write_tar(path: Path, pictures: int, size: int) -> Path:
    rng = random.Random(0)
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
        for number in range(pictures):
            for kind, content in (("jpg", rng.randbytes(size)), ("txt", b"a picture of bytes")):
                member = tarfile.TarInfo(f"{number:06d}.{kind}")
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
    return path


def open_source(path: str) -> WebDataset:
    context = SourceContext("web", Path("unused"), TokenNames())
    return WebDataset(WebDatasetConfig(paths=(path,)), context)


def places_of(path: Path, per_pack: int) -> list[list[Place]]:
    """Pictures in random order, as a plan has them, cut into packs."""
    media = [
        entry.segments[0] for entry in open_source(str(path)).scan(str(path)) if isinstance(entry, RawSample)
    ]
    places = [item.place for item in media if isinstance(item, Media) and item.place]
    random.Random(0).shuffle(places)
    return [places[start : start + per_pack] for start in range(0, len(places), per_pack)]


def measure_here(packs: Packs, rounds: int) -> dict[str, float]:
    pictures = sum(map(len, packs))

    def bare() -> None:
        file = os.open(packs[0][0].file, os.O_RDONLY)
        for pack in packs:
            for place in pack:
                os.pread(file, place.size, place.offset)
        os.close(file)

    def ahead() -> None:
        for pack, read in read_ahead(packs, lambda pack: pack):
            for place in pack:
                read(place)

    best = in_turn({"pread_us": bare, "read_ahead_us": ahead}, rounds)
    return {name: seconds / pictures * 1e6 for name, seconds in best.items()}


def measure_far(path: Path, packs: Packs, latency_s: float, work_s: float) -> dict[str, float]:
    content = path.read_bytes()

    class Handler(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        wbufsize = 1 << 17  # one packet for headers and body, or the client acknowledges late

        def do_GET(self) -> None:
            time.sleep(latency_s)
            wanted = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers["Range"])
            assert wanted is not None
            part = content[int(wanted[1]) : int(wanted[2]) + 1]
            self.send_response(206)
            self.send_header("Content-Length", str(len(part)))
            self.end_headers()
            self.wfile.write(part)

        def log_message(self, format: str, *args: Any) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    url = f"http://127.0.0.1:{server.server_address[1]}/a.tar"
    far = [[Place(url, place.offset, place.size) for place in pack] for pack in packs]

    def one_by_one() -> None:
        for pack in far:
            for place in pack:
                read_range(place.file, place.offset, place.size)
                time.sleep(work_s)

    def ahead() -> None:
        for pack, read in read_ahead(far, lambda pack: pack):
            for place in pack:
                read(place)
                time.sleep(work_s)

    best = in_turn({"one_by_one_s": one_by_one, "ahead_s": ahead}, 1)
    server.shutdown()
    return {**best, "work_s": work_s * sum(map(len, far))}


def measure_walk(path: Path, rounds: int) -> dict[str, float]:
    """MB of the plain tar per second: groups found, every picture's bytes read once."""
    data = path.read_bytes()
    packed = {"gzip": gzip.compress(data, 6), "zstd": zstandard.compress(data, 3)}
    paths = {"plain": path}
    for kind, content in packed.items():
        paths[kind] = path.with_suffix(f".{kind}.tar")
        paths[kind].write_bytes(content)

    def walk(path: str) -> None:
        for entry in open_source(path).scan(path):
            assert isinstance(entry, RawSample)
            picture = entry.segments[0]
            assert isinstance(picture, Media)
            picture.file.read()

    seconds = in_turn({kind: lambda path=str(path): walk(path) for kind, path in paths.items()}, rounds)
    return {kind: len(data) / best / 1e6 for kind, best in seconds.items()}


def in_turn(sides: dict[str, Callable[[], None]], rounds: int) -> dict[str, float]:
    """The median time of each, measured in turn."""
    times: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(rounds):
        for name, run in sides.items():
            start = time.perf_counter()
            run()
            times[name].append(time.perf_counter() - start)
    return {name: statistics.median(found) for name, found in times.items()}


if __name__ == "__main__":
    main()
