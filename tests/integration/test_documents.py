"""The documents' sessions, run again against a broker of their own: what they print is what comes."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from tests import documents
from tests.documents import DOCUMENTS, HOME

SESSIONS = [path for path in DOCUMENTS if any(documents.steps(path))]


@pytest.mark.parametrize("path", SESSIONS, ids=lambda path: path.relative_to(HOME).as_posix())
def test_a_documents_session_says_what_it_says(path: Path, tmp_path: Path) -> None:
    data, said = tmp_path / ".gpubroker", tmp_path / "dev.log"
    with said.open("w") as log:
        command = [sys.executable, "-m", "gpubroker", "dev", "--data", str(data), "--port", "0", "--json", "--end-pods"]
        dev = subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=log, text=True)
    try:
        assert dev.stdout is not None
        ready = json.loads(dev.stdout.readline() or "null")
        assert ready, said.read_text()
        env = {
            "PATH": f"{Path(sys.executable).parent}:/usr/bin:/bin:/usr/local/bin",
            "HOME": str(tmp_path), "COLUMNS": "120", "GPUBROKER_LOCAL_VCPUS": "2",
        }  # fmt: skip
        wrong = documents.play(path, tmp_path, env, {"http://127.0.0.1:8080": ready["url"]})
        assert not wrong, "\n".join(wrong)
    finally:
        dev.terminate()
        dev.wait(30)
        if dev.stdout is not None:
            dev.stdout.close()
