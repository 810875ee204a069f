"""The SHA-256 of a file that is longer than one part of it that is read at a time."""

import hashlib

from my import sha256


def test_it_is_that_of_all_bytes_with_a_bar_or_without(tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(sha256, "PART", 100)
    content = bytes(range(250)) * 3
    (tmp_path / "a.bin").write_bytes(content)
    expected = hashlib.sha256(content).hexdigest()
    assert sha256.sha256_of(tmp_path / "a.bin") == expected and capfd.readouterr().err == ""
    assert sha256.sha256_of(str(tmp_path / "a.bin"), bar=True) == expected and "a.bin" in capfd.readouterr().err
