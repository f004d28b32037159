"""Drives a real ComfyUI server over HTTP: finds one, starts it with this pack installed, runs prompts, stops it."""

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from host_location import Host, find_host, install_pack, why_no_host

__all__ = [
    "History",
    "Host",
    "HostServer",
    "PromptFailed",
    "PromptInterrupted",
    "ServerFailed",
    "find_host",
    "why_no_host",
]

BASE_FOLDERS = ("custom_nodes", "models/diffusion_models", "models/loras", "input", "output", "temp", "user")


@dataclass(frozen=True)
class History:
    """What the server recorded of one finished prompt; `outputs` maps node ids to their UI outputs."""

    prompt_id: str
    status: str
    outputs: dict
    messages: tuple


class ServerFailed(RuntimeError):
    """The server did not start, died, or did not answer in time."""


class PromptFailed(RuntimeError):
    """The server refused a prompt (validation) or a node raised (execution); `details` is the server's own record."""

    def __init__(self, message: str, node_type: str, exception_message: str, details: dict):
        super().__init__(f"{message}: {node_type}: {exception_message}")
        self.message = message
        self.node_type = node_type
        self.exception_message = exception_message
        self.details = details


class PromptInterrupted(PromptFailed):
    """The prompt ended through `interrupt()`."""


def read_latents(history: History, output: Path) -> dict:
    """Node id -> the tensor its SaveLatent wrote under the server's output folder."""
    from safetensors.torch import load_file

    latents = {}
    for node_id, saved in history.outputs.items():
        for entry in saved.get("latents", ()):
            latents[node_id] = load_file(output / entry["subfolder"] / entry["filename"])["latent_tensor"]
    return latents


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


class HostServer:
    """A running server as a context manager; `base` holds its models, input, output and custom_nodes folders.

    Without `base` a temporary folder is used and removed at the end. Model files may be put under `models` at any
    time: the server lists its folders anew for each prompt.
    """

    def __init__(
        self,
        host: Host,
        base: Path | None = None,
        *,
        startup_timeout: float = 180,
        extra_args: tuple = (),
        device_args: tuple = ("--cpu",),
        environment: dict[str, str] | None = None,
    ):
        self.host = host
        self.startup_timeout = startup_timeout
        self.arguments = (*device_args, *extra_args)
        self.environment = environment or {}
        self._owns_base = base is None
        self.base = Path(tempfile.mkdtemp(prefix="dit_quant_host_")) if base is None else Path(base).absolute()
        self.models = self.base / "models"
        self.input = self.base / "input"
        self.output = self.base / "output"
        self.log = self.base / "server.log"
        self.port = _free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self._process: subprocess.Popen | None = None
        # a proxy named in the environment must not see loopback requests
        self._opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))

    def __enter__(self) -> "HostServer":
        for name in BASE_FOLDERS:
            (self.base / name).mkdir(parents=True, exist_ok=True)
        install_pack(self.base / "custom_nodes")
        try:
            self._start()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(self, *exc_info) -> None:
        self.stop()

    def _start(self) -> None:
        command = [str(self.host.python), "main.py", "--listen", "127.0.0.1", "--port", str(self.port)]
        command += ["--disable-auto-launch", "--disable-api-nodes", "--base-directory", str(self.base)]
        command += ["--database-url", f"sqlite:///{(self.base / 'user' / 'comfyui.db').as_posix()}", *self.arguments]
        environment = {**os.environ, "OMP_NUM_THREADS": "2", "OMP_WAIT_POLICY": "PASSIVE", "PYTHONUNBUFFERED": "1"}
        # tests/kernels sets it for this process: a server would interpret its kernels, a thousand times slower
        environment.pop("TRITON_INTERPRET", None)
        environment |= self.environment
        new_group = {"creationflags": subprocess.CREATE_NEW_PROCESS_GROUP} if os.name == "nt" else {}
        with self.log.open("wb") as log:
            self._process = subprocess.Popen(
                command,
                cwd=self.host.root,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=os.name != "nt",
                **new_group,
            )
        for _ in self._until(self.startup_timeout, "the server did not start"):
            with contextlib.suppress(OSError):
                self.queue()
                return

    def stop(self) -> None:
        """Ends the server's whole process group and waits for it; safe to call twice."""
        process, self._process = self._process, None
        if process is not None and process.poll() is None:
            _signal_group(process, force=False)
            try:
                process.wait(timeout=20)
            except subprocess.TimeoutExpired:
                _signal_group(process, force=True)
                process.wait()
        if self._owns_base:
            shutil.rmtree(self.base, ignore_errors=True)

    def object_info(self) -> dict:
        """Every node's description, as the frontend gets it."""
        return self._request("/object_info")

    def queue(self) -> dict:
        """`queue_running` and `queue_pending`, as the server lists them."""
        return self._request("/queue")

    def interrupt(self) -> None:
        """Stops the prompt that is running now; its `wait` raises PromptInterrupted."""
        self._request("/interrupt", {})

    def log_text(self) -> str:
        """Everything the server has logged so far."""
        return self.log.read_text(encoding="utf-8", errors="replace")

    def latents(self, history: History) -> dict:
        """Node id -> the tensor that node's SaveLatent wrote."""
        return read_latents(history, self.output)

    def run(self, prompt: dict, timeout: float = 300) -> History:
        """Submits a prompt in API format and waits for its end."""
        return self.wait(self.submit(prompt), timeout)

    def submit(self, prompt: dict) -> str:
        """Queues a prompt in API format and returns its id."""
        try:
            answer = self._request("/prompt", {"prompt": prompt})
        except urllib.error.HTTPError as refusal:
            if refusal.code != 400:
                raise
            raise _refused(json.load(refusal)) from None
        # a prompt with one valid output is accepted without its invalid ones
        if answer["node_errors"]:
            self._request("/queue", {"delete": [answer["prompt_id"]]})
            raise _refused(answer)
        return answer["prompt_id"]

    def wait(self, prompt_id: str, timeout: float = 300) -> History:
        """Polls the history until the prompt has ended."""
        for _ in self._until(timeout, f"prompt {prompt_id} did not end"):
            entry = self._request(f"/history/{prompt_id}").get(prompt_id)
            if entry is not None:
                return _history(prompt_id, entry)
        raise AssertionError("unreachable")

    def read(self, path: str, body: dict | None = None) -> bytes:
        """What the server answers to a GET, or to a POST of `body`."""
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self.url + path, data, {"Content-Type": "application/json"})
        with self._opener.open(request, timeout=60) as response:
            return response.read()

    def _request(self, path: str, body: dict | None = None) -> dict:
        text = self.read(path, body)
        return json.loads(text) if text else {}

    def _until(self, timeout: float, what: str) -> Iterator[None]:
        deadline = time.monotonic() + timeout
        while True:
            if self._process is None or self._process.poll() is not None:
                code = None if self._process is None else self._process.returncode
                raise ServerFailed(f"{what}: it is not running (exit status {code})\n{self._log_tail()}")
            yield
            if time.monotonic() > deadline:
                raise ServerFailed(f"{what} within {timeout} s\n{self._log_tail()}")
            time.sleep(0.1)

    def _log_tail(self, lines: int = 60) -> str:
        return "\n".join(self.log_text().splitlines()[-lines:]) if self.log.exists() else "(no log)"


def _signal_group(process: subprocess.Popen, *, force: bool) -> None:
    if os.name == "nt":
        process.kill() if force else process.terminate()
        return
    # the leader may have gone in between, its group with it
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL if force else signal.SIGTERM)


def _refused(answer: dict) -> PromptFailed:
    for node in answer.get("node_errors", {}).values():
        messages = "; ".join(f"{error['message']}: {error['details']}" for error in node["errors"])
        return PromptFailed("prompt refused", node["class_type"], messages, answer)
    error = answer.get("error", {})
    return PromptFailed("prompt refused", "", f"{error.get('message')}: {error.get('details')}", answer)


def _history(prompt_id: str, entry: dict) -> History:
    status = entry["status"]
    for name, record in status["messages"]:
        if name == "execution_error":
            raise PromptFailed("node raised", record["node_type"], record["exception_message"].strip(), record)
        if name == "execution_interrupted":
            raise PromptInterrupted("interrupted", record["node_type"], "interrupted", record)
    if status["status_str"] != "success":
        raise PromptFailed("prompt failed", "", status["status_str"], entry)
    return History(prompt_id, status["status_str"], entry["outputs"], tuple(map(tuple, status["messages"])))
