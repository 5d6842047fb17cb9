import io
import os
import signal
import subprocess
import sys
from pathlib import Path

import fsspec
import jax
import numpy as np
import pytest
from etils.epath import backend

from safe_rlhf_jax import storage
from safe_rlhf_jax.data.sources import read_records
from safe_rlhf_jax.data.templates import load_template
from safe_rlhf_jax.data.tokenizer import load_tokenizer
from safe_rlhf_jax.metrics import JsonlWriter, read_jsonl
from safe_rlhf_jax.models import hf
from safe_rlhf_jax.processes import claimed
from tests.helpers import make_lm, perturbed, tiny_config


class Store(fsspec.AbstractFileSystem):
    """An object store: objects are put whole, read, listed and deleted, and nothing else."""

    protocol = "gs"
    cachable = False

    def __init__(self):
        super().__init__()
        self.objects = {}
        self.puts = 0

    def _open(self, path, mode="rb", **_):
        if mode == "rb":
            if path not in self.objects:
                raise FileNotFoundError(path)
            return io.BytesIO(self.objects[path])
        assert mode == "wb", f"an object store cannot open for {mode!r}"
        store = self

        class Put(io.BytesIO):
            def close(self):
                if not self.closed:
                    store.objects[path] = self.getvalue()
                    store.puts += 1
                super().close()

        return Put()

    def ls(self, path, detail=True, **_):
        path = self._strip_protocol(path)
        inside = {name[len(path) + 1 :].split("/")[0] for name in self.objects if name.startswith(f"{path}/")}
        names = [path] if path in self.objects else [f"{path}/{name}" for name in sorted(inside)]
        if not names:
            raise FileNotFoundError(path)
        kinds = {True: "file", False: "directory"}
        found = [
            {"name": n, "size": len(self.objects.get(n, b"")), "type": kinds[n in self.objects], "mtime": 1}
            for n in names
        ]
        return found if detail else names

    def rm_file(self, path):
        del self.objects[self._strip_protocol(path)]

    def forbidden(self, *_, **__):
        raise AssertionError("an object store has no such thing")

    mv = move = cp_file = mkdir = makedirs = forbidden


@pytest.fixture
def store(monkeypatch):
    made = Store()
    monkeypatch.setattr(storage, "SCHEMES", {"gs": "fsspec"})  # a package that is installed
    monkeypatch.setattr(backend._FileSystemSpecBackend, "fs", lambda self, path: made)
    monkeypatch.setenv("EPATH_USE_TF", "false")
    return made


@pytest.fixture(params=["disk", "store"])
def root(request, tmp_path):
    """Returns a folder, on a disk or in an object store: what a test says holds for both."""
    if request.param == "disk":
        return storage.path(tmp_path)
    request.getfixturevalue("store")
    return storage.path("gs://bucket/run")


# --- Names


def test_uris_are_not_mangled_wherever_they_pass_through(store):
    folder = storage.path("gs://bucket/run")
    for place in (
        folder,
        storage.expanded("gs://bucket/run"),
        storage.absolute(folder),
        storage.absolute("gs://bucket/run"),
        (folder / "a").parent,
    ):
        assert str(place) == os.fspath(place) == "gs://bucket/run"
    assert str(folder / "a" / "b.json") == "gs://bucket/run/a/b.json"
    assert str(folder.with_name("other")) == "gs://bucket/other"
    assert str((folder / "a" / "b").relative_to(folder)) == "a/b"
    assert (folder / "b.json.gz").suffixes == [".json", ".gz"]


def test_a_local_path_is_that_of_pathlib(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    assert storage.expanded("~/a") == tmp_path / "a"
    assert storage.expanded("~no such user/a") == Path("~no such user/a")
    assert storage.path("~/a") == Path("~/a")
    assert storage.absolute("a") == tmp_path / "a"
    assert storage.path("http://a/b") == Path("http://a/b")  # nothing that is opened


def test_what_is_there_has_one_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    storage.write(tmp_path / "a", "")
    (tmp_path / "link").symlink_to(tmp_path / "a")
    assert {storage.real(name) for name in ("a", f"../{tmp_path.name}/a", "link")} == {(tmp_path / "a").resolve()}
    assert storage.real("not/there") == Path("not/there")


def test_a_pipe_takes_the_bytes_as_they_come_and_stays(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    reader = os.open(tmp_path / "pipe", os.O_RDONLY | os.O_NONBLOCK)
    storage.write(tmp_path / "pipe", "text")
    assert os.read(reader, 10) == b"text"
    os.close(reader)
    assert (tmp_path / "pipe").is_fifo()


def test_a_store_without_its_package_says_what_to_install(monkeypatch):
    monkeypatch.setattr(storage, "SCHEMES", {"gs": "no_such_package"})
    with pytest.raises(OSError, match="gs://bucket/a: to open it, pip install no_such_package"):
        storage.is_file("gs://bucket/a")


# --- Disk and object store


def test_what_is_written_is_read_listed_and_removed(root):
    storage.write(root / "a.json", "é\n")
    storage.write(str(root / "below" / "b.json"), b"0123")
    assert storage.read_text(root / "a.json") == "é\n"
    assert storage.read_bytes(root / "below" / "b.json") == b"0123"
    assert storage.read_bytes(root / "below" / "b.json", 2) == b"01"
    assert storage.status(root / "below" / "b.json").size == 4
    assert storage.matching(root, "*.json", "*/*.json", "*") == sorted(
        [root / "a.json", root / "below", root / "below" / "b.json"]
    )
    assert [file for file in storage.below(root) if storage.is_file(file)] == [
        root / "a.json", root / "below" / "b.json"
    ]  # fmt: skip
    assert (storage.is_file(root / "a.json"), storage.is_folder(root / "a.json")) == (True, False)
    assert (storage.is_file(root / "below"), storage.is_folder(root / "below")) == (False, True)
    storage.remove(root / "below")
    assert not storage.is_folder(root / "below")
    storage.remove(root / "a.json")
    storage.remove(root / "a.json")
    assert not storage.is_file(root / "a.json")
    assert storage.matching(root, "*.json") == storage.below(root / "none") == []


def test_a_file_that_fails_half_way_leaves_the_old_one(root):
    storage.write(root / "a", "old")

    def write_half():
        with storage.writing(root / "a") as stream:
            stream.write(b"ne")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        write_half()
    assert storage.read_text(root / "a") == "old"
    assert storage.matching(root, "*") == [root / "a"]


def test_the_old_file_is_there_until_the_new_one_is_whole(root):
    storage.write(root / "a", "old")
    with storage.writing(root / "a") as stream:
        stream.write(b"new")
        assert storage.read_text(root / "a") == "old"
    assert storage.read_text(root / "a") == "new"


def test_numbers_are_read_from_where_they_stand(root):
    numbers = np.arange(12, dtype=np.float32).reshape(3, 4)
    storage.write(root / "a", b"header" + numbers.tobytes())
    np.testing.assert_array_equal(storage.read_array(root / "a", numbers.dtype, (2, 4), 6 + 16), numbers[1:])
    assert storage.read_array(root / "a", numbers.dtype, (), 6 + 4) == 1


def test_text_has_line_feeds_alone(root):
    storage.write(root / "a", b"a\r\nb\rc\n")
    assert storage.read_text(root / "a") == "a\nb\nc\n"


def test_lines_are_appended_replaced_and_read_back(root):
    with pytest.raises(FileNotFoundError, match=r"m\.jsonl"):
        storage.read_lines(root / "m.jsonl")
    storage.make_folder(root)
    storage.append_lines(root / "m.jsonl", ["a", "é"])
    storage.append_lines(root / "m.jsonl", ["c"])
    assert storage.read_lines(root / "m.jsonl") == ["a", "é", "c"]
    storage.write_lines(root / "m.jsonl", ["a"])
    assert storage.read_lines(root / "m.jsonl") == ["a"]
    storage.append_lines(root / "m.jsonl", ["d\u2028e"])  # only line feeds end a line
    assert storage.read_lines(root / "m.jsonl") == ["a", "d\u2028e"]
    storage.write_lines(root / "m.jsonl", [])
    assert storage.read_lines(root / "m.jsonl") == []


def test_a_folder_is_moved_and_never_onto_another(root):
    storage.write(root / "a" / "deep" / "f", "1")
    storage.write(root / "b" / "f", "2")
    with pytest.raises(FileExistsError, match="which is there"):
        storage.move(root / "a", root / "b")
    storage.move(root / "a", root / "c")
    assert storage.read_text(root / "c" / "deep" / "f") == "1"
    assert storage.read_text(root / "b" / "f") == "2"
    assert not storage.is_folder(root / "a")


def test_a_library_that_knows_only_the_disk_reads_and_writes_folders(root):
    with storage.local_draft(root / "a") as folder:
        (Path(folder) / "deep").mkdir()
        (Path(folder) / "deep" / "f").write_text("1")
    assert storage.read_text(root / "a" / "deep" / "f") == "1"
    with storage.local_copy(root / "a") as folder:
        assert (Path(folder) / "deep" / "f").read_text() == "1"
    with storage.local_copy(root / "a" / "deep" / "f") as file:
        assert Path(file).read_text() == "1"


def test_anything_that_has_a_name_exists(root):
    storage.write(root / "folder" / "file", "")
    assert storage.exists(root / "folder")
    assert storage.exists(root / "folder" / "file")
    assert not storage.exists(root / "fold")


def test_room_is_asked_about_before_there_is_a_folder(root):
    assert storage.free_bytes(root / "not" / "yet") > 0
    assert storage.can_write(storage.standing(root / "not" / "yet"))


# --- What goes through the door


def test_metrics_resume(root):
    for resume_step, steps in ((None, (1, 2, 3)), (2, (3, 4))):
        writer = JsonlWriter(root / "metrics.jsonl", resume_step=resume_step)
        for step in steps:
            writer.write(step, {"a": 0.5 if resume_step else 0.0})
        writer.close()
    assert [(record["step"], record["a"]) for record in read_jsonl(root / "metrics.jsonl")] == [
        (1, 0.0), (2, 0.0), (3, 0.5), (4, 0.5)
    ]  # fmt: skip


def test_a_model_is_saved_and_opened(root):
    tokenizer = load_tokenizer("demo")
    module, variables = make_lm(tiny_config(vocab_size=tokenizer.vocab_size))
    variables = perturbed(variables)
    folder = hf.save(root / "model", module, variables, tokenizer.hf, max_file_bytes=30_000)
    assert len(storage.matching(folder, "model-*.safetensors")) > 1
    _, loaded = hf.load(str(folder), scan_layers=False)
    jax.tree.map(np.testing.assert_array_equal, loaded, variables)
    assert load_tokenizer(str(folder)).texts == tokenizer.texts
    hf.save(folder, module, variables)
    assert not storage.matching(folder, "model-*.safetensors", hf.INDEX, "*.partial")


def test_data_is_read(root):
    for split in ("train", "test"):
        storage.write(root / "data" / f"{split}.jsonl", f'{{"prompt": "{split}", "response": "b"}}\n')
    assert [record["prompt"] for record in read_records(str(root / "data"), "test")] == ["test"]
    assert [record["prompt"] for record in read_records(str(root / "data" / "train.jsonl"))] == ["train"]
    source = "{% for m in messages %}{{ m.content }}{% endfor %}"
    storage.write(root / "chat.jinja", source)
    assert load_template(str(root / "chat.jinja"), load_tokenizer("demo")).source == source


# --- Object store alone


def test_each_call_that_appends_is_one_object_and_nothing_is_read_back(store):
    for i in range(12):
        storage.append_lines("gs://bucket/m.jsonl", [f"{i}", "…"])
    assert store.puts == 12
    assert storage.read_lines("gs://bucket/m.jsonl")[::2] == [str(i) for i in range(12)]


def test_lines_that_were_replaced_stay_gone_where_the_old_objects_could_not_be_removed(store, monkeypatch):
    for line in ("a", "b"):
        storage.append_lines("gs://bucket/m.jsonl", [line])
    monkeypatch.setattr(Store, "rm_file", Store.forbidden)  # as if the process had been killed
    with pytest.raises(AssertionError):
        storage.write_lines("gs://bucket/m.jsonl", ["a"])
    assert storage.read_lines("gs://bucket/m.jsonl") == ["a"]
    storage.append_lines("gs://bucket/m.jsonl", ["c"])
    assert storage.read_lines("gs://bucket/m.jsonl") == ["a", "c"]


def test_a_folder_of_a_store_cannot_be_claimed_yet(store):
    with (
        pytest.raises(OSError, match="gs://bucket/run: a folder of an object store cannot be held"),
        claimed("gs://bucket/run"),
    ):
        pass
    assert not store.objects


# --- Disk alone


def test_weights_are_mapped_and_not_read(tmp_path):
    with (tmp_path / "a").open("wb") as file:
        file.truncate(2**40)  # takes no place on the disk
    numbers = storage.read_array(tmp_path / "a", np.dtype("float32"), (2**38,), 0)
    assert isinstance(numbers.base, np.memmap)
    assert not numbers.flags.writeable
    assert numbers[-1] == 0


def test_a_disk_that_is_full_is_named_with_the_file_and_keeps_the_old_one(tmp_path):
    storage.write(tmp_path / "a", "old")
    code = (
        "import resource, signal, sys; from safe_rlhf_jax import storage\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN); resource.setrlimit(resource.RLIMIT_FSIZE, (100, 100))\n"
        "try: storage.write(sys.argv[1], 'x' * 1000)\n"
        "except OSError as error: print(error.filename)"
    )
    done = subprocess.run([sys.executable, "-c", code, tmp_path / "a"], check=True, capture_output=True, text=True)
    assert done.stdout == f"{tmp_path / 'a'}\n"
    assert storage.read_text(tmp_path / "a") == "old"
    assert [file.name for file in tmp_path.iterdir()] == ["a"]


def test_a_file_that_cannot_be_made_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match=str(tmp_path / "file")):
        storage.write(tmp_path / "file" / "a", "")


@pytest.mark.parametrize("moment", ["stream.write(b'half')", "os.fsync", "pathlib.Path.replace"])
def test_a_kill_leaves_the_old_file_whole(tmp_path, moment):
    storage.write(tmp_path / "a", "old")
    kill = "os.kill(os.getpid(), signal.SIGKILL)"
    code = f"import os, pathlib, signal; from safe_rlhf_jax import storage\ndef kill(*_): {kill}\n"
    code += "" if moment.startswith("stream") else f"{moment} = kill\n"
    code += f"with storage.writing({str(tmp_path / 'a')!r}) as stream: stream.write(b'half')"
    code += f"; {kill}" if moment.startswith("stream") else ""
    done = subprocess.run([sys.executable, "-c", code], check=False)
    assert done.returncode == -signal.SIGKILL
    assert storage.read_text(tmp_path / "a") == "old"
    storage.write(tmp_path / "a", "new")
    assert [file.read_text() for file in tmp_path.iterdir()] == ["new"]


def test_a_line_that_was_cut_short_is_left_out(tmp_path):
    storage.append_lines(tmp_path / "m", ["a"])
    with (tmp_path / "m").open("ab") as file:
        file.write("é".encode()[:1])
    assert storage.read_lines(tmp_path / "m") == ["a"]


def test_links_to_folders_are_listed_and_not_entered(tmp_path):
    storage.write(tmp_path / "elsewhere" / "f", "")
    storage.make_folder(tmp_path / "here")
    (tmp_path / "here" / "link").symlink_to(tmp_path / "elsewhere")
    assert storage.below(tmp_path / "here") == [tmp_path / "here" / "link"]
    assert storage.is_link(tmp_path / "here" / "link")
    (tmp_path / "link").symlink_to(tmp_path / "elsewhere")
    storage.remove(tmp_path / "link")
    storage.remove(tmp_path / "here")
    assert not storage.is_link(tmp_path / "link")
    assert storage.is_file(tmp_path / "elsewhere" / "f")
