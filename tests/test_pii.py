"""Personal data is found in real prompts, and once masked it is nowhere."""

from __future__ import annotations

import http.server
import json
import re
import subprocess
import sys
import threading
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import polars as pl
import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

pytest.importorskip("presidio_analyzer")

from batchgen import job, pii, spec
from batchgen.errors import ScreenError, SpecError

if TYPE_CHECKING:
    from collections.abc import Iterator

ROOT = Path(__file__).parents[1]
NAMES = {
    "EMAIL": "EMAIL_ADDRESS",
    "PHONE": "PHONE_NUMBER",
    "CREDIT_CARD": "CREDIT_CARD",
    "IBAN": "IBAN_CODE",
    "IP": "IP_ADDRESS",
}


class Redactor:
    """One text at a time."""

    def __init__(self, finder: pii.Finder) -> None:
        self._finder = finder

    def redact(self, text: str) -> tuple[str, Counter[str]]:
        return pii.masked(text, *self._finder.find([text]))


@pytest.fixture(scope="module")
def finder() -> Redactor:
    return Redactor(pii.Presidio(tuple(NAMES.values())))


@pytest.fixture(scope="module")
def labelled() -> list[dict]:
    """Rows with synthetic personal data, which their `detail` lists, and some that only look so."""
    table = pl.read_parquet(ROOT / "tests/data/dirty_prompts.parquet")
    return table.filter(pl.col("defect").is_in(["pii", "pii_negative"])).to_dicts()


def secrets(row: dict) -> list[tuple[str, str]]:
    entities = json.loads(row["detail"])["entities"]
    return [(NAMES[each["type"]], each["text"]) for each in entities if each["type"] in NAMES]


def test_what_is_listed_is_found(finder, labelled):
    asked = found = 0
    for row in labelled:
        masked, kinds = finder.redact("\n\n".join(m["content"] for m in row["messages"]))
        for kind, text in secrets(row):
            asked += 1
            found += text not in masked and kinds[kind] > 0
    assert asked == 32
    assert found / asked >= 0.95


def test_what_only_looks_so_is_left_alone(finder, labelled):
    for row in (row for row in labelled if row["defect"] == "pii_negative" and row["expect"] == "accept"):
        for message in row["messages"]:
            assert finder.redact(message["content"]) == (message["content"], Counter())


def test_numbers_in_prompts_about_mathematics_and_code_are_left_alone(finder):
    for name in ("eagle_gsm8k", "eagle_humaneval"):
        for chat in pl.read_parquet(ROOT / f"examples/prompts/{name}.parquet")["messages"].to_list():
            assert not finder.redact(chat[0]["content"])[1], chat[0]["content"]


@given(before=st.text(max_size=30), after=st.text(max_size=30), gap=st.sampled_from([" ", "\n", ": ", " ("]))
def test_a_mail_address_is_masked_wherever_it_stands(finder, before, after, gap):
    masked, kinds = finder.redact(f"{before}{gap}maria.okafor@example.com {after}")
    assert "okafor" not in masked
    assert kinds["EMAIL_ADDRESS"] >= 1


@given(st.text())
def test_what_holds_nothing_is_returned_as_it_is(finder, text):
    masked, kinds = finder.redact(text)
    assert kinds or masked == text


@pytest.mark.parametrize("action", ["redact", "skip"])
def test_no_secret_is_in_any_file_or_line_of_a_job(tmp_path, labelled, action):
    broken = [{"role": "assistant", "content": "Write to maria.okafor@example.com."}]
    rows = [{"id": f"row-{i}", "messages": row["messages"]} for i, row in enumerate(labelled)]
    pl.DataFrame([*rows, {"id": "broken", "messages": broken}]).write_parquet(tmp_path / "in.parquet")
    sections = {
        "input": {"path": str(tmp_path / "in.parquet"), "messages": "messages", "id": "id"},
        "screen": {"pii": {"action": action}},
        "model": {"target": "demo:smollm2-135m"},
        "engine": {"kind": "rehearsal", "options": {"kill": ["row-30"]}},
        "batch_size": 4,
        "checkpoint": {"journal_rows": 1},
        "max_error_rate": 1.0,
        "output": {"path": str(tmp_path / "out")},
    }
    job = tmp_path / "job.yaml"
    job.write_text(yaml.safe_dump(sections))
    command = [sys.executable, "-m", "batchgen", "submit", str(job), "--log", "json"]
    killed = subprocess.run(command, capture_output=True, text=True, check=False)
    assert killed.returncode < 0
    assert list(tmp_path.glob("out/__batchgen/journal/*/seg-*")), "there is a journal to look into"
    hidden = [text for row in labelled for _, text in secrets(row)] + ["maria.okafor@example.com"]

    def leaks(said: str) -> list[str]:
        files = [file.read_bytes() for file in tmp_path.glob("out/**/*") if file.is_file()]
        tables = [file for file in tmp_path.glob("out/**/*") if file.suffix in (".parquet", ".rows")]
        files += [str(pl.read_parquet(file).to_dicts()).encode() for file in tables]
        return [text for text in hidden if text in said or any(text.encode() in data for data in files)]

    assert not leaks(killed.stdout + killed.stderr)
    sections["engine"]["options"] = {}
    job.write_text(yaml.safe_dump(sections))
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert not leaks(done.stdout + done.stderr)
    table = pl.read_parquet(tmp_path / "out/*.parquet")
    assert table.height == len(labelled) + 1
    skipped = table.filter(pl.col("error_type") == "pii")
    if action == "skip":
        assert skipped["messages"].null_count() == skipped.height >= 29
        assert skipped.filter(pl.col("error") == "the conversation holds CREDIT_CARD 1").height >= 5
    else:
        assert skipped.height == 0
        assert "masked in prompts: " in done.stdout
        assert "<CREDIT_CARD>" in str(table["messages"].to_list())


@pytest.fixture(scope="module")
def spacy_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A spaCy model that knows two names by rules: as real as a trained one to who loads it, and a few kB."""
    spacy = pytest.importorskip("spacy")
    made = spacy.blank("en")
    names = [{"label": "PERSON", "pattern": "Maria Okafor"}, {"label": "GPE", "pattern": "Lagos"}]
    made.add_pipe("entity_ruler").add_patterns(names)
    folder = tmp_path_factory.mktemp("model") / "names"
    made.to_disk(folder)
    return folder


def test_names_are_found_by_a_spacy_model(spacy_model):
    finder = Redactor(pii.Presidio(("EMAIL_ADDRESS", "PERSON", "LOCATION"), str(spacy_model)))
    masked, kinds = finder.redact("Maria Okafor of Lagos, maria.okafor@example.com, met Jo.")
    assert masked == "<PERSON> of <LOCATION>, <EMAIL_ADDRESS>, met Jo."
    assert kinds == {"PERSON": 1, "LOCATION": 1, "EMAIL_ADDRESS": 1}
    only = Redactor(pii.Presidio(("PERSON",), str(spacy_model)))
    assert only.redact("Maria Okafor of Lagos")[0] == "<PERSON> of Lagos"


def test_what_overlaps_is_masked_whole():
    text = "Jo Meier jo.meier@example.org wrote"
    spans = [pii.Span(0, 29, "PERSON", 0.85), pii.Span(9, 29, "EMAIL_ADDRESS", 1.0)]
    assert pii.masked(text, spans) == ("<PERSON> <EMAIL_ADDRESS> wrote", {"PERSON": 1, "EMAIL_ADDRESS": 1})
    inside = [pii.Span(0, 6, "PERSON", 0.5), pii.Span(3, 4, "LOCATION", 1.0)]
    assert pii.masked("a (b) c", inside)[0] == "<PERSON><LOCATION>) c"


def test_a_spacy_model_that_is_not_there_is_not_fetched():
    with pytest.raises(SpecError, match="en_core_web_none is no spaCy model that is installed, and no folder with one"):
        pii.Presidio(("PERSON",), "en_core_web_none")


class Dlp(http.server.BaseHTTPRequestHandler):
    """Answers `content:inspect` in the shapes that Google's documentation records: zeros are left out of its JSON."""

    asked: ClassVar[list[dict[str, Any]]] = []
    failures: ClassVar[list[int]] = []
    truncated_above = 1000

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        type(self).asked.append(body | {"path": self.path})
        if self.failures:
            status = self.failures.pop(0)
            self._answer(status, {"error": {"code": status, "message": "no", "status": STATUSES[status]}})
            return
        rows = [row["values"][0]["stringValue"] for row in body["item"]["table"]["rows"]]
        findings = [
            {
                "infoType": {"name": "EMAIL_ADDRESS"},
                "likelihood": "VERY_LIKELY",
                "location": {
                    "byteRange": _range(text[: found.start()].encode(), found[0].encode()),
                    "codepointRange": _range(text[: found.start()], found[0]),
                    "contentLocations": [
                        {
                            "recordLocation": {
                                "fieldId": {"name": "text"},
                                "tableLocation": {"rowIndex": str(i)} if i else {},
                            }
                        }
                    ],
                },
                "createTime": "2019-03-08T23:55:10.980Z",
            }
            for i, text in enumerate(rows)
            for found in re.finditer(r"\S+@\S+", text)
        ]
        result = {"findings": findings} if len(rows) <= self.truncated_above else {"findingsTruncated": True}
        self._answer(200, {"result": result})

    def _answer(self, status: int, body: dict[str, Any]) -> None:
        data = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *args: Any) -> None:
        pass


STATUSES = {403: "PERMISSION_DENIED", 429: "RESOURCE_EXHAUSTED"}


def _range(before: str | bytes, found: str | bytes) -> dict[str, str]:
    start = {"start": str(len(before))} if before else {}
    return start | {"end": str(len(before) + len(found))}


@pytest.fixture
def dlp(monkeypatch: pytest.MonkeyPatch) -> Iterator[pii.CloudDlp]:
    """Google's client, speaking REST to a server on loopback."""
    dlp_v2 = pytest.importorskip("google.cloud.dlp_v2")
    from google.auth.credentials import AnonymousCredentials
    from google.cloud.dlp_v2.services.dlp_service.transports import DlpServiceRestTransport

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Dlp)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setattr(Dlp, "asked", [])
    monkeypatch.setattr(Dlp, "failures", [])
    host = f"127.0.0.1:{server.server_port}"
    transport = DlpServiceRestTransport(host=host, url_scheme="http", credentials=AnonymousCredentials())
    client = dlp_v2.DlpServiceClient(transport=transport)
    yield pii.CloudDlp(("EMAIL_ADDRESS", "CREDIT_CARD", "PERSON"), "my-project", client)
    server.shutdown()
    server.server_close()


TEXTS = ["é jo@example.org", "nothing", "", "ann@example.org and bo@example.org"]


def test_dlp_finds_what_it_says_where_it_says(dlp):
    found = [pii.masked(text, spans)[0] for text, spans in zip(TEXTS, dlp.find(TEXTS), strict=True)]
    assert found == ["é <EMAIL_ADDRESS>", "nothing", "", "<EMAIL_ADDRESS> and <EMAIL_ADDRESS>"]
    [asked] = Dlp.asked
    assert asked["path"].startswith("/v2/projects/my-project/locations/global/content:inspect")
    names = [each["name"] for each in asked["inspectConfig"]["infoTypes"]]
    assert names == ["EMAIL_ADDRESS", "CREDIT_CARD_NUMBER", "PERSON_NAME"]


def test_dlp_is_asked_in_portions_and_again(dlp, monkeypatch):
    monkeypatch.setattr(pii, "_REQUEST_BYTES", 80)
    monkeypatch.setattr(pii, "_SHARED", 9)
    monkeypatch.setattr(Dlp, "truncated_above", 1)
    Dlp.failures.append(429)
    long = "x y@z.org " * 5
    [spans, more] = dlp.find([long, "jo@example.org"])
    assert pii.masked(long, spans)[0] == "x <EMAIL_ADDRESS> " * 5
    assert [span.start for span in more] == [0]
    sent = [row["values"][0]["stringValue"] for each in Dlp.asked for row in each["item"]["table"]["rows"]]
    assert max(map(len, sent)) <= 20


def test_a_refusal_of_dlp_ends_the_job_in_one_line(dlp):
    Dlp.failures.append(403)
    with pytest.raises(ScreenError, match=r"Google Cloud DLP cannot be asked for projects/my-project/.*403"):
        dlp.find(["x"])


def test_a_whole_job_screens_by_dlp(dlp, monkeypatch, tmp_path):
    monkeypatch.setattr(pii, "finder", lambda spec: dlp)
    chats = [[{"role": "user", "content": text or "hi"}] for text in TEXTS] * 50
    pl.DataFrame({"messages": chats}).write_parquet(tmp_path / "in.parquet")
    sections = {
        "input": {"path": str(tmp_path / "in.parquet"), "messages": "messages"},
        "screen": {"pii": {"action": "redact", "by": "dlp", "project": "my-project"}},
        "model": {"target": "demo:smollm2-135m"},
        "engine": {"kind": "rehearsal"},
        "output": {"path": str(tmp_path / "out")},
    }
    (tmp_path / "job.yaml").write_text(yaml.safe_dump(sections))
    job.submit(spec.load(str(tmp_path / "job.yaml")))
    said = pl.read_parquet(tmp_path / "out/*.parquet")["messages"].list.last().struct.field("content").to_list()
    assert said == ["é <EMAIL_ADDRESS>", "nothing", "hi", "<EMAIL_ADDRESS> and <EMAIL_ADDRESS>"] * 50
    assert len(Dlp.asked) < 10
