"""The text: the King James Bible from Debian's `bible-kjv-text`, as one document per chapter.

The package keeps the text in `usr/lib/bible.data`: an index of big-endian offsets, then LZW windows
(Unix `compress` format) of which only the first carries the magic number. `gzip -dc` unpacks them.
A document reads like a printed chapter, and ends where the tokenizer's <|endoftext|> stands:

    Genesis 1
    1 In the beginning God created the heaven and the earth.
    2 And the earth was without form, and void; ...
"""

from __future__ import annotations

import io
import re
import struct
import subprocess
import tarfile
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

MAGIC = b"\x1f\x9d\x90"  # what `compress -b 16` files start with
HELP = """cannot find the King James text ({where}).
It is the Debian package bible-kjv-text (2.4 MB). Either of these makes it available:
    apt-get install bible-kjv-text
    apt-get download bible-kjv-text     and then --data bible-kjv-text_*.deb"""

NAMES = (  # as the data file abbreviates them
    "Ge=Genesis Exo=Exodus Lev=Leviticus Num=Numbers Deu=Deuteronomy Josh=Joshua Jdgs=Judges Ruth=Ruth "
    "1Sm=1_Samuel 2Sm=2_Samuel 1Ki=1_Kings 2Ki=2_Kings 1Chr=1_Chronicles 2Chr=2_Chronicles Ezra=Ezra "
    "Neh=Nehemiah Est=Esther Job=Job Psa=Psalm Prv=Proverbs Eccl=Ecclesiastes SSol=Song_of_Solomon "
    "Isa=Isaiah Jer=Jeremiah Lam=Lamentations Eze=Ezekiel Dan=Daniel Hos=Hosea Joel=Joel Amos=Amos "
    "Obad=Obadiah Jonah=Jonah Mic=Micah Nahum=Nahum Hab=Habakkuk Zep=Zephaniah Hag=Haggai "
    "Zec=Zechariah Mal=Malachi Mat=Matthew Mark=Mark Luke=Luke John=John Acts=Acts Rom=Romans "
    "1Cor=1_Corinthians 2Cor=2_Corinthians Gal=Galatians Eph=Ephesians Phi=Philippians Col=Colossians "
    "1Th=1_Thessalonians 2Th=2_Thessalonians 1Tim=1_Timothy 2Tim=2_Timothy Titus=Titus Phmn=Philemon "
    "Heb=Hebrews Jas=James 1Pet=1_Peter 2Pet=2_Peter 1Jn=1_John 2Jn=2_John 3Jn=3_John Jude=Jude "
    "Rev=Revelation"
)
BOOKS = dict(pair.split("=") for pair in NAMES.split())


@dataclass
class Split:
    """Chapters to learn from, to watch while training, and to report on."""

    train: list[str]
    valid: list[str]
    test: list[str]


def load(path: Path | None = None) -> Split:
    """One chapter in 40 is kept for the report and one in 40 for the progress display."""
    split = Split([], [], [])
    for i, chapter in enumerate(chapters(read_data_file(path))):
        part = {10: split.test, 30: split.valid}.get(i % 40, split.train)
        part.append(chapter)
    return split


def read_data_file(path: Path | None) -> bytes:
    if path is None:
        path = Path("/usr/lib/bible.data")
    if not path.is_file():
        raise SystemExit(HELP.format(where=path))
    if path.suffix != ".deb":
        return path.read_bytes()
    tar = subprocess.run(["dpkg-deb", "--fsys-tarfile", path], capture_output=True, check=True).stdout
    with tarfile.open(fileobj=io.BytesIO(tar)) as archive:
        member = archive.extractfile("./usr/lib/bible.data")
        assert member is not None
        return member.read()


def chapters(data: bytes) -> list[str]:
    """Unpack the windows and regroup `Ge1:1 In the beginning ...` lines into chapters."""
    (count,) = struct.unpack_from(">I", data, 0x58)
    offsets = struct.unpack_from(f">{count + 1}I", data, 0x5C)
    text = b"".join(
        subprocess.run(["gzip", "-dc"], input=MAGIC + data[a:b], capture_output=True, check=True).stdout
        for a, b in pairwise(offsets)
    ).decode("ascii")

    documents: dict[str, list[str]] = {}
    for line in text.splitlines()[1:]:  # the first line names the text file
        reference = re.fullmatch(r"(\d?[A-Za-z]+)(\d+):(\d+) (.*)", line)
        assert reference, line
        book, chapter, verse, words = reference.groups()
        title = f"{BOOKS[book].replace('_', ' ')} {chapter}"
        documents.setdefault(title, []).append(f"{verse} {words}")
    return ["\n".join([title, *verses]) + "\n" for title, verses in documents.items()]


if __name__ == "__main__":
    import sys

    parts = load(Path(sys.argv[1]) if len(sys.argv) > 1 else None)
    for name in ("train", "valid", "test"):
        docs = getattr(parts, name)
        print(f"{name}: {len(docs)} chapters, {sum(map(len, docs)):,} bytes")
    print(parts.test[0][:300])
