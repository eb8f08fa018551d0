"""The page of demo.py: what it computes and refuses, and a browser that uses all of it.

The browser's test needs pip install "gradio>=6" selenium, and Debian's packages chromium and chromium-driver.
"""

import contextlib
import dataclasses
import os
import re
import shutil
import socket
import urllib.request
from pathlib import Path

import jax
import numpy as np
import pytest
from browser import Browser, Picture
from runs import EXPERIMENTS, finish, start, wait_for

from demo import shown
from support import live, model
from support.config import Config
from support.saved_run import Sampling, SavedRun, sampler_table

TINY_RUN = Config(network="dit", embed_dim=4, depth=1, patch_size=8, num_timesteps=12)
KINDS = {
    "unconditional": TINY_RUN,
    "conditional": dataclasses.replace(TINY_RUN, conditional=True),
    "learned variance": dataclasses.replace(TINY_RUN, sigma_type="learned", target_type="pred_v", loss_type="hybrid"),
    "mean flow": dataclasses.replace(
        TINY_RUN, noise_schedule_type="flow", target_type="pred_u", loss_type="mean_flow", conditional=True
    ),
}
DRAWING = np.full((280, 280), 255, np.uint8)
DRAWING[60:200, 60:90] = 0


@pytest.fixture(scope="module")
def pages():
    """page(kind) -> a run that was not trained, with parameters that show every input, these, and its walk."""

    def page(kind: str):
        if kind not in made:
            run = SavedRun("", KINDS[kind], model.make_schedule(KINDS[kind]))
            params = model.initial_state(run.config, jax.random.key(0)).params
            leaves, tree = jax.tree.flatten(params)
            keys = jax.random.split(jax.random.key(1), len(leaves))
            noisy = [x + 0.3 * jax.random.normal(key, x.shape, x.dtype) for x, key in zip(leaves, keys, strict=True)]
            params = jax.tree.unflatten(tree, noisy)
            made[kind] = run, params, live.make_walk(run, params)
        return made[kind]

    made = {}
    return page


def last(frames: live.Frames) -> np.ndarray:
    frames = list(frames)
    assert [(number, steps) for number, steps, _ in frames] == [(i + 1, len(frames)) for i in range(len(frames))]
    return frames[-1][2]


OPTIONS = [
    ("unconditional", "unipc", [], 1),
    ("unconditional", "ancestral", [], 1),
    ("conditional", "heun", [3, 7, 1], 1),
    ("conditional", "dpm_solver_3m", [], 2.5),
    pytest.param("learned variance", "ancestral", [], 1, marks=pytest.mark.slow),
    pytest.param("mean flow", "ddim", [], 1, marks=pytest.mark.slow),
    ("mean flow", "consistency", [4], 2.5),
]


@pytest.mark.parametrize(("kind", "sampler", "labels", "guidance"), OPTIONS)
def test_the_page_draws_what_sample_py_draws(pages, kind, sampler, labels, guidance):
    run, params, walk = pages(kind)
    drawn = last(live.draw_digits(run, walk, labels, sampler, 5, guidance, 6))
    asked = np.resize(sorted(labels), 20) if labels else model.labels_in_turn(run.config, 20)
    table = sampler_table(Sampling(sampler=sampler, sampling_timesteps=5), run)
    expected = run.draw(params, table, jax.random.key(6, impl="threefry2x32"), asked, guidance)
    np.testing.assert_allclose(np.clip(drawn, -1, 1), expected, atol=2e-4)
    assert np.ptp(drawn, axis=0).max() > 0.1


@pytest.mark.parametrize("kind", ["conditional", "mean flow"])
@pytest.mark.parametrize("part", live.PARTS)
def test_a_drawing_is_completed_in_four_ways_that_keep_what_is_given(pages, kind, part):
    run, _, walk = pages(kind)
    shown, *ways = last(live.complete(run, walk, DRAWING, part, 0))
    ink = np.zeros((32, 32), bool)
    ink[8:22, 8:11] = True
    given = {"left half": np.arange(32)[None] < 16, "upper half": np.arange(32)[:, None] < 16, "only the ink": ink}[part]
    given = np.broadcast_to(given, (32, 32))
    assert len(ways) == 4
    for image in (shown, *ways):
        np.testing.assert_array_equal(image[given, 0], np.where(ink, 1, -1)[given])
    assert (shown[~given] == -0.5).all()
    assert min(np.abs(a - b).max() for i, a in enumerate(ways) for b in ways[:i]) > 0.1


@pytest.mark.parametrize("kind", ["unconditional", "conditional", "mean flow"])
def test_the_way_between_two_digits_begins_and_ends_with_them(pages, kind):
    run, _, walk = pages(kind)
    way = last(live.go_between(run, walk, 3, 1, 8, 2))
    assert len(way) == 9
    calls = run.default_calls(run.default_sampler)
    for image, label, seed in ((way[0], 3, 1), (way[-1], 8, 2)):
        drawn = last(live.draw_digits(run, walk, [label], run.default_sampler, calls, 1, seed))[0]
        np.testing.assert_allclose(image, drawn, atol=2e-4)
    steps = np.abs(np.diff(way, axis=0)).mean((1, 2, 3))
    assert steps.min() > 0
    assert steps.max() < np.abs(way[0] - way[-1]).mean()


GOOD = {"labels": [], "sampler": "unipc", "calls": 5, "guidance": 1, "seed": 0}
BAD = {
    "calls 0": "--sampling-timesteps must be between 1 and num_timesteps = 12, got 0",
    "calls 13": "--sampling-timesteps must be between 1 and num_timesteps = 12, got 13",
    "calls None": "--sampling-timesteps must be a number, got nothing",
    "guidance -1": "--guidance-scale must be at least 0 and finite, got -1",
    "guidance None": "--guidance-scale must be a number, got nothing",
    "seed -1": "--seed must be between 0 and 2^31 - 1, got -1",
    "seed None": "--seed must be a number, got nothing",
}


@pytest.mark.parametrize("what", BAD)
def test_a_bad_number_is_named_before_anything_is_computed(pages, what):
    run, _, walk = pages("conditional")
    name, value = what.split()
    bad = {name: None if value == "None" else int(value)}
    with pytest.raises(ValueError, match=f"^{re.escape(BAD[what])}$"):
        live.draw_digits(run, walk, **(GOOD | bad))


def test_what_a_run_cannot_do_is_named(pages):
    run, _, walk = pages("unconditional")
    with pytest.raises(ValueError, match="--guidance-scale must be 1 unless the run is --conditional, got 2"):
        live.draw_digits(run, walk, **(GOOD | {"guidance": 2}))
    run, _, walk = pages("mean flow")
    with pytest.raises(ValueError, match="--sampler must be ddim or consistency for a distilled or mean_flow run, got unipc"):
        live.draw_digits(run, walk, **GOOD)


def test_a_run_on_other_images_is_refused():
    config = dataclasses.replace(TINY_RUN, image_size=64)
    with pytest.raises(ValueError, match=r"^--workdir must be a run on grey images of 32x32, got runs/x$"):
        live.make_walk(SavedRun("runs/x", config, model.make_schedule(config)), {})


@pytest.mark.parametrize("drawing", [None, np.full((280, 280), 255, np.uint8), DRAWING[:, ::-1]])
def test_a_drawing_without_ink_in_what_is_given_is_refused(pages, drawing):
    run, _, walk = pages("conditional")
    with pytest.raises(ValueError, match=r"--drawing must be a part of a digit \(given: left half\), got no ink there"):
        live.complete(run, walk, drawing, "left half", 0)


@pytest.mark.parametrize("seeds", [(-1, 0), (0, -1)])
def test_both_seeds_of_a_way_are_checked(pages, seeds):
    run, _, walk = pages("conditional")
    with pytest.raises(ValueError, match="--seed must be between 0 and"):
        live.go_between(run, walk, 3, seeds[0], 8, seeds[1])


def test_fast_steps_are_not_all_shown_but_the_last_is():
    frames = [(i + 1, 500, np.zeros((4, 32, 32, 1))) for i in range(500)]
    pictures = list(shown(iter(frames), 2))
    assert 2 <= len(pictures) < 100
    assert "step 1 of 500" in pictures[0]
    assert "step 500 of 500" in pictures[-1]
    assert all(picture.startswith('<img src="data:image/png;base64,') for picture in pictures)


@pytest.fixture(scope="module")
def address():
    """Of the page of the network that comes with the project, which a process serves."""
    pytest.importorskip("gradio")
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    options = ["--workdir", EXPERIMENTS / "mnist.safetensors", "--no-open-browser", "--port", port]
    process, address = start("demo.py", *options, XLA_FLAGS=""), f"http://127.0.0.1:{port}/"

    def answers() -> bool:
        with contextlib.suppress(OSError):
            return urllib.request.urlopen(address).status == 200
        return False

    wait_for(process, answers)
    yield address
    process.kill()
    assert "Traceback" not in finish(process, None)


@pytest.fixture
def browser(address, tmp_path):
    """A headless Chromium on the page. Its screenshots stay in the folder PICTURES, if that variable is set."""
    webdriver = pytest.importorskip("selenium.webdriver")
    if not (shutil.which("chromium") and shutil.which("chromedriver")):
        pytest.skip("there is no chromium with its chromedriver")
    browser = Browser(webdriver, address, Path(os.environ.get("PICTURES", tmp_path)))
    yield browser
    browser.driver.quit()


@pytest.mark.slow
def test_a_browser_draws_digits_as_they_happen(browser):
    browser.tab("Digits")
    first, *_, final = browser.press()
    assert first.caption.startswith("step 1 of 20")
    assert first.pixels.shape == final.pixels.shape == (64, 320)
    assert np.median(final.pixels) < 20 < 80 < np.median(first.pixels)  # from noise to white on black
    browser.save("digits")
    browser.check("7")
    browser.fill("Guidance scale", 3)
    browser.fill("Seed", 5)
    *_, sevens = browser.press()
    browser.save("sevens")
    browser.choose("Sampler", "heun")
    browser.fill("Sampling timesteps", 10)
    *_, other = browser.press()
    assert re.match(r"step (\d+) of \1,", other.caption)
    assert np.abs(difference(sevens, other)).mean() < np.abs(difference(sevens, final)).mean()


def difference(one: Picture, other: Picture) -> np.ndarray:
    return one.pixels.astype(float) - other.pixels


@pytest.mark.slow
def test_a_browser_is_told_what_is_wrong(browser):
    browser.tab("Digits")
    for label, value, good, message in (
        ("Sampling timesteps", 0, 20, "sampling-timesteps must be between 1 and num_timesteps = 500, got 0"),
        ("Sampling timesteps", 501, 20, "sampling-timesteps must be between 1 and num_timesteps = 500, got 501"),
        ("Guidance scale", -1, 1, "guidance-scale must be at least 0 and finite, got -1"),
        ("Seed", -1, 0, "seed must be between 0 and 2^31 - 1, got -1"),
    ):
        browser.fill(label, value)
        assert browser.complaint() == message
        browser.fill(label, good)
    browser.tab("Complete")
    assert browser.complaint() == "drawing must be a part of a digit (given: left half), got no ink there"
    browser.tab("Between")
    browser.fill("Last seed", -1)
    assert browser.complaint() == "seed must be between 0 and 2^31 - 1, got -1"


@pytest.mark.slow
def test_a_browser_completes_a_drawing(browser):
    browser.tab("Complete")
    browser.draw_half_a_circle()
    for part in live.PARTS:
        browser.check(part)
        *_, final = browser.press()
        shown, *ways = np.split(final.pixels, 5, axis=1)
        inked = shown > 200
        assert 20 < inked.sum() < 100
        assert all((way[inked] > 200).all() for way in ways)
        assert len({way.tobytes() for way in ways}) == 4
        browser.save(part)


@pytest.mark.slow
def test_a_browser_goes_from_one_digit_to_another(browser):
    browser.tab("Between")
    browser.choose("First class", "4")
    browser.choose("Last class", "9")
    *_, final = browser.press()
    assert len({digit.tobytes() for digit in np.split(final.pixels, 9, axis=1)}) == 9
    browser.save("between")


@pytest.mark.slow
def test_the_page_asks_nobody_else_for_anything(browser):
    for name in ("Digits", "Complete", "Between"):
        browser.tab(name)
    assert browser.elsewhere() == set()
