import gc
import pickle
import random
import shutil
import sys
import tempfile
import threading
import warnings

import chex
import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
import pytest
from etils import epath
from test_training import compile_step, run, setup

import diffusion_jax as dj
from diffusion_jax import checkpoints as library
from diffusion_jax.checkpoints import open_checkpoints, restore_latest, save


@pytest.fixture
def state() -> dj.TrainState:
    return setup("mlp")[0]


def at(state, step) -> dj.TrainState:
    return state.replace(step=jnp.int32(step), params=jax.tree.map(lambda x: x + step, state.params))


def save_all(folder, state, losses) -> None:
    with open_checkpoints(folder) as checkpoints:
        for step, loss in enumerate(losses, start=1):
            save(checkpoints, at(state, step), loss)


def assert_same(one, other) -> None:
    for name in ("step", "params", "ema_params", "opt_state"):
        chex.assert_trees_all_equal(getattr(one, name), getattr(other, name))


def test_save_restore_continue_equals_never_stopping(tmp_path):
    state, step, x_0 = setup("mlp")
    step = compile_step(step, 1, donate_argnums=(0,))
    with open_checkpoints(tmp_path) as checkpoints:
        assert restore_latest(checkpoints, state) is state
        state, first = run(step, state, x_0, 3)
        save(checkpoints, state)
        save(checkpoints, state)  # the same step again: nothing to do
        state, rest = run(step, state, x_0, 4)  # goes on, and reuses the memory, while the save may still be under way
    with open_checkpoints(tmp_path) as checkpoints:
        restored = restore_latest(checkpoints, setup("mlp")[0])
    assert restored.step == 3
    resumed, again = run(step, restored, x_0, 4)
    assert rest == again != first
    assert_same(resumed, state)


def test_only_the_newest_checkpoints_are_kept(tmp_path, state):
    save_all(tmp_path, state, [None] * 4)
    with open_checkpoints(tmp_path) as checkpoints:
        assert list(checkpoints.all_steps()) == [3, 4]


def test_the_best_is_kept_as_well(tmp_path, state):
    save_all(tmp_path, state, [3.0, 1.0, 4.0, 1.5, 9.0, 2.0])
    with open_checkpoints(tmp_path) as checkpoints:
        assert list(checkpoints.all_steps()) == [2, 5, 6]
        assert checkpoints.best_step() == 2
        assert_same(library.restore(checkpoints, 2, state), at(state, 2))


def test_training_does_not_wait_for_a_save(tmp_path, state, monkeypatch):
    slow_disk = threading.Event()
    monkeypatch.setattr(
        library, "_write_checksums", lambda folder, write=library._write_checksums: slow_disk.wait(60) and write(folder)
    )
    with open_checkpoints(tmp_path) as checkpoints:
        save(checkpoints, at(state, 1))
        assert not (tmp_path / "1").exists()
        slow_disk.set()
    assert (tmp_path / "1" / "checksums.json").exists()


def test_a_save_that_fails_is_told(tmp_path, state, monkeypatch):
    def full(folder):
        raise OSError(28, "No space left on device")

    with open_checkpoints(tmp_path) as checkpoints:
        save(checkpoints, at(state, 1))
    monkeypatch.setattr(library, "_write_checksums", full)
    checkpoints = open_checkpoints(tmp_path)
    save(checkpoints, at(state, 2))
    with pytest.raises(OSError, match="No space left"):
        checkpoints.close()
    monkeypatch.undo()
    with open_checkpoints(tmp_path) as checkpoints:
        assert_same(restore_latest(checkpoints, state), at(state, 1))


@pytest.mark.parametrize("name", ["lr[1e-3]", "a*", "a\\b ?"])
def test_a_folder_of_any_name_keeps_what_was_saved(tmp_path, state, name):
    """Even beside folders that its name matches as a pattern, or could be taken for."""
    folders = [tmp_path / other / "checkpoints" for other in ("ab", "a/b c", name)]
    for number, folder in enumerate(folders):
        save_all(folder, at(state, 10 * number), [1.0, 2.0])
    shutil.copytree(folders[-1], tmp_path / "copy")
    for number, folder in (*enumerate(folders), (len(folders) - 1, tmp_path / "copy")):
        assert sorted(file.name for file in folder.iterdir()) == ["1", "2"]
        with open_checkpoints(folder) as checkpoints:
            assert_same(restore_latest(checkpoints, state), at(at(state, 10 * number), 2))


def test_a_folder_of_any_name_needs_a_place_for_a_link(tmp_path, state, monkeypatch):
    (tmp_path / "[tmp]").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "[tmp]"))
    open_checkpoints(tmp_path / "plain").close()
    with pytest.raises(ValueError, match=r"TMPDIR must not contain any of .*, got .*\[tmp\]"):
        open_checkpoints(tmp_path / "a*b")


def test_links_are_removed(tmp_path, state, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    save_all(tmp_path / "a*b", state, [1.0])
    gc.collect()
    assert [file.name for file in tmp_path.iterdir()] == ["a*b"]


@pytest.mark.parametrize("lost", ["values", "a value"])
def test_a_save_that_does_not_hold_the_state_is_not_taken_for_one(tmp_path, state, monkeypatch, lost):
    save_all(tmp_path, state, [1.0])
    if lost == "values":  # as Orbax did, with a warning, in a folder whose name it took for a pattern
        monkeypatch.setattr(type(epath.Path("/")), "glob", lambda *_: iter(()))
    else:
        changed = lambda arrays, args=ocp.args.StandardSave: args(jax.tree.map(lambda x: x * 0, arrays))  # noqa: E731
        monkeypatch.setattr(ocp.args, "StandardSave", changed)
    checkpoints = open_checkpoints(tmp_path)
    save(checkpoints, at(state, 2))
    with pytest.raises(OSError, match=r"2\.orbax-checkpoint-tmp( cannot be read back|: ema_params.* differs)"):
        checkpoints.close()
    monkeypatch.undo()
    with open_checkpoints(tmp_path) as checkpoints:
        assert list(checkpoints.all_steps()) == [1]
    assert not list(tmp_path.glob("*/checksums.json"))[1:]


def test_whatever_is_damaged_is_noticed_or_does_no_harm(tmp_path, state):
    save_all(tmp_path, state, [1.0, 2.0])
    files = sorted(file for file in (tmp_path / "2").rglob("*") if file.is_file())
    chance, noticed = random.Random(0), 0
    for file in files:
        whole = file.read_bytes()
        place = chance.randrange(len(whole)) if whole else 0
        damages = [whole[:place], None]
        damages += [whole[:place] + bytes([whole[place] ^ 1 << chance.randrange(8)]) + whole[place + 1 :]] if whole else []
        for damage in damages:
            file.unlink() if damage is None else file.write_bytes(damage)
            step = restored_step(tmp_path, state)
            noticed += step == 1
            assert step in (1, 2)
            file.parent.mkdir(exist_ok=True)
            file.write_bytes(whole)
    assert noticed > len(files)


def restored_step(folder, state) -> int:
    """The step that is used; its values are right, and if it is not the newest a warning says why."""
    with warnings.catch_warnings(record=True) as warned, open_checkpoints(folder) as checkpoints:
        warnings.simplefilter("always")
        restored = restore_latest(checkpoints, state)
    assert_same(restored, at(state, int(restored.step)))
    named = any(f"checkpoint 2 in {folder} cannot be used" in str(warning.message) for warning in warned)
    assert named == (restored.step == 1)
    return int(restored.step)


def test_another_dtype_is_named(tmp_path, state):
    save_all(tmp_path, state, [1.0])
    halved = state.replace(ema_params=jax.tree.map(lambda x: x.astype(jnp.bfloat16), state.ema_params))
    with open_checkpoints(tmp_path) as checkpoints:
        with pytest.raises(ValueError, match=r"ema_params.Dense_0.bias has the dtype float32, expected bfloat16"):
            restore_latest(checkpoints, halved)
        save(checkpoints, at(halved, 2))
    with open_checkpoints(tmp_path) as checkpoints:
        assert_same(restore_latest(checkpoints, halved), at(halved, 2))


def test_another_shape_is_named(tmp_path, state):
    save_all(tmp_path, state, [1.0])
    wider = dj.create_train_state(state.apply_fn, jax.tree.map(lambda x: jnp.zeros((*x.shape, 2)), state.params), state.tx)
    with open_checkpoints(tmp_path) as checkpoints:
        with pytest.raises(ValueError, match=r"checkpoint 1 in .*params.Dense_0.bias has the shape \(8,\), expected \(8, 2\)"):
            restore_latest(checkpoints, wider)
        fewer = state.replace(params={"Dense_0": state.params["Dense_0"]})
        with pytest.raises(ValueError, match=r"params.Dense_1.bias has the shape \(8,\), expected None"):
            restore_latest(checkpoints, fewer)


def test_a_loss_that_cannot_be_read_is_named_and_set_aside(tmp_path, state):
    save_all(tmp_path, state, [1.0, 2.0])
    (tmp_path / "1" / "metrics" / "metrics").write_text('{"loss"')
    with pytest.warns(UserWarning, match="1/metrics/metrics is damaged"):
        checkpoints = open_checkpoints(tmp_path)
    with checkpoints:
        assert checkpoints.best_step() == 2
        assert restore_latest(checkpoints, state).step == 2


def test_a_moment_without_memory_or_disk_is_not_taken_for_damage(tmp_path, state, monkeypatch):
    save_all(tmp_path, state, [1.0, 2.0])
    for problem in (OSError(5, "Input/output error"), MemoryError(), PermissionError(13, "Permission denied")):

        def fail(folder, problem=problem):
            raise problem

        monkeypatch.setattr(library, "_check_files", fail)
        with open_checkpoints(tmp_path) as checkpoints, pytest.raises(type(problem)):
            restore_latest(checkpoints, state)
    monkeypatch.undo()
    with open_checkpoints(tmp_path) as checkpoints:
        told = ValueError("NOT_FOUND: Failed to open: Too many open files [os_error_code='24']")
        monkeypatch.setattr(checkpoints, "restore", lambda *_, **__: (_ for _ in ()).throw(told))
        with pytest.raises(OSError, match="Too many open files"):
            restore_latest(checkpoints, state)


def test_nothing_in_a_checkpoint_is_executed(tmp_path, state):
    """Not even if somebody puts a pickle there, under the name of an array file and with its checksum."""
    save_all(tmp_path, state, [1.0, 2.0])
    for file in (tmp_path / "2" / "default").rglob("d/*"):
        file.write_bytes(pickle.dumps(print))
    temporary = (tmp_path / "2").rename(tmp_path / "2.orbax-checkpoint-tmp")
    library._write_checksums(temporary)
    temporary.rename(tmp_path / "2")
    seen = []
    watching = True
    sys.addaudithook(lambda event, _: seen.append(event) if watching and event == "pickle.find_class" else None)
    with open_checkpoints(tmp_path) as checkpoints, pytest.warns(UserWarning, match="cannot be used"):
        assert restore_latest(checkpoints, state).step == 1
    assert not seen
    pickle.loads(pickle.dumps(print))
    assert seen
    watching = False
