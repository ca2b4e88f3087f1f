"""Files are written as a whole or not at all, and locked by one process at a time."""

def test_a_file_written_half_does_not_take_the_place_of_the_old(tmp_path, monkeypatch):
    file = tmp_path / "file"
    checkpoint.write_file(file, b"old")

    def stop(descriptor):
        raise OSError("stopped here")

    monkeypatch.setattr(os, "fsync", stop)
    with pytest.raises(OSError, match="stopped here"):
        checkpoint.write_file(file, b"new")
    assert file.read_bytes() == b"old"
    monkeypatch.undo()
    checkpoint.write_file(file, b"new")
    assert file.read_bytes() == b"new"
    assert os.listdir(tmp_path) == ["file"]
