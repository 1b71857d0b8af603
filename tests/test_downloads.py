"""Downloads from a hub on this machine: their progress, and what is left where Stop ends them."""

import http.server
import json
import re
import shutil
import threading
from pathlib import Path

import pytest
from huggingface_hub import constants, hf_api

from noiserefine.models import downloads
from noiserefine.models.catalogue import Model
from noiserefine.models.loading import load_pipeline
from noiserefine.models.pool import Models
from noiserefine.page import jobs
from noiserefine.page.events import Arm, Download
from noiserefine.page.settings import Settings
from noiserefine.page.stream import Stopped

COMMIT, REPOSITORY = "0" * 40, "someone/tiny"


class Hub(http.server.BaseHTTPRequestHandler):
    """Serve a folder as a model repository, the parts of it that downloads ask for."""

    folder: Path
    sent: dict[str, int]  # bytes by file

    def do_HEAD(self):
        self.do_GET(body=False)

    def do_GET(self, body=True):
        path = self.path.partition("?")[0]
        if found := re.fullmatch(rf"/{REPOSITORY}/resolve/\w+/(.+)", path):
            return self.send_file(found[1], body)
        names = [path for path in self.folder.rglob("*") if path.is_file()]
        files = [(str(name.relative_to(self.folder)), name.stat().st_size) for name in names]
        answer: object = {
            "id": REPOSITORY,
            "sha": COMMIT,
            "siblings": [{"rfilename": name} for name, _ in files],
        }  # of /api/models/REPOSITORY
        if "/tree/" in path:
            answer = [
                {"type": "file", "path": name, "size": size, "oid": COMMIT} for name, size in files
            ]
        self.answer(json.dumps(answer).encode(), 200, {"Content-Type": "application/json"}, body)

    def send_file(self, name, body):
        path = self.folder / name
        if not path.is_file():
            return self.answer(b"", 404, {"X-Error-Code": "EntryNotFound"}, body)
        data = path.read_bytes()
        headers = {"ETag": f'"{name.replace("/", "-")}"', "X-Repo-Commit": COMMIT}
        if body:
            self.sent[name] = self.sent.get(name, 0) + len(data)
        return self.answer(data, 200, headers, body)

    def answer(self, data, status, headers, body):
        self.send_response(status)
        for name, value in (headers | {"Content-Length": str(len(data))}).items():
            self.send_header(name, value)
        self.end_headers()
        if body:
            self.wfile.write(data)

    def log_message(self, *_):
        pass


@pytest.fixture
def hub(tiny_folder, tmp_path, monkeypatch):
    """Return the bytes that a hub with the small pipeline has sent, by file."""
    Hub.folder, Hub.sent = tiny_folder, {}
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.handle_error = lambda *_: None  # a client that goes away
    threading.Thread(target=server.serve_forever, daemon=True).start()
    address = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setattr(constants, "ENDPOINT", address)
    monkeypatch.setattr(hf_api.api, "endpoint", address)
    template = f"{address}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 2**16)
    yield Hub.sent
    server.shutdown()


def test_a_stopped_download_keeps_what_is_complete(hub, tmp_path, monkeypatch):
    """The page hears of the bytes; Stop ends them, and the next run fetches the rest."""
    seen = []

    def stop(done, total):
        seen.append((done, total))
        if done > total / 2:
            raise Stopped

    models, other = Models(), Model(str(Hub.folder))
    loaded = models.get(other)
    with downloads.listening(stop), pytest.raises(Stopped):
        models.get(Model(REPOSITORY))
    assert models.find(other) is loaded, "a stopped download costs no model in memory"
    whole = sum(path.stat().st_size for path in Hub.folder.rglob("*"))
    assert len(seen) > 10 and seen[-1][1] <= whole
    [snapshot] = tmp_path.glob("*/snapshots/*")
    complete = {str(path.relative_to(snapshot)) for path in snapshot.rglob("*.*")}
    assert "model_index.json" in complete and not list(tmp_path.rglob("*.incomplete"))
    hub.clear()
    monkeypatch.setattr(jobs, "MODELS", models)
    settings = Settings("a cat", backbone=REPOSITORY, steps=1)
    batches = jobs.work("compare", settings, {}, {}, lambda text: None)
    events = [event for batch in batches for event in batch]
    done = [event.done for event in events if isinstance(event, Download)]
    assert whole / 2 < max(done) <= whole
    assert hub and not complete & hub.keys(), "these are not fetched again"
    assert any(isinstance(event, Arm) for event in events)


def test_files_of_a_removed_part_are_left_on_the_hub(hub, tiny_folder, tmp_path):
    """A model whose safety checker was taken out may still hold its files, pickles among them."""
    Hub.folder = shutil.copytree(tiny_folder, tmp_path / "model")
    (Hub.folder / "safety_checker").mkdir()
    (Hub.folder / "safety_checker" / "pytorch_model.bin").write_bytes(b"a pickle")
    assert load_pipeline(REPOSITORY, "cpu").safety_checker is None
    assert not any(name.startswith("safety_checker") for name in hub)
