"""The whole way through docker-compose.yml in real containers, twice: data come in, a model is
trained, searched, evaluated, promoted and rolled back, and a group grows with the cluster. Then
what is protected is tried: rights, limits, secrets, ports, and MLflow's login.

`make compose-test` builds the images and runs this; without them it is skipped. The second round
begins where the first has removed everything. Times and sizes are printed.
"""

from __future__ import annotations

import base64
import json
import re
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import browser
import compose_stack
import neighbour
import port_scan
import pytest
from compose_stack import MEMORY_MIB, MLFLOW, RAY, Stack, inspect, run
from PIL import Image

pytestmark = [
    pytest.mark.e2e,
    pytest.mark.cluster,
    pytest.mark.slow,
    pytest.mark.skipif(bool(compose_stack.missing()), reason=compose_stack.missing() or "-"),
]

ROUNDS = (1, 2)
IMAGES = 600
EPOCHS, BATCH, RATE = 50, 4, 0.002
"""Of the training that grows: long enough for a container to start meanwhile."""
DATA, PICTURES = "/data/photos", "/import/photos"
SMALL = "--variant tiny --epochs 2"
PATIENCE_SECONDS = 600.0
SAMPLE_LOG = """
import json, sys
from pathlib import Path
from pipelines.storage.open import open_storage
from pipelines.training import sample_log
folder = Path("/tmp/sample_log")
sample_log.fetch(open_storage("s3://tessera/runs/runs/" + sys.argv[1]), folder)
print(json.dumps(sample_log.read(folder)))
"""
FIND_SECRETS = """
for file in /run/secrets/*; do
  grep -rlF --file="$file" /tmp/ray /data && exit 3
  cat /proc/[0-9]*/cmdline /proc/[0-9]*/environ 2>/dev/null | grep -qaF --file="$file" && exit 4
done
exit 0
"""


class Way:
    """The stack, and what the steps of the way printed."""

    def __init__(self, stack: Stack, folder: Path) -> None:
        self.stack, self.folder = stack, folder
        self.commands: list[str] = []
        self.output: dict[str, str] = {}
        self.listened_before = neighbour.listening()

    def log(self, step: str) -> Path:
        return self.folder / f"{step}.log"

    def start(self, step: str, arguments: str) -> subprocess.Popen[bytes]:
        self.commands.append(f"tessera submit {arguments}")
        return self.stack.submit(*arguments.split(), log=self.log(step))

    def end(self, step: str, job: subprocess.Popen[bytes], began: float) -> None:
        try:
            status = job.wait(timeout=PATIENCE_SECONDS)
        finally:
            job.kill()
        self.output[step] = self.log(step).read_text(errors="replace")
        assert status == 0, f"{step}: {self.output[step]}"
        print(f"{step}: {time.monotonic() - began:.0f} s")

    def go(self, step: str, arguments: str) -> None:
        began = time.monotonic()
        self.end(step, self.start(step, arguments), began)

    def wait_for(self, step: str, text: str, job: subprocess.Popen[bytes]) -> None:
        deadline = time.monotonic() + PATIENCE_SECONDS
        while text not in (printed := self.log(step).read_text(errors="replace")):
            assert job.poll() is None, f"{step} ended before {text!r}: {printed}"
            assert time.monotonic() < deadline, f"{step} has no {text!r}: {printed}"
            time.sleep(0.5)

    def page(self, step: str) -> str:
        """The link that a step printed."""
        (link,) = re.findall(r"^page\s+(\S+)", self.output[step], re.MULTILINE)
        return str(link)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a folder of digits: a folder of PNGs for each class."""
    from sklearn.datasets import load_digits

    root = tmp_path_factory.mktemp("import")
    digits = load_digits()
    for number, (image, label) in enumerate(zip(digits.images, digits.target)):
        if number == IMAGES:
            break
        folder = root / "photos" / str(label)
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray((image * 15.9).astype("uint8")).save(folder / f"{number}.png")
    for path in (root, *root.rglob("*")):
        path.chmod(0o755 if path.is_dir() else 0o644)
    return root


@pytest.fixture(scope="module", params=ROUNDS)
def way(
    request: pytest.FixtureRequest, pictures: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Way]:
    """Goes the way; everything is removed at the end, and nothing may be there before."""
    folder = tmp_path_factory.mktemp("way")
    for port in (5000, 8265):
        with socket.socket() as taken:
            taken.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            taken.bind(("127.0.0.1", port))
    with Stack(folder / "stack", pictures) as stack:
        assert stack.left() == []
        way = Way(stack, folder)
        began = time.monotonic()
        stack.up(workers=2)
        print(f"\nround {request.param}\nup: {time.monotonic() - began:.0f} s")
        image = next((pictures / "photos" / "3").iterdir()).name
        way.go("pack", f"pack {PICTURES} --to {DATA}")
        way.go("train", f"train cnn --data {DATA} --workers 2 {SMALL}")
        way.go("evaluate", f"evaluate photos --data {DATA}")
        way.go("promote", "promote photos")
        way.go("predict", f"predict photos@champion {PICTURES}/3/{image}")
        way.go("tune", f"tune cnn --data {DATA} --trials 2 {SMALL} --workers-per-trial 0")
        grow(way)
        way.go("evaluate again", f"evaluate photos --data {DATA} --no-report")
        way.go("promote again", "promote photos")
        way.go("rollback", "rollback photos")
        way.go("predict again", f"predict photos@champion {PICTURES}/3/{image}")
        yield way
        began = time.monotonic()
    print(f"down: {time.monotonic() - began:.0f} s")
    assert stack.left() == []


def grow(way: Way) -> None:
    """Trains on what is there, and has a third container started meanwhile."""
    began = time.monotonic()
    training = f"train cnn --data {DATA} --workers 1:3 --variant tiny --epochs {EPOCHS}"
    job = way.start(
        "grow", f"{training} --batch-size {BATCH} --lr {RATE} --set data.sample_log=true"
    )
    try:
        way.wait_for("grow", f"epoch 2/{EPOCHS}", job)
        way.stack.scale(3)
        way.wait_for("grow", "2 → 3 workers", job)
    finally:
        way.end("grow", job, began)


# ── the way ───────────────────────────────────────────────────────────────────────────────────


def test_a_group_that_grew_used_each_sample_once_an_epoch(way: Way) -> None:
    (name,) = re.findall(r"^run (\S+)", way.output["grow"], re.MULTILINE)
    (head,) = way.stack.containers("ray-head")
    done = way.stack.execute(head, "python", "-", name, text=SAMPLE_LOG)
    assert done.returncode == 0, done.stderr
    used = json.loads(done.stdout)
    (samples,) = {len(set(rows)) for rows in used.values()}
    counts = {epoch: set(Counter(rows).values()) for epoch, rows in used.items()}
    assert len(used) == EPOCHS
    assert samples > IMAGES / 2
    assert [epoch for epoch, times in counts.items() if times != {1}] == []
    (seconds,) = re.findall(r"2 → 3 workers in (\d+) s", way.output["grow"])
    print(f"{samples} samples in each of {EPOCHS} epochs: none lost, none twice")
    print(f"2 → 3 workers in {seconds} s")


def test_the_way_is_that_of_the_docs(way: Way) -> None:
    """Each command of the docs began one of the way, in their order."""
    page = (compose_stack.CHECKOUT / "docs" / "clusters.md").read_text()
    section = page[page.index("### Bring data in") : page.index("### Settings")]
    documented = re.findall(r"^tessera submit .*$", section, re.MULTILINE)
    documented = [re.sub(r"/cat/.*|--trials \d+", "", line).rstrip() for line in documented]
    gone = [command for command in way.commands if not command.startswith(tuple(documented))]
    assert gone == []
    assert len(documented) > 8
    for line, command in zip(documented, way.commands):
        assert command.startswith(line)


def test_one_run_has_each_point_once(way: Way) -> None:
    run_id = re.findall(r"/runs/([0-9a-f]{32})", way.page("grow"))[0]
    query = f"run_id={run_id}&metric_key=val/accuracy&max_results=1000"
    status, history = ask(way, f"/api/2.0/mlflow/metrics/get-history?{query}")
    assert status == 200, history
    steps = [int(point.get("step", 0)) for point in json.loads(history)["metrics"]]
    assert steps == list(range(1, EPOCHS + 1))


def test_the_promoted_version_was_rolled_back_and_predicts(way: Way) -> None:
    assert "version 2 of photos promoted" in way.output["promote again"]
    assert "is version 1" in way.output["rollback"]
    (answer,) = re.findall(r"^\{.*\}$", way.output["predict again"], re.MULTILINE)
    assert json.loads(answer)["version"] == 1
    assert json.loads(answer)["class"] in map(str, range(10))


# ── rights and limits ─────────────────────────────────────────────────────────────────────────


def status_of(way: Way, container: str) -> dict[str, str]:
    text = way.stack.execute(container, "cat", "/proc/1/status").stdout
    return dict(re.findall(r"^(\w+):\s*(.*)$", text, re.MULTILINE))


def test_no_container_can_write_or_gain_a_right(way: Way) -> None:
    for service, container in way.stack.running():
        status = status_of(way, container)
        allowed = 0b11001011 if service == "object-store" else 0  # the five of docker-compose.yml
        assert int(status["CapBnd"], 16) & ~allowed == 0, container
        assert int(status["CapEff"], 16) & ~allowed == 0, container
        assert status["NoNewPrivs"] == "1", container
        for path in ("/x", "/usr/x", "/etc/x"):
            denied = way.stack.execute(container, "touch", path)
            assert denied.returncode, f"{container} can write {path}"
        assert way.stack.execute(container, "touch", "/tmp/x").returncode == 0, container


def test_every_container_has_its_limits(way: Way) -> None:
    for service, container in way.stack.running():
        limits = inspect(container)["HostConfig"]
        assert limits["Memory"] > 0, container
        assert limits["NanoCpus"] > 0, container
        assert limits["ReadonlyRootfs"] is True
        if service == "ray-worker":
            assert limits["Memory"] == MEMORY_MIB * 2**20
            assert limits["NanoCpus"] == 10**9
        user = way.stack.execute(container, "id", "-u").stdout.strip()
        assert user != "0" or service == "object-store"
    for image in compose_stack.images():
        size = json.loads(run(compose_stack.engine(), "image", "inspect", image).stdout)[0]["Size"]
        print(f"{image}: {size / 1e9:.2f} GB")


# ── secrets ───────────────────────────────────────────────────────────────────────────────────


def found_in(way: Way, text: str) -> list[str]:
    """The names of the secrets that are in a text, also as a browser sends a login."""
    login = base64.b64encode(f"trainer:{way.stack.secrets['mlflow_trainer_password']}".encode())
    values = {**way.stack.secrets, "login": login.decode()}
    return sorted(name for name, value in values.items() if value in text)


def test_no_secret_is_in_a_log_a_setting_or_a_process_list(way: Way) -> None:
    for container in way.stack.containers():
        assert found_in(way, way.stack.log(container)) == [], container
        assert found_in(way, json.dumps(inspect(container))) == [], container
    for service, container in way.stack.running():
        listed = way.stack.execute(container, "sh", "-c", "cat /proc/[0-9]*/cmdline | tr '\\0' ' '")
        assert listed.stdout
        assert found_in(way, listed.stdout) == [], container
        if service.startswith("ray-"):
            searched = way.stack.execute(container, "sh", "-c", FIND_SECRETS)
            assert (searched.returncode, searched.stdout) == (0, ""), container
    assert found_in(way, run("ps", "ax", "-o", "args").stdout) == []
    for step, output in way.output.items():
        assert found_in(way, output) == [], step


def test_no_secret_is_in_an_image(way: Way) -> None:
    """In its history, its settings, and the folders that the project fills. The images may be older
    than the secrets of this test, so those of the checkout are looked for, too."""
    own = Path(compose_stack.CHECKOUT / "secrets")
    values = {*way.stack.secrets.values(), *(p.read_text() for p in own.glob("*"))}
    for image in compose_stack.images():
        shown = run(compose_stack.engine(), "image", "inspect", image).stdout
        shown += run(compose_stack.engine(), "history", "--no-trunc", image).stdout
        assert shown
        assert not [value for value in values if value in shown], image
        look = ["run", "--rm", "--interactive", "--network", "none", "--entrypoint", "grep", image]
        folders = ["/srv", "/home", "/root", "/tmp", "/etc", "/usr/local/bin"]
        done = run(
            compose_stack.engine(), *look, "-rlsF", "--file=-", *folders, text="\n".join(values)
        )
        assert (done.stdout, done.returncode in (1, 2)) == ("", True), image


def test_a_secret_would_be_found(way: Way) -> None:
    """Control: where the secrets are, each way to look finds them."""
    (head,) = way.stack.containers("ray-head")
    shown = way.stack.execute(head, "cat", "/run/secrets/ray_auth_token")
    assert found_in(way, shown.stdout) == ["ray_auth_token"]
    leak = "cp /run/secrets/ray_auth_token /tmp/ray/leak"
    assert way.stack.execute(head, "sh", "-c", leak).returncode == 0
    assert way.stack.execute(head, "sh", "-c", FIND_SECRETS).returncode == 3
    assert way.stack.execute(head, "rm", "-f", "/tmp/ray/leak").returncode == 0


def test_no_secret_is_in_the_list_of_jobs(way: Way) -> None:
    status, listed = get(f"{RAY}/api/jobs/", token=way.stack.secrets["ray_auth_token"])
    assert status == 200
    jobs = json.loads(listed)
    assert len(jobs) >= len(way.output)
    assert found_in(way, listed) == []
    assert {job["status"] for job in jobs} == {"SUCCEEDED"}


# ── ports ─────────────────────────────────────────────────────────────────────────────────────


def test_another_container_reaches_what_it_may(way: Way) -> None:
    stack = way.stack
    program = Path(port_scan.__file__).read_text()
    stores = [a for name in ("postgres", "object-store") for a in stack.addresses(name)]
    assert len(stores) == 2
    hosts = ["mlflow", "ray-head", "postgres", "object-store", *stores]
    found = json.loads(stack.run_beside(program, *hosts))
    print(f"from another container: {found}")
    assert found["mlflow"] == [5000]
    assert {6379, 8265} <= set(found["ray-head"])
    assert {host: ports for host, ports in found.items() if host in hosts[2:] and ports} == {}


def test_ray_and_mlflow_answer_nobody_without_a_login(way: Way) -> None:
    for token in ("", "0" * 64):
        assert get(f"{RAY}/api/jobs/", token=token)[0] in (401, 403)
        assert get(f"{RAY}/nodes?view=summary", token=token)[0] in (401, 403)
    for path in ("/", "/api/2.0/mlflow/experiments/search?max_results=1", "/graphql"):
        assert get(f"{MLFLOW}{path}")[0] == 401
    join = "import ray; ray.init('ray-head:6379', logging_level='ERROR'); print('joined')"
    program = f"import subprocess, sys\ndone = subprocess.run([sys.executable, '-c', {join!r}], "
    program += "capture_output=True, text=True, timeout=120)\nprint(done.returncode, done.stdout)"
    answer = way.stack.run_beside(program)
    assert "joined" not in answer
    assert not answer.startswith("0 ")


@pytest.mark.skipif(bool(neighbour.missing()), reason=neighbour.missing() or "-")
def test_another_machine_reaches_nothing(way: Way) -> None:
    """Nor the stores at their own addresses, which it sends to this machine."""
    stores = [a for name in ("postgres", "object-store") for a in way.stack.addresses(name)]
    with neighbour.neighbour() as enter:
        scan = [sys.executable, port_scan.__file__, neighbour.ADDRESS, *stores]
        found = json.loads(run(*enter, *scan).stdout)
    assert sorted(set(found.pop(neighbour.ADDRESS)) - way.listened_before) == []
    assert found == {store: [] for store in stores}


# ── MLflow's pages ────────────────────────────────────────────────────────────────────────────


def get(address: str, *, token: str = "", login: str = "") -> tuple[int, str]:
    request = urllib.request.Request(address)
    if token:
        request.add_header("Authorization", f"Bearer {token}")
    if login:
        request.add_header("Authorization", f"Basic {base64.b64encode(login.encode()).decode()}")
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(request, timeout=60) as response:
            return response.status, response.read().decode()
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.read().decode(errors="replace")


def ask(way: Way, path: str) -> tuple[int, str]:
    password = way.stack.secrets["mlflow_trainer_password"]
    return get(f"{MLFLOW}{path}", login=f"trainer:{password}")


@pytest.mark.chromium
@pytest.mark.skipif(browser.CHROMIUM is None, reason="chromium is not installed: make chromium")
def test_the_links_of_jobs_open_behind_the_login(way: Way) -> None:
    login = {"username": "trainer", "password": way.stack.secrets["mlflow_trainer_password"]}
    bodies: list[Any] = []
    with browser.launch() as chromium:
        with pytest.raises(Exception, match="ERR_INVALID_AUTH_CREDENTIALS"):
            chromium.new_page().goto(way.page("grow"))
        for step, facts in {
            "grow": ("Finished", "val/accuracy", "cnn"),
            "tune": ("Finished", "Child runs"),
        }.items():
            context = chromium.new_context(
                http_credentials=login, viewport={"width": 1280, "height": 900}
            )
            context.set_default_timeout(60_000)
            page = context.new_page()
            page.on("response", lambda response: bodies.append(response))
            page.add_init_script(browser.NO_ASSISTANT)
            page.goto(way.page(step))
            for fact in facts:
                page.get_by_text(fact, exact=False).first.wait_for()
            page.wait_for_timeout(2000)
            page.screenshot(path=way.folder / f"{step}.png")
            assert found_in(way, page.content()) == []
            texts = [body_of(response) for response in bodies]
            assert any("tessera.run" in text or "tessera.search" in text for text in texts)
            assert found_in(way, "\n".join(texts)) == []
            bodies.clear()
            context.close()
        print(f"screenshots in {way.folder}")


def body_of(response: Any) -> str:
    kind = response.headers.get("content-type", "")
    if response.status != 200 or not kind.startswith(("application/json", "text/html")):
        return ""
    return str(response.text())
