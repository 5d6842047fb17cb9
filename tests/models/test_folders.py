"""What a folder holds in place of a model: pointers, web pages, indices without a map, files elsewhere."""

import json
import shutil

import numpy as np
import pytest
from huggingface_hub.utils import filter_repo_objects
from safetensors.numpy import load_file, save_file

from safe_rlhf_jax.models import hf
from safe_rlhf_jax.models.folders import read_config, read_index, read_json
from tests.helpers import make_lm, perturbed, tiny_config

POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a2146\nsize 4138\n"
PAGE = "<!DOCTYPE html>\n<html><title>Sign in</title></html>\n"
PARTS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    module, variables = make_lm(tiny_config(num_layers=1))
    return hf.save(tmp_path_factory.mktemp("saved"), module, perturbed(variables))


@pytest.fixture
def folder(saved, tmp_path):
    return shutil.copytree(saved, tmp_path / "model")


def split(folder, parts=PARTS, **index):
    """Writes the weights in two files and their index."""
    tensors = load_file(folder / hf.WEIGHTS)
    (folder / hf.WEIGHTS).unlink()
    names = sorted(tensors)
    files = dict.fromkeys(names[::2], parts[0]) | dict.fromkeys(names[1::2], parts[1])
    for part in parts:
        (folder / part).parent.mkdir(exist_ok=True)
        save_file({name: tensors[name] for name in names if files[name] == part}, folder / part)
    (folder / hf.INDEX).write_text(json.dumps({"weight_map": files} | index))
    return files


def embedding(folder):
    return np.asarray(hf.load(folder)[1]["params"]["decoder"]["embedding"])


# --- Files that are not what their names say --------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["config.json", hf.WEIGHTS, "tokenizer.json", "tokenizer.model", hf.INDEX])
@pytest.mark.parametrize(
    ("content", "reason"),
    [(POINTER, "is a pointer of Git LFS .*git lfs pull"), (PAGE, "is a web page"), ("", "is empty")],
)
def test_what_stands_in_place_of_a_file_is_said(folder, name, content, reason):
    (folder / name).write_text(content)
    if name == hf.INDEX:
        (folder / hf.WEIGHTS).unlink()
    with pytest.raises(ValueError, match=f"{name}.* {reason}"):
        hf.load(folder)


def test_a_web_page_and_a_mark_before_json_are_told_apart(tmp_path):
    path = tmp_path / "config.json"
    path.write_text("\n  <HTML>" + "x" * 10_000)
    with pytest.raises(ValueError, match="web page"):
        read_json(path)
    path.write_bytes(b'\xef\xbb\xbf{"a": 1}')
    assert read_json(path) == {"a": 1}
    path.write_text("[" * 10**5)
    with pytest.raises(ValueError, match=r"config\.json: not valid JSON"):
        read_json(path)
    path.write_text("[1]")
    with pytest.raises(ValueError, match="holds a list, not an object"):
        read_json(path)


def test_an_adapter_beside_the_weights_of_a_model_is_refused(folder):
    (folder / "adapter_config.json").write_text('{"base_model_name_or_path": "owner/base"}')
    with pytest.raises(
        ValueError, match=r"is a PEFT adapter, but the weights of a model are here too.*remove adapter_c"
    ):
        hf.load(folder)


def test_the_folder_below_that_holds_the_model_is_named(folder):
    for name in ("checkpoint-20", "checkpoint-100"):
        shutil.copytree(folder, folder.parent / "run" / name)
    with pytest.raises(FileNotFoundError, match=r"no config\.json.*one in checkpoint-100, checkpoint-20: name that"):
        hf.load(folder.parent / "run")
    (folder / "weights").mkdir()
    (folder / hf.WEIGHTS).rename(folder / "weights" / hf.WEIGHTS)
    with pytest.raises(FileNotFoundError, match=r"weights in a folder below \(weights/model\.safetensors\): name that"):
        hf.load(folder)


def test_a_file_is_no_folder(folder):
    with pytest.raises(FileNotFoundError, match="is a file; name the folder"):
        hf.load(folder / hf.WEIGHTS)


# --- Files and their index --------------------------------------------------------------------------------------------


def test_files_in_folders_below_are_found_by_the_index(folder):
    expected = embedding(folder)
    split(folder, ("first/model.safetensors", "second/model.safetensors"))
    np.testing.assert_array_equal(embedding(folder), expected)


@pytest.mark.parametrize("found", [None, {}, [], "model.safetensors", {"lm_head.weight": 3}])
def test_an_index_without_a_weight_map_is_named(folder, found):
    split(folder, weight_map=found)
    with pytest.raises(ValueError, match=r"model\.safetensors\.index\.json: no weight_map"):
        hf.load(folder)


@pytest.mark.parametrize("file", ["../other/model.safetensors", "/etc/passwd"])
def test_an_index_stays_in_its_folder(folder, file):
    split(folder, weight_map={"lm_head.weight": file})
    with pytest.raises(ValueError, match="is not in the folder"):
        hf.load(folder)


def test_a_tensor_that_its_file_lacks_is_named_with_the_file(folder):
    files = split(folder)
    part = folder / files["model.norm.weight"]
    save_file({k: v for k, v in load_file(part).items() if k != "model.norm.weight"}, part)
    with pytest.raises(ValueError, match=rf"'model\.norm\.weight' is missing; .*{part.name} should hold"):
        hf.load(folder)


def test_the_index_may_name_what_no_one_needs(folder):
    expected = embedding(folder)
    files = split(folder)
    index = {"weight_map": files | {"model.layers.0.self_attn.rotary_emb.inv_freq": PARTS[0]}}
    (folder / hf.INDEX).write_text(json.dumps(index))
    np.testing.assert_array_equal(embedding(folder), expected)


def test_a_tensor_in_two_files_is_named_with_both(folder):
    split(folder)
    tensors = [load_file(folder / part) for part in PARTS]
    save_file(tensors[0] | {"lm_head.weight": np.zeros((97, 48), np.float32)}, folder / PARTS[0])
    save_file(tensors[1] | {"lm_head.weight": np.ones((97, 48), np.float32)}, folder / PARTS[1])
    with pytest.raises(ValueError, match=rf"'lm_head\.weight' stands in {PARTS[0]} and {PARTS[1]}"):
        hf.load(folder)


def test_a_single_file_counts_more_than_others_beside_it_and_that_is_said(folder):
    whole = (folder / hf.WEIGHTS).read_bytes()
    split(folder)
    save_file({"model.embed_tokens.weight": np.ones((3, 3), np.float32)}, folder / PARTS[0])
    (folder / hf.WEIGHTS).write_bytes(whole)
    with pytest.warns(UserWarning, match=rf"{hf.WEIGHTS} is opened.*{PARTS[0]}, {PARTS[1]} are not"):
        assert embedding(folder).shape == (97, 48)


def test_an_index_that_names_the_single_file_is_no_other_model(folder, recwarn):
    tensors = load_file(folder / hf.WEIGHTS)
    (folder / hf.INDEX).write_text(json.dumps({"weight_map": dict.fromkeys(tensors, hf.WEIGHTS)}))
    assert embedding(folder).shape == (97, 48)
    assert not [w for w in recwarn if "is opened" in str(w.message)]


@pytest.mark.parametrize(
    ("file", "message"),
    [
        ("consolidated.safetensors", r"there are consolidated\.safetensors: .*save_pretrained"),
        (PARTS[0], "there are model-00001-of-00002.*fetch the index"),
        ("global_step20", r"checkpoint of DeepSpeed or FSDP \(global_step20\): .*zero_to_fp32"),
        ("pytorch_model.bin", "only pickled weights"),
        ("model.gguf", r"there are model\.gguf, which are not opened"),
        ("notes.txt", "no weights are here"),
    ],
)
def test_what_is_there_in_place_of_weights_is_named(folder, file, message):
    (folder / hf.WEIGHTS).rename(folder / file)
    with pytest.raises(FileNotFoundError, match=message):
        hf.load(folder)


# --- The hub ----------------------------------------------------------------------------------------------------------

REPOSITORY = [
    *("README.md", "LICENSE", ".gitattributes", "pytorch_model.bin", "tf_model.h5", "model.gguf"),
    *("onnx/model.onnx", "onnx/config.json", "original/consolidated.00.pth", "original/tokenizer.model"),
    *("consolidated.safetensors", "additional_chat_templates/rag.jinja"),
]
NEEDED = [
    *("config.json", "generation_config.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
    *("vocab.json", "merges.txt", "vocab.txt", "tokenizer.json", "tokenizer.model", "spiece.model"),
    *("chat_template.jinja", "chat_template.json", "model.safetensors", hf.INDEX, *PARTS),
]


@pytest.fixture
def hub(folder, monkeypatch):
    """Stands for the hub: takes down what is asked for, and gives a folder."""
    import huggingface_hub

    asked = []

    def snapshot_download(hub_id, *, revision=None, allow_patterns=None, ignore_patterns=None):
        fetched = filter_repo_objects(
            REPOSITORY + NEEDED, allow_patterns=allow_patterns, ignore_patterns=ignore_patterns
        )
        asked.append((hub_id, revision, allow_patterns, sorted(fetched)))
        return str(folder)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    return asked


def test_what_model_and_tokenizer_need_is_fetched_and_no_second_copy(hub, folder):
    assert hf.resolve("owner/name") == folder
    ((hub_id, _, _, fetched),) = hub
    assert hub_id == "owner/name"
    assert fetched == sorted(NEEDED)


def test_files_of_a_hub_model_in_folders_below_are_fetched_too(hub, folder):
    split(folder, ("first/model.safetensors", "second/model.safetensors"))
    hf.resolve("owner/name")
    _, (_, revision, patterns, _) = hub
    assert patterns == ["first/model.safetensors", "second/model.safetensors"]
    assert revision == folder.name


def test_a_tokenizer_of_vocabulary_and_merges_is_compared_with_the_runs(folder, tmp_path):
    from safe_rlhf_jax.data.tokenizer import load_tokenizer

    tokenizer = json.loads((load_tokenizer("demo").hf.backend_tokenizer).to_str())["model"]
    (folder / "vocab.json").write_text(json.dumps(tokenizer["vocab"]))
    merges = [" ".join(pair) if isinstance(pair, list) else pair for pair in tokenizer["merges"]]
    (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(merges) + "\n")
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "GPT2Tokenizer", "eos_token": "<|endoftext|>"}')
    assert load_tokenizer(str(folder)).encode("hello") == load_tokenizer("demo").encode("hello")


def test_reading_a_folder_without_index_is_reading_no_index(folder):
    assert read_index(folder) == {}
    assert read_config(folder)["model_type"] == "llama"
