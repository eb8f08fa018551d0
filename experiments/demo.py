"""Open a page, on this machine alone, that draws with a run of experiments/mnist.py (it needs pip install "gradio>=6").

python experiments/demo.py
"""

import support.terminal  # isort: skip  # noqa: F401

import contextlib
import dataclasses
import importlib
import os
import socket
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any, get_args

import numpy as np
from tqdm import tqdm

from support.command_line import one_line_errors, parse_command_line, require
from support.live import PARTS, SHARES, WAYS, Frames, complete, draw_digits, go_between, make_walk
from support.machine import prepare_machine
from support.pictures import as_html, tile, to_pixels
from support.saved_run import Sampler, SavedRun, Source, open_run

CANVAS = 280
PAUSE = 0.1  # seconds between pictures, since each costs the browser time


@dataclasses.dataclass(frozen=True)
class Config(Source):
    host: str = "127.0.0.1"
    """Address to listen on. By default only this machine can open the page; 0.0.0.0 is for everyone who can reach it."""
    port: int = 7860
    """Port to listen on."""
    open_browser: bool = True
    """Open the page in the browser."""


def main() -> None:
    prepare_machine()
    with one_line_errors():
        config = parse_command_line(Config(), __doc__)
        gradio = load_gradio()
        run = open_run(config.workdir)
        require(is_free(config.host, config.port), "port", config.port, f"a free one on {config.host}")
        walk = make_walk(run, run.restore(config.checkpoint).ema_params)

    compile_steps(run, walk)
    print(f"the page is at http://{config.host}:{config.port}; Ctrl-C ends it", file=sys.stderr)
    make_page(gradio, run, walk).launch(
        server_name=config.host,
        server_port=config.port,
        inbrowser=config.open_browser,
        share=False,
        ssr_mode=False,
        quiet=True,
        footer_links=[],
    )


def load_gradio() -> Any:
    """The module, told to report nothing. Raises ValueError if it is not installed."""
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    try:
        return importlib.import_module("gradio")
    except ModuleNotFoundError:
        raise ValueError('the page needs Gradio: pip install "gradio>=6"') from None


def is_free(host: str, port: int) -> bool:
    with contextlib.suppress(OSError), socket.create_server((host, port)):
        return True
    return False


def compile_steps(run: SavedRun, walk: Callable) -> None:
    """Compile the program of each kind of picture, so that no click has to wait for it."""
    sampler, ink = run.default_sampler, np.zeros((CANVAS, CANVAS), np.uint8)
    scales = (1.0, 2.0) if run.config.conditional and not run.config.distilled else (1.0,)
    kinds = [draw_digits(run, walk, [], sampler, 1, scale, 0) for scale in scales]
    if not run.config.distilled:
        kinds += [complete(run, walk, ink, PARTS[0], 0), go_between(run, walk, 0, 0, 1, 1)]
    for frames in tqdm(kinds, "compiling"):
        next(frames)


def make_page(gr: Any, run: SavedRun, walk: Callable) -> Any:
    with gr.Blocks(title="diffusion_jax") as page:
        gr.Markdown(f"# Digits from noise\nNetwork: `{os.path.relpath(run.workdir)}`")
        with gr.Tab("Digits"):
            digits_tab(gr, run, walk)
        if not run.config.distilled:
            with gr.Tab("Complete"):
                completion_tab(gr, run, walk)
            with gr.Tab("Between"):
                between_tab(gr, run, walk)
    return page


def digits_tab(gr: Any, run: SavedRun, walk: Callable) -> None:
    few_calls, conditional, classes = run.config.few_calls, run.config.conditional, list(range(run.config.num_classes))
    samplers = ("ddim", "consistency") if few_calls else get_args(Sampler)
    calls = run.default_calls(run.default_sampler)
    with gr.Row():
        with gr.Column():
            labels = gr.CheckboxGroup(classes, label="Classes (none: all in turn)", visible=conditional)
            sampler = gr.Dropdown(samplers, value=run.default_sampler, label="Sampler")
            steps = gr.Number(calls, precision=0, label="Sampling timesteps (network calls)")
            guidance = gr.Number(1.0, label="Guidance scale", visible=conditional and not run.config.distilled)
            seed = gr.Number(0, precision=0, label="Seed")
            button = gr.Button("Draw", variant="primary")
        with gr.Column(scale=2):
            picture = gr.HTML()
    inputs = [labels, sampler, steps, guidance, seed]
    on_click(gr, button, lambda *values: draw_digits(run, walk, *values), inputs, picture, 10)


def completion_tab(gr: Any, run: SavedRun, walk: Callable) -> None:
    with gr.Row():
        with gr.Column():
            drawing = gr.Sketchpad(
                np.full((CANVAS, CANVAS), 255, np.uint8),  # without a picture, one has to choose the brush first
                label="Draw a part of a digit",
                image_mode="L",
                format="png",
                canvas_size=(CANVAS, CANVAS),
                fixed_canvas=True,
                transforms=(),
                layers=False,
                brush=gr.Brush(default_size=12, colors=["#000000"], color_mode="fixed"),
            )
            part = gr.Radio(PARTS, value=PARTS[0], label="What is given")
            seed = gr.Number(0, precision=0, label="Seed")
            button = gr.Button("Complete", variant="primary")
        with gr.Column(scale=2):
            picture = gr.HTML()

    def frames(drawing: Any, part: str, seed: int) -> Frames:
        return complete(run, walk, drawing and drawing["composite"], part, seed)

    on_click(gr, button, frames, [drawing, part, seed], picture, WAYS + 1)


def between_tab(gr: Any, run: SavedRun, walk: Callable) -> None:
    inputs, classes = [], list(range(run.config.num_classes))
    with gr.Row():
        for name, label, seed in (("First", 3, 0), ("Last", 8, 1)):
            with gr.Column():
                inputs += [
                    gr.Dropdown(
                        classes, value=min(label, len(classes) - 1), label=f"{name} class", visible=run.config.conditional
                    ),
                    gr.Number(seed, precision=0, label=f"{name} seed"),
                ]
    button, picture = gr.Button("Go", variant="primary"), gr.HTML()
    on_click(gr, button, lambda *values: go_between(run, walk, *values), inputs, picture, len(SHARES))


def on_click(gr: Any, button: Any, make_frames: Callable[..., Frames], inputs: list, picture: Any, columns: int) -> None:
    """Show the frames for the inputs' values, or the line of a ValueError about them."""

    def show(*values: Any) -> Iterator[str]:
        try:
            yield from shown(make_frames(*values), columns)
        except ValueError as problem:
            raise gr.Error(str(problem).removeprefix("--"), print_exception=False) from None

    button.click(show, inputs, picture, show_progress="minimal")


def shown(frames: Frames, columns: int) -> Iterator[str]:
    """The frames as HTML, the last one and others as often as PAUSE allows."""
    start, last = time.monotonic(), -np.inf
    for number, steps, images in frames:
        now = time.monotonic()
        if number == steps or now - last >= PAUSE:
            last = now
            yield as_html(tile(to_pixels(images), columns), f"step {number} of {steps}, {now - start:.1f} s")


if __name__ == "__main__":
    main()
