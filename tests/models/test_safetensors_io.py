import json

import hypothesis
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import HealthCheck
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.numpy import save_file

from safe_rlhf_jax.models.safetensors_io import DTYPES, INDEX, WEIGHTS, Spec, Tensors, write_tensors

ARRAYS = {
    "model.a": np.arange(15, dtype=np.float32).reshape(3, 5),
    "model.b": np.arange(7, dtype=np.float32).astype(jnp.bfloat16),
    "model.c": np.arange(4, dtype=np.float16).reshape(2, 2, 1),
    "count": np.array([12], np.int64),
}


def write(folder, max_bytes=10**9, writes=True):
    specs = {name: Spec(a.shape, a.dtype, lambda a=a: a) for name, a in ARRAYS.items()}
    write_tensors(folder, specs, max_bytes=max_bytes, writes=writes)


@pytest.mark.parametrize("max_bytes", [10**9, 64, 1])
def test_what_is_written_is_read_bit_for_bit_whatever_the_number_of_files(tmp_path, max_bytes):
    write(tmp_path, max_bytes)
    tensors = Tensors(tmp_path)
    assert tensors.entries.keys() == ARRAYS.keys()
    for name, array in ARRAYS.items():
        assert tensors[name].dtype == array.dtype
        np.testing.assert_array_equal(tensors[name], array)
    files = sorted(path.name for path in tmp_path.glob("*.safetensors"))
    assert len(files) == {10**9: 1, 64: 2, 1: 4}[max_bytes]
    assert (tmp_path / INDEX).exists() == (len(files) > 1)
    if len(files) > 1:
        assert files[0] == f"model-00001-of-{len(files):05}.safetensors"


def test_the_library_reads_what_is_written_and_every_tensor_is_aligned(tmp_path):
    write(tmp_path)
    with safe_open(tmp_path / WEIGHTS, framework="flax") as file:
        assert file.metadata() == {"format": "pt"}
        for name, array in ARRAYS.items():
            np.testing.assert_array_equal(file.get_tensor(name), array)
    entries = Tensors(tmp_path).entries
    assert all(entry.offset % ARRAYS[name].dtype.itemsize == 0 for name, entry in entries.items())


def test_files_are_as_large_as_allowed_and_the_index_says_where_each_tensor_is(tmp_path):
    write(tmp_path, 64 + 14)
    index = json.loads((tmp_path / INDEX).read_text())
    assert index["metadata"]["total_size"] == sum(array.nbytes for array in ARRAYS.values())
    first = "model-00001-of-00002.safetensors"
    assert [name for name, file in index["weight_map"].items() if file == first] == ["model.a", "model.b"]
    for name, file in index["weight_map"].items():
        assert Tensors(tmp_path).entries[name].file.name == file


def test_a_process_that_does_not_write_makes_every_tensor(tmp_path):
    made = []
    specs = {n: Spec(a.shape, a.dtype, lambda n=n: made.append(n)) for n, a in ARRAYS.items()}
    write_tensors(tmp_path, specs, max_bytes=1, writes=False)
    assert made == list(ARRAYS)
    assert not list(tmp_path.iterdir())


def test_a_tensor_under_another_spelling_gets_its_name(tmp_path):
    save_file({"embed": np.ones(2, np.float32), "head": np.ones(1, np.float32)}, tmp_path / WEIGHTS)
    tensors = Tensors(tmp_path)
    tensors.respell({"model.embed": ("model.embed", "embed"), "head": ("head", "embed"), "norm": ("norm",)})
    assert {*tensors.entries} == {"model.embed", "head"}
    np.testing.assert_array_equal(tensors["model.embed"], np.ones(2))


@pytest.mark.parametrize("kept", [0, 5, 40, 300, -1], ids=lambda kept: f"{kept} bytes")
def test_a_file_that_is_cut_off_is_named(tmp_path, kept):
    write(tmp_path)
    path = tmp_path / WEIGHTS
    data = path.read_bytes()
    assert len(data) > 300
    path.write_bytes(data[:kept])
    with pytest.raises(ValueError, match=r"model\.safetensors: truncated.*fetch it again"):
        Tensors(tmp_path)


def test_a_file_of_another_kind_is_named(tmp_path):
    (tmp_path / WEIGHTS).write_text("version https://git-lfs.github.com/spec/v1\n")
    with pytest.raises(ValueError, match=r"model\.safetensors: truncated, or no safetensors file: .*git lfs pull"):
        Tensors(tmp_path)
    (tmp_path / WEIGHTS).write_bytes((4).to_bytes(8, "little") + b"{{{{")
    with pytest.raises(ValueError, match="no safetensors file"):
        Tensors(tmp_path)


def edit_header(path, change):
    """Changes the header of a file, and nothing after it."""
    data = path.read_bytes()
    start = 8 + int.from_bytes(data[:8], "little")
    text = json.dumps(change(json.loads(data[8:start]))).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data[start:])


def place(name, **fields):
    return lambda header: header | {name: header[name] | fields}


@pytest.mark.parametrize(
    "change",
    [
        place("model.a", data_offsets=[0, 60]),  # where another stands
        place("model.a", data_offsets=[8, 72]),  # more than it has
        place("model.a", data_offsets=[68, 8]),  # backwards
        place("model.a", data_offsets=[-8, 52]),
        place("model.a", shape=[3, 6]),
        place("model.a", shape=[-3, -5]),
        place("model.a", dtype="F16"),
        lambda header: {name: tensor for name, tensor in header.items() if name != "model.a"},  # a hole
    ],
)
def test_a_tensor_that_does_not_stand_where_the_one_before_ends_is_named(tmp_path, change):
    write(tmp_path)
    edit_header(tmp_path / WEIGHTS, change)
    with pytest.raises(ValueError, match=r"model\.safetensors: tensor 'model\.\w'.*does not stand from byte"):
        Tensors(tmp_path)


def test_a_tensor_beyond_the_end_is_named_as_a_file_that_was_cut_off(tmp_path):
    write(tmp_path)
    edit_header(tmp_path / WEIGHTS, place("model.c", data_offsets=[82, 1000]))
    with pytest.raises(ValueError, match="truncated"):
        Tensors(tmp_path)


@pytest.mark.parametrize(
    "header",
    [
        *("[]", "3", "null", "{", "[" * 10**5, '{"a": 3}', '{"a": {}}', '{"a": {"dtype": "F32", "shape": [1]}}'),
        *(
            json.dumps({"a": {"dtype": "F32", "shape": shape, "data_offsets": offsets}})
            for shape, offsets in (
                (None, [0, 4]),
                (["x"], [0, 4]),
                ([1], [0]),
                ([1], None),
                ([1], ["a", "b"]),
                (1, [0, 4]),
            )
        ),
    ],
    ids=lambda text: text[:40],
)
def test_a_header_that_is_none_is_named(tmp_path, header):
    data = header.encode()
    (tmp_path / WEIGHTS).write_bytes(len(data).to_bytes(8, "little") + data + b"\0" * 4)
    with pytest.raises(ValueError, match=r"model\.safetensors: no safetensors file"):
        Tensors(tmp_path)


NUMBERS = st.integers() | st.floats() | st.none() | st.text(max_size=2)
FIELDS = st.fixed_dictionaries(
    {},
    optional={
        "dtype": st.sampled_from([*DTYPES, "F8_E4M3", "X"]) | NUMBERS,
        "shape": st.lists(st.integers(-1, 3) | NUMBERS, max_size=3) | NUMBERS,
        "data_offsets": st.lists(st.integers(0, 40) | NUMBERS, max_size=3) | NUMBERS,
    },
)


@hypothesis.settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@hypothesis.given(
    st.dictionaries(st.sampled_from(["a", "b", "__metadata__"]), FIELDS), st.integers(0, 40), st.binary(max_size=3)
)
def test_any_header_gives_tensors_inside_the_file_or_an_error_that_names_it(tmp_path, header, size, noise):
    text = json.dumps(header).encode() + noise
    (tmp_path / WEIGHTS).write_bytes(len(text).to_bytes(8, "little") + text + bytes(size))
    try:
        tensors = Tensors(tmp_path)
    except ValueError as error:
        if WEIGHTS not in str(error):
            raise
        return
    for name, entry in tensors.entries.items():
        if entry.dtype in DTYPES and min(entry.shape, default=1) > 0:
            assert tensors[name].shape == entry.shape


def test_a_header_as_long_as_no_header_is_not_read(tmp_path):
    with (tmp_path / WEIGHTS).open("wb") as file:
        file.write((2 * 10**9).to_bytes(8, "little"))
        file.truncate(3 * 10**9)  # takes no place on the disk
    with pytest.raises(ValueError, match="no safetensors file"):
        Tensors(tmp_path)


def test_empty_tensors_have_a_place_too(tmp_path):
    save_file({"a": np.zeros((0, 3), np.float32), "b": np.ones(2, np.float32)}, tmp_path / WEIGHTS)
    assert Tensors(tmp_path).entries["a"].shape == (0, 3)


def test_files_that_the_index_names_and_that_are_missing_are_named(tmp_path):
    write(tmp_path, 1)
    (tmp_path / "model-00002-of-00004.safetensors").unlink()
    (tmp_path / "model-00003-of-00004.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"model-00002-of-00004\.safetensors, model-00003-of-00004"):
        Tensors(tmp_path)


def test_an_index_that_is_no_json_is_named(tmp_path):
    (tmp_path / INDEX).write_text('{"weight_map": ')
    with pytest.raises(ValueError, match=r"index\.json: not valid JSON"):
        Tensors(tmp_path)


def test_pickled_weights_are_named_and_never_opened(tmp_path):
    (tmp_path / "pytorch_model.bin").write_bytes(b"anything")
    with pytest.raises(FileNotFoundError, match=r"only pickled weights \(pytorch_model\.bin\).*save_pretrained"):
        Tensors(tmp_path)


def test_numbers_of_a_quantised_tensor_are_refused(tmp_path):
    save_file({"a": np.ones(3, np.int8)}, tmp_path / WEIGHTS)
    with pytest.raises(ValueError, match="tensor 'a' is stored as I8"):
        Tensors(tmp_path)["a"]
