"""Model digests: what they cover, that they come in slices, and that known files are not read again."""

from __future__ import annotations

import hashlib

import pytest

from llmos.services.storage import digest as module
from llmos.services.storage.digest import Digester, model_files

FILES = {
    "config.json": b"{}",
    "tokenizer.json": b"tok",
    "model-1.safetensors": b"x" * 5000,
    "model-2.safetensors": b"y",
}


def make_model(path, files=FILES):
    path.mkdir(exist_ok=True)
    for name, content in files.items():
        (path / name).write_bytes(content)
    return path


def digest_of(path, known=None):
    learned = {} if known is None else known
    digester = Digester(model_files(path), learned.get, learned.__setitem__)
    slices = 1
    while (found := digester.work(0.0)) is None:
        slices += 1
    return found, slices


def test_the_digest_is_what_the_docstring_says(tmp_path):
    lines = "".join(f"{hashlib.sha256(FILES[name]).hexdigest()} {name}\n" for name in sorted(FILES))
    assert digest_of(make_model(tmp_path / "m"))[0] == hashlib.sha256(lines.encode()).hexdigest()


def test_files_that_do_not_make_the_model_do_not_count(tmp_path):
    path = make_model(tmp_path / "m")
    before = digest_of(path)[0]
    (path / "README.md").write_text("new")
    (path / "optimizer.bin").write_text("new")
    assert digest_of(path)[0] == before
    assert [file.size for file in model_files(path)] == [2, 5000, 1, 3]


@pytest.mark.parametrize("name", sorted(FILES))
def test_every_file_counts(tmp_path, name):
    path = make_model(tmp_path / "m")
    before = digest_of(path)[0]
    (path / name).write_bytes(FILES[name] + b"!")
    assert digest_of(path)[0] != before


def test_work_comes_in_slices(tmp_path, monkeypatch):
    path = make_model(tmp_path / "m")
    monkeypatch.setattr(module, "_READ_BYTES", 1000)
    # Each file: begin, its blocks, the empty read at its end; then the end of the list.
    assert digest_of(path)[1] == 3 * (1 + 1 + 1) + (1 + 5 + 1) + 1


def test_known_files_are_not_opened(tmp_path):
    path = make_model(tmp_path / "m")
    known = {}
    first, _ = digest_of(path, known)
    assert len(known) == 4
    for name in FILES:
        (path / name).chmod(0)
    opened = []
    digester = Digester(model_files(path), lambda file: known[file], lambda file, digest: opened.append(file))
    while (second := digester.work(0.0)) is None:
        pass
    assert second == first
    assert opened == []


def test_a_file_that_vanishes_is_an_error(tmp_path):
    path = make_model(tmp_path / "m")
    files = model_files(path)
    (path / "tokenizer.json").unlink()
    digester = Digester(files, lambda file: None, lambda file, digest: None)
    with pytest.raises(FileNotFoundError):
        digester.work(10.0)
    digester.close()
