"""Runs that are killed, stopped, starved of disk, damaged, or shared among devices and processes."""

import asyncio
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import time
import types
from pathlib import Path

import chex
import numpy as np
import pytest
import tensorstore
from runs import EXPERIMENTS, TINY, assert_same_run, final_state, finish, kill_and_repeat, run, start, wait_for

from support.loop import keep_failed_saves_quiet, stop_requests

LONG = [*TINY, "--iterations", "400", "--checkpoint-every", "5", "--sample-every", "0"]


def test_killed_and_repeated_is_never_killed(trained, tmp_path):
    kill_and_repeat(tmp_path / "killed", *TINY)
    assert_same_run(tmp_path / "killed", trained)


@pytest.mark.slow
def test_the_published_network_goes_on_and_is_shared_by_devices_as_the_small_one(tmp_path):
    unet = [*TINY, "--network", "unet", "--dim-scales", "1", "2"]
    run("mnist.py", *unet, "--workdir", tmp_path / "whole")
    kill_and_repeat(tmp_path / "killed", *unet)
    assert_same_run(tmp_path / "killed", tmp_path / "whole")
    run("mnist.py", *unet, "--workdir", tmp_path / "shared", devices=4)
    assert_close(tmp_path / "shared", tmp_path / "whole")


def finish_killed(process: subprocess.Popen) -> None:
    process.kill()
    finish(process, status=-signal.SIGKILL)


@pytest.mark.slow
def test_killed_at_twenty_random_moments_is_never_killed(tmp_path):
    """In a step, in a save, between two files: whenever it comes, the same command ends with the same bits."""
    run("mnist.py", *LONG, "--workdir", tmp_path / "whole")
    workdir, moments = tmp_path / "killed", random.Random(0)
    for number in range(20):
        process, before = start("mnist.py", *LONG, "--workdir", workdir), newest(workdir)
        fewest = [10**9]

        def trains(fewest=fewest):
            """There are more rows than were left after those past the checkpoint had been dropped."""
            fewest[0] = min(fewest[0], rows(workdir))
            return rows(workdir) > fewest[0]

        def saves(before=before):
            return newest(workdir) > before

        wait_for(process, saves if number % 2 else trains)  # so that however slow saves are, the run comes on
        time.sleep(moments.uniform(0, 0.5))
        finish_killed(process)
    assert 20 < rows(workdir) < 400
    run("mnist.py", *LONG, "--workdir", workdir)
    assert_same_run(workdir, tmp_path / "whole")
    assert not list(workdir.glob("checkpoints/*.*"))


def newest(workdir: Path) -> int:
    return max((int(folder.name) for folder in workdir.glob("checkpoints/*") if folder.name.isdigit()), default=0)


def rows(workdir: Path) -> int:
    file = workdir / "metrics.csv"
    return len(file.read_bytes().splitlines()) if file.exists() else 0


@pytest.mark.slow
@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_stopped_by_a_signal_it_saves_and_says_how_to_go_on(trained, tmp_path, number, status):
    workdir = tmp_path / "stopped"
    process = start("mnist.py", *TINY, "--workdir", workdir)
    wait_for(process, lambda: list(workdir.glob("checkpoints/2")))
    process.send_signal(number)
    said = finish(process, status)
    step = max(int(folder.name) for folder in workdir.glob("checkpoints/*"))
    assert f"{number.name}: saved {workdir} at step {step} of 8" in said
    assert "Traceback" not in said
    run("mnist.py", *TINY, "--workdir", workdir)
    assert_same_run(workdir, trained)


def test_the_second_signal_does_what_it_always_did():
    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    with stop_requests() as requests:
        signal.raise_signal(signal.SIGTERM)
        assert requests == [signal.SIGTERM]
        assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == before


@pytest.mark.slow
def test_a_loss_that_is_not_finite_stops_the_run_before_it_is_saved(tmp_path):
    args = ["--workdir", tmp_path / "run", "--learning-rate", "1e30", "--checkpoint-every", "1", "--sample-every", "0"]
    said = run("mnist.py", *TINY, *args, "--seed", "3", status=1)
    step = len((tmp_path / "run" / "metrics.csv").read_text().splitlines()) - 1
    assert f"error: step {step} of seed 3 is not finite (grad_norm" in said
    assert "Traceback" not in said
    assert final_state(tmp_path / "run").step == step - 1
    chex.assert_tree_all_finite(final_state(tmp_path / "run").params)


def test_a_damaged_checkpoint_is_named_and_the_one_before_is_used(trained, tmp_path):
    workdir = tmp_path / "run"
    shutil.copytree(trained, workdir)
    largest = max((file for file in (workdir / "checkpoints" / "8").rglob("*") if file.is_file()), key=os.path.getsize)
    flip_a_bit(largest, largest.stat().st_size // 2)
    said = run("mnist.py", *TINY, "--workdir", workdir)
    assert f"warning: checkpoint 8 in {workdir / 'checkpoints'} cannot be used: {name_in_step(largest)} is damaged" in said
    assert "at step 6 of 8" in said
    assert_same_run(workdir, trained)
    assert [folder.name.rsplit(".", 1)[0] for folder in workdir.glob("checkpoints/*.*")] == ["8.damaged"]


def flip_a_bit(file: Path, place: int) -> None:
    content = bytearray(file.read_bytes())
    content[place] ^= 1
    file.write_bytes(content)


def name_in_step(file: Path) -> str:
    return str(file).split("/checkpoints/8/")[1]


def test_with_no_whole_checkpoint_nothing_is_touched(trained, tmp_path):
    workdir = tmp_path / "run"
    shutil.copytree(trained, workdir)
    kept = sorted(os.listdir(workdir / "checkpoints"), key=int)
    for step in kept:
        (workdir / "checkpoints" / step / "checksums.json").unlink()
    before = (workdir / "metrics.csv").read_text()
    said = run("mnist.py", *TINY, "--workdir", workdir, status=2)
    assert f"error: checkpoint {kept[0]} in {workdir / 'checkpoints'} cannot be used" in said
    assert "Traceback" not in said
    assert sorted(os.listdir(workdir / "checkpoints"), key=int) == kept
    assert (workdir / "metrics.csv").read_text() == before


def test_a_write_that_ends_after_its_save_has_failed_says_nothing(monkeypatch):
    said = []
    monkeypatch.setattr(sys, "unraisablehook", said.append)
    end_a_write_late()
    assert str(said.pop().exc_value) == "Event loop is closed"
    keep_failed_saves_quiet()
    end_a_write_late()
    assert not said
    others = [
        types.SimpleNamespace(exc_value=RuntimeError("anything else"), object=None),
        types.SimpleNamespace(exc_value=OSError("Event loop is closed"), object=None),
        types.SimpleNamespace(exc_value=RuntimeError("Event loop is closed"), object=end_a_write_late),
    ]
    for other in others:
        sys.unraisablehook(other)
    assert said == others


def test_a_failed_write_of_orbaxs_metadata_is_raised_and_not_logged(caplog, tmp_path):
    from orbax.checkpoint._src.metadata.checkpoint import metadata_store  # private, so another Orbax may lack it

    keep_failed_saves_quiet()
    store = metadata_store(enable_write=True, blocking_write=False)
    store.write(tmp_path / "metadata", object())  # which JSON cannot hold
    with pytest.raises(TypeError):
        store.wait_until_finished()
    assert not caplog.records


def test_what_orbax_and_tfds_log_is_silent_only_where_it_is_told_otherwise(tmp_path):
    """A save that fails says so in one line; whatever else is logged, perhaps for the first time, is shown."""
    code = """
import mixture
from absl import logging
from diffusion_jax import checkpoints
from support import data

def full(folder):
    logging.warning("New in a save")
    raise OSError(28, "No space left on device")

checkpoints._write_checksums = full
try:
    data.load_dataset("mnist", "no/such/folder")
except data.DataUnavailable:
    logging.warning("OpenCV is not installed.")
    logging.warning("New in a data set")
mixture.main()
"""
    script = tmp_path / "script.py"
    script.write_text(code)
    paths = {"PYTHONPATH": f"{EXPERIMENTS}:{EXPERIMENTS.parent}", "http_proxy": "", "TQDM_DISABLE": "1"}
    args = ["--workdir", tmp_path / "run", "--iterations", "4", "--checkpoint-every", "2"]
    said = finish(start(script, *args, **paths), status=1)
    lines = [line for line in said.splitlines() if line]
    assert lines[:2] == ["WARNING:absl:New in a data set", "WARNING:absl:New in a save"]
    assert lines[2].startswith(f"error: {tmp_path / 'run'} cannot be written (No space left on device)")
    assert not lines[3:]


def end_a_write_late() -> None:
    promise, future = tensorstore.Promise.new()

    async def wait():
        await future

    async def give_up():
        task = asyncio.ensure_future(wait())
        await asyncio.sleep(0)
        task._log_destroy_pending = False

    loop = asyncio.new_event_loop()
    loop.run_until_complete(give_up())
    loop.close()
    promise.set_result(None)
    time.sleep(0.1)


@pytest.mark.slow
def test_a_full_disk_stops_the_run_and_leaves_its_last_checkpoint(tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    args = [*LONG, "--iterations", "60"]
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=300k", "tmpfs", disk], capture_output=True).returncode:
        pytest.skip("a small disk needs the right to mount one")
    try:
        said = run("mnist.py", *args, "--workdir", disk / "run", status=1)
        assert f"error: {disk / 'run'} cannot be written (No space left on device" in said
        assert "Traceback" not in said
        kept = final_state(disk / "run")
        assert kept.step > 0
        subprocess.run(["mount", "-o", "remount,size=100m", disk], check=True)
        assert f"at step {kept.step} of 60" in run("mnist.py", *args, "--workdir", disk / "run")
        run("mnist.py", *args, "--workdir", tmp_path / "whole")
        assert_same_run(disk / "run", tmp_path / "whole")
    finally:
        subprocess.run(["umount", disk], check=True)


@pytest.mark.slow
def test_a_second_run_in_the_same_folder_is_refused(tmp_path):
    first = start("mnist.py", *LONG, "--workdir", tmp_path / "run")
    wait_for(first, lambda: (tmp_path / "run" / "lock").exists())
    said = run("mnist.py", *LONG, "--workdir", tmp_path / "run", status=2)
    assert "error: --workdir must be a folder in which no other process is at work" in said
    assert first.poll() is None
    finish_killed(first)


@pytest.mark.slow
def test_any_number_of_devices_trains_the_same_and_goes_on_from_any_other(trained, tmp_path):
    for devices in (2, 4, 8):
        workdir = tmp_path / str(devices)
        run("mnist.py", *TINY, "--workdir", workdir, devices=devices)
        assert_close(workdir, trained)
    stopped = tmp_path / "stopped"
    for devices in (8, 1):
        process = start("mnist.py", *TINY, "--checkpoint-every", "1", "--workdir", stopped, devices=devices)
        wait_for(process, lambda: list(stopped.glob("checkpoints/[1-9]")))
        process.terminate()
        finish(process, None)
    run("mnist.py", *TINY, "--checkpoint-every", "1", "--workdir", stopped, devices=4)
    assert_close(stopped, trained)


def assert_close(workdir: Path, other: Path) -> None:
    one, many = final_state(other), final_state(workdir)
    assert one.step == many.step == 8
    for tree in ("params", "ema_params"):
        chex.assert_trees_all_close(getattr(one, tree), getattr(many, tree), atol=1e-5, rtol=0)
    rows = [np.loadtxt(folder / "metrics.csv", delimiter=",", skiprows=1) for folder in (workdir, other)]
    np.testing.assert_allclose(*rows, rtol=1e-4)


def start_two(*args: object, devices: tuple[int, int] = (2, 2), seeds: tuple[int, int] = (0, 0)) -> list[subprocess.Popen]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    common = {"JAX_COORDINATOR_ADDRESS": address, "JAX_NUM_PROCESSES": "2"}
    args = [*args, "--distributed", "--seed"]
    return [
        start("mnist.py", *args, seeds[number], devices=devices[number], JAX_PROCESS_ID=str(number), **common)
        for number in (0, 1)
    ]


@pytest.mark.slow
@pytest.mark.parametrize("devices", [(1, 1), (2, 2), (1, 3), (3, 1)])
def test_two_processes_train_what_one_does(trained, tmp_path, devices):
    first, second = (finish(process) for process in start_two(*TINY, "--workdir", tmp_path / "two", devices=devices))
    assert_close(tmp_path / "two", trained)
    assert f"small preset on {sum(devices)} x cpu" in first
    assert "wrote" in first
    assert "preset" not in second
    assert "wrote" not in second


@pytest.mark.slow
def test_a_killed_process_stops_the_other_and_a_restart_of_both_is_exact(tmp_path):
    args = [*LONG, "--iterations", "40"]
    for process in start_two(*args, "--workdir", tmp_path / "whole"):
        finish(process)
    workdir = tmp_path / "killed"
    for victim, step in ((1, 10), (0, 25)):
        processes = start_two(*args, "--workdir", workdir)
        wait_for(processes[0], lambda step=step: (workdir / "checkpoints" / str(step)).exists())
        finish_killed(processes[victim])
        said = finish(processes[1 - victim], None, timeout=90)
        assert processes[1 - victim].returncode not in (0, None)
        assert "another task died" in said or "gloo::EnforceNotMet" in said  # whichever of the two libraries notices first
    for process in start_two(*args, "--workdir", workdir):
        finish(process)
    assert_same_run(workdir, tmp_path / "whole")


@pytest.mark.slow
def test_a_signal_to_one_process_stops_and_saves_them_all(tmp_path):
    processes = start_two(*LONG, "--workdir", tmp_path / "run")
    wait_for(processes[0], lambda: list(tmp_path.glob("run/checkpoints/5")))
    processes[1].terminate()
    first, second = (finish(process, 143) for process in processes)
    assert f"SIGTERM: saved {tmp_path / 'run'} at step {final_state(tmp_path / 'run').step} of 400" in first
    assert "saved" not in second


@pytest.mark.slow
def test_what_one_process_is_refused_stops_them_all(trained, tmp_path):
    for process in start_two(*TINY, "--workdir", tmp_path / "run", seeds=(0, 1)):
        assert "error: all processes of a run must have the same options and data" in finish(process, 2)
    assert not (tmp_path / "run").exists()
    first, second = (finish(process, None, timeout=60) for process in start_two(*LONG, "--workdir", trained))
    assert "error: " in first
    assert "holds a run with --iterations 8, and this command has 400" in first
    assert "error: another process of this run failed; see its error" in second
    assert "another task died" not in first + second
