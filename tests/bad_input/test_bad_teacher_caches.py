"""Teacher caches that cannot be used, and disks that cannot hold them: one message, and nothing finished is lost."""

import errno
import os
import shutil
from pathlib import Path

import pytest
from refusals import change_tensors, contents, distill, refused, refused_full

from bitdistill.data import teacher_rows
from bitdistill.data.teacher_rows import shard_path
from bitdistill.train import teacher_cache


@pytest.fixture(autouse=True)
def _many_shards(monkeypatch):
    monkeypatch.setattr(teacher_rows, "SHARD_TOKENS", 64)


@pytest.fixture
def run(cli, project, student, teacher, tmp_path):
    """``run("name", "distill.teacher_cache=hidden")`` -> what ``bitdistill distill`` left."""

    def command(name: str, *settings: str):
        return distill(cli, project, student, teacher, tmp_path / name, f'output_dir="{tmp_path}"', *settings)

    return command


# --- a named cache that does not match ---


@pytest.fixture(scope="module")
def shared_cache(cli, project, student, teacher, tmp_path_factory) -> Path:
    """A finished cache of the four likeliest tokens; read it."""
    folder = tmp_path_factory.mktemp("shared")
    settings = ("distill.teacher_cache=topk", "distill.cache_top_k=4")
    named = f'distill.teacher_cache_dir="{folder / "cache"}"'
    outcome = distill(cli, project, student, teacher, folder / "student", *settings, named)
    assert outcome.status == 0, outcome.err
    return folder / "cache"


@pytest.mark.parametrize(
    ("setting", "fragment"),
    [
        ("distill.kd_tokens=all", "logits.kd_tokens: 'response' there, 'all' now"),
        ("distill.temperature=1", "logits.temperature: 5.0 there, 1.0 now"),
        ("distill.cache_top_k=5", "logits.cache_top_k: 4 there, 5 now"),
        ("distill.relation_layers=[0]", "relations.layers: [1] there, [0] now"),
        ("distill.relation_states=pre_rope", "relations.states: 'post_rope' there, 'pre_rope' now"),
        ("distill.precision=bf16", "precision: 'fp32' there, 'bf16' now"),
        ("task.template={text} So", "examples: '"),
        ("task.max_train_examples=20", "examples: '"),
        ("another teacher", "teacher: '"),
    ],
)
def test_a_named_cache_that_does_not_match_is_refused(
    cli, project, student, teacher, tmp_path, shared_cache, setting, fragment
):
    before = contents(shared_cache)
    if setting == "another teacher":
        teacher = shutil.copytree(teacher, tmp_path / "teacher")
        change_tensors(teacher, lambda tensors: tensors["model.norm.weight"].mul_(2))
        setting = "seed=0"
    settings = ("distill.teacher_cache=topk", "distill.cache_top_k=4", setting)
    named = f'distill.teacher_cache_dir="{shared_cache}"'
    outcome = distill(cli, project, student, teacher, tmp_path / "new", *settings, named)
    refused(outcome, shared_cache, "does not match", fragment, "distill.teacher_cache_dir")
    assert contents(shared_cache) == before


def test_more_entries_than_there_are_is_refused(run):
    refused(
        run("new", "distill.teacher_cache=topk", "distill.cache_top_k=301"),
        "distill.cache_top_k = 301", "300 entries",
    )  # fmt: skip


# --- damage ---


@pytest.mark.parametrize("damage", ["missing", "half", "a byte", "no head", "half a head"])
def test_a_damaged_cache_is_named_with_the_remedy(run, tmp_path, damage):
    named = ("distill.teacher_cache=hidden", f'distill.teacher_cache_dir="{tmp_path / "cache"}"')
    assert run("first", *named).status == 0
    head = "head" in damage
    path = tmp_path / "cache" / "head.safetensors" if head else shard_path(tmp_path / "cache", 2)
    content = bytearray(path.read_bytes())
    if damage in ("missing", "no head"):
        path.unlink()
    elif damage == "a byte":
        content[-3] ^= 1
        path.write_bytes(content)
    else:
        path.write_bytes(content[: len(content) // 2])
    refused(run("second", *named), path, "damaged", f"delete {tmp_path / 'cache'}")


# --- the disk ---


def test_a_full_disk_keeps_what_is_there(run, tmp_path, monkeypatch):
    named = ("distill.teacher_cache=hidden", f'distill.teacher_cache_dir="{tmp_path / "cache"}"')
    save = teacher_rows.save_file

    def save_file(rows, path, metadata):
        save(rows, path, metadata)
        if "shard-00002" in str(path):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(teacher_rows, "save_file", save_file)
        refused_full(run("new", *named))
    names = set(contents(tmp_path / "cache.partial"))
    assert names == {"run.json", "head.safetensors", "shard-00000.safetensors", "shard-00001.safetensors"}
    before = contents(tmp_path / "cache.partial")
    assert run("new", *named).status == 0
    after = contents(tmp_path / "cache")
    assert all(after[name] == before[name] for name in names - {"run.json"})
    assert len(after) > len(before)


def test_a_disk_that_is_too_small_is_refused_before_the_teacher_runs(run, monkeypatch):
    usage = shutil.disk_usage("/")._replace(free=1000)
    monkeypatch.setattr(teacher_cache.shutil, "disk_usage", lambda _: usage)
    refused(
        run("new", "distill.teacher_cache=hidden"), "GB more", "0.000 GB free", "distill.teacher_cache_dir"
    )
