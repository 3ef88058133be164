"""A launcher on Ray reports that the cluster's head is lost before Ray ends it, and says how to complete the run."""

import os
import signal
import socket
import threading
from types import SimpleNamespace
from unittest.mock import patch

import pytest
from waiting import eventually

pytest.importorskip("ray")

from distattn.launch.ray import attempts, head
from distattn.launch.ray.run import stopping
from distattn.launch.stop_signals import CommandStopped, stop_on_signals


def test_a_lost_head_is_reported_once_with_how_to_complete_the_run():
    sentences, answers = [], []
    with (
        socket.create_server(("127.0.0.1", 0)) as server,
        patch.object(head, "_LOOK_SECONDS", 0.01),
        patch.object(head, "print_message", sentences.append),
    ):
        address = f"127.0.0.1:{server.getsockname()[1]}"
        real = head._answers
        context = SimpleNamespace(gcs_address=address)
        with (
            patch.object(head, "_answers", lambda at: answers.append(real(at)) or answers[-1]),
            patch.object(head.ray, "get_runtime_context", lambda: context),
            head.watch_head("runs/far"),
        ):
            eventually(lambda: len(answers) > head._LOOKS, "the head is not looked at")
            assert all(answers) and not sentences
            server.close()
            eventually(lambda: answers.count(False) > 2 * head._LOOKS, "the head is not missed")
    assert len(sentences) == 1 and sentences[0].startswith(
        f"the head of the Ray cluster at {address} does not answer any more."
    )
    assert "python -m distattn.launch.ray.attempts runs/far ends them, continues the run and reports" in sentences[0]
    eventually(
        lambda: not [thread for thread in threading.enumerate() if thread.name == "distattn-ray-head"], "it looks on"
    )


def test_a_second_ctrl_c_has_its_sentence():
    asked = []
    stopped = pytest.raises(CommandStopped, match="stopped by SIGINT")
    with stop_on_signals(), stopping(asked.append), stopped:
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)
    assert asked == [signal.SIGINT]


def test_a_run_continues_at_another_address(tmp_path):
    went_on = []
    config = tmp_path / "config.toml"
    config.write_text('[data]\npath = "x"\n[ray]\naddress = "old:1"\n')
    with (
        patch.object(attempts, "connected", lambda configs, quiet: patch.dict(os.environ)),
        patch.object(attempts, "run_attempts", lambda run, config: went_on.append(config.ray.address) or 0),
    ):
        assert attempts.main([str(tmp_path)]) == 0
        assert attempts.main([str(tmp_path), "--ray.address=new:2"]) == 0
    assert went_on == ["old:1", "new:2"]
