"""In a real WebUI: whatever ends a job or the server, the model is as it was, the job goes on, the next one trains."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest

from tests.webui.server import Refused, WebUI
from tests.webui.snippets import DIGEST, paced

STEPS = 25


@pytest.fixture(scope="module")
def server(launch) -> WebUI:
    return launch("--api", "--api-server-stop")


@pytest.fixture(scope="module")
def clean(server) -> dict:
    """Digest and picture of the untouched model, and an undisturbed job."""
    seen = {"picture": server.picture(), "digest": server.run(DIGEST)}
    job = server.until(server.submit(output_name="plain", max_train_steps=STEPS)["id"])
    assert job["state"] == "done", job["error"]
    return seen | {"losses": job["losses"], "lora": Path(job["output"][0])}


def as_before(server: WebUI, clean: dict) -> None:
    """The fixed-seed picture is the one before any training, and the next job trains."""
    assert server.picture() == clean["picture"]
    assert server.run(DIGEST) == clean["digest"]
    job = server.until(server.submit(output_name="next", max_train_steps=2)["id"])
    assert job["state"] == "done", job["error"]


def weights(path: Path) -> bytes:
    data = path.read_bytes()
    return data[8 + int.from_bytes(data[:8], "little") :]


def test_an_error_in_the_first_step(server, clean):
    server.run(paced(raise_at=1))
    job = server.until(server.submit(output_name="raised", max_train_steps=STEPS)["id"])
    server.run(paced())
    assert job["state"] == "failed"
    assert "raised by the test" in job["details"]
    as_before(server, clean)
    # It can even go on.
    server.ask(job["id"], "continue")
    job = server.until_state(job["id"], "done")
    assert job["losses"] == clean["losses"]
    as_before(server, clean)


def test_a_stop_and_going_on(server, clean):
    server.run(paced(seconds=0.05))
    job = server.submit(output_name="stopped", max_train_steps=STEPS)
    server.until(job["id"], step=3)
    server.ask(job["id"], "stop")
    job = server.until(job["id"])
    server.run(paced())
    assert job["state"] == "stopped"
    assert 3 <= job["step"] < STEPS
    as_before(server, clean)
    server.ask(job["id"], "continue")
    assert server.until_state(job["id"], "done")["losses"] == clean["losses"]
    as_before(server, clean)


def test_a_pause_with_three_generations(server, clean):
    server.run(paced(seconds=0.05))
    job = server.submit(output_name="paused", max_train_steps=STEPS)
    server.until(job["id"], step=10)
    server.ask(job["id"], "pause")
    job = server.until_state(job["id"], "paused")
    server.run(paced())
    # The plain picture at once, twice, and one with the LoRA as it is now.
    assert server.picture() == clean["picture"]
    name = Path(job["output"][-1]).stem
    server.run(
        "from lora_trainer.hosts.webui.extension import extension\n"
        f"result = extension().prompt(extension().jobs.job({job['id']!r}))"
    )
    assert server.picture(f"noto emoji of red apple <lora:{name}:1>") != clean["picture"]
    assert server.picture() == clean["picture"]
    server.ask(job["id"], "continue")
    job = server.until_state(job["id"], "done")
    assert job["losses"] == clean["losses"]
    assert weights(Path(job["output"][0])) == weights(clean["lora"])
    as_before(server, clean)


def interrupted(server: WebUI) -> None:
    server.process.send_signal(signal.SIGINT)


def restarted_by_api(server: WebUI) -> None:
    server.post("/sdapi/v1/server-kill")


def killed(server: WebUI) -> None:
    server.process.kill()


@pytest.mark.parametrize("end", [interrupted, restarted_by_api, killed])
def test_the_end_of_the_server(server, clean, end):
    server.run(paced(seconds=0.1))
    job = server.submit(output_name=end.__name__, max_train_steps=STEPS, checkpoint_every=5)
    waiting = server.submit(output_name=f"after-{end.__name__}", max_train_steps=2)
    server.until(job["id"], step=12)
    try:
        end(server)
    except (OSError, Refused) as gone:
        print(gone)
    server.ended()
    server.start()
    seen = server.job(job["id"])
    assert (seen["state"], server.job(waiting["id"])["state"]) == ("paused", "queued")
    assert seen["step"] >= 10
    assert server.picture() == clean["picture"]
    server.ask(job["id"], "continue")
    job = server.until_state(job["id"], "done")
    assert any("goes on from step 1" in line for line in job["log"])
    assert job["losses"] == clean["losses"]
    assert weights(Path(job["output"][0])) == weights(clean["lora"])
    server.until_state(waiting["id"], "done")
    as_before(server, clean)
