"""Members are grouped into samples, and never into a mixture of two."""

import pytest

from hf_dissect.data.shards.archive import BadShard, Member
from hf_dissect.data.shards.samples import group_samples, split_name


def group(names, at_last_dot=False):
    members = [Member(name, str(place).encode()) for place, name in enumerate(names.split())]
    return [
        (key, {extension: int(content) for extension, content in members.items()})
        for key, members in group_samples(members, at_last_dot)
    ]


@pytest.mark.parametrize(
    ("name", "first", "last"),
    [
        ("a.jpg", ("a", "jpg"), ("a", "jpg")),
        ("./x/a.b.JPG", ("./x/a", "b.jpg"), ("./x/a.b", "jpg")),
        ("x.y/a.jpg", ("x.y/a", "jpg"), ("x.y/a", "jpg")),
        ("a", None, None),
        ("._a.jpg", None, None),
        ("x/.DS_Store", None, None),
        (".git/a.jpg", None, None),
        ("__MACOSX/x/a.jpg", None, None),
        ("__notes__.json", None, None),
        ("a.", ("a", ""), ("a", "")),
    ],
)
def test_split_name(name, first, last):
    assert (split_name(name), split_name(name, True)) == (first, last)


def test_members_that_repeat_in_the_same_order_are_new_samples():
    assert group("x.jpg x.txt x.jpg x.txt y.jpg") == [
        ("x", {"jpg": 0, "txt": 1}),
        ("x", {"jpg": 2, "txt": 3}),
        ("y", {"jpg": 4}),
    ]
    assert len(group("x.txt x.jpg x.json " * 3)) == 3
    assert group("x.jpg y.jpg x.jpg") == [("x", {"jpg": 0}), ("y", {"jpg": 1}), ("x", {"jpg": 2})]
    assert group("a.b.jpg a.b.txt a.c.jpg a.c.txt", True) == [
        ("a.b", {"jpg": 0, "txt": 1}),
        ("a.c", {"jpg": 2, "txt": 3}),
    ]


@pytest.mark.parametrize(
    "names",
    [
        "x.jpg x.txt x.txt",
        "x.jpg x.jpg x.txt",
        "x.jpg x.JPG x.txt x.txt",
        "x.jpg x.txt x.txt x.jpg",
        "x.jpg x.txt x.jpg x.json x.txt",
        "x.jpg x.txt x.json x.jpg x.txt",
        "y.jpg y.txt x.jpg x.txt x.jpg x.txt x.jpg z.jpg",
    ],
)
def test_an_order_that_does_not_show_what_belongs_together_is_an_error(names):
    with pytest.raises(BadShard, match=r"the key 'x' has more than one member '\w+'"):
        group(names)


@pytest.mark.parametrize(
    ("names", "whole"),
    [("a.jpg a.txt b.jpg b.txt", 2), ("a.jpg a.txt b.jpg", 1), ("a.jpg a.txt", 0), ("x.jpg x.txt x.jpg", 1)],
)
def test_the_last_sample_before_a_damage_is_whole_or_left_out(names, whole):
    def read():
        for name in names.split():
            yield Member(name, b"x")
        raise BadShard("cut off")

    found = []
    with pytest.raises(BadShard, match="cut off"):
        for sample in group_samples(read()):
            found.append(sample)
    assert len(found) == whole


def test_a_sample_does_not_span_two_archives():
    members = [Member("x.jpg", b"0", 0), Member("x.txt", b"1", 1)]
    assert list(group_samples(members)) == [("x", {"jpg": b"0"}), ("x", {"txt": b"1"})]
