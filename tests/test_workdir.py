"""A run's folder: what counts as new, its lock, its name, and its metrics.csv."""

import errno
import fcntl
import shutil

import pytest
from runs import TINY, run

from support import vectors
from support.workdir import append_rows, keep_rows, open_workdir


@pytest.mark.parametrize("torn", ["", "5,0.", "5", "5,0.1,0.2\n6,0.1,0.2\n", "5,0.1,0.2\n6"])
def test_rows_past_the_checkpoint_are_dropped_even_if_they_are_torn(tmp_path, torn):
    four = [{"step": step, "loss": 0.5, "norm": 1.0} for step in range(1, 5)]
    append_rows(tmp_path, four)
    whole = (tmp_path / "metrics.csv").read_bytes()
    (tmp_path / "metrics.csv").write_bytes(whole + torn.encode())
    keep_rows(tmp_path, 4)
    assert (tmp_path / "metrics.csv").read_bytes() == whole
    keep_rows(tmp_path, 2)
    append_rows(tmp_path, four[2:])
    assert (tmp_path / "metrics.csv").read_bytes() == whole
    with pytest.warns(UserWarning, match="lacks rows of steps up to 7"):
        keep_rows(tmp_path, 7)
    keep_rows(tmp_path, 0)
    append_rows(tmp_path, four)
    assert (tmp_path / "metrics.csv").read_bytes() == whole


def test_rows_that_are_lost_are_missed_and_no_row_is_there_twice(tmp_path):
    rows = [{"step": step, "loss": 0.5, "norm": 1.0} for step in range(1, 9)]
    append_rows(tmp_path, rows)
    whole = (tmp_path / "metrics.csv").read_text().splitlines(keepends=True)
    damaged = [*whole[:2], "2,0.x,1.0\n", "3,0.5\n", *whole[5:7], "\0\n", *whole[6:]]
    (tmp_path / "metrics.csv").write_text("".join(damaged))
    with pytest.warns(UserWarning, match="lacks rows of steps up to 6"):
        keep_rows(tmp_path, 6)
    append_rows(tmp_path, rows[6:])
    assert (tmp_path / "metrics.csv").read_text().splitlines(keepends=True) == [*whole[:2], *whole[5:]]
    (tmp_path / "metrics.csv").write_bytes(b"\xff\n" + "".join(whole[1:]).encode())
    with pytest.warns(UserWarning, match="lacks rows of steps up to 6"):
        keep_rows(tmp_path, 6)
    append_rows(tmp_path, rows[6:])
    assert (tmp_path / "metrics.csv").read_text().splitlines(keepends=True) == [whole[0], *whole[7:]]


@pytest.mark.parametrize(
    "what", ["removed", *(pytest.param(left, marks=pytest.mark.slow) for left in ("empty", "without rows"))]
)
def test_a_finished_run_without_its_metrics_draws_what_it_can(trained, tmp_path, what):
    workdir = tmp_path / "run"
    shutil.copytree(trained, workdir)
    for name in ("training.png", "figure.png"):
        (workdir / name).unlink()
    header = (workdir / "metrics.csv").read_text().splitlines(keepends=True)[0]
    (workdir / "metrics.csv").write_text(header if what == "without rows" else "")
    if what == "removed":
        (workdir / "metrics.csv").unlink()
    said = run("mnist.py", *TINY, "--workdir", workdir)
    assert f"warning: {workdir / 'metrics.csv'} lacks rows of steps up to 8" in said
    assert "resuming" in said
    assert "wrote figure.png" in said
    assert "training.png" not in said
    assert (workdir / "figure.png").exists()
    assert not (workdir / "training.png").exists()


def test_without_locks_a_run_is_warned_once_and_goes_on(monkeypatch, tmp_path):
    def refuse(problem):
        monkeypatch.setattr(fcntl, "flock", lambda *_: (_ for _ in ()).throw(problem))

    config = vectors.Config(workdir=str(tmp_path / "run"))
    for problem in (OSError(errno.ENOSYS, "Function not implemented"), OSError(errno.ENOLCK, "No locks available")):
        refuse(problem)
        with pytest.warns(UserWarning, match="cannot be locked") as warned:
            assert open_workdir(config, ()) == tmp_path / "run"
        assert [str(warning.message) for warning in warned] == [
            f"{tmp_path / 'run'} cannot be locked ({problem.strerror}): start no second run in it"
        ]
    refuse(BlockingIOError(errno.EAGAIN, "Resource temporarily unavailable"))
    with pytest.raises(ValueError, match=r"no other process is at work, got .*/run"):
        open_workdir(config, ())


@pytest.mark.parametrize("name", [".DS_Store", ".ipynb_checkpoints", "lost+found", "Thumbs.db", "lock"])
def test_a_folder_that_only_a_system_has_written_in_is_new(tmp_path, name):
    (tmp_path / name).mkdir() if name == ".ipynb_checkpoints" else (tmp_path / name).touch()
    open_workdir(vectors.Config(workdir=str(tmp_path)), ())
    assert (tmp_path / "config.json").exists()
    assert (tmp_path / name).exists()
