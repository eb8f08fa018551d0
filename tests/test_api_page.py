"""The API page, as CONTRIBUTING.md makes it from the docstrings."""

import warnings

import pdoc

import diffusion_jax


def test_the_page_is_made_without_a_warning_and_has_every_public_name(tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", message=".*flax.training.train_state.TrainState.opt_state")  # Flax's own annotation
        pdoc.render.configure(docformat="markdown", math=True)
        pdoc.pdoc("diffusion_jax", output_directory=tmp_path)
    page = (tmp_path / "diffusion_jax.html").read_text()
    assert all(f'id="{name}"' in page for name in diffusion_jax.__all__)
