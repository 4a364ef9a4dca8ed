"""`regvq demo` in a process of its own, on embedded models of a few weights, and a client of its page."""

import http.client
import json
import os
import re
import subprocess
import sys
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from helpers.tiny_models import tiny_tokenizer

from regvq_fast.models.model import Model
from regvq_fast.priors.autoregressive.model import TokenTransformer
from regvq_fast.priors.diffusion.model import VQDiffusion
from regvq_fast.priors.diffusion.text import LabelEncoder, WordEncoder

LABELS = ("cow", "red fox")

START = """
import sys
from pathlib import Path
from regvq_fast.demo import serving
from regvq_fast.scenes import embedded
serving.REQUEST_SECONDS = 2.0
embedded.FOLDER = Path(sys.argv[1])
from regvq_fast.cli.demo import main
main(sys.argv[2:])
"""


def save_tiny_models(folder: Path) -> None:
    """Save a tokenizer of 8 x 8 tokens of 16 pixels, and untrained priors beside it, as the package holds its own."""
    tiny_tokenizer().save_pretrained(folder / "tokenizer")
    torch.manual_seed(0)
    sizes: Any = {"token_shape": (8, 8), "width": 16, "depth": 1, "heads": 2}
    words = WordEncoder(width=16, depth=1, heads=2, max_words=24, buckets=64)
    priors: dict[str, Model] = {
        "ar": TokenTransformer(32, 16, **sizes),
        "diffusion": VQDiffusion(32, num_steps=6, text_encoder=words, **sizes),
        "label": VQDiffusion(32, num_steps=6, text_encoder=LabelEncoder(LABELS, width=16), **sizes),
        "none": TokenTransformer(32, 0, **sizes),
    }
    for name, prior in priors.items():
        for weight in prior.parameters():
            torch.nn.init.normal_(weight, std=0.5)  # their first weights hardly look at the condition
        prior.save_pretrained(folder / name)


@dataclass
class DemoServer:
    """A running page."""

    port: int
    process: subprocess.Popen[str]
    log: Path

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/"

    def ask(
        self, method: str, path: str, body: bytes | None = None, headers: dict[str, str] | None = None
    ) -> tuple[int, bytes]:
        """Send one request as it stands, and return the answer's status and body."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        try:
            connection.putrequest(method, path, skip_host="Host" in (headers or {}))
            sent = ({} if body is None else {"Content-Length": str(len(body))}) | (headers or {})
            for name, value in sent.items():
                connection.putheader(name, value)
            connection.endheaders(body)
            answer = connection.getresponse()
            return answer.status, answer.read()
        finally:
            connection.close()

    def upload(self, content: bytes, name: str = "image.png") -> tuple[int, Any]:
        """Upload a file, and return the status and the paths that it got."""
        boundary = uuid.uuid4().hex
        head = f'--{boundary}\r\nContent-Disposition: form-data; name="files"; filename="{name}"\r\n\r\n'
        body = head.encode() + content + f"\r\n--{boundary}--\r\n".encode()
        kind = {"Content-Type": f"multipart/form-data; boundary={boundary}"}
        status, answer = self.ask("POST", "/gradio_api/upload", body, kind)
        return status, json.loads(answer)

    def join(self, body: bytes) -> tuple[int, Any]:
        """Ask for work with a body as it stands."""
        status, answer = self.ask("POST", "/gradio_api/queue/join", body, {"Content-Type": "application/json"})
        return status, json.loads(answer)

    def call(self, name: str, *values: Any) -> tuple[bool, str]:
        """Start the work of a button and wait for it; return whether it succeeded, and the HTML or the error."""
        session = uuid.uuid4().hex
        request = {"data": values, "fn_index": self.function(name), "session_hash": session}
        status, answer = self.join(json.dumps(request).encode())
        if status != 200:
            return False, str(answer["detail"])
        _, events = self.ask("GET", f"/gradio_api/queue/data?session_hash={session}")
        messages = [json.loads(line[6:]) for line in events.decode().splitlines() if line.startswith("data: ")]
        (done,) = [message for message in messages if message["msg"] == "process_completed"]
        output = done["output"]
        return done["success"], str(output["data"][0] if done["success"] else output["error"])

    def function(self, name: str) -> int:
        """Return the number of a button's work in the page."""
        _, page = self.ask("GET", "/")
        found = re.search(r"window\.gradio_config = (\{.*?\});</script>", page.decode(), re.DOTALL)
        assert found
        return next(entry["id"] for entry in json.loads(found[1])["dependencies"] if entry["api_name"] == name)


@contextmanager
def demo_server(models: Path, log: Path) -> Iterator[DemoServer]:
    """Serve the page on the models in a folder, at any free port."""
    runs = [str(models / name) for name in ("ar", "diffusion", "label", "none")]
    command = [sys.executable, "-c", START, str(models), "--port", "0", "--device", "cpu", "--prior-runs", *runs]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1", "COLUMNS": "200"}
    with log.open("w") as errors:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, text=True, env=environment)
        try:
            lines = []
            for line in process.stdout or ():
                lines.append(line)
                if found := re.search(r"http://127\.0\.0\.1:(\d+)", line):
                    yield DemoServer(int(found[1]), process, log)
                    break
            else:
                raise AssertionError(f"no page: {lines}\n{log.read_text()}")
        finally:
            process.terminate()
            process.wait(30)


def as_file(path: str, **more: Any) -> dict[str, Any]:
    """Return an upload's path as the page names files."""
    return {"path": path, "meta": {"_type": "gradio.FileData"}, **more}
