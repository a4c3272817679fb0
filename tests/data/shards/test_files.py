"""Shards are found and read on this machine, on a web server and on the Hub, and what is missing is named."""

import itertools
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from testing.shard_server import DATASET, serving
from testing.tar_files import write_tar

from hf_dissect.data import load_splits
from hf_dissect.data.pairs import as_pairs
from hf_dissect.data.shards.files import expand_braces, open_shard
from hf_dissect.data.streaming.loader import StreamLoader


@pytest.fixture
def server(tmp_path):
    for name, size in {"train-0": 40, "train-1": 25, "test-0": 3}.items():
        members = {}
        for row in range(size):
            members.update({f"{row}.jpg": os.urandom(2000), f"{row}.txt": f"{name}/{row}".encode()})
        write_tar(tmp_path / "files" / "shards" / f"{name}.tar", members)
    with serving(tmp_path / "files") as server:
        yield server


CAPTIONS = [f"train-0/{row}" for row in range(40)] + [f"train-1/{row}" for row in range(25)]


def captions_at(path):
    return [row["caption"] for row in load_splits(source="webdataset", path=path, streaming=True)["train"]]


def test_expand_braces():
    assert expand_braces("s-{08..11}.tar") == ["s-08.tar", "s-09.tar", "s-10.tar", "s-11.tar"]
    assert expand_braces("{a,b}-{1..2}") == ["a-1", "a-2", "b-1", "b-2"]
    assert expand_braces("plain") == ["plain"]


# ---- a web server ----


def test_shards_of_a_web_server(server):
    path = f"{server.address}/shards/{{train,test}}-{{0..0}}.tar"
    splits = load_splits(source="webdataset", path=path, streaming=True)
    assert [row["caption"] for row in splits["test"]] == ["test-0/0", "test-0/1", "test-0/2"]
    assert captions_at(f"{server.address}/shards/train-{{0..1}}.tar") == CAPTIONS
    assert captions_at(f"{server.address}/shards/train-1.tar") == CAPTIONS[40:]
    assert {path for _, path, _ in server.requests} == {f"/shards/{n}.tar" for n in ("train-0", "train-1", "test-0")}


@pytest.mark.parametrize("honours_ranges", [True, False])
@pytest.mark.parametrize("breaks_after", [0, 30_001])
def test_a_connection_that_breaks_is_taken_up_again(server, honours_ranges, breaks_after):
    server.honours_ranges, server.breaks_after = honours_ranges, breaks_after
    with open_shard(f"{server.address}/shards/train-0.tar") as shard:
        assert shard.read() == (server.folder / "shards" / "train-0.tar").read_bytes()
    assert [part for _, _, part in server.requests] == [None, f"bytes={breaks_after}-" if breaks_after else None]


def test_workers_read_a_web_server_and_resume(server):
    path = f"{server.address}/shards/train-{{0..1}}.tar"
    stream = as_pairs(load_splits(source="webdataset", path=path, streaming=True)["train"])

    def make_loader():
        return StreamLoader(stream, list, 5, num_workers=2, shuffle_buffer=10)

    loader = make_loader()
    whole = []
    for batch in itertools.islice(loader, 20):
        whole.append([pair["caption"] for pair in batch])
        if len(whole) == 13:
            place = json.dumps(loader.state_dict())
    resumed = make_loader()
    resumed.load_state_dict(json.loads(place))
    assert [[pair["caption"] for pair in batch] for batch in itertools.islice(resumed, 7)] == whole[13:]
    assert set(itertools.chain(*whole)) == set(CAPTIONS)


def test_a_shard_that_goes_missing_in_a_run_is_named(server):
    path = f"{server.address}/shards/train-{{0..1}}.tar"
    stream = as_pairs(load_splits(source="webdataset", path=path, streaming=True)["train"])
    (server.folder / "shards" / "train-1.tar").unlink()
    for workers in (0, 1):
        batches = iter(StreamLoader(stream, list, 5, num_workers=workers))
        assert next(batches)[0]["caption"] == "train-0/0"
        with pytest.raises(ValueError, match=r"^'http://.*/shards/train-1\.tar' is not .* 404.*\. Check its address"):
            list(itertools.islice(batches, 20))


def test_what_a_web_server_cannot_do_is_told(server):
    path = f"{server.address}/shards/train-0.tar"
    with pytest.raises(ValueError, match=r"is not on this machine: set data\.streaming to true"):
        load_splits(source="webdataset", path=path)
    for path in (f"{server.address}/shards", f"{server.address}/shards/*.tar"):
        with pytest.raises(ValueError, match="a web server does not tell which files it has; name the shards with"):
            load_splits(source="webdataset", path=path, streaming=True)
    with pytest.raises(ValueError, match=r"^'http://.*/train-2\.tar' is not a readable tar file .*404"):
        load_splits(source="webdataset", path=f"{server.address}/shards/train-2.tar", streaming=True)


# ---- the Hub ----

READ_FROM_THE_HUB = """
import itertools, json, sys
from hf_dissect.data import load_splits
from hf_dissect.data.pairs import as_pairs
from hf_dissect.data.streaming.loader import StreamLoader

found = {}
for path in sys.argv[1:]:
    try:
        stream = load_splits(source="webdataset", path=path, streaming=True)["train"]
        loader = StreamLoader(as_pairs(stream), list, 5, num_workers=1)
        found[path] = [pair["caption"] for batch in itertools.islice(loader, 13) for pair in batch]
    except (ValueError, FileNotFoundError) as error:
        found[path] = f"{type(error).__name__}: {error}"
print(json.dumps(found))
"""


def read_from_the_hub(*paths, **environment):
    root = str(Path(__file__).parents[3])
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": root, **environment}
    command = [sys.executable, "-c", READ_FROM_THE_HUB, *paths]
    finished = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert finished.returncode == 0, finished.stderr[-3000:]
    return list(json.loads(finished.stdout.splitlines()[-1]).values())


def test_shards_of_a_hub_dataset(server, tmp_path):
    server.breaks_after = 30_001  # the Hub's client takes a broken stream up again, too
    paths = [f"hf://datasets/{DATASET}/shards", f"hf://datasets/{DATASET}/shards/train-*.tar"]
    paths += [f"hf://datasets/{DATASET}/shards/train-{{0..1}}.tar", f"hf://datasets/{DATASET}/shards/none-*.tar"]
    paths += ["hf://datasets/somebody/nothing/train-*.tar"]
    given = {"HF_ENDPOINT": server.address, "HF_HUB_OFFLINE": "0", "HF_HOME": str(tmp_path / "home")}
    *found, no_shard, no_dataset = read_from_the_hub(*paths, **given)
    assert found == [CAPTIONS] * 3
    assert no_shard.startswith("FileNotFoundError: data.path ") and "no shard 'hf://" in no_shard
    assert "does not tell which shards there are (" in no_dataset and "404" in no_dataset


def test_the_hub_without_a_connection(monkeypatch):
    with pytest.raises(ValueError, match=r"does not tell which shards there are .*offline.*Check the name"):
        load_splits(source="webdataset", path="hf://datasets/somebody/pairs/train-*.tar", streaming=True)
    with pytest.raises(ValueError, match=r"^'hf://.*train-0\.tar' is not a readable tar file .*offline"):
        load_splits(source="webdataset", path="hf://datasets/somebody/pairs/train-{0..1}.tar", streaming=True)
