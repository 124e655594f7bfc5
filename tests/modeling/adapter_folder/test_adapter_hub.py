"""Adapter folders to the hub and from it, without a network."""

import shutil
from pathlib import Path

import pytest
import torch
from saved_adapters import ADAPTER_FILES, files_in, load, logits_of

from qadapter.errors import AdapterFormatError, ConfigError
from qadapter.modeling import bases, checkpoint, hub, loading


class Hub:
    """Stands in for huggingface_hub.HfApi and records what it is asked for."""

    calls: list

    def __init__(self, token=None):
        Hub.calls = [("token", token)]

    def create_repo(self, repo_id, private=None, exist_ok=False):
        Hub.calls.append(("create", repo_id, private, exist_ok))

    def create_branch(self, repo_id, branch, exist_ok):
        Hub.calls.append(("branch", repo_id, branch, exist_ok))

    def upload_folder(self, repo_id, folder_path, **options):
        Hub.calls.append(("upload", repo_id, files_in(Path(folder_path)), options))
        return "commit"


def test_push_uploads_the_adapter_folder(policy, monkeypatch):
    monkeypatch.setattr(checkpoint, "HfApi", Hub)
    assert policy.push_to_hub("me/polite", private=True, token="secret") == "commit"
    token, create, (kind, repo_id, files, options) = Hub.calls
    assert token == ("token", "secret")
    assert create == ("create", "me/polite", True, True)
    assert (kind, repo_id) == ("upload", "me/polite")
    assert files >= ADAPTER_FILES
    assert options["commit_message"] == "Upload Q-Adapter"


def test_save_pretrained_can_push(policy, tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint, "HfApi", Hub)
    policy.save_pretrained(tmp_path / "out", push_to_hub=True, repo_id="me/polite")
    assert Hub.calls[1][:2] == ("create", "me/polite")
    assert files_in(tmp_path / "out") == ADAPTER_FILES


@pytest.mark.parametrize("saved", [False, True])
def test_what_transformers_takes_for_an_upload_is_heeded(policy, tmp_path, monkeypatch, saved):
    """A private adapter stays private by either way."""
    monkeypatch.setattr(checkpoint, "HfApi", Hub)
    options = {"private": True, "commit_message": "v2", "revision": "dev", "create_pr": True, "token": "secret"}
    if saved:
        policy.save_pretrained(tmp_path / "out", push_to_hub=True, repo_id="me/polite", **options)
    else:
        policy.push_to_hub("me/polite", **options)
    token, create, branch, (*_, given) = Hub.calls
    assert token == ("token", "secret")
    assert create == ("create", "me/polite", True, True)
    assert branch == ("branch", "me/polite", "dev", True)
    assert given == {"commit_message": "v2", "commit_description": None, "revision": "dev", "create_pr": True}


def test_only_the_main_process_writes(policy, tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint, "HfApi", lambda **_: pytest.fail("asked the hub"))
    policy.save_pretrained(tmp_path / "out", is_main_process=False, push_to_hub=True, repo_id="me/polite")
    assert not (tmp_path / "out").exists()


def test_the_token_reaches_adapters_base_and_tokenizer(folder, tmp_path, monkeypatch):
    asked = []

    def download(repo_id, revision=None, token=None, allow_patterns=None):
        asked.append((repo_id, revision, token))
        return str(folder)

    def loads(kind):
        def from_pretrained(path, revision=None, token=None, **_):
            asked.append((kind, path, revision, token))
            raise OSError("enough")

        return from_pretrained

    monkeypatch.setattr(hub, "snapshot_download", download)
    monkeypatch.setattr(bases.AutoModelForCausalLM, "from_pretrained", loads("base"))
    with pytest.raises(ConfigError, match="enough"):
        load("org/base", adapters={"polite": "me/polite"}, revision="v2", token="secret")
    assert asked == [("me/polite", None, "secret"), ("base", "org/base", "v2", "secret")]
    monkeypatch.setattr(bases.AutoTokenizer, "from_pretrained", loads("tokenizer"))
    with pytest.raises(ConfigError, match="enough"):
        loading.tokenizer_of(tmp_path, bases.BaseSource("org/base", "org/base", None), "secret")
    assert asked[-1] == ("tokenizer", "org/base", "main", "secret")


def test_hub_snapshot_of_links_into_a_cache_is_read(policy, folder, tmp_path, monkeypatch):
    """The hub's cache holds snapshots of links to files in a folder beside them."""
    snapshot, blobs, asked = tmp_path / "snapshots" / "1a2b", tmp_path / "blobs", {}
    blobs.mkdir()
    for index, name in enumerate(sorted(files_in(folder))):
        shutil.copy(folder / name, blobs / str(index))
        (snapshot / name).parent.mkdir(parents=True, exist_ok=True)
        (snapshot / name).symlink_to(blobs / str(index))

    def download(repo_id, revision=None, token=None, allow_patterns=None):
        asked.update(repo_id=repo_id, revision=revision, token=token)
        return str(snapshot)

    monkeypatch.setattr(hub, "snapshot_download", download)
    loaded = load("me/polite", revision="v2", token="secret")
    assert torch.equal(logits_of(loaded), logits_of(policy))
    assert asked == {"repo_id": "me/polite", "revision": "v2", "token": "secret"}


def test_unreachable_hub_is_named(monkeypatch):
    def download(*args, **kwargs):
        raise ConnectionError("no route to host\nlong story")

    monkeypatch.setattr(hub, "snapshot_download", download)
    with pytest.raises(AdapterFormatError, match=r"me/polite: no such folder here, .*\(no route to host\)"):
        load("me/polite")


@pytest.mark.parametrize("name", ["nowhere", "/nowhere/at/all", "./a/b", "~/adapter"])
def test_missing_folder_is_named_without_asking_the_hub(name, monkeypatch):
    monkeypatch.setattr(hub, "snapshot_download", lambda *args, **kwargs: pytest.fail("asked the hub"))
    with pytest.raises(AdapterFormatError, match="there is no such adapter folder. Train one"):
        load(name)
