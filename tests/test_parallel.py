"""Several devices and processes train as one does; a lost process, a signal and a resumed run; reading ahead."""

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from contextlib import closing
from pathlib import Path

import anndata
import jax
import numpy as np
import pytest
from scipy import sparse
from trained_together import toy_run

from diffbio.errors import ConfigError
from diffbio.parallel import OneDevice, in_order, layout_of

HERE = Path(__file__).parent


def child(folder, *arguments, **environment):
    """Starts trained_together.py."""
    return subprocess.Popen(
        [sys.executable, "-u", str(HERE / "trained_together.py"), str(folder), *map(str, arguments)],
        env={**os.environ, "PYTHONPATH": str(HERE), **environment}, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def test_two_devices_train_as_one_does(tmp_path):
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=2"
    process = child(tmp_path, XLA_FLAGS=flags)
    _, said = process.communicate(timeout=300)
    assert process.returncode == 0, said
    found = json.loads((tmp_path / "devices.json").read_text())
    assert found.pop("devices") == 2
    for case, (curve, statistics) in found.items():
        assert curve < 1e-4, case
        assert statistics < 1e-2, case  # of the whole batch: half a batch has others by far
    assert "batch_size 35 is no multiple of the 2 devices" in said


def two_processes(folder, **environment):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        coordinator = f"127.0.0.1:{free.getsockname()[1]}"
    return [child(folder, i, coordinator, **environment) for i in range(2)]


def until(process, text):
    """Reads what a process says until `text` comes."""
    for line in process.stderr:
        if text in line:
            return
    raise AssertionError(text)


def test_two_processes_train_as_one_does_through_signal_kill_and_resume(tmp_path):
    rng = np.random.default_rng(0)
    counts = (rng.poisson(2, (200, 2)) @ rng.poisson(1.5, (2, 6))).astype(np.float32)
    anndata.AnnData(sparse.csr_matrix(counts)).write_h5ad(tmp_path / "cells.h5ad")
    model, history = toy_run(tmp_path / "cells.h5ad", tmp_path / "alone", progress=False)
    assert history.stopped_early

    # a signal to the second process stops both after the same step
    first, second = two_processes(tmp_path, SLOWLY="1")
    until(first, "epoch 2/")
    second.send_signal(signal.SIGTERM)
    for process in (first, second):
        _, said = process.communicate(timeout=60)
        assert process.returncode == 143, said
        assert "TrainingInterrupted: fit: stopped by SIGTERM; a checkpoint is saved" in said

    # a killed process ends the other, which says why
    first, second = two_processes(tmp_path, SLOWLY="1")
    until(first, "epoch 6/")
    second.kill()
    begun = time.monotonic()
    _, said = first.communicate(timeout=60)
    assert time.monotonic() - begun < 20
    assert first.returncode == 1, said
    assert "ProcessLostError: fit: another process of this run has ended or cannot be reached" in said
    second.communicate()

    # and the run goes on to where one process comes
    processes = two_processes(tmp_path)
    for process in processes:
        _, said = process.communicate(timeout=60)
        assert process.returncode == 0, said
    ours = [json.loads((tmp_path / f"{i}.json").read_text()) for i in range(2)]
    assert ours[0] == ours[1]
    assert "different settings: start all of them by the same program" in ours[0]["refused"]
    assert ours[0]["stopped_early"]
    np.testing.assert_allclose(ours[0]["loss"], history["loss"], rtol=1e-5)
    np.testing.assert_allclose(ours[0]["validation"], history["validation_loss"], rtol=1e-5)
    np.testing.assert_allclose(ours[0]["weights"], np.asarray(model.weights[...]), atol=1e-5)


def test_one_device_unless_asked_for_more():
    assert type(layout_of(None, 128)) is type(layout_of(1, 128)) is type(layout_of(jax.devices()[:1], 128)) is OneDevice


@pytest.mark.parametrize("devices", [0, -2, True, 1000])
def test_devices_that_are_not_there_are_named(devices):
    with pytest.raises(ConfigError, match=r"devices must be 1 to \d+ \(what JAX has here\), -1 for all"):
        layout_of(devices, 128)


@pytest.mark.parametrize("ahead", [False, True])
def test_batches_come_in_order(ahead):
    rows = [np.arange(i, i + 3) for i in range(20)]
    with closing(in_order(lambda r: r.sum(), rows, ahead=ahead)) as batches:
        assert list(batches) == [r.sum() for r in rows]


def test_reading_ahead_stops_when_nobody_wants_more_and_hands_errors_on():
    asked = []
    with closing(in_order(asked.append, range(1000), ahead=True)) as batches:
        next(batches)
    assert len(asked) < 20
    assert not [t for t in threading.enumerate() if t.name == "diffbio-reader"]

    def broken(number):
        if number == 3:
            msg = "the disk is gone"
            raise OSError(msg)
        return number

    taken = in_order(broken, range(9), ahead=True)
    assert [next(taken) for _ in range(3)] == [0, 1, 2]
    with pytest.raises(OSError, match="the disk is gone"):
        next(taken)
