"""Hub ids and paths: what is fetched, and from which revision."""

from __future__ import annotations

import shutil
from pathlib import Path

import huggingface_hub
import pytest
from huggingface_hub.errors import LocalEntryNotFoundError

from jv5kernels.checkpoint import HUB_PATTERNS, open_checkpoint
from jv5kernels.synthetic.checkpoint import TASKS

pytest_plugins = ("checkpoint_folders",)


def test_a_hub_id_is_fetched_once_at_one_revision(written, monkeypatch, tmp_path):
    commit = "dd76d535f5447ca3897a9c893fb1e612ead98192"
    snapshot = tmp_path / "models--a--b" / "snapshots" / commit
    shutil.copytree(written(family="small", layout="base"), snapshot)
    calls = []

    def download(repo_id, **options):
        calls.append((repo_id, options))
        return str(snapshot)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    checkpoint = open_checkpoint(
        "a/b", revision="main", token="secret", cache_dir=tmp_path, local_files_only=True
    )
    assert calls == [
        (
            "a/b",
            {
                "revision": "main",
                "token": "secret",
                "cache_dir": tmp_path,
                "local_files_only": True,
                "allow_patterns": list(HUB_PATTERNS),
            },
        )
    ]
    assert (checkpoint.source, checkpoint.revision) == ("a/b", commit)
    assert checkpoint.folder == snapshot and checkpoint.tasks == TASKS
    assert "secret" not in repr(checkpoint)


def test_the_patterns_fetch_what_is_needed_and_no_code(written):
    from huggingface_hub.utils import filter_repo_objects

    base = written(family="small", layout="base", shards=2)
    sibling = written(family="small", layout="merged")
    needed = [str(p.relative_to(f)) for f in (base, sibling) for p in f.rglob("*") if p.is_file()]
    others = [
        "modeling_jina_embeddings_v5.py",
        "onnx/model.onnx",
        "onnx/model.onnx_data",
        "README.md",
    ]
    others += ["onnx/config.json", "pytorch_model.bin", "v5-F16.gguf", "openvino/model.safetensors"]
    fetched = list(filter_repo_objects(needed + others, allow_patterns=list(HUB_PATTERNS)))
    assert sorted(fetched) == sorted(needed)


def test_an_empty_cache_gives_the_librarys_own_error(tmp_path):
    with pytest.raises(LocalEntryNotFoundError):
        open_checkpoint("jinaai/no-such-model", cache_dir=tmp_path, local_files_only=True)


@pytest.mark.parametrize("model", ["./nowhere", "/nowhere/at/all", "a/b/c", Path("nowhere")])
def test_a_folder_that_is_not_there(model):
    with pytest.raises(FileNotFoundError, match="there is no folder"):
        open_checkpoint(model)


def test_a_revision_is_for_hub_ids(written):
    with pytest.raises(ValueError, match="revision='main' is for hub ids"):
        open_checkpoint(written(family="small", layout="base"), revision="main")
