"""vLLM-Omni of .venv-serve on the loopback, started and asked as README.md says."""

import json
import os
import socket
import subprocess
import time
import urllib.error
import urllib.request
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).parent
VENV = HERE.parent / ".venv-serve"
START_SEC, ANSWER_SEC = 1800, 900  # one minute and seconds on two quiet cores; they may not be quiet
STOP_SEC = 30
ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "DO_NOT_TRACK": "1",  # nothing is asked of the network
    "VLLM_CPU_CI_ENV": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "OMP_NUM_THREADS": "2",
}


@dataclass
class Answer:
    """status: of HTTP; body: audio, or what the server says; seconds until its first byte, and its last."""

    status: int
    body: bytes
    first_sec: float
    seconds: float


class Server:
    """A checkpoint served, as a context. record: folder for what the engine computes, fp32: see cpu_worker.py.

    Raises RuntimeError with the end of the log when the server does not start.
    """

    def __init__(self, checkpoint: Path, log: Path, record: Path | None = None, fp32: bool = False):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.url = f"http://127.0.0.1:{free.getsockname()[1]}"
        self.checkpoint, self.log = checkpoint, log
        self.command = [
            VENV / "bin" / "vllm",
            "serve",
            checkpoint,
            "--omni",
            "--host",
            "127.0.0.1",
            "--port",
            self.url.rpartition(":")[2],
            "--deploy-config",
            HERE / "cpu.yaml",
            "--init-timeout",
            START_SEC,
            "--stage-init-timeout",
            START_SEC,
            *(["--dtype", "float32"] if fp32 else []),
        ]
        self.environment = {
            **os.environ,
            **ENVIRONMENT,
            "PATH": f"{VENV / 'bin'}:{os.environ['PATH']}",
            **({"SERVE_TEST_RECORD": str(record)} if record else {}),
            **({"SERVE_TEST_FP32": "1"} if fp32 else {}),
        }

    def __enter__(self) -> "Server":
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                [str(part) for part in self.command],
                env=self.environment,
                stdout=log,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
            )
        deadline = time.monotonic() + START_SEC
        while not self.is_healthy():
            if self.process.poll() is not None or time.monotonic() > deadline:
                self.__exit__()
                end = "\n".join(self.log.read_text(errors="replace").splitlines()[-30:])
                raise RuntimeError(f"the server of {self.checkpoint} did not start:\n{end}")
            time.sleep(1)
        return self

    def __exit__(self, *_) -> None:
        self.process.terminate()  # its own process, which ends the engine's
        try:
            self.process.wait(STOP_SEC)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()

    def is_healthy(self) -> bool:
        try:
            with urllib.request.urlopen(f"{self.url}/health", timeout=5) as response:
                return response.status == 200
        except OSError:
            return False

    def speak(self, text: str, **fields) -> Answer:
        """POST /v1/audio/speech; fields: voice, ref_audio, …"""
        body = {"model": str(self.checkpoint), "input": text, "response_format": "wav", **fields}
        request = urllib.request.Request(
            f"{self.url}/v1/audio/speech", json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        started = time.perf_counter()
        try:
            with urllib.request.urlopen(request, timeout=ANSWER_SEC) as response:
                first = response.read(1)
                first_sec = time.perf_counter() - started
                return Answer(response.status, first + response.read(), first_sec, time.perf_counter() - started)
        except urllib.error.HTTPError as error:
            seconds = time.perf_counter() - started
            return Answer(error.code, error.read(), seconds, seconds)
