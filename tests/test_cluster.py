"""Several workers on real Ray, local and on a cluster of two nodes: the same rows, whoever dies, hangs or is slow."""

from __future__ import annotations

import contextlib
import json
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

import polars as pl
import psutil
import pytest
import yaml
from commandline import Piped, batchgen

if TYPE_CHECKING:
    from collections.abc import Iterator

# One process answers to many tests here: a Ray of its own takes each some seconds.
pytestmark = pytest.mark.timeout(300)


def job_file(folder: Path, rows: int = 120, *, name: str = "job", **changes: Any) -> Path:
    """A rehearsal on two workers; `changes` go into sections."""
    chats = [[{"role": "user", "content": f"Say {i}."}] for i in range(rows)]
    source = folder / f"prompts-{rows}.parquet"
    pl.DataFrame({"id": [f"row-{i:04d}" for i in range(rows)], "messages": chats}).write_parquet(source)
    sections: dict[str, Any] = {
        "input": {"path": str(source), "messages": "messages", "id": "id"},
        "model": {"target": "demo:smollm2-135m"},
        "engine": {"kind": "rehearsal", "options": {"step_s": 0.02}},
        "sampling": {"max_tokens": 64},
        "batch_size": 4,
        "workers": {"count": 2},
        "checkpoint": {"rows_per_part": 20, "journal_rows": 4, "journal_seconds": 1.0, "lease_seconds": 5},
        "output": {"path": str(folder / name)},
    }
    for section, change in changes.items():
        sections[section] = sections[section] | change if isinstance(change, dict) else change
    file = folder / f"{name}.yaml"
    file.write_text(yaml.safe_dump(sections))
    return file


def submit(job: Path, *more: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return batchgen("submit", job, *more, **environment)


def started(job: Path, *more: str, **environment: str) -> Piped:
    """A submit that has just begun."""
    return Piped("submit", job, *more, **environment)


@contextlib.contextmanager
def submitted(job: Path, *more: str, **environment: str) -> Iterator[Piped]:
    """A submit under way, once its first rows are in the journal."""
    with started(job, *more, **environment) as process:
        deadline = time.monotonic() + 180
        while not list(job.with_suffix("").glob("__batchgen/journal/*/seg-*")):
            assert process.poll() is None, process.communicate()
            assert time.monotonic() < deadline
            time.sleep(0.05)
        yield process


def actors(driver: Piped) -> list[psutil.Process]:
    """The processes of the workers that have one."""
    found = []
    for child in psutil.Process(driver.pid).children(recursive=True):
        with contextlib.suppress(psutil.Error, IndexError):
            if child.cmdline()[0].startswith("ray::WorkerActor"):
                found.append(child)
    return found


def answers(job: Path) -> dict[str, str]:
    """What each row was answered; each stands there once."""
    found = pl.read_parquet(job.with_suffix("") / "*.parquet")
    assert found["row_id"].is_unique().all()
    return dict(found.select("row_id", "completion").rows())


def workers(job: Path) -> Counter[str]:
    return Counter(pl.read_parquet(job.with_suffix("") / "*.parquet")["worker"].to_list())


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The rows of one worker in process."""
    job = job_file(tmp_path_factory.mktemp("alone"), workers={"count": 1}, engine={"options": {}})
    done = submit(job)
    assert done.returncode == 0, done.stderr
    return answers(job)


def test_two_workers_give_the_rows_of_one_and_leave_nothing_behind(tmp_path: Path, expected: dict[str, str]) -> None:
    job = job_file(tmp_path)
    with submitted(job, "--json") as driver:
        assert list(Path("/tmp").glob(f"batchgen-{driver.pid}-*"))
        said, warned = driver.communicate(timeout=120)
    assert driver.returncode == 0, warned
    assert answers(job) == expected
    assert json.loads(said)["ok"] == len(expected)
    assert set(workers(job)) == {"0", "1"}
    assert "ray" not in warned.lower(), warned
    assert not list(Path("/tmp").glob(f"batchgen-{driver.pid}-*")), "Ray's own files are gone"
    again = submit(job)
    assert (again.returncode, "nothing to do" in again.stdout) == (0, True)


@pytest.mark.parametrize("after_s", [0.0, 0.75, 1.5])
def test_ctrl_c_while_ray_starts_is_a_drain(tmp_path: Path, after_s: float) -> None:
    """Whichever of Ray's own waits it falls into."""
    with started(job_file(tmp_path)) as driver:
        while not list(Path("/tmp").glob(f"batchgen-{driver.pid}-*/session_*")):
            assert driver.poll() is None, driver.communicate()
            time.sleep(0.01)
        time.sleep(after_s)
        driver.send_signal(signal.SIGINT)
        _, said = driver.communicate(timeout=60)
        assert driver.returncode == 75, said


def test_nothing_listens_but_on_loopback(tmp_path: Path) -> None:
    with submitted(job_file(tmp_path)) as driver:
        family = [psutil.Process(driver.pid), *psutil.Process(driver.pid).children(recursive=True)]
        heard = set()
        for process in family:
            with contextlib.suppress(psutil.Error):
                heard |= {c.laddr.ip for c in process.net_connections("inet") if c.status == psutil.CONN_LISTEN}
        assert heard
        assert heard <= {"127.0.0.1", "::1", "::ffff:127.0.0.1"}
        driver.send_signal(signal.SIGTERM)
        _, said = driver.communicate(timeout=60)
        assert driver.returncode == 75, said


def test_a_killed_worker_is_replaced_and_its_rows_go_to_others(tmp_path: Path, expected: dict[str, str]) -> None:
    job = job_file(tmp_path, engine={"options": {"step_s": 0.1}})
    with submitted(job) as driver:
        actors(driver)[0].kill()
        _, said = driver.communicate(timeout=120)
        assert driver.returncode == 0, said
    assert "died" in said
    assert answers(job) == expected
    assert "2" in workers(job), "a third worker took its place"


def test_a_worker_that_hangs_is_replaced_and_cannot_write_once_it_wakes(
    tmp_path: Path, expected: dict[str, str]
) -> None:
    job = job_file(tmp_path, workers={"count": 2, "silent_seconds": 4.0}, engine={"options": {"step_s": 0.1}})
    with submitted(job) as driver:
        victim = actors(driver)[0]
        victim.suspend()
        _, said = driver.communicate(timeout=120)
        assert driver.returncode == 0, said
        assert "made no step for 4 s" in said
        assert not victim.is_running() or victim.status() == psutil.STATUS_ZOMBIE, "it does not keep its memory"
    assert answers(job) == expected


def test_a_killed_driver_is_survived_by_the_next_submit(tmp_path: Path, expected: dict[str, str]) -> None:
    job = job_file(tmp_path, engine={"options": {"step_s": 0.1}})
    with submitted(job) as driver:
        orphans = actors(driver)
        driver.kill()
        driver.wait()
        done = submit(job)
        assert done.returncode == 0, done.stderr
        assert "rows taken over from journals" in done.stdout
        _, alive = psutil.wait_procs(orphans, timeout=30)
        assert not alive, "workers do not outlive their driver"
    assert answers(job) == expected


def test_a_drain_takes_seconds_and_loses_nothing_that_was_finished(tmp_path: Path, expected: dict[str, str]) -> None:
    job = job_file(tmp_path, engine={"options": {"step_s": 0.1}})
    with submitted(job) as driver:
        began = time.monotonic()
        driver.send_signal(signal.SIGTERM)
        _, said = driver.communicate(timeout=60)
        assert driver.returncode == 75, said
        assert time.monotonic() - began < 25
    notes = {path.name.split("-")[-1] for path in job.with_suffix("").glob("__batchgen/journal/*/note-*")}
    assert notes == {"end"}, "no shard is said to have killed its worker"
    assert submit(job).returncode == 0
    assert answers(job) == expected


def test_a_shard_is_shared_once_there_is_no_other(tmp_path: Path, expected: dict[str, str]) -> None:
    checkpoint = {"rows_per_part": 120}
    job = job_file(tmp_path, checkpoint=checkpoint, engine={"options": {"step_s": 0.1}})
    done = submit(job)
    assert done.returncode == 0, done.stderr
    assert answers(job) == expected
    assert min(workers(job).values()) > 120 / 4, "both had their share of one part"
    assert len(list(job.with_suffix("").glob("*.parquet"))) == 1
    assert pl.read_parquet(job.with_suffix("") / "*.parquet")["row_id"].to_list() == sorted(expected), "in input order"


def test_a_helper_or_the_owner_of_a_shared_shard_may_die(tmp_path: Path, expected: dict[str, str]) -> None:
    job = job_file(tmp_path, checkpoint={"rows_per_part": 120}, engine={"options": {"step_s": 0.15}})
    with submitted(job) as driver:
        deadline = time.monotonic() + 180
        while not list(job.with_suffix("").glob("__batchgen/journal/*/seg-*-h*")):
            assert time.monotonic() < deadline, "nobody helps"
            time.sleep(0.05)
        for victim in actors(driver):
            victim.kill()
            time.sleep(3)
        _, said = driver.communicate(timeout=120)
        assert driver.returncode == 0, said
    assert answers(job) == expected


def test_a_row_that_kills_its_worker_is_found_and_the_others_are_done(tmp_path: Path, expected: dict[str, str]) -> None:
    job = job_file(tmp_path, engine={"options": {"kill": ["row-0031"]}})
    done = submit(job, "--set", "max_error_rate=0.02")
    assert done.returncode == 0, done.stderr
    table = pl.read_parquet(job.with_suffix("") / "*.parquet").filter(pl.col("status") != "ok")
    assert table.select("row_id", "status", "error_type").rows() == [("row-0031", "error", "worker_died")]
    found = {row: text for row, text in answers(job).items() if row != "row-0031"}
    assert found == {row: text for row, text in expected.items() if row != "row-0031"}


def test_errors_of_workers_are_the_jobs(tmp_path: Path) -> None:
    job = job_file(tmp_path, engine={"options": {"fail": ["row-*"]}}, rows=400)
    done = submit(job)
    assert done.returncode == 1
    assert "rows failed" in done.stderr
    assert "max_error_rate is 0" in done.stderr
    assert "Traceback" not in done.stderr


NODES = """
import json, os, sys, time
os.environ.update(RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER="0", RAY_USAGE_STATS_ENABLED="0")
from ray.cluster_utils import Cluster
environment = json.loads(sys.argv[1]) if sys.argv[1:] else {}
gpus = int(environment.pop("gpus", 0))
head = {"num_cpus": 1 + gpus, "num_gpus": gpus, "include_dashboard": False, "env_vars": environment}
cluster = Cluster(initialize_head=True, head_node_args=head)
second = cluster.add_node(num_cpus=1)
print(cluster.address, flush=True)
for line in sys.stdin:
    cluster.remove_node(second, allow_graceful=False)
    second = cluster.add_node(num_cpus=1)
    print("replaced", flush=True)
cluster.shutdown()
"""


def test_a_cluster_of_two_nodes_one_of_which_dies(tmp_path: Path, expected: dict[str, str]) -> None:
    command = [sys.executable, "-c", NODES]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as nodes:
        assert nodes.stdin is not None
        assert nodes.stdout is not None
        address = nodes.stdout.readline().strip()
        job = job_file(tmp_path, workers={"count": 2, "address": address}, engine={"options": {"step_s": 0.1}})
        # The nodes' address is the loopback one, and so must the driver's be.
        with submitted(job, RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER="0") as driver:
            print("crash", file=nodes.stdin, flush=True)
            assert nodes.stdout.readline() == "replaced\n"
            _, said = driver.communicate(timeout=120)
            assert driver.returncode == 0, said
        nodes.stdin.close()
    assert answers(job) == expected
    assert "died" in said


def test_workers_share_a_gpu_and_one_that_asks_for_more_than_there_are_is_named(tmp_path: Path) -> None:
    """Ray counts GPUs; that there is none here does not matter to who gets how much of one."""
    command = [sys.executable, "-c", NODES, json.dumps({"gpus": "1"})]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as nodes:
        assert nodes.stdin is not None
        assert nodes.stdout is not None
        address = nodes.stdout.readline().strip()
        here = {"RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0"}
        halves = {"count": 2, "gpus": 0.5, "address": address}
        job = job_file(tmp_path, workers=halves)
        done = submit(job, **here)
        assert done.returncode == 0, done.stderr
        assert set(workers(job)) == {"0", "1"}
        group = {"count": 1, "gpus": 2, "address": address, "start_seconds": 5}
        refused = submit(job_file(tmp_path, name="group", workers=group), **here)
        nodes.stdin.close()
    assert refused.returncode == 1, "75 would be tried again for ever, and nobody told"
    assert "each asks for 2 GPUs" in refused.stderr


def test_a_node_on_which_no_engine_starts_is_left_for_another(tmp_path: Path) -> None:
    command = [sys.executable, "-c", NODES, json.dumps({"OMP_NUM_THREADS": "broken"})]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as nodes:
        assert nodes.stdin is not None
        assert nodes.stdout is not None
        workers = {"count": 1, "address": nodes.stdout.readline().strip()}
        engine = {"kind": "torch", "options": {}}
        job = job_file(tmp_path, 3, workers=workers, engine=engine, sampling={"max_tokens": 2})
        done = submit(job, RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER="0")
        nodes.stdin.close()
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("died: ValueError") == 3
    assert "before they had an engine" in done.stderr
    assert len(answers(job)) == 3
