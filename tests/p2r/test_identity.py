"""A user without an entry in the password file, and temporary folders with long names."""

import getpass
import os
import pwd
import stat
from pathlib import Path

import pytest

from p2r.identity import ensure_identity, identity_environment, private_folder, ray_folder
from p2r.storage import cache_folder


@pytest.fixture
def without_entry(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """The state in a container that runs under any user id: no entry, no HOME, no USER."""

    def absent(uid: int) -> pwd.struct_passwd:
        raise KeyError(f"getpwuid(): uid not found: {uid}")

    monkeypatch.setattr(pwd, "getpwuid", absent)
    for name in ("HOME", "USER", "LOGNAME", "LNAME", "USERNAME", "P2R_CACHE"):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    return tmp_path


def test_a_user_without_an_entry_gets_a_name_and_a_home(without_entry: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(RuntimeError):
        Path.home()
    for given in (None, "/", "relative", "/nowhere"):
        if given is not None:
            monkeypatch.setenv("HOME", given)
        news = ensure_identity()
        home = without_entry / f"p2r-home-{os.getuid()}"
        assert news is not None and str(home) in news and "P2R_STORAGE" in news
        assert getpass.getuser() == f"uid{os.getuid()}"
        assert Path.home() == home
        assert cache_folder().is_relative_to(home)
        assert stat.S_IMODE(home.stat().st_mode) == 0o700
        assert identity_environment() == {"USER": getpass.getuser(), "LOGNAME": getpass.getuser(), "HOME": str(home)}
    assert ensure_identity() is None, "a home that can be written to stays"


def test_users_with_an_entry_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    before = dict(os.environ)
    assert ensure_identity() is None
    assert dict(os.environ) == before
    assert identity_environment() == {}


def test_a_folder_of_somebody_else_is_not_used(tmp_path: Path) -> None:
    (tmp_path / f"p2r-x-{os.getuid()}").symlink_to(tmp_path)
    assert private_folder("p2r-x", inside=str(tmp_path)).name.startswith("p2r-x-")
    assert not private_folder("p2r-x", inside=str(tmp_path)).is_symlink()
    mine = private_folder("p2r-y", inside=str(tmp_path))
    assert private_folder("p2r-y", inside=str(tmp_path)) == mine
    mine.chmod(0o777)
    assert private_folder("p2r-y", inside=str(tmp_path)) != mine


def test_ray_gets_a_short_folder_where_the_default_is_too_long_for_a_socket(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_TMPDIR", raising=False)
    for folder in ("/tmp", "/scratch/user/job"):
        monkeypatch.setenv("TMPDIR", folder)
        assert ray_folder() is None
    for folder in (f"/scratch/{'x' * 60}", f"/scratch/{'ü' * 30}"):
        monkeypatch.setenv("TMPDIR", folder)
        found = ray_folder()
        assert found is not None
        assert len(f"{found}/session_2026-01-01_00-00-00_000000_0000000/sockets/plasma_store.1") <= 107
    monkeypatch.setenv("RAY_TMPDIR", "/tmp/r")
    assert ray_folder() is None, "where Ray is told another folder, that counts"
