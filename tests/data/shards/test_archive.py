"""A damaged archive gives an error with its place, and an undamaged one all of its members, whoever wrote it."""

import bz2
import gzip
import io
import lzma
import random
import tarfile

import pyarrow as pa
import pytest

from hf_dissect.data.shards.archive import BadShard, read_members


def make_tar(files, form=tarfile.PAX_FORMAT, padded=True):
    """A tar of names and contents; without padding it ends with the two blocks of zeros, as Go and BSD write it."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=form) as archive:
        for name, content in files:
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            archive.addfile(entry, io.BytesIO(content))
        end = archive.offset
    return buffer.getvalue() if padded else buffer.getvalue()[: end + 1024]


class OnceOnly:
    """A file that can be read once and in pieces of any size, as those of a server."""

    def __init__(self, content, sizes):
        self.content, self.sizes = io.BytesIO(content), sizes

    def read(self, size=-1):
        return self.content.read(size if size < 0 else min(size, self.sizes.randint(1, 5000)))


def read(content, wanted=lambda name: True):
    return [(member.name, member.content) for member in read_members(io.BytesIO(content), wanted)]


def random_files(rng, last=13_000):
    sizes = [rng.choice([0, 1, 3, 511, 512, 513, rng.randint(1, 4000)]) for _ in range(rng.randint(3, 12))]
    names = [f"{'long/' * rng.choice([0, 0, 30])}{row:03d}.{rng.choice(['jpg', 'txt'])}" for row in range(len(sizes))]
    return [(name, rng.randbytes(size)) for name, size in zip(names, [*sizes[:-1], last], strict=True)]


def zero_hole(rng, content):
    place, size = rng.randrange(len(content)), rng.choice([512, 1024, 4096, 12_000, rng.randint(1, 30_000)])
    place = place // 512 * 512 if rng.random() < 0.5 else place
    return content[:place] + bytes(min(size, len(content) - place)) + content[place + size :]


def cut(rng, content):
    place = rng.randrange(len(content) - 11_300)  # the end blocks and the padding may be cut
    return content[: place // 512 * 512 if rng.random() < 0.5 else place]


def flip(rng, content):
    place = rng.randrange(len(content))
    return content[:place] + bytes([content[place] ^ (1 << rng.randrange(8))]) + content[place + 1 :]


def drop(rng, content):
    place = rng.randrange(len(content) - 12_000)
    return content[:place] + content[place + rng.choice([1, 3, 700]) :]


@pytest.mark.parametrize("damage", [zero_hole, cut, flip, drop])
def test_damage_never_loses_members_in_silence(damage):
    rng = random.Random(damage.__name__)
    errors = 0
    for _ in range(250):
        files = random_files(rng)
        form = rng.choice([tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
        whole = make_tar(files, form, rng.random() < 0.5)
        assert read(whole) == files
        hurt = damage(rng, whole)
        found = []
        try:
            for member in read_members(OnceOnly(hurt, rng), lambda name: True):
                found.append(member)
            assert len(found) == len(files), damage
        except BadShard as error:
            errors += 1
            assert "byte" in str(error) or "does not begin" in str(error)
        # What came before is what was written, apart from the damaged bytes of a content.
        assert all(len(a.content) == len(b[1]) for a, b in zip(found, files, strict=False))
    # A bit of a content can flip unseen.
    assert errors > (20 if damage is flip else 60)


def test_every_cut_is_seen_until_the_end_blocks():
    whole = make_tar([("0.jpg", b"x" * 700), ("0.txt", b"a"), ("1.jpg", b"y" * 512), ("1.txt", b"")])
    end = 512 * (1 + 2 + 1 + 1 + 1 + 1 + 1)
    for place in range(0, len(whole) + 1, 128):
        if place >= end + 512:
            assert len(read(whole[:place])) == 4
            continue
        with pytest.raises(BadShard, match="byte"):
            read(whole[:place])


@pytest.mark.parametrize("blocks", [2, 3, 8, 20, 64, 2048])
def test_writers_that_pad_differently(blocks):
    files = [("0.jpg", b"x" * 700), ("0.txt", b"a")]
    record = 512 * blocks
    short = make_tar(files, padded=False)
    padded = short if blocks == 2 else short + bytes(-len(short) % record)
    assert read(padded) == files
    if blocks in (2, 20, 64, 2048):
        assert read(padded + padded) == files * 2
    else:
        with pytest.raises(BadShard, match="zeros, and other bytes follow"):
            read(padded + padded)


def test_appended_archives_are_read_on():
    one, two, none = make_tar([("0.jpg", b"x")]), make_tar([("1.jpg", b"y")], padded=False), make_tar([])
    assert [name for name, _ in read(none + one + two + one)] == ["0.jpg", "1.jpg", "0.jpg"]
    assert [member.archive for member in read_members(io.BytesIO(one + two), bool)] == [0, 1]
    assert read(none) == []
    with pytest.raises(BadShard, match=rf"the file is cut off in the header at byte {len(one)}|from byte 1024 on"):
        read(one + two[:100])
    for junk in (b"<html>" * 100, b"\0" * 100 + b"x"):
        with pytest.raises(BadShard, match="from byte 1024 on, .* zeros, and other bytes follow|header at byte 10240"):
            read(one + junk)


def test_a_page_of_zeros_between_two_members_is_a_hole():
    files = [(f"{row}.{e}", b"x" * 300) for row in range(12) for e in ("jpg", "txt")]
    whole = make_tar(files)
    for place in range(0, 20_480, 4096):
        with pytest.raises(BadShard, match=f"from byte {place} on, 4096 bytes are zeros, and other bytes follow"):
            read(whole[:place] + bytes(4096) + whole[place + 4096 :])


def test_a_hole_to_the_end_is_not_padding():
    whole = make_tar([(f"{row}.jpg", bytes([65 + row % 20]) * 3000) for row in range(60)])
    assert len(read(whole)) == 60
    with pytest.raises(BadShard, match=r"from byte \d+ on, there are \d+ bytes of zeros, more than end an archive"):
        read(whole[:70_000] + bytes(len(whole) - 70_000))


COMPRESSORS = {
    "gz": gzip.compress,
    "bz2": bz2.compress,
    "xz": lzma.compress,
    "zst": lambda content: pa.compress(content, "zstd", asbytes=True),
}


@pytest.mark.parametrize("kind", COMPRESSORS)
def test_compressed_archives_whole_and_damaged(kind):
    rng = random.Random(kind)
    files = [(f"{row}.jpg", rng.randbytes(900)) for row in range(30)]
    whole = COMPRESSORS[kind](make_tar(files))
    assert [(m.name, m.content) for m in read_members(OnceOnly(whole, rng), bool)] == files
    for place in (len(whole) // 2, len(whole) - 3):
        with pytest.raises(BadShard):
            read(whole[:place])
    if kind != "zst":  # its checksum is optional, and this writer leaves it out
        for place in (len(whole) // 3, len(whole) - 6):
            with pytest.raises(BadShard):
                read(whole[:place] + bytes([whole[place] ^ 4]) + whole[place + 1 :])


def test_contents_that_are_not_wanted_are_passed_over(tmp_path):
    files = [("0.jpg", b"x" * 50_000), ("0.txt", b"a"), ("0.npy", b"")]
    (tmp_path / "0.tar").write_bytes(make_tar(files))
    with open(tmp_path / "0.tar", "rb") as file:
        found = [(member.name, member.content) for member in read_members(file, lambda name: name == "0.txt")]
    assert found == [("0.jpg", b"?"), ("0.txt", b"a"), ("0.npy", b"")]
    (tmp_path / "1.tar").write_bytes(make_tar(files)[:40_000])
    with open(tmp_path / "1.tar", "rb") as file, pytest.raises(BadShard, match="cut off within a member"):
        list(read_members(file, lambda name: False))


def test_names_links_and_what_is_not_an_archive(tmp_path):
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for name, kind in {"folder": tarfile.DIRTYPE, "a.jpg": tarfile.SYMTYPE, "b.jpg": tarfile.LNKTYPE}.items():
            entry = tarfile.TarInfo(name)
            entry.type, entry.linkname = kind, "c.jpg"
            archive.addfile(entry)
    found = list(read_members(io.BytesIO(buffer.getvalue()), bool))
    assert [(member.name, member.is_link) for member in found] == [("a.jpg", True), ("b.jpg", True)]
    latin = make_tar([("caf\udce9.jpg", b"x")], tarfile.GNU_FORMAT)
    assert read(latin) == [("caf\\xe9.jpg", b"x")]
    for content, message in {b"": "empty", b"<html>" * 200: "does not begin with a header", b"abc": "cut off"}.items():
        with pytest.raises(BadShard, match=message):
            read(content)
