"""What accelerator.py measured, as JSON, as Markdown tables and as a plot."""

import json
import platform
import statistics
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

DATA_SHEET = {"H100": {"bfloat16": 989e12, "TF32": 494e12}, "H200": {"bfloat16": 989e12, "TF32": 494e12}}
"""Dense products and additions a second, by the vendor."""


def write_report(out: Path, results: dict[str, Any]) -> None:
    (out / "accelerator.json").write_text(json.dumps(results, indent=2) + "\n")
    (out / "accelerator.md").write_text("\n".join(as_markdown(results)) + "\n")
    if results["training"]:
        plot(out / "accelerator.png", results)


def as_markdown(results: dict[str, Any]) -> list[str]:
    rates, options = results.get("rates", {}), results["options"]
    lines = [
        f"{rates.get('device', 'device unknown')}, Python {platform.python_version()}, "
        f"{versions('jax', 'jaxlib', 'flax', 'torch')}; "
        f"embed_dim {options['embed_dim']} x {options['dim_scales']}, batch {options['batch_size']}; medians (and range)."
    ]
    if rates:
        products = ", ".join(f"{name} {rates[name] / 1e12:.0f} TFLOP/s" for name in ("bfloat16", "TF32"))
        lines += ["", f"Measured rates: {products}, memory {rates['bandwidth'] / 1e12:.2f} TB/s."]
    if results["training"]:
        lines += ["", *training_table(results)]
    if "sampling" in results:
        lines += ["", "| sampling | images | calls | s | first time, s |", "|---|---|---|---|---|"]
        lines += [
            f"| {row['name']} | {row['count']} | {row['calls']} | {row['seconds']:.3g} | {row['first']:.3g} |"
            for row in results["sampling"]
        ]
    if "recipe" in results:
        lines += [
            "",
            "Published recipe: " + ", ".join(f"{name} {value:.4g}" for name, value in results["recipe"].items()) + ".",
        ]
    if results["exactness"]:
        lines += ["", "Exactness: " + ", ".join(f"{name} {value:.3g}" for name, value in results["exactness"].items()) + "."]
    lines += ["", "Left out: " + ("; ".join(f"{name} ({why})" for name, why in results["left out"].items()) or "nothing") + "."]
    return lines


def training_table(results: dict[str, Any]) -> list[str]:
    rates = results.get("rates", {})
    sheet = next((peaks for name, peaks in DATA_SHEET.items() if name in rates.get("device", "")), {})
    lines = [
        "| | training step, ms | images/s | TFLOP/s | of the measured rate | MFU | memory, GB | first step, s |",
        "|---|" + "---|" * 7,
    ]
    for name, row in results["training"].items():
        step, precision = statistics.median(row["seconds"]), "bfloat16" if "bfloat16" in name else "TF32"
        rate = 3 * row["flops"] / step
        share = [
            f"{rate / peak:.0%}" if peak and name != "ours, float32" else ""
            for peak in (rates.get(precision), sheet.get(precision))
        ]
        cells = [
            name,
            f"{1e3 * step:.1f} ({1e3 * min(row['seconds']):.1f} to {1e3 * max(row['seconds']):.1f})",
            f"{row['batch'] / step:,.0f}",
            f"{rate / 1e12:.3g}",
            *share,
            f"{row['memory'] / 1e9:.1f}",
            f"{row['first step']:.1f}",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def versions(*packages: str) -> str:
    found = []
    for package in packages:
        try:
            found.append(f"{package} {version(package)}")
        except PackageNotFoundError:
            found.append(f"no {package}")
    return ", ".join(found)


def plot(file: Path, results: dict[str, Any]) -> None:
    rows, drawn = results["training"], results.get("sampling", [])
    names = list(rows)
    labels = [f"{row['name']}, {row['count']} images, {row['calls']} calls" for row in drawn]
    figure, axes = plt.subplots(
        2, 1, figsize=(9, 0.35 * (len(names) + len(labels)) + 2), layout="constrained",
        height_ratios=[len(names) + 1, len(labels) + 1],
    )  # fmt: skip
    panels = (
        (
            axes[0],
            names,
            [row["batch"] / statistics.median(row["seconds"]) for row in rows.values()],
            "training, images a second",
        ),
        (axes[1], labels, [row["seconds"] for row in drawn], "sampling, seconds"),
    )
    for axis, ticks, values, title in panels:
        bars = axis.barh(
            range(len(ticks)), values, color=["tab:orange" if tick.startswith("ours") else "tab:gray" for tick in ticks]
        )
        axis.set_yticks(range(len(ticks)), ticks)
        axis.bar_label(bars, [f"{value:,.0f}" if value > 100 else f"{value:.3g}" for value in values], padding=3)
        axis.invert_yaxis()
        axis.set_xlabel(title)
        axis.margins(x=0.12)
        axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(file, dpi=120)
    plt.close(figure)
