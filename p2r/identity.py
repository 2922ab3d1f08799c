"""User name and home folder for processes without either, and a folder with a path short enough for sockets.

Containers run under user ids without an entry in the password file (OpenShift always, `docker run --user` mostly), often
without HOME or with one they cannot write. `getpass`, Ray, torch, Triton and DeepSpeed then crash, each in another place.
Entry points therefore call `ensure_identity` first, and every process that they start inherits its settings.
"""

import getpass
import os
import tempfile
from pathlib import Path

_MAX_SOCKET_PATH = 107  # longest path of a Unix socket, bytes
_RAY_SUBPATH = len("/ray/session_2026-01-01_00-00-00_000000_0000000/sockets/plasma_store.1") + 8


def ensure_identity() -> str | None:
    """Set USER, LOGNAME and HOME of this process if the system does not know its user id.

    Returns:
        A notice for the user, if a temporary folder became the home folder; None otherwise.
    """
    if os.name != "posix":
        return None
    try:
        getpass.getuser()
    except (KeyError, OSError):
        os.environ["USER"] = os.environ["LOGNAME"] = f"uid{os.getuid()}"
    if _has_passwd_entry() or _is_writable(os.environ.get("HOME", "")):
        return None
    home = private_folder("p2r-home")
    os.environ["HOME"] = str(home)
    return (
        f"the user {os.getuid()} has no home folder: HOME is {home} for this run. Set HOME, or P2R_CACHE and P2R_STORAGE, to keep "
        "its files"
    )


def identity_environment() -> dict[str, str]:
    """Return the variables that processes on other machines need if the user has no entry in the password file."""
    if os.name != "posix" or _has_passwd_entry():
        return {}
    return {name: os.environ[name] for name in ("USER", "LOGNAME", "HOME") if name in os.environ}


def ray_folder() -> str | None:
    """Return a folder for Ray's sockets and logs if the default path is too long for a socket; None otherwise."""
    default = os.environ.get("RAY_TMPDIR") or os.environ.get("TMPDIR") or "/tmp"  # as Ray chooses it
    if len(os.fsencode(default)) + _RAY_SUBPATH <= _MAX_SOCKET_PATH:
        return None
    return str(private_folder("p2r-ray", inside="/tmp") / "r")  # Ray opens its folder to all users


def private_folder(name: str, *, inside: str | None = None) -> Path:
    """Return a folder of this user that no other user can write to, creating it if necessary.

    Args:
        name: Start of its name.
        inside: Parent folder; None: the folder for temporary files.
    """
    folder = Path(inside or tempfile.gettempdir()) / f"{name}-{os.getuid()}"
    try:
        folder.mkdir(mode=0o700, exist_ok=True)
        state = folder.lstat()
    except OSError:
        state = None
    if state is not None and not folder.is_symlink() and state.st_uid == os.getuid() and not state.st_mode & 0o022:
        return folder
    return Path(tempfile.mkdtemp(prefix=f"{name}-", dir=inside))  # another user owns the name


def _has_passwd_entry() -> bool:
    import pwd  # absent on Windows

    try:
        pwd.getpwuid(os.getuid())
    except KeyError:
        return False
    return True


def _is_writable(folder: str) -> bool:
    return (
        Path(folder).is_absolute() and folder != "/" and os.access(folder, os.W_OK | os.X_OK) and Path(folder).is_dir()
    )
